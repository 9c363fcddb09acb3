"""The registry of codebases."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Codebase", "codebases", "eikonal", "grid", "laplacian", "register", "squares", "target"]

_FILES = (
    "sirens", "wavelets", "splits", "radiance", "surfaces", "physics", "modulated", "filters", "fields", "packages",
)  # fmt: skip
#: the width of a network in tests: several of everything, and no multiple of a vector
SMALL = 20
_found: dict[str, Codebase] = {}


@dataclass(frozen=True)
class Codebase:
    """A network of a public codebase.

    Attributes:
        name: what it is called here.
        source: the codebase.
        traps: what a replacement of layers meets there.
        make: makes the network, of the published width where it is given None.
        inputs: the arguments of a call, for so many rows.
        loss: what its users minimise, of the network and these arguments.
        rows: the rows of a batch.
        order: the highest derivative that a step of training takes, that of the weights counted as one.
        method: the method that takes the arguments.
        methods: all methods that its users call.
        fused: how many of its linear layers have a pointwise function behind them.
        pointwise: whether what stands behind those layers is pointwise throughout, so that all of them fuse.
        requires: the distribution that `make` imports, None where the network is written here.
    """

    name: str
    source: str
    traps: str
    make: Callable[..., nn.Module]
    inputs: Callable[[int], tuple]
    loss: Callable[[nn.Module, tuple], Tensor]
    rows: int
    order: int
    fused: int
    method: str = "forward"
    methods: tuple[str, ...] = ("forward",)
    pointwise: bool = True
    requires: str | None = None

    def small(self) -> nn.Module:
        """The same structure, of a width for tests."""
        return self.make(SMALL)

    @property
    def available(self) -> bool:
        """Whether what `make` imports is installed."""
        if self.requires is None:
            return True
        try:
            importlib.metadata.version(self.requires)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True


def register(**facts: Any) -> Callable[[Callable[[int | None], nn.Module]], Callable[..., nn.Module]]:
    """Decorates the function that makes a network; the keywords are the `Codebase`'s other attributes."""

    def decorate(make: Callable[[int | None], nn.Module]) -> Callable[..., nn.Module]:
        def of_width(width: int | None = None) -> nn.Module:
            return make(width)

        name = make.__name__.replace("_", "-")
        _found[name] = Codebase(name=name, make=of_width, **facts)
        return of_width

    return decorate


def codebases() -> dict[str, Codebase]:
    """All codebases by name."""
    for name in _FILES:
        importlib.import_module(f"{__package__}.{name}")
    return dict(_found)


# -- inputs and losses


def grid(columns: int, low: float = -1.0) -> Callable[[int], tuple]:
    """Points between `low` and 1."""

    def inputs(rows: int) -> tuple:
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(rows, columns, generator=generator) * (1 - low) + low,)

    return inputs


def _tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output.get("model_out", next(iter(output.values()))) if isinstance(output, dict) else output[0]
    return output


def target(shape: tuple[int, ...]) -> Tensor:
    """A fixed picture of this shape."""
    return torch.cos(torch.arange(math.prod(shape), dtype=torch.float32)).reshape(shape)


def squares(model: nn.Module, inputs: tuple) -> Tensor:
    """The mean square of the first output's distance from a fixed picture."""
    y = _tensor(model(*inputs))
    return (y - target(y.shape).to(y.device)).square().mean()


def eikonal(model: nn.Module, inputs: tuple) -> Tensor:
    """The distance, and the distance of its gradient's length from 1."""
    x = inputs[0].detach().clone().requires_grad_()
    y = _tensor(model(x, *inputs[1:]))[..., :1]
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    return y.abs().mean() + (g.norm(dim=-1) - 1).square().mean()


def laplacian(model: nn.Module, inputs: tuple) -> Tensor:
    """The mean square of the Laplacian of the first column."""
    x = inputs[0].detach().clone().requires_grad_()
    y = _tensor(model(x, *inputs[1:]))[..., :1]
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    terms = [torch.autograd.grad(g[..., i].sum(), x, create_graph=True)[0][..., i] for i in range(x.shape[-1])]
    return torch.stack(terms).sum(0).square().mean()
