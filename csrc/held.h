// What every operator asks of a tensor before it takes its address.
#pragma once
#include <ATen/core/Tensor.h>

namespace fused_inr {

// Storage can be freed, or made smaller, under a tensor that is still there (`untyped_storage().resize_(0)`, as FSDP does
// with parameters between their uses). PyTorch's own operators raise then; an address alone tells nothing.
inline void held(const at::Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const auto& storage = t.storage();
  TORCH_CHECK((last + 1) * t.element_size() <= static_cast<int64_t>(storage.nbytes()), name, ": a tensor of shape ", t.sizes(),
              " whose storage holds ", storage.nbytes(),
              " bytes: it was freed or made smaller (untyped_storage().resize_); gather the tensor before it is used");
}

}  // namespace fused_inr
