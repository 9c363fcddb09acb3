"""A Triton driver without a device: kernels are compiled for a compute capability, and their PTX is executed here."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from . import library, reader

KINDS = (
    "OOB_READ", "OOB_WRITE", "MISALIGNED", "RACE_RAW", "RACE_WAR", "RACE_WAW", "UNINIT_SHARED", "PENDING_COPY",
    "DIVERGENT_BARRIER", "DIVERGENT_SYNC", "SHFL_INACTIVE", "BARRIER_EXITED", "TRAP", "TOO_LONG", "WARP_RAW",
    "RACE_CTA_RAW", "RACE_CTA_WAR", "RACE_CTA_WAW", "DIV_ZERO", "WARP_WAR", "SAME_WAW", "WGMMA_OVERWRITTEN",
    "NO_PROXY_FENCE",
)  # fmt: skip
#: no faults: threads of one warp, which run in step here, ordered by nothing but that; and equal values, which threads
#: that hold copies of one element write to one place
WEAK = {"WARP_RAW", "WARP_WAR", "SAME_WAW"}
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
REGION = np.dtype([("address", "u8"), ("bytes", "u8"), ("host", "u8")])
REPORT = np.dtype(
    [(n, "i4") for n in ("kind", "ins", "other", "cta", "warp", "lane", "other_warp", "bytes")]
    + [("address", "u8"), ("count", "u8")]
)
_MOST_REPORTS = 256


class Fault(AssertionError):
    """A kernel did what a device would not forgive."""


@dataclass
class Options:
    """How programs are executed.

    Args:
        races: keep shadow memory, and report races, missing waits and fences, shared memory never written.
        poison: what a racy read returns is NaN.
        approximations: "exact", or "worst": sin, ex2, rcp, .. err by as much as documented, up or down.
        cut_sums: sums of tensor cores are cut to float32 instead of rounded.
        order: of the warps between two barriers: "ascending", "descending", "shuffled".
        statistics: count wavefronts of shared memory and sectors of global memory.
        contract: mul and add become fma where the assembler may do so.
        limit: warp instructions between two barriers, after which a program counts as endless.
    """

    races: bool = True
    poison: bool = False
    approximations: str = "exact"
    cut_sums: bool = False
    order: str = "ascending"
    statistics: bool = False
    contract: bool = False
    limit: int = 200_000_000

    def flags(self) -> int:
        found = 1 * self.races | 2 * (self.approximations == "worst") | 4 * self.cut_sums | 8 * self.statistics
        return found | {"ascending": 0, "descending": 16, "shuffled": 32}[self.order] | 64 * self.poison


@dataclass
class Launch:
    """What one launch did: its faults, and of each instruction how often a warp ran it (`counts`) and how many
    wavefronts (shared memory) or sectors (global memory) that took (`waves`, with `statistics`)."""

    name: str
    grid: tuple[int, ...]
    warps: int
    shared: int
    seconds: float
    faults: list[str]
    weak: list[str]
    counts: np.ndarray
    waves: np.ndarray
    barriers: int
    program: reader.Program

    @property
    def instructions(self) -> int:
        return int(self.counts.sum())

    def by_mnemonic(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for name, n in zip(self.program.mnemonics, self.counts, strict=True):
            if n:
                found[name] += int(n)
        return found

    def __str__(self) -> str:
        return (
            f"{self.name} grid {self.grid}, {self.warps} warps, {self.shared} bytes shared: {self.instructions} warp "
            f"instructions in {self.seconds:.2f} s, {len(self.faults)} faults"
        )


@dataclass
class Device:
    """An emulated device: launches so far, and how the next ones run.

    `mutate` changes a kernel's PTX before it is read, to plant faults.
    """

    capability: int
    options: Options = field(default_factory=Options)
    mutate: Callable[[str], str] | None = None
    launches: list[Launch] = field(default_factory=list)
    _programs: dict[str, reader.Program] = field(default_factory=dict)

    def faults(self) -> list[str]:
        return [f"{launch.name} {launch.grid}: {fault}" for launch in self.launches for fault in launch.faults]

    def check(self) -> None:
        """Raises Fault with everything that was found since the device was made, or `forget`."""
        if found := self.faults():
            raise Fault("\n".join([f"{len(found)} faults in {len(self.launches)} launches", *found]))

    def forget(self) -> None:
        self.launches.clear()

    def program(self, text: str) -> reader.Program:
        if self.mutate is not None:
            text = self.mutate(text)
        key = hashlib.sha256(text.encode()).hexdigest() + str(self.options.contract)
        if key not in self._programs:
            self._programs[key] = reader.decode(text, self.options.contract)
            if unknown := self._programs[key].unsupported:
                raise NotImplementedError(f"{self._programs[key].name}: {dict(unknown)}")
        return self._programs[key]

    def launch(self, text: str, grid: tuple[int, int, int], warps: int, shared: int, arguments: list) -> Launch:
        """Run a program; arguments: (type as Triton writes it, value) of each parameter, pointers as tensors."""
        program = self.program(text)
        start = time.perf_counter()
        faults: list[str] = []
        params, regions = _parameters(program, arguments, faults)
        if any(g < 1 or g >= 2**31 or (i and g > 65535) for i, g in enumerate(grid)):
            faults.append(f"GRID {grid}")
        if program.threads != 32 * warps:
            raise ValueError(f"{program.name}: compiled for {program.threads} threads, launched with {32 * warps}")
        counts, waves = (np.zeros(len(program.code), np.uint64) for _ in range(2))
        barriers, out = ctypes.c_uint64(), np.zeros(_MOST_REPORTS, REPORT)

        def at(a: np.ndarray) -> ctypes.c_void_p:
            return a.ctypes.data_as(ctypes.c_void_p)

        n = library.load().launch(
            at(program.code), len(program.code), program.rf_bytes, at(program.consts), len(program.consts), at(params),
            at(regions), len(regions), *grid, warps, shared, self.options.flags(), ctypes.c_uint64(self.options.limit),
            at(out), len(out), at(counts), at(waves), ctypes.byref(barriers), at(program.extra),
        )  # fmt: skip
        weak: list[str] = []
        for report in out[: min(n, len(out))]:
            kind = KINDS[report["kind"]]
            (weak if kind in WEAK else faults).append(_describe(kind, report, program))
        seconds = time.perf_counter() - start
        launch = Launch(
            program.name, tuple(grid), warps, shared, seconds, faults, weak, counts, waves, barriers.value, program
        )
        self.launches.append(launch)
        return launch


def _describe(kind: str, report, program: reader.Program) -> str:
    i, other = int(report["ins"]), int(report["other"])
    line = (
        f"{kind} x{report['count']}: #{i} `{program.text[i]}` [{program.locs[i]}] block {report['cta']} warp "
        f"{report['warp']} lane {report['lane']} address {int(report['address']):#x}"
    )
    if other >= 0:
        line += f" after #{other} `{program.text[other]}` [{program.locs[other]}] of warp {report['other_warp']}"
    return line


def _parameters(program: reader.Program, arguments: list, faults: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the parameters, and the memory that their pointers lead to.

    Each tensor's storage has an address of its own, 2^40 from the next: no access beyond one lands in another.
    """
    regions: list[tuple[int, int, int]] = []
    addresses: dict[int, int] = {}
    kinds = [kind for kind, _ in arguments]
    values: list[int | float] = []
    for _, v in arguments:
        if not hasattr(v, "data_ptr"):
            values.append(0 if v is None else v)
            continue
        storage = v.untyped_storage()
        base, size = storage.data_ptr(), storage.nbytes()
        if not size or not v.data_ptr():
            values.append(0)
            continue
        if base not in addresses:
            addresses[base] = ((len(regions) + 1) << 40) | (base & 0xFF)
            regions.append((addresses[base], size, base))
        values.append(addresses[base] + v.data_ptr() - base)
    missing = len(program.params) - len(values)  # Triton's scratch pointers
    values += [0] * missing
    kinds += ["i64"] * missing
    buffer = bytearray(max(8, program.param_bytes))
    for (offset, size), kind, v in zip(program.params, kinds, values, strict=True):
        if kind in ("fp32", "f32"):
            raw = struct.pack("<f", v)
        elif kind in ("fp64", "f64"):
            raw = struct.pack("<d", v)
        else:
            if kind[0] != "*" and not -(2 ** (8 * size - 1)) <= int(v) < 2 ** (8 * size):
                faults.append(f"ARGUMENT {v} does not fit {kind}")
            raw = (int(v) & (2 ** (8 * size) - 1)).to_bytes(size, "little")
        if len(raw) != size:
            raise ValueError(f"{program.name}: a parameter of {size} bytes for an argument of type {kind}")
        buffer[offset : offset + size] = raw
    table = np.array(regions, REGION) if regions else np.zeros(0, REGION)
    return np.frombuffer(bytes(buffer), np.uint8), table


# -- Triton's driver


def unavailable() -> str:
    """Why Triton's kernels cannot be executed here; empty when they can."""
    if reason := library.unavailable():
        return reason
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed (pip install 'triton>=3.6'; Linux)"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
        return "Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing"
    return ""


def _make_driver(device: Device):
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Launcher:
        def __init__(self, src, metadata):
            self.signature = list(src.signature.values())
            self.metadata = metadata

        def flat(self, signature, values):
            for s, v in zip(signature, values, strict=True):
                if isinstance(s, tuple):
                    yield from self.flat(s, v)
                elif s != "constexpr":
                    yield s, v

        def __call__(self, gx, gy, gz, stream, function, packed, launch_metadata, enter, leave, *args):
            if self.metadata.global_scratch_size or self.metadata.profile_scratch_size:
                raise NotImplementedError("global scratch memory of Triton")
            arguments = list(self.flat(self.signature, args))
            _active[-1].launch(function, (gx, gy, gz), self.metadata.num_warps, self.metadata.shared, arguments)

    class Utils:
        def load_binary(self, name, binary, shared, index):
            return None, binary.decode(), 0, 0, 1024

        def get_device_properties(self, index):
            return {
                "max_shared_mem": SHARED_LIMIT[device.capability], "multiprocessor_count": 108, "warpSize": 32,
                "max_num_regs": 65536, "sm_clock_rate": 1410000, "mem_clock_rate": 1215000, "mem_bus_width": 5120,
            }  # fmt: skip

    class Driver(DriverBase):
        def __init__(self):
            self.utils, self.launcher_cls = Utils(), Launcher

        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_current_target(self):
            return GPUTarget("cuda", device.capability, 32)

        def get_current_device(self):  # Triton keeps what it has compiled by this number
            return 1000 + device.capability

        def get_current_stream(self, index):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError

    return Driver()


def _stages(*args):
    """Triton asks for a key without arguments, and with them what to change: PTX is the binary, ptxas does not run."""
    if not args:
        return "fused_inr executes PTX", "fused_inr executes PTX"
    args[1]["cubin"] = lambda source, metadata: source.encode()
    return None


_active: list[Device] = []


@contextlib.contextmanager
def triton_driver(capability: int = 80, options: Options | None = None) -> Iterator[Device]:
    """Within the block, Triton compiles for this compute capability, and its launches run on the executor."""
    if reason := unavailable():
        raise RuntimeError(reason)
    import triton

    device = Device(capability, options or Options())
    settings, drivers = triton.knobs.runtime, triton.runtime.driver
    former, former_driver = settings.add_stages_inspection_hook, drivers._active
    settings.add_stages_inspection_hook = _stages
    drivers.set_active(_make_driver(device))
    _active.append(device)
    try:
        yield device
    finally:
        _active.pop()
        settings.add_stages_inspection_hook = former
        drivers.set_active(former_driver)
