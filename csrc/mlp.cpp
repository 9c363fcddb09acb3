// The operators of a whole network, `mlp`, `mlp_backward` and `mlp_loss`: checks, allocation, and the call of the engine.
// Semantics: docs/architecture.md, section 7.
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "memory.h"
#include "native.h"

namespace fused_inr {
namespace {

// Tensors and activations of a call, checked and in a form that the engine takes.
struct NetworkOperands {
  const Engine* engine = current().load();
  at::ScalarType compute;
  Tensor x;
  std::vector<Tensor> keep;
  std::vector<Activation> activations;
  std::vector<Params> params;
  std::vector<NetworkLayer> layers;

  NetworkOperands(const Tensor& x_, at::TensorList weights, const OptionalTensors& biases, const OptionalTensors& params_,
                  at::ArrayRef<double> constants, const c10::List<std::string>& keys, const c10::List<bool>& skips,
                  const OptionalTensors& norms, at::ArrayRef<double> norm_eps)
      : compute(compute_type(x_)) {
    const size_t count = weights.size();
    TORCH_CHECK_VALUE(count >= 1 && biases.size() == count && keys.size() == count,
                      "weights, biases, activations: expected one for each layer, got ", count, ", ", biases.size(), ", ",
                      keys.size());
    TORCH_CHECK_VALUE(skips.empty() || skips.size() == count, "skips: expected none, or one for each layer, got ", skips.size());
    TORCH_CHECK_VALUE((norm_eps.empty() || norm_eps.size() == count) && norms.size() == 2 * norm_eps.size(),
                      "norms, norm_eps: expected none, or two and one for each layer, got ", norms.size(), " and ",
                      norm_eps.size());
    storage_of(x_, "x");
    TORCH_CHECK_VALUE(x_.dim() == 2, "x: expected [M, K], got ", x_.sizes());
    x = with_unit_columns(x_);
    layers.resize(count);
    params.reserve(count);
    int64_t channels = 1, channel = x_.size(1);
    size_t first_param = 0;
    for (size_t i = 0; i < count; ++i) {
      const std::string key = keys.get(i);
      activations.push_back(activation_of(engine, key));
      const Activation& a = activations.back();
      TORCH_CHECK_VALUE(a.params <= kMaxParams, "activation '", key, "': more than ", kMaxParams, " parameters");
      const Tensor& w = weights[i];
      storage_of(w, "weights");
      TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) == channels * channel && w.size(0) % a.branches == 0, "weights[", i,
                        "]: expected [", a.branches, " * N, ", channels * channel, "], got ", w.sizes());
      NetworkLayer& l = layers[i];
      l.in_channels = channels;
      l.in_channel = channel;
      l.features = w.size(0) / a.branches;
      l.branches = a.branches;
      l.outputs = a.outputs;
      l.params = a.params;
      keep.push_back(with_unit_columns(w.to(compute)));
      l.weight = rows_of(keep.back(), "weights");
      const OptionalTensor bias = biases.get(i);
      if (bias && bias->defined()) {
        TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == w.size(0), "biases[", i, "]: expected [", w.size(0), "], got ",
                          bias->sizes());
        storage_of(*bias, "biases");
        keep.push_back(bias->to(compute).contiguous());
        l.bias = keep.back().data_ptr();
      }
      OptionalTensors own;
      const size_t of_layer = static_cast<size_t>(a.params);
      TORCH_CHECK_VALUE(params_.size() >= first_param + of_layer && constants.size() >= first_param + of_layer,
                        "params, constants: expected those of every layer, got ", params_.size(), " and ", constants.size());
      for (size_t j = 0; j < of_layer; ++j) own.push_back(params_.get(first_param + j));
      params.emplace_back(own, constants.slice(first_param, of_layer), a, l.features, compute);
      first_param += of_layer;
      for (int j = 0; j < a.params; ++j) {
        // a copy of Params would leave these behind: they point into the vector, which does not grow
        l.param[j] = params.back().data[static_cast<size_t>(j)];
        l.param_stride[j] = params.back().stride[static_cast<size_t>(j)];
      }
      l.value = key == "identity" ? nullptr : map_of(a, key, float64(), 0, false);
      l.skip = !skips.empty() && skips.get(i);
      TORCH_CHECK_VALUE(!l.skip || (l.value && l.outputs == channels && l.features == channel), "skips[", i,
                        "]: a skip connection passes by a layer with an activation and with as many columns as its input");
      channels = a.outputs;
      channel = l.features;
      l.norm = !norm_eps.empty() && norm_eps[i] >= 0;
      if (!l.norm) continue;
      l.eps = norm_eps[i];
      const auto of_norm = [&](size_t at) -> const void* {
        const OptionalTensor t = norms.get(at);
        if (!t || !t->defined()) return nullptr;
        TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == channels * channel, "norms[", at, "]: expected [", channels * channel,
                          "], got ", t->sizes());
        storage_of(*t, "norms");
        keep.push_back(t->to(compute).contiguous());
        return keep.back().data_ptr();
      };
      l.gamma = of_norm(2 * i);
      l.beta = of_norm(2 * i + 1);
    }
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

  // the maps of a backward, with parameters as inputs that have gradients where `learnable`
  void differentiate(const c10::List<std::string>& keys, bool learnable) {
    for (size_t i = 0; i < layers.size(); ++i) {
      NetworkLayer& l = layers[i];
      if (!l.value) continue;
      l.jet = jet_of(activations[i], "activation", keys.get(i), float64(), learnable);
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
};

std::tuple<Tensor, Tensor> mlp(const Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                               const OptionalTensors& params, at::ArrayRef<double> constants,
                               const c10::List<std::string>& activations, const c10::List<bool>& skips,
                               const OptionalTensors& norms, at::ArrayRef<double> norm_eps, bool save) {
  const NetworkOperands o(x, weights, biases, params, constants, activations, skips, norms, norm_eps);
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

// Gradients of a network's operands: gx, then those of all weights, of all biases, of all parameters, and where there are norms
// of the weight and the bias of each layer's.
struct NetworkGradients {
  Tensor gx;
  std::vector<Tensor> gw, gb, gp, gn;

  NetworkGradients(NetworkOperands& o, at::TensorList weights, const Tensor& x, const OptionalTensors& norms,
                   std::array<bool, 5> needs, NetworkBackward* f) {
    const auto sum = [&](at::IntArrayRef sizes) { return for_sums(o.empty(), sizes, o.compute); };
    gx = nothing(x.scalar_type());
    if (needs[0]) {
      gx = o.empty() ? at::zeros(x.sizes(), at::TensorOptions().dtype(x.scalar_type())) : fresh(x.sizes(), x.scalar_type());
      f->gx = rows_of(gx, "gx");
    }
    for (size_t i = 0; i < o.layers.size(); ++i) {
      NetworkLayer& l = o.layers[i];
      gw.push_back(needs[1] ? sum(weights[i].sizes()) : nothing(weights[i].scalar_type()));
      if (needs[1]) l.gw = gw.back().data_ptr();
      const bool bias_needed = needs[2] && l.bias;
      gb.push_back(bias_needed ? sum({l.branches * l.features}) : nothing(o.compute));
      if (bias_needed) l.gb = gb.back().data_ptr();
      const bool learnable = needs[3] && l.params > 0;
      gp.push_back(learnable ? sum({l.params, l.features}) : nothing(o.compute));
      if (learnable) l.gp = gp.back().data_ptr();
      if (norms.empty()) continue;
      const auto of_norm = [&](const void* present) {
        const bool needed = needs[4] && present;
        gn.push_back(needed ? sum({l.outputs * l.features}) : nothing(o.compute));
        return needed ? gn.back().data_ptr() : nullptr;
      };
      l.g_gamma = of_norm(l.gamma);
      l.g_beta = of_norm(l.beta);
    }
    f->network = o.network();
  }

  std::vector<Tensor> all(at::TensorList weights, const OptionalTensors& biases, const OptionalTensors& norms,
                          std::vector<Tensor> first) const {
    first.push_back(gx);
    for (size_t i = 0; i < gw.size(); ++i) first.push_back(gw[i].to(weights[i].scalar_type()));
    const auto in_type_of = [](const OptionalTensor& t, const Tensor& gradient) {
      return t && t->defined() ? gradient.to(t->scalar_type()) : gradient;
    };
    for (size_t i = 0; i < gb.size(); ++i) first.push_back(in_type_of(biases.get(i), gb[i]));
    first.insert(first.end(), gp.begin(), gp.end());
    for (size_t i = 0; i < gn.size(); ++i) first.push_back(in_type_of(norms.get(i), gn[i]));
    return first;
  }
};

std::vector<Tensor> mlp_backward(const Tensor& g_, const Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                 const OptionalTensors& params, at::ArrayRef<double> constants,
                                 const c10::List<std::string>& activations, const c10::List<bool>& skips,
                                 const OptionalTensors& norms, at::ArrayRef<double> norm_eps, const OptionalTensor& saved,
                                 std::array<bool, 5> needs) {
  NetworkOperands o(x, weights, biases, params, constants, activations, skips, norms, norm_eps);
  expect_sizes(g_, {o.rows(), o.out_features()}, "g");
  held(g_, "g");
  o.differentiate(activations, needs[3]);
  NetworkBackward f;
  const NetworkGradients gradients(o, weights, x, norms, needs, &f);
  const Tensor g = readable(g_, o.compute);
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
  return gradients.all(weights, biases, norms, {});
}

std::vector<Tensor> mlp_loss(const Tensor& x, const Tensor& target_, const OptionalTensor& row_weights, at::TensorList weights,
                             const OptionalTensors& biases, const OptionalTensors& params, at::ArrayRef<double> constants,
                             const c10::List<std::string>& activations, const c10::List<bool>& skips,
                             const OptionalTensors& norms, at::ArrayRef<double> norm_eps, c10::string_view loss,
                             at::ArrayRef<double> loss_constants, double scale, std::array<bool, 5> needs) {
  NetworkOperands o(x, weights, biases, params, constants, activations, skips, norms, norm_eps);
  expect_sizes(target_, {o.rows(), o.out_features()}, "target");
  o.differentiate(activations, needs[3]);
  const Activation l = activation_of(o.engine, loss);
  TORCH_CHECK_VALUE(l.branches == 2 && l.outputs == 1, "loss '", loss, "': expected a map of (prediction, target) to one number");
  void* jet = jet_of(l, "loss", loss, o.float64(), false);
  const Params p(OptionalTensors(), loss_constants, l, 1, o.compute);
  held(target_, "target");

  NetworkBackward f;
  const NetworkGradients gradients(o, weights, x, norms, needs, &f);
  const Tensor target = readable(target_, o.compute);
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
  return gradients.all(weights, biases, norms, {at::full({}, value, at::TensorOptions().dtype(o.compute))});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_inr_native, m) {
  m.def(
      "mlp(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] params, float[] constants, str[] activations, bool[] skips, "
      "Tensor?[] norms, float[] norm_eps, bool save) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor g, Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] params, float[] constants, "
      "str[] activations, bool[] skips, Tensor?[] norms, float[] norm_eps, Tensor? saved, bool[5] needs) -> Tensor[]");
  m.def(
      "mlp_loss(Tensor x, Tensor target, Tensor? row_weights, Tensor[] weights, Tensor?[] biases, Tensor?[] params, "
      "float[] constants, str[] activations, bool[] skips, Tensor?[] norms, float[] norm_eps, str loss, float[] loss_constants, "
      "float scale, bool[5] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fused_inr_native, CPU, m) {
  m.impl("mlp", mlp);
  m.impl("mlp_backward", mlp_backward);
  m.impl("mlp_loss", mlp_loss);
}

}  // namespace fused_inr
