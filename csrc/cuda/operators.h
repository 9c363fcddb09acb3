// The CUDA backend as its operators see it: device and stream, activations by key, and what is asked of tensors on a device.
//
// No header of PyTorch's CUDA parts: the stream comes through the stable C shim, found at run time. With
// FUSED_INR_CUDA_ON_HOST the same operators serve CPU tensors, one thread after the other: that is for tests.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "../maps.h"
#include "../operands.h"
#include "moments.h"
#include "rows.h"

#if defined(FUSED_INR_CUDA_ON_HOST)
#define FI_NAMESPACE fused_inr_cuda_on_host
#define FI_KEY CPU
#else
#define FI_NAMESPACE fused_inr_cuda
#define FI_KEY CUDA
#endif
#define FI_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define FI_LIBRARY_FRAGMENT(name, m) TORCH_LIBRARY_FRAGMENT(name, m)
#define FI_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)

namespace fused_inr {

// What PyTorch's own kernels find set: the device of the tensors, and neither autograd nor autocast around the products.
struct Surroundings {
  c10::DeviceGuard device;
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  explicit Surroundings(const Tensor& like) : device(like.device()) {}
};

// The current stream of the tensor's device, a cudaStream_t (library.cpp).
void* stream_of(const Tensor& like);

struct Activation : Shape {
  const Maps* maps[2] = {};  // float, double
  const Moments* moments = nullptr;
};

// The activation of a key, built in or registered (library.cpp); ValueError where there is none.
Activation activation_of(c10::string_view key);

inline void same_device(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected a tensor on ", like.device(), ", got one on ", t.device());
}

}  // namespace fused_inr
