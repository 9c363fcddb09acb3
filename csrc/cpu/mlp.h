// A whole network over tiles of rows: what its passes share, sizes and packed weights.
//
// A tile passes through all layers, and back, while it is in the cache. What is stored for the backward is pre-activations or
// nothing; a loss makes one pass of both directions. Per tile, layer by layer (panels as in gemm.h):
//   forward    z = y_before W^T + b, panel by panel, each at once through its map: y, or y and its derivatives J
//   backward   gy = gz_after W_after, panel by panel, each at once times J: gz, its column sums; gw += gz^T y_before
// A LayerNorm comes when all panels of a layer are there: its statistics are those of whole rows.
#pragma once

#include "tile.h"

namespace fused_inr {
namespace {

// Of the widest layer's columns in a tile: with the weights of a layer it stays in the second-level cache.
constexpr int64_t kTileBytes = 96 << 10;

template <class T>
int64_t in_panels(const NetworkLayer& l) {
  return panels_of<Vector<T>>(l.in_channels, l.in_channel);
}
template <class T>
int64_t z_panels(const NetworkLayer& l) {
  return panels_of<Vector<T>>(l.branches, l.features);
}
template <class T>
int64_t y_panels(const NetworkLayer& l) {
  return panels_of<Vector<T>>(l.outputs, l.features);
}

// Whether a forward stores the layer's z: not that of a last linear layer, which nothing reads again.
inline bool stores(const Network& n, int i) { return n.layer[i].value || i + 1 < n.layers || n.layer[i].norm; }

// What all layers of a network need at most, in panels or streams of one panel.
template <class T>
struct Extent {
  int64_t widest = 1;  // panels of any tile: inputs, pre-activations, outputs
  int64_t saved = 0;   // panels of the pre-activations that a forward stores
  int branches = 1, outputs = 1, params = 0, derivatives = 0;
  bool expands = false;

  explicit Extent(const Network& n) {
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      widest = larger(widest, larger(in_panels<T>(l), larger(z_panels<T>(l), y_panels<T>(l))));
      if (stores(n, i)) saved += z_panels<T>(l);
      branches = branches > l.branches ? branches : l.branches;
      outputs = outputs > l.outputs ? outputs : l.outputs;
      params = params > l.params ? params : l.params;
      const int of_layer = l.outputs * (l.branches + l.params);
      derivatives = derivatives > of_layer ? derivatives : of_layer;
      expands = expands || fused_inr::expands<T>(l.params, l.param_stride);
    }
  }
};

template <class T>
int64_t threads_for(const Network& n) {
  double work = 0;
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    work += static_cast<double>(n.rows * l.branches * l.features) *
            static_cast<double>(2 * l.in_channels * l.in_channel + 16);
  }
  return work < kSerialWork ? 1 : n.threads;
}

template <class T>
int64_t rows_of_tile(const Network& n, const Extent<T>& extent) {
  return tile_rows<T>(n.rows, extent.widest * kPanel<Vector<T>>, kTileBytes, n.threads);
}

// The saved tensor begins with the number of rows of its tiles.
constexpr int64_t kSavedHeader = 16;

template <class T>
int64_t saved_elements(const Network& n) {
  return kSavedHeader + n.rows * Extent<T>(n).saved * kPanel<Vector<T>>;
}

inline bool skips(const Network& n) {
  for (int i = 0; i < n.layers; ++i)
    if (n.layer[i].skip) return true;
  return false;
}

inline bool norms(const Network& n) {
  for (int i = 0; i < n.layers; ++i)
    if (n.layer[i].norm) return true;
  return false;
}

// Whether the outputs of a tile are made before its cotangents, even where pre-activations are stored.
inline bool ascends(const Network& n) { return skips(n) || norms(n); }

// -- weights, packed once a call

template <class T>
struct PackedLayer {
  T *forward = nullptr, *input = nullptr, *bias = nullptr;
  T *gamma = nullptr, *beta = nullptr;  // of a norm, in panels: 1 and 0 where it has none
};

template <class T>
void take_packed(Arena& arena, const Network& n, bool forward, bool input, bool first_input, PackedLayer<T>* packed) {
  constexpr int64_t P = kPanel<Vector<T>>;
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    const int64_t depth = l.in_channels * l.in_channel;
    PackedLayer<T> of_layer;
    if (forward) of_layer.forward = arena.take<T>(z_panels<T>(l) * P * depth);
    if (forward && l.bias) of_layer.bias = arena.take<T>(z_panels<T>(l) * P);
    if (input && (i > 0 || first_input)) of_layer.input = arena.take<T>(in_panels<T>(l) * P * l.branches * l.features);
    if (l.norm) {
      of_layer.gamma = arena.take<T>(y_panels<T>(l) * P);
      of_layer.beta = arena.take<T>(y_panels<T>(l) * P);
    }
    if (packed) packed[i] = of_layer;
  }
}

template <class T>
void pack_bias(const NetworkLayer& l, Range panels, T* packed) {
  constexpr int64_t P = kPanel<Vector<T>>;
  const T* bias = static_cast<const T*>(l.bias);
  each_panel<Vector<T>>(l.features, panels.begin, panels.end, [&](int64_t panel, int64_t first, int64_t count) {
    for (int64_t j = 0; j < P; ++j) packed[panel * P + j] = j < count ? bias[first + j] : T(0);
  });
}

template <class T>
void pack_norm(const NetworkLayer& l, T* packed_gamma, T* packed_beta) {
  constexpr int64_t P = kPanel<Vector<T>>;
  const T *gamma = static_cast<const T*>(l.gamma), *beta = static_cast<const T*>(l.beta);
  each_panel<Vector<T>>(l.features, 0, y_panels<T>(l), [&](int64_t panel, int64_t first, int64_t count) {
    for (int64_t j = 0; j < P; ++j) {
      packed_gamma[panel * P + j] = gamma && j < count ? gamma[first + j] : T(1);
      packed_beta[panel * P + j] = beta && j < count ? beta[first + j] : T(0);
    }
  });
}

template <class T>
void pack(const Network& n, const PackedLayer<T>* packed, int64_t parts) {
  using V = Vector<T>;
  double size = 0;
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    size += static_cast<double>(l.branches * l.features * l.in_channels * l.in_channel);
  }
  parts = size < 50000 ? 1 : parts;
  run_parts(n.parallel, parts, [&](int64_t part) {
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      const int64_t depth = l.in_channels * l.in_channel, columns = l.branches * l.features;
      const T* weight = static_cast<const T*>(l.weight.data);
      if (packed[i].forward) {
        const Range r = share(z_panels<T>(l), part, parts);
        pack_transposed<V>(weight, l.weight.row_stride, depth, l.features, r.begin, r.end, packed[i].forward);
      }
      if (packed[i].input) {
        const Range r = share(in_panels<T>(l), part, parts);
        pack_rows<V>(weight, l.weight.row_stride, columns, l.in_channel, r.begin, r.end, packed[i].input);
      }
      if (packed[i].bias && part == 0) pack_bias<T>(l, {0, z_panels<T>(l)}, packed[i].bias);
      if (packed[i].gamma && part == 0) pack_norm<T>(l, packed[i].gamma, packed[i].beta);
    }
  });
}

}  // namespace
}  // namespace fused_inr
