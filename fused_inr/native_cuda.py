"""The CUDA C++ backend's library: where it comes from, and how nvcc builds it; `native.py` has the rest of the path.

As there: one build path for `setup.py` (`_C_cuda.so` beside this file) and for the first use, which compiles into the
private cache; a stamp with the versions of PyTorch and of the sources, and the architectures; a failure is a reason to
be told, never an exception on import.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from . import native

__all__ = ["architectures", "build", "compile_maps", "load", "nvcc", "status"]

#: compute capabilities, as 10 major + minor, that are built for where no device tells
SHIPPED = (80, 90, 100)
_PACKAGED = Path(__file__).resolve().parent / "_C_cuda.so"
_NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# unoptimised: what tests run is small, and compiling it is most of their time
_HOST_FLAGS = ("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-x", "c++", "-DFI_ONE_LANE=1")

_lock = threading.Lock()
_state: tuple[Path | None, str] | None = None
_user_libraries: dict[str, ctypes.CDLL] = {}


# -- compiler, architectures, stamp


def nvcc() -> tuple[list[str], str]:
    """nvcc as a command, and its version: `$CUDACXX`, else the path, `$CUDA_HOME`, /usr/local/cuda."""
    candidates: list[list[str]] = []
    if os.environ.get("CUDACXX"):
        candidates = [shlex.split(os.environ["CUDACXX"])]
    else:
        homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
        paths = [shutil.which("nvcc"), *(shutil.which("nvcc", path=str(Path(h, "bin"))) for h in homes if h)]
        candidates = [[path] for path in paths if path]
    if not candidates:
        raise RuntimeError("no nvcc found: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    command = candidates[0]
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"nvcc, {shlex.join(command)!r}, does not run: {error}") from error
    lines = [line.strip() for line in shown.splitlines() if "release" in line]
    return command, lines[0] if lines else "unknown"


def supported(command: Sequence[str]) -> list[int]:
    """The architectures that this nvcc compiles for, lowest first."""
    shown = subprocess.run([*command, "--list-gpu-arch"], capture_output=True, text=True, timeout=60).stdout
    return sorted(int(word.removeprefix("compute_")) for word in shown.split() if word[8:].isdigit())


def architectures(command: Sequence[str]) -> list[int]:
    """What to compile for: the devices of this machine, else `SHIPPED`; of each, the nearest that nvcc knows."""
    present = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    wanted = [10 * major + minor for major, minor in present] or list(SHIPPED)
    known = supported(command)
    nearest = {max((a for a in known if a <= w), default=0) for w in wanted} - {0}
    if not nearest:
        raise RuntimeError(f"nvcc compiles for none of the compute capabilities {sorted(set(wanted))}")
    return sorted(nearest)


def _runs_on(architecture: int, capability: int, newest: bool) -> bool:
    """Machine code runs on its own generation, from its own capability on; the newest, as PTX, on all later ones."""
    return architecture <= capability and (newest or architecture // 10 == capability // 10)


def _source_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    shared = ("primitives.h", "philox.h", "streams.h", "maps.h", "operands.h")
    generated = ("generated/activations.h", "generated/levels.h")
    for path in [*sorted((folder / "cuda").iterdir()), *(folder / name for name in (*shared, *generated))]:
        digest.update(f"{path.name}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _stamp(folder: Path) -> str:
    return f"torch {torch.__version__} cuda sources {_source_hash(folder)}"


def _usable(library: Path, stamp: str) -> bool:
    """Whether a library is of these versions, and has code for every device here."""
    try:
        found, _, built = (native.stamp_of(library) or "").partition(" for ")
        archs = sorted(int(a) for a in built.split())
    except (OSError, ValueError):
        return False
    if found != stamp or not archs:
        return False
    present = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return all(any(_runs_on(a, 10 * major + minor, a == archs[-1]) for a in archs) for major, minor in present)


# -- building


def _nvcc_command(command: Sequence[str], archs: Sequence[int]) -> list[str]:
    host, _ = native.compiler()
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    code.append(f"-gencode=arch=compute_{max(archs)},code=compute_{max(archs)}")
    return [*command, "-ccbin", host[0], *_NVCC_FLAGS, *code]


def _ops_flags(stamp: str) -> list[str]:
    include = Path(torch.__file__).resolve().parent / "include"
    return [
        *native.OPS_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f'-DFUSED_INR_STAMP="{stamp}"',
        "-isystem",
        str(include),
        "-isystem",
        str(include / "torch" / "csrc" / "api" / "include"),
    ]


def build(
    target: Path,
    verbose: bool = False,
    archs: Sequence[int] | None = None,
    on_host: bool = False,
    checked: bool = False,
) -> Path:
    """Compile the backend against the installed PyTorch into the library `target`, and return it.

    `checked` as of `native.build`. `on_host` compiles the device's functions for the processor, as
    `torch.ops.fused_inr_cuda_on_host`: that is for tests. Raises RuntimeError with the first error of a compiler.
    """
    target, folder = Path(target), native.sources()
    cuda = folder / "cuda"
    host, _ = native.compiler()
    if on_host:
        fused = ["-mfma"] if torch.backends.cpu.get_cpu_capability().startswith("AVX") else []
        kernels, link, archs = [*host, *_HOST_FLAGS, *fused], [*host, "-shared"], [0]
    else:
        command, _ = nvcc()
        archs = architectures(command) if archs is None else sorted(archs)
        kernels = _nvcc_command(command, archs)
        link = [*command, "-ccbin", host[0], "-shared", "-cudart", "static"]
    stamp = f"{_stamp(folder)} for {' '.join(map(str, archs))}"
    ops = [*host, *_ops_flags(stamp), *(["-DFUSED_INR_CUDA_ON_HOST"] if on_host else [])]
    units = [
        ([*kernels, "-DFUSED_INR_SCALAR=double"], "maps.cu", "maps_double"),
        ([*kernels, "-DFUSED_INR_SCALAR=float"], "maps.cu", "maps_float"),
        (kernels, "moments.cu", "moments"),
        *((ops, f"{name}.cpp", f"ops_{name}") for name in ("linear_act", "library", "moments")),
        (kernels, "probe.cu", "probe"),
    ]
    with native.Build(target, verbose) as build:
        objects = [str(build.folder / f"{name}.o") for _, _, name in units]
        build.run(
            [[*flags, "-c", str(cuda / source), "-o", output] for (flags, source, _), output in zip(units, objects)]
        )
        library = build.folder / target.name
        torch_libraries = ["-L" + str(Path(torch.__file__).resolve().parent / "lib"), "-ltorch_cpu", "-lc10", "-ldl"]
        build.run([[*link, *objects, "-o", str(library), *torch_libraries]])
        return build.publish(library, checked)


def cached_library(base: Path | None = None) -> Path:
    """The backend's library in the cache, compiled now if it is not there."""
    stamp, (command, version), (_, host) = _stamp(native.sources()), nvcc(), native.compiler()
    archs = architectures(command)
    digest = native.digest(stamp, version, host, platform.machine(), *map(str, archs))
    library = native.cache_folder(base) / f"cuda_{digest}.so"
    if not native.whole(library):
        with native.one_at_a_time(library.with_suffix(".lock"), patience=900.0):
            if not native.whole(library):
                native.logger.warning("fused_inr: compiling the CUDA backend (minutes, once) into %s", library)
                build(library, archs=archs, checked=True)
    return library


# -- loading


def absent() -> str:
    """Why this process cannot run CUDA kernels at all; empty when it can."""
    if torch.version.hip:
        return "ROCm devices have not been tried"
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device"


def load(cache: Path | None = None) -> bool:
    """Make `torch.ops.fused_inr_cuda` available: from the installed library, the cache, or by compiling it now.

    The outcome is remembered; `status()` tells it. Never raises.
    """
    global _state
    with _lock:
        if _state is None:
            try:
                if reason := absent():
                    raise RuntimeError(reason)
                packaged = cache is None and _usable(_PACKAGED, _stamp(native.sources()))
                library = native.open_library(
                    "fused_inr_cuda", _PACKAGED if packaged else None, lambda: cached_library(cache)
                )
                _state = (library, "")
            except Exception as error:  # whatever it is, another backend serves instead, and says why
                _state = (None, f"{error}")
        return _state[0] is not None


def status() -> tuple[Path | None, str]:
    """The loaded library, or None and the reason why there is none."""
    if _state is None:
        return None, absent() or "not loaded yet"
    return _state


# -- a user's formula


def compile_maps(key: str, source: str, cache: Path | None = None) -> None:
    """Compile the generated C++ `source` of one activation (`printing.cpp_source`), and register it under `key`.

    Raises RuntimeError where the backend is not available, or the source has an error.
    """
    if not load():
        raise RuntimeError(f"the CUDA backend is not available: {status()[1]}")
    folder, (command, version) = native.sources(), nvcc()
    archs = architectures(command)
    digest = native.digest(_source_hash(folder), version, platform.machine(), *map(str, archs), source)
    library = native.cache_folder(cache) / f"cuda_maps_{digest}.so"
    if not native.whole(library):
        build_maps(library, source, archs)
    loaded = ctypes.CDLL(str(library))
    tables = (ctypes.c_int64 * 3)()
    loaded.fused_inr_cuda_user_maps.restype = None
    loaded.fused_inr_cuda_user_maps(tables)
    _user_libraries[key] = loaded  # the backend keeps addresses into it
    torch.ops.fused_inr_cuda.register_activation(key, *tables)


def build_maps(library: Path, source: str, archs: Sequence[int]) -> Path:
    """Compile a user's formula for `archs` (none: for the host, for tests) into `library`."""
    folder, (host, _) = native.sources(), native.compiler()
    kernels = _nvcc_command(nvcc()[0], archs) if archs else [*host, *_HOST_FLAGS]
    link = [*nvcc()[0], "-ccbin", host[0], "-cudart", "static"] if archs else host
    with native.Build(library) as build:
        header, built, table = build.folder / "maps.h", build.folder / library.name, build.folder / "table.o"
        header.write_text(source)
        names = [f'-DFUSED_INR_MAPS_HEADER="{header}"', f"-I{folder}"]
        units = [
            ("maps.cu", ["-DFUSED_INR_SCALAR=float"]),
            ("maps.cu", ["-DFUSED_INR_SCALAR=double"]),
            ("moments.cu", []),
        ]
        objects = [str(build.folder / f"{i}.o") for i in range(len(units))]
        build.run(
            [
                *(
                    [*kernels, *names, *scalar, "-c", str(folder / "cuda" / unit), "-o", output]
                    for (unit, scalar), output in zip(units, objects, strict=True)
                ),
                [*host, "-O1", "-fPIC", "-c", str(folder / "cuda" / "user_maps.cpp"), "-o", str(table)],
            ]
        )
        build.run([[*link, "-shared", *objects, str(table), "-o", str(built)]])
        return build.publish(built)
