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
    #: what became of gradients of such calls
    history: History | None = field(default=None, compare=False, repr=False)

    @functools.cached_property
    def maps(self) -> tuple[ActivationMap, ...]:
        return tuple(lookup(key) for key in self.activations)

    @functools.cached_property
    def group_of(self) -> tuple[int, ...]:
        """Of each argument of `Network`, x and this configuration first, which group of operands it belongs to."""
        sizes = [end - begin for begin, end in pairwise((0, *self.ends))]
        groups = [group for group, size in enumerate(sizes) for _ in range(size)]
        return (groups[0], -2, *groups[1:])

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


class Operands:
    """A network as operands of one operation.

    Attributes:
        layers, skips, norms: of each layer its tensors and activation, whether it has a skip connection, its LayerNorm;
            the last two are empty where no layer has one.
        tensors: all of them, in the order in which the operation takes them and gives their gradients.
        constants: parameters of the activations that are numbers (0 where a parameter is a tensor).
        decisions: who runs its calls, by the kind of call.
    """

    def __init__(self, layers: Sequence[Layer], skips: Sequence[bool] = (), norms: Sequence[Norm | None] = ()):
        self.layers = layers
        self.skips = tuple(skips) if any(skips) else ()
        self.normed = any(norm is not None for norm in norms)  # `bool` of a tuple is beyond Dynamo in torch 2.11
        self.norms = tuple(norms) if self.normed else ()
        self.tensors, self.constants = _operands(layers, self.norms)
        self.present = [t for t in self.tensors if t is not None]
        #: whether all of them are parameters, none a tensor that a transform stands behind
        self.parameters = all(type(t) is torch.nn.Parameter for t in self.present)
        #: those that are factors of no matrix product
        self.elementwise = [t for _, _, activation in layers if activation.has_tensors for t in activation.tensors]
        self.elementwise += [t for norm in self.norms if norm is not None for t in norm[:2]]
        self.widest = max(weight.shape[0] for weight, _, _ in layers) if layers else 0
        self.decisions: dict[tuple, Decision] = {}
        self._functions: list[tuple] | None = None

    def functions(self) -> list[tuple]:
        """Of each layer: weight, bias, its activation as a plain PyTorch function, branches and parameters of that."""
        if self._functions is None:
            self._functions = [
                (weight, bias, activation.map.torch_map(0), activation.branches, tuple(activation.params.values()))
                for weight, bias, activation in self.layers
            ]
        return self._functions

    def tracked(self, x: Tensor) -> bool:
        """Whether the network's output has a derivative."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(t.requires_grad for t in self.present)


class History:
    """What became of a network's gradients: to differentiate them again, a whole network is computed a second time."""

    #: calls for which such a backward is remembered
    LASTS = 256

    def __init__(self) -> None:
        self.calls = 0

    def differentiated(self) -> None:
        """A backward that must itself be differentiated has run."""
        self.calls = self.LASTS

    def expects(self) -> bool:
        """Whether the present call's backward will probably be one."""
        self.calls = max(0, self.calls - 1)
        return self.calls > 0


@dataclass(eq=False)
class Decision:
    """How a network's calls of one kind run, and why not otherwise."""

    backend: str
    precision: str
    #: why the call is not one operation ("": it is)
    reason: str
    #: "network": as one operation; "layers": one operation a layer; "plain": by PyTorch's functions
    way: str = "network"
    #: of calls, by whether they save
    configs: dict[bool, Config] = field(default_factory=dict)
    #: None where calls are compiled
    history: History | None = None


#: Decisions that were made before, by everything that they depend on.
_decisions: dict[tuple, Decision] = {}
_MOST_DECISIONS = 1024
_AGAIN = "its gradients were differentiated lately, for which a whole network is computed twice"
#: rows times columns of the widest layer up to which plain PyTorch is faster on a CPU: derivatives of any order, and a
#: forward with its backward, which a Function of Python's has to pass on
_SMALL, _TINY = 1 << 18, 1 << 8
_FEW_ROWS = Decision("", "", "the gradients of so few rows are faster", "plain")


def _described(tensor: Tensor | None):
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def decide(x: Tensor, operands: Operands, direction: str, auto: bool = True) -> Decision:
    """How the call runs; remembered, as a small forward takes no longer than its decision.

    `auto`: whether layers and plain PyTorch may be chosen where they are faster.

    Raises:
        RuntimeError: a backend demanded with `backends.use` that cannot serve any layer.
    """
    if state := _state():
        free = auto and not torch.compiler.is_compiling() and linear_act._under_vmap() and backends.demanded() is None
        for first, _, _ in operands.layers[:1]:  # what does not fit goes to the layers, which say what is wrong
            free = free and x.dim() > 0 and x.shape[-1] == first.shape[-1] and x.dtype == first.dtype
        return Decision("", "", state, "plain" if free else "layers")
    cast = autocast_type(x, operands.layers)
    if torch.compiler.is_compiling():  # once a compilation
        return _decide(x, operands, direction, auto, cast)
    settings = backends.state(x.device)
    kind = (direction, auto, x.shape[-1:], x.dim(), x.dtype, x.device, x.layout, cast, settings)
    found = operands.decisions.get(kind)
    if found is None:
        found = operands.decisions[kind] = _known(x, operands, direction, auto, cast, kind)
        found.history = found.history or History()
    if found.way == "network" and auto and settings[0] is None:
        elements = x.numel() // max(1, x.shape[-1]) * operands.widest if x.device.type == "cpu" else _SMALL + 1
        if direction == "forward" and elements <= _TINY and cast is None:
            return _FEW_ROWS
        if direction != "inference" and found.history is not None and found.history.expects():
            way = "plain" if elements <= _SMALL else "layers"
            return Decision(found.backend, found.precision, _AGAIN, way)
    return found


def _known(x: Tensor, operands: Operands, direction: str, auto: bool, cast, kind: tuple) -> Decision:
    """The decision for a network that looks like this one: networks come and go with functional calls."""
    key = (
        kind, operands.skips,
        tuple([
            (weight.shape, weight.dtype, weight.device, _described(bias), activation.map, activation.constants,
             tuple([_described(t) for t in activation.tensors]) if activation.has_tensors else None)
            for weight, bias, activation in operands.layers
        ]),
        tuple([norm and (_described(norm[0]), _described(norm[1]), norm[2]) for norm in operands.norms]),
    )  # fmt: skip
    found = _decisions.get(key)
    if found is None:
        found = _decide(x, operands, direction, auto, cast)
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        _decisions[key] = found
    return found


def _decide(x: Tensor, operands: Operands, direction: str, auto: bool, cast: torch.dtype | None) -> Decision:
    layers = operands.layers
    backend, precision, reason = why_not(x, layers, operands.skips, operands.norms, direction=direction, cast=cast)
    if reason:
        return Decision(backend, precision, reason, "layers")
    if not auto:
        return Decision(backend, precision, "")
    dtype = x.dtype if cast is None else cast
    implementation = backends.implementation(backend)
    shapes = [(weight.shape[0], weight.shape[1]) for weight, _, _ in layers]
    if cast is None and backends.demanded() is None and (reason := implementation.prefers_plain(dtype)):
        return Decision(backend, precision, reason, "plain")
    if reason := implementation.prefers_layers(shapes, [activation.map for _, _, activation in layers], dtype):
        return Decision(backend, precision, reason, "layers")
    return Decision(backend, precision, "")


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
    if not (linear_act.unwatched(head) and linear_act.all_plain(tensors)):
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
        compiling = torch.compiler.is_compiling()
        needs = linear_act._wanted(ctx, present, None if compiling else config.group_of)
        needs = [needs[0], *needs[2:]]
        if not compiling and (torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(g)):
            if config.history is not None:
                config.history.differentiated()
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
            if ctx.config.history is not None:
                ctx.config.history.differentiated()

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


def _config(decision: Decision, operands: Operands, save: bool) -> Config:
    """The decision's configuration: the same object for all calls of one kind."""
    config = decision.configs.get(save)
    if config is None:
        keys = tuple(activation.map.key for _, _, activation in operands.layers)
        counts = tuple(len(activation.tensors) for _, _, activation in operands.layers)
        eps = tuple(backends.flat_norms(operands.norms)[1])
        config = Config(
            keys, operands.constants, counts, decision.backend, decision.precision, save, operands.skips, eps,
            decision.history,
        )  # fmt: skip
        decision.configs[save] = config
    return config


def _cast(x: Tensor, operands: Operands, backend: str) -> tuple[Tensor, Operands]:
    """To autocast's type, as each layer would do it for itself; weights only where the backend does not read any."""
    dtype = autocast_type(x, operands.layers)
    if dtype is None:
        return x, operands
    if not backends.implementation(backend).reads_any_weights:
        layers = [
            (w.to(dtype), None if b is None else b.to(dtype), activation) for w, b, activation in operands.layers
        ]
        operands = Operands(layers, operands.skips, operands.norms)
    return x.to(dtype), operands


def network(x: Tensor, operands: Operands, decision: Decision, save: bool) -> Tensor:
    """x [.., K] through all layers as one operation, where `decide` has found that the backend serves."""
    x, operands = _cast(x, operands, decision.backend)
    tensors = operands.tensors
    track = operands.tracked(x)
    config = _config(decision, operands, save and track)
    backends.record_network(x, operands.layers, operands.normed, config.backend, config.precision)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        run = Network.apply if track else Network.forward
        y = linear_act._exactly(x.device, run, rows, config, *tensors)[0]
    else:
        apply = (linear_act._apply_plain if operands.parameters else linear_act._apply) if track else _untracked
        y = linear_act._exactly(x.device, apply, Network, rows, config, *tensors)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


#: rows that plain PyTorch takes through all layers at a time, so that what they are between two layers stays in cache:
#: at least, and for each of many threads
_PLAIN_TILE, _PLAIN_TILE_OF_A_THREAD = 2048, 512


def plain(x: Tensor, operands: Operands, reason: str) -> Tensor:
    """x [.., K] through all layers by PyTorch's own functions, tile by tile; differentiable any number of times."""
    backends.record_plain_network(x, operands.layers, operands.normed, reason)
    return linear_act._exactly(x.device, _in_tiles, x, operands)


def _in_tiles(x: Tensor, operands: Operands) -> Tensor:
    backends.refuse_freed(*operands.elementwise)  # matrix products refuse theirs
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _plain(x, operands)
    rows, tile = x.numel() // max(1, x.shape[-1]), max(_PLAIN_TILE, _PLAIN_TILE_OF_A_THREAD * torch.get_num_threads())
    if rows <= tile or operands.tracked(x):  # gradients of tiles would have to be added
        return _plain(x, operands)
    parts = -(-rows // tile)
    tiles = x.reshape(rows, x.shape[-1]).split(-(-rows // parts))
    y = torch.cat([_plain(part, operands) for part in tiles])
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _plain(x: Tensor, operands: Operands) -> Tensor:
    if not operands.skips and not operands.norms and x.dtype.itemsize >= 4:
        linear = torch.nn.functional.linear
        for weight, bias, function, branches, values in operands.functions():
            z = linear(x, weight, bias)
            outputs = function(z, *values) if branches == 1 else function(*z.chunk(branches, -1), *values)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return x
    n = len(operands.layers)
    skips, norms = operands.skips or [False] * n, operands.norms or [None] * n
    for (weight, bias, activation), skip, norm in zip(operands.layers, skips, norms, strict=True):
        y = linear_act._unfused(x, weight, bias, activation)
        y = y if norm is None else backends.layer_norm(y, norm)
        x = backends.add_skip(y, x) if skip else y
    return x


def _untracked(function, *args):
    return function.forward(*args)


def network_loss(
    x: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    operands: Operands,
    criterion: Criterion,
    decision: Decision,
) -> Tensor:
    """The criterion of the network's output, with all gradients made in the same pass; rows flattened, [M, ..]."""
    x, operands = _cast(x, operands, decision.backend)
    config = _config(decision, operands, False)
    backends.record_network(
        x, operands.layers, operands.normed, config.backend, config.precision, criterion.loss
    )
    args = (x, target, row_weights, config, criterion, *operands.tensors)
    if torch.compiler.is_compiling():
        return linear_act._exactly(x.device, NetworkLoss.apply, *args)
    return linear_act._exactly(x.device, linear_act._apply, NetworkLoss, *args)
