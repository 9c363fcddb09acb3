"""`fused-inr bench moments`: moments and the search for sigma_p against the expressions that VI3NR's code uses.

Rounds are interleaved; medians. The reference's search takes 10,000 values of sigma_p, a million draws each: by
default every `--every`-th of them is timed and the time multiplied, `--every 1` times all.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import activations, backends
from ..cli.arguments import Parser, integer
from ..init import moments, search_sigma_p
from . import report
from .timing import interleaved

SAMPLES = 1_000_000
SIGMA = 0.05
#: times as fast as the reference's expression: what is asked for
DEMANDS = {"one sigma": 5.0, "search": 100.0}


def expression(sigma_p: float, samples: int) -> tuple[Tensor, Tensor]:
    """E[f^2], E[f'^2] of a gaussian with PyTorch's own draws and autograd."""
    z = (torch.randn(samples) * sigma_p).requires_grad_()
    f = torch.exp(-(z**2) / (2 * SIGMA**2))
    (slope,) = torch.autograd.grad(f.sum(), z)
    return (f.detach() ** 2).mean(), (slope**2).mean()


def reference_search(every: int, samples: int) -> tuple[float, float]:
    """sigma_p nearest to the backward condition among arange(0.001, 10, 0.001), the same draws for all, and the seconds
    that all values take (those timed, times `every`)."""
    noise = torch.randn(samples)
    values = torch.arange(0.001, 10, 0.001).tolist()[::every]
    best, at = math.inf, 0.0
    begin = time.perf_counter()
    for sigma_p in values:
        z = noise * sigma_p
        f = torch.exp(-(z**2) / (2 * SIGMA**2))
        slope = -z / SIGMA**2 * f
        condition = sigma_p**2 * (slope**2).mean().item() / (f**2).mean().item()
        if abs(condition - 1) < best:
            best, at = abs(condition - 1), sigma_p
    return at, (time.perf_counter() - begin) * every


def one_sigma(samples: int, seconds: float) -> dict[str, Any]:
    gaussian = activations.gaussian(sigma=SIGMA)
    variants: dict[str, Callable[[], object]] = {
        "fused": lambda: moments(gaussian, 0.0777, samples=samples),
        "reference": lambda: expression(0.0777, samples),
    }
    timings = interleaved(variants, torch.device("cpu"), seconds=seconds)
    ms = {name: t.ms for name, t in timings.items()}
    others = {}
    for name in ("sine", "tanh", "sinc", "split"):
        single = interleaved({name: partial(moments, name, 1.0, samples=samples)}, torch.device("cpu"), seconds=1.0)
        others[name] = single[name].ms
    return {"ms": ms, "ratio": ms["reference"] / ms["fused"], "ms_of_others": others}


def search(samples: int, every: int, rounds: int) -> dict[str, Any]:
    gaussian = activations.gaussian(sigma=SIGMA)
    seconds: dict[str, list[float]] = {"montecarlo": [], "auto": []}
    found = {}
    before = None
    for i in range(rounds):
        for method in seconds:
            begin = time.perf_counter()
            found[method] = search_sigma_p(gaussian, method=method, samples=samples, seed=i)
            seconds[method].append(time.perf_counter() - begin)
        if i == rounds // 2:  # in the middle of ours
            before = reference_search(every, samples)
    assert before is not None
    at, theirs = before
    medians = {method: statistics.median(s) for method, s in seconds.items()}
    return {
        "seconds": {**medians, "reference": theirs},
        "reference_timed_every": every,
        "ratio": {method: theirs / s for method, s in medians.items()},
        "sigma_p": {"reference": at, **{m: f.sigma_p for m, f in found.items()}},
        "sigma_p_error": found["montecarlo"].sigma_p_error,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="fused-inr bench moments", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=integer(2), default=SAMPLES, metavar="N", help="draws (%(default)d)")
    parser.add_argument("--every", type=integer(1), default=20, metavar="N", help="of the reference's values (20)")
    parser.add_argument("--rounds", type=integer(1), default=5, metavar="N", help="of the search (%(default)d)")
    parser.add_argument("--seconds", type=integer(1), default=5, metavar="N", help="of one sigma (%(default)d)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go, too")
    options = parser.parse_args(argv)
    usable, reason = backends.TABLE["cpu"].available()
    if not usable:
        print(f"the native engine is not there, the reference is timed: {reason}", file=sys.stderr)
    results = report.Results(Path(options.json) if options.json else None, report.environment(torch.device("cpu")))
    single = one_sigma(options.samples, options.seconds)
    results.append({"name": "one sigma", "asked": DEMANDS["one sigma"], **single})
    searched = search(options.samples, options.every, options.rounds)
    results.append({"name": "search", "asked": DEMANDS["search"], **searched})
    results.finish(samples=options.samples)
    rows = [
        (
            f"gaussian at one sigma, {options.samples:,} draws",
            f"{single['ms']['fused']:.2f} ms",
            f"{single['ms']['reference']:.2f} ms",
            f"{single['ratio']:.1f}",
            f"{DEMANDS['one sigma']:g}",
        ),
    ]
    found = searched["sigma_p"]
    for method, seconds in (("montecarlo", "Monte Carlo"), ("auto", "quadrature")):
        rows.append(
            (
                f"search for sigma_p, {seconds}: {found[method]:.5g} (reference {found['reference']:.4g})",
                f"{searched['seconds'][method]:.3f} s",
                f"{searched['seconds']['reference']:.1f} s",
                f"{searched['ratio'][method]:.0f}",
                f"{DEMANDS['search']:g}",
            )
        )
    print(report.table(("work", "fused", "reference", "ratio", "asked"), rows))
    print("ms at one sigma: " + ", ".join(f"{n} {ms:.2f}" for n, ms in single["ms_of_others"].items()))
    return 0
