"""A whole network as one differentiable operation: every layer of a tile of rows before the next tile.

`network` and `network_loss` run it; `why_not` tells why a call can only be a sequence of layers. The first derivative
is fused; where a derivative must itself be differentiated, the layers compute it (`linear_act`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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

    @functools.cached_property
    def maps(self) -> tuple[ActivationMap, ...]:
        return tuple(lookup(key) for key in self.activations)

    @property
    def ends(self) -> tuple[int, ...]:
        """Where x, weights, biases, parameters and norms end among x and the operands."""
        n = len(self.activations)
        params = 1 + 2 * n + len(self.constants)
        return 1, 1 + n, 1 + 2 * n, params, params + 2 * len(self.norm_eps)


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
        # Dynamo (2.13) takes a Function inside a transform apart wrongly
        return "torch.func transforms differentiate layers" if linear_act._inside_transform() else ""
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


@dataclass(eq=False)
class Decision:
    """Who runs a network's calls of one kind, or why it is not to run as one operation."""

    backend: str
    precision: str
    #: why the whole network cannot run there ("": it can)
    reason: str
    #: why layers are the better way for a network that could ("": they are not)
    layers_reason: str = ""
    #: of calls, by whether they save
    configs: dict[bool, Config] = field(default_factory=dict)


#: Decisions that were made before, by everything that they depend on.
_decisions: dict[tuple, Decision] = {}
_MOST_DECISIONS = 1024


def tracked(x: Tensor, layers: Sequence[Layer], norms: Sequence[Norm | None]) -> bool:
    """Whether the network's output has a derivative."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(
        t is not None and t.requires_grad
        for tensors in (*((weight, bias, *activation.tensors) for weight, bias, activation in layers),
                        *(norm[:2] for norm in norms if norm is not None))
        for t in tensors
    )  # fmt: skip


def _described(tensor: Tensor | None):
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def decide(
    x: Tensor, layers: Sequence[Layer], skips: Sequence[bool], norms: Sequence[Norm | None], direction: str
) -> Decision:
    """`why_not`, remembered: a small forward takes no longer than its decision.

    Raises:
        RuntimeError: a backend demanded with `backends.use` that cannot serve any layer.
    """
    if state := _state():
        return Decision("", "", state)
    cast = autocast_type(x, layers)
    if torch.compiler.is_compiling():  # once a compilation
        return _decide(x, layers, skips, norms, direction, cast)
    key = (
        direction, x.shape[-1:], x.dim(), x.dtype, x.device, x.layout, cast, backends.state(), skips,
        tuple([
            (weight.shape, weight.dtype, weight.device, _described(bias), activation.map, activation.constants,
             tuple([_described(t) for t in activation.tensors]) if activation.has_tensors else None)
            for weight, bias, activation in layers
        ]),
        tuple([norm and (_described(norm[0]), _described(norm[1]), norm[2]) for norm in norms]),
    )  # fmt: skip
    found = _decisions.get(key)
    if found is None:
        found = _decide(x, layers, skips, norms, direction, cast)
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        _decisions[key] = found
    return found


def _decide(x: Tensor, layers, skips, norms, direction: str, cast: torch.dtype | None) -> Decision:
    backend, precision, reason = why_not(x, layers, skips, norms, direction=direction, cast=cast)
    if reason:
        return Decision(backend, precision, reason)
    shapes = [(weight.shape[0], weight.shape[1]) for weight, _, _ in layers]
    maps = [activation.map for _, _, activation in layers]
    dtype = x.dtype if cast is None else cast
    return Decision(backend, precision, "", backends.implementation(backend).prefers_layers(shapes, maps, dtype))


def autocast_type(x: Tensor, layers: Sequence[Layer]) -> torch.dtype | None:
    """The type that autocast wants of the network, None where it is off or leaves it alone, as each layer would."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    if not all(t.is_floating_point() and t.dtype != torch.float64 for t in (x, *(weight for weight, _, _ in layers))):
        return None
    return torch.get_autocast_dtype(kind)


def why_not(
    x: Tensor,
    layers: Sequence[Layer],
    skips: Sequence[bool] = (),
    norms: Sequence[Norm | None] = (),
    *,
    direction: str = "forward",
    cast: torch.dtype | None = None,
) -> tuple[str, str, str]:
    """Backend, precision, and the reason why the whole network cannot run there ("": it can).

    `skips`, `norms`: of each layer, or empty where none has a skip connection, a LayerNorm. `direction`: "inference",
    "forward" (with its backward) or "loss". `cast`: the type that autocast gives input, weights and biases.

    Raises:
        RuntimeError: a backend demanded with `backends.use` that cannot serve any layer.
    """
    if state := _state():
        return "", "", state
    if not (x.is_floating_point() and x.dim() >= 1 and x.layout == torch.strided):
        return "", "", f"an input of {x.dtype} and {x.dim()} dimensions"
    if cast is not None:  # decided for an input and weights of that type
        x = x.new_empty(1, dtype=cast).expand(x.shape) if x.numel() else x.to(cast)
    columns = (1, x.shape[-1])  # outputs of the layer before, features of each
    for i, (weight, bias, activation) in enumerate(layers):
        tensors = [t for t in (weight, bias, *activation.tensors) if t is not None]
        if cast is None and any(t.dtype != x.dtype and t.is_floating_point() for t in (weight, bias) if t is not None):
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
    backend, precision = backends.choose(layers[0][2], x, layers[0][0], record=False)
    implementation = backends.implementation(backend)
    maps = [activation.map for _, _, activation in layers]
    for map in maps[1:]:
        if reason := backends.refusal(backend, map.key, x.device, x.dtype):
            return backend, precision, reason
    shapes = [(weight.shape[0], weight.shape[1]) for weight, _, _ in layers]
    learnable = [activation.has_tensors for _, _, activation in layers]
    normed = [norm is not None for norm in norms]
    reason = implementation.serves_network(x, shapes, maps, precision, direction, learnable, skips, normed)
    return backend, precision, reason


# -- the operation


def _split(config: Config, tensors: Sequence[Tensor | None]):
    """Weights, biases, parameters of the activations, weight and bias of each norm."""
    _, weights, biases, params, _ = config.ends
    first = weights - 1
    return (
        list(tensors[:first]), list(tensors[first : biases - 1]), list(tensors[biases - 1 : params - 1]),
        list(tensors[params - 1 :]),
    )  # fmt: skip


def _run(name: str, config: Config, head: Sequence[Tensor | None], tensors: Sequence[Tensor | None], *rest):
    """The raw operation `name` of (*head, network, *rest).

    Where nothing looks at operations (a mode, a subclass, a transform, the profiler), the backend is called directly:
    the dispatcher takes 20 us to pass a network's operands on.
    """
    weights, biases, params, norms = _split(config, tensors)
    if not linear_act.unwatched((*head, *tensors)):
        words = (config.constants, config.activations, config.skips, norms, config.norm_eps)
        return getattr(raw, name)(*head, weights, biases, params, *words, *rest)
    run = getattr(backends.implementation(config.backend), name)
    pairs = backends.norms_by_layer(norms, config.norm_eps)
    network = (weights, biases, params, config.constants, config.maps, config.skips, pairs)
    if name == "mlp":
        return run(*head, *network, config.precision, rest[2])
    if name == "mlp_backward":
        saved, _, precision, needs = rest
        return run(*head, *network, saved, precision, needs)
    loss, constants, scale, _, precision, needs = rest
    return run(*head, *network, lookup(loss), constants, scale, precision, needs)


def _layers(config: Config, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Layer]:
    """The operands as layers again, weights and biases in the type of the rows."""
    weights, biases, params, _ = _split(config, tensors)
    layers: list[Layer] = []
    at = 0
    for weight, bias, map, count in zip(weights, biases, config.maps, config.counts, strict=True):
        values = {
            name: config.constants[at + j] if params[at + j] is None else params[at + j]
            for j, name in enumerate(map.param_names)
        }
        at += count
        layers.append((weight.to(dtype), None if bias is None else bias.to(dtype), Activation(map, values)))
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
    layers = _layers(config, tensors, x.dtype)
    return through_layers(x, layers, config.skips, norms, (config.backend, config.precision))


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
    n, (_, _, first, own, _) = len(config.activations), config.ends

    def plain(results, needs):
        return [r if need else None for r, need in zip(results, needs, strict=True)]

    params = tensors[first - 1 : own - 1]
    of_params = _parameter_gradients(config, params, results[first : first + n], needs[first:own])
    return [*plain(results[:first], needs[:first]), *of_params, *plain(results[first + n :], needs[own:])]


def _groups(config: Config, needs: Sequence[bool]) -> list[bool]:
    """Whether x, any weight, bias, parameter, norm needs a gradient."""
    return [needs[0], *[any(needs[begin:end]) for begin, end in pairwise(config.ends)]]


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
        return _run("mlp", config, (x,), tensors, config.backend, config.precision, config.save)

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
        compiling = torch.compiler.is_compiling()
        if not compiling and (torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(g)):
            grads = _again(lambda: _through_layers(x, config, tensors), x, tensors, needs, g)
        else:
            rest = (saved, config.backend, config.precision, _groups(config, needs))
            results = linear_act._exactly(x.device, _run, "mlp_backward", config, (g, x), tensors, *rest)
            grads = _gradients(config, tensors, results, needs)
        return grads[0], None, *grads[1:]


class NetworkLoss(torch.autograd.Function):
    """Inputs: x, target, row weights or None, config, criterion, then as `Network`. One pass of both directions."""

    @staticmethod
    def forward(ctx, x, target, row_weights, config, criterion, *tensors):
        inputs = ctx.needs_input_grad
        needs = [inputs[0], *inputs[5:]]
        loss, *results = _run(
            "mlp_loss", config, (x, target, row_weights), tensors, criterion.loss, criterion.constants,
            criterion.scale, config.backend, config.precision, _groups(config, needs),
        )  # fmt: skip
        grads = _gradients(config, tensors, results, needs)
        ctx.config, ctx.criterion, ctx.count = config, criterion, len(tensors)
        ctx.save_for_backward(x, target, row_weights, *tensors, *grads)
        return loss.to(x.dtype) if x.dtype == torch.float64 else loss

    @staticmethod
    def backward(ctx, g):
        x, target, row_weights, *rest = ctx.saved_tensors
        tensors, grads = rest[: ctx.count], rest[ctx.count :]
        compiling = torch.compiler.is_compiling()
        if not compiling and (torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(g)):
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]

            def run():
                y = _through_layers(x, ctx.config, tensors)
                return elementwise_loss(y, target, row_weights, lookup(ctx.criterion.loss), ctx.criterion)

            scaled = _again(run, x, tensors, needs, g)
        else:
            scaled = _scaled(grads, g, (x, *tensors))
        return scaled[0], None, None, None, None, *scaled[1:]


def _scaled(grads: Sequence[Tensor | None], g: Tensor, of: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients times the cotangent of a loss, in the types of what they belong to."""
    # never the saved tensors themselves: a retained graph would see what becomes of the parameters' gradients
    found = iter(torch._foreach_mul([t for t in grads if t is not None], g))
    scaled = [None if t is None else next(found) for t in grads]
    return [t if t is None or o is None else t.to(o.dtype) for t, o in zip(scaled, of, strict=True)]


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
    return [*tensors, *backends.flat_norms(norms)[0]] if norms else tensors, tuple(constants)


def _config(
    decision: Decision, layers: Sequence[Layer], constants, save: bool, skips: Sequence[bool], norms: Sequence
) -> Config:
    """The decision's configuration: the same object for all calls of one kind."""
    config = decision.configs.get(save)
    if config is None:
        keys = tuple(activation.map.key for _, _, activation in layers)
        counts = tuple(len(activation.tensors) for _, _, activation in layers)
        skips = tuple(skips) if any(skips) else ()
        eps = tuple(backends.flat_norms(norms)[1])
        config = Config(keys, constants, counts, decision.backend, decision.precision, save, skips, eps)
        decision.configs[save] = config
    return config


def _cast(x: Tensor, layers: Sequence[Layer], backend: str) -> tuple[Tensor, Sequence[Layer]]:
    """To autocast's type, as each layer would do it for itself; weights only where the backend does not read any."""
    dtype = autocast_type(x, layers)
    if dtype is None:
        return x, layers
    if not backends.implementation(backend).reads_any_weights:
        layers = [(w.to(dtype), None if b is None else b.to(dtype), activation) for w, b, activation in layers]
    return x.to(dtype), layers


def network(
    x: Tensor,
    layers: Sequence[Layer],
    decision: Decision,
    save: bool,
    skips: Sequence[bool] = (),
    norms: Sequence[Norm | None] = (),
) -> Tensor:
    """x [.., K] through all layers, where `decide` has found that the backend serves."""
    x, layers = _cast(x, layers, decision.backend)
    tensors, constants = _operands(layers, norms)
    track = torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors))
    config = _config(decision, layers, constants, save and track, skips, norms)
    backends.record_network(x, layers, bool(norms), config.backend, config.precision)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        run = Network.apply if track else Network.forward
        y = linear_act._exactly(x.device, run, rows, config, *tensors)[0]
    else:
        apply = linear_act._apply if track else _untracked
        y = linear_act._exactly(x.device, apply, Network, rows, config, *tensors)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _untracked(function, *args):
    return function.forward(*args)


def network_loss(
    x: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    layers: Sequence[Layer],
    criterion: Criterion,
    decision: Decision,
    skips: Sequence[bool] = (),
    norms: Sequence[Norm | None] = (),
) -> Tensor:
    """The criterion of the network's output, with all gradients made in the same pass; rows flattened, [M, ..]."""
    x, layers = _cast(x, layers, decision.backend)
    tensors, constants = _operands(layers, norms)
    config = _config(decision, layers, constants, False, skips, norms)
    backends.record_network(x, layers, bool(norms), config.backend, config.precision, criterion.loss)
    args = (x, target, row_weights, config, criterion, *tensors)
    if torch.compiler.is_compiling():
        return linear_act._exactly(x.device, NetworkLoss.apply, *args)
    return linear_act._exactly(x.device, linear_act._apply, NetworkLoss, *args)
