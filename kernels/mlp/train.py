"""The training pass of a whole network: forward (or what one has saved), cotangent, all gradients of a tile of rows.

`train_kernel` keeps what the backward needs of each layer in a scratch tile of its program (or reads what a forward has
saved) and carries the gradient of the tile back through all layers; `one_pass_kernel` keeps it in registers, with the
sums of the weights' gradients, where depth and width allow. Sums are one set a program, which `pack.finish_kernel` adds
in a fixed order: memory depends on neither rows nor depth times rows, and the bits are the same every run.

Gradients of biases are products with a matrix that has ones in one column: sums over a tile's rows by the tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..maps import factor, narrow
from .tiles import (
    add_bias,
    dot,
    evaluate,
    evaluate_jet,
    first_layer,
    hidden_product,
    hidden_product_back,
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


class LossNumbers(NamedTuple):
    """What the loss takes beside prediction and target: its constants, what its sum is multiplied by, and what gx is in
    the end; (), 1 and 1 for a cotangent."""

    constants: tuple
    scale: float
    unscale: float


@triton.jit
def output_gradient(
    zy, data, numbers, criterion, rows, mask_m, offs_o, OUT, maps, NET: tl.constexpr, NUM: tl.constexpr
):  # fmt: skip
    """The gradient of zy, from g or from the loss; and the loss of each element, without the scale."""
    BLOCK_M: tl.constexpr = NET.BLOCK_M
    OUT_PAD: tl.constexpr = NET.OUT_PAD
    ACC: tl.constexpr = NUM.ACC
    mask = mask_m[:, None] & (offs_o < OUT)[None, :]
    mask_o = (offs_o < OUT)[None, :]
    loss = tl.zeros((BLOCK_M, OUT_PAD), ACC)
    if data.target is not None:
        y = maps.last(zy, *numbers.last, MODE=NUM.MODE)[0]
        t_tile = data.target.ptr + rows[:, None] * data.target.stride + offs_o[None, :]
        target = tl.load(t_tile, mask=mask_o, other=0.0).to(ACC)
        loss = maps.loss(y, target, *criterion.constants, MODE=NUM.MODE)[0]
        weight = tl.zeros((BLOCK_M,), ACC) + criterion.scale
        if data.weights is not None:
            row_weight = tl.load(data.weights + rows).to(ACC)
            loss = loss * row_weight[:, None]
            weight = weight * row_weight
        loss = tl.where(mask, loss, 0.0)
        g = tl.zeros((BLOCK_M, OUT_PAD), ACC) + weight[:, None]
        g = maps.loss_grad(y, target, *criterion.constants, g, MODE=NUM.MODE)[0]
    else:
        g_tile = data.g.ptr + rows[:, None] * data.g.stride + offs_o[None, :]
        g = tl.load(g_tile, mask=mask_o, other=0.0).to(ACC)
    gz = maps.last_grad(zy, *numbers.last, g, MODE=NUM.MODE)[0]
    return tl.where(mask, gz, 0.0), loss


# ---------------------------------------------------------------- sums


@triton.jit
def factors(tiles, COUNT: tl.constexpr, NUM: tl.constexpr):
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (factor(tiles[i], NUM.DTYPE, NUM.PRECISION),)
    return new


@triton.jit
def outer(sums, first, gz, h, OUT: tl.constexpr, IN: tl.constexpr, NUM: tl.constexpr):
    """sums[first ..] + gz^T h, block by block."""
    new = ()
    for o in tl.static_range(OUT):
        for i in tl.static_range(IN):
            new = new + (dot(tl.trans(gz[o]), h[i], sums[first + o * IN + i], NUM),)
    return new


@triton.jit
def column_sums(sums, gz, layer, GROUPS: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr):
    """Sums over rows of B*T tiles gz into column `layer` of sums [BLOCK_T, 16], (group of 16 layers, tile)."""
    COUNT: tl.constexpr = NET.B * NET.T
    new = ()
    for group in tl.static_range(GROUPS):
        column = tl.arange(0, _BIAS_COLUMNS) + group * _BIAS_COLUMNS
        ones = tl.zeros((NET.BLOCK_M, _BIAS_COLUMNS), NUM.ACC) + tl.where(column == layer, 1.0, 0.0)[None, :]
        for i in tl.static_range(COUNT):
            ones_i = ones.to(gz[i].dtype)
            new = new + (dot(tl.trans(gz[i]), ones_i, sums[group * COUNT + i], NUM),)
    return new


@triton.jit
def store_sum(ptr, value, mask, again):
    """*ptr = value, plus what is there if `again`."""
    # `again` may be a number of Python's, with which `mask` becomes integers, no mask to the interpreter of Triton 3.9
    old = tl.load(ptr, mask=(mask & again) != 0, other=0.0)
    tl.store(ptr, old + value, mask=mask)


@triton.jit
def store_column_sums(ptr, sums, offs_t, L, again, GROUPS: tl.constexpr, NET: tl.constexpr):
    """What `column_sums` has summed into [L, B*WIDTH]."""
    COUNT: tl.constexpr = NET.B * NET.T
    BLOCK_T: tl.constexpr = NET.BLOCK_T
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
def add_outer(ptr, gz, h, seen, NET: tl.constexpr, NUM: tl.constexpr):
    """A program's sum of gz^T h [B*WIDTH, C*WIDTH], kept in memory as one block after the other."""
    IN: tl.constexpr = NET.C * NET.T
    BLOCK: tl.constexpr = NET.BLOCK_T
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for o in tl.static_range(NET.B * NET.T):
        for i in tl.static_range(IN):
            tile = ptr + (o * IN + i) * (BLOCK * BLOCK) + offs
            grad = tl.load(tile, mask=tl.zeros(tile.shape, tl.int1) | seen, other=0.0)
            tl.store(tile, dot(tl.trans(gz[o]), h[i], grad, NUM))


@triton.jit
def add_product(
    ptr, gz_ptr, h_ptr, rows, seen, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr
):  # fmt: skip
    """A program's sum of gz^T h [B*WIDTH, C*WIDTH] in memory, for factors in memory, of so many rows."""
    BLOCK_R: tl.constexpr = NET.BLOCK_M
    ROWS: tl.constexpr = NET.B * NET.T * NET.BLOCK_T
    COLUMNS: tl.constexpr = NET.C * NET.T * NET.BLOCK_T
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
                grad = dot(tl.trans(a), v, grad, NUM)
            tl.store(tile, grad)


@triton.jit
def add_rows(ptr, gz, offs_t, seen, COUNT: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sums over a tile's rows, kept in memory."""
    for i in tl.static_range(COUNT):
        store_sum(ptr + i * BLOCK_T + offs_t, tl.sum(gz[i], axis=0), offs_t >= 0, seen)


@triton.jit
def add_first(
    ptr, gx_ptr, gz, x, first_ptr, rows, mask_m, offs_t, seen, unscale, sizes,
    NEED_X: tl.constexpr, NEED_W: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """From the first layer's gz: gx, and the sum of gfirst in memory, by BLOCK_X columns at a time."""
    BT: tl.constexpr = NET.B * NET.T
    BLOCK_T: tl.constexpr = NET.BLOCK_T
    BLOCK_X: tl.constexpr = NET.BLOCK_X
    for k in tl.range(0, sizes.K_PAD, BLOCK_X, num_stages=1, disable_licm=True):
        offs_k = k + tl.arange(0, BLOCK_X)
        if NEED_X:
            gx = tl.zeros((NET.BLOCK_M, BLOCK_X), NUM.ACC)
            for i in tl.static_range(BT):
                w = load_tile(first_ptr, i * BLOCK_T, k, sizes.K_PAD, 1, BLOCK_T, BLOCK_X)
                gx = dot(gz[i], w, gx, NUM)
            gx_tile = gx_ptr + rows[:, None] * sizes.K + offs_k[None, :]
            gx = narrow(gx * unscale, gx_ptr.dtype.element_ty)
            tl.store(gx_tile, gx, mask=mask_m[:, None] & (offs_k < sizes.K)[None, :])
        if NEED_W:
            v = load_x(x, rows, offs_k, sizes.K, NUM)
            for i in tl.static_range(BT):
                tile = ptr + (i * BLOCK_T + offs_t)[:, None] * sizes.K_PAD + offs_k[None, :]
                grad = tl.load(tile, mask=tl.zeros(tile.shape, tl.int1) | seen, other=0.0)
                tl.store(tile, dot(tl.trans(gz[i]), v, grad, NUM))


# ---------------------------------------------------------------- any network


class Scratch(NamedTuple):
    """Memory of a launch, None where there is none: what is kept of each layer; factors of the hidden weights'
    gradients that wait for their product."""

    saved: object
    gz: object
    h: object


class TrainPass(NamedTuple):
    """What `train_kernel` is compiled to do (its text says what the words mean; GROUPS: of BIAS_COLUMNS layers)."""

    NEED_X: bool
    NEED_W: bool
    NEED_B: bool
    GP: int
    JETS: bool
    RECOMPUTE: bool
    SUMS: bool
    LATER: int
    RELOAD: bool
    GROUPS: int
    STAGES: int


@triton.jit(
    do_not_specialize=["M", "L", "START", "ROWS_S", "ROWS_OUT", "ACCUMULATE"],
    do_not_specialize_on_alignment=["M", "L", "START", "ROWS_S", "ROWS_OUT", "ACCUMULATE"],
)
def train_kernel(
    data, packed, sums_ptr, criterion, scratch, gx_ptr, M, L, START, ROWS_S, ROWS_OUT, ACCUMULATE,
    numbers, at, sizes, maps, PASS: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """Gradients for the cotangent g [M, OUT] of y, or of scale sum_m weight_m sum_n loss(y, target).

    gx [M, K], times `unscale`. Per program, summed over its tiles: a row of sums, laid out as `pack.Segments` says.
    JETS: of each layer activations h and derivatives d are kept, `maps.map` being the jet; else pre-activations, with
    the map and its level 1. RECOMPUTE: they are kept in scratch, BLOCK_M of its ROWS_S rows a program; else they
    are what the forward kernel saved for ROWS_S rows, of which these begin with row START.
    SUMS: gradients of hidden weights are summed here, tile by tile, or, LATER, of factors of LATER tiles that stay in
    memory until the registers of a tile's backward are free: the program's gz [L-1, LATER*BLOCK_M, B*WIDTH] (layers 1
    and on) and h [L-1, LATER*BLOCK_M, C*WIDTH] (layers 0 and on; with JETS and RECOMPUTE the scratch tiles are h).
    Without SUMS the factors of all rows are written, gz [L-1, ROWS_OUT, B*WIDTH] and, unless the forward has saved
    them, h [L-1, ROWS_OUT, C*WIDTH]; their product is another launch's. ACCUMULATE: the sums continue those of the
    launch before.
    """
    JETS: tl.constexpr = PASS.JETS
    RECOMPUTE: tl.constexpr = PASS.RECOMPUTE
    NEED_W: tl.constexpr = PASS.NEED_W
    SUMS: tl.constexpr = PASS.SUMS
    LATER: tl.constexpr = PASS.LATER
    GP: tl.constexpr = PASS.GP
    B: tl.constexpr = NET.B
    C: tl.constexpr = NET.C
    T: tl.constexpr = NET.T
    BLOCK_M: tl.constexpr = NET.BLOCK_M
    BLOCK_T: tl.constexpr = NET.BLOCK_T
    OUT_PAD: tl.constexpr = NET.OUT_PAD
    ACC: tl.constexpr = NUM.ACC
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
    d_ptr = scratch.saved
    if JETS:
        d_ptr = scratch.saved + rows_s * L * (C * WIDTH)
    hidden_ptr, back_ptr, last_ptr, table_ptr = network(packed, L, sizes.K_PAD, NET)
    program = tl.program_id(0).to(tl.int64)
    sums_ptr += program * at.total
    again = ACCUMULATE != 0
    losses = tl.zeros((BLOCK_M, OUT_PAD), ACC)
    gout = tl.zeros((BLOCK_M, OUT_PAD), ACC)
    if NEED_W:
        glast = zeros(CT, BLOCK_T, OUT_PAD, ACC)
    if PASS.NEED_B:
        gbias = zeros(BT * PASS.GROUPS, BLOCK_T, _BIAS_COLUMNS, ACC)
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
            z = first_layer(data.x, packed, rows, offs_t, sizes.K, sizes.K_PAD, NET, NUM)
            for layer in tl.range(1, L, num_stages=PASS.STAGES, disable_licm=True):
                p = layer_params(numbers.maps, table_ptr, layer - 1, offs_t, NET)
                row = rows_s * (layer - 1) + kept
                if JETS:
                    h, d = evaluate_jet(z, p, offs_t, maps.map, NET, NUM)
                    if NEED_W and not (SUMS or LATER):
                        above = ROWS_OUT.to(tl.int64) * (layer - 1) + start
                        store_tiles(h, scratch.h + above * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, True)
                    elif NEED_W:
                        store_tiles(h, scratch.saved + row * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, False)
                    store_tiles(d, d_ptr + row * (C * B * WIDTH), offs, limit, offs_t, C * BT, BLOCK_T, False)
                else:
                    store_tiles(z, scratch.saved + row * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, False)
                    h = evaluate(z, p, offs_t, maps.map, NET, NUM)
                z = hidden_product(h, hidden_ptr, layer - 1, NET, NUM)
                z = add_bias(z, packed.bias + layer * (B * WIDTH), offs_t, NET)
            top = rows_s * (L - 1) + kept
            if PASS.RELOAD and not JETS:
                store_tiles(z, scratch.saved + top * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, False)
            tl.debug_barrier()  # the scratch tile is read in another order than it was written in
        else:
            kept = start + START
            offs_s = near
            top = rows_s * (L - 1) + kept
            if not JETS:
                z = load_tiles(scratch.saved + top * (B * WIDTH), offs_s, offs_t, BT, BLOCK_T)
        p = layer_params(numbers.maps, table_ptr, L - 1, offs_t, NET)
        if JETS:
            if RECOMPUTE:
                h, d = evaluate_jet(z, p, offs_t, maps.map, NET, NUM)
            else:
                h = load_tiles(scratch.saved + top * (C * WIDTH), offs_s, offs_t, CT, BLOCK_T)
                d = load_tiles(d_ptr + top * (C * B * WIDTH), offs_s, offs_t, C * BT, BLOCK_T)
        else:
            h = evaluate(z, p, offs_t, maps.map, NET, NUM)

        out = product(h, last_ptr, 1, C * WIDTH, CT, 1, BLOCK_T, OUT_PAD, NET, NUM)
        zy = out[0] + tl.load(packed.bias + L * (B * WIDTH) + offs_o)[None, :]
        gzy, loss = output_gradient(
            zy, data, numbers, criterion, rows, mask_m, offs_o, sizes.OUT, maps, NET, NUM
        )  # fmt: skip
        losses += loss
        gout += gzy
        gz = factors((gzy,), 1, NUM)
        if NEED_W:
            glast = outer(glast, 0, h, gz, CT, 1, NUM)
        g = product(gz, last_ptr, C * WIDTH, 1, 1, CT, OUT_PAD, BLOCK_T, NET, NUM)
        if JETS:
            full = times_jet(d, g, mask_m, NET, NUM)
        else:
            if PASS.RELOAD:  # rather than kept in registers through the products
                tl.debug_barrier()
                z = load_tiles(scratch.saved + top * (B * WIDTH), offs_s, offs_t, BT, BLOCK_T)
            full = pull_back(z, p, g, mask_m, offs_t, maps.map_grad, GP, NET, NUM)
            if GP:
                gp_ptr = sums_ptr + at.map_params + (L - 1) * (GP * WIDTH)
                add_rows(gp_ptr, full[BT:], offs_t, seen, GP * T, BLOCK_T)
        gz = factors(full, BT, NUM)
        if PASS.NEED_B:
            gbias = column_sums(gbias, gz, L - 1, PASS.GROUPS, NET, NUM)

        for step in tl.range(1, L, num_stages=PASS.STAGES, disable_licm=True):
            layer = L - 1 - step  # gz is that of the layer above
            row = rows_s * layer + kept
            p = layer_params(numbers.maps, table_ptr, layer, offs_t, NET)
            if not JETS:
                z = load_tiles(scratch.saved + row * (B * WIDTH), offs_s, offs_t, BT, BLOCK_T)
            if NEED_W:
                if not JETS:
                    h = evaluate(z, p, offs_t, maps.map, NET, NUM)
                elif SUMS and not (LATER and RECOMPUTE):
                    h = load_tiles(scratch.saved + row * (C * WIDTH), offs_s, offs_t, CT, BLOCK_T)
                if LATER:
                    above = (program * (L - 1) + layer) * (LATER * BLOCK_M) + place * BLOCK_M
                    store_tiles(gz, scratch.gz + above * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, False)
                    if not (JETS and RECOMPUTE):
                        store_tiles(h, scratch.h + above * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, False)
                elif SUMS:
                    square = sums_ptr + at.hidden + layer * SQUARE
                    add_outer(square, gz, h, seen, NET, NUM)
                else:
                    above = ROWS_OUT.to(tl.int64) * layer + start
                    store_tiles(gz, scratch.gz + above * (B * WIDTH), offs, limit, offs_t, BT, BLOCK_T, True)
                    if not JETS:
                        store_tiles(h, scratch.h + above * (C * WIDTH), offs, limit, offs_t, CT, BLOCK_T, True)
            g = hidden_product_back(gz, back_ptr, layer, NET, NUM)
            if JETS:
                d = load_tiles(d_ptr + row * (C * B * WIDTH), offs_s, offs_t, C * BT, BLOCK_T)
                full = times_jet(d, g, mask_m, NET, NUM)
            else:
                if PASS.RELOAD:
                    tl.debug_barrier()
                    z = load_tiles(scratch.saved + row * (B * WIDTH), offs_s, offs_t, BT, BLOCK_T)
                full = pull_back(z, p, g, mask_m, offs_t, maps.map_grad, GP, NET, NUM)
                if GP:
                    gp_ptr = sums_ptr + at.map_params + layer * (GP * WIDTH)
                    add_rows(gp_ptr, full[BT:], offs_t, seen, GP * T, BLOCK_T)
            gz = factors(full, BT, NUM)
            if PASS.NEED_B:
                gbias = column_sums(gbias, gz, layer, PASS.GROUPS, NET, NUM)

        if PASS.NEED_X or NEED_W:
            first_sums = scratch.saved
            if NEED_W:
                first_sums = sums_ptr + at.first
            add_first(
                first_sums, gx_ptr, gz, data.x, packed.weights, rows, mask_m, offs_t, seen, criterion.unscale, sizes,
                PASS.NEED_X, NEED_W, NET, NUM,
            )  # fmt: skip
        tl.debug_barrier()  # before the next tile's scratch and sums
        if LATER:
            if NEED_W:
                if (place == LATER - 1) | (tile + tl.num_programs(0) >= tl.cdiv(M, BLOCK_M)):
                    for layer in tl.range(0, L - 1, num_stages=1, disable_licm=True):
                        above = (program * (L - 1) + layer) * (LATER * BLOCK_M)
                        if JETS and RECOMPUTE:
                            waiting_ptr = scratch.saved + (rows_s * layer + program * LATER * BLOCK_M) * (C * WIDTH)
                        else:
                            waiting_ptr = scratch.h + above * (C * WIDTH)
                        add_product(
                            sums_ptr + at.hidden + layer * SQUARE, scratch.gz + above * (B * WIDTH),
                            waiting_ptr, (place + 1) * BLOCK_M, turn >= LATER, BLOCK_O, BLOCK_I, NET, NUM,
                        )  # fmt: skip
                    tl.debug_barrier()  # before the next tile's factors
    if NEED_W:
        store_blocks(sums_ptr + at.last, glast, again, CT, BLOCK_T, OUT_PAD)
    if PASS.NEED_B:
        store_column_sums(sums_ptr + at.bias, gbias, offs_t, L, again, PASS.GROUPS, NET)
        store_sum(sums_ptr + at.bias + L * (B * WIDTH) + offs_o, tl.sum(gout, axis=0), offs_o >= 0, again)
    if data.target is not None:
        value = tl.sum(tl.sum(losses, axis=1), axis=0) * criterion.scale
        if again:
            value += tl.load(sums_ptr + at.loss)
        tl.store(sums_ptr + at.loss, value)


# ---------------------------------------------------------------- a network that fits into registers


class OnePass(NamedTuple):
    """What `one_pass_kernel` is compiled to do, as `TrainPass` has it; for HIDDEN hidden weights, RESIDENT or not."""

    NEED_X: bool
    NEED_W: bool
    NEED_B: bool
    HIDDEN: int
    K_PAD: int
    RESIDENT: bool
    GROUPS: int


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def one_pass_kernel(
    data, packed, sums_ptr, criterion, gx_ptr, M, numbers, at, sizes, maps,
    PASS: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """What `train_kernel` computes with JETS, RECOMPUTE and SUMS, for one feature tile (WIDTH = BLOCK_T) and a constant
    depth of HIDDEN products: activations, derivatives and all sums stay in registers; `maps.map` is the
    jet. RESIDENT: the hidden weights stay on chip."""
    HIDDEN: tl.constexpr = PASS.HIDDEN
    NEED_W: tl.constexpr = PASS.NEED_W
    K_PAD: tl.constexpr = PASS.K_PAD
    B: tl.constexpr = NET.B
    C: tl.constexpr = NET.C
    BLOCK_M: tl.constexpr = NET.BLOCK_M
    BLOCK_T: tl.constexpr = NET.BLOCK_T
    OUT_PAD: tl.constexpr = NET.OUT_PAD
    ACC: tl.constexpr = NUM.ACC
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
    if PASS.NEED_B:
        gbias = zeros(B * PASS.GROUPS, BLOCK_T, _BIAS_COLUMNS, ACC)
    hidden_ptr, back_ptr, last_ptr, table_ptr = network(packed, HIDDEN + 1, K_PAD, NET)
    if PASS.RESIDENT:
        stack = load_stack(hidden_ptr, HIDDEN, NET)
    sums_ptr += program * at.total
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True):
        start = tile * BLOCK_M  # int64
        limit = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        mask_m = offs < limit
        rows = start + tl.minimum(offs, limit - 1)  # beyond the end, the last row again: finite where that row is
        z = first_layer(data.x, packed, rows, offs_t, sizes.K, K_PAD, NET, NUM)
        p = layer_params(numbers.maps, table_ptr, 0, offs_t, NET)
        h, d = evaluate_jet(z, p, offs_t, maps.map, NET, NUM)
        all_h = h
        all_d = d
        for layer in tl.static_range(1, HIDDEN + 1):
            if PASS.RESIDENT:
                z = resident_product(h, stack, (layer - 1) * BC, C, B, NET, NUM)
            else:
                z = hidden_product(h, hidden_ptr, layer - 1, NET, NUM)
            z = add_bias(z, packed.bias + layer * (B * BLOCK_T), offs_t, NET)
            p = layer_params(numbers.maps, table_ptr, layer, offs_t, NET)
            h, d = evaluate_jet(z, p, offs_t, maps.map, NET, NUM)
            all_h = all_h + h
            all_d = all_d + d
        out = product(h, last_ptr, 1, C * BLOCK_T, C, 1, BLOCK_T, OUT_PAD, NET, NUM)
        zy = out[0] + tl.load(packed.bias + (HIDDEN + 1) * (B * BLOCK_T) + offs_o)[None, :]
        gzy, loss = output_gradient(
            zy, data, numbers, criterion, rows, mask_m, offs_o, sizes.OUT, maps, NET, NUM
        )  # fmt: skip
        losses += loss
        gout += gzy
        gz = factors((gzy,), 1, NUM)
        if NEED_W:
            glast = outer(glast, 0, h, gz, C, 1, NUM)
        g = product(gz, last_ptr, C * BLOCK_T, 1, 1, C, OUT_PAD, BLOCK_T, NET, NUM)
        new_hidden = ()
        for above in tl.static_range(HIDDEN, -1, -1):
            d = ()
            for i in tl.static_range(BC):
                d = d + (all_d[above * BC + i],)
            gz = factors(times_jet(d, g, mask_m, NET, NUM), B, NUM)
            if PASS.NEED_B:
                gbias = column_sums(gbias, gz, above, PASS.GROUPS, NET, NUM)
            if above > 0:
                if NEED_W:
                    h = ()
                    for c in tl.static_range(C):
                        h = h + (all_h[(above - 1) * C + c],)
                    new_hidden = outer(ghidden, (above - 1) * BC, gz, h, B, C, NUM) + new_hidden
                if PASS.RESIDENT:
                    blocks = ()
                    for c in tl.static_range(C):
                        for b in tl.static_range(B):
                            blocks = blocks + (tl.trans(stack[((above - 1) * B + b) * C + c]),)
                    g = resident_product(gz, blocks, 0, B, C, NET, NUM)
                else:
                    g = hidden_product_back(gz, back_ptr, above - 1, NET, NUM)
        if PASS.NEED_X:
            gx = product(gz, packed.weights, K_PAD, 1, B, 1, BLOCK_T, K_PAD, NET, NUM)
            gx_tile = gx_ptr + rows[:, None] * sizes.K + offs_k[None, :]
            narrowed = narrow(gx[0] * criterion.unscale, gx_ptr.dtype.element_ty)
            tl.store(gx_tile, narrowed, mask=mask_m[:, None] & (offs_k < sizes.K)[None, :])
        if NEED_W:
            ghidden = new_hidden
            x = load_x(data.x, rows, offs_k, sizes.K, NUM)
            gfirst = outer(gfirst, 0, gz, (x,), B, 1, NUM)
    if NEED_W:
        if HIDDEN > 0:
            store_blocks(sums_ptr + at.hidden, ghidden, False, HIDDEN * BC, BLOCK_T, BLOCK_T)
        store_blocks(sums_ptr + at.first, gfirst, False, B, BLOCK_T, K_PAD)
        store_blocks(sums_ptr + at.last, glast, False, C, BLOCK_T, OUT_PAD)
    if PASS.NEED_B:
        store_column_sums(sums_ptr + at.bias, gbias, offs_t, HIDDEN + 1, False, PASS.GROUPS, NET)
        tl.store(sums_ptr + at.bias + (HIDDEN + 1) * (B * BLOCK_T) + offs_o, tl.sum(gout, axis=0))
    if data.target is not None:
        tl.store(sums_ptr + at.loss, tl.sum(tl.sum(losses, axis=1), axis=0) * criterion.scale)
