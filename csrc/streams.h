// What the engine and the kernels of every backend agree on. No header of PyTorch or CUDA.
#pragma once

namespace fused_inr {

enum class Storage : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

}  // namespace fused_inr
