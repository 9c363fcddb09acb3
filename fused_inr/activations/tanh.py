"""Hyperbolic tangent."""

from .registry import register


@register()
def tanh(z):
    """tanh(z)"""
    import sympy

    return sympy.tanh(z)
