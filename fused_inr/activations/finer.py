"""FINER (Liu et al., 2024): sine with a frequency that grows with abs(z)."""

from .registry import factory, register
from .spec import Activation


@register(omega=30.0)
def _finer(z, omega):
    """sin(omega (abs(z) + 1) z)"""
    from sympy import Abs, sin

    return sin(omega * (Abs(z) + 1) * z)


@register(omega=30.0)
def finer_detached(z, omega):
    """sin(omega s z) with s = abs(z) + 1 held constant under differentiation, as the published code does"""
    from sympy import Abs, sin

    from .symbols import detach

    return sin(omega * detach(Abs(z) + 1) * z)


@factory
def finer(omega=30.0, *, detach_scale=False, learnable=(), per_feature=False) -> Activation:
    """sin(omega (abs(z) + 1) z).

    Args:
        omega: frequency.
        detach_scale: hold abs(z) + 1 constant under differentiation, as the published code does (its gradients are
            then not those of the function). The second derivative jumps at 0, where sign(0) = 0.
    """
    return (finer_detached if detach_scale else _finer)(omega=omega, learnable=learnable, per_feature=per_feature)
