// One layer of a network on one tile of rows: pre-activations of a panel, its map, and the sum of a skip connection.
#pragma once

#include "mlp.h"

namespace fused_inr {
namespace {

// z of the panel p of each branch, [branch][m][kPanel] `z_stride` apart
template <class T>
void preactivate(const NetworkLayer& l, const PackedLayer<T>& packed, int64_t m, int64_t p, const T* input, T* z,
                 int64_t z_stride) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const int64_t depth = l.in_channels * l.in_channel, panels = panels_of<V>(1, l.features);
  for (int b = 0; b < l.branches; ++b)
    product<V, Left::kTile>(m, b * panels + p, b * panels + p + 1, depth, Operand<T>{input, 0, m * P, l.in_channel},
                            packed.forward, depth * P, z + b * z_stride, m * P, packed.bias, false, nullptr);
}

// a map of the panel p: streams z, parameters to out[0 .. outputs)
template <class T>
void apply(void* function, const NetworkLayer& l, int64_t m, int64_t p, const T* z, int64_t z_stride, T* params,
           T* const* out) {
  constexpr int64_t P = kPanel<Vector<T>>;
  const T* in[kMaxStreams];
  int64_t stride[kMaxStreams];
  for (int b = 0; b < l.branches; ++b) {
    in[b] = z + b * z_stride;
    stride[b] = 1;
  }
  const int64_t first = p * P, count = smaller(P, l.features - first);
  param_streams<T>(l.params, l.param, l.param_stride, first, count, m, params, in + l.branches, stride + l.branches);
  reinterpret_cast<Map<T>>(function)(m * P, in, stride, out);
}

// Of a skip connection: the mean square of a sum of two independent terms is that of each.
constexpr double kSkip = 0.70710678118654752440;

// to = (to + x) / sqrt(2), a panel
template <class T>
void add_skip(const T* x, int64_t size, T* to) {
  using V = Vector<T>;
  const V by(kSkip);
  for (int64_t e = 0; e < size; e += V::size) ((V::load(to + e) + V::load(x + e)) * by).store(to + e);
}

}  // namespace
}  // namespace fused_inr
