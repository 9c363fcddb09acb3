"""The reference: plain PyTorch from the same formulas, on any device, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import ActivationMap
from ..network import SKIP, compute_dtype, in_sequence, steps
from . import draws
from .base import FLOATS, Backend, group_branches, library_product, within_float16


def _expanded(params: Sequence[Tensor | None], constants: Sequence[float], like: Tensor) -> list[Tensor | float]:
    """Parameter values that broadcast over the rows of a branch of z [.., M, N]."""
    values: list[Tensor | float] = []
    for tensor, constant in zip(params, constants, strict=True):
        if tensor is None:
            values.append(constant)
        else:
            values.append(tensor.to(like.dtype))
    return values


def _row_sum(t: Tensor, like: Tensor) -> Tensor:
    """[.., N] or anything that broadcasts to `like`'s shape, summed over its rows."""
    return t.expand(like.shape).flatten(0, -2).sum(0)


def reference_map(
    map: ActivationMap,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor | None],
    constants: Sequence[float],
    level: int,
    learnable: bool,
) -> list[Tensor]:
    """`act_map` in plain PyTorch, which PyTorch can differentiate."""
    branches, outputs = group_branches(map, level, learnable)
    z = inputs[0]
    streams: list[Tensor | float] = []
    for position, (group, k) in enumerate(zip(inputs, branches, strict=True)):
        group = group.to(z.dtype)
        streams.extend(group.chunk(k, -1) if k > 1 else (group,))
        if position == 0:
            streams.extend(_expanded(params, constants, z))
    results = list(map.torch_map(level, learnable)(*streams))
    like = z[..., : z.shape[-1] // branches[0]]
    grouped = []
    for k in outputs:
        if k:
            # no view: the output's owner may change it in place
            parts = [r if r.shape == like.shape else r.expand(like.shape).contiguous() for r in results[:k]]
            grouped.append(parts[0] if k == 1 else torch.cat(parts, -1))
            results = results[k:]
        else:
            grouped.append(_row_sum(results.pop(0), like))
    return grouped


def _preactivation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    return library_product(x.to(dtype), weight.to(dtype).transpose(-1, -2), bias)


def product_and_map(x, weight, bias, params, constants, map: ActivationMap, keep):
    """`linear_act` as a matrix product of PyTorch's and the reference map of its result."""
    z = _preactivation(x, weight, bias)
    (y,) = reference_map(map, [z], params, constants, 0, False)
    y = y.to(x.dtype)
    if not keep:
        z = z.new_empty(0)
    elif y.untyped_storage().data_ptr() == z.untyped_storage().data_ptr():
        y = y.clone()  # identity: the output may be changed in place by its owner, z may not
    return y, z


def product_and_map_backward(
    g, x, weight, bias, params, constants, z, map: ActivationMap, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear_act_backward` as a map of z and g, and matrix products of PyTorch's."""
    if z is None:
        z = _preactivation(x, weight, bias)
    gz, *gp = reference_map(map, [z, g], params, constants, 1, needs[3])
    gx = (gz @ weight.to(gz.dtype)).to(x.dtype) if needs[0] else x.new_empty(0)
    gw = (gz.transpose(-1, -2) @ x.to(gz.dtype)).to(weight.dtype) if needs[1] else weight.new_empty(0)
    dtype = (weight if bias is None else bias).dtype
    gb = gz.sum(-2).to(dtype) if needs[2] else z.new_empty(0, dtype=dtype)
    if not needs[3]:
        return gx, gw, gb, z.new_empty(0)
    if z.dim() == 2:
        return gx, gw, gb, torch.stack(gp)
    batches = [reference_map(map, [zi, gi], params, constants, 1, True)[1:] for zi, gi in zip(z, g, strict=True)]
    return gx, gw, gb, torch.stack([torch.stack(b) for b in batches])


class Reference(Backend):
    """Plain PyTorch, emitted from the same formulas: runs on any device, differentiable any number of times."""

    name = "reference"

    def available(self):
        return True, ""

    def serves(self, map, device, dtype):
        return "" if dtype in FLOATS else f"dtype {dtype} is not a floating-point type of {FLOATS}"

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep):
        return product_and_map(x, weight, bias, params, constants, map, keep)

    def linear_act_backward(self, g, x, weight, bias, params, constants, z, map, precision, needs):
        return product_and_map_backward(g, x, weight, bias, params, constants, z, map, needs)

    def act_map(self, inputs, params, constants, map, level, learnable):
        outputs = reference_map(map, inputs, params, constants, level, learnable)
        taken = {t.untyped_storage().data_ptr() for t in inputs}
        return [o.clone() if o.untyped_storage().data_ptr() in taken else o for o in outputs]

    def moments(self, sigmas, params, start, samples, seed, map):
        return draws.reference_moments(sigmas, params, start, samples, seed, map)

    def serves_network(self, x, layers, precision, direction):
        return ""

    def prefers_layers(self, layers, dtype):
        return "plain PyTorch gains nothing from a whole network"

    def mlp(self, x, tensors, spec, precision, save):
        y = in_sequence(x, steps(spec.layers(tensors), self._layer))
        return y, x.new_empty(0, dtype=compute_dtype(x.dtype))

    def _layer(self, weight, bias, activation):
        def layer(x):
            return product_and_map(x, weight, bias, activation.tensors, activation.constants, activation.map, "")[0]

        return layer

    def mlp_backward(self, g, x, tensors, spec, saved, precision, needs):
        layers = spec.layers(tensors)
        inputs, mapped = [], []  # of each layer, and before its norm

        def kept(weight, bias, activation):
            layer = self._layer(weight, bias, activation)

            def run(x):
                inputs.append(x)
                mapped.append(layer(x))
                return mapped[-1]

            return run

        in_sequence(x, steps(layers, kept))
        results: list[Tensor] = []
        of_input, of_weight, of_bias, of_params, of_norm = needs
        for i in range(len(layers) - 1, -1, -1):
            weight, bias, activation, norm, skip = layers[i]
            own: list[Tensor] = []
            g = g * SKIP if skip else g
            around = g if skip else None
            if norm is not None:
                g, *own = norm.backward(g, mapped[i], of_norm)
            below = of_input or i > 0
            learnable = activation.map.n_params > 0
            g, *grads = self.linear_act_backward(
                g, inputs[i], weight, bias, activation.tensors, activation.constants, None, activation.map, precision,
                [below, of_weight, of_bias and bias is not None, of_params and learnable],
            )  # fmt: skip
            if around is not None and below:
                g = (g + around).to(inputs[i].dtype)
            results = [*(grads if learnable else grads[:2]), *own, *results]
        return [g, *results]

    @within_float16
    def mlp_loss(self, x, target, row_weights, tensors, spec, criterion, precision, needs):
        y, _ = self.mlp(x, tensors, spec, precision, False)
        dtype = compute_dtype(x.dtype)
        value, g, _ = criterion.map.torch_jet()(y.to(dtype), target.to(dtype), *criterion.constants)
        if row_weights is not None:
            value, g = (t * row_weights.to(dtype).unsqueeze(-1) for t in (value, g))
        # not in the type of y: a mean's gradient is below what half types hold
        g = g * criterion.scale
        grads = self.mlp_backward(g, x, tensors, spec, None, precision, needs)
        return [value.sum() * criterion.scale, *grads]
