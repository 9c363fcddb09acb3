"""What `fuse` has found in a model, and what came of it."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from .memory import Site

__all__ = ["FusedEntry", "FusionReport", "LeftEntry", "SiteRecorder"]


@dataclass
class FusedEntry:
    """A linear layer with its activation that runs fused.

    Attributes:
        where: the layer's name in the model.
        formula: what follows the layer, of its pre-activation z.
        activation: the name of the registered activation that this is, or "own".
        backend: who computes it.
        network: the number of the whole-network operation that it is a layer of; None where it is an operation of its
            own.
        error: the largest difference from the model's own functions on the sample, over the largest value; None without
            a sample.
        speed: of a forward with its backward (or of a forward, where nothing requires a gradient), how many times as
            fast as the model's own functions, on the sample; None where it was not measured.
        slower_below: the number of rows below which the model's own functions are left to run, 0 where none is known.
    """

    where: str
    formula: str
    activation: str
    backend: str
    network: int | None = None
    error: float | None = None
    speed: float | None = None
    slower_below: int = 0


@dataclass
class LeftEntry:
    """A linear layer that the model computes as before.

    Attributes:
        where: the layer's name in the model.
        reason: why.
    """

    where: str
    reason: str


@dataclass
class FusionReport:
    """What `fuse` did with a model.

    Attributes:
        model: the model's class.
        fused: of each linear layer with an activation that runs fused what it is.
        left: the linear layers that the model computes as before, and why.
        errors: of the model's values, gradients and second derivatives on the sample the largest difference from the
            original over the largest entry; empty without a sample.
        bounds: the differences that rounding explains: eight times what changes when every parameter and input is
            changed by one rounding.
        inference, training: seconds of a forward, and of a forward with its backward, on the sample: original, fused;
            None where it was not measured.
        saved: bytes that a forward keeps for its backward, on the sample: original, fused.
        notes: what could not be looked at.
    """

    model: str
    fused: list[FusedEntry] = field(default_factory=list)
    left: list[LeftEntry] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    inference: tuple[float, float] | None = None
    training: tuple[float, float] | None = None
    saved: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self, file: str | Path | None = None) -> str:
        """The report as JSON, written to a file where one is given."""
        text = json.dumps(asdict(self), indent=1)
        if file is not None:
            path = Path(file)
            beside = path.with_name(path.name + ".part")
            beside.write_text(text)
            beside.replace(path)
        return text

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for e in self.fused:
            how = "layer" if e.network is None else f"network {e.network}"
            error = "" if e.error is None else f"{e.error:.1e}"
            speed = "" if e.speed is None else f"{e.speed:.2f}x"
            speed += f" from {e.slower_below} rows" if e.slower_below else ""
            rows.append((e.where, e.formula, e.activation, e.backend, how, error, speed))
        return rows

    def _summary(self) -> list[str]:
        lines = []
        for name, pair in (("forward", self.inference), ("forward and backward", self.training)):
            if pair is not None:
                before, after = pair
                lines.append(f"{name}: {before * 1e3:.2f} -> {after * 1e3:.2f} ms ({before / after:.2f}x)")
        if self.saved is not None:
            lines.append(f"kept for the backward: {self.saved[0] / 2**20:.1f} -> {self.saved[1] / 2**20:.1f} MiB")
        for name, error in self.errors.items():
            lines.append(f"{name}: differs by {error:.1e}, where rounding explains {self.bounds[name]:.1e}")
        return lines + self.notes

    def __str__(self) -> str:
        rows = [_HEAD, *self._rows()]
        widths = [min(48, max(len(r[i]) for r in rows)) for i in range(len(_HEAD))]
        lines = [f"{self.model}: {len(self.fused)} fused, {len(self.left)} left"]
        if self.fused:
            lines += ["  ".join(c[:w].ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
        lines += [f"left: {left.where}: {left.reason}" for left in self.left]
        return "\n".join(lines + self._summary())

    def _repr_html_(self) -> str:
        def cells(kind: str, row: tuple[str, ...]) -> str:
            return "<tr>" + "".join(f"<{kind}>{html.escape(c)}</{kind}>" for c in row) + "</tr>"

        left = "".join(cells("td", (x.where, x.reason)) for x in self.left)
        body = "".join(cells("td", r) for r in self._rows())
        text = "".join(f"<p>{html.escape(line)}</p>" for line in self._summary())
        tables = f"<table>{cells('th', _HEAD)}{body}</table>" if body else ""
        tables += f"<table>{cells('th', ('left', 'reason'))}{left}</table>" if left else ""
        return f"<h4>{html.escape(self.model)}</h4>{tables}{text}"


_HEAD = ("where", "formula", "activation", "backend", "as", "error", "speed")


class SiteRecorder:
    """Writes down what a model's sites do in one call: which layer each is, what follows it, what is one operation."""

    def __init__(self, model: nn.Module):
        self.names = {m: n for n, m in model.named_modules()}
        self.parameters = {p: n for n, p in model.named_parameters()}
        self.stack: list[nn.Module] = []
        self.where: dict[int, str] = {}
        self.chains: list[tuple[list, Any]] = []
        self.reasons: dict[int, str] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block it knows which module runs."""
        before = _hooks.register_module_forward_pre_hook(lambda m, args: self.stack.append(m))
        after = _hooks.register_module_forward_hook(self._left_module, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _left_module(self, module: nn.Module, args: Any, result: Any) -> None:
        if self.stack and self.stack[-1] is module:
            self.stack.pop()

    def saw(self, site: Site, weight: Tensor, shape: Any) -> None:
        """A linear layer is pending."""
        if site.position in self.where:
            return
        name = self.parameters.get(weight) if isinstance(weight, nn.Parameter) else None
        if name is not None:
            name = name.removesuffix("weight").rstrip(".") or name
        else:
            name = next((n for m in reversed(self.stack) if (n := self.names.get(m))), "")
            name = name or f"linear {site.position + 1}"
        self.where[site.position] = name

    def ran(self, chain: list, decision: Any) -> None:
        """A chain of layers ran."""
        # copies: a node loses its operands where somebody keeps its value
        self.chains.append(([(copy.copy(node), activation) for node, activation in chain], decision))

    def left(self, site: Site, reason: str) -> None:
        """A layer is computed as the model wrote it."""
        self.reasons.setdefault(site.position, reason)
