// Scalar<T>: one number with the interface of cpu/vec.h's vectors, for the primitives and the generated maps on a device,
// and for the same functions on the host, where tests run them against the reference. No PyTorch here, no CUDA header.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define FI_INLINE static __host__ __device__ __forceinline__
#define FI_MEMBER __host__ __device__ __forceinline__
#define FI_UNROLL _Pragma("unroll")
#else
#define FI_INLINE static inline __attribute__((always_inline))
#define FI_MEMBER inline __attribute__((always_inline))
#define FI_UNROLL _Pragma("GCC unroll 96")
#endif
#define FI_HAS_FMA 1  // ::fma rounds once, on hosts too

namespace fused_inr {

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

// the bits of one number as another type
template <class To, class From>
FI_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
struct Scalar {
  using scalar = T;
  using Bits = typename BitsOf<T>::type;
  using Mask = Bits;  // all ones or all zeros, as a vector's
  static constexpr int size = 1;
  static constexpr int bytes = sizeof(T);

  T v;

  Scalar() = default;
  template <class A>
  FI_MEMBER Scalar(A a) : v(static_cast<T>(a)) {}

  static FI_MEMBER Scalar from_bits(Bits b) { return Scalar(bit_copy<T>(b)); }
  FI_MEMBER Bits bits() const { return bit_copy<Bits>(v); }

  friend FI_MEMBER Scalar operator+(Scalar a, Scalar b) { return Scalar(a.v + b.v); }
  friend FI_MEMBER Scalar operator-(Scalar a, Scalar b) { return Scalar(a.v - b.v); }
  friend FI_MEMBER Scalar operator*(Scalar a, Scalar b) { return Scalar(a.v * b.v); }
  friend FI_MEMBER Scalar operator/(Scalar a, Scalar b) { return Scalar(a.v / b.v); }
  friend FI_MEMBER Scalar operator-(Scalar a) { return Scalar(-a.v); }
  FI_MEMBER Scalar& operator+=(Scalar b) {
    v += b.v;
    return *this;
  }
  friend FI_MEMBER Mask operator<(Scalar a, Scalar b) { return -static_cast<Mask>(a.v < b.v); }
  friend FI_MEMBER Mask operator<=(Scalar a, Scalar b) { return -static_cast<Mask>(a.v <= b.v); }
  friend FI_MEMBER Mask operator>(Scalar a, Scalar b) { return -static_cast<Mask>(a.v > b.v); }
  friend FI_MEMBER Mask operator>=(Scalar a, Scalar b) { return -static_cast<Mask>(a.v >= b.v); }
  friend FI_MEMBER Mask operator==(Scalar a, Scalar b) { return -static_cast<Mask>(a.v == b.v); }
  friend FI_MEMBER Mask operator!=(Scalar a, Scalar b) { return -static_cast<Mask>(a.v != b.v); }
};

template <class V>
FI_INLINE V select(typename V::Mask m, V a, V b) {
  return m ? a : b;
}

template <class V>
FI_INLINE typename V::Mask sign_bit() {
  using Bits = typename V::Bits;
  return static_cast<Bits>(static_cast<Bits>(1) << (8 * sizeof(Bits) - 1));
}

template <class V>
FI_INLINE V absolute(V x) {
  return V::from_bits(x.bits() & ~sign_bit<V>());
}

template <class V>
FI_INLINE V copy_sign(V magnitude, V sign) {
  return V::from_bits((magnitude.bits() & ~sign_bit<V>()) | (sign.bits() & sign_bit<V>()));
}

FI_INLINE bool any(int32_t mask) { return mask != 0; }

FI_INLINE Scalar<float> fma(Scalar<float> a, Scalar<float> b, Scalar<float> c) { return ::fmaf(a.v, b.v, c.v); }
FI_INLINE Scalar<double> fma(Scalar<double> a, Scalar<double> b, Scalar<double> c) { return ::fma(a.v, b.v, c.v); }

// c - a * b
template <class V>
FI_INLINE V fnma(V a, V b, V c) {
  return fma(-a, b, c);
}

FI_INLINE Scalar<float> square_root(Scalar<float> x) { return ::sqrtf(x.v); }
FI_INLINE Scalar<double> square_root(Scalar<double> x) { return ::sqrt(x.v); }

// -- large arguments of sine and cosine

// frac(|x| 2/pi / 4) of a float as a 64-bit integer: quarters of a turn in the two highest bits. 2/pi to 224 bits, of which
// a window of 96 serves; what lies above it are whole turns, what lies below is less than 2^-60.
FI_INLINE uint64_t turns_of(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  const uint64_t m = (bits & 0x7fffff) | 0x800000;
  const int position = static_cast<int>(bits >> 23 & 0xff) - 120;  // of the first bit of the window; x >= 2^-6
  const int word = position >> 5, shift = position & 31;
  uint32_t part[4];
  FI_UNROLL
  for (int i = 0; i < 4; ++i) {
    switch (word + i) {
      case 1: part[i] = 0xa2f9836eu; break;
      case 2: part[i] = 0x4e441529u; break;
      case 3: part[i] = 0xfc2757d1u; break;
      case 4: part[i] = 0xf534ddc0u; break;
      case 5: part[i] = 0xdb629599u; break;
      case 6: part[i] = 0x3c439041u; break;
      case 7: part[i] = 0xfe5163abu; break;
      default: part[i] = 0; break;
    }
  }
  uint64_t window[3];
  FI_UNROLL
  for (int i = 0; i < 3; ++i)
    window[i] = static_cast<uint32_t>((static_cast<uint64_t>(part[i]) << 32 | part[i + 1]) >> (32 - shift));
  return ((m * window[0]) << 32) + m * window[1] + ((m * window[2]) >> 32);
}

// x = r + n step, r within half a step of 0; step is pi / Halves (1 or 2). For finite x; NaN for all others.
template <int Halves>
FI_INLINE Scalar<float> far_remainder(Scalar<float> x, int32_t& n) {
  const uint64_t turns = turns_of(x.v);
  n = static_cast<int32_t>((turns + (1ull << (63 - Halves))) >> (64 - Halves));
  const int64_t fraction = static_cast<int64_t>(turns << Halves);
  const double step = 3.14159265358979323846 / Halves;
  const float r = static_cast<float>(static_cast<double>(fraction) * (step * 0x1p-64));
  const bool negative = x.v < 0.0f;
  n = negative ? -n : n;
  return (x - x).v != 0.0f ? x - x : Scalar<float>(negative ? -r : r);
}

}  // namespace fused_inr
