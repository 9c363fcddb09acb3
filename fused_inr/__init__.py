"""Fused linear + activation layers for implicit neural representations.

Importing this module imports nothing else, torch included: each name below loads its part when it is first used, so
that `fused-inr --help` answers at once, and no compiler, GPU, Triton or sympy is looked for before it is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "SIREN",
    "FourierFeatures",
    "FusedLinear",
    "GaussianLayer",
    "SincLayer",
    "SineLayer",
    "SplitLayer",
    "SplitNet",
    "__version__",
    "activations",
    "backends",
    "encodings",
    "functional",
    "init",
    "layers",
    "losses",
    "models",
]

if TYPE_CHECKING:
    from . import activations, encodings, functional, init, layers, losses, models
    from .encodings import FourierFeatures
    from .layers import FusedLinear, GaussianLayer, SincLayer, SineLayer, SplitLayer
    from .models import MLP, SIREN, SplitNet
    from .ops import backends

_SUBMODULES = {"activations", "backends", "encodings", "functional", "init", "layers", "losses", "models"}
_HOME = {
    "FourierFeatures": "encodings",
    "FusedLinear": "layers",
    "GaussianLayer": "layers",
    "SincLayer": "layers",
    "SineLayer": "layers",
    "SplitLayer": "layers",
    "MLP": "models",
    "SIREN": "models",
    "SplitNet": "models",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    elif name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
