"""What this package asks PyTorch's private interface: which transformations run, and how a Function is applied.

Everything private that the operations, layers and models use is here, so that a new release of PyTorch is read against
one file (`docs/facts.md` tells which release does what).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import utils as _functorch

_F = TypeVar("_F", bound=Callable)
_PLAIN = (Tensor, nn.Parameter)
_PLAIN_OR_NONE = frozenset((*_PLAIN, type(None)))

#: Whether any torch.func transformation is active.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: Whether a tensor is a cotangent of `is_grads_batched`: PyTorch's older vmap, which no state tells of.
is_batched_cotangent: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
#: Whether hooks of all modules are registered (`nn.modules.module.register_module_forward_hook` and its kin).
any_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook


def constant_to_dynamo(function: _F) -> _F:
    """Marks a function whose result torch.compile takes as a constant and does not trace."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# -- applying a Function


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Does `function.apply`, without the 25 us of its signature inspection where no transformation is active."""
    if transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*_functorch.unwrap_dead_wrappers(args))  # type: ignore[misc]


def apply_to_parameters(function: type[torch.autograd.Function], x: Tensor, *args: Any) -> Any:
    """Does `apply` where all tensors but x are parameters: only x may come from a transformation that has ended."""
    if transforms_active():
        return function.apply(x, *args)
    return super(torch.autograd.Function, function).apply(*_functorch.unwrap_dead_wrappers((x,)), *args)  # type: ignore[misc]


def exactly(device: torch.device, function: Callable, *args: Any) -> Any:
    """Calls `function(*args)` with autocast off: it acts on what comes in; our own float32 products stay float32."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return function(*args)
    return function(*args)


def all_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Tells whether no tensor is of a subclass, which would look at operations."""
    return _PLAIN_OR_NONE.issuperset(map(type, tensors))


def unwatched(*tensors: Tensor | None) -> bool:
    """Tells whether nothing looks at operations (a mode, a subclass, a transformation, the profiler, Dynamo).

    A backend can be called directly then: the dispatcher takes 10 to 20 us to pass operands on to Python.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or transforms_active()
        or torch.autograd._profiler_enabled()
    ):
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or is_batched_cotangent(t)):
            return False
    return True


def wanted(ctx: Any, is_tensor: Sequence[bool], group_of: Sequence[int] | None = None) -> list[bool]:
    """Tells which of the inputs the running backward needs a gradient of.

    `ctx.needs_input_grad` says what requires one; an Eikonal step's first backward asks for the coordinates' alone.
    `group_of` numbers inputs whose gradients come together: where the engine wants one of them, it is not asked for the
    others, which takes a microsecond each.
    """
    needs = list(ctx.needs_input_grad)
    if torch.compiler.is_compiling():  # first: Dynamo's context of torch 2.11 has no next_functions to ask for
        return needs
    nodes = getattr(ctx, "next_functions", None)
    if nodes is None:
        return needs
    position = 0  # next_functions counts tensors only
    found = -1  # a group of which one is wanted
    for i, tensor in enumerate(is_tensor):
        if tensor:
            node = nodes[position][0]
            position += 1
            if needs[i] and node is not None and (group_of is None or group_of[i] != found):
                try:
                    needs[i] = torch._C._will_engine_execute_node(node)
                except RuntimeError:  # a leaf of torch.autograd.grad: the engine does not say, so it is wanted
                    needs[i] = True
                if needs[i] and group_of is not None:
                    found = group_of[i]
    return needs


def multiplied(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Multiplies each tensor by one number in few kernels; never in place."""
    return list(torch._foreach_mul(list(tensors), factor))


# -- overrides of functions

#: Within it no subclass of Tensor is asked before a function runs; no mode either.
without_subclasses = torch._C.DisableTorchFunctionSubclass
without_overrides = torch._C.DisableTorchFunction
#: The pair of hooks that saved tensors go through now, or None.
_top_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def saved_tensor_hooks() -> Any:
    """Returns the hooks that tensors saved for the backward go through now (`torch.autograd.graph`, checkpoints)."""
    return _top_hooks(True)


class _Arguments(threading.local):
    """What is done, in this thread, to the arguments of every Function before it is applied."""

    def __init__(self) -> None:
        self.stack: list[Callable[[Any], Any]] = []


_arguments = _Arguments()
_unwrap_dead_wrappers = _functorch.unwrap_dead_wrappers


def _unwrap(args: tuple) -> tuple:
    if _arguments.stack:
        args = _arguments.stack[-1](args)
    return _unwrap_dead_wrappers(args)


@contextmanager
def arguments_of_functions(change: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block the arguments of every `autograd.Function` that this thread applies go through `change`.

    `Function.apply` looks at no override, and `apply` may have been bound long ago (`trunc_exp = _TruncExp.apply`);
    what it calls first in every case is `unwrap_dead_wrappers`.
    """
    _functorch.unwrap_dead_wrappers = _unwrap
    _arguments.stack.append(change)
    try:
        yield
    finally:
        _arguments.stack.pop()


# -- which transformations run


@constant_to_dynamo
def inside_transform() -> bool:
    """Tells whether a torch.func transformation is active, also of a function that torch.compile traces."""
    return torch._C._functorch.maybe_current_level() is not None


def _levels(kind: Any) -> int:
    # not `retrieve_all_functorch_interpreters`, which makes an object for each
    return sum(i.key() == kind for i in torch._C._functorch.get_interpreter_stack() or ())


def under_vmap() -> bool:
    """Tells whether torch.func.vmap is active."""
    return _levels(torch._C._functorch.TransformType.Vmap) > 0


def forward_levels() -> int:
    """Counts the active torch.func.jvp (forward mode) transformations."""
    return _levels(torch._C._functorch.TransformType.Jvp)


def forward_mode() -> bool:
    """Tells whether forward-mode derivatives are computed."""
    # PyTorch switches it off while it runs a Function's own jvp
    return torch.autograd.forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


# -- modules that are imported later


class _Afterwards(importlib.abc.MetaPathFinder):
    """Finds one module as others do, and calls a function when it has been imported."""

    def __init__(self, name: str, function: Callable[[], None]):
        self.name, self.function = name, function

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute, function = spec.loader.exec_module, self.function

            def exec_module(module: Any) -> None:
                execute(module)
                function()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, function: Callable[[], None]) -> None:
    """Calls `function` once the module has been imported, at once where it has been."""
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Afterwards(name, function))
