"""Elementwise losses of (prediction, target): maps like the activations, so that their derivatives and kernels are too.

They are no activations: `names()` does not list them, `registered_losses()` does. The public side is
`fused_inr.losses`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .facts import Facts
from .registry import loss


@loss(Facts(eager=lambda prediction, target: F.mse_loss(prediction, target, reduction="none"), public="mse"))
def squared_error(prediction, target):
    """(prediction - target)^2"""
    return (prediction - target) ** 2


@loss(Facts(eager=lambda prediction, target: F.l1_loss(prediction, target, reduction="none"), public="l1"))
def absolute_error(prediction, target):
    """abs(prediction - target); its derivative at 0 is 0"""
    from sympy import Abs

    return Abs(prediction - target)


def _huber(prediction, target, delta):
    number = delta.item() if isinstance(delta, Tensor) else delta  # PyTorch's takes a number only
    return F.huber_loss(prediction, target, reduction="none", delta=number)


@loss(
    Facts(
        eager=_huber,
        test_values={"delta": 0.3},
        public="huber",
    ),
    delta=1.0,
)
def huber_error(prediction, target, delta):
    """e^2 / 2 for e = abs(prediction - target) up to delta, else delta (e - delta / 2) (Huber, 1964)"""
    from sympy import Abs, Piecewise

    error = Abs(prediction - target)
    return Piecewise((error**2 / 2, error <= delta), (delta * (error - delta / 2), True))
