// What the operators of CPU and CUDA share: their schemas, and what they ask of their tensors: types, storage, sizes.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "maps.h"
#include "streams.h"

namespace fused_inr {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

// The schemas of the operators that the backends of CPU and CUDA have both (docs/architecture.md, sections 3 and 8).
inline constexpr const char* kLinearActSchema =
    "linear_act(Tensor x, Tensor weight, Tensor? bias, Tensor?[] params, float[] constants, str activation, bool save) "
    "-> (Tensor, Tensor)";
inline constexpr const char* kLinearActBackwardSchema =
    "linear_act_backward(Tensor g, Tensor x, Tensor weight, Tensor? bias, Tensor?[] params, float[] constants, Tensor? z, "
    "str activation, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)";
inline constexpr const char* kActMapSchema =
    "act_map(Tensor[] inputs, Tensor?[] params, float[] constants, str activation, int level, bool learnable) -> Tensor[]";
inline constexpr const char* kMomentsSchema =
    "moments(Tensor sigmas, Tensor params, int start, int samples, int seed, str activation) -> Tensor";

// Storage can be freed, or made smaller, under a tensor that is still there (`untyped_storage().resize_(0)`, as FSDP does
// with parameters between their uses). PyTorch's own operators raise then; an address alone tells nothing.
inline void held(const Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const auto& storage = t.storage();
  TORCH_CHECK((last + 1) * t.element_size() <= static_cast<int64_t>(storage.nbytes()), name, ": a tensor of shape ", t.sizes(),
              " whose storage holds ", storage.nbytes(),
              " bytes: it was freed or made smaller (untyped_storage().resize_); gather the tensor before it is used");
}

inline Storage storage_of(const Tensor& t, const char* name) {
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

// The type that a call with this x computes in.
inline at::ScalarType compute_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline Tensor with_unit_columns(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

inline void expect_sizes(const Tensor& t, at::IntArrayRef expected, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == expected, name, ": expected ", expected, ", got ", t.sizes());
}

// The parameters of a map, each a tensor of one element or one per feature, or a constant: of_tensor(j, tensor) or
// of_constant(j, number), in their order.
template <class OfTensor, class OfConstant>
void each_parameter(const OptionalTensors& params, at::ArrayRef<double> constants, const Shape& shape, int64_t features,
                    OfTensor of_tensor, OfConstant of_constant) {
  const size_t count = static_cast<size_t>(shape.params);
  TORCH_CHECK_VALUE(params.size() <= count && (params.empty() || params.size() == count), "params: expected ", count,
                    " (or none), got ", params.size());
  for (size_t j = 0; j < count; ++j) {
    const OptionalTensor p = params.empty() ? OptionalTensor() : OptionalTensor(params.get(j));
    if (p && p->defined()) {
      TORCH_CHECK_VALUE(p->dim() <= 1 && (p->numel() == 1 || p->numel() == features), "params[", j,
                        "]: expected one number or ", features, " (one per feature), got shape ", p->sizes());
      of_tensor(j, *p);
    } else {
      TORCH_CHECK_VALUE(j < constants.size(), "constants: expected ", count, ", got ", constants.size());
      of_constant(j, constants[j]);
    }
  }
}

// The sizes of a linear_act, from x, weight and bias, which are checked.
struct LayerSizes {
  at::ScalarType compute;
  int64_t batch = 1, rows = 0, depth = 0, features = 0, branches = 1;
  bool batched = false;

  LayerSizes(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Shape& shape)
      : compute(compute_type(x)), branches(shape.branches) {
    storage_of(x, "x");
    storage_of(weight, "weight");
    batched = weight.dim() == 3;
    TORCH_CHECK_VALUE(weight.dim() == 2 || batched, "weight: expected [B*N, K] or [G, B*N, K], got ", weight.sizes());
    TORCH_CHECK_VALUE(x.dim() == weight.dim(), "x: expected ", weight.dim(), " dimensions as weight has, got ", x.sizes());
    TORCH_CHECK_VALUE(x.size(-1) == weight.size(-1), "x: its last size ", x.size(-1), " is not weight's, ", weight.size(-1));
    TORCH_CHECK_VALUE(!batched || x.size(0) == weight.size(0), "x: batch ", x.size(0), " is not weight's, ", weight.size(0));
    TORCH_CHECK_VALUE(weight.size(-2) % branches == 0, "weight: ", weight.size(-2), " rows are not a multiple of ", branches,
                      " branches");
    batch = batched ? x.size(0) : 1;
    rows = x.size(-2);
    depth = x.size(-1);
    features = weight.size(-2) / branches;
    if (!bias || !bias->defined()) return;
    TORCH_CHECK_VALUE(
        bias->size(-1) == columns() && bias->numel() == columns() * batch && bias->dim() == weight.dim() - 1,
        "bias: expected ", batched ? "[G, " : "[", columns(), "], got ", bias->sizes());
    storage_of(*bias, "bias");
  }

  std::vector<int64_t> shape(int64_t m, int64_t n) const {
    return batched ? std::vector<int64_t>{batch, m, n} : std::vector<int64_t>{m, n};
  }
  int64_t columns() const { return branches * features; }
  bool float64() const { return compute == at::kDouble; }
  bool empty() const { return rows == 0 || batch == 0 || columns() == 0; }
};

inline void expect_level(int64_t level) {
  TORCH_CHECK_VALUE(level >= 0 && level <= kMaxLevel, "level: expected 0 to ", kMaxLevel, ", got ", level);
}

// The sizes of an act_map, from z and the number of tensors, which are checked.
struct MapSizes {
  const Tensor& z;
  at::ScalarType compute;
  int64_t rows = 1, features = 0;

  MapSizes(at::TensorList inputs, const Streams& streams, const Shape& shape) : z(first(inputs, streams, shape)) {
    TORCH_CHECK_VALUE(z.dim() >= 2 && z.size(-1) % shape.branches == 0, "inputs[0]: expected [M, ", shape.branches, "*N], got ",
                      z.sizes());
    for (const Tensor& t : inputs) storage_of(t, "inputs");
    compute = compute_type(z);
    features = z.size(-1) / shape.branches;
    for (int64_t d = 0; d + 1 < z.dim(); ++d) rows *= z.size(d);
  }

  bool empty() const { return rows * features == 0; }
  // [M, width * N], with as many dimensions before the last as z has
  std::vector<int64_t> shape(int64_t width) const {
    auto sizes = z.sizes().vec();
    sizes.back() = width * features;
    return sizes;
  }
  void expect_column(const Tensor& t, size_t at) const {
    TORCH_CHECK_VALUE(t.dim() <= 1 && (t.numel() == 1 || t.numel() == features), "inputs[", at,
                      "]: the cotangent of a parameter, expected one number or ", features, ", got ", t.sizes());
  }
  // t, checked, as [rows, width * features]
  Tensor as_rows(const Tensor& t, int64_t width, size_t at) const {
    const auto expected = shape(width);
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(expected), "inputs[", at, "]: expected ", at::IntArrayRef(expected), ", got ",
                      t.sizes());
    return t.dim() == 2 ? t : t.reshape({rows, width * features});
  }

 private:
  static const Tensor& first(at::TensorList inputs, const Streams& streams, const Shape& shape) {
    const size_t count = streams.in.size() - static_cast<size_t>(shape.params);
    TORCH_CHECK_VALUE(inputs.size() == count, "inputs: expected ", count, " tensors, got ", inputs.size());
    return inputs[0];
  }
};

}  // namespace fused_inr
