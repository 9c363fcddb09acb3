// The moments kernels, as operators see them: plain structs and raw pointers.
#pragma once

#include <stdint.h>

namespace fused_inr {

constexpr int kChunk = 4096;  // draws of a sum, as in fused_inr/ops/moments.py

// Sums of v, v^2, v^4 over each chunk of draws, for every setting; docs/architecture.md, section 8.
struct MomentsCall {
  const float* sigmas = nullptr;  // [settings, B]
  const float* params = nullptr;  // [settings, P]
  double* out = nullptr;          // [chunks, settings, C (1 + B), 3]
  int64_t settings = 0, chunks = 0;
  int64_t start = 0, samples = 0;  // start: a multiple of 4
  uint64_t seed = 0;
  int64_t own = 1, groups = 1;  // settings of a block, and blocks of a chunk; the launcher deals out
};

struct Moments {
  const char* name;
  int branches, outputs, params;
  const char* (*launch)(MomentsCall call, void* stream);  // nullptr, or what went wrong
};

// Ends with a row without a name.
extern const Moments cuda_moments[];

// The words of `count` draws of a branch, in their order; start and count are multiples of 4.
const char* cuda_random_bits(int64_t* out, int64_t start, int64_t count, uint32_t branch, uint64_t seed, void* stream);

}  // namespace fused_inr
