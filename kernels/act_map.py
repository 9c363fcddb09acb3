"""A generated map of any level, elementwise over row groups, with the sums of parameter gradients over rows.

Streams come in groups, one tensor a group: row groups [M, k*N] (k branches or outputs side by side, any strides, 0 too)
and parameter cotangents ([] or [N]). Parameter gradients are partial sums per row tile, added in a fixed order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configurations import linear_act as layer_configs
from .launch import accumulator, arithmetic, cdiv, constants_of, on_device
from .maps import load_params, narrow, param_arguments
from .sums import launch_sum

# ---------------------------------------------------------------- which groups a level has


def groups(level: int, learnable: bool, B: int, C: int, P: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Group sizes of a level's inputs (z first, the P parameters behind it left out) and outputs.

    k > 0: a row group of k streams side by side; 0: one parameter's cotangent, or its gradient.
    Level 0 maps z to y. Level n + 1 has the inputs of n and a cotangent for each output of n, and gives a gradient for
    each input of n (parameters among them if learnable, behind z).
    """
    inputs: tuple[int, ...] = (B,)
    outputs: tuple[int, ...] = (C,)
    parameters = (0,) * P if learnable else ()
    for _ in range(level):
        inputs, outputs = inputs + outputs, inputs[:1] + parameters + inputs[1:]
    return inputs, outputs


# ---------------------------------------------------------------- kernel


@triton.constexpr_function
def _at(sizes, i):
    """An element of a constexpr tuple as a constexpr (indexing gives a plain int, which static_range refuses)."""
    return sizes[i]


class Streams(NamedTuple):
    """Groups of streams: a tensor each, and its strides."""

    ptrs: tuple
    rows: tuple[int, ...]
    columns: tuple[int, ...]


class Groups(NamedTuple):
    """Group sizes as `groups` gives them, of inputs and outputs; the first output of each group."""

    IN: tuple[int, ...]
    OUT: tuple[int, ...]
    FIRST: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def constant_groups(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Groups:
    first = tuple(sum(max(1, k) for k in outputs[:i]) for i in range(len(outputs)))
    return constants_of(Groups(inputs, outputs, first))


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def act_map_kernel(
    streams, map_params, out_ptrs, M, N,
    MAP: tl.constexpr, POINTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    NUM: tl.constexpr,
):  # fmt: skip
    """out = MAP(streams)."""
    IN: tl.constexpr = GROUPS.IN
    OUT: tl.constexpr = GROUPS.OUT
    FIRST: tl.constexpr = GROUPS.FIRST
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = (tl.program_id(0) // tiles_n).to(tl.int64)
    tile_n = tl.program_id(0) % tiles_n
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # int64
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    args = ()
    for i in tl.static_range(len(streams.ptrs)):
        if IN[i] > 0:
            tile = streams.ptrs[i] + offs_m[:, None] * streams.rows[i]
            for k in tl.static_range(_at(IN, i)):
                v = tl.load(tile + (k * N + offs_n)[None, :] * streams.columns[i], mask=mask, other=0.0)
                args = args + (v.to(NUM.ACC),)
        else:
            p = tl.load(streams.ptrs[i] + offs_n * streams.columns[i], mask=mask_n, other=0.0).to(NUM.ACC)
            args = args + (p[None, :],)
        if i == 0:
            args = args + load_params(map_params, offs_n, mask_n, POINTERS, NUM.ACC)
    out = MAP(*args, MODE=NUM.MODE)
    for i in tl.static_range(len(out_ptrs)):
        if OUT[i] > 0:
            for k in tl.static_range(_at(OUT, i)):
                tile = out_ptrs[i] + offs_m[:, None] * (OUT[i] * N) + (k * N + offs_n)[None, :]
                tl.store(tile, narrow(out[FIRST[i] + k], out_ptrs[i].dtype.element_ty), mask=mask)
        else:  # rows outside may hold anything: they must not reach the sum
            rows = tl.sum(tl.where(mask, out[FIRST[i]], 0.0), axis=0)
            tl.store(out_ptrs[i] + tile_m * N + offs_n, rows, mask=mask_n)


# ---------------------------------------------------------------- launcher


def launch_act_map(
    inputs, param_args, outputs, function, sizes, config: layer_configs.LayerConfig, M: int, N: int
) -> None:
    """outputs: row groups [M, k*N] contiguous, parameter gradients [tiles, N] (partial sums), as `sizes` says."""
    if not M * N:
        return
    params, pointers = param_args
    in_sizes, out_sizes = sizes
    z = inputs[0]
    rows = tuple(t.stride(0) if k else 0 for t, k in zip(inputs, in_sizes, strict=True))
    streams = Streams(tuple(inputs), rows, tuple(t.stride(-1) if t.dim() else 0 for t in inputs))
    options = config.options()
    del options["BLOCK_K"]
    with on_device(z):
        act_map_kernel[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
            streams, params, tuple(outputs), M, N, MAP=function, POINTERS=pointers,
            GROUPS=constant_groups(in_sizes, out_sizes), NUM=arithmetic(z.dtype, "ieee"), **options,
        )  # fmt: skip


def act_map(
    inputs: list[torch.Tensor],
    params: list[torch.Tensor | None],
    constants: list[float],
    activation,
    level: int,
    learnable: bool,
) -> list[torch.Tensor]:
    """The level-th derivative map of an activation, element by element; not differentiable by itself.

    Args:
        inputs: the streams in groups, one tensor a group: [z, g, u_z, (u_p_1 .. u_p_P), v_z, ..]; row groups [.., M,
            k*N] of any strides, parameter cotangents [] or [N].
        params: one tensor ([] or [N]) a parameter, or None for the number in `constants`.
        activation: has `branches`, `outputs` and `triton_map(level, learnable)`.
        level: 0 for the value, n for n vector-Jacobian products.
        learnable: whether parameters are inputs that have gradients.
    Returns:
        one tensor a group of outputs, in z's type: row groups [.., M, k*N], parameter gradients [N] summed over rows
        (float32 or float64).
    Raises:
        ValueError: if the number of inputs does not fit the level.
    """
    B, C, P = activation.branches, activation.outputs, len(params)
    learnable = learnable and P > 0
    sizes = groups(level, learnable, B, C, P)
    if len(inputs) != len(sizes[0]):
        raise ValueError(
            f"inputs: level {level} of {activation.name!r} takes {len(sizes[0])} groups of streams, got {len(inputs)}"
        )
    lead = inputs[0].shape[:-1]
    inputs = [t.reshape(-1, t.shape[-1]) if k and t.dim() != 2 else t for t, k in zip(inputs, sizes[0], strict=True)]
    z = inputs[0]
    M, N = z.shape[0], z.shape[1] // B
    acc = accumulator(z.dtype)
    streams = sum(max(1, k) for k in sizes[0] + sizes[1])
    config = layer_configs.pick_map(layer_configs.arch(z.device), streams, N)
    tiles = cdiv(M, config.block_m)
    outputs = [z.new_empty((M, k * N)) if k else z.new_empty((tiles, N), dtype=acc) for k in sizes[1]]
    param_args = param_arguments(params, constants, acc == torch.float64, z.device)
    launch_act_map(inputs, param_args, outputs, activation.triton_map(level, learnable), sizes, config, M, N)
    for i, k in enumerate(sizes[1]):
        if not k:
            total = z.new_empty((1, N), dtype=acc)
            launch_sum(outputs[i].view(1, tiles, N), total)
            outputs[i] = total[0]
        elif len(lead) != 1:
            outputs[i] = outputs[i].view(*lead, k * N)
    return outputs
