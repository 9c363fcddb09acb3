"""Backends whose operators a library of ours registers, and `cpu`, the native engine."""

from __future__ import annotations

import torch

from .. import native
from ..activations import ActivationMap
from .base import FLOATS, Backend, refuse_freed, within_float16
from .reference import product_and_map, product_and_map_backward

#: columns of the widest layer up to which the CPU engine is at its best with a whole network
_WIDEST_TILE = 1024


class Native(Backend):
    """A backend whose operators a library of ours registers; a user's formula is compiled when it is first used."""

    def __init__(self) -> None:
        self._compiled: dict[str, str] = {}  # key of a run-time formula -> reason why it could not be compiled

    @staticmethod
    def _library():
        """The module that builds and loads the library."""
        raise NotImplementedError

    @staticmethod
    def _operators():
        raise NotImplementedError

    def available(self):
        library = self._library()
        return (True, "") if library.load() else (False, library.status()[1])

    def _compile(self, map: ActivationMap) -> str:
        if map.key not in self._compiled:
            try:
                self._library().compile_maps(map.key, map.cpp_source())
                self._compiled[map.key] = ""
            except Exception as error:  # no compiler, no space, a compiler's error: the reference serves
                self._compiled[map.key] = f"the formula of {map.name!r} could not be compiled: {error}"
        return self._compiled[map.key]

    def _ready(self, map: ActivationMap):
        if not map.generated and (reason := self._compile(map)):
            raise RuntimeError(f"backend {self.name!r}: {reason}")
        return self._operators()

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep):
        return self._ready(map).linear_act(x, weight, bias, params, constants, map.key, bool(keep))

    def linear_act_backward(self, g, x, weight, bias, params, constants, z, map, precision, needs):
        return self._ready(map).linear_act_backward(g, x, weight, bias, params, constants, z, map.key, needs)

    def act_map(self, inputs, params, constants, map, level, learnable):
        return self._ready(map).act_map(inputs, params, constants, map.key, level, learnable)

    def moments(self, sigmas, params, start, samples, seed, map):
        return self._ready(map).moments(sigmas, params, start, samples, seed, map.key)


class Cpu(Native):
    """The C++ engine (csrc/cpu)."""

    name = "cpu"

    @staticmethod
    def _library():
        return native

    @staticmethod
    def _operators():
        return torch.ops.fused_inr_native

    def serves(self, map, device, dtype):
        if device.type != "cpu":
            return f"the tensors are on {device}, this backend serves CPU tensors"
        if dtype not in FLOATS:
            return f"dtype {dtype} is not one of {FLOATS}"
        usable, reason = self.available()
        if not usable:
            return reason
        return "" if map.generated else self._compile(map)

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep):
        if x.dtype == torch.float64:  # PyTorch's products and maps are faster than the engine's (bench calls)
            refuse_freed(x, weight, bias, *params)
            return product_and_map(x, weight, bias, params, constants, map, keep)
        return super().linear_act(x, weight, bias, params, constants, map, precision, keep)

    def linear_act_backward(self, g, x, weight, bias, params, constants, z, map, precision, needs):
        if x.dtype == torch.float64:
            refuse_freed(g, x, weight, bias, z, *params)
            return product_and_map_backward(g, x, weight, bias, params, constants, z, map, needs)
        return super().linear_act_backward(g, x, weight, bias, params, constants, z, map, precision, needs)

    def serves_network(self, x, layers, precision, direction):
        return ""

    def prefers_layers(self, layers, dtype):
        if dtype == torch.float64:
            return "float64: PyTorch's matrix products are faster than those of a whole network"
        # a tile of rows and a layer's weights no longer fit the second-level cache together
        widest = max(layer.weight.shape[0] for layer in layers)
        return "" if widest <= _WIDEST_TILE else f"layers of {widest} columns: a tile of them would hold few rows"

    def prefers_plain(self, dtype):
        return "PyTorch's products and maps of float64 are faster" if dtype == torch.float64 else ""

    def _network(self, spec):
        if not spec.generated:
            for map in spec.maps:
                self._ready(map)
        return torch.ops.fused_inr_native

    def mlp(self, x, tensors, spec, precision, save):
        return self._network(spec).mlp(x, tensors, spec.words, spec.numbers, save)

    def mlp_backward(self, g, x, tensors, spec, saved, precision, needs):
        return self._network(spec).mlp_backward(g, x, tensors, spec.words, spec.numbers, saved, needs)

    @within_float16
    def mlp_loss(self, x, target, row_weights, tensors, spec, criterion, precision, needs):
        self._ready(criterion.map)
        return self._network(spec).mlp_loss(
            x, target, row_weights, tensors, spec.words, spec.numbers, criterion.loss, criterion.constants,
            criterion.scale, needs,
        )  # fmt: skip


#: The native engine.
CPU = Cpu()


# -- memory of the native engine


def empty_cache() -> int:
    """Give the memory that the `cpu` backend keeps for its next results back to the system; returns its bytes.

    Large results (4 MiB and more) come from blocks that earlier ones gave back: mapping and faulting them in anew would
    cost more than the arithmetic. 0 where the native engine is not loaded.
    """
    return _engine().empty_cache() if CPU.available()[0] else 0


def set_cache_limit(size: int) -> int:
    """How many bytes of unused blocks the `cpu` backend may keep (an eighth of the machine's memory); the former limit.

    Raises:
        ValueError: a negative size.
        RuntimeError: no native engine.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"size: expected a number of bytes, 0 or more, got {size!r}")
    usable, reason = CPU.available()
    if not usable:
        raise RuntimeError(f"backend 'cpu': {reason}")
    return _engine().set_cache_limit(size)


def _engine():
    return torch.ops.fused_inr_native
