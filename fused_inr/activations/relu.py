"""Rectified linear unit."""

from .registry import register


@register()
def relu(z):
    """max(z, 0); derivative 0 at 0"""
    from sympy import Max

    return Max(z, 0)
