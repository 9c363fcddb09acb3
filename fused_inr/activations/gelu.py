"""GELU, the exact form."""

from .registry import register


@register()
def gelu(z):
    """z (1 + erf(z / sqrt 2)) / 2"""
    from sympy import Rational, erf, sqrt

    return Rational(1, 2) * z * (1 + erf(z / sqrt(2)))
