// From FUSED_INR_ACTIVATIONS(X) to functions of the C ABI, and to rows of a table: FUSED_INR_ACTIVATIONS(FI_MAPS) and (FI_ROW)
// in a scope that has the scalar `T` and the vector `V`.
#pragma once

#include "map.h"

namespace fused_inr {

#define FI_MAP(function, B, P, In, Out)                                                                   \
  void map_##function(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {              \
    run_map<V, In, Out, B, P>([](const auto* a, auto* r) FI_LAMBDA { function(a, r); }, n, in, stride, out); \
  }
#define FI_LEVEL_MAP(name, B, C, P, own, constant, level, learnable)                          \
  FI_MAP(name##_##own, B, P, streams_of(kInputs[slot_of(level, learnable)], B, C, P),         \
         streams_of(kResults[slot_of(level, learnable)], B, C, P))
#define FI_MAPS(name, B, C, P)                     \
  FUSED_INR_LEVELS(FI_LEVEL_MAP, name, B, C, P)    \
  FI_MAP(name##_j, B, P, B + P, C + C * B)         \
  FI_MAP(name##_jp, B, P, B + P, C + C * (B + P))

#define FI_ADDRESS(name, B, C, P, own, constant, level, learnable) (void*)map_##name##_##own,
#define FI_ROW(name, B, C, P) \
  {#name, B, C, P, {FUSED_INR_LEVELS(FI_ADDRESS, name, B, C, P) (void*)map_##name##_j, (void*)map_##name##_jp}},

}  // namespace fused_inr
