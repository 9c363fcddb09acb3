// The native engine as its operators see it: the capability that runs, its activations, and operands as it takes them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <atomic>
#include <string>

#include "cpu/engine.h"
#include "maps.h"
#include "operands.h"

namespace fused_inr {

// The engine of the capability that runs (library.cpp).
std::atomic<const Engine*>& current();

// Whether the engine multiplies bfloat16 as such: what it was compiled with, and what the processor can.
bool multiplies_bfloat16(const Engine* engine);

// -- activations

struct Activation : Shape {
  std::array<std::array<void*, kSlots>, 2> map{};  // of float32, of float64
};

// The activation of a key, built in or registered (library.cpp); ValueError where there is none.
Activation activation_of(const Engine* engine, c10::string_view key);

inline void* map_of(const Activation& a, c10::string_view key, bool float64, int level, bool learnable) {
  const int slot = slot_of(level, learnable && a.params > 0);
  void* map = slot < 0 ? nullptr : a.map[float64][slot];
  TORCH_CHECK_NOT_IMPLEMENTED(map != nullptr, "activation '", key, "': the native engine has no derivative of order ", level,
                              learnable ? " with learnable parameters" : "", " for ", float64 ? "float64" : "float32");
  return map;
}

// `kind`: what the key names, "activation" or "loss"
inline void* jet_of(const Activation& a, const char* kind, c10::string_view key, bool float64, bool learnable) {
  void* jet = a.map[float64][jet_slot(learnable && a.params > 0)];
  TORCH_CHECK_NOT_IMPLEMENTED(jet != nullptr, kind, " '", key, "': the native engine has no jet");
  return jet;
}

// -- operands

inline void parallel(int64_t parts, void (*task)(void*, int64_t), void* context) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) task(context, part);
  });
}

inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

inline Tensor nothing(at::ScalarType type) { return at::empty({0}, at::TensorOptions().dtype(type)); }

// Memory for what the engine writes whole; zeros where there is nothing to add up, and so nothing for it to do.
inline Tensor for_sums(bool empty, at::IntArrayRef sizes, at::ScalarType type) {
  const auto options = at::TensorOptions().dtype(type);
  return empty ? at::zeros(sizes, options) : at::empty(sizes, options);
}

inline Rows rows_of(const Tensor& t, const char* name) {
  Rows r;
  r.data = t.data_ptr();
  r.batch_stride = t.dim() == 3 ? t.stride(0) : 0;
  r.row_stride = t.stride(-2);
  r.storage = storage_of(t, name);
  return r;
}

// A cotangent or a target as the engine reads it: of the compute type where one of the two is float64, rows without gaps.
inline Tensor readable(const Tensor& t, at::ScalarType compute) {
  return with_unit_columns((t.scalar_type() == at::kDouble) != (compute == at::kDouble) ? t.to(compute) : t);
}

// Parameters in the compute type: tensors of one element or one per feature, or the constants. `data` points into it.
struct Params {
  std::vector<Tensor> keep;
  std::array<float, kMaxStreams> floats;
  std::array<double, kMaxStreams> doubles;
  std::array<const void*, kMaxStreams> data;
  std::array<int64_t, kMaxStreams> stride;

  Params(const OptionalTensors& params, at::ArrayRef<double> constants, const Shape& shape, int64_t features,
         at::ScalarType type) {
    const auto of_tensor = [&](size_t j, const Tensor& p) {
      held(p, "params");
      keep.push_back(p.to(type).contiguous());
      data[j] = keep.back().data_ptr();
      stride[j] = p.numel() == 1 ? 0 : 1;
    };
    const auto of_constant = [&](size_t j, double constant) {
      floats[j] = static_cast<float>(constant);
      doubles[j] = constant;
      data[j] = type == at::kDouble ? static_cast<const void*>(&doubles[j]) : &floats[j];
      stride[j] = 0;
    };
    each_parameter(params, constants, shape, features, of_tensor, of_constant);
  }
};

}  // namespace fused_inr
