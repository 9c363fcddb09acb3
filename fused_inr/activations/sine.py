"""Sine: the activation of SIREN (Sitzmann et al., 2020)."""

from .registry import register


@register(omega=30.0)
def sine(z, omega):
    """sin(omega z)"""
    from sympy import sin

    return sin(omega * z)
