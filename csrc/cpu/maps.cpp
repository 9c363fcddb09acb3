// The generated maps and the primitives, for one capability and one scalar type (FUSED_INR_SCALAR).
#include "map.h"

#include "../generated/activations.h"
#include "capability.h"
#include "map_table.h"

namespace fused_inr {
namespace {

using T = FUSED_INR_SCALAR;
using V = Vec<T, FUSED_INR_VECTOR_BYTES>;

FUSED_INR_ACTIVATIONS(FI_MAPS)

// -- primitives, for tests

#define FI_UNARY(name)                                                                                 \
  void primitive_##name(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {         \
    run_map<V, 1, 1, 0, 0>([](const auto* a, auto* r) FI_LAMBDA { r[0] = fi_##name(a[0]); }, n, in, stride, out); \
  }
#define FI_BINARY(name)                                                                                \
  void primitive_##name(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {         \
    run_map<V, 2, 1, 0, 0>([](const auto* a, auto* r) FI_LAMBDA { r[0] = fi_##name(a[0], a[1]); }, n, in, stride, out); \
  }
#define FI_EACH_UNARY(X)                                                                               \
  X(sin) X(cos) X(tan) X(exp) X(log) X(log1p) X(expm1) X(tanh) X(sinh) X(cosh) X(sigmoid) X(softplus) X(erf) X(sqrt) \
  X(abs) X(sign) X(step) X(saturate) X(atan) X(sinc0) X(sinc1) X(sinc2) X(sinc3) X(sinc4) X(sinc5) X(sinc6)
#define FI_EACH_BINARY(X) X(pow) X(gt) X(ge) X(lt) X(le) X(eq) X(minimum) X(maximum)
FI_EACH_UNARY(FI_UNARY)
FI_EACH_BINARY(FI_BINARY)
void primitive_where(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {
  run_map<V, 3, 1, 0, 0>([](const auto* a, auto* r) FI_LAMBDA { r[0] = fi_where(a[0], a[1], a[2]); }, n, in, stride, out);
}
void primitive_sincos(int64_t n, const T* const* in, const int64_t* stride, T* const* out) {
  run_map<V, 1, 2, 0, 0>([](const auto* a, auto* r) FI_LAMBDA { fi_sincos(a[0], r[0], r[1]); }, n, in, stride, out);
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
