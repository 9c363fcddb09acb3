"""What a bench writes: where it ran, JSON that is whole at any moment, tables for people, a bar chart."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cli import CliError
from ..cli.arguments import Parser as Parser
from ..cli.arguments import integer as integer
from ..cli.arguments import positive as positive
from ..cli.files import write_all


def usable_device(parser: Parser, name: str) -> torch.device:
    """The device of this name, with its index ("cuda" is the current one), or the parser's error if nothing can be put
    on it."""
    try:
        return torch.empty(1, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {name!r} cannot be used here: {str(error).splitlines()[0]}")


def one_or_more(accepted: Sequence[str]) -> Callable[[str], list[str]]:
    """Argument type: names among `accepted`, separated by commas."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in chosen if name not in accepted]
        if unknown or not chosen:
            wrong = repr(unknown[0]) if unknown else "nothing"
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(accepted)} separated by commas, got {wrong}")
        return chosen

    return parse


# -- where it ran


def environment(device: torch.device, *, unasked: Sequence[str] = ()) -> dict[str, Any]:
    """Device, driver, versions, threads, time and command: what a figure means nothing without.

    `unasked`: backends that are not asked whether they are available, since the answer may be a build of minutes.
    """
    from .. import __version__

    about: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["fused-inr", "bench", *sys.argv[1:][-20:]]
        if "bench" not in sys.argv[1:2]
        else ["fused-inr", *sys.argv[1:]],
        "device": device_name(device),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {"fused_inr": __version__, "torch": torch.__version__, **_versions("triton", "numpy")},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "backends": _backends(unasked),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["cuda"] = {
            "runtime": torch.version.cuda,
            "driver": driver_version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        }
    return about


def _backends(unasked: Sequence[str]) -> dict[str, str]:
    from .. import backends

    found = {}
    for name, backend in backends.TABLE.items():
        usable, reason = (False, "not asked: it may have to be built first") if name in unasked else backend.available()
        found[name] = "available" if usable else reason
    return found


def _versions(*names: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def driver_version() -> str | None:
    """NVIDIA's driver version, from the kernel module, or else from its tool."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        pass
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, with a + where it was changed; None where it is
    installed."""
    here = Path(__file__).resolve().parent
    inside = _output(["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name])
    if inside is None:
        return None
    commit = _output(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+" if commit and changed else commit


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0]


def about_lines(about: dict[str, Any]) -> list[str]:
    """The environment for people."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [f"{about['device']}; {about['threads']} threads of {about['cpus']} CPUs ({about['cpu_capability']})"]
    if "cuda" in about:
        cuda = about["cuda"]
        lines.append("CUDA {runtime}, driver {driver}, capability {capability}, {memory_gib} GiB".format(**cuda))
    usable = [name for name, state in about["backends"].items() if state == "available"]
    return [*lines, f"{versions}; Python {about['python']}; backends: {', '.join(usable)}"]


# -- files


class Results:
    """A JSON file that holds whatever has been measured so far, rewritten whole after each result.

    `path=None` keeps the results in memory only. Raises CliError, before any measurement, where nothing can be written.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            problem = (
                "is a folder, and a file is needed" if path.is_dir() else f"the folder {path.parent} does not exist"
            )
            raise CliError(f"{path}: {problem}")
        self.path = path
        self.content: dict[str, Any] = {**about, "finished": False, "results": []}
        self.write()

    def append(self, result: dict[str, Any]) -> None:
        self.content["results"].append(result)
        self.write()

    def finish(self, **more: Any) -> None:
        self.content.update(more, finished=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_all({self.path: (json.dumps(finite(self.content), indent=1) + "\n").encode()})


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


# -- for people


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, without an exponent where that is readable."""
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width, the first `left` of them aligned left."""
    cells = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def bar_chart(path: Path, title: str, groups: dict[str, dict[str, float]], unit: str) -> None:
    """One group of bars a row of work, one bar a variant.

    Raises:
        CliError: matplotlib is missing, the name's ending is no picture format, or the file cannot be written.
    """
    try:
        import io

        from matplotlib.figure import Figure
    except ImportError as error:
        raise CliError("--figure needs matplotlib: pip install 'fused_inr[fit]'") from error
    variants = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    figure = Figure(figsize=(1.6 + 1.7 * max(1, len(groups)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(variants))
    for i, variant in enumerate(variants):
        present = [(x, bars[variant]) for x, bars in enumerate(groups.values()) if variant in bars]
        drawn = axes.bar(
            [x + (i - (len(variants) - 1) / 2) * width for x, _ in present],
            [v for _, v in present],
            width,
            label=variant,
        )
        axes.bar_label(drawn, labels=[number(v) for _, v in present], fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), [name.replace(", ", ",\n") for name in groups], fontsize=8)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=path.suffix[1:].lower() or "png", dpi=160)
    except ValueError as error:
        raise CliError(f"--figure {path}: {str(error).splitlines()[0]}") from error
    write_all({path: buffer.getvalue()})
