"""Puts regions around a model's methods, and takes them away again."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..pytorch import forward_mode, transforms_active
from .memory import Memory, bucket
from .pending import Region, current

__all__ = ["fused", "install", "installed", "kind_of_call", "uninstall"]


class _Installed:
    """What `fuse` has put into a model's class.

    Attributes:
        kind: the class that the model had.
        methods: the methods that are regions.
        memory: of the sites.
    """

    def __init__(self, kind: type[nn.Module], methods: tuple[str, ...], memory: Memory):
        self.kind, self.methods, self.memory = kind, methods, memory


def installed(model: Any) -> _Installed | None:
    """What `fuse` has put into the model; None where it has not."""
    return getattr(type(model), "_fused_inr", None)


def run(memory: Memory, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls a function in a region of its own, or in the region that runs already."""
    if torch.compiler.is_compiling() or transforms_active() or forward_mode() or current() is not None:
        return function(*args, **kwargs)
    kind = None
    if memory.measured:
        kind = kind_of_call(args)
        if kind in memory.idle:
            return function(*args, **kwargs)
    with Region(memory) as region:
        result = function(*args, **kwargs)
    if kind is not None and not region.pendings:
        memory.idle.add(kind)
    return region.real(result)


def kind_of_call(args: tuple) -> tuple[bool, int] | None:
    """What it depends on whether a model's own functions are faster: gradients, and the rows of the first tensor."""
    for a in args:
        if isinstance(a, Tensor):
            return torch.is_grad_enabled(), bucket(a.numel() // max(1, a.shape[-1])) if a.dim() else 0
    return None


def _wrapped(function: Callable, memory: Memory) -> Callable:
    @functools.wraps(function)
    def method(self, *args, **kwargs):
        return run(memory, function, self, *args, **kwargs)

    return method


def _make(kind: type, methods: tuple[str, ...], memory: Memory) -> type:
    attributes: dict[str, Any] = {name: _wrapped(getattr(kind, name), memory) for name in methods}
    attributes["_fused_inr"] = _Installed(kind, methods, memory)

    made: type

    def reduce(self, protocol):
        """Copies and pickles as the model's own class does, fused again where it is read."""
        how, arguments, *state = super(made, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
        arguments = tuple([kind if a is made else a for a in arguments])
        return _again, (kind, methods, how, arguments), *state

    attributes["__reduce_ex__"] = reduce
    attributes["__module__"], attributes["__qualname__"] = kind.__module__, kind.__qualname__
    attributes["__doc__"] = kind.__doc__
    made = type(kind.__name__, (kind,), attributes)
    return made


def _again(kind: type, methods: tuple[str, ...], how: Callable, arguments: tuple) -> Any:
    model = how(*arguments)
    model.__class__ = _make(kind, methods, Memory())
    return model


def install(model: nn.Module, methods: tuple[str, ...]) -> Memory:
    """Makes each method a region, by a subclass of the model's class made for it."""
    memory = Memory()
    model.__class__ = _make(type(model), methods, memory)
    return memory


def uninstall(model: nn.Module) -> None:
    """Gives the model its class back."""
    found = type(model).__dict__["_fused_inr"]
    model.__class__ = found.kind


class fused:
    """A block in which linear layers and the pointwise functions behind them run fused, in whatever model is called.

    ```python
    with fused_inr.fused():
        y = net(x)
    ```

    As a decorator it does the same for a function. What leaves the block other than as a result (variables that are
    used after it) are tensors whose values are computed. Nothing is measured: `fuse` is the way to leave what is faster
    as it is. A block inside of another, in a torch.func transformation, in forward mode or under torch.compile does
    nothing.
    """

    _memories: ClassVar[dict[Any, Memory]] = {}

    def __init__(self) -> None:
        frame = sys._getframe(1)
        self._memory = self._memories.setdefault((frame.f_code, frame.f_lineno), Memory())
        self._region: list[Region | None] = []

    def __enter__(self) -> None:
        idle = torch.compiler.is_compiling() or transforms_active() or forward_mode() or current() is not None
        region = None if idle else Region(self._memory)
        self._region.append(region)
        if region is not None:
            region.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        region = self._region.pop()
        if region is not None:
            region.__exit__(kind, error, trace)

    def __call__(self, function: Callable) -> Callable:
        """Makes a function a block."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            return run(self._memory, function, *args, **kwargs)

        return wrapped
