"""The processes of `fused-inr bench tune`: candidates are compiled and checked side by side, and timed in one of them.

A configuration that takes the device's context with it costs a process and is rejected. What the compiler makes of a
candidate is asked of processes that have no device at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .gpu.workers import Pool, Worker
from .tune_kernels import RESERVE_S, Died, Kernels, Key, Numbers, Wanted

#: Seconds for compiling and checking what several searches want, for a look at what the compiler made of the best, and
#: for timing a group of candidates; what takes longer is rejected.
PREPARE_S, STATIC_S, TIMES_S = 90.0, 30.0, 120.0


class Processes:
    """What `tune.search` asks of a machine, answered by processes."""

    def __init__(
        self, device: torch.device, *, rows: int, seconds: float, jobs: int, log: Path | None,
        left: Callable[[], float],
    ):  # fmt: skip
        self._common = {"run": "tune", "rows": rows, "seconds": seconds}
        self._jobs, self._left = jobs, left
        self._make = lambda: Worker(device, log)
        self._pool = Pool(lambda: Worker(device, log, OMP_NUM_THREADS="1"))
        self._compilers = Pool(lambda: Worker(torch.device("cpu"), log, OMP_NUM_THREADS="1", TRITON_INTERPRET="0"))
        self._timing: Worker | None = None
        self._answers: dict[tuple[Key, Wanted], Any] = {}

    def prepare(self, wanted: Sequence[tuple[Key, Wanted]]) -> None:
        for kind, pool in (("problem", self._pool), ("static", self._compilers)):
            asked = [each for each in dict.fromkeys(wanted) if each[1][0] == kind and each not in self._answers]
            jobs = [{**self._common, "what": kind, "key": key, "numbers": numbers} for key, (_, numbers) in asked]
            limit = max(1.0, min(PREPARE_S, self._left())) if kind == "problem" else STATIC_S
            for each, answer in zip(asked, pool.run(jobs, self._jobs, limit)):
                self._answers[each] = answer.get("error") or answer["found"] if kind == "problem" else (
                    [answer["error"]] if "error" in answer else answer["found"]
                )  # fmt: skip

    def _answer(self, key: Key, wanted: Wanted) -> Any:
        if (key, wanted) not in self._answers:
            self.prepare([(key, wanted)])
        return self._answers[key, wanted]

    def problem(self, key: Key, numbers: Numbers) -> str:
        return self._answer(key, ("problem", numbers))

    def static_problems(self, key: Key, numbers: Numbers) -> list[str]:
        return self._answer(key, ("static", numbers))

    def milliseconds(self, key: Key, candidates: Sequence[Numbers]) -> list[list[float]]:
        if self._timing is None:
            self._timing = self._make()
        job = {**self._common, "what": "times", "key": key, "candidates": list(candidates)}
        limit = min(TIMES_S, max(10.0, self._left() + RESERVE_S))
        answer = self._timing.ask(job, limit)
        if "error" in answer:
            self._timing.close()
            self._timing = None
            raise Died(answer["error"])
        return answer["found"]

    def close(self) -> None:
        self._pool.close()
        self._compilers.close()
        if self._timing is not None:
            self._timing.close()
            self._timing = None


_kernels: dict[tuple[torch.device, int, float], Kernels] = {}


def answer(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a worker says to a job of `Processes`."""
    kernels = _kernels.setdefault((device, job["rows"], job["seconds"]), _make_kernels(job, device))
    key = tuple(job["key"])
    if job["what"] == "times":
        return {"found": kernels.milliseconds(key, [tuple(numbers) for numbers in job["candidates"]])}
    numbers = tuple(job["numbers"])
    if job["what"] == "static":
        return {"found": kernels.static_problems(key, numbers)}
    problem = kernels.problem(key, numbers)
    if not problem:
        kernels.compiled(key, numbers)
    return {"found": problem}


def _make_kernels(job: dict[str, Any], device: torch.device) -> Kernels:
    return Kernels(device, rows=job["rows"], seconds=job["seconds"])
