// Rows of storage types to and from the compute type. bfloat16 and float16 live only in memory: they widen to float32
// when a tile is read, and round to nearest even when it is written.
#pragma once

#include "engine.h"
#include "vec.h"

namespace fused_inr {
namespace {

FI_INLINE uint32_t bits_of(float x) {
  uint32_t b;
  __builtin_memcpy(&b, &x, 4);
  return b;
}
FI_INLINE float float_of(uint32_t b) {
  float x;
  __builtin_memcpy(&x, &b, 4);
  return x;
}

inline void widen_bfloat16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = float_of(static_cast<uint32_t>(from[i]) << 16);
}

inline void narrow_bfloat16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t b = bits_of(from[i]);
    const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

inline float widen_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // the subnormals too: the exponent is put right by a multiplication
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

inline uint16_t narrow_half(float x) {
  const uint32_t b = bits_of(x), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000)  // subnormal: the addition rounds to multiples of 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

inline void widen_float16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = widen_half(from[i]);
}

inline void narrow_float16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) to[i] = narrow_half(from[i]);
}

template <class T>
constexpr Storage kStorage = sizeof(T) == 4 ? Storage::float32 : Storage::float64;

template <class T>
struct Tile {
  T* data;
  int64_t stride;
};

template <class T>
T* address(const Rows& rows, int64_t batch, int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
}

// `count` rows for reading: where they lie, or widened into `buffer` [count, columns].
template <class T>
Tile<T> read_tile(const Rows& rows, int64_t batch, int64_t row, int64_t count, int64_t columns, T* buffer) {
  if (rows.storage == kStorage<T>) return {address<T>(rows, batch, row), rows.row_stride};
  if constexpr (sizeof(T) == 4) {
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t* from = address<uint16_t>(rows, batch, row + i);
      (rows.storage == Storage::bfloat16 ? widen_bfloat16 : widen_float16)(from, buffer + i * columns, columns);
    }
  }
  return {buffer, columns};
}

// `count` rows for writing: where they shall lie, or `buffer`, which `write_tile` then narrows.
template <class T>
Tile<T> target_tile(const Rows& rows, int64_t batch, int64_t row, int64_t columns, T* buffer) {
  if (rows.storage == kStorage<T>) return {address<T>(rows, batch, row), rows.row_stride};
  return {buffer, columns};
}

template <class T>
void write_tile(const Rows& rows, int64_t batch, int64_t row, int64_t count, int64_t columns, const T* buffer) {
  if (rows.storage == kStorage<T>) return;
  if constexpr (sizeof(T) == 4) {
    for (int64_t i = 0; i < count; ++i) {
      uint16_t* to = address<uint16_t>(rows, batch, row + i);
      (rows.storage == Storage::bfloat16 ? narrow_bfloat16 : narrow_float16)(buffer + i * columns, to, columns);
    }
  }
}

}  // namespace
}  // namespace fused_inr
