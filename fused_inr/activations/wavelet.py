"""VI3NR's toy wavelet."""

import torch

from .facts import Facts
from .registry import register


@register(
    Facts(
        eager=lambda z: torch.cos(z) * torch.exp(-(z**2)),
        # where both of VI3NR's conditions hold
        sigma_p=lambda: 0.8705,
        bench_init="vi3nr",
        slope=lambda: 1.086,
    )
)
def wavelet(z):
    """cos(z) exp(-z^2)"""
    from sympy import cos, exp

    from .symbols import saturate

    return cos(saturate(z)) * exp(-(saturate(z) ** 2))
