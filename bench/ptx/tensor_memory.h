// sm_100: tensor memory, products that run beside the warps, and the barriers that tell when they are done.
//
// A product is computed where it is issued. Shadow memory knows it as under way until a warp has waited for a barrier to
// which it was committed, and a warp that a block's barrier then orders after that one.
#pragma once

#include "tensor.h"

namespace {

class TensorMemory {
 public:
  static const int LANES = 128, COLUMNS = 512;

  void clear() {
    barriers_.clear();
    allocated_ = 0;
    products_ = 0;
  }

  // -- completion barriers (mbarrier), in shared memory

  void init(Machine &m, Warp &w, u64 address, u32 count, int lane, int at) {
    const u64 data = count;
    uint8_t *p = m.shared_at(address, 8, true, w.agent, lane, at);
    if (!p) return;
    m.write_shared(address, 8, w.agent, lane, at, (const uint8_t *)&data);
    memcpy(p, &data, 8);
    barriers_[address] = {count, count, 0, 0};
  }
  void invalidate(Machine &m, Warp &w, u64 address, int lane, int at) {
    const u64 data = ~0ull;
    uint8_t *p = m.shared_at(address, 8, true, w.agent, lane, at);
    if (!p) return;
    m.write_shared(address, 8, w.agent, lane, at, (const uint8_t *)&data);
    memcpy(p, &data, 8);
    barriers_.erase(address);
  }
  // Whether the phase of this parity is complete; what it stands for comes before the warp then.
  bool test(Machine &m, Warp &w, u64 address, u32 parity, int lane, int at) {
    Completion *b = barrier(m, w, address, lane, at);
    if (!b) return true;
    if ((b->phase & 1) == parity) return false;
    w.agent.tensor_seen = std::max(w.agent.tensor_seen, b->products);
    return true;
  }
  // The barrier's phase completes once all products so far are done.
  void commit(Machine &m, Warp &w, u64 address, int lane, int at) {
    Completion *b = barrier(m, w, address, lane, at);
    if (!b) return;
    b->products = products_;
    if (--b->pending == 0) {
      b->pending = b->count;
      b->phase++;
    }
  }

  // -- columns

  void allocate(Machine &m, Warp &w, u64 address, u32 columns, int at) {
    if (data_.empty()) {
      data_.resize(LANES * COLUMNS);
      cells_.resize(LANES * COLUMNS);
    }
    if (!allocated_) std::fill(cells_.begin(), cells_.end(), Cell{});
    const u32 base = allocated_;
    allocated_ += columns;
    if (allocated_ > COLUMNS || columns < 32 || (columns & (columns - 1)))
      m.report(TENSOR_MEMORY, at, -1, w.agent, 0, 0, base, (int)columns);
    uint8_t *p = m.shared_at(address, 4, true, w.agent, 0, at);
    if (!p) return;
    m.write_shared(address, 4, w.agent, 0, at, (const uint8_t *)&base);
    memcpy(p, &base, 4);
  }
  void release(Machine &m, Warp &w, u32 base, u32 columns, int at) {
    if (columns > allocated_ || base + columns != allocated_)
      m.report(TENSOR_MEMORY, at, -1, w.agent, 0, 0, base, (int)columns);
    else
      allocated_ -= columns;
  }
  void check_released(Machine &m) const {
    if (allocated_) m.report(TENSOR_MEMORY, 0, -1, m.warps[0].agent, 0, 0, 0, (int)allocated_);
  }

  // -- registers to and from tensor memory. flags: 1 the shape 16x32bx2, whose second half begins `size` columns on

  void load(Machine &m, const Instruction &I, Warp &w, const Operands &o, int at) {
    for (int k = 0; k < I.targets; k++) {
      for (int lane = 0; lane < 32; lane++) {
        const int i = place(m, I, w, o.word(I.targets)[lane], lane, k, at);
        o.word(k)[lane] = i < 0 ? ~0u : data_[i];
        if (i < 0 || !m.launch.races) continue;
        Cell &c = cells_[i];
        const int uncertain = m.read<true>(c, w.agent, lane, at, i, 4);
        if (uncertain >= 0) m.reports.use(uncertain);
        if (c.tensor_read > w.agent.tensor_seen) m.report(OPERAND_IN_FLIGHT, at, -1, w.agent, lane, 0, i, 4);
      }
      w.to_be_written[o.at[k] >> 6]++;
      w.loads.push_back(o.at[k] >> 6);
    }
  }
  void store(Machine &m, const Instruction &I, Warp &w, const Operands &o, int at) {
    for (int k = 0; k + 1 < I.operands; k++)
      for (int lane = 0; lane < 32; lane++) {
        const int i = place(m, I, w, o.word(0)[lane], lane, k, at);
        if (i < 0) continue;
        const u32 value = o.word(1 + k)[lane];
        if (m.launch.races) {
          m.write<true>(cells_[i], w.agent, lane, at, i, 4, (const uint8_t *)&value, (const uint8_t *)&data_[i]);
          cells_[i].pending = 1;
          w.stores.push_back(i);
        }
        data_[i] = value;
      }
  }
  // flags: 1 of loads, else of stores
  void wait(Warp &w, int flags) {
    if (flags & 1) {
      for (int32_t piece : w.loads) w.to_be_written[piece]--;
      w.loads.clear();
    } else {
      for (u32 i : w.stores) cells_[i].pending = 0;
      w.stores.clear();
    }
  }

  // -- products. width: A lies in tensor memory; value: added to D's address. Operands: D's address, A's descriptor or
  // address, B's descriptor, what kind of product it is, whether to add to D

  void multiply(Machine &m, const Instruction &I, Warp &w, const Operands &o, int lane, int at) {
    const u32 kind = o.word(3)[lane];
    const int N = (int)(kind >> 17 & 63) << 3, M = (int)(kind >> 24 & 31) << 4, type_a = (int)(kind >> 7 & 7);
    const int type = type_a == 2 ? TF32 : type_a == 1 ? BFLOAT16 : HALF, K = type == TF32 ? 8 : 16;
    const bool plain = !(kind & 0xf) && (kind >> 4 & 3) == 1 && (kind >> 10 & 7) == (u32)type_a;
    if (!plain || (M != 64 && M != 128) || N < 8 || N > 256 || (I.flags == TF32) != (type == TF32))
      m.report(TENSOR_MEMORY, at, -1, w.agent, lane, 0, kind, 4);
    const u32 product = ++products_;
    if (m.launch.statistics) {
      const u64 slow = type == TF32 ? 2 : 1;
      m.waves[at] += (u64)M * N * K * slow;
      m.more[at] += ((u64)N * K + (I.width ? 0 : (u64)M * K)) * 2 * slow / 128;
    }
    auto hold = [&](u32, Cell &c) { c.tensor_read = product; };
    static thread_local double A[128][16], B[16][256];
    if (I.width) {
      const u32 base = o.word(1)[lane] + (u32)I.size;
      for (int row = 0; row < M; row++)
        for (int k = 0; k < K; k++) {
          const int i = cell(base, lane_of(row, M), type == TF32 ? k : k / 2);
          if (i < 0) continue;
          if (m.launch.races) touch(m, w, i, product, false, true, lane, at);
          A[row][k] = type == TF32 ? cut_to_tf32(data_[i]) : factor((uint16_t)(data_[i] >> (16 * (k & 1))), type);
        }
    } else {
      const Matrix a(((const u64 *)o.word(1))[lane], kind >> 15 & 1);
      fetch_operand(m, a, 0, M, K, type, A[0], 16, 1, w.agent, at, hold);
    }
    const Matrix b(((const u64 *)o.word(2))[lane], kind >> 16 & 1);
    fetch_operand(m, b, 0, N, K, type, B[0], 1, 256, w.agent, at, hold);
    const bool add = ((const int32_t *)o.word(4))[lane] != 0;
    const double sign = (kind >> 13 & 1) != (kind >> 14 & 1) ? -1 : 1;
    const u32 base = o.word(0)[lane] + (u32)I.value;
    for (int row = 0; row < M; row++) {
      double sum[256] = {0};
      for (int k = 0; k < K; k++)
        for (int c = 0; c < N; c++) sum[c] += A[row][k] * B[k][c];
      for (int c = 0; c < N; c++) {
        const int i = cell(base, lane_of(row, M), c);
        if (i < 0) {
          m.report(TENSOR_MEMORY, at, -1, w.agent, lane, 0, base, N);
          return;
        }
        if (m.launch.races) touch(m, w, i, product, true, add, lane, at);
        data_[i] = bits(rounded(sign * sum[c] + (add ? (double)flt(data_[i]) : 0.0), m.launch.cut_sums));
      }
    }
  }

 private:
  struct Completion {
    u32 count, pending, phase, products;
  };
  std::map<u64, Completion> barriers_;
  std::vector<u32> data_;
  std::vector<Cell> cells_;
  u32 allocated_ = 0, products_ = 0;

  Completion *barrier(Machine &m, Warp &w, u64 address, int lane, int at) {
    if (!m.shared_at(address, 8, false, w.agent, lane, at)) return nullptr;
    const int uncertain = m.read_shared(address, 8, w.agent, lane, at);
    if (uncertain >= 0) m.reports.use(uncertain);
    auto found = barriers_.find(address);
    if (found != barriers_.end()) return &found->second;
    m.report(UNINITIALISED, at, -1, w.agent, lane, 0, address, 8);
    return nullptr;
  }
  // The lane that holds a row: one each, or 16 of every 32.
  static int lane_of(int row, int M) { return M == 128 ? row : 32 * (row / 16) + row % 16; }
  static int cell(u32 base, int lane, int column) {
    lane += (int)(base >> 16);
    column += (int)(base & 0xffff);
    return lane < LANES && column < COLUMNS ? lane * COLUMNS + column : -1;
  }
  // Where register k of a lane lies. A warp reaches the 32 lanes of tensor memory that its number gives it.
  int place(Machine &m, const Instruction &I, const Warp &w, u32 base, int lane, int k, int at) {
    base += (u32)I.value;
    const bool halves = I.flags & 1;
    const int i = cell(base, halves ? lane & 15 : lane, k + (halves && lane > 15 ? I.size : 0));
    const bool own = (int)(base >> 16) / 32 == (w.index & 3);
    if (i < 0 || !own || (u32)(i % COLUMNS) >= allocated_) {
      m.report(TENSOR_MEMORY, at, -1, w.agent, lane, 0, base, 4);
      return -1;
    }
    return i;
  }
  // A product reads or writes a piece of tensor memory.
  void touch(Machine &m, Warp &w, int i, u32 product, bool writes, bool reads, int lane, int at) {
    Cell &c = cells_[i];
    if (c.pending) m.report(COPY_PENDING, at, (int)c.w_instruction, w.agent, lane, c.w_warp, i, 4);
    if (reads && !c.initialised) m.report(UNINITIALISED, at, -1, w.agent, lane, 0, i, 4);
    if (!m.write_comes_before(c, w.agent))
      m.report(READ_AFTER_WRITE, at, (int)c.w_instruction, w.agent, lane, c.w_warp, i, 4);
    const int v = writes ? m.reader_beside(c, w.agent) : -1;
    if (v >= 0) m.report(WRITE_AFTER_READ, at, (int)c.r_instruction, w.agent, lane, v, i, 4);
    if (writes) c.initialised = 1;
    c.tensor_read = product;
  }
};

}  // namespace
