// The operators of a layer, `linear_act`, its backward and `act_map`: checks, allocation, PyTorch's matrix products, and the
// launches between them. Semantics: docs/architecture.md, sections 2 and 3.
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

#include "operators.h"

namespace fused_inr {
namespace {

// -- tensors as kernels take them

bool is_half(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

// The kernels of float64 read and write float64; those of float32 half types, too.
bool readable(at::ScalarType type, at::ScalarType compute) { return type == compute || (compute == at::kFloat && is_half(type)); }
Tensor readable(const Tensor& t, at::ScalarType compute) { return readable(t.scalar_type(), compute) ? t : t.to(compute); }

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

// Parameters as inputs 1 .. P of a map; the tensors that they lie in.
std::vector<Tensor> set_parameters(MapRows& rows, const OptionalTensors& params, at::ArrayRef<double> constants,
                                   const Shape& shape, at::ScalarType compute, const Tensor& like) {
  std::vector<Tensor> keep;
  const auto of_tensor = [&](size_t j, const Tensor& p) {
    same_device(p, like, "params");
    keep.push_back(readable(p, compute));
    rows.in[1 + j] = stream_of_column(keep.back(), "params");
  };
  const auto of_constant = [&](size_t j, double constant) { rows.in[1 + j].value = constant; };
  each_parameter(params, constants, shape, rows.features, of_tensor, of_constant);
  return keep;
}

// -- kernels and products

Kernel kernel_of(const Activation& a, c10::string_view key, bool float64, int level, bool learnable) {
  const int slot = slot_of(level, learnable && a.params > 0);
  TORCH_CHECK_NOT_IMPLEMENTED(slot >= 0 && a.maps[float64], "activation '", key, "': the CUDA backend has no derivative of order ",
                              level, learnable ? " with learnable parameters" : "");
  return a.maps[float64]->kernel[slot];
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

// -- operators

struct Activated {
  Activation activation;

  explicit Activated(c10::string_view key) : activation(activation_of(key)) {}
};

// x, weight and bias of a call, checked.
struct Operands : Activated, LayerSizes {
  at::ScalarType stored;  // of both factors of the products
  Tensor x, weight, bias;

  Operands(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, c10::string_view key)
      : Activated(key), LayerSizes(x_, weight_, bias_, activation) {
    same_device(weight_, x_, "weight");
    stored = x_.scalar_type() == weight_.scalar_type() ? x_.scalar_type() : compute;
    x = x_.to(stored);
    weight = weight_.to(stored);
    if (bias_ && bias_->defined()) {
      same_device(*bias_, x_, "bias");
      bias = readable(*bias_, compute).contiguous();
    }
  }

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
  expect_sizes(g_, o.shape(o.rows, a.outputs * o.features), "g");
  storage_of(g_, "g");
  same_device(g_, x, "g");
  const bool given = z_ && z_->defined();
  if (given) {
    expect_sizes(*z_, o.shape(o.rows, o.columns()), "z");
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
  expect_level(level);
  learnable = learnable && a.params > 0;
  const bool float64 = !inputs.empty() && compute_type(inputs[0]) == at::kDouble;
  const Kernel kernel = kernel_of(a, key, float64, static_cast<int>(level), learnable);
  const Streams streams(a, static_cast<int>(level), learnable);
  const MapSizes o(inputs, streams, a);
  for (const Tensor& t : inputs) same_device(t, o.z, "inputs");
  const Surroundings surroundings(o.z);
  MapRows m;
  m.features = o.features;
  m.rows = o.rows;
  std::vector<Tensor> keep = set_parameters(m, params, constants, a, o.compute, o.z);
  size_t next = 0;
  for (size_t i = 0; i < streams.in.size(); ++i) {
    if (i >= 1 && i <= static_cast<size_t>(a.params)) continue;
    Tensor t = readable(inputs[next], o.compute);
    if (streams.in[i].param) {
      o.expect_column(t, next);
      m.in[i] = stream_of_column(t, "inputs");
    } else {
      t = o.as_rows(t, streams.in[i].width, next);
      m.in[i] = stream_of_rows(t, "inputs");
    }
    keep.push_back(t);
    ++next;
  }
  int summed = level == 1 ? a.branches : 0;  // after the gradient of a bias, which is not wanted here
  std::vector<Tensor> results;
  for (size_t i = 0; i < streams.out.size(); ++i) {
    if (streams.out[i].param) {
      const auto options = o.z.options().dtype(o.compute);
      results.push_back(o.empty() ? at::zeros({o.features}, options) : at::empty({o.features}, options));
      m.sum[summed++] = {results.back().data_ptr(), 0, storage_of(results.back(), "outputs")};
    } else {
      results.push_back(at::empty(o.shape(streams.out[i].width), o.z.options()));
      m.out[i].data = results.back().data_ptr();
      m.out[i].row_stride = results.back().size(-1);
      m.out[i].storage = storage_of(o.z, "outputs");
    }
  }
  if (!o.empty()) launch(kernel, m, o.compute, o.z, key);
  return results;
}

}  // namespace

FI_LIBRARY_FRAGMENT(FI_NAMESPACE, m) {
  m.def(kLinearActSchema);
  m.def(kLinearActBackwardSchema);
  m.def(kActMapSchema);
}

FI_LIBRARY_IMPL(FI_NAMESPACE, FI_KEY, m) {
  m.impl("linear_act", linear_act);
  m.impl("linear_act_backward", linear_act_backward);
  m.impl("act_map", act_map);
}

}  // namespace fused_inr
