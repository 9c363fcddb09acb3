"""Softplus; signed distance fields use beta = 100."""

from .registry import register


@register(beta=1.0)
def softplus(z, beta):
    """log(1 + exp(beta z)) / beta"""
    from . import symbols

    return symbols.softplus(beta * z) / beta
