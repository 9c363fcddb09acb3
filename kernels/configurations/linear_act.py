"""Block sizes: data, one predicate of validity, and `pick`, which is a look-up and never a measurement.

The lists here are general; what an architecture does better otherwise stands in `linear_act_table.py`, which `fused-inr
bench tune` rewrites. They hold what `fused-inr bench static` has compiled for every architecture without a spill; the
row count is in none of the keys (it may change every step), so no new kernel is compiled when it does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from .linear_act_table import TUNED, Key, Numbers

K, V = TypeVar("K"), TypeVar("V")

#: Kinds of a tile's product: tensor cores; K of 1 to 8 and N of 1 to 4 by multiply-adds; none (z is read).
DOT, NARROW_K, NARROW_N, MAP = range(4)
KINDS = ("dot", "narrow_k", "narrow_n", "map")  # their names in the tables
NARROW_K_LIMIT, NARROW_N_LIMIT = 8, 4

#: Programs that a weight gradient's row splits aim at: two for each multiprocessor of an H200.
TARGET_PROGRAMS = 264

#: Shared memory that a program may take, in bytes; architectures by what their kernels may assume.
SHARED_LIMIT = {"sm80": 163 * 1024, "sm86": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
ARCHITECTURES = tuple(SHARED_LIMIT)
#: The compute capability that each class is compiled for by the static report.
CAPABILITY = {"sm80": 80, "sm86": 86, "sm90": 90, "sm100": 100}
#: Multiprocessors of the largest device of each class: A100, RTX 4090, H200, B200.
MULTIPROCESSORS = {"sm80": 108, "sm86": 128, "sm90": 132, "sm100": 148}


@dataclass(frozen=True)
class LayerConfig:
    """Tile [block_m, block_n] with a reduction by block_k (weight gradient: tile [block_n, block_k], rows by
    block_m)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    dot: bool = True

    def options(self) -> dict[str, int | bool]:
        """Launch arguments. Contraction of a*b + c is asked for explicitly: Triton is about to change its default."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True)
class SumConfig:
    """A partial sum of `chunk` rows, read in blocks [block_s, block_l]."""

    block_s: int
    block_l: int
    chunk: int
    num_warps: int


SUM = SumConfig(block_s=32, block_l=64, chunk=256, num_warps=4)


def valid(config: LayerConfig, arch: str, op: str, kind: int, branches: int, itemsize: int, cls: str) -> bool:
    """Whether a configuration can be right: powers of two, tensor-core minima, operands within shared memory,
    accumulators within a thread's registers and (sm_100) a multiprocessor's tensor memory.

    sm_100, several branches, TF32: x is rounded in registers, goes to tensor memory, and all branches' products read it
    there. With more than one stage Triton (3.7.1) writes the next x as soon as the first branch's product is done, and
    the others may still read the one before: `bench.ptx` finds it. With one stage it waits for all of them.
    """
    c = config
    if arch == "sm100" and op != "weight_grad" and kind == DOT and cls == "tf32" and branches > 1 and c.num_stages > 1:
        return False
    powers = (c.block_m, c.block_n, c.num_warps) + ((c.block_k,) if kind != NARROW_K or op == "weight_grad" else ())
    if any(v < 1 or v & (v - 1) for v in powers) or c.num_stages < 1 or c.num_warps > 16:
        return False
    threads = 32 * c.num_warps
    if kind == DOT:
        if min(c.block_m, c.block_n, c.block_k) < 16:
            return False
        rows, columns = (c.block_n, c.block_k) if op == "weight_grad" else (c.block_m, c.block_n)
        operands = (c.block_m * (c.block_n + c.block_k)) if op == "weight_grad" else (
            c.block_k * (c.block_m + branches * c.block_n)
        )  # fmt: skip
        if arch in SHARED_LIMIT and operands * itemsize * c.num_stages > SHARED_LIMIT[arch]:
            return False
        if arch == "sm100" and branches * columns * max(1, rows // 128) > 512:
            return False
        return branches * rows * columns // threads <= 128
    if kind == NARROW_N or op == "weight_grad":
        return branches * c.block_m * c.block_n * c.block_k // threads <= 128
    return branches * c.block_m * c.block_n // threads <= 64


# (block_m, block_n, block_k, num_warps, num_stages) for the largest width; narrower layers halve block_n, see `pick`.
# Keys: (operation, class of type, branches up to). Classes: half = bfloat16 and float16, x3 = tf32x3 and bf16x3.
_DOT: dict[tuple[str, str, int], tuple[int, int, int, int, int]] = {
    ("forward", "half", 1): (128, 128, 64, 8, 3),
    ("forward", "half", 2): (128, 64, 32, 8, 3),
    ("forward", "half", 4): (128, 32, 64, 8, 3),
    ("forward", "tf32", 1): (128, 128, 32, 8, 3),
    ("forward", "tf32", 2): (128, 64, 32, 8, 3),
    ("forward", "tf32", 4): (128, 32, 32, 8, 3),
    ("forward", "x3", 1): (128, 64, 32, 8, 2),
    ("forward", "x3", 2): (128, 32, 32, 8, 2),
    ("forward", "x3", 4): (64, 32, 16, 8, 2),
    ("forward", "ieee", 1): (64, 64, 16, 8, 2),
    ("forward", "ieee", 2): (64, 32, 16, 8, 2),
    ("forward", "ieee", 4): (32, 32, 16, 8, 2),
    ("gz", "half", 1): (128, 64, 64, 8, 3),
    ("gz", "half", 2): (128, 32, 64, 8, 3),
    ("gz", "half", 4): (64, 32, 64, 8, 3),
    ("gz", "tf32", 1): (128, 64, 32, 8, 3),
    ("gz", "tf32", 2): (128, 32, 32, 8, 3),
    ("gz", "tf32", 4): (64, 32, 32, 8, 3),
    ("gz", "x3", 1): (128, 32, 32, 8, 2),
    ("gz", "x3", 2): (64, 32, 32, 8, 2),
    ("gz", "x3", 4): (64, 16, 32, 8, 2),
    ("gz", "ieee", 1): (64, 32, 16, 8, 2),
    ("gz", "ieee", 2): (32, 32, 16, 8, 2),
    ("gz", "ieee", 4): (32, 16, 16, 8, 2),
    ("weight_grad", "half", 1): (64, 128, 128, 8, 3),
    ("weight_grad", "tf32", 1): (32, 128, 64, 8, 3),
    ("weight_grad", "x3", 1): (32, 64, 64, 8, 2),
    ("weight_grad", "ieee", 1): (16, 64, 64, 8, 2),
}  # fmt: skip

# By branches; NARROW_K takes K itself for block_k, NARROW_N the power of two above N for block_n, MAP has no block_k.
_OTHERS: dict[int, dict[int, tuple[int, int, int, int, int]]] = {
    NARROW_K: {1: (64, 64, 0, 4, 1), 2: (32, 64, 0, 4, 1), 4: (16, 32, 0, 4, 1)},
    NARROW_N: {1: (32, 0, 32, 4, 1), 2: (16, 0, 32, 4, 1), 4: (16, 0, 32, 4, 1)},
    MAP: {1: (64, 32, 0, 4, 1), 2: (32, 32, 0, 4, 1), 4: (16, 32, 0, 4, 1)},
}


def numbers(key: Key) -> Numbers:
    """What the tables say: `linear_act_table.py`, or else the general lists here."""
    _, op, kind, cls, b = key
    return TUNED.get(key) or (_DOT[op, cls, b] if kind == "dot" else _OTHERS[KINDS.index(kind)][b])


def kind(N: int, K: int) -> int:
    """How a product with N columns (of one branch) over K is computed."""
    if K <= NARROW_K_LIMIT:
        return NARROW_K
    return NARROW_N if N <= NARROW_N_LIMIT else DOT


#: Where PyTorch's library computes the product, with the map as a pointwise kernel: (architecture or "", operation,
#: class of type) -> the least columns and rows of the weight (of its gradient: rows) from which it is the faster one.
#: ieee: everywhere.
LIBRARY: dict[tuple[str, str, str], int] = {
    ("", "forward", "ieee"): 16,
    ("", "input_grad", "ieee"): 16,
    ("", "weight_grad", "ieee"): 16,
    # measured on an H200 (bench/results/2026-11-26-nvidia-h200): cuBLAS from width 64 on, 1.1 to 2 times as fast
    ("sm90", "input_grad", "half"): 64,
    ("sm90", "weight_grad", "half"): 64,
    ("sm90", "forward", "tf32"): 256,
    ("sm90", "input_grad", "tf32"): 128,
    ("sm90", "weight_grad", "tf32"): 64,
}


def library(arch: str, op: str, dtype: torch.dtype, precision: str, N: int, K: int) -> bool:
    """Whether PyTorch's library is to compute a product with a weight [N, K]: op is "forward", "input_grad",
    "weight_grad"."""
    cls = type_class(dtype, precision)
    least = LIBRARY.get((arch, op, cls), LIBRARY.get(("", op, cls)))
    return least is not None and (N if op == "weight_grad" else min(N, K)) >= least


@functools.cache
def _arch_of_cuda(index: int) -> str:
    return arch_of_capability(*torch.cuda.get_device_capability(index))


def arch_of_capability(major: int, minor: int) -> str:
    """The class of a compute capability: 8.0, 8.7; 8.6, 8.9, 12.x (99 KB of shared memory); 9.x; 10.x, 11.x."""
    if major in (10, 11):
        return "sm100"
    if major == 9:
        return "sm90"
    return "sm80" if (major, minor) in ((8, 0), (8, 7)) else "sm86"


def arch(device: torch.device) -> str:
    """The architecture class of a device; "interpreter" for anything but CUDA."""
    if device.type != "cuda":
        return "interpreter"
    return _arch_of_cuda(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _multiprocessors_of_cuda(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 2 for anything else, so that the interpreter's small tests see several programs."""
    if device.type != "cuda":
        return 2
    return _multiprocessors_of_cuda(torch.cuda.current_device() if device.index is None else device.index)


def type_class(dtype: torch.dtype, precision: str) -> str:
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    return "x3" if precision in ("tf32x3", "bf16x3") else precision


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _branch_class(branches: int) -> int:
    return 1 if branches == 1 else 2 if branches == 2 else 4


@functools.lru_cache(maxsize=4096)
def pick(
    arch: str, op: str, kind: int, dtype: torch.dtype, precision: str, branches: int, N: int, K: int
) -> LayerConfig:
    """The configuration of one launch; op is "forward", "gz" or "weight_grad" (there N counts all branches'
    columns)."""
    if arch == "interpreter":
        return _interpreter(op, kind, N, K)
    b = _branch_class(branches)
    extra = power_of_two(branches) // 4 if branches > 4 else 1  # more than four branches share four's registers
    width = power_of_two(N)
    if op == "weight_grad" and kind != DOT:
        block_n, block_k = min(64, width), min(64, power_of_two(K))
        narrow = min(block_n, block_k)
        config = LayerConfig(max(4, 64 // narrow), block_n, block_k, 4, 1, dot=False)
        return replace(config, block_m=max(4, min(32, 8192 // (block_n * block_k))))
    cls = type_class(dtype, precision)
    m, n, k, warps, stages = numbers((arch, op, KINDS[kind], cls, b))
    if kind == NARROW_K:
        return LayerConfig(max(1, m // extra), min(n, max(16, width)), K, warps, 1, dot=False)
    if kind == NARROW_N:
        return LayerConfig(max(1, m // extra), width, k, warps, 1, dot=False)
    if kind == MAP:
        return LayerConfig(max(1, m // extra), min(n, max(16, width)), 16, warps, 1, dot=False)
    if op == "weight_grad":
        return LayerConfig(m, min(n, max(32, width)), min(k, max(32, power_of_two(K))), warps, stages)
    if extra > 1:
        m = max(16, m // extra)
    config = LayerConfig(m, min(n, max(32, width)) if n > 32 else n, k, warps, stages)
    itemsize = 2 if cls == "half" else 4
    while not valid(config, arch, op, kind, branches, itemsize, cls) and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


@contextlib.contextmanager
def replaced(table: dict[K, V], key: K, value: V, forget: Callable[[], None]) -> Iterator[None]:
    """Another entry of `table` within the block; `forget` empties what was derived from it."""
    before = table.get(key)
    table[key] = value
    forget()
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before
        forget()


def using(key: Key, value: Numbers) -> contextlib.AbstractContextManager[None]:
    """Another entry of the table within the block: for whoever measures."""
    return replaced(TUNED, key, value, pick.cache_clear)


@functools.lru_cache(maxsize=1024)
def pick_map(arch: str, streams: int, N: int) -> LayerConfig:
    """The tile of `act_map`: fewer elements a thread where many streams are alive."""
    if arch == "interpreter":
        return LayerConfig(64, min(64, max(16, power_of_two(N))), 1, 1, 1, dot=False)
    elements = 128 * (8 if streams <= 4 else 4 if streams <= 16 else 2)
    block_n = min(64, power_of_two(N))
    return LayerConfig(elements // block_n, block_n, 1, 4, 1, dot=False)


def _interpreter(op: str, kind: int, N: int, K: int) -> LayerConfig:
    """Small tiles, so that small tests see several of each, in all directions."""
    if op == "weight_grad":
        side = 16 if kind == DOT else 8
        return LayerConfig(16, min(side, power_of_two(N)), min(side, power_of_two(K)), 1, 1, dot=kind == DOT)
    block_n = power_of_two(N) if kind == NARROW_N else min(64, max(16, power_of_two(N)))
    return LayerConfig(64, block_n, K if kind == NARROW_K else 16, 1, 1, dot=kind == DOT)


#: Widths that reach every different configuration of a table entry.
WIDTHS = (32, 64, 256)


@dataclass(frozen=True)
class ShippedLayer:
    """One entry of what is shipped: everything that `pick` looks at, and what it answers."""

    arch: str
    op: str
    kind: int
    dtype: torch.dtype
    precision: str
    branches: int
    N: int
    K: int
    config: LayerConfig


TYPES: tuple[tuple[torch.dtype, str], ...] = (
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
    (torch.float32, "bf16x3"),
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
)


def shipped(archs: tuple[str, ...] = ARCHITECTURES, branches: tuple[int, ...] = (1, 2, 4)) -> Iterator[ShippedLayer]:
    """Every different configuration, with shapes that lead to it."""
    seen = set()
    for a in archs:
        for dtype, precision in TYPES:
            for op in ("forward", "gz", "weight_grad"):
                for b in branches if op != "weight_grad" else (1,):
                    shapes = [(n, n) for n in WIDTHS] + [(256, 2), (256, 3), (1, 256), (3, 256)]
                    if op == "weight_grad":
                        shapes += [(256, 64), (64, 256)]
                    for N, K in shapes:
                        kinds = [kind(N, K)] + ([MAP] if op == "gz" and K == N else [])
                        for k in kinds:
                            config = pick(a, op, k, dtype, precision, b, N, K)
                            key = (a, op, k, dtype, precision, b, config)
                            if key not in seen:
                                seen.add(key)
                                yield ShippedLayer(a, op, k, dtype, precision, b, N, K, config)
