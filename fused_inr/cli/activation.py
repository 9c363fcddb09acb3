"""Reads `--activation`: a registered name or a formula, with values for its parameters.

`sine`, `sine:omega=20`, `gaussian:sigma=0.05`, `finer:omega=10,learnable`, `sin(omega*z**2):omega=2`
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import CliError

if TYPE_CHECKING:
    from ..activations import Activation

_FUNCTIONS = ("sin", "cos", "tan", "exp", "log", "sqrt", "sinh", "cosh", "tanh", "atan", "erf", "abs", "min", "max")
_STABLE = ("sigmoid", "softplus")  # from fused_inr.activations.symbols
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def parse_activation(text: str, option: str = "--activation") -> Activation:
    """Return the activation that `--activation TEXT` (or another `option`) means.

    Raises:
        CliError: an unknown name or parameter, a value that is no number, a formula that cannot be read.
    """
    from .. import activations

    head, _, tail = text.strip().partition(":")
    values, learnable = _parameters(f"{option} {text}", tail)
    try:
        if head.isidentifier() and head != "z":
            if head not in activations.names():
                raise ValueError(
                    f"no activation is called {head!r}; there are {', '.join(activations.names())}, or a formula in z, "
                    "such as sin(2*z)"
                )
            base = activations.get(head)
            if set(values) <= set(base.param_names):
                return base.map(**{**base.params, **values}, learnable=learnable)
            # the constructor knows arguments that are no parameters of the map: gaussian's scale=, split's omegas=
            return getattr(activations, head)(**values, learnable=learnable)
        defined = activations.define("formula", _formula(head, tuple(values)), **values)
        return defined.map(learnable=learnable, **values)
    except (TypeError, ValueError) as error:
        raise CliError(f"{option} {text}: {error}") from error


def _parameters(where: str, tail: str) -> tuple[dict[str, Any], bool]:
    values: dict[str, Any] = {}
    learnable = False
    for item in filter(None, (part.strip() for part in tail.split(","))):
        name, equals, number = (part.strip() for part in item.partition("="))
        if item == "learnable":
            learnable = True
        elif not equals or not name.isidentifier():
            raise CliError(f"{where}: parameters look like omega=30,learnable; got {item!r}")
        else:
            try:
                values[name] = float(number)
            except ValueError:
                raise CliError(f"{where}: {name} needs a number, got {number!r}") from None
            if not math.isfinite(values[name]):
                raise CliError(f"{where}: {name} needs a finite number, got {number!r}")
    return values, learnable


def _formula(text: str, parameters: tuple[str, ...]) -> Callable:
    """Return a function of sympy symbols, z and then the parameters, that `text` describes.

    The text is walked, not evaluated: numbers, names, + - * / **, and the functions listed above.
    """
    accepted = ", ".join((*_FUNCTIONS, *_STABLE))
    try:
        tree = ast.parse(text.replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or "it cannot be read"
        raise ValueError(f"{text!r} is neither a registered activation nor a formula in z: {reason}") from None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if "z" not in names:
        raise ValueError(f"{text!r} is neither a registered activation nor a formula in z")
    unknown = sorted(names - {"z", "pi", *parameters, *_FUNCTIONS, *_STABLE})
    if unknown:
        raise ValueError(f"the formula has no value for {unknown[0]!r}: append :{unknown[0]}=1, or use {accepted}")

    def build(node: ast.AST, known: dict[str, Any]) -> Any:
        import sympy

        from ..activations import symbols

        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return sympy.sympify(node.value)
        if isinstance(node, ast.Name) and node.id in known:
            return known[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = build(node.operand, known)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = build(node.left, known), build(node.right, known)
            if isinstance(node.op, ast.Pow):
                _check_power(node, left, right)
            return _OPERATORS[type(node.op)](left, right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            name, arguments = node.func.id, [build(argument, known) for argument in node.args]
            if name in _STABLE:
                return getattr(symbols, name)(*arguments)
            if name in _FUNCTIONS:
                return getattr(sympy, {"abs": "Abs", "min": "Min", "max": "Max"}.get(name, name))(*arguments)
        raise ValueError(
            f"cannot read {ast.unparse(node)!r} in the formula; it takes numbers, z, + - * / **, {accepted}"
        )

    def formula(*arguments: Any, **keywords: Any) -> Any:
        import sympy

        return build(tree, {"pi": sympy.pi, **dict(zip(("z", *parameters), arguments)), **keywords})

    formula.advice = f"it takes numbers, z, + - * / **, {accepted}"  # type: ignore[attr-defined]
    # `define` reads the number of branches and the parameters off the signature
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    formula.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in ("z", *parameters)])  # type: ignore
    return formula


#: powers of numbers beyond these overflow float64; exponents of z beyond this one are no activation
_LARGEST_LOG10, _LARGEST_EXPONENT = 308.0, 1000


def _check_power(node: ast.AST, base: Any, exponent: Any) -> None:
    """Refuse a power that sympy cannot be given.

    Raises:
        ValueError: a power that takes for ever to write out, or is no float64.
    """
    if not getattr(exponent, "is_number", False):
        return
    size = abs(complex(exponent))
    if getattr(base, "is_number", False):
        if base and size * abs(math.log10(abs(complex(base)))) > _LARGEST_LOG10:
            raise ValueError(f"{ast.unparse(node)} is beyond the numbers of float64")
    elif size > _LARGEST_EXPONENT:
        raise ValueError(f"the exponent of {ast.unparse(node)} is larger than {_LARGEST_EXPONENT}")
