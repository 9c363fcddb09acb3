"""FINER (Liu et al., 2024): sine with a frequency that grows with abs(z)."""

import torch

from .facts import Facts
from .finer_detached import finer_detached
from .registry import factory, register
from .spec import Activation


@register(
    Facts(
        eager=lambda z, omega: torch.sin(omega * (torch.abs(z) + 1) * z),
        # no solution, as for a sine
        sigma_p=lambda omega: 1 / omega,
        init="siren",
        at_zero=lambda f0, f1, f2: {"omega": f1} if f1 else None,
        test_sigma=1 / 30,
    ),
    omega=30.0,
)
def _finer(z, omega):
    """sin(omega (abs(z) + 1) z)"""
    from sympy import Abs, sin

    return sin(omega * (Abs(z) + 1) * z)


@factory
def finer(omega=30.0, *, detach_scale=False, learnable=(), per_feature=False) -> Activation:
    """sin(omega (abs(z) + 1) z).

    Args:
        omega: frequency.
        detach_scale: hold abs(z) + 1 constant under differentiation, as the published code does (its gradients are
            then not those of the function). The second derivative jumps at 0, where sign(0) = 0.
    """
    return (finer_detached if detach_scale else _finer)(omega=omega, learnable=learnable, per_feature=per_feature)
