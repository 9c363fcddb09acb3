"""Sine: the activation of SIREN (Sitzmann et al., 2020)."""

import torch

from .facts import Facts
from .registry import register


@register(
    Facts(
        eager=lambda z, omega: torch.sin(omega * z),
        # both of VI3NR's conditions hold nowhere: the phase omega z gets SIREN's standard deviation 1
        sigma_p=lambda omega: 1 / omega,
        init="siren",
        model="SIREN",
        model_arguments=lambda omega: {"omega": omega, "first_omega": omega},
        layer="SineLayer",
        at_zero=lambda f0, f1, f2: {"omega": f1} if f1 else None,
        slope=lambda omega: abs(omega),
        test_sigma=1 / 30,
    ),
    omega=30.0,
)
def sine(z, omega):
    """sin(omega z)"""
    from sympy import sin

    return sin(omega * z)
