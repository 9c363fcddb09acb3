// Matrix products over one tile of rows, register-blocked. No threads and no memory of their own: the callers
// (linear_act, the whole network) keep a tile in the cache across several of these.
//
// A tile of m rows lies in panels: columns 0 .. kPanel-1 of all rows, then the next ones, [panel][row][kPanel]. A block of
// rows is then one piece of memory, whatever the width; a panel of columns is at once what a product takes as its right side
// and what an activation takes as one array. Columns come in channels (the branches of a layer, the outputs of an
// activation) of `channel` columns each; a channel starts on a panel of its own, and the numbers beyond its last column are
// never read by a product.
//
//   pack_rows, pack_transposed   a matrix into panels
//   product                      C[m, n] = A[m, depth] B[depth, n] (+ bias), B packed, C in panels
//   outer_product                C[n, k] (+)= A[m, n]^T B[m, k], both tiles in panels
#pragma once

#include <type_traits>

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
FI_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FI_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// panels of `channels` channels of `channel` columns
template <class V>
constexpr int64_t panels_of(int64_t channels, int64_t channel) {
  return channels * ((channel + kPanel<V> - 1) / kPanel<V>);
}

// f(panel, first column, columns) for the panels `begin` .. `end`
template <class V, class F>
FI_INLINE void each_panel(int64_t channel, int64_t begin, int64_t end, F f) {
  const int64_t per_channel = panels_of<V>(1, channel);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t j = p % per_channel * kPanel<V>;
    f(p, p / per_channel * channel + j, smaller(kPanel<V>, channel - j));
  }
}

// packed[panel][k][j] = b[k, column of (panel, j)], b row-major [depth, channels * channel], 0 beyond a channel
template <class V>
void pack_rows(const typename V::scalar* b, int64_t ldb, int64_t depth, int64_t channel, int64_t begin, int64_t end,
               typename V::scalar* packed) {
  using T = typename V::scalar;
  each_panel<V>(channel, begin, end, [&](int64_t panel, int64_t first, int64_t columns) {
    T* to = packed + panel * depth * kPanel<V>;
    for (int64_t k = 0; k < depth; ++k, to += kPanel<V>) {
      const T* row = b + k * ldb + first;
      if (columns == kPanel<V>) {
        for (int i = 0; i < Block<V>::vectors; ++i) V::load(row + i * V::size).store(to + i * V::size);
      } else {
        for (int64_t i = 0; i < columns; ++i) to[i] = row[i];
        for (int64_t i = columns; i < kPanel<V>; ++i) to[i] = T(0);
      }
    }
  });
}

// packed[panel][k][j] = b[column of (panel, j), k], b row-major [channels * channel, depth], 0 beyond a channel
template <class V>
void pack_transposed(const typename V::scalar* b, int64_t ldb, int64_t depth, int64_t channel, int64_t begin, int64_t end,
                     typename V::scalar* packed) {
  using T = typename V::scalar;
  each_panel<V>(channel, begin, end, [&](int64_t panel, int64_t first, int64_t columns) {
    T* to = packed + panel * depth * kPanel<V>;
    for (int64_t i = 0; i < kPanel<V>; ++i) {
      const T* row = b + (first + i) * ldb;
      if (i < columns) {
        for (int64_t k = 0; k < depth; ++k) to[k * kPanel<V> + i] = row[k];
      } else {
        for (int64_t k = 0; k < depth; ++k) to[k * kPanel<V> + i] = T(0);
      }
    }
  });
}

// Memory that will be wanted soon, fetched a few lines at a time between products.
class Ahead {
 public:
  void add(const void* at, int64_t stride, int64_t bytes, int64_t rows) {
    if (rows <= 0 || bytes <= 0 || count_ == kRegions) return;
    // the lines that a row touches if it does not start with one
    region_[count_++] = {static_cast<const char*>(at), stride, bytes + 63, rows};
    lines_ += rows * ((bytes + 127) / 64);
  }
  // all of it within `steps` steps
  void spread(int64_t steps) { per_step_ = lines_ ? (lines_ + steps - 1) / (steps > 0 ? steps : 1) : 0; }
  void step() {
    for (int64_t i = per_step_; i > 0 && current_ < count_; --i) {
      const Region& r = region_[current_];
      __builtin_prefetch(r.at + row_ * r.stride + offset_, 0, 2);
      offset_ += 64;
      if (offset_ >= r.bytes) {
        offset_ = 0;
        if (++row_ == r.rows) {
          row_ = 0;
          ++current_;
        }
      }
    }
  }

 private:
  static constexpr int kRegions = 12;
  struct Region {
    const char* at;
    int64_t stride, bytes, rows;
  };
  Region region_[kRegions];
  int64_t lines_ = 0, per_step_ = 0, row_ = 0, offset_ = 0;
  int count_ = 0, current_ = 0;
};

// The left side of a product. kRows: rows in memory, `row` apart; kTile: a tile in panels, `panel` apart; kColumns: the
// transpose of one panel of a tile.
enum class Left { kRows, kTile, kColumns };

template <class T>
struct Operand {
  const T* data;
  int64_t row = 0;      // kRows
  int64_t panel = 0;    // kTile
  int64_t channel = 0;  // kTile: columns a channel
  int64_t used = 0;     // kTile: columns of the present channel that lie before `data`
};

// `count` steps of a block's depth
template <class V, int R, Left Kind, class Count>
FI_INLINE void steps(Count count, const typename V::scalar* a, int64_t lda, const typename V::scalar*& b,
                     V (&sum)[R][Block<V>::vectors]) {
  using T = typename V::scalar;
  constexpr int N = Block<V>::vectors;
  // two pointers reach all rows by scaled offsets, where one a row would run out of registers
  const T* a0 = a;
  const T* a1 = a + (R / 2) * lda;
  for (int64_t k = 0; k < count; ++k) {
    V row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = V::load(b + j * V::size);
    b += kPanel<V>;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const T value = Kind != Left::kRows ? a0[i * lda] : i < R / 2 ? a0[i * lda] : a1[(i - R / 2) * lda];
      const V broadcast(typename V::Native(value - typename V::Native{}));
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] = fma(broadcast, row[j], sum[i][j]);
    }
    a0 += Kind == Left::kColumns ? kPanel<V> : 1;
    a1 += 1;
  }
}

// What happens to a block of a product before it is stored.
template <class T>
struct Finish {
  const T* bias = nullptr;   // of the panel's columns, added
  bool accumulate = false;   // onto what stands in C
  const T* times = nullptr;  // the result is multiplied by this, which lies as C does
};

// C[R, kPanel] (+)= A B for R rows and one panel, finished; C's rows lie side by side.
template <class V, int R, Left Kind>
__attribute__((noinline)) void block_product(int64_t depth, const Operand<typename V::scalar>& left,
                                             const typename V::scalar* b, typename V::scalar* c,
                                             const Finish<typename V::scalar>& finish) {
  using T = typename V::scalar;
  constexpr int N = Block<V>::vectors;
  constexpr int64_t P = kPanel<V>;
  if (finish.accumulate)
    for (int i = 0; i < R; ++i) __builtin_prefetch(c + i * P, 1, 3);
  V sum[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V(0.0);
  const int64_t lda = Kind == Left::kRows ? left.row : Kind == Left::kTile ? P : 1;
  const T* a = left.data;
  int64_t unused = left.channel - left.used;
  if (Kind != Left::kTile) {
    steps<V, R, Kind>(depth, a, lda, b, sum);
  } else {
    for (;;) {
      const int64_t part = smaller(smaller(P, unused), depth);
      if (part == P) {
        steps<V, R, Kind>(std::integral_constant<int64_t, P>(), a, lda, b, sum);
      } else {
        steps<V, R, Kind>(part, a, lda, b, sum);
      }
      depth -= part;
      if (depth == 0) break;
      a += left.panel;
      unused -= part;
      if (unused == 0) unused = left.channel;
    }
  }
  // last, not first: the partial sums are smaller without it, and so are their rounding errors
  if (const T* bias = finish.bias) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] += V::load(bias + j * V::size);
  }
  const bool accumulate = finish.accumulate;
  if (const T* times = finish.times) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const int64_t at = i * P + j * V::size;
        ((accumulate ? sum[i][j] + V::load(c + at) : sum[i][j]) * V::load(times + at)).store(c + at);
      }
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      T* to = c + i * P + j * V::size;
      (accumulate ? sum[i][j] + V::load(to) : sum[i][j]).store(to);
    }
}

// 14 = 8 + 4 + 2 keeps the instances few
constexpr int rows_of_block(int full, int64_t left) {
  return left >= full ? full : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <class V, Left Kind>
FI_INLINE void block_rows(int rows, int64_t depth, const Operand<typename V::scalar>& a, const typename V::scalar* b,
                          typename V::scalar* c, const Finish<typename V::scalar>& finish) {
  constexpr int full = Block<V>::rows;
  if (rows == full) return block_product<V, full, Kind>(depth, a, b, c, finish);
  if constexpr (full > 8)
    if (rows == 8) return block_product<V, 8, Kind>(depth, a, b, c, finish);
  if constexpr (full > 4)
    if (rows == 4) return block_product<V, 4, Kind>(depth, a, b, c, finish);
  if (rows == 2) return block_product<V, 2, Kind>(depth, a, b, c, finish);
  block_product<V, 1, Kind>(depth, a, b, c, finish);
}

// C[m, panels begin .. end] (+)= A[m, depth] B (+ bias), times `times` where there is one. B's panels lie `b_panel` apart, those
// of C and `times` `c_panel`; c and `times` are those of `begin`, bias that of all panels.
template <class V, Left Kind>
void product(int64_t m, int64_t begin, int64_t end, int64_t depth, const Operand<typename V::scalar>& left,
             const typename V::scalar* packed, int64_t b_panel, typename V::scalar* c, int64_t c_panel,
             const typename V::scalar* bias, bool accumulate, Ahead* ahead, const typename V::scalar* times = nullptr) {
  using T = typename V::scalar;
  Operand<T> a = left;
  int64_t k = 0;
  do {
    // a part of the depth that ends with a panel of A
    int64_t part = 0, panels = 0, used = a.used;
    if (Kind == Left::kTile) {
      const int64_t whole = depth - k < Block<V>::depth * 3 / 2 ? depth - k : Block<V>::depth;
      while (part < whole) {
        const int64_t step = smaller(smaller(kPanel<V>, a.channel - used), depth - k - part);
        part += step;
        ++panels;
        used = used + step == a.channel ? 0 : used + step;
      }
    } else {
      part = depth - k < Block<V>::depth * 3 / 2 ? depth - k : Block<V>::depth;
    }
    for (int64_t j = begin; j < end; ++j) {
      const T* panel = packed + j * b_panel + k * kPanel<V>;
      T* to = c + (j - begin) * c_panel;
      Finish<T> finish{k == 0 && bias ? bias + j * kPanel<V> : nullptr, accumulate || k > 0, nullptr};
      for (int64_t i = 0; i < m;) {
        const int rows = rows_of_block(Block<V>::rows, m - i);
        Operand<T> block = a;
        block.data += Kind == Left::kTile ? i * kPanel<V> : i * a.row;
        if (times && k + part >= depth) finish.times = times + (j - begin) * c_panel + i * kPanel<V>;
        block_rows<V, Kind>(rows, part, block, panel, to + i * kPanel<V>, finish);
        if (ahead) ahead->step();
        i += rows;
      }
    }
    k += part;
    a.data += Kind == Left::kTile ? panels * a.panel : part;
    a.used = used;
  } while (k < depth);
}

template <class V>
constexpr int64_t blocks_of(int64_t m) {
  return (m + Block<V>::rows - 1) / Block<V>::rows;
}

// C (+)= A[m, panels begin .. end]^T B[m, panels of k]: C[panel of k][column of A][kPanel]. A and B in panels, `a_panel` and
// `b_panel` apart, A starting with the panel `begin`. `columns` is the number of all of A's columns.
template <class V>
void outer_product(int64_t m, int64_t channel, int64_t columns, int64_t begin, int64_t end, const typename V::scalar* a,
                   int64_t a_panel, int64_t k_panels, const typename V::scalar* b, int64_t b_panel,
                   typename V::scalar* c, bool accumulate, Ahead* ahead) {
  using T = typename V::scalar;
  for (int64_t j = 0; j < k_panels; ++j) {
    each_panel<V>(channel, begin, end, [&](int64_t panel, int64_t first, int64_t count) {
      T* to = c + (j * columns + first) * kPanel<V>;
      for (int64_t i = 0; i < count;) {
        const int rows = rows_of_block(Block<V>::rows, count - i);
        block_rows<V, Left::kColumns>(rows, m, Operand<T>{a + (panel - begin) * a_panel + i}, b + j * b_panel,
                                      to + i * kPanel<V>, Finish<T>{nullptr, accumulate, nullptr});
        i += rows;
      }
      if (ahead) ahead->step();
    });
  }
}

// Up to so many columns of B the transposed product does less in vain.
constexpr int64_t kNarrow = 4;

// The same for one panel of B with `k_columns` <= kNarrow columns of use: B^T A, its rows written as columns of C. What lies
// beyond them in C stays as it is.
template <class V>
void narrow_outer_product(int64_t m, int64_t channel, int64_t begin, int64_t end,
                          const typename V::scalar* a, int64_t a_panel, int64_t k_columns, const typename V::scalar* b,
                          typename V::scalar* c, bool accumulate) {
  using T = typename V::scalar;
  each_panel<V>(channel, begin, end, [&](int64_t panel, int64_t first, int64_t count) {
    alignas(64) T part[kNarrow * kPanel<V>];
    for (int64_t k = 0; k < k_columns;) {
      const int rows = rows_of_block(static_cast<int>(kNarrow), k_columns - k);
      block_rows<V, Left::kColumns>(rows, m, Operand<T>{b + k}, a + (panel - begin) * a_panel, part + k * kPanel<V>,
                                    Finish<T>{});
      k += rows;
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < k_columns; ++k) {
        T& to = c[(first + i) * kPanel<V> + k];
        to = accumulate ? to + part[k * kPanel<V> + i] : part[k * kPanel<V> + i];
      }
  });
}

}  // namespace
}  // namespace fused_inr
