"""GELU, the exact form."""

import torch.nn.functional as F

from .facts import Facts
from .registry import register


@register(Facts(eager=F.gelu, slope=lambda: 1.13))
def gelu(z):
    """z (1 + erf(z / sqrt 2)) / 2"""
    from sympy import Rational, erf, sqrt

    return Rational(1, 2) * z * (1 + erf(z / sqrt(2)))
