"""A whole network y = last(.. map(map(x W_0^T + b_0) W_1^T + b_1) ..) in one kernel, and its training pass.

| file | holds |
| --- | --- |
| `tiles.py` | layouts; pieces of kernels: maps, products, tiles in memory |
| `pack.py` | a network's tensors into the kernels' layout, sums back into gradients |
| `forward.py`, `train.py` | the kernels |
| here | whether a network is served, what a call of it needs, and the operations |

Launches of a call: pack, then the forward or the training pass, then (training) finish.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton

from .. import mlp_tune, tune
from ..launch import TYPES, accumulator, contiguous_rows, dot_precision, mode, on_device
from ..linear_act import launch_weight_grad, weight_grad_splits
from ..maps import INTERPRETED, identity
from ..sums import launch_sum
from . import pack
from .forward import JETS, NOTHING, PREACTIVATIONS, forward_kernel
from .pack import Network
from .tiles import Rows
from .train import BIAS_COLUMNS, one_pass_kernel, train_kernel

# ---------------------------------------------------------------- whether a network is served


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


# ---------------------------------------------------------------- what a call needs, but for tensors


@dataclass(frozen=True)
class Call:
    """Everything about a call that does not change from one to the next: the key of its plan."""

    shapes: tuple[tuple[int, int], ...]
    maps: tuple
    tensors: tuple[bool, ...]  # which parameters are tensors
    constants: tuple[float, ...]
    dtype: torch.dtype
    precision: str
    device: torch.device


@dataclass(frozen=True)
class Plan:
    """A call's sizes, its numbers, and the constants that its kernels share."""

    net: Network
    arch: str
    acc: torch.dtype
    numbers: tuple[float, ...]  # of the maps, in as few sets as there are different layers from the front
    sets: int
    table: bool  # parameters are in the packed table instead
    last_params: tuple[float, ...]
    constants: dict[str, object]

    def config(self, op: str, dtype: torch.dtype, precision: str) -> mlp_tune.Config:
        net = self.net
        config = mlp_tune.pick(self.arch, op, dtype, precision, net.branches, net.channels, net.width)
        if config is None:  # whoever asked `serves` is not here
            raise ValueError(f"no configuration for width {net.features} in {dtype} {precision} on {self.arch} ({op})")
        return config


@functools.lru_cache(maxsize=256)
def _plan(call: Call) -> Plan:
    arch, maps = tune.arch(call.device), call.maps
    net = _network(call.shapes, maps, arch)
    acc = accumulator(call.dtype)
    L, P = net.layers, net.n_params
    if any(call.tensors[L * P :]):
        raise ValueError(f"the parameters of the last activation, {maps[-1].name}, must be numbers in this kernel")
    values = [float(c) for c in call.constants[: L * P]]
    # a number argument of a kernel is float32
    table = P > 0 and (acc == torch.float64 or any(call.tensors[: L * P]))
    sets = [tuple(values[i * P : (i + 1) * P]) for i in range(L)] if P and not table else [()]
    while len(sets) > 1 and sets[-1] == sets[-2]:
        sets.pop()
    narrow_k = net.inputs <= tune.NARROW_K_LIMIT
    constants = {
        "MODE": mode(call.dtype, call.precision), "B": net.branches, "C": net.channels, "P": P, "SETS": len(sets),
        "TABLE": table, "N": net.features, "NARROW": narrow_k,
        "PRECISION": dot_precision(call.dtype, call.precision), "UPCAST": INTERPRETED, "ACC": TYPES[acc],
        "DTYPE": TYPES[call.dtype], "OUT_PAD": net.outputs_pad,
        "BLOCK_K": net.inputs if narrow_k else min(32, net.inputs_pad),
    }  # fmt: skip
    numbers = tuple(values) if table else tuple(v for s in sets for v in s)
    last_params = tuple(float(c) for c in call.constants[L * P :])
    return Plan(net, arch, acc, numbers, len(sets), table, last_params, constants)


def _of_config(plan: Plan, config: mlp_tune.Config) -> dict[str, object]:
    width = plan.net.width
    return {**plan.constants, "BLOCK_M": config.block_m, "BLOCK_T": width // config.tiles, **config.options()}


def _last_map(m, level: int):
    return identity if m.name == "identity" and level == 0 else m.triton_map(level, False)


def _call(x, weights, params, constants, maps, precision: str) -> Call:
    return Call(
        tuple(w.shape for w in weights), tuple(maps), tuple(p is not None for p in params), tuple(constants), x.dtype,
        precision, x.device,
    )  # fmt: skip


# ---------------------------------------------------------------- the packed network


@dataclass(frozen=True)
class _Packed:
    """The packed network (`tiles.network`), and what follows it in its buffer."""

    weights: torch.Tensor
    bias: torch.Tensor
    rest: torch.Tensor

    @staticmethod
    def split(buffer: torch.Tensor, plan: Plan, dtype: torch.dtype, back: bool) -> _Packed:
        weights, bias = pack.sizes(plan.net, back, plan.table)
        begin = -(-bias // 64) * 64
        end = begin + -(-weights * dtype.itemsize // (64 * buffer.dtype.itemsize)) * 64
        return _Packed(buffer[begin:end].view(dtype), buffer, buffer[end:])

    @staticmethod
    def elements(plan: Plan, dtype: torch.dtype, back: bool) -> int:
        """Of a buffer in the accumulators' type without a rest."""
        weights, bias = pack.sizes(plan.net, back, plan.table)
        return -(-bias // 64) * 64 + -(-weights * dtype.itemsize // (64 * plan.acc.itemsize)) * 64


def _has_back(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 4  # tf32 wants the summed index innermost


def _pack(plan: Plan, buffer, weights, biases, params, dtype: torch.dtype, precision: str, back: bool) -> _Packed:
    packed = _Packed.split(buffer, plan, dtype, back)
    count = plan.net.layers * plan.net.n_params
    params, numbers = list(params[:count]), plan.numbers
    if plan.table and plan.acc == torch.float64:
        params = [buffer.new_tensor(c) if p is None else p for p, c in zip(params, numbers, strict=True)]
    pack.launch_pack(
        plan.net, packed.weights, packed.bias, weights, biases, params, numbers, back, plan.table, dtype, precision
    )
    return packed


def _keeps(plan: Plan, dtype: torch.dtype, wants_parameters: bool) -> int:
    """What the backward is given of each layer: half types have no room for pre-activations, and 16 bits are enough for
    activations, which are rounded to them anyway, and for derivatives; gradients of parameters need pre-activations."""
    return JETS if dtype.itemsize == 2 and not wants_parameters else PREACTIVATIONS


def _kept_columns(plan: Plan, keeps: int) -> int:
    net = plan.net
    return {NOTHING: 0, PREACTIVATIONS: net.rows, JETS: net.columns * (1 + net.branches)}[keeps]


# ---------------------------------------------------------------- forward


def mlp(x, weights, biases, params, constants, maps, precision: str = "ieee", save: bool = False):
    """The network's output, and what its backward may take; not differentiable by itself.

    Args:
        x: [M, K] of any row stride; float32, bfloat16, float16 (float64 in the interpreter).
        weights, biases: [B_i*N_i, C_(i-1)*N_(i-1)], and [B_i*N_i] or None, of each layer; any strides.
        params, constants: of all layers, one after the other: a tensor ([] or [N]), or None for the number.
        maps: the `ActivationMap` of each layer; all but the last are one.
        save: whether to keep what the backward needs.
    Returns:
        y [M, N_last] in x's type; a flat tensor for `mlp_backward`, empty ([0]) without `save`: the packed network, and
        of each layer activations and derivatives (half types) or pre-activations.
    """
    plan = _plan(_call(x, weights, params, constants, maps, precision))
    net, M, dtype = plan.net, x.shape[0], x.dtype
    y = x.new_empty((M, net.outputs))
    back = save and _has_back(dtype)
    keeps = _keeps(plan, dtype, any(p is not None for p in params)) if save else NOTHING
    kept = net.layers * M * _kept_columns(plan, keeps) * (dtype.itemsize if keeps == JETS else plan.acc.itemsize)
    size = _Packed.elements(plan, dtype, back) + -(-kept // plan.acc.itemsize)
    buffer = x.new_empty(size, dtype=plan.acc)
    packed = _pack(plan, buffer, weights, biases, params, dtype, precision, back)
    if M:
        saved = None if keeps == NOTHING else packed.rest.view(dtype) if keeps == JETS else packed.rest
        config = plan.config("save" if save else "forward", dtype, precision)
        launch_forward(contiguous_rows(x), plan, packed, y, saved, maps, keeps, config, back)
    return y, buffer if save else buffer.new_empty(0)


def launch_forward(x, plan: Plan, packed: _Packed, y, saved, maps, keeps: int, config, back: bool) -> None:
    """y [M, OUT] and what `keeps` says; M > 0."""
    net, M = plan.net, x.shape[0]
    resident = net.layers - 1 if net.layers - 1 <= config.resident else 0
    function = maps[0].triton_jet() if keeps == JETS else maps[0].triton_map(0, False)
    with on_device(x):
        forward_kernel[(min(config.programs(x.device), triton.cdiv(M, config.block_m)),)](
            x, packed.weights, packed.bias, () if plan.table else plan.numbers, plan.last_params, y, saved, M,
            net.layers, net.inputs, net.inputs_pad, net.outputs, x.stride(0), y.stride(0), MAP=function,
            LAST=_last_map(maps[-1], 0), SAVE=keeps, RESIDENT=resident, K_MAJOR=back, STAGES=config.stages,
            T=config.tiles, **_of_config(plan, config),
        )  # fmt: skip


# ---------------------------------------------------------------- training pass


@dataclass(frozen=True)
class _Loss:
    target: torch.Tensor
    row_weights: torch.Tensor | None
    map: object
    constants: tuple[float, ...]
    scale: float
    #: a power of two, by which the kernel multiplies `scale` and the sums are divided: float16 holds gradients of order
    #: 1, and not those of a mean over many rows
    factor: float


def by_sums(net: Network, config: mlp_tune.Config, programs: int) -> mlp_tune.Config:
    """The configuration for this depth, with the way of the hidden weights' gradients settled: `sums`, unless those of
    so many layers would leave the cache; of factors that wait in `later` tiles where the entry says so."""
    if programs * (net.layers - 1) * net.square * 4 > mlp_tune.SUMS_BYTES:
        return replace(config, sums=False)
    later = 0 if config.sums else max(1, mlp_tune.LATER_ROWS // config.block_m)
    return replace(config, sums=True, later=later)


def _one_pass(plan: Plan, dtype: torch.dtype, precision: str) -> mlp_tune.Config | None:
    """The configuration with everything in registers, for a network that it serves."""
    net = plan.net
    found = mlp_tune.pick(plan.arch, "one_pass", dtype, precision, net.branches, net.channels, net.width)
    fits = found is not None and net.layers - 1 <= found.resident and net.inputs_pad <= 32
    return found if fits else None


def _train(g, x, weights, biases, params, constants, maps, saved, precision: str, needs, loss: _Loss | None):
    """Loss (or None) and gradients, for g or for the loss."""
    plan = _plan(_call(x, weights, params, constants, maps, precision))
    net, M, dtype, acc = plan.net, x.shape[0], x.dtype, plan.acc
    L = net.layers
    need_x, need_w, need_b, need_p = needs
    need_b = need_b and any(b is not None for b in biases)
    need_p = need_p and net.n_params > 0
    if needs[3] and maps[-1].n_params:
        raise ValueError(f"gradients of the parameters of the last activation, {maps[-1].name}, are not computed here")
    back = _has_back(dtype)
    elements = _Packed.elements(plan, dtype, back)
    if saved is None:
        packed = _pack(plan, x.new_empty(elements, dtype=acc), weights, biases, params, dtype, precision, back)
    else:
        packed = _Packed.split(saved, plan, dtype, back)
    keeps = _keeps(plan, dtype, need_p if saved is None else any(p is not None for p in params))
    config = _one_pass(plan, dtype, precision) if saved is None and not need_p else None
    one_pass = config is not None
    if config is None:
        config = plan.config("train" if saved is None else "backward", dtype, precision)
        config = by_sums(net, config, config.programs(x.device))
    x = contiguous_rows(x)
    # float16 gradients of a loss leave in float32: they are multiplied by the factor of a loss scaler later
    out_type = torch.float32 if loss is not None and dtype == torch.float16 else None
    gx = x.new_empty((M, net.inputs) if need_x else (0,), dtype=out_type)
    nothing = gx.new_empty(0)
    gw = [torch.empty(w.shape, dtype=out_type or w.dtype, device=x.device) if need_w else nothing for w in weights]
    gb = [torch.empty(b.shape, dtype=out_type or b.dtype, device=x.device) if need_b and b is not None
          else b if b is None else nothing for b in biases]  # fmt: skip
    gp = [x.new_empty((net.n_params, net.features), dtype=acc) if need_p else None for _ in range(L)]
    value = None if loss is None else x.new_empty((), dtype=acc)
    side = net.width // config.tiles if config.sums and not config.later and config.tiles > 1 else 0
    where = pack.segments(net, need_w, need_b, need_p, loss is not None, config.sums, side)
    chunk, hidden = M, None
    if not config.sums and need_w:
        row_bytes = max(1, L - 1) * (net.rows + net.columns) * dtype.itemsize
        chunk = max(1, mlp_tune.CHUNK_BYTES // row_bytes // config.block_m) * config.block_m
        hidden = x.new_zeros((L - 1, net.rows, net.columns), dtype=acc)
    chunk = min(chunk, M)
    programs = min(config.programs(x.device), triton.cdiv(chunk, config.block_m))
    if M and (where.total or need_x):
        sums = x.new_empty((programs, where.total), dtype=acc)
        if one_pass:
            _launch_one_pass(plan, packed, config, maps, x, g, loss, sums, where, gx, programs, needs, back)
        else:
            _passes(
                plan, packed, config, maps, x, g, loss, sums, where, gx, hidden, chunk, programs,
                (need_x, need_w, need_b, need_p), precision, keeps, saved is not None, back,
            )  # fmt: skip
    else:
        sums = x.new_zeros((1, where.total), dtype=acc)
    if where.total:
        unscale = 1.0 if loss is None else 1.0 / loss.factor
        pack.launch_finish(
            net, where, sums, gw if need_w else (), [b if b is not None and b.numel() else None for b in gb],
            gp if need_p else (), value, unscale,
        )  # fmt: skip
    if hidden is not None:
        unscale = 1.0 if loss is None else 1.0 / loss.factor
        B, C, N, W = net.branches, net.channels, net.features, net.width
        for i in range(L - 1):
            own = hidden[i].view(B, W, C, W)[:, :N, :, :N]
            gw[1 + i].view(own.shape).copy_(own * unscale)
    gb = [nothing.new_empty(0, dtype=acc) if b is None else b for b in gb]
    gp = [nothing.new_empty(0, dtype=acc) if p is None else p for p in gp] + [nothing.new_empty(0, dtype=acc)]
    return [*(() if value is None else (value,)), gx, *gw, *gb, *gp]


def _rows_and_functions(loss: _Loss | None, x, g, rows: slice):
    """The rows of a launch, and what it needs of the loss."""
    if loss is None:
        g = contiguous_rows(g[rows])
        return Rows(x[rows], g, None, None), (g.stride(0), 0), 1.0, 1.0, (), (identity, identity)
    target = contiguous_rows(loss.target)[rows]
    row_weights = None if loss.row_weights is None else loss.row_weights[rows]
    functions = (loss.map.triton_map(0, False), loss.map.triton_map(1, False))
    data = Rows(x[rows], None, target, row_weights)
    return data, (0, target.stride(0)), loss.scale * loss.factor, 1.0 / loss.factor, loss.constants, functions


def _flags(maps, functions, loss: _Loss | None, data: Rows, needs, back: bool, layers: int) -> dict[str, object]:
    return {
        "LAST": _last_map(maps[-1], 0), "LAST_GRAD": maps[-1].triton_map(1, False), "LOSS": functions[0],
        "LOSS_GRAD": functions[1], "HAS_LOSS": loss is not None, "HAS_WEIGHTS": data.weights is not None,
        "NEED_X": needs[0], "NEED_W": needs[1], "NEED_B": needs[2], "K_MAJOR": back,
        "GROUPS": -(-layers // BIAS_COLUMNS),
    }  # fmt: skip


def _launch_one_pass(plan, packed, config, maps, x, g, loss, sums, where, gx, programs, needs, back) -> None:
    net, M = plan.net, x.shape[0]
    data, strides, scale, unscale, loss_params, functions = _rows_and_functions(loss, x, g, slice(0, M))
    starts = [max(0, at) for at in (where.first, where.hidden, where.last, where.bias, where.loss)]
    needs = (needs[0], where.first >= 0, where.bias >= 0)
    with on_device(x):
        one_pass_kernel[(programs,)](
            data, packed.weights, packed.bias, sums, () if plan.table else plan.numbers, plan.last_params, loss_params,
            scale, unscale, gx, M, net.inputs, net.outputs, x.stride(0), *strides, where.total, *starts,
            MAP=maps[0].triton_jet(), HIDDEN=net.layers - 1, K_PAD=net.inputs_pad, RESIDENT=config.reload and not back,
            **_flags(maps, functions, loss, data, needs, back, net.layers), **_of_config(plan, config),
        )  # fmt: skip


def _passes(
    plan, packed, config, maps, x, g, loss, sums, where, gx, hidden, chunk, programs, needs, precision, keeps, saved,
    back,
) -> None:  # fmt: skip
    """The training pass, in one launch or, where hidden gradients are products of all rows' factors, by chunks of
    rows."""
    net, M, L = plan.net, x.shape[0], plan.net.layers
    need_x, need_w, need_b, need_p = needs
    jets = keeps == JETS
    gz = h = None
    if need_w and (config.later or hidden is not None):
        waiting = programs * config.later * config.block_m if config.later else chunk
        gz = x.new_empty(max(1, (L - 1) * waiting * net.rows))
        if not jets or (saved if config.later else not saved):
            h = x.new_empty(max(1, (L - 1) * waiting * net.columns))
    rows_s = M if saved else programs * config.block_m * (config.later if jets and config.later else 1)
    kept_type = x.dtype if jets else plan.acc
    if saved:
        kept = packed.rest.view(kept_type)
    else:
        kept = x.new_empty(L * rows_s * _kept_columns(plan, keeps), dtype=kept_type)
    starts = [max(0, at) for at in (where.first, where.hidden, where.last, where.bias, where.map_params, where.loss)]
    for start in range(0, M, chunk):
        rows = slice(start, min(start + chunk, M))
        count = rows.stop - rows.start
        data, strides, scale, unscale, loss_params, functions = _rows_and_functions(loss, x, g, rows)
        with on_device(x):
            train_kernel[(min(programs, triton.cdiv(count, config.block_m)),)](
                data, packed.weights, packed.bias, sums, () if plan.table else plan.numbers, plan.last_params,
                loss_params, scale, unscale, kept, gx[rows] if need_x else gx, gz, h, count, L, net.inputs,
                net.inputs_pad, net.outputs, start, rows_s, count, int(start > 0), x.stride(0), *strides, where.total,
                *starts,
                MAP=maps[0].triton_jet() if jets else maps[0].triton_map(0, False),
                MAP_GRAD=maps[0].triton_map(1, need_p), GP=net.n_params if need_p else 0, JETS=jets,
                RECOMPUTE=not saved, SUMS=config.sums, LATER=config.later, RELOAD=config.reload, STAGES=config.stages,
                T=config.tiles, BLOCK_X=min(32, net.inputs_pad),
                **_flags(maps, functions, loss, data, needs, back, L), **_of_config(plan, config),
            )  # fmt: skip
        if hidden is not None and L > 1:
            if h is not None:
                factors = h[: (L - 1) * count * net.columns].view(L - 1, count, net.columns)
            else:  # the forward's activations
                factors = kept[: L * M * net.columns].view(L, M, net.columns)[: L - 1, rows]
            hidden += _hidden_gradient(net, gz[: (L - 1) * count * net.rows].view(L - 1, count, -1), factors, precision)


def _hidden_gradient(net: Network, gz, h, precision: str) -> torch.Tensor:
    """gz^T h of a chunk for all hidden products at once, [L-1, B*WIDTH, C*WIDTH] in float32."""
    layers, rows, N = gz.shape
    K = h.shape[-1]
    config = tune.pick(tune.arch(gz.device), "weight_grad", tune.kind(N, K), gz.dtype, precision, 1, N, K)
    splits, per_split = weight_grad_splits(rows, N, K, config, layers)
    partials = gz.new_empty((layers, splits, N * K), dtype=accumulator(gz.dtype))
    launch_weight_grad(gz, h, partials, splits, per_split, config, precision)
    if splits == 1:
        return partials.view(layers, N, K)
    out = partials.new_empty((layers, N, K))
    launch_sum(partials, out.view(layers, N * K))
    return out


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
    if needs[3] and saved is not None and x.dtype.itemsize == 2 and not any(p is not None for p in params):
        saved = None  # gradients of numbers, for which nothing has been kept
    return _train(g, x, weights, biases, params, constants, maps, saved, precision, needs, None)


def mlp_loss(
    x, target, row_weights, weights, biases, params, constants, maps, loss_map, loss_constants, scale: float = 1.0,
    precision: str = "ieee", needs=(True, True, True, False),
) -> list[torch.Tensor]:  # fmt: skip
    """[loss, gx, gw_0 .., gb_0 .., gp_0 ..] of loss = scale sum_m row_weights[m] sum_n loss_map(y[m, n], target[m, n]).

    target: [M, N_last]; row_weights: [M], or None for 1; loss_map: an `ActivationMap` of (prediction, target); the loss
    is 0-D in float32, y is not rounded to x's type on the way. Gradients are in the types of what they belong to, but
    in float32 for float16: a loss scaler's factor comes later.
    """
    if row_weights is not None:
        row_weights = row_weights.contiguous()
    if accumulator(x.dtype) == torch.float64:  # a number argument of a kernel is float32
        row_weights = x.new_full((x.shape[0],), scale) if row_weights is None else row_weights.double() * scale
        scale = 1.0
    factor = 2.0 ** -round(math.log2(scale)) if x.dtype == torch.float16 and 0 < scale < 1 else 1.0
    loss = _Loss(target, row_weights, loss_map, tuple(float(c) for c in loss_constants), float(scale), factor)
    return _train(None, x, weights, biases, params, constants, maps, None, precision, needs, loss)
