"""Compares SplitNet initialised in four ways, after the SplitNet thesis (figure 5.1), and by VI3NR.

Cameraman, 256x256 grey, data in [-1, 1]; 128 Gaussian Fourier frequencies of standard deviation 10 periods a picture
(Fourier features take coordinates in [0, 1]; 5 a unit of coordinates in [-1, 1]), split layers to the last, omegas 1.
The thesis' PSNR takes 1 for the range of data in [-1, 1], 6.02 dB less than usual; so does this.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...encodings import FourierFeatures
from ...init import lsuv_init_
from ...models import SplitNet
from .fitting import cameraman, decibel, fit, shown_curve, thinned
from .record import Experiment, Request, seeds

#: name -> m, and how weights are made; VI3NR's m keeps unit variance through a layer
WAYS = {
    "default, m 1": (1.0, "default"),
    "default, m 10": (10.0, "default"),
    "LSUV, m 10": (10.0, "lsuv"),
    "VI3NR, m 5.935": (5.935, "vi3nr"),
}
#: what one trial of this gave at 256x256
_TRIAL = {
    "default, m 1": "29.2 to 30.9",
    "default, m 10": "29.2 to 30.9",
    "LSUV, m 10": "37.9",
    "VI3NR, m 5.935": "40.1",
}
_PEAK = 1.0
#: `--widths` and `--batch` choose.
WIDTHS = BATCH = True


@dataclass(frozen=True)
class SplitOptions:
    """Everything that decides the figures."""

    size: int = 128
    steps: int = 3000
    widths: tuple[int, ...] = (32,)  # 2.5 weights a pixel: more only memorise
    depth: int = 2
    lr: float = 1e-4
    frequencies: int = 128
    std: float = 5.0  # of the frequencies, periods per unit
    batch: int = 0  # pixels a step; 0: all


def prepare(request: Request) -> Experiment:
    """Make the experiment that the command line asks for."""
    options = SplitOptions(size=256, widths=(128,)) if request.full else SplitOptions()
    options = replace(options, batch=request.batch)
    if request.widths:
        options = replace(options, widths=request.widths)
    return experiment(options, seeds(request, 1), request.data)


def network(way: str, x: Tensor, outputs: int, width: int, options: SplitOptions, seed: int) -> SplitNet:
    """Make a SplitNet behind Fourier features, initialised in one of `WAYS`."""
    m, init = WAYS[way]
    torch.manual_seed(seed)
    encoding = FourierFeatures(2, options.frequencies, std=options.std, seed=seed)
    net = SplitNet(
        2,
        width,
        options.depth,
        outputs,
        m=m,
        outermost_linear=False,
        encoding=encoding,
        init="vi3nr" if init == "vi3nr" else "default",
        sigma_p=1.0 if init == "vi3nr" else None,
    )
    if init == "lsuv":
        lsuv_init_(net, x, 1.0)
    return net


def experiment(options: SplitOptions, numbers: list[int], data: str | None) -> Experiment:
    """Make the experiment: one cell for each way to initialise and each seed."""
    target = cameraman(data, options.size)
    x, y = target.coordinates(), target.target()

    def cell(way: str, width: int, seed: int) -> dict[str, Any]:
        net = network(way, x, y.shape[1], width, options, seed)
        assert net.encoding is not None
        encoded, net.encoding = net.encoding(x), None  # it has no parameters: once is enough
        curve = fit(net, encoded, y, options.steps, options.lr, options.batch)
        third = curve[options.steps // 3]
        return {"psnr": decibel(curve[-1], _PEAK), "psnr_third": decibel(third, _PEAK), "mse": thinned(curve)}

    return Experiment(
        {**asdict(options), "seeds": numbers, "picture": {"name": target.name, "digest": target.digest}},
        {
            f"{way}, width {w}, seed {s}": partial(cell, way, w, s)
            for s in numbers
            for w in options.widths
            for way in WAYS
        },
        partial(_tables, options, numbers),
        partial(_draw, options, numbers),
        (6.5 * len(options.widths) + 1.5, 5.0),
        [
            f"PSNR in dB with range 1 on [-1, 1], {options.size} pixels a side, {options.batch or 'all'} of them a "
            "step; the trial: 256x256 pixels, 3,000 steps, one seed."
        ],
    )


def _tables(options: SplitOptions, numbers: list[int], cells: dict[str, Any]) -> dict[str, list[list[str]]]:
    tables = {}
    for w in options.widths:
        rows = [["initialisation", f"{options.steps // 3} steps", f"{options.steps} steps", "lowest", "trial, 256x256"]]
        for way in WAYS:
            found = [cells[f"{way}, width {w}, seed {s}"] for s in numbers]
            third, last = ([f[k] for f in found] for k in ("psnr_third", "psnr"))
            rows.append(
                [way, f"{statistics.mean(third):.2f}", f"{statistics.mean(last):.2f}", f"{min(last):.2f}", _TRIAL[way]]
            )
        tables[f"SplitNet by initialisation, width {w}"] = rows
    return tables


def _draw(options: SplitOptions, numbers: list[int], figure: Any, cells: dict[str, Any]) -> None:
    for w, axis in zip(options.widths, figure.subplots(1, len(options.widths), squeeze=False)[0]):
        for i, way in enumerate(WAYS):
            for s in numbers:
                curve = cells[f"{way}, width {w}, seed {s}"]["mse"]
                shown_curve(axis, curve, way if s == numbers[0] else "", _PEAK, color=f"C{i}")
        axis.set_title(f"width {w}")
        axis.set_xlabel("step")
        axis.set_ylabel("PSNR, dB (range 1)")
        axis.grid(alpha=0.3)
        axis.legend()
