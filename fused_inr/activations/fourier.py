"""Fourier features (Tancik et al., 2020) as a map with two outputs."""

import math

import torch

from .facts import Facts
from .registry import register


@register(
    Facts(
        eager=lambda z: (torch.cos(2 * math.pi * z), torch.sin(2 * math.pi * z)),
        slope=lambda: 2 * math.pi,
    )
)
def fourier(z):
    """cos(2 pi z), sin(2 pi z)"""
    from sympy import cos, pi, sin

    return cos(2 * pi * z), sin(2 * pi * z)
