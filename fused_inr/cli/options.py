"""What `fused-inr fit` can be asked for. Apart from the training, so that reading arguments takes no torch."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("float32", "tf32", "bf16", "fp16", "float64")
INITS = ("paper", "default", "siren", "siren-tuned", "vi3nr")
NORMS = ("layer",)
METHODS = ("auto", "montecarlo", "quadrature")  # of moments
BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")


@dataclass(frozen=True)
class FitOptions:
    """What decides the result of a fit, bit for bit on one machine; stored in its checkpoint and its report.

    `size`: longer side after shrinking, 0 as it is. `depth`: hidden-to-hidden layers. `batch`: rows of a step, 0 all.
    `residual`, `norm`: skip connections and LayerNorm, as of `MLP`.
    """

    picture: str | None = None
    size: int = 256
    activation: str = "sine"
    width: int = 256
    depth: int = 3
    init: str = "paper"
    residual: bool = False
    norm: str | None = None
    steps: int = 500
    lr: float = 1e-4
    batch: int = 0
    precision: str = "float32"
    device: str = "cpu"
    backend: str = "auto"
    seed: int = 0
