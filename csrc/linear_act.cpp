// The operators of a layer, `linear_act`, its backward and `act_map`: checks, allocation, and the call of the engine. Semantics:
// docs/architecture.md, sections 2 and 3.
#include <torch/library.h>

#include "memory.h"
#include "native.h"

namespace fused_inr {
namespace {

// The engine that runs, and an activation of its.
struct Activated {
  const Engine* engine = current().load();
  Activation activation;

  explicit Activated(c10::string_view key) : activation(activation_of(engine, key)) {}
};

// x, weight and bias of a call, checked and in a form that the engine takes.
struct Operands : Activated, LayerSizes {
  Tensor x, weight, bias;

  Operands(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, c10::string_view key)
      : Activated(key), LayerSizes(x_, weight_, bias_, activation) {
    x = with_unit_columns(x_);
    weight = with_unit_columns(weight_.to(compute));
    if (bias_ && bias_->defined()) bias = bias_->to(compute).contiguous();
  }

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
  expect_sizes(g_, o.shape(o.rows, o.activation.outputs * o.features), "g");
  held(g_, "g");
  Backward f;
  f.layer = o.layer(p, map_of(o.activation, activation, o.float64(), 1, learnable));

  const Tensor g = readable(g_, o.compute);
  f.g = rows_of(g, "g");
  Tensor z;
  if (z_ && z_->defined()) {
    expect_sizes(*z_, o.shape(o.rows, o.columns()), "z");
    held(*z_, "z");
    z = with_unit_columns(z_->to(o.compute));
    f.z = rows_of(z, "z");
    // an empty tensor has no address, and none is needed
  }
  const bool bias_needed = needs[2] && bias && bias->defined();
  const bool empty = o.empty();
  Tensor gx = nothing(x.scalar_type()), gw = nothing(weight.scalar_type()), gp = nothing(o.compute);
  const auto bias_type = bias && bias->defined() ? bias->scalar_type() : weight.scalar_type();
  Tensor gb = nothing(bias_needed ? o.compute : bias_type);
  if (needs[0]) {
    gx = empty ? at::zeros(x.sizes(), at::TensorOptions().dtype(x.scalar_type())) : fresh(x.sizes(), x.scalar_type());
    f.gx = rows_of(gx, "gx");
  }
  if (needs[1]) {
    gw = for_sums(empty, o.shape(o.columns(), o.depth), o.compute);
    f.gw = gw.data_ptr();
  }
  if (bias_needed) {
    gb = for_sums(empty, bias->sizes(), o.compute);
    f.gb = gb.data_ptr();
  }
  if (learnable) {
    gp = for_sums(empty, o.shape(o.activation.params, o.features), o.compute);
    f.gp = gp.data_ptr();
  }
  if (!empty && (needs[0] || needs[1] || bias_needed || learnable)) o.engine->backward[o.float64()](f);
  if (needs[1]) gw = gw.to(weight.scalar_type());
  if (bias_needed) gb = gb.to(bias_type);
  return {gx, gw, gb, gp};
}

std::vector<Tensor> act_map(at::TensorList inputs, const OptionalTensors& params, at::ArrayRef<double> constants,
                            c10::string_view key, int64_t level, bool learnable) {
  const Engine* engine = current().load();
  const Activation a = activation_of(engine, key);
  expect_level(level);
  const bool float64 = !inputs.empty() && compute_type(inputs[0]) == at::kDouble;
  void* map = map_of(a, key, float64, static_cast<int>(level), learnable);
  const Streams streams(a, static_cast<int>(level), learnable && a.params > 0);
  const MapSizes o(inputs, streams, a);
  const Params p(params, constants, a, o.features, o.compute);

  MapRows f;
  f.rows = o.rows;
  f.features = o.features;
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
      o.expect_column(t, next);
      t = t.to(o.compute).contiguous();
      group.column_stride = t.numel() == 1 ? 0 : 1;
    } else {
      t = o.as_rows(t.to(o.compute), kind.width, next);
      if (t.size(1) > 1 && t.stride(1) > 1) t = t.contiguous();
      group.row_stride = t.stride(0);
      group.column_stride = t.size(1) > 1 ? t.stride(1) : 1;
    }
    group.data = t.data_ptr();
    keep.push_back(t);
    ++next;
  }
  std::vector<Tensor> results;
  for (const Streams::Kind kind : streams.out) {
    Group& group = f.out[f.results++];
    group.width = kind.width;
    group.summed = kind.param;
    if (kind.param) {
      results.push_back(for_sums(o.empty(), {o.features}, o.compute));
    } else {
      results.push_back(fresh(o.shape(kind.width), o.compute));
      group.row_stride = kind.width * o.features;
    }
    group.data = results.back().data_ptr();
  }
  if (!o.empty()) engine->map_rows[float64](f);
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_inr_native, m) {
  m.def(kLinearActSchema);
  m.def(kLinearActBackwardSchema);
  m.def(kActMapSchema);
}

TORCH_LIBRARY_IMPL(fused_inr_native, CPU, m) {
  m.impl("linear_act", linear_act);
  m.impl("linear_act_backward", linear_act_backward);
  m.impl("act_map", act_map);
}

}  // namespace fused_inr
