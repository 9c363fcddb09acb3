"""How time and memory are measured.

Variants are interleaved, round by round and in an order that rotates, so that a machine whose speed drifts treats them
alike; what is reported is the median over rounds. On CUDA the clock is a pair of events around a block of calls; what
the host needs to launch the block is timed beside it, without waiting for the device.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import backends
from ..cli.memory import PeakMemory

#: With these glibc never gives memory back, so a process pays the page faults of its tensors once and not at every step
#: ("warmed allocator"). The mmap limit of 0 sends large blocks to the heap as well.
WARMED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


@dataclass
class Timing:
    """Milliseconds a call of one variant; `samples` are the rounds, `faults` the page faults a call (CPU)."""

    samples: list[float] = field(default_factory=list)
    launches: list[float] = field(default_factory=list)
    faults: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)

    @property
    def launch_ms(self) -> float | None:
        """What the host spends on a call; on the CPU that is the call itself."""
        return statistics.median(self.launches) if self.launches else None

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median: differences below it are noise."""
        if len(self.samples) < 4:
            return (max(self.samples) - min(self.samples)) / 2 / self.ms
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2 / self.ms

    def summary(self) -> dict[str, float | int | None]:
        return {
            "ms": self.ms,
            "min_ms": min(self.samples),
            "spread": self.spread,
            "rounds": len(self.samples),
            "launch_ms": self.launch_ms,
            "page_faults": self.faults,
        }


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 4.0,
    rounds: tuple[int, int] = (5, 100),
    block_ms: float = 5.0,
) -> dict[str, Timing]:
    """Time each of `variants` (called without arguments), interleaved, for about `seconds` altogether.

    A round calls every variant in a block of as many calls as make `block_ms`; there are at least `rounds[0]` and at
    most `rounds[1]` rounds. Two calls of each come before, unmeasured.
    """
    names = list(variants)
    cuda = device.type == "cuda"
    calls: dict[str, int] = {}
    total = 0.0
    for name in names:
        variants[name]()
        _block(variants[name], 1, device)
        ms, _ = _block(variants[name], 1, device)
        calls[name] = max(1, min(1000, round(block_ms / max(ms, 1e-3))))
        total += calls[name] * ms / 1000
    count = int(min(rounds[1], max(rounds[0], seconds / max(total, 1e-6))))
    timings = {name: Timing() for name in names}
    faults = dict.fromkeys(names, 0)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whichever variant it meets
    try:
        for i in range(count):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                before = page_faults()
                ms, launch = _block(variants[name], calls[name], device)
                faults[name] += page_faults() - before
                timings[name].samples.append(ms / calls[name])
                if launch is not None:
                    timings[name].launches.append(launch / calls[name])
    finally:
        if collecting:
            gc.enable()
    if not cuda:
        for name in names:
            timings[name].faults = faults[name] / (count * calls[name])
    return timings


def _block(call: Callable[[], object], times: int, device: torch.device) -> tuple[float, float | None]:
    """Milliseconds of `times` calls, and on CUDA what the host needed to launch them."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) * 1e3, None
    with torch.cuda.device(device):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        first.record()
        for _ in range(times):
            call()
        last.record()
        launch = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize(device)
        return first.elapsed_time(last), launch


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The step as one CUDA graph: what it takes without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_memory(
    call: Callable[[], object], release: Callable[[], object], device: torch.device, calls: int = 3
) -> float:
    """MiB that `call` needs at its peak over what the process holds between calls, gradients included.

    CUDA: of the caching allocator. CPU: resident pages, which also counts scratch that no PyTorch allocator sees; the
    peak of a process only rises, so call this in a process of its own for every variant. One call comes before, so that
    libraries' buffers and compiled code are not charged. `release` drops what a call leaves (gradients).
    """
    call()
    release()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    else:
        backends.empty_cache()  # what our engine keeps from the first call is part of what a call needs
    memory = PeakMemory(device)
    for _ in range(calls):
        call()
        release()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return memory.peak()


def age() -> float:
    """Seconds since this process began, importing included; 0 where the system does not tell, and in a process that has
    done other things before (a minute and more of them)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        seconds = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return seconds if 0 < seconds < 60 else 0.0
