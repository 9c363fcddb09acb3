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


class Matrix(NamedTuple):
    """Rows in memory: where they begin, and from one to the next; within a row columns lie side by side."""

    ptr: object
    stride: object


class Rows(NamedTuple):
    """What comes with the rows, None where there is none: the input, and the cotangent or what the loss takes (a weight
    is a number a row, one behind the other)."""

    x: Matrix
    g: Matrix | None
    target: Matrix | None
    weights: object


class Packed(NamedTuple):
    """The packed network: weights (first, hidden, back, last); biases, and the table behind them."""

    weights: object
    bias: object


class Numbers(NamedTuple):
    """Parameters of the maps that are numbers: of the hidden layers, set after set, and of the last."""

    maps: tuple
    last: tuple


class Sizes(NamedTuple):
    """Of a network, not known when a kernel is compiled."""

    K: object
    K_PAD: object
    OUT: object


class Maps(NamedTuple):
    """What a kernel evaluates: the map of the hidden layers (or its jet) and the last one's; for a training pass their
    level 1, and the loss with its own, None where there is none. Triton knows a function among a kernel's arguments by
    its source, one within a constexpr by its name alone: so this group is no constexpr."""

    map: object
    last: object
    map_grad: object = None
    last_grad: object = None
    loss: object = None
    loss_grad: object = None


class Net(NamedTuple):
    """A network as a kernel is compiled for it, and how much of it a program holds at a time (see above). The hidden
    layers' map has P parameters, as SETS sets of numbers or in a TABLE; N of WIDTH columns exist; K_MAJOR: `back` is a
    copy; NARROW: few inputs, BLOCK_K of them; BLOCK_X: columns of the input at a time, backwards."""

    B: int
    C: int
    P: int
    SETS: int
    TABLE: bool
    N: int
    K_MAJOR: bool
    NARROW: bool
    T: int
    OUT_PAD: int
    BLOCK_M: int
    BLOCK_T: int
    BLOCK_K: int
    BLOCK_X: int


@triton.jit
def network(packed, L, K_PAD, NET: tl.constexpr):
    """Where hidden, back, last and table lie in what `pack.pack_kernel` has written; first and bias come first."""
    WIDTH: tl.constexpr = NET.T * NET.BLOCK_T
    hidden = packed.weights + NET.B * WIDTH * K_PAD
    back = hidden
    last = hidden + (L - 1) * (NET.B * WIDTH * NET.C * WIDTH)
    if NET.K_MAJOR:
        back = last
        last = back + (L - 1) * (NET.B * WIDTH * NET.C * WIDTH)
    return hidden, back, last, packed.bias + L * (NET.B * WIDTH) + NET.OUT_PAD


# ---------------------------------------------------------------- maps


@triton.jit
def layer_params(numbers, table_ptr, layer, offs_t, NET: tl.constexpr):
    """The P parameters of a layer for each feature tile, (t, j) at t*P + j: from a table [L, P, WIDTH], or from SETS
    sets of numbers, the last of which serves all layers from its own on."""
    WIDTH: tl.constexpr = NET.T * NET.BLOCK_T
    values = ()
    for t in tl.static_range(NET.T):
        for j in tl.static_range(NET.P):
            if NET.TABLE:
                p = tl.load(table_ptr + (layer * NET.P + j) * WIDTH + t * NET.BLOCK_T + offs_t)
                values = values + (p[None, :],)
            else:
                p = numbers[j]
                for i in tl.static_range(1, NET.SETS):
                    p = tl.where(layer >= i, numbers[i * NET.P + j], p)
                values = values + (p,)
    return values


@triton.jit
def _apply(z, p, g, MAP: tl.constexpr, G: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr):
    """MAP of each feature tile's branches, parameters and G cotangents: a tuple of tuples."""
    tiles = ()
    for t in tl.static_range(NET.T):
        args = ()
        for b in tl.static_range(NET.B):
            args = args + (z[b * NET.T + t],)
        for j in tl.static_range(NET.P):
            args = args + (p[t * NET.P + j],)
        for c in tl.static_range(G):
            args = args + (g[c * NET.T + t],)
        tiles = tiles + (MAP(*args, MODE=NUM.MODE),)
    return tiles


@triton.jit
def _within(v, offs_t, t: tl.constexpr, NET: tl.constexpr):
    """v, and 0 in the columns of feature tile t beyond N."""
    if (t + 1) * NET.BLOCK_T > NET.N:
        v = tl.where((t * NET.BLOCK_T + offs_t < NET.N)[None, :], v, 0.0)
    return v


@triton.jit
def evaluate(z, p, offs_t, MAP: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr):
    """h = MAP(z) as factors of the next product; 0 in the columns beyond N."""
    tiles = _apply(z, p, (), MAP, 0, NET, NUM)
    h = ()
    for c in tl.static_range(NET.C):
        for t in tl.static_range(NET.T):
            h = h + (factor(_within(tiles[t][c], offs_t, t, NET), NUM.DTYPE, NUM.PRECISION),)
    return h


@triton.jit
def evaluate_jet(z, p, offs_t, JET: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr):
    """h = MAP(z) as factors of the next product and d = dh/dz in their type, from one evaluation; 0 in the columns
    beyond N."""
    tiles = _apply(z, p, (), JET, 0, NET, NUM)
    h = ()
    for c in tl.static_range(NET.C):
        for t in tl.static_range(NET.T):
            h = h + (factor(_within(tiles[t][c], offs_t, t, NET), NUM.DTYPE, NUM.PRECISION),)
    d = ()
    for i in tl.static_range(NET.C * NET.B):
        for t in tl.static_range(NET.T):
            d = d + (_within(tiles[t][NET.C + i], offs_t, t, NET).to(NUM.DTYPE),)
    return h, d


@triton.jit
def pull_back(z, p, g, mask_m, offs_t, MAP: tl.constexpr, GP: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr):
    """gz = MAP(z, p, g), the level-1 map, and the gradients of GP parameters; 0 outside rows and columns."""
    tiles = _apply(z, p, g, MAP, NET.C, NET, NUM)
    gz = ()
    for b in tl.static_range(NET.B + GP):
        for t in tl.static_range(NET.T):
            mask = mask_m[:, None]
            if (t + 1) * NET.BLOCK_T > NET.N:
                mask = mask & (t * NET.BLOCK_T + offs_t < NET.N)[None, :]
            gz = gz + (tl.where(mask, tiles[t][b], 0.0),)
    return gz


@triton.jit
def times_jet(d, g, mask_m, NET: tl.constexpr, NUM: tl.constexpr):
    """gz = g d, summed over the outputs; 0 outside rows (columns beyond N are 0 in d)."""
    gz = ()
    for b in tl.static_range(NET.B):
        for t in tl.static_range(NET.T):
            v = g[t] * d[b * NET.T + t].to(NUM.ACC)
            for c in tl.static_range(1, NET.C):
                v += g[c * NET.T + t] * d[(c * NET.B + b) * NET.T + t].to(NUM.ACC)
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
def dot(a, b, acc, NUM: tl.constexpr):
    """acc + a b."""
    if NUM.UPCAST:  # the interpreter multiplies bfloat16 as the integers that it keeps them in
        a = a.to(NUM.ACC)
        b = b.to(NUM.ACC)
    return tl.dot(a, b, acc, input_precision=NUM.PRECISION, out_dtype=NUM.ACC)


@triton.jit
def add_bias(z, bias_ptr, offs_t, NET: tl.constexpr):
    """Tiles in the order of memory: branch, then feature tile."""
    new = ()
    for i in tl.static_range(NET.B * NET.T):
        bias = tl.load(bias_ptr + i * NET.BLOCK_T + offs_t)
        new = new + (z[i] + bias[None, :],)
    return new


@triton.jit
def load_x(x, rows, offs_k, K, NUM: tl.constexpr):
    """Columns offs_k of the input as factors; 0 beyond K."""
    v = tl.load(x.ptr + rows[:, None] * x.stride + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
    return factor(v, NUM.DTYPE, NUM.PRECISION)


@triton.jit
def first_layer(x, packed, rows, offs_t, K, K_PAD, NET: tl.constexpr, NUM: tl.constexpr):
    """z = x first^T + bias. NARROW: BLOCK_K = K multiply-adds in full precision."""
    w_ptr = packed.weights
    z = zeros(NET.B * NET.T, NET.BLOCK_M, NET.BLOCK_T, NUM.ACC)
    if NET.NARROW:
        for k in tl.static_range(NET.BLOCK_K):
            v = tl.load(x.ptr + rows * x.stride + k).to(NUM.ACC)
            new = ()
            for i in tl.static_range(NET.B * NET.T):
                w = tl.load(w_ptr + (i * NET.BLOCK_T + offs_t) * K_PAD + k).to(NUM.ACC)
                new = new + (z[i] + v[:, None] * w[None, :],)
            z = new
    else:
        for k in tl.range(0, K_PAD, NET.BLOCK_K, num_stages=1, disable_licm=True):
            offs_k = k + tl.arange(0, NET.BLOCK_K)
            v = load_x(x, rows, offs_k, K, NUM)
            new = ()
            for i in tl.static_range(NET.B * NET.T):
                w = tl.load(w_ptr + (i * NET.BLOCK_T + offs_t)[None, :] * K_PAD + offs_k[:, None])
                new = new + (dot(v, w, z[i], NUM),)
            z = new
    return add_bias(z, packed.bias, offs_t, NET)


@triton.jit
def load_tile(w_ptr, row, column, stride_r, stride_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs_r = row + tl.arange(0, ROWS)
    offs_c = column + tl.arange(0, COLUMNS)
    return tl.load(w_ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c)


@triton.jit
def product(
    a, w_ptr, stride_in, stride_out, IN: tl.constexpr, OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """OUT tiles [BLOCK_M, BLOCK_OUT] of a w, where w [IN*BLOCK_IN, OUT*BLOCK_OUT] has these strides."""
    out = ()
    for o in tl.static_range(OUT):
        acc = tl.zeros((NET.BLOCK_M, BLOCK_OUT), NUM.ACC)
        for i in tl.static_range(IN):
            w = load_tile(w_ptr, i * BLOCK_IN, o * BLOCK_OUT, stride_in, stride_out, BLOCK_IN, BLOCK_OUT)
            acc = dot(a[i], w, acc, NUM)
        out = out + (acc,)
    return out


@triton.jit
def hidden_product(h, hidden_ptr, i, NET: tl.constexpr, NUM: tl.constexpr):
    """h times the i-th hidden weight, transposed."""
    CT: tl.constexpr = NET.C * NET.T
    BT: tl.constexpr = NET.B * NET.T
    SQUARE: tl.constexpr = BT * NET.BLOCK_T * CT * NET.BLOCK_T
    return product(
        h, hidden_ptr + i * SQUARE, 1, CT * NET.BLOCK_T, CT, BT, NET.BLOCK_T, NET.BLOCK_T, NET, NUM
    )  # fmt: skip


@triton.jit
def hidden_product_back(gz, back_ptr, i, NET: tl.constexpr, NUM: tl.constexpr):
    """gz times the i-th hidden weight."""
    CT: tl.constexpr = NET.C * NET.T
    BT: tl.constexpr = NET.B * NET.T
    SQUARE: tl.constexpr = BT * NET.BLOCK_T * CT * NET.BLOCK_T
    if NET.K_MAJOR:  # a transposed copy [L-1, C*WIDTH, B*WIDTH]
        g = product(gz, back_ptr + i * SQUARE, 1, BT * NET.BLOCK_T, BT, CT, NET.BLOCK_T, NET.BLOCK_T, NET, NUM)
    else:
        g = product(gz, back_ptr + i * SQUARE, CT * NET.BLOCK_T, 1, BT, CT, NET.BLOCK_T, NET.BLOCK_T, NET, NUM)
    return g


@triton.jit
def load_stack(hidden_ptr, LAYERS: tl.constexpr, NET: tl.constexpr):
    """Every block of the hidden weights, transposed, (layer, out, in) in the order of memory."""
    IN: tl.constexpr = NET.C * NET.T
    OUT: tl.constexpr = NET.B * NET.T
    BLOCK: tl.constexpr = NET.BLOCK_T
    tiles = ()
    for layer in tl.static_range(LAYERS):
        for o in tl.static_range(OUT):
            for i in tl.static_range(IN):
                w_ptr = hidden_ptr + layer * OUT * IN * BLOCK * BLOCK
                tiles = tiles + (load_tile(w_ptr, i * BLOCK, o * BLOCK, 1, IN * BLOCK, BLOCK, BLOCK),)
    return tiles


@triton.jit
def resident_product(
    h, tiles, first, IN: tl.constexpr, OUT: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr
):  # fmt: skip
    """`product` with blocks (out, in) that are on chip, from tiles[first] on."""
    out = ()
    for o in tl.static_range(OUT):
        acc = tl.zeros((NET.BLOCK_M, NET.BLOCK_T), NUM.ACC)
        for i in tl.static_range(IN):
            acc = dot(h[i], tiles[first + o * IN + i], acc, NUM)
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
