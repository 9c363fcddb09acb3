"""What a row of a whole network costs each unit of a multiprocessor: launches executed, not timed.

Each step runs on one multiprocessor's programs for two numbers of rows; the difference is what a row costs, the rest is
what the launch costs whatever the rows (weights loaded, sums written).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .. import cases
from . import clocks
from .engine import ExecutionOptions, Launch
from .serving import emulated, few_programs

#: (step, way of training) of `cases.Case`
STEPS = (("inference", "default"), ("training", "default"), ("training", "recompute"), ("training", "one-pass"))
#: rows of the two runs: whole tiles for each program, whatever the tile
ROWS = (512, 1536)
CAPABILITY = {"sm80": 80, "sm90": 90, "sm100": 100}


def _launches(arch: str, case: cases.Case) -> list[Launch]:
    options = ExecutionOptions(races=False, statistics=True)
    with emulated(CAPABILITY[arch], options) as device, few_programs(1):
        cases.Workload(case).outcome("fused")
    return device.launches


def count(arch: str, activation: str, width: int, precision: str, step: str, way: str) -> list[dict[str, Any]]:
    """One dict a launch that costs something a row: the case, the kernel, `clocks` of each unit a row, the `bound`,
    `instructions`, `wavefronts` and `sectors` a row, `conflicts`, and the clocks of its busiest unit that a launch
    costs `once`.

    Raises:
        ValueError: an unknown architecture, activation, precision or step.
    """
    if arch not in CAPABILITY:
        raise ValueError(f"arch: {arch!r} is not one of {', '.join(CAPABILITY)}")
    few, many = (
        _launches(arch, cases.Case("network", step, activation, width, rows, precision, way=way)) for rows in ROWS
    )
    if [launch.name for launch in few] != [launch.name for launch in many]:
        raise RuntimeError(f"{[launch.name for launch in few]} for {ROWS[0]} rows, but others for {ROWS[1]}")
    found = []
    for a, b in zip(few, many):
        small, large = clocks.cost(a, arch), clocks.cost(b, arch)
        row = large.minus(small, ROWS[1] - ROWS[0])
        if row.clocks[row.bound] < 0.01:
            continue
        once = small.clocks[row.bound] - ROWS[0] * row.clocks[row.bound]
        found.append(
            {
                "arch": arch, "activation": activation, "width": width, "precision": precision, "step": step,
                "way": way, "kernel": b.name, "warps": b.warps, "shared_bytes": b.shared, "bound": row.bound,
                "once": once, "conflicts": large.conflicts, **{k: v for k, v in asdict(row).items() if k != "ideal"},
            }
        )  # fmt: skip
    return found


def jobs(
    archs: Sequence[str], activations: Sequence[str], widths: Sequence[int] = (32, 64, 128),
    precisions: Sequence[str] = ("bf16", "tf32"),
) -> list[dict[str, Any]]:  # fmt: skip
    """Arguments of `count` for every combination, architectures first."""
    return [
        {"arch": arch, "activation": activation, "width": width, "precision": precision, "step": step, "way": way}
        for arch in archs
        for activation in activations
        for precision in precisions
        for width in widths
        for step, way in STEPS
    ]


COLUMNS = (("precision", 9), ("width", 5), ("activation", 10), ("step", 9), ("way", 9), ("kernel", 18), ("warps", 5))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One table an architecture: clocks a row, by unit."""
    lines = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        head = [name.ljust(size) for name, size in COLUMNS] + [unit.rjust(8) for unit in clocks.UNITS]
        lines += [f"{arch}: clocks a row of one multiprocessor", "  ".join([*head, "bound".ljust(16), "instr", "  wave",
                  "confl", " sect", "     once"])]  # fmt: skip
        for row in rows:
            if row["arch"] != arch:
                continue
            cells = [str(row[name]).removesuffix("_kernel").ljust(size) for name, size in COLUMNS]
            cells += [f"{row['clocks'][unit]:8.1f}" for unit in clocks.UNITS]
            bound = f"{row['clocks'][row['bound']]:.1f} {row['bound']}"
            cells += [bound.ljust(16), f"{row['instructions']:5.0f}", f"{row['wavefronts']:6.1f}"]
            cells += [f"{row['conflicts']:5.2f}", f"{row['sectors']:5.1f}", f"{row['once']:9.0f}"]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines[:-1])
