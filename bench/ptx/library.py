"""The executor's library: compiled once, into the private cache, from the C++ files beside this one."""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from pathlib import Path

from ... import native

SOURCES = Path(__file__).resolve().parent
#: AVX2 is what a CPU of the last ten years has; NaN, infinities and signed zeros keep their meaning, and only what
#: PTX calls a fused multiply-add is one
FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fPIC", "-fvisibility=hidden", "-shared",
)  # fmt: skip
_logger = logging.getLogger("fused_inr")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"avx2", "fma", "f16c"}  # no such file: the compiler and the first call will tell
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))


def unavailable() -> str:
    """Why PTX cannot be executed here; empty when it can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the executor of PTX needs an x86-64 processor, this one is {platform.machine()}"
    if missing := {"avx2", "fma", "f16c"} - _cpu_flags():
        return f"the executor of PTX needs a processor with AVX2, FMA and F16C; {', '.join(sorted(missing))} missing"
    try:
        native.compiler()
    except RuntimeError as error:
        return f"the executor of PTX is compiled when it is first used: {error}"
    return ""


def build(target: Path) -> Path:
    """Compile the executor into the library `target`; whole or not at all. Raises RuntimeError with the first error."""
    command, _ = native.compiler()
    with native.Build(target) as build:
        built = build.folder / target.name
        build.run([[*command, *FLAGS, str(SOURCES / "engine.cpp"), "-o", str(built)]])
        return build.publish(built)


@functools.cache
def load() -> ctypes.CDLL:
    """The executor, from the cache or compiled now. Raises RuntimeError with the reason where it cannot run."""
    if reason := unavailable():
        raise RuntimeError(reason)
    sources = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".h", ".inc"))
    _, version = native.compiler()
    name = native.digest(version, *FLAGS, *(f"{p.name}\0{p.read_text()}" for p in sources))
    library = native.cache_folder() / f"ptx_{name}.so"
    if not native.whole(library):
        with native.one_at_a_time(library.with_suffix(".lock"), patience=300.0):
            if not native.whole(library):
                _logger.info("fused_inr: compiling the executor of PTX (seconds, once) into %s", library)
                build(library)
    return ctypes.CDLL(str(library))
