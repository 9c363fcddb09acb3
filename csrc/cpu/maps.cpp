// The generated maps and the primitives, for one capability and one scalar type (FUSED_INR_SCALAR).
#include "map.h"

#include "../generated/activations.h"
#include "capability.h"

namespace fused_inr {
namespace {

using T = FUSED_INR_SCALAR;
using V = Vec<T, FUSED_INR_VECTOR_BYTES>;
static_assert(kMaxLevel == 3 && kMaxLearnableLevel == 2, "Maps has a slot for each of these levels");

// Streams of each level, as in docs/architecture.md, section 1.
constexpr int in0(int B, int, int P) { return B + P; }
constexpr int in1(int B, int C, int P) { return B + P + C; }
constexpr int in2(int B, int C, int P) { return in1(B, C, P) + B; }
constexpr int in3(int B, int C, int P) { return in2(B, C, P) + B + C; }
constexpr int in2p(int B, int C, int P) { return in1(B, C, P) + B + P; }

#define FI_MAP(function, In, Out)                                                                       \
  void map_##function(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {            \
    run_map<V, In, Out>([](const V* a, V* r) FI_LAMBDA { function<V>(a, r); }, n, in, stride, out); \
  }
// `dz, dg, du` of level 3 are gradients of the inputs of level 2 that are not parameters
#define FI_MAPS(name, B, C, P)                     \
  FI_MAP(name##_l0, in0(B, C, P), C)               \
  FI_MAP(name##_l1, in1(B, C, P), B)               \
  FI_MAP(name##_l2, in2(B, C, P), B + C)           \
  FI_MAP(name##_l3, in3(B, C, P), B + C + B)       \
  FI_MAP(name##_p1, in1(B, C, P), B + P)           \
  FI_MAP(name##_p2, in2p(B, C, P), B + P + C)
FUSED_INR_ACTIVATIONS(FI_MAPS)

#define FI_ROW(name, B, C, P)                                                                 \
  {#name, B, C, P,                                                                            \
   {(void*)map_##name##_l0, (void*)map_##name##_l1, (void*)map_##name##_l2, (void*)map_##name##_l3, \
    (void*)map_##name##_p1, (void*)map_##name##_p2}},

// -- primitives, for tests

#define FI_UNARY(name)                                                                                 \
  void primitive_##name(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {         \
    run_map<V, 1, 1>([](const V* a, V* r) FI_LAMBDA { r[0] = fi_##name(a[0]); }, n, in, stride, out); \
  }
#define FI_BINARY(name)                                                                                \
  void primitive_##name(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {         \
    run_map<V, 2, 1>([](const V* a, V* r) FI_LAMBDA { r[0] = fi_##name(a[0], a[1]); }, n, in, stride, out); \
  }
#define FI_EACH_UNARY(X)                                                                               \
  X(sin) X(cos) X(tan) X(exp) X(log) X(log1p) X(expm1) X(tanh) X(sinh) X(cosh) X(sigmoid) X(softplus) X(erf) X(sqrt) \
  X(abs) X(sign) X(step) X(saturate) X(atan) X(sinc0) X(sinc1) X(sinc2) X(sinc3) X(sinc4) X(sinc5) X(sinc6)
#define FI_EACH_BINARY(X) X(pow) X(gt) X(ge) X(lt) X(le) X(eq) X(minimum) X(maximum)
FI_EACH_UNARY(FI_UNARY)
FI_EACH_BINARY(FI_BINARY)
void primitive_where(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {
  run_map<V, 3, 1>([](const V* a, V* r) FI_LAMBDA { r[0] = fi_where(a[0], a[1], a[2]); }, n, in, stride, out);
}
void primitive_sincos(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {
  run_map<V, 1, 2>([](const V* a, V* r) FI_LAMBDA { fi_sincos(a[0], r[0], r[1]); }, n, in, stride, out);
}

#define FI_UNARY_ROW(name) {#name, 1, 1, (void*)primitive_##name},
#define FI_BINARY_ROW(name) {#name, 2, 1, (void*)primitive_##name},

}  // namespace

#define FI_TABLE(name) FI_JOIN(FI_EXPORTED(name), FUSED_INR_SCALAR)
extern const Maps FI_TABLE(maps)[] = {FUSED_INR_ACTIVATIONS(FI_ROW){nullptr, 0, 0, 0, {}}};
extern const Primitive FI_TABLE(primitives)[] = {
    FI_EACH_UNARY(FI_UNARY_ROW) FI_EACH_BINARY(FI_BINARY_ROW){"where", 3, 1, (void*)primitive_where},
    {"sincos", 1, 2, (void*)primitive_sincos},
    {nullptr, 0, 0, nullptr}};

}  // namespace fused_inr
