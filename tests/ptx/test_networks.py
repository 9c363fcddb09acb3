"""Whole networks on an emulated device, each way to train, as close to float64 as eager PyTorch."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from fused_inr.bench import ptx
from fused_inr.bench.cases import Case, Workload, matmul_precision
from fused_inr.kernels import mlp
from fused_inr.kernels.configurations import mlp as network_configs
from operands import operands

from fused_inr import activations, backends

from .tensors import spread, uniform

WAYS = (("inference", "default"), ("training", "default"), ("training", "recompute"), ("training", "one-pass"))


def check(gpu, step: str, way: str, precision: str, activation: str, width: int) -> None:
    """A few tiles of rows for each program, the last one not full."""
    products = precision if precision.endswith("x3") else None
    with ptx.few_programs(1), backends.float32_products(products):
        tensors = "tf32" if products else precision
        work = Workload(Case("network", step, activation, width, rows=293, precision=tensors, way=way))
        work.check()
    assert "gz_kernel" not in {launch.name for launch in gpu.launches}, "it ran layer by layer"


@pytest.mark.parametrize(("step", "way"), WAYS)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("gpu", [80, 90], indirect=True)
def test_sine(gpu, step, way, width):
    check(gpu, step, way, "bf16", "sine", width)


@pytest.mark.parametrize(("gpu", "width"), [(80, 32), (80, 64), (90, 32), (90, 64)], indirect=["gpu"])
def test_sine_in_tf32(gpu, width):
    check(gpu, "training", "one-pass", "tf32", "sine", width)


@pytest.mark.parametrize("name", ["gaussian", "gabor"])
def test_other_maps(gpu, name):
    check(gpu, "training", "one-pass", "bf16", name, 32)


@pytest.mark.parametrize("gpu", [86, 100], indirect=True)
def test_elsewhere(gpu):
    check(gpu, "training", "one-pass", "bf16", "sine", 64)


def test_half_precision(gpu):
    # gradients of a mean over rows are below float16's range without loss scaling
    check(gpu, "inference", "default", "fp16", "sine", 64)


@pytest.mark.parametrize("gpu", [90], indirect=True)
def test_split_factors(gpu):
    check(gpu, "training", "one-pass", "bf16x3", "sine", 64)


AXES = ((80, 86, 90, 100), ("bf16", "tf32", "tf32x3", "bf16x3"), ("sine", "split", "gaussian", "gabor"), (32, 64, 128))


def every_fourth():
    """A quarter of all combinations, in which every three values of different axes meet (all of them take hours)."""
    for places in itertools.product(*(range(len(axis)) for axis in (*AXES, WAYS))):
        if sum(places) % 4 == 0:
            *values, (step, way) = (axis[i] for axis, i in zip((*AXES, WAYS), places))
            yield (*values, step, way)


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "precision", "name", "width", "step", "way"), every_fourth(), indirect=["gpu"])
def test_everywhere(gpu, precision, name, width, step, way):
    tensors = "bf16" if precision == "bf16" else "tf32"
    work = Workload(Case("network", step, name, width, rows=293, precision=tensors, way=way))
    direction = "loss" if way == "one-pass" else "forward"  # without gradients "forward" is inference
    with (
        matmul_precision(tensors),
        backends.float32_products(precision if precision.endswith("x3") else None),
        torch.set_grad_enabled(step == "training"),
    ):
        _, decision = work.fused.whole_call(work.x.detach(), direction)
    if decision.reason:
        pytest.skip(decision.reason)
    check(gpu, step, way, precision, name, width)


# -- shapes and layouts, through the raw operations

#: of the largest value: what two roundings a layer, of random sign, may come to in these small networks
TOLERANCE = {"tf32": 4e-2, "bf16": 8e-2, "fp16": 2e-2, "tf32x3": 2e-4, "bf16x3": 4e-3}
REFERENCE = backends.TABLE["reference"]


def run_raw(name, precision, x, width, outputs, hidden=2, learnable=False, saved=False) -> None:
    """Value and gradients, from saved pre-activations or without, against the reference in float64."""
    map, identity = activations.lookup(name), activations.lookup("identity")
    B, C, K = map.branches, map.outputs, x.shape[1]
    shapes = [(B * width, K), *[(B * width, C * width)] * hidden, (outputs, C * width)]
    weights = [(torch.randn(s) / s[1] ** 0.5 * 0.5).to(x.dtype) for s in shapes]
    biases = [None if i == 1 else (torch.randn(s[0]) * 0.2).to(x.dtype) for i, s in enumerate(shapes)]
    numbers = [min(float(c), 2.0) + 0.1 * i for i in range(hidden + 1) for c in map.defaults.values()]
    params = [torch.full((width,), c) if learnable and i % 2 == 0 else None for i, c in enumerate(numbers)]
    maps = [map] * (hidden + 1) + [identity]
    g = torch.randn(x.shape[0], outputs).to(x.dtype)
    asked = precision if x.dtype == torch.float32 else "ieee"
    needs = (True, True, True, learnable)
    tensors, spec = operands(weights, biases, params, numbers, maps)
    y, kept = mlp.mlp(x, tensors, spec, asked, saved)
    found = mlp.mlp_backward(g, x, tensors, spec, kept if saved else None, asked, needs)

    doubles = [None if t is None else t.double() for t in tensors]
    exact, _ = REFERENCE.mlp(x.double(), doubles, spec, "ieee", False)
    gradients = REFERENCE.mlp_backward(g.double(), x.double(), doubles, spec, None, "ieee", (*needs, False))

    def close(value, expected):
        return (value.double() - expected).abs().max() <= TOLERANCE[precision] * expected.abs().max()

    assert close(y, exact)
    for i, (value, expected) in enumerate(zip(found, gradients)):
        if value.numel() and expected.numel():
            assert close(value, expected), i


@contextlib.contextmanager
def little_memory():
    """Gradients of hidden weights by chunks of rows, as with many layers."""
    with mock.patch.multiple(network_configs, SUMS_BYTES=1, CHUNK_BYTES=200_000):
        network_configs.pick.cache_clear()
        yield
    network_configs.pick.cache_clear()


SHAPES = {
    "odd width": lambda: run_raw("sine", "tf32", uniform(150, 3), 51, 5, saved=True),
    "width 31": lambda: run_raw("gabor", "bf16", uniform(150, 2).bfloat16(), 31, 3),
    "200 inputs, 40 outputs": lambda: run_raw("sine", "bf16", uniform(150, 200).bfloat16(), 64, 40),
    "learnable parameters": lambda: run_raw("sine", "tf32", uniform(150, 2), 64, 3, learnable=True),
    "no hidden product": lambda: run_raw("gaussian", "fp16", uniform(150, 2).half(), 64, 1, hidden=0, saved=True),
    "five hidden products": lambda: run_raw("sine", "bf16", uniform(150, 2).bfloat16(), 32, 3, hidden=5),
    "rows far apart": lambda: run_raw("sine", "tf32", spread((150, 2), (1 << 24, 1)), 64, 3, saved=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(gpu, shape):
    with ptx.few_programs(1):
        SHAPES[shape]()


def test_chunks_of_rows(gpu):
    with ptx.few_programs(1), little_memory():
        run_raw("sine", "tf32", uniform(700, 2), 64, 3)
