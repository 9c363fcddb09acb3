"""Holds what `fused-inr fit` can be asked for, apart from the training: reading arguments takes no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

PRECISIONS = ("float32", "tf32", "bf16", "fp16", "float64")
INITS = ("paper", "default", "siren", "siren-tuned", "vi3nr")
NORMS = ("layer", "rms")
METHODS = ("auto", "montecarlo", "quadrature")  # of moments
BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
WIDEST, DEEPEST = 1 << 16, 1000  # features of a layer and layers, beyond which a number is a mistake
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "str | None": (str, type(None)), "int": (int,), "bool": (bool,), "float": (float, int),
}  # fmt: skip


@dataclass(frozen=True)
class FitOptions:
    """Everything that decides the result of a fit, bit for bit on one machine; stored in its checkpoint and its report.

    `size`: longer side after shrinking, 0 as it is. `depth`: hidden-to-hidden layers. `batch`: rows of a step, 0 all.
    `residual`, `norm`: skip connections and norms, as of `MLP`.
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

    @staticmethod
    def checked(values: Any) -> FitOptions:
        """Make options of what was stored as JSON, and is not believed unseen.

        Raises:
            ValueError: unknown or wrongly typed options, or values that the command line would not take.
        """
        if not isinstance(values, dict):
            raise ValueError("its options are no JSON object")
        known = {f.name: f for f in fields(FitOptions)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"it has an option {name!r}, which this version does not know")
            accepted = _TYPES[str(known[name].type)]
            if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
                raise ValueError(f"its option {name} is {value!r}")
        options = FitOptions(**values)
        for name, choices in (
            ("precision", PRECISIONS),
            ("init", INITS),
            ("backend", BACKENDS),
            ("norm", (None, *NORMS)),
        ):
            if getattr(options, name) not in choices:
                raise ValueError(
                    f"its option {name} is {getattr(options, name)!r}, none of {', '.join(map(str, choices))}"
                )
        most = 2**63 - 1
        for name, least, largest in (
            ("size", 0, most), ("width", 1, WIDEST), ("depth", 0, DEEPEST), ("steps", 1, most), ("batch", 0, most),
            ("seed", 0, most),
        ):  # fmt: skip
            if not least <= getattr(options, name) <= largest:
                raise ValueError(f"its option {name} is {getattr(options, name)}, not within {least} .. {largest}")
        if not 0 < options.lr < math.inf:
            raise ValueError(f"its option lr is {options.lr}")
        return options
