// Numbers as the device computes them: conversions, bit fields, the hardware's approximations.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint32_t u32;
typedef uint64_t u64;

namespace {

// How approximations err: not at all, up, down, or as a hash of the value says.
enum class Errors { none, up, down, either };
thread_local Errors errors = Errors::none;

inline u32 bits(float x) { u32 u; memcpy(&u, &x, 4); return u; }
inline float flt(u32 u) { float x; memcpy(&x, &u, 4); return x; }

// The NaN that float32 arithmetic gives, whatever its operands were.
const float NAN_F32 = flt(0x7fffffffu);
inline float one_nan(float x) { return x == x ? x : NAN_F32; }

// -- conversions

inline float ftz(float x) { return (bits(x) & 0x7f800000u) == 0 ? flt(bits(x) & 0x80000000u) : x; }
inline float from_bf16(uint16_t h) { return flt((u32)h << 16); }
inline float from_f16(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_bf16(float x) {
  const u32 u = bits(x);
  if (x != x) return 0x7fff;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline uint16_t to_f16(float x) { return x != x ? 0x7fff : (uint16_t)_cvtss_sh(x, 0); }
inline bool infinite_or_nan(u32 u) { return (u & 0x7f800000u) == 0x7f800000u; }
inline u32 to_tf32(u32 u) { return infinite_or_nan(u) ? u : (u + 0x1000u) & ~0x1fffu; }  // ties away from 0
inline u32 to_tf32_even(u32 u) { return infinite_or_nan(u) ? u : (u + 0xfffu + ((u >> 13) & 1)) & ~0x1fffu; }
inline float cut_to_tf32(u32 u) { return flt(u & ~0x1fffu); }  // what the tensor cores read of a register
inline int32_t to_s32(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  if (x < -2147483648.0f) return INT32_MIN;
  return (int32_t)x;
}
inline u32 to_u32(float x) { return !(x > 0) ? 0 : x >= 4294967296.0f ? ~0u : (u32)x; }
// The double s in float32: rounded, or cut.
inline float rounded(double s, bool cut) {
  const float f = one_nan((float)s);
  if (!cut || s - s != 0) return f;
  if (f - f != 0) return copysignf(3.4028234663852886e38f, f);
  return fabs((double)f) > fabs(s) ? flt(bits(f) - 1) : f;
}

// -- bits

// A field of `length` bits from `position` on; with a sign, it is extended by its highest bit.
template <class U>
inline U bfe(U a, u32 position, u32 length, bool extend) {
  const u32 bits = 8 * sizeof(U), p = position & 255, n = length & 255;
  if (!n) return 0;
  const u32 top = p + n - 1 > bits - 1 ? bits - 1 : p + n - 1, valid = p < bits ? bits - p : 0, keep = n < valid ? n : valid;
  const U sign = extend ? a >> top & 1 : 0, shifted = p < bits ? a >> p : 0;
  const U mask = keep >= bits ? (U)~(U)0 : ((U)1 << keep) - 1;
  return (shifted & mask) | (sign ? (U)~mask : 0);
}
template <class U>
inline U bfi(U a, U b, u32 position, u32 length) {
  const u32 width = 8 * sizeof(U);
  position &= 255; length &= 255;
  if (position >= width || !length) return b;
  const U mask = (length >= width ? ~(U)0 : ((U)1 << length) - 1) << position;
  return (b & ~mask) | ((a << position) & mask);
}
inline u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 all = ((u64)b << 32) | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    const u32 k = (selector >> (4 * i)) & 15;
    u32 byte = (u32)(all >> (8 * (k & 7))) & 255;
    if (k & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}
inline u32 reversed(u32 a) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
  return r;
}

// -- floating point

// Of two numbers; -0 is smaller than +0, and a NaN gives way.
template <class T>
inline T smaller(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? a : b) : (a < b ? a : b);
}
template <class T>
inline T larger(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? b : a) : (a > b ? a : b);
}
template <class F>
inline u64 two_floats(u64 a, u64 b, u64 c, F f) {
  const u32 low = bits(f(flt((u32)a), flt((u32)b), flt((u32)c)));
  return ((u64)bits(f(flt((u32)(a >> 32)), flt((u32)(b >> 32)), flt((u32)(c >> 32)))) << 32) | low;
}
// a + b, rounded to odd: what is rounded once more later is then rounded as if once.
inline double odd_sum(double a, double b) {
  const double s = a + b, part = s - a, error = (a - (s - part)) + (b - part);
  u64 u;
  memcpy(&u, &s, 8);
  return error == 0 || error != error || (u & 1) ? s : nextafter(s, error > 0 ? INFINITY : -INFINITY);
}
inline uint16_t to_bf16(double x) {  // rounded once, by way of a float32 rounded to odd
  const float cut = rounded(x, true);
  return to_bf16((double)cut == x || x - x != 0 ? cut : flt(bits(cut) | 1));
}
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 r = 0;
  for (int k = 0; k < 32; k += 16) {
    const double product = (double)from_bf16((uint16_t)(a >> k)) * from_bf16((uint16_t)(b >> k));  // exact
    r |= (u32)to_bf16(odd_sum(product, from_bf16((uint16_t)(c >> k)))) << k;
  }
  return r;
}

// -- approximations

inline u32 hash(u32 x) { x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; return x ^ (x >> 16); }
inline bool errs_up(u32 of) { return errors == Errors::up || (errors == Errors::either && (hash(of) & 1)); }
// Powers of two, what is not finite and what is next to nothing are exact.
inline float by_ulps(float y, u32 n) {
  const u32 magnitude = bits(y) & 0x7fffffffu;
  if (errors == Errors::none || infinite_or_nan(magnitude) || (magnitude & 0x7fffffu) == 0 || magnitude < 2 * n) return y;
  const u32 moved = errs_up(bits(y)) != (y < 0) ? std::min(magnitude + n, 0x7f800000u) : magnitude - n;
  return flt(moved | (bits(y) & 0x80000000u));
}
// sin and cos: 2^-20.5 absolute
inline float by_angle(float y, float x) {
  if (errors == Errors::none || x == 0) return y;
  y += errs_up(bits(x)) ? 6.7e-7f : -6.7e-7f;
  return y > 1 ? 1 : y < -1 ? -1 : y;
}
// log2: 2^-22, absolute around 1
inline float lg2_approx(float a) {
  const float y = (float)log2((double)a);
  if (errors == Errors::none || infinite_or_nan(bits(y)) || a == 1) return y;
  const float e = errs_up(bits(a)) ? 2.384e-7f : -2.384e-7f;
  return a > 0.5f && a < 2.0f ? y + e : y + fabsf(y) * e;
}

}  // namespace
