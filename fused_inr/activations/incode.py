"""INCODE (Kazerouni et al., 2024): a sine with modulated amplitude, frequency, phase and offset."""

from .registry import register


@register(omega=30.0, a=0.0, b=0.0, c=0.0, d=0.0)
def incode(z, omega, a, b, c, d):
    """exp(a) sin(exp(b) omega z + c) + d"""
    from sympy import exp, sin

    return exp(a) * sin(exp(b) * omega * z + c) + d
