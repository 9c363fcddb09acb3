"""Repeats VI3NR's toy experiment (Koneputugodage et al., CVPR 2025): does the variance survive 100 layers and back?

    z_0 ~ N(0, sigma_p^2),  z_{i+1} = W_i f(z_i),  Var(W) = gain^2 / n;      L = sum(z_last g),  g ~ N(0, 1)
    E_f = 100 mean(abs(v - sigma_p^2) / (v + sigma_p^2)),  v the variance of each row of z_last
    E_b = the same of dL/dz_0, against 1

A mean over rows that is NaN counts as 100. Rows are independent given the weights: they pass in blocks, so that memory
is that of the weights and a block's pre-activations.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import activations, init
from ...activations import Activation
from .record import Experiment, Request, seeds

_BLOCK = 1000  # rows that pass together


@dataclass(frozen=True)
class ToyOptions:
    """Everything that decides the figures."""

    width: int = 1000
    depth: int = 100
    batch: int = 1000
    samples: int = 1_000_000


@dataclass(frozen=True)
class GainSetting:
    """One line of a table: an activation, its sigma_p, a fixed gain^2 (None: by Monte Carlo), what was published."""

    label: str
    activation: str
    sigma_p: float
    gain2: float | None = None
    published: tuple[float, float] | None = None
    solved: bool = False


_GAUSSIAN, _SINE = "gaussian:0.05", "sine:30"
#: The published script's lines, as it prints them for batch 2,000 and its own seed.
PUBLISHED = [
    GainSetting("tanh, Xavier", "tanh", 1.0, 1.0, (99.0, 98.6)),
    GainSetting("tanh, PyTorch", "tanh", 1.0, (5 / 3) ** 2, (7.9, 100.0)),
    GainSetting("tanh, VI3NR", "tanh", 1.0, 2.54, (2.1, 100.0)),
    GainSetting("tanh, VI3NR backward", "tanh", 0.1, 1.02, (8.4, 19.7)),
    GainSetting("sigmoid, Kumar", "sigmoid", 1.0, 12.96, (62.1, 100.0)),
    GainSetting("sigmoid, PyTorch", "sigmoid", 1.0, 1.0, (61.0, 100.0)),
    GainSetting("sigmoid, VI3NR", "sigmoid", 1.0, 3.41, (4.6, 100.0)),
    GainSetting("sigmoid, VI3NR backward", "sigmoid", 6.8, 104.28, (2.6, 34.0)),
    GainSetting("relu", "relu", 1.0, 2.0, (7.7, 25.6)),
    GainSetting("tanh, sigma_p 1", "tanh", 1.0, None, (2.2, 100.0)),
    GainSetting("sigmoid, sigma_p 1", "sigmoid", 1.0, None, (4.5, 100.0)),
    GainSetting("relu, sigma_p 1", "relu", 1.0, None, (7.9, 26.2)),
    GainSetting("sin(30z), sigma_p 1", _SINE, 1.0, None, (2.0, 100.0)),
    GainSetting("gaussian 0.05, sigma_p 1", _GAUSSIAN, 1.0, None, (6.7, 100.0)),
    GainSetting("sin(z)/z, sigma_p 1", "sinc", 1.0, None, (4.6, 100.0)),
    GainSetting("wavelet, sigma_p 1", "wavelet", 1.0, None, (3.2, 100.0)),
]
_SOLVED = ("tanh", _GAUSSIAN, "sinc", "wavelet", "sigmoid", "relu")
DISTRIBUTIONS = ("uniform", "normal", "orthogonal")
_FILL = {"uniform": init.vi3nr_uniform_, "normal": init.vi3nr_normal_, "orthogonal": init.vi3nr_orthogonal_}


def activation_of(text: str) -> Activation:
    """Return the activation that a text such as "gaussian:0.05" means: a name and the value of its first parameter."""
    name, _, value = text.partition(":")
    activation = activations.get(name)
    return activation.with_params(**{activation.param_names[0]: float(value)}) if value else activation


def solved_rows() -> list[GainSetting]:
    """Return the rows where both conditions hold (tanh: nearly, only in the limit 0; relu: everywhere)."""
    rows = []
    for text in _SOLVED:
        sigma = init.default_sigma_p(activation_of(text))
        rows.append(GainSetting(f"{text.replace(':', ' ')}, sigma_p {sigma:.4g}", text, sigma, solved=True))
    return rows


def errors(
    activation: Activation, sigma_p: float, gain: float, weights: list[Tensor], batch: int, seed: int
) -> tuple[float, float]:
    """Return E_f and E_b in percent. `weights` are square matrices of variance 1 / n, which the gain scales."""
    width = weights[0].shape[1]
    jet, constants = activation.map.torch_jet(), activation.constants
    rng = torch.Generator().manual_seed(seed)
    forward, backward = [], []
    with torch.no_grad():
        for start in range(0, batch, _BLOCK):
            rows = min(_BLOCK, batch - start)
            z = torch.randn(rows, width, generator=rng).mul_(sigma_p)
            slopes = []
            for weight in weights:
                y, slope = jet(z, *constants)
                slopes.append(slope)
                z = torch.mm(y, weight.T).mul_(gain)
            forward.append(_off(z, sigma_p**2))
            g = torch.randn(rows, width, generator=rng)
            for weight, slope in zip(reversed(weights), reversed(slopes)):
                g = torch.mm(g, weight).mul_(slope * gain)
            backward.append(_off(g, 1.0))
    return _percent(forward), _percent(backward)


def _off(values: Tensor, wanted: float) -> Tensor:
    variance = values.double().var(1)
    return (variance - wanted).abs() / (variance + wanted)


def _percent(parts: list[Tensor]) -> float:
    mean = 100 * torch.cat(parts).mean().item()
    return 100.0 if math.isnan(mean) else mean


def matrices(distribution: str, width: int, depth: int, seed: int) -> list[Tensor]:
    """Draw `depth` square matrices of variance 1 / width."""
    rng = torch.Generator().manual_seed(seed)
    return [_FILL[distribution](torch.empty(width, width), 1.0, rng) for _ in range(depth)]


def prepare(request: Request) -> Experiment:
    """Make the experiment that the command line asks for."""
    options = ToyOptions(batch=10_000) if request.full else ToyOptions()
    return experiment(options, seeds(request, 5), request.full)


def experiment(options: ToyOptions, numbers: list[int], full: bool = False) -> Experiment:
    """Make the experiment: one cell for each distribution and seed, since all activations share the weights."""
    rows = solved_rows()

    def cell(distribution: str, seed: int) -> dict[str, Any]:
        weights = matrices(distribution, options.width, options.depth, seed)
        result = {}
        for row in (PUBLISHED if distribution == "uniform" else []) + rows:
            activation = activation_of(row.activation)
            gain = (
                init.vi3nr_gain_MC(row.sigma_p, activation, options.samples, seed=seed)
                if row.gain2 is None
                else math.sqrt(row.gain2)
            )
            e_f, e_b = errors(activation, row.sigma_p, gain, weights, options.batch, seed)
            result[row.label] = {"E_f": e_f, "E_b": e_b, "gain2": gain**2}
        return result

    cells: dict[str, Any] = {f"{d} {s}": partial(cell, d, s) for s in numbers for d in DISTRIBUTIONS}
    return Experiment(
        {**asdict(options), "seeds": numbers, "rows": [asdict(r) for r in rows]},
        cells,
        partial(_tables, rows, numbers),
        partial(_draw, rows, numbers),
        (13.0, 7.0),
        [
            "E_f, E_b: percent, median over seeds (lowest to highest). Published: one draw, batch 2,000; it varies "
            "with the seed as the ranges here do."
        ],
    )


def _column(cells: dict, numbers: list[int], distribution: str, label: str, key: str) -> list[float]:
    return [cells[f"{distribution} {s}"][label][key] for s in numbers]


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _tables(rows: list[GainSetting], numbers: list[int], cells: dict[str, Any]) -> dict[str, list[list[str]]]:
    first = [["as published", "gain^2", "E_f there", "E_f", "mean", "E_b there", "E_b", "mean"]]
    for row in PUBLISHED:
        forward, backward = (_column(cells, numbers, "uniform", row.label, k) for k in ("E_f", "E_b"))
        gain2 = statistics.mean(_column(cells, numbers, "uniform", row.label, "gain2"))
        assert row.published is not None
        e_f, e_b = row.published
        line = [row.label, f"{gain2:.3g}"]
        for published, values in ((e_f, forward), (e_b, backward)):
            line += [f"{published}", _shown(values), f"{statistics.mean(values):.1f}"]
        first.append(line)
    second = [["at our sigma_p", "gain^2", *(f"{k} {d}" for k in ("E_f", "E_b") for d in DISTRIBUTIONS)]]
    for row in rows:
        gain2 = statistics.mean(_column(cells, numbers, "uniform", row.label, "gain2"))
        parts = [_shown(_column(cells, numbers, d, row.label, k)) for k in ("E_f", "E_b") for d in DISTRIBUTIONS]
        second.append([row.label, f"{gain2:.4g}", *parts])
    return {"The published gains, uniform weights": first, "Both conditions met, three distributions": second}


def _draw(rows: list[GainSetting], numbers: list[int], figure: Any, cells: dict[str, Any]) -> None:
    for axis, key in zip(figure.subplots(2, 1), ("E_f", "E_b")):
        labels = []
        for x, row in enumerate([*PUBLISHED, *rows]):
            labels.append(row.label)
            for d, color in zip(DISTRIBUTIONS if row.solved else ("uniform",), ("C0", "C1", "C2")):
                values = _column(cells, numbers, d, row.label, key)
                offset = x + 0.22 * (DISTRIBUTIONS.index(d) - 1) * row.solved
                axis.plot([offset] * len(values), values, "_", color=color, markersize=8)
            if row.published is not None:
                axis.plot(x, row.published[key == "E_b"], "x", color="k", markersize=5)
        axis.set_ylabel(f"{key}, percent")
        if key == "E_f":
            axis.set_yscale("symlog", linthresh=10)
        axis.grid(alpha=0.3, axis="y")
        axis.set_xticks(range(len(labels)), labels if key == "E_b" else [""] * len(labels), rotation=60, ha="right")
    first = figure.axes[0]
    for name, color in zip(DISTRIBUTIONS, ("C0", "C1", "C2")):
        first.plot([], [], "_", color=color, label=name)
    first.plot([], [], "x", color="k", label="published (one draw)")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", fontsize=8, ncols=4)
