"""The list of cells: what is measured on a GPU, in which order.

Cells are in parts, and the parts in the order of what they decide. A cell is a dictionary that travels as JSON:
`cell` its name, `group` what its figures are, `run` what a worker does for it (`measure.RUNS`), `needs` a library
that has to be built first, `about` the variant without which it has no point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..cases import STEPS, Case
from . import checks

Cell = dict[str, Any]

#: The parts in order, and what each holds.
PARTS = {
    "deciding": "networks of width 64, 128 and 256 in bf16, all ways to train, inference, against eager and compile",
    "autotune": "the same against torch.compile's max-autotune",
    "layers": "one layer of 256 columns in bf16",
    "tests": "tests/test_gpu.py",
    "float32": "the networks in ieee, TF32 and products of split factors, with accuracy beside them",
    "half": "the networks in fp16",
    "maps": "split, gaussian, sinc and relu: networks and layers",
    "eikonal": "second derivatives: an Eikonal step",
    "small": "few rows, with and without CUDA graphs",
    "moments": "moments under normal pre-activations",
    "accuracy": "errors of a layer of every activation in every type",
    "cuda": "the CUDA C++ backend",
    "tcnn": "tiny-cuda-nn, where it is installed",
    "sizes": "other widths and numbers of rows",
    "sanitizer": "compute-sanitizer over small networks and layers",
    "ncu": "a profile of the network kernels by ncu",
    "sweep": "sine of every float32",
    "product": "every kind, step, width, number of rows, activation and type (hours)",
}
#: What runs only when asked for by name, or with --full.
ON_REQUEST = ("sanitizer", "ncu", "sweep", "product")


def parts(device: torch.device, names: Sequence[str]) -> Iterator[tuple[str, list[Cell]]]:
    """The parts of these names, in their order, each with its cells; no cell comes twice."""
    seen: set[str] = set()
    for name in names:
        found = []
        for cell in _Lists(device).of(name):
            if cell["cell"] not in seen:
                seen.add(cell["cell"])
                found.append(cell)
        yield name, found


class _Lists:
    """The cells of a device, part by part; on a CPU a small rehearsal of each."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.memory = torch.cuda.get_device_properties(device).total_memory if self.cuda else 0
        if self.cuda:
            self.rows = 1 << (20 if self.memory > 60e9 else 18 if self.memory > 14e9 else 16)
            self.widths: tuple[int, ...] = (64, 128, 256)
            self.precisions: tuple[str, ...] = ("bf16", "ieee", "tf32", "fp16")
        else:
            self.rows, self.widths, self.precisions = 512, (16, 32), ("bf16", "ieee")
        self.width = self.widths[-1]
        self.float32 = tuple(p for p in ("ieee", "tf32") if p in self.precisions)
        self.compiled = ["compile"] if self.cuda else []  # a rehearsal needs no C++ compiler

    def of(self, part: str) -> Iterator[Cell]:
        return getattr(self, f"_{part}")()

    # -- kinds of cells

    def accuracy(self, activation: str, precision: str, k: int = 0, n: int = 0, m: int = 8191) -> Cell:
        k, n, m = k or self.width, n or self.width, m if self.cuda else 255
        shape = {"activation": activation, "precision": precision, "k": k, "n": n, "m": m}
        return {"cell": f"accuracy {activation} {k}-{n} {precision}", "group": "accuracy", "run": "accuracy", **shape}

    def bench(self, case: Case, variants: list[str], note: str = "", **more: Any) -> Cell:
        cell = {"cell": f"bench {case}{note}", "group": "bench", "run": "bench", **more}
        return {**cell, "case": asdict(case), "variants": variants, "seconds": 1.5 if self.cuda else 0.1}

    def network(self, step: str, precision: str, activation: str = "sine", **more: int) -> Case:
        return Case(
            "network", step, activation, **{"width": self.width, "rows": self.rows, **more}, precision=precision
        )

    def layer(self, activation: str, precision: str, step: str = "training", k: int = 0, n: int = 0) -> Case:
        k, n = k or self.width, n or self.width
        return Case("layer", step, activation, n, self.rows, precision, in_features=k)

    def ways(self, step: str, rivals: Sequence[str] = ("eager", "compile"), *more: str) -> list[str]:
        """Ours, those that matter most first, then what they are compared with."""
        ours = ["one-pass", "fused", "recompute", "layers"] if step == "training" else ["fused", "layers"]
        return [*ours, *more, *(r for r in rivals if r == "eager" or self.cuda)]

    def networks(self, precision: str, rivals: Sequence[str] = ("eager", "compile"), *more: str) -> Iterator[Cell]:
        for width in self.widths:
            for step in ("training", "inference"):
                yield self.bench(self.network(step, precision, width=width), self.ways(step, rivals, *more))

    # -- the parts

    def _deciding(self) -> Iterator[Cell]:
        yield {
            "cell": "ceilings", "group": "ceilings", "run": "ceilings", "precisions": list(self.precisions),
            "small": not self.cuda,
        }  # fmt: skip
        yield from self.networks("bf16")

    def _autotune(self) -> Iterator[Cell]:
        for width in self.widths if self.cuda else ():
            for step, ours in (("training", ["one-pass", "fused"]), ("inference", ["fused"])):
                case = self.network(step, "bf16", width=width)
                variants = [*ours, "eager", "max-autotune"]
                yield self.bench(case, variants, ", max-autotune", about="max-autotune")

    def _layers(self) -> Iterator[Cell]:
        for step in ("training", "inference"):
            yield self.bench(self.layer("sine", "bf16", step), ["fused", "eager", *self.compiled])

    def _tests(self) -> Iterator[Cell]:
        yield {"cell": "tests", "group": "tests"}

    def _float32(self) -> Iterator[Cell]:
        for precision in self.float32:
            yield self.accuracy("sine", precision)
            more = ("fused bf16x3", "fused tf32x3") if precision == "ieee" and self.cuda else ()
            yield from self.networks(precision, ("eager", "compile"), *more)
            for step in ("training", "inference"):
                yield self.bench(self.layer("sine", precision, step), ["fused", "eager", *self.compiled])
        for split in ("bf16x3", "tf32x3") if self.cuda else ():
            yield self.accuracy("sine", split)

    def _half(self) -> Iterator[Cell]:
        if "fp16" in self.precisions:
            yield self.accuracy("sine", "fp16")
            yield from self.networks("fp16", ("eager",))

    def _maps(self) -> Iterator[Cell]:
        for activation in ("split", "gaussian", "sinc", "relu"):
            for precision in ("bf16", "tf32") if self.cuda else ("bf16",):
                yield self.accuracy(activation, precision)
                yield self.bench(self.layer(activation, precision), ["fused", "eager", *self.compiled])
                for width in (64, self.width) if self.cuda else (self.width,):
                    case = self.network("training", precision, activation, width=width, rows=self.rows // 4)
                    yield self.bench(case, self.ways("training", ("eager",)))

    def _eikonal(self) -> Iterator[Cell]:
        for precision in self.precisions[:3]:
            for width in (self.widths[0], self.width):
                yield self.bench(
                    self.network("eikonal", precision, width=width, rows=self.rows // 4), ["fused", "eager"]
                )

    def _small(self) -> Iterator[Cell]:
        for precision in ("bf16", "ieee"):
            plain = self.ways("training")
            graphs = [f"{name} graph" for name in ("one-pass", "fused", "layers", "eager", "compile")]
            rows = 4096 if self.cuda else 128
            case = self.network("training", precision, width=self.widths[0], rows=rows)
            yield self.bench(case, [*plain, *(graphs if self.cuda else [])])

    def _moments(self) -> Iterator[Cell]:
        for settings, samples in ((1, 1_000_000), (10_000, 1_000_000)) if self.cuda else ((1, 10_000), (20, 10_000)):
            for activation in ("gaussian", "sine", "split"):
                yield {
                    "cell": f"moments {activation}, {settings} x {samples}", "group": "moments", "run": "moments",
                    "activation": activation, "settings": settings, "samples": samples,
                    "backends": ["triton"] if self.cuda else ["cpu"],
                }  # fmt: skip

    def _accuracy(self) -> Iterator[Cell]:
        from ... import activations

        first = ("sine", "split", "gaussian", "relu")
        for activation in sorted(activations.names(), key=lambda name: (name not in first, name)):
            for precision in self.precisions:
                yield self.accuracy(activation, precision)
        for precision in self.precisions:
            yield self.accuracy("sine", precision, 2, self.width)
            yield self.accuracy("sine", precision, self.width, 3)

    def _cuda(self) -> Iterator[Cell]:
        for precision in ("bf16", "ieee") if self.cuda else ():
            for step in ("training", "inference"):
                variants = ["fused", "layers", "cuda", "eager"]
                yield self.bench(self.network(step, precision), variants, ", CUDA C++", needs="cuda")
            yield self.bench(self.layer("sine", precision), ["fused", "cuda", "eager"], ", CUDA C++", needs="cuda")
        for cell in self._moments() if self.cuda else ():
            yield {**cell, "cell": f"{cell['cell']}, CUDA C++", "backends": ["cuda", "triton"], "needs": "cuda"}

    def _tcnn(self) -> Iterator[Cell]:
        for activation in ("relu", "sine") if self.cuda and checks.importable("tinycudann") else ():
            for width in self.widths[:2]:
                for step in ("training", "inference"):
                    case = self.network(step, "fp16", activation, width=width)
                    yield self.bench(case, self.ways(step, ("eager", "tcnn")), ", tiny-cuda-nn")

    def _sizes(self) -> Iterator[Cell]:
        for width in (32, 512, 1024) if self.cuda else ():
            for step in ("training", "inference"):
                yield self.bench(self.network(step, "bf16", width=width), self.ways(step, ("eager",)))
        for rows in (1 << 14, 1 << 17, 1 << 21) if self.cuda else (64,):
            for width in (self.widths[0], self.width):
                yield self.bench(
                    self.network("training", "bf16", width=width, rows=rows), self.ways("training", ("eager",))
                )

    def _sanitizer(self) -> Iterator[Cell]:
        for tool in checks.TOOLS:
            cell = {"cell": f"compute-sanitizer {tool}", "group": "sanitizer", "tool": tool}
            yield {**cell, "small_cases": checks.small_cases(self.cuda), **({"needs": "cuda"} if self.cuda else {})}

    def _ncu(self) -> Iterator[Cell]:
        yield {"cell": "ncu", "group": "ncu"}

    def _sweep(self) -> Iterator[Cell]:
        for backend in ("triton", "cuda") if self.cuda else ():
            name = f"sine of all 2^32 float32, {backend}"
            needs = {"needs": "cuda"} if backend == "cuda" else {}
            yield {"cell": name, "group": "sweep", "run": "sweep", "backend": backend, "limit": 600.0, **needs}

    def _product(self) -> Iterator[Cell]:
        """Every kind, step, width, number of rows, activation and type; the smaller part on a CPU."""
        graphs = ["fused graph", "layers graph", "eager graph", "compile graph"] if self.cuda else []
        for rows in (1 << 17, 1 << 20, 1 << 14, 1 << 21) if self.cuda else (128,):
            for activation in ("sine", "split", "gaussian", "relu", "sinc"):
                for precision in self.precisions:
                    for width in (32, 64, 128, 256, 512, 1024) if self.cuda else (32,):
                        for kind in ("network", "layer"):
                            for step in STEPS:
                                inputs = 2 if kind == "network" else width
                                case = Case(kind, step, activation, width, rows, precision, in_features=inputs)
                                if not self.cuda or eager_bytes(case) <= 0.8 * self.memory:
                                    yield self.bench(case, self._every_variant(case, graphs), ", every variant")

    def _every_variant(self, case: Case, graphs: list[str]) -> list[str]:
        more = ["fused bf16x3"] if case.precision == "ieee" and self.cuda else []
        if case.step == "eikonal":
            return ["fused", *more, "eager"]
        if case.kind == "layer":
            return ["fused", *more, "eager", *self.compiled, *(g for g in graphs if not g.startswith("layers"))]
        return [*self.ways(case.step, ("eager", "compile", "max-autotune"), *more), *graphs]


def eager_bytes(case: Case) -> int:
    """About what eager PyTorch holds at its peak: each value of each formula's branches, and the gradients beside."""
    values = sum(4 * z + y for _, z, y in case.shapes())
    times = {"inference": 0.5, "training": 1.5, "eikonal": 4.0}[case.step]
    return int(times * case.rows * values * case.dtype.itemsize)
