"""`torch.compile(model, backend="fused_inr")`: the graph that Dynamo captures, its layers fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .install import run
from .memory import Memory

__all__ = ["backend"]


def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Tensor], **options: Any) -> Callable[..., Any]:
    """The entry point `fused_inr` of torch.compile's backends.

    The captured graph runs as it is, function by function, in a region (`fused_inr.fused`): linear layers and the
    pointwise functions behind them as fused operations, chains of layers as whole networks. Nothing is traced further,
    so that the result is differentiable any number of times, and a number of rows that changes compiles once more and
    not again.
    Where Dynamo breaks the graph a chain of layers ends.

    Raises:
        TypeError: options; the backend has none.
    """
    if options:
        raise TypeError(f"backend 'fused_inr' has no options, got {', '.join(sorted(options))}")
    memory = Memory()
    forward = graph.forward

    def call(*args: Any) -> Any:
        return run(memory, forward, *args)

    return call
