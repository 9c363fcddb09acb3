// What the reader of PTX (reader.py) and the engine share: decoded instructions, memory, reports.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace {

// One instruction. `operands[first ..]` are byte offsets into a warp's registers: `targets` that it writes, then its
// sources. What count, size, width, flags and value mean is the operation's affair (engine.cpp); for loads and stores:
// `count` elements of `size` bytes in memory and `width` bytes in registers, `value` added to the address.
struct Instruction {
  int32_t op, guard, guard_negated, first, targets, operands, count, size, width, flags;
  int64_t value;
};
// A register that holds the same number for all lanes from the start.
struct Constant {
  int32_t offset, width;
  u64 value;
};
// Memory that a kernel may reach: an address of the device's, and where its bytes are.
struct Region {
  u64 address, bytes;
  uint8_t *host;
};
struct PtxProgram {
  const Instruction *code;
  int32_t instructions, register_bytes, constants, local_bytes;
  const int32_t *operands;
  const Constant *constant;
  // the smallest access to shared and to global memory: what shadow memory keeps apart
  int32_t shared_granule, global_granule;
  // whether there are instructions that hold registers until they are waited for, and barriers of a part of the warps
  int32_t watches_registers, has_partial_barriers;
};
// A wgmma that a warp ran: its matrix descriptors (A's is 0 where A lies in registers).
struct Wgmma {
  int32_t instruction, block, warp, registers;
  u64 a, b;
};
struct Launch {
  int32_t grid[3], warps, shared_bytes, regions, reports_room;
  const uint8_t *parameters;
  const Region *region;
  int32_t races, errors, cut_sums, order, statistics, products_room;
  u64 limit;
  Wgmma *products;  // the first `products_room` of them; how many there were
  u64 *products_seen;
};

enum Kind : int32_t {
  OUT_OF_BOUNDS_READ, OUT_OF_BOUNDS_WRITE, MISALIGNED, READ_AFTER_WRITE, WRITE_AFTER_READ, WRITE_AFTER_WRITE,
  BLOCK_READ_AFTER_WRITE, BLOCK_WRITE_AFTER_READ, BLOCK_WRITE_AFTER_WRITE, UNINITIALISED, COPY_PENDING,
  OPERAND_IN_FLIGHT, REGISTERS_IN_FLIGHT, NO_WGMMA_FENCE, NO_PROXY_FENCE, DIVERGENT, INACTIVE_LANE, EXITED_WARP,
  DEADLOCK, ENDLESS, TRAP, TENSOR_MEMORY, UNUSED_RACE, LANE_READ_AFTER_WRITE, LANE_WRITE_AFTER_READ, SAME_VALUE,
  LATE_FACTOR
};
struct Report {
  int32_t kind, instruction, other, block, warp, lane, other_warp, bytes;
  u64 address, count;
};

// Addresses of a device. Shared memory starts above 0, so that a null pointer lies outside of it; the generic addresses
// of shared and of local memory are in windows of their own.
const u32 SHARED_BASE = 1024;
const u64 SHARED_WINDOW = 1ull << 60, LOCAL_WINDOW = 1ull << 61;

}  // namespace
