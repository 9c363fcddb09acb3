"""Formulas that grow function by function behind a linear layer, and the activation that a finished one is.

A `State` is a formula without its numbers and tensors (its leaves): "sin of leaf 0 times branch 0". Each function that
is applied leads to another state; which one is remembered, so that a model's second call looks each function up and
derives nothing. A state's map is found once: a registered activation where the formula is one's, else one of its own.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations import ActivationMap, registered
from ..activations.store import DEFINED
from .functions import ARITHMETIC, COMPARISONS, LITERAL, evaluate

__all__ = ["Matched", "State", "branch", "start"]

#: Numbers that stay in a formula: they say which function it is.
KEPT = (0, 1, -1, 2, 0.5)
#: Transitions that a state remembers: a number that is part of a formula may be another one at each call.
_MOST_TRANSITIONS = 64
#: Formulas of their own, each compiled once.
_MOST_OWN = 64


@dataclass(frozen=True)
class Matched:
    """The activation that a formula is.

    Attributes:
        map: its map.
        leaves: of each parameter of the map which leaf it is, or the number that it is.
        own: whether the map was made for this formula, and is no registered one.
    """

    map: ActivationMap
    leaves: tuple[int | float, ...]
    own: bool


class State:
    """A formula of the pre-activations of some branches and of leaves.

    Attributes:
        expression: ("z", branch), ("v", leaf), ("=", literal) or (function, arguments, keyword arguments).
        branches: how many the pre-activations are split into; 0 where that is open, as nothing was applied.
        of: the type of the pre-activations.
        dtype: of the value; None: that of the pre-activations.
        bare: whether nothing was applied: the pre-activation, or a branch of it.
        next: states by what is applied.
        steps: the same for a function alone, or with one number: by function; by (function, whether the pending is
            first, number) for a number that is part of the formula; without the number for one that is a parameter.
    """

    __slots__ = ("_matched", "_parts", "bare", "branches", "dtype", "expression", "next", "of", "reason", "steps")

    def __init__(self, expression: tuple, branches: int, of: torch.dtype, dtype: torch.dtype | None = None):
        self.expression = expression
        self.branches = branches
        self.of = of
        self.dtype = dtype
        self.bare = expression[0] == "z"
        self.next: dict[Any, Any] = {}
        self.steps: dict[Any, State] = {}
        self.reason = ""
        self._matched: dict[Any, Matched | None] = {}
        self._parts: tuple[set[str], set[int]] | None = None

    def parts(self) -> tuple[set[str], set[int]]:
        """The functions and the branches that the formula has."""
        if self._parts is None:
            names: set[str] = set()
            branches: set[int] = set()

            def visit(e):
                if type(e) is tuple:
                    if e[0] == "z":
                        branches.add(e[1])
                    elif e[0] not in ("v", "="):
                        names.add(e[0])
                        for a in e[1]:
                            visit(a)
                        for _, a in e[2]:
                            visit(a)

            visit(self.expression)
            self._parts = names, branches
        return self._parts

    def why_not(self) -> str:
        """Why the formula is no activation of its own; empty where it is."""
        if self.bare:
            return "nothing pointwise follows"
        names, branches = self.parts()
        if names <= ARITHMETIC:
            return "only arithmetic follows"
        if self.dtype is torch.bool:
            return "only a comparison follows"
        if len(branches) < self.branches:
            return f"only {len(branches)} of {self.branches} branches are used"
        return ""

    def matched(self, leaves: tuple, complex_z: bool, complex_y: bool) -> Matched | None:
        """The activation that the formula is; None, with `reason`, where it is none.

        `complex_z`, `complex_y`: whether the pre-activation and the value are complex: two branches, two outputs.
        """
        key = complex_z, complex_y
        if key not in self._matched:
            try:
                self.reason = self.why_not()
                self._matched[key] = None if self.reason else _match(self, leaves, *key)
            except Exception as error:  # a formula that nothing compiles is computed by PyTorch
                self.reason = (
                    f"its formula cannot be compiled: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
                )
                self._matched[key] = None
        return self._matched[key]

    def written(self, leaves: tuple) -> str:
        """The formula as text, with the numbers among its leaves; a tensor is p and its position."""
        import sympy

        zs = [sympy.Symbol("z" if self.branches < 2 else f"z{i + 1}", real=True) for i in range(max(1, self.branches))]
        values = {}
        for i, leaf in enumerate(leaves):
            value = sympy.Symbol(f"p{i + 1}", real=True) if isinstance(leaf, Tensor) else sympy.Symbol(f"{leaf:.6g}")
            values[sympy.Symbol(f"v{i}", real=True)] = value
        return str(sympy.sympify(_sympy(self.expression, zs)).xreplace(values))


_states: dict[Any, State] = {}


def state_of(expression: tuple, branches: int, of: torch.dtype, dtype: torch.dtype | None = None) -> State:
    """The state of an expression: the same object for the same one."""
    key = (expression, branches, of, dtype)
    found = _states.get(key)
    if found is None:
        found = _states[key] = State(expression, branches, of, dtype)
    return found


_starts: dict[torch.dtype, State] = {}


def start(of: torch.dtype) -> State:
    """The state of pre-activations of this type, to which nothing was applied."""
    found = _starts.get(of)
    if found is None:
        found = _starts[of] = state_of(("z", 0), 0, of)
    return found


def branch(index: int, branches: int, of: torch.dtype) -> State:
    """The state of one of several branches."""
    return state_of(("z", index), branches, of)


# -- a function is applied


def shifted(expression: Any, positions: tuple[int, ...], branches: int) -> Any:
    """An expression with its leaves at other positions and its branches behind `branches` others."""
    if type(expression) is not tuple:
        return expression
    if expression[0] == "z":
        return ("z", expression[1] + branches)
    if expression[0] == "v":
        return ("v", positions[expression[1]])
    if expression[0] == "=":
        return expression
    name, args, kwargs = expression
    return (
        name,
        tuple(shifted(a, positions, branches) for a in args),
        tuple((k, shifted(v, positions, branches)) for k, v in kwargs),
    )


def keeps(name: str, value: int | float) -> bool:
    """Whether a number stays in the formula of a function, or becomes a parameter."""
    return value in KEPT or name in LITERAL


def apply(
    name: str, args: tuple, kwargs: tuple, branches: int, of: torch.dtype, detached: bool, dtype: torch.dtype | None
) -> State | None:
    """The state of a function of expressions; None where its formula does not take these arguments."""
    from .symbolic import FORMULAS

    formula = FORMULAS[name]
    try:
        inspect.signature(formula).bind(*args, **dict(kwargs))
    except TypeError:
        return None
    kwargs = tuple((k, v) for k, v in kwargs if k not in ("inplace", "memory_format"))
    if name == "clone" and args[0][0] != "z":  # a pre-activation itself has one value, and a copy another
        expression = args[0]
    else:
        args = args if "inplace" not in inspect.signature(formula).parameters else _without_inplace(formula, args)
        expression = (name, args, kwargs)
    if detached:
        expression = ("detach", (_attached(expression),), ())
    return state_of(expression, branches, of, torch.bool if name in COMPARISONS else dtype)


def _attached(expression: Any) -> Any:
    """The expression without `detach` in it."""
    if type(expression) is not tuple or expression[0] in ("z", "v", "="):
        return expression
    name, args, kwargs = expression
    if name == "detach":
        return _attached(args[0])
    return name, tuple(map(_attached, args)), tuple((k, _attached(v)) for k, v in kwargs)


def _without_inplace(formula, args: tuple) -> tuple:
    names = list(inspect.signature(formula).parameters)
    return args[: names.index("inplace")]


def remember(state: State, key: Any, value: Any) -> None:
    """Remembers where something that is applied to a state leads."""
    if len(state.next) < _MOST_TRANSITIONS:
        state.next[key] = value


# -- formulas and maps


def _sympy(expression: Any, zs: list) -> Any:
    import sympy

    from .symbolic import FORMULAS

    def visit(e):
        if type(e) is not tuple:
            return _number(e)
        if e[0] == "z":
            return zs[e[1]]
        if e[0] == "v":
            return sympy.Symbol(f"v{e[1]}", real=True)
        if e[0] == "=":
            return _number(e[1])
        name, args, kwargs = e
        return FORMULAS[name](*map(visit, args), **{k: visit(v) for k, v in kwargs})

    return visit(expression)


def _number(value):
    import sympy

    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, complex):
        return _number(value.real) + sympy.I * _number(value.imag)
    if float(value).is_integer():
        return sympy.Integer(int(value))
    return sympy.Rational(1, 2) if value == 0.5 else sympy.Float(value)


def _outputs(expression: Any, zs: list, complex_z: bool, complex_y: bool) -> list:
    import sympy

    given = [zs[0] + sympy.I * zs[1]] if complex_z else zs
    value = _sympy(expression, given)
    if complex_y:
        return [sympy.expand(part, power_exp=False) for part in value.as_real_imag()]
    return [sympy.expand(value.as_real_imag()[0], power_exp=False) if complex_z else value]


def _lifted(expression: Any, values: list[float]) -> Any:
    """The expression with the numbers of its products as leaves of their own, behind 1,000 others."""
    if type(expression) is not tuple or expression[0] in ("z", "v", "="):
        return expression
    name, args, kwargs = expression
    made = []
    for a in args:
        if name in ("mul", "div") and type(a) is tuple and a[0] == "=" and type(a[1]) in (int, float):
            values.append(float(a[1]))
            made.append(("v", 999 + len(values)))
        else:
            made.append(_lifted(a, values))
    return name, tuple(made), tuple((k, _lifted(v, values)) for k, v in kwargs)


def _used(found: list) -> list[str]:
    return sorted({s.name for e in found for s in e.free_symbols if s.name[0] == "v"}, key=lambda n: int(n[1:]))


def _match(state: State, leaves: tuple, complex_z: bool, complex_y: bool) -> Matched:
    import sympy

    count = 2 if complex_z else max(1, state.branches)
    zs = [sympy.Symbol(f"z{i}", real=True) for i in range(count)]
    found = _outputs(state.expression, zs, complex_z, complex_y)
    if any(e.has(sympy.nan, sympy.zoo, sympy.oo, sympy.I) for e in found):
        raise ValueError("it has no finite real value")
    known = _known(found, _used(found), count)
    if known is None:
        numbers: list[float] = []
        lifted = _lifted(state.expression, numbers)
        if numbers:
            variant = _outputs(lifted, zs, complex_z, complex_y)
            known = _known(variant, _used(variant), count)
            if known is not None:
                back = tuple(numbers[n - 1000] if type(n) is int and n >= 1000 else n for n in known.leaves)
                known = Matched(known.map, back, False)
    if known is None:
        known = _own(found, _used(found), zs)
    _check(state, known, leaves, complex_z, complex_y)
    return known


_table: dict[tuple[int, int, int], list[tuple[ActivationMap, list, tuple[int | float, ...]]]] = {}


def _patterns() -> dict:
    """Of each number of branches, outputs and parameters the registered formulas that have so many."""
    import sympy

    if not _table:
        # a formula may be several maps' with some parameters 0 or 1: the plainest is taken
        for map in sorted(registered(), key=lambda m: m.n_params):
            if map.key == "identity":
                continue
            zs = [sympy.Symbol(f"z{i}", real=True) for i in range(map.branches)]
            for written in _spellings(map, zs):
                # a factor that is 1 and a term that is 0 are often not written
                for ones in itertools.product((False, True), repeat=map.n_params):
                    leaves: list[int | float] = []
                    values = {}
                    for (name, default), one in zip(map.defaults.items(), ones):
                        neutral = 0 if default == 0 else 1
                        leaves.append(float(neutral) if one else sum(type(n) is int for n in leaves))
                        values[sympy.Symbol(f"p_{name}", real=True)] = (
                            sympy.Integer(neutral) if one else sympy.Symbol(f"v{leaves[-1]}", real=True)
                        )
                    made = [_canonical(e.xreplace(values)) for e in written]
                    symbols = {s.name for e in made for s in e.free_symbols if s.name[0] == "v"}
                    if len(symbols) == sum(type(n) is int for n in leaves):
                        key = (map.branches, len(made), len(symbols))
                        _table.setdefault(key, []).append((map, made, tuple(leaves)))
    return _table


def _spellings(map: ActivationMap, zs: list) -> list[list]:
    """A registered map in sympy's terms: its own formula, and its usual PyTorch form read as a formula."""
    import sympy

    from .tracing import formula_of

    parameters = {n: sympy.Symbol(f"p_{n}", real=True) for n in map.param_names}
    spellings = []
    if not map.facts.detached:
        spellings.append(list(map._expressions(zs, parameters)))
    if map.facts.eager is not None:
        expressions = formula_of(map.facts.eager, map.branches, map.n_params)
        if expressions is not None:
            values = {sympy.Symbol(f"v{i}", real=True): p for i, p in enumerate(parameters.values())}
            spellings.append([sympy.sympify(_sympy(e, zs)).xreplace(values) for e in expressions])
    return spellings


def _canonical(e):
    import sympy

    return sympy.expand(sympy.sympify(e))


def _known(found: list, used: list[str], branches: int) -> Matched | None:
    """The registered activation that a formula is, whatever its parameters are called."""
    import sympy

    made = [_canonical(e) for e in found]
    for map, pattern, leaves in _patterns().get((branches, len(found), len(used)), ()):
        for order in itertools.permutations(range(len(used))):
            names = {sympy.Symbol(name, real=True): sympy.Symbol(f"v{i}", real=True) for name, i in zip(used, order)}
            if all(e.xreplace(names) == p for e, p in zip(made, pattern)):
                back = {i: int(name[1:]) for name, i in zip(used, order)}
                return Matched(map, tuple(back[n] if type(n) is int else n for n in leaves), False)
    return None


_own_maps: dict[str, ActivationMap] = {}


def _own(found: list, used: list[str], zs: list) -> Matched:
    """An activation made for a formula: the same map for the same one."""
    import sympy

    names = [f"p{i}" for i in range(len(used))]
    renamed = {sympy.Symbol(u, real=True): sympy.Symbol(n, real=True) for u, n in zip(used, names)}
    expressions = tuple(e.xreplace(renamed) for e in found)
    key = repr(expressions)
    map = _own_maps.get(key)
    if map is None:
        if len(_own_maps) >= _MOST_OWN:
            raise ValueError(f"{_MOST_OWN} formulas have been compiled already")

        def formula(*given, **parameters):
            values = dict(zip(zs, given))
            values.update((sympy.Symbol(n, real=True), v) for n, v in parameters.items())
            results = tuple(e.xreplace(values) for e in expressions)
            return results if len(results) > 1 else results[0]

        parameters = [
            inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in (*(z.name for z in zs), *names)
        ]
        formula.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        map = ActivationMap(f"formula_{digest}", formula, dict.fromkeys(names, 1.0), generated=False)
        map.__doc__ = ", ".join(str(e) for e in expressions)
        map = _own_maps[key] = DEFINED.setdefault(map.key, map)
    return Matched(map, tuple(int(u[1:]) for u in used), True)


def _check(state: State, matched: Matched, leaves: tuple, complex_z: bool, complex_y: bool) -> None:
    """Compares a map with PyTorch's own functions at some points, value and derivative.

    Raises:
        ValueError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    count = 2 if complex_z else max(1, state.branches)
    zs = [torch.randn(64, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]
    scalars = tuple(_scalar(leaf) for leaf in leaves)
    with torch.enable_grad():
        given = (torch.complex(zs[0], zs[1]),) if complex_z else tuple(zs)
        expected = evaluate(state.expression, given, scalars)
        parts = [expected.real, expected.imag] if complex_y else [expected]
        values = [scalars[n] if type(n) is int else n for n in matched.leaves]
        found = matched.map.torch_map(0)(*zs, *values)
        for e, f in zip(parts, found, strict=True):
            _close(e, f, "values")
            if not e.requires_grad and not f.requires_grad:
                continue
            slopes = [_slopes(t, zs) for t in (e, f)]
            for a, b in zip(*slopes):
                _close(a, b, "derivatives")


def _slopes(y: Tensor, zs: list[Tensor]) -> list[Tensor]:
    if not y.requires_grad:
        return [torch.zeros_like(z) for z in zs]
    found = torch.autograd.grad(y.sum(), zs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(z) if g is None else g for g, z in zip(found, zs)]


def _close(a: Tensor, b: Tensor, what: str) -> None:
    a, b = a.detach(), b.detach()
    same = torch.isclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)
    if not bool(same.all()):
        raise ValueError(f"its formula and PyTorch differ in their {what}")


def _scalar(leaf):
    if isinstance(leaf, Tensor):
        value = leaf.detach().reshape(-1)
        return float(value[0]) if value.numel() else 1.0
    return leaf
