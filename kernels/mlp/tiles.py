"""Pieces of the whole-network kernels: what happens to the tile of rows that a program holds.

Shapes, inside. Widths are padded to powers of two with zeros: N to WIDTH = T * BLOCK_T (T feature tiles), the inputs K
to K_PAD, the outputs to OUT_PAD. L layers have the map, B branches and C outputs each:

| name | shape | |
| --- | --- | --- |
| first | [B*WIDTH, K_PAD] | |
| hidden | [L-1, B*WIDTH, C*WIDTH] | |
| back | [L-1, C*WIDTH, B*WIDTH] | hidden transposed, for TF32; else hidden itself |
| last | [OUT_PAD, C*WIDTH] | |
| bias | [L*B*WIDTH + OUT_PAD] | float32 (float64), zeros where there is none |
| table | [L, P, WIDTH] | parameters of the maps, where some are tensors; in the type of bias |

A tile's activations h are C*T blocks [BLOCK_M, BLOCK_T], block (c, t) at c*T + t; its pre-activations z are B*T, its
derivatives d of the outputs with respect to the branches C*B*T, block (c, b, t) at (c*B + b)*T + t.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..maps import factor

# ---------------------------------------------------------------- what a kernel is given


class Rows(NamedTuple):
    """What comes with the rows: the input, and the cotangent or what the loss takes."""

    x: object
    g: object
    target: object
    weights: object


@triton.jit
def network(
    packed_ptr, bias_ptr, L, K_PAD, B: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, OUT_PAD: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """Where hidden, back, last and table lie in what `pack.pack_kernel` has written; first and bias come first."""
    hidden = packed_ptr + B * WIDTH * K_PAD
    back = hidden
    last = hidden + (L - 1) * (B * WIDTH * C * WIDTH)
    if BACK:
        back = last
        last = back + (L - 1) * (B * WIDTH * C * WIDTH)
    return hidden, back, last, bias_ptr + L * (B * WIDTH) + OUT_PAD


# ---------------------------------------------------------------- maps


@triton.jit
def layer_params(
    map_params, table_ptr, layer, offs_t, T: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, P: tl.constexpr,
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
                p = map_params[j]
                for i in tl.static_range(1, SETS):
                    p = tl.where(layer >= i, map_params[i * P + j], p)
                values = values + (p,)
    return values


@triton.jit
def _apply(
    z, p, g, MAP: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, T: tl.constexpr, P: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """MAP of each feature tile's branches, parameters and G cotangents: a tuple of tuples."""
    tiles = ()
    for t in tl.static_range(T):
        args = ()
        for b in tl.static_range(B):
            args = args + (z[b * T + t],)
        for j in tl.static_range(P):
            args = args + (p[t * P + j],)
        for c in tl.static_range(G):
            args = args + (g[c * T + t],)
        tiles = tiles + (MAP(*args, MODE=MODE),)
    return tiles


@triton.jit
def _within(v, offs_t, t: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr):
    """v, and 0 in the columns of feature tile t beyond N."""
    if (t + 1) * BLOCK_T > N:
        v = tl.where((t * BLOCK_T + offs_t < N)[None, :], v, 0.0)
    return v


@triton.jit
def evaluate(
    z, p, offs_t, MAP: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = MAP(z) as factors of the next product; 0 in the columns beyond N."""
    tiles = _apply(z, p, (), MAP, MODE, B, T, P, 0)
    h = ()
    for c in tl.static_range(C):
        for t in tl.static_range(T):
            h = h + (factor(_within(tiles[t][c], offs_t, t, N, BLOCK_T), DTYPE, PRECISION),)
    return h


@triton.jit
def evaluate_jet(
    z, p, offs_t, JET: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = MAP(z) as factors of the next product and d = dh/dz in their type, from one evaluation; 0 in the columns
    beyond N."""
    tiles = _apply(z, p, (), JET, MODE, B, T, P, 0)
    h = ()
    for c in tl.static_range(C):
        for t in tl.static_range(T):
            h = h + (factor(_within(tiles[t][c], offs_t, t, N, BLOCK_T), DTYPE, PRECISION),)
    d = ()
    for i in tl.static_range(C * B):
        for t in tl.static_range(T):
            d = d + (_within(tiles[t][C + i], offs_t, t, N, BLOCK_T).to(DTYPE),)
    return h, d


@triton.jit
def pull_back(
    z, p, g, mask_m, offs_t, MAP: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    P: tl.constexpr, GP: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """gz = MAP(z, p, g), the level-1 map, and the gradients of GP parameters; 0 outside rows and columns."""
    tiles = _apply(z, p, g, MAP, MODE, B, T, P, C)
    gz = ()
    for b in tl.static_range(B + GP):
        for t in tl.static_range(T):
            mask = mask_m[:, None]
            if (t + 1) * BLOCK_T > N:
                mask = mask & (t * BLOCK_T + offs_t < N)[None, :]
            gz = gz + (tl.where(mask, tiles[t][b], 0.0),)
    return gz


@triton.jit
def times_jet(
    d, g, mask_m, B: tl.constexpr, C: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """gz = g d, summed over the outputs; 0 outside rows (columns beyond N are 0 in d)."""
    gz = ()
    for b in tl.static_range(B):
        for t in tl.static_range(T):
            v = g[t] * d[b * T + t].to(ACC)
            for c in tl.static_range(1, C):
                v += g[c * T + t] * d[(c * B + b) * T + t].to(ACC)
            gz = gz + (tl.where(mask_m[:, None], v, 0.0),)
    return gz


# ---------------------------------------------------------------- products


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BLOCK_M, BLOCK_N), ACC),)
    return tiles


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr):
    """acc + a b."""
    if UPCAST:  # the interpreter multiplies bfloat16 as the integers that it keeps them in
        a = a.to(ACC)
        b = b.to(ACC)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def add_bias(z, bias_ptr, offs_t, COUNT: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tiles in the order of memory: branch, then feature tile."""
    new = ()
    for i in tl.static_range(COUNT):
        bias = tl.load(bias_ptr + i * BLOCK_T + offs_t)
        new = new + (z[i] + bias[None, :],)
    return new


@triton.jit
def load_x(
    x_ptr, rows, offs_k, K, stride_xm, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Columns offs_k of the input as factors; 0 beyond K."""
    x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
    return factor(x, DTYPE, PRECISION)


@triton.jit
def first_layer(
    x_ptr, w_ptr, bias_ptr, rows, offs_t, K, K_PAD, stride_xm,
    BT: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
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
            x = load_x(x_ptr, rows, offs_k, K, stride_xm, DTYPE, PRECISION)
            new = ()
            for i in tl.static_range(BT):
                w = tl.load(w_ptr + (i * BLOCK_T + offs_t)[None, :] * K_PAD + offs_k[:, None])
                new = new + (dot(x, w, z[i], PRECISION, UPCAST, ACC),)
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
            acc = dot(a[i], w, acc, PRECISION, UPCAST, ACC)
        out = out + (acc,)
    return out


@triton.jit
def load_stack(w_ptr, LAYERS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK_T: tl.constexpr):
    """Every block of the hidden weights, transposed, (layer, out, in) in the order of memory."""
    tiles = ()
    for layer in tl.static_range(LAYERS):
        for o in tl.static_range(OUT):
            for i in tl.static_range(IN):
                w = load_tile(
                    w_ptr + layer * OUT * IN * BLOCK_T * BLOCK_T, i * BLOCK_T, o * BLOCK_T, 1, IN * BLOCK_T, BLOCK_T,
                    BLOCK_T,
                )  # fmt: skip
                tiles = tiles + (w,)
    return tiles


@triton.jit
def resident_product(
    h, tiles, first, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """`product` with blocks (out, in) that are on chip, from tiles[first] on."""
    out = ()
    for o in tl.static_range(OUT):
        acc = tl.zeros((BLOCK_M, BLOCK_T), ACC)
        for i in tl.static_range(IN):
            acc = dot(h[i], tiles[first + o * IN + i], acc, PRECISION, UPCAST, ACC)
        out = out + (acc,)
    return out


# ---------------------------------------------------------------- tiles in memory


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
    """What `store_tiles` has stored."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.load(ptr + (offs[:, None] * (COUNT * BLOCK_T) + (i * BLOCK_T + offs_t)[None, :])),)
    return tiles
