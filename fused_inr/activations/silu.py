"""SiLU (swish)."""

from .registry import register


@register()
def silu(z):
    """z sigmoid(z)"""
    from .symbols import sigmoid

    return z * sigmoid(z)
