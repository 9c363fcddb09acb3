"""Fits a network shortly over a grid of sigma_p: for shallow networks, where it is the bandwidth that counts.

At its solved sigma_p VI3NR keeps the variance over any number of layers, forward and backward. A network of five layers
does not need that much; what sigma_p decides there is how fast its output varies at the start, and the best value is a
matter of the signal. The published advice is a short grid around the solved one; this is that grid, with the network's
own weights (PyTorch's default, say) among the candidates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._checks import described, finite_float, positive_int
from .network import vi3nr_init_

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """One candidate: `sigma_p`, `first_sigma_p` (both None: the network's own weights), `losses` one a seed."""

    sigma_p: float | None
    first_sigma_p: float | None
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The mean of the losses; infinite where a fit diverged."""
        mean = sum(self.losses) / len(self.losses)
        return mean if math.isfinite(mean) else math.inf


@dataclass(frozen=True)
class SigmaTuning:
    """What `tune_sigma_p` found: `trials`, the best first; `str()` is a table of them."""

    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the lowest loss."""
        return self.trials[0]

    @property
    def own(self) -> Trial:
        """The trial with the network's own weights."""
        return next(t for t in self.trials if t.sigma_p is None)

    def wins(self) -> int:
        """Count the seeds in which the best of the grid ends below the network's own weights."""
        grid = next(t for t in self.trials if t.sigma_p is not None)
        return sum(a < b for a, b in zip(grid.losses, self.own.losses))

    def __str__(self) -> str:
        lines = [f"{'sigma_p':>10}  {'first':>10}  {'loss':>12}  {'better than own':>15}"]
        own = self.own
        for t in self.trials:
            if t.sigma_p is None:
                lines.append(f"{'own':>10}  {'own':>10}  {t.loss:>12.4e}  {'':>15}")
            else:
                wins = sum(a < b for a, b in zip(t.losses, own.losses))
                first = t.sigma_p if t.first_sigma_p is None else t.first_sigma_p
                count = f"{wins} of {len(own.losses)}"
                lines.append(f"{t.sigma_p:>10.4g}  {first:>10.4g}  {t.loss:>12.4e}  {count:>15}")
        return "\n".join(lines)


def mean_squared_error(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error of `model(x)`, which `tune_sigma_p` minimises by default."""
    return (model(x) - target).square().mean()


def tune_sigma_p(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sigma_p: Sequence[float],
    first_sigma_p: Sequence[float | None] = (None,),
    *,
    steps: int = 100,
    lr: float = 1e-3,
    seeds: int = 1,
    loss: Loss = mean_squared_error,
    apply: bool = True,
) -> SigmaTuning:
    """Fit `model` shortly from each candidate, and from its own weights, and tell which ends lowest.

    Args:
        model: a network that `vi3nr_init_` can initialise. It is not trained: copies are.
        x, target: coordinates [.., in_features] and values, as the network will be trained on (a subset will do).
        sigma_p: candidates, e.g. 1, 2.5 and 4 times `search_sigma_p(...).sigma_p`.
        first_sigma_p: candidates for the first layer; None: as the other layers.
        steps, lr: of each fit, by Adam over all rows.
        seeds: weights are drawn anew for each; its own are drawn by the model's `reset_parameters` after the first.
        loss: of (network, x, target); `fused_inr.losses.mse` does it in one pass.
        apply: whether `model` is initialised with the winner in the end (left as it is where its own weights win).

    Returns a `SigmaTuning`. Raises TypeError or ValueError for other arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a network, got {type(model).__name__}")
    for name, value in (("x", x), ("target", target)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {described(value)}")
    if not isinstance(sigma_p, Sequence) or isinstance(sigma_p, str) or not sigma_p:
        raise ValueError(f"sigma_p must be a sequence of candidates, got {sigma_p!r}")
    if not isinstance(first_sigma_p, Sequence) or isinstance(first_sigma_p, str) or not first_sigma_p:
        raise ValueError(f"first_sigma_p must be a sequence of candidates, got {first_sigma_p!r}")
    sigmas = [finite_float("sigma_p", s, above=0) for s in sigma_p]
    firsts = [None if s is None else finite_float("first_sigma_p", s, above=0) for s in first_sigma_p]
    steps, seeds = positive_int("steps", steps), positive_int("seeds", seeds)
    lr = finite_float("lr", lr, above=0)
    candidates: list[tuple[float | None, float | None]] = [(None, None), *((s, f) for s in sigmas for f in firsts)]

    def start(net: nn.Module, sigma: float | None, first: float | None, seed: int) -> None:
        if sigma is not None:
            rng = torch.Generator(device=next(net.parameters()).device).manual_seed(seed)
            vi3nr_init_(net, x, sigma, first_sigma_p=first, generator=rng)
        elif seed:
            for m in [net] if hasattr(net, "reset_parameters") else net.modules():
                reset: Callable[[], object] | None = getattr(m, "reset_parameters", None)
                if reset is not None:
                    reset()

    trials = []
    with torch.random.fork_rng(devices=()):
        for sigma, first in candidates:
            ends = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                net = copy.deepcopy(model)
                start(net, sigma, first, seed)
                ends.append(_fitted(net, x, target, steps, lr, loss))
            trials.append(Trial(sigma, first, tuple(ends)))
    found = SigmaTuning(tuple(sorted(trials, key=lambda t: t.loss)))
    if apply and found.best.sigma_p is not None:
        start(model, found.best.sigma_p, found.best.first_sigma_p, 0)
    return found


def _fitted(net: nn.Module, x: Tensor, target: Tensor, steps: int, lr: float, loss: Loss) -> float:
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(net, x, target).backward()
        optimizer.step()
    with torch.no_grad():
        return loss(net, x, target).item()
