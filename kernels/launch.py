"""What every launcher needs: the device, types inside a kernel, how products and elementary functions are computed."""

from __future__ import annotations

import contextlib

import torch
import triton.language as tl

from .maps import INTERPRETED

#: A tensor's type as kernels name it.
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def on_device(tensor: torch.Tensor):
    """Triton launches on the current device and its current stream: make them the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of pre-activations, sums and maps: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mode(dtype: torch.dtype, precision: str) -> int:
    """Primitives: accurate where the product is as good as float32's, fast where it is not, pure in the interpreter."""
    if INTERPRETED:
        return 2
    return 0 if dtype == torch.float32 and precision in ("ieee", "tf32x3", "bf16x3") else 1


def dot_precision(dtype: torch.dtype, precision: str) -> str:
    """What `tl.dot` is asked for. The interpreter ignores it; 16-bit types have one precision only."""
    return precision if dtype == torch.float32 and not INTERPRETED else "ieee"


def contiguous_rows(t: torch.Tensor) -> torch.Tensor:
    """Any stride between rows, none but 1 within."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
