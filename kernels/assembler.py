"""Which assembler (ptxas) makes the machine code of Hopper's kernels: never one that is known to get products wrong.

ptxas 12.8, which Triton 3.6 to 3.8 call for compute capability 9.0, computes the matrix descriptor of some wgmma from a
uniform register that holds something else. Such a product reads other shared memory than it should, without a word, or
memory that does not exist: on an H200, every fifth configuration of the network kernels gave wrong gradients or an
illegal access. `bench/ptx/machine_code.py` finds such products in the machine code. Issue 11366 of triton-lang/triton
and pull request 1262 of fla-org/flash-linear-attention report the same. The assembler that Triton brings for Blackwell
(12.9, or 13) makes code for Hopper too and does it right: compiling goes there where Triton's own choice is older.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator

import triton

#: the first release of ptxas whose wgmma descriptors are right
SOUND = (12, 9)
HOPPER = 90


def release(version: str) -> tuple[int, int]:
    """Major and minor release, from what a tool says of itself ("12.8")."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.lru_cache
def instead(own_path: str, own_version: str, other_path: str, other_version: str) -> str:
    """The assembler to be called in place of Triton's own choice: a path; empty where that one is sound."""
    if release(own_version) >= SOUND:
        return ""
    if release(other_version) >= SOUND:
        return other_path
    raise RuntimeError(
        f"ptxas {own_version} ({own_path}) makes Hopper kernels that compute wrong numbers: set TRITON_PTXAS_PATH to "
        "the ptxas of CUDA 12.9 or later, or install a Triton that brings one"
    )


def _own():
    """The assembler that this Triton calls for Hopper; 3.9 calls the one for Blackwell itself."""
    from triton.backends.nvidia import compiler

    return compiler.get_ptxas(HOPPER)


def for_hopper() -> str:
    """The assembler that Hopper's kernels go to: a path.

    Raises:
        RuntimeError: none that is here is sound.
    """
    own, other = _own(), triton.knobs.nvidia.ptxas_blackwell
    return instead(own.path, own.version, other.path, other.version) or own.path


@contextlib.contextmanager
def sound() -> Iterator[None]:
    """Within the block, what Triton compiles for Hopper is assembled by a sound ptxas.

    Raises:
        RuntimeError: there is none.
    """
    runtime, nvidia = triton.knobs.runtime, triton.knobs.nvidia
    path = for_hopper()
    if path == _own().path:
        yield
        return
    mark = f"fused_inr: assembled by ptxas {nvidia.ptxas_blackwell.version}"
    former = runtime.add_stages_inspection_hook

    def stages(*args):
        """Triton asks for a key without arguments, and with them what is to be done otherwise."""
        theirs = former(*args) if former is not None else None
        if not args:
            return tuple(f"{mark} {x}" for x in theirs) if theirs else (mark, repr(mark))
        assemble = args[1]["cubin"]

        def cubin(source, metadata):
            with nvidia.scope():
                nvidia.ptxas = path
                return assemble(source, metadata)

        args[1]["cubin"] = cubin
        return theirs

    runtime.add_stages_inspection_hook = stages
    try:
        yield
    finally:
        runtime.add_stages_inspection_hook = former


def for_target(target) -> contextlib.AbstractContextManager[None]:
    """`sound()` for a target of Triton's that needs it (backend "cuda", compute capability 9.0), else nothing."""
    if target.backend == "cuda" and target.arch == HOPPER:
        return sound()
    return contextlib.nullcontext()
