"""Triton kernels on CUDA devices."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..network import NORMS
from .base import FLOATS, Backend, library_product
from .precision import pytorch_products


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


class Triton(Backend):
    """Triton kernels on CUDA devices; on CPU tensors under TRITON_INTERPRET=1, for tests."""

    name = "triton"
    chooses_products = True
    reads_any_weights = True

    def available(self):
        try:
            import triton
        except ImportError:
            return False, "Triton is not installed (pip install 'triton>=3.6'; Linux)"
        major, minor = (int(part) for part in triton.__version__.split(".")[:2])
        if (major, minor) < (3, 6):
            return False, f"Triton {triton.__version__} is too old: 3.6 or newer is needed"
        if interpreted():
            return True, ""
        if not torch.cuda.is_available():
            return False, "no CUDA device, and TRITON_INTERPRET=1 (its interpreter, for tests) is not set"
        if torch.version.hip:
            return False, "ROCm devices have not been tried"
        return True, ""

    def serves(self, map, device, dtype):
        usable, reason = self.available()
        if not usable:
            return reason
        if interpreted():
            return "" if dtype in FLOATS else f"dtype {dtype} is not one of {FLOATS}"
        if device.type != "cuda":
            return f"the tensors are on {device}, this backend serves CUDA tensors"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {dtype} is not float32, bfloat16 or float16"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor}: 8.0 or newer is needed"
        return ""

    def keeps(self, dtype, has_tensors):
        if dtype.itemsize >= 4:
            return "preactivations"
        return "" if has_tensors else "derivatives"

    @staticmethod
    def _by_library(op: str, x: Tensor, weight: Tensor, precision: str) -> bool:
        """Whether a matrix product is left to the library, with the map as one pointwise kernel: where it is the faster
        one (`kernels/configurations/linear_act.py`), which includes ieee, that no tensor core computes.

        The library goes by PyTorch's settings as they are now: where those are not the precision (`float32_products`,
        or changed since the forward), ours compute it.
        """
        if interpreted() or not weight.is_cuda:
            return False
        from fused_inr.kernels.configurations import linear_act as layer_configs

        if x.dtype == torch.float32 and precision != pytorch_products():
            return False
        return layer_configs.library(layer_configs.arch(x.device), op, x.dtype, precision, *weight.shape[-2:])

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep):
        from fused_inr.kernels import act_map, linear_act

        if keep != "derivatives" and self._by_library("forward", x, weight, precision):
            z = library_product(x, weight.mT, bias)
            if map.key == "identity" and not keep:
                return z.to(x.dtype), z.new_empty(0)
            (y,) = act_map.act_map([z], params, constants, map, 0, False)
            return y.to(x.dtype), z if keep else z.new_empty(0)
        return linear_act.linear_act(x, weight, bias, params, constants, map, precision, keep)

    def linear_act_backward(self, g, x, weight, bias, params, constants, z, map, precision, needs):
        from fused_inr.kernels import linear_act

        def product(op: str) -> bool:
            return self._by_library(op, x, weight, precision)

        if z is None and product("forward"):
            z = library_product(x, weight.mT, bias)
        return linear_act.linear_act_backward(
            g, x, weight, bias, params, constants, z, map, precision, needs, product("input_grad"),
            product("weight_grad"),
        )  # fmt: skip

    def act_map(self, inputs, params, constants, map, level, learnable):
        from fused_inr.kernels import act_map

        return act_map.act_map(inputs, params, constants, map, level, learnable)

    def moments(self, sigmas, params, start, samples, seed, map):
        from fused_inr.kernels import moments

        return moments.moments(sigmas, params, start, samples, seed, map)

    def serves_network(self, x, layers, precision, direction):
        if any(layer.skip for layer in layers):
            return "backend 'triton' takes skip connections layer by layer"
        for layer in layers:
            if layer.norm is not None:
                return f"backend 'triton' takes {NORMS[layer.norm.kind].name} layer by layer"
        if layers[-1].activation.has_tensors:
            return "backend 'triton' takes learnable parameters of the last layer's activation layer by layer"
        from fused_inr.kernels import mlp

        arch = None
        if x.is_cuda:
            major, minor = torch.cuda.get_device_capability(x.device)
            arch = 10 * major + minor
        shapes = [tuple(layer.weight.shape) for layer in layers]
        maps = [layer.activation.map for layer in layers]
        directions = {"inference": ("forward",), "forward": ("forward", "backward")}.get(direction, ("loss",))
        reasons = (mlp.serves(shapes, maps, x.dtype, precision, arch, direction=d) for d in directions)
        return next(filter(None, reasons), "")

    def mlp(self, x, tensors, spec, precision, save):
        from fused_inr.kernels import mlp

        return mlp.mlp(x, tensors, spec, precision, save)

    def mlp_backward(self, g, x, tensors, spec, saved, precision, needs):
        from fused_inr.kernels import mlp

        return mlp.mlp_backward(g, x, tensors, spec, saved, precision, needs)

    def mlp_loss(self, x, target, row_weights, tensors, spec, criterion, precision, needs):
        from fused_inr.kernels import mlp

        return mlp.mlp_loss(x, target, row_weights, tensors, spec, criterion, precision, needs)
