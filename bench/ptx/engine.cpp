// Executes decoded PTX, one warp instruction at a time over 32 lanes. The warps of a block run one after the other
// from barrier to barrier; blocks run one after the other. Shadow memory tells what no barrier orders.
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <tuple>
#include <unordered_map>
#include <vector>

typedef uint32_t u32;
typedef uint64_t u64;

enum Op {
#define OP1(n, ...) n,
#define OP2(n, ...) n,
#define OP3(n, ...) n,
#define OPW(n, ...) n,
#define OPM(n, ...) n,
#define OPS(n, ...) n,
#define OPP(n, ...) n,
#define OPC(n, ...) n,
#define OPSEL(n, ...) n,
#define OPX(n) n,
#include "operations.inc"
#undef OP1
#undef OP2
#undef OP3
#undef OPW
#undef OPM
#undef OPS
#undef OPP
#undef OPC
#undef OPSEL
#undef OPX
#undef CMPS
  OPS_END
};
static const char *const NAMES[] = {
#define OP1(n, ...) #n,
#define OP2(n, ...) #n,
#define OP3(n, ...) #n,
#define OPW(n, ...) #n,
#define OPM(n, ...) #n,
#define OPS(n, ...) #n,
#define OPP(n, ...) #n,
#define OPC(n, ...) #n,
#define OPSEL(n, ...) #n,
#define OPX(n) #n,
#include "operations.inc"
#undef OP1
#undef OP2
#undef OP3
#undef OPW
#undef OPM
#undef OPS
#undef OPP
#undef OPC
#undef OPSEL
#undef OPX
#undef CMPS
};

// o: byte offsets into a warp's registers. Memory: o[0] the address (-1: imm alone), o[1..] the values; aux elements of
// size bytes in registers of width bytes.
struct Ins {
  int32_t op, pred, pneg, aux, size, width, flags, loc;
  int64_t imm;
  int32_t o[20];
};
struct Const {
  int32_t offset, width;
  u64 value;
};
struct Region {
  u64 address, bytes;
  uint8_t *host;
};
struct Report {
  int32_t kind, ins, other, cta, warp, lane, other_warp, bytes;
  u64 address, count;
};
enum Kind {
  OOB_READ, OOB_WRITE, MISALIGNED, RACE_RAW, RACE_WAR, RACE_WAW, UNINIT_SHARED, PENDING_COPY, DIVERGENT_BARRIER,
  DIVERGENT_SYNC, SHFL_INACTIVE, BARRIER_EXITED, TRAP, TOO_LONG, WARP_RAW, RACE_CTA_RAW, RACE_CTA_WAR, RACE_CTA_WAW,
  DIV_ZERO, WARP_WAR, SAME_WAW, WGMMA_OVERWRITTEN, NO_PROXY_FENCE
};
enum Flags { F_RACES = 1, F_WORST = 2, F_MMA_RZ = 4, F_STATS = 8, F_REVERSE = 16, F_SHUFFLE = 32, F_POISON = 64, F_TF32_ROUND = 128 };

extern "C" __attribute__((visibility("default"))) int op_id(const char *name) {
  for (int i = 0; i < OPS_END; i++)
    if (!strcmp(NAMES[i], name)) return i;
  return -1;
}
extern "C" __attribute__((visibility("default"))) int ins_size() { return sizeof(Ins); }

static bool WORST = false;
static inline u32 bits(float x) { u32 u; memcpy(&u, &x, 4); return u; }
static inline float flt(u32 u) { float x; memcpy(&x, &u, 4); return x; }
static inline float ftz(float x) { return (bits(x) & 0x7f800000u) == 0 ? flt(bits(x) & 0x80000000u) : x; }
static inline u32 hash32(u32 x) { x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; return x ^ (x >> 16); }
// The documented error of an approximation, up or down as a hash of the result says.
static inline float bump_ulp(float y, int n) {
  if (!WORST || !(fabsf(y) < INFINITY) || y == 0 || (bits(y) & 0x7fffffu) == 0) return y;
  u32 h = hash32(bits(y));
  return flt(bits(y) + ((h & 1) ? n : -n));
}
static inline float bump_abs(float y, float x) {
  if (!WORST || x == 0) return y;
  float e = 6.7e-7f * ((hash32(bits(x)) & 1) ? 1 : -1);  // 2^-20.5
  y += e;
  return y > 1 ? 1 : y < -1 ? -1 : y;
}
static inline float lg2_approx(float a) {
  float y = (float)log2((double)a);
  if (!WORST || !(fabsf(y) < INFINITY) || a == 1) return y;
  float e = 2.384e-7f * ((hash32(bits(a)) & 1) ? 1 : -1);  // 2^-22
  return a > 0.5f && a < 2.0f ? y + e : y * (1 + e);
}
static inline uint16_t to_bf16(float x) {
  u32 u = bits(x);
  if (x != x) return 0x7fff;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline u32 to_tf32(u32 u) {
  if ((u & 0x7f800000u) == 0x7f800000u) return u;
  return (u + 0x1000u) & ~0x1fffu;
}
static inline int32_t to_s32(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  if (x < -2147483648.0f) return INT32_MIN;
  return (int32_t)x;
}
static inline u32 bfe_u(u32 a, u32 b, u32 c) {
  b &= 255; c &= 255;
  if (b > 31 || !c) return 0;
  a >>= b;
  return c > 31 ? a : a & ((1u << c) - 1);
}
static inline u32 bfe_s(u32 a, u32 b, u32 c) {
  b &= 255; c &= 255;
  if (!c) return 0;
  u32 sign = b + c - 1 > 31 ? a >> 31 : (a >> (b + c - 1)) & 1;
  u32 r = b > 31 ? 0 : a >> b;
  u32 valid = b > 31 ? 0 : 32 - b;
  u32 keep = c < valid ? c : valid;
  u32 mask = keep > 31 ? ~0u : (1u << keep) - 1;
  return (r & mask) | (sign ? ~mask : 0);
}
static inline u32 prmt(u32 a, u32 b, u32 s) {
  u64 all = ((u64)b << 32) | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 k = (s >> (4 * i)) & 15;
    u32 byte = (u32)(all >> (8 * (k & 7))) & 255;
    if (k & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}
static inline float round_sum(double s, bool rz) {
  float f = (float)s;
  if (rz && fabs((double)f) > fabs(s) && f - f == 0) f = flt(bits(f) - 1);
  else if (rz && !(f - f == 0) && s - s == 0) f = copysignf(3.4028234663852886e38f, (float)s);
  return f;
}

struct Shadow {
  u32 w_epoch, r_epoch, w_ins, r_ins, w_cta, r_cta, w_sync, r_sync;
  uint8_t w_warp, w_lane, r_lane, r_many;  // r_many: lanes of more than one thread
  uint8_t init, pending, in_flight, pad;  // in_flight: reads of wgmma that nobody has waited for
  u32 r_warps;
};

struct Copy {
  u32 dst;
  u64 src;
  int bytes, valid, lane, ins;
};
struct Warp {
  std::vector<uint8_t> storage;
  uint8_t *rf;
  int pc = 0, index = 0;
  u32 active = ~0u, exited = 0, sync = 1;
  std::vector<std::pair<int, u32>> pending;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  bool waiting = false;
  u32 fence_epoch = 0;
  std::vector<u32> wg_open;
  std::vector<std::vector<u32>> wg_groups;
  bool done() const { return exited == ~0u; }
};

struct Engine {
  const Ins *code;
  int n;
  const uint8_t *params;
  Region *regions;
  int nregions, flags, shared_bytes, nwarps;
  std::vector<uint8_t> shared;
  std::vector<Shadow> shared_shadow;
  std::vector<std::unordered_map<u64, std::vector<Shadow>>> global_shadow;
  u32 epoch = 1;
  int cta = 0;
  std::map<std::tuple<int, int, int>, Report> reports;
  u64 *counts, *waves;
  const int32_t *extra;
  bool racy = false;  // the last access read what another warp or block may still write
  static const int SHARED_BASE = 1024;

  void report(int kind, int ins, int other, int warp, int lane, int other_warp, u64 address, int bytes) {
    auto key = std::make_tuple(kind, ins, other);
    auto it = reports.find(key);
    if (it == reports.end()) {
      Report r = {kind, ins, other, cta, warp, lane, other_warp, bytes, address, 1};
      reports.emplace(key, r);
    } else
      it->second.count++;
  }

  int region_of(u64 address, int bytes) {
    for (int i = 0; i < nregions; i++)
      if (address - regions[i].address < regions[i].bytes && address - regions[i].address + bytes <= regions[i].bytes) return i;
    return -1;
  }

  void touch(Shadow &s, bool write, bool is_shared, Warp &w, int lane, int ins, u64 address, int bytes, bool same) {
    if (is_shared && write && s.in_flight) report(WGMMA_OVERWRITTEN, ins, (int)s.r_ins, w.index, lane, s.r_lane, address, bytes);
    if (is_shared && s.pending) report(PENDING_COPY, ins, (int)s.w_ins, w.index, lane, s.w_warp, address, bytes);
    bool other_w = s.w_epoch && !is_shared && s.w_cta != (u32)cta;
    bool other_r = s.r_epoch && !is_shared && s.r_cta != (u32)cta;
    if (write) {
      if (other_w) report(same ? SAME_WAW : RACE_CTA_WAW, ins, (int)s.w_ins, w.index, lane, s.w_warp, address, bytes);
      if (other_r) report(RACE_CTA_WAR, ins, (int)s.r_ins, w.index, lane, s.w_warp, address, bytes);
      if (s.w_epoch == epoch && s.w_warp != w.index && !other_w)
        report(same ? SAME_WAW : RACE_WAW, ins, (int)s.w_ins, w.index, lane, s.w_warp, address, bytes);
      if (s.r_epoch == epoch && (s.r_warps & ~(1u << w.index)) && !other_r)
        report(RACE_WAR, ins, (int)s.r_ins, w.index, lane, __builtin_ctz(s.r_warps & ~(1u << w.index)), address, bytes);
      else if (s.r_epoch == epoch && s.r_sync == w.sync && (s.r_many || s.r_lane != lane) && !other_r)
        report(WARP_WAR, ins, (int)s.r_ins, w.index, lane, s.r_lane, address, bytes);
      s.w_epoch = epoch; s.w_warp = (uint8_t)w.index; s.w_lane = (uint8_t)lane; s.w_ins = (u32)ins; s.w_cta = (u32)cta;
      s.w_sync = w.sync; s.init = 1;
    } else {
      if (other_w) { report(RACE_CTA_RAW, ins, (int)s.w_ins, w.index, lane, s.w_warp, address, bytes); racy = true; }
      else if (s.w_epoch == epoch && s.w_warp != w.index) {
        report(RACE_RAW, ins, (int)s.w_ins, w.index, lane, s.w_warp, address, bytes);
        racy = true;
      }
      else if (s.w_epoch == epoch && s.w_lane != lane && s.w_sync == w.sync)
        report(WARP_RAW, ins, (int)s.w_ins, w.index, lane, s.w_lane, address, bytes);
      if (is_shared && !s.init) report(UNINIT_SHARED, ins, -1, w.index, lane, 0, address, bytes);
      if (s.r_epoch != epoch || (!is_shared && s.r_cta != (u32)cta)) { s.r_warps = 0; s.r_many = 0; }
      else if (s.r_lane != lane || s.r_sync != w.sync) s.r_many = 1;
      s.r_epoch = epoch; s.r_warps |= 1u << w.index; s.r_ins = (u32)ins; s.r_cta = (u32)cta; s.r_lane = (uint8_t)lane;
      s.r_sync = w.sync;
    }
  }
  void touch_shared(u32 at, int bytes, bool write, Warp &w, int lane, int ins, const uint8_t *data) {
    if (!(flags & F_RACES)) return;
    for (int i = 0; i < bytes; i++) touch(shared_shadow[at + i], write, true, w, lane, ins, at + i, bytes, data && data[i] == shared[at + i]);
  }
  void touch_global(int r, u64 at, int bytes, bool write, Warp &w, int lane, int ins, const uint8_t *data) {
    if (!(flags & F_RACES)) return;
    for (u64 g = at >> 1; g <= (at + bytes - 1) >> 1; g++) {
      auto &page = global_shadow[r][g >> 11];
      if (page.empty()) page.resize(2048, Shadow{});
      bool same = data != nullptr;
      for (u64 b = 2 * g; same && b < 2 * g + 2; b++)
        if (b >= at && b < at + bytes) same = data[b - at] == regions[r].host[b];
      touch(page[g & 2047], write, false, w, lane, ins, regions[r].address + 2 * g, bytes, same);
    }
  }
  uint8_t *global(u64 address, int bytes, bool write, Warp &w, int lane, int ins, const uint8_t *data = nullptr) {
    if (address % bytes) report(MISALIGNED, ins, -1, w.index, lane, 0, address, bytes);
    int r = region_of(address, bytes);
    if (r < 0) {
      report(write ? OOB_WRITE : OOB_READ, ins, -1, w.index, lane, 0, address, bytes);
      return nullptr;
    }
    touch_global(r, address - regions[r].address, bytes, write, w, lane, ins, data);
    return regions[r].host + (address - regions[r].address);
  }
  uint8_t *shared_at(u64 address, int bytes, bool write, Warp &w, int lane, int ins, const uint8_t *data = nullptr) {
    u64 at = (u32)address - SHARED_BASE;
    if (at % bytes) report(MISALIGNED, ins, -1, w.index, lane, 1, address, bytes);
    if ((u32)address < SHARED_BASE || at + bytes > (u64)shared_bytes) {
      report(write ? OOB_WRITE : OOB_READ, ins, -1, w.index, lane, 1, address, bytes);
      return nullptr;
    }
    touch_shared((u32)at, bytes, write, w, lane, ins, data);
    return shared.data() + at;
  }

  // Wavefronts of a shared access, 32-byte sectors of a global one.
  void stat(int ins, const u64 *address, u32 m, int bytes, bool is_shared) {
    if (!(flags & F_STATS)) return;
    if (!is_shared) {
      std::vector<u64> sectors;
      for (int i = 0; i < 32; i++)
        if (m >> i & 1)
          for (u64 s = address[i] >> 5; s <= (address[i] + bytes - 1) >> 5; s++) {
            bool seen = false;
            for (u64 t : sectors) seen |= t == s;
            if (!seen) sectors.push_back(s);
          }
      waves[ins] += sectors.size();
      return;
    }
    int lanes = bytes <= 4 ? 32 : 128 / bytes;
    for (int first = 0; first < 32; first += lanes) {
      int worst = 0;
      std::vector<u32> words[32];
      for (int i = first; i < first + lanes; i++)
        if (m >> i & 1)
          for (int b = 0; b < bytes; b += 4) {
            u32 word = (u32)(address[i] + b) >> 2;
            auto &list = words[word & 31];
            bool seen = false;
            for (u32 t : list) seen |= t == word;
            if (!seen) list.push_back(word);
          }
      for (auto &list : words) worst = std::max(worst, (int)list.size());
      waves[ins] += worst;
    }
  }

  void finish(Warp &w, const std::vector<Copy> &group) {
    for (const Copy &c : group) {
      u32 at = c.dst - SHARED_BASE;
      if (flags & F_RACES)
        for (int i = 0; i < c.bytes; i++) shared_shadow[at + i].pending = 0;
      uint8_t data[16] = {0};
      if (c.valid) {
        int r = region_of(c.src, c.valid);
        if (r >= 0) memcpy(data, regions[r].host + (c.src - regions[r].address), c.valid);
        else memset(data, 0xff, c.valid);
      }
      memcpy(shared_at(c.dst, c.bytes, true, w, c.lane, c.ins, data), data, c.bytes);
    }
  }

  void do_mma(const Ins &I, uint8_t *rf) {
    // size: 16 bits or 32 (tf32); aux: k; flags: 0 f16, 1 bf16, 2 tf32
    const int K = I.aux;
    double A[16][16], Bm[16][8];
    auto word = [&](int operand, int lane) { u32 u = ((const u32 *)(rf + I.o[operand]))[lane]; return I.flags == 2 && (flags & F_TF32_ROUND) ? to_tf32(u) : u; };
    auto half = [&](u32 u) { return I.flags == 1 ? (double)flt(u << 16) : (double)_cvtsh_ss((uint16_t)u); };
    int na = I.flags == 2 ? K / 2 : K / 4, nb = na / 2;
    for (int lane = 0; lane < 32; lane++) {
      int g = lane >> 2, t = lane & 3;
      if (I.flags == 2) {
        for (int r = 0; r < na; r++) A[g + 8 * (r & 1)][t + 4 * (r >> 1)] = flt(word(4 + r, lane) & ~0x1fffu);
        for (int r = 0; r < nb; r++) Bm[t + 4 * r][g] = flt(word(4 + na + r, lane) & ~0x1fffu);
      } else {
        for (int r = 0; r < na; r++) {
          u32 u = word(4 + r, lane);
          int row = g + 8 * (r & 1), col = 2 * t + 8 * (r >> 1);
          A[row][col] = half(u & 0xffff);
          A[row][col + 1] = half(u >> 16);
        }
        for (int r = 0; r < nb; r++) {
          u32 u = word(4 + na + r, lane);
          Bm[2 * t + 8 * r][g] = half(u & 0xffff);
          Bm[2 * t + 8 * r + 1][g] = half(u >> 16);
        }
      }
    }
    double C[16][8];
    for (int row = 0; row < 16; row++) {
      double acc[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      for (int k = 0; k < K; k++) {
        double a = A[row][k];
        for (int c = 0; c < 8; c++) acc[c] += a * Bm[k][c];
      }
      for (int c = 0; c < 8; c++) C[row][c] = acc[c];
    }
    bool rz = flags & F_MMA_RZ;
    float out[4][32];
    for (int lane = 0; lane < 32; lane++) {
      int g = lane >> 2, t = lane & 3;
      for (int r = 0; r < 4; r++) {
        float c = ((const float *)(rf + I.o[4 + na + nb + r]))[lane];
        out[r][lane] = round_sum(C[g + 8 * (r >> 1)][2 * t + (r & 1)] + (double)c, rz);
      }
    }
    for (int r = 0; r < 4; r++) memcpy(rf + I.o[r], out[r], 128);
  }

  // Where element (mn, k) of a wgmma operand in shared memory lies: the canonical layouts of the PTX ISA.
  static u32 operand_at(u64 d, bool mn_major, int mn, int k, int size) {
    u32 start = (u32)(d & 0x3fff) << 4, lbo = (u32)(d >> 16 & 0x3fff) << 4, sbo = (u32)(d >> 32 & 0x3fff) << 4;
    int mode = (int)(d >> 62 & 3);
    u32 row = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32, at;  // bytes of a row of the swizzle's atom
    if (!mn_major) {
      u32 byte = (u32)(k * size);
      at = start + (mn % 8) * row + (mn / 8) * sbo + (mode == 0 ? (byte / 16) * lbo + byte % 16 : byte);
    } else {
      int per = (int)row / size;
      at = start + (mn % per) * size + (k % 8) * row;
      at += mode == 0 ? (mn / per) * sbo + (k / 8) * lbo : (mn / per) * lbo + (k / 8) * sbo;
    }
    u32 mask = mode == 0 ? 0 : mode == 1 ? 7 : mode == 2 ? 3 : 1;
    return at ^ (((at >> 7) & mask) << 4);
  }

  // imm: where the operands start in `extra`: aux/2 accumulators, then A's descriptor or 4 registers, B's descriptor,
  // the predicate of D. size: 0 f16, 1 bf16, 2 tf32; width: 1 A in registers; flags: 1 A, 2 B transposed, 4, 8 negated.
  void do_wgmma(const Ins &I, Warp &w, int pc) {
    const int N = I.aux, K = I.size == 2 ? 8 : 16, bytes = I.size == 2 ? 4 : 2, quarter = w.index & 3;
    const int32_t *o = extra + I.imm;
    uint8_t *rf = w.rf;
    static thread_local double A[16][16], Bm[16][256], C[16][256];
    auto convert = [&](const uint8_t *p) -> double {
      if (bytes == 4) { u32 u; memcpy(&u, p, 4); return flt((flags & F_TF32_ROUND ? to_tf32(u) : u) & ~0x1fffu); }
      uint16_t h; memcpy(&h, p, 2);
      return I.size == 1 ? (double)flt((u32)h << 16) : (double)_cvtsh_ss(h);
    };
    auto fetch = [&](u64 d, bool mn_major, int mn, int k) -> double {
      u32 at = operand_at(d, mn_major, mn, k, bytes);
      racy = false;
      uint8_t *p = shared_at(at, bytes, false, w, mn & 31, pc);
      if (!p) return NAN;
      if (flags & F_RACES) {
        for (int b = 0; b < bytes; b++) {
          Shadow &s = shared_shadow[at - SHARED_BASE + b];
          if (s.w_epoch > w.fence_epoch) report(NO_PROXY_FENCE, pc, (int)s.w_ins, w.index, mn & 31, s.w_warp, at, bytes);
          if (s.in_flight < 255) { s.in_flight++; w.wg_open.push_back(at - SHARED_BASE + b); }
        }
        if (racy && (flags & F_POISON)) return NAN;
      }
      return convert(p);
    };
    int at = N / 2;
    if (I.width) {
      for (int lane = 0; lane < 32; lane++) {
        int g = lane >> 2, t = lane & 3;
        for (int r = 0; r < 4; r++) {
          u32 u = ((const u32 *)(rf + o[at + r]))[lane];
          int row = g + 8 * (r & 1);
          if (bytes == 4) A[row][t + 4 * (r >> 1)] = flt(u & ~0x1fffu);
          else for (int h = 0; h < 2; h++) { uint16_t v = (uint16_t)(u >> (16 * h)); A[row][2 * t + 8 * (r >> 1) + h] = convert((uint8_t *)&v); }
        }
      }
      at += 4;
    } else {
      u64 d = ((const u64 *)(rf + o[at++]))[0];
      for (int r = 0; r < 16; r++) for (int k = 0; k < K; k++) A[r][k] = fetch(d, I.flags & 1, 16 * quarter + r, k);
    }
    u64 d = ((const u64 *)(rf + o[at++]))[0];
    for (int c = 0; c < N; c++) for (int k = 0; k < K; k++) Bm[k][c] = fetch(d, I.flags & 2, c, k);
    bool keep = ((const int32_t *)(rf + o[at]))[0] != 0;
    double sign = ((I.flags & 4) != 0) != ((I.flags & 8) != 0) ? -1 : 1;
    for (int r = 0; r < 16; r++) {
      for (int c = 0; c < N; c++) C[r][c] = 0;
      for (int k = 0; k < K; k++) { double a = sign * A[r][k]; for (int c = 0; c < N; c++) C[r][c] += a * Bm[k][c]; }
    }
    bool rz = flags & F_MMA_RZ;
    for (int i = 0; i < N / 2; i++) {
      float *x = (float *)(rf + o[i]);
      for (int lane = 0; lane < 32; lane++) {
        int row = (lane >> 2) + 8 * ((i >> 1) & 1), col = 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
        x[lane] = round_sum(C[row][col] + (keep ? (double)x[lane] : 0.0), rz);
      }
    }
  }

  // Runs a warp up to a barrier or its end.
  void run(Warp &w, u64 limit) {
    uint8_t *rf = w.rf;
    u64 steps = 0;
    for (;;) {
      if (w.done()) return;
      if (!w.pending.empty() || !w.active) {
        int best = w.active ? w.pc : INT32_MAX, at = -1;
        for (size_t i = 0; i < w.pending.size(); i++)
          if (w.pending[i].first < best) { best = w.pending[i].first; at = (int)i; }
        if (at >= 0) {
          auto taken = w.pending[at];
          w.pending.erase(w.pending.begin() + at);
          if (w.active) w.pending.emplace_back(w.pc, w.active);
          w.pc = taken.first;
          w.active = taken.second;
        }
        for (size_t i = 0; i < w.pending.size();)
          if (w.pending[i].first == w.pc) { w.active |= w.pending[i].second; w.pending.erase(w.pending.begin() + i); }
          else i++;
      }
      const int pc = w.pc;
      const Ins &I = code[pc];
      counts[pc]++;
      if (++steps > limit) {
        report(TOO_LONG, pc, -1, w.index, 0, 0, 0, 0);
        w.exited = ~0u;
        return;
      }
      u32 m = w.active;
      if (I.pred >= 0) {
        const __m256i *p = (const __m256i *)(rf + I.pred);
        u32 v = 0;
        for (int i = 0; i < 4; i++) v |= (u32)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_load_si256(p + i))) << (8 * i);
        m &= I.pneg ? ~v : v;
      }
      w.pc = pc + 1;
      if (!m && I.op != bra) continue;
      const bool all = m == ~0u;
#define R(T, k) ((T *)__builtin_assume_aligned(rf + I.o[k], 64))
#define EACH(body) \
  if (all) { _Pragma("GCC ivdep") for (int i = 0; i < 32; i++) { body } } \
  else { for (int i = 0; i < 32; i++) if (m >> i & 1) { body } }
      switch (I.op) {
#define OP1(n, D, A, e) case n: { D *d = R(D, 0); const A *pa = R(A, 1); EACH(A a = pa[i]; d[i] = (e);) } break;
#define OP2(n, T, e) case n: { T *d = R(T, 0); const T *pa = R(T, 1), *pb = R(T, 2); EACH(T a = pa[i]; T b = pb[i]; d[i] = (e);) } break;
#define OP3(n, T, e) case n: { T *d = R(T, 0); const T *pa = R(T, 1), *pb = R(T, 2), *pc_ = R(T, 3); EACH(T a = pa[i]; T b = pb[i]; T c = pc_[i]; d[i] = (e);) } break;
#define OPW(n, D, T, e) case n: { D *d = R(D, 0); const T *pa = R(T, 1), *pb = R(T, 2); EACH(T a = pa[i]; T b = pb[i]; d[i] = (e);) } break;
#define OPM(n, D, T, e) case n: { D *d = R(D, 0); const T *pa = R(T, 1), *pb = R(T, 2); const D *pc_ = R(D, 3); EACH(T a = pa[i]; T b = pb[i]; D c = pc_[i]; d[i] = (e);) } break;
#define OPS(n, T, e) case n: { T *d = R(T, 0); const T *pa = R(T, 1); const u32 *pb = R(u32, 2); EACH(T a = pa[i]; u32 b = pb[i]; d[i] = (e);) } break;
#define OPP(n, e) case n: { u32 *d = R(u32, 0); const float *pa = R(float, 1), *pb = R(float, 2); EACH(float a = pa[i]; float b = pb[i]; d[i] = (e);) } break;
#define OPC(n, T, e) case n: { int32_t *d = R(int32_t, 0); const T *pa = R(T, 1), *pb = R(T, 2); EACH(T a = pa[i]; T b = pb[i]; d[i] = (e) ? -1 : 0;) } break;
#define OPSEL(n, T) case n: { T *d = R(T, 0); const T *pa = R(T, 1), *pb = R(T, 2); const int32_t *p = R(int32_t, 3); EACH(d[i] = p[i] ? pa[i] : pb[i];) } break;
#define OPX(n)
#include "operations.inc"
      case lop3_32: {
        u32 *d = R(u32, 0); const u32 *a = R(u32, 1), *b = R(u32, 2), *c = R(u32, 3);
        EACH(u32 r = 0; for (int k = 0; k < 8; k++) if (I.imm >> k & 1) r |= (k & 4 ? a[i] : ~a[i]) & (k & 2 ? b[i] : ~b[i]) & (k & 1 ? c[i] : ~c[i]); d[i] = r;)
      } break;
      case bfi_32: {
        u32 *d = R(u32, 0); const u32 *a = R(u32, 1), *b = R(u32, 2), *c = R(u32, 3), *n = R(u32, 4);
        EACH(u32 pos = c[i] & 255; u32 len = n[i] & 255; u32 mask = pos > 31 || !len ? 0 : (len > 31 ? ~0u : (1u << len) - 1) << pos;
             d[i] = (b[i] & ~mask) | (pos > 31 ? 0 : (a[i] << pos) & mask);)
      } break;
      case fma_bf16x2: {
        u32 *d = R(u32, 0); const u32 *a = R(u32, 1), *b = R(u32, 2), *c = R(u32, 3);
        EACH(u32 r = 0; for (int k = 0; k < 32; k += 16) {
               double v = (double)flt((a[i] >> k) << 16) * (double)flt((b[i] >> k) << 16) + (double)flt((c[i] >> k) << 16);
               r |= (u32)to_bf16((float)v) << k; } d[i] = r;)
      } break;
      case shf_l: case shf_r: {
        u32 *d = R(u32, 0); const u32 *a = R(u32, 1), *b = R(u32, 2), *c = R(u32, 3);
        EACH(u32 s = I.flags ? c[i] & 31 : (c[i] > 32 ? 32 : c[i]); u64 v = ((u64)b[i] << 32) | a[i];
             d[i] = I.op == shf_l ? (s ? (u32)(v >> (32 - s)) : b[i]) : (s == 32 ? b[i] : (u32)(v >> s));)
      } break;
      case cvt_int: {  // aux: source bits, size: target bits; width: target register, flags: 1 source signed, 2 target
                       // signed, 4.. source register's bytes
        int sw = I.flags >> 2;
        EACH(u64 v = sw == 2 ? R(uint16_t, 1)[i] : sw == 4 ? R(u32, 1)[i] : R(u64, 1)[i];
             if (I.aux < 64) { v &= (1ull << I.aux) - 1; if ((I.flags & 1) && (v >> (I.aux - 1) & 1)) v |= ~0ull << I.aux; }
             if (I.size < 64) { v &= (1ull << I.size) - 1; if ((I.flags & 2) && (v >> (I.size - 1) & 1)) v |= ~0ull << I.size; }
             if (I.width == 2) R(uint16_t, 0)[i] = (uint16_t)v; else if (I.width == 4) R(u32, 0)[i] = (u32)v; else R(u64, 0)[i] = v;)
      } break;
      case pack: {  // aux parts of width bytes from o[1..] into o[0] of size bytes
        EACH(u64 v = 0; for (int k = 0; k < I.aux; k++) v |= (I.width == 2 ? (u64)R(uint16_t, 1 + k)[i] : (u64)R(u32, 1 + k)[i]) << (8 * I.width * k);
             if (I.size == 4) R(u32, 0)[i] = (u32)v; else R(u64, 0)[i] = v;)
      } break;
      case unpack: {  // o[0] is the source
        EACH(u64 v = I.size == 4 ? (u64)R(u32, 0)[i] : R(u64, 0)[i];
             for (int k = 0; k < I.aux; k++) if (I.width == 2) R(uint16_t, 1 + k)[i] = (uint16_t)(v >> (16 * k)); else R(u32, 1 + k)[i] = (u32)(v >> (32 * k));)
      } break;
      case ld_param: {
        u64 v = 0;
        memcpy(&v, params + I.imm, I.size);
        if (I.flags && I.size < 8 && (v >> (8 * I.size - 1) & 1)) v |= ~0ull << (8 * I.size);
        EACH(if (I.width == 2) R(uint16_t, 1)[i] = (uint16_t)v; else if (I.width == 4) R(u32, 1)[i] = (u32)v; else R(u64, 1)[i] = v;)
      } break;
      case ld_global: case st_global: case ld_shared: case st_shared: {
        const bool is_shared = I.op == ld_shared || I.op == st_shared, write = I.op == st_global || I.op == st_shared;
        const int bytes = I.aux * I.size;
        u64 address[32];
        if (I.o[0] < 0) for (int i = 0; i < 32; i++) address[i] = I.imm;
        else if (is_shared) { const u32 *a = R(u32, 0); for (int i = 0; i < 32; i++) address[i] = (u32)(a[i] + I.imm); }
        else { const u64 *a = R(u64, 0); for (int i = 0; i < 32; i++) address[i] = a[i] + I.imm; }
        stat(pc, address, m, bytes, is_shared);
        for (int i = 0; i < 32; i++) {
          if (!(m >> i & 1)) continue;
          uint8_t data[16];
          if (write) for (int k = 0; k < I.aux; k++) memcpy(data + k * I.size, rf + I.o[1 + k] + i * I.width, I.size);
          const uint8_t *given = write ? data : nullptr;
          racy = false;
          uint8_t *p = is_shared ? shared_at(address[i], bytes, write, w, i, pc, given) : global(address[i], bytes, write, w, i, pc, given);
          if (racy && !write && (flags & F_POISON)) p = nullptr;
          for (int k = 0; k < I.aux; k++) {
            if (write) {
              if (p) memcpy(p + k * I.size, rf + I.o[1 + k] + i * I.width, I.size);
            } else {
              u64 v = 0;
              if (p) memcpy(&v, p + k * I.size, I.size); else v = ~0ull;
              if (I.flags && I.size < 8 && (v >> (8 * I.size - 1) & 1)) v |= ~0ull << (8 * I.size);
              memcpy(rf + I.o[1 + k] + i * I.width, &v, I.width);
            }
          }
        }
      } break;
      case cp_async: {  // o[0] shared, o[1] global; imm, size: displacements; aux: bytes; o[2]: bytes from memory or -1
        const u32 *d = R(u32, 0); const u64 *s = R(u64, 1);
        u64 at[32], from[32];
        for (int i = 0; i < 32; i++) { at[i] = (u32)(d[i] + I.imm); from[i] = s[i] + I.size; }
        stat(pc, at, m, I.aux, true);
        for (int i = 0; i < 32; i++) {
          if (!(m >> i & 1)) continue;
          int valid = I.o[2] < 0 ? I.aux : (int)R(u32, 2)[i];
          if (from[i] % I.aux) report(MISALIGNED, pc, -1, w.index, i, 0, from[i], I.aux);
          if (valid && !global(from[i] , valid, false, w, i, pc)) valid = 0;
          if (!shared_at(at[i], I.aux, true, w, i, pc)) continue;
          if (flags & F_RACES)
            for (int b = 0; b < I.aux; b++) shared_shadow[at[i] - SHARED_BASE + b].pending = 1;
          memset(shared.data() + at[i] - SHARED_BASE, 0xff, I.aux);
          w.open.push_back(Copy{(u32)at[i], from[i], I.aux, valid, i, pc});
        }
      } break;
      case cp_commit: w.groups.push_back(w.open); w.open.clear(); break;
      case cp_wait: {
        if (I.flags) { w.groups.push_back(w.open); w.open.clear(); }
        while ((int64_t)w.groups.size() > I.imm) { finish(w, w.groups.front()); w.groups.erase(w.groups.begin()); }
      } break;
      case ldmatrix: {  // aux matrices, flags: transposed; o[0] the address, o[1..] results
        const u32 *a = R(u32, 0);
        if (!all) report(DIVERGENT_SYNC, pc, -1, w.index, 0, 0, 0, 0);
        uint16_t rows[32][8];
        u64 address[32];
        u32 lanes = I.aux == 4 ? ~0u : (1u << (8 * I.aux)) - 1;
        for (int i = 0; i < 8 * I.aux; i++) {
          address[i] = (u32)(a[i] + I.imm);
          racy = false;
          uint8_t *p = shared_at(address[i], 16, false, w, i, pc);
          if (p && !(racy && (flags & F_POISON))) memcpy(rows[i], p, 16); else memset(rows[i], 0xff, 16);
        }
        stat(pc, address, lanes, 16, true);
        for (int j = 0; j < I.aux; j++) {
          u32 *d = R(u32, 1 + j);
          for (int i = 0; i < 32; i++) {
            int r = i >> 2, c = 2 * (i & 3);
            d[i] = I.flags ? rows[8 * j + c][r] | ((u32)rows[8 * j + c + 1][r] << 16) : rows[8 * j + r][c] | ((u32)rows[8 * j + r][c + 1] << 16);
          }
        }
      } break;
      case stmatrix: {  // as ldmatrix, the other way
        const u32 *a = R(u32, 0);
        if (!all) report(DIVERGENT_SYNC, pc, -1, w.index, 0, 0, 0, 0);
        u64 address[32];
        for (int i = 0; i < 8 * I.aux; i++) {
          uint16_t row[8];
          const u32 *v = R(u32, 1 + i / 8);
          for (int c = 0; c < 8; c++) {
            int r = i & 7, lane = I.flags ? 4 * c + r / 2 : 4 * r + c / 2;
            row[c] = (uint16_t)(v[lane] >> (16 * ((I.flags ? r : c) & 1)));
          }
          address[i] = (u32)(a[i] + I.imm);
          uint8_t *p = shared_at(address[i], 16, true, w, i, pc, (const uint8_t *)row);
          if (p) memcpy(p, row, 16);
        }
        stat(pc, address, I.aux == 4 ? ~0u : (1u << (8 * I.aux)) - 1, 16, true);
      } break;
      case mma:
        if (!all) report(DIVERGENT_SYNC, pc, -1, w.index, 0, 0, 0, 0);
        do_mma(I, rf);
        break;
      case shfl: {  // flags: 0 idx, 1 bfly, 2 up, 3 down; o: d, a, b, c, members; o[5]: predicate or -1
        u32 *d = R(u32, 0); const u32 *a = R(u32, 1), *b = R(u32, 2), *c = R(u32, 3), *mem = R(u32, 4);
        u32 r[32]; int32_t p[32];
        for (int i = 0; i < 32; i++) {
          if (!(m >> i & 1)) continue;
          if ((mem[i] & m) != mem[i]) report(DIVERGENT_SYNC, pc, -1, w.index, i, 0, 0, 0);
          u32 seg = (c[i] >> 8) & 31, cv = c[i] & 31, lo = i & seg, hi = lo | (cv & ~seg), bv = b[i] & 31;
          int j; bool ok;
          if (I.flags == 0) { j = lo | (bv & ~seg); ok = j <= (int)hi; }
          else if (I.flags == 1) { j = i ^ bv; ok = j <= (int)hi; }
          else if (I.flags == 2) { j = i - (int)bv; ok = j >= (int)hi; }
          else { j = i + (int)bv; ok = j <= (int)hi; }
          if (!ok) j = i;
          if (!(m >> j & 1)) report(SHFL_INACTIVE, pc, -1, w.index, i, j, 0, 0);
          r[i] = a[j]; p[i] = ok ? -1 : 0;
        }
        EACH(d[i] = r[i];)
        if (I.o[5] >= 0) { int32_t *q = R(int32_t, 5); EACH(q[i] = p[i];) }
      } break;
      case redux: {  // flags: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; aux: signed
        u32 *d = R(u32, 0); const u32 *a = R(u32, 1), *mem = R(u32, 2);
        if (!all) report(DIVERGENT_SYNC, pc, -1, w.index, 0, 0, 0, 0);
        u32 r[32];
        for (int i = 0; i < 32; i++) {
          u32 v = 0; bool first = true;
          for (int j = 0; j < 32; j++) {
            if (!(mem[i] >> j & 1)) continue;
            u32 x = a[j];
            if (first) { v = x; first = false; continue; }
            switch (I.flags) {
              case 0: v += x; break;
              case 1: v = I.aux ? ((int32_t)x < (int32_t)v ? x : v) : (x < v ? x : v); break;
              case 2: v = I.aux ? ((int32_t)x > (int32_t)v ? x : v) : (x > v ? x : v); break;
              case 3: v &= x; break;
              case 4: v |= x; break;
              default: v ^= x;
            }
          }
          r[i] = v;
        }
        EACH(d[i] = r[i];)
      } break;
      case vote: {  // flags: 0 any, 1 all, 2 ballot; pneg of the operand in aux
        const int32_t *p = R(int32_t, 1);
        u32 v = 0;
        for (int i = 0; i < 32; i++) if (m >> i & 1) v |= (u32)((p[i] != 0) != (I.aux != 0)) << i;
        u32 r = I.flags == 0 ? (v ? ~0u : 0) : I.flags == 1 ? (v == m ? ~0u : 0) : v;
        u32 *d = R(u32, 0);
        EACH(d[i] = r;)
      } break;
      case bar_sync:
        if ((w.active | w.exited) != ~0u || !w.pending.empty()) report(DIVERGENT_BARRIER, pc, -1, w.index, 0, 0, 0, 0);
        w.waiting = true;
        return;
      case bar_warp:
        if ((w.active | w.exited) != ~0u) report(DIVERGENT_SYNC, pc, -1, w.index, 0, 0, 0, 0);
        w.sync++;
        break;
      case bra: {
        u32 rest = w.active & ~m;
        if (!m) break;
        if (rest) { w.pending.emplace_back(pc + 1, rest); }
        w.active = m;
        w.pc = (int)I.imm;
      } break;
      case ret: w.exited |= m; w.active &= ~m; break;
      case trap: report(TRAP, pc, -1, w.index, 0, 0, 0, 0); w.exited = ~0u; return;
      case wgmma:
        if (!all) report(DIVERGENT_SYNC, pc, -1, w.index, 0, 0, 0, 0);
        do_wgmma(I, w, pc);
        break;
      case wgmma_commit: w.wg_groups.push_back(w.wg_open); w.wg_open.clear(); break;
      case wgmma_wait:
        while ((int64_t)w.wg_groups.size() > I.imm) {
          for (u32 b : w.wg_groups.front()) if (flags & F_RACES) shared_shadow[b].in_flight--;
          w.wg_groups.erase(w.wg_groups.begin());
        }
        break;
      case fence_async: w.fence_epoch = epoch; break;
      case nop: break;
      default: fprintf(stderr, "op %s not implemented\n", NAMES[I.op]); w.exited = ~0u; return;
      }
    }
  }
};

// Returns the number of reports; the first `most` are written to out.
extern "C" __attribute__((visibility("default"))) int launch(const Ins *code, int n, int rf_bytes, const Const *consts, int nconst, const uint8_t *params,
                      Region *regions, int nregions, int gx, int gy, int gz, int nwarps, int shared_bytes, int flags,
                      u64 limit, Report *out, int most, u64 *counts, u64 *waves, u64 *barriers,
                      const int32_t *extra) {
  Engine e;
  WORST = flags & F_WORST;
  e.code = code; e.n = n; e.params = params; e.regions = regions; e.nregions = nregions; e.flags = flags;
  e.shared_bytes = shared_bytes; e.nwarps = nwarps; e.counts = counts; e.waves = waves; e.extra = extra;
  e.global_shadow.resize(nregions);
  std::vector<Warp> warps(nwarps);
  u32 rng = 12345;
  *barriers = 0;
  for (int cz = 0; cz < gz; cz++) for (int cy = 0; cy < gy; cy++) for (int cx = 0; cx < gx; cx++) {
    e.epoch++;
    e.shared.assign(shared_bytes, 0xff);
    if (flags & F_RACES) e.shared_shadow.assign(shared_bytes, Shadow{});
    for (int i = 0; i < nwarps; i++) {
      Warp &w = warps[i];
      w = Warp();
      w.index = i;
      w.storage.assign(rf_bytes + 64, 0xff);
      w.rf = (uint8_t *)(((uintptr_t)w.storage.data() + 63) & ~(uintptr_t)63);
      u32 special[] = {0, (u32)cx, (u32)cy, (u32)cz, (u32)gx, (u32)gy, (u32)gz, (u32)(32 * nwarps), 0};
      for (int s = 0; s < 9; s++)
        for (int lane = 0; lane < 32; lane++)
          ((u32 *)(w.rf + 128 * s))[lane] = s == 0 ? 32 * i + lane : s == 8 ? lane : special[s];
      for (int c = 0; c < nconst; c++)
        for (int lane = 0; lane < 32; lane++) memcpy(w.rf + consts[c].offset + lane * consts[c].width, &consts[c].value, consts[c].width);
    }
    for (;;) {
      std::vector<int> order(nwarps);
      for (int i = 0; i < nwarps; i++) order[i] = flags & F_REVERSE ? nwarps - 1 - i : i;
      if (flags & F_SHUFFLE)
        for (int i = nwarps - 1; i > 0; i--) { rng = rng * 1664525u + 1013904223u; std::swap(order[i], order[(rng >> 8) % (i + 1)]); }
      bool any = false;
      for (int i : order)
        if (!warps[i].done()) { warps[i].waiting = false; e.run(warps[i], limit); any = true; }
      if (!any) break;
      int waiting = 0, exited = 0;
      for (auto &w : warps) { waiting += w.waiting; exited += w.done(); }
      if (waiting && exited) e.report(BARRIER_EXITED, 0, -1, 0, 0, 0, 0, 0);
      e.epoch++;
      (*barriers)++;
    }
    e.cta++;
  }
  int i = 0;
  for (auto &r : e.reports) { if (i < most) out[i] = r.second; i++; }
  return i;
}
