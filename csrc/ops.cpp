// The operators of the native engine, `torch.ops.fused_inr_native.*`: checks, allocation, and the choice of capability.
// The semantics are those of docs/architecture.md, sections 2 and 3.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/engine.h"
#include "held.h"
#include "memory.h"

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

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

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

std::atomic<const Engine*>& current() {
  static std::atomic<const Engine*> engine{best_engine()};
  return engine;
}

// Whether the engine multiplies bfloat16 as such: what it was compiled with, and what the processor can.
bool multiplies_bfloat16(const Engine* engine) {
  if (!*engine->multiplies_bfloat16) return false;
#if defined(__x86_64__)
  return std::string(engine->name) == "wide" || __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

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

struct Activation {
  int branches = 1, outputs = 1, params = 0;
  std::array<std::array<void*, kSlots>, 2> map{};
};

std::shared_mutex registry_mutex;
std::unordered_map<std::string, Activation>& registered() {
  static std::unordered_map<std::string, Activation> table;
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
  std::shared_lock lock(registry_mutex);
  if (auto it = registered().find(key); it != registered().end()) {
    *found = it->second;
    return true;
  }
  return false;
}

Activation activation_of(const Engine* engine, c10::string_view key) {
  Activation a;
  TORCH_CHECK_VALUE(find_activation(engine, std::string(key), &a), "activation: the native engine knows no '", key,
                    "'; register_activation adds one");
  return a;
}

void* map_of(const Activation& a, c10::string_view key, bool float64, int level, bool learnable) {
  const int slot = slot_of(level, learnable && a.params > 0);
  void* map = slot < 0 ? nullptr : a.map[float64][slot];
  TORCH_CHECK_NOT_IMPLEMENTED(map != nullptr, "activation '", key, "': the native engine has no derivative of order ", level,
                              learnable ? " with learnable parameters" : "", " for ", float64 ? "float64" : "float32");
  return map;
}

bool has_activation(const std::string& key, int64_t level, bool learnable) {
  Activation a;
  if (!find_activation(current().load(), key, &a)) return false;
  const int slot = slot_of(static_cast<int>(level), learnable && a.params > 0);
  return slot >= 0 && a.map[0][slot] && a.map[1][slot];
}

// tables: addresses of `Map<float>` for the slots of engine.h, then of `Map<double>`; 0 where there is none
void register_activation(const std::string& key, int64_t branches, int64_t outputs, int64_t params,
                         at::ArrayRef<int64_t> tables) {
  TORCH_CHECK_VALUE(tables.size() == 2 * kSlots, "tables: expected ", 2 * kSlots, " addresses, got ", tables.size());
  TORCH_CHECK_VALUE(branches >= 1 && outputs >= 1 && params >= 0, "branches, outputs, params: expected at least 1, 1, 0, got ",
                    branches, ", ", outputs, ", ", params);
  TORCH_CHECK_VALUE(2 * (branches + outputs + params) * 3 <= 2 * kMaxStreams, "activation '", key,
                    "': too many branches, outputs and parameters together (at most ", kMaxStreams / 3, ")");
  TORCH_CHECK_VALUE(built_in(current().load()).count(key) == 0, "key: '", key, "' is a built-in activation");
  Activation a;
  a.branches = static_cast<int>(branches);
  a.outputs = static_cast<int>(outputs);
  a.params = static_cast<int>(params);
  for (int type = 0; type < 2; ++type)
    for (int s = 0; s < kSlots; ++s) a.map[type][s] = reinterpret_cast<void*>(tables[type * kSlots + s]);
  std::unique_lock lock(registry_mutex);
  registered()[key] = a;
}

// -- tensors

void parallel(int64_t parts, void (*task)(void*, int64_t), void* context) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) task(context, part);
  });
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

Storage storage_of(const Tensor& t, const char* name) {
  held(t, name);
  switch (t.scalar_type()) {
    case at::kFloat: return Storage::float32;
    case at::kDouble: return Storage::float64;
    case at::kBFloat16: return Storage::bfloat16;
    case at::kHalf: return Storage::float16;
    default: break;
  }
  TORCH_CHECK_TYPE(false, name, ": expected float32, float64, bfloat16 or float16, got ", t.scalar_type());
}

Tensor nothing(at::ScalarType type) { return at::empty({0}, at::TensorOptions().dtype(type)); }

Tensor with_unit_columns(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

Rows rows_of(const Tensor& t, const char* name) {
  Rows r;
  r.data = t.data_ptr();
  r.batch_stride = t.dim() == 3 ? t.stride(0) : 0;
  r.row_stride = t.stride(-2);
  r.storage = storage_of(t, name);
  return r;
}

// Parameters in the compute type: tensors of one element or one per feature, or the constants.
struct Params {
  std::vector<Tensor> keep;
  std::array<float, kMaxStreams> floats;
  std::array<double, kMaxStreams> doubles;
  std::array<const void*, kMaxStreams> data;
  std::array<int64_t, kMaxStreams> stride;

  Params(const OptionalTensors& params, at::ArrayRef<double> constants, const Activation& a, int64_t features,
         at::ScalarType type) {
    const size_t count = static_cast<size_t>(a.params);
    TORCH_CHECK_VALUE(params.size() <= count && (params.empty() || params.size() == count), "params: expected ", count,
                      " (or none), got ", params.size());
    for (size_t j = 0; j < count; ++j) {
      const OptionalTensor p = params.empty() ? OptionalTensor() : OptionalTensor(params.get(j));
      if (p && p->defined()) {
        TORCH_CHECK_VALUE(p->dim() <= 1 && (p->numel() == 1 || p->numel() == features), "params[", j,
                          "]: expected one number or ", features, " (one per feature), got shape ", p->sizes());
        held(*p, "params");
        keep.push_back(p->to(type).contiguous());
        data[j] = keep.back().data_ptr();
        stride[j] = p->numel() == 1 ? 0 : 1;
      } else {
        TORCH_CHECK_VALUE(j < constants.size(), "constants: expected ", count, ", got ", constants.size());
        floats[j] = static_cast<float>(constants[j]);
        doubles[j] = constants[j];
        data[j] = type == at::kDouble ? static_cast<const void*>(&doubles[j]) : &floats[j];
        stride[j] = 0;
      }
    }
  }
};

// x, weight and bias of a call, checked and in a form that the engine takes.
struct Operands {
  const Engine* engine = current().load();
  Activation activation;
  at::ScalarType compute;
  int64_t batch = 1, rows = 0, depth = 0, features = 0;
  bool batched = false;
  Tensor x, weight, bias;

  Operands(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, c10::string_view key)
      : activation(activation_of(engine, key)), compute(x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {
    storage_of(x_, "x");
    storage_of(weight_, "weight");
    batched = weight_.dim() == 3;
    TORCH_CHECK_VALUE(weight_.dim() == 2 || batched, "weight: expected [B*N, K] or [G, B*N, K], got ", weight_.sizes());
    TORCH_CHECK_VALUE(x_.dim() == weight_.dim(), "x: expected ", weight_.dim(), " dimensions as weight has, got ", x_.sizes());
    TORCH_CHECK_VALUE(x_.size(-1) == weight_.size(-1), "x: its last size ", x_.size(-1), " is not weight's, ", weight_.size(-1));
    TORCH_CHECK_VALUE(!batched || x_.size(0) == weight_.size(0), "x: batch ", x_.size(0), " is not weight's, ", weight_.size(0));
    TORCH_CHECK_VALUE(weight_.size(-2) % activation.branches == 0, "weight: ", weight_.size(-2), " rows are not a multiple of ",
                      activation.branches, " branches");
    batch = batched ? x_.size(0) : 1;
    rows = x_.size(-2);
    depth = x_.size(-1);
    features = weight_.size(-2) / activation.branches;
    x = with_unit_columns(x_);
    weight = with_unit_columns(weight_.to(compute));
    if (bias_ && bias_->defined()) {
      const int64_t columns = weight_.size(-2);
      TORCH_CHECK_VALUE(bias_->size(-1) == columns && bias_->numel() == columns * batch && bias_->dim() == weight_.dim() - 1,
                        "bias: expected ", batched ? "[G, " : "[", columns, "], got ", bias_->sizes());
      storage_of(*bias_, "bias");
      bias = bias_->to(compute).contiguous();
    }
  }

  std::vector<int64_t> shape(int64_t m, int64_t n) const {
    return batched ? std::vector<int64_t>{batch, m, n} : std::vector<int64_t>{m, n};
  }
  int64_t columns() const { return activation.branches * features; }
  bool float64() const { return compute == at::kDouble; }

  Layer layer(const Params& params, void* map) const {
    Layer l;
    l.batch = batch;
    l.rows = rows;
    l.in_features = depth;
    l.features = features;
    l.branches = activation.branches;
    l.outputs = activation.outputs;
    l.params = activation.params;
    l.x = rows_of(x, "x");
    l.weight = rows_of(weight, "weight");
    l.bias = bias.defined() ? bias.data_ptr() : nullptr;
    l.bias_batch_stride = bias.defined() && batched ? bias.stride(0) : 0;
    for (int j = 0; j < activation.params; ++j) {
      l.param[j] = params.data[j];
      l.param_stride[j] = params.stride[j];
    }
    l.map = map;
    l.parallel = parallel;
    l.threads = threads();
    return l;
  }
};

// -- operators

std::tuple<Tensor, Tensor> linear_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                      const OptionalTensors& params, at::ArrayRef<double> constants,
                                      c10::string_view activation, bool save) {
  const Operands o(x, weight, bias, activation);
  const Params p(params, constants, o.activation, o.features, o.compute);
  void* map = map_of(o.activation, activation, o.float64(), 0, false);
  Tensor y = fresh(o.shape(o.rows, o.activation.outputs * o.features), x.scalar_type());
  Tensor z = save ? fresh(o.shape(o.rows, o.columns()), o.compute) : nothing(o.compute);
  Forward f;
  f.layer = o.layer(p, map);
  f.y = rows_of(y, "y");
  if (save) f.z = rows_of(z, "z");
  o.engine->forward[o.float64()](f);
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_act_backward(
    const Tensor& g_, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensors& params,
    at::ArrayRef<double> constants, const OptionalTensor& z_, c10::string_view activation, std::array<bool, 4> needs) {
  const Operands o(x, weight, bias, activation);
  const Params p(params, constants, o.activation, o.features, o.compute);
  const bool learnable = needs[3] && o.activation.params > 0;
  const auto expected = o.shape(o.rows, o.activation.outputs * o.features);
  TORCH_CHECK_VALUE(g_.sizes() == at::IntArrayRef(expected), "g: expected ", at::IntArrayRef(expected), ", got ", g_.sizes());
  held(g_, "g");
  Backward f;
  f.layer = o.layer(p, map_of(o.activation, activation, o.float64(), 1, learnable));

  const bool widened = (g_.scalar_type() == at::kDouble) != o.float64();
  const Tensor g = with_unit_columns(widened ? g_.to(o.compute) : g_);
  f.g = rows_of(g, "g");
  Tensor z;
  if (z_ && z_->defined()) {
    const auto z_shape = o.shape(o.rows, o.columns());
    TORCH_CHECK_VALUE(z_->sizes() == at::IntArrayRef(z_shape), "z: expected ", at::IntArrayRef(z_shape), ", got ", z_->sizes());
    held(*z_, "z");
    z = with_unit_columns(z_->to(o.compute));
    f.z = rows_of(z, "z");
    // an empty tensor has no address, and none is needed
  }
  const bool bias_needed = needs[2] && bias && bias->defined();
  const bool empty = o.rows == 0 || o.batch == 0 || o.columns() == 0;
  const auto sum = [&](std::vector<int64_t> shape) {
    const auto options = at::TensorOptions().dtype(o.compute);
    return empty ? at::zeros(shape, options) : at::empty(shape, options);
  };
  Tensor gx = nothing(x.scalar_type()), gw = nothing(weight.scalar_type()), gp = nothing(o.compute);
  const auto bias_type = bias && bias->defined() ? bias->scalar_type() : weight.scalar_type();
  Tensor gb = nothing(bias_needed ? o.compute : bias_type);
  if (needs[0]) {
    gx = empty ? at::zeros(x.sizes(), at::TensorOptions().dtype(x.scalar_type())) : fresh(x.sizes(), x.scalar_type());
    f.gx = rows_of(gx, "gx");
  }
  if (needs[1]) {
    gw = sum(o.shape(o.columns(), o.depth));
    f.gw = gw.data_ptr();
  }
  if (bias_needed) {
    gb = sum(bias->sizes().vec());
    f.gb = gb.data_ptr();
  }
  if (learnable) {
    gp = sum(o.shape(o.activation.params, o.features));
    f.gp = gp.data_ptr();
  }
  if (!empty && (needs[0] || needs[1] || bias_needed || learnable)) o.engine->backward[o.float64()](f);
  if (needs[1]) gw = gw.to(weight.scalar_type());
  if (bias_needed) gb = gb.to(bias_type);
  return {gx, gw, gb, gp};
}

// The groups of a map's inputs and outputs, derived level by level (docs/architecture.md, section 1).
struct Streams {
  struct Kind {
    int width;
    bool param;
  };
  std::vector<Kind> in, out;

  Streams(const Activation& a, int level, bool learnable) {
    in.push_back({a.branches, false});
    for (int p = 0; p < a.params; ++p) in.push_back({1, true});
    out.push_back({a.outputs, false});
    for (int l = 1; l <= level; ++l) {
      std::vector<Kind> gradients;
      for (size_t i = 0; i < in.size(); ++i) {
        const bool constant = !learnable && i >= 1 && i <= static_cast<size_t>(a.params);
        if (!constant) gradients.push_back(in[i]);
      }
      in.insert(in.end(), out.begin(), out.end());
      out = gradients;
    }
  }
};

std::vector<Tensor> act_map(at::TensorList inputs, const OptionalTensors& params, at::ArrayRef<double> constants,
                            c10::string_view key, int64_t level, bool learnable) {
  const Engine* engine = current().load();
  const Activation a = activation_of(engine, key);
  TORCH_CHECK_VALUE(level >= 0 && level <= 3, "level: expected 0 to 3, got ", level);
  const Streams streams(a, static_cast<int>(level), learnable);
  const size_t count = streams.in.size() - static_cast<size_t>(a.params);
  TORCH_CHECK_VALUE(inputs.size() == count, "inputs: expected ", count, " tensors, got ", inputs.size());
  const Tensor& z = inputs[0];
  TORCH_CHECK_VALUE(z.dim() >= 2 && z.size(-1) % a.branches == 0, "inputs[0]: expected [M, ", a.branches, "*N], got ", z.sizes());
  for (size_t i = 0; i < count; ++i) storage_of(inputs[i], "inputs");
  const auto compute = z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t features = z.size(-1) / a.branches;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < z.dim(); ++d) rows *= z.size(d);
  void* map = map_of(a, key, compute == at::kDouble, static_cast<int>(level), learnable);
  const Params p(params, constants, a, features, compute);

  MapRows f;
  f.rows = rows;
  f.features = features;
  f.map = map;
  f.parallel = parallel;
  f.threads = threads();
  std::vector<Tensor> keep;
  size_t next = 0;
  for (size_t i = 0; i < streams.in.size(); ++i) {
    Group& group = f.in[f.inputs++];
    if (i >= 1 && i <= static_cast<size_t>(a.params)) {
      group.data = const_cast<void*>(p.data[i - 1]);
      group.column_stride = p.stride[i - 1];
      continue;
    }
    const Streams::Kind kind = streams.in[i];
    Tensor t = inputs[next];
    group.width = kind.width;
    if (kind.param) {
      TORCH_CHECK_VALUE(t.dim() <= 1 && (t.numel() == 1 || t.numel() == features), "inputs[", next,
                        "]: the cotangent of a parameter, expected one number or ", features, ", got ", t.sizes());
      t = t.to(compute).contiguous();
      group.column_stride = t.numel() == 1 ? 0 : 1;
    } else {
      auto shape = z.sizes().vec();
      shape.back() = kind.width * features;
      TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(shape), "inputs[", next, "]: expected ", at::IntArrayRef(shape), ", got ",
                        t.sizes());
      t = t.to(compute);
      if (t.dim() != 2) t = t.reshape({rows, kind.width * features});
      if (t.size(1) > 1 && t.stride(1) > 1) t = t.contiguous();
      group.row_stride = t.stride(0);
      group.column_stride = t.size(1) > 1 ? t.stride(1) : 1;
    }
    group.data = t.data_ptr();
    keep.push_back(t);
    ++next;
  }
  std::vector<Tensor> results;
  const bool empty = rows * features == 0;
  for (const Streams::Kind kind : streams.out) {
    Group& group = f.out[f.results++];
    group.width = kind.width;
    group.summed = kind.param;
    if (kind.param) {
      const auto options = at::TensorOptions().dtype(compute);
      results.push_back(empty ? at::zeros({features}, options) : at::empty({features}, options));
    } else {
      auto shape = z.sizes().vec();
      shape.back() = kind.width * features;
      results.push_back(fresh(shape, compute));
      group.row_stride = kind.width * features;
    }
    group.data = results.back().data_ptr();
  }
  if (!empty) engine->map_rows[compute == at::kDouble](f);
  return results;
}

// -- a whole network

// What a layer is, from its word in a network's spec (fused_inr/network.py): the key of its map, `skip`, the word of a norm.
struct LayerWords {
  std::string key;
  bool skip = false;
  bool norm = false;
  bool centred = true;

  explicit LayerWords(const std::string& words) {
    std::istringstream in(words);
    in >> key;
    for (std::string word; in >> word;) {
      if (word == "skip") {
        skip = true;
      } else if (word == "layernorm" || word == "rmsnorm") {
        norm = true;
        centred = word == "layernorm";
      } else {
        TORCH_CHECK_VALUE(false, "words: expected skip, layernorm or rmsnorm behind '", key, "', got '", word, "'");
      }
    }
  }
};

// Takes a network's tensors and numbers one after the other.
class NetworkReader {
 public:
  NetworkReader(const OptionalTensors& tensors, at::ArrayRef<double> numbers) : tensors_(tensors), numbers_(numbers) {}

  OptionalTensor tensor() {
    TORCH_CHECK_VALUE(next_ < tensors_.size(), "tensors: expected those of every layer, got ", tensors_.size());
    return tensors_.get(next_++);
  }
  at::ArrayRef<double> numbers(size_t count) {
    TORCH_CHECK_VALUE(number_ + count <= numbers_.size(), "numbers: expected those of every layer, got ", numbers_.size());
    number_ += count;
    return numbers_.slice(number_ - count, count);
  }
  void end() const {
    TORCH_CHECK_VALUE(next_ == tensors_.size() && number_ == numbers_.size(), "tensors, numbers: expected ", next_, " and ",
                      number_, " for these words, got ", tensors_.size(), " and ", numbers_.size());
  }

 private:
  const OptionalTensors& tensors_;
  at::ArrayRef<double> numbers_;
  size_t next_ = 0, number_ = 0;
};

// Tensors and activations of a call, checked and in a form that the engine takes.
struct NetworkOperands {
  const Engine* engine = current().load();
  at::ScalarType compute;
  Tensor x;
  std::vector<Tensor> keep;
  std::vector<Activation> activations;
  std::vector<Params> params;
  std::vector<NetworkLayer> layers;
  std::vector<std::string> keys;

  NetworkOperands(const Tensor& x_, const OptionalTensors& tensors, const c10::List<std::string>& words,
                  at::ArrayRef<double> numbers)
      : compute(x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {
    const size_t count = words.size();
    TORCH_CHECK_VALUE(count >= 1, "words: expected one for each layer, got none");
    storage_of(x_, "x");
    TORCH_CHECK_VALUE(x_.dim() == 2, "x: expected [M, K], got ", x_.sizes());
    x = with_unit_columns(x_);
    layers.resize(count);
    params.reserve(count);
    int64_t channels = 1, channel = x_.size(1);
    NetworkReader reader(tensors, numbers);
    for (size_t i = 0; i < count; ++i) {
      const LayerWords word(words.get(i));
      keys.push_back(word.key);
      activations.push_back(activation_of(engine, word.key));
      const Activation& a = activations.back();
      TORCH_CHECK_VALUE(a.params <= kMaxParams, "activation '", word.key, "': more than ", kMaxParams, " parameters");
      const OptionalTensor weight = reader.tensor();
      TORCH_CHECK_VALUE(weight && weight->defined(), "tensors: layer ", i, " has no weight");
      const Tensor& w = *weight;
      storage_of(w, "weight");
      TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) == channels * channel && w.size(0) % a.branches == 0, "weight of layer ", i,
                        ": expected [", a.branches, " * N, ", channels * channel, "], got ", w.sizes());
      NetworkLayer& l = layers[i];
      l.in_channels = channels;
      l.in_channel = channel;
      l.features = w.size(0) / a.branches;
      l.branches = a.branches;
      l.outputs = a.outputs;
      l.params = a.params;
      keep.push_back(with_unit_columns(w.to(compute)));
      l.weight = rows_of(keep.back(), "weight");
      l.bias = vector_of(reader.tensor(), w.size(0), "bias of layer ", i);
      OptionalTensors own;
      for (int j = 0; j < a.params; ++j) own.push_back(reader.tensor());
      params.emplace_back(own, reader.numbers(static_cast<size_t>(a.params)), a, l.features, compute);
      for (int j = 0; j < a.params; ++j) {
        // a copy of Params would leave these behind: they point into the vector, which does not grow
        l.param[j] = params.back().data[static_cast<size_t>(j)];
        l.param_stride[j] = params.back().stride[static_cast<size_t>(j)];
      }
      l.value = word.key == "identity" ? nullptr : map_of(a, word.key, float64(), 0, false);
      l.skip = word.skip;
      TORCH_CHECK_VALUE(!l.skip || (l.value && l.outputs == channels && l.features == channel), "words: layer ", i,
                        ": a skip connection passes by a layer with an activation and with as many columns as its input");
      channels = a.outputs;
      channel = l.features;
      l.norm = word.norm;
      if (!l.norm) continue;
      l.centred = word.centred;
      l.gamma = vector_of(reader.tensor(), channels * channel, "norm's weight of layer ", i);
      l.beta = vector_of(reader.tensor(), channels * channel, "norm's bias of layer ", i);
      l.eps = reader.numbers(1)[0];
    }
    reader.end();
  }
  NetworkOperands(const NetworkOperands&) = delete;

  bool float64() const { return compute == at::kDouble; }
  int64_t rows() const { return x.size(0); }
  int64_t out_features() const { return layers.back().outputs * layers.back().features; }
  bool empty() const {
    for (const NetworkLayer& l : layers)
      if (l.features == 0) return true;
    return rows() == 0;
  }

  // Finds the maps of a backward, with parameters as inputs that have gradients where `learnable`.
  void differentiate(bool learnable) {
    for (size_t i = 0; i < layers.size(); ++i) {
      NetworkLayer& l = layers[i];
      if (!l.value) continue;
      l.jet = activations[i].map[float64()][jet_slot(learnable && l.params > 0)];
      TORCH_CHECK_NOT_IMPLEMENTED(l.jet != nullptr, "activation '", keys[i], "': the native engine has no jet");
    }
  }

  Network network() const {
    Network n;
    n.rows = rows();
    n.layers = static_cast<int>(layers.size());
    n.layer = layers.data();
    n.x = rows_of(x, "x");
    n.bfloat16 = x.scalar_type() == at::kBFloat16 && multiplies_bfloat16(engine);
    n.parallel = parallel;
    n.threads = threads();
    return n;
  }

 private:
  // One number a column in the compute type, kept; null where there is no tensor.
  const void* vector_of(const OptionalTensor& t, int64_t size, const char* what, size_t layer) {
    if (!t || !t->defined()) return nullptr;
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == size, what, layer, ": expected [", size, "], got ", t->sizes());
    storage_of(*t, what);
    keep.push_back(t->to(compute).contiguous());
    return keep.back().data_ptr();
  }
};

std::tuple<Tensor, Tensor> mlp(const Tensor& x, const OptionalTensors& tensors, const c10::List<std::string>& words,
                               at::ArrayRef<double> numbers, bool save) {
  const NetworkOperands o(x, tensors, words, numbers);
  Tensor y = o.empty() ? at::zeros({o.rows(), o.out_features()}, at::TensorOptions().dtype(x.scalar_type()))
                       : fresh({o.rows(), o.out_features()}, x.scalar_type());
  if (o.empty()) return {y, nothing(o.compute)};
  NetworkForward f;
  f.network = o.network();
  f.y = rows_of(y, "y");
  Tensor saved = nothing(o.compute);
  if (save) {
    saved = fresh({o.engine->network_saved[o.float64()](f.network)}, o.compute);
    f.saved = saved.data_ptr();
  }
  o.engine->network_forward[o.float64()](f);
  return {y, saved};
}

// Gradients of a network's operands: of x, then of each layer's weight, bias, parameters (together, where it has any), and of
// its norm's weight and bias, where it has one. Empty where not needed or where there is nothing.
class NetworkGradients {
 public:
  NetworkGradients(NetworkOperands& o, const OptionalTensors& tensors, const Tensor& x, std::array<bool, 5> needs,
                   NetworkBackward* f)
      : o_(o) {
    const auto [of_input, of_weight, of_bias, of_params, of_norm] = needs;
    Tensor gx = nothing(x.scalar_type());
    if (of_input) {
      gx = o.empty() ? at::zeros(x.sizes(), at::TensorOptions().dtype(x.scalar_type())) : fresh(x.sizes(), x.scalar_type());
      f->gx = rows_of(gx, "gx");
    }
    results_.push_back({gx, x.scalar_type()});
    size_t next = 0;
    for (NetworkLayer& l : o.layers) {
      l.gw = add(tensors.get(next), of_weight, tensors.get(next)->sizes().vec());
      l.gb = add(tensors.get(next + 1), of_bias, {l.branches * l.features});
      next += 2 + static_cast<size_t>(l.params);
      if (l.params > 0) l.gp = add(std::nullopt, of_params, {l.params, l.features}, true);
      if (!l.norm) continue;
      l.g_gamma = add(tensors.get(next), of_norm, {l.outputs * l.features});
      l.g_beta = add(tensors.get(next + 1), of_norm, {l.outputs * l.features});
      next += 2;
    }
    f->network = o.network();
  }

  // All of them, each in the type of what it belongs to, behind what comes `first`.
  std::vector<Tensor> all(std::vector<Tensor> first) const {
    for (const auto& [gradient, type] : results_) first.push_back(gradient.to(type));
    return first;
  }

 private:
  // Room for the gradient of a tensor, or of parameters, which are of the compute type and always there.
  void* add(const OptionalTensor& of, bool needed, std::vector<int64_t> shape, bool always = false) {
    const bool present = of && of->defined();
    const auto type = present ? of->scalar_type() : o_.compute;
    if (!needed || !(present || always)) {
      results_.push_back({nothing(o_.compute), type});
      return nullptr;
    }
    const auto options = at::TensorOptions().dtype(o_.compute);
    results_.push_back({o_.empty() ? at::zeros(shape, options) : at::empty(shape, options), type});
    return results_.back().first.data_ptr();
  }

  const NetworkOperands& o_;
  std::vector<std::pair<Tensor, at::ScalarType>> results_;
};

std::vector<Tensor> mlp_backward(const Tensor& g_, const Tensor& x, const OptionalTensors& tensors,
                                 const c10::List<std::string>& words, at::ArrayRef<double> numbers,
                                 const OptionalTensor& saved, std::array<bool, 5> needs) {
  NetworkOperands o(x, tensors, words, numbers);
  const std::vector<int64_t> expected{o.rows(), o.out_features()};
  TORCH_CHECK_VALUE(g_.sizes() == at::IntArrayRef(expected), "g: expected ", at::IntArrayRef(expected), ", got ", g_.sizes());
  held(g_, "g");
  o.differentiate(needs[3]);
  NetworkBackward f;
  const NetworkGradients gradients(o, tensors, x, needs, &f);
  const Tensor g = with_unit_columns((g_.scalar_type() == at::kDouble) != o.float64() ? g_.to(o.compute) : g_);
  f.g = rows_of(g, "g");
  if (saved && saved->defined() && saved->numel() > 0) {
    const int64_t count = o.engine->network_saved[o.float64()](f.network);
    TORCH_CHECK_VALUE(saved->scalar_type() == o.compute && saved->is_contiguous() && saved->numel() == count,
                      "saved: expected what mlp returned, ", count, " elements of ", o.compute, ", got ", saved->sizes());
    held(*saved, "saved");
    f.saved = saved->data_ptr();
  }
  const bool any = needs[0] || needs[1] || needs[2] || needs[3] || needs[4];
  if (!o.empty() && any) o.engine->network_backward[o.float64()](f);
  return gradients.all({});
}

std::vector<Tensor> mlp_loss(const Tensor& x, const Tensor& target_, const OptionalTensor& row_weights,
                             const OptionalTensors& tensors, const c10::List<std::string>& words, at::ArrayRef<double> numbers,
                             c10::string_view loss, at::ArrayRef<double> loss_constants, double scale,
                             std::array<bool, 5> needs) {
  NetworkOperands o(x, tensors, words, numbers);
  const std::vector<int64_t> expected{o.rows(), o.out_features()};
  TORCH_CHECK_VALUE(target_.sizes() == at::IntArrayRef(expected), "target: expected ", at::IntArrayRef(expected), ", got ",
                    target_.sizes());
  o.differentiate(needs[3]);
  const Activation l = activation_of(o.engine, loss);
  TORCH_CHECK_VALUE(l.branches == 2 && l.outputs == 1, "loss '", loss, "': expected a map of (prediction, target) to one number");
  void* jet = l.map[o.float64()][jet_slot(false)];
  TORCH_CHECK_NOT_IMPLEMENTED(jet != nullptr, "loss '", loss, "': the native engine has no jet");
  const Params p(OptionalTensors(), loss_constants, l, 1, o.compute);
  held(target_, "target");

  NetworkBackward f;
  const NetworkGradients gradients(o, tensors, x, needs, &f);
  const Tensor target = with_unit_columns((target_.scalar_type() == at::kDouble) != o.float64() ? target_.to(o.compute) : target_);
  Tensor row_weight;
  double value = 0;
  f.loss.jet = jet;
  f.loss.params = l.params;
  for (int j = 0; j < l.params; ++j) f.loss.param[j] = p.data[static_cast<size_t>(j)];
  f.loss.target = rows_of(target, "target");
  if (row_weights && row_weights->defined()) {
    TORCH_CHECK_VALUE(row_weights->dim() == 1 && row_weights->size(0) == o.rows(), "row_weights: expected [", o.rows(),
                      "], got ", row_weights->sizes());
    held(*row_weights, "row_weights");
    row_weight = row_weights->to(o.compute).contiguous();
    f.loss.row_weight = row_weight.data_ptr();
  }
  f.loss.scale = scale;
  f.loss.value = &value;
  if (!o.empty()) o.engine->network_backward[o.float64()](f);
  return gradients.all({at::full({}, value, at::TensorOptions().dtype(o.compute))});
}

// Sums over `samples` draws from `start` on: [chunks, G, outputs * (1 + branches), 3] in float64.
Tensor moments(const Tensor& sigmas_, const Tensor& params_, int64_t start, int64_t samples, int64_t seed,
               c10::string_view activation) {
  const Engine* engine = current().load();
  const Activation a = activation_of(engine, activation);
  TORCH_CHECK_VALUE(sigmas_.dim() == 2 && sigmas_.size(1) == a.branches && a.branches <= 16, "sigmas: expected [G, ", a.branches,
                    "] (at most 16 branches), got ", sigmas_.sizes());
  TORCH_CHECK_VALUE(params_.dim() == 2 && params_.size(0) == sigmas_.size(0) && params_.size(1) == a.params,
                    "params: expected [", sigmas_.size(0), ", ", a.params, "], got ", params_.sizes());
  TORCH_CHECK_VALUE(start >= 0 && start % 4 == 0 && samples >= 0, "start, samples: expected a multiple of 4 and at least 0, got ",
                    start, ", ", samples);
  void* jet = a.map[0][jet_slot(false)];
  TORCH_CHECK_NOT_IMPLEMENTED(jet != nullptr, "activation '", activation, "': the native engine has no jet");
  held(sigmas_, "sigmas");
  held(params_, "params");
  const Tensor sigmas = sigmas_.to(at::kFloat).contiguous(), params = params_.to(at::kFloat).contiguous();
  Tensor sums = at::empty({(samples + 4095) / 4096, sigmas.size(0), a.outputs * (1 + a.branches), 3},
                          at::TensorOptions().dtype(at::kDouble));
  if (sums.numel() == 0) return sums;
  Moments m;
  m.settings = sigmas.size(0);
  m.start = start;
  m.samples = samples;
  m.seed = static_cast<uint64_t>(seed);
  m.branches = a.branches;
  m.outputs = a.outputs;
  m.params = a.params;
  m.sigma = sigmas.const_data_ptr<float>();
  m.param = params.const_data_ptr<float>();
  m.jet = jet;
  m.sums = sums.data_ptr<double>();
  m.parallel = parallel;
  m.threads = threads();
  engine->moments(m);
  return sums;
}

Tensor random_bits(int64_t start, int64_t count, int64_t branch, int64_t seed) {
  TORCH_CHECK_VALUE(start >= 0 && start % 4 == 0 && count >= 0 && count % 4 == 0,
                    "start, count: expected multiples of 4, got ", start, ", ", count);
  Tensor words = at::empty({count}, at::TensorOptions().dtype(at::kLong));
  current().load()->random_bits(start, count, branch, static_cast<uint64_t>(seed), words.data_ptr<int64_t>());
  return words;
}

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
  m.def(
      "linear_act(Tensor x, Tensor weight, Tensor? bias, Tensor?[] params, float[] constants, str activation, bool save) "
      "-> (Tensor, Tensor)");
  m.def(
      "linear_act_backward(Tensor g, Tensor x, Tensor weight, Tensor? bias, Tensor?[] params, float[] constants, Tensor? z, "
      "str activation, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "act_map(Tensor[] inputs, Tensor?[] params, float[] constants, str activation, int level, bool learnable) -> Tensor[]");
  m.def("mlp(Tensor x, Tensor?[] tensors, str[] words, float[] numbers, bool save) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor g, Tensor x, Tensor?[] tensors, str[] words, float[] numbers, Tensor? saved, bool[5] needs) "
      "-> Tensor[]");
  m.def(
      "mlp_loss(Tensor x, Tensor target, Tensor? row_weights, Tensor?[] tensors, str[] words, float[] numbers, str loss, "
      "float[] loss_constants, float scale, bool[5] needs) -> Tensor[]");
  m.def("moments(Tensor sigmas, Tensor params, int start, int samples, int seed, str activation) -> Tensor");
  m.def("random_bits(int start, int count, int branch, int seed) -> Tensor",
        [](int64_t start, int64_t count, int64_t branch, int64_t seed) { return random_bits(start, count, branch, seed); });
  m.def("primitive(str name, Tensor[] arguments) -> Tensor[]");
  m.def("register_activation(str key, int branches, int outputs, int params, int[] tables) -> ()",
        [](const std::string& key, int64_t b, int64_t c, int64_t p, at::ArrayRef<int64_t> t) { register_activation(key, b, c, p, t); });
  m.def("has_activation(str key, int level=0, bool learnable=False) -> bool",
        [](const std::string& key, int64_t level, bool learnable) { return has_activation(key, level, learnable); });
  m.def("capability() -> str", []() { return capability(); });
  m.def("capabilities() -> str[]", []() { return capabilities(); });
  m.def("multiplies_bfloat16() -> bool", []() { return multiplies_bfloat16(current().load()); });
  m.def("set_capability(str name) -> ()", [](const std::string& name) { set_capability(name); });
  m.def("product_floor(float operations, int width, bool float64=False) -> ()",
        [](double operations, int64_t width, bool float64) {
          TORCH_CHECK_VALUE(operations > 0 && width > 0, "operations, width: expected more than 0, got ", operations, ", ", width);
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

TORCH_LIBRARY_IMPL(fused_inr_native, CPU, m) {
  m.impl("linear_act", linear_act);
  m.impl("linear_act_backward", linear_act_backward);
  m.impl("act_map", act_map);
  m.impl("mlp", mlp);
  m.impl("mlp_backward", mlp_backward);
  m.impl("mlp_loss", mlp_loss);
  m.impl("moments", moments);
  m.impl("primitive", primitive);
}

}  // namespace fused_inr
