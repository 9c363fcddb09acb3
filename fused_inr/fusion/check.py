"""Compares a model with regions around its methods with the model as it was: values, gradients, second derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Compared", "combined", "floats", "own_inputs", "quantities", "same_state"]

#: Roundings of every parameter and input that a difference may come to.
_ROUNDINGS = 8.0
_FLOOR = 32.0


@contextlib.contextmanager
def same_state(model: nn.Module) -> Iterator[None]:
    """Within the block the model may change its buffers and draw random numbers: afterwards all is as it was."""
    kept = {name: b.detach().clone() for name, b in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, b in model.named_buffers():
                    if name in kept and kept[name].shape == b.shape and not torch.equal(kept[name], b):
                        b.copy_(kept[name])


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in a value, complex ones as pairs."""
    found = [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]
    found = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
    return [t for t in found if t.is_floating_point()]


def own_inputs(args: tuple) -> tuple[tuple, list[Tensor]]:
    """The arguments with leaves of their own for floating-point tensors."""
    leaves: list[Tensor] = []

    def own(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1]

    return torch.utils._pytree.tree_map_only(Tensor, own, args), leaves


def combined(tensors: list[Tensor], seed: int) -> Tensor:
    """The tensors against fixed random cotangents."""
    generator = torch.Generator().manual_seed(seed)
    total = None
    for t in tensors:
        weights = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
        part = (t * weights).sum() / max(1, t.numel()) ** 0.5
        total = part if total is None else total + part
    assert total is not None
    return total


def quantities(model: nn.Module, call: Callable, args: tuple) -> dict[str, list[Tensor]]:
    """Of a call its values, its gradients, and gradients of its gradients, as far as it has them.

    Gradients are those of a fixed random combination of the outputs with respect to inputs and parameters;
    second derivatives those of a combination of the gradients of the inputs (of the parameters, where there are none).
    """
    args, leaves = own_inputs(args)
    found: dict[str, list[Tensor]] = {}
    with same_state(model), torch.enable_grad():
        outputs = floats(call(*args))
        found["values"] = [t.detach().clone() for t in outputs]
        parameters = [p for p in model.parameters() if p.requires_grad]
        outputs = [t for t in outputs if t.requires_grad]
        wanted = [*leaves, *parameters]
        if not outputs or not wanted:
            return found
        first = torch.autograd.grad(combined(outputs, 1), wanted, create_graph=True, allow_unused=True)
        found["gradients"] = _real(first, wanted)
        of = [g for g in first[: len(leaves)] if g is not None and g.requires_grad]
        of = of or [g for g in first[len(leaves) :] if g is not None and g.requires_grad]
        if of:
            try:
                second = torch.autograd.grad(combined(floats(of), 2), wanted, allow_unused=True)
            except RuntimeError as error:
                if "differentiate" not in str(error) and "derivative" not in str(error):
                    raise
                return found
            found["second derivatives"] = _real(second, wanted)
    return found


def _real(grads: Any, of: list[Tensor]) -> list[Tensor]:
    """Gradients without their graphs, zeros where there are none, complex ones as pairs."""
    found = [torch.zeros_like(t) if g is None else g.detach().resolve_conj() for g, t in zip(grads, of)]
    return [torch.view_as_real(t) if t.is_complex() else t for t in found]


class Compared:
    """A model's quantities on a sample, with the differences that rounding explains.

    Args:
        model: as it was.
        call: the method that is looked at.
        args: the sample.
    """

    def __init__(self, model: nn.Module, call: Callable, args: tuple):
        self.model, self.args = model, args
        self.expected = quantities(model, call, args)
        self.bounds: dict[str, list[float]] = {}
        with _changed_parameters(model):
            changed = torch.utils._pytree.tree_map_only(Tensor, lambda t: _changed(t, 4), args)
            moved = quantities(model, call, changed)
        for kind, tensors in self.expected.items():
            self.bounds[kind] = []
            for a, b in zip(tensors, moved.get(kind, tensors)):
                eps = torch.finfo(a.dtype).eps
                size = float(a.abs().max()) if a.numel() else 0.0
                bound = _ROUNDINGS * _distance(a, b) + _FLOOR * eps * size
                self.bounds[kind].append(bound)
        self.errors: dict[str, float] = {}

    def why(self, call: Callable) -> str:
        """Why a call is not the same; empty where it is. `errors` has the relative differences afterwards."""
        found = quantities(self.model, call, self.args)
        self.errors = {}
        reasons = []
        for kind, tensors in self.expected.items():
            given = found.get(kind)
            if given is None or len(given) != len(tensors):
                reasons.append(f"it has no {kind}")
                continue
            size = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0) or 1.0
            floor = _FLOOR * max(torch.finfo(t.dtype).eps for t in tensors) * size if tensors else 0.0
            worst = 0.0
            for a, b, bound in zip(tensors, given, self.bounds[kind]):
                if a.shape != b.shape or a.dtype != b.dtype:
                    reasons.append(f"its {kind} are {b.dtype} {list(b.shape)}, not {a.dtype} {list(a.shape)}")
                    continue
                distance = _distance(a, b)
                worst = max(worst, distance)
                if not distance <= max(bound, floor):
                    reasons.append(f"its {kind} differ by {distance:.1e}, where rounding explains {bound:.1e}")
            self.errors[kind] = worst / size
        return reasons[0] if reasons else ""

    def explained(self) -> dict[str, float]:
        """Of each kind the relative difference that rounding explains."""
        found = {}
        for kind, tensors in self.expected.items():
            size = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0) or 1.0
            found[kind] = max(self.bounds[kind], default=0.0) / size
        return found


def _distance(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, torch.zeros_like(a), (a - b).abs()).nan_to_num(float("inf"), float("inf")).max())


@contextlib.contextmanager
def _changed_parameters(model: nn.Module) -> Iterator[None]:
    """Within the block every parameter is changed by one rounding; afterwards they have their bits again.

    In place, past autograd: a model may put its parameters into attributes of its own while it runs.
    """
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        for p, value in kept:
            p.data.copy_(_changed(value, 3))
        yield
    finally:
        for p, value in kept:
            p.data.copy_(value)


def _changed(t: Tensor, seed: int) -> Tensor:
    """The tensor with every number changed by one rounding, up or down."""
    if not (t.is_floating_point() or t.is_complex()):
        return t
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, t.shape, generator=generator).to(t.device) * 2 - 1
    eps = torch.finfo(t.dtype).eps
    return (t.detach() * (1 + eps * signs)).to(t.dtype).requires_grad_(t.requires_grad)
