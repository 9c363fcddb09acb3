"""Floating-point operations of the raw operations, for `torch.utils.flop_counter.FlopCounterMode`.

As PyTorch counts its own: two for a multiply-add of a matrix product, none for what is element by element. A backward
counts the products of the gradients that are asked for, as eager PyTorch's does; what a kernel computes a second time
to save memory is not counted.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..network import spec_of
from ..pytorch import after_import

__all__ = ["register"]

_COUNTER = "torch.utils.flop_counter"


def _product(rows: Any, weight: Any) -> int:
    """Operations of x W^T, of the shapes of x [.., K] and of W [N, K] or [G, N, K]."""
    return 2 * math.prod(rows[:-1]) * weight[-2] * weight[-1]


def _layer(x, weight, *rest, out_shape=None, **kwargs) -> int:
    return _product(x, weight)


def _layer_backward(g, x, weight, bias, params, constants, z, activation, backend, precision, needs, **kwargs) -> int:
    return _product(x, weight) * (bool(needs[0]) + bool(needs[1]))


def _products(x, tensors, words, numbers) -> list[int]:
    """Operations of the matrix product of each layer."""
    rows = math.prod(x[:-1])
    at, found = 0, []
    spec = spec_of(tuple(words), tuple(numbers))
    for count, norm in zip(spec.counts, spec.norms):
        weight = tensors[at]
        found.append(2 * rows * weight[0] * weight[1])
        at += 2 + count + (0 if norm is None else 2)
    return found


def _backward_of(products: list[int], needs) -> int:
    """Of the gradients: of all weights where any is asked for, and of the rows of each layer behind something."""
    of_rows = sum(products) if needs[0] else sum(products[1:])
    return of_rows + (sum(products) if needs[1] else 0)


def _network(x, tensors, words, numbers, backend, precision, save, **kwargs) -> int:
    return sum(_products(x, tensors, words, numbers))


def _network_backward(g, x, tensors, words, numbers, saved, backend, precision, needs, **kwargs) -> int:
    return _backward_of(_products(x, tensors, words, numbers), needs)


def _network_loss(
    x, target, row_weights, tensors, words, numbers, loss, constants, scale, backend, precision, needs, **kwargs
) -> int:
    products = _products(x, tensors, words, numbers)
    return sum(products) + _backward_of(products, needs)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.fused_inr
    for op, formula in (
        (ops.linear_act, _layer),
        (ops.linear_act_backward, _layer_backward),
        (ops.mlp, _network),
        (ops.mlp_backward, _network_backward),
        (ops.mlp_loss, _network_loss),
    ):
        register_flop_formula(op)(formula)


def register() -> None:
    """Tells the counter of these operations, once it is imported: importing it takes as long as importing Triton."""
    after_import(_COUNTER, _register)
