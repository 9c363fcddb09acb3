"""Hyperbolic tangent."""

import torch

from .facts import Facts
from .registry import register


# VI3NR's condition holds only in the limit 0: sigma_p is where it holds nearly, and tanh is still not linear
@register(Facts(eager=torch.tanh, sigma_p=lambda: 0.25, slope=lambda: 1.0))
def tanh(z):
    """tanh(z)"""
    import sympy

    return sympy.tanh(z)
