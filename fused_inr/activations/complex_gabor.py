"""The Gabor wavelet of WIRE (Saragadam et al., 2023) of a complex pre-activation."""

import torch

from .facts import Facts
from .registry import register


def _eager(zr, zi, omega, scale):
    square = scale * scale
    envelope = torch.exp(-(omega * zi) - square * zr * zr - square * zi * zi)
    return envelope * torch.cos(omega * zr), envelope * torch.sin(omega * zr)


@register(
    Facts(
        eager=_eager,
        # no solution, as for a sine
        sigma_p=lambda omega, scale: 1 / omega,
        test_sigma=0.1,
    ),
    omega=10.0,
    scale=10.0,
)
def complex_gabor(zr, zi, omega, scale):
    """exp(j omega z - abs(scale z)^2) of z = zr + j zi: real part, imaginary part"""
    from sympy import Abs, Or, Piecewise, cos, exp, sin

    from .symbols import keep

    # beyond 40 widths both parts are 0; the exponential itself would say inf * 0 at infinity
    beyond = Or(Abs(scale * zr) >= 40, Abs(scale * zi) >= 40)
    zr, zi = (keep(Piecewise((0, beyond), (part, True))) for part in (zr, zi))
    envelope = exp(-omega * zi - (scale * zr) ** 2 - (scale * zi) ** 2)
    return tuple(Piecewise((0, beyond), (envelope * wave(omega * zr), True)) for wave in (cos, sin))
