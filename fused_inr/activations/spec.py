"""`ActivationMap`: one formula and everything derived from it. `Activation`: a map with values for its parameters."""

from __future__ import annotations

import dis
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import primitives, printing
from .facts import Facts
from .piecewise import guarded
from .store import DEFINED, lookup
from .tape import MAX_LEARNABLE_LEVEL as MAX_LEARNABLE_LEVEL
from .tape import MAX_LEVEL as MAX_LEVEL
from .tape import Program, Tape, from_sympy

_LETTERS = ("y", "g", "u", "v", "w")


class ActivationMap:
    """A map from `branches` pre-activations and some parameters to `outputs` values, element by element.

    Args:
        name: a Python identifier; the registry's key.
        formula: takes `branches` sympy symbols and then the parameters by name, and returns one sympy expression,
            or a tuple of them (several outputs). All symbols are real. Called only when code is generated.
        parameters: default value of each parameter, in order.
        generated: whether the code is among the committed files; else it is generated at run time.
        facts: what else is known of it.
    """

    def __init__(
        self,
        name: str,
        formula: Callable | None,
        parameters: dict[str, float],
        *,
        branches: int | None = None,
        generated: bool = True,
        facts: Facts | None = None,
    ):
        self.name = name
        self.formula = formula
        self.__doc__ = formula.__doc__ if formula is not None else None
        self.defaults = {k: float(v) for k, v in parameters.items()}
        self.param_names = tuple(parameters)
        if formula is not None:
            branches = sum(p not in parameters for p in inspect.signature(formula).parameters)
        if branches is None:
            raise ValueError("a map without a formula needs its number of branches")
        self.branches = branches
        self.generated = generated
        self.facts = Facts() if facts is None else facts
        self._programs: dict[tuple[int, bool], Program] = {}
        self._torch: dict[tuple[int, bool], Callable] = {}
        self._triton: dict[tuple[int, bool], Any] = {}
        self._triton_jet: Any = None
        self._key: str | None = name if generated else None
        self._outputs: int | None = None
        self._operations: int | None = None

    def __repr__(self) -> str:
        return f"<activation map {self.name}: {self.branches} -> {self.outputs}>"

    def __reduce__(self):
        # a registered map is itself wherever it is unpickled; a run-time one travels as its program
        return unpickle_map, (self.name, self.defaults, self.branches, None if self.generated else self.program(0))

    def __copy__(self) -> ActivationMap:
        return self

    def __deepcopy__(self, memo) -> ActivationMap:
        return self

    @property
    def n_params(self) -> int:
        """The number of parameters."""
        return len(self.param_names)

    @property
    def outputs(self) -> int:
        """The number of values that the map returns for an element."""
        if self._outputs is None:
            if self.generated:
                from . import generated

                self._outputs = generated.SHAPES[self.name][1]
            else:
                self._outputs = len(self.program(0).outputs[0][1])
        return self._outputs

    @property
    def operations(self) -> int:
        """The number of PyTorch's functions that the map is; what is several of them counts as four."""
        if self._operations is None:
            found = list(dis.get_instructions(self.torch_map(0)))
            self._operations = sum(i.opname in ("CALL", "BINARY_OP", "UNARY_NEGATIVE") for i in found)
            used = [getattr(primitives, str(i.argval), None) for i in found if i.opname in ("LOAD_ATTR", "LOAD_METHOD")]
            self._operations += 3 * sum(getattr(primitive, "composite", False) for primitive in used)
        return self._operations

    @property
    def key(self) -> str:
        """Identifies the generated code: the name, and for a run-time formula a hash of what it compiles to."""
        if self._key is None:
            described = (self.program(0).tape.nodes, self.program(0).outputs, self.param_names)
            digest = hashlib.sha256(repr(described).encode())
            self._key = f"{self.name}_{digest.hexdigest()[:12]}"
        return self._key

    # -- programs

    def program(self, level: int, learnable: bool = False) -> Program:
        """Return the straight-line program of the level-th derivative map (see docs/architecture.md); needs sympy."""
        if level == 0:
            learnable = False
        if (level, learnable) not in self._programs:
            if level:
                lower = self.program(level - 1, learnable)
                if level == 1 and learnable:
                    lower = Program(lower.tape, lower.inputs, lower.outputs, lower.parameters)
                self._programs[level, learnable] = lower.vjp(_LETTERS[level] if level < 5 else f"w{level}")
            else:
                self._programs[0, False] = self._trace()
        return self._programs[level, learnable]

    def jet(self, learnable: bool = False) -> Program:
        """Return the program of the value and its derivatives together (docs/architecture.md, section 1)."""
        value = self.program(0)
        if learnable:
            value = Program(value.tape, value.inputs, value.outputs, value.parameters)
        return value.jet()

    def _trace(self) -> Program:
        import sympy

        z_names = tuple(f"z{i}" for i in range(self.branches))
        # what users call their parameters may be a keyword of C++, or a name in the printed code
        own_names = self.param_names if self.generated else tuple(f"param{j}" for j in range(self.n_params))
        symbols = tuple(sympy.Symbol(n, real=True) for n in z_names)
        parameters = {n: sympy.Symbol(own, real=True) for n, own in zip(self.param_names, own_names)}
        expressions = self._expressions(symbols, parameters)
        if not self.generated:
            values = {symbol: self.defaults[n] for n, symbol in parameters.items()}
            expressions = [guarded(e, symbols, values) for e in expressions]
        tape = Tape()
        for name in (*z_names, *own_names):
            tape.input(name)
        nodes = from_sympy(expressions, tape)
        used = {str(n.value) for n in tape.nodes if n.op == "input"}
        unknown = used - set(z_names) - set(own_names)
        if unknown:
            raise ValueError(
                f"the formula of {self.name!r} contains unknown symbols {sorted(unknown)}; "
                f"declare them as parameters with a default value, e.g. {sorted(unknown)[0]}=1.0"
            )
        inputs = [("z", z_names), *((n, (n,)) for n in own_names)]
        return Program(tape, inputs, [("y", tuple(nodes))], own_names, frozenset(own_names))

    def _expressions(self, symbols, parameters) -> list:
        """Return what the formula gives for these symbols, as a list of sympy expressions."""
        import sympy

        assert self.formula is not None  # a map without one comes with its program
        advice = getattr(self.formula, "advice", "build it from sympy's functions, e.g. sympy.sin(omega * z)")
        try:
            result = self.formula(*symbols, **parameters)
        except Exception as error:
            if hasattr(self.formula, "advice"):
                raise ValueError(f"{error}; {advice}") from error
            raise ValueError(
                f"the formula of {self.name!r} failed on sympy symbols ({type(error).__name__}: {error}); {advice}"
            ) from error
        found = result if isinstance(result, tuple | list) else (result,)
        if not found:
            raise ValueError(
                f"the formula of {self.name!r} must return an expression or a tuple of them, got {result!r}"
            )
        for e in found:
            # never a string: sympy would evaluate it as Python
            if isinstance(e, bool) or not isinstance(e, sympy.Expr | int | float):
                raise TypeError(
                    f"the formula of {self.name!r} must return a sympy expression or a tuple of them, got {e!r} of "
                    f"type {type(e).__name__}; {advice}"
                )
        return [sympy.sympify(e) for e in found]

    # -- generated code

    def function_name(self, level: int, learnable: bool) -> str:
        """Return what the generated function of a level is called, on every target."""
        return f"{self.key}_{'p' if learnable and level else 'l'}{level}"

    def jet_name(self, learnable: bool) -> str:
        """Return what the generated function of the value and its derivatives is called, on every target."""
        return f"{self.key}_j{'p' if learnable else ''}"

    def torch_map(self, level: int, learnable: bool = False) -> Callable[..., tuple[torch.Tensor, ...]]:
        """Return the map as a plain PyTorch function of its streams; see docs/architecture.md for their order."""
        cached = self._torch.get((level, learnable))
        if cached is None:
            if self.generated:
                from . import generated

                cached = getattr(generated, self.function_name(level, learnable))
            else:
                name = self.function_name(level, learnable)
                cached = _compiled(name, self.program(level, learnable))
            self._torch[level, learnable] = cached
        return cached

    def torch_jet(self, learnable: bool = False) -> Callable[..., tuple[torch.Tensor, ...]]:
        """Return value and derivatives together as a plain PyTorch function of the streams (docs/architecture.md)."""
        name = self.jet_name(learnable)
        if self.generated:
            from . import generated

            return getattr(generated, name if self.n_params else self.jet_name(False))
        return _compiled(name, self.jet(learnable))

    def triton_map(self, level: int, learnable: bool = False):
        """Return the map as a `triton.jit` function (imports Triton)."""
        cached = self._triton.get((level, learnable))
        if cached is None:
            from fused_inr.kernels import maps

            name = self.function_name(level, learnable)
            if self.generated:
                cached = maps.get(self.name, level, learnable)
            else:
                cached = maps.from_source(name, printing.triton_function(name, self.program(level, learnable)))
            self._triton[level, learnable] = cached
        return cached

    def triton_jet(self):
        """Return value and derivatives together as a `triton.jit` function, parameters constant (imports Triton)."""
        if self._triton_jet is None:
            from fused_inr.kernels import maps

            if self.generated:
                self._triton_jet = maps.jet(self.name)
            else:
                name = self.jet_name(False)
                self._triton_jet = maps.from_source(name, printing.triton_function(name, self.jet()))
        return self._triton_jet

    def cpp_source(self) -> str:
        """Print every level as C++ functions, with the table macro, as in csrc/generated/activations.h."""
        return printing.cpp_source([self])

    def eager(self, z: torch.Tensor, *params: float | torch.Tensor) -> torch.Tensor:
        """Compute the map as people write it in PyTorch (`Facts.eager`).

        Args:
            z: [.., B*N], branches side by side.
            params: numbers, or tensors that broadcast against one branch.

        Returns [.., C*N], outputs side by side.
        """
        streams = z.chunk(self.branches, -1) if self.branches > 1 else (z,)
        function = self.facts.eager or self.torch_map(0)
        outputs = function(*streams, *params)
        if isinstance(outputs, tuple):
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return outputs

    # -- values

    def __call__(
        self,
        *,
        learnable: bool | str | Iterable[str] = (),
        per_feature: bool = False,
        **values: float | torch.Tensor,
    ) -> Activation:
        """Make an `Activation`: this map with values (numbers, tensors [] or [features]) for its parameters."""
        unknown = set(values) - set(self.param_names)
        if unknown:
            accepted = ", ".join(self.param_names) or "none"
            raise TypeError(f"{self.name}() got an unknown parameter {sorted(unknown)[0]!r}; accepted: {accepted}")
        return Activation(self, {**self.defaults, **values}, learnable=learnable, per_feature=per_feature)


class Activation:
    """An activation with values for its parameters; immutable.

    Attributes:
        map: the `ActivationMap` (formula and generated code).
        params: name -> float, or a tensor of shape [] or [features] (differentiable if it requires a gradient).
        learnable: names of the parameters that a layer turns into `nn.Parameter`s.
        per_feature: whether those are one number a feature, or one for the layer.

    `activation(z)` is plain PyTorch: z [.., B*N] (branches side by side) to [.., C*N], differentiable any number of
    times.
    """

    def __init__(
        self,
        map: ActivationMap,
        params: dict[str, float | torch.Tensor],
        *,
        learnable: bool | str | Iterable[str] = (),
        per_feature: bool = False,
    ):
        self.map = map
        self.params = {n: _checked(map.name, n, params[n]) for n in map.param_names}
        if not isinstance(learnable, bool | str | Iterable):
            raise TypeError(f"learnable: expected True, False, a name or names, got {learnable!r}")
        if isinstance(learnable, bool):
            learnable = map.param_names if learnable else ()
        elif isinstance(learnable, str):
            learnable = (learnable,)
        self.learnable = frozenset(learnable)
        if not self.learnable <= set(map.param_names):
            wrong = sorted(self.learnable - set(map.param_names))[0]
            accepted = ", ".join(map.param_names) or "none"
            raise ValueError(f"learnable: {map.name} has no parameter {wrong!r}; it has: {accepted}")
        self.per_feature = bool(per_feature)
        self._split()

    def _split(self) -> None:
        values = tuple(self.params.values())
        self.tensors = tuple(v if isinstance(v, torch.Tensor) else None for v in values)
        self.constants = tuple(0.0 if isinstance(v, torch.Tensor) else v for v in values)
        self.has_tensors = any(isinstance(v, torch.Tensor) for v in values)

    @property
    def name(self) -> str:
        """The name of the map."""
        return self.map.name

    @property
    def branches(self) -> int:
        """The number of pre-activations of an element."""
        return self.map.branches

    @property
    def outputs(self) -> int:
        """The number of values that the map returns for an element."""
        return self.map.outputs

    @property
    def param_names(self) -> tuple[str, ...]:
        """The names of the parameters, in order."""
        return self.map.param_names

    def with_params(self, **values: float | torch.Tensor) -> Activation:
        """Return a copy with other values for some parameters."""
        unknown = set(values) - set(self.param_names)
        if unknown:
            accepted = ", ".join(self.param_names) or "none"
            raise TypeError(f"{self.name} has no parameter {sorted(unknown)[0]!r}; it has: {accepted}")
        copy = Activation.__new__(Activation)
        copy.map, copy.learnable, copy.per_feature = self.map, self.learnable, self.per_feature
        copy.params = {**self.params, **{n: _checked(self.name, n, v) for n, v in values.items()}}
        copy._split()
        return copy

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        if z.dim() < 1:
            raise ValueError("z: expected shape [..., N], got a scalar; reshape it to [1]")
        if z.shape[-1] % self.branches:
            raise ValueError(
                f"z: {self.name} has {self.branches} branches side by side in the last dimension, "
                f"which must be a multiple of {self.branches}; got shape {tuple(z.shape)}"
            )
        streams = z.chunk(self.branches, -1) if self.branches > 1 else (z,)
        outputs = self.map.torch_map(0)(*streams, *self.params.values())
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def __repr__(self) -> str:
        shown = [
            f"{k}={v:.6g}" if isinstance(v, float) else f"{k}=tensor{tuple(v.shape)}" for k, v in self.params.items()
        ]
        if self.learnable:
            names = [n for n in self.param_names if n in self.learnable]
            shown.append(f"learnable={names[0]!r}" if len(names) == 1 else f"learnable={tuple(names)!r}")
            if self.per_feature:
                shown.append("per_feature=True")
        return f"{self.name}({', '.join(shown)})"

    def _identity(self) -> tuple:
        values = tuple(id(v) if isinstance(v, torch.Tensor) else v for v in self.params.values())
        return self.map.key, values, self.learnable, self.per_feature

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Activation) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def _checked(name: str, parameter: str, value: object) -> float | torch.Tensor:
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: parameter {parameter!r} must be a floating-point tensor, got {value.dtype}")
        if value.dim() > 1:
            raise ValueError(
                f"{name}: parameter {parameter!r} must have shape [] or [features], got {tuple(value.shape)}"
            )
        return value
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: parameter {parameter!r} must be a number or a tensor, got {value!r}") from None
    if isinstance(value, bool | str) or not math.isfinite(number):
        raise ValueError(f"{name}: parameter {parameter!r} must be a finite number, got {value!r}")
    return number


def check_name(name: object) -> str:
    """Return an activation's name; raises ValueError where it is no Python identifier."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]*", name):
        raise ValueError(f"name: an activation's name is a Python identifier such as 'chirp', got {name!r}")
    return name


def _compiled(name: str, program: Program) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Compile the program to a PyTorch function of this name."""
    source = printing.torch_function(name, program)
    return printing.execute(source, f"<fused_inr torch map {name}>", {"p": primitives, "torch": torch})[name]


def unpickle_map(name: str, defaults: dict[str, float], branches: int, program: Program | None) -> ActivationMap:
    """Return the map that a pickle describes: a registered one by its name, or one of a user by its program."""
    if program is None:
        return lookup(name)
    map = ActivationMap(name, None, defaults, branches=branches, generated=False)
    map._programs[0, False] = program
    return DEFINED.setdefault(map.key, map)
