// LayerNorm of a tile's rows, and its backward.
#pragma once

#include "mlp_tile.h"

namespace fused_inr {
namespace {

template <class T>
T square_root_of(T x) {
  if constexpr (sizeof(T) == 4)
    return sqrtf(x);
  else
    return ::sqrt(x);
}

// Sums over the columns of rows of the layer's output. f(at, column, sum) adds a vector to each of K sums: `at` from where the
// first row begins in the tile, `column` in panels of one row. What lies beyond a channel's last column does not count, be it a
// NaN.
template <class T>
class RowSums {
  using V = Vector<T>;
  static constexpr int64_t P = kPanel<V>;
  static constexpr int N = Block<V>::vectors;

 public:
  RowSums(const NetworkLayer& l, int64_t panel_size)
      : outputs_(l.outputs), full_(l.features / P), size_(panel_size), rest_(l.features % P != 0) {
    alignas(64) T position[P];
    for (int64_t j = 0; j < P; ++j) position[j] = static_cast<T>(j);
    for (int j = 0; j < N; ++j)
      counts_[j] = V::load(position + j * V::size) < V(static_cast<double>(l.features % P));
  }

  template <int K, class F>
  FI_MEMBER void add(F f, T* result) const {
    V sum[N][K];
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < K; ++k) sum[j][k] = V(0.0);
    int64_t panel = 0;
    for (int c = 0; c < outputs_; ++c) {
      for (const int64_t end = panel + full_; panel < end; ++panel)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) f(panel * size_ + j * V::size, panel * P + j * V::size, sum[j]);
      if (!rest_) continue;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        V before[K];
        for (int k = 0; k < K; ++k) before[k] = sum[j][k];
        f(panel * size_ + j * V::size, panel * P + j * V::size, sum[j]);
        for (int k = 0; k < K; ++k) sum[j][k] = select(counts_[j], sum[j][k], before[k]);
      }
      ++panel;
    }
    for (int k = 0; k < K; ++k) {
      for (int j = 1; j < N; ++j) sum[0][k] += sum[j][k];
      alignas(64) T lane[V::size];
      sum[0][k].store(lane);
      for (int w = V::size / 2; w > 0; w /= 2)
        for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
      result[k] = lane[0];
    }
  }

 private:
  int outputs_;
  int64_t full_, size_;
  bool rest_;
  typename V::Mask counts_[N];
};

// R rows at a time, each for itself: sums are chains of dependent steps, and several fill the time in which one waits.
template <class T, int R>
FI_INLINE void normalise_rows(const NetworkLayer& l, const PackedLayer<T>& packed, const RowSums<T>& sums, int64_t size,
                              const T* y, const T* x, T* hat, T* rstd, T* to) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const T count = static_cast<T>(l.outputs * l.features), eps = static_cast<T>(l.eps);
  T sum[R] = {};
  V mean[R], by[R];
  if (l.centred)
    sums.template add<R>(
        [y](int64_t at, int64_t, V* s) FI_LAMBDA {
          for (int r = 0; r < R; ++r) s[r] += V::load(y + r * P + at);
        },
        sum);
  for (int r = 0; r < R; ++r) mean[r] = V(l.centred ? static_cast<double>(sum[r] / count) : 0.0);
  sums.template add<R>(
      [y, &mean](int64_t at, int64_t, V* s) FI_LAMBDA {
        for (int r = 0; r < R; ++r) {
          const V deviation = V::load(y + r * P + at) - mean[r];
          s[r] = fma(deviation, deviation, s[r]);
        }
      },
      sum);
  for (int r = 0; r < R; ++r) {
    const T scale = T(1) / square_root_of(sum[r] / count + eps);
    if (rstd) rstd[r] = scale;
    by[r] = V(static_cast<double>(scale));
  }
  const V half(kSkip);
  for (int64_t p = 0; p < y_panels<T>(l); ++p)
#pragma GCC unroll 4
    for (int64_t j = 0; j < P; j += V::size) {
      const V gamma = V::load(packed.gamma + p * P + j), beta = V::load(packed.beta + p * P + j);
      for (int r = 0; r < R; ++r) {
        const int64_t at = p * size + r * P + j;
        const V h = (V::load(y + at) - mean[r]) * by[r];
        if (hat) h.store(hat + at);
        V out = fma(h, gamma, beta);
        if (x) out = (out + V::load(x + at)) * half;
        out.store(to + at);
      }
    }
}

// to = gamma * hat + beta of hat = (y - mean) / sqrt(variance + eps), where x is given plus x and over sqrt(2), of m rows. Mean
// first (0 where the norm is not centred: RMSNorm), then squared deviations. hat and 1 / sqrt(..) are kept where they are asked for; y may be hat or to.
template <class T>
void normalise(const NetworkLayer& l, const PackedLayer<T>& packed, int64_t m, const T* y, const T* x, T* hat, T* rstd, T* to) {
  constexpr int64_t P = kPanel<Vector<T>>, R = 4;
  const RowSums<T> sums(l, m * P);
  const auto from = [](auto* p, int64_t at) { return p ? p + at : p; };
  int64_t r = 0;
  for (; r + R <= m; r += R)
    normalise_rows<T, R>(l, packed, sums, m * P, y + r * P, from(x, r * P), from(hat, r * P), from(rstd, r), to + r * P);
  for (; r < m; ++r)
    normalise_rows<T, 1>(l, packed, sums, m * P, y + r * P, from(x, r * P), from(hat, r * P), from(rstd, r), to + r * P);
}

template <class T, int R>
FI_INLINE void normalise_rows_backward(const NetworkLayer& l, const PackedLayer<T>& packed, const RowSums<T>& sums,
                                       int64_t size, const T* hat, const T* rstd, T* g) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const T count = static_cast<T>(l.outputs * l.features);
  const T* gamma = packed.gamma;
  T sum[2 * R];
  sums.template add<2 * R>(
      [g, hat, gamma](int64_t at, int64_t column, V* s) FI_LAMBDA {
        for (int r = 0; r < R; ++r) {
          const V scaled = V::load(g + r * P + at) * V::load(gamma + column);
          s[2 * r] += scaled;
          s[2 * r + 1] = fma(scaled, V::load(hat + r * P + at), s[2 * r + 1]);
        }
      },
      sum);
  V mean[R], along[R], by[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = V(l.centred ? static_cast<double>(sum[2 * r] / count) : 0.0);
    along[r] = V(static_cast<double>(sum[2 * r + 1] / count));
    by[r] = V(static_cast<double>(rstd[r]));
  }
  for (int64_t p = 0; p < y_panels<T>(l); ++p)
#pragma GCC unroll 4
    for (int64_t j = 0; j < P; j += V::size)
      for (int r = 0; r < R; ++r) {
        const int64_t at = p * size + r * P + j;
        const V centred = fma(V::load(g + at), V::load(gamma + p * P + j), -mean[r]);
        (fnma(V::load(hat + at), along[r], centred) * by[r]).store(g + at);
      }
}

// g, the cotangent of hat * gamma + beta, becomes that of y:
// rstd (g gamma - mean(g gamma) - hat mean(g gamma hat)), means over the columns of a row, the first one 0 where not centred
template <class T>
void normalise_backward(const NetworkLayer& l, const PackedLayer<T>& packed, int64_t m, const T* hat, const T* rstd, T* g) {
  constexpr int64_t P = kPanel<Vector<T>>, R = 2;
  const RowSums<T> sums(l, m * P);
  int64_t r = 0;
  for (; r + R <= m; r += R) normalise_rows_backward<T, R>(l, packed, sums, m * P, hat + r * P, rstd + r, g + r * P);
  for (; r < m; ++r) normalise_rows_backward<T, 1>(l, packed, sums, m * P, hat + r * P, rstd + r, g + r * P);
}

}  // namespace
}  // namespace fused_inr
