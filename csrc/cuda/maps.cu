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
static_assert(kMaxLevel == 3 && kMaxLearnableLevel == 2, "Maps has a slot for each of these levels");

#define FI_FUNCTION(function)                       \
  struct Map_##function {                           \
    template <class V>                              \
    static FI_MEMBER void run(const V* in, V* out) { \
      function<V>(in, out);                         \
    }                                               \
  };
#define FI_FUNCTIONS(name, B, C, P) \
  FI_FUNCTION(name##_l0)            \
  FI_FUNCTION(name##_l1)            \
  FI_FUNCTION(name##_l2)            \
  FI_FUNCTION(name##_l3)            \
  FI_FUNCTION(name##_p1)            \
  FI_FUNCTION(name##_p2)
FUSED_INR_CHOSEN(FI_FUNCTIONS)

// without parameters the learnable maps are the constant ones
template <class Constant, class Learnable, int B, int C, int P, int Level>
constexpr Kernel learnable_kernel() {
  if constexpr (P > 0) {
    return kernel_of<RowsOf<T, Learnable, B, C, P, Level, true>>();
  } else {
    return kernel_of<RowsOf<T, Constant, B, C, P, Level, false>>();
  }
}

#define FI_ROW(name, B, C, P)                                       \
  {#name, B, C, P,                                                  \
   {kernel_of<RowsOf<T, Map_##name##_l0, B, C, P, 0, false>>(),     \
    kernel_of<RowsOf<T, Map_##name##_l1, B, C, P, 1, false>>(),     \
    kernel_of<RowsOf<T, Map_##name##_l2, B, C, P, 2, false>>(),     \
    kernel_of<RowsOf<T, Map_##name##_l3, B, C, P, 3, false>>(),     \
    learnable_kernel<Map_##name##_l1, Map_##name##_p1, B, C, P, 1>(), \
    learnable_kernel<Map_##name##_l2, Map_##name##_p2, B, C, P, 2>()}},

}  // namespace

#define FI_TABLE FI_JOIN(cuda_maps_, FUSED_INR_SCALAR)
extern const Maps FI_TABLE[] = {FUSED_INR_CHOSEN(FI_ROW){nullptr, 0, 0, 0, {}}};

}  // namespace fused_inr
