// Executes decoded PTX, one warp instruction at a time over 32 lanes. The warps of a block run one after the other, each
// to its next barrier; blocks run one after the other. Shadow memory (shadow.h) tells what nothing orders.
#include "tensor.h"
#include "tensor_memory.h"

namespace {

namespace op {
enum {
#define UNARY(name, ...) name,
#define BINARY(name, ...) name,
#define TERNARY(name, ...) name,
#define WIDENING(name, ...) name,
#define WIDENING_ADD(name, ...) name,
#define SHIFT(name, ...) name,
#define FIELD(name, ...) name,
#define PAIRING(name, ...) name,
#define MIXED(name, ...) name,
#define COMPARISON(name, ...) name,
#define SELECT(name, ...) name,
#define OTHER(name, ...) name,
#include "operations.inc"
#undef UNARY
#undef BINARY
#undef TERNARY
#undef WIDENING
#undef WIDENING_ADD
#undef SHIFT
#undef FIELD
#undef PAIRING
#undef MIXED
#undef COMPARISON
#undef SELECT
#undef OTHER
  OPERATIONS
};
}

// How an operation passes values on: what follows an uncertain one needs to know.
enum class Passes { lanes, select, load, store, cross, sink, control };
struct Operation {
  const char *name;
  Passes passes;
};
const Operation TABLE[] = {
#define UNARY(name, ...) {#name, Passes::lanes},
#define BINARY(name, ...) {#name, Passes::lanes},
#define TERNARY(name, ...) {#name, Passes::lanes},
#define WIDENING(name, ...) {#name, Passes::lanes},
#define WIDENING_ADD(name, ...) {#name, Passes::lanes},
#define SHIFT(name, ...) {#name, Passes::lanes},
#define FIELD(name, ...) {#name, Passes::lanes},
#define PAIRING(name, ...) {#name, Passes::lanes},
#define MIXED(name, ...) {#name, Passes::lanes},
#define COMPARISON(name, ...) {#name, Passes::lanes},
#define SELECT(name, ...) {#name, Passes::select},
#define OTHER(name, how) {#name, Passes::how},
#include "operations.inc"
#undef UNARY
#undef BINARY
#undef TERNARY
#undef WIDENING
#undef WIDENING_ADD
#undef SHIFT
#undef FIELD
#undef PAIRING
#undef MIXED
#undef COMPARISON
#undef SELECT
#undef OTHER
};

// Flags of loads and stores.
enum { SIGNED = 1, WIDE_ADDRESS = 2 };

class Interpreter : public Machine {
 public:
  using Machine::Machine;

  void run_block(int x, int y, int z);

 private:
  TensorMemory tensor_memory;
  u32 random = 12345;

  void start(Warp &w, int index, int x, int y, int z);
  void run(Warp &w);
  bool release_barriers();

  // -- uncertain values

  void set_uncertain(Warp &w, int32_t target, u32 lanes, u32 uncertain, int because) {
    u32 &at = w.uncertain[target >> 6];
    const u32 now = (at & ~lanes) | (uncertain & lanes);
    w.uncertain_registers += (now != 0) - (at != 0);
    at = now;
    if (uncertain & lanes) w.because[target >> 6] = because;
  }
  void use(Warp &w, int32_t source, u32 lanes) {
    if (w.uncertain[source >> 6] & lanes) reports.use(w.because[source >> 6]);
  }
  // Before an instruction whose lanes are m: where uncertain values go.
  void follow_uncertain(const Instruction &I, Warp &w, u32 m) {
    const int32_t *o = program.operands + I.first;
    if (I.guard >= 0) use(w, I.guard, w.path.lanes);
    const Passes passes = TABLE[I.op].passes;
    const int sources = passes == Passes::load ? std::min(I.operands, I.targets + 1) : I.operands;
    u32 uncertain = 0;
    int because = -1;
    for (int k = I.targets; k < sources; k++) {
      if (passes == Passes::store || passes == Passes::load) use(w, o[k], m);
      if (passes == Passes::sink) use(w, o[k], ~0u);
      if (u32 lanes = w.uncertain[o[k] >> 6] & (passes == Passes::cross ? ~0u : m)) {
        uncertain |= lanes;
        because = w.because[o[k] >> 6];
      }
    }
    if (passes == Passes::load) uncertain = 0;
    if (passes == Passes::cross && uncertain) uncertain = ~0u;
    if (passes == Passes::select) {  // only what is chosen
      const int32_t *p = (const int32_t *)(w.registers + o[3]);
      uncertain = w.uncertain[o[3] >> 6];
      for (int i = 0; i < 32; i++) uncertain |= w.uncertain[o[p[i] ? 1 : 2] >> 6] & (1u << i);
    }
    for (int k = 0; k < I.targets; k++) set_uncertain(w, o[k], m, uncertain, because);
  }

  // -- registers that products, or loads from tensor memory, still need

  void watch_registers(const Instruction &I, Warp &w, int at) {
    const int32_t *o = program.operands + I.first;
    const bool copies = I.op == op::mov_32 || I.op == op::mov_64 || I.op == op::pack || I.op == op::unpack;
    bool loading = false;  // a copy of what is still being loaded is one more register that must be waited for
    for (int k = I.targets; k < I.operands && copies && !w.loads.empty(); k++) loading |= w.to_be_written[o[k] >> 6];
    for (int k = 0; k < I.targets && loading; k++) {
      w.to_be_written[o[k] >> 6]++;
      w.loads.push_back(o[k] >> 6);
    }
    for (int k = 0; k < I.operands && !loading; k++) {
      const bool own = I.op == op::wgmma && k < I.targets;  // products of one sum follow each other
      if ((w.to_be_written[o[k] >> 6] && !own) || (k < I.targets && w.to_be_read[o[k] >> 6]))
        report(REGISTERS_IN_FLIGHT, at, -1, w.agent, 0, 0, 0, 0);
    }
    w.steps++;
    if (I.op == op::wgmma) {
      for (int k = 0; k < I.targets + (I.width ? 4 : 0); k++)
        if (w.written[o[k] >> 6] > w.fenced)
          report(k < I.targets ? NO_WGMMA_FENCE : LATE_FACTOR, at, -1, w.agent, 0, 0, 0, 0);
    } else {
      for (int k = 0; k < I.targets; k++)  // a copy of a register is the compiler's, which the assembler takes out
        w.written[o[k] >> 6] = I.op == op::mov_32 && I.flags ? w.written[o[1] >> 6] : w.steps;
    }
  }

  // The lanes of a path go different ways, the last of these first, and meet again at `until`.
  void diverge(Warp &w, int until, const std::vector<std::pair<int, u32>> &ways) {
    if (ways.size() > 1 && until != w.path.until) w.paths.push_back({until, w.path.lanes, w.path.until});
    if (ways.size() == 1) until = w.path.until;
    for (auto [at, lanes] : ways) w.paths.push_back({at, lanes, until});
    w.path = w.paths.back();
    w.paths.pop_back();
  }

  // -- loads and stores

  void access(const Instruction &I, Warp &w, u32 m, int at);
  void access_space(Space space, const Instruction &I, Warp &w, u32 m, int at, const u64 *address);
  void load(const Instruction &I, uint8_t *registers, u32 m, uint8_t *const *from);
  void load_parameter(const Instruction &I, Warp &w, u32 m);
  void copy_async(const Instruction &I, Warp &w, u32 m, int at);
  void finish(Warp &w, const std::vector<Copy> &group);
  bool with_tensor_memory(const Instruction &I, Warp &w, u32 m, int at);
};

void Interpreter::load(const Instruction &I, uint8_t *registers, u32 m, uint8_t *const *from) {
  for (int k = 0; k < I.count; k++) {
    uint8_t *to = registers + program.operands[I.first + k];
    const int offset = k * I.size;
    if (I.size == 4 && I.width == 4) {
      for (int i = 0; i < 32; i++)
        if (m >> i & 1) memcpy(to + 4 * i, from[i] + offset, 4);
    } else {
      for (int i = 0; i < 32; i++) {
        if (!(m >> i & 1)) continue;
        u64 v = 0;
        memcpy(&v, from[i] + offset, I.size);
        if ((I.flags & SIGNED) && I.size < 8 && (v >> (8 * I.size - 1) & 1)) v |= ~0ull << (8 * I.size);
        memcpy(to + I.width * i, &v, I.width);
      }
    }
  }
}

void Interpreter::access_space(Space space, const Instruction &I, Warp &w, u32 m, int at, const u64 *address) {
  const bool writes = TABLE[I.op].passes == Passes::store;
  const int bytes = I.count * I.size;
  static uint8_t nowhere[64];
  static const uint8_t ones[64] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
                                   255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
  if (launch.statistics && space == Space::shared) count_wavefronts(at, address, m, bytes);
  if (launch.statistics && space == Space::global) count_sectors(waves[at], address, m, bytes);
  uint8_t *place[32];
  u32 outside = 0;
  for (int i = 0; i < 32; i++) {
    if (!(m >> i & 1)) continue;
    place[i] = space == Space::shared   ? shared_at(address[i], bytes, writes, w.agent, i, at)
               : space == Space::global ? global_at(address[i], bytes, writes, w.agent, i, at)
                                        : local_at(w, address[i], bytes, writes, i, at);
    if (!place[i]) {
      outside |= 1u << i;
      place[i] = writes ? nowhere : const_cast<uint8_t *>(ones);
    }
  }
  const u32 inside = m & ~outside;
  if (writes) {
    const int32_t *o = program.operands + I.first;
    for (int i = 0; i < 32; i++) {
      if (!(m >> i & 1)) continue;
      uint8_t data[64];
      for (int k = 0; k < I.count; k++) memcpy(data + k * I.size, w.registers + o[1 + k] + i * I.width, I.size);
      if (inside >> i & 1) {
        if (space == Space::shared) write_shared(address[i], bytes, w.agent, i, at, data);
        if (space == Space::global) write_global(address[i], bytes, w.agent, i, at, data);
      }
      memcpy(place[i], data, bytes);
    }
    return;
  }
  load(I, w.registers, m, place);
  if (!launch.races || space == Space::local) return;
  u32 uncertain = 0;
  int because = -1;
  for (int i = 0; i < 32; i++) {
    if (!(inside >> i & 1)) continue;
    const int found = space == Space::shared ? read_shared(address[i], bytes, w.agent, i, at)
                                             : read_global(address[i], bytes, w.agent, i, at);
    if (found >= 0) {
      uncertain |= 1u << i;
      because = found;
    }
  }
  if (uncertain)
    for (int k = 0; k < I.targets; k++) set_uncertain(w, program.operands[I.first + k], m, uncertain, because);
}

void Interpreter::access(const Instruction &I, Warp &w, u32 m, int at) {
  u64 address[32];
  const uint8_t *base = w.registers + program.operands[I.first + (TABLE[I.op].passes == Passes::store ? 0 : I.targets)];
  if (I.flags & WIDE_ADDRESS)
    for (int i = 0; i < 32; i++) address[i] = ((const u64 *)base)[i] + I.value;
  else
    for (int i = 0; i < 32; i++) address[i] = (u32)(((const u32 *)base)[i] + I.value);
  switch (I.op) {
    case op::ld_global: case op::st_global: return access_space(Space::global, I, w, m, at, address);
    case op::ld_shared: case op::st_shared: return access_space(Space::shared, I, w, m, at, address);
    case op::ld_local: case op::st_local: return access_space(Space::local, I, w, m, at, address);
  }
  u32 of_space[3] = {0, 0, 0};  // generic addresses: by their windows
  for (int i = 0; i < 32; i++) {
    if (!(m >> i & 1)) continue;
    const int space = address[i] - SHARED_WINDOW < (1ull << 32) ? 1 : address[i] - LOCAL_WINDOW < (1ull << 32) ? 2 : 0;
    of_space[space] |= 1u << i;
    if (space) address[i] -= space == 1 ? SHARED_WINDOW : LOCAL_WINDOW;
  }
  for (int space = 0; space < 3; space++)
    if (of_space[space]) access_space((Space)space, I, w, of_space[space], at, address);
}

void Interpreter::load_parameter(const Instruction &I, Warp &w, u32 m) {
  uint8_t *from[32];
  const uint8_t *base = w.registers + program.operands[I.first + I.targets];
  for (int i = 0; i < 32; i++)
    from[i] = const_cast<uint8_t *>(launch.parameters) + ((const u64 *)base)[i] + I.value;
  load(I, w.registers, m, from);
}

// Operands: the shared address, the global one, and how many bytes come from there (the rest is 0) where it says so.
// count: bytes; value, size: added to the two addresses.
void Interpreter::copy_async(const Instruction &I, Warp &w, u32 m, int at) {
  const int32_t *o = program.operands + I.first;
  u64 to[32], from[32];
  for (int i = 0; i < 32; i++) {
    to[i] = (u32)(((const u32 *)(w.registers + o[0]))[i] + I.value);
    from[i] = ((const u64 *)(w.registers + o[1]))[i] + I.size;
  }
  if (launch.statistics) {
    count_wavefronts(at, to, m, I.count);
    count_sectors(more[at], from, m, I.count);
  }
  for (int i = 0; i < 32; i++) {
    if (!(m >> i & 1)) continue;
    int valid = I.operands < 3 ? I.count : (int)std::min<u32>(((const u32 *)(w.registers + o[2]))[i], I.count);
    if (from[i] % I.count) report(MISALIGNED, at, -1, w.agent, i, 0, from[i], I.count);
    const Region *region = valid ? region_of(from[i], valid) : nullptr;
    if (valid && !region) {
      report(OUT_OF_BOUNDS_READ, at, -1, w.agent, i, 0, from[i], valid);
      valid = 0;
    }
    if (valid) {
      const int uncertain = read_global(from[i], valid, w.agent, i, at);
      if (uncertain >= 0) reports.use(uncertain);
    }
    uint8_t *place = shared_at(to[i], I.count, true, w.agent, i, at);
    if (!place) continue;
    const uint8_t unknown[16] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    write_shared(to[i], I.count, w.agent, i, at, unknown);
    memcpy(place, unknown, I.count);
    if (launch.races)
      for (u64 c = (to[i] - SHARED_BASE) / program.shared_granule;
           c <= (to[i] - SHARED_BASE + I.count - 1) / program.shared_granule; c++)
        shared_cells[c].pending = 1;
    w.copies.push_back({(u32)to[i], from[i], I.count, valid, i, at});
  }
}

void Interpreter::finish(Warp &w, const std::vector<Copy> &group) {
  for (const Copy &c : group) {
    uint8_t data[16] = {0};
    const u32 at = c.to - SHARED_BASE;
    if (c.valid) memcpy(data, global_at(c.from, c.valid, false, w.agent, c.lane, c.instruction), c.valid);
    if (launch.races)
      for (u32 i = at / program.shared_granule; i <= (at + c.bytes - 1) / program.shared_granule; i++)
        shared_cells[i].pending = 0;
    write_shared(c.to, c.bytes, w.agent, c.lane, c.instruction, data);
    memcpy(shared.data() + at, data, c.bytes);
  }
}

// Instructions of sm_100 (tensor_memory.h). False: a test failed, and another warp should run.
bool Interpreter::with_tensor_memory(const Instruction &I, Warp &w, u32 m, int at) {
  const Operands o = {w.registers, program.operands + I.first};
  const int lane = __builtin_ctz(m);  // most are run by one lane, or alike by all
  auto address = [&](int k, int lane) {  // in shared memory; Triton 3.6 gives it as 64 bits, the upper ones 0
    return (u32)((I.flags & WIDE_ADDRESS ? ((const u64 *)o.word(k))[lane] : o.word(k)[lane]) + I.value);
  };
  switch (I.op) {
    case op::mbarrier_init: tensor_memory.init(*this, w, address(0, lane), o.word(1)[lane], lane, at); break;
    case op::mbarrier_inval: tensor_memory.invalidate(*this, w, address(0, lane), lane, at); break;
    case op::mbarrier_try_wait: {  // Operands: whether it is complete, the barrier, the phase's parity
      bool complete = true;
      for (int i = 0; i < 32; i++)
        if (m >> i & 1) {
          const bool done = tensor_memory.test(*this, w, address(1, i), o.word(2)[i] & 1, i, at);
          ((int32_t *)o.word(0))[i] = done ? -1 : 0;
          complete &= done;
        }
      return complete;
    }
    case op::tcgen05_alloc: tensor_memory.allocate(*this, w, address(0, lane), o.word(1)[lane], at); break;
    case op::tcgen05_dealloc: tensor_memory.release(*this, w, o.word(0)[lane], o.word(1)[lane], at); break;
    case op::tcgen05_mma: tensor_memory.multiply(*this, I, w, o, lane, at); break;
    case op::tcgen05_commit: tensor_memory.commit(*this, w, address(0, lane), lane, at); break;
    case op::tcgen05_ld: tensor_memory.load(*this, I, w, o, at); break;
    case op::tcgen05_st: tensor_memory.store(*this, I, w, o, at); break;
    default: tensor_memory.wait(w, I.flags);
  }
  return true;
}

// Runs a warp up to a barrier, its end, or a test of a completion barrier that fails.
void Interpreter::run(Warp &w) {
  uint8_t *const registers = w.registers;
  u64 steps = 0;
  w.state = State::ready;
  for (;;) {
    if (w.exited == ~0u) {
      w.state = State::done;
      return;
    }
    while (!w.paths.empty() && (!w.path.lanes || w.path.at == w.path.until)) {  // its end: the next one goes on
      w.path = w.paths.back();
      w.path.lanes &= ~w.exited;
      w.paths.pop_back();
    }
    const int at = w.path.at;
    const Instruction &I = program.code[at];
    counts[at]++;
    if (++steps > launch.limit) {
      report(ENDLESS, at, -1, w.agent, 0, 0, 0, 0);
      w.exited = ~0u;
      continue;
    }
    u32 m = w.path.lanes;
    if (I.guard >= 0) {
      const __m256i *p = (const __m256i *)(registers + I.guard);
      u32 set = 0;
      for (int i = 0; i < 4; i++) set |= (u32)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_load_si256(p + i))) << (8 * i);
      m &= I.guard_negated ? ~set : set;
    }
    w.path.at = at + 1;
    if (w.uncertain_registers) follow_uncertain(I, w, m);
    if (!m) continue;
    if (program.watches_registers) watch_registers(I, w, at);
    const bool all = m == ~0u;
    const int32_t *const o = program.operands + I.first;
    auto together = [&] {  // instructions that all lanes of a warp run at once
      if ((m | w.exited) != ~0u) report(DIVERGENT, at, -1, w.agent, 0, 0, 0, 0);
    };
#define R(T, k) ((T *)__builtin_assume_aligned(registers + o[k], 64))
#define EACH(body)                                       \
  if (all) {                                             \
    _Pragma("GCC ivdep") for (int i = 0; i < 32; i++) {  \
      body                                               \
    }                                                    \
  } else {                                               \
    for (int i = 0; i < 32; i++)                         \
      if (m >> i & 1) {                                  \
        body                                             \
      }                                                  \
  }
    switch (I.op) {
#define UNARY(name, D, A, e)                       \
  case op::name: {                                     \
    D *d = R(D, 0);                                \
    const A *pa = R(A, 1);                         \
    EACH(const A a = pa[i]; d[i] = (e);)           \
  } break;
#define BINARY(name, T, e)                                            \
  case op::name: {                                                        \
    T *d = R(T, 0);                                                   \
    const T *pa = R(T, 1), *pb = R(T, 2);                             \
    EACH(const T a = pa[i]; const T b = pb[i]; d[i] = (e);)           \
  } break;
#define TERNARY(name, T, e)                                                               \
  case op::name: {                                                                            \
    T *d = R(T, 0);                                                                       \
    const T *pa = R(T, 1), *pb = R(T, 2), *pc = R(T, 3);                                  \
    EACH(const T a = pa[i]; const T b = pb[i]; const T c = pc[i]; d[i] = (e);)            \
  } break;
#define WIDENING(name, D, T, e)                                       \
  case op::name: {                                                        \
    D *d = R(D, 0);                                                   \
    const T *pa = R(T, 1), *pb = R(T, 2);                             \
    EACH(const T a = pa[i]; const T b = pb[i]; d[i] = (e);)           \
  } break;
#define WIDENING_ADD(name, D, T, e)                                                       \
  case op::name: {                                                                            \
    D *d = R(D, 0);                                                                       \
    const T *pa = R(T, 1), *pb = R(T, 2);                                                 \
    const D *pc = R(D, 3);                                                                \
    EACH(const T a = pa[i]; const T b = pb[i]; const D c = pc[i]; d[i] = (e);)            \
  } break;
#define SHIFT(name, T, e)                                             \
  case op::name: {                                                        \
    T *d = R(T, 0);                                                   \
    const T *pa = R(T, 1);                                            \
    const u32 *pb = R(u32, 2);                                        \
    EACH(const T a = pa[i]; const u32 b = pb[i]; d[i] = (e);)         \
  } break;
#define FIELD(name, T, e)                                                                     \
  case op::name: {                                                                        \
    T *d = R(T, 0);                                                                   \
    const T *pa = R(T, 1);                                                            \
    const u32 *pb = R(u32, 2), *pc = R(u32, 3);                                       \
    EACH(const T a = pa[i]; const u32 b = pb[i]; const u32 c = pc[i]; d[i] = (e);)    \
  } break;
#define PAIRING(name, e)                                              \
  case op::name: {                                                        \
    u32 *d = R(u32, 0);                                               \
    const float *pa = R(float, 1), *pb = R(float, 2);                 \
    EACH(const float a = pa[i]; const float b = pb[i]; d[i] = (e);)   \
  } break;
#define MIXED(name, e)                                                                                  \
  case op::name: {                                                                                          \
    float *d = R(float, 0);                                                                             \
    const uint16_t *pa = R(uint16_t, 1), *pb = R(uint16_t, I.operands - 2);                             \
    const float *pc = R(float, I.operands - 1);                                                         \
    EACH(const uint16_t a = pa[i]; const uint16_t b = pb[i]; (void)b; const float c = pc[i]; d[i] = (e);) \
  } break;
#define COMPARISON(name, T, e)                                        \
  case op::name: {                                                        \
    int32_t *d = R(int32_t, 0);                                       \
    const T *pa = R(T, 1), *pb = R(T, 2);                             \
    EACH(const T a = pa[i]; const T b = pb[i]; d[i] = (e) ? -1 : 0;)  \
  } break;
#define SELECT(name, T)                                               \
  case op::name: {                                                        \
    T *d = R(T, 0);                                                   \
    const T *pa = R(T, 1), *pb = R(T, 2);                             \
    const int32_t *p = R(int32_t, 3);                                 \
    EACH(d[i] = p[i] ? pa[i] : pb[i];)                                \
  } break;
#define OTHER(...)
#include "operations.inc"
      case op::lop3_32: {
        u32 *d = R(u32, 0);
        const u32 *a = R(u32, 1), *b = R(u32, 2), *c = R(u32, 3);
        EACH(u32 r = 0; for (int k = 0; k < 8; k++) if (I.value >> k & 1) r |=
             (k & 4 ? a[i] : ~a[i]) & (k & 2 ? b[i] : ~b[i]) & (k & 1 ? c[i] : ~c[i]);
             d[i] = r;)
      } break;
      case op::bfi_32: {
        u32 *d = R(u32, 0);
        const u32 *a = R(u32, 1), *b = R(u32, 2), *position = R(u32, 3), *length = R(u32, 4);
        EACH(d[i] = bfi(a[i], b[i], position[i], length[i]);)
      } break;
      case op::bfi_64: {
        u64 *d = R(u64, 0);
        const u64 *a = R(u64, 1), *b = R(u64, 2);
        const u32 *position = R(u32, 3), *length = R(u32, 4);
        EACH(d[i] = bfi(a[i], b[i], position[i], length[i]);)
      } break;
      case op::shf_l: case op::shf_r: {  // flags: the count wraps around
        u32 *d = R(u32, 0);
        const u32 *a = R(u32, 1), *b = R(u32, 2), *c = R(u32, 3);
        EACH(const u32 s = I.flags ? c[i] & 31 : std::min(c[i], 32u); const u64 v = ((u64)b[i] << 32) | a[i];
             d[i] = I.op == op::shf_l ? (u32)((v << s) >> 32) : (u32)(v >> s);)
      } break;
      case op::cvt_int: {  // count, size: bits of source and target; width: the target register's bytes; value: the
                       // source register's; flags: 1 source signed, 2 target signed, 4 saturated
        EACH(u64 v = I.value == 2 ? R(uint16_t, 1)[i] : I.value == 4 ? R(u32, 1)[i] : R(u64, 1)[i];
             if (I.count < 64) {
               v &= (1ull << I.count) - 1;
               if ((I.flags & 1) && (v >> (I.count - 1) & 1)) v |= ~0ull << I.count;
             }
             if (I.size < 64) {
               v &= (1ull << I.size) - 1;
               if ((I.flags & 2) && (v >> (I.size - 1) & 1)) v |= ~0ull << I.size;
             }
             memcpy(registers + o[0] + I.width * i, &v, I.width);)
      } break;
      case op::pack:  // the parts, of width bytes each, into one of size bytes
        EACH(for (int k = 1; k < I.operands; k++)
                 memcpy(registers + o[0] + I.size * i + I.width * (k - 1), registers + o[k] + I.width * i, I.width);)
        break;
      case op::unpack:
        EACH(u64 v = 0; memcpy(&v, registers + o[I.targets] + I.size * i, I.size);
             for (int k = 0; k < I.targets; k++) {
               memcpy(registers + o[k] + I.width * i, &v, I.width);
               v >>= 8 * I.width;
             })
        break;
      case op::ld_param: load_parameter(I, w, m); break;
      case op::ld_global: case op::ld_shared: case op::ld_local: case op::ld_generic:
      case op::st_global: case op::st_shared: case op::st_local: case op::st_generic:
        access(I, w, m, at);
        break;
      case op::cp_async: copy_async(I, w, m, at); break;
      case op::cp_commit:
        w.copy_groups.push_back(std::move(w.copies));
        w.copies.clear();
        break;
      case op::cp_wait:  // value: groups that may be open; flags: all copies
        if (I.flags) {
          w.copy_groups.push_back(std::move(w.copies));
          w.copies.clear();
        }
        while ((int64_t)w.copy_groups.size() > I.value) {
          finish(w, w.copy_groups.front());
          w.copy_groups.erase(w.copy_groups.begin());
        }
        break;
      case op::ldmatrix: {
        together();
        const int because = ldmatrix(*this, I, w, {registers, o}, at);
        if (because >= 0)
          for (int k = 0; k < I.targets; k++) set_uncertain(w, o[k], ~0u, ~0u, because);
      } break;
      case op::stmatrix:
        together();
        stmatrix(*this, I, w, {registers, o}, at);
        break;
      case op::mma:
        together();
        mma(I, {registers, o}, launch.cut_sums);
        break;
      case op::shfl: {  // flags: 0 idx, 1 bfly, 2 up, 3 down. Operands: result, (whether in range,) value, lane, limits, lanes
        const int s = I.targets;
        u32 *d = R(u32, 0);
        const u32 *a = R(u32, s), *b = R(u32, s + 1), *c = R(u32, s + 2), *members = R(u32, s + 3);
        u32 result[32];
        int32_t in_range[32];
        for (int i = 0; i < 32; i++) {
          if (!(m >> i & 1)) continue;
          if ((members[i] & (m | w.exited)) != members[i]) report(DIVERGENT, at, -1, w.agent, i, 0, 0, 0);
          const int segment = (c[i] >> 8) & 31, limit = c[i] & 31, low = i & segment, high = low | (limit & ~segment);
          const int by = b[i] & 31;
          int from = I.flags == 0 ? low | (by & ~segment) : I.flags == 1 ? i ^ by : I.flags == 2 ? i - by : i + by;
          const bool ok = I.flags == 2 ? from >= high : from <= high;
          if (!ok) from = i;
          if (!(m >> from & 1)) report(INACTIVE_LANE, at, -1, w.agent, i, from, 0, 0);
          result[i] = a[from];
          in_range[i] = ok ? -1 : 0;
        }
        EACH(d[i] = result[i];)
        if (s > 1) {
          int32_t *p = R(int32_t, 1);
          EACH(p[i] = in_range[i];)
        }
      } break;
      case op::redux: {  // flags: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; width: signed. Operands: result, value, lanes
        u32 *d = R(u32, 0);
        const u32 *a = R(u32, 1), *members = R(u32, 2);
        u32 result[32];
        for (int i = 0; i < 32; i++) {
          if (!(m >> i & 1)) continue;
          if ((members[i] & (m | w.exited)) != members[i]) report(DIVERGENT, at, -1, w.agent, i, 0, 0, 0);
          u32 v = 0;
          bool first = true;
          for (int j = 0; j < 32; j++) {
            if (!(members[i] & m & (1u << j))) continue;
            const u32 x = a[j];
            const bool less = I.width ? (int32_t)x < (int32_t)v : x < v;
            if (first) v = x;
            else if (I.flags == 0) v += x;
            else if (I.flags == 1) v = less ? x : v;
            else if (I.flags == 2) v = less || x == v ? v : x;
            else if (I.flags == 3) v &= x;
            else if (I.flags == 4) v |= x;
            else v ^= x;
            first = false;
          }
          result[i] = v;
        }
        EACH(d[i] = result[i];)
      } break;
      case op::vote: {  // flags: 0 any, 1 all, 2 ballot, 3 uni; width: of the opposite. Operands: result, predicate, lanes
        const int32_t *p = R(int32_t, 1);
        const u32 *members = R(u32, 2);
        u32 set = 0;
        for (int i = 0; i < 32; i++)
          if (m >> i & 1) {
            if ((members[i] & (m | w.exited)) != members[i]) report(DIVERGENT, at, -1, w.agent, i, 0, 0, 0);
            set |= (u32)((p[i] != 0) != (I.width != 0)) << i;
          }
        u32 *d = R(u32, 0);
        EACH(const u32 voters = members[i] & m; const u32 in_favour = set & members[i];
             d[i] = I.flags == 0   ? (in_favour ? ~0u : 0)
                    : I.flags == 1 ? (in_favour == voters ? ~0u : 0)
                    : I.flags == 2 ? in_favour
                                   : (in_favour == voters || !in_favour ? ~0u : 0);)
      } break;
      case op::elect: {  // Operands: the lane, whether it is this one, lanes
        const int chosen = __builtin_ctz(m & R(u32, 2)[__builtin_ctz(m)]);
        u32 *d = R(u32, 0);
        int32_t *p = R(int32_t, 1);
        EACH(d[i] = (u32)chosen; p[i] = i == chosen ? -1 : 0;)
      } break;
      case op::bar_sync: case op::bar_arrive: {  // value: which; count: of how many threads, 0 for all
        if ((m | w.exited) != ~0u) report(DIVERGENT, at, -1, w.agent, 0, 0, 0, 0);
        arrive((int)I.value, w, I.count, I.op == op::bar_sync);
        if (I.op == op::bar_arrive) break;
        w.state = State::at_barrier;
        return;
      }
      case op::bar_warp:
        together();
        w.agent.sync++;
        break;
      case op::bra:  // value: where the lanes that jump and those that do not meet again; flags: those that stay go first
        if (const u32 stay = w.path.lanes & ~m) {
          if (I.flags) diverge(w, (int)I.value, {{o[0], m}, {at + 1, stay}});
          else diverge(w, (int)I.value, {{at + 1, stay}, {o[0], m}});
        } else {
          w.path.at = o[0];
        }
        break;
      case op::brx: {  // count: labels, which lie behind the operand that chooses one; value: as above
        const u32 *index = R(u32, 0);
        std::vector<std::pair<int, u32>> ways;
        if (w.path.lanes & ~m) ways.push_back({at + 1, w.path.lanes & ~m});
        for (int label = 0; label < I.count; label++) {
          u32 lanes = 0;
          for (int i = 0; i < 32; i++) lanes |= (u32)((m >> i & 1) && index[i] == (u32)label) << i;
          if (lanes) ways.push_back({o[1 + label], lanes});
          m &= ~lanes;
        }
        if (m) {
          report(OUT_OF_BOUNDS_READ, at, -1, w.agent, __builtin_ctz(m), 0, index[__builtin_ctz(m)], 4);
          w.exited |= m;
          w.path.lanes &= ~m;
        }
        if (!ways.empty()) diverge(w, (int)I.value, ways);
      } break;
      case op::ret:
        w.exited |= m;
        w.path.lanes &= ~m;
        break;
      case op::trap:
        report(TRAP, at, -1, w.agent, 0, 0, 0, 0);
        w.exited = ~0u;
        break;
      case op::wgmma:
        together();
        wgmma(*this, I, w, {registers, o}, at);
        break;
      case op::wgmma_fence: w.fenced = w.steps; break;
      case op::wgmma_commit:
        w.product_groups.push_back(std::move(w.products));
        w.products = Warp::Products();
        break;
      case op::wgmma_wait: wait_for_products(*this, w, I.value, at); break;
      case op::fence_async:
        w.agent.fences++;
        w.agent.fence_epoch = epoch;
        break;
      case op::nop: break;
      case op::mbarrier_init: case op::mbarrier_inval: case op::mbarrier_try_wait: case op::tcgen05_alloc: case op::tcgen05_dealloc:
      case op::tcgen05_mma: case op::tcgen05_commit: case op::tcgen05_ld: case op::tcgen05_st: case op::tcgen05_wait:
        if (!with_tensor_memory(I, w, m, at)) {
          w.state = State::yielded;
          return;
        }
        break;
      default:
        fprintf(stderr, "fused_inr: no operation of PTX has the number %d\n", I.op);
        abort();
    }
  }
}

// Lets the warps go on whose barriers are complete.
bool Interpreter::release_barriers() {
  int alive = 0;
  for (const Warp &w : warps) alive += w.state != State::done;
  bool any = false;
  for (Barrier &b : barriers) {
    if (b.arrived.empty()) continue;
    const int needed = b.threads ? b.threads / 32 : launch.warps;
    const int arrived = (int)b.arrived.size();
    if (arrived < needed && !(b.threads == 0 && arrived == alive)) continue;
    if (arrived < needed) report(EXITED_WARP, 0, -1, warps[b.arrived[0].warp].agent, 0, 0, 0, 0);
    int waiting = 0;
    for (const Arrival &a : b.arrived) waiting += a.waits;
    if (waiting == launch.warps || arrived < needed) new_epoch();
    else join(b);
    for (const Arrival &a : b.arrived)
      if (a.waits) warps[a.warp].state = State::ready;
    b.arrived.clear();
    any = true;
  }
  return any;
}

void Interpreter::start(Warp &w, int index, int x, int y, int z) {
  w = Warp();
  w.index = w.agent.warp = index;
  w.path = {0, ~0u, -1};
  w.agent.sync = 1;
  w.storage.assign(program.register_bytes + 64, 0xff);
  w.registers = (uint8_t *)(((uintptr_t)w.storage.data() + 63) & ~(uintptr_t)63);
  const size_t pieces = program.register_bytes / 64 + 1;
  w.uncertain.assign(pieces, 0);
  w.because.assign(pieces, -1);
  if (program.watches_registers) {
    w.to_be_written.assign(pieces, 0);
    w.to_be_read.assign(pieces, 0);
    w.written.assign(pieces, 0);
  }
  w.local.assign(32 * (size_t)program.local_bytes, 0xff);
  // the special registers lie first, in the order of reader.SPECIAL
  const u32 special[] = {0, 0, 0, (u32)x, (u32)y, (u32)z, (u32)launch.grid[0], (u32)launch.grid[1], (u32)launch.grid[2],
                         (u32)(32 * launch.warps), 1, 1, 0, (u32)index};
  for (int s = 0; s < 14; s++)
    for (int lane = 0; lane < 32; lane++)
      ((u32 *)(w.registers + 128 * s))[lane] = s == 0 ? 32 * index + lane : s == 12 ? lane : special[s];
  for (int c = 0; c < program.constants; c++)
    for (int lane = 0; lane < 32; lane++)
      memcpy(w.registers + program.constant[c].offset + lane * program.constant[c].width, &program.constant[c].value,
             program.constant[c].width);
}

void Interpreter::run_block(int x, int y, int z) {
  first_epoch = ++epoch;
  shared.assign(launch.shared_bytes, 0xff);
  if (launch.races) shared_cells.assign(launch.shared_bytes / program.shared_granule + 1, Cell{});
  read_segments.clear();
  tensor_memory.clear();
  for (Barrier &b : barriers) b.arrived.clear();
  const int n = launch.warps;
  for (int i = 0; i < n; i++) start(warps[i], i, x, y, z);
  std::vector<int> order(n);
  for (;;) {
    for (int i = 0; i < n; i++) order[i] = launch.order == 1 ? n - 1 - i : i;
    if (launch.order == 2)
      for (int i = n - 1; i > 0; i--) {
        random = random * 1664525u + 1013904223u;
        std::swap(order[i], order[(random >> 8) % (i + 1)]);
      }
    bool ran = false;
    for (int i : order)
      if (warps[i].state == State::ready || warps[i].state == State::yielded) {
        const int before = warps[i].path.at;
        const State state = warps[i].state;
        run(warps[i]);
        ran |= !(state == State::yielded && warps[i].state == State::yielded && warps[i].path.at == before);
      }
    const bool released = release_barriers();
    bool done = true;
    for (const Warp &w : warps) done &= w.state == State::done;
    if (done) break;
    if (!ran && !released) {
      for (const Warp &w : warps)
        if (w.state != State::done) report(DEADLOCK, w.path.at - 1, -1, w.agent, 0, 0, 0, 0);
      break;
    }
  }
  tensor_memory.check_released(*this);
  block++;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int fused_inr_ptx_operation(const char *name) {
  for (int i = 0; i < op::OPERATIONS; i++)
    if (!strcmp(TABLE[i].name, name)) return i;
  return -1;
}

EXPORTED const char *fused_inr_ptx_name(int i) { return i >= 0 && i < op::OPERATIONS ? TABLE[i].name : nullptr; }

// Returns how many reports there are; the first ones are written to `reports`.
EXPORTED int fused_inr_ptx_launch(const PtxProgram *program, const Launch *launch, Report *reports, u64 *counts, u64 *waves,
                                  u64 *more) {
  errors = (Errors)launch->errors;
  Interpreter machine(*program, *launch, counts, waves, more);
  for (int z = 0; z < launch->grid[2]; z++)
    for (int y = 0; y < launch->grid[1]; y++)
      for (int x = 0; x < launch->grid[0]; x++) machine.run_block(x, y, z);
  return machine.reports.write(reports, launch->reports_room);
}
