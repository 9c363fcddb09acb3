"""FINER as its published code differentiates it: the growing frequency is held constant."""

import torch

from .facts import Facts
from .registry import register


@register(
    Facts(
        eager=lambda z, omega: torch.sin((torch.abs(z) + 1).detach() * z * omega),
        # no solution, as for a sine
        sigma_p=lambda omega: 1 / omega,
        init="siren",
        detached=True,
        test_sigma=1 / 30,
    ),
    omega=30.0,
)
def finer_detached(z, omega):
    """sin(omega s z) with s = abs(z) + 1 held constant under differentiation, as the published code does"""
    from sympy import Abs, sin

    from .symbols import detach

    return sin(omega * detach(Abs(z) + 1) * z)
