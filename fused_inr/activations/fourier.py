"""Fourier features (Tancik et al., 2020) as a map with two outputs."""

from .registry import register


@register()
def fourier(z):
    """cos(2 pi z), sin(2 pi z)"""
    from sympy import cos, pi, sin

    return cos(2 * pi * z), sin(2 * pi * z)
