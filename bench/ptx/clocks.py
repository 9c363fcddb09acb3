"""Lower bounds in clocks of one multiprocessor, from the instructions that ran: what its busiest unit takes.

PTX is not what the machine runs: the assembler's address arithmetic, its moves and its order are not seen, and neither
are latencies, caches and occupancy. Wavefronts of shared memory and sectors of global memory are exact.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from .. import roofline
from .engine import Launch

#: units, and what they are asked for
UNITS = {
    "issue": "instructions of a warp, 4 a clock",
    "fma": "float32 and integer multiplications and float32 additions",
    "alu": "other integer operations, comparisons, selections, conversions between float32 and half types",
    "special": "sin, cos, ex2, lg2, rcp, sqrt, tanh; conversions to integers, of whole numbers and of float64",
    "fp64": "float64",
    "tensor": "matrix products",
    "shared": "wavefronts of shared memory, operands of wgmma and tcgen05 there, shuffles: one a clock",
    "global": "sectors of 32 bytes, through the first-level cache: 4 a clock",
}
#: Multiply-adds of half types a clock on tensor cores (of TF32: half as many): GA100 white paper; Hopper and Blackwell
#: twice as many each, by their data sheets.
TENSOR = {"sm80": 1024, "sm90": 2048, "sm100": 4096}
ARCHS = tuple(TENSOR)
#: what becomes part of other instructions, or of none
_FREE = (
    "ld.param",
    "mov",
    "cvta",
    "ret",
    "bra",
    "bar",
    "barrier",
    "fence",
    "membar",
    "elect",
    "mbarrier",
    "wgmma.fence",
)
_FREE += ("wgmma.commit", "wgmma.wait", "cp.async.commit", "cp.async.wait", "tcgen05.alloc", "tcgen05.dealloc")
_FREE += ("tcgen05.relinquish", "tcgen05.commit", "tcgen05.wait", "tcgen05.fence", "trap")
#: instructions that the assembler makes of one, by unit; what is not here is one of its own unit
_SEQUENCES = {
    r"div\.full\.f32": {"special": 1, "fma": 2},
    r"(div|rcp)\.rn\.f32": {"special": 1, "fma": 7},
    r"sqrt\.rn\.f32": {"special": 1, "fma": 6},
    r"(div|rcp|sqrt)\.rn\.f64": {"special": 1, "fp64": 8},
    r"(sin|cos)\.approx.*": {"special": 1, "fma": 1},
    r"(ex2|lg2|sqrt|rsqrt)\.approx\.f32": {"special": 1, "fma": 2},  # without .ftz: subnormal numbers apart
    r"(div|rem)\.[us]32": {"special": 2, "alu": 10, "fma": 8},
    r"(div|rem)\.[us]64": {"special": 2, "alu": 40, "fma": 40},
    r"mul\.(lo|hi)\.[us]64|mad\.lo\.s64": {"fma": 4},
    r"(add|sub|neg|min|max|abs)\.[us]64|(and|or|xor|not|shl|shr|selp)\.[busf]64|setp\.\w+\.[bus]64": {"alu": 2},
    r"(add|sub|mul|fma)\..*f32x2": {"fma": 2, "issue": -1},
}


@functools.cache
def units_of(mnemonic: str) -> dict[str, float]:
    """What one instruction of a warp asks of each unit; matrix products and memory not included."""
    if mnemonic.startswith(_FREE):
        return {}
    for pattern, found in _SEQUENCES.items():
        if re.fullmatch(pattern, mnemonic):
            return {"issue": sum(found.values()), **{u: n for u, n in found.items() if u != "issue"}}
    base, kinds = mnemonic.split(".")[0], mnemonic.split(".")[1:]
    if base in ("ld", "st", "cp", "ldmatrix", "stmatrix", "shfl", "mma", "wgmma", "tcgen05"):
        return {"issue": 1}
    if base in ("sin", "cos", "ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"):
        unit = "special"
    elif base == "cvt":
        whole = kinds[0] in ("rzi", "rni", "rmi", "rpi") or "f64" in kinds
        unit = "special" if whole else "alu"
    elif kinds and kinds[-1] == "f64":
        unit = "fp64"
    elif base in ("mul", "mad", "fma") or (base in ("add", "sub") and kinds[-1] in ("f32", "f16", "bf16")):
        unit = "fma"
    else:
        unit = "alu"
    return {"issue": 1, unit: 1}


@dataclass
class Cost:
    """What a launch asks of one multiprocessor: clocks of each unit, and counts."""

    clocks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    instructions: float = 0.0
    wavefronts: float = 0.0  # of loads from and stores to shared memory
    ideal: float = 0.0  # and as many as they would be without conflicts
    sectors: float = 0.0

    @property
    def bound(self) -> str:
        return max(self.clocks, key=lambda unit: self.clocks[unit])

    @property
    def conflicts(self) -> float:
        """Wavefronts of shared memory for each that its bytes need."""
        return self.wavefronts / self.ideal if self.ideal else 1.0

    def minus(self, other: Cost, divisor: float) -> Cost:
        """The difference to another launch, divided: what one more row costs."""
        clocks = {unit: (n - other.clocks[unit]) / divisor for unit, n in self.clocks.items()}
        names = ("instructions", "wavefronts", "ideal", "sectors")
        return Cost(clocks, *((getattr(self, name) - getattr(other, name)) / divisor for name in names))


def _rates(arch: str) -> dict[str, float]:
    """Instructions of a warp a clock."""
    device = next(d for d in roofline.DEVICES if d.arch == arch)
    return {
        "issue": 4.0,
        "fma": device.lanes / 32,
        "alu": device.integer / 32,
        "special": device.special / 32,
        "fp64": device.double / 32,
        "tensor": float(TENSOR[arch]),
        "shared": 1.0,
        "global": 4.0,
    }


def _product(mnemonic: str, row) -> tuple[float, float]:
    """Of one matrix instruction of a warp: multiply-adds of half types that take as long, and wavefronts of operands in
    shared memory (those that four warps read together count a quarter)."""
    shape = re.search(r"m(\d+)n(\d+)k(\d+)", mnemonic)
    slow = 2 if "tf32" in mnemonic else 1
    if mnemonic.startswith("mma"):
        m, n, k = map(int, shape.groups())  # type: ignore[union-attr]
        return m * n * k * slow, 0.0
    if mnemonic.startswith("wgmma"):
        _, n, k = map(int, shape.groups())  # type: ignore[union-attr]
        of_a = 0 if row["width"] else 16 * k
        return 16 * n * k * slow, (n * k / 4 + of_a) * 2 * slow / 128
    return 0.0, 0.0


def cost(launch: Launch, arch: str) -> Cost:
    """Of a launch that ran with `statistics`.

    Raises:
        ValueError: it ran without, or nothing is known of the architecture.
    """
    if arch not in TENSOR:
        raise ValueError(f"arch: {arch!r} is not one of {', '.join(ARCHS)}")
    if not launch.options.statistics:
        raise ValueError("this launch counted no wavefronts and sectors")
    found, total = Cost(), dict.fromkeys(UNITS, 0.0)
    program = launch.program
    counters = (launch.counts.tolist(), launch.waves.tolist(), launch.more.tolist())
    for name, row, count, waves, more in zip(program.mnemonics, program.code, *counters):
        if not count:
            continue
        found.instructions += count
        for unit, n in units_of(name).items():
            total[unit] += n * count
        if name.startswith(("mma", "wgmma.mma")):
            products, operands = _product(name, row)
            total["tensor"] += products * count
            total["shared"] += operands * count
        elif name.startswith("tcgen05.mma"):
            total["tensor"] += waves
            total["shared"] += more
        elif name.startswith("shfl"):
            total["shared"] += count
        elif name.startswith(("ldmatrix", "stmatrix", "cp.async.c")) or ".shared" in name:
            found.wavefronts += waves
            found.ideal += count * _ideal(name, row)
            total["shared"] += waves
            found.sectors += more
            total["global"] += more
        elif name.startswith(("ld.", "st.")) and waves:
            found.sectors += waves
            total["global"] += waves
    rates = _rates(arch)
    found.clocks = {unit: n / rates[unit] for unit, n in total.items()}
    return found


def _ideal(name: str, row) -> float:
    """Wavefronts of an access of a whole warp without conflicts: 128 bytes each."""
    if name.startswith(("ldmatrix", "stmatrix")):
        return float(row["count"])
    size = row["count"] if name.startswith("cp.") else row["count"] * row["size"]
    return max(1.0, 32 * int(size) / 128)
