"""Computes moments by quadrature, in float64: the other way to what Monte Carlo estimates, and its oracle.

One branch: Gauss-Hermite rules of three sizes; where they do not agree (a kink, a narrow bump, many periods), adaptive
Gauss-Legendre panels against the normal density, graded towards 0. Several branches: products of trapezoidal rules,
which converge faster than Gauss-Hermite where the function has poles near the real axis (tanh), until two agree. A
function that is smooth almost everywhere and has a bump between all nodes is not noticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

#: Nodes of the rules a branch, by the number of branches.
_NODES = {1: (64, 96, 128), 2: (64, 128, 256, 512, 1024), 3: (32, 48, 64, 96), 4: (24, 32, 40)}
#: Two rules agree: difference over the size of what is integrated.
_AGREED = {1: 1e-10, 2: 1e-9, 3: 1e-8, 4: 1e-4}
#: Standard deviations at which the density ends: what lies beyond weighs 1e-38.
_END = 13.0
#: The same for products of rules: 2e-17, 6e-13, 3e-12.
_END_PRODUCT = {2: 8.5, 3: 7.2, 4: 7.0}
_PANEL_NODES = 16
_MOST_PANELS = 1 << 14
_AT_A_TIME = 1 << 20


class NotConverged(ArithmeticError):
    """Raised where the rules do not agree."""


def integrate(grid) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """Integrate means, second moments (both [G, V]), and their errors, for a `Grid`; raises NotConverged."""
    rules = _NODES.get(grid.branches)
    if rules is None:
        raise NotConverged(f"quadrature over {grid.branches} branches takes too many nodes")
    if grid.branches > 1:
        return _by_products(grid, rules)
    last, error, good = smooth(grid)
    for g in (~good).nonzero().flatten().tolist():
        last[g], error[g] = _panels(grid, g)
    return last[..., 0], last[..., 1], error[..., 0], error[..., 1], None


def smooth(grid) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate by Gauss-Hermite (one branch): moments [G, V, 2], their errors, and where [G] the rules agree."""
    results = [_product_rule(grid, _hermite(nodes)) for nodes in _NODES[1]]
    last, error = results[-1], torch.zeros_like(results[-1])
    for other in results[:-1]:
        error = torch.maximum(error, (other - last).abs())
    return last, error, _agree(last, error, 1) & (last[..., 1] > 0).all(1)


def _by_products(grid, rules):
    end = _END_PRODUCT[grid.branches]
    before = _product_rule(grid, _trapezoidal(rules[0], end))
    for nodes in rules[1:]:
        last = _product_rule(grid, _trapezoidal(nodes, end))
        error = (last - before).abs()
        if bool(_agree(last, error, grid.branches).all()):
            break
        before = last
    else:
        raise NotConverged(f"quadrature does not converge for sigma up to {grid.sigmas.max():g}: {grid.f!r}")
    return last[..., 0], last[..., 1], error[..., 0], error[..., 1], None


def _agree(last: Tensor, error: Tensor, branches: int) -> Tensor:
    size = torch.stack((last[..., 1].sqrt(), last[..., 1]), -1)  # of a mean, of a second moment
    return (torch.isfinite(last) & (error <= _AGREED[branches] * size)).flatten(1).all(1)


def _product_rule(grid, rule: tuple[Tensor, Tensor]) -> Tensor:
    """Integrate E[v] and E[v^2], [G, V, 2], by the product of a rule's points and weights over the branches."""
    points, weights = rule
    axes = torch.meshgrid(*[points] * grid.branches, indexing="ij")
    t = [a.flatten() for a in axes]
    w = torch.ones((), dtype=torch.float64)
    for _ in range(grid.branches):
        w = (w.unsqueeze(-1) * weights).flatten()
    rows = max(1, _AT_A_TIME // len(w))
    out = []
    for at in range(0, len(grid.sigmas), rows):
        sigmas = grid.sigmas[at : at + rows]
        v = grid.values([sigmas[:, b, None] * t[b] for b in range(grid.branches)], grid.params[at : at + rows])
        out.append(torch.stack([torch.stack((x @ w, (x * x) @ w), -1) for x in v], 1))
    return torch.cat(out)


def _panels(grid, g: int) -> tuple[Tensor, Tensor]:
    """Integrate setting g (one branch), [V, 2], with its error: panels are halved until each agrees with its halves."""
    points, weights = _legendre(_PANEL_NODES)
    sigma, params = grid.sigmas[g, 0], grid.params[g : g + 1]

    def panel_sums(low: Tensor, high: Tensor) -> Tensor:  # [panels, V, 2]
        half = ((high - low) / 2).unsqueeze(1)
        t = (low + high).unsqueeze(1) / 2 + half * points
        w = half * weights * torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        v = grid.values([(sigma * t).reshape(1, -1)], params)
        rows = [x.view_as(t) for x in v]
        return torch.stack([torch.stack(((w * x).sum(1), (w * x * x).sum(1)), -1) for x in rows], 1)

    edges = torch.cat((torch.zeros(1), _END * 2.0 ** torch.arange(-40.0, 1.0))).double()
    low = torch.cat((-edges.flip(0)[:-1], edges[:-1]))
    high = torch.cat((-edges.flip(0)[1:], edges[1:]))
    sums = panel_sums(low, high)
    total, error, size = torch.zeros_like(sums[0]), torch.zeros_like(sums[0]), None
    used = 0
    while len(low):
        used += len(low)
        if used > _MOST_PANELS:
            raise NotConverged(f"quadrature does not converge for sigma = {sigma:g}: {grid.f!r}")
        middle = (low + high) / 2
        left, right = panel_sums(low, middle), panel_sums(middle, high)
        halves = left + right
        off = (halves - sums).abs()
        now = total + halves.sum(0)
        if not bool(torch.isfinite(now).all()):
            return now, now
        second = torch.maximum(now[:, 1], size) if size is not None else now[:, 1]
        size = second
        allowed = 1e-12 * torch.stack((second.sqrt(), second), -1) + 1e-300
        done = (off <= allowed).flatten(1).all(1) | (high - low < 1e-13)
        total = total + halves[done].sum(0)
        error = error + off[done].sum(0)
        rest = ~done
        low, high = torch.cat((low[rest], middle[rest])), torch.cat((middle[rest], high[rest]))
        sums = torch.cat((left[rest], right[rest]))
    return total, error


@lru_cache(maxsize=16)
def _hermite(nodes: int) -> tuple[Tensor, Tensor]:
    return _rule(np.polynomial.hermite_e.hermegauss, nodes, math.sqrt(2 * math.pi))


@lru_cache(maxsize=16)
def _trapezoidal(nodes: int, end: float) -> tuple[Tensor, Tensor]:
    points = torch.linspace(-end, end, nodes, dtype=torch.float64)
    weights = torch.exp(-points * points / 2)
    return points, weights / weights.sum()


@lru_cache(maxsize=16)
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    return _rule(np.polynomial.legendre.leggauss, nodes, 1.0)


def _rule(make: Callable, nodes: int, norm: float) -> tuple[Tensor, Tensor]:
    points, weights = make(nodes)
    return torch.from_numpy(points), torch.from_numpy(weights / norm)
