"""VI3NR's toy wavelet."""

from .registry import register


@register()
def wavelet(z):
    """cos(z) exp(-z^2)"""
    from sympy import cos, exp

    from .symbols import saturate

    return cos(saturate(z)) * exp(-(saturate(z) ** 2))
