"""The raw operations: no autograd, one implementation a backend, registered so that PyTorch's transforms see them.

`torch.ops.fused_inr.linear_act`, `.linear_act_backward`, `.act_map`; arguments and layouts: docs/architecture.md,
sections 2 and 3. `.mlp`, `.mlp_backward`, `.mlp_loss`: section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..activations import lookup
from ..backends.base import group_branches
from ..network import Criterion, Spec, compute_dtype, spec_of
from . import flops

_LIB = torch.library.Library("fused_inr", "DEF")
_LIB.define(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, Tensor?[] params, float[] constants, str activation, "
    "str backend, str precision, str keep) -> (Tensor, Tensor)"
)
_LIB.define(
    "linear_act_backward(Tensor g, Tensor x, Tensor weight, Tensor? bias, Tensor?[] params, float[] constants, "
    "Tensor? z, str activation, str backend, str precision, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define(
    "act_map(Tensor[] inputs, Tensor?[] params, float[] constants, str activation, str backend, int level, "
    "bool learnable) -> Tensor[]"
)
_NETWORK = "Tensor?[] tensors, str[] words, float[] numbers"
_LIB.define(f"mlp(Tensor x, {_NETWORK}, str backend, str precision, bool save) -> (Tensor, Tensor)")
_LIB.define(
    f"mlp_backward(Tensor g, Tensor x, {_NETWORK}, Tensor? saved, str backend, str precision, bool[] needs) -> Tensor[]"
)
_LIB.define(
    f"mlp_loss(Tensor x, Tensor target, Tensor? row_weights, {_NETWORK}, str loss, float[] loss_constants, "
    "float scale, str backend, str precision, bool[] needs) -> Tensor[]"
)
Params = Sequence[Tensor | None]


@torch.library.impl(_LIB, "linear_act", "CompositeExplicitAutograd")
def _linear_act(x, weight, bias, params, constants, activation, backend, precision, keep):
    return backends.implementation(backend).linear_act(
        x, weight, bias, params, constants, lookup(activation), precision, keep
    )


@torch.library.impl(_LIB, "linear_act_backward", "CompositeExplicitAutograd")
def _linear_act_backward(g, x, weight, bias, params, constants, z, activation, backend, precision, needs):
    return backends.implementation(backend).linear_act_backward(
        g, x, weight, bias, params, constants, z, lookup(activation), precision, needs
    )


@torch.library.impl(_LIB, "act_map", "CompositeExplicitAutograd")
def _act_map(inputs, params, constants, activation, backend, level, learnable):
    run = backends.implementation(backend).act_map
    map, shape = lookup(activation), inputs[0].shape[:-1]
    if len(shape) == 1:
        return run(inputs, params, constants, map, level, learnable)
    branches, outputs = group_branches(lookup(activation), level, learnable)
    rows = [t.reshape(-1, t.shape[-1]) if k else t for t, k in zip(inputs, branches, strict=True)]
    results = run(rows, params, constants, map, level, learnable)
    return [t.reshape(*shape, t.shape[-1]) if k else t for t, k in zip(results, outputs, strict=True)]


def _spec(words, numbers) -> Spec:
    return spec_of(tuple(words), tuple(numbers))


@torch.library.impl(_LIB, "mlp", "CompositeExplicitAutograd")
def _mlp(x, tensors, words, numbers, backend, precision, save):
    return backends.implementation(backend).mlp(x, tensors, _spec(words, numbers), precision, save)


@torch.library.impl(_LIB, "mlp_backward", "CompositeExplicitAutograd")
def _mlp_backward(g, x, tensors, words, numbers, saved, backend, precision, needs):
    run = backends.implementation(backend).mlp_backward
    return run(g, x, tensors, _spec(words, numbers), saved, precision, needs)


@torch.library.impl(_LIB, "mlp_loss", "CompositeExplicitAutograd")
def _mlp_loss(
    x, target, row_weights, tensors, words, numbers, loss, loss_constants, scale, backend, precision, needs
):  # fmt: skip
    criterion = Criterion(loss, tuple(loss_constants), scale)
    run = backends.implementation(backend).mlp_loss
    return run(x, target, row_weights, tensors, _spec(words, numbers), criterion, precision, needs)


linear_act = torch.ops.fused_inr.linear_act.default
linear_act_backward = torch.ops.fused_inr.linear_act_backward.default
act_map = torch.ops.fused_inr.act_map.default
mlp = torch.ops.fused_inr.mlp.default
mlp_backward = torch.ops.fused_inr.mlp_backward.default
mlp_loss = torch.ops.fused_inr.mlp_loss.default


# -- shapes, for fake tensors


@torch.library.register_fake("fused_inr::linear_act", lib=_LIB)
def _(x, weight, bias, params, constants, activation, backend, precision, keep):
    map = lookup(activation)
    features = weight.shape[-2] // map.branches
    y = x.new_empty((*x.shape[:-1], map.outputs * features))
    if keep == "derivatives":
        return y, x.new_empty((*x.shape[:-1], map.outputs * map.branches * features))
    z_shape = (*x.shape[:-1], map.branches * features) if keep else (0,)
    return y, x.new_empty(z_shape, dtype=compute_dtype(x.dtype))


@torch.library.register_fake("fused_inr::linear_act_backward", lib=_LIB)
def _(g, x, weight, bias, params, constants, z, activation, backend, precision, needs):
    map = lookup(activation)
    features = weight.shape[-2] // map.branches
    gx = x.new_empty(x.shape if needs[0] else (0,))
    gw = weight.new_empty(weight.shape if needs[1] else (0,))
    gb = weight.new_empty(weight.shape[:-1] if needs[2] else (0,), dtype=(weight if bias is None else bias).dtype)
    gp_shape = (*weight.shape[:-2], map.n_params, features) if needs[3] else (0,)
    return gx, gw, gb, x.new_empty(gp_shape, dtype=compute_dtype(x.dtype))


@torch.library.register_fake("fused_inr::mlp", lib=_LIB)
def _(x, tensors, words, numbers, backend, precision, save):
    y = x.new_empty((x.shape[0], _spec(words, numbers).layers(tensors)[-1].columns))
    size = torch.library.get_ctx().new_dynamic_size() if save else 0  # what a backend stores is its own affair
    return y, x.new_empty((size,), dtype=compute_dtype(x.dtype))


def _fake_gradients(x, tensors, words, numbers, needs, out=None):
    """out: the type of gradients, where it is not that of what they belong to."""
    dtype = compute_dtype(x.dtype)

    def of(t, needed):
        if t is None:
            return x.new_empty(0, dtype=dtype)
        return t.new_empty(t.shape if needed else (0,), dtype=out)

    grads = [of(x, needs[0])]
    for weight, bias, activation, norm, _ in _spec(words, numbers).layers(tensors):
        grads += [of(weight, needs[1]), of(bias, needs[2])]
        if activation.map.n_params:
            shape = (activation.map.n_params, weight.shape[0] // activation.branches) if needs[3] else (0,)
            grads.append(x.new_empty(shape, dtype=dtype))
        if norm is not None:
            grads += [of(norm.weight, needs[4]), of(norm.bias, needs[4])]
    return grads


@torch.library.register_fake("fused_inr::mlp_backward", lib=_LIB)
def _(g, x, tensors, words, numbers, saved, backend, precision, needs):
    return _fake_gradients(x, tensors, words, numbers, needs)


@torch.library.register_fake("fused_inr::mlp_loss", lib=_LIB)
def _(x, target, row_weights, tensors, words, numbers, loss, loss_constants, scale, backend, precision, needs):
    value = x.new_empty((), dtype=compute_dtype(x.dtype))
    out = torch.float32 if x.dtype == torch.float16 else None  # a loss scaler's factor comes later
    return [value, *_fake_gradients(x, tensors, words, numbers, needs, out)]


@torch.library.register_fake("fused_inr::act_map", lib=_LIB)
def _(inputs, params, constants, activation, backend, level, learnable):
    z = inputs[0]
    features = z.shape[-1] // lookup(activation).branches
    _, outputs = group_branches(lookup(activation), level, learnable)
    return [z.new_empty((*z.shape[:-1], k * features) if k else (features,)) for k in outputs]


# -- vmap: onto the rows where only rows are batched, else onto the leading batch of weights


def _batched(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The vmapped dimension first; what is not batched is expanded (stride 0)."""
    return t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)


def _front(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    return None if t is None else _batched(t, dim, size)


def _any(dims) -> bool:
    return any(d is not None for d in dims)


def _one_by_one(op, info, in_dims, args):
    """The fallback for batched activation parameters: one call an element."""

    def at(arg, dim, i):
        if isinstance(arg, list | tuple) and isinstance(dim, list | tuple):
            return [at(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    results = [op(*(at(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    stacked = [torch.stack(tensors) for tensors in zip(*results, strict=True)]
    if isinstance(results[0], tuple):
        return tuple(stacked), (0,) * len(stacked)
    return stacked, [0] * len(stacked)


def _fold_rows(t: Tensor) -> Tensor:
    """[V, M, K] to [V M, K]; [V, G, M, K] to [G, V M, K]."""
    if t.dim() == 3:
        return t.flatten(0, 1)
    return t.movedim(0, 1).flatten(1, 2)


def _unfold_rows(t: Tensor, size: int) -> Tensor:
    if t.dim() == 2:
        return t.unflatten(0, (size, -1 if t.shape[0] else 0))
    return t.unflatten(1, (size, -1 if t.shape[1] else 0)).movedim(1, 0)


def _merge_batch(t: Tensor | None, own_dims: int) -> Tensor | None:
    """[V, ...] or [V, G, ...] to [V G, ...]."""
    return t if t is None or t.dim() == own_dims + 1 else t.flatten(0, 1)


def _split_batch(t: Tensor, size: int, own_dims: int, batched: bool) -> Tensor:
    return t.unflatten(0, (size, -1)) if batched and t.dim() == own_dims + 1 else t


@torch.library.register_vmap("fused_inr::linear_act", lib=_LIB)
def _(info, in_dims, x, weight, bias, params, constants, activation, backend, precision, keep):
    v = info.batch_size
    rest = (constants, activation, backend, precision, keep)
    if _any(in_dims[3] or ()):
        return _one_by_one(linear_act, info, in_dims, (x, weight, bias, params, *rest))
    if in_dims[1] is None and in_dims[2] is None:
        y, z = linear_act(_fold_rows(_batched(x, in_dims[0], v)), weight, bias, params, *rest)
        y = _unfold_rows(y, v)
        return (y, _unfold_rows(z, v) if keep else z), (0, 0 if keep else None)
    batched = x.dim() - (in_dims[0] is not None) == 3
    x, weight, bias = (_front(t, d, v) for t, d in zip((x, weight, bias), in_dims, strict=False))
    y, z = linear_act(_merge_batch(x, 2), _merge_batch(weight, 2), _merge_batch(bias, 1), params, *rest)
    y = _split_batch(y, v, 2, batched)
    return (y, _split_batch(z, v, 2, batched) if keep else z), (0, 0 if keep else None)


@torch.library.register_vmap("fused_inr::linear_act_backward", lib=_LIB)
def _(info, in_dims, g, x, weight, bias, params, constants, z, activation, backend, precision, needs):
    v = info.batch_size
    rest = (activation, backend, precision, needs)
    if _any(in_dims[4] or ()):
        return _one_by_one(linear_act_backward, info, in_dims, (g, x, weight, bias, params, constants, z, *rest))
    batched = x.dim() - (in_dims[1] is not None) == 3
    g, x, weight, bias = (_front(t, d, v) for t, d in zip((g, x, weight, bias), in_dims, strict=False))
    z = _front(z, in_dims[6], v)
    if not any(needs[1:]) and in_dims[2] is None and in_dims[3] is None:
        first = weight[0] if weight is not None else None
        gx, *others = linear_act_backward(
            _fold_rows(g), _fold_rows(x), first, None if bias is None else bias[0], params, constants,
            None if z is None else _fold_rows(z), *rest,
        )  # fmt: skip
        return (_unfold_rows(gx, v), *others), (0, None, None, None)
    results = linear_act_backward(
        _merge_batch(g, 2), _merge_batch(x, 2), _merge_batch(weight, 2), _merge_batch(bias, 1), params, constants,
        _merge_batch(z, 2), *rest,
    )  # fmt: skip
    own = (2, 2, 1, 2)
    out = tuple(_split_batch(t, v, o, batched) if n else t for t, o, n in zip(results, own, needs, strict=True))
    return out, tuple(0 if n else None for n in needs)


@torch.library.register_vmap("fused_inr::act_map", lib=_LIB)
def _(info, in_dims, inputs, params, constants, activation, backend, level, learnable):
    v = info.batch_size
    branches, outputs = group_branches(lookup(activation), level, learnable)
    parameter_batched = any(d is not None for d, k in zip(in_dims[0], branches, strict=True) if not k)
    if learnable or parameter_batched or _any(in_dims[1] or ()):
        args = (inputs, params, constants, activation, backend, level, learnable)
        return _one_by_one(act_map, info, in_dims, args)
    rows = [_batched(t, d, v) for t, d in zip(inputs, in_dims[0], strict=True)]
    shape = rows[0].shape[:-1]
    results = act_map([t.reshape(-1, t.shape[-1]) for t in rows], params, constants, activation, backend, level, False)
    return [t.reshape(*shape, t.shape[-1]) for t in results], [0] * len(outputs)


flops.register()
