"""SiLU (swish)."""

import torch.nn.functional as F

from .facts import Facts
from .registry import register


@register(Facts(eager=F.silu, slope=lambda: 1.1))
def silu(z):
    """z sigmoid(z)"""
    from .symbols import sigmoid

    return z * sigmoid(z)
