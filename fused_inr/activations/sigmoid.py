"""Logistic sigmoid."""

import torch

from .facts import Facts
from .registry import register


# sigma_p is where both of VI3NR's conditions hold
@register(Facts(eager=torch.sigmoid, sigma_p=lambda: 6.7546, slope=lambda: 0.25))
def sigmoid(z):
    """1 / (1 + exp(-z))"""
    from . import symbols

    return symbols.sigmoid(z)
