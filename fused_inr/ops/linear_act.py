"""Fused linear + activation: y = f(x W^T + b; p), differentiable any number of times.

`LinearAct` is the fused operation with its fused first backward. When that backward must itself be differentiated it
is built from `act_map`, a map of any level whose backward is the map of the next, and matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import backends
from ..activations import Activation, lookup
from ..activations.spec import MAX_LEARNABLE_LEVEL, MAX_LEVEL
from ..backends.base import group_branches
from ..network import compute_dtype, plain_layer
from ..pytorch import (
    apply,
    exactly,
    forward_levels,
    forward_mode,
    inside_transform,
    is_batched_cotangent,
    transforms_active,
    under_vmap,
    unwatched,
    wanted,
)
from . import raw


@dataclass(frozen=True)
class LayerCall:
    """What a call needs besides tensors (no tuple: functorch would take it apart)."""

    activation: str
    constants: tuple[float, ...]
    backend: str
    precision: str
    #: what is stored for the backward: "preactivations", "derivatives" (for a fused first backward alone), "" (nothing)
    keep: str
    #: whether Dynamo traces the call: then pre-activations are no output with a derivative of its own
    compiled: bool = False

    @property
    def linked(self) -> bool:
        """Whether stored pre-activations are an output with a derivative of its own."""
        return self.keep == "preactivations" and not self.compiled


def _run_linear_act(x, weight, bias, params, constants, activation, backend, precision, keep):
    if unwatched(x, weight, bias, *params):
        map = lookup(activation)
        return backends.TABLE[backend].linear_act(x, weight, bias, params, constants, map, precision, keep)
    return raw.linear_act(x, weight, bias, params, constants, activation, backend, precision, keep)


def _run_linear_act_backward(g, x, weight, bias, params, constants, z, activation, backend, precision, needs):
    if unwatched(g, x, weight, bias, z, *params):
        run = backends.TABLE[backend].linear_act_backward
        return run(g, x, weight, bias, params, constants, z, lookup(activation), precision, needs)
    return raw.linear_act_backward(g, x, weight, bias, params, constants, z, activation, backend, precision, needs)


def _run_act_map(inputs, params, constants, activation, backend, level, learnable):
    if inputs[0].dim() == 2 and unwatched(*inputs, *params):
        return backends.TABLE[backend].act_map(inputs, params, constants, lookup(activation), level, learnable)
    return raw.act_map(inputs, params, constants, activation, backend, level, learnable)


def _refuse_nested_forward_mode(config: LayerCall) -> None:
    # PyTorch computes wrong values silently for a Function here (pytorch issue 197867)
    if forward_levels() > 1:
        raise NotImplementedError(
            "forward mode over forward mode (order 2) of "
            f"{lookup(config.activation).name} on backend {config.backend!r}: "
            "use reverse mode inside, e.g. torch.func.hessian (jacfwd of jacrev) or jacrev of jacfwd"
        )


# -- pieces of derivatives


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2)


def _by_pytorch(config: LayerCall) -> bool:
    """Whether bare products are PyTorch's, which are differentiable as they are: on a CPU each of ours costs more
    around it than it saves (`fused-inr bench calls --only maml`)."""
    return config.backend in ("cpu", "reference")


def _linear(config: LayerCall, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, differentiable, by the backend that runs everything else."""
    if _by_pytorch(config):
        return x @ _transposed(weight)
    precision = backends.products_of(config.precision, x.dtype)
    if not torch.is_grad_enabled() and not forward_mode():
        return _run_linear_act(x, weight, None, [], [], "identity", config.backend, precision, "")[0]
    plain = replace(config, activation="identity", constants=(), precision=precision, keep="")
    return apply(LinearAct, x, weight, None, plain)[0]


def _weight_gradient(config: LayerCall, gz: Tensor, x: Tensor) -> Tensor:
    """gz^T x, differentiable: with `_linear` a closed set, each the derivative of the other."""
    if _by_pytorch(config):
        return _transposed(gz) @ x
    if not torch.is_grad_enabled() and not forward_mode():
        return WeightGradient.forward(config, gz, x)
    return apply(WeightGradient, config, gz, x)


def _linear_backward(config: LayerCall, needs, gz: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype | None):
    gx = _linear(config, gz, _transposed(weight.to(gz.dtype))).to(x.dtype) if needs[0] else None
    gw = _weight_gradient(config, gz, x.to(gz.dtype)).to(weight.dtype) if needs[1] else None
    gb = gz.sum(-2).to(bias_dtype) if needs[2] else None
    return gx, gw, gb


class WeightGradient(torch.autograd.Function):
    """gz [.., M, N], x [.., M, K] to gz^T x [.., N, K]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(config, gz, x):
        shape = (*x.shape[:-2], gz.shape[-1], x.shape[-1])
        weight = x.new_empty(1).expand(shape)  # only its shape counts
        precision = backends.products_of(config.precision, x.dtype)
        return _run_linear_act_backward(
            gz, x, weight, None, [], [], gz, "identity", config.backend, precision, [False, True, False, False]
        )[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.config, gz, x = inputs
        ctx.save_for_backward(gz, x)
        ctx.save_for_forward(gz, x)

    @staticmethod
    def backward(ctx, g):
        gz, x = ctx.saved_tensors
        _, need_gz, need_x = wanted(ctx, (False, True, True))
        d_gz = _linear(ctx.config, x, g) if need_gz else None
        d_x = _linear(ctx.config, gz, _transposed(g)) if need_x else None
        return None, d_gz, d_x

    @staticmethod
    def jvp(ctx, _, t_gz, t_x):
        gz, x = ctx.saved_tensors
        terms = [] if t_gz is None else [_weight_gradient(ctx.config, t_gz, x)]
        if t_x is not None:
            terms.append(_weight_gradient(ctx.config, gz, t_x))
        return sum(terms[1:], terms[0])


class Preactivation(torch.autograd.Function):
    """Gives a pre-activation that was computed without autograd its place in the graph: z = x W^T + b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, z, config):
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, ctx.config = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, gz):
        x, weight = ctx.saved_tensors
        needs = wanted(ctx, (True, True, ctx.bias_dtype is not None, True, False))
        return *exactly(gz.device, _linear_backward, ctx.config, needs, gz, x, weight, ctx.bias_dtype), None, None

    @staticmethod
    def jvp(ctx, tx, tw, tb, *_):
        x, weight = ctx.saved_tensors
        return _tangent_of_z(ctx.config, x, weight, tx, tw, tb)


def _tangent_of_z(
    config: LayerCall, x: Tensor, weight: Tensor, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None
) -> Tensor:
    return exactly(x.device, _linear_jvp, config, x, weight, tx, tw, tb)


def _linear_jvp(config, x, weight, tx, tw, tb) -> Tensor:
    dtype = compute_dtype(x.dtype)
    terms = []
    if tx is not None:
        terms.append(_linear(config, tx.to(dtype), weight.to(dtype)))
    if tw is not None:
        terms.append(_linear(config, x.to(dtype), tw.to(dtype)))
    if tb is not None:
        terms.append(tb.to(dtype).unsqueeze(-2).expand(*x.shape[:-1], weight.shape[-2]))
    return sum(terms[1:], terms[0]) if terms else x.new_zeros((*x.shape[:-1], weight.shape[-2]), dtype=dtype)


class ActMap(torch.autograd.Function):
    """`act_map` with its backward (the next level) and its forward derivative (read off the level after that).

    Inputs: config, level, learnable, number of row/parameter groups, then the groups, then the parameters.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(config, level, learnable, count, *tensors):
        inputs, params = tensors[:count], tensors[count:]
        out = _run_act_map(
            list(inputs), list(params), config.constants, config.activation, config.backend, level, learnable
        )
        return tuple(_like_parameters(out, config, level, learnable, params))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.config, ctx.level, ctx.learnable, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        tensors, count = ctx.saved_tensors, ctx.count
        inputs, params = tensors[:count], tensors[count:]
        grads = apply_map(ctx.config, ctx.level + 1, ctx.learnable, [*inputs, *cotangents], params)
        gz, *rest = grads
        n = len(params) if ctx.learnable else 0
        return None, None, None, None, gz, *rest[n:], *(rest[:n] if n else [None] * len(params))

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse_nested_forward_mode(ctx.config)
        tensors, count = ctx.saved_tensors, ctx.count
        inputs, params = tensors[:count], tensors[count:]
        d = [
            torch.zeros_like(t) if d is None and t is not None else d
            for t, d in zip(tensors, tangents[4:], strict=True)
        ]
        return _pushforward(ctx.config, ctx.level, ctx.learnable, inputs, params, d[:count], d[count:])


def _like_parameters(out: Sequence[Tensor], config: LayerCall, level: int, learnable: bool, params) -> list[Tensor]:
    """Gradients of parameters come per feature; those of one number a layer are summed to it."""
    out = list(out)
    if learnable and level:
        for j, p in enumerate(params):
            if p.dim() == 0:
                out[1 + j] = out[1 + j].sum()
            out[1 + j] = out[1 + j].to(p.dtype)
    return out


def _pushforward(config, level, learnable, inputs, params, d_inputs, d_params) -> tuple[Tensor, ...]:
    """Tangents of the map's outputs: J t is the gradient of <t, J^T c> with respect to c, one level further up."""
    _, outputs = group_branches(lookup(config.activation), level, learnable)
    z = inputs[0]
    features = z.shape[-1] // lookup(config.activation).branches
    position = iter(params)
    zeros = [z.new_zeros((*z.shape[:-1], k * features)) if k else torch.zeros_like(next(position)) for k in outputs]
    first, *others = d_inputs
    tangents = [first, *(d_params if learnable else ()), *others]
    results = apply_map(config, level + 2, learnable, [*inputs, *zeros, *tangents], params)
    return tuple(results[-len(outputs) :])


def _composite_map(config: LayerCall, level: int, learnable: bool, inputs, params) -> list[Tensor]:
    out = backends.reference_map(lookup(config.activation), inputs, params, config.constants, level, learnable)
    return _like_parameters(out, config, level, learnable, params)


def apply_map(config: LayerCall, level: int, learnable: bool, inputs: Sequence[Tensor], params) -> list[Tensor]:
    """The map of a level, differentiable; beyond the generated levels PyTorch differentiates the highest one."""
    top = MAX_LEARNABLE_LEVEL if learnable else MAX_LEVEL
    if level > top:
        raise NotImplementedError(
            f"order {level} of {lookup(config.activation).name} on backend {config.backend!r}: "
            "use fused_inr.backends.use('reference') or lower the order"
        )
    if any(t is not None and is_batched_cotangent(t) for t in (*inputs, *params)):
        # is_grads_batched: PyTorch's older vmap, which has no rule for a list of tensors
        return _composite_map(config, level, learnable, inputs, params)
    if level + (2 if forward_mode() else 1) > top and (torch.is_grad_enabled() or forward_mode()):
        return _composite_map(config, level, learnable, inputs, params)
    if not torch.is_grad_enabled() and not forward_mode():
        out = _run_act_map(
            list(inputs), list(params), config.constants, config.activation, config.backend, level, learnable
        )
        return _like_parameters(out, config, level, learnable, params)
    return list(apply(ActMap, config, level, learnable, len(inputs), *inputs, *params))


# -- the fused operation


def _bare_preactivation(config: LayerCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.no_grad():
        _, z = _run_linear_act(x, weight, bias, [], [], "identity", config.backend, config.precision, "preactivations")
    return z


def _saved(ctx):
    x, weight, bias, z, *params = ctx.saved_tensors
    return x, weight, bias, z, params


def _setup(ctx, inputs, output):
    """Saves what the backward needs."""
    x, weight, bias, config, *params = inputs
    _, z = output
    if not config.linked:
        ctx.mark_non_differentiable(z)
    ctx.config = config
    z = z if config.keep else None
    ctx.save_for_backward(x, weight, bias, z, *params)
    ctx.save_for_forward(x, weight, bias, z, *params)
    ctx.set_materialize_grads(False)


def _differentiable_backward(config, needs, g, g_z, x, weight, bias, z, params):
    """The same gradients, out of pieces that differentiate again."""
    gp: list[Tensor | None] = [None] * len(params)
    gz = g_z
    if config.activation == "identity":
        gz = g.to(compute_dtype(g.dtype))
    elif g is not None:
        if not config.linked:
            stored = z if config.keep == "preactivations" else None
            z = _bare_preactivation(config, x, weight, bias) if stored is None else stored
            z = Preactivation.apply(x, weight, bias, z, config)
        # not `needs`: the gradient of x depends on the parameters too, in an outer transformation perhaps
        learnable = any(p is not None for p in params)
        values = _all_tensors(config, params, z) if learnable else params
        gz, *rest = apply_map(config, 1, learnable, [z, g.to(z.dtype)], values)
        gp[: len(rest)] = rest
        gz = gz if g_z is None else gz + g_z
    linear = _linear_backward(config, needs, gz, x, weight, None if bias is None else bias.dtype)
    return *linear, None, *((gp[j] if n else None) for j, n in enumerate(needs[3:]))


def _all_tensors(config: LayerCall, params, like: Tensor) -> list[Tensor]:
    """Where some parameters are learnable, the constants among the others become tensors too."""
    return [like.new_tensor(c) if p is None else p for p, c in zip(params, config.constants, strict=True)]


def _fused_backward(config, needs, g, g_z, x, weight, bias, z, params):
    if g_z is not None:
        return _fused_backward_from_z(config, needs, g, g_z, x, weight, bias, z, params)
    if config.activation == "identity" and g.dtype.itemsize >= 4:
        z = g  # the map does not look at z: nothing to recompute
    gx, gw, gb, gp = _run_linear_act_backward(
        g, x, weight, bias, list(params), config.constants, z, config.activation, config.backend, config.precision,
        [*needs[:3], any(needs[3:])],
    )  # fmt: skip
    grads = []
    for j, n in enumerate(needs[3:]):
        grad = None
        if n:
            grad = gp[..., j, :]
            if grad.dim() == 2:
                grad = grad.sum(0)
            grad = (grad.sum() if params[j].dim() == 0 else grad).to(params[j].dtype)
        grads.append(grad)
    return gx if needs[0] else None, gw if needs[1] else None, gb if needs[2] else None, None, *grads


def _fused_backward_from_z(config, needs, g, g_z, x, weight, bias, z, params):
    """With a cotangent of z itself, from a derivative of higher order: both meet before the matrix products."""
    grads: list[Tensor | None] = [None] * len(params)
    if g is not None:
        learnable = any(needs[3:])
        values = _all_tensors(config, params, z) if learnable else params
        gz, *gp = apply_map(config, 1, learnable, [z, g.to(z.dtype)], values)
        grads = [gp[j] if n else None for j, n in enumerate(needs[3:])]
        # gz is ours; under vmap the other may be the larger one
        g_z = gz + g_z if transforms_active() else gz.add_(g_z)
    gx, gw, gb, _ = _run_linear_act_backward(
        g_z, x, weight, bias, [], [], z, "identity", config.backend, config.precision, [*needs[:3], False]
    )
    return gx if needs[0] else None, gw if needs[1] else None, gb if needs[2] else None, None, *grads


def _backward(ctx, g, g_z):
    """Gradients for the cotangents of y and z: fused, or of pieces where they are differentiated again."""
    if not ctx.config.linked:
        g_z = None  # Dynamo gives zeros for an output without a derivative
    if g is None and g_z is None:
        return (None,) * len(ctx.needs_input_grad)
    x, weight, bias, z, params = _saved(ctx)
    needs = wanted(ctx, (True, True, bias is not None, False, *(p is not None for p in params)))
    needs = needs[:3] + needs[4:]
    if not any(needs):
        return (None,) * len(ctx.needs_input_grad)
    differentiate = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    run = _differentiable_backward if differentiate else _fused_backward
    return exactly(x.device, run, ctx.config, needs, g, g_z, x, weight, bias, z, params)


class LinearAct(torch.autograd.Function):
    """Inputs: x, weight, bias, config, parameters (None where constant). Outputs: y, z (empty unless saved).

    z is an output with a derivative, so that what a higher derivative adds to its gradient meets the first-order
    part before the matrix products, not after.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, config, *params):
        return _run_linear_act(
            x, weight, bias, list(params), config.constants, config.activation, config.backend, config.precision,
            config.keep
        )  # fmt: skip

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx, tx, tw, tb, _, *d_params):
        _refuse_nested_forward_mode(ctx.config)
        x, weight, bias, z, params = _saved(ctx)
        config = ctx.config
        tz = _tangent_of_z(config, x, weight, tx, tw, tb)
        if config.activation == "identity":
            return tz.to(x.dtype), None
        if config.keep != "preactivations":
            z = Preactivation.apply(x, weight, bias, _bare_preactivation(config, x, weight, bias), config)
        learnable = any(p is not None for p in params)
        values = _all_tensors(config, params, z) if learnable else params
        d_values = (
            [torch.zeros_like(v) if d is None else d for v, d in zip(values, d_params, strict=True)]
            if learnable
            else []
        )
        (ty,) = _pushforward(config, 0, learnable, [z], values, [tz], d_values)
        return ty.to(x.dtype), tz if config.keep == "preactivations" else None


class _CompiledLinearAct(torch.autograd.Function):
    """The twin that Dynamo accepts: it refuses a Function with a jvp (PyTorch 2.13)."""

    @staticmethod
    def forward(x, weight, bias, config, *params):
        return LinearAct.forward(x, weight, bias, config, *params)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


#: rows times features up to which, on a CPU, a layer whose map is at most so many operations is faster by PyTorch's own
#: functions: a Function of Python's costs more than it saves (`fused-inr bench calls --only one-layer-16`)
_FEW, _LIGHT = 1 << 14, 2
_FEW_ROWS = "a layer of so few rows is faster by PyTorch's own functions"


def _few(x: Tensor, weight: Tensor, activation: Activation) -> bool:
    """Whether the layer is one of few rows and a light map, in float32 on a CPU."""
    return (
        x.dtype is torch.float32
        and x.dim() == 2
        and x.shape[0] * weight.shape[-2] <= _FEW
        and x.device.type == "cpu"
        and not activation.has_tensors
        and activation.map.operations <= _LIGHT
        and not torch.is_autocast_enabled("cpu")
    )


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, chosen: tuple[str, str] | None = None
) -> Tensor:
    """`fused_inr.functional.linear_act` without its checks: x [M, K] or [G, M, K], weight and bias to match.

    `chosen`: backend and precision, where a forward has settled them.
    """
    compiling = torch.compiler.is_compiling()
    if transforms_active() and not compiling and backends.demanded() is None and under_vmap():
        # one point or one network at a time: what a Function costs each transform is more than fusion saves
        backends.record_plain(activation, x, weight, "under torch.func.vmap plain PyTorch is faster")
        return exactly(x.device, plain_layer(weight, bias, activation), x)
    if chosen is None and x.dtype is torch.float64 and (reason := backends.why_plain(x.device, x.dtype)):
        backends.record_plain(activation, x, weight, reason)
        backends.refuse_freed(x, weight, bias, *activation.tensors)
        return exactly(x.device, plain_layer(weight, bias, activation), x)
    if chosen is None and not compiling and _few(x, weight, activation) and backends.demanded() is None:
        backends.record_plain(activation, x, weight, _FEW_ROWS)
        return plain_layer(weight, bias, activation)(x)
    backend, precision = chosen or backends.choose(activation, x, weight)
    params = activation.tensors
    track = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (activation.has_tensors and any(p is not None and p.requires_grad for p in params))
    )
    if compiling and inside_transform():
        # Dynamo (2.13) takes a Function inside a transform apart wrongly; it fuses plain PyTorch itself
        return exactly(x.device, plain_layer(weight, bias, activation), x)
    if not track and (compiling or not (transforms_active() or forward_mode())):
        tensors = list(params)
        key, constants = activation.map.key, activation.constants
        args = (x, weight, bias, tensors, constants, key, backend, precision, "")
        return exactly(x.device, _run_linear_act, *args)[0]
    keep = ""
    if track and activation.map.key != "identity":
        keep = backends.implementation(backend).keeps(x.dtype, activation.has_tensors)
    config = LayerCall(activation.map.key, activation.constants, backend, precision, keep, compiling)
    if compiling:
        return exactly(x.device, _CompiledLinearAct.apply, x, weight, bias, config, *params)[0]
    return exactly(x.device, apply, LinearAct, x, weight, bias, config, *params)[0]
