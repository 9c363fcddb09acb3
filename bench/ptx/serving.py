"""fused_inr on an emulated device: what decides by a tensor's device is told the emulated one instead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ... import backends
from ...kernels.configurations import linear_act as layer_configs
from ...kernels.configurations import mlp as network_configs
from .device import EmulatedDevice, ExecutionOptions, triton_driver


class _Emulated(backends.Triton):
    """The backend "triton" as it is on a CUDA device of this compute capability, for tensors of the CPU.

    Wide products of float32 in ieee precision, which a device leaves to cuBLAS, are ours here, so that they are seen;
    with `by_library` they are PyTorch's.
    """

    by_library = False

    def __init__(self, capability: int):
        self.capability = capability

    def available(self):
        return True, ""

    def serves(self, map, device, dtype):
        if device.type != "cpu":
            return f"the tensors are on {device}, an emulated device serves CPU tensors"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {dtype} is not float32, bfloat16 or float16"
        return ""

    def _by_library(self, op, x, weight, precision):
        if not self.by_library or (x.dtype == torch.float32 and precision not in ("ieee", "tf32")):
            return False
        arch = layer_configs.arch_of_capability(*divmod(self.capability, 10))
        return layer_configs.library(arch, op, x.dtype, precision, *weight.shape[-2:])

    def serves_network(self, x, layers, precision, direction):
        from ...kernels import mlp

        original = mlp.serves

        def on_this_device(shapes, maps, dtype, precision, arch=None, **more):
            return original(shapes, maps, dtype, precision, self.capability, **more)

        with mock.patch.object(mlp, "serves", on_this_device):
            return super().serves_network(x, layers, precision, direction)


def _precision_of(device: torch.device, dtype: torch.dtype, backend: str = "triton") -> str:
    """`backends.precision_of` of a CUDA device."""
    return _original_precision_of(torch.device("cuda") if backend == "triton" else device, dtype, backend)


_original_precision_of = backends.precision_of


class _LibraryProducts(TorchDispatchMode):
    """PyTorch's own products of float32 as on a device: with factors rounded to TF32 where its settings say so."""

    products = frozenset((torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.products and torch.backends.cuda.matmul.fp32_precision == "tf32":
            factors = [rounded_to_tf32(t) if t.dtype == torch.float32 else t for t in args[-2:]]
            args = (*args[:-2], *factors)
        return function(*args, **(kwargs or {}))


def rounded_to_tf32(t: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of 10 bits, ties away from 0."""
    bits = t.contiguous().view(torch.int32)
    return torch.where(t.isfinite(), (bits + 0x1000) & ~0x1FFF, bits).view(torch.float32)


@contextlib.contextmanager
def emulated(
    capability: int = 80, options: ExecutionOptions | None = None, *, by_library: bool = False
) -> Iterator[EmulatedDevice]:
    """Within the block, backend "triton" serves CPU tensors, on an emulated device of this compute capability.

    PyTorch's own operations run on the CPU; its products of float32 follow `torch.backends.cuda.matmul` as there.
    """
    serving = _Emulated(capability)
    serving.by_library = by_library
    arch = layer_configs.arch_of_capability(*divmod(capability, 10))
    with (
        triton_driver(capability, options) as device,
        mock.patch.dict(backends.TABLE, triton=serving),
        mock.patch.object(backends.choice, "precision_of", _precision_of),
        mock.patch.object(layer_configs, "arch", return_value=arch),
        backends.use("triton"),
        _LibraryProducts(),
    ):
        yield device


@contextlib.contextmanager
def few_programs(count: int) -> Iterator[None]:
    """Whole networks run as so many programs within the block, not one or more for each multiprocessor: so that few
    rows make several tiles of each."""
    network_configs.pick.cache_clear()
    try:
        with mock.patch.object(layer_configs, "multiprocessors", return_value=count):
            yield
    finally:
        network_configs.pick.cache_clear()
