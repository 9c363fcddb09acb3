"""Gaussian (Ramasinghe & Lucey, 2022; VI3NR)."""

import math

import torch

from .facts import Facts
from .gaussian_scale import gaussian_scale
from .registry import factory, register
from .spec import Activation


@register(
    Facts(
        eager=lambda z, sigma: torch.exp(-(z**2) / (2 * sigma**2)),
        # where both of VI3NR's conditions hold: 1.5538 sigma
        sigma_p=lambda sigma: math.sqrt(1 + math.sqrt(2)) * sigma,
        bench_init="vi3nr",
        layer="GaussianLayer",
        at_zero=lambda f0, f1, f2: {"sigma": (-f2) ** -0.5} if f2 < 0 else None,
        slope=lambda sigma: math.exp(-0.5) / abs(sigma),
        test_sigma=0.05,
    ),
    sigma=0.05,
)
def _gaussian(z, sigma):
    """exp(-z^2 / (2 sigma^2))"""
    from sympy import Rational, exp

    from .symbols import saturate

    return exp(-Rational(1, 2) * saturate(z / sigma) ** 2)


@factory
def gaussian(*, sigma=None, scale=None, learnable=(), per_feature=False) -> Activation:
    """exp(-z^2 / (2 sigma^2)), or with `scale=` WIRE's form exp(-(scale z)^2); scale = 1/(sqrt(2) sigma).

    Args:
        sigma: standard deviation of the bump in units of z; 0.05 (VI3NR's) when neither is given.
        scale: the other parametrisation; not together with `sigma`.
    """
    if sigma is not None and scale is not None:
        raise ValueError("gaussian: give sigma or scale, not both (scale = 1/(sqrt(2) sigma))")
    if scale is not None:
        return gaussian_scale(scale=scale, learnable=learnable, per_feature=per_feature)
    return _gaussian(sigma=0.05 if sigma is None else sigma, learnable=learnable, per_feature=per_feature)
