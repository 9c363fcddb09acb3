"""HOSC (Serrano et al., 2024): a sine with sharpened edges."""

import torch

from .facts import Facts
from .registry import register


@register(
    Facts(
        eager=lambda z, beta, omega: torch.tanh(beta * torch.sin(omega * z)),
        # no solution: tanh and sine are both at the end of their linear range there
        sigma_p=lambda beta, omega: 1 / (beta * omega),
        slope=lambda beta, omega: abs(beta * omega),
        test_sigma=0.05,
    ),
    beta=8.0,
    omega=1.0,
)
def hosc(z, beta, omega):
    """tanh(beta sin(omega z))"""
    from sympy import sin, tanh

    return tanh(beta * sin(omega * z))
