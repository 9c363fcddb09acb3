"""`fused-inr bench table`: our figures beside eager PyTorch's and torch.compile's on this machine, and what they must
be.

Each row is timed in a process of its own, variants interleaved; peak memory in one process a variant. `--warmed` adds
every row with an allocator that keeps its memory, since a good part of eager's time on CPUs is page faults.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import backends
from . import report, worker
from .cases import COMPILED, Case
from .report import number, ratio


@dataclass(frozen=True)
class Benchmark:
    """A case, and how much faster than each rival it must be (as the user starts it, and with a warmed
    allocator)."""

    name: str
    case: Case
    demands: dict[str, float] = field(default_factory=dict)
    warmed: dict[str, float] = field(default_factory=dict)
    memory: float | None = None  # largest share of eager's peak


_BRANCHED = {"eager": 2.5, "compile": 1.5}
BENCHMARKS = (
    Benchmark(
        "inference",
        Case("network", "inference"),
        {"eager": 3.0, "compile": 1.6, "floor": 0.8},
        {"eager": 1.5, "compile": 1.0},
    ),
    Benchmark(
        "training",
        Case("network", "training"),
        {"eager": 3.5, "compile": 1.4, "floor": 0.7},
        {"eager": 1.5, "compile": 1.0},
    ),
    Benchmark("one-pass", Case("network", "training", way="one-pass"), {"eager": 4.0, "compile": 1.6, "floor": 0.85}),
    Benchmark("recompute", Case("network", "training", way="recompute"), {"compile": 1.1}),
    Benchmark(
        "one-pass-128",
        Case("network", "training", width=128, way="one-pass"),
        {"eager": 3.6, "compile": 1.6, "floor": 0.8},
    ),
    Benchmark(
        "one-pass-64",
        Case("network", "training", width=64, way="one-pass"),
        {"eager": 3.2, "compile": 1.4, "floor": 0.75},
    ),
    Benchmark("inference-128", Case("network", "inference", width=128), _BRANCHED),
    Benchmark("training-128", Case("network", "training", width=128), {"eager": 3.0, "compile": 1.3}),
    Benchmark("inference-64", Case("network", "inference", width=64), _BRANCHED),
    Benchmark("training-64", Case("network", "training", width=64), {"eager": 3.0, "compile": 1.3}),
    *(
        Benchmark(f"{name}-{step}", Case("network", step, activation, width=width), _BRANCHED)
        for name, activation, width in (
            ("splitnet", "split", 128),
            ("gaussian", "gaussian_scale", 256),
            ("sinc", "sinc", 256),
        )
        for step in ("inference", "training")
    ),
    Benchmark("bf16", Case("network", "inference", precision="bf16"), {"compile": 1.3}),
    Benchmark("eikonal", Case("network", "eikonal"), {"eager": 1.8}, {"eager": 1.5}),
    Benchmark(
        "split",
        Case("layer", "training", "split", in_features=256),
        {"eager": 3.0},
        {"eager": 1.5, "compile": 1.0},
        0.5,
    ),
    Benchmark("small", Case("network", "training", width=64, rows=1024), {"eager": 1.0}, {"eager": 1.0}),
)
#: memory of a training step beyond parameters, inputs and outputs, as a share of eager's, and by how much a row's cost
#: may vary with the number of rows
DEPTH_MEMORY, FLAT = 0.25, 0.15
IMPORT_LIMIT_S, PSNR_LIMIT_DB = 0.3, 0.1
OTHERS = ("depth", "rows", "import", "psnr", "pixels")
#: peak memory of training on a picture of 16.8 million pixels at once, data included
PIXELS_LIMIT_GIB = 24
NAMES = (*(each.name for each in BENCHMARKS), *OTHERS)
#: what runs without --only: all but the picture of 16.8 million pixels, minutes a step
DEFAULT = tuple(name for name in NAMES if name != "pixels")
QUICK = ("inference", "one-pass", "eikonal", "split", *OTHERS)
ALLOCATORS = {False: "as started", True: "warmed allocator"}


def parser() -> report.Parser:
    p = report.Parser(
        prog="fused-inr bench table", description=__doc__, formatter_class=report.argparse.RawTextHelpFormatter
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE, after every row")
    p.add_argument("--figure", type=Path, metavar="FILE", help="draw the times as a bar chart (.png, .svg, .pdf)")
    p.add_argument("--only", type=report.one_or_more(NAMES), metavar="NAME,..", help=f"rows: {', '.join(NAMES)}")
    p.add_argument("--rows", type=report.integer(1), metavar="N", help="rows of the inputs (65536; small: 1024)")
    p.add_argument("--width", type=report.integer(1), metavar="N", help="features of a hidden layer (256; small: 64)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, .. (cpu)")
    p.add_argument("--threads", type=report.integer(1), metavar="N", help="PyTorch's threads (its own default)")
    p.add_argument(
        "--seconds", type=report.positive, default=15.0, metavar="S", help="timing of a row, all variants (15)"
    )
    p.add_argument("--warmed", action="store_true", help="every row also with a warmed allocator (CPU, glibc)")
    p.add_argument(
        "--no-autotune",
        action="store_true",
        help="torch.compile in its default mode only (max-autotune: minutes a row)",
    )
    p.add_argument("--no-compile", action="store_true", help="without torch.compile")
    p.add_argument("--draws", type=report.integer(2), default=6, metavar="N", help="draws of weights of psnr (6)")
    p.add_argument("--steps", type=report.integer(1), default=2, metavar="N", help="steps on the picture of pixels (2)")
    p.add_argument("--no-memory", action="store_true", help="without peak memory")
    p.add_argument(
        "--quick", action="store_true", help="small sizes, few rounds, no torch.compile: does it work at all?"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 every row was measured (whether or not it meets its demand), 1 a row failed."""
    p = parser()
    options = p.parse_args(argv)
    device = report.usable_device(p, options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.warmed and (device.type != "cpu" or not sys.platform.startswith("linux")):
        p.error("argument --warmed: it is about glibc's allocator, so it needs a CPU and Linux")
    about = report.environment(device)
    results = report.Results(options.json, about)
    print("\n".join(report.about_lines(about)))
    kind = "a quick run: sizes reduced, nothing is judged" if options.quick else "float32"
    print(f"medians of interleaved rounds; {kind}\n")
    bench = _Bench(options, device)
    lines, failed, bars = [], 0, {}
    for name in options.only or (QUICK if options.quick else DEFAULT):
        for warmed in (False, True) if options.warmed and name not in OTHERS else (False,):
            progress(f"{name}, {ALLOCATORS[warmed]} ...")
            result = bench.measure(name, warmed)
            results.append(result)
            failed += "error" in result
            lines += bench.lines(result)
            if "timings" in result:
                label = name + (", warmed" if warmed else "")
                bars[label] = {variant: t["ms"] for variant, t in result["timings"].items()}
    progress("")
    print(report.table(HEAD, lines, left=2))
    print("\n".join(_notes(options)))
    if options.figure is not None:
        report.bar_chart(
            options.figure, f"{about['device']}, torch {torch.__version__}", bars, "ms a step (less is better)"
        )
    results.finish()
    return 1 if failed else 0


HEAD = (
    "work",
    "allocator",
    "fused",
    "eager",
    "compile",
    "max-autotune",
    "floor",
    "vs eager",
    "vs compile",
    "of floor",
    "peak MiB",
    "eager's",
    "demand",
    "",
)


def progress(text: str) -> None:
    """One line on a terminal that each text replaces; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


class _Bench:
    def __init__(self, options, device: torch.device):
        self.options, self.device = options, device
        self.benchmarks = {each.name: each for each in BENCHMARKS}
        self.variants = ["fused", "eager"]
        if device.type == "cpu" and backends.available()["cpu"][0]:
            self.variants.append("floor")
        if not options.no_compile and not options.quick:
            self.variants += ["compile"] if options.no_autotune else list(COMPILED)

    def job(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"job": kind, "device": str(self.device), "threads": self.options.threads, **more}

    def measure(self, name: str, warmed: bool) -> dict[str, Any]:
        start = datetime.datetime.now()
        others = {
            "import": self._import,
            "psnr": self._psnr,
            "pixels": self._pixels,
            "depth": self._depth,
            "rows": self._rows,
        }
        measured = others.get(name, lambda: self._benchmark(self.benchmarks[name], warmed))()
        return {"name": name, "warmed": warmed, **measured, "took_s": (datetime.datetime.now() - start).total_seconds()}

    def _benchmark(self, benchmark: Benchmark, warmed: bool) -> dict[str, Any]:
        quick = self.options.quick
        case = benchmark.case
        if quick:
            case = replace(case, rows=min(case.rows, 512), width=min(case.width, 32))
        if quick and case.kind == "layer":
            case = replace(case, in_features=32)
        if self.options.rows:
            case = replace(case, rows=self.options.rows)
        if self.options.width:
            case = replace(
                case, width=self.options.width, in_features=self.options.width if case.kind == "layer" else 2
            )
        rounds, seconds = ([2, 3], 0.2) if quick else ([7, 200], self.options.seconds)
        job = self.job("time", case=asdict(case), variants=self.variants, seconds=seconds, rounds=rounds)
        result = worker.run(job, warmed=warmed)
        if "error" in result:
            return {"work": str(case), **result}
        times = {variant: t["ms"] for variant, t in result["timings"].items()}
        result["ratios"] = {variant: ms / times["fused"] for variant, ms in times.items() if variant != "fused"}
        if not self.options.no_memory and not warmed:
            result["peak_mib"] = {}
            for variant in times.keys() - {"floor"}:
                memory = worker.run(self.job("memory", case=asdict(case), variant=variant))
                if "error" in memory:
                    result["failed"][f"memory of {variant}"] = memory["error"]
                else:
                    result["peak_mib"][variant] = memory["peak_mib"]
        if case == benchmark.case and self.device.type == "cpu":
            result["verdicts"] = verdicts(benchmark, result, warmed)
        return result

    def _depth(self) -> dict[str, Any]:
        """Peak memory of a training step at two depths: eager, one pass, recomputed."""
        small = {"rows": 512, "width": 32} if self.options.quick else {}
        peaks: dict[str, dict[str, float]] = {}
        for name, variant, way in (
            ("eager", "eager", "default"),
            *((w, "fused", w) for w in ("one-pass", "recompute")),
        ):
            peaks[name] = {}
            for depth in (5, 10):
                case = Case("network", "training", hidden_layers=depth, way=way, **small)
                memory = worker.run(self.job("memory", case=asdict(case), variant=variant))
                if "error" in memory:
                    return {"work": "memory by depth", **memory}
                peaks[name][str(depth)] = memory["peak_mib"]
        found = []
        for way in ("one-pass", "recompute"):
            share, growth = peaks[way]["5"] / max(peaks["eager"]["5"], 1e-9), peaks[way]["10"] - peaks[way]["5"]
            found.append({"demand": f"{way} <= {DEPTH_MEMORY} eager", "value": share, "met": share <= DEPTH_MEMORY})
            # gradients and packed weights are parameters' size; 5 layers of 256 x 256 more are 4 MiB of parameters
            found.append(
                {"demand": f"{way}: no more deep", "value": growth, "met": growth <= 0.05 * peaks["eager"]["5"]}
            )
        result = {"work": "memory of a training step, 5 and 10 hidden layers", "peak_by_depth": peaks}
        return result if self.options.quick else {**result, "verdicts": found}

    def _rows(self) -> dict[str, Any]:
        """The cost of a row of inference, from few rows to many."""
        powers = (8, 10) if self.options.quick else range(12, 23, 2)
        job = self.job("rows", case=asdict(Case("network", "inference", width=32 if self.options.quick else 256)))
        result = worker.run({**job, "rows": [2**p for p in powers], "rounds": 5})
        if "error" in result:
            return {"work": "cost of a row", **result}
        costs = result["ns_a_row"].values()
        value = max(costs) / min(costs) - 1
        if not self.options.quick:
            result["verdicts"] = [{"demand": f"flat within {FLAT:.0%}", "value": value, "met": value <= FLAT}]
        return {"work": "inference, cost of a row by number of rows", **result}

    def _import(self) -> dict[str, Any]:
        """What the import costs a program that has torch already; no compiler in the PATH, no GPU to be seen."""
        environment = {**os.environ, "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
        environment = {key: value for key, value in environment.items() if key not in ("CC", "CXX")}
        times: dict[str, list[float]] = {"import fused_inr": [], "with all that it names": []}
        for _ in range(2 if self.options.quick else 9):
            for name, program in _IMPORTS.items():
                try:
                    done = subprocess.run(
                        [sys.executable, "-P", "-c", program],
                        env=environment,
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                except subprocess.CalledProcessError as error:
                    return {"work": name, "error": error.stderr.strip().splitlines()[-1]}
                times[name].append(float(done.stdout))
        seconds = {name: statistics.median(values) for name, values in times.items()}
        slowest = max(seconds.values())
        verdict = {"demand": f"< {IMPORT_LIMIT_S} s", "value": slowest, "met": slowest < IMPORT_LIMIT_S}
        return {"work": "import beyond torch", "seconds": seconds, "verdicts": [verdict]}

    def _psnr(self) -> dict[str, Any]:
        options = {"size": 64, "steps": 500, "lr": 1e-4, "seed": 0, "width": self.options.width or 64}
        draws = self.options.draws
        if self.options.quick:
            draws, options = 2, options | {"size": 24, "steps": 10, "width": 32}
        result = worker.run(self.job("psnr", options=options, draws=draws), limit=7200)
        if "error" not in result and not self.options.quick:
            apart = result["fused_less_eager"]
            demand = f"mean within {PSNR_LIMIT_DB} dB and 2 standard errors"
            met = abs(apart["mean"]) <= PSNR_LIMIT_DB + 2 * apart["standard_error"]
            result["verdicts"] = [{"demand": demand, "value": apart["mean"], "met": met}]
        return {"work": f"PSNR after {options['steps']} steps", **result}

    def _pixels(self) -> dict[str, Any]:
        """A whole picture a step: 4096 x 4096 pixels."""
        side, width = (64, 32) if self.options.quick else (4096, self.options.width or 256)
        result = worker.run(self.job("pixels", side=side, width=width, steps=self.options.steps), limit=7200)
        if "error" not in result and not self.options.quick:
            value = (result["peak_mib"] + result["data_mib"]) / 1024
            demand = f"data and peak < {PIXELS_LIMIT_GIB} GiB"
            result["verdicts"] = [{"demand": demand, "value": value, "met": value < PIXELS_LIMIT_GIB}]
        return {"work": f"one pass over {side} x {side} pixels", **result}

    def lines(self, result: dict[str, Any]) -> list[tuple[str, ...]]:
        """The row of the table, and one below it for each further demand."""
        told = [(v["demand"], "met" if v["met"] else "MISSED") for v in result.get("verdicts", [])] or [("-", "")]
        blank = ("-",) * 10
        if "error" in result:
            cells = (result["name"], "failed: " + result["error"][:90], *blank, "-", "FAILED")
            return [cells]
        allocator = ALLOCATORS[result["warmed"]] if result["name"] not in OTHERS else ""
        if "timings" in result:
            times = {variant: t["ms"] for variant, t in result["timings"].items()}
            peaks = result.get("peak_mib", {})
            ratios = {**result["ratios"], "compile": compiled(result["ratios"])}
            shown: tuple[str, ...] = (
                *(number(times.get(variant)) for variant in ("fused", "eager", *COMPILED, "floor")),
                *(ratio(ratios.get(variant)) for variant in ("eager", "compile", "floor")),
                *(number(peaks.get(variant)) for variant in ("fused", "eager")),
            )
        elif "peak_by_depth" in result:
            peaks = result["peak_by_depth"]
            shown = (*blank[:8], number(peaks["one-pass"]["10"]), number(peaks["eager"]["10"]))
        elif "ns_a_row" in result:
            shown = (
                "-".join(f"{c:.0f}" for c in (min(result["ns_a_row"].values()), max(result["ns_a_row"].values())))
                + " ns",
                *blank[1:],
            )
        elif "s_a_step" in result:
            shown = (f"{min(result['s_a_step']):.1f} s", *blank[1:8], number(result["peak_mib"]), "-")
        elif "seconds" in result:
            shown = (f"{max(result['seconds'].values()):.3f} s", *blank[1:])
        else:
            shown = (f"{result['fused_psnr']:.2f} dB", f"{result['eager_psnr']:.2f} dB", *blank[2:])
        first = (result["name"], allocator, *shown, *told[0])
        return [first, *(("", "", *("",) * 10, *more) for more in told[1:])]


_IMPORTS = {
    "import fused_inr": "import torch, time; t = time.perf_counter(); import fused_inr; print(time.perf_counter() - t)",
    "with all that it names": (
        "import torch, time; t = time.perf_counter(); import fused_inr; "
        "[getattr(fused_inr, n) for n in fused_inr.__all__]; print(time.perf_counter() - t)"
    ),
}


def compiled(ratios: dict[str, float]) -> float | None:
    """Of torch.compile, the better of its modes that were measured."""
    return min((ratios[mode] for mode in COMPILED if mode in ratios), default=None)


def verdicts(benchmark: Benchmark, result: dict[str, Any], warmed: bool) -> list[dict[str, Any]]:
    """Each demand of a benchmark with what was measured; a rival that was not measured judges nothing."""
    found = []
    for rival, least in (benchmark.warmed if warmed else benchmark.demands).items():
        value = compiled(result["ratios"]) if rival == "compile" else result["ratios"].get(rival)
        if value is not None:
            found.append({"demand": f">= {least}x {rival}", "value": value, "met": value >= least})
    peaks = result.get("peak_mib", {})
    if benchmark.memory is not None and "fused" in peaks and "eager" in peaks:
        share = peaks["fused"] / peaks["eager"]
        met = share <= benchmark.memory
        found.append({"demand": f"peak <= {benchmark.memory} of eager's", "value": share, "met": met})
    return found


def _notes(options) -> list[str]:
    lines = [
        "",
        "ms a step; 'vs' how many times as fast as the rival, of torch.compile the better of its modes;",
        "peak: resident memory over that between steps.",
        "floor: the products alone, by the engine's micro-kernel on numbers in the cache, timed in the same rounds.",
    ]
    shown: Callable[[str], bool] = lambda name: not options.only or name in options.only  # noqa: E731
    if shown("eikonal"):
        lines.append("torch.compile cannot differentiate twice: no figure for the Eikonal step.")
    if not options.warmed:
        lines.append(
            "--warmed adds every row with an allocator that keeps its memory (eager's time is partly page faults)."
        )
    lines.append("Triton kernels, compiled ahead of time: fused-inr bench static. CUDA machines: fused-inr bench gpu.")
    return lines
