"""SplitNet: four branches multiplied."""

import torch

from .facts import Facts
from .registry import factory, register
from .spec import Activation


def _eager(z1, z2, z3, z4, m, w1, w2, w3, w4):
    return m * torch.tanh(w1 * z1) * torch.sigmoid(w2 * z2) * torch.sin(w3 * z3) * torch.cos(w4 * z4)


@register(
    Facts(
        # sigma_p is 1, as LSUV's target for each branch
        eager=_eager,
        model="SplitNet",
        model_arguments=lambda m, w1, w2, w3, w4: {"m": m, "omegas": (w1, w2, w3, w4)},
        layer="SplitLayer",
        slope=lambda m, w1, w2, w3, w4: abs(m) * max(abs(w1), abs(w2) / 4, abs(w3), abs(w4)),
        test_values={"m": 3.0},
    ),
    m=10.0,
    w1=1.0,
    w2=1.0,
    w3=1.0,
    w4=1.0,
)
def _split(z1, z2, z3, z4, m, w1, w2, w3, w4):
    """m tanh(w1 z1) sigmoid(w2 z2) sin(w3 z3) cos(w4 z4)"""
    from sympy import cos, sin, tanh

    from .symbols import sigmoid

    return m * tanh(w1 * z1) * sigmoid(w2 * z2) * sin(w3 * z3) * cos(w4 * z4)


@factory
def split(m=10.0, omegas=(1.0, 1.0, 1.0, 1.0), *, learnable=(), per_feature=False) -> Activation:
    """m tanh(w1 z1) sigmoid(w2 z2) sin(w3 z3) cos(w4 z4): the branches lie in this order in one weight [4N, K].

    Args:
        m: factor of the product (parameter `m`).
        omegas: one number for all branches, or four (parameters `w1` .. `w4`).
    """
    if not isinstance(omegas, list | tuple):
        omegas = (omegas,) * 4
    if len(omegas) != 4:
        raise ValueError(f"split: omegas needs one number or four (tanh, sigmoid, sin, cos), got {len(omegas)}")
    w1, w2, w3, w4 = omegas
    return _split(m=m, w1=w1, w2=w2, w3=w3, w4=w4, learnable=learnable, per_feature=per_feature)
