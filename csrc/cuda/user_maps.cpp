// A user's formula: the addresses of its tables, for `register_activation` (fused_inr/native_cuda.py, compile_maps).
#include "moments.h"
#include "rows.h"

extern "C" __attribute__((visibility("default"))) void fused_inr_cuda_user_maps(int64_t* to) {
  to[0] = reinterpret_cast<int64_t>(fused_inr::cuda_maps_float);
  to[1] = reinterpret_cast<int64_t>(fused_inr::cuda_maps_double);
  to[2] = reinterpret_cast<int64_t>(fused_inr::cuda_moments);
}
