"""Shares among all reproductions: options, a JSON that grows cell by cell, a table and a figure."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import platform
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ... import __version__
from .. import CliError
from ..files import NO_PICTURE, prepare_folder, refuse_folders, write_all, write_picture
from . import REPRODUCTIONS

_FORMAT = 1


@dataclass(frozen=True)
class Request:
    """What the command line asks of a reproduction."""

    full: bool = False
    seeds: int | None = None
    data: str | None = None
    widths: tuple[int, ...] | None = None
    batch: int = 0  # rows a step of a fit sees; 0: all


@dataclass
class Experiment:
    """One reproduction, ready to run.

    Attributes:
        options: everything that decides the figures; a run goes on where one with the same options stopped.
        cells: name -> function that computes its figures (a JSON object).
        tables: figures of all cells -> titles and rows of the tables to print, first row the headings.
        draw: (matplotlib figure, figures of all cells) -> nothing.
        size: of the figure, inches.
        notes: lines below the tables.
    """

    options: dict[str, Any]
    cells: dict[str, Callable[[], dict[str, Any]]]
    tables: Callable[[dict[str, Any]], dict[str, list[list[str]]]]
    draw: Callable[[Any, dict[str, Any]], None]
    size: tuple[float, float] = (12.0, 5.0)
    notes: list[str] = field(default_factory=list)


class Reproduction(Protocol):
    """What a module of this folder offers."""

    def prepare(self, request: Request) -> Experiment:
        """Make the experiment that the command line asks for."""


def run(arguments: Namespace) -> int:
    """Run the reproduction that the command line asks for; returns the exit code."""
    require("matplotlib", "tqdm")
    name = arguments.name
    module: Reproduction = importlib.import_module(f"{__package__}.{REPRODUCTIONS[name][0]}")
    widths = tuple(arguments.widths) if arguments.widths else None
    if widths and not getattr(module, "WIDTHS", False):
        raise CliError(f"--widths: {name} has one network size")
    if arguments.batch is not None and not getattr(module, "BATCH", False):
        raise CliError(f"--batch: {name} has no fit that could go in batches")
    experiment = module.prepare(Request(arguments.full, arguments.seeds, arguments.data, widths, arguments.batch or 0))
    folder = Path(arguments.out)
    stem = f"{name}-{'full' if arguments.full else 'quick'}"
    path = Path(arguments.json) if arguments.json else folder / f"{stem}.json"
    options = json.loads(json.dumps(experiment.options))
    done, seconds = _resume(path, name, options)
    resumed = bool(done)
    prepare_folder(folder)
    if path.parent != folder and not path.parent.is_dir():
        raise CliError(f"--json {path}: the folder {path.parent} does not exist; make it first")
    picture = folder / f"{stem}.png"
    refuse_folders([path, picture])

    def document() -> bytes:
        content = {
            "format": _FORMAT,
            "name": name,
            "size": "full" if arguments.full else "quick",
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "fused_inr": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "finished": bool(tables),
            "options": options,
            "tables": tables or None,
            "seconds": seconds,
            "cells": done,
        }
        return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"

    tables: dict[str, list[list[str]]] = {}
    for cell in _progress(experiment, done, arguments.quiet):
        start = time.perf_counter()
        done[cell] = plain(experiment.cells[cell]())
        seconds[cell] = round(time.perf_counter() - start, 2)
        if cell != list(experiment.cells)[-1]:
            write_all({path: document()})
    try:
        tables.update(experiment.tables(done))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if not resumed:
            raise
        message = f"{path}: holds figures that are not those of {name} ({error!r}); remove it or give another --out"
        raise CliError(message) from error
    write_all({path: document()})
    drawn = write_picture(picture, lambda: _figure(experiment, done))
    for title, rows in tables.items():
        print(f"\n{title}\n{aligned(rows)}")
    for note in experiment.notes:
        print(f"\n{note}")
    print(f"\nwrote {path}{f', {picture}' if drawn else ''}")
    return 0 if drawn else NO_PICTURE


def _resume(path: Path, name: str, options: dict) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the cells that an earlier run with the same options has computed."""
    if not path.is_file():
        return {}, {}
    try:
        found = json.loads(path.read_text())
        same = (found["format"], found["name"]) == (_FORMAT, name)
        # other seeds are other cells: they stay, and a later run with them need not repeat them
        if not same or {**found["options"], "seeds": 0} != {**options, "seeds": 0}:
            return {}, {}
        done, seconds = dict(found["cells"]), dict(found["seconds"])
        if not all(isinstance(cell, dict) for cell in done.values()):
            raise ValueError("its cells are no JSON objects")
        return done, {cell: float(seconds.get(cell, 0.0)) for cell in done}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path}: is no result of fused-inr reproduce ({error}); remove it or give another --out"
        raise CliError(message) from error


def _progress(experiment: Experiment, done: dict, quiet: bool) -> Iterator[str]:
    from tqdm import tqdm

    todo, total = [cell for cell in experiment.cells if cell not in done], len(experiment.cells)
    with tqdm(total=total, initial=total - len(todo), disable=quiet, unit="cell", dynamic_ncols=True) as bar:
        for cell in todo:
            bar.set_description(cell)
            yield cell
            bar.update()


def _figure(experiment: Experiment, cells: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=experiment.size, layout="constrained")
    experiment.draw(figure, cells)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


# -- for the reproductions


def require(*modules: str) -> None:
    """Make sure that packages are installed.

    Raises:
        CliError: one of the packages is not installed.
    """
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CliError(f"reproduce needs {', '.join(missing)}: pip install 'fused_inr[fit]'")


def seeds(request: Request, default: int) -> list[int]:
    """Return the seeds that were asked for, else as many as `default`."""
    return list(range(default if request.seeds is None else request.seeds))


def plain(value: Any) -> Any:
    """Return `value` for JSON, which has no NaN and no infinities: they become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def machine() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def aligned(rows: list[list[str]]) -> str:
    """Format rows of cells as a text table, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def digest(array: Any) -> str:
    """Return a name for data, so that a run goes on with the same or not at all."""
    import numpy as np

    array = np.ascontiguousarray(array)
    return f"{'x'.join(map(str, array.shape))}-{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
