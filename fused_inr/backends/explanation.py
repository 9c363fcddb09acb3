"""The record of what ran a call and why, for `explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import Activation
from ..network import NORMS, Layer

_recorded: ContextVar[list[Choice] | None] = ContextVar("fused_inr.backends.explain", default=None)


@dataclass(frozen=True)
class Choice:
    """What runs a call, why not the others, and the call in words."""

    call: str
    backend: str
    precision: str
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = "".join(f"\n    not {name}: {reason}" for name, reason in self.rejected)
        if not self.backend:
            return self.call
        return f"{self.call}: {self.backend} ({self.precision}){reasons}"


def records() -> list[Choice] | None:
    """Returns where `explain` of this thread writes; None where nobody asks (and in compiled functions)."""
    return None if torch.compiler.is_compiling() else _recorded.get()


def call_of_layer(activation: Activation, x: Tensor, weight: Tensor) -> str:
    """Says which layer is computed, in words."""
    shape = f"[{', '.join(map(str, x.shape))}] x [{', '.join(map(str, weight.shape))}]"
    return f"linear_act {shape} {x.dtype} {activation!r}"


def call_of_network(x: Tensor, layers: Sequence[Layer]) -> str:
    """Says which whole network is computed, in words."""
    widths = " -> ".join(str(layer.weight.shape[0] // layer.activation.branches) for layer in layers)
    names = [*(layer.activation.name for layer in layers)]
    names += [NORMS[layer.norm.kind].name for layer in layers if layer.norm is not None]
    shape = ", ".join(map(str, x.shape))
    return f"whole network [{shape}] -> {widths} {x.dtype} ({', '.join(dict.fromkeys(names))})"


def record_layers(reason: str) -> None:
    """Tells `explain` why a network runs layer by layer."""
    if (found := records()) is not None:
        found.append(Choice(f"layer by layer: {reason}", "", "", ()))


def explain(function: Callable, *args, **kwargs) -> str:
    """Runs `function(*args)` (a module, say) without gradients and tells, a line a call, what ran it and why.

    Raises:
        ValueError: no fused operation ran.
    """
    found: list[Choice] = []
    token = _recorded.set(found)
    try:
        with torch.no_grad():
            function(*args, **kwargs)
    finally:
        _recorded.reset(token)
    lines = [str(choice) for choice in found]
    if not lines:
        raise ValueError(
            "explain: no fused_inr operation ran in this call; pass a module (and its input) that uses one"
        )
    return "\n".join(lines)
