"""Which assembler (ptxas) makes the machine code of Hopper's kernels: never one that is known to get products wrong.

ptxas 12.8, which Triton 3.6 to 3.8 call for compute capability 9.0, computes the matrix descriptor of some wgmma from a
uniform register that holds something else: such a product reads other shared memory than it should, without a word, or
memory that does not exist. On an H200 every fifth configuration of the network kernels gave wrong gradients or an
illegal access for that reason (`bench/ptx/machine_code.py` shows it in the machine code, `tests/ptx/
test_machine_code.py` holds it fast); the same is reported in issue 11366 of triton-lang/triton and pull request 1262 of
fla-org/flash-linear-attention. The assembler that Triton brings for Blackwell is a later one, 12.9 or 13, makes code for
Hopper too, and does not do it: compiling goes to that one where Triton's own choice is 12.8 or older.
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
        f"ptxas {own_version} ({own_path}) makes Hopper kernels that compute wrong numbers: install CUDA's ptxas 12.9 or "
        "later and set TRITON_PTXAS_PATH to it, or a Triton that brings one"
    )


def _own():
    """The assembler that this Triton calls for Hopper; 3.9 calls the one for Blackwell itself."""
    from triton.backends.nvidia import compiler

    return compiler.get_ptxas(HOPPER)


@contextlib.contextmanager
def sound() -> Iterator[None]:
    """Within the block, what Triton compiles for Hopper is assembled by a sound ptxas.

    Raises:
        RuntimeError: there is none.
    """
    runtime, nvidia = triton.knobs.runtime, triton.knobs.nvidia
    own, other = _own(), nvidia.ptxas_blackwell
    path = instead(own.path, own.version, other.path, other.version)
    if not path:
        yield
        return
    mark = f"fused_inr: assembled by ptxas {other.version}"
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
