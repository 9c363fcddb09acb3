"""y = map(x W^T + b) and its backward, fused.

Forward: one kernel; the branches of a layer share one read of x. Backward: a forward-shaped kernel recomputes z (or
reads it) and writes gz = vjp(z, g) once, in the compute type, with the bias and parameter gradients as partial sums per
row tile; then gx = gz W (the forward kernel with the identity map) and gW = gz^T x (rows split over programs, partial
products summed in a fixed order by a second kernel). No atomics: the same bits every run.

Shapes, inside: x [G, M, K], weight [G, B*N, K], z and gz [G, M, B*N], y and g [G, M, C*N]; stride 0 on G where shared.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configurations import linear_act as layer_configs
from .launch import Launcher, accumulator, arithmetic, cdiv, on_device
from .maps import Params, identity, load_params, narrow, param_arguments, rounded
from .sums import launch_sum

DOT, NARROW_K, NARROW_N = layer_configs.DOT, layer_configs.NARROW_K, layer_configs.NARROW_N

# ---------------------------------------------------------------- kernels


class LayerMatrices(NamedTuple):
    """A matrix a layer: where they begin, and the strides between layers (0: all have one), rows and columns."""

    ptr: object
    layer: int
    row: int
    column: int


class LayerRows(NamedTuple):
    """A matrix a layer, whose columns lie side by side."""

    ptr: object
    layer: int
    row: int


class LayerVectors(NamedTuple):
    """A vector a layer."""

    ptr: object
    layer: int
    element: int


@triton.jit
def pre_activation(
    x, weight, bias, layer, offs_m, offs_n, M, N, K,
    B: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM: tl.constexpr,
):  # fmt: skip
    """z = x W^T + b for one tile: B tiles [BLOCK_M, BLOCK_N]. Row and column offsets arrive as int64."""
    ACC: tl.constexpr = NUM.ACC
    x_ptr = x.ptr + layer * x.layer
    w_ptr = weight.ptr + layer * weight.layer
    if bias is not None:
        b_ptr = bias.ptr + layer * bias.layer
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = ()
    if KIND == 1:  # K of 1 to 8: BLOCK_K = K multiply-adds, no tile of tensor cores padded to 16
        for _ in tl.static_range(B):
            acc = acc + (tl.zeros((BLOCK_M, BLOCK_N), ACC),)
        for _k in tl.static_range(BLOCK_K):
            v = tl.load(x_ptr + offs_m * x.row, mask=mask_m, other=0.0).to(ACC)
            new = ()
            for b in tl.static_range(B):
                w = tl.load(w_ptr + (b * N + offs_n) * weight.row, mask=mask_n, other=0.0).to(ACC)
                new = new + (acc[b] + v[:, None] * w[None, :],)
            acc = new
            x_ptr += x.column  # step by step: k times a stride could pass 2^31
            w_ptr += weight.column
    elif KIND == 2:  # N of 1 to 4: products side by side, summed over K once at the end
        for _ in tl.static_range(B):
            acc = acc + (tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), ACC),)
        for k in range(0, K, BLOCK_K):
            offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask_k = offs_k < K
            v = tl.load(
                x_ptr + offs_m[:, None, None] * x.row + offs_k[None, None, :] * x.column,
                mask=mask_m[:, None, None] & mask_k[None, None, :],
                other=0.0,
            ).to(ACC)  # [BLOCK_M, 1, BLOCK_K]
            new = ()
            for b in tl.static_range(B):
                w = tl.load(
                    w_ptr + (b * N + offs_n)[None, :, None] * weight.row + offs_k[None, None, :] * weight.column,
                    mask=mask_n[None, :, None] & mask_k[None, None, :],
                    other=0.0,
                ).to(ACC)  # [1, BLOCK_N, BLOCK_K]
                new = new + (acc[b] + v * w,)
            acc = new
        new = ()
        for b in tl.static_range(B):
            new = new + (tl.sum(acc[b], axis=2),)
        acc = new
    else:
        for _ in tl.static_range(B):
            acc = acc + (tl.zeros((BLOCK_M, BLOCK_N), ACC),)
        for k in range(0, K, BLOCK_K):
            offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask_k = offs_k < K
            v = tl.load(
                x_ptr + offs_m[:, None] * x.row + offs_k[None, :] * x.column,
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )
            if NUM.UPCAST:  # the interpreter multiplies bfloat16 as the integers that it keeps them in
                v = v.to(ACC)
            v = rounded(v, NUM.PRECISION)
            new = ()
            for b in tl.static_range(B):
                w = tl.load(
                    w_ptr + (b * N + offs_n)[None, :] * weight.row + offs_k[:, None] * weight.column,
                    mask=mask_n[None, :] & mask_k[:, None],
                    other=0.0,
                )
                if NUM.UPCAST:
                    w = w.to(ACC)
                w = rounded(w, NUM.PRECISION)
                new = new + (tl.dot(v, w, acc[b], input_precision=NUM.PRECISION, out_dtype=ACC),)
            acc = new
    if bias is not None:
        new = ()
        for b in tl.static_range(B):
            v = tl.load(b_ptr + (b * N + offs_n) * bias.element, mask=mask_n, other=0.0).to(ACC)
            new = new + (acc[b] + v[None, :],)
        acc = new
    return acc


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Layer, row tile, column tile. All on grid axis 0 (the others stop at 65,535); neighbours share a row tile of
    x."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_gm = pid // tiles_n
    return (tile_gm // tiles_m).to(tl.int64), (tile_gm % tiles_m).to(tl.int64), tile_n


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def forward_kernel(
    x, weight, bias, map_params, y, z, M, N, K,
    MAP: tl.constexpr, B: tl.constexpr, C: tl.constexpr, POINTERS: tl.constexpr, SAVE: tl.constexpr,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """y = MAP(x W^T + b). SAVE 1: z = x W^T + b as well; 2: the derivatives of y with respect to z, [.., C*B*N] in z,
    MAP being the jet."""
    g, tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # int64
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    v = pre_activation(
        x, weight, bias, g, offs_m, offs_n, M, N, K, B, KIND, BLOCK_M, BLOCK_N, BLOCK_K, NUM
    )  # fmt: skip
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    if SAVE == 1:
        z_tile = z.ptr + g * z.layer + offs_m[:, None] * z.row + offs_n[None, :]
        for b in tl.static_range(B):
            tl.store(z_tile + b * N, v[b], mask=mask)
    p = load_params(map_params, offs_n, mask_n, POINTERS, NUM.ACC)
    out = MAP(*v, *p, MODE=NUM.MODE)
    y_tile = y.ptr + g * y.layer + offs_m[:, None] * y.row + offs_n[None, :]
    for c in tl.static_range(C):
        tl.store(y_tile + c * N, narrow(out[c], y.ptr.dtype.element_ty), mask=mask)
    if SAVE == 2:
        d_tile = z.ptr + g * z.layer + offs_m[:, None] * z.row + offs_n[None, :]
        for i in tl.static_range(C * B):
            tl.store(d_tile + i * N, narrow(out[C + i], z.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def gz_kernel(
    g, x, weight, bias, map_params, z, gz_ptr, gb_ptr, gp_ptr, M, N, K,
    MAP: tl.constexpr, B: tl.constexpr, C: tl.constexpr, P: tl.constexpr, POINTERS: tl.constexpr, KEPT: tl.constexpr,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """gz [G, M, B*N] = MAP(z, map_params, g), the level-1 map; sums over the tile's rows of gz to gb [G, tiles, B*N],
    and of the gradients of P parameters (0: constants) to gp [G, tiles, P*N]. KEPT: z holds nothing (0), z (1), or the
    derivatives d [.., C*B*N] (2): then gz = g d."""
    layer, tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # int64
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    v = ()
    if KEPT:
        z_tile = z.ptr + layer * z.layer + offs_m[:, None] * z.row + offs_n[None, :]
        for b in tl.static_range(B if KEPT == 1 else C * B):
            v = v + (tl.load(z_tile + b * N, mask=mask, other=0.0).to(NUM.ACC),)
    else:
        v = pre_activation(
            x, weight, bias, layer, offs_m, offs_n, M, N, K, B, KIND, BLOCK_M, BLOCK_N, BLOCK_K, NUM
        )  # fmt: skip
    gy = ()
    g_tile = g.ptr + layer * g.layer + offs_m[:, None] * g.row
    for c in tl.static_range(C):
        gy = gy + (tl.load(g_tile + (c * N + offs_n)[None, :] * g.column, mask=mask, other=0.0).to(NUM.ACC),)
    out = ()
    if KEPT == 2:
        for b in tl.static_range(B):
            gz = gy[0] * v[b]
            for c in tl.static_range(1, C):
                gz += gy[c] * v[c * B + b]
            out = out + (gz,)
    else:
        p = load_params(map_params, offs_n, mask_n, POINTERS, NUM.ACC)
        out = MAP(*v, *p, *gy, MODE=NUM.MODE)
    row = layer * tl.cdiv(M, BLOCK_M) + tile_m
    for b in tl.static_range(B):
        # rows and columns outside may hold anything (0 times an infinite derivative): they must not reach the sums
        gz = tl.where(mask, out[b], 0.0)
        if gz_ptr is not None:
            gz_tile = gz_ptr + (layer * M + offs_m)[:, None] * (B * N) + (b * N + offs_n)[None, :]
            tl.store(gz_tile, narrow(gz, gz_ptr.dtype.element_ty), mask=mask)
        if gb_ptr is not None:
            tl.store(gb_ptr + row * (B * N) + b * N + offs_n, tl.sum(gz, axis=0), mask=mask_n)
    for j in tl.static_range(P):
        gp = tl.where(mask, out[B + j], 0.0)
        tl.store(gp_ptr + row * (P * N) + j * N + offs_n, tl.sum(gp, axis=0), mask=mask_n)


@triton.jit(do_not_specialize=["M", "rows"], do_not_specialize_on_alignment=["M", "rows"])
def weight_grad_kernel(
    gz, x, out_ptr, M, N, K, rows, SPLITS, DOT_PRODUCT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """out [G, SPLITS, N, K] = gz^T x over `rows` rows a split; here N counts the columns of gz (branches times
    features)."""
    ACC: tl.constexpr = NUM.ACC
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_k = (pid // tiles_n) % tiles_k
    row = pid // (tiles_n * tiles_k)  # layer and split
    layer = (row // SPLITS).to(tl.int64)
    start = (row % SPLITS).to(tl.int64) * rows
    stop = tl.minimum(start + rows, M)
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = (tile_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask_n = offs_n < N
    mask_k = offs_k < K
    gz_ptr = gz.ptr + layer * gz.layer
    x_ptr = x.ptr + layer * x.layer
    steps = tl.cdiv(stop - start, BLOCK_M).to(tl.int32)
    if DOT_PRODUCT:
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        for i in range(steps):
            offs_m = start + i * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < stop
            a = tl.load(
                gz_ptr + offs_m[None, :] * gz.row + offs_n[:, None],
                mask=mask_m[None, :] & mask_n[:, None],
                other=0.0,
            )
            v = tl.load(
                x_ptr + offs_m[:, None] * x.row + offs_k[None, :] * x.column,
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )
            if NUM.UPCAST:
                a = a.to(ACC)
                v = v.to(ACC)
            a = rounded(a, NUM.PRECISION)
            v = rounded(v, NUM.PRECISION)
            acc = tl.dot(a, v, acc, input_precision=NUM.PRECISION, out_dtype=ACC)
    else:  # a narrow side: products over the rows of a block side by side, summed at the end
        partial = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), ACC)
        for i in range(steps):
            offs_m = start + i * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < stop
            a = tl.load(
                gz_ptr + offs_m[:, None, None] * gz.row + offs_n[None, :, None],
                mask=mask_m[:, None, None] & mask_n[None, :, None],
                other=0.0,
            ).to(ACC)
            v = tl.load(
                x_ptr + offs_m[:, None, None] * x.row + offs_k[None, None, :] * x.column,
                mask=mask_m[:, None, None] & mask_k[None, None, :],
                other=0.0,
            ).to(ACC)
            partial += a * v
        acc = tl.sum(partial, axis=0)
    out = out_ptr + row.to(tl.int64) * N * K + offs_n[:, None] * K + offs_k[None, :]
    tl.store(out, narrow(acc, out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


# ---------------------------------------------------------------- launchers: allocated outputs, checked inputs


def _matrices(t: torch.Tensor) -> LayerMatrices:
    strides = t.stride()
    return LayerMatrices(t, 0, *strides) if len(strides) == 2 else LayerMatrices(t, *strides)


def _rows(t: torch.Tensor | None) -> LayerRows | None:
    """A tensor whose last stride is 1."""
    if t is None:
        return None
    return LayerRows(t, 0, t.stride(0)) if t.dim() == 2 else LayerRows(t, t.stride(0), t.stride(1))


def _vectors(t: torch.Tensor | None) -> LayerVectors | None:
    if t is None:
        return None
    return LayerVectors(t, 0, *t.stride()) if t.dim() == 1 else LayerVectors(t, *t.stride())


def launch_forward(x, weight, bias, param_args, y, z, function, B: int, C: int, precision: str, save: int = 1) -> None:
    """y (and z, unless None) = function(x weight^T + bias). y and z: [.., M, columns], last stride 1. save 2: z takes
    the derivatives, and function is the jet."""
    G, M, N = y.shape[0] if y.dim() == 3 else 1, y.shape[-2], y.shape[-1] // C
    K = x.shape[-1]
    if not G * M * N:
        return
    params, pointers = param_args
    kind = layer_configs.kind(N, K)
    config = layer_configs.pick(layer_configs.arch(x.device), "forward", kind, x.dtype, precision, B, N, K)
    arguments = (_matrices(x), _matrices(weight), _vectors(bias), params, _rows(y), _rows(z), M, N, K)
    constants = _forward_constants(
        function, x.dtype, precision, B, C, pointers, 0 if z is None else save, kind, config
    )  # fmt: skip
    with on_device(x):
        _forward(G * cdiv(M, config.block_m) * cdiv(N, config.block_n), arguments, constants)


_forward, _gz, _weight_grad = Launcher(forward_kernel), Launcher(gz_kernel), Launcher(weight_grad_kernel)


@functools.lru_cache(maxsize=1024)
def _forward_constants(function, dtype, precision, B, C, pointers, save, kind, config) -> dict[str, object]:
    return {
        "MAP": function, "B": B, "C": C, "POINTERS": pointers, "SAVE": save, "KIND": kind,
        "NUM": arithmetic(dtype, precision), **config.options(),
    }  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _gz_constants(function, dtype, precision, B, C, P, pointers, kept, kind, config) -> dict[str, object]:
    return {
        "MAP": function, "B": B, "C": C, "P": P, "POINTERS": pointers, "KEPT": kept, "KIND": kind,
        "NUM": arithmetic(dtype, precision), **config.options(),
    }  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _weight_grad_constants(dtype, precision, config) -> dict[str, object]:
    return {"DOT_PRODUCT": config.dot, "NUM": arithmetic(dtype, precision), **config.options()}


def _kept(z: torch.Tensor | None) -> int:
    """What a tensor that a forward has kept holds: nothing, pre-activations, derivatives (in half types)."""
    return 0 if z is None else 1 if z.dtype.itemsize >= 4 else 2


def launch_gz(g, x, weight, bias, param_args, z, gz, gb, gp, function, B: int, C: int, precision: str) -> None:
    """gz [G, M, B*N], gb [G, tiles, B*N] and gp [G, tiles, P*N], each contiguous, or None where not wanted; z: what the
    forward has kept, or None."""
    G, M, N = g.shape[0] if g.dim() == 3 else 1, g.shape[-2], g.shape[-1] // C
    K = x.shape[-1]
    if not G * M * N:
        return
    params, pointers = param_args
    kind = layer_configs.kind(N, K) if z is None else layer_configs.MAP
    config = layer_configs.pick(layer_configs.arch(x.device), "gz", kind, x.dtype, precision, B, N, K)
    arguments = (
        _matrices(g), _matrices(x), _matrices(weight), _vectors(bias), params, _rows(z), gz, gb, gp, M, N, K
    )  # fmt: skip
    constants = _gz_constants(
        function, x.dtype, precision, B, C, 0 if gp is None else len(params.entries), pointers, _kept(z), kind, config
    )  # fmt: skip
    with on_device(x):
        _gz(G * cdiv(M, config.block_m) * cdiv(N, config.block_n), arguments, constants)


def weight_grad_splits(M: int, N: int, K: int, config: layer_configs.LayerConfig, layers: int) -> tuple[int, int]:
    """Number of splits and rows in each: enough programs to fill a large device, at least 8 steps each. It depends on
    the shapes alone, so the sum's order (and its bits) does not change from device to device of one architecture."""
    tiles = layers * cdiv(N, config.block_n) * cdiv(K, config.block_k)
    wanted = max(1, min(cdiv(layer_configs.TARGET_PROGRAMS, tiles), cdiv(M, 8 * config.block_m)))
    rows = cdiv(cdiv(M, wanted), config.block_m) * config.block_m
    return cdiv(M, rows), rows


def launch_weight_grad(gz, x, out, splits: int, rows: int, config: layer_configs.LayerConfig, precision: str) -> None:
    """out [G, splits, N, K] = gz^T x by splits of the rows; gz [G, M, N] contiguous, M > 0."""
    G, M, N = gz.shape
    K = x.shape[-1]
    arguments = (_rows(gz), _matrices(x), out, M, N, K, rows, splits)
    with on_device(x):
        programs = G * splits * cdiv(N, config.block_n) * cdiv(K, config.block_k)
        _weight_grad(programs, arguments, _weight_grad_constants(x.dtype, precision, config))


# ---------------------------------------------------------------- the raw operations


def _layers(*tensors: torch.Tensor | None) -> int | None:
    """G, or None if no tensor has a batch of layers; the last argument is the bias."""
    *matrices, bias = tensors
    for t in matrices:
        if t is not None and t.dim() == 3:
            return t.shape[0]
    return bias.shape[0] if bias is not None and bias.dim() == 2 else None


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    params: list[torch.Tensor | None],
    constants: list[float],
    activation,
    precision: str = "ieee",
    keep: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = map(x weight^T + bias), z = x weight^T + bias; not differentiable by itself (`fused_inr.ops` differentiates).

    Args:
        x: [M, K] or [G, M, K], any strides; float32, bfloat16, float16 (float64 in the interpreter).
        weight: [B*N, K] or [G, B*N, K], of x's type; bias: [B*N], [G, B*N] or None.
        params: one tensor ([] or [N]) a parameter, or None for the number in `constants`.
        activation: has `branches` (B), `outputs` (C) and `triton_map(level, learnable)`.
        precision: of a float32 product: "ieee", "tf32", "tf32x3" or "bf16x3".
        keep: "preactivations" to return z, "derivatives" those of y with respect to z, "" nothing.
    Returns:
        y [.., M, C*N] in x's type; z [.., M, B*N] in float32 (float64 for float64), or the derivatives [.., M, C*B*N]
        in x's type (output c with respect to branch b from column (c*B + b)*N on), or empty ([0]).
    """
    B, C = activation.branches, activation.outputs
    G = _layers(x, weight, bias)
    lead = () if G is None else (G,)
    M, N = x.shape[-2], weight.shape[-2] // B
    acc = accumulator(x.dtype)
    y = x.new_empty((*lead, M, C * N))
    jets = keep == "derivatives"
    if jets:
        z = x.new_empty((*lead, M, C * B * N))
    else:
        z = x.new_empty((*lead, M, B * N) if keep else (0,), dtype=acc)
    param_args = param_arguments(params, constants, acc == torch.float64, x.device)
    function = activation.triton_jet() if jets else activation.triton_map(0, False)
    launch_forward(x, weight, bias, param_args, y, z if keep else None, function, B, C, precision, 2 if jets else 1)
    return y, z


def linear_act_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    params: list[torch.Tensor | None],
    constants: list[float],
    z: torch.Tensor | None,
    activation,
    precision: str = "ieee",
    needs: tuple[bool, bool, bool, bool] | list[bool] = (True, True, True, True),
    library_gx: bool = False,
    library_gw: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `linear_act` for the cotangent g of y: (gx, gw, gb, gp), empty ([0]) where `needs` says so.

    gx, gw, gb have the types of x, weight and bias, and their shapes (a tensor without G, shared by all layers, gets
    the sum over G); gp is [P, N] or [G, P, N] in float32 (float64 for float64): per feature, summed over rows. z: what
    the forward has kept (derivatives are told from pre-activations by their half type), or None: recomputed.
    library_gx, library_gw: PyTorch computes that product.
    """
    B, C, P = activation.branches, activation.outputs, len(params)
    need_x, need_w, need_b, need_p = needs
    need_b, need_p = need_b and bias is not None, need_p and P > 0
    G = _layers(g, x, weight, bias)
    layers = 1 if G is None else G
    M, N, K = x.shape[-2], weight.shape[-2] // B, x.shape[-1]
    acc = accumulator(x.dtype)
    nothing = x.new_empty(0)
    if not (need_x or need_w or need_b or need_p):
        return nothing, nothing, nothing, nothing
    if z is not None and (z.numel() == 0 and M * N or z.stride(-1) != 1):
        z = z.contiguous() if z.numel() else None

    rows = cdiv(M, layer_configs.pick(
        layer_configs.arch(x.device), "gz", layer_configs.kind(N, K) if z is None else layer_configs.MAP, x.dtype,
        precision, B, N, K
    ).block_m)  # fmt: skip
    gz = x.new_empty((layers, M, B * N)) if need_x or need_w else None
    gb_rows = x.new_empty((layers, rows, B * N), dtype=acc) if need_b else None
    gp_rows = x.new_empty((layers, rows, P * N), dtype=acc) if need_p else None
    launch_gz(
        g, x, weight, bias, param_arguments(params, constants, acc == torch.float64, x.device), z, gz, gb_rows, gp_rows,
        activation.triton_map(1, need_p), B, C, precision,
    )  # fmt: skip

    gx = gw = gb = gp = nothing
    if need_x:
        gx = _library_gx(gz, x, weight) if library_gx else _input_gradient(gz, x, weight, precision)
    if need_w:
        gw = _library_gw(gz, x, weight) if library_gw else weight_gradient(gz, x, weight, precision)
    if need_b:
        gb = torch.empty_like(bias, memory_format=torch.contiguous_format)
        if bias.dim() == 1:  # shared by all layers
            gb_rows = gb_rows.view(1, layers * rows, B * N)
        launch_sum(gb_rows, gb.view(gb_rows.shape[0], B * N))
    if need_p:
        gp = x.new_empty((layers, P, N) if G is not None else (P, N), dtype=acc)
        launch_sum(gp_rows, gp.view(layers, P * N))
    return gx, gw, gb, gp


def _library_gx(gz, x, weight) -> torch.Tensor:
    if x.dim() == 2 and len(gz) == 1:
        return torch.mm(gz[0], weight.view(weight.shape[-2:]))
    gx = torch.matmul(gz, weight)
    return gx.sum(0) if x.dim() == 2 else gx


def _library_gw(gz, x, weight) -> torch.Tensor:
    # half types: the sums of parts of a split product stay float32
    wide = {"out_dtype": torch.float32} if gz.dtype.itemsize == 2 else {}
    if len(gz) == 1:
        gw = torch.mm(gz[0].t(), x.view(x.shape[-2:]), **wide)
    else:
        gw = torch.bmm(gz.mT, x.expand(len(gz), *x.shape[-2:]), **wide)
        gw = gw.sum(0) if weight.dim() == 2 else gw
    return gw.to(weight.dtype).view(weight.shape)


def _input_gradient(gz, x, weight, precision: str) -> torch.Tensor:
    """gz weight, summed over the layers that share x: the forward kernel with the transposed weight and no map."""
    layers, M, _ = gz.shape
    K = x.shape[-1]
    shared = x.dim() == 2 and layers > 1
    full = x.new_empty((layers, M, K), dtype=accumulator(x.dtype) if shared else x.dtype)
    launch_forward(gz, weight.mT, None, (Params((), ()), 0), full, None, identity, 1, 1, precision)
    if not shared:
        return full.view(x.shape)
    gx = x.new_empty(x.shape)
    launch_sum(full.view(1, layers, M * K), gx.view(1, M * K))
    return gx


def weight_gradient(gz, x, weight, precision: str) -> torch.Tensor:
    layers, M, N = gz.shape
    K = x.shape[-1]
    gw = weight.new_empty(weight.shape)
    if not gw.numel():
        return gw
    if not M:
        return gw.zero_()
    arch, kind = layer_configs.arch(x.device), layer_configs.kind(N, K)
    config = layer_configs.pick(arch, "weight_grad", kind, x.dtype, precision, 1, N, K)
    splits, rows = weight_grad_splits(M, N, K, config, layers)
    shared = weight.dim() == 2
    if splits * (layers if shared else 1) == 1:
        launch_weight_grad(gz, x, gw.view(layers, 1, N, K), splits, rows, config, precision)
        return gw
    partials = gz.new_empty((layers, splits, N * K), dtype=accumulator(x.dtype))
    launch_weight_grad(gz, x, partials, splits, rows, config, precision)
    launch_sum(partials.view(1, layers * splits, N * K) if shared else partials, gw.view(-1, N * K))
    return gw
