// The operators `torch.ops.fused_inr_cuda.*`: checks, allocation, PyTorch's matrix products, and the launches between them.
// Semantics: docs/architecture.md, sections 2 and 3. No header of PyTorch's CUDA parts: the stream comes through the stable
// C shim, found at run time. With FUSED_INR_CUDA_ON_HOST the same operators serve CPU tensors, one thread after the other:
// that is for tests.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <array>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "../operands.h"
#include "moments.h"
#include "rows.h"

#ifndef FUSED_INR_STAMP
#define FUSED_INR_STAMP "unstamped"
#endif
#if defined(FUSED_INR_CUDA_ON_HOST)
#define FI_NAMESPACE fused_inr_cuda_on_host
#define FI_KEY CPU
#else
#define FI_NAMESPACE fused_inr_cuda
#define FI_KEY CUDA
#endif
#define FI_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define FI_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)

namespace fused_inr {

// fused_inr/native.py looks for this before it loads a library: one built for another PyTorch must not be loaded.
extern "C" __attribute__((used, visibility("default"))) const char fused_inr_cuda_stamp[] =
    "FUSED_INR_STAMP=" FUSED_INR_STAMP ";";

namespace {

// -- device, stream, dispatch

// What PyTorch's own kernels find set: the device of the tensors, and neither autograd nor autocast around the products.
struct Surroundings {
  c10::DeviceGuard device;
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  explicit Surroundings(const Tensor& like) : device(like.device()) {}
};

void* stream_of(const Tensor& like) {
#if defined(FUSED_INR_CUDA_ON_HOST)
  (void)like;
  return nullptr;
#else
  using CurrentStream = int32_t (*)(int32_t device, void** stream);  // torch/csrc/inductor/aoti_torch/c/shim.h
  static const CurrentStream current = [] {
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = nullptr;
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, name);
    if (!found) found = dlsym(RTLD_DEFAULT, name);
    return reinterpret_cast<CurrentStream>(found);
  }();
  TORCH_CHECK(current, "fused_inr: this PyTorch has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_CHECK(current(like.get_device(), &stream) == 0, "fused_inr: the current stream of ", like.device(), " is not known");
  return stream;
#endif
}

// -- activations

struct Activation {
  int branches = 1, outputs = 1, params = 0;
  const Maps* maps[2] = {};  // float, double
  const Moments* moments = nullptr;
};

std::shared_mutex registry_mutex;
std::unordered_map<std::string, Activation>& table() {
  static std::unordered_map<std::string, Activation> all = [] {
    std::unordered_map<std::string, Activation> built_in;
    const Maps* tables[] = {cuda_maps_float, cuda_maps_double};
    for (int type = 0; type < 2; ++type)
      for (const Maps* m = tables[type]; m->name; ++m) {
        Activation& a = built_in[m->name];
        a.branches = m->branches;
        a.outputs = m->outputs;
        a.params = m->params;
        a.maps[type] = m;
      }
    for (const Moments* m = cuda_moments; m->name; ++m) built_in[m->name].moments = m;
    return built_in;
  }();
  return all;
}

bool find_activation(const std::string& key, Activation* found) {
  std::shared_lock lock(registry_mutex);
  const auto it = table().find(key);
  if (it == table().end()) return false;
  *found = it->second;
  return true;
}

Activation activation_of(c10::string_view key) {
  Activation a;
  TORCH_CHECK_VALUE(find_activation(std::string(key), &a), "activation: the CUDA backend knows no '", key, "'");
  return a;
}

Kernel kernel_of(const Activation& a, c10::string_view key, bool float64, int level, bool learnable) {
  const int slot = slot_of(level, learnable && a.params > 0);
  TORCH_CHECK_NOT_IMPLEMENTED(slot >= 0 && a.maps[float64], "activation '", key, "': the CUDA backend has no derivative of order ",
                              level, learnable ? " with learnable parameters" : "");
  return a.maps[float64]->kernel[slot];
}

bool has_activation(const std::string& key) {
  Activation a;
  return find_activation(key, &a);
}

// The addresses of three tables of one activation, as fused_inr_cuda_user_maps gives them.
void register_activation(const std::string& key, int64_t of_float, int64_t of_double, int64_t of_moments) {
  Activation a;
  a.maps[0] = reinterpret_cast<const Maps*>(of_float);
  a.maps[1] = reinterpret_cast<const Maps*>(of_double);
  a.moments = reinterpret_cast<const Moments*>(of_moments);
  TORCH_CHECK_VALUE(a.maps[0] && a.maps[1] && a.moments, "tables: expected three addresses");
  a.branches = a.maps[0]->branches;
  a.outputs = a.maps[0]->outputs;
  a.params = a.maps[0]->params;
  std::unique_lock lock(registry_mutex);
  TORCH_CHECK_VALUE(table().emplace(key, a).second, "key: '", key, "' is there already");
}

std::string refusal([[maybe_unused]] int64_t device) {
#if !defined(FUSED_INR_CUDA_ON_HOST)
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)));
#endif
  const char* reason = cuda_refusal();
  return reason ? reason : "";
}

// -- tensors

bool is_half(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

// The kernels of float64 read and write float64; those of float32 half types, too.
bool readable(at::ScalarType type, at::ScalarType compute) { return type == compute || (compute == at::kFloat && is_half(type)); }
Tensor readable(const Tensor& t, at::ScalarType compute) { return readable(t.scalar_type(), compute) ? t : t.to(compute); }

void same_device(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected a tensor on ", like.device(), ", got one on ", t.device());
}

Stream stream_of_rows(const Tensor& t, const char* name) {  // [M, n] or [G, M, n], any strides
  Stream s;
  s.data = t.data_ptr();
  s.batch_stride = t.dim() == 3 ? t.stride(0) : 0;
  s.row_stride = t.stride(-2);
  s.column_stride = t.size(-1) > 1 ? t.stride(-1) : 1;
  s.storage = storage_of(t, name);
  return s;
}

// One value a feature, or one for all.
Stream stream_of_column(const Tensor& t, const char* name) {
  Stream s;
  s.data = t.data_ptr();
  s.column_stride = t.numel() > 1 ? t.stride(0) : 0;
  s.storage = storage_of(t, name);
  return s;
}

// Parameters, tensors of one element or one per feature or the constants, as inputs 1 .. P of a map.
std::vector<Tensor> set_parameters(MapRows& rows, const OptionalTensors& params, at::ArrayRef<double> constants,
                                   const Activation& a, at::ScalarType compute, const Tensor& like) {
  const size_t count = static_cast<size_t>(a.params);
  TORCH_CHECK_VALUE(params.size() <= count && (params.empty() || params.size() == count), "params: expected ", count,
                    " (or none), got ", params.size());
  std::vector<Tensor> keep;
  for (size_t j = 0; j < count; ++j) {
    const OptionalTensor p = params.empty() ? OptionalTensor() : OptionalTensor(params.get(j));
    if (p && p->defined()) {
      TORCH_CHECK_VALUE(p->dim() <= 1 && (p->numel() == 1 || p->numel() == rows.features), "params[", j,
                        "]: expected one number or ", rows.features, " (one per feature), got shape ", p->sizes());
      same_device(*p, like, "params");
      keep.push_back(readable(*p, compute));
      rows.in[1 + j] = stream_of_column(keep.back(), "params");
    } else {
      TORCH_CHECK_VALUE(j < constants.size(), "constants: expected ", count, ", got ", constants.size());
      rows.in[1 + j].value = constants[j];
    }
  }
  return keep;
}

void launch(const Kernel& kernel, MapRows& rows, at::ScalarType compute, const Tensor& like, c10::string_view key) {
  Tensor partial;
  bool summed = false;
  for (int s = 0; s < kernel.sums; ++s) summed = summed || rows.sum[s].data;
  if (summed) {
    const int64_t count = plan(rows.batch, rows.rows, rows.features, kernel.width, kernel.sums).partials;
    if (count) {
      partial = at::empty({count}, like.options().dtype(compute));
      rows.partial = partial.data_ptr();
    }
  }
  const char* error = kernel.launch(rows, stream_of(like));
  TORCH_CHECK(error == nullptr, "fused_inr: the CUDA kernel of '", key, "' could not be launched: ", error);
}

// a b with the sums in float32 (float64), and the result in `type`
Tensor product(const Tensor& a, const Tensor& b, at::ScalarType type) {
  const bool batched = a.dim() == 3;
  if (type == a.scalar_type()) return batched ? at::bmm(a, b) : at::mm(a, b);
#if defined(FUSED_INR_CUDA_ON_HOST)  // PyTorch has the products below for CUDA tensors only
  return batched ? at::bmm(a.to(type), b.to(type)) : at::mm(a.to(type), b.to(type));
#else
  return batched ? at::bmm(a, b, type) : at::mm(a, b, type);
#endif
}

// x, weight and bias of a call, checked.
struct Operands {
  Activation activation;
  at::ScalarType compute, stored;  // stored: of both factors of the products
  int64_t batch = 1, rows = 0, depth = 0, features = 0;
  bool batched = false;
  Tensor x, weight, bias;

  Operands(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, c10::string_view key)
      : activation(activation_of(key)), compute(x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {
    storage_of(x_, "x");
    storage_of(weight_, "weight");
    batched = weight_.dim() == 3;
    TORCH_CHECK_VALUE(weight_.dim() == 2 || batched, "weight: expected [B*N, K] or [G, B*N, K], got ", weight_.sizes());
    TORCH_CHECK_VALUE(x_.dim() == weight_.dim(), "x: expected ", weight_.dim(), " dimensions as weight has, got ", x_.sizes());
    TORCH_CHECK_VALUE(x_.size(-1) == weight_.size(-1), "x: its last size ", x_.size(-1), " is not weight's, ", weight_.size(-1));
    TORCH_CHECK_VALUE(!batched || x_.size(0) == weight_.size(0), "x: batch ", x_.size(0), " is not weight's, ", weight_.size(0));
    TORCH_CHECK_VALUE(weight_.size(-2) % activation.branches == 0, "weight: ", weight_.size(-2), " rows are not a multiple of ",
                      activation.branches, " branches");
    same_device(weight_, x_, "weight");
    batch = batched ? x_.size(0) : 1;
    rows = x_.size(-2);
    depth = x_.size(-1);
    features = weight_.size(-2) / activation.branches;
    stored = x_.scalar_type() == weight_.scalar_type() ? x_.scalar_type() : compute;
    x = x_.to(stored);
    weight = weight_.to(stored);
    if (bias_ && bias_->defined()) {
      const int64_t columns = weight_.size(-2);
      TORCH_CHECK_VALUE(bias_->size(-1) == columns && bias_->numel() == columns * batch && bias_->dim() == weight_.dim() - 1,
                        "bias: expected ", batched ? "[G, " : "[", columns, "], got ", bias_->sizes());
      storage_of(*bias_, "bias");
      same_device(*bias_, x_, "bias");
      bias = readable(*bias_, compute).contiguous();
    }
  }

  std::vector<int64_t> shape(int64_t m, int64_t n) const {
    return batched ? std::vector<int64_t>{batch, m, n} : std::vector<int64_t>{m, n};
  }
  int64_t columns() const { return activation.branches * features; }
  bool float64() const { return compute == at::kDouble; }
  bool empty() const { return rows == 0 || batch == 0 || columns() == 0; }
  Tensor preactivation() const { return product(x, weight.transpose(-1, -2), compute); }  // without the bias

  MapRows map_rows() const {
    MapRows m;
    m.batch = batch;
    m.rows = rows;
    m.features = features;
    return m;
  }
  void add_bias(MapRows& m) const {
    if (!bias.defined()) return;
    m.bias.data = bias.data_ptr();
    m.bias.batch_stride = batched ? bias.stride(0) : 0;
    m.bias.storage = storage_of(bias, "bias");
  }
};

// -- operators

std::tuple<Tensor, Tensor> linear_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                      const OptionalTensors& params, at::ArrayRef<double> constants,
                                      c10::string_view activation, bool save) {
  const Surroundings surroundings(x);
  const Operands o(x, weight, bias, activation);
  const Kernel kernel = kernel_of(o.activation, activation, o.float64(), 0, false);
  Tensor y = at::empty(o.shape(o.rows, o.activation.outputs * o.features), x.options());
  MapRows m = o.map_rows();
  const auto keep = set_parameters(m, params, constants, o.activation, o.compute, x);
  if (o.empty())
    return {y, at::empty(save ? o.shape(o.rows, o.columns()) : std::vector<int64_t>{0}, x.options().dtype(o.compute))};
  Tensor z = o.preactivation();
  m.in[0] = stream_of_rows(z, "z");
  m.out[0] = stream_of_rows(y, "y");
  o.add_bias(m);
  if (save && m.bias.data) m.z = stream_of_rows(z, "z");  // in place: the bias is added where z lies
  launch(kernel, m, o.compute, x, activation);
  return {y, save ? z : at::empty({0}, z.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_act_backward(
    const Tensor& g_, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensors& params,
    at::ArrayRef<double> constants, const OptionalTensor& z_, c10::string_view activation, std::array<bool, 4> needs) {
  const Surroundings surroundings(x);
  const Operands o(x, weight, bias, activation);
  const Activation& a = o.activation;
  const bool learnable = needs[3] && a.params > 0;
  const Kernel kernel = kernel_of(a, activation, o.float64(), 1, learnable);
  MapRows m = o.map_rows();
  const auto keep = set_parameters(m, params, constants, a, o.compute, x);
  const auto expected = o.shape(o.rows, a.outputs * o.features);
  TORCH_CHECK_VALUE(g_.sizes() == at::IntArrayRef(expected), "g: expected ", at::IntArrayRef(expected), ", got ", g_.sizes());
  storage_of(g_, "g");
  same_device(g_, x, "g");
  const bool given = z_ && z_->defined();
  if (given) {
    const auto z_shape = o.shape(o.rows, o.columns());
    TORCH_CHECK_VALUE(z_->sizes() == at::IntArrayRef(z_shape), "z: expected ", at::IntArrayRef(z_shape), ", got ", z_->sizes());
    same_device(*z_, x, "z");
  }
  const auto options = x.options().dtype(o.compute);
  const bool bias_needed = needs[2] && bias && bias->defined();
  const auto bias_type = bias && bias->defined() ? bias->scalar_type() : weight.scalar_type();
  const auto sum = [&](const std::vector<int64_t>& shape, at::ScalarType type) {
    return o.empty() ? at::zeros(shape, options.dtype(type)) : at::empty(shape, options.dtype(type));
  };
  Tensor gx = at::empty({0}, x.options()), gw = at::empty({0}, weight.options()), gp = at::empty({0}, options);
  Tensor gb = at::empty({0}, options.dtype(bias_type));
  if (bias_needed) gb = sum(bias->sizes().vec(), readable(bias_type, o.compute) ? bias_type : o.compute);
  if (learnable) gp = sum(o.shape(a.params, o.features), o.compute);
  if (o.empty()) {
    if (needs[0]) gx = at::zeros(x.sizes(), x.options());
    if (needs[1]) gw = at::zeros(weight.sizes(), weight.options());
    return {gx, gw, gb, gp};
  }
  const bool products = needs[0] || needs[1];
  if (!products && !bias_needed && !learnable) return {gx, gw, gb, gp};

  const Tensor z = given ? readable(*z_, o.compute) : o.preactivation();
  const Tensor g = readable(g_, o.compute);
  m.in[0] = stream_of_rows(z, "z");
  m.in[1 + a.params] = stream_of_rows(g, "g");
  if (!given) o.add_bias(m);
  Tensor gz;
  if (products) {
    gz = at::empty(o.shape(o.rows, o.columns()), x.options().dtype(o.stored));
    m.out[0] = stream_of_rows(gz, "gz");
  }
  if (bias_needed)
    for (int k = 0; k < a.branches; ++k)
      m.sum[k] = {static_cast<char*>(gb.data_ptr()) + k * o.features * static_cast<int64_t>(gb.element_size()),
                  o.batched ? o.columns() : 0, storage_of(gb, "bias")};
  if (learnable)
    for (int p = 0; p < a.params; ++p)
      m.sum[a.branches + p] = {static_cast<char*>(gp.data_ptr()) + p * o.features * static_cast<int64_t>(gp.element_size()),
                               o.batched ? a.params * o.features : 0, storage_of(gp, "params")};
  launch(kernel, m, o.compute, x, activation);
  if (needs[0]) gx = product(gz, o.weight, o.stored).to(x.scalar_type());
  // a sum over all rows: kept in float32 until it is whole
  if (needs[1]) gw = product(gz.transpose(-1, -2), o.x, o.compute).to(weight.scalar_type());
  if (bias_needed) gb = gb.to(bias_type);
  return {gx, gw, gb, gp};
}

std::vector<Tensor> act_map(at::TensorList inputs, const OptionalTensors& params, at::ArrayRef<double> constants,
                            c10::string_view key, int64_t level, bool learnable) {
  const Activation a = activation_of(key);
  TORCH_CHECK_VALUE(level >= 0 && level <= 3, "level: expected 0 to 3, got ", level);
  learnable = learnable && a.params > 0;
  const bool float64 = !inputs.empty() && inputs[0].scalar_type() == at::kDouble;
  const Kernel kernel = kernel_of(a, key, float64, static_cast<int>(level), learnable);
  const Groups groups = groups_of(a.branches, a.outputs, a.params, static_cast<int>(level), learnable);
  const size_t count = static_cast<size_t>(groups.ins - a.params);
  TORCH_CHECK_VALUE(inputs.size() == count, "inputs: expected ", count, " tensors, got ", inputs.size());
  const Tensor& z = inputs[0];
  TORCH_CHECK_VALUE(z.dim() >= 2 && z.size(-1) % a.branches == 0, "inputs[0]: expected [M, ", a.branches, "*N], got ", z.sizes());
  for (const Tensor& t : inputs) {
    storage_of(t, "inputs");
    same_device(t, z, "inputs");
  }
  const Surroundings surroundings(z);
  const auto compute = float64 ? at::kDouble : at::kFloat;
  MapRows m;
  m.features = z.size(-1) / a.branches;
  m.rows = 1;
  for (int64_t d = 0; d + 1 < z.dim(); ++d) m.rows *= z.size(d);
  std::vector<Tensor> keep = set_parameters(m, params, constants, a, compute, z);
  size_t next = 0;
  for (int i = 0; i < groups.ins; ++i) {
    if (i >= 1 && i <= a.params) continue;
    Tensor t = readable(inputs[next], compute);
    if (groups.in_column[i]) {
      TORCH_CHECK_VALUE(t.dim() <= 1 && (t.numel() == 1 || t.numel() == m.features), "inputs[", next,
                        "]: the cotangent of a parameter, expected one number or ", m.features, ", got ", t.sizes());
      m.in[i] = stream_of_column(t, "inputs");
    } else {
      auto shape = z.sizes().vec();
      shape.back() = groups.in_width[i] * m.features;
      TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(shape), "inputs[", next, "]: expected ", at::IntArrayRef(shape), ", got ",
                        t.sizes());
      if (t.dim() != 2) t = t.reshape({m.rows, groups.in_width[i] * m.features});
      m.in[i] = stream_of_rows(t, "inputs");
    }
    keep.push_back(t);
    ++next;
  }
  const bool empty = m.rows * m.features == 0;
  int summed = level == 1 ? a.branches : 0;  // after the gradient of a bias, which is not wanted here
  std::vector<Tensor> results;
  for (int i = 0; i < groups.outs; ++i) {
    if (groups.out_sum[i]) {
      const auto options = z.options().dtype(compute);
      results.push_back(empty ? at::zeros({m.features}, options) : at::empty({m.features}, options));
      m.sum[summed++] = {results.back().data_ptr(), 0, storage_of(results.back(), "outputs")};
    } else {
      auto shape = z.sizes().vec();
      shape.back() = groups.out_width[i] * m.features;
      results.push_back(at::empty(shape, z.options()));
      m.out[i].data = results.back().data_ptr();
      m.out[i].row_stride = shape.back();
      m.out[i].storage = storage_of(z, "outputs");
    }
  }
  if (!empty) launch(kernel, m, compute, z, key);
  return results;
}

// Random draws at a position of the stream that is given, so no generator's state (docs/architecture.md, section 8).
Tensor moments(const Tensor& sigmas_, const Tensor& params_, int64_t start, int64_t samples, int64_t seed,
               c10::string_view activation) {
  const Activation a = activation_of(activation);
  const auto columns = [](const Tensor& t, int64_t n, const char* name, const Tensor& like) {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, ": expected float32, got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) == n && t.size(0) == like.size(0), name, ": expected [", like.size(0), ", ", n,
                      "], got ", t.sizes());
    same_device(t, like, name);
    return t.contiguous();
  };
  TORCH_CHECK_VALUE(sigmas_.dim() == 2, "sigmas: expected [G, ", a.branches, "], got ", sigmas_.sizes());
  TORCH_CHECK_VALUE(start >= 0 && start % 4 == 0, "start: expected a multiple of 4, got ", start);
  TORCH_CHECK_VALUE(samples >= 0 && samples - 1 <= INT64_MAX - start, "samples: expected 0 to 2^63 - start, got ", samples);
  const Surroundings surroundings(sigmas_);
  const Tensor sigmas = columns(sigmas_, a.branches, "sigmas", sigmas_), params = columns(params_, a.params, "params", sigmas_);
  MomentsCall call;
  call.settings = sigmas.size(0);
  call.chunks = samples / kChunk + (samples % kChunk != 0);
  const Tensor out = at::empty({call.chunks, call.settings, a.outputs * (1 + a.branches), 3}, sigmas.options().dtype(at::kDouble));
  call.sigmas = sigmas.data_ptr<float>();
  call.params = params.data_ptr<float>();
  call.out = out.data_ptr<double>();
  call.start = start;
  call.samples = samples;
  call.seed = static_cast<uint64_t>(seed);
  const char* error = a.moments->launch(call, stream_of(sigmas));
  TORCH_CHECK(error == nullptr, "fused_inr: the CUDA kernel of moments of '", activation, "' could not be launched: ", error);
  return out;
}

Tensor random_bits(int64_t start, int64_t count, int64_t branch, int64_t seed, c10::Device device) {
  TORCH_CHECK_VALUE(start >= 0 && start % 4 == 0 && count >= 0 && count % 4 == 0,
                    "start and count: expected multiples of 4, got ", start, " and ", count);
  const Tensor out = at::empty({count}, at::TensorOptions().dtype(at::kLong).device(device));
  const Surroundings surroundings(out);
  const char* error = cuda_random_bits(out.data_ptr<int64_t>(), start, count, static_cast<uint32_t>(branch),
                                       static_cast<uint64_t>(seed), stream_of(out));
  TORCH_CHECK(error == nullptr, "fused_inr: the CUDA kernel of random_bits could not be launched: ", error);
  return out;
}

std::string stamp() { return FUSED_INR_STAMP; }

}  // namespace

FI_LIBRARY(FI_NAMESPACE, m) {
  m.def(
      "linear_act(Tensor x, Tensor weight, Tensor? bias, Tensor?[] params, float[] constants, str activation, bool save) "
      "-> (Tensor, Tensor)");
  m.def(
      "linear_act_backward(Tensor g, Tensor x, Tensor weight, Tensor? bias, Tensor?[] params, float[] constants, Tensor? z, "
      "str activation, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "act_map(Tensor[] inputs, Tensor?[] params, float[] constants, str activation, int level, bool learnable) -> Tensor[]");
  m.def("moments(Tensor sigmas, Tensor params, int start, int samples, int seed, str activation) -> Tensor");
  m.def("random_bits(int start, int count, int branch, int seed, Device device) -> Tensor",
        [](int64_t start, int64_t count, int64_t branch, int64_t seed, c10::Device device) {
          return random_bits(start, count, branch, seed, device);
        });
  m.def("register_activation(str key, int of_float, int of_double, int of_moments) -> ()",
        [](const std::string& key, int64_t f, int64_t d, int64_t m) { register_activation(key, f, d, m); });
  m.def("has_activation(str key) -> bool", [](const std::string& key) { return has_activation(key); });
  m.def("refusal(int device) -> str", [](int64_t device) { return refusal(device); });
  m.def("stamp() -> str", []() { return stamp(); });
}

FI_LIBRARY_IMPL(FI_NAMESPACE, FI_KEY, m) {
  m.impl("linear_act", linear_act);
  m.impl("linear_act_backward", linear_act_backward);
  m.impl("act_map", act_map);
  m.impl("moments", moments);
}

}  // namespace fused_inr
