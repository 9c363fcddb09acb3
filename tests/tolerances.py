"""Every tolerance of the tests of `linear_act`, each with its reason, and the arithmetic of the bound.

The oracle is plain PyTorch in float64. A computed result may differ from it by what rounding explains and no more:

    abs(y - y64) <= V(z, c (abs(x) abs(W)^T + abs(b))) + E + S

where V(z, d) is the most that f varies while its argument moves by d around z (L d, with L the largest slope on the
way, except that V also knows kinks), E the error of evaluating f, S half an ulp of the stored type. Derivatives obey
the same rule with f', f'' in place of f, and the products and sums around them add their own roundings: `Rounded`
carries a float64 value and its bound through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    value: float
    reason: str


#: Half an ulp of 1: a value stored in this type differs from the true one by at most this, relatively.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: The distance of subnormal numbers: what storing may cost near 0.
TINY = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}

TABLE = {
    "dot": Tolerance(
        3,
        "a product of K terms rounds each of them at most K times in any order of summation; the bias, omega itself "
        "and the multiplication by omega round once each: c = (K + 3) u",
    ),
    "evaluation": Tolerance(
        4,
        "ulp of the largest value of the function where it is usually used, in the type of the computation "
        "(cancellation, as in 1 - tanh^2, makes a small value no more accurate than a large one): "
        "sin and cos are good to 2 ulp, "
        "every other primitive to 4, and a sum or product of a few of them is dominated by its worst",
    ),
    "oracle": Tolerance(2, "float64 against float64: the oracle rounds as often as what it judges, so twice the bound"),
    "eager": Tolerance(
        2,
        "second gate: no worse than twice the error of eager PyTorch in the same type on the same data (QuACK's rule)",
    ),
    "eager floor": Tolerance(
        2, "ulp of the largest value: where eager happens to round exactly, twice its error would be 0"
    ),
    "same arithmetic": Tolerance(
        1e-10,
        "relative to the largest value, float64: a transformation reorders sums of at most some hundred terms (1e-14), "
        "which a Hessian of omega = 30 amplifies by at most 1e4",
    ),
    "gradcheck atol": Tolerance(1e-5, "PyTorch's default, for float64 with steps of 1e-6"),
    "gradcheck rtol": Tolerance(1e-3, "PyTorch's default"),
    "nondeterminism": Tolerance(0, "the same call gives the same bits"),
    "kink": Tolerance(1e-4, "a hundred steps of gradcheck: no finite difference straddles a kink"),
}


def tolerance(name: str) -> float:
    return TABLE[name].value


def compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Rounded:
    """A float64 value and a bound on the error of its computed counterpart; `unit` is that of the computation."""

    value: Tensor
    error: Tensor
    unit: float

    @staticmethod
    def exact(value: Tensor, unit: float) -> Rounded:
        value = value.detach().double()
        return Rounded(value, torch.zeros_like(value), unit)

    @property
    def size(self) -> Tensor:
        return self.value.abs() + self.error

    @property
    def T(self) -> Rounded:
        return Rounded(self.value.transpose(-1, -2), self.error.transpose(-1, -2), self.unit)

    def __matmul__(self, other: Rounded) -> Rounded:
        terms = self.value.shape[-1]
        error = self.error @ other.size + self.value.abs() @ other.error
        return Rounded(
            self.value @ other.value,
            error + (terms + tolerance("dot") - 1) * self.unit * (self.size @ other.size),
            self.unit,
        )

    def __add__(self, other: Rounded | None) -> Rounded:
        if other is None:
            return self
        value, error = self.value + other.value, self.error + other.error
        return Rounded(value, error + self.unit * (self.size + other.size), self.unit)

    def sum(self, dim: int) -> Rounded:
        terms = self.value.shape[dim]
        return Rounded(
            self.value.sum(dim), self.error.sum(dim) + (terms + 1) * self.unit * self.size.sum(dim), self.unit
        )

    def stored(self, dtype: torch.dtype) -> Tensor:
        """The bound on what lies in memory."""
        error = self.error + UNIT[dtype] * self.size + TINY[dtype]
        if dtype == torch.float64:
            error = tolerance("oracle") * error
        # beyond the largest number of the type lies infinity: where the true value may, nothing is claimed
        return torch.where(self.size * (1 + UNIT[dtype]) >= torch.finfo(dtype).max, math.inf, error)


class Map:
    """Values and derivatives of an elementwise map f: R^B -> R^C in float64, and how they err when z does.

    `formula` takes B tensors and then the parameters. `z` [.., B N]; parameters are 0-D or [N]. `typical` is the size
    of usual pre-activations: the function's largest value is looked for there, too, where `z` has few elements.
    """

    #: fractions of the error in z at which the variation is looked for
    STEPS = (-1.0, -0.5, 0.5, 1.0)
    #: multiples of the typical pre-activation
    USUAL = (-1.5, -0.5, 0.1, 0.5, 1.5)

    def __init__(
        self,
        formula: Callable,
        branches: int,
        z: Rounded,
        params: Sequence[Tensor],
        order: int,
        typical: float = 1.0,
    ):
        self.unit, self.branches = z.unit, branches
        at, step = z.value.chunk(branches, -1), z.error.chunk(branches, -1)
        # row 0 the point itself, then each branch moved by each fraction of its error
        moved = []
        for b in range(branches):
            points = [at[b]]
            for other in range(branches):
                points += [at[b] + (s * step[b] if other == b else 0.0) for s in self.STEPS]
            points += [torch.full_like(at[b], s * typical) for s in self.USUAL]
            moved.append(torch.stack(points).requires_grad_())
        self._points = moved
        self._params = [p.detach().double().expand(moved[0].shape).clone().requires_grad_() for p in params]
        with torch.enable_grad():
            out = formula(*moved, *self._params)
            out = out if isinstance(out, tuple) else (out,)
            self.outputs = len(out)
            self.value = [self._bounded(o) for o in out]
            first = [self._gradient(o, order > 1) for o in out] if order else []
            second = [[self._gradient(d, False) for d in f[:branches]] for f in first] if order > 1 else []
        self.first = [[self._bounded(d) for d in f[:branches]] for f in first]
        self.by_param = [[self._bounded(d) for d in f[branches:]] for f in first]
        self.second = [[[self._bounded(d) for d in row[:branches]] for row in f] for f in second]

    def _gradient(self, out: Tensor, again: bool) -> list[Tensor]:
        inputs = [*self._points, *self._params]
        if not out.requires_grad:
            return [torch.zeros_like(out) for _ in inputs]
        return list(
            torch.autograd.grad(
                out.sum(), inputs, create_graph=again, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    def _bounded(self, values: Tensor) -> Rounded:
        values = values.detach().expand(self._points[0].shape)
        centre, around = values[0], values[1 : -len(self.USUAL)]
        if not centre.numel():
            return Rounded(centre, torch.zeros_like(centre), self.unit)
        variation = (around - centre).abs().unflatten(0, (self.branches, len(self.STEPS))).amax(1).sum(0)
        evaluation = (
            2 * tolerance("evaluation") * self.unit * torch.cat((values[:1], values[-len(self.USUAL) :])).abs().max()
        )
        return Rounded(centre, variation + evaluation, self.unit)


def times(a: Rounded, b: Rounded) -> Rounded:
    error = a.error * b.size + a.value.abs() * b.error
    return Rounded(a.value * b.value, error + a.unit * a.size * b.size, a.unit)


def total(terms: Sequence[Rounded]) -> Rounded:
    result = terms[0]
    for t in terms[1:]:
        result = result + t
    return result


def cat(parts: Sequence[Rounded]) -> Rounded:
    return Rounded(torch.cat([p.value for p in parts], -1), torch.cat([p.error for p in parts], -1), parts[0].unit)


def chunk(t: Rounded, n: int) -> list[Rounded]:
    return [Rounded(v, e, t.unit) for v, e in zip(t.value.chunk(n, -1), t.error.chunk(n, -1), strict=True)]


def worst(actual: Tensor, expected: Rounded, dtype: torch.dtype) -> float:
    """The largest error in units of what is allowed: at most 1 where all is well."""
    if not actual.numel():
        return 0.0
    error = (actual.detach().double() - expected.value).abs()
    bound = expected.stored(dtype)
    ratio = torch.where((error == 0) | bound.isinf(), 0.0, error / bound)
    return math.inf if bool(ratio.isnan().any()) else ratio.max().item()
