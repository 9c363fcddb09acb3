"""Makes models that are written in plain PyTorch run on the fused operations: `fuse`, `unfuse`, `fused`.

```python
report = fused_inr.fuse(net, x)  # in place
print(report)
fused_inr.unfuse(net)  # as it was
```

How it works: inside the model's methods `F.linear` (matmul with a transposed weight, bmm, addmm, a convolution of width
1) returns a pre-activation that is not computed yet; the pointwise functions that follow extend its formula, until
anything else needs its value (`pending.py`). Nothing is captured, so hooks, changed attributes, `load_state_dict`,
`functional_call` and derivatives of any order are those of the model as it is at each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..ops.mlp import forget_derivatives
from .check import Compared, combined, floats, own_inputs, same_state
from .install import fused, install, installed, kind_of_call, uninstall
from .measure import WORTH, MeasuredChain, saved_bytes, side_by_side, slow_rows
from .memory import Memory, bucket
from .pending import Deferred, Region
from .report import FusedEntry, FusionReport, LeftEntry, SiteRecorder

__all__ = ["FusedEntry", "FusionReport", "LeftEntry", "fuse", "fused", "unfuse"]

_PREFER = ("speed", "always")


def fuse(
    model: nn.Module, sample_input: Any = None, methods: tuple[str, ...] = ("forward",), *, prefer: str = "speed"
) -> FusionReport:
    """Makes a model's linear layers and the pointwise functions behind them run as fused operations, in place.

    y = f(x W^T + b) becomes one operation for any f of pointwise functions, learnable parameters and splits into
    branches; a chain of such layers (LayerNorm and RMSNorm behind the activation included) becomes one whole-network
    operation. Parameters, buffers, attributes and `state_dict` are untouched; the model's class is replaced by a
    subclass made for it.

    Args:
        model: any module; what is compiled, scripted or wrapped for several processes is fused before that.
        sample_input: an input of the first of `methods`, or a tuple of its positional arguments. With it the fused
            model is compared with the original in values, gradients and second derivatives, and a layer that differs by
            more than rounding explains is left alone; without it nothing is compared or measured.
        methods: the methods that are fused; what other methods call stays as it is.
        prefer: "speed" measures each chain of layers on the sample and on fewer rows, and leaves those that the model's
            own functions compute faster, by their number of rows; "always" fuses whatever can be.

    Returns:
        A `FusionReport`: what is fused, as which activation, how far it differs, how fast it is, and what is left, and
        why.

    Types: all floating-point types, and complex pre-activations. Differentiable as the original, any number of times in
    reverse mode; under torch.func.vmap, in forward mode and under torch.compile the original's own functions run.

    Raises:
        TypeError: a model that is no module, or is compiled or scripted.
        ValueError: a model that is fused already, a method that it does not have, another word for `prefer`.
        RuntimeError: a model that is not the same twice on the sample, fused or not.
        Whatever the model raises on the sample; the model is then as it was.
    """
    methods = _checked(model, methods, prefer)
    args = sample_input if isinstance(sample_input, tuple) else () if sample_input is None else (sample_input,)
    report = FusionReport(type(model).__qualname__)
    if not args:
        install(model, methods)
        report.notes.append("no sample input: nothing was compared or measured")
        return report
    original = getattr(model, methods[0])
    compared = Compared(model, original, args)
    memory = install(model, methods)
    try:
        _examine(model, methods[0], original, args, memory, compared, prefer, report)
    except BaseException:
        uninstall(model)
        raise
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Takes back what `fuse` did: the model's class is its own again.

    Raises:
        ValueError: a model that is not fused.
    """
    if installed(model) is None:
        raise ValueError(f"model: this {type(model).__qualname__} is not fused")
    if "_fused_inr" not in vars(type(model)):
        raise ValueError(
            f"model: its class {type(model).__qualname__} was changed after it was fused (FSDP?); undo that first"
        )
    uninstall(model)
    return model


def _checked(model: Any, methods: Any, prefer: str) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected an nn.Module, got {type(model).__qualname__}; fused_inr.fused() serves functions"
        )
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError("model: it is compiled or scripted; fuse it first, then compile or script it")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError("model: it is wrapped for several processes or devices; fuse model.module")
    if installed(model) is not None:
        raise ValueError(f"model: this {type(model).__qualname__} is fused already; unfuse it first")
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    if not methods:
        raise ValueError("methods: name at least one method")
    for name in methods:
        if not callable(getattr(type(model), name, None)):
            raise ValueError(f"methods: {type(model).__qualname__} has no method {name!r}")
        if name in vars(model):
            raise ValueError(f"methods: this model has a {name!r} of its own among its attributes; delete it first")
    if prefer not in _PREFER:
        raise ValueError(f"prefer: expected one of {', '.join(map(repr, _PREFER))}, got {prefer!r}")
    return methods


def _examine(
    model, method, original, args, memory: Memory, compared: Compared, prefer: str, report: FusionReport
) -> None:
    call = getattr(model, method)
    recorder = SiteRecorder(model)
    memory.recorder = recorder
    with same_state(model), torch.no_grad():
        call(*args)  # sites learn which values are wanted by more than what follows
    recorder.chains.clear()
    forget_derivatives()
    with same_state(model), recorder.listening(), torch.enable_grad():
        call(*args)
    memory.recorder = None
    _leave_what_differs(call, memory, compared)
    chains = _chains(recorder, memory)
    entries = _entries(recorder, chains, memory)
    if prefer == "speed":
        _leave_what_is_slow(model, original, call, args, chains, entries, memory, report)
    for chain, of in zip(chains, entries):
        _measure_error(chain, of)
    report.fused = [e for of in entries for e in of if e is not None]
    placed = {
        site.position
        for chain, of in zip(chains, entries)
        if any(of)
        for node in chain.nodes
        for site in (node.root.site, node.root.partner)
        if site is not None
    }
    for position, where in sorted(recorder.where.items()):
        if position not in placed:
            reason = (
                memory.site(position).off
                or memory.site(position).note
                or recorder.reasons.get(position)
                or "nothing pointwise follows"
            )
            report.left.append(LeftEntry(where, reason))
    forget_derivatives()
    report.errors, report.bounds = dict(compared.errors), compared.explained()
    missing = [k for k in ("gradients", "second derivatives") if k not in compared.expected]
    report.notes += [f"the original has no {k} on the sample: not compared" for k in missing]
    parameters = list(model.parameters())
    with same_state(model), torch.enable_grad():
        report.saved = (
            saved_bytes(lambda: original(*args), parameters),
            saved_bytes(lambda: call(*args), parameters),
        )


def _leave_what_differs(call, memory: Memory, compared: Compared) -> None:
    reason = compared.why(call)
    if not reason:
        return
    for site in memory.sites:
        memory.chosen = frozenset((site.position,))
        if found := compared.why(call):
            site.off = found
    memory.chosen = None
    reason = compared.why(call)
    if reason:
        for site in memory.sites:
            site.off = site.off or reason
        if left := compared.why(call):
            raise RuntimeError(f"the model is not the same twice, fused or not: {left}")


def _chains(recorder: SiteRecorder, memory: Memory) -> list[MeasuredChain]:
    """The chains of the sample that stay fused, each once."""
    found = []
    for nodes, _ in recorder.chains:
        nodes = [node for node, _ in nodes]
        if all(not n.root.site.off for n in nodes):
            x = nodes[0].root.x
            x = x.result if isinstance(x, Deferred) else x
            if x is not None:
                found.append(MeasuredChain(nodes, x))
    return found


def _entries(recorder: SiteRecorder, chains: list[MeasuredChain], memory: Memory) -> list[list[FusedEntry | None]]:
    found: list[list[FusedEntry | None]] = []
    networks = 0
    decisions = {id(nodes[0][0]): (nodes, decision) for nodes, decision in recorder.chains}
    for chain in chains:
        pairs, decision = decisions[id(chain.nodes[0])]
        networks += decision is not None
        of: list[FusedEntry | None] = []
        for node, activation in pairs:
            if node.state.bare:
                of.append(None)
                continue
            backend = (
                decision.backend
                if decision is not None
                else backends.choose(activation, chain.x.real, node.root.weight.real, record=False)[0]
            )
            name = activation.name if activation.map.generated else "own"
            where = recorder.where.get(node.root.site.position, "")
            of.append(
                FusedEntry(
                    where, node.state.written(node.leaves), name, backend, networks if decision is not None else None
                )
            )
        found.append(of)
    return found


def _leave_what_is_slow(model, original, call, args, chains, entries, memory: Memory, report: FusionReport) -> None:
    region = Region(Memory())
    gradients = any(p.requires_grad for p in model.parameters())
    with same_state(model):
        for chain, of in zip(chains, entries):
            slow: dict[bool, frozenset[int]] = {}
            seconds = None
            for mode in (False, True) if gradients else (False,):
                with torch.set_grad_enabled(mode):
                    slow[mode], seconds = slow_rows(chain, region, mode)
            if seconds is not None:
                for e in filter(None, of):
                    e.speed = seconds[0] / seconds[1]
                    e.slower_below = _rows_below(slow[max(slow)])
            for node in chain.nodes:
                for site in filter(None, (node.root.site, node.root.partner)):
                    site.slow = slow
            if seconds is not None and bucket(chain.rows) in slow[max(slow)]:
                of[:] = [None] * len(of)
                for node in chain.nodes:
                    node.root.site.note = (
                        f"the model's own functions are faster: {seconds[0] * 1e3:.3g} ms, fused "
                        f"{seconds[1] * 1e3:.3g} ms on {chain.rows} rows"
                    )
    memory.measured = True
    device = next(
        (t.device for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)), torch.device("cpu")
    )
    for mode in (False, True) if gradients else (False,):
        pair = _time(model, original, call, args, device, mode)
        if pair[1] > pair[0] / WORTH:  # twice, as a machine may have been busy
            pair = min(pair, _time(model, original, call, args, device, mode), key=lambda p: p[1] / p[0])
            with torch.set_grad_enabled(mode):
                kind = kind_of_call(args)
            if pair[1] > pair[0] / WORTH and kind is not None and kind not in memory.idle:
                memory.idle.add(kind)
                what = "forward and backward" if mode else "forward"
                report.notes.append(
                    f"{what}: the model as a whole is not faster fused ({pair[0] * 1e3:.3g} ms, fused "
                    f"{pair[1] * 1e3:.3g} ms), and stays as it was for such a number of rows"
                )
                pair = pair[0], pair[0]
        if mode:
            report.training = pair
        else:
            report.inference = pair


def _rows_below(slow: frozenset[int]) -> int:
    return 4 ** max(slow) // 2 if slow else 0


def _time(model, original, call, args, device: torch.device, gradients: bool) -> tuple[float, float]:
    def step(function):
        def run():
            given, _ = own_inputs(args)
            if not gradients:
                with torch.no_grad():
                    return function(*given)
            outputs = [t for t in floats(function(*given)) if t.requires_grad]
            wanted = [p for p in model.parameters() if p.requires_grad]
            return torch.autograd.grad(combined(outputs, 1), wanted, allow_unused=True) if outputs else None

        return run

    with same_state(model), torch.enable_grad():
        before, after = side_by_side(step(original), step(call), device=device)
    return before, after


def _measure_error(chain: MeasuredChain, of: list[FusedEntry | None]) -> None:
    if not any(of):
        return
    region = Region(Memory())
    with torch.no_grad():
        expected = chain.original(region, chain.x).detach()
        found = chain.fused(region, chain.x).detach()
    size = float(expected.abs().max()) if expected.numel() else 0.0
    for e in filter(None, of):
        e.error = float((found - expected).abs().max()) / (size or 1.0) if expected.numel() else 0.0
