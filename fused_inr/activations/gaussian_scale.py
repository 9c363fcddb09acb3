"""Gaussian in the parametrisation of WIRE's GaussLayer."""

import math

import torch

from .facts import Facts
from .registry import register


@register(
    Facts(
        eager=lambda z, scale: torch.exp(-((scale * z) ** 2)),
        # where both of VI3NR's conditions hold: 1.0987 / scale
        sigma_p=lambda scale: math.sqrt(1 + math.sqrt(2)) / math.sqrt(2) / scale,
        slope=lambda scale: math.sqrt(2 / math.e) * abs(scale),
        test_sigma=0.1,
    ),
    scale=10.0,
)
def gaussian_scale(z, scale):
    """exp(-(scale z)^2)"""
    from sympy import exp

    from .symbols import saturate

    return exp(-(saturate(scale * z) ** 2))
