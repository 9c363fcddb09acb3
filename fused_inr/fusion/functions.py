"""The pointwise functions of PyTorch that `fuse` can make part of an activation, however they are spelled.

`KNOWN` finds a function object (`torch.sin`, `Tensor.sin_`, `Tensor.__rmul__`, `F.relu`) among `NAMES`, whose formulas
are in `symbolic.py`. A function that is not here, or is called with arguments that its formula does not take, is no
part of an activation: it is called as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ARITHMETIC", "COMPARISONS", "KNOWN", "LITERAL", "NAMES", "Function", "evaluate", "inplace_function"]


class Function(NamedTuple):
    """What a function object of PyTorch does: the name among `NAMES`, whether its two operands come in reverse, and
    whether it changes its first operand in place."""

    name: str
    reversed: bool = False
    inplace: bool = False


#: The functions that have a formula (`symbolic.FORMULAS`, which takes sympy).
NAMES = frozenset(
    """
    abs add addcdiv addcmul atan celu clamp clamp_max clamp_min clone cos
    cosh detach div elu erf erfc exp exp2 expm1 gelu ge gt
    hardshrink hardsigmoid hardswish hardtanh le leaky_relu log log1p logsigmoid lt maximum minimum
    mish mul neg pow prelu reciprocal relu relu6 rsqrt selu sigmoid sign
    silu sin sinc sinh softplus softshrink softsign sqrt square sub tan tanh
    tanhshrink threshold where
    """.split()
)

#: Functions that a product and a sum can do as well: a formula of these alone is no activation.
ARITHMETIC = frozenset("add sub mul div neg clone detach addcmul square reciprocal".split())
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
    for name in [*sorted(NAMES), *_ALIASES]:
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

#: Of each name PyTorch's function.
_CALLABLES: dict[str, Callable[..., Any]] = {n: vars(F).get(n) or getattr(torch, n) for n in NAMES}
#: The same with a number before the tensor, of which PyTorch's functions know not all.
_BEHIND_A_NUMBER = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


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
            numbered = name in _BEHIND_A_NUMBER and not isinstance(values[0], Tensor)
            function = _BEHIND_A_NUMBER[name] if numbered else _CALLABLES[name]
            done[key] = function(*values, **{k: visit(v) for k, v in kwargs})
        return done[key]

    return visit(expression)


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
