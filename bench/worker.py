"""The processes of `fused-inr bench table`: a job as JSON on standard input, its result as JSON on standard output.

A process a job, so that memory can be told apart, a crash costs one row of the table, and the warmed allocator (a
setting of glibc's that is read at start) can stand beside the plain one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

from . import process
from .timing import WARMED_ALLOCATOR


def run(job: dict[str, Any], *, warmed: bool = False, limit: float = 1800) -> dict[str, Any]:
    """Do `job` in a fresh process and return its result, or {"error": one line}."""
    environment = process.environment(**(WARMED_ALLOCATOR if warmed else {}))
    command = process.python("-m", "fused_inr.bench.worker")
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        out, errors = child.communicate(json.dumps(job), timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit:.0f} s"}
    finally:
        if child.poll() is None:  # a time limit or Ctrl-C
            child.kill()
            child.wait()
    if child.returncode == 0 and out:
        return json.loads(out.splitlines()[-1])
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return {"error": f"its process ended with exit code {child.returncode}" + (f": {lines[-1]}" if lines else "")}


def _time(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from . import cases, timing

    device = torch.device(job["device"])
    work = cases.Work(cases.Case(**job["case"]), device)
    result: dict[str, Any] = {"work": str(work.case), "backends": work.backends(), "check": work.check(), "failed": {}}
    calls: dict[str, Any] = {}
    with cases.matmul_precision(work.case.precision):
        for name in job["variants"]:
            if name in cases.COMPILED and not work.case.compiles:
                continue
            start = time.perf_counter()
            try:
                calls[name] = work.call(name)
                calls[name]()
            except Exception as error:
                if name in ("fused", "eager"):
                    raise
                calls.pop(name, None)
                result["failed"][name] = one_line(error)
            if name in cases.COMPILED:
                result.setdefault("compile_s", {})[name] = time.perf_counter() - start
        for call in calls.values():  # beside each other they find other places in memory than alone
            call()
        timings = timing.interleaved(calls, device, seconds=job["seconds"], rounds=tuple(job["rounds"]))
    result["timings"] = {name: t.summary() for name, t in timings.items()}
    return result


def _memory(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from . import cases, timing

    device = torch.device(job["device"])
    work = cases.Work(cases.Case(**job["case"]), device)
    with cases.matmul_precision(work.case.precision):
        return {"peak_mib": timing.peak_memory(work.call(job["variant"]), work.release, device)}


def _rows(job: dict[str, Any]) -> dict[str, Any]:
    """Nanoseconds a row, by number of rows; the sizes take turns."""
    import statistics

    import torch

    from . import cases

    case = cases.Case(**job["case"])
    module = cases.build(case, torch.device(job["device"]))
    x = torch.rand(max(job["rows"]), case.in_features, dtype=case.dtype) * 2 - 1
    samples: dict[str, list[float]] = {str(rows): [] for rows in job["rows"]}
    with torch.no_grad():
        for _ in range(job["rounds"]):
            for rows in job["rows"]:
                repeats = max(1, 2**16 // rows)
                module(x[:rows])
                start = time.perf_counter()
                for _ in range(repeats):
                    module(x[:rows])
                samples[str(rows)].append((time.perf_counter() - start) / repeats / rows * 1e9)
    return {"ns_a_row": {rows: statistics.median(values) for rows, values in samples.items()}}


def _pixels(job: dict[str, Any]) -> dict[str, Any]:
    """Adam steps on a whole picture of `side` x `side` pixels, each in one pass: seconds, memory beyond data."""
    import torch

    from .. import losses
    from ..cli.memory import PeakMemory
    from . import cases

    device, side = torch.device(job["device"]), job["side"]
    model = cases.build(cases.Case("network", "training", width=job["width"], way="one-pass"), device)
    axis = torch.linspace(-1, 1, side, device=device)
    x = torch.cartesian_prod(axis, axis)
    # smooth shapes, an edge and texture, as three colours on [-1, 1]
    u, v = x.unbind(-1)
    target = torch.stack([(5 * u * v).sin(), ((u - 0.2) ** 2 + v**2 < 0.3).float(), (40 * u).sin() * (v > 0)], -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(rows: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = losses.mse(model, x[:rows], target[:rows])
        loss.backward()
        optimizer.step()
        return loss.item()

    step(256)  # the optimiser's state, the engine's code
    memory = PeakMemory(device)
    losses_of, seconds = [], []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        losses_of.append(step(len(x)))
        seconds.append(time.perf_counter() - start)
    return {
        "pixels": len(x), "width": job["width"], "s_a_step": seconds, "loss": losses_of, "peak_mib": memory.peak(),
        "data_mib": sum(t.numel() * t.element_size() for t in (x, target)) / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def _psnr(job: dict[str, Any]) -> dict[str, Any]:
    """A fit from several draws of weights: fused, eager from the same weights, and eager from weights moved by 1e-7 of
    themselves, which tells how far two correct computations of one fit come apart."""
    import copy
    import statistics

    import torch

    from ..cli.options import FitOptions
    from ..cli.training import Trainer, build_model, final_psnr
    from . import cases

    options = FitOptions(device=job["device"], **job["options"])
    picture, made = _picture(options.size)
    result: dict[str, Any] = {"picture": made, "options": dataclasses.asdict(options), "draws": job["draws"]}
    values: dict[str, list[float]] = {"fused": [], "eager": [], "moved": []}
    for draw in range(job["draws"]):
        own = dataclasses.replace(options, seed=options.seed + draw)
        fused = build_model(own, picture.pixels.shape[2])
        eager = cases.twin(fused)
        moved = copy.deepcopy(eager)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter *= 1 + 1e-7 * torch.randn_like(parameter)
        for name, model in (("fused", fused), ("eager", eager), ("moved", moved)):
            trainer = Trainer(model, picture, own)
            trainer.train(own.steps)
            values[name].append(final_psnr(picture, trainer.evaluate())[1])
    for name in ("fused", "moved"):
        apart = [a - b for a, b in zip(values[name], values["eager"], strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else None
        result[f"{name}_less_eager"] = {"mean": statistics.mean(apart), "standard_error": error, "each": apart}
    result |= {f"{name}_psnr": statistics.mean(v) for name, v in values.items()}
    return result


def _picture(size: int):
    """The built-in photograph where matplotlib and Pillow are, else smooth shapes with edges and texture."""
    import numpy as np

    from ..cli import CliError
    from ..cli.pictures import Picture, read_picture

    try:
        picture = read_picture(None, size)
        return picture, f"{picture.name}, {picture.pixels.shape[1]}x{picture.pixels.shape[0]}"
    except CliError:
        y, x = np.meshgrid(*(np.linspace(-1, 1, size),) * 2, indexing="ij")
        disc = ((x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.3) * 0.5
        pixels = np.stack([0.5 + 0.3 * np.sin(5 * x * y), 0.25 + disc, 0.5 + 0.25 * np.sin(40 * x) * (y > 0)], -1)
        return Picture("shapes", pixels.clip(0, 1).astype(np.float32), 255), f"shapes, {size}x{size}"


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


JOBS = {"time": _time, "memory": _memory, "rows": _rows, "psnr": _psnr, "pixels": _pixels}


def main() -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not stand between the lines of JSON
    job = json.load(sys.stdin)
    import torch

    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    try:
        result = JOBS[job["job"]](job)
    except Exception as error:
        result = {"error": one_line(error)}
    print(json.dumps(result), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
