"""Reports the spread of pre-activations and gradients of each layer: predicted by theory, and measured on data."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import described, positive_int
from .estimates import moments
from .network import drawn_moments
from .walk import Link, chain, watch


@dataclass(frozen=True)
class BranchSpread:
    """One branch of a layer. Standard deviations are over rows and features, and NaN where nothing can be said.

    Attributes:
        layer, branch: where.
        function: what follows the product.
        fan_in, units: of the branch's weights.
        input_std: measured, of the product's input x.
        predicted, measured: standard deviation of z = W x + b (before omega).
        predicted_gradient, measured_gradient: of dL/dz, one row's.
    """

    layer: str
    branch: int
    function: str
    fan_in: int
    units: int
    input_std: float
    predicted: float
    measured: float
    predicted_gradient: float
    measured_gradient: float


@dataclass(frozen=True)
class Report:
    """What `report` found: `str(report)` is a table of `rows`, `note` says what stayed unpredicted."""

    rows: list[BranchSpread] = field(default_factory=list)
    note: str = ""

    def __str__(self) -> str:
        head = ["layer", "function", "fan-in", "units", "std x", "std z", "predicted", "std dL/dz", "predicted"]
        lines = [head]
        branches = {row.layer: row.branch for row in self.rows}
        for r in self.rows:
            name = f"{r.layer}[{r.branch}]" if branches[r.layer] else r.layer
            numbers = (r.input_std, r.measured, r.predicted, r.measured_gradient, r.predicted_gradient)
            shown = ["-" if math.isnan(v) else f"{v:.4g}" for v in numbers]
            lines.append([name, r.function, str(r.fan_in), str(r.units), *shown])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
            for line in lines
        ]
        text.insert(1, "-" * len(text[0]))
        return "\n".join([*text, self.note] if self.note else text)

    def figure(self) -> Any:
        """Draw a matplotlib Figure: predicted and measured spread of z and of dL/dz, layer by layer."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("drawing a report needs matplotlib: pip install 'fused_inr[fit]'") from error

        figure = Figure(figsize=(max(6.0, 2.0 + 0.6 * len(self.rows)), 6.0), layout="constrained")
        names = [f"{r.layer}[{r.branch}]" if r.branch else r.layer for r in self.rows]
        kinds = (("z", "measured", "predicted"), ("dL/dz", "measured_gradient", "predicted_gradient"))
        for axis, (what, measured, predicted) in zip(figure.subplots(2, 1, sharex=True), kinds):
            for key, style, size in ((predicted, "k_", 12), (measured, "o", 5)):
                values = [getattr(r, key) for r in self.rows]
                axis.plot(range(len(values)), values, style, label=key.split("_")[0], markersize=size)
            if all(getattr(r, measured) > 0 for r in self.rows):
                axis.set_yscale("log")
            axis.set_ylabel(f"standard deviation of {what}")
            axis.grid(alpha=0.3)
            axis.legend()
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        return figure

    def save(self, path: str | os.PathLike) -> None:
        """Write the figure as a PNG, whole or not at all."""
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=100)
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            part.write_bytes(buffer.getvalue())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def report(
    model: nn.Module,
    sample_input: Tensor,
    loss: Callable[[Tensor], Tensor] | None = None,
    *,
    samples: int = 200_000,
    seed: int = 0,
) -> Report:
    """Predict and measure standard deviations of each layer's pre-activation z and of dL/dz.

    Args:
        model: one of ours, or any module (as for `lsuv_init_`; predicted where `vi3nr_init_` could initialise it).
        sample_input: what the network is given, e.g. coordinates [.., in_features].
        loss: from the output to a 0-D tensor; by default L = sum(output g), g ~ N(0, 1), as in VI3NR's experiments.
        samples, seed: of the moments by Monte Carlo where quadrature does not serve, and of g.

    The prediction follows mean squares of the weights and biases as they are, taken for independent: forward
    E[z_b^2] = n E[W_b^2] E[x^2] + E[b_b^2] and E[x^2] = E[f(z)^2], z ~ N(0, E[z^2]), from the measured input of the
    first layer; backward from the measured dL/doutput.

    Returns a `Report`. The model's parameters, gradients and modes are left alone. Raises TypeError or ValueError for
    other arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a network or a layer, got {type(model).__name__}")
    if not isinstance(sample_input, Tensor) or not sample_input.is_floating_point():
        raise TypeError(f"sample_input must be a floating-point tensor, got {described(sample_input)}")
    if sample_input.dim() == 0:
        raise ValueError("sample_input must have shape [.., in_features], got a scalar")
    if sample_input.numel() == 0:
        raise ValueError("sample_input must have rows")
    samples = positive_int("samples", samples, minimum=2)
    try:
        links, note = chain(model).links, ""
        if any(link.skip or link.norm is not None for link in links):
            note = "predicted nothing: slopes through skip connections and LayerNorm are not followed"
    except ValueError as error:
        links, note = [], f"predicted nothing: {error}"

    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # x, weight, z of each product's first run

    def visit(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = nn.functional.linear(x, weight, bias)
        if name not in seen:
            z = z if z.requires_grad else z.requires_grad_()
            seen[name] = x.detach(), weight, z
        return z

    with torch.enable_grad(), watch(model, visit):
        output = model(sample_input.detach())
    if not isinstance(output, Tensor):
        raise ValueError(f"model must return a tensor, got {type(output).__name__}")
    rng = torch.Generator().manual_seed(positive_int("seed", seed, minimum=0))
    if loss is None:
        value = (output * torch.randn(output.shape, generator=rng).to(output)).sum()
    else:
        value = loss(output)
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
            raise ValueError("loss must return a 0-D tensor that depends on the output")
    wanted = [z for _, _, z in seen.values()]
    *slopes, pull = torch.autograd.grad(value, [*wanted, output], allow_unused=True)

    by_weight = {id(link.weight): link for link in links}
    names = list(seen)
    known = [by_weight.get(id(seen[name][1])) for name in names]
    if note or any(link is None for link in known):
        predictions: dict[str, tuple[list[float], list[float]]] = {}
    else:
        first = seen[names[0]][0].double().square().mean().item()
        last = pull.double().square().mean().item() if pull is not None else math.nan
        predictions = _predicted([link for link in known if link is not None], first, last, samples, seed)
    rows = []
    for name, link, slope in zip(names, known, slopes):
        x, weight, z = seen[name]
        branches = link.branches if link is not None else 1
        function = "?" if link is None else repr(link.activation) if link.activation is not None else "a formula"
        nothing = [math.nan] * branches
        forward, backward = predictions.get(link.name, (nothing, nothing)) if link is not None else (nothing, nothing)
        parts = z.detach().chunk(branches, -1)
        gradients = slope.chunk(branches, -1) if slope is not None else [torch.tensor(math.nan)] * branches
        for b in range(branches):
            rows.append(
                BranchSpread(
                    name,
                    b,
                    function,
                    weight.shape[1],
                    weight.shape[0] // branches,
                    _std(x),
                    forward[b],
                    _std(parts[b]),
                    backward[b],
                    _std(gradients[b]),
                )
            )
    return Report(rows, note)


def _std(values: Tensor) -> float:
    return values.double().std(correction=0).item()


def _squares(block: Tensor) -> float:
    return block.detach().double().square().mean().item()


def _predicted(
    links: list[Link], first: float, last: float, samples: int, seed: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Predict standard deviations of z and dL/dz, a link and branch, from E[x^2] of the input and of dL/doutput."""
    forward: dict[str, list[float]] = {}
    slopes: dict[str, list[float]] = {}
    second = first
    for link in links:
        blocks = link.weight.chunk(link.branches)
        offsets = link.bias.chunk(link.branches) if link.bias is not None else [None] * link.branches
        squares = [_squares(b) if b is not None else 0.0 for b in offsets]
        variances = [link.fan_in * _squares(w) * second + b for w, b in zip(blocks, squares)]
        forward[link.name] = [math.sqrt(v) for v in variances]
        if any(not (0 < v < math.inf) for v in variances):
            slopes[link.name], second = [math.nan] * link.branches, math.nan
            continue
        second, slopes[link.name] = _moments(link, forward[link.name], samples, seed)
    backward: dict[str, list[float]] = {}
    for link in reversed(links):
        backward[link.name] = [math.sqrt(last * s) for s in slopes[link.name]]
        blocks = link.weight.chunk(link.branches)
        last = sum(link.units * _squares(w) * g * g for w, g in zip(blocks, backward[link.name]))
    return {link.name: (forward[link.name], backward[link.name]) for link in links}


def _moments(link: Link, sigmas: list[float], samples: int, seed: int) -> tuple[float, list[float]]:
    """Return E[f^2], mean over outputs, and for each branch the sum over outputs of E[(df/dz)^2]."""
    if link.activation is None:
        return drawn_moments(link, sigmas, samples, seed)
    sigma = tuple(sigmas) if len(sigmas) > 1 else sigmas[0]
    method = "auto" if link.branches == 1 else "montecarlo"
    m = moments(link.activation, sigma, method=method, samples=samples, seed=seed)
    return m.second.mean().item(), m.derivative_second.sum(-2).reshape(-1).tolist()
