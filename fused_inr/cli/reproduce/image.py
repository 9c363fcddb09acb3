"""Compares VI3NR at a short grid of sigma_p around the solved one with PyTorch's initialisation, on a picture.

The published advice for shallow networks is such a grid (`init.tune_sigma_p` is it for any network). Beside PSNR each
cell tells the frequency of the untrained network, rms(abs(dy/dx)) / (2 pi std(y)), in periods per unit of coordinate:
what sigma_p decides when there are only a few layers.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import activations, init
from ...activations import Activation
from ...models import MLP
from .fitting import cameraman, decibel, fit, spreads
from .record import Experiment, Request, seeds

#: `--widths` and `--batch` choose.
WIDTHS = BATCH = True
ACTIVATIONS: dict[str, Activation] = {
    "gaussian": activations.gaussian(sigma=0.05),
    "sinc": activations.sinc(omega=1.0),
}


@dataclass(frozen=True)
class ImageOptions:
    """Everything that decides the figures."""

    size: int = 64
    steps: int = 300
    lr: float = 1e-3
    widths: tuple[int, ...] = (64, 128)
    depth: int = 3
    multiples: tuple[float, ...] = (0.6, 1.0, 1.6, 2.5)
    batch: int = 0  # pixels a step; 0: all


def prepare(request: Request) -> Experiment:
    """Make the experiment that the command line asks for."""
    options = replace(ImageOptions(size=256) if request.full else ImageOptions(), batch=request.batch)
    if request.widths:
        options = replace(options, widths=request.widths)
    return experiment(options, seeds(request, 5), request.data)


def frequency(net: nn.Module, x: Tensor) -> float:
    """Measure the network's mean frequency: root mean square of its gradient over 2 pi times its spread."""
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:2048]].requires_grad_()
    y = net(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return (slope.square().sum(1).mean().sqrt() / (2 * math.pi * y.std())).item()


def experiment(options: ImageOptions, numbers: list[int], data: str | None) -> Experiment:
    """Make the experiment: one cell for each activation, width, way to initialise and seed."""
    target = cameraman(data, options.size)
    x, y = target.coordinates(), target.target()
    solved = {name: float(f"{init.search_sigma_p(a).sigma_p:.6g}") for name, a in ACTIVATIONS.items()}

    def cell(name: str, width: int, seed: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for multiple in (0.0, *options.multiples):
            torch.manual_seed(seed)
            net = MLP(2, width, options.depth, y.shape[1], activation=ACTIVATIONS[name])
            if multiple:
                init.vi3nr_init_(net, x, multiple * solved[name])
            start = frequency(net, x)
            spread = [found["z"] for found in spreads(net, x)]
            curve = fit(net, x, y, options.steps, options.lr, options.batch)
            key = f"{multiple:g} solved" if multiple else "default"
            result[key] = {"psnr": decibel(curve[-1]), "frequency": start, "std": spread}
        return result

    return Experiment(
        {**asdict(options), "seeds": numbers, "picture": {"name": target.name, "digest": target.digest}},
        {
            f"{a}, width {w}, seed {s}": partial(cell, a, w, s)
            for s in numbers
            for a in ACTIVATIONS
            for w in options.widths
        },
        partial(_tables, options, solved, numbers),
        partial(_draw, options, numbers),
        (11.0, 7.0),
        [
            f"{options.size} pixels a side, {options.batch or 'all'} of them a step, {options.steps} steps of Adam at "
            f"{options.lr:g}. Default: nn.Linear's. "
            "Wins: seeds in which a line ends above the default."
        ],
    )


def _tables(
    options: ImageOptions, solved: dict[str, float], numbers: list[int], cells: dict[str, Any]
) -> dict[str, list[list[str]]]:
    tables = {}
    for name in ACTIVATIONS:
        rows = [
            ["sigma_p", *(f"width {w}: {k}" for w in options.widths for k in ("PSNR", "wins", "frequency", "std z"))]
        ]
        for key in ("default", *(f"{m:g} solved" for m in options.multiples)):
            factor = 0.0 if key == "default" else float(key.split()[0])
            line = [f"{factor * solved[name]:.4g} ({key})" if factor else key]
            for w in options.widths:
                found = [cells[f"{name}, width {w}, seed {s}"] for s in numbers]
                values = [f[key]["psnr"] for f in found]
                wins = sum(f[key]["psnr"] > f["default"]["psnr"] for f in found)
                line += [
                    f"{statistics.mean(values):.2f}",
                    f"{wins} of {len(numbers)}" if factor else "",
                    f"{statistics.mean(f[key]['frequency'] for f in found):.2f}",
                    f"{statistics.mean(f[key]['std'][1] for f in found):.3g}",
                ]
            rows.append(line)
        tables[name] = rows
    return tables


def _draw(options: ImageOptions, numbers: list[int], figure: Any, cells: dict[str, Any]) -> None:
    keys = ("default", *(f"{m:g} solved" for m in options.multiples))
    for (name, _), row in zip(ACTIVATIONS.items(), figure.subplots(len(ACTIVATIONS), 2, squeeze=False)):
        for i, w in enumerate(options.widths):
            for what, axis in zip(("psnr", "frequency"), row):
                for x, key in enumerate(keys):
                    values = [cells[f"{name}, width {w}, seed {s}"][key][what] for s in numbers]
                    label = f"width {w}" if x == 0 else ""
                    axis.plot([x + 0.15 * i] * len(values), values, "o", color=f"C{i}", markersize=4, label=label)
                axis.set_xticks(range(len(keys)), keys)
                axis.grid(alpha=0.3)
                axis.set_ylabel(f"{name}: {'PSNR, dB' if what == 'psnr' else 'frequency at the start'}")
                axis.legend(fontsize=8)
