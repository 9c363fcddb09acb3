// The operators of a whole network, `mlp`, `mlp_backward` and `mlp_loss`: checks, allocation, and the call of the engine.
// Semantics: docs/architecture.md, section 7.
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <sstream>

#include "memory.h"
#include "native.h"

namespace fused_inr {
namespace {

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
      : compute(compute_type(x_)) {
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
      l.jet = jet_of(activations[i], "activation", keys[i], float64(), learnable);
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
    results_.push_back({for_sums(o_.empty(), shape, o_.compute), type});
    return results_.back().first.data_ptr();
  }

  const NetworkOperands& o_;
  std::vector<std::pair<Tensor, at::ScalarType>> results_;
};

std::vector<Tensor> mlp_backward(const Tensor& g_, const Tensor& x, const OptionalTensors& tensors,
                                 const c10::List<std::string>& words, at::ArrayRef<double> numbers,
                                 const OptionalTensor& saved, std::array<bool, 5> needs) {
  NetworkOperands o(x, tensors, words, numbers);
  expect_sizes(g_, {o.rows(), o.out_features()}, "g");
  held(g_, "g");
  o.differentiate(needs[3]);
  NetworkBackward f;
  const NetworkGradients gradients(o, tensors, x, needs, &f);
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
  return gradients.all({});
}

std::vector<Tensor> mlp_loss(const Tensor& x, const Tensor& target_, const OptionalTensor& row_weights,
                             const OptionalTensors& tensors, const c10::List<std::string>& words, at::ArrayRef<double> numbers,
                             c10::string_view loss, at::ArrayRef<double> loss_constants, double scale,
                             std::array<bool, 5> needs) {
  NetworkOperands o(x, tensors, words, numbers);
  expect_sizes(target_, {o.rows(), o.out_features()}, "target");
  o.differentiate(needs[3]);
  const Activation l = activation_of(o.engine, loss);
  TORCH_CHECK_VALUE(l.branches == 2 && l.outputs == 1, "loss '", loss, "': expected a map of (prediction, target) to one number");
  void* jet = jet_of(l, "loss", loss, o.float64(), false);
  const Params p(OptionalTensors(), loss_constants, l, 1, o.compute);
  held(target_, "target");

  NetworkBackward f;
  const NetworkGradients gradients(o, tensors, x, needs, &f);
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
  return gradients.all({at::full({}, value, at::TensorOptions().dtype(o.compute))});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_inr_native, m) {
  m.def("mlp(Tensor x, Tensor?[] tensors, str[] words, float[] numbers, bool save) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor g, Tensor x, Tensor?[] tensors, str[] words, float[] numbers, Tensor? saved, bool[5] needs) "
      "-> Tensor[]");
  m.def(
      "mlp_loss(Tensor x, Tensor target, Tensor? row_weights, Tensor?[] tensors, str[] words, float[] numbers, str loss, "
      "float[] loss_constants, float scale, bool[5] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fused_inr_native, CPU, m) {
  m.impl("mlp", mlp);
  m.impl("mlp_backward", mlp_backward);
  m.impl("mlp_loss", mlp_loss);
}

}  // namespace fused_inr
