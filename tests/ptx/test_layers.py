"""Layers on an emulated device: value and first derivatives within the bounds of `fused_inr.bench.bounds`, second ones
(act_map at second order) as close to float64 as eager PyTorch."""

import pytest
from fused_inr.bench import ptx
from fused_inr.bench.gpu.checks import layer_accuracy

from .layers import NARROW_K, NARROW_N, SPLIT, TAILS, assert_within_bounds, shares
from .tensors import spread, uniform

MAPS = ("sine", "split", "gaussian", "complex_gabor")
TYPES = ("ieee", "tf32", "bf16", "fp16")
#: a reduction of several steps, tails of one, one row
MORE = ((70, 145, 80), (300, 257, 130), (1, 16, 16), (5, 3, 1), (9, 300, 4))


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


#: elements far apart: every offset beyond 2^31 bytes, most beyond 2^31 elements
FAR = {
    "rows of x": lambda: (spread((131, 33), (1 << 26, 1)), uniform(49, 33), uniform(49)),
    "columns of x": lambda: (spread((131, 33), (1, 1 << 27)), uniform(49, 33), uniform(49)),
    "rows of a few inputs": lambda: (spread((131, 2), (1 << 26, 1)), uniform(49, 2), uniform(49)),
    "rows of the weight": lambda: (uniform(70, 33), spread((49, 33), (1 << 27, 1)), uniform(49)),
    "columns of the weight": lambda: (uniform(70, 33), spread((49, 33), (1, 1 << 27)), uniform(49)),
}


@pytest.mark.parametrize("far", FAR)
def test_strides_beyond_32_bits(gpu, far):
    x, weight, bias = FAR[far]()
    found = shares("gaussian", "tf32", x, weight / 16, bias)
    assert max(found.values()) <= 1, found


def test_products_left_to_the_library():
    """float32 in ieee precision, as on a device by default: cuBLAS multiplies, the kernels map."""
    with ptx.emulated(80, by_library=True) as device:
        assert_within_bounds("split", "ieee", TAILS)
    device.check()
    assert "act_map_kernel" in {launch.name for launch in device.launches}


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


@pytest.mark.parametrize("gpu", [100], indirect=True)
def test_branches_that_share_a_rounded_input(gpu):
    """Several steps of the reduction: the next x must not be written while some branch's product reads the last one."""
    assert_within_bounds("split", "tf32", (70, 145, 80))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [*TYPES, *SPLIT])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("gpu", [80, 86, 90, 100], indirect=True)
def test_everywhere(gpu, name, precision):
    assert_within_bounds(name, precision, TAILS, NARROW_K, NARROW_N, *MORE)
    assert_second_order(name, precision, *TAILS)
