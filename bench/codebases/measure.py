"""`fused-inr bench codebases`: networks as public codebases write them, as they are and after `fused_inr.fuse`.

A row is a training step of one network on the loss that its users minimise (forward and backward, no optimiser), at its
own batch; then a forward without gradients. Original and fused are timed in the same rounds, interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import activations, functional, fusion
from ...cli.arguments import Parser, integer
from .. import report
from ..timing import interleaved
from ._registry import Codebase, codebases

__all__ = ["main"]

#: name, or name@rows: how many times as fast as the original a training step is asked to be; 1 where nothing is said
DEMANDS = {
    "siren-notebook@16384": 1.9,
    "siren-notebook": 2.8,
    "wire": 2.9,
    "incode": 2.3,
    "splitnet": 2.3,
    "neus": 1.7,
    "siren-modules": 1.7,
    "nerf-pytorch": 1.7,
    "torch-ngp": 1.6,
    "tensorf": 1.6,
    "physicsnemo": 1.9,
    "coinpp": 1.8,
    "deepxde": 1.1,
    "igr": 1.15,
    "kilonerf": 1.2,
}

#: microseconds a layer of `fuse` over a call by hand, at most
OVERHEAD = 15.0


def rows_of(name: str) -> tuple[Codebase, int]:
    """A codebase and a number of rows from "name" or "name@rows"."""
    plain, _, rows = name.partition("@")
    codebase = codebases()[plain]
    return codebase, int(rows) if rows else codebase.rows


def _training(codebase: Codebase, model: torch.nn.Module, inputs: tuple) -> Callable[[], Any]:
    def step():
        for p in model.parameters():
            p.grad = None
        loss = codebase.loss(model, inputs)
        loss.backward()
        return loss.detach()

    return step


def _inference(codebase: Codebase, model: torch.nn.Module, inputs: tuple) -> Callable[[], Any]:
    def step():
        with torch.no_grad():
            return getattr(model, codebase.method)(*inputs)

    return step


def measure(name: str, seconds: float, device: torch.device, prefer: str) -> dict[str, Any]:
    """Milliseconds of a step and of a forward, original and fused, and what `fuse` says."""
    codebase, rows = rows_of(name)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(codebase.make(None).to(device))
    original, fused = models
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), codebase.inputs(rows))
    found = fusion.fuse(fused, inputs, codebase.methods, prefer=prefer)
    result: dict[str, Any] = {
        "source": codebase.source,
        "rows": rows,
        "order": codebase.order,
        "fused": len(found.fused),
        "left": len(found.left),
        "errors": found.errors,
        "bounds": found.bounds,
        "saved": found.saved,
    }
    for kind, make in (("training", _training), ("inference", _inference)):
        variants = {"original": make(codebase, original, inputs), "fused": make(codebase, fused, inputs)}
        timings = interleaved(variants, device, seconds=seconds)
        ms = {variant: t.ms for variant, t in timings.items()}
        result[kind] = {"ms": ms, "ratio": ms["original"] / ms["fused"]}
    return result


class _ByHand(torch.nn.Module):
    """A sine layer that calls `linear_act`."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.linear, self.activation = linear, activations.sine(omega=30.0)

    def forward(self, x):
        return functional.linear_act(x, self.linear.weight, self.linear.bias, self.activation)


class _Written(torch.nn.Module):
    """The same in plain PyTorch."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.linear, self.omega = linear, 30.0

    def forward(self, x):
        return torch.sin(self.omega * self.linear(x))


def overhead(seconds: float, layers: int = 16) -> float:
    """Microseconds a layer that `fuse` takes over `linear_act` by hand: layers one by one, few rows, no gradients."""
    linears = [torch.nn.Linear(16, 16) for _ in range(layers)]
    by_hand = torch.nn.Sequential(*map(_ByHand, linears))
    fused = torch.nn.Sequential(*map(_Written, linears))
    fusion.fuse(fused, prefer="always")
    found = fusion.installed(fused)
    assert found is not None
    found.memory.layers_only = True  # a network would have no layers to count
    x = torch.rand(4, 16)
    with torch.no_grad():
        timings = interleaved({"hand": lambda: by_hand(x), "fused": lambda: fused(x)}, x.device, seconds=seconds)
    return (timings["fused"].ms - timings["hand"].ms) * 1e3 / layers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench and returns its exit code."""
    names = ["siren-notebook@16384", *(name for name, codebase in codebases().items() if codebase.available)]
    parser = Parser(
        prog="fused-inr bench codebases", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    text = f"rows, each may be NAME@ROWS: {', '.join(codebases())}"
    parser.add_argument("--only", metavar="NAME,..", help=text)
    parser.add_argument("--prefer", choices=("speed", "always"), default="speed", help="of fuse (speed)")
    parser.add_argument("--seconds", type=report.positive, default=6.0, metavar="S", help="timing of a row (6)")
    parser.add_argument("--threads", type=integer(1), metavar="N", help="PyTorch's threads (its own default)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, .. (cpu)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go, too")
    options = parser.parse_args(argv)
    names = options.only.split(",") if options.only else names
    for name in names:
        plain, _, rows = name.partition("@")
        if plain not in codebases() or (rows and not rows.isdigit()):
            parser.error(f"argument --only: {name!r} is not one of {', '.join(codebases())}, with @ROWS or without")
    device = report.usable_device(parser, options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    about = report.environment(device)
    results = report.Results(Path(options.json) if options.json else None, about)
    print("\n".join(report.about_lines(about)))
    rows_shown, failed, each = [], 0, 0.0
    for name in names:
        try:
            result = measure(name, options.seconds, device, options.prefer)
        except RuntimeError as error:
            results.append({"name": name, "error": str(error)})
            rows_shown.append((name, str(error)[:60], *("-",) * 7, "FAILED"))
            failed += 1
            continue
        demand = DEMANDS.get(name, 1.0)
        training, inference = result["training"], result["inference"]
        results.append({"name": name, "asked": demand, **result})
        rows_shown.append((
            name, f"{result['rows']:,}", f"{result['fused']} / {result['left']}",
            f"{training['ms']['original']:.1f}", f"{training['ms']['fused']:.1f}", f"{training['ratio']:.2f}x",
            f"{inference['ms']['original']:.1f}", f"{inference['ms']['fused']:.1f}", f"{inference['ratio']:.2f}x",
            f"{demand:g}x {'met' if training['ratio'] >= demand else 'MISSED'}",
        ))  # fmt: skip
    if not options.only:
        each = overhead(options.seconds)
        results.append({"name": "overhead", "microseconds": each, "asked": OVERHEAD})
    results.finish()
    head = ("codebase", "rows", "fused / left", "training, ms", "fused", "", "inference, ms", "fused", "", "asked")
    print(report.table(head, rows_shown, left=1))
    if not options.only:
        verdict = "met" if each <= OVERHEAD else "MISSED"
        print(f"a layer by fuse, over linear_act called by hand: {each:.1f} us (asked {OVERHEAD:g} at most: {verdict})")
    return 1 if failed else 0
