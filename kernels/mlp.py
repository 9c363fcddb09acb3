"""A whole network y = last(.. map(map(x W_0^T + b_0) W_1^T + b_1) ..) in one kernel, and its training pass.

A persistent program takes tiles of rows through all layers: the activations of a tile stay in registers, the weights
pass through shared memory (or stay there). The training pass computes the tile's pre-activations again (or reads those
saved), keeps them in a scratch tile of its program, and carries the gradient of the tile back through all layers;
weight gradients are sums per program, added in a fixed order. So memory depends on neither rows nor depth times rows,
and the bits are the same every run.

Shapes, inside. Widths are padded to powers of two with zeros: N to WIDTH = T * BLOCK_T (T feature tiles), the inputs K
to K_PAD, the outputs to OUT_PAD. L layers have the map, B branches and C outputs each:

| name | shape | |
| --- | --- | --- |
| first | [B*WIDTH, K_PAD] | |
| hidden | [L-1, B*WIDTH, C*WIDTH] | |
| last | [OUT_PAD, C*WIDTH] | |
| bias | [L*B*WIDTH + OUT_PAD] | float32 (float64), zeros where there is none |
| z | [L, rows, B*WIDTH] | float32 (float64): saved, or the programs' scratch tiles |

In the kernels a tile's activations are C*T blocks [BLOCK_M, BLOCK_T], (c, t) at c*T + t; its pre-activations B*T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from . import mlp_tune, tune
from .linear_act import (
    _TRITON,
    accumulator,
    dot_precision,
    identity,
    launch_sum,
    launch_weight_grad,
    mode,
    on_device,
    weight_grad_splits,
)
from .maps import INTERPRETED, narrow

# ---------------------------------------------------------------- pieces


@triton.jit
def layer_params(
    params, table_ptr, layer, offs_t, T: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, P: tl.constexpr,
    SETS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """The P parameters of a layer for each feature tile, (t, j) at t*P + j: from a table [L, P, WIDTH], or from SETS
    sets of numbers, the last of which serves all layers from its own on."""
    values = ()
    for t in tl.static_range(T):
        for j in tl.static_range(P):
            if TABLE:
                p = tl.load(table_ptr + (layer * P + j) * WIDTH + t * BLOCK_T + offs_t)
                values = values + (p[None, :],)
            else:
                p = params[j]
                for i in tl.static_range(1, SETS):
                    p = tl.where(layer >= i, params[i * P + j], p)
                values = values + (p,)
    return values


@triton.jit
def evaluate(
    z, p, offs_t, MAP: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """h = MAP(z), narrowed; 0 in the columns beyond N."""
    tiles = ()
    for t in tl.static_range(T):
        args = ()
        for b in tl.static_range(B):
            args = args + (z[b * T + t],)
        for j in tl.static_range(P):
            args = args + (p[t * P + j],)
        tiles = tiles + (MAP(*args, MODE=MODE),)
    h = ()
    for c in tl.static_range(C):
        for t in tl.static_range(T):
            v = tiles[t][c]
            if (t + 1) * BLOCK_T > N:
                v = tl.where((t * BLOCK_T + offs_t < N)[None, :], v, 0.0)
            h = h + (narrow(v, DTYPE),)
    return h


@triton.jit
def pull_back(
    z, p, g, mask_m, offs_t, MAP: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    P: tl.constexpr, GP: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """gz = MAP(z, p, g), the level-1 map, and the gradients of GP parameters; 0 outside rows and columns."""
    tiles = ()
    for t in tl.static_range(T):
        args = ()
        for b in tl.static_range(B):
            args = args + (z[b * T + t],)
        for j in tl.static_range(P):
            args = args + (p[t * P + j],)
        for c in tl.static_range(C):
            args = args + (g[c * T + t],)
        tiles = tiles + (MAP(*args, MODE=MODE),)
    gz = ()
    for b in tl.static_range(B + GP):
        for t in tl.static_range(T):
            mask = mask_m[:, None]
            if (t + 1) * BLOCK_T > N:
                mask = mask & (t * BLOCK_T + offs_t < N)[None, :]
            gz = gz + (tl.where(mask, tiles[t][b], 0.0),)
    return gz


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BLOCK_M, BLOCK_N), ACC),)
    return tiles


@triton.jit
def add_bias(z, bias_ptr, offs_t, COUNT: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tiles in the order of memory: branch, then feature tile."""
    new = ()
    for i in tl.static_range(COUNT):
        bias = tl.load(bias_ptr + i * BLOCK_T + offs_t)
        new = new + (z[i] + bias[None, :],)
    return new


@triton.jit
def first_layer(
    x_ptr, w_ptr, bias_ptr, rows, offs_t, K, K_PAD, stride_xm,
    BT: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z = x first^T + bias. NARROW: BLOCK_K = K multiply-adds in full precision."""
    z = zeros(BT, BLOCK_M, BLOCK_T, ACC)
    if NARROW:
        for k in tl.static_range(BLOCK_K):
            x = tl.load(x_ptr + rows * stride_xm + k).to(ACC)
            new = ()
            for i in tl.static_range(BT):
                w = tl.load(w_ptr + (i * BLOCK_T + offs_t) * K_PAD + k).to(ACC)
                new = new + (z[i] + x[:, None] * w[None, :],)
            z = new
    else:
        for k in tl.range(0, K_PAD, BLOCK_K, num_stages=1, disable_licm=True):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
            if UPCAST:
                x = x.to(ACC)
            new = ()
            for i in tl.static_range(BT):
                w = tl.load(w_ptr + (i * BLOCK_T + offs_t)[None, :] * K_PAD + offs_k[:, None])
                if UPCAST:
                    w = w.to(ACC)
                new = new + (tl.dot(x, w, z[i], input_precision=PRECISION, out_dtype=ACC),)
            z = new
    return add_bias(z, bias_ptr, offs_t, BT, BLOCK_T)


@triton.jit
def load_tile(w_ptr, row, column, stride_r, stride_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs_r = row + tl.arange(0, ROWS)
    offs_c = column + tl.arange(0, COLUMNS)
    return tl.load(w_ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c)


@triton.jit
def product(
    a, w_ptr, stride_in, stride_out, IN: tl.constexpr, OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """OUT tiles [BLOCK_M, BLOCK_OUT] of a w, where w [IN*BLOCK_IN, OUT*BLOCK_OUT] has these strides."""
    out = ()
    for o in tl.static_range(OUT):
        acc = tl.zeros((BLOCK_M, BLOCK_OUT), ACC)
        for i in tl.static_range(IN):
            w = load_tile(w_ptr, i * BLOCK_IN, o * BLOCK_OUT, stride_in, stride_out, BLOCK_IN, BLOCK_OUT)
            v = a[i]
            if UPCAST:  # the interpreter multiplies bfloat16 as the integers that it keeps them in
                w = w.to(ACC)
                v = v.to(ACC)
            acc = tl.dot(v, w, acc, input_precision=PRECISION, out_dtype=ACC)
        out = out + (acc,)
    return out


@triton.jit
def load_stack(
    w_ptr, LAYERS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK_T: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Every block of the hidden weights, transposed, (layer, out, in) in the order of memory."""
    tiles = ()
    for layer in tl.static_range(LAYERS):
        for o in tl.static_range(OUT):
            for i in tl.static_range(IN):
                w = load_tile(
                    w_ptr + layer * OUT * IN * BLOCK_T * BLOCK_T, i * BLOCK_T, o * BLOCK_T, 1, IN * BLOCK_T, BLOCK_T,
                    BLOCK_T,
                )  # fmt: skip
                if UPCAST:
                    w = w.to(ACC)
                tiles = tiles + (w,)
    return tiles


@triton.jit
def resident_product(
    h, tiles, first, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    out = ()
    for o in tl.static_range(OUT):
        acc = tl.zeros((BLOCK_M, BLOCK_T), ACC)
        for i in tl.static_range(IN):
            v = h[i]
            if UPCAST:
                v = v.to(ACC)
            acc = tl.dot(v, tiles[first + o * IN + i], acc, input_precision=PRECISION, out_dtype=ACC)
        out = out + (acc,)
    return out


@triton.jit
def store_tiles(tiles, ptr, offs, limit, offs_t, COUNT: tl.constexpr, BLOCK_T: tl.constexpr, MASKED: tl.constexpr):
    """Tiles side by side into rows of COUNT*BLOCK_T at ptr; offs: rows (32 bits), those below limit if MASKED."""
    for i in tl.static_range(COUNT):
        tile = ptr + (offs[:, None] * (COUNT * BLOCK_T) + (i * BLOCK_T + offs_t)[None, :])
        if MASKED:
            tl.store(tile, tiles[i], mask=(offs < limit)[:, None])
        else:
            tl.store(tile, tiles[i])


@triton.jit
def load_tiles(ptr, offs, offs_t, COUNT: tl.constexpr, BLOCK_T: tl.constexpr):
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.load(ptr + (offs[:, None] * (COUNT * BLOCK_T) + (i * BLOCK_T + offs_t)[None, :])),)
    return tiles


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["M", "L"], do_not_specialize_on_alignment=["M", "L"])
def forward_kernel(
    x_ptr, first_ptr, hidden_ptr, last_ptr, bias_ptr, map_params, table_ptr, last_params, y_ptr, z_ptr,
    M, L, K, K_PAD, OUT, stride_xm, stride_ym,
    MAP: tl.constexpr, LAST: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    SETS: tl.constexpr, TABLE: tl.constexpr, N: tl.constexpr, SAVE_Z: tl.constexpr, RESIDENT: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr, T: tl.constexpr, OUT_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, OUT], and z if SAVE_Z. RESIDENT: the number of hidden products (L - 1) whose weights stay on chip; 0: each
    layer's weights are read again for each tile of rows."""
    WIDTH: tl.constexpr = T * BLOCK_T
    offs = tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_T)
    offs_o = tl.arange(0, OUT_PAD)
    if RESIDENT:
        stack = load_stack(hidden_ptr, RESIDENT, C * T, B * T, BLOCK_T, UPCAST, ACC)
    program = tl.program_id(0).to(tl.int64)
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True):
        start = tile * BLOCK_M  # int64
        limit = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        # beyond the end, the last row again: finite where that row is
        rows = start + tl.minimum(offs, limit - 1)
        z = first_layer(
            x_ptr, first_ptr, bias_ptr, rows, offs_t, K, K_PAD, stride_xm,
            B * T, NARROW, PRECISION, UPCAST, ACC, BLOCK_M, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        if SAVE_Z:
            store_tiles(z, z_ptr + start * (B * WIDTH), offs, limit, offs_t, B * T, BLOCK_T, True)
        p = layer_params(map_params, table_ptr, 0, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
        h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE)
        if RESIDENT:
            for i in tl.static_range(RESIDENT):
                z = resident_product(
                    h, stack, i * B * T * C * T, C * T, B * T, PRECISION, UPCAST, ACC, BLOCK_M, BLOCK_T
                )
                z = add_bias(z, bias_ptr + (i + 1) * B * WIDTH, offs_t, B * T, BLOCK_T)
                if SAVE_Z:
                    z_tile = z_ptr + (M.to(tl.int64) * (i + 1) + start) * (B * WIDTH)
                    store_tiles(z, z_tile, offs, limit, offs_t, B * T, BLOCK_T, True)
                p = layer_params(map_params, table_ptr, i + 1, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
                h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE)
        else:
            for layer in tl.range(1, L, num_stages=STAGES):
                z = product(
                    h, hidden_ptr + (layer - 1) * (B * WIDTH * C * WIDTH), 1, C * WIDTH, C * T, B * T, BLOCK_T, BLOCK_T,
                    PRECISION, UPCAST, ACC, BLOCK_M,
                )  # fmt: skip
                z = add_bias(z, bias_ptr + layer * (B * WIDTH), offs_t, B * T, BLOCK_T)
                if SAVE_Z:
                    z_tile = z_ptr + (M.to(tl.int64) * layer + start) * (B * WIDTH)
                    store_tiles(z, z_tile, offs, limit, offs_t, B * T, BLOCK_T, True)
                p = layer_params(map_params, table_ptr, layer, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
                h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE)
        out = product(h, last_ptr, 1, C * WIDTH, C * T, 1, BLOCK_T, OUT_PAD, PRECISION, UPCAST, ACC, BLOCK_M)
        zy = out[0] + tl.load(bias_ptr + L * (B * WIDTH) + offs_o)[None, :]
        y = LAST(zy, *last_params, MODE=MODE)
        y_tile = y_ptr + rows[:, None] * stride_ym + offs_o[None, :]
        tl.store(y_tile, narrow(y[0], DTYPE), mask=(offs < limit)[:, None] & (offs_o < OUT)[None, :])


# ---------------------------------------------------------------- training pass


@triton.jit
def add_to(ptr, value, seen):
    """A sum that one program keeps in memory: *ptr = value, plus what is there if `seen`."""
    old = tl.load(ptr, mask=tl.zeros(value.shape, tl.int1) | seen, other=0.0)
    tl.store(ptr, old + value)


@triton.jit
def add_outer(
    ptr, gz, h, seen, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program's sum of gz^T h [OUT*BLOCK_OUT, IN*BLOCK_IN], kept in memory as one block after the other."""
    offs = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
    for o in tl.static_range(OUT):
        for i in tl.static_range(IN):
            a = gz[o]
            v = h[i]
            if UPCAST:
                a = a.to(ACC)
                v = v.to(ACC)
            tile = ptr + (o * IN + i) * (BLOCK_OUT * BLOCK_IN) + offs
            grad = tl.load(tile, mask=tl.zeros(tile.shape, tl.int1) | seen, other=0.0)
            grad = tl.dot(tl.trans(a), v, grad, input_precision=PRECISION, out_dtype=ACC)
            tl.store(tile, grad)


@triton.jit
def add_product(
    ptr, gz_ptr, h_ptr, rows, seen, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program's sum of gz^T h [ROWS, COLUMNS] in memory, for factors [rows, ROWS] and [rows, COLUMNS] in memory."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_o = tl.arange(0, BLOCK_O)
    offs_i = tl.arange(0, BLOCK_I)
    for o in tl.range(0, ROWS, BLOCK_O, num_stages=1, disable_licm=True):
        for i in tl.range(0, COLUMNS, BLOCK_I, num_stages=1, disable_licm=True):
            tile = ptr + (o + offs_o)[:, None] * COLUMNS + (i + offs_i)[None, :]
            grad = tl.load(tile, mask=tl.zeros(tile.shape, tl.int1) | seen, other=0.0)
            for r in tl.range(0, rows, BLOCK_R, num_stages=1, disable_licm=True):
                a = tl.load(gz_ptr + (r + offs_r)[:, None] * ROWS + (o + offs_o)[None, :])
                v = tl.load(h_ptr + (r + offs_r)[:, None] * COLUMNS + (i + offs_i)[None, :])
                if UPCAST:
                    a = a.to(ACC)
                    v = v.to(ACC)
                grad = tl.dot(tl.trans(a), v, grad, input_precision=PRECISION, out_dtype=ACC)
            tl.store(tile, grad)


@triton.jit
def add_rows(ptr, gz, offs_t, seen, COUNT: tl.constexpr, BLOCK_T: tl.constexpr):
    for i in tl.static_range(COUNT):
        add_to(ptr + i * BLOCK_T + offs_t, tl.sum(gz[i], axis=0), seen)


@triton.jit
def narrow_all(tiles, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (narrow(tiles[i], DTYPE),)
    return new


@triton.jit
def output_gradient(
    zy, g_ptr, target_ptr, row_weight_ptr, last_params, loss_params, scale, rows, mask_m, offs_o, OUT, stride_gm,
    stride_tm, LAST: tl.constexpr, LAST_GRAD: tl.constexpr, LOSS: tl.constexpr, LOSS_GRAD: tl.constexpr,
    MODE: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, OUT_PAD: tl.constexpr,
):  # fmt: skip
    """The gradient of zy, from g or from the loss; and the loss of each row."""
    mask_o = (offs_o < OUT)[None, :]
    mask = mask_m[:, None] & mask_o
    loss = tl.zeros((BLOCK_M,), ACC)
    if HAS_LOSS:
        y = LAST(zy, *last_params, MODE=MODE)[0]
        target = tl.load(target_ptr + rows[:, None] * stride_tm + offs_o[None, :], mask=mask_o, other=0.0).to(ACC)
        value = tl.where(mask, LOSS(y, target, *loss_params, MODE=MODE)[0], 0.0)
        loss = tl.sum(value, axis=1)
        weight = tl.zeros((BLOCK_M,), ACC) + scale
        if HAS_WEIGHTS:
            row_weight = tl.load(row_weight_ptr + rows).to(ACC)
            loss = tl.where(mask_m, loss * row_weight, 0.0)
            weight = weight * row_weight
        g = tl.zeros((BLOCK_M, OUT_PAD), ACC) + weight[:, None]
        g = LOSS_GRAD(y, target, *loss_params, g, MODE=MODE)[0]
    else:
        g = tl.load(g_ptr + rows[:, None] * stride_gm + offs_o[None, :], mask=mask_o, other=0.0).to(ACC)
    gz = LAST_GRAD(zy, *last_params, g, MODE=MODE)[0]
    return tl.where(mask, gz, 0.0), loss


@triton.jit(
    do_not_specialize=["M", "L", "ROWS_Z", "ROWS_OUT", "ACCUMULATE"],
    do_not_specialize_on_alignment=["M", "L", "ROWS_Z", "ROWS_OUT", "ACCUMULATE"],
)
def train_kernel(
    x_ptr, g_ptr, target_ptr, row_weight_ptr, first_ptr, hidden_ptr, back_ptr, last_ptr, bias_ptr, map_params,
    table_ptr, last_params, loss_params, scale, z_ptr, gx_ptr, gfirst_ptr, ghidden_ptr, glast_ptr, gbias_ptr,
    gparams_ptr, loss_ptr, gz_ptr, h_ptr, M, L, K, K_PAD, OUT, ROWS_Z, ROWS_OUT, ACCUMULATE, stride_xm, stride_gm, stride_tm,
    stride_sum,
    MAP: tl.constexpr, MAP_GRAD: tl.constexpr, LAST: tl.constexpr, LAST_GRAD: tl.constexpr, LOSS: tl.constexpr,
    LOSS_GRAD: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr, GP: tl.constexpr,
    SETS: tl.constexpr, TABLE: tl.constexpr, N: tl.constexpr, RECOMPUTE: tl.constexpr, HAS_LOSS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, NEED_X: tl.constexpr, NEED_W: tl.constexpr, NEED_B: tl.constexpr, SUMS: tl.constexpr,
    LATER: tl.constexpr, RELOAD: tl.constexpr, K_MAJOR: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr, T: tl.constexpr,
    OUT_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Gradients for the cotangent g [M, OUT] of y, or of scale sum_m row_weight_m sum_n LOSS(y, target).

    gx [M, K]. Per program, summed over its tiles: gfirst [B*WIDTH, K_PAD], glast [C*WIDTH, OUT_PAD], ghidden [L-1,
    B*T, C*T, BLOCK_T, BLOCK_T] (block by block), gbias [L*B*WIDTH + OUT_PAD], gparams [L, GP*WIDTH], loss.
    LATER: the factors of ghidden, of LATER tiles, wait in the program's gz [L-1, LATER*BLOCK_M, B*WIDTH] (layers 1 and
    on) and h [L-1, LATER*BLOCK_M, C*WIDTH] (layers 0 and on) until the registers of a tile's backward are free; ghidden
    is [L-1, B*WIDTH, C*WIDTH] then. Without SUMS the factors of all rows are written, gz [L-1, ROWS_OUT, B*WIDTH] and
    h [L-1, ROWS_OUT, C*WIDTH], and the product is another launch's. RECOMPUTE: z is scratch, BLOCK_M of its ROWS_Z rows
    a program; else it holds what the forward kernel saved. ACCUMULATE: the sums continue those of the launch before.
    """
    WIDTH: tl.constexpr = T * BLOCK_T
    BT: tl.constexpr = B * T
    CT: tl.constexpr = C * T
    SQUARE: tl.constexpr = B * WIDTH * C * WIDTH
    BLOCK_O: tl.constexpr = 128 if WIDTH > 128 else WIDTH
    BLOCK_I: tl.constexpr = 64 if WIDTH > 64 else WIDTH
    offs = tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_T)
    offs_o = tl.arange(0, OUT_PAD)
    stride_z = ROWS_Z.to(tl.int64) * (B * WIDTH)
    program = tl.program_id(0).to(tl.int64)
    sums = program * stride_sum
    losses = tl.zeros((BLOCK_M,), ACC)
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True):
        seen = (tile != program) | (ACCUMULATE != 0)
        start = tile * BLOCK_M  # int64
        limit = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        mask_m = offs < limit
        near = tl.minimum(offs, limit - 1)  # beyond the end, the last row again: finite where that row is
        rows = start + near
        if LATER:
            turn = (tile - program) // tl.num_programs(0)
            place = (turn % LATER).to(tl.int32)
        if RECOMPUTE:
            z_tile = z_ptr + program * (BLOCK_M * B * WIDTH)
            offs_z = offs
            z = first_layer(
                x_ptr, first_ptr, bias_ptr, rows, offs_t, K, K_PAD, stride_xm,
                BT, NARROW, PRECISION, UPCAST, ACC, BLOCK_M, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            for layer in tl.range(1, L, num_stages=STAGES, disable_licm=True):
                store_tiles(z, z_tile + stride_z * (layer - 1), offs, limit, offs_t, BT, BLOCK_T, False)
                p = layer_params(map_params, table_ptr, layer - 1, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
                h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE)
                z = product(
                    h, hidden_ptr + (layer - 1) * SQUARE, 1, C * WIDTH, CT, BT, BLOCK_T, BLOCK_T, PRECISION, UPCAST,
                    ACC, BLOCK_M,
                )  # fmt: skip
                z = add_bias(z, bias_ptr + layer * (B * WIDTH), offs_t, BT, BLOCK_T)
            if RELOAD:
                store_tiles(z, z_tile + stride_z * (L - 1), offs, limit, offs_t, BT, BLOCK_T, False)
            tl.debug_barrier()  # the scratch tile is read in another order than it was written in
        else:
            z_tile = z_ptr + start * (B * WIDTH)
            offs_z = near
            z = load_tiles(z_tile + stride_z * (L - 1), offs_z, offs_t, BT, BLOCK_T)
        p = layer_params(map_params, table_ptr, L - 1, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
        h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE)

        out = product(h, last_ptr, 1, C * WIDTH, CT, 1, BLOCK_T, OUT_PAD, PRECISION, UPCAST, ACC, BLOCK_M)
        zy = out[0] + tl.load(bias_ptr + L * (B * WIDTH) + offs_o)[None, :]
        gzy, loss = output_gradient(
            zy, g_ptr, target_ptr, row_weight_ptr, last_params, loss_params, scale, rows, mask_m, offs_o, OUT,
            stride_gm, stride_tm, LAST, LAST_GRAD, LOSS, LOSS_GRAD, MODE, HAS_LOSS, HAS_WEIGHTS, ACC, BLOCK_M, OUT_PAD,
        )  # fmt: skip
        losses += loss
        if NEED_B:
            add_to(gbias_ptr + sums + L * (B * WIDTH) + offs_o, tl.sum(gzy, axis=0), seen)
        gz = narrow_all((gzy,), 1, DTYPE)
        if NEED_W:
            add_outer(glast_ptr + sums, h, gz, seen, CT, 1, BLOCK_T, OUT_PAD, PRECISION, UPCAST, ACC)
        g = product(gz, last_ptr, C * WIDTH, 1, 1, CT, OUT_PAD, BLOCK_T, PRECISION, UPCAST, ACC, BLOCK_M)
        if RELOAD:  # rather than kept in registers through the products
            tl.debug_barrier()
            z = load_tiles(z_tile + stride_z * (L - 1), offs_z, offs_t, BT, BLOCK_T)
        full = pull_back(z, p, g, mask_m, offs_t, MAP_GRAD, MODE, B, C, T, P, GP, N, BLOCK_T)
        if NEED_B:
            add_rows(gbias_ptr + sums + (L - 1) * (B * WIDTH), full, offs_t, seen, BT, BLOCK_T)
        if GP:
            add_rows(gparams_ptr + sums + (L - 1) * (GP * WIDTH), full[BT:], offs_t, seen, GP * T, BLOCK_T)
        gz = narrow_all(full, BT, DTYPE)

        for step in tl.range(1, L, num_stages=STAGES, disable_licm=True):
            layer = L - 1 - step  # gz is that of the layer above
            z = load_tiles(z_tile + stride_z * layer, offs_z, offs_t, BT, BLOCK_T)
            p = layer_params(map_params, table_ptr, layer, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
            if NEED_W:
                h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE)
                if LATER:
                    above = (program * (L - 1) + layer) * (LATER * BLOCK_M) + place * BLOCK_M
                    store_tiles(gz, gz_ptr + above * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, False)
                    store_tiles(h, h_ptr + above * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, False)
                elif SUMS:
                    square = ghidden_ptr + sums + layer * SQUARE
                    add_outer(square, gz, h, seen, BT, CT, BLOCK_T, BLOCK_T, PRECISION, UPCAST, ACC)
                else:
                    above = ROWS_OUT.to(tl.int64) * layer + start
                    store_tiles(gz, gz_ptr + above * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, True)
                    store_tiles(h, h_ptr + above * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, True)
            if K_MAJOR:  # a transposed copy [L-1, C*WIDTH, B*WIDTH]
                g = product(
                    gz, back_ptr + layer * SQUARE, 1, B * WIDTH, BT, CT, BLOCK_T, BLOCK_T, PRECISION, UPCAST, ACC,
                    BLOCK_M,
                )  # fmt: skip
            else:
                g = product(
                    gz, back_ptr + layer * SQUARE, C * WIDTH, 1, BT, CT, BLOCK_T, BLOCK_T, PRECISION, UPCAST, ACC,
                    BLOCK_M,
                )  # fmt: skip
            if RELOAD:
                tl.debug_barrier()
                z = load_tiles(z_tile + stride_z * layer, offs_z, offs_t, BT, BLOCK_T)
            full = pull_back(z, p, g, mask_m, offs_t, MAP_GRAD, MODE, B, C, T, P, GP, N, BLOCK_T)
            if NEED_B:
                add_rows(gbias_ptr + sums + layer * (B * WIDTH), full, offs_t, seen, BT, BLOCK_T)
            if GP:
                add_rows(gparams_ptr + sums + layer * (GP * WIDTH), full[BT:], offs_t, seen, GP * T, BLOCK_T)
            gz = narrow_all(full, BT, DTYPE)

        if NEED_X or NEED_W:
            for k in tl.range(0, K_PAD, BLOCK_X, num_stages=1, disable_licm=True):
                offs_k = k + tl.arange(0, BLOCK_X)
                mask_k = (offs_k < K)[None, :]
                if NEED_X:
                    gx = tl.zeros((BLOCK_M, BLOCK_X), ACC)
                    for i in tl.static_range(BT):
                        w = load_tile(first_ptr, i * BLOCK_T, k, K_PAD, 1, BLOCK_T, BLOCK_X)
                        v = gz[i]
                        if UPCAST:
                            w = w.to(ACC)
                            v = v.to(ACC)
                        gx = tl.dot(v, w, gx, input_precision=PRECISION, out_dtype=ACC)
                    gx_tile = gx_ptr + rows[:, None] * K + offs_k[None, :]
                    tl.store(gx_tile, narrow(gx, DTYPE), mask=mask_m[:, None] & mask_k)
                if NEED_W:
                    x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask_k, other=0.0)
                    if UPCAST:
                        x = x.to(ACC)
                    for i in tl.static_range(BT):
                        v = gz[i]
                        if UPCAST:
                            v = v.to(ACC)
                        grad = tl.dot(tl.trans(v), x, input_precision=PRECISION, out_dtype=ACC)
                        tile_w = gfirst_ptr + sums + (i * BLOCK_T + offs_t)[:, None] * K_PAD + offs_k[None, :]
                        add_to(tile_w, grad, seen)
        tl.debug_barrier()  # before the next tile's scratch and sums
        if LATER:
            if NEED_W:
                if (place == LATER - 1) | (tile + tl.num_programs(0) >= tl.cdiv(M, BLOCK_M)):
                    for layer in tl.range(0, L - 1, num_stages=1, disable_licm=True):
                        above = (program * (L - 1) + layer) * (LATER * BLOCK_M)
                        add_product(
                            ghidden_ptr + sums + layer * SQUARE, gz_ptr + above * (B * WIDTH),
                            h_ptr + above * (C * WIDTH), (place + 1) * BLOCK_M, turn >= LATER, B * WIDTH, C * WIDTH,
                            BLOCK_M, BLOCK_O, BLOCK_I, PRECISION, UPCAST, ACC,
                        )  # fmt: skip
                    tl.debug_barrier()  # before the next tile's factors
    if HAS_LOSS:
        value = tl.sum(losses, axis=0) * scale
        if ACCUMULATE != 0:
            value += tl.load(loss_ptr + sums)
        tl.store(loss_ptr + sums, value)


# ---------------------------------------------------------------- training pass of a narrow network


@triton.jit
def outer(
    sums, first, gz, h, OUT: tl.constexpr, IN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums[first ..] + gz^T h, block by block."""
    new = ()
    for o in tl.static_range(OUT):
        for i in tl.static_range(IN):
            a = gz[o]
            v = h[i]
            if UPCAST:
                a = a.to(ACC)
                v = v.to(ACC)
            acc = sums[first + o * IN + i]
            new = new + (tl.dot(tl.trans(a), v, acc, input_precision=PRECISION, out_dtype=ACC),)
    return new


@triton.jit
def store_blocks(ptr, blocks, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for i in tl.static_range(COUNT):
        tl.store(ptr + i * (ROWS * COLUMNS) + offs, blocks[i])


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def one_pass_kernel(
    x_ptr, g_ptr, target_ptr, row_weight_ptr, first_ptr, hidden_ptr, back_ptr, last_ptr, bias_ptr, map_params,
    table_ptr, last_params, loss_params, scale, gx_ptr, gfirst_ptr, ghidden_ptr, glast_ptr, gbias_ptr, loss_ptr,
    M, K, OUT, stride_xm, stride_gm, stride_tm, stride_sum,
    MAP: tl.constexpr, MAP_GRAD: tl.constexpr, LAST: tl.constexpr, LAST_GRAD: tl.constexpr, LOSS: tl.constexpr,
    LOSS_GRAD: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SETS: tl.constexpr,
    TABLE: tl.constexpr, N: tl.constexpr, HIDDEN: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    NEED_X: tl.constexpr, NEED_W: tl.constexpr, NEED_B: tl.constexpr, K_MAJOR: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr, OUT_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """What `train_kernel` computes with RECOMPUTE and SUMS, for one feature tile (WIDTH = BLOCK_T) and a constant depth
    of HIDDEN products: pre-activations and the sums of hidden weights stay in registers, written once at the end."""
    SQUARE: tl.constexpr = B * C * BLOCK_T * BLOCK_T
    offs = tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_T)
    offs_o = tl.arange(0, OUT_PAD)
    offs_k = tl.arange(0, K_PAD)
    program = tl.program_id(0).to(tl.int64)
    losses = tl.zeros((BLOCK_M,), ACC)
    ghidden = zeros(HIDDEN * B * C, BLOCK_T, BLOCK_T, ACC)
    sums = program * stride_sum
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True):
        start = tile * BLOCK_M  # int64
        limit = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        mask_m = offs < limit
        seen = tile != program
        rows = start + tl.minimum(offs, limit - 1)  # beyond the end, the last row again: finite where that row is
        z = first_layer(
            x_ptr, first_ptr, bias_ptr, rows, offs_t, K, K_PAD, stride_xm,
            B, NARROW, PRECISION, UPCAST, ACC, BLOCK_M, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        p = layer_params(map_params, table_ptr, 0, offs_t, 1, BLOCK_T, BLOCK_T, P, SETS, TABLE)
        h = evaluate(z, p, offs_t, MAP, MODE, B, C, 1, P, N, BLOCK_T, DTYPE)
        all_z = z
        all_h = h
        for layer in tl.static_range(1, HIDDEN + 1):
            z = product(
                h, hidden_ptr + (layer - 1) * SQUARE, 1, C * BLOCK_T, C, B, BLOCK_T, BLOCK_T, PRECISION, UPCAST, ACC,
                BLOCK_M,
            )  # fmt: skip
            z = add_bias(z, bias_ptr + layer * (B * BLOCK_T), offs_t, B, BLOCK_T)
            p = layer_params(map_params, table_ptr, layer, offs_t, 1, BLOCK_T, BLOCK_T, P, SETS, TABLE)
            h = evaluate(z, p, offs_t, MAP, MODE, B, C, 1, P, N, BLOCK_T, DTYPE)
            all_z = all_z + z
            all_h = all_h + h
        out = product(h, last_ptr, 1, C * BLOCK_T, C, 1, BLOCK_T, OUT_PAD, PRECISION, UPCAST, ACC, BLOCK_M)
        zy = out[0] + tl.load(bias_ptr + (HIDDEN + 1) * (B * BLOCK_T) + offs_o)[None, :]
        gzy, loss = output_gradient(
            zy, g_ptr, target_ptr, row_weight_ptr, last_params, loss_params, scale, rows, mask_m, offs_o, OUT,
            stride_gm, stride_tm, LAST, LAST_GRAD, LOSS, LOSS_GRAD, MODE, HAS_LOSS, HAS_WEIGHTS, ACC, BLOCK_M, OUT_PAD,
        )  # fmt: skip
        losses += loss
        if NEED_B:
            add_to(gbias_ptr + sums + (HIDDEN + 1) * (B * BLOCK_T) + offs_o, tl.sum(gzy, axis=0), seen)
        gz = narrow_all((gzy,), 1, DTYPE)
        if NEED_W:
            add_outer(glast_ptr + sums, h, gz, seen, C, 1, BLOCK_T, OUT_PAD, PRECISION, UPCAST, ACC)
        g = product(gz, last_ptr, C * BLOCK_T, 1, 1, C, OUT_PAD, BLOCK_T, PRECISION, UPCAST, ACC, BLOCK_M)
        new_hidden = ()
        for above in tl.static_range(HIDDEN, -1, -1):
            p = layer_params(map_params, table_ptr, above, offs_t, 1, BLOCK_T, BLOCK_T, P, SETS, TABLE)
            z = ()
            for b in tl.static_range(B):
                z = z + (all_z[above * B + b],)
            full = pull_back(z, p, g, mask_m, offs_t, MAP_GRAD, MODE, B, C, 1, P, 0, N, BLOCK_T)
            if NEED_B:
                add_rows(gbias_ptr + sums + above * (B * BLOCK_T), full, offs_t, seen, B, BLOCK_T)
            gz = narrow_all(full, B, DTYPE)
            if above > 0:
                if NEED_W:
                    h = ()
                    for c in tl.static_range(C):
                        h = h + (all_h[(above - 1) * C + c],)
                    own = outer(ghidden, (above - 1) * B * C, gz, h, B, C, PRECISION, UPCAST, ACC)
                    new_hidden = own + new_hidden
                if K_MAJOR:  # a transposed copy
                    g = product(
                        gz, back_ptr + (above - 1) * SQUARE, 1, B * BLOCK_T, B, C, BLOCK_T, BLOCK_T, PRECISION, UPCAST,
                        ACC, BLOCK_M,
                    )  # fmt: skip
                else:
                    g = product(
                        gz, back_ptr + (above - 1) * SQUARE, C * BLOCK_T, 1, B, C, BLOCK_T, BLOCK_T, PRECISION, UPCAST,
                        ACC, BLOCK_M,
                    )  # fmt: skip
        mask_k = (offs_k < K)[None, :]
        if NEED_X:
            gx = product(gz, first_ptr, K_PAD, 1, B, 1, BLOCK_T, K_PAD, PRECISION, UPCAST, ACC, BLOCK_M)
            gx_tile = gx_ptr + rows[:, None] * K + offs_k[None, :]
            tl.store(gx_tile, narrow(gx[0], DTYPE), mask=mask_m[:, None] & mask_k)
        if NEED_W:
            ghidden = new_hidden
            x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask_k, other=0.0)
            add_outer(gfirst_ptr + sums, gz, (x,), seen, B, 1, BLOCK_T, K_PAD, PRECISION, UPCAST, ACC)
    if NEED_W and HIDDEN > 0:
        store_blocks(ghidden_ptr + sums, ghidden, HIDDEN * B * C, BLOCK_T, BLOCK_T)
    if HAS_LOSS:
        tl.store(loss_ptr + sums, tl.sum(losses, axis=0) * scale)


# ---------------------------------------------------------------- what a network is, and whether it is served


@dataclass(frozen=True)
class Network:
    """Sizes of a network of `layers` equal layers and a last one."""

    inputs: int
    outputs: int
    layers: int
    features: int
    branches: int
    channels: int
    n_params: int
    width: int

    @property
    def inputs_pad(self) -> int:
        return -(-self.inputs // 16) * 16 if self.inputs <= 32 else -(-self.inputs // 32) * 32

    @property
    def outputs_pad(self) -> int:
        return max(16, tune._power_of_two(self.outputs))

    @property
    def rows(self) -> int:
        """Rows of a hidden weight, padded: branches times width."""
        return self.branches * self.width

    @property
    def columns(self) -> int:
        return self.channels * self.width


def _network(shapes: Sequence[tuple[int, int]], maps: Sequence, arch: str) -> Network:
    hidden = maps[0]
    B, C = hidden.branches, hidden.outputs
    N = shapes[0][0] // B
    return Network(shapes[0][1], shapes[-1][0], len(shapes) - 1, N, B, C, hidden.n_params, mlp_tune.width(N, arch))


def _arch(capability: int | None) -> str:
    return "interpreter" if capability is None else tune.arch_of_capability(capability // 10, capability % 10)


def serves(
    shapes: Sequence[tuple[int, int]],
    maps: Sequence,
    dtype: torch.dtype,
    precision: str,
    arch: int | None,
    *,
    direction: str,
) -> str:
    """Why the whole-network kernels cannot run a network, or "" if they can.

    Args:
        shapes: of the weights, (rows, columns), first layer first.
        maps: the `ActivationMap` of each layer.
        dtype, precision: of the operands; of float32 products.
        arch: the compute capability as one number (90), None for the interpreter.
        direction: "forward", "backward" or "loss".
    """
    if direction not in ("forward", "backward", "loss"):
        raise ValueError(f"direction: {direction!r} is not one of forward, backward, loss")
    if len(shapes) != len(maps) or len(shapes) < 2:
        return "a network of at least two layers, each with its activation, is needed"
    hidden, last = maps[0], maps[-1]
    if any(m is not hidden for m in maps[:-1]):
        return "the layers before the last have different activations"
    if (last.branches, last.outputs) != (1, 1):
        return f"the last activation, {last.name}, has {last.branches} branches and {last.outputs} outputs"
    B, C = hidden.branches, hidden.outputs
    N = shapes[0][0] // B
    if any(s != (B * N, C * N) for s in shapes[1:-1]) or shapes[0][0] != B * N or shapes[-1][1] != C * N:
        return "the hidden layers differ in width"
    K, out = shapes[0][1], shapes[-1][0]
    if min(K, out, N) < 1:
        return "a layer is empty"
    if K > mlp_tune.MAX_INPUTS:
        return f"{K} inputs; the kernels take {mlp_tune.MAX_INPUTS}"
    if out > mlp_tune.MAX_OUTPUTS:
        return f"{out} outputs; the kernels take {mlp_tune.MAX_OUTPUTS}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) and not (dtype == torch.float64 and INTERPRETED):
        return f"{dtype} is not served"
    name = _arch(arch)
    if name == "interpreter":
        return "" if INTERPRETED else "no CUDA device"
    if dtype == torch.float32 and precision == "ieee":
        return "float32 products in precision 'ieee' take the layers one by one; tf32, bf16x3 and tf32x3 are served"
    op = "forward" if direction == "forward" else "train"
    WIDTH = mlp_tune.width(N, name)
    if mlp_tune.pick(name, op, dtype, precision, B, C, WIDTH) is None:
        kind = f"{B} branches and {C} outputs" if (B, C) != (1, 1) else "one branch"
        products = f"float32 in {precision}" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        return f"no configuration for width {N}, {kind}, {products} on {name} ({direction})"
    return ""


# ---------------------------------------------------------------- operands, packed once a call


@dataclass
class _Operands:
    net: Network
    arch: str
    first: torch.Tensor
    hidden: torch.Tensor
    last: torch.Tensor
    bias: torch.Tensor
    params: tuple
    sets: int
    table: torch.Tensor | None
    last_params: tuple


def _pack_weights(net: Network, weights, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, C, N, W = net.branches, net.channels, net.features, net.width
    first = weights[0].to(dtype).reshape(B, N, net.inputs)
    # contiguous: a pad by nothing keeps the strides of a transposed weight
    first = pad(first, (0, net.inputs_pad - net.inputs, 0, W - N)).reshape(net.rows, net.inputs_pad).contiguous()
    hidden = first
    if net.layers > 1:
        hidden = torch.stack([w.to(dtype) for w in weights[1:-1]])
        if W != N:
            hidden = pad(hidden.view(-1, B, N, C, N), (0, W - N, 0, 0, 0, W - N)).view(-1, net.rows, net.columns)
    last = weights[-1].to(dtype).reshape(net.outputs, C, N)
    last = pad(last, (0, W - N, 0, 0, 0, net.outputs_pad - net.outputs)).reshape(net.outputs_pad, net.columns)
    return first, hidden.contiguous(), last.contiguous()


def _pack_bias(net: Network, biases, like: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    parts = []
    for b in biases[:-1]:
        if b is None:
            parts.append(like.new_zeros(net.rows, dtype=acc))
        else:
            parts.append(pad(b.to(acc).view(net.branches, -1), (0, net.width - net.features)).view(-1))
    b = biases[-1]
    out = like.new_zeros(net.outputs, dtype=acc) if b is None else b.to(acc)
    return torch.cat((*parts, pad(out, (0, net.outputs_pad - net.outputs))))


def _pack_params(net: Network, params, constants, like: torch.Tensor, acc: torch.dtype):
    """Numbers: as few sets as there are different layers from the front; tensors among them (or float64, which a
    number argument of a kernel is not): a table."""
    L, P = net.layers, net.n_params
    hidden, values = params[: L * P], [float(c) for c in constants[: L * P]]
    if P and (acc == torch.float64 or any(p is not None for p in hidden)):
        table = like.new_zeros((L * P, net.width), dtype=acc)
        for i, p in enumerate(hidden):
            table[i, : net.features] = values[i] if p is None else p.detach().to(acc)
        return (), 1, table
    sets = [tuple(values[i * P : (i + 1) * P]) for i in range(L)] if P else [()]
    while len(sets) > 1 and sets[-1] == sets[-2]:
        sets.pop()
    return tuple(v for s in sets for v in s), len(sets), None


def _operands(x, weights, biases, params, constants, maps) -> _Operands:
    shapes = [(int(w.shape[0]), int(w.shape[1])) for w in weights]
    arch = tune.arch(x.device)
    net = _network(shapes, maps, arch)
    acc = accumulator(x.dtype)
    n = net.layers * net.n_params
    if any(p is not None for p in params[n:]):
        raise ValueError(f"the parameters of the last activation, {maps[-1].name}, must be numbers in this kernel")
    numbers, sets, table = _pack_params(net, params, constants, x, acc)
    return _Operands(
        net, arch, *_pack_weights(net, weights, x.dtype), _pack_bias(net, biases, x, acc), numbers, sets, table,
        tuple(float(c) for c in constants[n:]),
    )  # fmt: skip


TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _rows(t: torch.Tensor) -> torch.Tensor:
    """Any stride between rows, none but 1 within."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _config(o: _Operands, op: str, dtype: torch.dtype, precision: str) -> mlp_tune.Config:
    net = o.net
    config = mlp_tune.pick(o.arch, op, dtype, precision, net.branches, net.channels, net.width)
    if config is None:  # whoever asked `serves` is not here
        raise ValueError(f"no configuration for width {net.features} in {dtype} {precision} on {o.arch} ({op})")
    return config


def _constants(o: _Operands, config: mlp_tune.Config, x: torch.Tensor, precision: str) -> dict[str, object]:
    """What both kernels take as constants."""
    net = o.net
    narrow_k = x.dtype.itemsize >= 4 and net.inputs <= tune.NARROW_K_LIMIT
    return {
        "MODE": mode(x.dtype, precision), "B": net.branches, "C": net.channels, "P": net.n_params, "SETS": o.sets,
        "TABLE": o.table is not None, "N": net.features, "NARROW": narrow_k,
        "PRECISION": dot_precision(x.dtype, precision), "UPCAST": INTERPRETED, "ACC": _TRITON[accumulator(x.dtype)],
        "DTYPE": TYPES[x.dtype], "STAGES": config.stages, "T": config.tiles, "OUT_PAD": net.outputs_pad,
        "BLOCK_M": config.block_m, "BLOCK_T": net.width // config.tiles,
        "BLOCK_K": net.inputs if narrow_k else min(32, net.inputs_pad), **config.options(),
    }  # fmt: skip


def launch_forward(x, o: _Operands, y, z, maps, config: mlp_tune.Config, precision: str) -> None:
    """y [M, OUT] and, unless None, z [L, M, B*WIDTH]; M > 0."""
    net, M = o.net, x.shape[0]
    resident = net.layers - 1 if net.layers - 1 <= config.resident else 0
    with on_device(x):
        forward_kernel[(min(config.programs, triton.cdiv(M, config.block_m)),)](
            x, o.first, o.hidden, o.last, o.bias, o.params, o.table, o.last_params, y, z, M, net.layers, net.inputs,
            net.inputs_pad, net.outputs, x.stride(0), y.stride(0), MAP=maps[0].triton_map(0, False),
            LAST=_last_map(maps[-1], 0), SAVE_Z=z is not None, RESIDENT=resident, **_constants(o, config, x, precision),
        )  # fmt: skip


def _last_map(m, level: int):
    return identity if m.name == "identity" and level == 0 else m.triton_map(level, False)


# ---------------------------------------------------------------- the operations


def mlp(x, weights, biases, params, constants, maps, precision: str = "ieee", save: bool = False):
    """The network's output, and what its backward may take; not differentiable by itself.

    Args:
        x: [M, K] of any row stride; float32, bfloat16, float16 (float64 in the interpreter).
        weights, biases: [B_i*N_i, C_(i-1)*N_(i-1)], and [B_i*N_i] or None, of each layer.
        params, constants: of all layers, one after the other: a tensor ([] or [N]), or None for the number.
        maps: the `ActivationMap` of each layer; all but the last are one.
        save: whether to keep the pre-activations.
    Returns:
        y [M, N_last] in x's type; the pre-activations, flat, in float32, or an empty tensor ([0]).
    """
    o = _operands(x, weights, biases, params, constants, maps)
    net, M, acc = o.net, x.shape[0], accumulator(x.dtype)
    config = _config(o, "save" if save else "forward", x.dtype, precision)
    y = x.new_empty((M, net.outputs))
    z = x.new_empty((net.layers, M, net.rows) if save else (0,), dtype=acc)
    if M:
        launch_forward(_rows(x), o, y, z if save else None, maps, config, precision)
    return y, z.view(-1)


@dataclass(frozen=True)
class _Loss:
    target: torch.Tensor
    row_weights: torch.Tensor | None
    map: object
    constants: tuple[float, ...]
    scale: float


def _segments(net: Network, config: mlp_tune.Config, needs, GP: int, loss: bool) -> dict[str, tuple[int, int]]:
    """Where a program's sums lie in its row of the buffer: offset and length, each offset a multiple of 16."""
    hidden = (net.layers - 1) * net.rows * net.columns
    sizes = {
        "first": net.rows * net.inputs_pad if needs[1] else 0,
        "hidden": hidden if needs[1] and config.sums else 0,
        "last": net.columns * net.outputs_pad if needs[1] else 0,
        "bias": net.layers * net.rows + net.outputs_pad if needs[2] else 0,
        "params": net.layers * GP * net.width,
        "loss": 1 if loss else 0,
    }
    where, offset = {}, 0
    for name, size in sizes.items():
        where[name] = (offset, size)
        offset += -(-size // 16) * 16
    where["total"] = (0, offset)
    return where


def by_sums(net: Network, config: mlp_tune.Config) -> mlp_tune.Config:
    """The configuration for this depth, with the way of the hidden weights' gradients settled: `sums`, unless those of
    so many layers would leave the cache; of factors that wait in `later` tiles where the entry says so."""
    if config.programs * (net.layers - 1) * net.rows * net.columns * 4 > mlp_tune.SUMS_BYTES:
        return replace(config, sums=False)
    later = 0 if config.sums else max(1, mlp_tune.LATER_ROWS // config.block_m)
    return replace(config, sums=True, later=later)


def _train(g, x, weights, biases, params, constants, maps, saved, precision: str, needs, loss: _Loss | None):
    """Loss (or None) and gradients, for g or for the loss."""
    o = _operands(x, weights, biases, params, constants, maps)
    net, M, acc = o.net, x.shape[0], accumulator(x.dtype)
    L, P, T = net.layers, net.n_params, x.dtype.itemsize
    need_x, need_w, need_b, need_p = needs
    need_b = need_b and any(b is not None for b in biases)
    GP = P if need_p else 0
    if need_p and maps[-1].n_params:
        raise ValueError(f"gradients of the parameters of the last activation, {maps[-1].name}, are not computed here")
    if saved is not None:
        saved = saved.view(L, M, net.rows)
    narrow_config = mlp_tune.pick(o.arch, "one_pass", x.dtype, precision, net.branches, net.channels, net.width)
    one_pass = saved is None and not GP and narrow_config is not None
    one_pass = one_pass and L - 1 <= narrow_config.resident and net.inputs_pad <= 32
    config = _config(o, "train" if saved is None else "backward", x.dtype, precision)
    config = narrow_config if one_pass else by_sums(net, config)
    where = _segments(net, config, (need_x, need_w, need_b), GP, loss is not None)
    total = where["total"][1]
    x = _rows(x)
    gx = x.new_empty((M, net.inputs) if need_x else (0,))
    result = x.new_zeros(total, dtype=acc) if not M else x.new_empty(total, dtype=acc)
    hidden = None if config.sums or not need_w else x.new_zeros((L - 1, net.rows, net.columns), dtype=acc)
    if M and (total or need_x):
        chunk = M
        gz = h = None
        if hidden is not None:
            row_bytes = max(1, L - 1) * (net.rows + net.columns) * T
            chunk = max(1, mlp_tune.CHUNK_BYTES // row_bytes // config.block_m) * config.block_m
            chunk = min(chunk, M)
        programs = min(config.programs, triton.cdiv(chunk, config.block_m))
        if need_w and (config.later or not config.sums):
            waiting = programs * config.later * config.block_m if config.later else chunk
            gz = x.new_empty(max(1, (L - 1) * waiting * net.rows))
            h = x.new_empty(max(1, (L - 1) * waiting * net.columns))
        sums = x.new_empty((programs, total), dtype=acc)
        z = saved
        if saved is None and not one_pass:
            z = x.new_empty((L, programs * config.block_m, net.rows), dtype=acc)
        back = o.hidden.mT.contiguous() if T == 4 and L > 1 else o.hidden  # tf32 wants the summed index innermost
        for start in range(0, M, chunk):
            rows = slice(start, min(start + chunk, M))
            _launch_train(
                o, config, maps, x[rows], None if g is None else _rows(g)[rows], loss, rows, back,
                z if saved is None else z[:, rows], gx[rows] if need_x else None, sums, where, gz, h, programs,
                (need_x, need_w, need_b), GP, precision, saved is None, one_pass,
            )  # fmt: skip
            if hidden is not None and L > 1:
                hidden += _hidden_gradient(net, gz, h, rows.stop - rows.start, precision)
        launch_sum(sums.view(1, programs, total), result.view(1, total))
    return _unpack(net, config, result, hidden, gx, where, weights, biases, need_w, need_b, GP, loss)


def _launch_train(
    o, config, maps, x, g, loss, rows, back, z, gx, sums, where, gz, h, programs, needs, GP, precision, recompute,
    one_pass,
) -> None:  # fmt: skip
    net, M = o.net, x.shape[0]
    segment = {k: sums[0, offset:] if size else None for k, (offset, size) in where.items()}
    target = row_weights = None
    scale, loss_params, functions = 1.0, (), (identity, identity)
    if loss is not None:
        target = _rows(loss.target)[rows]
        row_weights = None if loss.row_weights is None else loss.row_weights[rows]
        scale, loss_params = loss.scale, loss.constants
        functions = (loss.map.triton_map(0, False), loss.map.triton_map(1, False))
    inputs = (
        x, g, target, row_weights, o.first, o.hidden, back, o.last, o.bias, o.params, o.table, o.last_params,
        loss_params, scale,
    )  # fmt: skip
    strides = (
        x.stride(0), 0 if g is None else g.stride(0), 0 if target is None else target.stride(0), sums.shape[1],
    )  # fmt: skip
    constants = {
        "MAP": maps[0].triton_map(0, False), "MAP_GRAD": maps[0].triton_map(1, GP > 0), "LAST": _last_map(maps[-1], 0),
        "LAST_GRAD": maps[-1].triton_map(1, False), "LOSS": functions[0], "LOSS_GRAD": functions[1],
        "HAS_LOSS": loss is not None, "HAS_WEIGHTS": row_weights is not None, "NEED_X": needs[0], "NEED_W": needs[1],
        "NEED_B": needs[2], "K_MAJOR": x.dtype.itemsize == 4, **_constants(o, config, x, precision),
    }  # fmt: skip
    first, hidden, last, bias, of_params, of_loss = (
        segment[k] for k in ("first", "hidden", "last", "bias", "params", "loss")
    )
    if hidden is None and config.sums:  # no hidden product: compiled, but never run
        hidden = first
    grid = (min(programs, triton.cdiv(M, config.block_m)),)
    with on_device(x):
        if one_pass:
            del constants["STAGES"], constants["T"]
            one_pass_kernel[grid](
                *inputs, gx, first, hidden, last, bias, of_loss, M, net.inputs, net.outputs, *strides,
                HIDDEN=net.layers - 1, K_PAD=net.inputs_pad, **constants,
            )  # fmt: skip
        else:
            train_kernel[grid](
                *inputs, z, gx, first, hidden, last, bias, of_params, of_loss, gz, h, M, net.layers, net.inputs,
                net.inputs_pad, net.outputs, z.stride(0) // net.rows, M, int(rows.start > 0), *strides, GP=GP,
                RECOMPUTE=recompute, SUMS=config.sums, LATER=config.later, RELOAD=config.reload,
                BLOCK_X=min(32, net.inputs_pad), **constants,
            )  # fmt: skip


def _hidden_gradient(net: Network, gz, h, rows: int, precision: str) -> torch.Tensor:
    """gz^T h of a chunk for all hidden products at once, [L-1, B*WIDTH, C*WIDTH] in float32."""
    layers = net.layers - 1
    gz = gz[: layers * rows * net.rows].view(layers, rows, net.rows)
    h = h[: layers * rows * net.columns].view(layers, rows, net.columns)
    N, K = net.rows, net.columns
    config = tune.pick(tune.arch(gz.device), "weight_grad", tune.kind(N, K), gz.dtype, precision, 1, N, K)
    splits, per_split = weight_grad_splits(rows, N, K, config, layers)
    partials = gz.new_empty((layers, splits, N * K), dtype=accumulator(gz.dtype))
    launch_weight_grad(gz, h, partials, splits, per_split, config, precision)
    if splits == 1:
        return partials.view(layers, N, K)
    out = partials.new_empty((layers, N, K))
    launch_sum(partials, out.view(layers, N * K))
    return out


def _unpack(net: Network, config, result, hidden, gx, where, weights, biases, need_w, need_b, GP, loss):
    """The sums as tensors of the shapes and types that were given."""
    L, B, C, N, W = net.layers, net.branches, net.channels, net.features, net.width
    T, BT = config.tiles, net.width // config.tiles
    nothing = gx.new_empty(0)

    def segment(name, *shape):
        offset, size = where[name]
        return result[offset : offset + size].view(*shape)

    gw = [nothing] * (L + 1)
    if need_w:
        gw[0] = segment("first", B, W, net.inputs_pad)[:, :N, : net.inputs]
        if hidden is None and config.later:
            hidden = segment("hidden", L - 1, net.rows, net.columns)
        elif hidden is None:
            blocks = segment("hidden", L - 1, B, T, C, T, BT, BT)  # T tiles of rows, T of columns
            hidden = blocks.permute(0, 1, 2, 5, 3, 4, 6)
        hidden = hidden.reshape(L - 1, B, W, C, W)[:, :, :N, :, :N]
        gw[1:L] = hidden.unbind(0)
        gw[L] = segment("last", C, W, net.outputs_pad)[:, :N, : net.outputs].permute(2, 0, 1)
        for i, (gradient, w) in enumerate(zip(gw, weights, strict=True)):
            gw[i] = torch.empty(w.shape, dtype=w.dtype, device=w.device)  # memory of its own
            gw[i].view(gradient.shape).copy_(gradient)
    acc = result.dtype
    gb = [nothing.to(acc)] * (L + 1)
    if need_b:
        offset, size = where["bias"]
        flat = result[offset : offset + size]
        parts = [*flat[: L * net.rows].view(L, B, W)[:, :, :N], flat[L * net.rows :][: net.outputs]]
        for i, b in enumerate(biases):
            if b is not None:
                gb[i] = parts[i].reshape(b.shape).to(b.dtype, copy=True)
    gp = [nothing.to(acc)] * (L + 1)
    if GP:
        gp[:L] = [rows.clone() for rows in segment("params", L, GP, W)[:, :, :N]]
    value = [] if loss is None else [segment("loss", ()).clone()]
    return [*value, gx, *gw, *gb, *gp]


def mlp_backward(
    g, x, weights, biases, params, constants, maps, saved=None, precision: str = "ieee", needs=(True, True, True, False)
) -> list[torch.Tensor]:
    """Gradients of `mlp` for the cotangent g [M, N_last]: [gx, gw_0 .., gb_0 .., gp_0 ..], one of each a layer.

    gx, gw, gb in the types and shapes of x, weights and biases, summed in float32; gp [P, N] in float32: per feature,
    summed over rows, whether the parameters are tensors or not. Empty ([0]) where `needs` (x, weights, biases,
    parameters) says so or there is nothing. saved: what `mlp` returned with it, or None: computed again from x, in
    memory that does not grow with rows times depth.

    Raises:
        ValueError: parameters of the last activation are tensors, or needed.
    """
    if saved is not None and not saved.numel():
        saved = None
    return _train(g, x, weights, biases, params, constants, maps, saved, precision, needs, None)


def mlp_loss(
    x, target, row_weights, weights, biases, params, constants, maps, loss_map, loss_constants, scale: float = 1.0,
    precision: str = "ieee", needs=(True, True, True, False),
) -> list[torch.Tensor]:  # fmt: skip
    """[loss, gx, gw_0 .., gb_0 .., gp_0 ..] of loss = scale sum_m row_weights[m] sum_n loss_map(y[m, n], target[m, n]).

    target: [M, N_last]; row_weights: [M], or None for 1; loss_map: an `ActivationMap` of (prediction, target); the loss
    is 0-D in float32, y is not rounded to x's type on the way.
    """
    if row_weights is not None:
        row_weights = row_weights.contiguous()
    if accumulator(x.dtype) == torch.float64:  # a number argument of a kernel is float32
        row_weights = x.new_full((x.shape[0],), scale) if row_weights is None else row_weights.double() * scale
        scale = 1.0
    loss = _Loss(target, row_weights, loss_map, tuple(float(c) for c in loss_constants), float(scale))
    return _train(None, x, weights, biases, params, constants, maps, None, precision, needs, loss)
