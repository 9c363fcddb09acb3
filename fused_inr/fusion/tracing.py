"""Reads a function of pre-activations written in PyTorch as a formula, by calling it with stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .functions import KNOWN, NAMES

__all__ = ["formula_of"]


class _Unknown(Exception):
    """A function that is no formula."""


class _Traced:
    """A stand-in for a tensor: what is applied to it becomes an expression."""

    def __init__(self, expression: tuple):
        self.expression = expression

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        known = KNOWN.get(function)
        if known is None or known.inplace:
            raise _Unknown(function)
        return cls._apply(known.name, args[::-1] if known.reversed else args, kwargs or {})

    @classmethod
    def _apply(cls, name: str, args, kwargs) -> _Traced:
        given = tuple(a.expression if isinstance(a, cls) else ("=", a) for a in args)
        named = tuple((k, v.expression if isinstance(v, cls) else ("=", v)) for k, v in kwargs.items())
        if name not in NAMES:
            raise _Unknown(name)
        return cls((name, given, named))

    def __getattr__(self, name: str):
        if name in NAMES:
            return lambda *args, **kwargs: self._apply(name, (self, *args), kwargs)
        raise AttributeError(name)

    def __neg__(self):
        return self._apply("neg", (self,), {})

    def __float__(self):
        raise _Unknown("a number")


def _operator(name: str, reversed: bool):
    def method(self, other):
        return self._apply(name, (other, self) if reversed else (self, other), {})

    return method


for _name, _meant in (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("truediv", "div"), ("pow", "pow")):
    setattr(_Traced, f"__{_name}__", _operator(_meant, False))
    setattr(_Traced, f"__r{_name}__", _operator(_meant, True))


def formula_of(function: Callable[..., Any], branches: int, parameters: int) -> list[tuple] | None:
    """The expressions that a function of pre-activations and parameters computes; None where it is no formula."""
    zs = [_Traced(("z", i)) for i in range(branches)]
    leaves = [_Traced(("v", i)) for i in range(parameters)]
    try:
        result = function(*zs, *leaves)
    except (_Unknown, TypeError, AttributeError, ValueError):
        return None
    results = result if isinstance(result, tuple) else (result,)
    return [r.expression for r in results if isinstance(r, _Traced)] if results else None
