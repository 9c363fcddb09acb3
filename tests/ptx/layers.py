"""Layers on an emulated device, held to the bounds of `fused_inr.bench.bounds`."""

import torch
from fused_inr.bench import bounds
from fused_inr.bench.cases import PRECISIONS, matmul_precision

import fused_inr as fi
from fused_inr import backends
from fused_inr.functional import linear_act

from .tensors import uniform

SPLIT = ("tf32x3", "bf16x3")
#: a tail in every direction; few inputs; few outputs
TAILS, NARROW_K, NARROW_N = (131, 33, 49), (131, 2, 49), (67, 49, 3)


def shares(name: str, precision: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, float]:
    """Of its bound, the error of the output and of the gradients of x, weight and bias."""
    act = fi.activations.get(name)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    g = torch.randn(len(x), len(weight) // act.branches * act.outputs).to(x.dtype)
    with matmul_precision(precision), backends.float32_products(precision if precision in SPLIT else None):
        y = linear_act(*leaves, act)
        gradients = torch.autograd.grad(y, leaves, g)
    exact, bound = bounds.layer_bounds(x, weight, bias, act, g, precision, kept=bounds.keeps(x, act))
    found = dict(zip(("y", "gx", "gw", "gb"), (y.detach(), *gradients)))
    return {tensor: bounds.of_bound(t, exact[tensor], bound[tensor])["of_bound"] for tensor, t in found.items()}


def assert_within_bounds(name: str, precision: str, *shapes) -> None:
    dtype, beyond = PRECISIONS.get(precision, torch.float32), {}
    for m, k, n in shapes:
        layer = fi.FusedLinear(k, n, activation=name).to(dtype)
        for tensor, share in shares(name, precision, uniform(m, k).to(dtype), layer.weight, layer.bias).items():
            if not share <= 1:
                beyond[m, k, n, tensor] = share
    assert not beyond
