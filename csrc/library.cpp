// The library `torch.ops.fused_inr_native`: capabilities, activations by key, kept memory, and primitives for tests. The
// operators on layers, networks and random draws stand in files of their own. Semantics: docs/architecture.md.
#include <torch/library.h>

#include "memory.h"
#include "native.h"

#ifndef FUSED_INR_STAMP
#define FUSED_INR_STAMP "unstamped"
#endif
#ifndef FUSED_INR_ENGINES
#define FUSED_INR_ENGINES X(generic)
#endif

namespace fused_inr {

#define X(name) extern const Engine engine_##name;
FUSED_INR_ENGINES
#undef X

// fused_inr/native.py looks for this before it loads a library: one built for another PyTorch must not be loaded.
extern "C" __attribute__((used, visibility("default"))) const char fused_inr_stamp[] = "FUSED_INR_STAMP=" FUSED_INR_STAMP ";";

namespace {

// -- capabilities

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name != "generic") return avx2;
#endif
  return true;
}

const std::vector<const Engine*>& engines() {  // slowest first
  static const std::vector<const Engine*> all = {
#define X(name) &engine_##name,
      FUSED_INR_ENGINES
#undef X
  };
  return all;
}

const Engine* best_engine() {
  const Engine* best = engines().front();
  for (const Engine* e : engines())
    if (std::string(e->name) != "wide" && runs_here(e->name)) best = e;
  return best;
}

}  // namespace

std::atomic<const Engine*>& current() {
  static std::atomic<const Engine*> engine{best_engine()};
  return engine;
}

bool multiplies_bfloat16(const Engine* engine) {
  if (!*engine->multiplies_bfloat16) return false;
#if defined(__x86_64__)
  return std::string(engine->name) == "wide" || __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

namespace {

std::string capability() { return current().load()->name; }

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Engine* e : engines())
    if (runs_here(e->name)) names.emplace_back(e->name);
  return names;
}

void set_capability(const std::string& name) {
  if (name.empty()) {
    current() = best_engine();
    return;
  }
  for (const Engine* e : engines()) {
    if (name != e->name) continue;
    TORCH_CHECK_VALUE(runs_here(name), "capability '", name, "' is built but this processor cannot run it");
    current() = e;
    return;
  }
  TORCH_CHECK_VALUE(false, "capability: no '", name, "' in this build, expected one of ", c10::Join(", ", capabilities()));
}

// -- activations

Registry<Activation>& registered() {
  static Registry<Activation> table;
  return table;
}

const std::unordered_map<std::string, Activation>& built_in(const Engine* engine) {
  static std::mutex mutex;
  static std::unordered_map<const Engine*, std::unordered_map<std::string, Activation>> tables;
  std::lock_guard lock(mutex);
  auto& table = tables[engine];
  if (table.empty())
    for (int type = 0; type < 2; ++type)
      for (const Maps* m = engine->maps[type]; m->name; ++m) {
        Activation& a = table[m->name];
        a.branches = m->branches;
        a.outputs = m->outputs;
        a.params = m->params;
        for (int s = 0; s < kSlots; ++s) a.map[type][s] = m->map[s];
      }
  return table;
}

bool find_activation(const Engine* engine, const std::string& key, Activation* found) {
  const auto& table = built_in(engine);
  if (auto it = table.find(key); it != table.end()) {
    *found = it->second;
    return true;
  }
  return registered().find(key, found);
}

}  // namespace

Activation activation_of(const Engine* engine, c10::string_view key) {
  Activation a;
  TORCH_CHECK_VALUE(find_activation(engine, std::string(key), &a), "activation: the native engine knows no '", key,
                    "'; register_activation adds one");
  return a;
}

namespace {

bool has_activation(const std::string& key, int64_t level, bool learnable) {
  Activation a;
  if (!find_activation(current().load(), key, &a)) return false;
  const int slot = slot_of(static_cast<int>(level), learnable && a.params > 0);
  return slot >= 0 && a.map[0][slot] && a.map[1][slot];
}

// tables: addresses of `Map<float>` for each slot, then of `Map<double>`; 0 where there is none
void register_activation(const std::string& key, int64_t branches, int64_t outputs, int64_t params,
                         at::ArrayRef<int64_t> tables) {
  TORCH_CHECK_VALUE(tables.size() == 2 * kSlots, "tables: expected ", 2 * kSlots, " addresses, got ", tables.size());
  TORCH_CHECK_VALUE(branches >= 1 && outputs >= 1 && params >= 0, "branches, outputs, params: expected at least 1, 1, 0, got ",
                    branches, ", ", outputs, ", ", params);
  TORCH_CHECK_VALUE(kMostOfAKind * (branches + outputs + params) <= kMaxStreams, "activation '", key,
                    "': too many branches, outputs and parameters together (at most ", kMaxStreams / kMostOfAKind, ")");
  TORCH_CHECK_VALUE(built_in(current().load()).count(key) == 0, "key: '", key, "' is a built-in activation");
  Activation a;
  a.branches = static_cast<int>(branches);
  a.outputs = static_cast<int>(outputs);
  a.params = static_cast<int>(params);
  for (int type = 0; type < 2; ++type)
    for (int s = 0; s < kSlots; ++s) a.map[type][s] = reinterpret_cast<void*>(tables[type * kSlots + s]);
  registered().put(key, a);
}

// -- primitives

// One primitive, element by element: for tests of their accuracy.
std::vector<Tensor> primitive(c10::string_view name, at::TensorList arguments) {
  TORCH_CHECK_VALUE(!arguments.empty(), "arguments: expected at least one tensor");
  const auto type = arguments[0].scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, "arguments: expected float32 or float64, got ", type);
  const Primitive* row = current().load()->primitives[type == at::kDouble];
  while (row->name && name != row->name) ++row;
  TORCH_CHECK_VALUE(row->name, "name: no primitive '", name, "'");
  TORCH_CHECK_VALUE(arguments.size() == static_cast<size_t>(row->arguments), "arguments: '", name, "' takes ", row->arguments,
                    ", got ", arguments.size());
  std::vector<Tensor> in, out;
  std::array<const void*, 3> source{};
  std::array<void*, 2> target{};
  const std::array<int64_t, 3> stride{1, 1, 1};
  for (size_t i = 0; i < arguments.size(); ++i) {
    TORCH_CHECK_VALUE(arguments[i].sizes() == arguments[0].sizes() && arguments[i].scalar_type() == type,
                      "arguments: expected one shape and type");
    held(arguments[i], "arguments");
    in.push_back(arguments[i].contiguous());
    source[i] = in.back().data_ptr();
  }
  for (int i = 0; i < row->results; ++i) {
    out.push_back(at::empty(arguments[0].sizes(), arguments[0].options()));
    target[static_cast<size_t>(i)] = out.back().data_ptr();
  }
  const auto run = [&](auto scalar) {
    using T = decltype(scalar);
    const T* from[3];
    T* to[2];
    for (int i = 0; i < 3; ++i) from[i] = static_cast<const T*>(source[static_cast<size_t>(i)]);
    for (int i = 0; i < 2; ++i) to[i] = static_cast<T*>(target[static_cast<size_t>(i)]);
    reinterpret_cast<Map<T>>(row->map)(arguments[0].numel(), from, stride.data(), to);
  };
  if (type == at::kDouble) {
    run(double());
  } else {
    run(float());
  }
  return out;
}

std::string stamp() { return FUSED_INR_STAMP; }

}  // namespace

TORCH_LIBRARY(fused_inr_native, m) {
  m.def("primitive(str name, Tensor[] arguments) -> Tensor[]");
  m.def("register_activation(str key, int branches, int outputs, int params, int[] tables) -> ()",
        [](const std::string& key, int64_t b, int64_t c, int64_t p, at::ArrayRef<int64_t> t) {
          register_activation(key, b, c, p, t);
        });
  m.def("has_activation(str key, int level=0, bool learnable=False) -> bool",
        [](const std::string& key, int64_t level, bool learnable) { return has_activation(key, level, learnable); });
  m.def("capability() -> str", []() { return capability(); });
  m.def("capabilities() -> str[]", []() { return capabilities(); });
  m.def("multiplies_bfloat16() -> bool", []() { return multiplies_bfloat16(current().load()); });
  m.def("set_capability(str name) -> ()", [](const std::string& name) { set_capability(name); });
  m.def("product_floor(float operations, int width, bool float64=False) -> ()",
        [](double operations, int64_t width, bool float64) {
          TORCH_CHECK_VALUE(operations > 0 && width > 0, "operations, width: expected more than 0, got ", operations, ", ",
                            width);
          current().load()->product_floor[float64](operations, width, parallel, threads());
        });
  m.def("stamp() -> str", []() { return stamp(); });
  m.def("empty_cache() -> int", []() { return BlockCache::instance().clear(); });
  m.def("cached_bytes() -> int", []() { return BlockCache::instance().cached(); });
  m.def("set_cache_limit(int bytes) -> int", [](int64_t bytes) {
    TORCH_CHECK_VALUE(bytes >= 0, "bytes: expected a limit of at least 0, got ", bytes);
    return BlockCache::instance().set_limit(bytes);
  });
}

TORCH_LIBRARY_IMPL(fused_inr_native, CPU, m) { m.impl("primitive", primitive); }

}  // namespace fused_inr
