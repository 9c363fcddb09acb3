"""Runs `fused-inr gain ACTIVATION`: VI3NR's gain, backward condition and sigma_p of an activation or a formula."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..activations import Activation
from ..init import SigmaSearch, moments, search_sigma_p
from . import CliError
from .activation import parse_activation
from .files import NO_PICTURE, prepare_folder, refuse_folders, write_picture


@dataclass(frozen=True)
class Answer:
    """What `fused-inr gain` tells: the search, and the moments at the sigma_p that was asked for, if one was."""

    activation: Activation
    fan_ratio: float
    bias_variance: float
    search: SigmaSearch
    at: dict[str, float] | None

    def as_json(self) -> dict[str, Any]:
        """Return the answer as it is printed with `--json`."""
        s = self.search
        sigma, condition, error, gain = (t.tolist() for t in s.curve)
        return {
            "activation": repr(self.activation),
            "fan_ratio": self.fan_ratio,
            "bias_variance": self.bias_variance,
            "status": s.status,
            "why": s.why,
            "sigma_p": s.sigma_p,
            "sigma_p_error": s.sigma_p_error,
            "gain": s.gain,
            "gain_error": s.gain_error,
            "condition": s.condition,
            "condition_error": s.condition_error,
            "roots": list(s.roots),
            "method": s.method,
            "samples": s.samples,
            **({"at": self.at} if self.at else {}),
            "curve": {"sigma_p": sigma, "condition": condition, "condition_error": error, "gain": gain},
        }

    def __str__(self) -> str:
        s = self.search
        how = f"Monte Carlo, {s.samples:,} draws" if s.method == "montecarlo" else "quadrature"
        lines = [
            f"{self.activation!r}   ({how})",
            f"  sigma_p    {_number(s.sigma_p, s.sigma_p_error)}   {s.status}: {s.why}",
            f"  gain       {_number(s.gain, s.gain_error)}   gain^2 {s.gain**2:.6g}",
            f"  condition  {_number(s.condition, s.condition_error)}   fan ratio {self.fan_ratio:g}",
        ]
        if self.at:
            a = self.at
            lines += [
                f"at sigma_p = {a['sigma_p']:g}",
                f"  gain       {_number(a['gain'], a['gain_error'])}   gain^2 {a['gain'] ** 2:.6g}",
                f"  condition  {_number(a['condition'], a['condition_error'])}",
                f"  E[f] {a['mean']:.6g}   E[f^2] {a['second']:.6g}",
            ]
        lines.append("weights of a layer after it: uniform within gain sqrt(3 / fan_in), or variance gain^2 / fan_in")
        return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer and write its figure; returns the exit code."""
    path = Path(arguments.figure)
    if arguments.figure:
        prepare_folder(path.parent, "--figure")
        refuse_folders([path])
    answer = examine(arguments)
    print(json.dumps(answer.as_json(), indent=1) if arguments.json else answer, flush=True)
    if arguments.figure:
        if not write_picture(path, lambda: draw(answer)):
            return NO_PICTURE
        if not arguments.json:
            print(f"figure: {arguments.figure}")
    return 0


def examine(arguments: argparse.Namespace) -> Answer:
    """Compute what the arguments ask for. Raises CliError for what cannot be computed."""
    activation = parse_activation(arguments.activation, "ACTIVATION")
    how = dict(method=arguments.method, samples=arguments.samples, seed=arguments.seed, device=arguments.device)
    try:
        search = search_sigma_p(
            activation, fan_ratio=arguments.fan_ratio, bias_variance=arguments.bias_variance, lower=arguments.lower,
            upper=arguments.upper, **how,
        )  # fmt: skip
        at = None
        if arguments.sigma_p is not None:
            at = _at(activation, arguments, how)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CliError(f"gain {arguments.activation}: {error}") from error
    return Answer(activation, arguments.fan_ratio, arguments.bias_variance, search, at)


def _at(activation: Activation, arguments: argparse.Namespace, how: dict[str, Any]) -> dict[str, float]:
    sigma_p, variance = arguments.sigma_p, arguments.bias_variance
    if sigma_p**2 <= variance:
        raise ValueError(f"--sigma-p {sigma_p:g} leaves nothing for the weights beside --bias-variance {variance:g}")
    m = moments(activation, sigma_p, **how)
    return {
        "sigma_p": sigma_p,
        "gain": m.gain(variance)[0].item(),
        "gain_error": m.gain_error(variance)[0].item(),
        "condition": m.condition(arguments.fan_ratio, variance).item(),
        "condition_error": m.condition_error(arguments.fan_ratio, variance).item(),
        "mean": m.mean.mean().item(),
        "second": m.second.mean().item(),
    }


def _number(value: float, error: float) -> str:
    text = f"{value:.6g}"
    return f"{text} +- {error:.1g}" if error > abs(value) * 1e-6 else text


#: The figure's range: by what factor sigma differs from sigma_p at most.
_SHOWN = 300.0


def draw(answer: Answer) -> bytes:
    """Return a figure as a PNG: condition and gain over sigma_p."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CliError("the figure needs matplotlib: pip install 'fused_inr[fit]', or --no-figure") from error
    s = answer.search
    sigma, condition, off, gain = s.curve
    near = (sigma > s.sigma_p / _SHOWN) & (sigma < s.sigma_p * _SHOWN)
    shown = torch.isfinite(condition) & (condition > 0) & (off < 0.2 * condition) & near
    sigma, condition, off, gain = sigma[shown], condition[shown], off[shown], gain[shown]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    title = f"{answer.activation!r}, fan ratio {answer.fan_ratio:g}: {s.status}, sigma_p = {s.sigma_p:.5g}"
    figure.suptitle(title, parse_math=False)
    left, right = figure.subplots(1, 2)
    left.fill_between(
        sigma, (condition - 2 * off).clamp_min(1e-12), condition + 2 * off, alpha=0.3, label="two standard errors"
    )
    left.loglog(sigma, condition, label="condition")
    left.axhline(1, color="grey", linewidth=1)
    left.plot([s.sigma_p], [s.condition], "o", color="black")
    # far from 1 its size says nothing more
    left.set_ylim(max(1e-4, float(condition.min()) / 2), min(1e4, float(condition.max()) * 2))
    left.set_ylabel("backward condition")
    left.legend()
    right.loglog(sigma, gain)
    right.plot([s.sigma_p], [s.gain], "o", color="black")
    right.set_ylabel("gain")
    for axis in (left, right):
        axis.set_xlabel("sigma_p, standard deviation of pre-activations before omega")
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
