// Matrix instructions: ldmatrix and stmatrix, mma, wgmma (sm_90).
//
// Products of factors are exact in double; a sum of products and the accumulator is rounded to float32 once an
// instruction (or cut: `cut_sums`). TF32 factors are cut to 10 bits: that is what the hardware reads of a register.
#pragma once

#include "machine.h"

namespace {

enum Factor { HALF, BFLOAT16, TF32 };

inline double factor(uint16_t h, int kind) { return kind == BFLOAT16 ? (double)from_bf16(h) : (double)from_f16(h); }

struct Operands {
  uint8_t *registers;
  const int32_t *at;
  u32 *word(int k) const { return (u32 *)(registers + at[k]); }
  float *real(int k) const { return (float *)(registers + at[k]); }
};

// C [16, N] += A [16, K] B [K, N]
template <int N>
inline void multiply(const double (*A)[16], const double (*B)[N], double (*C)[N], int K, int columns) {
  for (int row = 0; row < 16; row++) {
    for (int c = 0; c < columns; c++) C[row][c] = 0;
    for (int k = 0; k < K; k++) {
      const double a = A[row][k];
      for (int c = 0; c < columns; c++) C[row][c] += a * B[k][c];
    }
  }
}

// count: K; flags: the factors' type. Operands: 4 results; A: K/4 words of halves (K/2 of TF32); B: half as many; 4 of C.
inline void mma(const Instruction &I, const Operands &o, bool cut) {
  const int K = I.count, of_a = I.flags == TF32 ? K / 2 : K / 4, of_b = of_a / 2;
  const int a_at = 4, b_at = a_at + of_a, c_at = b_at + of_b;
  double A[16][16], B[16][8], C[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane >> 2, t = lane & 3;
    for (int r = 0; r < of_a; r++) {
      const u32 u = o.word(a_at + r)[lane];
      const int row = g + 8 * (r & 1);
      if (I.flags == TF32) {
        A[row][t + 4 * (r >> 1)] = cut_to_tf32(u);
      } else {
        const int k = 2 * t + 8 * (r >> 1);
        A[row][k] = factor((uint16_t)u, I.flags);
        A[row][k + 1] = factor((uint16_t)(u >> 16), I.flags);
      }
    }
    for (int r = 0; r < of_b; r++) {
      const u32 u = o.word(b_at + r)[lane];
      if (I.flags == TF32) {
        B[t + 4 * r][g] = cut_to_tf32(u);
      } else {
        B[2 * t + 8 * r][g] = factor((uint16_t)u, I.flags);
        B[2 * t + 8 * r + 1][g] = factor((uint16_t)(u >> 16), I.flags);
      }
    }
  }
  multiply<8>(A, B, C, K, 8);
  float result[4][32];
  for (int r = 0; r < 4; r++)
    for (int lane = 0; lane < 32; lane++)
      result[r][lane] = rounded(C[(lane >> 2) + 8 * (r >> 1)][2 * (lane & 3) + (r & 1)] + o.real(c_at + r)[lane], cut);
  for (int r = 0; r < 4; r++) memcpy(o.real(r), result[r], 128);
}

// An operand of a product in shared memory, by its matrix descriptor: the canonical layouts of the PTX ISA.
struct Matrix {
  u32 start, leading, stride;
  int swizzle;     // bytes of a row of the swizzle's atom: 16 (none), 32, 64, 128
  bool mn_major;   // neighbours along M or N lie side by side, else along K

  // sm_90: two bits of swizzle; sm_100: three, which means the same where both have it
  Matrix(u64 descriptor, bool mn_major) : mn_major(mn_major) {
    start = (u32)(descriptor & 0x3fff) << 4;
    leading = (u32)(descriptor >> 16 & 0x3fff) << 4;
    stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
    const int modes[] = {16, 128, 64, 32};
    swizzle = modes[descriptor >> 62 & 3];
  }
  // Address of element (mn, k) of `size` bytes.
  u32 at(int mn, int k, int size) const {
    u32 where;
    if (!mn_major) {
      const u32 byte = (u32)(k * size);
      where = start + (mn % 8) * swizzle + (mn / 8) * stride;
      where += swizzle == 16 ? (byte / 16) * leading + byte % 16 : byte;
    } else {
      const int per = swizzle / size;
      where = start + (mn % per) * size + (k % 8) * swizzle;
      where += swizzle == 16 ? (mn / per) * stride + (k / 8) * leading : (mn / per) * leading + (k / 8) * stride;
    }
    const u32 mask = swizzle == 16 ? 0 : swizzle / 16 - 1;
    return where ^ (((where >> 7) & mask) << 4);
  }
};

// 16 bytes of an operand in shared memory, as its type says: 8 halves or 4 TF32.
inline void convert_row(const uint8_t *bytes, int kind, double *to, int step) {
  for (int e = 0; e < (kind == TF32 ? 4 : 8); e++) {
    if (kind == TF32) {
      u32 u;
      memcpy(&u, bytes + 4 * e, 4);
      to[e * step] = cut_to_tf32(u);
    } else {
      uint16_t h;
      memcpy(&h, bytes + 2 * e, 2);
      to[e * step] = factor(h, kind);
    }
  }
}

// Whether the asynchronous proxy sees what was written to a cell: a proxy fence of the writer after it, or of the reader
// after what ordered the two.
inline bool fenced(const Machine &m, const Cell &c, const Agent &a) {
  if (c.w_warp == a.warp) return a.fences > c.w_fences;
  return m.warps[c.w_warp].agent.fences_published > c.w_fences || a.fence_epoch > c.w_epoch;
}

// 16 bytes that an asynchronous product reads, or nullptr; `each` keeps of every cell that it is read.
template <class F>
inline const uint8_t *operand_row(Machine &m, u32 address, Agent &a, int lane, int instruction, F each) {
  const uint8_t *p = m.shared_at(address, 16, false, a, lane, instruction);
  if (!p || !m.launch.races) return p;
  const u32 at = address - SHARED_BASE;
  for (u32 i = at / m.program.shared_granule; i <= (at + 15) / m.program.shared_granule; i++) {
    Cell &c = m.shared_cells[i];
    const int uncertain = m.check_read<true>(c, a, lane, instruction, address, 16);
    if (uncertain >= 0) m.reports.use(uncertain);
    if (c.w_epoch && !fenced(m, c, a))
      m.report(NO_PROXY_FENCE, instruction, (int)c.w_instruction, a, lane, c.w_warp, address, 16);
    each(i, c);
  }
  return p;
}

// An operand [MN, K] in shared memory as doubles, element (mn, k) to out[mn * mn_step + k * k_step].
template <class F>
inline void fetch_operand(Machine &m, const Matrix &matrix, int first, int count, int K, int kind, double *out, int mn_step,
                          int k_step, Agent &a, int instruction, F each) {
  const int size = kind == TF32 ? 4 : 2, row = 16 / size;
  const double nan = NAN;
  for (int mn = 0; mn < count; mn += matrix.mn_major ? row : 1)
    for (int k = 0; k < K; k += matrix.mn_major ? 1 : row) {
      const uint8_t *p = operand_row(m, matrix.at(first + mn, k, size), a, mn & 31, instruction, each);
      double *to = out + mn * mn_step + k * k_step;
      const int step = matrix.mn_major ? mn_step : k_step;
      if (p) convert_row(p, kind, to, step);
      else for (int e = 0; e < row; e++) to[e * step] = nan;
    }
}

// count: N; width: A lies in registers; flags: type of the factors; 4: A, 8: B is transposed; 16: of opposite sign.
// Operands: N/2 accumulators; then A's descriptor or 4 registers, B's descriptor, whether to add to the accumulators.
inline void wgmma(Machine &m, const Instruction &I, Warp &w, const Operands &o, int instruction) {
  const int N = I.count, kind = I.flags & 3, K = kind == TF32 ? 8 : 16, quarter = w.index & 3;
  static thread_local double A[16][16], B[16][256], C[16][256];
  auto hold = [&](u32 index, Cell &c) {
    m.record_read(c, w.agent, 0, instruction);
    if (c.in_flight < 255) {
      c.in_flight++;
      w.products.cells.push_back(index);
    }
  };
  int at = I.targets;
  for (int k = 0; k < I.targets; k++) {
    w.products.sums.push_back(o.at[k] >> 6);
    w.to_be_written[o.at[k] >> 6]++;
  }
  if (I.width) {
    for (int lane = 0; lane < 32; lane++)
      for (int r = 0; r < 4; r++) {
        const u32 u = o.word(at + r)[lane];
        const int row = (lane >> 2) + 8 * (r & 1), t = lane & 3;
        if (kind == TF32) {
          A[row][t + 4 * (r >> 1)] = cut_to_tf32(u);
        } else {
          A[row][2 * t + 8 * (r >> 1)] = factor((uint16_t)u, kind);
          A[row][2 * t + 8 * (r >> 1) + 1] = factor((uint16_t)(u >> 16), kind);
        }
      }
    for (int r = 0; r < 4; r++) {
      w.products.fragments.push_back(o.at[at + r] >> 6);
      w.to_be_read[o.at[at + r] >> 6]++;
    }
    at += 4;
  } else {
    const Matrix a(*(const u64 *)(o.registers + o.at[at++]), I.flags & 4);
    fetch_operand(m, a, 16 * quarter, 16, K, kind, A[0], 16, 1, w.agent, instruction, hold);
  }
  const u64 of_a = I.width ? 0 : *(const u64 *)(o.registers + o.at[at - 1]), of_b = *(const u64 *)(o.registers + o.at[at++]);
  if (m.launch.products) {
    const u64 seen = (*m.launch.products_seen)++;
    if (seen < (u64)m.launch.products_room)
      m.launch.products[seen] = {instruction, m.block, w.index, I.width, of_a, of_b};
  }
  const Matrix b(of_b, I.flags & 8);
  fetch_operand(m, b, 0, N, K, kind, B[0], 1, 256, w.agent, instruction, hold);
  const bool add = ((const int32_t *)(o.registers + o.at[at]))[0] != 0;
  multiply<256>(A, B, C, K, N);
  const double sign = I.flags & 16 ? -1 : 1;
  for (int i = 0; i < N / 2; i++) {
    float *x = o.real(i);
    for (int lane = 0; lane < 32; lane++) {
      const int row = (lane >> 2) + 8 * ((i >> 1) & 1), column = 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
      x[lane] = rounded(sign * C[row][column] + (add ? (double)x[lane] : 0.0), m.launch.cut_sums);
    }
  }
}

// The oldest groups of products are done, all but `most`: their operands count as read now, their registers are free.
inline void wait_for_products(Machine &m, Warp &w, u64 most, int instruction) {
  while (w.product_groups.size() > most) {
    Warp::Products &group = w.product_groups.front();
    for (u32 i : group.cells) {
      m.shared_cells[i].in_flight--;
      m.record_read(m.shared_cells[i], w.agent, 0, instruction);
    }
    for (int32_t piece : group.sums) w.to_be_written[piece]--;
    for (int32_t piece : group.fragments) w.to_be_read[piece]--;
    w.product_groups.erase(w.product_groups.begin());
  }
}

// count: matrices of 8 x 8 halves; flags: 4 transposed. Operands: a word of each, the address.
inline int ldmatrix(Machine &m, const Instruction &I, Warp &w, const Operands &o, int instruction) {
  const u32 *base = o.word(I.targets);
  uint16_t rows[32][8];
  int uncertain = -1;
  u64 address[32];
  for (int i = 0; i < 8 * I.count; i++) {
    address[i] = (u32)(base[i] + I.value);
    const uint8_t *p = m.shared_at(address[i], 16, false, w.agent, i, instruction);
    if (!p) {
      memset(rows[i], 0xff, 16);
      continue;
    }
    uncertain = std::max(uncertain, m.read_shared(address[i], 16, w.agent, i, instruction));
    memcpy(rows[i], p, 16);
  }
  if (m.launch.statistics)
    m.count_wavefronts(instruction, address, I.count == 4 ? ~0u : (1u << (8 * I.count)) - 1, 16);
  for (int j = 0; j < I.count; j++) {
    u32 *d = o.word(j);
    for (int i = 0; i < 32; i++) {
      const int r = i >> 2, c = 2 * (i & 3);
      d[i] = I.flags & 4 ? rows[8 * j + c][r] | ((u32)rows[8 * j + c + 1][r] << 16)
                         : rows[8 * j + r][c] | ((u32)rows[8 * j + r][c + 1] << 16);
    }
  }
  return uncertain;
}

// As ldmatrix, the other way. Operands: the address, then a word of each matrix.
inline void stmatrix(Machine &m, const Instruction &I, Warp &w, const Operands &o, int instruction) {
  u64 address[32];
  for (int i = 0; i < 8 * I.count; i++) {
    uint16_t row[8];
    const u32 *v = o.word(1 + i / 8);
    for (int c = 0; c < 8; c++) {
      const int r = i & 7, lane = I.flags & 4 ? 4 * c + r / 2 : 4 * r + c / 2;
      row[c] = (uint16_t)(v[lane] >> (16 * ((I.flags & 4 ? r : c) & 1)));
    }
    address[i] = (u32)(o.word(0)[i] + I.value);
    uint8_t *p = m.shared_at(address[i], 16, true, w.agent, i, instruction);
    if (!p) continue;
    m.write_shared(address[i], 16, w.agent, i, instruction, (const uint8_t *)row);
    memcpy(p, row, 16);
  }
  if (m.launch.statistics)
    m.count_wavefronts(instruction, address, I.count == 4 ? ~0u : (1u << (8 * I.count)) - 1, 16);
}

}  // namespace
