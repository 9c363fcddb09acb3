// Shadow memory: who wrote and read a piece of memory last, and whether what happened since orders that.
//
// A barrier of all warps of a block starts a new epoch: what is of an earlier one is ordered. Barriers of a part of the
// warps divide an epoch into segments: each warp knows how many of another's segments come before it. Blocks run one
// after the other here and in no order on a device: an epoch before the block's first is another block's.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "engine.h"

namespace {

const int MOST_WARPS = 32;

struct Cell {
  u32 w_epoch, w_instruction, w_sync;
  u32 r_epoch, r_instruction, r_sync, r_warps;
  u32 r_before;     // the last read by another warp than r_warp
  u32 w_fences;     // proxy fences of the writing warp before it wrote
  u32 tensor_read;  // shared memory: the last product of tcgen05 that reads it
  uint16_t w_segment;
  uint8_t w_warp, w_lane, r_lane, r_many;           // r_many: read by more than one lane
  uint8_t initialised, pending, in_flight, r_warp;  // shared memory: written; being copied to; read by so many wgmma
};

// A warp as shadow memory sees it.
struct Agent {
  int warp;
  u32 sync;                     // warp barriers so far: they order the lanes of a warp
  uint16_t segment;             // barriers of a part of the warps in this epoch
  uint16_t before[MOST_WARPS];  // how many segments of each warp come before
  u32 fences, fences_published, fence_epoch;  // proxy fences so far; before the last barrier; epoch of the last one
  u32 tensor_seen;              // products of tcgen05 known to be done
};

// One shadow memory's cells, made where they are first touched.
class Pages {
 public:
  static const int BITS = 11;
  Cell *at(u64 index) {
    const u64 page = index >> BITS;
    if (page != last_ || !cells_) {
      auto &found = pages_[page];
      if (!found) found.reset(new Cell[1 << BITS]());
      last_ = page;
      cells_ = found.get();
    }
    return cells_ + (index & ((1 << BITS) - 1));
  }

 private:
  std::unordered_map<u64, std::unique_ptr<Cell[]>> pages_;
  u64 last_ = 0;
  Cell *cells_ = nullptr;
};

}  // namespace
