"""Logistic sigmoid."""

from .registry import register


@register()
def sigmoid(z):
    """1 / (1 + exp(-z))"""
    from . import symbols

    return symbols.sigmoid(z)
