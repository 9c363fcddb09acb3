"""Measures how much memory a stretch of work takes at its peak."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Measures MiB over what the process held when this was made: of CUDA's caching allocator, else resident pages.

    Linux keeps a high-water mark per process that can be set back (`/proc/self/clear_refs`), so that what imports took
    before does not hide what is measured; elsewhere the mark of the whole process stands in for it.
    """

    def __init__(self, device: torch.device):
        self.cuda = device if device.type == "cuda" else None
        _initialise_libraries(device)
        self.start = self.held()
        self.restart()

    def restart(self) -> None:
        """Measure the peak from here on."""
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def held(self) -> float:
        """Return the MiB in use now."""
        if self.cuda is not None:
            return torch.cuda.memory_allocated(self.cuda) / 2**20
        _trim()
        return _status("VmRSS") or _high_water()

    def kept(self) -> float:
        """Return the MiB in use now over the start: what stays between two steps."""
        return max(0.0, self.held() - self.start)

    def peak(self) -> float:
        """Return the highest MiB over the start since the last restart."""
        if self.cuda is not None:
            return torch.cuda.max_memory_allocated(self.cuda) / 2**20 - self.start
        return max(0.0, (_status("VmHWM") or _high_water()) - self.start)


def _initialise_libraries(device: torch.device) -> None:
    """Take a step of something tiny, so that threads, libraries and optimiser code are in memory from now on."""
    layer = torch.nn.Linear(16, 16, device=device)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.zeros(64, 16, device=device)).sin().sum().backward()
    optimizer.step()


def _trim() -> None:
    """Give freed heap pages back, so that what is resident is what is in use (glibc; elsewhere nothing)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def _status(field: str) -> float | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def _high_water() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
