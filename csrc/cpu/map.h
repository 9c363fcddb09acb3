// A generated map as a loop over arrays: the C ABI that the engine, and a user's own formula, call.
#pragma once

#include "../primitives.h"
#include "engine.h"

namespace fused_inr {

// F(const V* in, V* out), element by element. Arrays may be the same in and out. Every element takes the same path, so
// that a value does not depend on where in an array it stands.
template <class V, int In, int Out, class F>
FI_INLINE void run_map(F f, int64_t n, const typename V::scalar* const* in, const int64_t* stride,
                       typename V::scalar* const* out) {
  using T = typename V::scalar;
  constexpr int W = V::size;
  alignas(64) T constant[In][W];
  alignas(64) T last_in[In][W], last_out[Out][W];
  const T* source[In];
  T* target[Out];
  int64_t moving[In];
  for (int s = 0; s < In; ++s) {
    source[s] = in[s];
    moving[s] = -1;
    if (stride[s] == 0) {
      for (int i = 0; i < W; ++i) constant[s][i] = n > 0 ? in[s][0] : T(0);
      source[s] = constant[s];
      moving[s] = 0;
    }
  }
  for (int s = 0; s < Out; ++s) target[s] = out[s];
  int64_t i = 0;
  for (; i < n; i += W) {
    if (__builtin_expect(i + W > n, false)) {  // the last elements, through a full vector
      for (int s = 0; s < In; ++s) {
        if (moving[s] == 0) continue;
        for (int64_t j = 0; j < W; ++j) last_in[s][j] = j < n - i ? source[s][i + j] : T(0);
        source[s] = last_in[s] - i;
      }
      for (int s = 0; s < Out; ++s) target[s] = last_out[s] - i;
    }
    V a[In > 0 ? In : 1], r[Out];
#pragma GCC unroll 96
    for (int s = 0; s < In; ++s) a[s] = V::load(source[s] + (i & moving[s]));
    f(a, r);
#pragma GCC unroll 96
    for (int s = 0; s < Out; ++s) r[s].store(target[s] + i);
  }
  if (i > n) {
    const int64_t done = i - W;
    for (int s = 0; s < Out; ++s)
      for (int64_t j = done; j < n; ++j) out[s][j] = last_out[s][j - done];
  }
}

}  // namespace fused_inr
