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
    hidden_product,
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
    z, numbers, table_ptr, saved_ptr, layer, start, M, L, offs, limit, offs_t,
    MAP: tl.constexpr, SAVE: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """h of a layer, and what SAVE says into its rows of z [L, M, B*WIDTH], or of h [L, M, C*WIDTH] and behind it d
    [L, M, C*B*WIDTH]. MAP is the jet for JETS."""
    B: tl.constexpr = NET.B
    C: tl.constexpr = NET.C
    T: tl.constexpr = NET.T
    WIDTH: tl.constexpr = T * NET.BLOCK_T
    p = layer_params(numbers.maps, table_ptr, layer, offs_t, NET)
    row = M.to(tl.int64) * layer + start
    if SAVE == 2:
        h, d = evaluate_jet(z, p, offs_t, MAP, NET, NUM)
        store_tiles(h, saved_ptr + row * (C * WIDTH), offs, limit, offs_t, C * T, NET.BLOCK_T, True)
        d_ptr = saved_ptr + M.to(tl.int64) * L * (C * WIDTH) + row * (C * B * WIDTH)
        store_tiles(d, d_ptr, offs, limit, offs_t, C * B * T, NET.BLOCK_T, True)
    else:
        if SAVE == 1:
            store_tiles(z, saved_ptr + row * (B * WIDTH), offs, limit, offs_t, B * T, NET.BLOCK_T, True)
        h = evaluate(z, p, offs_t, MAP, NET, NUM)
    return h


@triton.jit(do_not_specialize=["M", "L"], do_not_specialize_on_alignment=["M", "L"])
def forward_kernel(
    x, packed, y, saved_ptr, M, L, numbers, sizes, maps,
    SAVE: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """y [M, OUT], and what SAVE says. RESIDENT: the number of hidden products (L - 1) whose weights stay on chip; 0:
    each layer's weights are read again for each tile of rows."""
    B: tl.constexpr = NET.B
    C: tl.constexpr = NET.C
    T: tl.constexpr = NET.T
    BLOCK_M: tl.constexpr = NET.BLOCK_M
    BLOCK_T: tl.constexpr = NET.BLOCK_T
    OUT_PAD: tl.constexpr = NET.OUT_PAD
    WIDTH: tl.constexpr = T * BLOCK_T
    offs = tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_T)
    offs_o = tl.arange(0, OUT_PAD)
    hidden_ptr, _, last_ptr, table_ptr = network(packed, L, sizes.K_PAD, NET)
    if RESIDENT:
        stack = load_stack(hidden_ptr, RESIDENT, NET)
    program = tl.program_id(0).to(tl.int64)
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True):
        start = tile * BLOCK_M  # int64
        limit = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        # beyond the end, the last row again: finite where that row is
        rows = start + tl.minimum(offs, limit - 1)
        z = first_layer(x, packed, rows, offs_t, sizes.K, sizes.K_PAD, NET, NUM)
        h = activate(
            z, numbers, table_ptr, saved_ptr, 0, start, M, L, offs, limit, offs_t, maps.map, SAVE, NET, NUM
        )  # fmt: skip
        if RESIDENT:
            for i in tl.static_range(RESIDENT):
                z = resident_product(h, stack, i * B * T * C * T, C * T, B * T, NET, NUM)
                z = add_bias(z, packed.bias + (i + 1) * B * WIDTH, offs_t, NET)
                h = activate(
                    z, numbers, table_ptr, saved_ptr, i + 1, start, M, L, offs, limit, offs_t, maps.map, SAVE, NET, NUM
                )  # fmt: skip
        else:
            for layer in tl.range(1, L, num_stages=STAGES):
                z = hidden_product(h, hidden_ptr, layer - 1, NET, NUM)
                z = add_bias(z, packed.bias + layer * (B * WIDTH), offs_t, NET)
                h = activate(
                    z, numbers, table_ptr, saved_ptr, layer, start, M, L, offs, limit, offs_t, maps.map, SAVE, NET, NUM
                )  # fmt: skip
        out = product(h, last_ptr, 1, C * WIDTH, C * T, 1, BLOCK_T, OUT_PAD, NET, NUM)
        zy = out[0] + tl.load(packed.bias + L * (B * WIDTH) + offs_o)[None, :]
        v = maps.last(zy, *numbers.last, MODE=NUM.MODE)
        y_tile = y.ptr + rows[:, None] * y.stride + offs_o[None, :]
        tl.store(y_tile, narrow(v[0], NUM.DTYPE), mask=(offs < limit)[:, None] & (offs_o < sizes.OUT)[None, :])
