// SIMD vectors over GCC's and Clang's vector extensions: one type for every width and both scalar types.
//
// Vec<float, 64> is one register under AVX-512 and two under AVX2, from the same source: the compiler splits what the
// machine does not have. Only what the extensions cannot say (fused multiply-add, square root) is written per machine.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FI_LAMBDA __attribute__((always_inline))
#define FI_MEMBER inline __attribute__((always_inline))
#ifndef FI_INLINE
// static: objects of different capabilities are linked into one library, and must not share a copy of anything
#define FI_INLINE static inline __attribute__((always_inline))
#endif

namespace fused_inr {

#if defined(__AVX512F__)
inline constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
inline constexpr int kRegisterBytes = 32;
#else
inline constexpr int kRegisterBytes = 16;
#endif

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};

template <class T, int Bytes>
struct Vec {
  using scalar = T;
  using Bits = typename BitsOf<T>::type;
  typedef T Native __attribute__((vector_size(Bytes)));
  typedef Bits Mask __attribute__((vector_size(Bytes)));
  static constexpr int size = Bytes / static_cast<int>(sizeof(T));
  static constexpr int bytes = Bytes;

  Native v;

  Vec() = default;
  FI_MEMBER Vec(Native n) : v(n) {}
  // s - 0 is s in every bit, -0 included, and compiles to a broadcast
  FI_MEMBER Vec(double s) : v(static_cast<T>(s) - Native{}) {}

  static FI_MEMBER Vec load(const T* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, Bytes);
    return r;
  }
  FI_MEMBER void store(T* p) const { __builtin_memcpy(p, &v, Bytes); }
  static FI_MEMBER Vec from_bits(Mask m) { return Vec(reinterpret_cast<Native>(m)); }
  FI_MEMBER Mask bits() const { return reinterpret_cast<Mask>(v); }

  friend FI_MEMBER Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend FI_MEMBER Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend FI_MEMBER Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend FI_MEMBER Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend FI_MEMBER Vec operator-(Vec a) { return Vec(-a.v); }
  FI_MEMBER Vec& operator+=(Vec b) {
    v += b.v;
    return *this;
  }
  // comparisons give masks of all ones or all zeros
  friend FI_MEMBER Mask operator<(Vec a, Vec b) { return a.v < b.v; }
  friend FI_MEMBER Mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
  friend FI_MEMBER Mask operator>(Vec a, Vec b) { return a.v > b.v; }
  friend FI_MEMBER Mask operator>=(Vec a, Vec b) { return a.v >= b.v; }
  friend FI_MEMBER Mask operator==(Vec a, Vec b) { return a.v == b.v; }
  friend FI_MEMBER Mask operator!=(Vec a, Vec b) { return a.v != b.v; }
};

template <class V>
FI_INLINE V select(typename V::Mask m, V a, V b) {
  return V(m ? a.v : b.v);
}

// by the sign bit of each lane of m, whatever the others are
template <class V>
FI_INLINE V select_by_sign(typename V::Mask m, V a, V b) {
#if defined(__AVX512F__)
  if constexpr (V::bytes == 64 && sizeof(typename V::scalar) == 4)
    return V(_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)m), b.v, a.v));
#endif
#if defined(__AVX__)
  if constexpr (V::bytes == 32 && sizeof(typename V::scalar) == 4) return V(_mm256_blendv_ps(b.v, a.v, (__m256)m));
#endif
  return select(m < 0, a, b);
}

template <class V>
FI_INLINE typename V::Mask sign_bit() {
  using Bits = typename V::Bits;
  return static_cast<Bits>(static_cast<Bits>(1) << (8 * sizeof(Bits) - 1)) - typename V::Mask{};
}

template <class V>
FI_INLINE V absolute(V x) {
  return V::from_bits(x.bits() & ~sign_bit<V>());
}

template <class V>
FI_INLINE V copy_sign(V magnitude, V sign) {
  return V::from_bits((magnitude.bits() & ~sign_bit<V>()) | (sign.bits() & sign_bit<V>()));
}

template <class M>
FI_INLINE bool any(M m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(M) == 64) return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#endif
#if defined(__AVX__)
  if constexpr (sizeof(M) == 32) return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(M) == 16) return _mm_movemask_epi8((__m128i)m) != 0;
#endif
  int64_t words[sizeof(M) / 8];
  __builtin_memcpy(words, &m, sizeof(M));
  int64_t all = 0;
  for (unsigned i = 0; i < sizeof(M) / 8; ++i) all |= words[i];
  return all != 0;
}

#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
#define FI_HAS_FMA 1
#else
#define FI_HAS_FMA 0
#endif

namespace machine {
// The register operations that the extensions lack. `Half` splits a vector that is wider than the machine's.
template <class V>
struct Half {
  using type = Vec<typename V::scalar, V::bytes / 2>;
};

template <class V, class F>
FI_INLINE V by_halves(F f, V a, V b, V c) {
  using H = typename Half<V>::type;
  H parts[2];
  for (int i = 0; i < 2; ++i) {
    H h[3];
    __builtin_memcpy(&h[0], reinterpret_cast<const char*>(&a) + i * H::bytes, H::bytes);
    __builtin_memcpy(&h[1], reinterpret_cast<const char*>(&b) + i * H::bytes, H::bytes);
    __builtin_memcpy(&h[2], reinterpret_cast<const char*>(&c) + i * H::bytes, H::bytes);
    parts[i] = f(h[0], h[1], h[2]);
  }
  V r;
  __builtin_memcpy(&r, parts, V::bytes);
  return r;
}
}  // namespace machine

// a * b + c, rounded once where the machine can (FI_HAS_FMA)
template <class V>
FI_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (V::bytes == 64 && sizeof(typename V::scalar) == 4) return V(_mm512_fmadd_ps(a.v, b.v, c.v));
  if constexpr (V::bytes == 64 && sizeof(typename V::scalar) == 8) return V(_mm512_fmadd_pd(a.v, b.v, c.v));
#endif
#if defined(__FMA__)
  if constexpr (V::bytes == 32 && sizeof(typename V::scalar) == 4) return V(_mm256_fmadd_ps(a.v, b.v, c.v));
  if constexpr (V::bytes == 32 && sizeof(typename V::scalar) == 8) return V(_mm256_fmadd_pd(a.v, b.v, c.v));
  if constexpr (V::bytes == 16 && sizeof(typename V::scalar) == 4) return V(_mm_fmadd_ps(a.v, b.v, c.v));
  if constexpr (V::bytes == 16 && sizeof(typename V::scalar) == 8) return V(_mm_fmadd_pd(a.v, b.v, c.v));
#elif defined(__aarch64__)
  if constexpr (V::bytes == 16 && sizeof(typename V::scalar) == 4)
    return V((typename V::Native)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v));
  if constexpr (V::bytes == 16 && sizeof(typename V::scalar) == 8)
    return V((typename V::Native)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v));
#endif
#if FI_HAS_FMA
  if constexpr (V::bytes > 16)
    return machine::by_halves([](auto x, auto y, auto z) FI_LAMBDA { return fused_inr::fma(x, y, z); }, a, b, c);
#endif
  return a * b + c;
}

// c - a * b
template <class V>
FI_INLINE V fnma(V a, V b, V c) {
  // said where the machine can, for a compiler that shares -a between several of these
#if defined(__AVX512F__)
  if constexpr (V::bytes == 64 && sizeof(typename V::scalar) == 4) return V(_mm512_fnmadd_ps(a.v, b.v, c.v));
#endif
#if defined(__FMA__)
  if constexpr (V::bytes == 32 && sizeof(typename V::scalar) == 4) return V(_mm256_fnmadd_ps(a.v, b.v, c.v));
#endif
  return fma(-a, b, c);
}

template <class V>
FI_INLINE V square_root(V a) {
#if defined(__AVX512F__)
  if constexpr (V::bytes == 64 && sizeof(typename V::scalar) == 4) return V(_mm512_sqrt_ps(a.v));
  if constexpr (V::bytes == 64 && sizeof(typename V::scalar) == 8) return V(_mm512_sqrt_pd(a.v));
#endif
#if defined(__AVX__)
  if constexpr (V::bytes == 32 && sizeof(typename V::scalar) == 4) return V(_mm256_sqrt_ps(a.v));
  if constexpr (V::bytes == 32 && sizeof(typename V::scalar) == 8) return V(_mm256_sqrt_pd(a.v));
#endif
#if defined(__SSE2__)
  if constexpr (V::bytes == 16 && sizeof(typename V::scalar) == 4) return V(_mm_sqrt_ps(a.v));
  if constexpr (V::bytes == 16 && sizeof(typename V::scalar) == 8) return V(_mm_sqrt_pd(a.v));
#endif
#if defined(__SSE2__)
  if constexpr (V::bytes > 16)
    return machine::by_halves([](auto x, auto, auto) FI_LAMBDA { return square_root(x); }, a, a, a);
#endif
  V r = a;
  for (int i = 0; i < V::size; ++i) r.v[i] = sizeof(typename V::scalar) == 4 ? sqrtf(a.v[i]) : ::sqrt(a.v[i]);
  return r;
}

}  // namespace fused_inr
