"""Whether it is right: accuracy gates, the GPU tests, compute-sanitizer, every float32 sine; and profiles by ncu."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...cli import children
from .. import bounds, cases

#: compute-sanitizer's tools, the most telling first.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# -- accuracy


def layer_accuracy(activation: str, precision: str, device: torch.device, m: int, k: int, n: int) -> dict[str, Any]:
    """Errors of one layer on fresh random numbers: value and first derivatives against their bounds, order 2 against
    eager."""
    from ... import activations, backends, functional
    from ...cli.eager import EagerLayer
    from ...layers import FusedLinear

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
    exact, bound = bounds.layer_bounds(x, layer.weight, layer.bias, act, g, precision, kept=bounds.keeps(x, act))
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


def moments_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of sums [chunks, G, V, 3] over the same draws, the largest difference relative to what the sums are made of: v by
    the root mean square, v^2 and v^4 by themselves."""
    from ...ops import moments

    total, exact = found.double().sum(0), expected.double().sum(0)
    draws = len(expected) * moments.CHUNK
    size = torch.cat(((exact[..., 1:2] * draws).sqrt(), exact[..., 1:]), -1)
    return ((total - exact).abs() / (size + 1e-6 * draws)).max().item()


def every_float32_sine(backend: str, device: torch.device) -> dict[str, Any]:
    """sin of every float32, by a backend's kernel that serves float32 layers (accurate mode), against float64.

    ulp errors count where |sin| >= 2^-10, absolute ones everywhere.
    """
    from ...ops import raw

    worst: dict[str, dict[str, float]] = {}
    step = 1 << 26
    for start in range(0, 1 << 32, step):
        bits = torch.arange(start, start + step, device=device, dtype=torch.int64)
        x = bits.to(torch.int32).view(torch.float32).view(-1, 1024)
        (y,) = raw.act_map([x], [None], [1.0], "sine", backend, 0, False)
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


# -- the GPU tests


def run_tests(limit: float, full: bool, log: Path | None = None) -> dict[str, Any]:
    """`pytest tests/test_gpu.py` (all tests but the interpreter's with `full`) in a process with a time limit.

    Outcomes are read from its output line by line, so that a run that was stopped counts for what it reached. `log`
    keeps the whole output.
    """
    checkout = Path(__file__).resolve().parents[2]
    folder = checkout / "tests"
    if not (folder / "test_gpu.py").is_file():
        return {"skipped": "the tests come with a checkout, not with the installed package"}
    if not importable("pytest"):
        return {"skipped": "pytest is not installed"}
    what = [str(folder)] if full else [str(folder / "test_gpu.py")]
    command = children.python("-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--color=no", *what)
    command += ["--ignore-glob=*interpreter*"] if full else []
    if importable("xdist"):  # Triton compiles on the host: that is most of the time
        command += ["-n", str(max(1, (os.cpu_count() or 2) - 2))]
    lines, stopped, code = _run_with_limit(command, limit, log, checkout)
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
    result["passed"] = not failed and bool(outcomes) and (stopped or code in (0, 5))
    return result


def _run_with_limit(
    command: Sequence[str], limit: float, log: Path | None, folder: Path | None = None, **environment: str
) -> tuple[list[str], bool, int]:
    """The lines that a command prints, whether its time limit ended it, and its exit code."""
    import tempfile

    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=children.environment(**environment), start_new_session=True,
        )  # fmt: skip
        stopped = False
        try:
            child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            children.end(child, patience=min(15.0, max(1.0, limit / 4)))
        output.seek(0)
        lines = output.read().splitlines()
    if log is not None:
        with log.open("a") as file:
            file.write("$ " + " ".join(command) + "\n" + "\n".join(lines)[-4_000_000:] + "\n")
    return lines, stopped, child.returncode


# -- compute-sanitizer


def small_cases(cuda: bool) -> list[str]:
    """What the sanitizer watches, by name: whole networks in every way to train, and layers; sizes with tails."""
    precisions = ("bf16", "tf32") if cuda else ("ieee",)
    ways = ("one-pass", "default", "recompute")
    found = [f"network {width} {p} {way}" for width in (64, 128, 32) for p in precisions for way in ways]
    for precision in ("bf16", "tf32", "ieee") if cuda else ("ieee",):
        for activation in ("sine", "split"):
            for backend in ("triton", "cuda") if cuda else ("cpu",):
                found.append(f"layer {backend} {activation} {precision}")
    return found


def small_case(name: str, device: torch.device) -> dict[str, Any]:
    """One of `small_cases`, and whether it is right."""
    from ... import backends

    kind, what, *rest = name.split()
    if kind == "network":
        precision, way = rest
        case = cases.Case("network", "training", width=int(what), rows=300, precision=precision, way=way)
        work = cases.Workload(case, device)
        found = work.errors(work.exact())
        worst = max(figures["of_bound"] for figures in found.values())
        return {"of_bound": worst, "passed": bool(worst <= 1), "backends": work.backends()}
    activation, precision = rest
    usable, reason = backends.TABLE[what].available()
    if not usable:
        return {"skipped": reason, "passed": True}
    worst = 0.0
    for m, k, n in ((131, 33, 49), (131, 2, 49), (131, 49, 3)):
        with backends.use(what):
            result = layer_accuracy(activation, precision, device, m, k, n)
        worst = max(worst, result["of_bound"])
    return {"of_bound": worst, "passed": bool(worst <= 1)}


def run_small_cases(device: torch.device) -> int:
    """All of them, one after the other, saying which; exit code 0 if all are right."""
    wrong = 0
    for name in small_cases(device.type == "cuda"):
        print(f"case {name}", flush=True)
        result = small_case(name, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not result["passed"]:
            print(f"WRONG: {name}: {result['of_bound']:.3g} of its bound", flush=True)
            wrong = 1
    return wrong


def sanitize(tool: str, device: torch.device, limit: float, log: Path | None = None) -> dict[str, Any]:
    """One of compute-sanitizer's tools over the small cases, without the caching allocator, which would hide bad
    accesses; stopped at its limit, it counts for the cases that it has watched."""
    found = _tool("compute-sanitizer")
    if found is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [found, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    command += children.python("-m", "fused_inr.bench.gpu", "--small-cases", "--device", str(device))
    lines, stopped, code = _run_with_limit(command, limit, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return sanitizer_verdict(lines, stopped, code, limit)


#: What the sanitizer says of an error; its other lines tell where, or that all is well.
_REPORT = re.compile(r"^=+\s+(Invalid|Misaligned|Error|Race|Potential|Uninitialized|Barrier|Out-of-range|Program hit)")


def sanitizer_verdict(lines: Sequence[str], stopped: bool, code: int, limit: float) -> dict[str, Any]:
    """What its output says: cases watched, errors reported, whether it passed."""
    watched = [line.removeprefix("case ") for line in lines if line.startswith("case ")]
    reports = [line for line in lines if _REPORT.match(line)]
    wrong = [line for line in lines if line.startswith("WRONG")]
    result: dict[str, Any] = {"watched": watched, "reports": len(reports), "wrong": wrong, "exit_code": code}
    result["output"] = lines[-60:] if code or reports else lines[-5:]
    if stopped:
        result["stopped"] = f"at its limit of {limit:.0f} s"
        watched[-1:] = []  # the last one may not be through
    result["passed"] = bool(watched) and not reports and not wrong and (stopped or code == 0)
    return result


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


# -- ncu

#: What a profile shows, by base name; those that the installed ncu does not know for the device are left out.
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors.sum",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "launch__waves_per_multiprocessor",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_mio_throttle_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
)
#: Networks that are profiled: (width, step, way).
PROFILED = (
    (64, "training", "one-pass"),
    (64, "inference", "default"),
    (128, "training", "one-pass"),
    (128, "inference", "default"),
)


def profile(device: torch.device, limit: float, table: Path, log: Path | None = None) -> dict[str, Any]:
    """One launch of each kernel of `PROFILED` under ncu, its metrics as CSV in `table`. The clocks are left alone."""
    found = _tool("ncu")
    if found is None:
        return {"skipped": "ncu is not installed"}
    wanted = known_metrics(METRICS, _query_metrics(found))
    kernels = "regex:^(forward|train|one_pass|backward)_kernel"
    command = [found, "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", kernels, "--csv"]
    command += ["--page", "raw", "--metrics", ",".join(wanted), "--log-file", str(table), "--force-overwrite"]
    command += children.python("-m", "fused_inr.bench.gpu", "--profiled", "--device", str(device))
    lines, stopped, code = _run_with_limit(command, limit, log)
    launches = profiled_launches(table.read_text(errors="replace") if table.is_file() else "")
    result: dict[str, Any] = {"profile": launches, "metrics": wanted, "exit_code": code, "output": lines[-20:]}
    if stopped:
        result["stopped"] = f"at its limit of {limit:.0f} s"
    result["passed"] = bool(launches)
    return result


def _query_metrics(ncu: str) -> str:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    chip = {(8, 0): "ga100", (8, 6): "ga102", (8, 9): "ad102", (9, 0): "gh100", (10, 0): "gb100"}.get((major, minor))
    try:
        command = [ncu, "--query-metrics", *(["--chips", chip] if chip else [])]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def known_metrics(wanted: Sequence[str], listed: str) -> list[str]:
    """Those of `wanted` whose base name is in ncu's list; launch__ metrics are in none, and all of them where there
    is no list."""
    names = {line.split()[0] for line in listed.splitlines() if line.split()}
    return [m for m in wanted if not names or m.startswith("launch__") or m.split(".")[0] in names]


def profiled_launches(text: str) -> list[dict[str, str]]:
    """The rows of ncu's CSV, each a launch: kernel and metrics by name."""
    import csv

    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    return [
        {name: value for name, value in row.items() if name and ("__" in name or name == "Kernel Name")}
        for row in rows
        if row.get("Kernel Name")  # the row below the heads has the units
    ]


def run_profiled(device: torch.device) -> int:
    """The program that ncu looks at: each step of `PROFILED` a few times, the last time watched."""
    rows = 1 << 18 if device.type == "cuda" else 64
    for width, step, way in PROFILED:
        case = cases.Case("network", step, width=width, rows=rows, precision="bf16", way=way)
        call = cases.Workload(case, device).call("fused")
        for _ in range(3):
            call()
        print(f"{case}", flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
    return 0
