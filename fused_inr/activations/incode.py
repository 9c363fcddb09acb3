"""INCODE (Kazerouni et al., 2024): a sine with modulated amplitude, frequency, phase and offset."""

import math

import torch

from .facts import Facts
from .registry import register


def _exp(value):
    return torch.exp(value) if isinstance(value, torch.Tensor) else math.exp(value)


@register(
    Facts(
        eager=lambda z, omega, a, b, c, d: _exp(a) * torch.sin(_exp(b) * omega * z + c) + d,
        # no solution, as for a sine
        sigma_p=lambda omega, a, b, c, d: 1 / omega,
        init="siren",
        slope=lambda omega, a, b, c, d: math.exp(a + b) * abs(omega),
        test_sigma=1 / 30,
    ),
    omega=30.0,
    a=0.0,
    b=0.0,
    c=0.0,
    d=0.0,
)
def incode(z, omega, a, b, c, d):
    """exp(a) sin(exp(b) omega z + c) + d"""
    from sympy import exp, sin

    return exp(a) * sin(exp(b) * omega * z + c) + d
