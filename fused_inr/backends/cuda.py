"""CUDA C++ for where Triton is not, or not enough."""

from __future__ import annotations

import torch

from .. import native_cuda
from .base import FLOATS
from .native import Native


class Cuda(Native):
    """CUDA C++ (csrc/cuda): the map in one elementwise kernel per direction, around PyTorch's own matrix products."""

    name = "cuda"

    @staticmethod
    def _library():
        return native_cuda

    @staticmethod
    def _operators():
        return torch.ops.fused_inr_cuda

    def serves(self, map, device, dtype):
        if device.type != "cuda":
            return f"the tensors are on {device}, this backend serves CUDA tensors"
        if dtype not in FLOATS:
            return f"dtype {dtype} is not one of {FLOATS}"
        usable, reason = self.available()
        if not usable:
            return reason
        index = torch.cuda.current_device() if device.index is None else device.index
        return self._operators().refusal(index) or ("" if map.generated else self._compile(map))
