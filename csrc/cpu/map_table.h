// From FUSED_INR_ACTIVATIONS(X) to functions of the C ABI, and to rows of a table: FUSED_INR_ACTIVATIONS(FI_MAPS) and (FI_ROW)
// in a scope that has the scalar `T` and the vector `V`.
#pragma once

#include "map.h"

namespace fused_inr {

// Streams of each level, as in docs/architecture.md, section 1.
constexpr int in0(int B, int, int P) { return B + P; }
constexpr int in1(int B, int C, int P) { return B + P + C; }
constexpr int in2(int B, int C, int P) { return in1(B, C, P) + B; }
constexpr int in3(int B, int C, int P) { return in2(B, C, P) + B + C; }
constexpr int in2p(int B, int C, int P) { return in1(B, C, P) + B + P; }

#define FI_MAP(function, B, P, In, Out)                                                                   \
  void map_##function(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {              \
    run_map<V, In, Out, B, P>([](const auto* a, auto* r) FI_LAMBDA { function(a, r); }, n, in, stride, out); \
  }
#define FI_MAPS(name, B, C, P)                     \
  FI_MAP(name##_l0, B, P, in0(B, C, P), C)               \
  FI_MAP(name##_l1, B, P, in1(B, C, P), B)               \
  FI_MAP(name##_l2, B, P, in2(B, C, P), B + C)           \
  FI_MAP(name##_l3, B, P, in3(B, C, P), B + C + B)       \
  FI_MAP(name##_p1, B, P, in1(B, C, P), B + P)           \
  FI_MAP(name##_p2, B, P, in2p(B, C, P), B + P + C)      \
  FI_MAP(name##_j, B, P, in0(B, C, P), C + C * B)        \
  FI_MAP(name##_jp, B, P, in0(B, C, P), C + C * (B + P))

#define FI_ROW(name, B, C, P)                                                                 \
  {#name, B, C, P,                                                                            \
   {(void*)map_##name##_l0, (void*)map_##name##_l1, (void*)map_##name##_l2, (void*)map_##name##_l3, \
    (void*)map_##name##_p1, (void*)map_##name##_p2, (void*)map_##name##_j, (void*)map_##name##_jp}},

}  // namespace fused_inr
