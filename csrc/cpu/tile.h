// What linear_act and the whole network share: scratch memory, the division of work, tiles of rows to and from memory, and
// maps over panels (gemm.h says how a tile lies).
#pragma once

#include <stdlib.h>

#include <atomic>

#include "capability.h"
#include "convert.h"
#include "engine.h"
#include "gemm.h"

namespace fused_inr {
namespace {

template <class T>
using Vector = Vec<T, FUSED_INR_VECTOR_BYTES>;

// -- memory and threads

// A thread keeps its last few scratch blocks: mapped anew for each call they would cost a page fault per 4 KiB.
class Kept {
 public:
  ~Kept() {
    for (Block& b : blocks_) free(b.data);
  }
  char* take(int64_t bytes) {
    Block* best = nullptr;
    for (Block& b : blocks_)
      if (b.data && b.bytes >= bytes && b.bytes <= 4 * bytes && (!best || b.bytes < best->bytes)) best = &b;
    if (best) {
      char* p = best->data;
      best->data = nullptr;
      return p;
    }
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(bytes)) != 0) abort();
    return static_cast<char*>(p);
  }
  void give_back(char* p, int64_t bytes) {
    if (bytes > kMost) return free(p);
    Block& b = blocks_[next_++ % kBlocks];
    free(b.data);
    b = {p, bytes};
  }

 private:
  static constexpr int kBlocks = 4;
  static constexpr int64_t kMost = 32 << 20;
  struct Block {
    char* data = nullptr;
    int64_t bytes = 0;
  };
  Block blocks_[kBlocks];
  unsigned next_ = 0;
};

Kept& kept() {
  static thread_local Kept blocks;
  return blocks;
}

// Aligned scratch memory, handed out in pieces. An arena without memory only measures.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes) : size_(bytes ? bytes : 64), begin_(kept().take(size_)) {}
  ~Arena() {
    if (begin_) kept().give_back(begin_, size_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(begin_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return begin_ ? p : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  int64_t size_ = 0;
  char* begin_ = nullptr;
  int64_t used_ = 0;
};

template <class F>
void run_parts(Parallel parallel, int64_t parts, F f) {
  if (parts == 1) return f(0);
  parallel(parts, [](void* context, int64_t part) { (*static_cast<F*>(context))(part); }, &f);
}

// Pieces of work, each taken by the thread that is free first: a core that is slowed down by others does not keep the rest
// waiting.
class Queue {
 public:
  int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
};

// Parts of the tiles with sums of their own, added in the order of the parts: with more of them than threads, and a number
// that does not depend on the threads (unless these are many), they can be taken as they come. `bytes`: of one part's sums.
[[maybe_unused]] int64_t sum_parts(int64_t tiles, int64_t threads, int64_t bytes) {
  constexpr int64_t kParts = 16, kTilesEach = 4, kMost = 16 << 20;
  if (threads == 1 || tiles < kParts * kTilesEach) return smaller(threads, tiles);
  return larger(threads, smaller(kParts, kMost / larger(1, bytes)));
}

struct Range {
  int64_t begin, end;
};
Range share(int64_t count, int64_t part, int64_t parts) { return {count * part / parts, count * (part + 1) / parts}; }

// Below this many operations a thread costs more than it brings.
constexpr double kSerialWork = 5e5;

// Rows of a tile: `columns` numbers a row shall fit `bytes`; whole register blocks; work for every thread. Not a number of
// lines at which the panels of a block of rows would all share a few sets of the first-level cache.
template <class T>
int64_t tile_rows(int64_t rows, int64_t columns, int64_t bytes, int64_t parts) {
  constexpr int64_t block = Block<Vector<T>>::rows;
  const int64_t fit = bytes / larger(1, columns * static_cast<int64_t>(sizeof(T)));
  constexpr int64_t lines = kPanel<Vector<T>> * static_cast<int64_t>(sizeof(T)) / 64 > 0
                                ? kPanel<Vector<T>> * static_cast<int64_t>(sizeof(T)) / 64
                                : 1;
  int64_t most = larger(block, smaller(fit, 256) / block * block);
  while (most > 2 * block && most * lines % 16 == 0) most -= block;
  return smaller(most, round_up((rows + parts - 1) / parts, block));
}

// -- a panel to and from rows in memory

// Results larger than this pass by the caches: they would not be there any more when they are read. Not rows so long that
// every line of a panel lies in another page of the memory.
constexpr int64_t kStreamedBytes = 16 << 20, kStreamedRowBytes = 2 << 10;

template <class T>
bool streams(const Rows& to, int64_t rows, int64_t columns) {
#if defined(__AVX__)
  return to.storage == kStorage<T> && to.row_stride * static_cast<int64_t>(sizeof(T)) <= kStreamedRowBytes &&
         rows * columns * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes &&
         reinterpret_cast<uintptr_t>(to.data) % 32 == 0 && to.row_stride * static_cast<int64_t>(sizeof(T)) % 32 == 0 &&
         to.batch_stride * static_cast<int64_t>(sizeof(T)) % 32 == 0;
#else
  (void)to, (void)rows, (void)columns;
  return false;
#endif
}

template <class V>
FI_INLINE void store_streamed(V v, typename V::scalar* to) {
#if defined(__AVX__)
  for (int i = 0; i < V::bytes / 32; ++i) {
    __m256 part;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + 32 * i, 32);
    _mm256_stream_ps(reinterpret_cast<float*>(to) + 8 * i, part);
  }
#else
  v.store(to);
#endif
}

FI_INLINE void finish_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// `count` columns from `first` of m rows, as a panel; 0 beyond
template <class T>
void read_panel(const Rows& from, int64_t batch, int64_t row, int64_t m, int64_t first, int64_t count, T* panel) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  if (from.storage == kStorage<T>) {
    const T* p = address<T>(from, batch, row) + first;
    if (count == P) {
      for (int64_t i = 0; i < m; ++i, p += from.row_stride, panel += P)
        for (int j = 0; j < Block<V>::vectors; ++j) V::load(p + j * V::size).store(panel + j * V::size);
      return;
    }
    for (int64_t i = 0; i < m; ++i, p += from.row_stride, panel += P) {
      for (int64_t j = 0; j < count; ++j) panel[j] = p[j];
      for (int64_t j = count; j < P; ++j) panel[j] = T(0);
    }
    return;
  }
  if constexpr (sizeof(T) == 4) {
    const auto widen = from.storage == Storage::bfloat16 ? widen_bfloat16 : widen_float16;
    for (int64_t i = 0; i < m; ++i, panel += P) {
      widen(address<uint16_t>(from, batch, row + i) + first, panel, count);
      for (int64_t j = count; j < P; ++j) panel[j] = T(0);
    }
  }
}

template <class T>
void write_panel(const Rows& to, int64_t batch, int64_t row, int64_t m, int64_t first, int64_t count, const T* panel,
                 bool streamed) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  if (to.storage == kStorage<T>) {
    T* p = address<T>(to, batch, row) + first;
    if (count == P && streamed) {
      for (int64_t i = 0; i < m; ++i, p += to.row_stride, panel += P)
        for (int j = 0; j < Block<V>::vectors; ++j) store_streamed<V>(V::load(panel + j * V::size), p + j * V::size);
    } else if (count == P) {
      for (int64_t i = 0; i < m; ++i, p += to.row_stride, panel += P)
        for (int j = 0; j < Block<V>::vectors; ++j) V::load(panel + j * V::size).store(p + j * V::size);
    } else {
      for (int64_t i = 0; i < m; ++i, p += to.row_stride, panel += P)
        for (int64_t j = 0; j < count; ++j) p[j] = panel[j];
    }
    return;
  }
  if constexpr (sizeof(T) == 4) {
    const auto narrow = to.storage == Storage::bfloat16 ? narrow_bfloat16 : narrow_float16;
    for (int64_t i = 0; i < m; ++i, panel += P) narrow(panel, address<uint16_t>(to, batch, row + i) + first, count);
  }
}

// columns in `channels` channels of rows, as a tile; its panels lie m * kPanel apart
template <class T>
void read_rows(const Rows& from, int64_t batch, int64_t row, int64_t m, int64_t channels, int64_t channel, T* tile) {
  constexpr int64_t P = kPanel<Vector<T>>;
  each_panel<Vector<T>>(channel, 0, panels_of<Vector<T>>(channels, channel),
                        [&](int64_t panel, int64_t first, int64_t count) {
                          read_panel<T>(from, batch, row, m, first, count, tile + panel * m * P);
                        });
}

template <class T>
void write_rows(const Rows& to, int64_t batch, int64_t row, int64_t m, int64_t channels, int64_t channel, const T* tile,
                bool streamed) {
  constexpr int64_t P = kPanel<Vector<T>>;
  each_panel<Vector<T>>(channel, 0, panels_of<Vector<T>>(channels, channel),
                        [&](int64_t panel, int64_t first, int64_t count) {
                          write_panel<T>(to, batch, row, m, first, count, tile + panel * m * P, streamed);
                        });
}

// lines of those columns, to be fetched ahead
template <class T>
void fetch_rows(Ahead& ahead, const Rows& from, int64_t batch, int64_t row, int64_t m, int64_t first, int64_t count) {
  const int64_t size = from.storage == Storage::float64 ? 8 : from.storage == Storage::float32 ? 4 : 2;
  const char* at = static_cast<const char*>(from.data) + (batch * from.batch_stride + row * from.row_stride + first) * size;
  ahead.add(at, from.row_stride * size, count * size, m);
}

// -- maps over a panel

// The parameters of a map as streams of a panel: one number, or one a feature, then repeated for each row in `expanded`
// [params][m][kPanel].
template <class T>
int param_streams(int params, const void* const* param, const int64_t* param_stride, int64_t first, int64_t count,
                  int64_t m, T* expanded, const T** in, int64_t* stride) {
  constexpr int64_t P = kPanel<Vector<T>>;
  for (int p = 0; p < params; ++p) {
    const T* value = static_cast<const T*>(param[p]);
    stride[p] = param_stride[p];
    in[p] = value;
    if (param_stride[p] == 0) continue;
    T* to = expanded + p * m * P;
    in[p] = to;
    for (int64_t i = 0; i < m; ++i, to += P)
      for (int64_t j = 0; j < P; ++j) to[j] = value[first + (j < count ? j : 0)];
  }
  return params;
}

template <class T>
bool expands(int params, const int64_t* param_stride) {
  for (int p = 0; p < params; ++p)
    if (param_stride[p]) return true;
  return false;
}

// total[j] += the sum of the vectors at(0), at(kPanel), .. of m rows, column j: a tile in the compute type, tiles in double, so
// that the error does not grow with the number of rows
template <class T, class F>
FI_INLINE void add_columns(int64_t m, int64_t count, double* total, F at) {
  using V = Vector<T>;
  constexpr int N = Block<V>::vectors;
  V sum[N];
  for (int j = 0; j < N; ++j) sum[j] = V(0.0);
  for (int64_t i = 0; i < m * kPanel<V>; i += kPanel<V>)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[j] += at(i + j * V::size);
  alignas(64) T column[kPanel<V>];
  for (int j = 0; j < N; ++j) sum[j].store(column + j * V::size);
  for (int64_t j = 0; j < count; ++j) total[j] += static_cast<double>(column[j]);
}

// total[j] += the sum of column j
template <class T>
void add_panel(const T* panel, int64_t m, int64_t count, double* total) {
  add_columns<T>(m, count, total, [panel](int64_t e) FI_LAMBDA { return Vector<T>::load(panel + e); });
}

// total[j] += the sum of a * b in column j
template <class T>
void add_products(const T* a, const T* b, int64_t m, int64_t count, double* total) {
  add_columns<T>(m, count, total,
                 [a, b](int64_t e) FI_LAMBDA { return Vector<T>::load(a + e) * Vector<T>::load(b + e); });
}

// gw[n, k] = the parts' sums in the order of the parts, each [panel of k][n][kPanel] as outer_product leaves it
template <class T>
void add_weight_gradients(Parallel parallel, int64_t threads, int64_t columns, int64_t k_channel, int64_t k_channels,
                          const T* const* partial, int64_t parts, T* gw) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const int64_t depth = k_channels * k_channel;
  const int64_t by = columns * depth < 50000 ? 1 : smaller(threads, columns);
  run_parts(parallel, by, [&](int64_t part) {
    const Range r = share(columns, part, by);
    each_panel<V>(k_channel, 0, panels_of<V>(k_channels, k_channel), [&](int64_t panel, int64_t first, int64_t count) {
      for (int64_t i = r.begin; i < r.end; ++i) {
        const int64_t at = (panel * columns + i) * P;
        T* to = gw + i * depth + first;
        if (count == P) {
#pragma GCC unroll 4
          for (int j = 0; j < Block<V>::vectors; ++j) {
            V sum = V::load(partial[0] + at + j * V::size);
            for (int64_t p = 1; p < parts; ++p) sum += V::load(partial[p] + at + j * V::size);
            sum.store(to + j * V::size);
          }
          continue;
        }
        for (int64_t j = 0; j < count; ++j) {
          T sum = partial[0][at + j];
          for (int64_t p = 1; p < parts; ++p) sum += partial[p][at + j];
          to[j] = sum;
        }
      }
    });
  });
}

}  // namespace
}  // namespace fused_inr
