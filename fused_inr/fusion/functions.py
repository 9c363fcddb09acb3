"""PyTorch's pointwise functions as sympy formulas: what `fuse` can make part of an activation.

`FORMULAS` has of each function by name its formula with PyTorch's own arguments and defaults; `KNOWN` finds a function
object (`torch.sin`, `Tensor.sin_`, `Tensor.__rmul__`, `F.relu`) among them. A function that is not here, or is called with
arguments that its formula does not take, is no part of an activation: it is called as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import symbols

__all__ = ["ARITHMETIC", "COMPARISONS", "FORMULAS", "KNOWN", "LITERAL", "Function", "evaluate", "inplace_function"]


class Function(NamedTuple):
    """What a function object of PyTorch does: the name in `FORMULAS`, whether its two operands come in reverse, and
    whether it changes its first operand in place."""

    name: str
    reversed: bool = False
    inplace: bool = False


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
    "contiguous": _itself,
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

#: Functions that a product and a sum can do as well: a formula of these alone is no activation.
ARITHMETIC = frozenset("add sub mul div neg clone contiguous detach addcmul square reciprocal".split())
#: Functions whose value is a truth value.
COMPARISONS = frozenset("ge gt le lt".split())
#: Functions whose numbers are part of the formula; other numbers become parameters, so that they may change.
LITERAL = frozenset(
    "pow clamp clamp_min clamp_max leaky_relu elu celu hardtanh hardshrink softshrink threshold".split()
)

_ALIASES = {
    "absolute": "abs",
    "arctan": "atan",
    "clip": "clamp",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "subtract": "sub",
    "true_divide": "div",
    "expit": "sigmoid",
    "log_sigmoid": "logsigmoid",
    "max": "maximum",
    "min": "minimum",
}
_OPERATORS = {
    "__abs__": Function("abs"),
    "__add__": Function("add"),
    "__radd__": Function("add", reversed=True),
    "__iadd__": Function("add", inplace=True),
    "__sub__": Function("sub"),
    "__rsub__": Function("sub", reversed=True),
    "__isub__": Function("sub", inplace=True),
    "__mul__": Function("mul"),
    "__rmul__": Function("mul", reversed=True),
    "__imul__": Function("mul", inplace=True),
    "__truediv__": Function("div"),
    "__rtruediv__": Function("div", reversed=True),
    "__rdiv__": Function("div", reversed=True),
    "__div__": Function("div"),
    "__itruediv__": Function("div", inplace=True),
    "__idiv__": Function("div", inplace=True),
    "__pow__": Function("pow"),
    "__rpow__": Function("pow", reversed=True),
    "__ipow__": Function("pow", inplace=True),
    "__neg__": Function("neg"),
    "__gt__": Function("gt"),
    "__ge__": Function("ge"),
    "__lt__": Function("lt"),
    "__le__": Function("le"),
}


def _known() -> dict[Any, Function]:
    places = (torch, Tensor, F, torch.special, torch._C._nn)
    found: dict[Any, Function] = {}
    for name in [*FORMULAS, *_ALIASES]:
        function = Function(_ALIASES.get(name, name))
        for place in places:
            for spelled, meant in ((name, function), (f"{name}_", function._replace(inplace=True))):
                it = getattr(place, spelled, None)
                if callable(it):
                    found[it] = meant
    for name, function in _OPERATORS.items():
        if hasattr(Tensor, name):
            found[getattr(Tensor, name)] = function
    found[torch.rsub] = Function("sub", reversed=True)
    # the method has the condition second
    found.pop(Tensor.where, None)
    return found


#: Function objects of PyTorch.
KNOWN = _known()

_SPELLED: dict[str, Callable[..., Any]] = {
    "celu": F.celu,
    "contiguous": lambda input, **_: input,
    "clone": lambda input, **_: input,
    "detach": lambda input: input.detach(),
    "prelu": F.prelu,
    "where": torch.where,
}


def _callable(name: str) -> Callable[..., Any]:
    for place in (_SPELLED, vars(F), vars(torch)):
        if callable(place.get(name)):
            return place[name]
    return getattr(torch, name)


_CALLABLES = {name: _callable(name) for name in FORMULAS}


def evaluate(expression: tuple, zs: tuple[Tensor, ...], leaves: tuple) -> Tensor:
    """Computes an expression by PyTorch's own functions.

    Args:
        expression: as `formulas.State` holds it.
        zs: of each branch its pre-activations.
        leaves: its numbers and tensors.
    """
    done: dict[int, Any] = {}

    def visit(e):
        if type(e) is not tuple:
            return e
        if e[0] == "z":
            return zs[e[1]]
        if e[0] == "v":
            return leaves[e[1]]
        if e[0] == "=":
            return e[1]
        key = id(e)
        if key not in done:
            name, args, kwargs = e
            values = [visit(a) for a in args]
            if name in ("pow", "sub", "div", "mul", "add") and not isinstance(values[0], Tensor):
                done[key] = _reversed(name, values)
            else:
                done[key] = _CALLABLES[name](*values, **{k: visit(v) for k, v in kwargs})
        return done[key]

    return visit(expression)


def _reversed(name: str, values: list):
    a, b = values
    if name == "pow":
        return torch.pow(a, b)
    return a - b if name == "sub" else a / b if name == "div" else a * b if name == "mul" else a + b


_inplace: dict[Any, bool] = {}


def inplace_function(function: Any) -> bool:
    """Whether a function of PyTorch changes an operand in place, by its name."""
    found = _inplace.get(function)
    if found is None:
        name = getattr(function, "__name__", "")
        dunder = name.startswith("__")
        found = (name.endswith("_") and not dunder) or name in _WRITING or (dunder and name in _INPLACE_OPERATORS)
        _inplace[function] = found
    return found


_INPLACE_OPERATORS = frozenset(f"__i{n}__" for n in "add sub mul truediv div pow floordiv mod and or xor".split())
_WRITING = frozenset(("__setitem__", "__set__", "_foreach_copy_"))
