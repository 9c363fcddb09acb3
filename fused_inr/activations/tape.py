"""Straight-line programs over elementwise primitives, and their vector-Jacobian products.

A formula enters as sympy expressions (`from_sympy`), becomes a value-numbered list of primitive operations, and is
differentiated in reverse there (`Program.vjp`): the expanded expression of a third derivative has thousands of
operations where the merged program has hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Orders of differentiation with generated code: constant parameters, learnable parameters.
MAX_LEVEL, MAX_LEARNABLE_LEVEL = 3, 2
ARITHMETIC = ("add", "sub", "mul", "div", "neg")
COMPARISONS = ("gt", "ge", "lt", "le", "eq")
SINC_ORDERS = 7
#: Every primitive that a program may call; each target (PyTorch, Triton, C++) implements all of them.
PRIMITIVES: dict[str, int] = {  # name: number of arguments
    **dict.fromkeys(
        ("sin", "cos", "tan", "exp", "log", "log1p", "expm1", "tanh", "sinh", "cosh", "sigmoid", "softplus", "erf"), 1
    ),
    **dict.fromkeys(("sqrt", "abs", "sign", "step", "saturate", "atan"), 1),
    **{f"sinc{n}": 1 for n in range(SINC_ORDERS)},
    **dict.fromkeys(("pow", "minimum", "maximum", *COMPARISONS), 2),
    "where": 3,
}
_COMMUTATIVE = {"eq"}

Arg = int  # index of a node


@dataclass(frozen=True)
class Node:
    """One operation on earlier nodes of a tape, an input, or a constant."""

    op: str  # "const", "input", one of ARITHMETIC, or a primitive
    args: tuple[Arg, ...] = ()
    value: float | str | None = None  # of a constant; the name of an input


class Tape:
    """An append-only list of nodes, in which equal operations share one node."""

    def __init__(self, nodes: Sequence[Node] = ()):
        self.nodes: list[Node] = list(nodes)
        self._index = {node: i for i, node in enumerate(self.nodes)}

    def _put(self, node: Node) -> Arg:
        if node not in self._index:
            self._index[node] = len(self.nodes)
            self.nodes.append(node)
        return self._index[node]

    def const(self, value: float) -> Arg:
        """Append a constant."""
        return self._put(Node("const", value=float(value) + 0.0))

    def input(self, name: str) -> Arg:
        """Append an input by its name."""
        return self._put(Node("input", value=name))

    def constant(self, a: Arg) -> float | None:
        """Return the number that a node is, or None if it is no constant."""
        value = self.nodes[a].value
        return value if isinstance(value, float) else None

    # -- arithmetic, with the simplifications that reverse differentiation makes worthwhile

    def add(self, a: Arg, b: Arg) -> Arg:
        """Append a + b, simplified."""
        ca, cb = self.constant(a), self.constant(b)
        if ca is not None and cb is not None:
            return self.const(ca + cb)
        if ca == 0:
            return b
        if cb == 0:
            return a
        if a == b:
            return self.mul(self.const(2), a)
        if self.nodes[b].op == "neg":
            return self.sub(a, self.nodes[b].args[0])
        if self.nodes[a].op == "neg":
            return self.sub(b, self.nodes[a].args[0])
        return self._put(Node("add", tuple(sorted((a, b)))))

    def sub(self, a: Arg, b: Arg) -> Arg:
        """Append a - b, simplified."""
        ca, cb = self.constant(a), self.constant(b)
        if ca is not None and cb is not None:
            return self.const(ca - cb)
        if a == b:
            return self.const(0)
        if ca == 0:
            return self.neg(b)
        if cb == 0:
            return a
        if self.nodes[b].op == "neg":
            return self.add(a, self.nodes[b].args[0])
        return self._put(Node("sub", (a, b)))

    def neg(self, a: Arg) -> Arg:
        """Append -a, simplified."""
        node = self.nodes[a]
        if (value := self.constant(a)) is not None:
            return self.const(-value)
        if node.op == "neg":
            return node.args[0]
        if node.op == "sub":
            return self.sub(node.args[1], node.args[0])
        return self._put(Node("neg", (a,)))

    def mul(self, a: Arg, b: Arg) -> Arg:
        """Append a b, simplified."""
        ca, cb = self.constant(a), self.constant(b)
        if ca is not None and cb is not None:
            return self.const(ca * cb)
        if cb is not None:
            a, b, ca = b, a, cb
        if ca is not None:  # a is the constant
            if ca == 0:
                return self.const(0)
            if ca == 1:
                return b
            if ca == -1:
                return self.neg(b)
            inner = self.nodes[b]
            if inner.op == "neg":
                return self.mul(self.const(-ca), inner.args[0])
            if inner.op == "mul" and (c := self.constant(inner.args[0])) is not None:
                return self.mul(self.const(ca * c), inner.args[1])
            return self._put(Node("mul", (a, b)))
        for x, y in ((a, b), (b, a)):
            if self.nodes[x].op == "neg":
                return self.neg(self.mul(self.nodes[x].args[0], y))
        for x, y in ((a, b), (b, a)):  # constants travel to the left, where they merge
            node = self.nodes[x]
            if node.op == "mul" and self.constant(node.args[0]) is not None:
                return self.mul(node.args[0], self.mul(node.args[1], y))
        return self._put(Node("mul", tuple(sorted((a, b)))))

    def div(self, a: Arg, b: Arg) -> Arg:
        """Append a / b, simplified."""
        ca, cb = self.constant(a), self.constant(b)
        if cb is not None and cb != 0:
            return self.const(ca / cb) if ca is not None else self.mul(self.const(1 / cb), a)
        if ca == 0:
            return a
        if self.nodes[a].op == "neg":
            return self.neg(self.div(self.nodes[a].args[0], b))
        return self._put(Node("div", (a, b)))

    def power(self, a: Arg, n: int) -> Arg:
        """Append a**n by repeated squaring."""
        if n < 0:
            return self.div(self.const(1), self.power(a, -n))
        result, square = self.const(1), a
        while n:
            if n & 1:
                result = self.mul(result, square)
            n >>= 1
            if n:
                square = self.mul(square, square)
        return result

    def call(self, op: str, *args: Arg) -> Arg:
        """Append the call of a primitive."""
        if op not in PRIMITIVES and op != "detach":
            raise ValueError(f"no primitive called {op!r}")
        if op in _COMMUTATIVE:
            args = tuple(sorted(args))
        if op == "where" and args[1] == args[2]:
            return args[1]
        return self._put(Node(op, tuple(args)))

    # -- differentiation

    def partials(self, i: Arg) -> list[Arg | Callable[[Arg], Arg]]:
        """Return d node_i / d args: each a factor (a node), or a function from the adjoint to the contribution."""
        node, one = self.nodes[i], self.const(1)
        a = node.args[0] if node.args else -1
        match node.op:
            case "add":
                return [one, one]
            case "sub":
                return [one, self.const(-1)]
            case "neg":
                return [self.const(-1)]
            case "mul":
                return [node.args[1], node.args[0]]
            case "div":
                inverse = self.div(one, node.args[1])
                return [inverse, self.neg(self.mul(i, inverse))]
            case "sin":
                return [self.call("cos", a)]
            case "cos":
                return [self.neg(self.call("sin", a))]
            case "tan":
                return [self.add(one, self.mul(i, i))]
            case "exp":
                return [i]
            case "expm1":
                return [self.call("exp", a)]
            case "log":
                return [self.div(one, a)]
            case "log1p":
                return [self.div(one, self.add(one, a))]
            case "tanh":
                return [self.sub(one, self.mul(i, i))]
            case "sinh":
                return [self.call("cosh", a)]
            case "cosh":
                return [self.call("sinh", a)]
            case "sigmoid":
                return [self.mul(i, self.sub(one, i))]
            case "softplus":
                return [self.call("sigmoid", a)]
            case "erf":
                s = self.call("saturate", a)
                return [self.mul(self.const(2 / math.sqrt(math.pi)), self.call("exp", self.neg(self.mul(s, s))))]
            case "sqrt":
                return [self.div(self.const(0.5), i)]
            case "abs":
                return [self.call("sign", a)]
            case "saturate":
                return [one]
            case "atan":
                return [self.div(one, self.add(one, self.mul(a, a)))]
            case "pow":
                b = node.args[1]
                # 0 to a power does not vary with the power: not 0 times log(0)
                zero_base = self.call("eq", a, self.const(0))
                return [
                    self.mul(b, self.call("pow", a, self.sub(b, one))),
                    self.mul(i, self.call("log", self.call("where", zero_base, one, a))),
                ]
            case "maximum" | "minimum":
                first = self.call("gt" if node.op == "maximum" else "lt", a, node.args[1])
                return [first, self.sub(one, first)]
            case "where":
                zero = self.const(0)
                return [
                    zero,
                    lambda g: self.call("where", a, g, zero),
                    lambda g: self.call("where", a, zero, g),
                ]
            case op if op.startswith("sinc"):
                order = int(op[4:]) + 1
                if order == SINC_ORDERS:
                    raise ValueError(f"derivatives of sinc stop at order {SINC_ORDERS - 1}")
                return [self.call(f"sinc{order}", a)]
            case _:  # sign, step, detach, comparisons: piecewise constant, or held constant
                return [self.const(0)] * len(node.args)


@dataclass
class Program:
    """A map: named input groups (a tuple of input names each), and output groups of nodes.

    `parameters` names the map's parameters, `constants` the inputs that have no gradient.
    """

    tape: Tape
    inputs: list[tuple[str, tuple[str, ...]]]
    outputs: list[tuple[str, tuple[Arg, ...]]]
    parameters: tuple[str, ...] = ()
    constants: frozenset[str] = field(default_factory=frozenset)

    def is_row(self, group: str) -> bool:
        """Tell whether a group is one value an element (else one a feature: parameters and their cotangents)."""
        return not any(group == p or group.endswith(f"_{p}") for p in self.parameters)

    def vjp(self, letter: str) -> Program:
        """Differentiate in reverse: the same inputs and one cotangent an output, to one gradient a group."""
        tape = Tape(self.tape.nodes)
        count = len(tape.nodes)
        cotangent_groups = []
        seeds: list[tuple[Arg, Arg]] = []
        for name, nodes in self.outputs:
            base = name.removeprefix("d_")
            names = tuple(f"{letter}_{base}{i if len(nodes) > 1 or base == 'z' else ''}" for i in range(len(nodes)))
            if base == "y":
                names = tuple(f"g{i}" for i in range(len(nodes)))
            cotangent_groups.append((f"{letter}_{base}" if base != "y" else "g", names))
            seeds.extend((node, tape.input(cotangent)) for node, cotangent in zip(nodes, names, strict=True))
        outputs = self._reverse(tape, count, seeds)
        return Program(tape, self.inputs + cotangent_groups, outputs, self.parameters, self.constants)

    def jet(self) -> Program:
        """Differentiate each output: the same inputs, to the outputs, then each one's derivatives by each group."""
        tape = Tape(self.tape.nodes)
        count = len(tape.nodes)
        outputs = list(self.outputs)
        for i, node in enumerate(self.output_nodes):
            for group, nodes in self._reverse(tape, count, [(node, tape.const(1))]):
                outputs.append((f"{group}_{i}", nodes))
        return Program(tape, self.inputs, outputs, self.parameters, self.constants)

    def _reverse(self, tape: Tape, count: int, seeds: Sequence[tuple[Arg, Arg]]) -> list[tuple[str, tuple[Arg, ...]]]:
        """Go in reverse over the first `count` nodes of a tape, from seeds (output, its cotangent)."""
        adjoint: dict[Arg, Arg] = {}

        def accumulate(node: Arg, contribution: Arg) -> None:
            adjoint[node] = tape.add(adjoint[node], contribution) if node in adjoint else contribution

        for node, cotangent in seeds:
            accumulate(node, cotangent)
        active = self._active(tape)
        for i in range(count - 1, -1, -1):
            if i not in adjoint or i not in active or tape.nodes[i].op in ("input", "const"):
                continue
            for arg, partial in zip(tape.nodes[i].args, tape.partials(i), strict=True):
                if arg not in active:
                    continue
                accumulate(arg, partial(adjoint[i]) if callable(partial) else tape.mul(adjoint[i], partial))

        outputs = []
        for group, names in self.inputs:
            if names and names[0] in self.constants:
                continue
            outputs.append((f"d_{group}", tuple(adjoint.get(tape.input(n), tape.const(0)) for n in names)))
        return outputs

    def _active(self, tape: Tape) -> set[Arg]:
        """Return the nodes that depend on an input which has a gradient."""
        active: set[Arg] = set()
        for i, node in enumerate(tape.nodes):
            if node.op == "input":
                if node.value not in self.constants:
                    active.add(i)
            elif node.op != "detach" and any(a in active for a in node.args):
                active.add(i)
        return active

    @property
    def input_names(self) -> list[str]:
        """The names of all inputs, group after group."""
        return [name for _, names in self.inputs for name in names]

    @property
    def output_nodes(self) -> list[Arg]:
        """The nodes of all outputs, group after group."""
        return [node for _, nodes in self.outputs for node in nodes]

    def live(self) -> list[Arg]:
        """Return the nodes that the outputs need, in order."""
        needed: set[Arg] = set()
        stack = list(self.output_nodes)
        while stack:
            i = stack.pop()
            if i not in needed:
                needed.add(i)
                stack.extend(self.tape.nodes[i].args)
        return sorted(needed)


# -- from sympy


def from_sympy(expressions: Sequence, tape: Tape) -> list[Arg]:
    """Append sympy expressions to a tape; free symbols become inputs of their names."""
    import sympy

    named = {
        sympy.sin: "sin",
        sympy.cos: "cos",
        sympy.tan: "tan",
        sympy.exp: "exp",
        sympy.log: "log",
        sympy.tanh: "tanh",
        sympy.sinh: "sinh",
        sympy.cosh: "cosh",
        sympy.erf: "erf",
        sympy.Abs: "abs",
        sympy.sign: "sign",
        sympy.Heaviside: "step",
        sympy.atan: "atan",
        sympy.sinc: "sinc0",
    }
    relations = {
        sympy.StrictGreaterThan: "gt",
        sympy.GreaterThan: "ge",
        sympy.StrictLessThan: "lt",
        sympy.LessThan: "le",
        sympy.Equality: "eq",
    }
    memo: dict = {}

    def condition(c) -> Arg:
        if c == sympy.true or c == sympy.false:
            return tape.const(1.0 if c == sympy.true else 0.0)
        if isinstance(c, sympy.And):
            result = condition(c.args[0])
            for other in c.args[1:]:
                result = tape.mul(result, condition(other))
            return result
        if isinstance(c, sympy.Or):
            result = condition(c.args[0])
            for other in c.args[1:]:
                result = tape.call("maximum", result, condition(other))
            return result
        if isinstance(c, sympy.Unequality):
            return tape.sub(tape.const(1), tape.call("eq", visit(c.args[0]), visit(c.args[1])))
        if isinstance(c, sympy.Not):
            return tape.sub(tape.const(1), condition(c.args[0]))
        if type(c) in relations:
            return tape.call(relations[type(c)], visit(c.args[0]), visit(c.args[1]))
        raise ValueError(f"the condition {c} cannot be compiled; use comparisons joined by And, Or, Not")

    def visit(e) -> Arg:
        if e not in memo:
            memo[e] = convert(e)
        return memo[e]

    def product(factors) -> Arg:
        numerator, denominator, coefficient = [], [], 1.0
        for f in factors:
            if f.is_number:
                coefficient *= number(f)
            elif f.is_Pow and f.exp.is_number and f.exp.is_negative and f.base != sympy.E:
                denominator.append(visit(f.base ** (-f.exp)))
            else:
                numerator.append(visit(f))
        result = tape.const(1)
        for a in numerator:
            result = tape.mul(result, a)
        if denominator:
            d = denominator[0]
            for a in denominator[1:]:
                d = tape.mul(d, a)
            result = tape.div(result, d)
        return tape.mul(tape.const(coefficient), result)

    def number(e) -> float:
        value = complex(e.evalf(30))
        if value.imag or not math.isfinite(value.real):
            raise ValueError(f"the constant {e} in the formula is not a finite real number")
        return value.real

    def convert(e) -> Arg:
        if e.is_Symbol:
            return tape.input(e.name)
        if e.is_number:
            return tape.const(number(e))
        if e.is_Add:
            # positive terms first: a - b instead of -b + a
            terms = sorted(e.args, key=lambda t: bool(t.could_extract_minus_sign()))
            result = visit(terms[0])
            for t in terms[1:]:
                result = tape.add(result, visit(t))
            return result
        if e.is_Mul:
            return product(e.args)
        if isinstance(e, sympy.exp):
            return tape.call("exp", visit(e.args[0]))
        if e.is_Pow:
            base, exponent = e.base, e.exp
            if exponent.is_Integer:
                return tape.power(visit(base), int(exponent))
            if exponent.is_Rational and exponent.q == 2:
                return tape.power(tape.call("sqrt", visit(base)), int(exponent.p))
            return tape.call("pow", visit(base), visit(exponent))
        if isinstance(e, sympy.Max | sympy.Min):
            # constants last: at a tie the derivative is that of the constant (relu'(0) = 0)
            args = [visit(a) for a in sorted(e.args, key=lambda a: bool(a.is_number))]
            op = "maximum" if isinstance(e, sympy.Max) else "minimum"
            result = args[0]
            for a in args[1:]:
                result = tape._put(Node(op, (result, a)))
            return result
        if isinstance(e, sympy.Piecewise):
            pieces = list(e.args)
            value = visit(pieces[-1].expr)
            if pieces[-1].cond != sympy.true:
                raise ValueError("a Piecewise needs a last piece with the condition True")
            for piece in reversed(pieces[:-1]):
                value = tape.call("where", condition(piece.cond), visit(piece.expr), value)
            return value
        if isinstance(e, sympy.erfc):
            return tape.sub(tape.const(1), tape.call("erf", visit(e.args[0])))
        if isinstance(e, sympy.DiracDelta):
            return tape.const(0)
        name = named.get(type(e)) or getattr(type(e), "fused_inr_primitive", None)
        if name == "keep":
            return visit(e.args[0])
        if name is not None:
            return tape.call(name, visit(e.args[0]))
        if e.is_Function:
            rewritten = e.rewrite(sympy.exp)  # e.g. sech, coth, acosh: by exp and log
            if rewritten != e:
                return visit(rewritten)
        known = ", ".join(sorted({f.__name__ for f in named} | {"Max", "Min", "Piecewise", "sqrt"}))
        raise ValueError(f"the formula contains {type(e).__name__}, which cannot be compiled; known functions: {known}")

    return [visit(sympy.sympify(e)) for e in expressions]
