// The moments kernels of the generated maps, in a table; and the bare stream of random numbers. Compiled as maps.cu is, but
// in float32 only.
#include "moments.cuh"

#if defined(FUSED_INR_MAPS_HEADER)
#include FUSED_INR_MAPS_HEADER
#else
#include "../generated/activations.h"
#endif

#ifndef FUSED_INR_CHOSEN
#define FUSED_INR_CHOSEN FUSED_INR_ACTIVATIONS
#endif

namespace fused_inr {
namespace {

#define FI_JET(name, B, C, P)                       \
  struct Jet_##name {                               \
    template <class V>                              \
    static FI_MEMBER void run(const V* in, V* out) { \
      name##_j<V>(in, out);                         \
    }                                               \
  };
FUSED_INR_CHOSEN(FI_JET)

}  // namespace

#define FI_MOMENTS(name, B, C, P) {#name, B, C, P, launch_moments<MomentsOf<Jet_##name, B, C, P>>},
extern const Moments cuda_moments[] = {FUSED_INR_CHOSEN(FI_MOMENTS){nullptr, 0, 0, 0, nullptr}};

#if !defined(FUSED_INR_MAPS_HEADER)

namespace {

FI_INLINE void quad_bits(int64_t* out, int64_t start, int64_t quad, uint32_t branch, uint64_t seed) {
  uint32_t x[4];
  philox(static_cast<uint64_t>(start / 4 + quad), branch, seed, x);
  for (int i = 0; i < 4; ++i) out[4 * quad + i] = static_cast<int64_t>(x[i]);
}

#if defined(__CUDACC__)
__global__ void random_bits(int64_t* out, int64_t start, int64_t quads, uint32_t branch, uint64_t seed) {
  const int64_t quad = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (quad < quads) quad_bits(out, start, quad, branch, seed);
}
#endif

}  // namespace

const char* cuda_random_bits(int64_t* out, int64_t start, int64_t count, uint32_t branch, uint64_t seed, void* stream) {
  const int64_t quads = count / 4;
  if (quads == 0) return nullptr;
#if defined(__CUDACC__)
  if (quads > 0x7fffffffll * kThreads) return "too many draws";
  const unsigned blocks = static_cast<unsigned>((quads + kThreads - 1) / kThreads);
  random_bits<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(out, start, quads, branch, seed);
  return moments_outcome();
#else
  (void)stream;
  for (int64_t quad = 0; quad < quads; ++quad) quad_bits(out, start, quad, branch, seed);
  return nullptr;
#endif
}

#endif

}  // namespace fused_inr
