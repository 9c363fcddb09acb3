"""Gabor wavelets of WIRE (Saragadam et al., 2023)."""

from .registry import register


@register(omega=10.0, scale=10.0)
def gabor(z1, z2, omega, scale):
    """cos(omega z1) exp(-(scale z2)^2): WIRE's real form, two linear maps"""
    from sympy import cos, exp

    from .symbols import saturate

    return cos(omega * z1) * exp(-(saturate(scale * z2) ** 2))


@register(omega=10.0, scale=10.0)
def complex_gabor(zr, zi, omega, scale):
    """exp(j omega z - abs(scale z)^2) of z = zr + j zi: real part, imaginary part"""
    from sympy import Abs, Or, Piecewise, cos, exp, sin

    from .symbols import keep

    # beyond 40 widths both parts are 0; the exponential itself would say inf * 0 at infinity
    beyond = Or(Abs(scale * zr) >= 40, Abs(scale * zi) >= 40)
    zr, zi = (keep(Piecewise((0, beyond), (part, True))) for part in (zr, zi))
    envelope = exp(-omega * zi - (scale * zr) ** 2 - (scale * zi) ** 2)
    return tuple(Piecewise((0, beyond), (envelope * wave(omega * zr), True)) for wave in (cos, sin))
