// The kernels of the generated maps for one scalar type (FUSED_INR_SCALAR), in a table. nvcc compiles this for a device; a
// host compiler (-x c++ -DFI_ONE_LANE=1) makes the same functions run on the host, for tests.
#include "rows.cuh"

#if defined(FUSED_INR_MAPS_HEADER)
#include FUSED_INR_MAPS_HEADER
#else
#include "../generated/activations.h"
#endif

#ifndef FUSED_INR_CHOSEN
#define FUSED_INR_CHOSEN FUSED_INR_ACTIVATIONS
#endif

#define FI_JOINED(a, b) a##b
#define FI_JOIN(a, b) FI_JOINED(a, b)

namespace fused_inr {
namespace {

using T = FUSED_INR_SCALAR;
#define FI_FUNCTION(name, B, C, P, own, constant, level, learnable) \
  struct Map_##name##_##own {                                       \
    template <class V>                                              \
    static FI_MEMBER void run(const V* in, V* out) {                \
      name##_##own<V>(in, out);                                     \
    }                                                               \
  };
#define FI_FUNCTIONS(name, B, C, P) FUSED_INR_LEVELS(FI_FUNCTION, name, B, C, P)
FUSED_INR_CHOSEN(FI_FUNCTIONS)

// without parameters the learnable maps are the constant ones
template <class Own, class Constant, int B, int C, int P, int Level, bool Learnable>
constexpr Kernel kernel_at() {
  using Map = std::conditional_t<(P > 0), Own, Constant>;
  return kernel_of<RowsOf<T, Map, B, C, P, Level, Learnable && (P > 0)>>();
}

#define FI_KERNEL(name, B, C, P, own, constant, level, learnable) \
  kernel_at<Map_##name##_##own, Map_##name##_##constant, B, C, P, level, learnable>(),
#define FI_ROW(name, B, C, P) {#name, B, C, P, {FUSED_INR_LEVELS(FI_KERNEL, name, B, C, P)}},

}  // namespace

#define FI_TABLE FI_JOIN(cuda_maps_, FUSED_INR_SCALAR)
extern const Maps FI_TABLE[] = {FUSED_INR_CHOSEN(FI_ROW){nullptr, 0, 0, 0, {}}};

}  // namespace fused_inr
