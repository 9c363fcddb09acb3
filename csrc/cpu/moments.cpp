// Moments of a map under normal pre-activations (docs/architecture.md, section 8). A chunk of draws is generated once and
// passed through the map's jet for setting after setting; sums are kept in float64 and added in one order, whatever the
// number of threads.
#include "../philox.h"
#include "map.h"
#include "tile.h"

namespace fused_inr {
namespace {

using V = Vector<float>;
constexpr int64_t kChunk = 4096;     // draws of a sum, as in fused_inr/ops/moments.py
constexpr int64_t kBlock = 1024;     // draws that pass through the jet at a time: they stay in the first-level cache
constexpr int64_t kSettings = 64;    // of a task: their draws are generated once
constexpr int kLanes = 16;           // running sums of a value, whatever the width of the machine's vectors
constexpr int kMaxBranches = 16;

// Philox over vectors: 64-bit lanes whose low halves are the words. A product of two low halves is one instruction, and what
// it leaves in the high halves is ignored by the next one, so that no word is ever moved.
typedef uint64_t Lanes __attribute__((vector_size(V::bytes)));
typedef uint32_t Words __attribute__((vector_size(V::bytes / 2)));

template <class L>
FI_INLINE L low_product(L a, L b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 64) return (L)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(L) == 32) return (L)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(L) == 16) return (L)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
  return (a & 0xffffffffu) * (b & 0xffffffffu);
}

// Four words a counter, each kind in an array of its own; `count` is a multiple of the lanes, and of 16 at least.
void words(uint64_t q, int64_t count, uint32_t branch, uint64_t seed, uint32_t* w0, uint32_t* w1, uint32_t* w2, uint32_t* w3) {
  constexpr int lanes = V::size / 2;
  const Lanes m0 = 0xD2511F53u - Lanes{}, m1 = 0xCD9E8D57u - Lanes{};
  Lanes step;
  for (int i = 0; i < lanes; ++i) step[i] = static_cast<uint64_t>(i);
  for (int64_t i = 0; i < count; i += 2 * lanes) {
    Lanes c0[2], c1[2], c2[2], c3[2];  // two at a time: their chains of products overlap
    for (int j = 0; j < 2; ++j) {
      const Lanes at = q + static_cast<uint64_t>(i + j * lanes) + step;
      c0[j] = at;  // the high half is ignored
      c1[j] = at >> 32;
      c2[j] = static_cast<uint64_t>(branch) - Lanes{};
      c3[j] = Lanes{};
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const Lanes p0 = low_product(c0[j], m0), p1 = low_product(c2[j], m1);
        c0[j] = (p1 >> 32) ^ c1[j] ^ (static_cast<uint64_t>(k0) - Lanes{});
        c1[j] = p1;
        c2[j] = (p0 >> 32) ^ c3[j] ^ (static_cast<uint64_t>(k1) - Lanes{});
        c3[j] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int j = 0; j < 2; ++j) {
      const Lanes c[4] = {c0[j], c1[j], c2[j], c3[j]};
      uint32_t* to[4] = {w0, w1, w2, w3};
      for (int k = 0; k < 4; ++k) {
        const Words low = __builtin_convertvector(c[k], Words);
        __builtin_memcpy(to[k] + i + j * lanes, &low, sizeof(low));
      }
    }
  }
}

// Box-Muller: two words to two normals. n is a multiple of the vector's size.
void normals(const uint32_t* even, const uint32_t* odd, int64_t n, float* first, float* second) {
  typedef uint32_t Unsigned __attribute__((vector_size(V::bytes)));
  typedef int32_t Signed __attribute__((vector_size(V::bytes)));
  for (int64_t i = 0; i < n; i += V::size) {
    Unsigned a;
    Signed b;
    __builtin_memcpy(&a, even + i, sizeof(a));
    __builtin_memcpy(&b, odd + i, sizeof(b));
    const V u = fma(V(__builtin_convertvector(a, V::Native)), V(0x1p-32), V(0x1p-33));  // in (0, 1]
    const V t = V(__builtin_convertvector(b, V::Native)) * V(static_cast<float>(3.14159265358979323846 * 0x1p-31));
    const V e = V(-2.0) * fi_log(u);
    const V r = square_root(select(e > V(0.0), e, V(0.0)));
    V s, c;
    fi_sincos(t, s, c);
    (r * c).store(first + i);
    (r * s).store(second + i);
  }
}

// Sums of v, v^2, v^4 in float64: `lane` holds kLanes of each; n is a multiple of kLanes except in the last call.
typedef float Four __attribute__((vector_size(16)));
typedef double Wide __attribute__((vector_size(32)));

FI_INLINE void add_powers(const float* v, int64_t n, double* lane) {
  constexpr int kGroups = kLanes / 4;
  Wide sum[3][kGroups];
  __builtin_memcpy(sum, lane, sizeof(sum));
  float last[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const float* from = v + i;
    if (__builtin_expect(i + kLanes > n, false)) {
      for (int64_t j = 0; j < kLanes; ++j) last[j] = j < n - i ? v[i + j] : 0.0f;  // zeros add nothing
      from = last;
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      Four four;
      __builtin_memcpy(&four, from + 4 * g, sizeof(four));
      const Wide x = __builtin_convertvector(four, Wide), square = x * x;
      sum[0][g] += x;
      sum[1][g] += square;
      sum[2][g] += square * square;
    }
  }
  __builtin_memcpy(lane, sum, sizeof(sum));
}

double add_lanes(const double* lane) {
  double s[kLanes];
  for (int i = 0; i < kLanes; ++i) s[i] = lane[i];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}

}  // namespace

void FI_EXPORTED(moments)(const Moments& m) {
  const int values = m.outputs * (1 + m.branches);
  const int64_t chunks = (m.samples + kChunk - 1) / kChunk, groups = (m.settings + kSettings - 1) / kSettings;
  const int64_t tasks = chunks * groups;
  const double work = static_cast<double>(m.samples) * static_cast<double>(m.settings) * 16 * values;
  const int64_t parts = work < kSerialWork ? 1 : smaller(m.threads, tasks);
  const Map<float> jet = reinterpret_cast<Map<float>>(m.jet);
  Queue queue;
  run_parts(m.parallel, parts, [&](int64_t) {
    Arena arena((kChunk * (m.branches + 1) + kBlock * (m.branches + values)) * 4 + values * 3 * kLanes * 8 + 64 * 8);
    float* normal = arena.take<float>(kChunk * m.branches);
    uint32_t* word = arena.take<uint32_t>(kChunk);
    float* z = arena.take<float>(kBlock * m.branches);
    float* value = arena.take<float>(kBlock * values);
    double* lane = arena.take<double>(values * 3 * kLanes);
    const float* in[kMaxStreams];
    int64_t stride[kMaxStreams];
    float* out[kMaxStreams];
    for (int b = 0; b < m.branches; ++b) {
      in[b] = z + b * kBlock;
      stride[b] = 1;
    }
    for (int j = 0; j < m.params; ++j) stride[m.branches + j] = 0;
    for (int k = 0; k < values; ++k) out[k] = value + k * kBlock;

    for (int64_t task = queue.next(); task < tasks; task = queue.next()) {
      const int64_t chunk = task / groups, group = task % groups;
      const int64_t n = smaller(kChunk, m.samples - chunk * kChunk);
      const uint64_t q = static_cast<uint64_t>(m.start + chunk * kChunk) / 4;
      constexpr int64_t quarter = kChunk / 4;
      for (int b = 0; b < m.branches; ++b) {
        float* own = normal + b * kChunk;
        words(q, quarter, static_cast<uint32_t>(b), m.seed, word, word + quarter, word + 2 * quarter, word + 3 * quarter);
        normals(word, word + quarter, quarter, own, own + quarter);
        normals(word + 2 * quarter, word + 3 * quarter, quarter, own + 2 * quarter, own + 3 * quarter);
        if (n < kChunk) {  // draw 4 i + j lies at i of quarter j: what is wanted of each quarter is its beginning
          int64_t filled = 0;
          for (int64_t j = 0; j < 4; ++j) {
            const int64_t wanted = (n - j + 3) / 4;
            for (int64_t i = 0; i < wanted; ++i) own[filled + i] = own[j * quarter + i];
            filled += wanted;
          }
        }
      }
      for (int64_t g = group * kSettings; g < smaller(m.settings, (group + 1) * kSettings); ++g) {
        for (int j = 0; j < m.params; ++j) in[m.branches + j] = m.param + g * m.params + j;
        for (int64_t i = 0; i < values * 3 * kLanes; ++i) lane[i] = 0;
        for (int64_t begin = 0; begin < n; begin += kBlock) {
          const int64_t count = smaller(kBlock, n - begin);
          for (int b = 0; b < m.branches; ++b) {
            const float sigma = m.sigma[g * m.branches + b];
            const float* from = normal + b * kChunk + begin;
            float* to = z + b * kBlock;
            for (int64_t i = 0; i < count; ++i) to[i] = sigma * from[i];
          }
          jet(count, in, stride, out);
          for (int k = 0; k < values; ++k) add_powers(out[k], count, lane + k * 3 * kLanes);
        }
        double* sums = m.sums + (chunk * m.settings + g) * values * 3;
        for (int k = 0; k < 3 * values; ++k) sums[k] = add_lanes(lane + k * kLanes);
      }
    }
  });
}

void FI_EXPORTED(random_bits)(int64_t start, int64_t count, int64_t branch, uint64_t seed, int64_t* to) {
  constexpr int64_t kMost = 256;
  uint32_t w[4][kMost];
  for (int64_t begin = 0; begin < count / 4; begin += kMost) {
    const int64_t n = smaller(kMost, count / 4 - begin);
    words(static_cast<uint64_t>(start / 4 + begin), kMost, static_cast<uint32_t>(branch), seed, w[0], w[1], w[2], w[3]);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < 4; ++j) to[4 * (begin + i) + j] = w[j][i];
  }
}

}  // namespace fused_inr
