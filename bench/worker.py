"""The processes of `fused-inr bench table`: a process a job, which answers with the job's result.

So memory can be told apart, a crash costs one row of the table, and the warmed allocator (a setting of glibc's that is
read at start) can stand beside the plain one.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from ..cli import children
from ..cli.children import one_line
from .timing import WARMED_ALLOCATOR


def run(job: dict[str, Any], *, warmed: bool = False, limit: float = 1800) -> dict[str, Any]:
    """Do `job` in a fresh process and return its result, or {"error": one line}."""
    return children.ask_once(("-m", "fused_inr.bench.worker"), job, limit, WARMED_ALLOCATOR if warmed else None)


def _time(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from . import cases, timing

    device = torch.device(job["device"])
    work = cases.Workload(cases.Case(**job["case"]), device)
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
    work = cases.Workload(cases.Case(**job["case"]), device)
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


JOBS = {"time": _time, "memory": _memory, "rows": _rows, "psnr": _psnr, "pixels": _pixels}


def _answer(job: dict[str, Any], tell: children.Tell) -> dict[str, Any]:
    import torch

    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    return JOBS[job["job"]](job)


if __name__ == "__main__":
    sys.exit(children.serve(_answer))
