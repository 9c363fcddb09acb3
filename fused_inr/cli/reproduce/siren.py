"""Compares SIREN with its own constants and with the tuned pair, after the SplitNet thesis.

Table 3.3: standard deviation of each layer's omega z, and of its sine, at initialisation. Table 3.4: PSNR after 3,000
steps of Adam at 1e-4 on a photograph of 512x512 (`tokyo512.png`), 3 hidden layers, by width.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...models import SIREN
from .fitting import decibel, fit, picture, shown_curve, spreads, thinned
from .record import Experiment, Request, seeds

PAIRS = {"published (1, 6)": (1.0, 6.0), "tuned (2, 40)": (2.0, 40.0)}
_SPREAD = {  # table 3.3
    "published (1, 6)": (14.14, "1.46 to 1.51"),
    "tuned (2, 40)": (18.99, "2.79 to 2.81"),
}
_PSNR = {  # table 3.4
    "published (1, 6)": {128: 21.71, 256: 24.82, 512: 30.66, 1024: 34.37},
    "tuned (2, 40)": {128: 21.62, 256: 27.11, 512: 43.57, 1024: 46.22},
}
_OMEGA = 30.0


@dataclass(frozen=True)
class SirenOptions:
    """Everything that decides the figures."""

    size: int = 64
    steps: int = 300
    widths: tuple[int, ...] = (128, 256, 512)
    depth: int = 3
    lr: float = 1e-4
    spread_width: int = 256
    batch: int = 0  # pixels a step; 0: all


#: `--widths` and `--batch` choose.
WIDTHS = BATCH = True


def prepare(request: Request) -> Experiment:
    """Make the experiment that the command line asks for."""
    options = SirenOptions(size=512, steps=3000, widths=(128, 256, 512, 1024)) if request.full else SirenOptions()
    options = replace(options, batch=request.batch)
    if request.widths:
        options = replace(options, widths=request.widths)
    return experiment(options, seeds(request, 1), request.data)


def experiment(options: SirenOptions, numbers: list[int], data: str | None) -> Experiment:
    """Make the experiment: one cell for each pair of constants and each seed."""
    target = picture(data, options.size, "published: tokyo512.png, a photograph of 512x512")
    whole = picture(data, 0, "")
    x, y = target.coordinates(), target.target()

    def spread(pair: str, seed: int) -> dict[str, Any]:
        return {"layers": sine_spreads(pair, whole.coordinates(), options.spread_width, options.depth, seed)}

    def psnr(pair: str, width: int, seed: int) -> dict[str, Any]:
        flic, initc = PAIRS[pair]
        torch.manual_seed(seed)
        net = SIREN(2, width, options.depth, y.shape[1], omega=_OMEGA, first_omega=_OMEGA, flic=flic, initc=initc)
        curve = fit(net, x, y, options.steps, options.lr, options.batch)
        return {"psnr": decibel(curve[-1]), "mse": thinned(curve)}

    cells: dict[str, Any] = {f"spread, {p}, seed {s}": partial(spread, p, s) for p in PAIRS for s in numbers}
    cells |= {
        f"width {w}, {p}, seed {s}": partial(psnr, p, w, s) for w in options.widths for p in PAIRS for s in numbers
    }
    about = {"name": target.name, "digest": target.digest}
    return Experiment(
        {**asdict(options), "seeds": numbers, "picture": about},
        cells,
        partial(_tables, options, numbers),
        partial(_draw, options, numbers),
        (11.0, 4.5),
        [
            f"PSNR in dB of data in [0, 1], {target.pixels.shape[1]}x{target.pixels.shape[0]} pixels, "
            f"{options.batch or 'all'} of them a step, {options.steps} steps; published: 512x512, 3,000 steps."
        ],
    )


def sine_spreads(pair: str, x: Tensor, width: int, depth: int, seed: int) -> list[dict[str, float]]:
    """Measure, of each sine layer, the standard deviation of omega z and of its sine, over rows and features."""
    flic, initc = PAIRS[pair]
    torch.manual_seed(seed)
    net = SIREN(x.shape[1], width, depth, 3, omega=_OMEGA, first_omega=_OMEGA, flic=flic, initc=initc)
    found = spreads(net, x)
    return [{"z": _OMEGA * layer["z"], "sine": after["x"]} for layer, after in pairwise(found)]


def _tables(options: SirenOptions, numbers: list[int], cells: dict[str, Any]) -> dict[str, list[list[str]]]:
    spread = [["layer", *(f"{p}: {k}" for p in PAIRS for k in ("omega z", "published", "sine"))]]
    for i in range(options.depth + 1):
        line = [str(i)]
        for pair in PAIRS:
            layers = [cells[f"spread, {pair}, seed {s}"]["layers"][i] for s in numbers]
            z, sine = (statistics.mean(layer[k] for layer in layers) for k in ("z", "sine"))
            line += [f"{z:.2f}", str(_SPREAD[pair][i > 0]), f"{sine:.3f}"]
        spread.append(line)
    psnr = [["width", *(f"{p}{k}" for p in PAIRS for k in (", dB", " published")), "tuned gains", "published"]]
    for width in options.widths:
        line, gains, published = [str(width)], [], []
        for pair in PAIRS:
            value = statistics.mean(cells[f"width {width}, {pair}, seed {s}"]["psnr"] for s in numbers)
            gains.append(value)
            published.append(_PSNR[pair].get(width))
            line += [f"{value:.2f}", "-" if published[-1] is None else f"{published[-1]:.2f}"]
        known = [p for p in published if p is not None]
        line += [f"{gains[1] - gains[0]:+.2f}", f"{known[1] - known[0]:+.2f}" if len(known) == 2 else "-"]
        psnr.append(line)
    return {"Standard deviation at initialisation (table 3.3)": spread, "PSNR by width (table 3.4)": psnr}


def _draw(options: SirenOptions, numbers: list[int], figure: Any, cells: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    for pair, style in zip(PAIRS, ("--", "-")):
        for i, width in enumerate(options.widths):
            curve = cells[f"width {width}, {pair}, seed {numbers[0]}"]["mse"]
            shown_curve(left, curve, f"{width}, {pair}", color=f"C{i}", linestyle=style)
        layers = cells[f"spread, {pair}, seed {numbers[0]}"]["layers"]
        right.plot([layer["z"] for layer in layers], "o", linestyle=style, label=pair)
        right.plot([_SPREAD[pair][0]], "kx")
    left.set_xlabel("step")
    left.set_ylabel("PSNR, dB")
    left.legend(fontsize=7)
    left.grid(alpha=0.3)
    right.set_xlabel("layer (x: published)")
    right.set_ylabel("standard deviation of omega z")
    right.set_xticks(range(options.depth + 1))
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
