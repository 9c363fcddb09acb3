// A generated map as a loop over arrays: the C ABI that the engine, and a user's own formula, call.
#pragma once

#include <type_traits>

#include "../primitives.h"
#include "engine.h"
#include "twice.h"

namespace fused_inr {

// What a map is computed on: two registers at a time; float64's primitives go lane by lane in any case.
template <class V>
using Lanes = std::conditional_t<is_float<V> && V::bytes <= kRegisterBytes, Twice<V>, V>;

// f(const V* in, V* out), element by element, V = Lanes<Single>; in[First] .. in[First + Count - 1] are parameters. Strides are
// 0 or 1. Arrays may be the same in and out. Every element takes the same path, so that a value does not depend on where in an
// array it stands.
template <class Single, int In, int Out, int First, int Count, class F>
FI_INLINE void run_map(F f, int64_t n, const typename Single::scalar* const* in, const int64_t* stride,
                       typename Single::scalar* const* out) {
  using V = Lanes<Single>;
  using T = typename V::scalar;
  constexpr int W = V::size;
  constexpr int64_t kFilled = 4 * W;
  const auto is_param = [](int s) { return s >= First && s < First + Count; };
  if (n <= 0) return;

  // What is one value for all elements: parameters stay in registers, unless one of them varies; other streams are filled.
  alignas(64) T filled[In][kFilled];
  V param[Count > 0 ? Count : 1];
  bool varying = false, fills = false;
  for (int s = First; s < First + Count; ++s) varying = varying || stride[s] != 0;
  for (int s = 0; s < In; ++s) {
    if (stride[s] != 0) continue;
    if (is_param(s) && !varying) {
      param[s - First] = V(static_cast<double>(in[s][0]));
      continue;
    }
    for (int64_t i = 0; i < kFilled; ++i) filled[s][i] = in[s][0];
    fills = true;
  }

  alignas(64) T last_in[In][W], last_out[Out][W];
  const T* source[In];
  T* target[Out];
  for (int s = 0; s < In; ++s) source[s] = in[s];
  for (int s = 0; s < Out; ++s) target[s] = out[s];
  const int64_t chunk = fills ? kFilled : n;
  int64_t i = 0;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    for (int s = 0; s < In && fills; ++s)
      if (stride[s] == 0) source[s] = filled[s] - begin;
    const int64_t end = begin + chunk < n ? begin + chunk : n;
    for (; i < end; i += W) {
      if (__builtin_expect(i + W > n, false)) {  // the last elements, through a full vector
        for (int s = 0; s < In; ++s) {
          if (stride[s] == 0) continue;
          for (int64_t j = 0; j < W; ++j) last_in[s][j] = j < n - i ? source[s][i + j] : T(0);
          source[s] = last_in[s] - i;
        }
        for (int s = 0; s < Out; ++s) target[s] = last_out[s] - i;
      }
      V a[In > 0 ? In : 1], r[Out];
      if (varying)
#pragma GCC unroll 96
        for (int s = First; s < First + Count; ++s) param[s - First] = V::load(source[s] + i);
#pragma GCC unroll 96
      for (int s = 0; s < In; ++s) a[s] = is_param(s) ? param[s - First] : V::load(source[s] + i);
      f(a, r);
#pragma GCC unroll 96
      for (int s = 0; s < Out; ++s) r[s].store(target[s] + i);
    }
  }
  if (i > n) {
    const int64_t done = i - W;
    for (int s = 0; s < Out; ++s)
      for (int64_t j = done; j < n; ++j) out[s][j] = last_out[s][j - done];
  }
}

}  // namespace fused_inr
