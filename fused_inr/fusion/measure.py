"""Times chains of layers, and whole models, fused and as the model wrote them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import bucket
from .pending import Deferred, Region, Root

__all__ = ["WORTH", "MeasuredChain", "saved_bytes", "side_by_side", "slow_rows"]

#: Measurements of each, and seconds after which no more are made.
_TIMES, _SECONDS = 5, 1.0
#: A chain of layers runs fused where it takes at most this much of the time of the model's own functions.
WORTH = 0.98


class MeasuredChain:
    """Layers that ran as one chain on the sample, ready to run again on some of its rows.

    Args:
        nodes: of each layer its formula.
        x: the rows of the first layer.
    """

    def __init__(self, nodes: list[Deferred], x: Tensor):
        self.nodes, self.x = nodes, x.detach()
        self.gradients = nodes[0].root.grad

    @property
    def rows(self) -> int:
        """Rows of the sample."""
        return self.x.numel() // max(1, self.x.shape[1 if self.nodes[0].root.channels else -1])

    def some(self, rows: int) -> Tensor | None:
        """About so many of the rows; None where there are not so many, or a group of weights belongs to each."""
        x, root = self.x, self.nodes[0].root
        if rows == self.rows:
            return x
        if x.dim() == 2 and root.weight.dim() == 2:
            return x[:rows]
        if x.dim() == 3:
            each = rows // x.shape[0]
            return None if each < 1 else x[:, :, :each] if root.channels else x[:, :each]
        return None

    def fused(self, region: Region, x: Tensor) -> Tensor:
        """The chain's value of other rows, by the fused operations."""
        node: Any = x
        for old in self.nodes:
            node = _again(old, node, x)
        return region.value(node)

    def original(self, region: Region, x: Tensor) -> Tensor:
        """The same by the functions that the model calls."""
        for old in self.nodes:
            node = _again(old, x, x)
            x = region.normed(old.norm, region.by_pytorch(node))
        return x

    def times(self, region: Region, rows: int, gradients: bool) -> tuple[float, float] | None:
        """Seconds by the model's functions, and fused: a forward with its backward where `gradients` is set."""
        x = self.some(rows)
        if x is None:
            return None
        x = x.detach().requires_grad_(gradients and len(self.nodes) > 1)
        wanted = [x] if x.requires_grad else []
        if gradients:
            for node in self.nodes:
                wanted += [t for t in (node.root.weight, node.root.bias, *node.leaves) if _wants(t)]
        before, after = side_by_side(
            *(_step(f, region, x, wanted) for f in (self.original, self.fused)), device=x.device
        )
        return before, after


def _wants(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


def _again(old: Deferred, x: Any, rows: Tensor) -> Deferred:
    """The same layer of other rows, with gradients as they are recorded now."""
    r, grad = old.root, torch.is_grad_enabled()
    if r.channels:
        shape: tuple = (*rows.shape[:1], r.shape[1], rows.shape[2])
    else:
        shape = (*rows.shape[:-1], r.shape[-1])
    root = Root(x, r.weight, r.bias, r.compute, shape, r.dtype, r.device, r.site, grad, r.cast, r.channels)
    root.branches = r.branches
    node = Deferred(root, old.state, old.leaves)
    node.norm = old.norm
    return node


def _step(function: Callable, region: Region, x: Tensor, wanted: list[Tensor]) -> Callable[[], Any]:
    def step():
        if not wanted:
            with torch.no_grad():
                return function(region, x)
        y = function(region, x)
        y = torch.view_as_real(y) if y.is_complex() else y
        grads = torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True, retain_graph=True)
        return y, grads

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(*steps: Callable[[], Any], device: torch.device) -> tuple[float, ...]:
    """Median seconds of each, measured in turn after a call of each; fewer times where one call takes long."""
    found: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    began = time.perf_counter()
    while len(found[0]) < _TIMES and (len(found[0]) < 2 or time.perf_counter() - began < _SECONDS):
        for step, times in zip(steps, found):
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            times.append(time.perf_counter() - start)
    return tuple(statistics.median(times) for times in found)


def slow_rows(
    chain: MeasuredChain, region: Region, gradients: bool
) -> tuple[frozenset[int], tuple[float, float] | None]:
    """The numbers of rows (`bucket`) up to the sample's at which the model's functions are faster; seconds there."""
    rows, slow = chain.rows, set()
    at_sample = chain.times(region, rows, gradients)
    if at_sample is None:
        return frozenset(), None
    if at_sample[1] > WORTH * at_sample[0]:
        slow.add(bucket(rows))
    few = rows // 4
    fast = 0
    # fewer rows are slower by what a call costs: two sizes in a row that are faster settle the larger ones
    probes = []
    while few >= 4:
        probes.append(few)
        few //= 4
    for few in reversed(probes):
        times = chain.times(region, few, gradients)
        if times is None:
            continue
        if times[1] > WORTH * times[0]:
            slow.add(bucket(few))
            fast = 0
        else:
            fast += 1
            if fast == 2:
                break
    if (slow and bucket(rows) not in slow) or (probes and slow):
        # what is fewer than the fewest that were looked at is not faster
        least = min(slow)
        if all(b in slow or b < least for b in range(1, least + 1)):
            slow |= set(range(least))
    return frozenset(slow), at_sample


def saved_bytes(step: Callable[[], Any], parameters: list[Tensor]) -> int:
    """Bytes of the tensors that a forward keeps for its backward, parameters apart; each memory once."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = step()
    del kept
    return sum(seen.values())
