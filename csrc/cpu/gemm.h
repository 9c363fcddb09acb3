// Matrix products of one tile of rows, register-blocked. No threads and no memory of their own: the callers
// (linear_act, later the whole network) keep a tile in the cache across several of these.
//
//   pack_rows, pack_transposed   a matrix into panels of kPanel columns, zero beyond its edge
//   product                      C[m, n] = A[m, depth] B[depth, n] (+ bias), B packed
//   outer_product                C[n, k] (+)= A[m, n]^T B[m, k]
#pragma once

#include "vec.h"

namespace fused_inr {
namespace {

template <class V>
struct Block {
  // Accumulators plus one row of B plus one broadcast fill the registers: 14 * 2 + 2 + 1 of 32 with AVX-512,
  // 6 * 2 + 2 + 1 of 16 with AVX2. Without fused multiply-add the product wants a register too.
  static constexpr int rows = V::bytes == 64 ? 14 : V::bytes == 32 || FI_HAS_FMA ? 6 : 4;
  static constexpr int vectors = 2;
  static constexpr int panel = vectors * V::size;
  // The part of a panel that stays in the first-level cache while the rows pass.
  static constexpr int64_t depth = 16384 / (panel * static_cast<int>(sizeof(typename V::scalar)));
};

template <class V>
constexpr int64_t kPanel = Block<V>::panel;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// elements that a packed [depth, n] matrix takes
template <class V>
constexpr int64_t packed_size(int64_t depth, int64_t n) {
  return round_up(n, kPanel<V>) * depth;
}

// packed[j / panel][k][j % panel] = b[k, j], b row-major [depth, n]; panels first .. last
template <class V>
void pack_rows(const typename V::scalar* b, int64_t ldb, int64_t depth, int64_t n, typename V::scalar* packed) {
  using T = typename V::scalar;
  for (int64_t j = 0; j < n; j += kPanel<V>) {
    const int64_t columns = n - j < kPanel<V> ? n - j : kPanel<V>;
    for (int64_t k = 0; k < depth; ++k, packed += kPanel<V>) {
      const T* row = b + k * ldb + j;
      if (columns == kPanel<V>) {
        for (int i = 0; i < Block<V>::vectors; ++i) V::load(row + i * V::size).store(packed + i * V::size);
      } else {
        for (int64_t i = 0; i < columns; ++i) packed[i] = row[i];
        for (int64_t i = columns; i < kPanel<V>; ++i) packed[i] = T(0);
      }
    }
  }
}

// packed[j / panel][k][j % panel] = b[j, k], b row-major [n, depth]
template <class V>
void pack_transposed(const typename V::scalar* b, int64_t ldb, int64_t depth, int64_t n, typename V::scalar* packed) {
  using T = typename V::scalar;
  for (int64_t j = 0; j < n; j += kPanel<V>, packed += kPanel<V> * depth) {
    for (int64_t i = 0; i < kPanel<V>; ++i) {
      const T* row = b + (j + i) * ldb;
      T* column = packed + i;
      if (j + i < n) {
        for (int64_t k = 0; k < depth; ++k) column[k * kPanel<V>] = row[k];
      } else {
        for (int64_t k = 0; k < depth; ++k) column[k * kPanel<V>] = T(0);
      }
    }
  }
}

// C[R, columns] (+)= A B for R rows and one panel. A's element (i, k) is a[i * a_row + k * a_step].
template <class V, int R, bool Columns>
__attribute__((noinline)) void block_product(int64_t depth, const typename V::scalar* a, int64_t lda,
                                             const typename V::scalar* b, int64_t ldb, typename V::scalar* c,
                                             int64_t ldc, int64_t columns, const typename V::scalar* bias,
                                             bool accumulate) {
  using T = typename V::scalar;
  constexpr int N = Block<V>::vectors;
  V sum[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V(0.0);
  // two pointers reach all rows by scaled offsets, where one a row would run out of registers
  const T* a0 = a;
  const T* a1 = a + (R / 2) * lda;
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    V row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = V::load(b + j * V::size);
    b += ldb;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const T value = Columns ? a0[i] : i < R / 2 ? a0[i * lda] : a1[(i - R / 2) * lda];
      const V broadcast(typename V::Native(value - typename V::Native{}));
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] = fma(broadcast, row[j], sum[i][j]);
    }
    a0 += Columns ? R : 1;
    a1 += 1;
  }
  // last, not first: the partial sums are smaller without it, and so are their rounding errors
  if (bias) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] += V::load(bias + j * V::size);
  }
  if (columns == kPanel<V>) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        T* to = c + i * ldc + j * V::size;
        (accumulate ? sum[i][j] + V::load(to) : sum[i][j]).store(to);
      }
  } else {
    alignas(64) T edge[R][kPanel<V>];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j].store(&edge[i][j * V::size]);
    for (int i = 0; i < R; ++i)
      for (int64_t j = 0; j < columns; ++j) c[i * ldc + j] = accumulate ? c[i * ldc + j] + edge[i][j] : edge[i][j];
  }
}

// The same for any number of rows up to Block::rows; 14 = 8 + 4 + 2 keeps the instances few.
constexpr int rows_of_block(int full, int64_t left) {
  return left >= full ? full : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <class V, bool Columns>
FI_INLINE void block_rows(int rows, int64_t depth, const typename V::scalar* a, int64_t lda,
                          const typename V::scalar* b, int64_t ldb, typename V::scalar* c, int64_t ldc,
                          int64_t columns, const typename V::scalar* bias, bool accumulate) {
  constexpr int full = Block<V>::rows;
  if (rows == full) return block_product<V, full, Columns>(depth, a, lda, b, ldb, c, ldc, columns, bias, accumulate);
  if constexpr (full > 8)
    if (rows == 8) return block_product<V, 8, Columns>(depth, a, lda, b, ldb, c, ldc, columns, bias, accumulate);
  if constexpr (full > 4)
    if (rows == 4) return block_product<V, 4, Columns>(depth, a, lda, b, ldb, c, ldc, columns, bias, accumulate);
  if (rows == 2) return block_product<V, 2, Columns>(depth, a, lda, b, ldb, c, ldc, columns, bias, accumulate);
  block_product<V, 1, Columns>(depth, a, lda, b, ldb, c, ldc, columns, bias, accumulate);
}

// C[m, n] = A[m, depth] B + bias. `bias` is padded to whole panels, or null for 0.
template <class V>
void product(int64_t m, int64_t n, int64_t depth, const typename V::scalar* a, int64_t lda,
             const typename V::scalar* packed, typename V::scalar* c, int64_t ldc, const typename V::scalar* bias) {
  using T = typename V::scalar;
  int64_t k = 0;
  do {
    const int64_t part = depth - k < Block<V>::depth * 3 / 2 ? depth - k : Block<V>::depth;
    for (int64_t j = 0; j < n; j += kPanel<V>) {
      const int64_t columns = n - j < kPanel<V> ? n - j : kPanel<V>;
      const T* panel = packed + j * depth + k * kPanel<V>;
      for (int64_t i = 0; i < m;) {
        const int rows = rows_of_block(Block<V>::rows, m - i);
        block_rows<V, false>(rows, part, a + i * lda + k, lda, panel, kPanel<V>, c + i * ldc + j, ldc, columns,
                             k == 0 && bias ? bias + j : nullptr, k > 0);
        i += rows;
      }
    }
    k += part;
  } while (k < depth);
}

template <int R, class T>
FI_INLINE void gather_columns(int64_t m, const T* from, int64_t lda, T* to) {
  for (int64_t p = 0; p < m; ++p, to += R, from += lda) __builtin_memcpy(to, from, R * sizeof(T));
}

// C[n, k] (+)= A[m, n]^T B[m, k], B packed over its columns; `column` has room for m * Block::rows.
template <class V>
void outer_product(int64_t m, int64_t n, int64_t k, const typename V::scalar* a, int64_t lda,
                   const typename V::scalar* packed, typename V::scalar* c, int64_t ldc, bool accumulate,
                   typename V::scalar* column) {
  using T = typename V::scalar;
  for (int64_t i = 0; i < n;) {
    const int rows = rows_of_block(Block<V>::rows, n - i);
    if (rows == Block<V>::rows) {
      gather_columns<Block<V>::rows>(m, a + i, lda, column);
    } else {
      T* to = column;
      const T* from = a + i;
      for (int64_t p = 0; p < m; ++p, to += rows, from += lda)
        for (int r = 0; r < rows; ++r) to[r] = from[r];
    }
    for (int64_t j = 0; j < k; j += kPanel<V>) {
      const int64_t columns = k - j < kPanel<V> ? k - j : kPanel<V>;
      block_rows<V, true>(rows, m, column, 0, packed + j * m, kPanel<V>, c + i * ldc + j, ldc, columns, nullptr,
                          accumulate);
    }
    i += rows;
  }
}

}  // namespace
}  // namespace fused_inr
