// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the counter is the position, so any
// thread can draw any number of the stream. Host and device.
#pragma once

#include <stdint.h>

#ifndef FI_INLINE
#define FI_INLINE static inline __attribute__((always_inline))
#endif

namespace fused_inr {

// The four words of draws 4 q .. 4 q + 3 of a branch, as docs/architecture.md (section 8) lays the counter out.
FI_INLINE void philox(uint64_t q, uint32_t branch, uint64_t seed, uint32_t* x) {
  uint32_t c0 = static_cast<uint32_t>(q), c1 = static_cast<uint32_t>(q >> 32), c2 = branch, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t h0 = static_cast<uint32_t>(p0 >> 32), h1 = static_cast<uint32_t>(p1 >> 32);
    c0 = h1 ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = h0 ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  x[0] = c0;
  x[1] = c1;
  x[2] = c2;
  x[3] = c3;
}

}  // namespace fused_inr
