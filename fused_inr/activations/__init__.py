"""Activations as maps: one formula a file, with value and derivatives of every order generated from it.

`sine(omega=30.0)` and its like return an `Activation`; `define` makes one from a formula; `get` from a name.
Learnable parameters: `sine(omega=30.0, learnable="omega", per_feature=True)`.
"""

from . import losses as losses
from .complex_gabor import complex_gabor
from .finer import finer
from .finer_detached import finer_detached
from .fourier import fourier
from .gabor import gabor
from .gaussian import gaussian
from .gaussian_scale import gaussian_scale
from .gelu import gelu
from .hosc import hosc
from .identity import identity
from .incode import incode
from .registry import define, get, lookup, names, registered, registered_losses
from .relu import relu
from .sigmoid import sigmoid
from .silu import silu
from .sinc import sinc
from .sine import sine
from .softplus import softplus
from .spec import Activation, ActivationMap
from .split import split
from .tanh import tanh
from .wavelet import wavelet

__all__ = [
    "Activation",
    "ActivationMap",
    "complex_gabor",
    "define",
    "finer",
    "finer_detached",
    "fourier",
    "gabor",
    "gaussian",
    "gaussian_scale",
    "gelu",
    "get",
    "hosc",
    "identity",
    "incode",
    "lookup",
    "names",
    "registered",
    "registered_losses",
    "relu",
    "sigmoid",
    "silu",
    "sinc",
    "sine",
    "softplus",
    "split",
    "tanh",
    "wavelet",
]
