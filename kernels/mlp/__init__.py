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
from typing import NamedTuple

import torch

from fused_inr.network import Criterion, Spec

from ..configurations import linear_act as layer_configs
from ..configurations import mlp as network_configs
from ..launch import Arithmetic, Launcher, accumulator, arithmetic, cdiv, constants_of, contiguous_rows, on_device
from ..linear_act import launch_weight_grad, weight_grad_splits
from ..maps import INTERPRETED, identity
from ..sums import launch_sum
from . import pack
from .forward import JETS, NOTHING, PREACTIVATIONS, forward_kernel
from .pack import NetworkSizes
from .tiles import Maps, Matrix, Net, Numbers, Packed, Rows, Sizes
from .train import BIAS_COLUMNS, LossNumbers, OnePass, Scratch, TrainPass, one_pass_kernel, train_kernel

# ---------------------------------------------------------------- whether a network is served


def _network(shapes: Sequence[tuple[int, int]], maps: Sequence, arch: str) -> NetworkSizes:
    hidden = maps[0]
    B, C = hidden.branches, hidden.outputs
    N = shapes[0][0] // B
    width = network_configs.width(N, arch)
    return NetworkSizes(shapes[0][1], shapes[-1][0], len(shapes) - 1, N, B, C, hidden.n_params, width)


def _arch(capability: int | None) -> str:
    return "interpreter" if capability is None else layer_configs.arch_of_capability(capability // 10, capability % 10)


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
    if K > network_configs.MAX_INPUTS:
        return f"{K} inputs; the kernels take {network_configs.MAX_INPUTS}"
    if out > network_configs.MAX_OUTPUTS:
        return f"{out} outputs; the kernels take {network_configs.MAX_OUTPUTS}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) and not (dtype == torch.float64 and INTERPRETED):
        return f"{dtype} is not served"
    name = _arch(arch)
    if name == "interpreter":
        return "" if INTERPRETED else "no CUDA device"
    if dtype == torch.float32 and precision == "ieee":
        return "float32 products in precision 'ieee' take the layers one by one; tf32, bf16x3 and tf32x3 are served"
    op = "forward" if direction == "forward" else "train"
    WIDTH = network_configs.width(N, name)
    if network_configs.pick(name, op, dtype, precision, B, C, WIDTH) is None:
        kind = f"{B} branches and {C} outputs" if (B, C) != (1, 1) else "one branch"
        products = f"float32 in {precision}" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        return f"no configuration for width {N}, {kind}, {products} on {name} ({direction})"
    return ""


# ---------------------------------------------------------------- what a call needs, but for tensors


@dataclass(frozen=True)
class Call:
    """Everything about a call that does not change from one to the next: the key of its plan."""

    shapes: tuple[tuple[int, int], ...]
    spec: Spec
    tensors: tuple[bool, ...]  # which parameters are tensors
    dtype: torch.dtype
    precision: str
    arch: str


@dataclass(frozen=True, eq=False)
class Plan:
    """A call's sizes and its numbers, and how its kernels compute."""

    call: Call
    net: NetworkSizes
    acc: torch.dtype
    numbers: tuple[float, ...]  # of the maps, in as few sets as there are different layers from the front
    sets: int
    table: bool  # parameters are in the packed table instead
    last_params: tuple[float, ...]
    arithmetic: Arithmetic
    #: elements of biases and table, and of the packed weights without and with a transposed copy, in the accumulators'
    #: type, each a multiple of 64
    bias_size: int
    weight_sizes: tuple[int, int]

    def pick(self, op: str) -> network_configs.NetworkConfig | None:
        call, net = self.call, self.net
        return network_configs.pick(call.arch, op, call.dtype, call.precision, net.branches, net.channels, net.width)

    def config(self, op: str) -> network_configs.NetworkConfig:
        config = self.pick(op)
        if config is None:  # whoever asked `serves` is not here
            call = self.call
            products = f"{call.dtype} {call.precision}"
            raise ValueError(f"no configuration for width {self.net.features} in {products} on {call.arch} ({op})")
        return config


@functools.lru_cache(maxsize=256)
def _plan(call: Call) -> Plan:
    maps = call.spec.maps
    net = _network(call.shapes, maps, call.arch)
    acc = accumulator(call.dtype)
    L, P = net.layers, net.n_params
    if any(call.tensors[L * P :]):
        raise ValueError(f"the parameters of the last activation, {maps[-1].name}, must be numbers in this kernel")
    values = [float(c) for c in call.spec.numbers[: L * P]]
    # a number argument of a kernel is float32
    table = P > 0 and (acc == torch.float64 or any(call.tensors[: L * P]))
    sets = [tuple(values[i * P : (i + 1) * P]) for i in range(L)] if P and not table else [()]
    while len(sets) > 1 and sets[-1] == sets[-2]:
        sets.pop()
    numbers = tuple(values) if table else tuple(v for s in sets for v in s)
    last_params = tuple(float(c) for c in call.spec.numbers[L * P :])
    sizes = [pack.sizes(net, back, table) for back in (False, True)]
    words = [-(-weights * call.dtype.itemsize // (64 * acc.itemsize)) * 64 for weights, _ in sizes]
    bias = -(-sizes[0][1] // 64) * 64
    computes = arithmetic(call.dtype, call.precision)
    return Plan(call, net, acc, numbers, len(sets), table, last_params, computes, bias, tuple(words))


def compiled_for(
    net: NetworkSizes, config: network_configs.NetworkConfig, back: bool, sets: int, table: bool
) -> Net:  # fmt: skip
    """A network as its kernels are compiled for it."""
    narrow = net.inputs <= layer_configs.NARROW_K_LIMIT
    return Net(
        B=net.branches, C=net.channels, P=net.n_params, SETS=sets, TABLE=table, N=net.features, K_MAJOR=back,
        NARROW=narrow, T=config.tiles, OUT_PAD=net.outputs_pad, BLOCK_M=config.block_m,
        BLOCK_T=net.width // config.tiles, BLOCK_K=net.inputs if narrow else min(32, net.inputs_pad),
        BLOCK_X=min(32, net.inputs_pad),
    )  # fmt: skip


def _of_plan(plan: Plan, config: network_configs.NetworkConfig, back: bool, maps: Maps) -> dict[str, object]:
    """What does not change from call to call: constants, and arguments that are the plan's."""
    net = plan.net
    return {
        "numbers": Numbers(() if plan.table else plan.numbers, plan.last_params),
        "sizes": Sizes(net.inputs, net.inputs_pad, net.outputs), "maps": maps,
        "NET": constants_of(compiled_for(net, config, back, plan.sets, plan.table)), "NUM": plan.arithmetic,
        **config.options(),
    }  # fmt: skip


def _last_map(m, level: int):
    return identity if m.name == "identity" and level == 0 else m.triton_map(level, False)


class Tensors(NamedTuple):
    """A network's tensors by what they are: weights and biases of each layer, parameters of all layers."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    params: list[torch.Tensor | None]

    @staticmethod
    def of(spec: Spec, tensors: Sequence[torch.Tensor | None]) -> Tensors:
        """From the order of a spec."""
        found = Tensors([], [], [])
        groups = (found.weights, found.biases, found.params)
        for group, tensor in zip(spec.groups, tensors, strict=True):
            groups[group - Spec.WEIGHT].append(tensor)
        return found


def _call(x, tensors: Tensors, spec: Spec, precision: str) -> Call:
    return Call(
        tuple([w.shape for w in tensors.weights]), spec, tuple([p is not None for p in tensors.params]), x.dtype,
        precision, layer_configs.arch(x.device),
    )  # fmt: skip


# ---------------------------------------------------------------- the packed network


def _split(buffer: torch.Tensor, plan: Plan, back: bool) -> tuple[Packed, torch.Tensor]:
    """The packed network, and what follows it in its buffer."""
    end = plan.bias_size + plan.weight_sizes[back]
    return Packed(buffer[plan.bias_size : end].view(plan.call.dtype), buffer), buffer[end:]


def _has_back(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 4  # tf32 wants the summed index innermost


def _pack(plan: Plan, buffer, tensors: Tensors, back: bool) -> tuple[Packed, torch.Tensor]:
    packed, rest = _split(buffer, plan, back)
    params, numbers = tensors.params[: plan.net.layers * plan.net.n_params], plan.numbers
    if plan.table and plan.acc == torch.float64:
        params = [buffer.new_tensor(c) if p is None else p for p, c in zip(params, numbers, strict=True)]
    pack.launch_pack(
        plan.net, packed, tensors.weights, tensors.biases, params, numbers, back, plan.table, plan.call.dtype,
        plan.call.precision,
    )  # fmt: skip
    return packed, rest


def _keeps(plan: Plan, dtype: torch.dtype, wants_parameters: bool) -> int:
    """What the backward is given of each layer: half types have no room for pre-activations, and 16 bits are enough for
    activations, which are rounded to them anyway, and for derivatives; gradients of parameters need pre-activations."""
    return JETS if dtype.itemsize == 2 and not wants_parameters else PREACTIVATIONS


def _kept_columns(plan: Plan, keeps: int) -> int:
    net = plan.net
    return {NOTHING: 0, PREACTIVATIONS: net.rows, JETS: net.columns * (1 + net.branches)}[keeps]


# ---------------------------------------------------------------- forward


def mlp(x, tensors, spec: Spec, precision: str = "ieee", save: bool = False):
    """The network's output, and what its backward may take; not differentiable by itself.

    Args:
        x: [M, K] of any row stride; float32, bfloat16, float16 (float64 in the interpreter).
        tensors: in the order of the spec: of each layer weight [B_i*N_i, C_(i-1)*N_(i-1)], bias [B_i*N_i] or None, and
            parameters, [] or [N], or None for the spec's number; any strides.
        spec: of the network; the maps of all layers but the last are one, no layer has a skip connection or a norm.
        save: whether to keep what the backward needs.
    Returns:
        y [M, N_last] in x's type; a flat tensor for `mlp_backward`, empty ([0]) without `save`: the packed network, and
        of each layer activations and derivatives (half types) or pre-activations.
    """
    parts = Tensors.of(spec, tensors)
    plan = _plan(_call(x, parts, spec, precision))
    net, M, dtype = plan.net, x.shape[0], x.dtype
    y = x.new_empty((M, net.outputs))
    back = save and _has_back(dtype)
    keeps = _keeps(plan, dtype, any(plan.call.tensors)) if save else NOTHING
    kept = net.layers * M * _kept_columns(plan, keeps) * (dtype.itemsize if keeps == JETS else plan.acc.itemsize)
    size = plan.bias_size + plan.weight_sizes[back] + -(-kept // plan.acc.itemsize)
    buffer = x.new_empty(size, dtype=plan.acc)
    packed, rest = _pack(plan, buffer, parts, back)
    if M:
        saved = None if keeps == NOTHING else rest.view(dtype) if keeps == JETS else rest
        config = plan.config("save" if save else "forward")
        launch_forward(contiguous_rows(x), plan, packed, y, saved, keeps, config, back)
    return y, buffer if save else buffer.new_empty(0)


_forward = Launcher(forward_kernel)


@functools.lru_cache(maxsize=256)
def _forward_constants(plan: Plan, config: network_configs.NetworkConfig, keeps: int, back: bool) -> dict[str, object]:
    maps, hidden = plan.call.spec.maps, plan.net.layers - 1
    functions = Maps(
        maps[0].triton_jet() if keeps == JETS else maps[0].triton_map(0, False), _last_map(maps[-1], 0)
    )  # fmt: skip
    return {
        "SAVE": keeps, "RESIDENT": hidden if hidden <= config.resident else 0, "STAGES": config.stages,
        **_of_plan(plan, config, back, functions),
    }  # fmt: skip


def launch_forward(
    x, plan: Plan, packed: Packed, y, saved, keeps: int, config: network_configs.NetworkConfig, back: bool
) -> None:
    """y [M, OUT] and what `keeps` says; M > 0."""
    M = x.shape[0]
    arguments = Matrix(x, x.stride(0)), packed, Matrix(y, y.stride(0)), saved, M, plan.net.layers
    with on_device(x):
        programs = min(config.programs(x.device), cdiv(M, config.block_m))
        _forward(programs, arguments, _forward_constants(plan, config, keeps, back))


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


def by_sums(net: NetworkSizes, config: network_configs.NetworkConfig, programs: int) -> network_configs.NetworkConfig:
    """The configuration for this depth, with the way of the hidden weights' gradients settled: `sums`, unless those of
    so many layers would leave the cache; of the factors of `later` tiles where the entry says so."""
    if programs * (net.layers - 1) * net.square * 4 > network_configs.SUMS_BYTES:
        return replace(config, sums=False)
    later = 0 if config.sums else max(1, network_configs.LATER_ROWS // config.block_m)
    return replace(config, sums=True, later=later)


@dataclass(frozen=True)
class Pass:
    """What a training pass is, but for its plan: which gradients, of which loss (None: for a cotangent), from what."""

    needs: tuple[bool, bool, bool, bool]
    loss_map: object
    weighted: bool
    saved: bool
    keeps: int


@dataclass(frozen=True, eq=False)
class _Training:
    """A pass settled: its configuration, where its sums lie, the constants of its kernel."""

    config: network_configs.NetworkConfig
    one_pass: bool
    programs: int
    where: pack.Segments
    constants: dict[str, object]


@functools.lru_cache(maxsize=256)
def _training(
    plan: Plan,
    which: Pass,
    narrow: network_configs.NetworkConfig | None,
    config: network_configs.NetworkConfig,
    multiprocessors: int,
) -> _Training:
    """`narrow`: the configuration with everything in registers, where there is one."""
    net, call, maps = plan.net, plan.call, plan.call.spec.maps
    need_x, need_w, need_b, need_p = which.needs
    one_pass = narrow is not None and not which.saved and not need_p
    if one_pass and net.layers - 1 <= narrow.resident and net.inputs_pad <= 32:
        config = narrow
    else:
        one_pass = False
        config = by_sums(net, config, multiprocessors * config.resident_programs)
    blocks = config.sums and not config.later and config.tiles * net.channels > 1  # of more columns than one
    side = net.width // config.tiles if blocks else 0
    loss = which.loss_map is not None
    where = pack.segments(net, need_w, need_b, need_p, loss, config.sums, side)
    back, jets = _has_back(call.dtype), which.keeps == JETS
    functions = Maps(
        maps[0].triton_jet() if one_pass or jets else maps[0].triton_map(0, False), _last_map(maps[-1], 0),
        None if one_pass else maps[0].triton_map(1, need_p), maps[-1].triton_map(1, False),
        which.loss_map.triton_map(0, False) if loss else None, which.loss_map.triton_map(1, False) if loss else None,
    )  # fmt: skip
    groups = -(-net.layers // BIAS_COLUMNS)
    duties: OnePass | TrainPass
    if one_pass:
        duties = OnePass(
            need_x, need_w, need_b, net.layers - 1, net.inputs_pad, config.reload and not back, groups
        )  # fmt: skip
    else:
        duties = TrainPass(
            need_x, need_w, need_b, GP=net.n_params if need_p else 0, JETS=jets, RECOMPUTE=not which.saved,
            SUMS=config.sums, LATER=config.later, RELOAD=config.reload, GROUPS=groups, STAGES=config.stages,
        )  # fmt: skip
    constants = {"at": where, "PASS": constants_of(duties), **_of_plan(plan, config, back, functions)}
    programs = multiprocessors * config.resident_programs
    return _Training(config, one_pass, programs, where, constants)


def _train(g, x, tensors, spec: Spec, saved, precision: str, needs, loss: _Loss | None):
    """Loss (or None) and gradients, for g or for the loss."""
    parts = Tensors.of(spec, tensors)
    weights, biases, _ = parts
    plan, maps = _plan(_call(x, parts, spec, precision)), spec.maps
    net, M, dtype, acc = plan.net, x.shape[0], x.dtype, plan.acc
    L = net.layers
    need_x, need_w, need_b, need_p = needs[:4]
    if need_p and maps[-1].n_params:
        raise ValueError(f"gradients of the parameters of the last activation, {maps[-1].name}, are not computed here")
    need_b, need_p = need_b and any(b is not None for b in biases), need_p and net.n_params > 0
    back = _has_back(dtype)
    if saved is None:
        buffer = x.new_empty(plan.bias_size + plan.weight_sizes[back], dtype=acc)
        packed, rest = _pack(plan, buffer, parts, back)
    else:
        packed, rest = _split(saved, plan, back)
    keeps = _keeps(plan, dtype, need_p if saved is None else any(plan.call.tensors))
    which = Pass(
        (need_x, need_w, need_b, need_p), None if loss is None else loss.map,
        loss is not None and loss.row_weights is not None, saved is not None, keeps,
    )  # fmt: skip
    op = "train" if saved is None else "backward"
    training = _training(plan, which, plan.pick("one_pass"), plan.config(op), layer_configs.multiprocessors(x.device))
    # float16 gradients of a loss leave in float32: they are multiplied by the factor of a loss scaler later
    out_type = torch.float32 if loss is not None and dtype == torch.float16 else None
    gx = x.new_empty((M, net.inputs) if need_x else (0,), dtype=out_type)
    nothing = gx.new_empty(0)

    def gradient(t, needed):
        return torch.empty_like(t, dtype=out_type, memory_format=torch.contiguous_format) if needed else nothing

    gw = [gradient(w, need_w) for w in weights]
    gb = [None if b is None else gradient(b, need_b) for b in biases]
    gp = [x.new_empty((net.n_params, net.features), dtype=acc) for _ in range(L)] if need_p else []
    value = None if loss is None else x.new_empty((), dtype=acc)
    unscale = 1.0 if loss is None else 1.0 / loss.factor
    total, hidden = training.where.total, None
    if M and (total or need_x):
        sums, hidden = _passes(plan, packed, rest, training, which, contiguous_rows(x), g, loss, gx)
    else:
        sums = x.new_zeros((1, total), dtype=acc)
    if total:
        pack.launch_finish(
            net, training.where, sums, gw if need_w else (), gb if need_b else (), gp, value, unscale
        )  # fmt: skip
    if need_w and not training.config.sums:
        B, C, N, W = net.branches, net.channels, net.features, net.width
        for i in range(L - 1):
            own = 0.0 if hidden is None else hidden[i].view(B, W, C, W)[:, :N, :, :N] * unscale
            gw[1 + i].view(B, N, C, N).copy_(own) if hidden is not None else gw[1 + i].zero_()
    empty = nothing.new_empty(0, dtype=acc)
    results = [gx] if value is None else [value, gx]
    for i, map in enumerate(maps):
        results += [gw[i], empty if gb[i] is None else gb[i]]
        if map.n_params:
            results.append(gp[i] if i < len(gp) else empty)
    return results


def _rows(loss: _Loss | None, x, g, start: int, stop: int) -> Rows:
    """The rows of a launch."""
    other = contiguous_rows(g if loss is None else loss.target)
    weights = None if loss is None else loss.row_weights
    if stop - start < len(x):
        x, other = x[start:stop], other[start:stop]
        weights = None if weights is None else weights[start:stop]
    inputs, others = Matrix(x, x.stride(0)), Matrix(other, other.stride(0))
    return Rows(inputs, others, None, None) if loss is None else Rows(inputs, None, others, weights)


_train_pass, _one_pass = Launcher(train_kernel), Launcher(one_pass_kernel)


def _passes(plan: Plan, packed: Packed, rest, training: _Training, which: Pass, x, g, loss: _Loss | None, gx):
    """The training pass, in one launch or, where gradients of hidden weights are products of all rows' factors, by
    chunks of rows: the programs' sums, and in the second case gradients of the hidden weights [L-1, B*WIDTH, C*WIDTH].
    """
    net, M, L, config = plan.net, x.shape[0], plan.net.layers, training.config
    numbers = LossNumbers((), 1.0, 1.0)
    if loss is not None:
        numbers = LossNumbers(loss.constants, loss.scale * loss.factor, 1.0 / loss.factor)
    if training.one_pass:
        programs = min(training.programs, cdiv(M, config.block_m))
        sums = x.new_empty((programs, training.where.total), dtype=plan.acc)
        with on_device(x):
            _one_pass(programs, (_rows(loss, x, g, 0, M), packed, sums, numbers, gx, M), training.constants)
        return sums, None
    jets, need_w = which.keeps == JETS, which.needs[1]
    chunk, hidden = M, None
    if not config.sums and need_w:
        row_bytes = max(1, L - 1) * (net.rows + net.columns) * x.dtype.itemsize
        chunk = min(M, max(1, network_configs.CHUNK_BYTES // row_bytes // config.block_m) * config.block_m)
        hidden = x.new_zeros((L - 1, net.rows, net.columns), dtype=plan.acc)
    programs = min(training.programs, cdiv(chunk, config.block_m))
    sums = x.new_empty((programs, training.where.total), dtype=plan.acc)
    gz = h = None
    if need_w and (config.later or hidden is not None):
        waiting = programs * config.later * config.block_m if config.later else chunk
        gz = x.new_empty(max(1, (L - 1) * waiting * net.rows))
        if not jets or which.saved == bool(config.later):
            h = x.new_empty(max(1, (L - 1) * waiting * net.columns))
    rows_s = M if which.saved else programs * config.block_m * (config.later if jets and config.later else 1)
    kept_type = x.dtype if jets else plan.acc
    if which.saved:
        kept = rest.view(kept_type)
    else:
        kept = x.new_empty(L * rows_s * _kept_columns(plan, which.keeps), dtype=kept_type)
    for start in range(0, M, chunk):
        count = min(chunk, M - start)
        arguments = (
            _rows(loss, x, g, start, start + count), packed, sums, numbers, Scratch(kept, gz, h),
            gx[start : start + count] if which.needs[0] and chunk < M else gx, count, L, start, rows_s, count,
            int(start > 0),
        )  # fmt: skip
        with on_device(x):
            _train_pass(min(programs, cdiv(count, config.block_m)), arguments, training.constants)
        if hidden is not None and L > 1:
            if h is not None:
                factors = h[: (L - 1) * count * net.columns].view(L - 1, count, net.columns)
            else:  # the forward's activations
                factors = kept[: L * M * net.columns].view(L, M, net.columns)[: L - 1, start : start + count]
            gradients = gz[: (L - 1) * count * net.rows].view(L - 1, count, net.rows)
            hidden += _hidden_gradient(gradients, factors, plan.call.precision)
    return sums, hidden


def _hidden_gradient(gz, h, precision: str) -> torch.Tensor:
    """gz^T h of a chunk for all hidden products at once, [L-1, B*WIDTH, C*WIDTH] in float32."""
    layers, rows, N = gz.shape
    K = h.shape[-1]
    arch, kind = layer_configs.arch(gz.device), layer_configs.kind(N, K)
    config = layer_configs.pick(arch, "weight_grad", kind, gz.dtype, precision, 1, N, K)
    splits, per_split = weight_grad_splits(rows, N, K, config, layers)
    partials = gz.new_empty((layers, splits, N * K), dtype=accumulator(gz.dtype))
    launch_weight_grad(gz, h, partials, splits, per_split, config, precision)
    if splits == 1:
        return partials.view(layers, N, K)
    out = partials.new_empty((layers, N, K))
    launch_sum(partials, out.view(layers, N * K))
    return out


def mlp_backward(
    g, x, tensors, spec: Spec, saved=None, precision: str = "ieee", needs=(True, True, True, False)
) -> list[torch.Tensor]:
    """Gradients of `mlp` for the cotangent g [M, N_last]: gx, then of each layer gw, gb, gp (where it has any).

    gx, gw, gb in the types and shapes of x, weights and biases, summed in float32; gp [P, N] in float32: per feature,
    summed over rows, whether the parameters are tensors or not. Empty ([0]) where `needs` (x, weights, biases,
    parameters) says so or there is nothing. saved: what `mlp` returned with it, or None: computed again from x, in
    memory that does not grow with rows times depth.

    Raises:
        ValueError: parameters of the last activation are tensors, or needed.
    """
    if saved is not None and not saved.numel():
        saved = None
    if needs[3] and saved is not None and x.dtype.itemsize == 2 and not _any_parameter(spec, tensors):
        saved = None  # gradients of numbers, for which nothing has been kept
    return _train(g, x, tensors, spec, saved, precision, needs, None)


def _any_parameter(spec: Spec, tensors) -> bool:
    return any(group == Spec.PARAMETER and t is not None for group, t in zip(spec.groups, tensors, strict=True))


def mlp_loss(
    x, target, row_weights, tensors, spec: Spec, criterion: Criterion, precision: str = "ieee",
    needs=(True, True, True, False),
) -> list[torch.Tensor]:  # fmt: skip
    """[loss, gx, then of each layer gw, gb, gp] of loss = scale sum_m row_weights[m] sum_n f(y[m, n], target[m, n]).

    target: [M, N_last]; row_weights: [M], or None for 1; criterion: f, a map of (prediction, target), its constants and
    the scale; the loss is 0-D in float32, y is not rounded to x's type on the way. Gradients are in the types of what
    they belong to, but in float32 for float16: a loss scaler's factor comes later.
    """
    scale = criterion.scale
    if row_weights is not None:
        row_weights = row_weights.contiguous()
    if accumulator(x.dtype) == torch.float64:  # a number argument of a kernel is float32
        row_weights = x.new_full((x.shape[0],), scale) if row_weights is None else row_weights.double() * scale
        scale = 1.0
    factor = 2.0 ** -round(math.log2(scale)) if x.dtype == torch.float16 and 0 < scale < 1 else 1.0
    constants = tuple(float(c) for c in criterion.constants)
    loss = _Loss(target, row_weights, criterion.map, constants, float(scale), factor)
    return _train(None, x, tensors, spec, None, precision, needs, loss)
