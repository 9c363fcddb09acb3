// The forward of a whole network, for one capability, and how fast its products could be at best.
#include "mlp_bfloat16.h"
#include "norm.h"

namespace fused_inr {
namespace {

template <class T>
void forward_tile(const NetworkForward& f, const PackedLayer<T>* packed, int64_t row, int64_t m, T* const* buffer, T* z,
                  T* params, T* saved, bool streamed) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Network& n = f.network;
  read_rows<T>(n.x, 0, row, m, n.layer[0].in_channels, n.layer[0].in_channel, buffer[0]);
  const T* in = buffer[0];
  T* y = buffer[1];
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    const int64_t panels = panels_of<V>(1, l.features);
    T* const stored = saved && stores(n, i) ? saved : nullptr;
    if (stored) saved += z_panels<T>(l) * m * P;
    T* const linear = stored ? stored : y;  // of the identity: its output
    for (int64_t p = 0; p < panels; ++p) {
      if (!l.value) {
        preactivate<T>(l, packed[i], m, p, in, linear + p * m * P, panels * m * P);
        continue;
      }
      T* const to = stored ? stored + p * m * P : z;
      const int64_t stride = (stored ? panels : 1) * m * P;
      preactivate<T>(l, packed[i], m, p, in, to, stride);
      T* out[kMaxStreams];
      for (int c = 0; c < l.outputs; ++c) out[c] = y + (c * panels + p) * m * P;
      apply<T>(l.value, l, m, p, to, stride, params, out);
      for (int c = 0; l.skip && !l.norm && c < l.outputs; ++c) add_skip<T>(in + (c * panels + p) * m * P, m * P, out[c]);
    }
    if (l.norm) {
      normalise<T>(l, packed[i], m, l.value ? y : linear, l.skip ? in : nullptr, nullptr, nullptr, y);
    } else if (!l.value && stored) {
      in = stored;
      continue;
    }
    in = y;
    y = in == buffer[0] ? buffer[1] : buffer[0];
  }
  const NetworkLayer& last = n.layer[n.layers - 1];
  write_rows<T>(f.y, 0, row, m, last.outputs, last.features, in, streamed);
}

template <class T>
void network_forward(const NetworkForward& f) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Network& n = f.network;
  if (n.rows == 0) return;
#if FI_BFLOAT16
  if constexpr (sizeof(T) == 4)
    if (n.bfloat16) return network_forward_bfloat16(f);
#endif
  const Extent<T> extent(n);
  const int64_t threads = threads_for<T>(n), tile = rows_of_tile<T>(n, extent), tiles = (n.rows + tile - 1) / tile;
  const int64_t parts = smaller(threads, tiles);
  T* const saved = static_cast<T*>(f.saved);
  if (saved) saved[0] = static_cast<T>(tile);

  Arena sizes;
  take_packed<T>(sizes, n, true, false, false, nullptr);
  sizes.take<PackedLayer<T>>(n.layers);
  Arena shared(sizes.used());
  PackedLayer<T>* packed = shared.take<PackedLayer<T>>(n.layers);
  take_packed<T>(shared, n, true, false, false, packed);
  pack<T>(n, packed, threads);

  const NetworkLayer& last = n.layer[n.layers - 1];
  const bool streamed = streams<T>(f.y, n.rows, last.outputs * last.features);
  const int64_t panel = tile * P;
  Queue queue;
  run_parts(n.parallel, parts, [&](int64_t) {
    Arena arena((2 * extent.widest + extent.branches + extent.params + 1) * panel * static_cast<int64_t>(sizeof(T)) + 512);
    T* const buffer[] = {arena.take<T>(extent.widest * panel), arena.take<T>(extent.widest * panel)};
    T* z = arena.take<T>(extent.branches * panel);
    T* params = extent.expands ? arena.take<T>(extent.params * panel) : nullptr;
    for (int64_t t; (t = queue.next()) < tiles;) {
      const int64_t row = t * tile, m = smaller(tile, n.rows - row);
      T* const of_tile = saved ? saved + kSavedHeader + row * extent.saved * P : nullptr;
      forward_tile<T>(f, packed, row, m, buffer, z, params, of_tile, streamed);
    }
    finish_streams();
  });
}

// -- the floor

template <class T>
void product_floor(double operations, int64_t width, Parallel parallel, int threads) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const int64_t m = tile_rows<T>(1 << 20, round_up(width, P), kTileBytes, 1), panels = panels_of<V>(1, width);
  // a layer of a tile, as often as it takes; a thread takes the next when it is done
  const int64_t repeats = static_cast<int64_t>(operations / (2.0 * static_cast<double>(m * panels * P * width))) + 1;
  Queue queue;
  run_parts(parallel, smaller(threads, repeats), [&](int64_t) {
    Arena arena((2 * m * panels * P + panels * P * width) * static_cast<int64_t>(sizeof(T)) + 256);
    T* a = arena.take<T>(m * panels * P);
    T* c = arena.take<T>(m * panels * P);
    T* b = arena.take<T>(panels * P * width);
    for (int64_t i = 0; i < m * panels * P; ++i) a[i] = T(0.5);
    for (int64_t i = 0; i < panels * P * width; ++i) b[i] = T(0.25);
    while (queue.next() < repeats)
      product<V, Left::kTile>(m, 0, panels, width, Operand<T>{a, 0, m * P, width}, b, width * P, c, m * P, nullptr, false,
                              nullptr);
  });
}

}  // namespace

#define FI_NETWORK(type)                                                                                             \
  int64_t FI_JOIN(FI_EXPORTED(network_saved), type)(const Network& n) { return saved_elements<type>(n); }            \
  void FI_JOIN(FI_EXPORTED(network_forward), type)(const NetworkForward& f) { network_forward<type>(f); }            \
  void FI_JOIN(FI_EXPORTED(product_floor), type)(double operations, int64_t width, Parallel p, int threads) {        \
    product_floor<type>(operations, width, p, threads);                                                              \
  }
FI_NETWORK(float)
FI_NETWORK(double)
extern const bool FI_EXPORTED(multiplies_bfloat16);
const bool FI_EXPORTED(multiplies_bfloat16) = FI_BFLOAT16;

}  // namespace fused_inr
