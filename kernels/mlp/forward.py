"""The forward of a whole network: the activations of a tile of rows stay in registers from the first layer to the last.

A persistent program takes tiles of rows through all layers; the weights pass through shared memory, or stay there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..maps import narrow
from .tiles import (
    add_bias,
    evaluate,
    evaluate_jet,
    first_layer,
    layer_params,
    load_stack,
    network,
    product,
    resident_product,
    store_tiles,
)

#: What a forward keeps for its backward: nothing, pre-activations, or activations and their derivatives.
NOTHING, PREACTIVATIONS, JETS = range(3)


@triton.jit
def activate(
    z, map_params, table_ptr, saved_ptr, layer, start, M, L, offs, limit, offs_t,
    MAP: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SETS: tl.constexpr,
    TABLE: tl.constexpr, N: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    T: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """h of a layer, and what SAVE says into its rows of z [L, M, B*WIDTH], or of h [L, M, C*WIDTH] and behind it d
    [L, M, C*B*WIDTH]. MAP is the jet for JETS."""
    WIDTH: tl.constexpr = T * BLOCK_T
    p = layer_params(map_params, table_ptr, layer, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
    row = M.to(tl.int64) * layer + start
    if SAVE == 2:
        h, d = evaluate_jet(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE, PRECISION)
        store_tiles(h, saved_ptr + row * (C * WIDTH), offs, limit, offs_t, C * T, BLOCK_T, True)
        d_ptr = saved_ptr + M.to(tl.int64) * L * (C * WIDTH) + row * (C * B * WIDTH)
        store_tiles(d, d_ptr, offs, limit, offs_t, C * B * T, BLOCK_T, True)
    else:
        if SAVE == 1:
            store_tiles(z, saved_ptr + row * (B * WIDTH), offs, limit, offs_t, B * T, BLOCK_T, True)
        h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE, PRECISION)
    return h


@triton.jit(do_not_specialize=["M", "L"], do_not_specialize_on_alignment=["M", "L"])
def forward_kernel(
    x_ptr, packed_ptr, bias_ptr, map_params, last_params, y_ptr, saved_ptr, M, L, K, K_PAD, OUT, stride_xm, stride_ym,
    MAP: tl.constexpr, LAST: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    SETS: tl.constexpr, TABLE: tl.constexpr, N: tl.constexpr, SAVE: tl.constexpr, RESIDENT: tl.constexpr,
    K_MAJOR: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr, T: tl.constexpr, OUT_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, OUT], and what SAVE says. RESIDENT: the number of hidden products (L - 1) whose weights stay on chip; 0:
    each layer's weights are read again for each tile of rows."""
    WIDTH: tl.constexpr = T * BLOCK_T
    offs = tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_T)
    offs_o = tl.arange(0, OUT_PAD)
    hidden_ptr, _, last_ptr, table_ptr = network(packed_ptr, bias_ptr, L, K_PAD, B, C, WIDTH, OUT_PAD, K_MAJOR)
    if RESIDENT:
        stack = load_stack(hidden_ptr, RESIDENT, C * T, B * T, BLOCK_T)
    program = tl.program_id(0).to(tl.int64)
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True):
        start = tile * BLOCK_M  # int64
        limit = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        # beyond the end, the last row again: finite where that row is
        rows = start + tl.minimum(offs, limit - 1)
        z = first_layer(
            x_ptr, packed_ptr, bias_ptr, rows, offs_t, K, K_PAD, stride_xm,
            B * T, NARROW, PRECISION, UPCAST, ACC, DTYPE, BLOCK_M, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        h = activate(
            z, map_params, table_ptr, saved_ptr, 0, start, M, L, offs, limit, offs_t,
            MAP, MODE, B, C, P, SETS, TABLE, N, SAVE, PRECISION, DTYPE, T, BLOCK_T,
        )  # fmt: skip
        if RESIDENT:
            for i in tl.static_range(RESIDENT):
                z = resident_product(
                    h, stack, i * B * T * C * T, C * T, B * T, PRECISION, UPCAST, ACC, BLOCK_M, BLOCK_T
                )
                z = add_bias(z, bias_ptr + (i + 1) * B * WIDTH, offs_t, B * T, BLOCK_T)
                h = activate(
                    z, map_params, table_ptr, saved_ptr, i + 1, start, M, L, offs, limit, offs_t,
                    MAP, MODE, B, C, P, SETS, TABLE, N, SAVE, PRECISION, DTYPE, T, BLOCK_T,
                )  # fmt: skip
        else:
            for layer in tl.range(1, L, num_stages=STAGES):
                z = product(
                    h, hidden_ptr + (layer - 1) * (B * WIDTH * C * WIDTH), 1, C * WIDTH, C * T, B * T, BLOCK_T,
                    BLOCK_T, PRECISION, UPCAST, ACC, BLOCK_M,
                )  # fmt: skip
                z = add_bias(z, bias_ptr + layer * (B * WIDTH), offs_t, B * T, BLOCK_T)
                h = activate(
                    z, map_params, table_ptr, saved_ptr, layer, start, M, L, offs, limit, offs_t,
                    MAP, MODE, B, C, P, SETS, TABLE, N, SAVE, PRECISION, DTYPE, T, BLOCK_T,
                )  # fmt: skip
        out = product(h, last_ptr, 1, C * WIDTH, C * T, 1, BLOCK_T, OUT_PAD, PRECISION, UPCAST, ACC, BLOCK_M)
        zy = out[0] + tl.load(bias_ptr + L * (B * WIDTH) + offs_o)[None, :]
        y = LAST(zy, *last_params, MODE=MODE)
        y_tile = y_ptr + rows[:, None] * stride_ym + offs_o[None, :]
        tl.store(y_tile, narrow(y[0], DTYPE), mask=(offs < limit)[:, None] & (offs_o < OUT)[None, :])
