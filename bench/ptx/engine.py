"""The engine as Python sees it: how programs are executed, what a launch did, what counts as a fault."""

from __future__ import annotations

import ctypes
import struct
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from . import library, reader

#: what the engine reports, in the order of its `Kind`
KINDS = (
    "read out of bounds",
    "write out of bounds",
    "misaligned",
    "race: read after write",
    "race: write after read",
    "race: write after write",
    "race between blocks: read after write",
    "race between blocks: write after read",
    "race between blocks: write after write",
    "read before it was written",
    "touched before the copy to it was waited for",
    "written while products read it, or touched before they were done",
    "register touched before the product was waited for",
    "wgmma without wgmma.fence after its registers were written",
    "no proxy fence between a write and an asynchronous product",
    "lanes of a warp are missing where all must take part",
    "value of a lane that does not take part",
    "a barrier that a warp has left for good",
    "every warp waits",
    "endless",
    "trap",
    "tensor memory misused",
    "race whose value is not used",
    "lanes of a warp: read after write",
    "lanes of a warp: write after read",
    "write after write of the same value",
    "left factor of wgmma written after wgmma.fence",
)
#: No faults: reads that a race makes uncertain, but of which nothing comes; lanes of one warp, which run in step here,
#: ordered by nothing but that; equal values, which lanes that hold copies of one element write to one place; a left
#: factor in registers that is written between wgmma.fence and its product. PTX asks for the fence between these too,
#: but LLVM moves conversions past the one fence that Triton puts before several products, and the assembler orders a
#: product behind what writes its registers by their dependence, or runs the products one by one. Sums have no such
#: order.
HARMLESS = frozenset(KINDS[-5:])
_REGION = np.dtype([("address", "u8"), ("bytes", "u8"), ("host", "u8")])
_REPORT = np.dtype(
    [(n, "i4") for n in ("kind", "instruction", "other", "block", "warp", "lane", "other_warp", "bytes")]
    + [("address", "u8"), ("count", "u8")]
)
_PRODUCT = np.dtype([(n, "i4") for n in ("instruction", "block", "warp", "registers")] + [("a", "u8"), ("b", "u8")])
_MOST_REPORTS = 512
_ERRORS = {"exact": 0, "up": 1, "down": 2, "either": 3}
_ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


@dataclass(frozen=True)
class ExecutionOptions:
    """How programs are executed.

    Args:
        races: keep shadow memory, and report races, missing waits and fences, shared memory never written.
        errors: of the hardware's approximations (sin, ex2, rcp ..): "exact", or as large as documented: "up", "down",
            "either" as a hash of the value says.
        cut_sums: sums of tensor cores are cut to float32 instead of rounded.
        order: of the warps between two barriers: "ascending", "descending", "shuffled".
        statistics: count wavefronts of shared memory and sectors of global memory.
        products: keep the matrix descriptors of so many wgmma (`Launch.products`).
        contract: products and sums become multiply-adds where the assembler may have it.
        limit: instructions of a warp between two barriers, from which on it counts as endless.
    """

    races: bool = True
    errors: str = "exact"
    cut_sums: bool = False
    order: str = "ascending"
    statistics: bool = False
    products: int = 0
    contract: bool = False
    limit: int = 100_000_000


@dataclass(frozen=True)
class Found:
    """Something that was reported: what, at which instruction, and after which other one."""

    kind: str
    instruction: int
    other: int  # -1: none
    count: int
    where: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.count} times): {self.where}"


@dataclass(frozen=True)
class Launch:
    """What one launch did: faults, and what is harmless; how often each instruction ran, by a warp (`counts`), and,
    with `statistics`, how many wavefronts of shared or sectors of global memory that took (`waves`; `more`: machine.h);
    how it ran, and the bytes of its parameters; with `ExecutionOptions.products` each wgmma of a warp: instruction,
    block, warp, whether A lies in registers, and the matrix descriptors `a`, `b`."""

    program: reader.PtxProgram
    grid: tuple[int, int, int]
    warps: int
    shared: int
    seconds: float
    faults: tuple[Found, ...]
    harmless: tuple[Found, ...]
    counts: np.ndarray
    waves: np.ndarray
    more: np.ndarray
    options: ExecutionOptions
    parameters: bytes
    products: np.ndarray

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def instructions(self) -> int:
        return int(self.counts.sum())

    def by_mnemonic(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for name, n in zip(self.program.mnemonics, self.counts.tolist(), strict=True):
            found[name] += n
        return +found

    def __str__(self) -> str:
        return (
            f"{self.name} {self.grid}, {self.warps} warps, {self.shared} bytes shared: {self.instructions:,} warp "
            f"instructions in {self.seconds:.2f} s, {len(self.faults)} faults"
        )


class _Program(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("instructions", "register_bytes", "constants", "local_bytes")),
        ("operands", ctypes.c_void_p),
        ("constant", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("shared_granule", "global_granule", "watches_registers", "partial")),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("warps", "shared_bytes", "regions", "reports_room")),
        ("parameters", ctypes.c_void_p),
        ("region", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("races", "errors", "cut_sums", "order", "statistics", "products_room")),
        ("limit", ctypes.c_uint64),
        ("products", ctypes.c_void_p),
        ("products_seen", ctypes.c_void_p),
    )


def execute(
    program: reader.PtxProgram,
    arguments: Sequence[tuple[str, object]],
    grid: Iterable[int],
    threads: int,
    dynamic_shared: int = 0,
    options: ExecutionOptions = ExecutionOptions(),
    memory: Iterable[np.ndarray] = (),
) -> Launch:
    """Run a program.

    Args:
        arguments: (type, value) of each parameter: pointers ("*..") as PyTorch tensors, NumPy arrays or None, numbers
            as "i32", "u64", "fp32" .., what else a kernel takes by value as bytes. Parameters beyond these are 0.
        grid: blocks in each direction, up to three numbers.
        threads: of a block.
        dynamic_shared: bytes of shared memory that the launch asks for.
        memory: arrays whose addresses here the arguments hold (pointers within a struct).
    """
    start = time.perf_counter()
    x, y, z = (*grid, 1, 1)[:3]
    if program.threads not in (0, threads):
        raise ValueError(f"{program.name}: compiled for {program.threads} threads a block, launched with {threads}")
    if threads % 32 or not 0 < threads <= 1024:
        raise ValueError(f"{program.name}: {threads} threads a block")
    shared = program.static_shared
    shared = (
        dynamic_shared if not shared else shared if not dynamic_shared else -(-shared // 1024) * 1024 + dynamic_shared
    )
    misfits: list[Found] = []
    parameters, regions = _parameters(program, arguments, memory, misfits)
    if min(x, y, z) < 1 or x >= 2**31 or max(y, z) > 65535:
        raise ValueError(f"{program.name}: a grid of {(x, y, z)} blocks")
    counts, waves, more = (np.zeros(len(program.code), np.uint64) for _ in range(3))
    reports = np.zeros(_MOST_REPORTS, _REPORT)
    products, seen = np.zeros(options.products, _PRODUCT), np.zeros(1, np.uint64)

    def at(array: np.ndarray) -> int:
        return array.ctypes.data

    p = _Program(
        at(program.code), len(program.code), program.register_bytes, len(program.constants), program.local_bytes,
        at(program.operands), at(program.constants), program.shared_granule, program.global_granule,
        program.watches_registers, program.has_partial_barriers,
    )  # fmt: skip
    launch = _Launch(
        (ctypes.c_int32 * 3)(x, y, z), threads // 32, shared, len(regions), len(reports), at(parameters), at(regions),
        options.races, _ERRORS[options.errors], options.cut_sums, _ORDERS[options.order], options.statistics,
        options.products, options.limit, at(products) if options.products else None, at(seen),
    )  # fmt: skip
    n = library.load().fused_inr_ptx_launch(
        ctypes.byref(p), ctypes.byref(launch), *(ctypes.c_void_p(at(a)) for a in (reports, counts, waves, more))
    )
    found = [_describe(report, program) for report in reports[: min(n, len(reports))]]
    if n > len(reports):
        misfits.append(Found(f"{n - len(reports)} more reports", 0, -1, 1, program.name))
    faults = (*misfits, *(f for f in found if f.kind not in HARMLESS))
    harmless = tuple(f for f in found if f.kind in HARMLESS)
    seconds = time.perf_counter() - start
    return Launch(
        program, (x, y, z), threads // 32, shared, seconds, faults, harmless, counts, waves, more, options,
        parameters.tobytes(), products[: int(seen[0])],
    )  # fmt: skip


def _describe(report, program: reader.PtxProgram) -> Found:
    i, other = int(report["instruction"]), int(report["other"])
    where = (
        f"`{program.text[i]}` [{program.locations[i]}] of block {report['block']} warp {report['warp']} lane "
        f"{report['lane']} at {int(report['address']):#x}"
    )
    if other >= 0:
        where += f", after `{program.text[other]}` [{program.locations[other]}] of warp {report['other_warp']}"
    return Found(KINDS[report["kind"]], i, other, int(report["count"]), where)


def _memory(value: object) -> tuple[int, int, int]:
    """Where a tensor's or an array's storage begins, its bytes, and where the tensor begins within it."""
    if isinstance(value, np.ndarray):
        return value.ctypes.data, value.nbytes, 0
    storage = value.untyped_storage()  # type: ignore[attr-defined]
    return storage.data_ptr(), storage.nbytes(), value.data_ptr() - storage.data_ptr()  # type: ignore[attr-defined]


def _parameters(
    program: reader.PtxProgram,
    arguments: Sequence[tuple[str, object]],
    memory: Iterable[np.ndarray],
    misfits: list[Found],
) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the parameters, and the memory that their pointers lead to.

    Each storage has an address of its own, 2^40 from the next: no access beyond one lands in another.
    """
    regions = [(address, len(data), data.ctypes.data) for address, data in program.variables]
    regions += [(array.ctypes.data, array.nbytes, array.ctypes.data) for array in memory]
    addresses: dict[int, int] = {}
    buffer = bytearray(max(8, program.param_bytes))
    for (offset, size), (kind, value) in zip(program.params, arguments, strict=False):
        if isinstance(value, bytes):
            raw = value
        elif kind.startswith("*"):
            base, length, within = (0, 0, 0) if value is None else _memory(value)
            if length and base not in addresses:
                addresses[base] = ((len(addresses) + 1) << 40) | (base & 0xFF)
                regions.append((addresses[base], length, base))
            raw = struct.pack("<Q", addresses[base] + within if length else 0)
        elif kind in ("fp32", "f32", "fp64", "f64"):
            raw = struct.pack("<f" if kind.endswith("32") else "<d", value)
        else:
            number = int(value)  # type: ignore[call-overload]
            if not -(2 ** (8 * size - 1)) <= number < 2 ** (8 * size):
                misfits.append(Found("argument out of range", 0, -1, 1, f"{number} of {program.name} for {kind}"))
            raw = (number & (2 ** (8 * size) - 1)).to_bytes(size, "little")
        if len(raw) != size:
            raise ValueError(f"{program.name}: {len(raw)} bytes for a parameter of {size} ({kind})")
        buffer[offset : offset + size] = raw
    return np.frombuffer(bytes(buffer), np.uint8), np.array(regions, _REGION)
