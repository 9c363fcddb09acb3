"""The training pass of a whole network: forward (or what one has saved), cotangent, all gradients of a tile of rows.

`train_kernel` keeps what the backward needs of each layer in a scratch tile of its program (or reads what a forward has
saved) and carries the gradient of the tile back through all layers; `one_pass_kernel` keeps it in registers, with the
sums of the weights' gradients, where depth and width allow. Sums are one set a program, which `pack.finish_kernel` adds
in a fixed order: memory depends on neither rows nor depth times rows, and the bits are the same every run.

Gradients of biases are products with a matrix that has ones in one column: sums over a tile's rows by the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..maps import factor, narrow
from .tiles import (
    add_bias,
    dot,
    evaluate,
    evaluate_jet,
    first_layer,
    layer_params,
    load_stack,
    load_tile,
    load_tiles,
    load_x,
    network,
    product,
    pull_back,
    resident_product,
    store_tiles,
    times_jet,
    zeros,
)

#: Layers whose bias gradients share one accumulator, a column each.
BIAS_COLUMNS = 16
_BIAS_COLUMNS = tl.constexpr(BIAS_COLUMNS)


# ---------------------------------------------------------------- the end of the network


@triton.jit
def output_gradient(
    zy, data, last_params, loss_params, scale, rows, mask_m, offs_o, OUT, stride_gm, stride_tm,
    LAST: tl.constexpr, LAST_GRAD: tl.constexpr, LOSS: tl.constexpr, LOSS_GRAD: tl.constexpr, MODE: tl.constexpr,
    HAS_LOSS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, OUT_PAD: tl.constexpr,
):  # fmt: skip
    """The gradient of zy, from g or from the loss; and the loss of each element, without `scale`."""
    mask = mask_m[:, None] & (offs_o < OUT)[None, :]
    mask_o = (offs_o < OUT)[None, :]
    loss = tl.zeros((BLOCK_M, OUT_PAD), ACC)
    if HAS_LOSS:
        y = LAST(zy, *last_params, MODE=MODE)[0]
        target = tl.load(data.target + rows[:, None] * stride_tm + offs_o[None, :], mask=mask_o, other=0.0).to(ACC)
        loss = LOSS(y, target, *loss_params, MODE=MODE)[0]
        weight = tl.zeros((BLOCK_M,), ACC) + scale
        if HAS_WEIGHTS:
            row_weight = tl.load(data.weights + rows).to(ACC)
            loss = loss * row_weight[:, None]
            weight = weight * row_weight
        loss = tl.where(mask, loss, 0.0)
        g = tl.zeros((BLOCK_M, OUT_PAD), ACC) + weight[:, None]
        g = LOSS_GRAD(y, target, *loss_params, g, MODE=MODE)[0]
    else:
        g = tl.load(data.g + rows[:, None] * stride_gm + offs_o[None, :], mask=mask_o, other=0.0).to(ACC)
    gz = LAST_GRAD(zy, *last_params, g, MODE=MODE)[0]
    return tl.where(mask, gz, 0.0), loss


# ---------------------------------------------------------------- sums


@triton.jit
def factors(tiles, COUNT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (factor(tiles[i], DTYPE, PRECISION),)
    return new


@triton.jit
def outer(
    sums, first, gz, h, OUT: tl.constexpr, IN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums[first ..] + gz^T h, block by block."""
    new = ()
    for o in tl.static_range(OUT):
        for i in tl.static_range(IN):
            new = new + (dot(tl.trans(gz[o]), h[i], sums[first + o * IN + i], PRECISION, UPCAST, ACC),)
    return new


@triton.jit
def column_sums(
    sums, gz, layer, COUNT: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums over rows of COUNT tiles gz into column `layer` of sums [BLOCK_T, 16], (group of 16 layers, tile)."""
    new = ()
    for group in tl.static_range(GROUPS):
        column = tl.arange(0, _BIAS_COLUMNS) + group * _BIAS_COLUMNS
        ones = tl.zeros((BLOCK_M, _BIAS_COLUMNS), ACC) + tl.where(column == layer, 1.0, 0.0)[None, :]
        for i in tl.static_range(COUNT):
            ones_i = ones.to(gz[i].dtype)
            new = new + (dot(tl.trans(gz[i]), ones_i, sums[group * COUNT + i], PRECISION, UPCAST, ACC),)
    return new


@triton.jit
def store_sum(ptr, value, mask, again):
    """*ptr = value, plus what is there if `again`."""
    # `again` may be a number of Python's, with which `mask` becomes integers, no mask to the interpreter of Triton 3.9
    old = tl.load(ptr, mask=(mask & again) != 0, other=0.0)
    tl.store(ptr, old + value, mask=mask)


@triton.jit
def store_column_sums(
    ptr, sums, offs_t, L, again, COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """What `column_sums` has summed into [L, COUNT*BLOCK_T]."""
    for group in tl.static_range(GROUPS):
        layer = tl.arange(0, _BIAS_COLUMNS) + group * _BIAS_COLUMNS
        for i in tl.static_range(COUNT):
            at = ptr + layer[None, :] * (COUNT * BLOCK_T) + (i * BLOCK_T + offs_t)[:, None]
            store_sum(at, sums[group * COUNT + i], (layer < L)[None, :] & (offs_t >= 0)[:, None], again)


@triton.jit
def store_blocks(ptr, blocks, again, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Blocks [ROWS, COLUMNS] one behind the other."""
    offs = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for i in tl.static_range(COUNT):
        store_sum(ptr + i * (ROWS * COLUMNS) + offs, blocks[i], offs >= 0, again)


@triton.jit
def add_outer(
    ptr, gz, h, seen, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program's sum of gz^T h [OUT*BLOCK_OUT, IN*BLOCK_IN], kept in memory as one block after the other."""
    offs = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
    for o in tl.static_range(OUT):
        for i in tl.static_range(IN):
            tile = ptr + (o * IN + i) * (BLOCK_OUT * BLOCK_IN) + offs
            grad = tl.load(tile, mask=tl.zeros(tile.shape, tl.int1) | seen, other=0.0)
            tl.store(tile, dot(tl.trans(gz[o]), h[i], grad, PRECISION, UPCAST, ACC))


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
                grad = dot(tl.trans(a), v, grad, PRECISION, UPCAST, ACC)
            tl.store(tile, grad)


@triton.jit
def add_rows(ptr, gz, offs_t, seen, COUNT: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sums over a tile's rows, kept in memory."""
    for i in tl.static_range(COUNT):
        store_sum(ptr + i * BLOCK_T + offs_t, tl.sum(gz[i], axis=0), offs_t >= 0, seen)


@triton.jit
def add_first(
    ptr, gx_ptr, gz, x_ptr, first_ptr, rows, mask_m, offs_t, seen, unscale, K, K_PAD, stride_xm,
    NEED_X: tl.constexpr, NEED_W: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """From the first layer's gz: gx, and the sum of gfirst in memory, by BLOCK_X columns at a time."""
    for k in tl.range(0, K_PAD, BLOCK_X, num_stages=1, disable_licm=True):
        offs_k = k + tl.arange(0, BLOCK_X)
        if NEED_X:
            gx = tl.zeros((BLOCK_M, BLOCK_X), ACC)
            for i in tl.static_range(BT):
                w = load_tile(first_ptr, i * BLOCK_T, k, K_PAD, 1, BLOCK_T, BLOCK_X)
                gx = dot(gz[i], w, gx, PRECISION, UPCAST, ACC)
            gx_tile = gx_ptr + rows[:, None] * K + offs_k[None, :]
            gx = narrow(gx * unscale, gx_ptr.dtype.element_ty)
            tl.store(gx_tile, gx, mask=mask_m[:, None] & (offs_k < K)[None, :])
        if NEED_W:
            x = load_x(x_ptr, rows, offs_k, K, stride_xm, DTYPE, PRECISION)
            for i in tl.static_range(BT):
                tile = ptr + (i * BLOCK_T + offs_t)[:, None] * K_PAD + offs_k[None, :]
                grad = tl.load(tile, mask=tl.zeros(tile.shape, tl.int1) | seen, other=0.0)
                tl.store(tile, dot(tl.trans(gz[i]), x, grad, PRECISION, UPCAST, ACC))


# ---------------------------------------------------------------- any network


@triton.jit(
    do_not_specialize=["M", "L", "START", "ROWS_S", "ROWS_OUT", "ACCUMULATE"],
    do_not_specialize_on_alignment=["M", "L", "START", "ROWS_S", "ROWS_OUT", "ACCUMULATE"],
)
def train_kernel(
    data, packed_ptr, bias_ptr, sums_ptr, map_params, last_params, loss_params, scale, unscale, saved_ptr, gx_ptr,
    gz_ptr, h_ptr, M, L, K, K_PAD, OUT, START, ROWS_S, ROWS_OUT, ACCUMULATE, stride_xm, stride_gm, stride_tm,
    stride_sum, at_first, at_hidden, at_last, at_bias, at_params, at_loss,
    MAP: tl.constexpr, MAP_GRAD: tl.constexpr, LAST: tl.constexpr, LAST_GRAD: tl.constexpr, LOSS: tl.constexpr,
    LOSS_GRAD: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr, GP: tl.constexpr,
    SETS: tl.constexpr, TABLE: tl.constexpr, N: tl.constexpr, JETS: tl.constexpr, RECOMPUTE: tl.constexpr,
    HAS_LOSS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, NEED_X: tl.constexpr, NEED_W: tl.constexpr,
    NEED_B: tl.constexpr, SUMS: tl.constexpr, LATER: tl.constexpr, RELOAD: tl.constexpr, K_MAJOR: tl.constexpr,
    GROUPS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr, T: tl.constexpr, OUT_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Gradients for the cotangent g [M, OUT] of y, or of scale sum_m weight_m sum_n LOSS(y, target).

    gx [M, K], times `unscale`. Per program, summed over its tiles: a row of sums, laid out as `pack.Segments` says.
    JETS: of each layer activations h and derivatives d are kept, MAP being the jet; else pre-activations, MAP being the
    map and MAP_GRAD its level 1. RECOMPUTE: they are kept in scratch, BLOCK_M of its ROWS_S rows a program; else they
    are what the forward kernel saved for ROWS_S rows, of which these begin with row START.
    SUMS: gradients of hidden weights are summed here, tile by tile, or, LATER, of factors of LATER tiles that stay in
    memory until the registers of a tile's backward are free: the program's gz [L-1, LATER*BLOCK_M, B*WIDTH] (layers 1
    and on) and h [L-1, LATER*BLOCK_M, C*WIDTH] (layers 0 and on; with JETS and RECOMPUTE the scratch tiles are h).
    Without SUMS the factors of all rows are written, gz [L-1, ROWS_OUT, B*WIDTH] and, unless the forward has saved
    them, h [L-1, ROWS_OUT, C*WIDTH]; their product is another launch's. ACCUMULATE: the sums continue those of the
    launch before.
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
    rows_s = ROWS_S.to(tl.int64)
    d_ptr = saved_ptr
    if JETS:
        d_ptr = saved_ptr + rows_s * L * (C * WIDTH)
    hidden_ptr, back_ptr, last_ptr, table_ptr = network(packed_ptr, bias_ptr, L, K_PAD, B, C, WIDTH, OUT_PAD, K_MAJOR)
    program = tl.program_id(0).to(tl.int64)
    sums_ptr += program * stride_sum
    again = ACCUMULATE != 0
    losses = tl.zeros((BLOCK_M, OUT_PAD), ACC)
    gout = tl.zeros((BLOCK_M, OUT_PAD), ACC)
    if NEED_W:
        glast = zeros(CT, BLOCK_T, OUT_PAD, ACC)
    if NEED_B:
        gbias = zeros(BT * GROUPS, BLOCK_T, _BIAS_COLUMNS, ACC)
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True):
        seen = (tile != program) | again
        start = tile * BLOCK_M  # int64
        limit = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        mask_m = offs < limit
        near = tl.minimum(offs, limit - 1)  # beyond the end, the last row again: finite where that row is
        rows = start + near
        if LATER:
            turn = (tile - program) // tl.num_programs(0)
            place = (turn % LATER).to(tl.int32)
        if RECOMPUTE:
            kept = program * BLOCK_M
            if JETS and LATER:
                kept = (program * LATER + place) * BLOCK_M
            offs_s = offs
            z = first_layer(
                data.x, packed_ptr, bias_ptr, rows, offs_t, K, K_PAD, stride_xm,
                BT, NARROW, PRECISION, UPCAST, ACC, DTYPE, BLOCK_M, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            for layer in tl.range(1, L, num_stages=STAGES, disable_licm=True):
                p = layer_params(map_params, table_ptr, layer - 1, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
                row = rows_s * (layer - 1) + kept
                if JETS:
                    h, d = evaluate_jet(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE, PRECISION)
                    if NEED_W and not (SUMS or LATER):
                        above = ROWS_OUT.to(tl.int64) * (layer - 1) + start
                        store_tiles(h, h_ptr + above * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, True)
                    elif NEED_W:
                        store_tiles(h, saved_ptr + row * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, False)
                    store_tiles(d, d_ptr + row * (C * B * WIDTH), offs, limit, offs_t, C * BT, BLOCK_T, False)
                else:
                    store_tiles(z, saved_ptr + row * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, False)
                    h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE, PRECISION)
                z = product(
                    h, hidden_ptr + (layer - 1) * SQUARE, 1, C * WIDTH, CT, BT, BLOCK_T, BLOCK_T, PRECISION, UPCAST,
                    ACC, BLOCK_M,
                )  # fmt: skip
                z = add_bias(z, bias_ptr + layer * (B * WIDTH), offs_t, BT, BLOCK_T)
            top = rows_s * (L - 1) + kept
            if RELOAD and not JETS:
                store_tiles(z, saved_ptr + top * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, False)
            tl.debug_barrier()  # the scratch tile is read in another order than it was written in
        else:
            kept = start + START
            offs_s = near
            top = rows_s * (L - 1) + kept
            if not JETS:
                z = load_tiles(saved_ptr + top * (B * WIDTH), offs_s, offs_t, BT, BLOCK_T)
        p = layer_params(map_params, table_ptr, L - 1, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
        if JETS:
            if RECOMPUTE:
                h, d = evaluate_jet(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE, PRECISION)
            else:
                h = load_tiles(saved_ptr + top * (C * WIDTH), offs_s, offs_t, CT, BLOCK_T)
                d = load_tiles(d_ptr + top * (C * B * WIDTH), offs_s, offs_t, C * BT, BLOCK_T)
        else:
            h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE, PRECISION)

        out = product(h, last_ptr, 1, C * WIDTH, CT, 1, BLOCK_T, OUT_PAD, PRECISION, UPCAST, ACC, BLOCK_M)
        zy = out[0] + tl.load(bias_ptr + L * (B * WIDTH) + offs_o)[None, :]
        gzy, loss = output_gradient(
            zy, data, last_params, loss_params, scale, rows, mask_m, offs_o, OUT, stride_gm, stride_tm,
            LAST, LAST_GRAD, LOSS, LOSS_GRAD, MODE, HAS_LOSS, HAS_WEIGHTS, ACC, BLOCK_M, OUT_PAD,
        )  # fmt: skip
        losses += loss
        gout += gzy
        gz = factors((gzy,), 1, DTYPE, PRECISION)
        if NEED_W:
            glast = outer(glast, 0, h, gz, CT, 1, PRECISION, UPCAST, ACC)
        g = product(gz, last_ptr, C * WIDTH, 1, 1, CT, OUT_PAD, BLOCK_T, PRECISION, UPCAST, ACC, BLOCK_M)
        if JETS:
            full = times_jet(d, g, mask_m, B, C, T, ACC)
        else:
            if RELOAD:  # rather than kept in registers through the products
                tl.debug_barrier()
                z = load_tiles(saved_ptr + top * (B * WIDTH), offs_s, offs_t, BT, BLOCK_T)
            full = pull_back(z, p, g, mask_m, offs_t, MAP_GRAD, MODE, B, C, T, P, GP, N, BLOCK_T)
            if GP:
                gp_ptr = sums_ptr + at_params + (L - 1) * (GP * WIDTH)
                add_rows(gp_ptr, full[BT:], offs_t, seen, GP * T, BLOCK_T)
        gz = factors(full, BT, DTYPE, PRECISION)
        if NEED_B:
            gbias = column_sums(gbias, gz, L - 1, BT, GROUPS, PRECISION, UPCAST, ACC, BLOCK_M)

        for step in tl.range(1, L, num_stages=STAGES, disable_licm=True):
            layer = L - 1 - step  # gz is that of the layer above
            row = rows_s * layer + kept
            p = layer_params(map_params, table_ptr, layer, offs_t, T, WIDTH, BLOCK_T, P, SETS, TABLE)
            if not JETS:
                z = load_tiles(saved_ptr + row * (B * WIDTH), offs_s, offs_t, BT, BLOCK_T)
            if NEED_W:
                if not JETS:
                    h = evaluate(z, p, offs_t, MAP, MODE, B, C, T, P, N, BLOCK_T, DTYPE, PRECISION)
                elif SUMS and not (LATER and RECOMPUTE):
                    h = load_tiles(saved_ptr + row * (C * WIDTH), offs_s, offs_t, CT, BLOCK_T)
                if LATER:
                    above = (program * (L - 1) + layer) * (LATER * BLOCK_M) + place * BLOCK_M
                    store_tiles(gz, gz_ptr + above * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, False)
                    if not (JETS and RECOMPUTE):
                        store_tiles(h, h_ptr + above * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, False)
                elif SUMS:
                    square = sums_ptr + at_hidden + layer * SQUARE
                    add_outer(square, gz, h, seen, BT, CT, BLOCK_T, BLOCK_T, PRECISION, UPCAST, ACC)
                else:
                    above = ROWS_OUT.to(tl.int64) * layer + start
                    store_tiles(gz, gz_ptr + above * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, True)
                    if not JETS:
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
            if JETS:
                d = load_tiles(d_ptr + row * (C * B * WIDTH), offs_s, offs_t, C * BT, BLOCK_T)
                full = times_jet(d, g, mask_m, B, C, T, ACC)
            else:
                if RELOAD:
                    tl.debug_barrier()
                    z = load_tiles(saved_ptr + row * (B * WIDTH), offs_s, offs_t, BT, BLOCK_T)
                full = pull_back(z, p, g, mask_m, offs_t, MAP_GRAD, MODE, B, C, T, P, GP, N, BLOCK_T)
                if GP:
                    gp_ptr = sums_ptr + at_params + layer * (GP * WIDTH)
                    add_rows(gp_ptr, full[BT:], offs_t, seen, GP * T, BLOCK_T)
            gz = factors(full, BT, DTYPE, PRECISION)
            if NEED_B:
                gbias = column_sums(gbias, gz, layer, BT, GROUPS, PRECISION, UPCAST, ACC, BLOCK_M)

        if NEED_X or NEED_W:
            first_sums = saved_ptr
            if NEED_W:
                first_sums = sums_ptr + at_first
            add_first(
                first_sums, gx_ptr, gz, data.x, packed_ptr, rows, mask_m, offs_t, seen, unscale, K, K_PAD, stride_xm,
                NEED_X, NEED_W, BT, PRECISION, UPCAST, ACC, DTYPE, BLOCK_M, BLOCK_T, BLOCK_X,
            )  # fmt: skip
        tl.debug_barrier()  # before the next tile's scratch and sums
        if LATER:
            if NEED_W:
                if (place == LATER - 1) | (tile + tl.num_programs(0) >= tl.cdiv(M, BLOCK_M)):
                    for layer in tl.range(0, L - 1, num_stages=1, disable_licm=True):
                        above = (program * (L - 1) + layer) * (LATER * BLOCK_M)
                        if JETS and RECOMPUTE:
                            waiting_ptr = saved_ptr + (rows_s * layer + program * LATER * BLOCK_M) * (C * WIDTH)
                        else:
                            waiting_ptr = h_ptr + above * (C * WIDTH)
                        add_product(
                            sums_ptr + at_hidden + layer * SQUARE, gz_ptr + above * (B * WIDTH),
                            waiting_ptr, (place + 1) * BLOCK_M, turn >= LATER, B * WIDTH, C * WIDTH,
                            BLOCK_M, BLOCK_O, BLOCK_I, PRECISION, UPCAST, ACC,
                        )  # fmt: skip
                    tl.debug_barrier()  # before the next tile's factors
    if NEED_W:
        store_blocks(sums_ptr + at_last, glast, again, CT, BLOCK_T, OUT_PAD)
    if NEED_B:
        store_column_sums(sums_ptr + at_bias, gbias, offs_t, L, again, BT, GROUPS, BLOCK_T)
        store_sum(sums_ptr + at_bias + L * (B * WIDTH) + offs_o, tl.sum(gout, axis=0), offs_o >= 0, again)
    if HAS_LOSS:
        value = tl.sum(tl.sum(losses, axis=1), axis=0) * scale
        if again:
            value += tl.load(sums_ptr + at_loss)
        tl.store(sums_ptr + at_loss, value)


# ---------------------------------------------------------------- a network that fits into registers


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def one_pass_kernel(
    data, packed_ptr, bias_ptr, sums_ptr, map_params, last_params, loss_params, scale, unscale, gx_ptr,
    M, K, OUT, stride_xm, stride_gm, stride_tm, stride_sum, at_first, at_hidden, at_last, at_bias, at_loss,
    MAP: tl.constexpr, LAST: tl.constexpr, LAST_GRAD: tl.constexpr, LOSS: tl.constexpr, LOSS_GRAD: tl.constexpr,
    MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SETS: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, HIDDEN: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, NEED_X: tl.constexpr,
    NEED_W: tl.constexpr, NEED_B: tl.constexpr, K_MAJOR: tl.constexpr, RESIDENT: tl.constexpr, GROUPS: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
    OUT_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """What `train_kernel` computes with JETS, RECOMPUTE and SUMS, for one feature tile (WIDTH = BLOCK_T) and a constant
    depth of HIDDEN products: activations, derivatives and all sums stay in registers; MAP is the jet. RESIDENT: the
    hidden weights stay on chip."""
    SQUARE: tl.constexpr = B * C * BLOCK_T * BLOCK_T
    BC: tl.constexpr = B * C
    offs = tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_T)
    offs_o = tl.arange(0, OUT_PAD)
    offs_k = tl.arange(0, K_PAD)
    program = tl.program_id(0).to(tl.int64)
    losses = tl.zeros((BLOCK_M, OUT_PAD), ACC)
    gout = tl.zeros((BLOCK_M, OUT_PAD), ACC)
    if NEED_W:
        ghidden = zeros(HIDDEN * BC, BLOCK_T, BLOCK_T, ACC)
        gfirst = zeros(B, BLOCK_T, K_PAD, ACC)
        glast = zeros(C, BLOCK_T, OUT_PAD, ACC)
    if NEED_B:
        gbias = zeros(B * GROUPS, BLOCK_T, _BIAS_COLUMNS, ACC)
    hidden_ptr, back_ptr, last_ptr, table_ptr = network(
        packed_ptr, bias_ptr, HIDDEN + 1, K_PAD, B, C, BLOCK_T, OUT_PAD, K_MAJOR
    )
    if RESIDENT:
        stack = load_stack(hidden_ptr, HIDDEN, C, B, BLOCK_T)
    sums_ptr += program * stride_sum
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True):
        start = tile * BLOCK_M  # int64
        limit = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        mask_m = offs < limit
        rows = start + tl.minimum(offs, limit - 1)  # beyond the end, the last row again: finite where that row is
        z = first_layer(
            data.x, packed_ptr, bias_ptr, rows, offs_t, K, K_PAD, stride_xm,
            B, NARROW, PRECISION, UPCAST, ACC, DTYPE, BLOCK_M, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        p = layer_params(map_params, table_ptr, 0, offs_t, 1, BLOCK_T, BLOCK_T, P, SETS, TABLE)
        h, d = evaluate_jet(z, p, offs_t, MAP, MODE, B, C, 1, P, N, BLOCK_T, DTYPE, PRECISION)
        all_h = h
        all_d = d
        for layer in tl.static_range(1, HIDDEN + 1):
            if RESIDENT:
                z = resident_product(h, stack, (layer - 1) * BC, C, B, PRECISION, UPCAST, ACC, BLOCK_M, BLOCK_T)
            else:
                z = product(
                    h, hidden_ptr + (layer - 1) * SQUARE, 1, C * BLOCK_T, C, B, BLOCK_T, BLOCK_T, PRECISION, UPCAST,
                    ACC, BLOCK_M,
                )  # fmt: skip
            z = add_bias(z, bias_ptr + layer * (B * BLOCK_T), offs_t, B, BLOCK_T)
            p = layer_params(map_params, table_ptr, layer, offs_t, 1, BLOCK_T, BLOCK_T, P, SETS, TABLE)
            h, d = evaluate_jet(z, p, offs_t, MAP, MODE, B, C, 1, P, N, BLOCK_T, DTYPE, PRECISION)
            all_h = all_h + h
            all_d = all_d + d
        out = product(h, last_ptr, 1, C * BLOCK_T, C, 1, BLOCK_T, OUT_PAD, PRECISION, UPCAST, ACC, BLOCK_M)
        zy = out[0] + tl.load(bias_ptr + (HIDDEN + 1) * (B * BLOCK_T) + offs_o)[None, :]
        gzy, loss = output_gradient(
            zy, data, last_params, loss_params, scale, rows, mask_m, offs_o, OUT, stride_gm, stride_tm,
            LAST, LAST_GRAD, LOSS, LOSS_GRAD, MODE, HAS_LOSS, HAS_WEIGHTS, ACC, BLOCK_M, OUT_PAD,
        )  # fmt: skip
        losses += loss
        gout += gzy
        gz = factors((gzy,), 1, DTYPE, PRECISION)
        if NEED_W:
            glast = outer(glast, 0, h, gz, C, 1, PRECISION, UPCAST, ACC)
        g = product(gz, last_ptr, C * BLOCK_T, 1, 1, C, OUT_PAD, BLOCK_T, PRECISION, UPCAST, ACC, BLOCK_M)
        new_hidden = ()
        for above in tl.static_range(HIDDEN, -1, -1):
            d = ()
            for i in tl.static_range(BC):
                d = d + (all_d[above * BC + i],)
            gz = factors(times_jet(d, g, mask_m, B, C, 1, ACC), B, DTYPE, PRECISION)
            if NEED_B:
                gbias = column_sums(gbias, gz, above, B, GROUPS, PRECISION, UPCAST, ACC, BLOCK_M)
            if above > 0:
                if NEED_W:
                    h = ()
                    for c in tl.static_range(C):
                        h = h + (all_h[(above - 1) * C + c],)
                    new_hidden = outer(ghidden, (above - 1) * BC, gz, h, B, C, PRECISION, UPCAST, ACC) + new_hidden
                if RESIDENT:
                    blocks = ()
                    for c in tl.static_range(C):
                        for b in tl.static_range(B):
                            blocks = blocks + (tl.trans(stack[((above - 1) * B + b) * C + c]),)
                    g = resident_product(gz, blocks, 0, B, C, PRECISION, UPCAST, ACC, BLOCK_M, BLOCK_T)
                elif K_MAJOR:  # a transposed copy
                    g = product(
                        gz, back_ptr + (above - 1) * SQUARE, 1, B * BLOCK_T, B, C, BLOCK_T, BLOCK_T, PRECISION,
                        UPCAST, ACC, BLOCK_M,
                    )  # fmt: skip
                else:
                    g = product(
                        gz, back_ptr + (above - 1) * SQUARE, C * BLOCK_T, 1, B, C, BLOCK_T, BLOCK_T, PRECISION,
                        UPCAST, ACC, BLOCK_M,
                    )  # fmt: skip
        if NEED_X:
            gx = product(gz, packed_ptr, K_PAD, 1, B, 1, BLOCK_T, K_PAD, PRECISION, UPCAST, ACC, BLOCK_M)
            gx_tile = gx_ptr + rows[:, None] * K + offs_k[None, :]
            narrowed = narrow(gx[0] * unscale, gx_ptr.dtype.element_ty)
            tl.store(gx_tile, narrowed, mask=mask_m[:, None] & (offs_k < K)[None, :])
        if NEED_W:
            ghidden = new_hidden
            x = load_x(data.x, rows, offs_k, K, stride_xm, DTYPE, PRECISION)
            gfirst = outer(gfirst, 0, gz, (x,), B, 1, PRECISION, UPCAST, ACC)
    if NEED_W:
        if HIDDEN > 0:
            store_blocks(sums_ptr + at_hidden, ghidden, False, HIDDEN * BC, BLOCK_T, BLOCK_T)
        store_blocks(sums_ptr + at_first, gfirst, False, B, BLOCK_T, K_PAD)
        store_blocks(sums_ptr + at_last, glast, False, C, BLOCK_T, OUT_PAD)
    if NEED_B:
        store_column_sums(sums_ptr + at_bias, gbias, offs_t, HIDDEN + 1, False, B, GROUPS, BLOCK_T)
        at = sums_ptr + at_bias + (HIDDEN + 1) * (B * BLOCK_T) + offs_o
        tl.store(at, tl.sum(gout, axis=0))
    if HAS_LOSS:
        tl.store(sums_ptr + at_loss, tl.sum(tl.sum(losses, axis=1), axis=0) * scale)
