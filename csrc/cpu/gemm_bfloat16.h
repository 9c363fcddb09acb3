// Products of a bfloat16 tile and a packed bfloat16 matrix with float32 sums, for processors that multiply and add pairs of
// bfloat16 (VDPBF16PS). Twice the multiplications of float32 an instruction, half the bytes.
//
// A tile lies in panels as in gemm.h, its numbers bfloat16 (uint16_t). The right side lies by pairs of its depth,
// [panel][pair][kPanel][2]: a pair of a row of A is one 32-bit broadcast. A channel of odd size ends with half a pair, which
// is zero on both sides.
//
// The instruction treats subnormal numbers as zero and rounds each of its two sums to nearest. FUSED_INR_EMULATE_BFLOAT16:
// the same from ordinary instructions, subnormals kept, for tests on processors without it.
#pragma once

#include "convert.h"
#include "gemm.h"

#if defined(FUSED_INR_EMULATE_BFLOAT16)
#define FI_BFLOAT16 1
#define FI_PAIRS
#elif defined(__AVX512F__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define FI_BFLOAT16 1
// these functions alone: the processor is asked before they are called
#define FI_PAIRS __attribute__((target("avx512bf16")))
#else
#define FI_BFLOAT16 0
#endif

#if FI_BFLOAT16
namespace fused_inr {
namespace {

constexpr int64_t pairs_of(int64_t columns) { return (columns + 1) / 2; }

// sum + pair[0] b[2 j] + pair[1] b[2 j + 1] for each element j
template <class V>
FI_INLINE FI_PAIRS V add_pairs(V sum, uint32_t pair, V b) {
#if defined(FUSED_INR_EMULATE_BFLOAT16)
  using Mask = typename V::Mask;
  const V low = V::from_bits(b.bits() << 16), high = V::from_bits(b.bits() & static_cast<int32_t>(0xffff0000));
  const Mask both = static_cast<int32_t>(pair) - Mask{};
  return fma(V::from_bits(both << 16), low, fma(V::from_bits(both & static_cast<int32_t>(0xffff0000)), high, sum));
#else
  static_assert(V::bytes == 64, "one register");
  return V((typename V::Native)_mm512_dpbf16_ps((__m512)sum.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)),
                                                (__m512bh)b.v));
#endif
}

// m rows of a panel, rounded; the half pair beyond `count` columns is zero
template <class V>
FI_PAIRS void narrow_panel(const float* from, int64_t m, int64_t count, uint16_t* to) {
  constexpr int64_t P = kPanel<V>;
#if defined(FUSED_INR_EMULATE_BFLOAT16)
  narrow_bfloat16(from, to, m * P);
#else
  for (int64_t e = 0; e < m * P; e += 32)
    _mm512_storeu_si512(to + e, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + e + 16), _mm512_loadu_ps(from + e)));
#endif
  if (count < P && count % 2)
    for (int64_t i = 0; i < m; ++i) to[i * P + count] = 0;
}

// packed[panel][pair][j] of W [channels_out * channel_out, channels * channel] row-major, the panels `begin` .. `end` of its rows
template <class V>
void pack_pairs(const float* weight, int64_t ldw, int64_t channels, int64_t channel, int64_t channel_out, int64_t begin,
                int64_t end, uint16_t* packed) {
  constexpr int64_t P = kPanel<V>;
  const int64_t pairs = pairs_of(channel);
  each_panel<V>(channel_out, begin, end, [&](int64_t panel, int64_t first, int64_t count) {
    for (int64_t c = 0; c < channels; ++c) {
      uint16_t* const to = packed + (panel * channels + c) * pairs * 2 * P;
      for (int64_t j = 0; j < P; ++j)
        for (int64_t k = 0; k < 2 * pairs; ++k) {
          const float value = j < count && k < channel ? weight[(first + j) * ldw + c * channel + k] : 0.0f;
          narrow_bfloat16(&value, to + (k / 2 * P + j) * 2 + k % 2, 1);
        }
    }
  });
}

// The left side: a tile of m rows in panels, `panel` apart.
struct PairOperand {
  const uint16_t* data;
  int64_t panel = 0;
  int64_t channel = 0;  // columns a channel
  int64_t used = 0;     // columns of the present channel that lie before `data`
};

// C[R, kPanel] (+)= A B (+ bias) for R rows and one panel
template <class V, int R>
FI_PAIRS __attribute__((noinline)) void pair_block(int64_t depth, const PairOperand& left, const uint16_t* b, float* c,
                                                   const float* bias, bool accumulate) {
  constexpr int N = Block<V>::vectors;
  constexpr int64_t P = kPanel<V>;
  V sum[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V(0.0);
  const uint16_t* a = left.data;
  int64_t unused = left.channel - left.used;
  for (;;) {
    const int64_t part = smaller(smaller(P, unused), depth);
    for (int64_t k = 0; k < pairs_of(part); ++k) {
      V row[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) __builtin_memcpy(&row[j].v, b + j * 2 * V::size, V::bytes);
      b += 2 * P;
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        uint32_t pair;
        __builtin_memcpy(&pair, a + i * P + 2 * k, 4);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = add_pairs<V>(sum[i][j], pair, row[j]);
      }
    }
    depth -= part;
    if (depth == 0) break;
    a += left.panel;
    unused -= part;
    if (unused == 0) unused = left.channel;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* to = c + i * P + j * V::size;
      V result = bias ? sum[i][j] + V::load(bias + j * V::size) : sum[i][j];
      if (accumulate) result = result + V::load(to);
      result.store(to);
    }
}

template <class V>
FI_INLINE void pair_block_rows(int rows, int64_t depth, const PairOperand& a, const uint16_t* b, float* c, const float* bias,
                               bool accumulate) {
  constexpr int full = Block<V>::rows;
  if (rows == full) return pair_block<V, full>(depth, a, b, c, bias, accumulate);
  if constexpr (full > 8)
    if (rows == 8) return pair_block<V, 8>(depth, a, b, c, bias, accumulate);
  if constexpr (full > 4)
    if (rows == 4) return pair_block<V, 4>(depth, a, b, c, bias, accumulate);
  if (rows == 2) return pair_block<V, 2>(depth, a, b, c, bias, accumulate);
  pair_block<V, 1>(depth, a, b, c, bias, accumulate);
}

// C[m, one panel] = A[m, depth] B (+ bias): `packed` and `bias` are the panel's
template <class V>
void pair_product(int64_t m, int64_t depth, const PairOperand& left, const uint16_t* packed, float* c, const float* bias) {
  constexpr int64_t P = kPanel<V>;
  // panels of A whose part of B stays in the first-level cache while the rows pass
  constexpr int64_t most = 2 * Block<V>::depth / P;
  PairOperand a = left;
  bool first = true;
  while (depth > 0) {
    const int64_t whole = depth <= most * P * 3 / 2 ? depth : most * P;
    int64_t part = 0, pairs = 0, panels = 0, used = a.used;
    while (part < whole) {
      const int64_t step = smaller(smaller(P, a.channel - used), depth - part);
      part += step;
      pairs += pairs_of(step);
      ++panels;
      used = used + step == a.channel ? 0 : used + step;
    }
    for (int64_t i = 0; i < m;) {
      const int rows = rows_of_block(Block<V>::rows, m - i);
      PairOperand block = a;
      block.data += i * P;
      pair_block_rows<V>(rows, part, block, packed, c + i * P, first ? bias : nullptr, !first);
      i += rows;
    }
    packed += pairs * 2 * P;
    a.data += panels * a.panel;
    a.used = used;
    depth -= part;
    first = false;
  }
}

}  // namespace
}  // namespace fused_inr
#endif
