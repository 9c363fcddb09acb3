"""Layers on an emulated device: value and first derivatives within the bounds of `fused_inr.bench.bounds`, second ones
(act_map at second order) as close to float64 as eager PyTorch."""

import pytest
import torch
from fused_inr.bench import bounds
from fused_inr.bench.cases import PRECISIONS, matmul_precision
from fused_inr.bench.gpu.checks import layer_accuracy

import fused_inr as fi
from fused_inr.functional import linear_act
from fused_inr.ops import backends

MAPS = ("sine", "split", "gaussian", "complex_gabor")
TYPES = ("ieee", "tf32", "bf16", "fp16")
SPLIT = ("tf32x3", "bf16x3")
#: a tail in every direction; few inputs; few outputs
TAILS, NARROW_K, NARROW_N = (131, 33, 49), (131, 2, 49), (67, 49, 3)
#: a reduction of several steps, tails of one, one row
MORE = ((70, 145, 80), (300, 257, 130), (1, 16, 16), (5, 3, 1), (9, 300, 4))


def assert_within_bounds(name: str, precision: str, *shapes) -> None:
    """Output and gradients of x, weight and bias."""
    dtype, beyond = PRECISIONS.get(precision, torch.float32), {}
    act = fi.activations.get(name)
    for m, k, n in shapes:
        layer = fi.FusedLinear(k, n, activation=act).to(dtype)
        x = (torch.rand(m, k) * 2 - 1).to(dtype).requires_grad_()
        g = torch.randn(m, layer.output_features).to(dtype)
        with matmul_precision(precision), backends.float32_products(precision if precision in SPLIT else None):
            y = linear_act(x, layer.weight, layer.bias, act)
            gx, gw, gb = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
        exact, bound = bounds.layer_bounds(x, layer.weight, layer.bias, act, g, precision)
        for tensor, value in (("y", y.detach()), ("gx", gx), ("gw", gw), ("gb", gb)):
            share = bounds.of_bound(value, exact[tensor], bound[tensor])["of_bound"]
            if not share <= 1:
                beyond[m, k, n, tensor] = share
    assert not beyond


def assert_second_order(name: str, precision: str, *shape) -> None:
    second = layer_accuracy(name, precision, "cpu", *shape)["orders"]["2"]
    assert not {tensor: figures for tensor, figures in second.items() if not figures["of_bound"] <= 1}


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", MAPS)
def test_layers(gpu, name, precision):
    assert_within_bounds(name, precision, TAILS)
    assert {"forward_kernel", "gz_kernel", "weight_grad_kernel"} <= {launch.name for launch in gpu.launches}


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("name", ["sine", "split"])
def test_narrow_layers(gpu, name, precision):
    assert_within_bounds(name, precision, NARROW_K, NARROW_N)


@pytest.mark.parametrize("precision", SPLIT)
def test_products_of_split_factors(gpu, precision):
    assert_within_bounds("sine", precision, TAILS)


@pytest.mark.parametrize("name", MAPS)
def test_second_order(gpu, name):
    assert_second_order(name, "tf32", *TAILS)
    assert "act_map_kernel" in {launch.name for launch in gpu.launches}


def test_second_order_of_a_half_type(gpu):
    assert_second_order("sine", "bf16", *TAILS)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("gpu", [90], indirect=True)
def test_layers_with_warp_groups(gpu, precision):
    assert_within_bounds("sine", precision, TAILS)
    products = {name for launch in gpu.launches for name in launch.by_mnemonic() if "mma" in name}
    assert all(name.startswith("wgmma") for name in products) and bool(products) == (precision != "ieee")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("gpu", [86, 100], indirect=True)
def test_layers_elsewhere(gpu, precision):
    assert_within_bounds("sine", precision, TAILS)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [*TYPES, *SPLIT])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("gpu", [80, 86, 90, 100], indirect=True)
def test_everywhere(gpu, name, precision):
    assert_within_bounds(name, precision, TAILS, NARROW_K, NARROW_N, *MORE)
    assert_second_order(name, precision, *TAILS)
