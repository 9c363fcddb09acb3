"""Fused linear + activation layers for implicit neural representations.

Importing this module imports nothing else, torch included: each name below loads its part when it is first used, so
that `fused-inr --help` answers at once, and no compiler, GPU, Triton or sympy is looked for before it is needed.
"""

import importlib
import importlib.machinery
import os
import sys
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
    "fuse",
    "fused",
    "fusion",
    "init",
    "layers",
    "losses",
    "models",
    "to_pytorch",
    "unfuse",
]

if TYPE_CHECKING:
    from . import activations, backends, encodings, functional, fusion, init, layers, losses, models
    from .convert import to_pytorch
    from .encodings import FourierFeatures
    from .fusion import fuse, fused, unfuse
    from .layers import FusedLinear, GaussianLayer, SincLayer, SineLayer, SplitLayer
    from .models import MLP, SIREN, SplitNet

_SUBMODULES = {"activations", "backends", "encodings", "functional", "fusion", "init", "layers", "losses", "models"}
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
    "fuse": "fusion",
    "fused": "fusion",
    "to_pytorch": "convert",
    "unfuse": "fusion",
}


class _Beside:
    """Finds `fused_inr.kernels` and `fused_inr.bench` in a checkout, where their folders lie beside this one.

    An installation puts them inside (pyproject.toml), and needs nothing of this.
    """

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name in (f"{__name__}.kernels", f"{__name__}.bench"):
            return importlib.machinery.PathFinder.find_spec(name, [cls.root])
        return None


if not os.path.isdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels")):
    # ahead of other finders: another checkout may be the one that is installed
    sys.meta_path.insert(0, _Beside)


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
