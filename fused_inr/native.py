"""The native CPU engine: where its library comes from, and how it is built.

One build path serves `setup.py`, which puts `_C.so` beside this file, and the first use in an installation without
one, which compiles into a private cache. A library carries a stamp (the versions of PyTorch and of the sources); one
with another stamp is never loaded. A failure is a reason to be told, never an exception on import. With
FUSED_INR_NATIVE=0 in the environment nothing is looked for or built: where only a GPU is of interest, building would
be time lost.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch

__all__ = ["build", "compile_maps", "load", "status"]

_PACKAGED = Path(__file__).resolve().parent / "_C.so"
_X86 = platform.machine().lower() in ("x86_64", "amd64")

#: capability: (bytes of a vector, compiler flags). "wide" runs AVX-512's code on AVX2, for tests.
_CAPABILITIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "generic": (16, ()),
    "avx2": (32, ("-mavx2", "-mfma", "-mf16c")),
    "avx512": (64, ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c")),
    "wide": (64, ("-mavx2", "-mfma", "-mf16c", "-DFUSED_INR_EMULATE_BFLOAT16")),
}
_SHIPPED = ("generic", "avx2", "avx512") if _X86 else ("generic",)

# NaN, infinities and signed zeros keep their meaning: no -ffast-math.
_KERNEL_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
OPS_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-g0")

logger = logging.getLogger("fused_inr")
_lock = threading.Lock()
_state: tuple[Path | None, str] | None = None
_user_libraries: dict[str, ctypes.CDLL] = {}


# -- sources, compiler, stamp


def sources() -> Path:
    """The folder of the C++ sources: `fused_inr/_csrc` where installed, `csrc` in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_csrc", here.parent / "csrc"):
        if (folder / "library.cpp").is_file():
            return folder
    raise RuntimeError("the C++ sources of the native engine are not installed")


def _source_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp")):
        if path.relative_to(folder).parts[0] == "cuda":
            continue
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _stamp(folder: Path) -> str:
    return f"torch {torch.__version__} sources {_source_hash(folder)}"


def stamp_of(library: Path) -> str | None:
    """The stamp in a library file, read without loading it."""
    data = library.read_bytes()
    begin = data.find(b"FUSED_INR_STAMP=")
    if begin < 0:
        return None
    begin += len(b"FUSED_INR_STAMP=")
    return data[begin : data.index(b";", begin)].decode()


def _usable(library: Path, stamp: str) -> bool:
    try:
        return stamp_of(library) == stamp
    except (OSError, ValueError):
        return False


def compiler() -> tuple[list[str], str]:
    """The C++ compiler as a command, and its version: `$CXX`, else g++, clang++ or c++."""
    if sys.platform == "win32":
        raise RuntimeError("the native engine needs GCC or Clang; it is not built on Windows")
    if os.environ.get("CXX"):
        candidates = [shlex.split(os.environ["CXX"])]
    else:
        candidates = [[name] for name in ("g++", "clang++", "c++") if shutil.which(name)]
    if not candidates:
        raise RuntimeError("no C++ compiler (g++, clang++ or c++) was found; install one, or set CXX")
    command = candidates[0]
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"the C++ compiler {shlex.join(command)!r} does not run: {error}") from error
    return command, shown.splitlines()[0] if shown else "unknown"


# -- the private cache


def cache_folder(base: Path | None = None) -> Path:
    """A folder for compiled code that only this user can write; `base` replaces the user's cache folder.

    Raises RuntimeError where the folder belongs to somebody else or others can write to it: what lies there is loaded
    as code.
    """
    root = base or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "fused_inr"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeError(f"{folder} is a link, not a folder of its own; compiled code is not kept there")
    if found.st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; compiled code is not loaded from there")
    if found.st_mode & 0o022:
        raise RuntimeError(
            f"{folder} can be written by others (chmod 700 mends it); compiled code is not loaded from there"
        )
    return folder


@contextmanager
def one_at_a_time(path: Path, patience: float = 1200.0) -> Iterator[None]:
    """Spares several processes the same work. The kernel frees the lock of a killed process, and nobody waits for ever:
    after `patience` seconds two builds run side by side, which is only slower."""
    with open(path, "w") as lock:
        until = time.monotonic() + patience
        while not _try_lock(lock) and time.monotonic() < until:
            time.sleep(0.2)
        yield


def _try_lock(file: IO) -> bool:
    """Take the lock on an open file, until it is closed or its process ends; False where another holds it."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def digest(*parts: str) -> str:
    """Names a compilation by what it is made of."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _sum_file(library: Path) -> Path:
    """Beside a library in the cache: the SHA-256 of its bytes."""
    return library.with_name(f"{library.name}.sha256")


def whole(library: Path) -> bool:
    """Whether a library in the cache has the bytes that it was built with; a crash or a full disk may have cut it."""
    try:
        return _sum_file(library).read_text().strip() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def cached_library(base: Path | None = None, capabilities: Sequence[str] = _SHIPPED) -> Path:
    """The engine's library in the cache, compiled now if it is not there as it was built."""
    stamp, (_, version) = _stamp(sources()), compiler()
    name = digest(stamp, version, platform.machine(), *capabilities)
    library = cache_folder(base) / f"engine_{name}.so"
    if not whole(library):
        with one_at_a_time(library.with_suffix(".lock")):
            if not whole(library):
                logger.warning("fused_inr: compiling the native CPU engine (about a minute, once) into %s", library)
                build(library, capabilities=capabilities, checked=True)
    return library


# -- building


class Build:
    """A temporary folder beside the library `target` in which compilers work, and the way of their result to `target`.

    Two builds at once, or one that ends early, leave a whole library or none. On an error or Ctrl-C the compilers that
    still run are ended and the folder is removed. A killed process cannot do that: each build holds a lock on its
    folder, which goes with its process, and the next build beside it removes folders that nobody holds.

    >>> with Build(target) as build:
    ...     build.run([["g++", "-c", "a.cpp", "-o", str(build.folder / "a.o")]])
    ...     build.publish(build.folder / "a.so")
    """

    _PREFIX, _LOCK = ".build_", "lock"

    def __init__(self, target: Path, verbose: bool = False):
        self.target, self.verbose = Path(target), verbose
        self._running: set[subprocess.Popen] = set()
        self._stopped = False
        self._guard = threading.Lock()

    def __enter__(self) -> Build:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=self._PREFIX, dir=self.target.parent))
        self._lock = open(self.folder / self._LOCK, "w")
        _try_lock(self._lock)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def run(self, commands: Sequence[Sequence[str]]) -> None:
        """Run compilers, several at a time. Raises RuntimeError with the first error of the first that fails."""
        with ThreadPoolExecutor(_workers()) as pool:
            futures = [pool.submit(self._run, command) for command in commands]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._stop()
                for future in futures:
                    future.cancel()
                raise

    def publish(self, built: Path, checked: bool = True) -> Path:
        """Put what was built in the place of `target`; `checked` also writes the sum by which `whole` knows it."""
        total = _sum_file(self.target)
        if checked:
            written = self.folder / total.name
            written.write_text(hashlib.sha256(built.read_bytes()).hexdigest() + "\n")
            total.unlink(missing_ok=True)
        os.replace(built, self.target)
        if checked:
            os.replace(written, total)
        return self.target

    def _run(self, command: Sequence[str]) -> None:
        if self.verbose:
            print(shlex.join(command), file=sys.stderr, flush=True)
        with self._guard:
            if self._stopped:
                raise RuntimeError("the build was stopped")
            try:
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # nvcc has children of its own: they end together
                )
            except OSError as error:
                raise RuntimeError(f"the compiler could not be started: {error}") from error
            self._running.add(process)
        output, errors = process.communicate()
        with self._guard:
            self._running.discard(process)
        if process.returncode:
            lines = (errors or output).strip().splitlines()
            first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
            raise RuntimeError(f"{command[0]} failed with exit code {process.returncode}: {first}")
        if self.verbose and errors:
            print(errors, file=sys.stderr, flush=True)

    def _stop(self) -> None:
        """End the compilers that run, and start no more."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _sweep(self) -> None:
        for folder in self.target.parent.glob(f"{self._PREFIX}*"):
            try:
                with open(folder / self._LOCK, "r+") as lock:
                    abandoned = _try_lock(lock)
            except OSError:
                # being made or removed at this moment, or left by a version that held no lock
                abandoned = folder.is_dir() and time.time() - folder.stat().st_mtime > 86_400
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)


def _kernel_flags(capability: str) -> list[str]:
    size, machine = _CAPABILITIES[capability]
    names = [f"-DFUSED_INR_CAPABILITY={capability}", f"-DFUSED_INR_VECTOR_BYTES={size}"]
    return [*_KERNEL_FLAGS, *machine, *names]


def _workers() -> int:
    return max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))


def build(target: Path, verbose: bool = False, capabilities: Sequence[str] = _SHIPPED, checked: bool = False) -> Path:
    """Compile the engine against the installed PyTorch into the library `target`, and return it.

    `checked` writes the sum by which `whole` knows the library beside it: what lies in the cache has one.
    Raises RuntimeError with the first error of the compiler.
    """
    target = Path(target)
    folder = sources()
    command, _ = compiler()
    torch_folder = Path(torch.__file__).resolve().parent
    include = torch_folder / "include"
    engines = " ".join(f"X({name})" for name in capabilities)
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # at::parallel_for is a header: without, it is serial
    ops = [
        *OPS_FLAGS,
        *openmp,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-DFUSED_INR_ENGINES={engines}",
        f'-DFUSED_INR_STAMP="{_stamp(folder)}"',
        "-isystem",
        str(include),
        "-isystem",
        str(include / "torch" / "csrc" / "api" / "include"),
    ]
    units: list[tuple[str, list[str], str]] = []  # the longest first
    for source in ("linear_act", "mlp", "library", "moments"):
        units.append((f"{source}.cpp", ops, f"ops_{source}"))
    for name in reversed(capabilities):
        for scalar in ("float", "double"):
            units.append(
                ("cpu/maps.cpp", [*_kernel_flags(name), "-O2", f"-DFUSED_INR_SCALAR={scalar}"], f"maps_{scalar}_{name}")
            )
        for source in ("mlp_training", "mlp_forward", "linear_act", "moments", "engine"):
            units.append((f"cpu/{source}.cpp", [*_kernel_flags(name), "-O3"], f"{source}_{name}"))

    with Build(target, verbose) as build:
        objects = [str(build.folder / f"{name}.o") for _, _, name in units]
        build.run(
            [
                [*command, *flags, "-c", str(folder / source), "-o", output]
                for (source, flags, _), output in zip(units, objects)
            ]
        )
        library = build.folder / target.name
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", *openmp, *undefined]
        build.run([[*command, "-shared", *objects, "-o", str(library), *libraries]])
        return build.publish(library, checked)


# -- loading


def open_library(operators: str, packaged: Path | None, cached: Callable[[], Path]) -> Path:
    """Load the library that registers `torch.ops.<operators>`: the `packaged` one, or where there is none, or it is
    damaged, the one that `cached` finds or builds. Returns which. Raises what the last attempt raises."""
    # one process, one engine: a second registration of its operators would end the process
    if packaged is not None:
        try:
            if not hasattr(getattr(torch.ops, operators), "stamp"):
                torch.ops.load_library(str(packaged))
            return packaged
        except OSError as error:
            logger.warning("fused_inr: %s is damaged (%s); one in the cache takes its place", packaged, error)
    library = cached()
    if not hasattr(getattr(torch.ops, operators), "stamp"):
        torch.ops.load_library(str(library))
    return library


def _packaged(cache: Path | None) -> Path | None:
    return _PACKAGED if cache is None and _usable(_PACKAGED, _stamp(sources())) else None


def load(cache: Path | None = None) -> bool:
    """Make `torch.ops.fused_inr_native` available: from the installed library, the cache, or by compiling it now.

    The outcome is remembered; `status()` tells it. Never raises.
    """
    global _state
    with _lock:
        if _state is None:
            try:
                if os.environ.get("FUSED_INR_NATIVE") == "0":
                    raise RuntimeError("FUSED_INR_NATIVE=0 leaves the native engine out")
                library = open_library("fused_inr_native", _packaged(cache), lambda: cached_library(cache))
                _state = (library, "")
            except Exception as error:  # whatever it is, the reference serves instead, and says why
                _state = (None, f"{error}")
        return _state[0] is not None


def status() -> tuple[Path | None, str]:
    """The loaded library, or None and the reason why there is none."""
    if _state is None:
        return None, "not loaded yet"
    return _state


# -- a user's formula


def compile_maps(key: str, source: str, cache: Path | None = None) -> ctypes.Array:
    """Compile the generated C++ `source` of one activation, and register it with the engine under `key`.

    `source` is what `activations.printing.cpp_source` prints for one map. Returns the table: branches, outputs,
    parameters, then the addresses of its functions. Raises RuntimeError where there is no engine, no compiler, or an
    error in the source.
    """
    if not load():
        raise RuntimeError(f"the native engine is not available: {status()[1]}")
    ops = torch.ops.fused_inr_native
    capability = ops.capability()
    folder = sources()
    command, version = compiler()
    name = digest(_source_hash(folder), version, platform.machine(), capability, source)
    library = cache_folder(cache) / f"maps_{name}.so"
    if not whole(library):
        with Build(library) as build:
            header, built = build.folder / "maps.h", build.folder / library.name
            header.write_text(source)
            flags = [*_kernel_flags(capability), "-O2", f'-DFUSED_INR_MAPS_HEADER="{header}"', f"-I{folder}"]
            build.run([[*command, *flags, "-shared", str(folder / "cpu" / "user_maps.cpp"), "-o", str(built)]])
            build.publish(built)
    loaded = ctypes.CDLL(str(library))
    table = (ctypes.c_int64 * ctypes.c_int.in_dll(loaded, "fused_inr_user_maps_size").value)()
    loaded.fused_inr_user_maps.restype = None
    loaded.fused_inr_user_maps(table)
    _user_libraries[key] = loaded  # the engine keeps addresses into it
    ops.register_activation(key, table[0], table[1], table[2], list(table[3:]))
    return table
