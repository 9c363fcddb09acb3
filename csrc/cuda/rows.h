// What the CUDA kernels offer to operators: plain structs and raw pointers, no PyTorch and no CUDA header.
#pragma once

#include <stdint.h>

#include "../streams.h"

namespace fused_inr {

constexpr int kMaxIn = 20;    // groups of streams of one map; with kMaxOut and kMaxSums, what fits a kernel's arguments
constexpr int kMaxOut = 12;
constexpr int kMaxSums = 16;
constexpr int kThreads = 256;

// Whether every group of every level has its place in MapRows.
constexpr bool fits(int branches, int outputs, int params) {
  for (int slot = 0; slot < kLevelSlots; ++slot)
    if (groups_of(kInputs[slot], params) > kMaxIn || groups_of(kResults[slot], params) > kMaxOut) return false;
  return branches + params <= kMaxSums && branches >= 1 && outputs >= 1;
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
  Stream in[kMaxIn], out[kMaxOut];  // in the order of kInputs and kResults; outputs that are summed, or not wanted, have no data
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
  Kernel kernel[kLevelSlots];
};

// Ends with a row without a name.
extern const Maps cuda_maps_float[], cuda_maps_double[];

// Whether the current device runs code of this library; nullptr, or why not.
const char* cuda_refusal();

}  // namespace fused_inr
