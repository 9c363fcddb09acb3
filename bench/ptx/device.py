"""A Triton driver without a device: kernels are compiled for a compute capability, and their PTX is executed here."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from . import engine, library, reader
from .engine import ExecutionOptions, Launch

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class Fault(AssertionError):
    """A kernel did what a device would not forgive."""


@dataclass
class EmulatedDevice:
    """An emulated device: its launches so far, and how the next ones run.

    `mutate` gives another program in the place of a kernel's, to plant faults.
    """

    capability: int
    options: ExecutionOptions = field(default_factory=ExecutionOptions)
    mutate: Callable[[reader.PtxProgram], reader.PtxProgram] | None = None
    launches: list[Launch] = field(default_factory=list)
    _programs: dict[tuple[str, bool], reader.PtxProgram] = field(default_factory=dict)

    def faults(self) -> list[str]:
        return [f"{launch.name} {launch.grid}: {fault}" for launch in self.launches for fault in launch.faults]

    def check(self) -> None:
        """Raises Fault with everything that was found since the device was made, or `forget`."""
        if found := self.faults():
            raise Fault("\n".join([f"{len(found)} faults in {len(self.launches)} launches", *found]))

    def forget(self) -> None:
        self.launches.clear()

    def program(self, text: str) -> reader.PtxProgram:
        key = (hashlib.sha256(text.encode()).hexdigest(), self.options.contract)
        if key not in self._programs:
            self._programs[key] = reader.read(text, contract=self.options.contract)
            self._programs[key].source = text
        return self._programs[key] if self.mutate is None else self.mutate(self._programs[key])

    def launch(self, text: str, arguments: list, grid: tuple[int, ...], threads: int, shared: int) -> Launch:
        """Run the kernel of a PTX text; arguments as `engine.execute` takes them."""
        launch = engine.execute(self.program(text), arguments, grid, threads, shared, self.options)
        self.launches.append(launch)
        return launch


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


def _make_driver(device: EmulatedDevice):
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class ExecutorLauncher:
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
            threads = 32 * self.metadata.num_warps
            _active[-1].launch(function, arguments, (gx, gy, gz), threads, self.metadata.shared)

    class Utils:
        def load_binary(self, name, binary, shared, index):
            return None, binary.decode(), 0, 0, 1024

        def get_device_properties(self, index):
            return {
                "max_shared_mem": SHARED_LIMIT[device.capability], "multiprocessor_count": 108, "warpSize": 32,
                "max_num_regs": 65536, "sm_clock_rate": 1410000, "mem_clock_rate": 1215000, "mem_bus_width": 5120,
            }  # fmt: skip

    class ExecutorDriver(DriverBase):
        def __init__(self):
            self.utils, self.launcher_cls = Utils(), ExecutorLauncher

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

    return ExecutorDriver()


def _stages(*args):
    """Triton asks for a key without arguments, and with them what to change: PTX is the binary, ptxas does not run."""
    if not args:
        return "fused_inr executes PTX", "fused_inr executes PTX"
    args[1]["cubin"] = lambda source, metadata: source.encode()
    return None


_active: list[EmulatedDevice] = []


@contextlib.contextmanager
def triton_driver(capability: int = 80, options: ExecutionOptions | None = None) -> Iterator[EmulatedDevice]:
    """Within the block, Triton compiles for this compute capability, and its launches run on the executor."""
    if reason := unavailable():
        raise RuntimeError(reason)
    import triton

    device = EmulatedDevice(capability, options or ExecutionOptions())
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
