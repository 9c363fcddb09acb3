"""Guards the pieces of a formula where they are not taken, so that no 0 times infinity arises.

`Piecewise((z, z > 0), (exp(z) - 1, True))` at z = 100 takes z; but its derivative also passes 0 through that of
exp(100), which is NaN where exp overflows. So each piece is given, in place of arguments for which it is not taken, a
point where it is finite: exp(where(z > 0, -1, z)) - 1. Values and derivatives where it is taken do not change.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from . import primitives, printing
from .tape import Program, Tape, from_sympy

#: Points at which pieces are tried, in this order; of several branches, their combinations.
_POINTS = (1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.0, 0.1, -0.1, 4.0, -4.0, 10.0, -10.0, 50.0, -50.0)
_MOST_POINTS = 1 << 12


def guarded(expression: Any, symbols: tuple, values: dict[Any, float]) -> Any:
    """Return a sympy expression with harmless arguments in the pieces that are not taken.

    Args:
        symbols: the pre-activations.
        values: parameter symbol -> its default, at which points are tried.
    """
    import sympy

    def rewrite(whole: Any) -> Any:
        pieces, before = [], sympy.false
        for piece, condition in whole.args:
            elsewhere = sympy.Or(before, sympy.Not(condition))
            inside = tuple(s for s in symbols if s in piece.free_symbols)
            point = _point(piece, elsewhere, inside, symbols, values) if inside else None
            if point is not None:
                # as a choice that a NaN does not take: it stays NaN
                piece = piece.xreplace(
                    {s: sympy.Piecewise((p, elsewhere), (s, True), evaluate=False) for s, p in zip(inside, point)}
                )
            pieces.append((piece, condition))
            before = sympy.Or(before, condition)
        return sympy.Piecewise(*pieces, evaluate=False)

    if not expression.has(sympy.Piecewise):
        return expression
    return _bottom_up(expression, rewrite)


def _bottom_up(expression: Any, rewrite: Any) -> Any:
    import sympy

    if not expression.args or isinstance(expression, sympy.logic.boolalg.Boolean):
        return expression
    if isinstance(expression, sympy.Piecewise):
        pieces = [(_bottom_up(piece, rewrite), condition) for piece, condition in expression.args]
        return rewrite(sympy.Piecewise(*pieces, evaluate=False))
    arguments = [_bottom_up(a, rewrite) for a in expression.args]
    return expression if arguments == list(expression.args) else expression.func(*arguments)


def _point(piece: Any, elsewhere: Any, inside: tuple, symbols: tuple, values: dict[Any, float]) -> list[float] | None:
    """Find where the piece is taken, and finite with its first two derivatives; None where no such point is found."""
    import sympy

    taken = sympy.Piecewise((0, elsewhere), (1, True), evaluate=False)
    run = _function([piece, taken], (*symbols, *values))
    points = list(itertools.islice(itertools.product(_POINTS, repeat=len(symbols)), _MOST_POINTS))
    z = torch.tensor(points, dtype=torch.float64).T.clone().requires_grad_()
    parameters = [torch.full_like(z[0], v) for v in values.values()]
    with torch.enable_grad():
        y, here = run(*z, *parameters)
        good = (here > 0.5) & torch.isfinite(y)
        if y.requires_grad:
            (slope,) = torch.autograd.grad(y.sum(), z, create_graph=True)
            good &= torch.isfinite(slope).all(0)
            if slope.requires_grad:
                (curve,) = torch.autograd.grad(slope.sum(), z)
                good &= torch.isfinite(curve).all(0)
    if not bool(good.any()):
        return None
    found = points[int(good.to(torch.int8).argmax())]
    return [found[symbols.index(s)] for s in inside]


def _function(expressions: list, arguments: tuple) -> Any:
    """Make a PyTorch function of `arguments` from sympy expressions."""
    tape = Tape()
    for symbol in arguments:
        tape.input(symbol.name)
    nodes = from_sympy(expressions, tape)
    program = Program(tape, [(s.name, (s.name,)) for s in arguments], [("y", tuple(nodes))])
    source = printing.torch_function("pieces", program)
    return printing.execute(source, "<fused_inr pieces>", {"p": primitives, "torch": torch})["pieces"]
