"""Fits networks shortly to a signal, full batch, and reads the pictures and recordings they are given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import losses
from ...init.walk import watch
from .. import CliError
from ..pictures import Picture, picture_of, read_picture


def fit(model: nn.Module, x: Tensor, target: Tensor, steps: int, lr: float, batch: int = 0) -> list[float]:
    """Fit by Adam; returns the mean squared error before each of `steps` steps, and after the last.

    A step sees all rows, or `batch` of them, drawn anew each time without repetition, and its error is theirs. The last
    error is always that of all rows.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    draws = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        rows = torch.randperm(len(x), generator=draws)[:batch] if 0 < batch < len(x) else slice(None)
        loss = losses.mse(model, x[rows], target[rows])
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    with torch.no_grad():
        curve.append(nn.functional.mse_loss(model(x), target))
    return torch.stack(curve).tolist()


def spreads(model: nn.Module, x: Tensor) -> list[dict[str, float]]:
    """Measure the standard deviation, over rows and features, of each product's input and of its pre-activation."""
    found: list[dict[str, float]] = []

    def visit(name: str, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = nn.functional.linear(rows, weight, bias)
        found.append({"x": rows.std().item(), "z": z.std().item()})
        return z

    with torch.no_grad(), watch(model, visit):
        model(x)
    return found


def decibel(mse: float, peak: float = 2.0) -> float:
    """Return 10 log10(peak^2 / mse): data in [-1, 1] have the peak 2, which is PSNR of data in [0, 1]."""
    return 10 * math.log10(peak * peak / mse) if 0 < mse < math.inf else (math.inf if mse == 0 else -math.inf)


def thinned(curve: list[float], points: int = 100) -> list[list[float]]:
    """Return [step, mse] of about `points` steps, the last among them."""
    every = max(1, (len(curve) - 1) // points)
    steps = sorted({*range(0, len(curve), every), len(curve) - 1})
    return [[step, curve[step]] for step in steps]


def shown_curve(axis: Any, points: list[list[float]], label: str, peak: float = 2.0, **style: Any) -> None:
    """Plot a curve of `thinned` in decibel over the steps."""
    known = [(step, decibel(mse, peak)) for step, mse in points if mse is not None and mse > 0]
    axis.plot(*zip(*known), label=label, **style)


def picture(data: str | None, size: int, hint: str) -> Picture:
    """Read the picture that was named.

    Raises:
        CliError: no picture was named, or it cannot be read.
    """
    if data is None:
        raise CliError(f"--data: a picture is needed; {hint}")
    return read_picture(data, size)


def cameraman(data: str | None, size: int) -> Picture:
    """Return the grey picture that most papers use: scikit-image's, or a file."""
    if data is not None:
        found = read_picture(data, size)
        grey = found.pixels[..., :3].mean(-1, keepdims=True) if found.pixels.shape[2] > 2 else found.pixels[..., :1]
        return Picture(found.name, np.ascontiguousarray(grey), found.depth)
    try:
        from skimage import data as samples

        pixels = samples.camera()
    except ImportError as error:
        raise CliError(
            "--data: a picture is needed where scikit-image, which brings the cameraman, is not installed: "
            "pip install scikit-image, or name any picture"
        ) from error
    return picture_of("camera", pixels, size)


def recording(data: str | None, seconds: float) -> tuple[str, int, np.ndarray]:
    """Return name, rate and the first `seconds` of a WAV file, [samples] float32, scaled to a peak of 1.

    Raises:
        CliError: no file was named, it is no WAV, it is silent, scipy is missing.
    """
    if data is None:
        raise CliError("--data: a recording is needed, a WAV file of some seconds (published: gt_bach.wav of SIREN)")
    try:
        from scipy.io import wavfile
    except ImportError as error:
        raise CliError("reading recordings needs scipy: pip install scipy") from error
    path = Path(data)
    if not path.is_file():
        raise CliError(f"{path}: no such recording")
    try:
        rate, values = wavfile.read(path)
    except Exception as error:  # whatever a damaged file leads to
        raise CliError(f"{path}: cannot be read as a WAV file: {error}") from error
    values = np.asarray(values, dtype=np.float64)
    values = values.mean(1) if values.ndim == 2 else values
    values = values[: int(rate * seconds)]
    peak = float(np.abs(values).max()) if len(values) else 0.0
    if len(values) < 2 or not np.isfinite(values).all() or peak == 0:
        raise CliError(f"{path}: holds no sound in its first {seconds:g} s")
    return path.name, int(rate), (values / peak).astype(np.float32)
