// Moments of a map under normal draws: a block draws a chunk once and takes it through the map's jet for setting after
// setting. Sums in float64: of a thread over its draws, of a warp as a tree, over warps in their order. Where there is no
// CUDA compiler the same functions run one thread after the other, with the same sums.
#pragma once

#include "../primitives.h"

#include "../philox.h"
#include "moments.h"
#include "rows.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace fused_inr {
namespace {

constexpr int kOwnDraws = kChunk / kThreads;  // of a thread: draws 4 q .. 4 q + 3 for every kThreads-th q
constexpr int kWarps = kThreads / 32;

// Box-Muller: two standard normals of two words.
FI_INLINE void box_muller(uint32_t even, uint32_t odd, float& first, float& second) {
  using V = Scalar<float>;
  const V u = static_cast<float>(even) * 0x1p-32f + 0x1p-33f;  // in (0, 1]
  const V t = static_cast<float>(static_cast<int32_t>(odd)) * static_cast<float>(3.14159265358979323846 * 0x1p-31);
  const V e = V(-2.0) * fi_log(u);
  const V r = square_root(select(e > V(0.0), e, V(0.0)));
  V s, c;
  fi_sincos(t, s, c);
  first = (r * c).v;
  second = (r * s).v;
}

template <class Jet, int B, int C, int P>
struct MomentsOf {
  using V = Scalar<float>;
  static constexpr int kValues = C * (1 + B), kSums = 3 * kValues;
  static constexpr int64_t kShared = static_cast<int64_t>(sizeof(float)) * B * kChunk;

  static FI_MEMBER int draw_of(int thread, int i) { return 4 * (thread + kThreads * (i >> 2)) + (i & 3); }
  static FI_MEMBER float& normal(float* normals, int b, int thread, int i) {
    return normals[(b * kOwnDraws + i) * kThreads + thread];
  }

  // The normals of a thread's draws; no other thread reads them.
  static FI_MEMBER void thread_draws(const MomentsCall& a, int64_t chunk, int thread, float* normals) {
    const uint64_t first = static_cast<uint64_t>(a.start / 4) + static_cast<uint64_t>(chunk) * (kChunk / 4);
    for (int b = 0; b < B; ++b)
      for (int i = 0; i < kOwnDraws; i += 4) {
        uint32_t x[4];
        philox(first + static_cast<uint64_t>(draw_of(thread, i) / 4), static_cast<uint32_t>(b), a.seed, x);
        box_muller(x[0], x[1], normal(normals, b, thread, i), normal(normals, b, thread, i + 1));
        box_muller(x[2], x[3], normal(normals, b, thread, i + 2), normal(normals, b, thread, i + 3));
      }
  }

  static FI_MEMBER void thread_sums(const MomentsCall& a, int64_t chunk, int64_t g, int thread, float* normals,
                                    double (&sum)[kSums]) {
    FI_UNROLL
    for (int s = 0; s < kSums; ++s) sum[s] = 0.0;
    V in[B + P], out[kValues];
    float sigma[B];
    FI_UNROLL
    for (int b = 0; b < B; ++b) sigma[b] = a.sigmas[g * B + b];
    FI_UNROLL
    for (int p = 0; p < P; ++p) in[B + p] = V(a.params[g * P + p]);
    const int64_t left = a.samples - chunk * kChunk;
    const int count = static_cast<int>(left < kChunk ? left : kChunk);
#if defined(__CUDACC__)
#pragma unroll 1
#endif
    for (int i = 0; i < kOwnDraws; ++i) {
      if (draw_of(thread, i) >= count) continue;
      FI_UNROLL
      for (int b = 0; b < B; ++b) in[b] = V(sigma[b] * normal(normals, b, thread, i));
      Jet::template run<V>(in, out);
      FI_UNROLL
      for (int k = 0; k < kValues; ++k) {
        const double v = static_cast<double>(out[k].v), square = v * v;
        sum[3 * k] += v;
        sum[3 * k + 1] += square;
        sum[3 * k + 2] += square * square;
      }
    }
  }

  static FI_MEMBER double over_warps(const double* parts, int s) {
    double total = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) total += parts[s * kWarps + warp];
    return total;
  }
  static FI_MEMBER double& result(const MomentsCall& a, int64_t chunk, int64_t g, int s) {
    return a.out[(chunk * a.settings + g) * kSums + s];
  }
};

// -- launches

#if defined(__CUDACC__)

inline const char* moments_outcome() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class M>
__global__ void __launch_bounds__(kThreads, 2) moments_of(const __grid_constant__ MomentsCall a) {
  extern __shared__ float normals[];
  __shared__ double parts[2][M::kSums * kWarps];
  const int64_t chunk = blockIdx.x / a.groups, group = blockIdx.x - chunk * a.groups;
  const int thread = threadIdx.x;
  M::thread_draws(a, chunk, thread, normals);
  const int64_t end = (group + 1) * a.own < a.settings ? (group + 1) * a.own : a.settings;
  for (int64_t g = group * a.own; g < end; ++g) {
    double sum[M::kSums];
    M::thread_sums(a, chunk, g, thread, normals, sum);
    double* of_warps = parts[g & 1];  // the other one may still be read
#pragma unroll
    for (int s = 0; s < M::kSums; ++s) {
#pragma unroll
      for (int step = 16; step; step /= 2) sum[s] += __shfl_down_sync(0xffffffffu, sum[s], step);
      if (thread % 32 == 0) of_warps[s * kWarps + thread / 32] = sum[s];
    }
    __syncthreads();
    for (int s = thread; s < M::kSums; s += kThreads) M::result(a, chunk, g, s) = M::over_warps(of_warps, s);
  }
}

template <class M>
const char* run_moments(const MomentsCall& a, void* stream) {
  if (M::kShared > 32 * 1024) {
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(moments_of<M>, limit, static_cast<int>(M::kShared));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return cudaGetErrorString(error);
    }
  }
  const unsigned blocks = static_cast<unsigned>(a.chunks * a.groups);
  moments_of<M><<<blocks, kThreads, static_cast<size_t>(M::kShared), static_cast<cudaStream_t>(stream)>>>(a);
  return moments_outcome();
}

#else

template <class M>
const char* run_moments(const MomentsCall& a, void*) {
  static float normals[M::kShared / sizeof(float)];
  static double sum[kThreads][M::kSums], parts[M::kSums * kWarps];
  for (int64_t block = 0; block < a.chunks * a.groups; ++block) {
    const int64_t chunk = block / a.groups, group = block - chunk * a.groups;
    for (int thread = 0; thread < kThreads; ++thread) M::thread_draws(a, chunk, thread, normals);
    for (int64_t g = group * a.own; g < (group + 1) * a.own && g < a.settings; ++g) {
      for (int thread = 0; thread < kThreads; ++thread) M::thread_sums(a, chunk, g, thread, normals, sum[thread]);
      for (int s = 0; s < M::kSums; ++s)
        for (int warp = 0; warp < kWarps; ++warp) {
          for (int step = 16; step; step /= 2)
            for (int lane = 0; lane < step; ++lane) sum[32 * warp + lane][s] += sum[32 * warp + lane + step][s];
          parts[s * kWarps + warp] = sum[32 * warp][s];
        }
      for (int s = 0; s < M::kSums; ++s) M::result(a, chunk, g, s) = M::over_warps(parts, s);
    }
  }
  return nullptr;
}

#endif

template <class M>
const char* launch_moments(MomentsCall a, void* stream) {
  constexpr int64_t wanted = 1024, most = 64;  // blocks of a call; settings of a block
  if (a.settings == 0 || a.chunks == 0) return nullptr;
  a.own = a.settings * a.chunks / wanted;
  a.own = a.own < 1 ? 1 : a.own > most ? most : a.own;
  a.groups = (a.settings + a.own - 1) / a.own;
  if (a.chunks > 0x7fffffff / a.groups) return "too many blocks: fewer settings or samples";
  return run_moments<M>(a, stream);
}

}  // namespace
}  // namespace fused_inr
