"""The Gabor wavelet of WIRE (Saragadam et al., 2023) in its real form."""

import math

import torch

from .facts import Facts
from .registry import register


@register(
    Facts(
        eager=lambda z1, z2, omega, scale: torch.cos(omega * z1) * torch.exp(-((scale * z2) ** 2)),
        # no solution, as for a sine
        sigma_p=lambda omega, scale: 1 / omega,
        slope=lambda omega, scale: max(abs(omega), math.sqrt(2 / math.e) * abs(scale)),
        test_sigma=0.1,
    ),
    omega=10.0,
    scale=10.0,
)
def gabor(z1, z2, omega, scale):
    """cos(omega z1) exp(-(scale z2)^2): WIRE's real form, two linear maps"""
    from sympy import cos, exp

    from .symbols import saturate

    return cos(omega * z1) * exp(-(saturate(scale * z2) ** 2))
