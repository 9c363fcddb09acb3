"""A whole network as one differentiable operation: every layer of a tile of rows before the next tile.

`network` and `network_loss` run it; `decide` tells how a call runs, and why it can only be a sequence of layers where
it is one. The first derivative is fused; where a derivative must itself be differentiated, the layers compute it
(`linear_act`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import backends
from ..network import (
    NORMS,
    Criterion,
    Layer,
    Norm,
    Spec,
    compute_dtype,
    gradients_by_layer,
    groups_needed,
    in_sequence,
    plain_layer,
    plain_loss,
    spec_of,
    steps,
)
from ..pytorch import (
    all_plain,
    apply,
    apply_to_parameters,
    exactly,
    forward_mode,
    inside_transform,
    is_batched_cotangent,
    multiplied,
    transforms_active,
    under_vmap,
    unwatched,
    wanted,
)
from . import raw
from .linear_act import linear_act

# -- a network, and how its calls run


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


@dataclass(frozen=True)
class NetworkCall:
    """What a call of a network needs besides tensors (no tuple: functorch would take it apart)."""

    spec: Spec
    backend: str
    precision: str
    save: bool
    #: what became of gradients of such calls; None where calls are compiled
    history: History | None = field(default=None, compare=False, repr=False)

    @functools.cached_property
    def groups(self) -> tuple[int, ...]:
        """Of each argument of `Network`, x and the call first, which group of gradients it belongs to."""
        return (Spec.INPUT, -2, *self.spec.groups)


@dataclass(eq=False)
class Decision:
    """How a network's calls of one kind run, and why not otherwise."""

    backend: str
    precision: str
    #: why the call is not one operation ("": it is)
    reason: str
    #: "network": as one operation; "layers": one operation a layer; "plain": by PyTorch's functions
    way: str = "network"
    #: the calls themselves, by whether they save
    calls: dict[bool, NetworkCall] = field(default_factory=dict)
    #: what became of their gradients; None where calls are compiled
    history: History | None = None

    def call(self, spec: Spec, save: bool) -> NetworkCall:
        """The call of a network: the same object for all of one kind."""
        found = self.calls.get(save)
        if found is None:
            found = self.calls[save] = NetworkCall(spec, self.backend, self.precision, save, self.history)
        return found


class Operands:
    """A network as operands of one operation.

    Attributes:
        layers: its layers.
        spec: what it is besides tensors.
        tensors: its tensors, in the order of the spec.
        present: those that are not None.
        parameters: whether these are all parameters, none a tensor that a transformation stands behind.
        elementwise: those that are factors of no matrix product.
        widest: rows of the widest layer's weight.
        decisions: who runs its calls, by the kind of call.
    """

    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers
        self.spec = spec_of(
            tuple([layer.word for layer in layers]), tuple([n for layer in layers for n in layer.numbers])
        )
        self.tensors: Sequence[Tensor | None] = [t for layer in layers for t in layer.tensors]
        self.present = [t for t in self.tensors if t is not None]
        self.parameters = all(type(t) is torch.nn.Parameter for t in self.present)
        self.elementwise = [t for layer in layers if layer.activation.has_tensors for t in layer.activation.tensors]
        self.elementwise += [t for layer in layers if layer.norm is not None for t in layer.norm[1:3]]
        self.widest = max(layer.weight.shape[0] for layer in layers) if layers else 0
        self.decisions: dict[tuple, Decision] = {}
        self._steps: list[tuple] | None = None

    def steps(self) -> list[tuple[Callable, Norm | None, bool]]:
        """The network for `in_sequence`, by PyTorch's functions."""
        if self._steps is None:
            self._steps = steps(self.layers, plain_layer)
        return self._steps

    def tracked(self, x: Tensor) -> bool:
        """Whether the network's output has a derivative."""
        if not torch.is_grad_enabled():
            return False
        if x.requires_grad:
            return True
        for t in self.present:
            if t.requires_grad:
                return True
        return False


# -- the choice


def _state() -> str:
    """Why the running transformation needs layers; empty where none does."""
    if torch.compiler.is_compiling():
        # Dynamo (2.13) takes a Function inside a transformation apart wrongly
        return "torch.func transforms differentiate layers" if inside_transform() else ""
    if transforms_active():
        return "torch.func transforms differentiate layers"
    return "forward mode differentiates layers" if forward_mode() else ""


def _why_not_norm(x: Tensor, norm: Norm, columns: int) -> str:
    """Why a norm between the layers cannot be part of the network; empty where it can."""
    name = NORMS[norm.kind].name
    if not norm.eps >= 0:
        return f"its {name} has eps={norm.eps}"
    for t in (norm.weight, norm.bias):
        if t is None:
            continue
        if t.device != x.device:
            return f"its {name} is not on the input's device, {x.device}"
        if t.dtype not in (x.dtype, compute_dtype(x.dtype)):
            return f"its {name} has {t.dtype}, the input {x.dtype}"
        if t.shape != (columns,):
            return f"its {name} has {list(t.shape)} elements, its output {columns} columns"
    return ""


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
        free = auto and not torch.compiler.is_compiling() and under_vmap() and backends.demanded() is None
        for first in operands.layers[:1]:  # what does not fit goes to the layers, which say what is wrong
            free = free and x.dim() > 0 and x.shape[-1] == first.weight.shape[-1] and x.dtype == first.weight.dtype
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
    key = (kind, operands.spec, *map(_described, operands.tensors))
    found = _decisions.get(key)
    if found is None:
        found = _decide(x, operands, direction, auto, cast)
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        _decisions[key] = found
    return found


def forget_derivatives() -> None:
    """Forgets which networks' gradients were differentiated: what was tried with a network is no sign of its use."""
    for decision in _decisions.values():
        if decision.history is not None:
            decision.history.calls = 0


def _decide(x: Tensor, operands: Operands, direction: str, auto: bool, cast: torch.dtype | None) -> Decision:
    layers = operands.layers
    backend, precision, reason = why_not(x, layers, direction=direction, cast=cast)
    if reason:
        return Decision(backend, precision, reason, "layers")
    if not auto:
        return Decision(backend, precision, "")
    dtype = x.dtype if cast is None else cast
    implementation = backends.implementation(backend)
    if cast is None and backends.demanded() is None and (reason := implementation.prefers_plain(dtype)):
        return Decision(backend, precision, reason, "plain")
    if reason := implementation.prefers_layers(layers, dtype):
        return Decision(backend, precision, reason, "layers")
    return Decision(backend, precision, "")


def autocast_type(x: Tensor, layers: Sequence[Layer]) -> torch.dtype | None:
    """The type that autocast wants of the network, None where it is off or leaves it alone, as each layer would."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    if not all(t.is_floating_point() and t.dtype != torch.float64 for t in (x, *(layer.weight for layer in layers))):
        return None
    return torch.get_autocast_dtype(kind)


def why_not(
    x: Tensor, layers: Sequence[Layer], *, direction: str = "forward", cast: torch.dtype | None = None
) -> tuple[str, str, str]:
    """Backend, precision, and the reason why the whole network cannot run there ("": it can).

    `direction`: "inference", "forward" (with its backward) or "loss". `cast`: the type that autocast gives input,
    weights and biases.

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
    for i, (weight, bias, activation, norm, skip) in enumerate(layers):
        tensors = [t for t in (weight, bias, *activation.tensors) if t is not None]
        if cast is None and any(t.dtype != x.dtype and t.is_floating_point() for t in (weight, bias) if t is not None):
            return "", "", f"layer {i}: its type is not the input's, {x.dtype}"
        if any(t.device != x.device for t in tensors):
            return "", "", f"layer {i}: it is not on the input's device, {x.device}"
        if weight.dim() != 2 or weight.shape[1] != math.prod(columns) or weight.shape[0] % activation.branches:
            reason = f"its weight {tuple(weight.shape)} does not fit an input of {math.prod(columns)} columns"
            return "", "", f"layer {i}: {reason}"
        before, columns = columns, (activation.outputs, weight.shape[0] // activation.branches)
        if skip and (activation.map.key == "identity" or columns != before):
            return "", "", f"layer {i}: a skip connection needs an activation, and an output of its input's columns"
        if norm is not None and (reason := _why_not_norm(x, norm, math.prod(columns))):
            return "", "", f"layer {i}: {reason}"
    backend, precision = backends.choose(layers[0].activation, x, layers[0].weight, record=False)
    for layer in layers[1:]:
        if reason := backends.refusal(backend, layer.activation.map.key, x.device, x.dtype):
            return backend, precision, reason
    reason = backends.implementation(backend).serves_network(x, layers, precision, direction)
    return backend, precision, reason


# -- the operation


def _run(name: str, call: NetworkCall, head: Sequence[Tensor | None], tensors: Sequence[Tensor | None], *rest):
    """The raw operation `name` of (*head, network, *rest).

    Where nothing looks at operations (a mode, a subclass, a transformation, the profiler), the backend is called
    directly: the dispatcher takes 20 us to pass a network's operands on.
    """
    spec = call.spec
    if unwatched(*head) and all_plain(tensors):
        last = rest[-1:]
        return getattr(backends.TABLE[call.backend], name)(*head, tensors, spec, *rest[:-1], call.precision, *last)
    if name == "mlp_loss":
        criterion, *rest = rest  # type: ignore[assignment]
        rest = (criterion.loss, criterion.constants, criterion.scale, *rest)
    run = getattr(raw, name)
    return run(*head, list(tensors), spec.words, spec.numbers, *rest[:-1], call.backend, call.precision, rest[-1])


def through_layers(x: Tensor, layers: Sequence[Layer], chosen: tuple[str, str] | None = None) -> Tensor:
    """Computes the network layer by layer, differentiable any number of times; `chosen` as in `linear_act`."""

    def one(weight, bias, activation):
        return lambda x: linear_act(x, weight, bias, activation, chosen)

    return in_sequence(x, steps(layers, one))


def _through_layers(x: Tensor, call: NetworkCall, tensors: Sequence[Tensor | None]) -> Tensor:
    """The same from a call's operands, weights and biases in the type of the rows."""
    layers = [
        layer._replace(weight=layer.weight.to(x.dtype), bias=None if layer.bias is None else layer.bias.to(x.dtype))
        for layer in call.spec.layers(tensors)
    ]
    return through_layers(x, layers, (call.backend, call.precision))


def _gradients(call: NetworkCall, tensors, results: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """gx and the gradients of `tensors` from a raw operation's results; None where not needed."""
    grads: list[Tensor | None] = [results[0] if needs[0] else None]

    def add(gradient):
        grads.append(gradient if needs[len(grads)] else None)

    for weight, bias, params, norm in gradients_by_layer(call.spec, results[1:]):
        add(weight)
        add(bias)
        for per_feature in params:
            gradient = None
            if needs[len(grads)]:
                p = tensors[len(grads) - 1]
                gradient = (per_feature.sum() if p.dim() == 0 else per_feature).to(p.dtype)
            grads.append(gradient)
        for gradient in norm:
            add(gradient)
    return grads


def _again(run, x: Tensor, tensors, needs: Sequence[bool], g: Tensor) -> list[Tensor | None]:
    """Gradients of `run()`, a composition of differentiable operations, that differentiate again."""
    inputs = [x, *tensors]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        y = run()
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(grads) if need else None for need in needs]


class Network(torch.autograd.Function):
    """Inputs: x [M, K], the call, then the network's tensors in the order of its spec."""

    @staticmethod
    def forward(x, call, *tensors):
        return _run("mlp", call, (x,), tensors, call.save)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.call, *tensors = inputs
        _, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(x, saved if ctx.call.save else None, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        call = ctx.call
        x, saved, *tensors = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        present = [True, False, *[t is not None for t in tensors]]
        needs = wanted(ctx, present, None if compiling else call.groups)
        needs = [needs[0], *needs[2:]]
        if not compiling and (torch.is_grad_enabled() or is_batched_cotangent(g)):
            if call.history is not None:
                call.history.differentiated()
            grads = _again(lambda: _through_layers(x, call, tensors), x, tensors, needs, g)
        else:
            groups = groups_needed(call.spec, needs[0], needs[1:])
            results = exactly(x.device, _run, "mlp_backward", call, (g, x), tensors, saved, groups)
            grads = _gradients(call, tensors, results, needs)
        return grads[0], None, *grads[1:]


class NetworkLoss(torch.autograd.Function):
    """Inputs: x, target, row weights or None, call, criterion, then as `Network`. One pass of both directions."""

    @staticmethod
    def forward(ctx, x, target, row_weights, call, criterion, *tensors):
        inputs = ctx.needs_input_grad
        needs = [inputs[0], *inputs[5:]]
        groups = groups_needed(call.spec, needs[0], needs[1:])
        loss, *results = _run("mlp_loss", call, (x, target, row_weights), tensors, criterion, groups)
        grads = _gradients(call, tensors, results, needs)
        ctx.call, ctx.criterion, ctx.count = call, criterion, len(tensors)
        ctx.save_for_backward(x, target, row_weights, *tensors, *grads)
        return loss.to(x.dtype) if x.dtype == torch.float64 else loss

    @staticmethod
    def backward(ctx, g):
        x, target, row_weights, *rest = ctx.saved_tensors
        tensors, grads = rest[: ctx.count], rest[ctx.count :]
        compiling = torch.compiler.is_compiling()
        if not compiling and (torch.is_grad_enabled() or is_batched_cotangent(g)):
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
            if ctx.call.history is not None:
                ctx.call.history.differentiated()

            def run():
                return plain_loss(_through_layers(x, ctx.call, tensors), target, row_weights, ctx.criterion)

            scaled = _again(run, x, tensors, needs, g)
        else:
            scaled = _scaled(grads, g, (x, *tensors))
        return scaled[0], None, None, None, None, *scaled[1:]


def _scaled(grads: Sequence[Tensor | None], g: Tensor, of: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients times the cotangent of a loss, in the types of what they belong to."""
    # never the saved tensors themselves: a retained graph would see what becomes of the parameters' gradients
    found = iter(multiplied([t for t in grads if t is not None], g))
    scaled = [None if t is None else next(found) for t in grads]
    return [t if t is None or o is None else t.to(o.dtype) for t, o in zip(scaled, of, strict=True)]


def _cast(x: Tensor, operands: Operands, backend: str) -> tuple[Tensor, Operands]:
    """To autocast's type, as each layer would do it for itself; weights only where the backend does not read any."""
    dtype = autocast_type(x, operands.layers)
    if dtype is None:
        return x, operands
    if not backends.implementation(backend).reads_any_weights:
        operands = Operands([
            layer._replace(weight=layer.weight.to(dtype), bias=None if layer.bias is None else layer.bias.to(dtype))
            for layer in operands.layers
        ])  # fmt: skip
    return x.to(dtype), operands


def network(x: Tensor, operands: Operands, decision: Decision, save: bool) -> Tensor:
    """x [.., K] through all layers as one operation, where `decide` has found that the backend serves."""
    x, operands = _cast(x, operands, decision.backend)
    tensors = operands.tensors
    track = operands.tracked(x)
    call = decision.call(operands.spec, save and track)
    backends.record_network(x, operands.layers, call.backend, call.precision)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        run = Network.apply if track else Network.forward
        y = exactly(x.device, run, rows, call, *tensors)[0]
    elif track:
        applied = apply_to_parameters if operands.parameters else apply
        y = exactly(x.device, applied, Network, rows, call, *tensors)[0]
    else:
        y = exactly(x.device, Network.forward, rows, call, *tensors)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


#: rows that plain PyTorch takes through all layers at a time, so that what they are between two layers stays in cache:
#: at least, and for each of many threads
_PLAIN_TILE, _PLAIN_TILE_OF_A_THREAD = 2048, 512


def plain(x: Tensor, operands: Operands, reason: str) -> Tensor:
    """x [.., K] through all layers by PyTorch's own functions, tile by tile; differentiable any number of times."""
    backends.record_plain_network(x, operands.layers, reason)
    if reason is _FEW_ROWS.reason:  # no autocast, no transformation, less than a tile
        if operands.elementwise:
            backends.refuse_freed(*operands.elementwise)
        return in_sequence(x, operands.steps())
    return exactly(x.device, _in_tiles, x, operands)


def _in_tiles(x: Tensor, operands: Operands) -> Tensor:
    backends.refuse_freed(*operands.elementwise)  # matrix products refuse theirs
    if torch.compiler.is_compiling() or transforms_active():
        return in_sequence(x, operands.steps())
    rows, tile = x.numel() // max(1, x.shape[-1]), max(_PLAIN_TILE, _PLAIN_TILE_OF_A_THREAD * torch.get_num_threads())
    if rows <= tile or operands.tracked(x):  # gradients of tiles would have to be added
        return in_sequence(x, operands.steps())
    parts = -(-rows // tile)
    tiles = x.reshape(rows, x.shape[-1]).split(-(-rows // parts))
    y = torch.cat([in_sequence(part, operands.steps()) for part in tiles])
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


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
    call = decision.call(operands.spec, False)
    backends.record_network(x, operands.layers, call.backend, call.precision, criterion.loss)
    args = (x, target, row_weights, call, criterion, *operands.tensors)
    if torch.compiler.is_compiling():
        return exactly(x.device, NetworkLoss.apply, *args)
    return exactly(x.device, apply, NetworkLoss, *args)
