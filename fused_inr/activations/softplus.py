"""Softplus; signed distance fields use beta = 100."""

import math

import torch.nn.functional as F

from .facts import Facts
from .registry import register


@register(
    Facts(
        # PyTorch's takes a number only
        eager=lambda z, beta: F.softplus(z, beta) if isinstance(beta, float) else F.softplus(beta * z) / beta,
        at_zero=lambda f0, f1, f2: {"beta": math.log(2) / f0} if f0 > 0 else None,
        slope=lambda beta: 1.0,
    ),
    beta=1.0,
)
def softplus(z, beta):
    """log(1 + exp(beta z)) / beta"""
    from . import symbols

    return symbols.softplus(beta * z) / beta
