// The operators `moments` and `random_bits`: checks, allocation, and the call of the engine. Semantics:
// docs/architecture.md, section 8.
#include <torch/library.h>

#include "native.h"

namespace fused_inr {
namespace {

// Sums over `samples` draws from `start` on: [chunks, G, outputs * (1 + branches), 3] in float64.
Tensor moments(const Tensor& sigmas_, const Tensor& params_, int64_t start, int64_t samples, int64_t seed,
               c10::string_view activation) {
  const Engine* engine = current().load();
  const Activation a = activation_of(engine, activation);
  TORCH_CHECK_VALUE(sigmas_.dim() == 2 && sigmas_.size(1) == a.branches && a.branches <= 16, "sigmas: expected [G, ", a.branches,
                    "] (at most 16 branches), got ", sigmas_.sizes());
  TORCH_CHECK_VALUE(params_.dim() == 2 && params_.size(0) == sigmas_.size(0) && params_.size(1) == a.params,
                    "params: expected [", sigmas_.size(0), ", ", a.params, "], got ", params_.sizes());
  TORCH_CHECK_VALUE(start >= 0 && start % 4 == 0 && samples >= 0, "start, samples: expected a multiple of 4 and at least 0, got ",
                    start, ", ", samples);
  void* jet = jet_of(a, "activation", activation, false, false);
  held(sigmas_, "sigmas");
  held(params_, "params");
  const Tensor sigmas = sigmas_.to(at::kFloat).contiguous(), params = params_.to(at::kFloat).contiguous();
  Tensor sums = at::empty({(samples + 4095) / 4096, sigmas.size(0), a.outputs * (1 + a.branches), 3},
                          at::TensorOptions().dtype(at::kDouble));
  if (sums.numel() == 0) return sums;
  Moments m;
  m.settings = sigmas.size(0);
  m.start = start;
  m.samples = samples;
  m.seed = static_cast<uint64_t>(seed);
  m.branches = a.branches;
  m.outputs = a.outputs;
  m.params = a.params;
  m.sigma = sigmas.const_data_ptr<float>();
  m.param = params.const_data_ptr<float>();
  m.jet = jet;
  m.sums = sums.data_ptr<double>();
  m.parallel = parallel;
  m.threads = threads();
  engine->moments(m);
  return sums;
}

Tensor random_bits(int64_t start, int64_t count, int64_t branch, int64_t seed) {
  TORCH_CHECK_VALUE(start >= 0 && start % 4 == 0 && count >= 0 && count % 4 == 0,
                    "start, count: expected multiples of 4, got ", start, ", ", count);
  Tensor words = at::empty({count}, at::TensorOptions().dtype(at::kLong));
  current().load()->random_bits(start, count, branch, static_cast<uint64_t>(seed), words.data_ptr<int64_t>());
  return words;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_inr_native, m) {
  m.def(kMomentsSchema);
  m.def("random_bits(int start, int count, int branch, int seed) -> Tensor",
        [](int64_t start, int64_t count, int64_t branch, int64_t seed) { return random_bits(start, count, branch, seed); });
}

TORCH_LIBRARY_IMPL(fused_inr_native, CPU, m) {
  m.impl("moments", moments);
}

}  // namespace fused_inr
