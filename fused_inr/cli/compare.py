"""Serves `--compare`: the same fit with eager layers and with `torch.compile`, each in its own process, in lockstep.

Processes of their own, because a peak of memory can only be told apart that way; in lockstep (a block of steps each, in
turn), because a machine's speed drifts over minutes and would otherwise favour whoever ran first.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import children
from .memory import PeakMemory
from .options import FitOptions
from .pictures import Picture
from .training import WARM_UP, Trainer, build_model, final_psnr, finite

VARIANTS = ("eager", "torch.compile")


@dataclass
class FitResult:
    """What one variant came to, with times in ms and s, and memory in MiB over the process before its first step."""

    name: str
    ms_per_step: float | None = None
    warm_up_s: float | None = None
    psnr: float | None = None
    peak_mib: float | None = None
    kept_mib: float | None = None
    error: str | None = None


class Measured:
    """A trainer whose memory is watched: its peak after the warm-up, against the state before the first step."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.memory = PeakMemory(trainer.device)
        self.done = 0
        self.kept: float | None = None

    def train(self, steps: int) -> None:
        """Take `steps` steps, and watch the memory of those after the warm-up."""
        self.trainer.train(steps)
        self.done += steps
        if self.kept is None and self.done >= WARM_UP:
            # gradients included, in every variant: they live until the next step frees them
            self.kept = self.memory.kept()
            self.memory.restart()

    def result(self, name: str, picture: Picture) -> tuple[FitResult, np.ndarray]:
        """Return what the fit came to, and its reconstruction."""
        trainer, peak = self.trainer, self.memory.peak()  # before evaluating, which takes memory too
        pixels, psnr = final_psnr(picture, trainer.evaluate())
        return FitResult(name, trainer.ms_per_step(), trainer.warm_up_seconds(), finite(psnr), peak, self.kept), pixels


class Comparison:
    """The other variants' processes: `train(n)` advances all of them, `results()` ends them."""

    def __init__(self, options: FitOptions, picture: Picture):
        self._folder = tempfile.TemporaryDirectory(prefix="fused-inr-")
        pixels = Path(self._folder.name, "pixels.npy")
        np.save(pixels, picture.pixels)
        job = {"options": asdict(options), "pixels": str(pixels), "threads": torch.get_num_threads()}
        self._variants = [_Variant(name, job) for name in VARIANTS]

    def train(self, steps: int) -> None:
        """Let every variant take `steps` steps."""
        for variant in self._variants:
            variant.ask({"train": steps})

    def results(self) -> list[FitResult]:
        """End the fits and return what each came to."""
        return [variant.result() for variant in self._variants]

    def close(self) -> None:
        """End the processes and delete their files."""
        for variant in self._variants:
            variant.close()
        self._folder.cleanup()


class _Variant:
    """A process that serves `_Side`; a failure ends it and becomes its result, the fit goes on without it."""

    def __init__(self, name: str, job: dict[str, Any]):
        self.name = name
        self.error: str | None = None
        self._child = children.Child("-m", "fused_inr.cli.compare")
        self.ask({"variant": name, **job})

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and wait for the answer, {} from a process that has failed."""
        if self.error is not None:
            return {}
        answer = self._child.ask(message)
        self.error = answer.get("error")
        return answer

    def result(self) -> FitResult:
        """End the fit and return what it came to, or its error."""
        answer = self.ask({"finish": True})
        return FitResult(self.name, error=self.error) if self.error is not None else FitResult(**answer["result"])

    def close(self) -> None:
        """End the process."""
        self._child.close()


class _Side:
    """The other side of `_Variant`: the first message describes the fit, the next ones advance it, the last ends it."""

    def answer(self, message: dict[str, Any], tell: children.Tell) -> dict[str, Any]:
        """Do what a message asks for."""
        if "variant" in message:
            torch.set_num_threads(message["threads"])
            self.name = message["variant"]
            self.picture = Picture("", np.load(message["pixels"]), 255)
            self.measured = Measured(_trainer(self.name, FitOptions(**message["options"]), self.picture))
        elif "train" in message:
            self.measured.train(message["train"])
        else:
            return {"result": asdict(self.measured.result(self.name, self.picture)[0])}
        return {}


def _trainer(name: str, options: FitOptions, picture: Picture) -> Trainer:
    from .eager import eager_twin

    model = eager_twin(build_model(options, picture.pixels.shape[2]))
    trainer = Trainer(model, picture, options)
    if name == "torch.compile":
        trainer.forward = torch.compile(trainer.model)
    return trainer


def table(results: list[FitResult]) -> str:
    """Format the results side by side; `speed` is against eager."""
    eager = next((r.ms_per_step for r in results if r.name == "eager"), None)
    head = ("", "ms/step", "speed", "PSNR dB", "peak MiB", "kept MiB", f"first {WARM_UP} steps s")
    rows = [head]
    for r in results:
        if r.error is not None:
            continue
        speed = f"{eager / r.ms_per_step:.2f}x" if eager and r.ms_per_step else "-"
        numbers = (r.ms_per_step, 2), (r.psnr, 2), (r.peak_mib, 0), (r.kept_mib, 0), (r.warm_up_s, 1)
        ms, psnr, peak, kept, warm = ("-" if v is None else f"{v:.{digits}f}" for v, digits in numbers)
        rows.append((r.name, ms, speed, psnr, peak, kept, warm))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join((name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]))) for name, *cells in rows]
    lines += [f"{r.name}: failed: {r.error}" for r in results if r.error is not None]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(children.serve(_Side().answer))
