// The operators `moments` and `random_bits`: checks, allocation, and the launch. Semantics: docs/architecture.md, section 8.
#include <torch/library.h>

#include "operators.h"

namespace fused_inr {
namespace {

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

}  // namespace

FI_LIBRARY_FRAGMENT(FI_NAMESPACE, m) {
  m.def(kMomentsSchema);
  m.def("random_bits(int start, int count, int branch, int seed, Device device) -> Tensor",
        [](int64_t start, int64_t count, int64_t branch, int64_t seed, c10::Device device) {
          return random_bits(start, count, branch, seed, device);
        });
}

FI_LIBRARY_IMPL(FI_NAMESPACE, FI_KEY, m) {
  m.impl("moments", moments);
}

}  // namespace fused_inr
