"""Fits the first seconds of a recording by SIREN with its own constants, with the tuned pair, and by VI3NR.

One coordinate in [-1, 1], amplitude in [-1, 1]; omega 3000 in the first layer, 30 in the others (Sitzmann et al. 2020
took 7 s of Bach, `gt_bach.wav`).
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ...models import SIREN
from .fitting import decibel, fit, recording, shown_curve, thinned
from .record import Experiment, Request, digest, seeds

WAYS: dict[str, dict[str, Any]] = {
    "SIREN (1, 6)": {"flic": 1.0, "initc": 6.0},
    "SIREN tuned (2, 40)": {"flic": 2.0, "initc": 40.0},
    "VI3NR": {"init": "vi3nr"},
}

#: `--batch` chooses.
BATCH = True


@dataclass(frozen=True)
class AudioOptions:
    """Everything that decides the figures."""

    duration: float = 1.0
    steps: int = 300
    width: int = 64
    depth: int = 3
    lr: float = 1e-4
    first_omega: float = 3000.0
    omega: float = 30.0
    batch: int = 0  # samples a step; 0: all


def prepare(request: Request) -> Experiment:
    """Make the experiment that the command line asks for."""
    options = AudioOptions(duration=7.0, steps=3000, width=256) if request.full else AudioOptions()
    return experiment(replace(options, batch=request.batch), seeds(request, 1), request.data)


def experiment(options: AudioOptions, numbers: list[int], data: str | None) -> Experiment:
    """Make the experiment: one cell for each way to initialise and each seed."""
    name, rate, values = recording(data, options.duration)
    y = torch.from_numpy(values).unsqueeze(1)
    x = torch.linspace(-1, 1, len(y)).unsqueeze(1)
    power = y.square().mean().item()

    def cell(way: str, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        own = WAYS[way]
        net = SIREN(1, options.width, options.depth, 1, omega=options.omega, first_omega=options.first_omega, **own)
        curve = fit(net, x, y, options.steps, options.lr, options.batch)
        return {"psnr": decibel(curve[-1]), "snr": decibel(curve[-1], power**0.5), "mse": thinned(curve)}

    return Experiment(
        {**asdict(options), "seeds": numbers, "recording": {"name": name, "rate": rate, "digest": digest(values)}},
        {f"{way}, seed {s}": partial(cell, way, s) for s in numbers for way in WAYS},
        partial(_tables, numbers),
        partial(_draw, numbers),
        (8.0, 5.0),
        [f"{len(y)} samples of {name}; PSNR: peak 2, that of data in [-1, 1]; SNR: against the signal's power."],
    )


def _tables(numbers: list[int], cells: dict[str, Any]) -> dict[str, list[list[str]]]:
    rows = [["initialisation", "PSNR, dB", "SNR, dB"]]
    for way in WAYS:
        found = [cells[f"{way}, seed {s}"] for s in numbers]
        rows.append([way, *(f"{statistics.mean(f[k] for f in found):.2f}" for k in ("psnr", "snr"))])
    return {"A recording by initialisation": rows}


def _draw(numbers: list[int], figure: Any, cells: dict[str, Any]) -> None:
    axis = figure.subplots()
    for i, way in enumerate(WAYS):
        for s in numbers:
            shown_curve(axis, cells[f"{way}, seed {s}"]["mse"], way if s == numbers[0] else "", color=f"C{i}")
    axis.set_xlabel("step")
    axis.set_ylabel("PSNR, dB")
    axis.grid(alpha=0.3)
    axis.legend()
