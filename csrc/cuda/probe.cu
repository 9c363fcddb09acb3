// Whether a device runs this library's code: it has to be compiled for it, and the driver has to be new enough.
#include "rows.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace fused_inr {
namespace {
__global__ void probe() {}
}  // namespace

const char* cuda_refusal() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  cudaGetLastError();  // it is told here, and nowhere else
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
}  // namespace fused_inr

#else
namespace fused_inr {
const char* cuda_refusal() { return nullptr; }
}  // namespace fused_inr
#endif
