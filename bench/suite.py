"""What the pytest-benchmark suites share: one benchmark a case and variant, its rivals interleaved.

Before each of a benchmark's rounds the case's other variants run a step each, unmeasured by pytest-benchmark and timed
here: so every row of a group was measured in alternation with its rivals, and `extra_info` (and `--benchmark-json`)
tells how many times as fast as each rival it was in those very rounds.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from .cases import COMPILED, Case, Workload, matmul_precision

ROUNDS = 12


class Workbench:
    """One case at a time in memory, checked against float64 and warmed up once for all its variants."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.work: Workload | None = None
        self.calls: dict[str, Any] = {}
        self.check: dict[str, float] = {}

    def prepare(self, case: Case, variants: Sequence[str]) -> None:
        if self.case == case and list(self.calls) == list(variants):
            return
        self.case, self.work = case, Workload(case)
        self.check = self.work.check()
        self.calls = {}
        for name in variants:
            self.calls[name] = self.work.call(name)
            for _ in range(2):
                self.calls[name]()


def parameters(cases: Sequence[tuple[Case, bool]]) -> list[Any]:
    """pytest parameters (case, variants, variant) of cases and whether torch.compile is among the rivals."""
    found = []
    for case, compiled in cases:
        variants = ("fused", "eager", *(["compile"] if compiled and case.compiles else []))
        found += [pytest.param(case, variants, variant, id=_id(case, variant)) for variant in variants]
    return found


def _id(case: Case, variant: str) -> str:
    """Without commas and spaces, which `-k` does not take."""
    return re.sub(r"[^\w-]+", "-", f"{case}, {variant}".replace(",", ""))


def run(benchmark, bench: Workbench, case: Case, variants: Sequence[str], variant: str) -> None:
    """Fill `benchmark` with the step of one variant."""
    if "compile" in variants and not _compiler():
        if variant in COMPILED:
            pytest.skip("torch.compile needs a C++ compiler")
        variants = [name for name in variants if name not in COMPILED]
    rounds = max(ROUNDS, benchmark._min_rounds)
    rivals: dict[str, list[float]] = {name: [] for name in variants if name != variant}
    with matmul_precision(case.precision):
        bench.prepare(case, variants)

        def run_the_others() -> None:
            for name, times in rivals.items():
                start = time.perf_counter()
                bench.calls[name]()
                times.append(time.perf_counter() - start)

        benchmark.group = str(case)
        benchmark.pedantic(bench.calls[variant], setup=run_the_others, rounds=rounds, iterations=1, warmup_rounds=1)
    benchmark.extra_info |= {"variant": variant, "threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.extra_info |= {"backends": bench.work.backends(), "share_of_error_bound": bench.check["of_bound"]}
    if benchmark.stats is not None:  # --benchmark-disable
        own = benchmark.stats.stats.median
        for name, times in rivals.items():
            benchmark.extra_info[f"times as fast as {name}"] = round(statistics.median(times[-rounds:]) / own, 3)


def _compiler() -> bool:
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:
        return False
    return True
