"""Between a network's tensors and the kernels' layout (`tiles.py`): one launch packs, one takes the sums apart.

`pack_kernel` reads the weights, biases and parameters where they lie, in any type and strides, and writes them padded,
in the type of the products, rounded where the tensor cores would cut. `finish_kernel` adds the programs' sums in a
fixed order and writes every gradient in its own shape and type.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..configurations import linear_act as layer_configs
from ..launch import TYPES, Launcher, arithmetic, constants_of, on_device
from ..maps import factor, narrow
from .tiles import Packed

#: Elements of a packed weight that a program writes: every packed weight is a multiple of it.
PACK_BLOCK = 256
#: Sums that a program of `finish_kernel` adds up, and how many programs' at a time.
FINISH_BLOCK, FINISH_ROWS = 64, 32


@dataclass(frozen=True)
class NetworkSizes:
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
        return max(16, layer_configs.power_of_two(self.outputs))

    @property
    def rows(self) -> int:
        """Rows of a hidden weight, padded: branches times width."""
        return self.branches * self.width

    @property
    def columns(self) -> int:
        return self.channels * self.width

    @property
    def square(self) -> int:
        """Elements of a hidden weight."""
        return self.rows * self.columns


# ---------------------------------------------------------------- pack


class SourceMatrices(NamedTuple):
    """A tensor a layer, and its strides; a vector has none between rows."""

    ptrs: tuple
    rows: tuple
    columns: tuple


class SourceVectors(NamedTuple):
    """A tensor each, or None, and its stride."""

    ptrs: tuple
    strides: tuple


@triton.jit
def _source(
    start, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH_R: tl.constexpr, N_R, WIDTH_C: tl.constexpr, N_C
):  # fmt: skip
    """Packed row and column of BLOCK elements from `start`, those of the tensor, and which exist there: rows come in
    groups of WIDTH_R of which N_R exist, columns in groups of WIDTH_C of which N_C do."""
    offs = start + tl.arange(0, BLOCK)
    row = offs // COLUMNS
    column = offs % COLUMNS
    r, n = row // WIDTH_R, row % WIDTH_R
    c, m = column // WIDTH_C, column % WIDTH_C
    return row, column, r * N_R + n, c * N_C + m, (n < N_R) & (m < N_C)


@triton.jit
def _load(matrices, i: tl.constexpr, row, column, mask):
    at = matrices.ptrs[i] + row.to(tl.int64) * matrices.rows[i] + column.to(tl.int64) * matrices.columns[i]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _load_vector(vectors, i: tl.constexpr, offs, mask, ACC: tl.constexpr):
    return tl.load(vectors.ptrs[i] + offs * vectors.strides[i], mask=mask, other=0.0).to(ACC)


class Layout(NamedTuple):
    """`NetworkSizes` as the kernels here take them, padded and not; but for inputs and outputs that exist."""

    B: int
    C: int
    P: int
    L: int
    N: int
    WIDTH: int
    K_PAD: int
    OUT_PAD: int


def _layout(net: NetworkSizes) -> Layout:
    layout = Layout(
        net.branches, net.channels, net.n_params, net.layers, net.features, net.width, net.inputs_pad, net.outputs_pad
    )  # fmt: skip
    return constants_of(layout)


@triton.jit
def pack_kernel(
    packed, weights, biases, tensors, numbers, K, OUT,
    BACK: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr, NET: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """packed: first, hidden, back (if BACK), last; its bias: biases, then the table (if TABLE). `tensors` has a tensor
    or None for each parameter of each layer, `numbers` what stands for None."""
    B: tl.constexpr = NET.B
    P: tl.constexpr = NET.P
    L: tl.constexpr = NET.L
    N: tl.constexpr = NET.N
    WIDTH: tl.constexpr = NET.WIDTH
    K_PAD: tl.constexpr = NET.K_PAD
    OUT_PAD: tl.constexpr = NET.OUT_PAD
    ACC: tl.constexpr = NUM.ACC
    ROWS: tl.constexpr = B * WIDTH
    COLUMNS: tl.constexpr = NET.C * WIDTH
    SQUARE: tl.constexpr = ROWS * COLUMNS
    FIRST: tl.constexpr = ROWS * K_PAD // BLOCK  # programs of the first weight
    HIDDEN: tl.constexpr = SQUARE // BLOCK
    LAST: tl.constexpr = OUT_PAD * COLUMNS // BLOCK
    pid = tl.program_id(0)
    hidden_ptr = packed.weights + ROWS * K_PAD
    back_ptr = hidden_ptr + (L - 1) * SQUARE
    last_ptr = back_ptr
    if BACK:
        last_ptr = back_ptr + (L - 1) * SQUARE
    offs_t = tl.arange(0, WIDTH)
    for i in tl.static_range(L + 1):
        if i == 0:
            if pid < FIRST:
                row, column, r, c, mask = _source(pid * BLOCK, BLOCK, K_PAD, WIDTH, N, K_PAD, K)
                w = _load(weights, 0, r, c, mask)
                tl.store(packed.weights + row * K_PAD + column, factor(w.to(ACC), NUM.DTYPE, NUM.PRECISION))
        elif i < L:
            mine = pid - FIRST - (i - 1) * HIDDEN
            if (mine >= 0) & (mine < HIDDEN):
                row, column, r, c, mask = _source(mine * BLOCK, BLOCK, COLUMNS, WIDTH, N, WIDTH, N)
                w = factor(_load(weights, i, r, c, mask).to(ACC), NUM.DTYPE, NUM.PRECISION)
                tl.store(hidden_ptr + (i - 1) * SQUARE + row * COLUMNS + column, w)
                if BACK:
                    tl.store(back_ptr + (i - 1) * SQUARE + column * ROWS + row, w)
        else:
            mine = pid - FIRST - (L - 1) * HIDDEN
            if (mine >= 0) & (mine < LAST):
                row, column, r, c, mask = _source(mine * BLOCK, BLOCK, COLUMNS, OUT_PAD, OUT, WIDTH, N)
                w = _load(weights, L, r, c, mask)
                tl.store(last_ptr + row * COLUMNS + column, factor(w.to(ACC), NUM.DTYPE, NUM.PRECISION))
    layer = pid - FIRST - (L - 1) * HIDDEN - LAST  # one program for what else a layer has
    for i in tl.static_range(L):
        if layer == i:
            for b in tl.static_range(B):
                v = tl.zeros((WIDTH,), ACC)
                if biases.ptrs[i] is not None:
                    v = _load_vector(biases, i, b * N + offs_t, offs_t < N, ACC)
                tl.store(packed.bias + i * ROWS + b * WIDTH + offs_t, v)
            if TABLE:
                for j in tl.static_range(P):
                    if tensors.ptrs[i * P + j] is not None:
                        v = _load_vector(tensors, i * P + j, offs_t, offs_t < N, ACC)
                    else:
                        v = tl.where(offs_t < N, numbers[i * P + j] + tl.zeros((WIDTH,), ACC), 0.0)
                    table_ptr = packed.bias + L * ROWS + OUT_PAD
                    tl.store(table_ptr + (i * P + j) * WIDTH + offs_t, v)
    if layer == L:
        offs_o = tl.arange(0, OUT_PAD)
        v = tl.zeros((OUT_PAD,), ACC)
        if biases.ptrs[L] is not None:
            v = _load_vector(biases, L, offs_o, offs_o < OUT, ACC)
        tl.store(packed.bias + L * ROWS + offs_o, v)


def sizes(net: NetworkSizes, back: bool, table: bool) -> tuple[int, int]:
    """Elements of the packed weights, and of biases and table."""
    weights = net.rows * net.inputs_pad + (net.layers - 1) * net.square * (2 if back else 1)
    weights += net.outputs_pad * net.columns
    return weights, net.layers * net.rows + net.outputs_pad + (net.layers * net.n_params * net.width if table else 0)


_pack = Launcher(pack_kernel)
_NO_VECTORS = SourceVectors((), ())


@functools.lru_cache(maxsize=256)
def _pack_constants(
    net: NetworkSizes, back: bool, table: bool, dtype: torch.dtype, precision: str, numbers: tuple[float, ...]
) -> tuple[int, dict]:  # fmt: skip
    programs = (sizes(net, False, False)[0]) // PACK_BLOCK + net.layers + 1
    return programs, {
        "numbers": numbers, "K": net.inputs, "OUT": net.outputs, "BACK": back, "TABLE": table, "BLOCK": PACK_BLOCK,
        "NET": _layout(net), "NUM": arithmetic(dtype, precision), "num_warps": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def launch_pack(
    net: NetworkSizes, packed: Packed, weights: Sequence, biases: Sequence, params: Sequence,
    numbers: tuple[float, ...], back: bool, table: bool, dtype: torch.dtype, precision: str,
) -> None:  # fmt: skip
    """Both parts of `packed`, of the elements that `sizes` says, from the network's own tensors; params and numbers: of
    the layers before the last."""
    programs, constants = _pack_constants(net, back, table, dtype, precision, numbers if table else ())
    strides = [w.stride() for w in weights]
    matrices = SourceMatrices(tuple(weights), tuple([r for r, _ in strides]), tuple([c for _, c in strides]))
    vectors = SourceVectors(tuple(biases), tuple([0 if b is None else b.stride(0) for b in biases]))
    tensors = _NO_VECTORS
    if table:
        tensors = SourceVectors(tuple(params), tuple([0 if p is None or not p.dim() else p.stride(0) for p in params]))
    with on_device(packed.weights):
        _pack(programs, (packed, matrices, vectors, tensors), constants)


# ---------------------------------------------------------------- finish


class Segments(NamedTuple):
    """Where the sums of one program lie in its row of the buffer, each from a multiple of FINISH_BLOCK on; -1: none.

    first [B*WIDTH, K_PAD]; hidden [L-1, B*WIDTH, C*WIDTH], or block by block of BLOCK_T x BLOCK_T where `block` says
    its side; last [C*WIDTH, OUT_PAD]; bias [L, B*WIDTH] and behind it [OUT_PAD]; map_params [L, P, WIDTH]; loss [1].
    """

    first: int
    hidden: int
    last: int
    bias: int
    map_params: int
    loss: int
    total: int
    block: int


@functools.lru_cache(maxsize=256)
def segments(net: NetworkSizes, needs_w: bool, needs_b: bool, needs_p: bool, loss: bool, hidden: bool, block: int):
    """The layout of the sums that are needed."""
    lengths = {
        "first": net.rows * net.inputs_pad if needs_w else 0,
        "hidden": (net.layers - 1) * net.square if needs_w and hidden else 0,
        "last": net.columns * net.outputs_pad if needs_w else 0,
        "bias": net.layers * net.rows + net.outputs_pad if needs_b else 0,
        "map_params": net.layers * net.n_params * net.width if needs_p else 0,
        "loss": 1 if loss else 0,
    }
    where, offset = {}, 0
    for name, length in lengths.items():
        where[name] = offset if length else -1
        offset += -(-length // FINISH_BLOCK) * FINISH_BLOCK
    return Segments(**where, total=offset, block=block)


@triton.jit
def _scatter(ptr, v, row, column, mask, COLUMNS):
    tl.store(ptr + row * COLUMNS + column, narrow(v, ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=["programs"])
def finish_kernel(
    sums_ptr, weights, biases, map_params, loss_ptr, programs, scale, K, OUT,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr, AT: tl.constexpr, NET: tl.constexpr,
):  # fmt: skip
    """Gradients (contiguous, of the network's shapes) and loss: `scale` times the sums of sums [programs, total]. AT:
    the `Segments`."""
    P: tl.constexpr = NET.P
    L: tl.constexpr = NET.L
    N: tl.constexpr = NET.N
    WIDTH: tl.constexpr = NET.WIDTH
    K_PAD: tl.constexpr = NET.K_PAD
    OUT_PAD: tl.constexpr = NET.OUT_PAD
    FIRST: tl.constexpr = AT.first
    HIDDEN: tl.constexpr = AT.hidden
    LAST: tl.constexpr = AT.last
    BIAS: tl.constexpr = AT.bias
    PARAMS: tl.constexpr = AT.map_params
    SIDE: tl.constexpr = AT.block
    ROWS: tl.constexpr = NET.B * WIDTH
    COLUMNS: tl.constexpr = NET.C * WIDTH
    SQUARE: tl.constexpr = ROWS * COLUMNS
    start = tl.program_id(0) * BLOCK_L
    offs = start + tl.arange(0, BLOCK_L)
    acc = tl.zeros((BLOCK_S, BLOCK_L), ACC)
    for s in range(0, programs, BLOCK_S):
        offs_s = (s + tl.arange(0, BLOCK_S)).to(tl.int64)
        mask = (offs_s < programs)[:, None]
        acc += tl.load(sums_ptr + offs_s[:, None] * AT.total + offs[None, :], mask=mask, other=0.0)
    v = tl.sum(acc, axis=0) * scale
    if FIRST >= 0:
        if (start >= FIRST) & (start < FIRST + ROWS * K_PAD):
            row, column = (offs - FIRST) // K_PAD, (offs - FIRST) % K_PAD
            b, n = row // WIDTH, row % WIDTH
            _scatter(weights[0], v, b * N + n, column, (n < N) & (column < K), K)
    if HIDDEN >= 0:
        for i in tl.static_range(1, L):
            if (start >= HIDDEN + (i - 1) * SQUARE) & (start < HIDDEN + i * SQUARE):
                at = offs - (HIDDEN + (i - 1) * SQUARE)
                if SIDE > 0:
                    inside, block = at % (SIDE * SIDE), at // (SIDE * SIDE)
                    row = block // (COLUMNS // SIDE) * SIDE + inside // SIDE
                    column = block % (COLUMNS // SIDE) * SIDE + inside % SIDE
                else:
                    row, column = at // COLUMNS, at % COLUMNS
                b, n = row // WIDTH, row % WIDTH
                c, m = column // WIDTH, column % WIDTH
                _scatter(weights[i], v, b * N + n, c * N + m, (n < N) & (m < N), NET.C * N)
    if LAST >= 0:
        if (start >= LAST) & (start < LAST + COLUMNS * OUT_PAD):
            row, column = (offs - LAST) // OUT_PAD, (offs - LAST) % OUT_PAD
            c, m = row // WIDTH, row % WIDTH
            _scatter(weights[L], v, column, c * N + m, (column < OUT) & (m < N), NET.C * N)
    if BIAS >= 0:
        if (start >= BIAS) & (start < BIAS + L * ROWS + OUT_PAD):
            at = offs - BIAS
            n = at % WIDTH
            for i in tl.static_range(L):
                if biases[i] is not None:
                    mine = (at >= i * ROWS) & (at < (i + 1) * ROWS) & (n < N)
                    _scatter(biases[i], v, at % ROWS // WIDTH * N + n, 0, mine, 1)
            if biases[L] is not None:
                _scatter(biases[L], v, at - L * ROWS, 0, (at >= L * ROWS) & (at < L * ROWS + OUT), 1)
    if PARAMS >= 0:
        if (start >= PARAMS) & (start < PARAMS + L * P * WIDTH):
            at = offs - PARAMS
            n = at % WIDTH
            for i in tl.static_range(L):
                mine = (at >= i * P * WIDTH) & (at < (i + 1) * P * WIDTH) & (n < N)
                _scatter(map_params[i], v, at % (P * WIDTH) // WIDTH, n, mine, N)
    if AT.loss >= 0:
        if start == AT.loss:
            tl.store(loss_ptr + offs - AT.loss, v, mask=offs == AT.loss)


_finish = Launcher(finish_kernel)


@functools.lru_cache(maxsize=256)
def _finish_constants(net: NetworkSizes, where: Segments, acc: torch.dtype) -> dict:
    return {
        "K": net.inputs, "OUT": net.outputs, "BLOCK_S": FINISH_ROWS, "BLOCK_L": FINISH_BLOCK, "ACC": TYPES[acc],
        "AT": constants_of(where), "NET": _layout(net), "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip


def launch_finish(
    net: NetworkSizes, where: Segments, sums, weights: Sequence, biases: Sequence, map_params: Sequence, loss,
    scale: float,
) -> None:  # fmt: skip
    """The network's gradients and the loss from sums [programs, where.total]; what there is none of is None."""
    arguments = (sums, tuple(weights), tuple(biases), tuple(map_params), loss, sums.shape[0], scale)
    with on_device(sums):
        _finish(where.total // FINISH_BLOCK, arguments, _finish_constants(net, where, sums.dtype))
