"""A network written as lists by kind (all weights, all biases, ..), as the operations take it, and gradients back."""

from __future__ import annotations

from fused_inr.kernels import mlp as kernels

from fused_inr.activations import lookup
from fused_inr.network import Criterion, Spec


def operands(weights, biases, params, constants, maps) -> tuple[list, Spec]:
    """The tensors layer by layer, and the spec."""
    tensors: list = []
    at = 0
    for weight, bias, map in zip(weights, biases, maps, strict=True):
        tensors += [weight, bias, *params[at : at + map.n_params]]
        at += map.n_params
    assert at == len(params) == len(constants)
    return tensors, Spec(tuple(m.key for m in maps), tuple(float(c) for c in constants))


def by_kind(spec: Spec, results, first: int = 1) -> list:
    """Results of a raw backward, `first` of them for no layer: those, then of all layers the gradients of weights, of
    biases and of parameters ([P, N], or what stands for nothing), then those of norms."""
    kinds: list[list] = [[], [], [], []]
    at = first
    for map, norm in zip(spec.maps, spec.norms, strict=True):
        kinds[0].append(results[at])
        kinds[1].append(results[at + 1])
        at += 2
        if map.n_params:
            kinds[2].append(results[at])
            at += 1
        else:
            kinds[2].append(results[0].new_empty(0))
        if norm is not None:
            kinds[3] += results[at : at + 2]
            at += 2
    assert at == len(results)
    return [*results[:first], *(t for kind in kinds for t in kind)]


def mlp(x, weights, biases, params, constants, maps, precision="ieee", save=False):
    """`kernels.mlp.mlp`."""
    return kernels.mlp(x, *operands(weights, biases, params, constants, maps), precision, save)


def mlp_backward(
    g, x, weights, biases, params, constants, maps, saved=None, precision="ieee", needs=(True, True, True, False)
):
    """`kernels.mlp.mlp_backward`, its results by kind."""
    tensors, spec = operands(weights, biases, params, constants, maps)
    return by_kind(spec, kernels.mlp_backward(g, x, tensors, spec, saved, precision, needs))


def mlp_loss(
    x, target, row_weights, weights, biases, params, constants, maps, loss="squared_error", loss_constants=(),
    scale=1.0, precision="ieee", needs=(True, True, True, False),
):  # fmt: skip
    """`kernels.mlp.mlp_loss`, its results by kind."""
    tensors, spec = operands(weights, biases, params, constants, maps)
    assert lookup(loss).branches == 2
    criterion = Criterion(loss, tuple(loss_constants), scale)
    return by_kind(spec, kernels.mlp_loss(x, target, row_weights, tensors, spec, criterion, precision, needs), 2)
