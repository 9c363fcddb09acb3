"""Runs `fused-inr fit`: a picture as a function of its coordinates, fitted, and everything about it written down."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends
from . import CliError
from .compare import Comparison, FitResult, Measured, table
from .figure import draw
from .files import NO_PICTURE, prepare_folder, printable, refuse_folders, write_all, write_picture
from .options import FitOptions
from .pictures import Picture, read_picture, to_png
from .training import WARM_UP, Checkpoint, Trainer, build_model, check_memory, finite

INTERRUPTED = 130
_CHECKPOINT_SECONDS = 30.0
_BLOCK = 5  # steps in turn with the other variants
_RESULTS = ("reconstruction.png", "figure.png", "weights.safetensors", "checkpoint.safetensors", "report.json")


def run(arguments: argparse.Namespace) -> int:
    """Run the fit that the command line asks for; returns the exit code."""
    _require("PIL", "tqdm", "matplotlib", "safetensors")
    folder = Path(arguments.out)
    checkpoint_file = folder / "checkpoint.safetensors"
    given = {f.name: getattr(arguments, f.name) for f in fields(FitOptions) if getattr(arguments, f.name) is not None}
    if "picture" in given:
        given["picture"] = str(Path(given["picture"]).resolve())
    if arguments.resume:
        if arguments.compare:
            raise CliError("--compare: starts from the first step, so it does not go with --resume")
        checkpoint = Checkpoint.read(checkpoint_file)
        options = _continued(checkpoint.options, given, folder, checkpoint.step)
    else:
        checkpoint = None
        options = FitOptions(**given)
    _check_device(options.device)
    refuse_folders(folder / name for name in _RESULTS)
    picture = read_picture(options.picture, options.size)
    check_memory(options, *picture.pixels.shape)
    if checkpoint is not None and picture.digest != checkpoint.picture:
        raise CliError(f"--resume: {picture.name} is not the picture that {checkpoint_file} was fitted to")
    with _Stop() as stop, _chosen(options.backend):
        try:
            trainer = Trainer(build_model(options, picture.pixels.shape[2]), picture, options)
        except RuntimeError as error:
            _refuse_out_of_memory(error, "--width, --depth or --size")
            raise
        if checkpoint is not None:
            trainer.restore(checkpoint)
        explanation = _explain(trainer)
        prepare_folder(folder)  # nothing is left behind by a fit that cannot begin
        _announce(options, picture, trainer, explanation)
        measured = Measured(trainer)
        comparison = Comparison(options, picture) if arguments.compare else None
        try:
            finished = _train(measured, comparison, picture, checkpoint_file, stop, arguments.quiet)
            others = comparison.results() if comparison is not None and finished else []
        finally:
            if comparison is not None:
                comparison.close()
        if not finished:
            write_all({checkpoint_file: trainer.checkpoint(picture)})
            print(
                f"fused-inr: stopped after {trainer.step} of {options.steps} steps; "
                f"go on with: fused-inr fit --resume --out {folder}",
                file=sys.stderr,
            )
            return INTERRUPTED
        own, pixels = measured.result(f"fused ({_backend_name(explanation)})", picture)

    curve = trainer.psnr_curve()
    shape = f"{options.width} wide, {options.depth} hidden layers"
    title = f"{picture.name}, {options.activation}, {shape}: {_decibel(own)} after {trainer.step} steps"
    report = _report(options, picture, trainer, explanation, [own, *others], curve)
    # the checkpoint too: `--resume --steps MORE` goes on from the end
    write_all(
        {
            folder / "reconstruction.png": to_png(pixels, picture.depth),
            folder / "weights.safetensors": _weights(trainer),
            checkpoint_file: trainer.checkpoint(picture),
            folder / "report.json": json.dumps(report, indent=1).encode() + b"\n",
        }
    )
    drawn = write_picture(folder / "figure.png", lambda: draw(picture.pixels, pixels, curve, title))
    _conclude(folder, own, others, trainer, drawn)
    return 0 if drawn else NO_PICTURE


# -- before


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CliError(f"fit needs {', '.join(missing)}: pip install 'fused_inr[fit]'")


def _continued(stored: FitOptions, given: dict[str, Any], folder: Path, done: int) -> FitOptions:
    """Return the stored options with more steps than `done`; anything else that differs would be another fit."""
    for name, value in given.items():
        # the picture may have moved; its pixels are compared instead
        if name not in ("steps", "picture") and value != getattr(stored, name):
            raise CliError(f"--resume: the fit in {folder} has --{name} {getattr(stored, name)}, not {value}")
    if given.get("steps", done) < done:
        raise CliError(f"--steps {given['steps']}: the fit in {folder} has taken {done} steps already")
    kept = {name: given[name] for name in ("steps", "picture") if name in given}
    return replace(stored, **kept)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CliError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise CliError("--device meta: has no data to fit")


def _chosen(backend: str):
    import contextlib

    return contextlib.nullcontext() if backend == "auto" else backends.use(backend)


def _explain(trainer: Trainer) -> list[str]:
    """Tell what runs the network's layers here, one entry a layer; fails now, not at the first step, if nothing can."""
    try:
        with trainer.autocast():
            text = backends.explain(trainer.model, trainer.coordinates[: min(trainer.rows, len(trainer.coordinates))])
    except RuntimeError as error:
        raise CliError(_one_line(error)) from error
    return re.split(r"\n(?! )", text)


def _backend_name(explanation: list[str]) -> str:
    """Name the backend as `backends.explain` does, 'call: backend (precision)', by the first line that names one."""
    for entry in explanation:
        if found := re.search(r": (\w+) \(\w+\)$", entry.splitlines()[0]):
            return found.group(1)
    return "fused"


def _announce(options: FitOptions, picture: Picture, trainer: Trainer, explanation: list[str]) -> None:
    height, width, channels = picture.pixels.shape
    layers = "-".join(map(str, (2, *(options.width,) * (options.depth + 1), channels)))
    layers += ", skip connections" * options.residual
    layers += {"layer": ", LayerNorm", "rms": ", RMSNorm"}.get(options.norm or "", "")
    rows = min(trainer.rows, len(trainer.coordinates))
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    print(
        f"{printable(picture.name)} {width}x{height}, {channels} channel{'s' * (channels > 1)}; "
        f"{options.activation} {layers}, {rows} rows a step, "
        f"{options.precision} on {options.device}{threads}; backend {_backend_name(explanation)}",
        flush=True,
    )


# -- the steps


def _train(
    measured: Measured,
    comparison: Comparison | None,
    picture: Picture,
    checkpoint_file: Path,
    stop: _Stop,
    quiet: bool,
) -> bool:
    """Take the steps that are left; returns False if stopped before."""
    from tqdm import tqdm

    trainer = measured.trainer
    total = trainer.options.steps
    block = _BLOCK if comparison is not None else (1 if trainer.device.type == "cpu" else 10)
    saved = time.monotonic()
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, initial=trainer.step, unit="step", disable=quiet, mininterval=interval) as bar:
        while trainer.step < total and not stop.asked:
            warming = measured.done < WARM_UP
            steps = min(total - trainer.step, WARM_UP - measured.done if warming else block)
            try:
                measured.train(steps)
            except RuntimeError as error:  # torch.OutOfMemoryError is one, the CPU allocator's a plain one
                _refuse_out_of_memory(error, "--batch")
                raise
            _check_loss(trainer)
            if comparison is not None and not stop.asked:
                comparison.train(steps)
            bar.set_postfix_str(f"PSNR {trainer.psnr_curve_last():.2f} dB", refresh=False)
            bar.update(steps)
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                write_all({checkpoint_file: trainer.checkpoint(picture)})
                saved = time.monotonic()
    return trainer.step >= total


def _refuse_out_of_memory(error: RuntimeError, options: str) -> None:
    """Say in one line that there was no memory left; other errors pass.

    Raises:
        CliError: `error` says that there was no memory left, which smaller `options` may mend.
    """
    if "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
        raise CliError(f"out of memory (a smaller {options} takes less): {_one_line(error)}") from error


def _check_loss(trainer: Trainer) -> None:
    """Make sure that the loss is a number.

    Raises:
        CliError: the loss is not a number, with the initial weights or after steps.
    """
    if not math.isfinite(trainer.mse[0]):
        raise CliError(
            f"the loss is {trainer.mse[0]} before the first step, so no --lr helps: --activation "
            f"{trainer.options.activation} is not finite at the values that the layers' products have there "
            "(a root or logarithm of a negative number, a division by 0, an overflow)"
        )
    if math.isnan(trainer.mse[-1]):
        first = next(step for step, mse in enumerate(trainer.mse) if math.isnan(mse))
        raise CliError(f"the fit diverged: the loss is not a number at step {first}; try a lower --lr")


class _Stop:
    """Lets Ctrl-C (or SIGTERM) within the block ask to stop after the present step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nfused-inr: stopping after this step (once more: at once, without a checkpoint)\n")


# -- after


def _weights(trainer: Trainer) -> bytes:
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in trainer.model.state_dict().items()}
    header = {"version": __version__, "model": type(trainer.model).__name__, "options": asdict(trainer.options)}
    return save(tensors, {"fused_inr": json.dumps(header)})


def _report(
    options: FitOptions,
    picture: Picture,
    trainer: Trainer,
    explanation: list[str],
    results: list[FitResult],
    curve: list[float],
) -> dict[str, Any]:
    own = results[0]
    cuda = trainer.device.type == "cuda"
    return {
        "fused_inr": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(trainer.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "options": asdict(options),
        "picture": {"name": picture.name, "shape": list(picture.pixels.shape), "digest": picture.digest},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "backends": explanation,
        "steps": trainer.step,
        # both of data in [0, 1]: this of the whole picture, clamped; the curve of each step's batch, not clamped
        "psnr_db": own.psnr,
        "ms_per_step": own.ms_per_step,
        "psnr_curve_db": [finite(round(value, 4)) for value in curve],
        "results": [asdict(result) for result in results],
    }


def _conclude(folder: Path, own: FitResult, others: list[FitResult], trainer: Trainer, drawn: bool) -> None:
    if others:
        print(f"\n{table([own, *others])}\n")
        print(
            "ms/step: median after the first steps, which pay for compilation. Memory: over the process before its\n"
            "first step; peak while steps run, kept between them (torch.compile keeps what compiling left there)."
        )
    speed = f", {own.ms_per_step:.1f} ms/step" if own.ms_per_step is not None else ""
    print(f"PSNR {_decibel(own)} (data in [0, 1]) after {trainer.step} steps{speed}")
    names = ", ".join(name for name in _RESULTS if drawn or name != "figure.png")
    print(f"wrote {names} to {printable(folder)}")


def _decibel(result: FitResult) -> str:
    return "infinite" if result.psnr is None else f"{result.psnr:.2f} dB"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
