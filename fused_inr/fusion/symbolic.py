"""PyTorch's pointwise functions as sympy formulas, with PyTorch's own arguments and defaults.

A formula raises TypeError where it does not take the arguments that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy

from ..activations import symbols

__all__ = ["FORMULAS"]


def _piecewise(*pieces):
    return sympy.Piecewise(*pieces)


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    return _piecewise((input, input > 0), (negative_slope * input, True))


def _elu(input, alpha=1.0, inplace=False):
    # the exponential of what is not taken stays finite
    return _piecewise((input, input > 0), (alpha * symbols.expm1(sympy.Min(input, 0)), True))


def _celu(input, alpha=1.0, inplace=False):
    return _piecewise((input, input > 0), (alpha * symbols.expm1(sympy.Min(input, 0) / alpha), True))


def _selu(input, inplace=False):
    scale, alpha = sympy.Float(1.0507009873554804934193349852946), sympy.Float(1.6732632423543772848170429916717)
    return scale * _elu(input, alpha)


def _clamp(input, min=None, max=None):
    pieces: list[tuple[Any, Any]] = []
    if min is None and max is None:
        raise TypeError("clamp needs a bound")
    if min is not None and max is not None and not (_is_number(min) and _is_number(max) and min <= max):
        raise TypeError("clamp needs numbers, the smaller first")
    if min is not None:
        pieces.append((min, input < min))
    if max is not None:
        pieces.append((max, input > max))
    return _piecewise(*pieces, (input, True))


def _is_number(value) -> bool:
    return isinstance(value, int | float) or getattr(value, "is_number", False)


def _gelu(input, approximate="none"):
    if approximate == "none":
        return sympy.Rational(1, 2) * input * (1 + sympy.erf(input / sympy.sqrt(2)))
    if approximate != "tanh":
        raise TypeError("approximate is 'none' or 'tanh'")
    inner = sympy.Float(math.sqrt(2 / math.pi)) * (input + sympy.Float(0.044715) * input**3)
    return sympy.Rational(1, 2) * input * (1 + sympy.tanh(inner))


def _softplus(input, beta=1.0, threshold=20.0):
    smooth = symbols.softplus(beta * input) / beta
    if not _is_number(threshold) or threshold < 0:
        raise TypeError("softplus needs a threshold that is a number of at least 0")
    # beyond 20 the line is the function, in float32; PyTorch's own threshold
    return smooth if threshold >= 20 else _piecewise((input, beta * input > threshold), (smooth, True))


def _pow(input, exponent):
    if _is_number(input):
        if not input > 0:
            raise TypeError("a power of a number that is not positive")
        return sympy.exp(exponent * sympy.log(input))
    return input**exponent


def _add(input, other, alpha=1):
    return input + alpha * other


def _sub(input, other, alpha=1):
    return input - alpha * other


def _where(condition, input, other):
    if not isinstance(condition, sympy.core.relational.Relational | sympy.logic.boolalg.Boolean):
        raise TypeError("where needs a condition made of comparisons")
    return _piecewise((input, condition), (other, True))


def _two(function):
    """Of two operands: with one, `torch.max` is a reduction."""

    def formula(input, other):
        return function(input, other)

    return formula


def _threshold(input, threshold, value, inplace=False):
    return _piecewise((input, input > threshold), (value, True))


def _hardshrink(input, lambd=0.5):
    return _piecewise((input, sympy.Or(input > lambd, input < -lambd)), (0, True))


def _softshrink(input, lambd=0.5):
    return _piecewise((input - lambd, input > lambd), (input + lambd, input < -lambd), (0, True))


def _unary(function):
    def formula(input):
        return function(input)

    return formula


def _maybe_inplace(function):
    def formula(input, inplace=False):
        return function(input)

    return formula


def _relation(kind):
    def formula(input, other):
        return kind(input, other)

    return formula


def _itself(input, *, memory_format=None):
    return input


#: Of each function its formula in sympy's terms, with PyTorch's arguments.
FORMULAS: dict[str, Callable[..., Any]] = {
    "abs": _unary(sympy.Abs),
    "add": _add,
    "addcdiv": lambda input, tensor1, tensor2, *, value=1: input + value * tensor1 / tensor2,
    "addcmul": lambda input, tensor1, tensor2, *, value=1: input + value * tensor1 * tensor2,
    "atan": _unary(sympy.atan),
    "celu": _celu,
    "clamp": _clamp,
    "clamp_max": lambda input, max: _clamp(input, max=max),
    "clamp_min": lambda input, min: _clamp(input, min=min),
    "clone": _itself,
    "cos": _unary(sympy.cos),
    "cosh": _unary(sympy.cosh),
    "detach": _unary(symbols.detach),
    "div": lambda input, other: input / other,
    "elu": _elu,
    "erf": _unary(sympy.erf),
    "erfc": _unary(lambda x: 1 - sympy.erf(x)),
    "exp": _unary(sympy.exp),
    "exp2": _unary(lambda x: sympy.exp(x * sympy.log(2))),
    "expm1": _unary(symbols.expm1),
    "gelu": _gelu,
    "ge": _relation(sympy.Ge),
    "gt": _relation(sympy.Gt),
    "hardshrink": _hardshrink,
    "hardsigmoid": _maybe_inplace(lambda x: sympy.Min(sympy.Max(x + 3, 0), 6) / 6),
    "hardswish": _maybe_inplace(lambda x: x * sympy.Min(sympy.Max(x + 3, 0), 6) / 6),
    "hardtanh": lambda input, min_val=-1.0, max_val=1.0, inplace=False: sympy.Min(sympy.Max(input, min_val), max_val),
    "le": _relation(sympy.Le),
    "leaky_relu": _leaky_relu,
    "log": _unary(sympy.log),
    "log1p": _unary(symbols.log1p),
    "logsigmoid": _unary(lambda x: -symbols.softplus(-x)),
    "lt": _relation(sympy.Lt),
    "maximum": _two(sympy.Max),
    "minimum": _two(sympy.Min),
    "mish": _maybe_inplace(lambda x: x * sympy.tanh(symbols.softplus(x))),
    "mul": lambda input, other: input * other,
    "neg": _unary(lambda x: -x),
    "pow": _pow,
    "prelu": lambda input, weight: _leaky_relu(input, weight),
    "reciprocal": _unary(lambda x: 1 / x),
    "relu": _maybe_inplace(lambda x: sympy.Max(x, 0)),
    "relu6": _maybe_inplace(lambda x: sympy.Min(sympy.Max(x, 0), 6)),
    "rsqrt": _unary(lambda x: 1 / sympy.sqrt(x)),
    "selu": _selu,
    "sigmoid": _unary(symbols.sigmoid),
    "sign": _unary(sympy.sign),
    "silu": _maybe_inplace(lambda x: x * symbols.sigmoid(x)),
    "sin": _unary(sympy.sin),
    "sinc": _unary(lambda x: sympy.sinc(sympy.pi * x)),
    "sinh": _unary(sympy.sinh),
    "softplus": _softplus,
    "softshrink": _softshrink,
    "softsign": _unary(lambda x: x / (1 + sympy.Abs(x))),
    "sqrt": _unary(sympy.sqrt),
    "square": _unary(lambda x: x * x),
    "sub": _sub,
    "tan": _unary(sympy.tan),
    "tanh": _unary(sympy.tanh),
    "tanhshrink": _unary(lambda x: x - sympy.tanh(x)),
    "threshold": _threshold,
    "where": _where,
}
