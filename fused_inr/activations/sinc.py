"""Sinc (unnormalised), as in VI3NR; `torch.sinc` is omega = pi."""

from .registry import register


@register(omega=1.0)
def sinc(z, omega):
    """sin(omega z) / (omega z), 1 at 0"""
    import sympy

    return sympy.sinc(omega * z)
