"""What the tests of `linear_act` share: backends, problems made from the registry, the float64 oracle, its bounds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from tolerances import UNIT, Map, Rounded, cat, chunk, compute_type, times, tolerance, total
from torch import Tensor
from torch.nn.functional import linear

import fused_inr as fi
from fused_inr.activations import Activation

NAMES = fi.activations.names()


def pytest_generate_tests(metafunc):
    """`backend`: what runs on the device under test; `exact_backend`: of those, what runs float64."""
    cuda = metafunc.config.getoption("--device").startswith("cuda")
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", *(("triton", "cuda") if cuda else ("cpu",))])
    if "exact_backend" in metafunc.fixturenames:
        metafunc.parametrize("exact_backend", ["reference", "cuda" if cuda else "cpu"])


def unavailable(backend: str) -> str:
    """Why a backend cannot run here; empty when it can."""
    try:
        usable, reason = fi.backends.TABLE[backend].available()
    except ImportError as error:
        return str(error)
    return "" if usable else reason


@contextmanager
def using(backend: str):
    """Everything within runs on this backend; skips the test where it cannot run."""
    if reason := unavailable(backend):
        pytest.skip(f"backend {backend!r}: {reason}")
    with fi.backends.use(backend):
        yield


def compiler() -> str | None:
    return next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)


# -- plain PyTorch

_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(64))


def _sinc(z: Tensor, omega: Tensor) -> Tensor:
    """sin(x)/x, x = omega z, as the integral of cos(x t) over [0, 1]: autograd's derivatives of the quotient lose all
    digits near 0. 64 Gauss-Legendre nodes are exact to 1e-16 for abs(x) < 40."""
    x = omega * z
    assert not x.numel() or x.abs().max() < 40
    nodes, weights = _NODES.to(x.device), _WEIGHTS.to(x.device)
    return (torch.cos(x.unsqueeze(-1) * (nodes + 1) / 2) * (weights / 2)).sum(-1)


#: What float64 derivatives are taken of.
#: every activation as users of PyTorch write it
BY_HAND = {m.name: m.facts.eager for m in fi.activations.registered()}
#: whose derivatives are, on purpose, not those of their values
DETACHED = {m.name for m in fi.activations.registered() if m.facts.detached}
ORACLE: dict[str, Callable] = {**BY_HAND, "sinc": _sinc}


def parameters(activation: Activation, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [p if isinstance(p, Tensor) else torch.tensor(p, dtype=dtype) for p in activation.params.values()]


def eager_act(activation: Activation, z: Tensor) -> Tensor:
    """The activation as a user of PyTorch writes it (`BY_HAND`), on branches side by side."""
    params = [p.to(z.dtype) for p in parameters(activation)]
    out = BY_HAND[activation.name](*z.chunk(activation.branches, -1), *params)
    return torch.cat(out, -1) if isinstance(out, tuple) else out


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    if weight.dim() == 2:
        return eager_act(activation, linear(x, weight, bias))
    z = x @ weight.transpose(-1, -2)
    return eager_act(activation, z if bias is None else z + bias.unsqueeze(-2))


# -- problems


@lru_cache
def spread(name: str) -> float:
    """The standard deviation of pre-activations with which the map does something: about 2 over its largest slope."""
    activation = fi.activations.get(name)
    z = torch.linspace(-0.5, 0.5, 401, dtype=torch.float64).unsqueeze(1).repeat(1, activation.branches).requires_grad_()
    y = eager_act(activation, z)
    slope = max(
        torch.autograd.grad(column.sum(), z, retain_graph=True)[0].abs().max().item() for column in y.unbind(-1)
    )
    return min(1.0, 2.0 / slope)


@dataclass
class Problem:
    """x [M, K], weight [B*N, K], bias [B*N], cotangent g [M, C*N] (or with a leading batch), and the activation."""

    activation: Activation
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    g: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.x, self.weight, self.bias) if t is not None)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
        moved = {
            k: None if (t := getattr(self, k)) is None else t.to(device, dtype) for k in ("x", "weight", "bias", "g")
        }
        return replace(self, **moved)

    def requires_grad(self, mask: Sequence[bool] = (True, True, True)) -> Problem:
        for t, needed in zip((self.x, self.weight, self.bias), mask, strict=True):
            if t is not None:
                t.requires_grad_(needed)
        return self


def problem(
    activation: str | Activation,
    m: int = 3,
    k: int = 2,
    n: int = 2,
    *,
    dtype: torch.dtype = torch.float64,
    batch: int | None = None,
    bias: bool = True,
    seed: int = 0,
    away_from_kinks: bool = False,
) -> Problem:
    """Random tensors (exact in `dtype`) with pre-activations where the map does something."""
    activation = fi.activations.get(activation)
    lead = () if batch is None else (batch,)
    scale = spread(activation.name)
    while True:
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape, rng=rng):
            return torch.randn(*lead, *shape, generator=rng, dtype=torch.float64)

        x = draw(m, k)
        weight = draw(activation.branches * n, k) * (scale / max(k, 1) ** 0.5)
        b = draw(activation.branches * n) * scale if bias else None
        g = draw(m, activation.outputs * n)
        made = Problem(activation, x, weight, b, g).to(dtype)
        if not away_from_kinks:
            return made
        z = x @ weight.transpose(-1, -2) + (0 if b is None else b.unsqueeze(-2))
        if not z.numel() or z.abs().min() > tolerance("kink"):
            return made
        seed += 1000


# -- the bound


def _unbatched(p: Problem) -> bool:
    return p.weight.dim() == 2


def _stored(t: Rounded, dtype: torch.dtype) -> Rounded:
    """One of several contributions to a gradient, each of which autograd keeps in the tensor's own type."""
    error = t.error + (UNIT[dtype] * t.size if dtype.itemsize < 4 else 0)
    return Rounded(t.value, torch.where(t.size >= torch.finfo(dtype).max, torch.inf, error), t.unit)


def expected(
    p: Problem, order: int = 1, directions: Sequence[Tensor] | None = None, backend: str = "reference"
) -> dict[str, Rounded]:
    """Value, gradients of <g, y>, and (order 2) gradients of <directions, those gradients>, in float64, with bounds.

    Keys: "y"; "x", "weight", "bias", parameter names; "xx", "ww", "bb", "gg" for the second derivatives.
    """
    assert _unbatched(p)
    u = UNIT[compute_type(p.x.dtype)]
    x, weight, g = (Rounded.exact(t.cpu(), u) for t in (p.x, p.weight, p.g))
    bias = None if p.bias is None else Rounded.exact(p.bias.cpu(), u)
    activation = p.activation
    branches, rows = activation.branches, p.x.shape[0]
    z = (x @ weight.T) + bias
    # omega, and its multiplication, round too
    z = Rounded(z.value, z.error + 2 * u * z.size, u)
    params = [t.cpu() for t in parameters(activation)]
    map = Map(ORACLE[activation.name], branches, z, params, order, spread(activation.name))
    found = {"y": cat(map.value)}
    if not order:
        return found
    gs = chunk(g, map.outputs)
    gz = cat([total([times(gs[c], map.first[c][b]) for c in range(map.outputs)]) for b in range(branches)])
    if backend in ("triton", "cuda") and p.x.dtype.itemsize < 4:
        # their backward writes the gradient of z once, in the type of the tensor cores
        gz = Rounded(gz.value, gz.error + UNIT[p.x.dtype] * gz.size, u)
    found |= {"x": gz @ weight, "weight": gz.T @ x, "bias": gz.sum(0)}
    for j, name in enumerate(activation.param_names):
        found[name] = total([times(gs[c], map.by_param[c][j]) for c in range(map.outputs)]).sum(0)
    if order < 2:
        return found
    vx, vw, vb = (Rounded.exact(t.cpu(), u) for t in directions)
    direction = (vx @ weight.T) + (x @ vw.T)
    direction = direction + Rounded(vb.value.expand(rows, -1), vb.error.expand(rows, -1), u)
    us = chunk(direction, branches)
    hz, hg = [], []
    for b in range(branches):
        terms = [times(times(gs[c], us[a]), map.second[c][a][b]) for c in range(map.outputs) for a in range(branches)]
        hz.append(total(terms))
    for c in range(map.outputs):
        hg.append(total([times(us[a], map.first[c][a]) for a in range(branches)]))
    hz = cat(hz)
    found |= {
        "xx": _stored(hz @ weight, p.x.dtype) + _stored(gz @ vw, p.x.dtype),
        "ww": _stored(hz.T @ x, p.x.dtype) + _stored(gz.T @ vx, p.x.dtype),
        "bb": hz.sum(0),
        "gg": cat(hg),
    }
    return found
