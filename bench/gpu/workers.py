"""The processes of `fused-inr bench gpu`: one measures cells one after the other, many compile ahead.

A worker reads jobs from standard input, a line of JSON each, and answers with lines of JSON: `{"now": NAME}` when it
begins with a variant, and at last the result. So the driver knows which variant a process was at when it died, hung, or
lost the device's context (an illegal address), and can have the rest measured without it.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import process
from ..worker import one_line

Say = Callable[[str], None]


class Lost(Exception):
    """The device's context is gone: nothing more will run in this process."""


class Worker:
    """A process that does one job after the other."""

    def __init__(self, device: torch.device, log: Path | None = None, **environment: str):
        self._words = tempfile.TemporaryFile("w+")
        self._log = log
        self.now: str | None = None  # the variant that the job in hand has come to
        self._process = subprocess.Popen(
            process.python("-m", "fused_inr.bench.gpu", "--worker", "--device", str(device)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=process.environment(**environment),
            start_new_session=True,  # Ctrl-C is for the driver, which keeps the results
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, job: dict[str, Any], limit: float) -> dict[str, Any] | None:
        """Its answer; None where the process died or took longer than `limit` seconds."""
        end = time.monotonic() + limit
        self.now = None
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            while line := self._answers.get(timeout=max(0.0, end - time.monotonic())):
                answer = json.loads(line)
                if answer.keys() != {"now"}:
                    return answer
                self.now = answer["now"]
        except (OSError, queue.Empty):
            pass
        return None

    def last_words(self) -> str:
        self._words.seek(0)
        lines = [line.strip() for line in self._words if line.strip()]
        return f"; it last said: {lines[-1][:200]}" if lines else ""

    def close(self) -> None:
        process.kill(self._process)
        if self._log is not None:
            self._words.seek(0)
            if said := self._words.read()[-20_000:]:
                with self._log.open("a") as log:
                    log.write(f"== worker {self._process.pid}\n{said}\n")
        for stream in (self._process.stdin, self._process.stdout, self._words):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # what was buffered for a process that is gone
                pass


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
                if answer is None or answer.pop("lost", False):
                    died = "" if time.monotonic() >= end else f"its process died{worker.last_words()}"
                    answer = answer or {"error": died or late}
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


def serve(device: torch.device, runs: dict[str, Callable[..., dict[str, Any]]]) -> int:
    """The other side: jobs on standard input, results on standard output, until that is closed; `runs`: who answers."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=out, flush=True)

    if device.type == "cuda":
        torch.cuda.set_device(device)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result = runs[job["run"]](job, device, lambda name: answer({"now": name}))
        except Lost as error:
            result = {"error": str(error), "lost": True}
        except Exception as error:
            traceback.print_exc()
            result = {"error": one_line(error)}
        if "lost" not in result:
            try:
                settle(device)
            except Lost as error:
                result = {"error": result.get("error") or str(error), "lost": True}
        answer(result)
    return 0


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
