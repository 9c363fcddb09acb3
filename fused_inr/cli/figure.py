"""Draws the figure of a fit: target, reconstruction, error, PSNR over the steps."""

import io

import numpy as np

from . import CliError
from .files import printable


def draw(target: np.ndarray, reconstruction: np.ndarray, curve: list[float], title: str) -> bytes:
    """Return the figure as a PNG.

    Args:
        target, reconstruction: [height, width, channels] in [0, 1].
        curve: PSNR in dB, one value a step.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CliError("drawing the figure needs matplotlib: pip install 'fused_inr[fit]'") from error

    height, width = target.shape[:2]
    figure = Figure(figsize=(16, max(3.0, min(3.7 * height / width, 7.0)) + 1.0), layout="constrained")
    figure.suptitle(printable(title), parse_math=False)  # a file's name may have $ in it
    axes = figure.subplots(1, 4)
    for axis, pixels, name in zip(axes, (target, reconstruction), ("target", "reconstruction")):
        axis.imshow(_displayed(pixels), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name)
    off = np.abs(reconstruction - target).mean(-1)
    shown = axes[2].imshow(off, cmap="magma", vmin=0, vmax=max(float(off.max()), 1e-6), interpolation="nearest")
    axes[2].set_title("absolute error, mean over channels")
    figure.colorbar(shown, ax=axes[2], fraction=0.046)
    for axis in axes[:3]:
        axis.set_axis_off()
    finite = [(step, value) for step, value in enumerate(curve) if np.isfinite(value)]
    axes[3].plot(*(zip(*finite) if finite else ([], [])))
    axes[3].set_xlabel("step")
    axes[3].set_ylabel("PSNR of the step's batch, dB")
    axes[3].grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _displayed(pixels: np.ndarray) -> np.ndarray:
    """Return what matplotlib shows: grey [h, w], RGB and RGBA; grey with alpha becomes RGBA."""
    if pixels.shape[2] == 1:
        return pixels[..., 0]
    return pixels[..., [0, 0, 0, 1]] if pixels.shape[2] == 2 else pixels
