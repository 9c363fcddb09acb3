// The forward of a network with products of bfloat16 (gemm_bfloat16.h), where this capability has them.
#pragma once

#include "gemm_bfloat16.h"
#include "norm.h"

#if FI_BFLOAT16
namespace fused_inr {
namespace {

struct PackedPairs {
  uint16_t* weight = nullptr;
  PackedLayer<float> other;  // bias, gamma and beta
};

int64_t pair_elements(const NetworkLayer& l) {
  return z_panels<float>(l) * kPanel<Vector<float>> * l.in_channels * 2 * pairs_of(l.in_channel);
}

void pack(const Network& n, const PackedPairs* packed, int64_t parts) {
  using V = Vector<float>;
  run_parts(n.parallel, parts, [&](int64_t part) {
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      const Range r = share(z_panels<float>(l), part, parts);
      pack_pairs<V>(static_cast<const float*>(l.weight.data), l.weight.row_stride, l.in_channels, l.in_channel, l.features,
                    r.begin, r.end, packed[i].weight);
      if (packed[i].other.bias) pack_bias<float>(l, r, packed[i].other.bias);
      if (packed[i].other.gamma && part == 0) pack_norm<float>(l, packed[i].other.gamma, packed[i].other.beta);
    }
  });
}

// One thread's memory for a tile: what products read is bfloat16, the rest float32 and, but for what a norm takes, never more
// than a panel of each stream.
struct PairScratch {
  uint16_t* tile[2];
  float *z, *y, *params, *around;
  float* whole;  // a layer's output, where there are norms
};

// As forward_tile; what a layer reads is rounded to bfloat16, pre-activations and maps are float32.
void forward_tile(const NetworkForward& f, const PackedPairs* packed, int64_t row, int64_t m, const PairScratch& s,
                  float* saved) {
  using V = Vector<float>;
  constexpr int64_t P = kPanel<V>;
  const Network& n = f.network;
  uint16_t *in = s.tile[0], *next = s.tile[1];
  const NetworkLayer& first = n.layer[0];
  each_panel<V>(first.in_channel, 0, in_panels<float>(first), [&](int64_t panel, int64_t column, int64_t count) {
    read_panel<float>(n.x, 0, row, m, column, count, s.y);
    narrow_panel<V>(s.y, m, count, in + panel * m * P);
  });
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    const int64_t panels = panels_of<V>(1, l.features), depth = l.in_channels * l.in_channel;
    const int64_t of_panel = 2 * P * l.in_channels * pairs_of(l.in_channel);
    float* const stored = saved && stores(n, i) ? saved : nullptr;
    if (stored) saved += z_panels<float>(l) * m * P;
    // an output, float32, to where it is read
    const auto finish = [&](int c, int64_t p, float* out) {
      const int64_t at = (c * panels + p) * m * P, count = smaller(P, l.features - p * P);
      if (l.skip) {
        widen_bfloat16(in + at, s.around, m * P);
        add_skip<float>(s.around, m * P, out);
      }
      if (i + 1 < n.layers)
        narrow_panel<V>(out, m, count, next + at);
      else
        write_panel<float>(f.y, 0, row, m, c * l.features + p * P, count, out, false);
    };
    for (int64_t p = 0; p < panels; ++p) {
      float* const z = stored ? stored + p * m * P : s.z;
      const int64_t stride = (stored ? panels : 1) * m * P;
      for (int b = 0; b < l.branches; ++b) {
        const int64_t panel = b * panels + p;
        pair_product<V>(m, depth, PairOperand{in, m * P, l.in_channel}, packed[i].weight + panel * of_panel, z + b * stride,
                        packed[i].other.bias ? packed[i].other.bias + panel * P : nullptr);
      }
      float* out[kMaxStreams] = {z};
      if (l.value) {
        for (int c = 0; c < l.outputs; ++c) out[c] = l.norm ? s.whole + (c * panels + p) * m * P : s.y + c * m * P;
        apply<float>(l.value, l, m, p, z, stride, s.params, out);
      } else if (l.norm) {
        __builtin_memcpy(s.whole + p * m * P, z, static_cast<size_t>(m * P) * sizeof(float));
      }
      for (int c = 0; !l.norm && c < l.outputs; ++c) finish(c, p, out[c]);
    }
    if (l.norm) {
      normalise<float>(l, packed[i].other, m, s.whole, nullptr, nullptr, nullptr, s.whole);
      for (int c = 0; c < l.outputs; ++c)
        for (int64_t p = 0; p < panels; ++p) finish(c, p, s.whole + (c * panels + p) * m * P);
    }
    uint16_t* const done = in;
    in = next;
    next = done;
  }
}

void network_forward_bfloat16(const NetworkForward& f) {
  constexpr int64_t P = kPanel<Vector<float>>;
  const Network& n = f.network;
  const Extent<float> extent(n);
  const int64_t threads = threads_for<float>(n), tile = rows_of_tile<float>(n, extent), tiles = (n.rows + tile - 1) / tile;
  float* const saved = static_cast<float*>(f.saved);
  if (saved) saved[0] = static_cast<float>(tile);

  const auto take_packed_pairs = [&](Arena& arena) {
    PackedPairs* packed = arena.take<PackedPairs>(n.layers);
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      PackedPairs of_layer;
      of_layer.weight = arena.take<uint16_t>(pair_elements(l));
      if (l.bias) of_layer.other.bias = arena.take<float>(z_panels<float>(l) * P);
      if (l.norm) {
        of_layer.other.gamma = arena.take<float>(y_panels<float>(l) * P);
        of_layer.other.beta = arena.take<float>(y_panels<float>(l) * P);
      }
      if (packed) packed[i] = of_layer;
    }
    return packed;
  };
  Arena sizes;
  take_packed_pairs(sizes);
  Arena shared(sizes.used());
  const PackedPairs* const packed = take_packed_pairs(shared);
  pack(n, packed, threads);

  const int64_t panel = tile * P;
  const auto take_scratch = [&](Arena& arena) {
    PairScratch s;
    for (uint16_t*& t : s.tile) t = arena.take<uint16_t>(extent.widest * panel);
    s.z = arena.take<float>(extent.branches * panel);
    s.y = arena.take<float>(extent.outputs * panel);
    s.params = extent.expands ? arena.take<float>(extent.params * panel) : nullptr;
    s.around = arena.take<float>(panel);
    s.whole = norms(n) ? arena.take<float>(extent.widest * panel) : nullptr;
    return s;
  };
  Arena scratch_size;
  take_scratch(scratch_size);
  Queue queue;
  run_parts(n.parallel, smaller(threads, tiles), [&](int64_t) {
    Arena arena(scratch_size.used());
    const PairScratch scratch = take_scratch(arena);
    for (int64_t t; (t = queue.next()) < tiles;) {
      const int64_t row = t * tile, m = smaller(tile, n.rows - row);
      forward_tile(f, packed, row, m, scratch, saved ? saved + kSavedHeader + row * extent.saved * P : nullptr);
    }
  });
}

}  // namespace
}  // namespace fused_inr
#endif
