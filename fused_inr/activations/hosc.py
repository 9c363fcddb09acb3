"""HOSC (Serrano et al., 2024): a sine with sharpened edges."""

from .registry import register


@register(beta=8.0, omega=1.0)
def hosc(z, beta, omega):
    """tanh(beta sin(omega z))"""
    from sympy import sin, tanh

    return tanh(beta * sin(omega * z))
