"""Sums over rows of partial results, in a fixed order: what kernels leave one a program or one a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configurations import linear_act as layer_configs
from .launch import TYPES, accumulator, cdiv, on_device
from .maps import narrow


@triton.jit(do_not_specialize=["S", "chunk"], do_not_specialize_on_alignment=["S", "chunk"])
def sum_kernel(
    in_ptr, out_ptr, S, L, chunk, CHUNKS,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """out [G, CHUNKS, L] = sums of in [G, S, L] over `chunk` rows each, in a fixed order."""
    tiles = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    row = pid // tiles  # layer and chunk
    layer = (row // CHUNKS).to(tl.int64)
    start = (row % CHUNKS) * chunk
    stop = tl.minimum(start + chunk, S)
    offs_l = ((pid % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    mask_l = offs_l < L
    acc = tl.zeros((BLOCK_S, BLOCK_L), ACC)
    for s in range(start, stop, BLOCK_S):
        offs_s = (s + tl.arange(0, BLOCK_S)).to(tl.int64)
        part = in_ptr + (layer * S + offs_s)[:, None] * L + offs_l[None, :]
        acc += tl.load(part, mask=(offs_s < stop)[:, None] & mask_l[None, :], other=0.0).to(ACC)
    out = out_ptr + row.to(tl.int64) * L + offs_l
    tl.store(out, narrow(tl.sum(acc, axis=0), out_ptr.dtype.element_ty), mask=mask_l)


def launch_sum(partials: torch.Tensor, out: torch.Tensor) -> None:
    """out [G, L] = partials [G, S, L] summed over S; both contiguous. Two passes where S is long."""
    G, S, L = partials.shape
    if not G * L:
        return
    config = layer_configs.SUM
    chunks = 1 if S <= 4 * config.chunk else cdiv(S, config.chunk)
    target = out if chunks == 1 else partials.new_empty((G, chunks, L))
    chunk = cdiv(S, chunks) if chunks == 1 else config.chunk
    with on_device(partials):
        sum_kernel[(G * chunks * cdiv(L, config.block_l),)](
            partials, target, S, L, chunk, chunks, ACC=TYPES[accumulator(partials.dtype)],
            BLOCK_S=config.block_s, BLOCK_L=config.block_l, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    if chunks > 1:
        launch_sum(target, out)
