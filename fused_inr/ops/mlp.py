"""A whole network as one differentiable operation: every layer of a tile of rows before the next tile.

`network` and `network_loss` run it; `why_not` tells why a call can only be a sequence of layers. The first derivative
is fused; where a derivative must itself be differentiated, the layers compute it (`linear_act`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..activations import Activation, ActivationMap, lookup
from . import backends, linear_act, raw
from .backends import Norm

#: A layer: weight [B*N, K], bias [B*N] or None, activation.
Layer = tuple[Tensor, Tensor | None, Activation]


@dataclass(frozen=True)
class Config:
    """What a call needs besides tensors (no tuple: functorch would take it apart)."""

    activations: tuple[str, ...]
    constants: tuple[float, ...]
    #: parameters of each layer's activation
    counts: tuple[int, ...]
    backend: str
    precision: str
    save: bool
    #: for each layer, whether its output is (activation + input) / sqrt(2)
    skips: tuple[bool, ...] = ()
    #: for each layer, eps of its LayerNorm, below 0 where it has none; empty where none has
    norm_eps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Criterion:
    """An elementwise loss: `scale` times the sum over rows of their weight times the sum over columns."""

    loss: str
    constants: tuple[float, ...]
    scale: float


# -- the choice


def _state() -> str:
    """Why the running transformation needs layers."""
    if torch.compiler.is_compiling():
        return "torch.compile traces layers"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms differentiate layers"
    if linear_act._forward_mode():
        return "forward mode differentiates layers"
    return ""


def _why_not_norm(x: Tensor, norm: Norm, columns: int) -> str:
    """Why LayerNorm between the layers cannot be part of the network."""
    weight, bias, eps = norm
    if not eps >= 0:
        return f"its LayerNorm has eps={eps}"
    for t in (weight, bias):
        if t is None:
            continue
        if t.device != x.device:
            return f"its LayerNorm is not on the input's device, {x.device}"
        if t.dtype not in (x.dtype, raw.compute_dtype(x.dtype)):
            return f"its LayerNorm has {t.dtype}, the input {x.dtype}"
        if t.shape != (columns,):
            return f"its LayerNorm has {list(t.shape)} elements, its output {columns} columns"
    return ""


def why_not(
    x: Tensor,
    layers: Sequence[Layer],
    skips: Sequence[bool] = (),
    norms: Sequence[Norm | None] = (),
    *,
    direction: str = "forward",
) -> tuple[str, str, str]:
    """Backend, precision, and the reason why the whole network cannot run there ("": it can).

    `skips`, `norms`: of each layer, or empty where none has a skip connection, a LayerNorm.

    Raises:
        RuntimeError: a backend demanded with `backends.use` that cannot serve any layer.
    """
    first = layers[0]
    if state := _state():
        return "", "", state
    columns = (1, x.shape[-1])  # outputs of the layer before, features of each
    for i, (weight, bias, activation) in enumerate(layers):
        tensors = [t for t in (weight, bias, *activation.tensors) if t is not None]
        if any(t.dtype != x.dtype and t.is_floating_point() for t in (weight, bias) if t is not None):
            return "", "", f"layer {i}: its type is not the input's, {x.dtype}"
        if any(t.device != x.device for t in tensors):
            return "", "", f"layer {i}: it is not on the input's device, {x.device}"
        if weight.dim() != 2 or weight.shape[1] != math.prod(columns) or weight.shape[0] % activation.branches:
            reason = f"its weight {tuple(weight.shape)} does not fit an input of {math.prod(columns)} columns"
            return "", "", f"layer {i}: {reason}"
        before, columns = columns, (activation.outputs, weight.shape[0] // activation.branches)
        if skips and skips[i] and (activation.map.key == "identity" or columns != before):
            return "", "", f"layer {i}: a skip connection needs an activation, and an output of its input's columns"
        norm = norms[i] if norms else None
        if norm is not None and (reason := _why_not_norm(x, norm, math.prod(columns))):
            return "", "", f"layer {i}: {reason}"
    if not (x.is_floating_point() and x.dim() >= 1 and x.layout == torch.strided):
        return "", "", f"an input of {x.dtype} and {x.dim()} dimensions"
    backend, precision = backends.choose(first[2], x, first[0], record=False)
    implementation = backends.implementation(backend)
    maps = [activation.map for _, _, activation in layers]
    for map in maps[1:]:
        if reason := backends.implementation(backend).serves(map, x.device, x.dtype):
            return backend, precision, reason
    shapes = [(weight.shape[0], weight.shape[1]) for weight, _, _ in layers]
    learnable = [activation.has_tensors for _, _, activation in layers]
    normed = [norm is not None for norm in norms]
    reason = implementation.serves_network(x, shapes, maps, precision, direction, learnable, skips, normed)
    return backend, precision, reason


# -- the operation


def _split(config: Config, tensors: Sequence[Tensor | None]):
    """Weights, biases, parameters of the activations, weight and bias of each norm."""
    n = len(config.activations)
    norms = 2 * n + len(config.constants)
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n : norms]), list(tensors[norms:])


def _arguments(config: Config, tensors: Sequence[Tensor | None]):
    weights, biases, params, norms = _split(config, tensors)
    return weights, biases, params, config.constants, config.activations, config.skips, norms, config.norm_eps


def _layers(config: Config, tensors: Sequence[Tensor | None]) -> list[Layer]:
    """The operands as layers again."""
    weights, biases, params, _ = _split(config, tensors)
    layers: list[Layer] = []
    at = 0
    for weight, bias, key, count in zip(weights, biases, config.activations, config.counts, strict=True):
        map = lookup(key)
        values = {
            name: config.constants[at + j] if params[at + j] is None else params[at + j]
            for j, name in enumerate(map.param_names)
        }
        at += count
        layers.append((weight, bias, Activation(map, values)))
    return layers


def through_layers(
    x: Tensor,
    layers: Sequence[Layer],
    skips: Sequence[bool] = (),
    norms: Sequence[Norm | None] = (),
    chosen: tuple[str, str] | None = None,
) -> Tensor:
    """The same network layer by layer: differentiable any number of times; `chosen` as in `linear_act`."""
    skips, norms = skips or [False] * len(layers), norms or [None] * len(layers)
    for (weight, bias, activation), skip, norm in zip(layers, skips, norms, strict=True):
        y = linear_act.linear_act(x, weight, bias, activation, chosen)
        y = y if norm is None else backends.layer_norm(y, norm)
        x = backends.add_skip(y, x) if skip else y
    return x


def _through_layers(x: Tensor, config: Config, tensors: Sequence[Tensor | None]) -> Tensor:
    norms = backends.norms_by_layer(_split(config, tensors)[3], config.norm_eps)
    return through_layers(x, _layers(config, tensors), config.skips, norms, (config.backend, config.precision))


def _parameter_gradients(config: Config, params, gp: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """[P, N] a layer, to what each parameter is."""
    grads: list[Tensor | None] = []
    for per_layer, count in zip(gp, config.counts, strict=True):
        for j in range(count):
            p = params[len(grads)]
            grad = None
            if needs[len(grads)]:
                grad = (per_layer[j].sum() if p.dim() == 0 else per_layer[j]).to(p.dtype)
            grads.append(grad)
    return grads


def _gradients(config: Config, tensors, results: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """gx and the gradients of `tensors` from a raw operation's results; None where not needed."""
    n, params = len(config.activations), _split(config, tensors)[2]
    first, own = 1 + 2 * n, 1 + 2 * n + len(params)

    def plain(results, needs):
        return [r if need else None for r, need in zip(results, needs, strict=True)]

    of_params = _parameter_gradients(config, params, results[first : first + n], needs[first:own])
    return [*plain(results[:first], needs[:first]), *of_params, *plain(results[first + n :], needs[own:])]


def _groups(config: Config, needs: Sequence[bool]) -> list[bool]:
    """Whether x, any weight, bias, parameter, norm needs a gradient."""
    n = len(config.activations)
    ends = [1, 1 + n, 1 + 2 * n, 1 + 2 * n + len(config.constants), len(needs)]
    return [needs[0], *(any(needs[begin:end]) for begin, end in pairwise(ends))]


def _again(run, x: Tensor, tensors, needs: Sequence[bool], g: Tensor) -> list[Tensor | None]:
    """Gradients of `run()`, a composition of differentiable operations, that differentiate again."""
    inputs = [x, *tensors]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        y = run()
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(grads) if need else None for need in needs]


class Network(torch.autograd.Function):
    """Inputs: x [M, K], config, then weights, biases (None where there is none), parameters (None where constant),
    and where there are norms each layer's weight and bias (None where there is none)."""

    @staticmethod
    def forward(x, config, *tensors):
        return raw.mlp(x, *_arguments(config, tensors), config.backend, config.precision, config.save)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.config, *tensors = inputs
        _, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(x, saved if ctx.config.save else None, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        config = ctx.config
        x, saved, *tensors = ctx.saved_tensors
        present = [True, False, *(t is not None for t in tensors)]
        needs = linear_act._wanted(ctx, present)
        needs = [needs[0], *needs[2:]]
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(g):
            grads = _again(lambda: _through_layers(x, config, tensors), x, tensors, needs, g)
        else:
            results = linear_act._exactly(
                x.device, raw.mlp_backward, g, x, *_arguments(config, tensors), saved, config.backend, config.precision,
                _groups(config, needs),
            )  # fmt: skip
            grads = _gradients(config, tensors, results, needs)
        return grads[0], None, *grads[1:]


class NetworkLoss(torch.autograd.Function):
    """Inputs: x, target, row weights or None, config, criterion, then as `Network`. One pass of both directions."""

    @staticmethod
    def forward(ctx, x, target, row_weights, config, criterion, *tensors):
        inputs = ctx.needs_input_grad
        needs = [inputs[0], *inputs[5:]]
        loss, *results = raw.mlp_loss(
            x, target, row_weights, *_arguments(config, tensors), criterion.loss, criterion.constants, criterion.scale,
            config.backend, config.precision, _groups(config, needs),
        )  # fmt: skip
        grads = _gradients(config, tensors, results, needs)
        ctx.config, ctx.criterion, ctx.count = config, criterion, len(tensors)
        ctx.save_for_backward(x, target, row_weights, *tensors, *grads)
        return loss.to(x.dtype) if x.dtype == torch.float64 else loss

    @staticmethod
    def backward(ctx, g):
        x, target, row_weights, *rest = ctx.saved_tensors
        tensors, grads = rest[: ctx.count], rest[ctx.count :]
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(g):
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]

            def run():
                y = _through_layers(x, ctx.config, tensors)
                return elementwise_loss(y, target, row_weights, lookup(ctx.criterion.loss), ctx.criterion)

            scaled = _again(run, x, tensors, needs, g)
        else:
            scaled = [None if t is None else (t * g).to(t.dtype) for t in grads]
        return scaled[0], None, None, None, None, *scaled[1:]


def elementwise_loss(
    y: Tensor, target: Tensor, row_weights: Tensor | None, map: ActivationMap, criterion: Criterion
) -> Tensor:
    """The criterion in plain PyTorch, differentiable any number of times."""
    dtype = raw.compute_dtype(y.dtype)
    (loss,) = map.torch_map(0)(y.to(dtype), target.to(dtype), *criterion.constants)
    if row_weights is not None:
        loss = loss * row_weights.to(dtype).unsqueeze(-1)
    return loss.sum() * criterion.scale


def _operands(
    layers: Sequence[Layer], norms: Sequence[Norm | None] = ()
) -> tuple[list[Tensor | None], tuple[float, ...]]:
    tensors: list[Tensor | None] = [weight for weight, _, _ in layers]
    tensors += [bias for _, bias, _ in layers]
    constants: list[float] = []
    for _, _, activation in layers:
        tensors += activation.tensors
        constants += activation.constants
    return [*tensors, *backends.flat_norms(norms)[0]], tuple(constants)


def _config(layers: Sequence[Layer], constants, backend: str, precision: str, save: bool, skips, norms) -> Config:
    keys = tuple(activation.map.key for _, _, activation in layers)
    counts = tuple(len(activation.tensors) for _, _, activation in layers)
    skips = tuple(skips) if any(skips) else ()
    return Config(keys, constants, counts, backend, precision, save, skips, tuple(backends.flat_norms(norms)[1]))


def network(
    x: Tensor,
    layers: Sequence[Layer],
    backend: str,
    precision: str,
    save: bool,
    skips: Sequence[bool] = (),
    norms: Sequence[Norm | None] = (),
) -> Tensor:
    """x [.., K] through all layers, on a backend of which `why_not` has found that it serves."""
    tensors, constants = _operands(layers, norms)
    track = torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors))
    config = _config(layers, constants, backend, precision, save and track, skips, norms)
    backends.record_network(x, layers, bool(norms), backend, precision)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    run = linear_act._apply if track else _untracked
    y = linear_act._exactly(x.device, run, Network, rows, config, *tensors)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _untracked(function, *args):
    return function.forward(*args)


def network_loss(
    x: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    layers: Sequence[Layer],
    criterion: Criterion,
    backend: str,
    precision: str,
    skips: Sequence[bool] = (),
    norms: Sequence[Norm | None] = (),
) -> Tensor:
    """The criterion of the network's output, with all gradients made in the same pass; rows flattened, [M, ..]."""
    tensors, constants = _operands(layers, norms)
    config = _config(layers, constants, backend, precision, False, skips, norms)
    backends.record_network(x, layers, bool(norms), backend, precision, criterion.loss)
    args = (x, target, row_weights, config, criterion, *tensors)
    return linear_act._exactly(x.device, NetworkLoss.apply, *args)
