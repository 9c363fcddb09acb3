"""The processes of `fused-inr bench gpu`: one measures cells one after the other, many compile ahead.

A worker tells which variant it begins with. So the driver knows which variant a process was at when it died, hung, or
lost the device's context (an illegal address), and can have the rest measured without it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...cli import children
from ...cli.children import Lost, Tell, one_line

Answer = Callable[[dict[str, Any], torch.device, Tell], dict[str, Any]]


class Worker(children.Child):
    """A process that does one job after the other, on a device."""

    def __init__(self, device: torch.device, log: Path | None = None, **environment: str):
        command = ("-m", "fused_inr.bench.gpu", "--worker", "--device", str(device))
        super().__init__(*command, log=log, variables=environment)


class Pool:
    """Workers side by side, kept from one list of jobs to the next: starting one takes seconds."""

    def __init__(self, make: Callable[[], Worker]):
        self._make = make
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed = False

    def run(self, jobs: Sequence[dict[str, Any]], count: int, limit: float) -> list[dict[str, Any]]:
        """Do the jobs in `count` workers, for at most `limit` seconds; each answer has the `seconds` that it took.

        A worker that dies or hangs costs the job that it was at; jobs that no worker came to are answered with an
        error.
        """
        end = time.monotonic() + limit
        waiting: queue.Queue[int] = queue.Queue()
        for i in range(len(jobs)):
            waiting.put(i)
        late = f"not done within {limit:.0f} s"
        answers: list[dict[str, Any]] = [{"error": late, "seconds": 0.0} for _ in jobs]

        def work() -> None:
            worker: Worker | None = None
            while time.monotonic() < end and not self._closed:
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    break
                start = time.monotonic()
                worker = worker or self._take()
                answer = worker.ask(jobs[i], end - start)
                if answer.pop("lost", False):
                    if time.monotonic() >= end:
                        answer = {"error": late}
                    self._busy.discard(worker)
                    worker.close()
                    worker = None
                answers[i] = {**answer, "seconds": round(time.monotonic() - start, 2)}
            if worker is not None:
                self._busy.discard(worker)
                self._idle.append(worker)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(count, len(jobs)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a signal is noticed between the waits
                thread.join(timeout=0.5)
        return answers

    def _take(self) -> Worker:
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = self._make()
        self._busy.add(worker)
        return worker

    def close(self) -> None:
        self._closed = True
        for worker in (*self._busy, *self._idle):
            worker.close()


def serve(device: torch.device, runs: dict[str, Answer]) -> int:
    """Serve the other side of `Worker`, until that is closed; `runs`: who answers a job, by its `run`."""
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def answer(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
        try:
            result = runs[job["run"]](job, device, tell)
        except Lost:
            raise
        except Exception as error:
            result = children.failed(error)
        try:
            settle(device)
        except Lost as error:
            raise Lost(result.get("error") or str(error)) from error
        return result

    return children.serve(answer)


def settle(device: torch.device) -> None:
    """Wait for the device, and give its memory back.

    Raises:
        Lost: something that was launched has taken the context with it.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception as error:
            raise Lost(one_line(error)) from error
