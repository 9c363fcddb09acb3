// A generated map over rows: one kernel a map, with the bias added on the way in, types converted on both ways, and sums
// over rows in a fixed order. Where there is no CUDA compiler the same functions run one thread after the other.
#pragma once

#include "../primitives.h"
#include "rows.h"

#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fused_inr {
namespace {

// -- one number, or W neighbours, between memory and the compute type

template <class U, int W>
struct alignas(sizeof(U) * W) Pack {
  U v[W];
};

FI_INLINE float from_bfloat16(uint16_t b) { return bit_copy<float>(static_cast<uint32_t>(b) << 16); }
FI_INLINE uint16_t to_bfloat16(float x) {  // to nearest even
  const uint32_t b = bit_copy<uint32_t>(x);
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

FI_INLINE float from_float16(uint16_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bit_copy<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return bit_copy<float>(sign | bit_copy<uint32_t>(bit_copy<float>(rest << 13) * 0x1p112f));
#endif
}
FI_INLINE uint16_t to_float16(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t b = bit_copy<uint32_t>(x), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000)  // subnormal: the addition rounds to multiples of 2^-24
    return static_cast<uint16_t>(sign | (bit_copy<uint32_t>(bit_copy<float>(rest) + 0.5f) - bit_copy<uint32_t>(0.5f)));
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
#endif
}

// What the compute type may be stored as: float64 as itself, float32 also in half types. All else is converted before.
template <class T>
FI_INLINE T load_one(const void* data, int64_t at, Storage storage) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<const T*>(data)[at];
  } else {
    if (storage == Storage::float32) return static_cast<const T*>(data)[at];
    const uint16_t half = static_cast<const uint16_t*>(data)[at];
    return storage == Storage::bfloat16 ? from_bfloat16(half) : from_float16(half);
  }
}

template <class T>
FI_INLINE void store_one(void* data, int64_t at, Storage storage, T x) {
  if constexpr (sizeof(T) == 8) {
    static_cast<T*>(data)[at] = x;
  } else {
    if (storage == Storage::float32)
      static_cast<T*>(data)[at] = x;
    else
      static_cast<uint16_t*>(data)[at] = storage == Storage::bfloat16 ? to_bfloat16(x) : to_float16(x);
  }
}

// `count` of W neighbours, the first at `at`
template <class T, int W>
FI_INLINE void load(const Stream& s, int64_t at, int count, T (&to)[W]) {
  if constexpr (W > 1) {
    if (s.wide) {
      if (s.storage == Storage::float32) {
        const auto pack = *reinterpret_cast<const Pack<T, W>*>(static_cast<const T*>(s.data) + at);
        FI_UNROLL
        for (int e = 0; e < W; ++e) to[e] = pack.v[e];
      } else {
        const auto pack = *reinterpret_cast<const Pack<uint16_t, W>*>(static_cast<const uint16_t*>(s.data) + at);
        const bool brain = s.storage == Storage::bfloat16;
        FI_UNROLL
        for (int e = 0; e < W; ++e) to[e] = brain ? from_bfloat16(pack.v[e]) : from_float16(pack.v[e]);
      }
      return;
    }
  }
  FI_UNROLL
  for (int e = 0; e < W; ++e) to[e] = e < count ? load_one<T>(s.data, at + e * s.column_stride, s.storage) : T(0);
}

template <class T, int W>
FI_INLINE void store(const Stream& s, int64_t at, int count, const T (&from)[W]) {
  if constexpr (W > 1) {
    if (s.wide) {
      if (s.storage == Storage::float32) {
        Pack<T, W> pack;
        FI_UNROLL
        for (int e = 0; e < W; ++e) pack.v[e] = from[e];
        *reinterpret_cast<Pack<T, W>*>(static_cast<T*>(s.data) + at) = pack;
      } else {
        Pack<uint16_t, W> pack;
        const bool brain = s.storage == Storage::bfloat16;
        FI_UNROLL
        for (int e = 0; e < W; ++e) pack.v[e] = brain ? to_bfloat16(from[e]) : to_float16(from[e]);
        *reinterpret_cast<Pack<uint16_t, W>*>(static_cast<uint16_t*>(s.data) + at) = pack;
      }
      return;
    }
  }
  FI_UNROLL
  for (int e = 0; e < W; ++e)
    if (e < count) store_one<T>(s.data, at + e, s.storage, from[e]);
}

// -- one map

// Where a stream of a map comes from, or goes to.
struct StreamOf {
  int group, branch;
  bool column;  // one value a feature, summed over rows where it is an output
};
constexpr StreamOf stream_at(const char* kinds, int B, int C, int P, int stream) {
  int group = 0;
  for (; *kinds; ++kinds) {
    const int streams = *kinds == 'z' ? B : *kinds == 'y' ? C : P;
    if (stream < streams) return *kinds == 'p' ? StreamOf{group + stream, 0, true} : StreamOf{group, stream, false};
    stream -= streams;
    group += *kinds == 'p' ? P : 1;
  }
  return {-1, 0, false};
}

// f(0) .. f(N - 1), each with its number as a type: what a number selects is a register then, never memory
template <class F, int... I>
FI_INLINE void each_of(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
FI_INLINE void each(F&& f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}

// Map: a function object with `template <class V> run(const V* in, V* out)`.
template <class Number, class Map, int B, int C, int P, int Level, bool Learnable>
struct RowsOf {
  using T = Number;
  using V = Scalar<T>;
  static constexpr int kSlot = slot_of(Level, Learnable);
  static constexpr StreamOf input(int stream) { return stream_at(kInputs[kSlot], B, C, P, stream); }
  static constexpr StreamOf output(int stream) { return stream_at(kResults[kSlot], B, C, P, stream); }
  static constexpr int kIn = streams_of(kInputs[kSlot], B, C, P);
  static constexpr int kOut = streams_of(kResults[kSlot], B, C, P);
  static constexpr int kParams = Learnable ? P : 0;
  static constexpr int kBias = Level == 1 ? B : 0;
  static constexpr int kSums = kBias + kParams;
  // what a thread works on at once has to fit its registers
  static constexpr int kWidth = sizeof(T) == 8 || kIn + kOut > 12 ? 1 : kIn + kOut > 6 ? 2 : 4;
  static constexpr int kShared = kSums ? kSums * kWidth * kThreads : 1;
  static_assert(fits(B, C, P), "too many branches, outputs and parameters together");
  static_assert(kShared * sizeof(T) <= 48 * 1024, "the sums of a block fit shared memory");

  struct Place {
    int64_t batch, row_block, feature;
    int row, count;
  };
  static FI_MEMBER Place place(const MapRows& a, uint32_t block, int thread) {
    Place p;
    const int lane = thread & ((1 << a.lane_bits) - 1);
    p.row = thread >> a.lane_bits;
    const uint32_t rest = block / a.tiles;
    p.feature = static_cast<int64_t>((block - rest * a.tiles << a.lane_bits) + lane) * kWidth;
    p.batch = rest / a.row_blocks;
    p.row_block = rest - static_cast<uint32_t>(p.batch) * a.row_blocks;
    const int64_t left = a.features - p.feature;
    p.count = static_cast<int>(left < kWidth ? (left > 0 ? left : 0) : kWidth);
    return p;
  }

  // The rows of one thread; its sums go to `shared`.
  static FI_MEMBER void thread_rows(const MapRows& a, uint32_t block, int thread, T* shared) {
    const Place p = place(a, block, thread);
    V in[kWidth][kIn], out[kWidth][kOut];
    T bias[B][kWidth], sum[kSums ? kSums : 1][kWidth];
    each<kSums>([&](auto s) {
      each<kWidth>([&](auto e) { sum[s][e] = T(0); });
    });
    if (p.count > 0) {
      // what does not depend on the row
      each<kIn>([&](auto i) {
        constexpr StreamOf from = input(i);
        if constexpr (from.column) {
          const Stream& s = a.in[from.group];
          T part[kWidth];
          if (s.data) load<T, kWidth>(s, p.feature * s.column_stride, p.count, part);
          each<kWidth>([&](auto e) { in[e][i] = V(s.data ? part[e] : static_cast<T>(s.value)); });
        }
      });
      if constexpr (Level <= 1)
        each<B>([&](auto k) {
          each<kWidth>([&](auto e) { bias[k][e] = T(0); });
          if (a.bias.data)
            load<T, kWidth>(a.bias, p.batch * a.bias.batch_stride + k * a.features + p.feature, p.count, bias[k]);
        });
      const int64_t step = static_cast<int64_t>(a.row_blocks) * (kThreads >> a.lane_bits);
      for (int64_t row = p.row_block * (kThreads >> a.lane_bits) + p.row; row < a.rows; row += step) {
        each<kIn>([&](auto i) {
          constexpr StreamOf from = input(i);
          if constexpr (!from.column) {
            const Stream& s = a.in[from.group];
            T part[kWidth];
            load<T, kWidth>(s, p.batch * s.batch_stride + row * s.row_stride + (from.branch * a.features + p.feature) * s.column_stride,
                            p.count, part);
            if constexpr (Level <= 1 && from.group == 0) {
              // a bias of zeros would turn -0 into 0
              each<kWidth>([&](auto e) { part[e] = a.bias.data ? part[e] + bias[from.branch][e] : part[e]; });
              if constexpr (Level == 0)
                if (a.z.data) store<T, kWidth>(a.z, start(a, a.z, p, row, from.branch), p.count, part);
            }
            each<kWidth>([&](auto e) { in[e][i] = V(part[e]); });
          }
        });
        each<kWidth>([&](auto e) { Map::template run<V>(in[e], out[e]); });
        each<kOut>([&](auto o) {
          constexpr StreamOf to = output(o);
          if constexpr (to.column) {
            constexpr int s = kBias + to.group - 1;  // parameters come after z
            each<kWidth>([&](auto e) { sum[s][e] += out[e][o].v; });
          } else {
            T part[kWidth];
            each<kWidth>([&](auto e) { part[e] = out[e][o].v; });
            const Stream& s = a.out[to.group];
            if (s.data) store<T, kWidth>(s, start(a, s, p, row, to.branch), p.count, part);
            if constexpr (kBias > 0 && to.group == 0) each<kWidth>([&](auto e) { sum[to.branch][e] += part[e]; });
          }
        });
      }
    }
    each<kSums>([&](auto s) {
      each<kWidth>([&](auto e) { shared[(s * kWidth + e) * kThreads + thread] = sum[s][e]; });
    });
  }
  // where a row of an output begins for this thread
  static FI_MEMBER int64_t start(const MapRows& a, const Stream& s, const Place& p, int64_t row, int branch) {
    return p.batch * s.batch_stride + row * s.row_stride + branch * a.features + p.feature;
  }

  // The sums of a block, from those of its threads, row after row.
  static FI_MEMBER void block_sums(const MapRows& a, uint32_t block, int thread, const T* shared) {
    const int lanes = 1 << a.lane_bits;
    for (int item = thread; item < kSums * kWidth * lanes; item += kThreads) {
      const int lane = item & (lanes - 1), e = (item >> a.lane_bits) % kWidth, s = (item >> a.lane_bits) / kWidth;
      const Sum& target = a.sum[s];
      if (!target.data) continue;
      const Place p = place(a, block, lane);
      if (e >= p.count) continue;
      T total = T(0);
      for (int row = 0; row < kThreads; row += lanes) total += shared[(s * kWidth + e) * kThreads + row + lane];
      if (a.row_blocks == 1)
        store_one<T>(target.data, p.batch * target.batch_stride + p.feature + e, target.storage, total);
      else
        static_cast<T*>(a.partial)[((p.batch * a.row_blocks + p.row_block) * kSums + s) * a.features + p.feature + e] = total;
    }
  }
};

// -- the sum of the blocks' sums: 32 features a block, a group of threads for every eighth row block

template <class T>
struct FinishSums {
  static constexpr int kLanes = 32, kRows = kThreads / kLanes;

  static FI_MEMBER uint32_t tiles(const MapRows& a) { return static_cast<uint32_t>((a.features + kLanes - 1) / kLanes); }

  static FI_MEMBER bool find(const MapRows& a, int sums, uint32_t block, int thread, int64_t& batch, int& s, int64_t& feature) {
    const uint32_t n = tiles(a), rest = block / n;
    feature = static_cast<int64_t>(block - rest * n) * kLanes + thread % kLanes;
    s = static_cast<int>(rest % sums);
    batch = rest / sums;
    return feature < a.features && a.sum[s].data;
  }
  static FI_MEMBER void thread_rows(const MapRows& a, int sums, uint32_t block, int thread, T* shared) {
    int64_t batch, feature;
    int s;
    T total = T(0);
    if (find(a, sums, block, thread, batch, s, feature)) {
      const T* partial = static_cast<const T*>(a.partial) + (batch * a.row_blocks * sums + s) * a.features + feature;
      for (int64_t row = thread / kLanes; row < a.row_blocks; row += kRows) total += partial[row * sums * a.features];
    }
    shared[thread] = total;
  }
  static FI_MEMBER void block_sums(const MapRows& a, int sums, uint32_t block, int thread, const T* shared) {
    int64_t batch, feature;
    int s;
    if (thread >= kLanes || !find(a, sums, block, thread, batch, s, feature)) return;
    T total = T(0);
    for (int row = 0; row < kRows; ++row) total += shared[row * kLanes + thread];
    store_one<T>(a.sum[s].data, batch * a.sum[s].batch_stride + feature, a.sum[s].storage, total);
  }
};

// -- launches

#if defined(__CUDACC__)

template <class Rows>
__global__ void __launch_bounds__(kThreads, sizeof(typename Rows::T) == 8 ? 1 : 2) map_rows(const __grid_constant__ MapRows a) {
  __shared__ typename Rows::T shared[Rows::kShared];
  Rows::thread_rows(a, blockIdx.x, threadIdx.x, shared);
  if (Rows::kSums) {
    __syncthreads();
    Rows::block_sums(a, blockIdx.x, threadIdx.x, shared);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) finish_sums(const __grid_constant__ MapRows a, int sums) {
  __shared__ T shared[kThreads];
  FinishSums<T>::thread_rows(a, sums, blockIdx.x, threadIdx.x, shared);
  __syncthreads();
  FinishSums<T>::block_sums(a, sums, blockIdx.x, threadIdx.x, shared);
}

inline const char* outcome() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Rows>
const char* run(const MapRows& a, int64_t blocks, void* stream) {
  map_rows<Rows><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return outcome();
}

template <class T>
const char* finish(const MapRows& a, int sums, void* stream) {
  const unsigned blocks = static_cast<unsigned>(a.batch * sums) * FinishSums<T>::tiles(a);
  finish_sums<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, sums);
  return outcome();
}

#else

template <class Rows>
const char* run(const MapRows& a, int64_t blocks, void*) {
  static typename Rows::T shared[Rows::kShared];
  for (uint32_t block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < kThreads; ++thread) Rows::thread_rows(a, block, thread, shared);
    for (int thread = 0; thread < kThreads; ++thread) Rows::block_sums(a, block, thread, shared);
  }
  return nullptr;
}

template <class T>
const char* finish(const MapRows& a, int sums, void*) {
  T shared[kThreads];
  for (uint32_t block = 0; block < static_cast<uint32_t>(a.batch * sums) * FinishSums<T>::tiles(a); ++block) {
    for (int thread = 0; thread < kThreads; ++thread) FinishSums<T>::thread_rows(a, sums, block, thread, shared);
    for (int thread = 0; thread < kThreads; ++thread) FinishSums<T>::block_sums(a, sums, block, thread, shared);
  }
  return nullptr;
}

#endif

// Whether W neighbours can be moved together wherever they stand in `s`.
inline bool is_wide(const Stream& s, int width, int64_t features) {
  if (!s.data || width == 1 || s.storage == Storage::float64) return false;
  const int64_t size = s.storage == Storage::float32 ? 4 : 2;
  return s.column_stride == 1 && features % width == 0 && s.row_stride % width == 0 && s.batch_stride % width == 0 &&
         reinterpret_cast<uintptr_t>(s.data) % static_cast<uintptr_t>(size * width) == 0;
}

template <class Rows>
const char* launch(MapRows a, void* stream) {
  bool summed = false;
  for (int s = 0; s < Rows::kSums; ++s) summed = summed || a.sum[s].data;
  const Plan p = plan(a.batch, a.rows, a.features, Rows::kWidth, Rows::kSums);
  a.lane_bits = p.lane_bits;
  a.tiles = static_cast<uint32_t>(p.tiles);
  a.row_blocks = static_cast<uint32_t>(p.row_blocks);
  for (Stream& s : a.in) s.wide = is_wide(s, Rows::kWidth, a.features);
  for (Stream& s : a.out) s.wide = is_wide(s, Rows::kWidth, a.features);
  a.bias.wide = is_wide(a.bias, Rows::kWidth, a.features);
  a.z.wide = is_wide(a.z, Rows::kWidth, a.features);
  const int64_t blocks = a.batch * p.row_blocks * p.tiles;
  if (blocks == 0 || a.features == 0) return nullptr;
  if (blocks > 0x7fffffff) return "too many blocks: fewer features or a smaller batch";
  const char* error = run<Rows>(a, blocks, stream);
  return error || !summed || p.row_blocks == 1 ? error : finish<typename Rows::T>(a, Rows::kSums, stream);
}

template <class Rows>
constexpr Kernel kernel_of() {
  return {launch<Rows>, Rows::kWidth, Rows::kSums};
}

}  // namespace
}  // namespace fused_inr
