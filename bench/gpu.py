"""`fused-inr bench gpu`: what a CUDA machine has to tell, in one command, the most important first.

GPU tests, then cells (ceilings of the device, accuracy, benches) under a time budget. Every cell runs in a worker
process; its result is in the JSON file before the next one starts. A cell that fails is recorded and the next one runs,
in a fresh process where it took the device's context with it (an illegal address) or did not come back (a hanging
kernel).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..cli import CliError
from ..cli.files import write_all
from . import report
from .cases import Case
from .report import number, ratio
from .worker import one_line

CELL_LIMIT_S = 150.0
TESTS_SHARE = 0.4  # of the budget, at most


def parser() -> report.Parser:
    p = report.Parser(prog="fused-inr bench gpu", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, ..; cpu is a rehearsal of the program (cuda)")
    p.add_argument("--budget", type=report.positive, default=600.0, metavar="S", help="seconds for everything (600)")
    p.add_argument(
        "--full", action="store_true", help="every cell whatever it takes, compute-sanitizer, all 2^32 sines"
    )
    p.add_argument(
        "--tests", action=report.argparse.BooleanOptionalAction, help="the GPU tests first (default on CUDA)"
    )
    p.add_argument("--only", metavar="TEXT", help="only cells whose name contains TEXT")
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="results (bench/results/DATE-DEVICE.json, or else in this folder)"
    )
    p.add_argument(
        "--figure", action=report.argparse.BooleanOptionalAction, default=True, help="a picture beside the JSON"
    )
    p.add_argument("--worker", action="store_true", help=report.argparse.SUPPRESS)
    p.add_argument("--sanitized", action="store_true", help=report.argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all cells that were reached passed, 1 a cell or test failed, 130 stopped by Ctrl-C."""
    p = parser()
    options = p.parse_args(argv)
    device = report.usable_device(p, options.device)
    if device.type not in ("cuda", "cpu"):
        p.error(f"argument --device: expected cuda or cpu, got {options.device!r}")
    if options.worker:
        return serve(device)
    if options.sanitized:
        return small_cases(device)
    rehearsal = device.type == "cpu"
    about = {"rehearsal": rehearsal, **report.environment(device), "budget_s": options.budget, "full": options.full}
    path = options.json or default_path(about["device"], rehearsal)
    results = report.Results(path, about)
    if rehearsal:
        print("REHEARSAL on a CPU: this shows that the program works, its figures say nothing about a GPU.")
    print("\n".join(report.about_lines(about)) + f"\nresults: {path}", flush=True)
    run = _Run(results, device, options)
    interrupted = False
    try:
        run.everything()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        run.close()
    results.content["interrupted"] = interrupted
    results.finish(not_reached=run.not_reached) if not interrupted else results.write()
    print("\n" + summary(results.content))
    print(f"\nresults: {path}")
    if options.figure:
        print(_figure(path.with_suffix(".png"), results.content))
    failed = any(_failed(result) for result in results.content["results"])
    return 130 if interrupted else int(failed)


def _figure(path: Path, content: dict[str, Any]) -> str:
    """Draw, and say where; a missing matplotlib costs no result."""
    try:
        return f"figure: {path}" if draw(path, content) else "figure: nothing to draw"
    except CliError as error:
        return f"no figure: {error}"


def default_path(device: str, rehearsal: bool) -> Path:
    """Where results go: never over an earlier file, and a rehearsal's to a folder of its own."""
    if rehearsal:
        return Path(tempfile.mkdtemp(prefix="fused-inr-rehearsal-"), "rehearsal.json")
    folder = Path("bench", "results") if Path("bench", "results").is_dir() else Path()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = f"{datetime.date.today().isoformat()}-{slug}"
    names = [f"{stem}.json", *(f"{stem}-{i}.json" for i in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


def _failed(result: dict[str, Any]) -> bool:
    return "error" in result or result.get("passed") is False


# -- the driver


class _Run:
    """Tests and cells in order, until the budget is spent."""

    def __init__(self, results: report.Results, device: torch.device, options):
        self.results, self.device, self.options = results, device, options
        self.start = time.monotonic()
        self.not_reached: list[str] = []
        self.worker: _Worker | None = None
        self.ceilings: dict[str, float] = {}

    def left(self) -> float:
        return float("inf") if self.options.full else self.options.budget - (time.monotonic() - self.start)

    def everything(self) -> None:
        tests = self.options.tests if self.options.tests is not None else self.device.type == "cuda"
        if tests:
            self.record({"cell": "tests", "group": "tests"}, lambda: run_tests(self._tests_limit(), self.options.full))
        for cell in cells(self.device, self.options.full):
            if self.options.only and self.options.only not in cell["cell"]:
                continue
            if self.left() <= 0:
                self.not_reached.append(cell["cell"])
            elif cell["group"] == "sanitizer":
                self.record(cell, lambda cell=cell: sanitize(cell["tool"]))
            else:
                self.record(cell, lambda cell=cell: self._measure(cell))
        if self.not_reached:
            print(f"the budget is spent: {len(self.not_reached)} cells not reached (--full, or a larger --budget)")

    def _tests_limit(self) -> float:
        return 3600.0 if self.options.full else self.options.budget * TESTS_SHARE

    def record(self, cell: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        start = time.monotonic()
        try:
            result = measure()
        except Exception as error:
            result = {"error": one_line(error)}
        seconds = time.monotonic() - start
        self.results.append({"cell": cell["cell"], "group": cell["group"], "seconds": round(seconds, 2), **result})
        state = f"FAILED: {result['error']}" if "error" in result else brief(result)
        print(f"{time.monotonic() - self.start:6.0f} s  {cell['cell']}: {state}", flush=True)

    def _measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.worker is None:
            self.worker = _Worker(self.device)
        limit = CELL_LIMIT_S * (20 if self.options.full else 1)
        answer = self.worker.ask(cell, limit)
        if answer is None or answer.pop("broken", False):
            words = self.worker.last_words()
            self.close()
            answer = answer or {"error": f"its process died or was not done within {limit:.0f} s{words}"}
        if cell["group"] == "ceilings":
            self.ceilings |= answer.get("ceilings", {})
        if "variants" in answer:
            self._compare_with_ceilings(answer)
        return answer

    def _compare_with_ceilings(self, answer: dict[str, Any]) -> None:
        """Achieved rate and bandwidth against what this device did at best in this run."""
        rate, bandwidth = self.ceilings.get(answer["precision"]), self.ceilings.get("copy")
        operations, moved = answer["operations"], answer["bytes"]
        floors = [operations / rate * 1e-9] if rate else []
        floors += [moved / bandwidth * 1e-6] if moved and bandwidth else []
        if floors:
            answer["floor_ms"] = max(floors)
        split = self.ceilings.get("bf16", 0.0) / 3  # three products of half type for one
        for name, figures in answer["variants"].items():
            figures["tflops"] = operations / figures["ms"] * 1e-9
            reached = split if name.endswith("bf16x3") else rate
            if reached:
                figures["of_rate"] = figures["tflops"] / reached
            if moved:
                figures["gbps"] = moved / figures["ms"] * 1e-6
                if bandwidth:
                    figures["of_bandwidth"] = figures["gbps"] / bandwidth

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


class _Worker:
    """A process that measures one cell after the other."""

    def __init__(self, device: torch.device):
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fused_inr.bench.gpu", "--worker", "--device", str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the driver, which keeps the results
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, cell: dict[str, Any], limit: float) -> dict[str, Any] | None:
        """Its answer; None where the process died or took longer than `limit` seconds."""
        try:
            self._process.stdin.write(json.dumps(cell) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit)
        except (OSError, queue.Empty):
            return None
        return json.loads(line) if line else None

    def last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"; it last said: {lines[-1][:200]}" if lines else ""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            try:
                stream.close()
            except OSError:  # what was buffered for a process that is gone
                pass


# -- the cells


def cells(device: torch.device, full: bool) -> Iterator[dict[str, Any]]:
    """What to measure, the most important first, each once."""
    seen = set()
    for cell in _in_order(device, full):
        if cell["cell"] not in seen:
            seen.add(cell["cell"])
            yield cell


def _in_order(device: torch.device, full: bool) -> Iterator[dict[str, Any]]:
    from .. import activations

    cuda = device.type == "cuda"
    if cuda:
        memory = torch.cuda.get_device_properties(device).total_memory
        rows = 1 << (20 if memory > 60e9 else 18 if memory > 14e9 else 16)
        precisions = ("ieee", "tf32", "bf16", "fp16")
        tcnn = ["tcnn"] if _importable("tinycudann") else []
    else:
        rows, precisions, tcnn = 512, ("ieee", "bf16"), []
    width, small = (256, 4096) if cuda else (32, 128)
    # "fused" is what is chosen (triton; of networks the whole, where it serves), "cuda" the CUDA C++ backend
    plain = ["fused", "eager", *(["cuda"] if cuda else [])]
    compiled = [*plain, *(["compile"] if cuda else [])]
    graphed = ["fused graph", "layers graph", "cuda graph", "eager graph", "compile graph"]
    graphs = [*plain, "layers", *(["compile", *graphed] if cuda else [])]

    def ways(step: str, precision: str) -> list[str]:
        """What a network is compared with, beyond the plain variants: its layers one by one, one pass with the loss,
        pre-activations recomputed; bf16x3 beside float32; tiny-cuda-nn beside fp16."""
        more = ["layers"] if step != "eikonal" else []
        more += ["one-pass", "recompute"] if step == "training" else []
        more += ["fused bf16x3"] if precision == "ieee" and cuda else []
        return more + (tcnn if precision == "fp16" and step != "eikonal" else [])

    def accuracy(activation: str, precision: str, k: int = width, n: int = width, m: int = 8191) -> dict[str, Any]:
        name = f"accuracy {activation} {k}-{n} {precision}"
        shape = {"activation": activation, "precision": precision, "k": k, "n": n, "m": m if cuda else 255}
        return {"cell": name, "group": "accuracy", "run": "accuracy", **shape}

    def bench(case: Case, variants: list[str], note: str = "") -> dict[str, Any]:
        name = f"bench {case}{note}"
        return {"cell": name, "group": "bench", "run": "bench", "case": asdict(case), "variants": variants}

    def network(step: str, precision: str, activation: str = "sine", **more: int) -> Case:
        return Case("network", step, activation, **{"width": width, "rows": rows, **more}, precision=precision)

    def layer(activation: str, precision: str, step: str = "training", k: int = width, n: int = width) -> Case:
        return Case("layer", step, activation, n, rows, precision, in_features=k)

    yield {"cell": "ceilings", "group": "ceilings", "run": "ceilings", "precisions": precisions, "small": not cuda}
    for precision in precisions:
        yield accuracy("sine", precision)
    for step in ("training", "inference"):
        for precision in precisions[:3]:
            variants = compiled if precision != "tf32" or full else plain
            yield bench(network(step, precision), variants + ways(step, precision))
    yield bench(network("eikonal", "ieee", rows=rows // 4), plain)
    for precision in ("bf16", "tf32") if cuda else ("bf16",):  # where whole networks stay on chip
        for step in ("training", "inference"):
            yield bench(network(step, precision, width=width // 4), plain + ways(step, precision))
    for precision in precisions[:3]:
        yield bench(layer("split", precision), compiled if precision == "bf16" or full else plain)
    yield bench(network("training", "ieee", width=width // 4, rows=small), graphs)
    for settings, samples in ((1, 1_000_000), (10_000, 1_000_000)) if cuda else ((1, 10_000), (20, 10_000)):
        for activation in ("gaussian", "split") if full else ("gaussian",):
            cell = {"activation": activation, "settings": settings, "samples": samples}
            name = f"moments {activation}, {settings} x {samples}"
            yield {"cell": name, "group": "moments", "run": "moments", **cell}
    for activation in ("split", "gaussian", "relu"):
        for precision in precisions:
            yield accuracy(activation, precision)
    if cuda:
        yield accuracy("sine", "bf16x3")
        yield accuracy("split", "bf16x3")
        yield accuracy("sine", "tf32x3")
    for precision in precisions:
        yield accuracy("sine", precision, 2, width)
        yield accuracy("sine", precision, width, 3)
    for precision in precisions[1:]:
        yield bench(network("eikonal", precision, rows=rows // 4), plain)
    for step in ("inference", "training"):
        for precision in precisions:
            yield bench(layer("sine", precision, step), plain)
    for k, n in ((2, width), (width, 3)):
        for precision in (precisions[0], precisions[-2]):
            yield bench(layer("sine", precision, k=k, n=n), plain)
    yield bench(network("training", precisions[-2], width=width // 4, rows=small), graphs)
    for activation in activations.names():
        for precision in precisions:
            if activation not in ("sine", "split", "gaussian", "relu"):
                yield accuracy(activation, precision)
    if tcnn:
        for activation in ("relu", "sine"):
            for step in ("inference", "training"):
                yield bench(network(step, "fp16", activation, width=width // 4), plain + ways(step, "fp16"))
    if cuda:  # its search takes a minute
        for precision in ("bf16", "ieee"):
            yield bench(network("training", precision), ["fused", "eager", "max-autotune"], ", max-autotune")
    for w in (width // 8, width // 4, width // 2, width * 2, width * 4)[: None if cuda else 1]:
        for precision in precisions[:3]:
            yield bench(network("training", precision, width=w), plain + ways("training", precision))
    for m in (1 << 14, 1 << 17, 1 << 21) if cuda else (64,):
        for precision in ("bf16", "ieee"):
            yield bench(network("training", precision, rows=m), plain + ways("training", precision))
    for activation in ("gaussian", "sinc", "relu", "split"):
        for precision in precisions[:3]:
            yield bench(network("training", precision, activation, rows=rows // 4), compiled if full else plain)
    if not full:
        return
    for activation in activations.names():
        yield bench(layer(activation, "bf16"), compiled)
    everything = [*compiled, *(["max-autotune", *graphed] if cuda else [])]
    for case in _product(cuda, precisions):
        if cuda and _eager_bytes(case) > 0.8 * memory:
            continue
        second = [v for v in everything if v.split()[0] not in ("compile", "max-autotune", "layers")]
        variants = second if case.step == "eikonal" else everything
        if case.kind == "layer":
            variants = [v for v in variants if not v.startswith("layers")]
        more = ways(case.step, case.precision) if case.kind == "network" else []
        yield bench(case, variants + more, ", every variant")
    if cuda:
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            yield {"cell": f"compute-sanitizer {tool}", "group": "sanitizer", "tool": tool}
        for backend in ("triton", "cuda"):
            yield {"cell": f"sine of all 2^32 float32, {backend}", "group": "sweep", "run": "sweep", "backend": backend}


def _product(cuda: bool, precisions: Sequence[str]) -> Iterator[Case]:
    """Every kind, step, width, number of rows, activation and type; the smaller part on a CPU."""
    widths = (32, 64, 128, 256, 512, 1024) if cuda else (32,)
    counts = (1 << 17, 1 << 20, 1 << 14, 1 << 21) if cuda else (128,)
    for rows in counts:
        for activation in ("sine", "split", "gaussian", "relu", "sinc"):
            for precision in precisions:
                for width in widths:
                    for kind in ("network", "layer"):
                        for step in ("training", "inference", "eikonal"):
                            inputs = 2 if kind == "network" else width
                            yield Case(kind, step, activation, width, rows, precision, in_features=inputs)


def _eager_bytes(case: Case) -> int:
    """About what eager PyTorch holds at its peak: each value of each formula's branches, and the gradients beside."""
    values = sum(4 * z + y for _, z, y in case.shapes())
    times = {"inference": 0.5, "training": 1.5, "eikonal": 4.0}[case.step]
    return int(times * case.rows * values * case.dtype.itemsize)


# -- the worker


def serve(device: torch.device) -> int:
    """Cells on standard input, results on standard output, one line each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for line in sys.stdin:
        cell = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = RUNS[cell["run"]](cell, device)
        except Exception as error:
            answer = {"error": one_line(error)}
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
            except Exception as error:  # the context is gone: nothing more will run in this process
                answer = {"error": answer.get("error") or one_line(error), "broken": True}
        print(json.dumps(answer), file=out, flush=True)
    return 0


def _ceilings(cell: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy bandwidth in GB/s, bytes read and written; rate of a large matrix product of each type in TFLOP/s."""
    from . import cases, timing

    count, size = (1 << 20, 256) if cell["small"] else (1 << 30, 8192)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    ceilings = {}
    timed = timing.interleaved({"copy": lambda: target.copy_(source)}, device, seconds=1.0, rounds=(5, 30))
    ceilings["copy"] = 2 * source.nbytes / timed["copy"].ms * 1e-6
    source = target = None
    for precision in cell["precisions"]:
        a, b = (torch.randn(size, size, device=device).to(cases.PRECISIONS[precision]) for _ in range(2))
        with cases.matmul_precision(precision):
            timed = timing.interleaved({"matmul": lambda a=a, b=b: a @ b}, device, seconds=1.0, rounds=(5, 30))
        ceilings[precision] = 2 * size**3 / timed["matmul"].ms * 1e-9
    return {"ceilings": ceilings, "units": {"copy": "GB/s", "other": "TFLOP/s"}, "matmul_size": size}


def _accuracy(cell: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return layer_accuracy(cell["activation"], cell["precision"], device, cell["m"], cell["k"], cell["n"])


def layer_accuracy(activation: str, precision: str, device: torch.device, m: int, k: int, n: int) -> dict[str, Any]:
    """Errors of one layer on fresh random numbers: value and first derivatives against their bounds, order 2 against
    eager."""
    from .. import activations, functional
    from ..cli.eager import EagerLayer
    from ..layers import FusedLinear
    from ..ops import backends
    from . import bounds, cases

    # what PyTorch has no word for: its own products are ieee meanwhile
    products = partial(backends.float32_products, precision if precision in backends.PRODUCTS else None)
    act, dtype = activations.get(activation), cases.PRECISIONS.get(precision, torch.float32)
    layer = FusedLinear(k, n, activation=act).to(device, dtype)
    eager = EagerLayer(layer)
    x = (torch.rand(m, k, device=device) * 2 - 1).to(dtype).requires_grad_()
    g = torch.randn(m, layer.output_features, device=device).to(dtype).requires_grad_()
    v = torch.randn(m, k, device=device).to(dtype)
    result: dict[str, Any] = {"precision": precision, "shape": [m, k, n], "orders": {}}
    with cases.matmul_precision(precision), products():
        y = functional.linear_act(x, layer.weight, layer.bias, act)
        gx, gw, gb = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
    exact, bound = bounds.layer_bounds(x, layer.weight, layer.bias, act, g, precision)
    first = {
        name: bounds.of_bound(t.detach(), exact[name], bound[name])
        for name, t in (("y", y), ("gx", gx), ("gw", gw), ("gb", gb))
    }
    result["orders"]["0"] = {"y": first.pop("y")}
    result["orders"]["1"] = first

    def second(net, *tensors):
        x, weight, bias, g, v = tensors
        (gx,) = torch.autograd.grad(net(x, weight, bias), x, g, create_graph=True)
        grads = torch.autograd.grad((gx * v).sum(), (x, weight, bias, g), allow_unused=True)
        return [torch.zeros_like(t) if d is None else d for d, t in zip(grads, (x, weight, bias, g))]

    def plain(x, weight, bias, module=eager):
        return torch.func.functional_call(module, {"linear.weight": weight, "linear.bias": bias}, (x,))

    tensors = [x, layer.weight, layer.bias, g, v]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    reference = second(plain, *doubles)
    moved = second(partial(plain, module=bounds.simulate_rounding(eager)), *doubles)
    with cases.matmul_precision(precision), products():
        ours = second(lambda x, weight, bias: functional.linear_act(x, weight, bias, act), *tensors)
    # eager has no such products: ours must be no worse than its TF32
    with cases.matmul_precision("tf32" if precision in ("bf16x3", "tf32x3") else precision):
        theirs = second(plain, *tensors)
    summed = (1, m, m, 1)
    result["orders"]["2"] = {
        name: bounds.against_eager(a, b, c, dtype, s, d)
        for name, a, b, c, s, d in zip(("gx", "gw", "gb", "gg"), ours, theirs, reference, summed, moved)
    }
    shares = [figures["of_bound"] for order in result["orders"].values() for figures in order.values()]
    result["of_bound"] = max(shares, key=lambda share: float("inf") if share != share else share)
    result["passed"] = bool(result["of_bound"] <= 1)
    return result


def _bench(cell: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Correct first, then milliseconds of each variant, interleaved, and each one's peak memory."""
    from ..ops import backends
    from . import cases, timing

    case = cases.Case(**cell["case"])
    work = cases.Work(case, device)
    chunk = 1 << 16 if device.type == "cuda" else 8192
    check = work.check(rows_at_once=chunk)
    others: dict[str, cases.Work] = {}
    result: dict[str, Any] = {
        "work": str(case),
        "precision": case.precision,
        "backends": work.backends(),
        "check": check,
        "operations": case.operations(),
        "bytes": case.bytes(),
        "ways": {},
        "way_checks": {},
        "variants": {},
        "failed": {},
    }
    calls = {}
    with cases.matmul_precision(case.precision):
        for name in cell["variants"]:
            try:
                variant, _, how = name.partition(" ")
                if name == "cuda":
                    with backends.use("cuda"):
                        result["cuda_check"] = work.check(rows_at_once=1 << 16)
                if variant in ("layers", "one-pass", "recompute") and variant not in others:
                    others[variant] = cases.Work(dataclasses.replace(case, way=variant), device)
                    if name == variant:
                        result["ways"][variant] = others[variant].backends()
                        result["way_checks"][variant] = others[variant].check(rows_at_once=chunk)
                if variant == "cuda":
                    call = _within(lambda: backends.use("cuda"), work.call("fused"))
                elif variant == "tcnn":
                    call = tiny_cuda_nn(case, device)
                else:
                    call = others[variant].call("fused") if variant in others else work.call(variant)
                if how == "bf16x3":
                    call = _within(lambda: backends.float32_products("bf16x3"), call)
                calls[name] = _captured(call) if how == "graph" else call
                calls[name]()
            except Exception as error:
                calls.pop(name, None)
                result["failed"][name] = one_line(error)
        seconds = 3.0 if device.type == "cuda" else 0.3
        timings = timing.interleaved(calls, device, seconds=seconds, rounds=(5 if device.type == "cuda" else 2, 100))
        for name, timed in timings.items():
            result["variants"][name] = timed.summary()
            if not name.endswith(" graph"):  # a graph's memory is its own pool, held between replays
                owner = others.get(name, work)
                owner.release()
                result["variants"][name]["peak_mib"] = timing.peak_memory(calls[name], owner.release, device)
    if "fused" not in result["variants"]:
        result["error"] = f"fused: {result['failed']['fused']}"
    return result


def _within(
    context: Callable[[], contextlib.AbstractContextManager], call: Callable[[], object]
) -> Callable[[], object]:
    """The step within a context: the CUDA C++ backend, other products."""

    def step() -> object:
        with context():
            return call()

    return step


def tiny_cuda_nn(case: Case, device: torch.device) -> Callable[[], object]:
    """The step by tiny-cuda-nn's own network of that shape, in fp16: without bias, its sine without omega. A time to
    compare with, not a result.

    Raises:
        ValueError: it has nothing of the kind.
    """
    import tinycudann

    names = {"relu": "ReLU", "sine": "Sine"}
    if case.kind != "network" or case.activation not in names or case.step == "eikonal":
        raise ValueError(f"tiny-cuda-nn has no {case.step} of a {case.activation} {case.kind}")
    fully_fused = case.activation == "relu" and case.width in (16, 32, 64, 128)
    settings = {
        "otype": "FullyFusedMLP" if fully_fused else "CutlassMLP",
        "activation": names[case.activation],
        "output_activation": "None",
        "n_neurons": case.width,
        "n_hidden_layers": case.hidden_layers + 1,
    }
    net = tinycudann.Network(case.in_features, case.out_features, settings).to(device)
    x = torch.rand(case.rows, case.in_features, device=device) * 2 - 1
    target = torch.rand(case.rows, case.out_features, device=device)

    def inference() -> object:
        with torch.no_grad():
            return net(x)

    def training() -> object:
        for parameter in net.parameters():
            parameter.grad = None
        loss = torch.nn.functional.mse_loss(net(x).float(), target)
        loss.backward()
        return loss.detach()

    return inference if case.step == "inference" else training


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The step as one CUDA graph: what it takes without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _sweep(cell: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """sin of every float32, by a backend's kernel that serves float32 layers (accurate mode), against float64.

    ulp errors count where |sin| >= 2^-10, absolute ones everywhere.
    """
    from ..ops import raw

    worst: dict[str, dict[str, float]] = {}
    step = 1 << 26
    for start in range(0, 1 << 32, step):
        bits = torch.arange(start, start + step, device=device, dtype=torch.int64)
        x = bits.to(torch.int32).view(torch.float32).view(-1, 1024)
        (y,) = raw.act_map([x], [None], [1.0], "sine", cell["backend"], 0, False)
        exact = torch.sin(x.double())
        finite = torch.isfinite(x)
        if not bool((torch.isfinite(y) == finite).all()):
            return {"error": f"a NaN for a finite argument, or none for an infinite one, in bits {start:#x}"}
        error = torch.where(finite, (y.double() - exact).abs(), 0.0)
        unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-126))) - 23)
        ulp = torch.where(finite & (exact.abs() >= 2.0**-10), error / unit, 0.0)
        for limit in (3.15, 1e2, 1e4, 1e6, float("inf")):
            chosen = x.abs() <= limit
            figures = worst.setdefault(f"|x| <= {limit:g}", {"ulp": 0.0, "absolute": 0.0})
            figures["ulp"] = max(figures["ulp"], torch.where(chosen, ulp, 0.0).max().item())
            figures["absolute"] = max(figures["absolute"], torch.where(chosen, error, 0.0).max().item())
    return {"worst": worst}


def moments_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of sums [chunks, G, V, 3] over the same draws, the largest difference relative to what the sums are made of: v by
    the root mean square, v^2 and v^4 by themselves."""
    from ..ops import moments

    total, exact = found.double().sum(0), expected.double().sum(0)
    draws = len(expected) * moments.CHUNK
    size = torch.cat(((exact[..., 1:2] * draws).sqrt(), exact[..., 1:]), -1)
    return ((total - exact).abs() / (size + 1e-6 * draws)).max().item()


def _moments(cell: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Sums of a map over draws for a grid of sigma: each backend's words and sums against the reference's, then
    milliseconds, beside the expression in PyTorch (fresh draws, autograd) at one sigma."""
    from .. import activations
    from ..ops import backends, moments
    from . import timing

    act = activations.get(cell["activation"])
    map, samples, settings = act.map, cell["samples"], cell["settings"]
    sigmas = torch.logspace(-2, 1, settings, device=device).unsqueeze(1).repeat(1, map.branches)
    numbers = torch.tensor([float(v) for v in act.params.values()], device=device)
    params = numbers.expand(settings, -1).contiguous()
    some = torch.linspace(0, settings - 1, min(settings, 5), device=device).long()
    expected = moments.reference(sigmas[some], params[some], 0, min(samples, 20_000), 1, map)
    result: dict[str, Any] = {"work": cell["cell"], "moments": {}, "failed": {}}
    calls: dict[str, Callable[[], object]] = {}
    for name in ("triton", "cuda") if device.type == "cuda" else ("cpu",):
        backend = backends.implementation(name)
        try:
            found = backend.moments(sigmas[some], params[some], 0, min(samples, 20_000), 1, map)
            worst = moments_error(found, expected)
            if not worst <= 1e-3:
                raise ValueError(f"sums differ from the reference's by {worst:.2g} of their size")
            calls[name] = partial(backend.moments, sigmas, params, 0, samples, 1, map)
            first = calls[name]()
            if not torch.equal(first, calls[name]()):
                raise ValueError("the bits differ from call to call")
            result["moments"][name] = {"error": worst}
        except Exception as error:
            calls.pop(name, None)
            result["moments"].pop(name, None)
            result["failed"][name] = one_line(error)
    if settings == 1:

        def expression() -> torch.Tensor:
            z = (torch.randn(samples, map.branches, device=device) * sigmas[0]).requires_grad_()
            y = act(z)
            (dz,) = torch.autograd.grad(y.sum(), z)
            return torch.stack((y.detach().square().mean(), dz.square().mean()))

        calls["eager"] = expression
    timed = timing.interleaved(calls, device, seconds=2.0 if device.type == "cuda" else 0.2, rounds=(3, 50))
    for name, each in timed.items():
        figures = result["moments"].setdefault(name, {})
        figures |= {**each.summary(), "ps_per_draw": each.ms * 1e9 / (samples * settings)}
    if not set(result["moments"]) - {"eager"}:
        result["error"] = "; ".join(f"{name}: {reason}" for name, reason in result["failed"].items())
    return result


RUNS: dict[str, Callable[[dict[str, Any], torch.device], dict[str, Any]]] = {
    "ceilings": _ceilings,
    "accuracy": _accuracy,
    "bench": _bench,
    "sweep": _sweep,
    "moments": _moments,
}


# -- tests and sanitizer


def run_tests(limit: float, full: bool) -> dict[str, Any]:
    """`pytest tests/test_gpu.py` (all tests but the interpreter's with `full`) in a process with a time limit.

    Outcomes are read from its output line by line, so that a run that was stopped counts for what it reached.
    """
    checkout = Path(__file__).resolve().parent.parent
    folder = checkout / "tests"
    if not (folder / "test_gpu.py").is_file():
        return {"skipped": "the tests come with a checkout, not with the installed package"}
    try:
        import pytest  # noqa: F401
    except ImportError:
        return {"skipped": "pytest is not installed"}
    what = [str(folder)] if full else [str(folder / "test_gpu.py")]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--color=no", *what]
    command += ["--ignore-glob=*interpreter*"] if full else []
    workers = min(8, (os.cpu_count() or 2) // 2)
    if shutil.which("xdist") or _importable("xdist"):  # Triton compiles on the host: that is most of the time
        command += ["-n", str(workers)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=checkout, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        stopped = False
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            _end(process)
        log.seek(0)
        lines = log.read().splitlines()
    outcomes: dict[str, int] = {}
    failed = []
    for line in lines:
        found = re.search(
            r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)|(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+::.+)",
            line,
        )
        if found and not line.startswith(("FAILED", "ERROR")):  # those lines repeat them at the end
            outcome = found[2] or found[3]
            outcomes[outcome.lower()] = outcomes.get(outcome.lower(), 0) + 1
            if outcome in ("FAILED", "ERROR"):
                failed.append((found[1] or found[4]).strip())
    result: dict[str, Any] = {
        "command": command[2:],
        "outcomes": outcomes,
        "failed_tests": failed,
        "output": lines[-150:],
    }
    if stopped:
        result["stopped"] = f"at its limit of {limit:.0f} s"
    result["passed"] = not failed and bool(outcomes) and (stopped or process.returncode in (0, 5))
    return result


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _end(process: subprocess.Popen) -> None:
    """SIGINT first, so that pytest reports; then the whole group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def small_cases(device: torch.device) -> int:
    """What the sanitizer watches: each kind of kernel once, on sizes with tails."""
    from ..ops import backends

    cuda = device.type == "cuda"
    for backend in [name for name in ("triton", "cuda") if backends.TABLE[name].available()[0]] if cuda else ["cpu"]:
        for activation in ("sine", "split"):
            for precision in ("ieee", "tf32", "bf16") if cuda else ("ieee",):
                for m, k, n in ((131, 33, 49), (131, 2, 49), (131, 49, 3)):
                    with backends.use(backend):
                        result = layer_accuracy(activation, precision, device, m, k, n)
                    if not result["passed"]:
                        what = f"{backend} {activation} {precision} {m, k, n}"
                        print(f"{what}: {result['of_bound']:.3g} of its bound", file=sys.stderr)
                        return 1
    return 0


def sanitize(tool: str, limit: float = 1200) -> dict[str, Any]:
    """One of compute-sanitizer's tools over `small_cases`, without the caching allocator, which would hide bad
    accesses."""
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [found, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only", sys.executable]
    command += ["-P", "-m", "fused_inr.bench.gpu", "--sanitized"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit:.0f} s"}
    lines = (done.stdout + done.stderr).splitlines()
    return {"passed": done.returncode == 0, "exit_code": done.returncode, "output": lines[-60:]}


# -- what people read


def brief(result: dict[str, Any]) -> str:
    """One line about a cell."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    if "outcomes" in result:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in result["outcomes"].items()) or "no tests ran"
        return counts + (f"; stopped {result['stopped']}" if "stopped" in result else "")
    if "ceilings" in result:
        rates = ", ".join(
            f"{name} {number(rate)} TFLOP/s" for name, rate in result["ceilings"].items() if name != "copy"
        )
        return f"copy {number(result['ceilings']['copy'])} GB/s, {rates}"
    if "orders" in result:
        return f"{number(result['of_bound'])} of its bound" + ("" if result["passed"] else ": WRONG")
    if "variants" in result:
        return ", ".join(f"{name} {number(v['ms'])} ms" for name, v in result["variants"].items())
    if "moments" in result:
        return ", ".join(
            f"{name} {number(m['ms'])} ms ({number(m['ps_per_draw'])} ps a draw)"
            for name, m in result["moments"].items()
        )
    if "worst" in result:
        return "; ".join(f"{where}: {number(w['ulp'])} ulp" for where, w in result["worst"].items())
    return "passed" if result.get("passed") else "FAILED"


#: Rivals of the fused step: their columns, where any cell has them.
RIVALS = {"eager": "eager", "compile": "compile", "max-autotune": "autotune", "cuda": "cuda", "layers": "layers",
          "tcnn": "tcnn"}  # fmt: skip
#: The same step otherwise: milliseconds.
OTHERWISE = {
    "one-pass": "one pass",
    "recompute": "recomputed",
    "fused bf16x3": "bf16x3",
    "fused graph": "graph",
    "layers graph": "layers' graph",
    "cuda graph": "cuda's graph",
    "eager graph": "eager's graph",
    "compile graph": "compile's graph",
}


def summary(content: dict[str, Any]) -> str:
    """The tables at the end."""
    results = content["results"]
    benches = [result for result in results if result.get("variants")]
    present = {name for result in benches for name in result["variants"]}
    rivals = [name for name in RIVALS if name in present]
    otherwise = [name for name in OTHERWISE if name in present]
    rows = []
    for result in benches:
        variants = result["variants"]
        fused = variants.get("fused") or next(iter(variants.values()))
        rows.append(
            (
                result["work"],
                number(fused["ms"]),
                *(ratio(variants[name]["ms"] / fused["ms"] if name in variants else None) for name in rivals),
                number(fused.get("launch_ms")),
                *(f"{fused[share]:.0%}" if share in fused else "-" for share in ("of_rate", "of_bandwidth")),
                number(result.get("floor_ms")),
                number(fused.get("peak_mib")),
                number(variants.get("eager", {}).get("peak_mib")),
            )
        )
    head = ["work", "ms", *(f"vs {RIVALS[name]}" for name in rivals), "launch ms", "rate", "copy", "floor ms"]
    parts = [report.table([*head, "peak MiB", "eager's"], rows)] if rows else []
    rows = [
        (result["work"], *(number(result["variants"].get(name, {}).get("ms")) for name in ("fused", *otherwise)))
        for result in benches
        if set(otherwise) & set(result["variants"])
    ]
    if rows:
        parts.append("\n" + report.table(["the same otherwise, ms", "fused", *(OTHERWISE[n] for n in otherwise)], rows))
        parts.append("")
    accuracy = [r for r in results if "orders" in r]
    if accuracy:
        worst = max(accuracy, key=lambda r: r["of_bound"] if r["of_bound"] == r["of_bound"] else float("inf"))
        wrong = [r["cell"] for r in accuracy if not r["passed"]]
        parts.append(
            f"accuracy: {len(accuracy)} cells, {len(wrong)} beyond the bound{': ' if wrong else ''}{', '.join(wrong)}; "
            f"closest: {worst['cell']}, {number(worst['of_bound'])} of its bound"
        )
    for result in results:
        if result["group"] in ("tests", "sanitizer", "ceilings", "sweep", "moments") and "error" not in result:
            parts.append(f"{result['cell']}: {brief(result)}")
        for name in result.get("failed_tests", [])[:20]:
            parts.append(f"  failed: {name}")
    for result in results:
        if "error" in result:
            parts.append(f"FAILED {result['cell']}: {result['error']}")
        for variant, reason in result.get("failed", {}).items():
            parts.append(f"no figure for {variant} in {result['cell']}: {reason}")
    if content.get("interrupted"):
        parts.append("interrupted: what was measured until then is in the file")
    return "\n".join(parts) or "nothing was measured"


def draw(path: Path, content: dict[str, Any]) -> bool:
    """One line a cell: the time of each variant relative to the fused step, on a logarithmic axis; right of 1 is
    slower. False where no cell has a time.

    Raises:
        CliError: matplotlib is missing, or the file cannot be written.
    """
    cells = [result for result in content["results"] if "fused" in result.get("variants", {})]
    if not cells:
        return False
    try:
        import io

        from matplotlib.figure import Figure
    except ImportError as error:
        raise CliError("drawing needs matplotlib: pip install 'fused_inr[fit]'") from error
    names = list(dict.fromkeys(name for cell in cells for name in cell["variants"]))
    figure = Figure(figsize=(9, 1.6 + 0.22 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        points = [
            (cell["variants"][name]["ms"] / cell["variants"]["fused"]["ms"], y)
            for y, cell in enumerate(cells)
            if name in cell["variants"]
        ]
        marker = "o^sDvP*X<>hd"[i % 12]
        axes.plot(*zip(*points), marker, color=f"C{i % 10}", markersize=5, label=name)
    axes.axvline(1.0, color="0.7", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cells)), [f"{c['work']}: {number(c['variants']['fused']['ms'])} ms" for c in cells])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to the fused step")
    words = "REHEARSAL, " if content.get("rehearsal") else ""
    axes.set_title(f"{words}{content.get('device', '')}, {content.get('time', '')}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_all({path: buffer.getvalue()})
    return True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CliError as error:
        print(f"fused-inr: error: {error}", file=sys.stderr)
        sys.exit(2)
