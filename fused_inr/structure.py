"""What a network consists of: its layers as operands, read once and kept until a module, a parameter or a hook changes.

Reading takes longer than a small network's arithmetic; finding that nothing has changed takes some microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layers import OUR_FORWARDS, FusedLayer, FusedLinear, has_hooks
from .network import NORMS, Layer, Norm
from .ops import mlp as _op
from .pytorch import any_global_hook

__all__ = ["Structure", "read"]

#: The modules that are norms of a whole network.
_KINDS = {norm.module: kind for kind, norm in NORMS.items()}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Structure:
    """The operands of a network, and everything whose change would change them.

    Attributes:
        operands: the layers as operands of one operation; None where `reason` says why they cannot be.
        kept: whether `holds` can tell that they are still right, at a later call.
    """

    def __init__(self, kept: bool) -> None:
        self.operands: _op.Operands | None = None
        self.reason = ""
        self.kept = kept
        self._same: list[tuple[dict, str, Any]] = []
        self._slots: list[tuple[dict, str, Any]] = []  # of tensors: of each layer weight, bias, parameters
        self._children: list[tuple[dict, list]] = []
        self._without: list[dict] = []
        self._kinds: list[tuple[nn.Module, type]] = []
        self._forwards: dict[Any, Callable] = {}
        self._tensors: list[tuple[Tensor, torch.dtype, torch.device, torch.Size]] = []

    @staticmethod
    def of(operands: _op.Operands) -> Structure:
        """Of operands for one call."""
        found = Structure(False)
        found.operands = operands
        return found

    def holds(self) -> bool:
        """Whether nothing has changed that the operands were read from."""
        for mapping, name, value in self._slots:
            if mapping.get(name) is not value:
                return False
        for tensor, dtype, device, shape in self._tensors:
            if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device:
                return False
        return self._modules_hold()

    def substituted(self) -> _op.Operands | None:
        """The operands with the tensors that stand in for parameters now (`torch.func.functional_call`); None where
        they do not look like those, or where something else has changed."""
        kept = self.operands
        if kept is None or len(self._slots) != 2 * len(kept.layers) or not self._modules_hold():
            return None  # norms and parameters of activations are tensors too
        values = [mapping.get(name) for mapping, name, _ in self._slots]
        for value, (_, _, like) in zip(values, self._slots):
            if value is None or like is None:
                if value is not like:
                    return None
            elif value.dtype is not like.dtype or value.shape != like.shape or value.device != like.device:
                return None
        layers = [
            layer._replace(weight=cast(Tensor, weight), bias=bias)
            for weight, bias, layer in zip(values[::2], values[1::2], kept.layers)
        ]
        operands = _op.Operands(layers)
        operands.decisions = kept.decisions
        return operands

    def _modules_hold(self) -> bool:
        if any_global_hook():
            return False
        for mapping, name, value in self._same:
            if mapping.get(name) is not value:
                return False
        for mapping, children in self._children:
            if list(mapping.values()) != children:
                return False
        for attributes in self._without:
            if "forward" in attributes:
                return False
            for name in _HOOKS:
                if attributes[name]:
                    return False
        for module, kind in self._kinds:
            if module.__class__ is not kind:
                return False
        for kind, forward in self._forwards.items():
            if kind.forward is not forward:
                return False
        return True

    # -- what `holds` looks at

    def watch(self, module: nn.Module, *attributes: str) -> None:
        """The class of a module, its hooks, and attributes of it that are no parameters."""
        if not self.kept:
            return
        self._without.append(module.__dict__)
        self._kinds.append((module, module.__class__))
        self._forwards[type(module)] = type(module).forward
        self._same += [(module.__dict__, name, module.__dict__.get(name)) for name in attributes]

    def watch_children(self, module: nn.Module) -> None:
        """Which modules a container holds."""
        self._children.append((module._modules, list(module._modules.values())))

    def watch_child(self, module: nn.Module, name: str) -> None:
        """Which module a module holds under a name."""
        self._same.append((module._modules, name, module._modules.get(name)))

    def watch_tensor(self, module: nn.Module, name: str) -> None:
        """A parameter (or buffer) of a module; what is computed anew at each call is read anew."""
        if not self.kept:
            return
        mapping = module._parameters if name in module._parameters else module._buffers
        value = mapping.get(name)
        self._slots.append((mapping, name, value))
        if value is None:
            self.kept &= name in mapping
        else:
            # tensors that stand in for parameters during a call (torch.func) are not held beyond it
            self.kept &= type(value) is nn.Parameter or mapping is module._buffers
            self._tensors.append((value, value.dtype, value.device, value.shape))


def read(net: nn.Module, norms: list[nn.Module], containers: tuple[Callable, ...], kept: bool) -> Structure:
    """The structure of `net`, a sequence of layers with a forward of `containers`, and of the `norms` behind the first
    of them; `kept`: whether it may be wanted at a later call."""
    found = Structure(kept)
    layers: list[Layer] = []
    found.reason = _read_layers(net, containers, found, layers) or _read_norms(net, norms, found, layers)
    found.kept &= not found.reason
    if not found.reason:
        found.operands = _op.Operands(layers)
    return found


def _read_layers(net: nn.Module, containers, found: Structure, layers: list[Layer]) -> str:
    if type(net).forward not in containers:
        return f"its net is {type(net).__qualname__}, with a forward of its own"
    if has_hooks(net) or any_global_hook():
        return "there are hooks, which a whole network would not call"
    found.watch(net, "skips", "_norms")
    found.watch_children(net)
    skips = getattr(net, "skips", ())
    for i, module in enumerate(net.children()):
        if not isinstance(module, FusedLayer) or type(module).forward not in OUR_FORWARDS:
            return f"{type(module).__name__} is not one of the fused layers"
        if has_hooks(module):
            return "a layer has hooks, which a whole network would not call"
        if reason := module.why_called():
            return f"{type(module).__name__}: {reason}"
        layers.append(Layer(*module.operands(), skip=bool(skips) and skips[i]))
        found.watch(module, "activation", "_tensor_names")
        holder: nn.Module = module
        if not isinstance(module, FusedLinear):
            found.watch_child(module, "linear")
            holder = cast(nn.Module, module.linear)
            found.watch(holder)
        for name in ("weight", "bias"):
            found.watch_tensor(holder, name)
        for name in module._tensor_names:
            found.watch_tensor(module, name)
    return ""


def _read_norms(net: nn.Module, norms: list[nn.Module], found: Structure, layers: list[Layer]) -> str:
    if (held := getattr(net, "_norms", (None,))[0]) is not None:
        found.watch_children(held)
    for i, module in enumerate(norms):
        kind = _KINDS.get(type(module))
        if reason := _why_not_norm(module, kind, cast(FusedLayer, net[i])):  # type: ignore[index]
            return f"layer {i}: {reason}"
        found.watch(module, "eps", "normalized_shape")
        for name in module._parameters:  # an RMSNorm has no bias
            found.watch_tensor(module, name)
        norm = Norm(cast(str, kind), module.weight, getattr(module, "bias", None), float(module.eps))  # type: ignore[arg-type]
        layers[i] = layers[i]._replace(norm=norm)
    return ""


def _why_not_norm(module: nn.Module, kind: str | None, layer: FusedLayer) -> str:
    """Why what stands behind a layer cannot be part of a whole network; empty where it can."""
    if kind is None:
        names = " or ".join(f"nn.{kind.__name__}" for kind in _KINDS)
        return f"{type(module).__name__} behind it is no {names}"
    name = NORMS[kind].name
    if has_hooks(module):
        return f"its {name} has hooks, which a whole network would not call"
    if module.normalized_shape != (layer.output_features,):
        return f"its {name} is over {module.normalized_shape}, its output has {layer.output_features} columns"
    if module.eps is None:
        return f"its {name} has eps=None, which goes by the type of its input: give it a number"
    return ""
