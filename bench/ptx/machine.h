// A launch: its blocks, one after the other; the warps of a block; memory, with what shadow memory finds.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "shadow.h"

namespace {

// An asynchronous copy of one lane, from global to shared memory.
struct Copy {
  u32 to;
  u64 from;
  int bytes, valid, lane, instruction;
};
// A path that some lanes of a warp take: where they are, and where they meet those of other paths (-1: nowhere).
struct Path {
  int at;
  u32 lanes;
  int until;
};
enum class State { ready, at_barrier, yielded, done };

struct Warp {
  std::vector<uint8_t> storage;
  uint8_t *registers;
  int index;
  u32 exited;
  Path path;                // the one that runs
  std::vector<Path> paths;  // those that wait, the next one last
  State state;
  Agent agent;
  // cp.async: copies of no group yet; groups that were committed
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> copy_groups;
  // wgmma: cells and registers of products of no group yet; of groups that were committed
  struct Products {
    std::vector<u32> cells;  // granules of shared memory
    std::vector<int32_t> sums, fragments;  // registers, by the piece that they begin at
  };
  Products products;
  std::vector<Products> product_groups;
  // Of registers, by the piece of 64 bytes that they begin at: how many products (or loads from tensor memory) will still
  // write them, how many will still read them, the step at which they were written
  std::vector<uint8_t> to_be_written, to_be_read;
  std::vector<u32> written;
  u32 steps, fenced;  // instructions so far; of the last wgmma.fence
  // tcgen05: registers that loads will still write, pieces of tensor memory that stores have not reached yet
  std::vector<int32_t> loads;
  std::vector<u32> stores;
  // Values that a race left uncertain, as lanes of registers; which race
  std::vector<u32> uncertain;
  std::vector<int> because;
  int uncertain_registers;
  std::vector<uint8_t> local;
};

// At a barrier: which warp, whether it waits, and what comes before it.
struct Arrival {
  int warp;
  bool waits;
  u32 epoch;
  uint16_t before[MOST_WARPS];
};
struct Barrier {
  std::vector<Arrival> arrived;
  int threads = 0;  // 0: all of the block
};

class Reports {
 public:
  struct Entry {
    Report report;
    bool used;  // of a read that a race made uncertain: whether what was read had an effect
  };
  int add(Kind kind, int instruction, int other, int block, int warp, int lane, int other_warp, u64 address, int bytes,
          bool used = true) {
    const u64 key = ((u64)kind << 56) | ((u64)(u32)instruction << 28) | (u32)(other + 1);
    auto found = index_.find(key);
    if (found != index_.end()) {
      entries_[found->second].report.count++;
      return found->second;
    }
    index_[key] = (int)entries_.size();
    entries_.push_back({{kind, instruction, other, block, warp, lane, other_warp, bytes, address, 1}, used});
    return (int)entries_.size() - 1;
  }
  void use(int index) { entries_[index].used = true; }
  int write(Report *out, int room) {
    std::sort(entries_.begin(), entries_.end(), [](const Entry &a, const Entry &b) {
      return std::tie(a.report.kind, a.report.instruction, a.report.other) <
             std::tie(b.report.kind, b.report.instruction, b.report.other);
    });
    int n = 0;
    for (Entry &e : entries_) {
      if (!e.used) e.report.kind = UNUSED_RACE;
      if (n < room) out[n] = e.report;
      n++;
    }
    return n;
  }

 private:
  std::unordered_map<u64, int> index_;
  std::vector<Entry> entries_;
};

enum class Space { global, shared, local };

class Machine {
 public:
  Machine(const PtxProgram &program, const Launch &launch, u64 *counts, u64 *waves, u64 *more)
      : program(program), launch(launch), counts(counts), waves(waves), more(more), global_cells(launch.regions), warps(launch.warps) {}

  const PtxProgram &program;
  const Launch &launch;
  // of each instruction: how often a warp ran it; wavefronts of shared memory or sectors of global memory; the sectors
  // of asynchronous copies. Of products of tcgen05: multiply-adds (of halves: TF32 counts twice), wavefronts of operands
  u64 *counts, *waves, *more;
  Reports reports;
  std::vector<uint8_t> shared;
  std::vector<Cell> shared_cells;
  std::vector<Pages> global_cells;
  std::vector<Warp> warps;
  Barrier barriers[16];
  u32 epoch = 0, first_epoch = 0;
  int block = 0;

  int report(Kind kind, int instruction, int other, const Agent &a, int lane, int other_warp, u64 address, int bytes,
             bool used = true) {
    return reports.add(kind, instruction, other, block, a.warp, lane, other_warp, address, bytes, used);
  }

  // -- what orders two accesses

  bool write_comes_before(const Cell &c, const Agent &a) const {
    return c.w_epoch != epoch || c.w_warp == a.warp || (program.has_partial_barriers && c.w_segment < a.before[c.w_warp]);
  }
  // A warp that reads in this epoch without coming before this one, or -1.
  int reader_beside(const Cell &c, const Agent &a) {
    const u32 others = c.r_epoch == epoch ? c.r_warps & ~(1u << a.warp) : 0;
    if (!others) return -1;
    if (!program.has_partial_barriers) return __builtin_ctz(others);
    const auto &segments = read_segments[&c];
    for (int v = 0; v < launch.warps; v++)
      if ((others >> v & 1) && segments[v] >= a.before[v]) return v;
    return -1;
  }

  // -- one access, one cell

  // Return the number of a report if a race makes what is read uncertain, -1 otherwise.
  template <bool is_shared>
  int check_read(const Cell &c, const Agent &a, int lane, int instruction, u64 address, int bytes) {
    int uncertain = -1;
    if (is_shared) {
      if (c.pending) report(COPY_PENDING, instruction, (int)c.w_instruction, a, lane, c.w_warp, address, bytes);
      if (!c.initialised) report(UNINITIALISED, instruction, -1, a, lane, 0, address, bytes);
    } else if (c.w_epoch && c.w_epoch < first_epoch) {
      uncertain = report(BLOCK_READ_AFTER_WRITE, instruction, (int)c.w_instruction, a, lane, c.w_warp, address, bytes, false);
    }
    if (!write_comes_before(c, a))
      uncertain = report(READ_AFTER_WRITE, instruction, (int)c.w_instruction, a, lane, c.w_warp, address, bytes, false);
    else if (c.w_epoch == epoch && c.w_warp == a.warp && c.w_lane != lane && c.w_sync == a.sync)
      report(LANE_READ_AFTER_WRITE, instruction, (int)c.w_instruction, a, lane, c.w_warp, address, bytes);
    return uncertain;
  }
  template <bool is_shared>
  int read(Cell &c, const Agent &a, int lane, int instruction, u64 address, int bytes) {
    const int uncertain = check_read<is_shared>(c, a, lane, instruction, address, bytes);
    record_read(c, a, lane, instruction);
    return uncertain;
  }
  void record_read(Cell &c, const Agent &a, int lane, int instruction) {
    if (c.r_epoch != epoch) {
      c.r_warps = 0;
      c.r_many = 0;
    } else if (c.r_lane != lane || c.r_sync != a.sync) {
      c.r_many = 1;
    }
    if (c.r_warp != a.warp) c.r_before = c.r_instruction;
    c.r_warp = (uint8_t)a.warp;
    c.r_epoch = epoch;
    c.r_warps |= 1u << a.warp;
    c.r_instruction = (u32)instruction;
    c.r_lane = (uint8_t)lane;
    c.r_sync = a.sync;
    if (program.has_partial_barriers) read_segments[&c][a.warp] = a.segment;
  }
  // What is written, and what was there: if it is the same, the order of two writes is indifferent.
  template <bool is_shared>
  void write(Cell &c, Agent &a, int lane, int instruction, u64 address, int bytes, const uint8_t *data,
             const uint8_t *before) {
    auto beside = [&](Kind kind) { return memcmp(data, before, bytes) ? kind : SAME_VALUE; };
    const int writer = (int)c.w_instruction, reader = (int)(c.r_warp == a.warp ? c.r_before : c.r_instruction);
    if (is_shared) {
      if (c.in_flight || c.tensor_read > a.tensor_seen)
        report(OPERAND_IN_FLIGHT, instruction, reader, a, lane, c.r_lane, address, bytes);
      if (c.pending) report(COPY_PENDING, instruction, writer, a, lane, c.w_warp, address, bytes);
    } else {
      if (c.w_epoch && c.w_epoch < first_epoch)
        report(beside(BLOCK_WRITE_AFTER_WRITE), instruction, writer, a, lane, c.w_warp, address, bytes);
      if (c.r_epoch && c.r_epoch < first_epoch)
        report(BLOCK_WRITE_AFTER_READ, instruction, (int)c.r_instruction, a, lane, c.r_warp, address, bytes);
    }
    if (!write_comes_before(c, a))
      report(beside(WRITE_AFTER_WRITE), instruction, writer, a, lane, c.w_warp, address, bytes);
    const int v = reader_beside(c, a);
    if (v >= 0)
      report(WRITE_AFTER_READ, instruction, reader, a, lane, v, address, bytes);
    else if (c.r_epoch == epoch && (c.r_warps >> a.warp & 1) && c.r_sync == a.sync && (c.r_many || c.r_lane != lane))
      report(LANE_WRITE_AFTER_READ, instruction, (int)c.r_instruction, a, lane, a.warp, address, bytes);
    c.w_epoch = epoch;
    c.w_warp = (uint8_t)a.warp;
    c.w_lane = (uint8_t)lane;
    c.w_instruction = (u32)instruction;
    c.w_sync = a.sync;
    c.w_segment = a.segment;
    c.w_fences = a.fences;
    c.initialised = 1;
  }

  // -- memory: where an access goes, or nullptr

  const Region *region_of(u64 address, int bytes) {
    auto holds = [&](const Region &r) { return address >= r.address && address - r.address + bytes <= r.bytes; };
    if (last_region && holds(*last_region)) return last_region;
    for (int i = 0; i < launch.regions; i++)
      if (holds(launch.region[i])) return last_region = launch.region + i;
    return nullptr;
  }
  uint8_t *global_at(u64 address, int bytes, bool writes, const Agent &a, int lane, int instruction) {
    if (address % bytes) report(MISALIGNED, instruction, -1, a, lane, 0, address, bytes);
    const Region *r = region_of(address, bytes);
    if (r) return r->host + (address - r->address);
    report(writes ? OUT_OF_BOUNDS_WRITE : OUT_OF_BOUNDS_READ, instruction, -1, a, lane, 0, address, bytes);
    return nullptr;
  }
  uint8_t *shared_at(u64 address, int bytes, bool writes, const Agent &a, int lane, int instruction) {
    if (address % bytes) report(MISALIGNED, instruction, -1, a, lane, 0, address, bytes);
    if (address >= SHARED_BASE && address - SHARED_BASE + bytes <= (u64)launch.shared_bytes)
      return shared.data() + (address - SHARED_BASE);
    report(writes ? OUT_OF_BOUNDS_WRITE : OUT_OF_BOUNDS_READ, instruction, -1, a, lane, 0, address, bytes);
    return nullptr;
  }
  uint8_t *local_at(Warp &w, u64 address, int bytes, bool writes, int lane, int instruction) {
    if (address % bytes) report(MISALIGNED, instruction, -1, w.agent, lane, 0, address, bytes);
    if (address + bytes <= (u64)program.local_bytes) return w.local.data() + (u64)lane * program.local_bytes + address;
    report(writes ? OUT_OF_BOUNDS_WRITE : OUT_OF_BOUNDS_READ, instruction, -1, w.agent, lane, 0, address, bytes);
    return nullptr;
  }

  // Shadow memory of one access to an address that is there. Reads return a report's number, or -1.
  int read_shared(u64 address, int bytes, Agent &a, int lane, int instruction) {
    if (!launch.races) return -1;
    const u64 at = address - SHARED_BASE;
    int uncertain = -1;
    for (u64 c = at / program.shared_granule; c <= (at + bytes - 1) / program.shared_granule; c++)
      uncertain = std::max(uncertain, read<true>(shared_cells[c], a, lane, instruction, address, bytes));
    return uncertain;
  }
  void write_shared(u64 address, int bytes, Agent &a, int lane, int instruction, const uint8_t *data) {
    if (!launch.races) return;
    const u64 at = address - SHARED_BASE;
    for (u64 c = at / program.shared_granule; c <= (at + bytes - 1) / program.shared_granule; c++)
      write<true>(shared_cells[c], a, lane, instruction, address, bytes, data, shared.data() + at);
  }
  int read_global(u64 address, int bytes, Agent &a, int lane, int instruction) {
    if (!launch.races) return -1;
    const Region *r = region_of(address, bytes);
    Pages &pages = global_cells[r - launch.region];
    const u64 base = r->address / program.global_granule;
    int uncertain = -1;
    for (u64 c = address / program.global_granule; c <= (address + bytes - 1) / program.global_granule; c++)
      uncertain = std::max(uncertain, read<false>(*pages.at(c - base), a, lane, instruction, address, bytes));
    return uncertain;
  }
  void write_global(u64 address, int bytes, Agent &a, int lane, int instruction, const uint8_t *data) {
    if (!launch.races) return;
    const Region *r = region_of(address, bytes);
    Pages &pages = global_cells[r - launch.region];
    const u64 base = r->address / program.global_granule;
    const uint8_t *before = r->host + (address - r->address);
    for (u64 c = address / program.global_granule; c <= (address + bytes - 1) / program.global_granule; c++)
      write<false>(*pages.at(c - base), a, lane, instruction, address, bytes, data, before);
  }

  // -- statistics: wavefronts of an access to shared memory, sectors of one to global memory

  void count_wavefronts(int instruction, const u64 *address, u32 lanes, int bytes) {
    const int together = bytes <= 4 ? 32 : 128 / bytes;  // lanes that are served in one go, if no bank is asked twice
    for (int first = 0; first < 32; first += together) {
      u64 words[128];
      int n = 0, of_bank[32] = {0}, most = 0;
      for (int i = first; i < first + together; i++)
        if (lanes >> i & 1)
          for (int b = 0; b < std::max(bytes, 4); b += 4) words[n++] = (address[i] + b) >> 2;
      std::sort(words, words + n);
      n = (int)(std::unique(words, words + n) - words);
      for (int i = 0; i < n; i++) most = std::max(most, ++of_bank[words[i] & 31]);
      waves[instruction] += most;
    }
  }
  void count_sectors(u64 &sum, const u64 *address, u32 lanes, int bytes) {
    u64 sectors[64];
    int n = 0;
    for (int i = 0; i < 32; i++)
      if (lanes >> i & 1) {
        sectors[n++] = address[i] >> 5;
        if ((address[i] + bytes - 1) >> 5 != address[i] >> 5) sectors[n++] = (address[i] + bytes - 1) >> 5;
      }
    std::sort(sectors, sectors + n);
    sum += std::unique(sectors, sectors + n) - sectors;
  }

  // -- barriers

  // All warps' accesses so far come before all that follow.
  void new_epoch() {
    epoch++;
    read_segments.clear();
    u32 seen = 0;
    for (Warp &w : warps) seen = std::max(seen, w.agent.tensor_seen);
    for (Warp &w : warps) {
      w.agent.segment = 0;
      memset(w.agent.before, 0, sizeof w.agent.before);
      w.agent.fences_published = w.agent.fences;
      w.agent.tensor_seen = seen;
    }
  }
  // A warp arrives: what it does later is another segment.
  void arrive(int barrier, Warp &w, int threads, bool waits) {
    Agent &a = w.agent;
    Arrival arrival = {w.index, waits, epoch, {0}};
    memcpy(arrival.before, a.before, sizeof a.before);
    arrival.before[w.index] = ++a.segment;
    a.fences_published = a.fences;
    barriers[barrier].arrived.push_back(arrival);
    barriers[barrier].threads = threads;
  }
  // What the arrived warps did comes before what the waiting ones do next.
  void join(const Barrier &b) {
    uint16_t before[MOST_WARPS] = {0};
    u32 seen = 0;
    for (const Arrival &arrival : b.arrived) {
      if (arrival.epoch == epoch)
        for (int v = 0; v < MOST_WARPS; v++) before[v] = std::max(before[v], arrival.before[v]);
      seen = std::max(seen, warps[arrival.warp].agent.tensor_seen);
    }
    for (const Arrival &arrival : b.arrived)
      if (arrival.waits) {
        memcpy(warps[arrival.warp].agent.before, before, sizeof before);
        warps[arrival.warp].agent.tensor_seen = seen;
      }
  }

  std::unordered_map<const Cell *, std::array<uint16_t, MOST_WARPS>> read_segments;
  const Region *last_region = nullptr;
};

}  // namespace
