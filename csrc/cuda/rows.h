// What the CUDA kernels offer to operators: plain structs and raw pointers, no PyTorch and no CUDA header.
#pragma once

#include <stdint.h>

#include "../streams.h"

namespace fused_inr {

constexpr int kSlots = 6;     // levels 0 to 3 with constant parameters, levels 1 and 2 with learnable ones
constexpr int kMaxIn = 20;    // groups of streams of one map; with kMaxOut and kMaxSums, what fits a kernel's arguments
constexpr int kMaxOut = 12;
constexpr int kMaxSums = 16;
constexpr int kThreads = 256;

inline int slot_of(int level, bool learnable) {
  if (learnable && level > 0) return level <= 2 ? 3 + level : -1;
  return level <= 3 ? level : -1;
}

// The groups of a map's inputs and outputs, derived level by level (docs/architecture.md, section 1).
struct Groups {
  int ins = 0, outs = 0;
  int in_width[kMaxIn] = {}, out_width[kMaxOut] = {};
  bool in_column[kMaxIn] = {}, out_sum[kMaxOut] = {};  // one value a feature; summed over rows

  constexpr int streams_in() const {
    int n = 0;
    for (int i = 0; i < ins; ++i) n += in_width[i];
    return n;
  }
  constexpr int streams_out() const {
    int n = 0;
    for (int i = 0; i < outs; ++i) n += out_width[i];
    return n;
  }
};

constexpr Groups groups_of(int branches, int outputs, int params, int level, bool learnable) {
  Groups g;
  g.in_width[g.ins++] = branches;
  for (int p = 0; p < params; ++p) {
    g.in_column[g.ins] = true;
    g.in_width[g.ins++] = 1;
  }
  g.out_width[g.outs++] = outputs;
  for (int l = 1; l <= level; ++l) {
    Groups next = g;
    for (int i = 0; i < g.outs; ++i) {
      next.in_column[next.ins] = g.out_sum[i];
      next.in_width[next.ins++] = g.out_width[i];
    }
    next.outs = 0;
    for (int i = 0; i < g.ins; ++i) {
      if (!learnable && i >= 1 && i <= params) continue;
      next.out_sum[next.outs] = g.in_column[i];
      next.out_width[next.outs++] = g.in_width[i];
    }
    g = next;
  }
  return g;
}

// Whether every group of every level has its place in MapRows.
constexpr bool fits(int branches, int outputs, int params) {
  return 3 + 2 * params <= kMaxIn && 3 + 3 + params <= kMaxIn && 2 + params <= kMaxOut && branches + params <= kMaxSums &&
         branches >= 1 && outputs >= 1;
}

// Rows of numbers; strides in elements, 0 where one value serves all.
struct Stream {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 1;
  double value = 0.0;  // of a parameter without data
  Storage storage = Storage::float32;
  bool wide = false;  // neighbours may be moved together: set by the launcher
};

// A sum over rows: one value a feature.
struct Sum {
  void* data = nullptr;  // nullptr: not wanted
  int64_t batch_stride = 0;
  Storage storage = Storage::float32;
};

// One map over all rows. Branch k of a group of width w stands in columns k * features .. (k + 1) * features.
struct MapRows {
  int64_t batch = 1, rows = 0, features = 0;
  Stream in[kMaxIn], out[kMaxOut];  // in the order of Groups; outputs that are summed, or not wanted, have no data
  Stream bias;                      // levels 0 and 1: added to z when it is read, where there is one
  Stream z;                         // level 0: z with its bias is written there, where wanted
  Sum sum[kMaxSums];                // level 1: the gradient of the bias, a sum a branch; then, learnable, of each parameter
  void* partial = nullptr;          // plan().partials values in the compute type
  int lane_bits = 5;                // 2^lane_bits threads side by side in a row; the launcher deals out, see Plan
  uint32_t tiles = 1, row_blocks = 1;
};

// How rows are dealt out to blocks. It depends on the sizes alone, so the order of a sum is always the same.
struct Plan {
  int lane_bits;
  int64_t tiles, row_blocks, partials;
};

inline Plan plan(int64_t batch, int64_t rows, int64_t features, int width, int sums) {
  constexpr int64_t blocks = 2048;  // more than are in flight on any device; the rest of the rows come in strides
  Plan p;
  p.lane_bits = 0;
  while (p.lane_bits < 5 && (static_cast<int64_t>(width) << p.lane_bits) < features) ++p.lane_bits;
  const int64_t columns = static_cast<int64_t>(width) << p.lane_bits;
  p.tiles = (features + columns - 1) / columns;
  const int64_t block_rows = (kThreads >> p.lane_bits) * (sums ? 4 : 1);  // a partial sum stands for some rows
  const int64_t wanted = (rows + block_rows - 1) / block_rows;
  const int64_t limit = (sums ? blocks / 2 : blocks) / (p.tiles * batch > 0 ? p.tiles * batch : 1);
  p.row_blocks = wanted < limit ? wanted : limit;
  if (p.row_blocks < 1) p.row_blocks = 1;
  p.partials = sums && p.row_blocks > 1 ? batch * p.row_blocks * sums * features : 0;
  return p;
}

// Runs a map on a stream (a cudaStream_t); nullptr, or what went wrong.
using Launch = const char* (*)(MapRows rows, void* stream);

struct Kernel {
  Launch launch;
  int width, sums;  // features a thread works on; sums over rows that it can give
};

struct Maps {  // of one scalar type
  const char* name;
  int branches, outputs, params;
  Kernel kernel[kSlots];
};

// Ends with a row without a name.
extern const Maps cuda_maps_float[], cuda_maps_double[];

// Whether the current device runs code of this library; nullptr, or why not.
const char* cuda_refusal();

}  // namespace fused_inr
