// What the engine and the kernels of every backend agree on: how numbers are stored, the streams of a map at every level
// (docs/architecture.md, section 1), and its slot in a table. No header of PyTorch or CUDA.
#pragma once

#include "generated/levels.h"

namespace fused_inr {

enum class Storage : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// The slot of a level's map in a table; -1 where no table has one.
constexpr int slot_of(int level, bool learnable) {
  if (learnable && level > 0) return level <= kMaxLearnableLevel ? kMaxLevel + level : -1;
  return level <= kMaxLevel ? level : -1;
}
constexpr int jet_slot(bool learnable) { return learnable ? kLearnableJetSlot : kJetSlot; }

// The number of streams, and of groups, of kInputs or kResults for a map with B branches, C outputs and P parameters.
constexpr int streams_of(const char* kinds, int B, int C, int P) {
  int n = 0;
  for (; *kinds; ++kinds) n += *kinds == 'z' ? B : *kinds == 'y' ? C : P;
  return n;
}
constexpr int groups_of(const char* kinds, int P) {
  int n = 0;
  for (; *kinds; ++kinds) n += *kinds == 'p' ? P : 1;
  return n;
}

}  // namespace fused_inr
