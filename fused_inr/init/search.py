"""Searches the standard deviation sigma_p at which VI3NR's forward and backward conditions hold together.

With the gain of the forward condition, gradients keep their variance from layer to layer where

    condition(sigma_p) = fan_ratio sum_b sigma_p^2 sum_c E[(df_c/dz_b)^2] / sum_c E[f_c^2] = 1,    z_b ~ N(0, sigma_p^2)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import finite_float, one_of, positive_int
from ..activations import Activation
from . import estimates, quadrature
from .estimates import METHODS, Moments

_PER_DECADE = 8
#: Draws of the first look at the whole range.
_COARSE_SAMPLES = 1 << 17
#: Differences of the condition from 1 that count as none, beyond the error of the estimate.
_NONE = 1e-6
_ERRORS = 4.0
#: The largest relative error of the condition at which a value still says something.
_VAGUE = 0.2
_MOST_REFINEMENTS = 60


@dataclass(frozen=True)
class SigmaSearch:
    """The outcome of `search_sigma_p`; numbers are floats.

    Attributes:
        status: "solved": the condition is 1 at sigma_p. "everywhere": at every sigma_p (relu). "limit_zero",
            "limit_infinity": only in a limit. "never": nowhere.
        sigma_p: the solution, else the best compromise (`why` says which).
        gain, condition: there, with `gain_error`, `condition_error`.
        sigma_p_error: of a solution: the condition's error over its slope; 0 otherwise.
        roots: all solutions found, ascending.
        why: in words.
        method, samples: as in `Moments`.
        curve: (sigma, condition, its error, gain), tensors of the first look at the range.
    """

    status: str
    sigma_p: float
    gain: float
    condition: float
    sigma_p_error: float
    gain_error: float
    condition_error: float
    roots: tuple[float, ...]
    why: str
    method: str
    samples: int
    curve: tuple[Tensor, Tensor, Tensor, Tensor]


def search_sigma_p(
    activation: Activation | Callable[[Tensor], Tensor] | str,
    *,
    fan_ratio: float = 1.0,
    bias_variance: float = 0.0,
    lower: float = 1e-4,
    upper: float = 1e4,
    within: float = 0.005,
    tolerance: float = 1e-6,
    method: str = "auto",
    samples: int = 1_000_000,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> SigmaSearch:
    """Bracket and refine the sigma_p at which the backward condition holds beside the forward one.

    Args:
        activation: as in `moments`; all branches have the same sigma_p.
        fan_ratio: M_{i+1} / M_i, features that a layer returns over features that it takes; > 0.
        bias_variance: variance of the biases, which the gain leaves room for; sigma_p is sought above its root.
        lower, upper: the range, before omega.
        within: by how much the condition of a compromise may differ from 1 where it is 1 in a limit only. With 0.005
            the variance of gradients changes by less than a factor of 2 over 100 layers.
        tolerance: relative width of the last bracket.
        method: "auto", by quadrature where that converges (one or two branches), else Monte Carlo; or one of these.
        samples, seed, device: of Monte Carlo; every sigma sees the same draws.

    Returns a `SigmaSearch`. Where there are several solutions, sigma_p is the smallest at which the condition rises;
    `roots` has all.
    Where there is none, sigma_p is the best compromise: in a limit, the value farthest from it with the condition still
    `within` of 1 (nearer to the limit the activation is linear, or constant); else the one with the smallest
    abs(log(condition)).

    Raises TypeError or ValueError for other arguments, an activation whose values or derivatives are not finite or that
    is constant, and one about which no estimate in the range says anything.
    """
    fan_ratio = finite_float("fan_ratio", fan_ratio, above=0)
    bias_variance = finite_float("bias_variance", bias_variance, least=0)
    lower, upper = finite_float("lower", lower, above=0), finite_float("upper", upper, above=0)
    within, tolerance = finite_float("within", within, above=0), finite_float("tolerance", tolerance, above=0)
    method, samples = one_of("method", method, METHODS), positive_int("samples", samples, minimum=2)
    lower = max(lower, math.sqrt(bias_variance) * (1 + 1e-6))
    if lower >= upper:
        raise ValueError(f"upper must exceed lower and the root of bias_variance, {lower:g}, got {upper:g}")
    f = estimates.function_of(activation)
    if method == "auto" and isinstance(f, Activation) and f.branches > 2:
        method = "montecarlo"  # a product rule would take seconds a value
    problem = _Problem(f, fan_ratio, bias_variance, method, samples, dict(seed=seed, device=device))
    return problem.solve(lower, upper, within, tolerance)


class _Problem:
    """One search: the function, its conditions, and how moments are computed."""

    def __init__(self, f, fan_ratio, bias_variance, method, samples, own) -> None:
        self.f, self.fan_ratio, self.bias_variance = f, fan_ratio, bias_variance
        self.method, self.samples, self.own = method, samples, own

    def look(self, sigma: Tensor) -> tuple[Tensor, Tensor, Moments]:
        """Compute `log_condition` over the whole range, by quadrature where that is cheap: far out few digits do."""
        if self.method == "quadrature":
            return self.log_condition(*sigma.tolist())
        samples = min(_COARSE_SAMPLES, self.samples)
        value, error, m = self._of(estimates.moments(self.f, sigma, method="montecarlo", samples=samples, **self.own))
        grid = estimates.Grid(self.f, sigma, None, None)
        if self.method == "auto" and grid.branches == 1 and not grid.features:
            last, off, good = quadrature.smooth(grid)
            if bool(good.any()):
                last, off = torch.where(good[:, None, None], last, last[good][0]), off * good[:, None, None]
                exact = grid.result("quadrature", 0, last[..., 0], last[..., 1], off[..., 0], off[..., 1], None)
                exact_value, exact_error, _ = self._of(exact)
                value, error = torch.where(good, exact_value, value), torch.where(good, exact_error, error)
            for g in ((value.abs() <= _ERRORS * error) & ~good).nonzero().flatten().tolist():  # on which side of 1?
                value[g : g + 1], error[g : g + 1], _ = self.log_condition(sigma[g].item())
        return value, error, m

    def log_condition(self, *sigma: float) -> tuple[Tensor, Tensor, Moments]:
        """Compute log(condition), its error, and the moments."""
        grid = torch.tensor(sigma, dtype=torch.float64)
        return self._of(estimates.moments(self.f, grid, method=self.method, samples=self.samples, **self.own))

    def _of(self, m: Moments) -> tuple[Tensor, Tensor, Moments]:
        condition = m.condition(self.fan_ratio, self.bias_variance)
        error = m.condition_error(self.fan_ratio, self.bias_variance)
        return condition.log(), error / condition, m

    def solve(self, lower: float, upper: float, within: float, tolerance: float) -> SigmaSearch:
        """Look at the range, refine what it brackets, and tell the outcome."""
        count = max(3, math.ceil(_PER_DECADE * math.log10(upper / lower)) + 1)
        sigma = torch.logspace(math.log10(lower), math.log10(upper), count, dtype=torch.float64)
        value, error, m = self.look(sigma)
        self._refuse_constant(m)
        curve = (sigma, value.exp(), error * value.exp(), m.gain(self.bias_variance)[..., 0])
        clear = torch.isfinite(value) & (error < _VAGUE)
        if not bool(clear.any()):
            raise ValueError(
                f"no sigma_p in [{lower:g}, {upper:g}] gives a usable estimate for {self.f!r}; "
                "give lower, upper, or more samples"
            )
        sigma, value, error = sigma[clear], value[clear], error[clear]
        known = _ERRORS * error + _NONE
        if bool((value.abs() <= known).all()):
            at = 1.0 if lower <= 1 <= upper else math.sqrt(lower * upper)
            why = "the condition is 1 for every sigma_p (f is homogeneous): 1 is as good as any"
            return self._outcome("everywhere", at, (), why, curve)
        # signs that are known; a root lies between two that differ
        sure = value.abs() > known
        s, v = sigma[sure].tolist(), value[sure].tolist()
        brackets = [(s[i], s[i + 1], v[i] < 0) for i in range(len(s) - 1) if v[i] * v[i + 1] < 0]
        if brackets:
            roots = [self._refine(a, b, tolerance) for a, b, _ in brackets]
            rising = [r for r, (_, _, rises) in zip(roots, brackets) if rises]
            chosen = rising[0] if rising else roots[0]
            others = ", ".join(f"{r:.6g}" for r in roots if r != chosen)
            more = f"; further solutions: {others}" if others else ""
            return self._outcome("solved", chosen, tuple(sorted(roots)), f"both conditions hold{more}", curve)
        side = "above" if v[0] > 0 else "below"
        if float(value[0].abs()) <= max(within / 10, float(known[0])):
            at = self._last_within(sigma, value, within)
            why = (
                f"no solution: the condition is {side} 1 for every sigma_p and tends to 1 for sigma_p -> 0, where f is "
                f"linear; the largest sigma_p with a condition within {within:g} of 1 is the compromise"
            )
            return self._outcome("limit_zero", at, (), why, curve)
        if float(value[-1].abs()) <= max(within, float(known[-1])):
            at = self._last_within(sigma.flip(0), value.flip(0), within)
            why = (
                f"no solution: the condition is {side} 1 for every sigma_p and tends to 1 for sigma_p -> infinity; "
                f"the smallest sigma_p with a condition within {within:g} of 1 is the compromise"
            )
            return self._outcome("limit_infinity", at, (), why, curve)
        least = float(value.abs().min())
        good = value.abs() <= least + known
        if bool(good[0]) or bool(good[-1]):  # nearest to 1 in a limit
            end = "0; the largest" if bool(good[0]) else "infinity; the smallest"
            order = slice(None) if bool(good[0]) else torch.arange(len(sigma) - 1, -1, -1)
            at = self._last_within(sigma[order], value[order], within, least)
            why = (
                f"no solution: the condition is {side} 1 for every sigma_p and nearest to it, "
                f"{math.exp(float(value[order][0])):.4g}, for sigma_p -> {end} with a condition within {within:g} of "
                "that is the compromise"
            )
        else:
            at = self._nearest(sigma, value)
            why = f"no solution: the condition is {side} 1 for every sigma_p; it is nearest to 1 at the compromise"
        return self._outcome("never", at, (), why, curve)

    def _refuse_constant(self, m: Moments) -> None:
        if bool((m.derivative_second == 0).all()):
            raise ValueError(f"activation must not be constant: {self.f!r} has derivative 0 wherever it was evaluated")
        if bool((m.second == 0).all()):
            raise ValueError(f"activation must not be zero everywhere, no gain restores the variance: {self.f!r}")

    def _at(self, sigma: float) -> float:
        return self.log_condition(sigma)[0].item()

    def _refine(self, low: float, high: float, tolerance: float) -> float:
        """Find a root of log(condition) over log(sigma) by the Illinois variant of false position."""
        a, b = math.log(low), math.log(high)
        fa, fb = self._at(low), self._at(high)
        if fa * fb > 0:  # the finer estimate disagrees with the coarse one: the nearer end
            return low if abs(fa) < abs(fb) else high
        side = 0
        for _ in range(_MOST_REFINEMENTS):
            c = (fa * b - fb * a) / (fa - fb) if fa != fb else (a + b) / 2
            fc = self._at(math.exp(c))
            if fc == 0:
                return math.exp(c)
            if fc * fb < 0:
                step, a, fa = abs(c - b), b, fb
            else:
                step, fa = abs(c - b), fa / 2
            b, fb = c, fc
            if step < tolerance or abs(b - a) < tolerance:
                break
            side += 1
        return math.exp(b)

    def _last_within(self, sigma: Tensor, value: Tensor, within: float, least: float = 0.0) -> float:
        """Return the last sigma, from the limit on, up to which abs(log(condition)) stays `within` of `least`."""
        most = least + math.log1p(within)
        off = value.abs() > most
        if not bool(off.any()):
            return sigma[-1].item()
        # the look at the range has few digits: move both ends to where they belong
        at = int(off.nonzero()[0])
        while at > 0 and abs(self._at(sigma[at].item())) > most:
            at -= 1
        while at + 1 < len(sigma) and abs(self._at(sigma[at + 1].item())) <= most:
            at += 1
        if at + 1 == len(sigma):
            return sigma[-1].item()
        inside, outside = math.log(sigma[at].item()), math.log(sigma[at + 1].item())
        for _ in range(20):
            middle = (inside + outside) / 2
            if abs(self._at(math.exp(middle))) > most:
                outside = middle
            else:
                inside = middle
        return math.exp(inside)

    def _nearest(self, sigma: Tensor, value: Tensor) -> float:
        """Minimise abs(log(condition)) by golden section between the neighbours of the grid's best."""
        best = int(value.abs().argmin())
        a = math.log(sigma[max(best - 1, 0)].item())
        b = math.log(sigma[min(best + 1, len(sigma) - 1)].item())
        ratio = (math.sqrt(5) - 1) / 2
        for _ in range(20):
            c, d = b - ratio * (b - a), a + ratio * (b - a)
            if abs(self._at(math.exp(c))) < abs(self._at(math.exp(d))):
                b = d
            else:
                a = c
        return math.exp((a + b) / 2)

    def _outcome(self, status: str, sigma_p: float, roots, why: str, curve) -> SigmaSearch:
        value, error, m = self.log_condition(sigma_p, sigma_p * 1.001)
        slope = abs(value[1] - value[0]).item() / math.log(1.001)
        own_error = sigma_p * error[0].item() / slope if status == "solved" and slope > 0 else 0.0
        return SigmaSearch(
            status, sigma_p, m.gain(self.bias_variance)[0, 0].item(), value[0].exp().item(), own_error,
            m.gain_error(self.bias_variance)[0, 0].item(), (error * value.exp())[0].item(), roots, why, m.method,
            m.samples, curve,
        )  # fmt: skip
