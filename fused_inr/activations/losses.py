"""Elementwise losses of (prediction, target): maps like the activations, so that their derivatives and kernels are too.

They are no activations: `names()` does not list them. The public side is `fused_inr.losses`.
"""

from __future__ import annotations

from .registry import loss


@loss()
def squared_error(prediction, target):
    """(prediction - target)^2"""
    return (prediction - target) ** 2


@loss()
def absolute_error(prediction, target):
    """abs(prediction - target); its derivative at 0 is 0"""
    from sympy import Abs

    return Abs(prediction - target)


@loss(delta=1.0)
def huber_error(prediction, target, delta):
    """e^2 / 2 for e = abs(prediction - target) up to delta, else delta (e - delta / 2) (Huber, 1964)"""
    from sympy import Abs, Piecewise

    error = Abs(prediction - target)
    return Piecewise((error**2 / 2, error <= delta), (delta * (error - delta / 2), True))


#: whose code is committed
LOSSES = (absolute_error, huber_error, squared_error)
