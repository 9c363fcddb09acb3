"""Configurations of the whole-network kernels: one predicate of validity, and `pick`, a look-up in `mlp_table.py`.

The table there holds what `fused-inr bench static` has compiled for every architecture, without spills that matter;
`fused-inr bench tune` rewrites it. What is not in it is not served: the layers then run one by one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import linear_act as layer_configs
from .mlp_table import TUNED, WHY, Key, Numbers

#: What the programs' sums of weight gradients may take before a chunk of rows at a time is cheaper, in bytes; and what
#: the scratch of a chunk takes. Both stay in the L2 cache (50 MB on an H200).
SUMS_BYTES = 32 << 20
CHUNK_BYTES = 32 << 20
#: Rows whose factors a program keeps in memory for one product: a sum is read and written once for them, not for each
#: tile, and they take no more than the sums.
LATER_ROWS = 64

#: Bytes of stack that a configuration may take without a reason of its own: on an H200 the fastest of several networks
#: take up to 728, a tile without spills is half as large and reads the weights twice as often.
SPILL = 512

#: Inputs and outputs of a network: beyond, the first or last layer is large enough to run by itself.
MAX_INPUTS, MAX_OUTPUTS = 512, 64

#: Branches and outputs of the maps with configurations.
KINDS = ((1, 1), (2, 1), (2, 2), (4, 1))


@dataclass(frozen=True)
class NetworkConfig:
    """Rows of a tile, feature tiles of the width, warps; stages of the weights' pipeline over the layers; hidden
    products whose weights may stay on chip (one_pass: whose gradients may stay in registers); gradients of the hidden
    weights as part of a tile's backward, or of factors that stay in memory until the registers are free;
    pre-activations read a second time instead of kept (one_pass: hidden weights that stay on chip); programs for each
    multiprocessor, 0: as many as have eight warps together; tiles whose factors stay in memory (`mlp.by_sums` settles
    it)."""

    block_m: int
    tiles: int
    num_warps: int
    stages: int = 1
    resident: int = 0
    sums: bool = True
    reload: bool = False
    per_sm: int = 0
    later: int = 0

    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}

    @property
    def resident_programs(self) -> int:
        """Programs for each multiprocessor."""
        return self.per_sm or max(1, 8 // self.num_warps)

    def programs(self, device: torch.device) -> int:
        """Persistent programs of a launch. The order of sums depends on them: the same bits on devices of one kind."""
        return layer_configs.multiprocessors(device) * self.resident_programs


def width(N: int, arch: str) -> int:
    """N as the kernels hold it: a power of two, at least 32 (16 in the interpreter)."""
    return max(16 if arch == "interpreter" else 32, layer_configs.power_of_two(N))


def valid(config: NetworkConfig, arch: str, op: str, B: int, C: int, WIDTH: int, itemsize: int) -> bool:
    """Whether a configuration can be right: powers of two, tensor-core minima, weights that stay on chip and the
    operands of one product within shared memory, tensor memory (sm_100), a thread's registers."""
    c = config
    block_t = WIDTH // c.tiles
    if any(v < 1 or v & (v - 1) for v in (c.block_m, c.tiles, c.num_warps)) or c.num_warps > 16 or c.stages < 1:
        return False
    if op == "one_pass" and c.resident and not c.sums:  # gradients in registers are sums
        return False
    if not 0 <= c.per_sm or c.resident_programs * c.num_warps > 64:
        return False
    if min(c.block_m, block_t) < 16 or c.tiles * block_t != WIDTH:
        return False
    weights = block_t * itemsize * block_t * c.stages
    resident = c.resident * B * C * WIDTH * WIDTH * itemsize
    if arch in layer_configs.SHARED_LIMIT:
        limit = layer_configs.SHARED_LIMIT[arch]
        if weights + block_t * itemsize * c.block_m + resident > limit:
            return False
        # activations may pass through registers; each program takes a KB besides, and a multiprocessor has a KB more
        # than a program may take
        if c.resident_programs * (weights + resident + 1024) > limit + 1024:
            return False
    if arch == "sm100" and c.block_m >= 64 and B * block_t > 512:
        return False
    return B * c.block_m * WIDTH // (32 * c.num_warps) <= 128


def numbers(key: Key) -> Numbers:
    return TUNED[key]


@functools.lru_cache(maxsize=1024)
def pick(arch: str, op: str, dtype: torch.dtype, precision: str, B: int, C: int, WIDTH: int) -> NetworkConfig | None:
    """The configuration of a launch, or None: op is "forward", "save" (a forward that keeps z), "train", "backward" (a
    training pass that reads z), "one_pass"."""
    if arch == "interpreter":  # small tiles and few programs, so that small tests see several of each
        if op == "one_pass":
            return NetworkConfig(16, 1, 1, resident=2, reload=True, per_sm=1) if WIDTH == 16 else None
        tiles = 2 if WIDTH == 32 else 1
        resident = 2 if WIDTH == 16 else 0
        return NetworkConfig(16, tiles, 1, resident=resident, sums=WIDTH <= 32, reload=WIDTH == 32, per_sm=1)
    key = entry(arch, op, dtype, precision, B, C, WIDTH)
    return None if key is None else NetworkConfig(*TUNED[key])


def entry(arch: str, op: str, dtype: torch.dtype, precision: str, B: int, C: int, WIDTH: int) -> Key | None:
    """The entry of the table that a launch goes by."""
    cls = layer_configs.type_class(dtype, precision)
    # what writes or reads pre-activations takes more registers, and sometimes another tile
    ways = (op, {"save": "forward", "backward": "train"}.get(op, op))
    return next((key for o in ways if (key := (arch, o, cls, B, C, WIDTH)) in TUNED), None)


def granted_spill(key: Key) -> float:
    """The bytes of stack that an entry may take: any where times on a device decided it (`fused-inr bench tune` writes
    which device), those that its reason names ("spills 632 bytes .."), else `SPILL`."""
    why = WHY.get(key, "")
    found = re.match(r"spills (\d+) bytes", why)
    return math.inf if why.startswith("NVIDIA") else int(found[1]) if found else SPILL


def using(key: Key, value: Numbers) -> contextlib.AbstractContextManager[None]:
    """Another entry of the table within the block: for whoever measures."""
    return layer_configs.replaced(TUNED, key, value, pick.cache_clear)


@dataclass(frozen=True)
class ShippedNetwork:
    """One entry of the table, with a type that leads to it."""

    op: str
    dtype: torch.dtype
    precision: str
    kind: tuple[int, int]
    width: int


def shipped(arch: str, types, kinds) -> Iterator[ShippedNetwork]:
    """The entries of an architecture for these types and kinds of maps, and what they serve besides."""
    besides = {"forward": ("forward", "save"), "train": ("train", "backward"), "one_pass": ("one_pass",)}
    for a, op, cls, B, C, WIDTH in TUNED:
        for dtype, precision in types:
            if a == arch and layer_configs.type_class(dtype, precision) == cls and (B, C) in kinds:
                for each in besides.get(op, ()):
                    if each == "save" and entry(arch, "backward", dtype, precision, B, C, WIDTH) is None:
                        continue  # nothing reads what it would save: such networks train layer by layer
                    yield ShippedNetwork(each, dtype, precision, (B, C), WIDTH)
