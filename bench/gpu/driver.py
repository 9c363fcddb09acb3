"""The command `fused-inr bench gpu`: parts and cells in order, until the budget is spent.

Before a part is measured, everything that it launches is compiled by many processes side by side, which idle
afterwards; nothing is timed meanwhile. Then a worker process measures cell after cell, and each result is in the
folder before the next one starts. A cell that fails is recorded and the next one runs; a variant that takes the
device's context with it, or hangs, costs a fresh process and its own figure, and the cell is measured again without
it. The library of the CUDA C++ backend is built beside all of this, with low priority, and the cells that need it
come late.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ...cli import CliError, children
from ...cli.children import one_line
from ...cli.files import prepare_folder
from .. import report, roofline, timing
from . import checks, measure, summary
from .cells import ON_REQUEST, PARTS, Cell, parts
from .workers import Pool, Worker, serve

#: Seconds that a cell may take, and that compiling a part ahead may take (torch.compile's search compiles hundreds of
#: kernels); what of the remaining budget may go into that, and what of the whole into tests.
CELL_LIMIT_S, AHEAD_LIMIT_S, SEARCH_LIMIT_S = 60.0, 100.0, 150.0
AHEAD_SHARE, TESTS_SHARE = 0.4, 0.25
#: What a cell may overrun the budget by, so that one that has begun is not lost.
GRACE_S = 10.0


def parser() -> report.Parser:
    lines = "\n".join(f"  {name:<10} {text}" for name, text in PARTS.items())
    p = report.Parser(
        prog="fused-inr bench gpu",
        description="What a CUDA machine has to tell, the most important first, until the budget is spent.",
        epilog=f"parts, in their order (only by name or with --full: {', '.join(ON_REQUEST)}):\n{lines}",
        formatter_class=report.argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, ..; cpu is a rehearsal of the program (cuda)")
    p.add_argument("--budget", type=report.positive, default=540.0, metavar="S", help="seconds for everything (540)")
    p.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for results.json, results.png, log.txt and what the tools say (bench/results/DATE-DEVICE)",
    )  # fmt: skip
    p.add_argument(
        "--parts", type=report.one_or_more(tuple(PARTS)), metavar="NAMES", help="these, separated by commas, in order"
    )
    p.add_argument("--full", action="store_true", help="every part, whatever it takes")
    p.add_argument("--only", metavar="TEXT", help="only cells whose name contains TEXT")
    p.add_argument("--tests", action=report.argparse.BooleanOptionalAction, help="the GPU tests (default on CUDA)")
    p.add_argument("--ncu", action="store_true", help="a profile by ncu as well, after the other parts")
    p.add_argument(
        "--jobs", type=report.integer(1), default=min(16, os.cpu_count() or 2), metavar="N",
        help="processes that compile side by side (the CPUs, at most 16)",
    )  # fmt: skip
    p.add_argument(
        "--figure", action=report.argparse.BooleanOptionalAction, default=True, help="a picture beside the results"
    )
    for child in ("worker", "small-cases", "profiled"):
        p.add_argument(f"--{child}", action="store_true", help=report.argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all cells that were reached passed, 1 a cell or test failed, 130 stopped by a signal."""
    p = parser()
    options = p.parse_args(argv)
    device = report.usable_device(p, options.device)
    if device.type not in ("cuda", "cpu"):
        p.error(f"argument --device: expected cuda or cpu, got {options.device!r}")
    if options.worker:
        return serve(device, measure.RUNS)
    if options.small_cases:
        return checks.run_small_cases(device)
    if options.profiled:
        return checks.run_profiled(device)
    return drive(device, options)


def drive(device: torch.device, options) -> int:
    """Everything that was asked for, then the summary."""
    start = time.monotonic() - timing.age()
    rehearsal = device.type == "cpu"
    if not rehearsal:
        os.environ.setdefault("FUSED_INR_NATIVE", "0")  # nothing here runs on the CPU engine: it is not built
    about = {
        "rehearsal": rehearsal,
        **report.environment(device, unasked=("cuda",)),
        "budget_s": options.budget,
        "full": options.full,
    }
    out = options.out or default_folder(about["device"], rehearsal)
    prepare_folder(out)
    results = report.Results(out / "results.json", about)
    run = Run(results, device, options, out, start)
    if rehearsal:
        run.say("REHEARSAL on a CPU: this shows that the program works, its figures say nothing about a GPU.")
    run.say("\n".join(report.about_lines(about)) + f"\nresults: {out}")
    interrupted = False
    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        run.everything()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, handler)
        run.close()
    results.content["interrupted"] = interrupted
    results.finish(not_reached=run.not_reached) if not interrupted else results.write()
    run.say("\n" + summary.text(results.content))
    if options.figure:
        run.say(_figure(out / "results.png", results.content))
    run.say(f"results: {out}")
    return 130 if interrupted else int(any(summary.failed(result) for result in results.content["results"]))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _figure(path: Path, content: dict[str, Any]) -> str:
    """Draw, and say where; a missing matplotlib costs no result."""
    try:
        return f"figure: {path}" if summary.draw(path, content) else "figure: nothing to draw"
    except CliError as error:
        return f"no figure: {error}"


def default_folder(device: str, rehearsal: bool) -> Path:
    """Where results go: never over earlier ones, and a rehearsal's to a temporary folder."""
    if rehearsal:
        return Path(tempfile.mkdtemp(prefix="fused-inr-rehearsal-"))
    folder = Path("bench", "results") if Path("bench", "results").is_dir() else Path()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = f"{datetime.date.today().isoformat()}-{slug}"
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


class Run:
    """Parts and cells in order, until the budget is spent."""

    def __init__(self, results: report.Results, device: torch.device, options, out: Path, start: float | None = None):
        self.results, self.device, self.options, self.out = results, device, options, out
        self.start = time.monotonic() if start is None else start
        self.not_reached: list[str] = []
        self.worker: Worker | None = None
        self.ceilings: dict[str, float] = {}
        self.build: subprocess.Popen | None = None
        self.left_out: dict[tuple[str, str], str] = {}  # (cell, variant) -> why it is not measured
        # a process that compiles computes nothing worth a second thread; torch.compile compiles in processes of its own
        threads = str(max(1, (os.cpu_count() or 2) // 4))
        few = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": threads}
        self.pool = Pool(lambda: self.new_worker(**few))
        self._recording = threading.Lock()

    def say(self, text: str) -> None:
        """Print it, and keep it in the folder."""
        print(text, flush=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(text + "\n")

    def left(self) -> float:
        return float("inf") if self.options.full else self.options.budget - (time.monotonic() - self.start)

    def parts(self) -> list[tuple[str, list[Cell]]]:
        """What was asked for."""
        options, cuda = self.options, self.device.type == "cuda"
        names = options.parts or [name for name in PARTS if options.full or name not in ON_REQUEST]
        names = [*names, *(["ncu"] if options.ncu and "ncu" not in names else [])]
        tests = options.tests if options.tests is not None else cuda or options.parts is not None
        names = [name for name in names if name != "tests" or tests]
        if options.tests and "tests" not in names:
            names = ["tests", *names]
        chosen = []
        for name, found in parts(self.device, names):
            chosen.append((name, [c for c in found if not options.only or options.only in c["cell"]]))
        return [(name, found) for name, found in chosen if found]

    def everything(self) -> None:
        chosen = self.parts()
        if not chosen:
            raise CliError("nothing to measure: no cell is in these parts under that name")
        if self.device.type == "cuda" and not self.options.full:
            self.worker = self.new_worker()  # it imports and makes its context while others compile
        needed = [any(cell.get("needs") == "cuda" for cell in cells) for _, cells in chosen]
        for i, (name, cells) in enumerate(chosen):
            if self.build is None and (needed[i] or (i == 1 and any(needed))):  # what decides is measured alone
                self.build = self.start_build()
            if self.left() > 0:
                self.ahead(name, cells)
            watched = [cell for cell in cells if cell["group"] == "sanitizer"]
            if watched:
                self.sanitize(watched)
            for cell in cells:
                if cell not in watched:
                    self.one(cell)
        if self.not_reached:
            self.say(f"the budget is spent: {len(self.not_reached)} cells not reached (--full, or a larger --budget)")

    def one(self, cell: Cell) -> None:
        """A cell by itself, if there is time for it."""
        left, full = self.left(), self.options.full
        if left <= 0:
            self.not_reached.append(cell["cell"])
        elif cell["group"] == "tests":
            alone = self.options.parts == ["tests"]
            limit = 3600.0 if full else left if alone else min(self.options.budget * TESTS_SHARE, left)
            self.record(cell, lambda: checks.run_tests(limit, full, self.out / "tests.txt"))
        elif cell["group"] == "ncu":
            limit, out = min(left, 120.0), self.out
            self.record(cell, lambda: checks.profile(self.device, limit, out / "ncu.csv", out / "ncu.txt"))
        else:
            self.record(cell, lambda: self.measure(cell))

    def record(self, cell: Cell, do: Callable[[], dict[str, Any]]) -> None:
        start = time.monotonic()
        try:
            result = do()
        except Exception as error:
            result = {"error": one_line(error)}
        seconds = time.monotonic() - start
        if self.build is not None and self.build.poll() is None:
            result["beside"] = "a build of the CUDA C++ backend"
        state = f"FAILED: {result['error']}" if "error" in result else summary.brief(result)
        with self._recording:
            self.results.append({"cell": cell["cell"], "group": cell["group"], "seconds": round(seconds, 2), **result})
            self.say(f"{time.monotonic() - self.start:6.1f} s  {cell['cell']}: {state}")

    # -- compiling ahead

    def ahead(self, part: str, cells: list[Cell]) -> None:
        """Compile what these cells launch, in many processes side by side."""
        jobs = measure.ahead_jobs(cells)
        if not jobs:
            return
        limit = min(self.left() * AHEAD_SHARE, SEARCH_LIMIT_S if part == "autotune" else AHEAD_LIMIT_S)
        limit = 3600.0 if self.options.full else limit
        count = min(len(jobs), self.options.jobs)

        def compile_all() -> dict[str, Any]:
            answers = self.pool.run(jobs, count, limit)
            for job, answer in zip(jobs, answers):
                if "error" in answer and job["variant"] == "max-autotune":  # it would take the cell's time
                    self.left_out[job["of"]["cell"], job["variant"]] = f"not compiled ahead: {answer['error']}"
            names = [f"{job['of'].get('cell') or job['of'].get('case')}: {job['variant']}" for job in jobs]
            failed = {name: answer["error"] for name, answer in zip(names, answers) if "error" in answer}
            slowest = sorted(zip(names, answers), key=lambda pair: -pair[1]["seconds"])[:5]
            return {
                "jobs": len(jobs),
                "processes": count,
                "not_compiled": failed,  # the cell itself tells whether that is a failure
                "slowest": {name: answer["seconds"] for name, answer in slowest},
            }

        self.record({"cell": f"compiling ahead: {part}", "group": "ahead"}, compile_all)

    def new_worker(self, **environment: str) -> Worker:
        return Worker(self.device, self.out / "workers.txt", **environment)

    def start_build(self) -> subprocess.Popen:
        """Build the library of the CUDA C++ backend where there is none, beside everything else."""
        code = "from fused_inr import native_cuda; print(native_cuda.load(), native_cuda.status())"
        log = (self.out / "workers.txt").open("a")
        return subprocess.Popen(
            children.python("-c", f"import os; os.nice(19)\n{code}"), env=children.environment(),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def built(self, patience: float) -> bool:
        """Whether that build has ended, within `patience` seconds."""
        try:
            return self.build is None or self.build.wait(timeout=max(1.0, min(patience, 600.0))) is not None
        except subprocess.TimeoutExpired:
            return False

    # -- measuring

    def sanitize(self, cells: list[Cell]) -> None:
        """compute-sanitizer's tools, two at a time: nothing is timed meanwhile."""
        log = self.out / "sanitizer.txt"
        share = 0.5 if self.options.parts == ["sanitizer"] else 0.3
        self.built(self.left() / 4)  # without it, its cases are skipped

        def watch(cell: Cell) -> None:
            if self.left() <= 5:
                self.not_reached.append(cell["cell"])
                return
            limit = 3600.0 if self.options.full else share * self.left()
            self.record(cell, lambda: checks.sanitize(cell["tool"], self.device, limit, log))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(watch, cells))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The worker's answer; without a variant that takes the process with it, if there is one."""
        if cell.get("needs") == "cuda" and not self.built(self.left()):
            return {"error": "the CUDA C++ backend was not built in time"}
        lost = {variant: reason for (name, variant), reason in self.left_out.items() if name == cell["cell"]}
        if left := [name for name in cell.get("variants", ()) if name not in lost]:
            cell = {**cell, "variants": left}
        if cell.get("about") in lost:
            return {"skipped": lost[cell["about"]]}
        while True:
            if self.worker is None:
                self.worker = self.new_worker()
            limit = cell.get("limit", CELL_LIMIT_S)
            limit = 20 * limit if self.options.full else min(limit, max(1.0, self.left()) + GRACE_S)
            answer = self.worker.ask(cell, limit)
            if not answer.pop("lost", False):
                break
            reason = answer["error"]
            now = self.worker.now
            self.close_worker()
            left_out = self._left_out(cell, now)
            if not left_out or self.left() <= 0:
                return {"error": f"{now}: {reason}" if now else reason, **({"failed": lost} if lost else {})}
            lost |= dict.fromkeys(left_out, reason)
            cell = {**cell, "variants": [name for name in cell["variants"] if name not in left_out]}
        if lost:
            answer["failed"] = {**answer.get("failed", {}), **lost}
            answer["passed"] = answer.get("passed", True) and not any(measure.is_ours(name) for name in lost)
        self.ceilings |= answer.get("ceilings", {})
        if answer.get("variants"):
            self.compare(cell, answer)
        return answer

    @staticmethod
    def _left_out(cell: Cell, now: str | None) -> list[str]:
        """The variants to leave out after the process was lost at `now`; none where the rest would be nothing."""
        variants = cell.get("variants", [])
        guilty = [now] if now in variants else []
        if now == measure.TOGETHER:  # one of ours, most likely
            guilty = [name for name in variants if measure.is_ours(name)]
        return guilty if len(guilty) < len(variants) else []

    def compare(self, cell: Cell, answer: dict[str, Any]) -> None:
        """Each variant's rate, and its share of what the device allows."""
        case = measure.Case(**cell["case"])
        device = roofline.named(self.results.content["device"]) if self.device.type == "cuda" else None
        floors = roofline.case_floors(case, device, self.ceilings)
        answer["floors_ns"] = floors
        floor = max(floors.values(), default=0.0)
        answer["bound"] = max(floors, key=lambda unit: floors[unit]) if floors else "-"
        for figures in answer["variants"].values():
            figures["tflops"] = answer["operations"] / figures["ms"] * 1e-9
            if floor:
                figures["of_floor"] = floor / figures["ns_a_row"]
            if "products" in floors:
                figures["of_rate"] = floors["products"] / figures["ns_a_row"]

    def close_worker(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def close(self) -> None:
        self.close_worker()
        self.pool.close()
        if self.build is not None:
            children.kill(self.build)
