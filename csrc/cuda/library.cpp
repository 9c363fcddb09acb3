// The library `torch.ops.fused_inr_cuda`: streams, activations by key, and whether a device runs its code. The operators on
// layers and random draws stand in files of their own.
#include <dlfcn.h>
#include <torch/library.h>

#include "operators.h"

#ifndef FUSED_INR_STAMP
#define FUSED_INR_STAMP "unstamped"
#endif

namespace fused_inr {

// fused_inr/native.py looks for this before it loads a library: one built for another PyTorch must not be loaded.
extern "C" __attribute__((used, visibility("default"))) const char fused_inr_cuda_stamp[] =
    "FUSED_INR_STAMP=" FUSED_INR_STAMP ";";

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

namespace {

std::unordered_map<std::string, Activation> built_in() {
  std::unordered_map<std::string, Activation> all;
  const Maps* tables[] = {cuda_maps_float, cuda_maps_double};
  for (int type = 0; type < 2; ++type)
    for (const Maps* m = tables[type]; m->name; ++m) {
      Activation& a = all[m->name];
      a.branches = m->branches;
      a.outputs = m->outputs;
      a.params = m->params;
      a.maps[type] = m;
    }
  for (const Moments* m = cuda_moments; m->name; ++m) all[m->name].moments = m;
  return all;
}

Registry<Activation>& activations() {
  static Registry<Activation> all(built_in());
  return all;
}

}  // namespace

Activation activation_of(c10::string_view key) {
  Activation a;
  TORCH_CHECK_VALUE(activations().find(std::string(key), &a), "activation: the CUDA backend knows no '", key, "'");
  return a;
}

namespace {

bool has_activation(const std::string& key) {
  Activation a;
  return activations().find(key, &a);
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
  TORCH_CHECK_VALUE(activations().add(key, a), "key: '", key, "' is there already");
}

std::string refusal([[maybe_unused]] int64_t device) {
#if !defined(FUSED_INR_CUDA_ON_HOST)
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)));
#endif
  const char* reason = cuda_refusal();
  return reason ? reason : "";
}

std::string stamp() { return FUSED_INR_STAMP; }

}  // namespace

FI_LIBRARY(FI_NAMESPACE, m) {
  m.def("register_activation(str key, int of_float, int of_double, int of_moments) -> ()",
        [](const std::string& key, int64_t f, int64_t d, int64_t m) { register_activation(key, f, d, m); });
  m.def("has_activation(str key) -> bool", [](const std::string& key) { return has_activation(key); });
  m.def("refusal(int device) -> str", [](int64_t device) { return refusal(device); });
  m.def("stamp() -> str", []() { return stamp(); });
}

}  // namespace fused_inr
