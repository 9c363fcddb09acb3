"""Sinc (unnormalised), as in VI3NR; `torch.sinc` is omega = pi."""

import math

import torch

from .facts import Facts
from .registry import register


@register(
    Facts(
        eager=lambda z, omega: torch.sinc(z * (omega / math.pi)),
        # where both of VI3NR's conditions hold
        sigma_p=lambda omega: 2.2233 / omega,
        bench_init="vi3nr",
        layer="SincLayer",
        at_zero=lambda f0, f1, f2: {"omega": (-3 * f2) ** 0.5} if f2 < 0 else None,
        slope=lambda omega: 0.4363 * abs(omega),
        test_values={"omega": 2.0},
    ),
    omega=1.0,
)
def sinc(z, omega):
    """sin(omega z) / (omega z), 1 at 0"""
    import sympy

    return sympy.sinc(omega * z)
