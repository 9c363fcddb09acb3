"""The operation on a CUDA device: `fused-inr bench gpu` runs this first, and so does `pytest tests/test_gpu.py` there.

The oracle is float64 on the same device, the bounds are those of `fused_inr.bench.bounds`. The most important tests
come first: under a time limit the rest may not be reached.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from fused_inr.bench import bounds
from fused_inr.bench.cases import PRECISIONS, Case, Workload, matmul_precision
from fused_inr.bench.gpu.checks import layer_accuracy, moments_error

import fused_inr as fi
from fused_inr import activations, backends
from fused_inr.functional import linear_act
from fused_inr.ops import moments, raw

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]

NAMES = activations.names()
SOME = ("sine", "split", "gaussian", "complex_gabor")
TYPES = tuple(PRECISIONS)


@pytest.fixture(autouse=True)
def among_others(request, tmp_path_factory):
    """Processes of tests share the device; a test marked `alone` waits until no other runs, and none begins beside it.

    What a test's allocator keeps is given back after it, or the next one would find the device full.
    """
    import fcntl

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # one for all workers of a run
    with open(folder / "gpu.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def device():
    """The device. `tests/ptx` runs some of these tests on an emulated one, whose tensors are the CPU's."""
    return torch.device("cuda")


def assert_within(result: dict) -> None:
    beyond = {
        (order, name): figures
        for order, tensors in result["orders"].items()
        for name, figures in tensors.items()
        if not figures["of_bound"] <= 1
    }
    assert not beyond


def layer(device, k: int, n: int, activation, dtype=torch.float32, **more):
    return fi.FusedLinear(k, n, activation=activation, **more).to(device, dtype)


def outputs_and_gradients(f, x, g):
    """y and the gradients of x and of the module's parameters."""
    x = x.detach().requires_grad_()
    y = f(x)
    grads = torch.autograd.grad(y, (x, *f.parameters()), g)
    return [y.detach(), *grads]


# -- what runs, and how accurate it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_triton_backend_serves_cuda_tensors(device, dtype):
    net = layer(device, 64, 64, "sine", dtype)
    assert ": triton (" in backends.explain(net, torch.ones(8, 64, device=device, dtype=dtype))


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", sorted(NAMES, key=lambda name: (name not in SOME, name)))
def test_value_and_derivatives_within_the_bound(device, name, precision):
    assert_within(layer_accuracy(name, precision, device, 1001, 96, 80))


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("step", ["inference", "training", "eikonal"])
def test_a_network_is_as_close_to_float64_as_eager(device, step, precision):
    if precision == "fp16" and step != "inference":
        pytest.skip("gradients of a mean over rows are below float16's range without loss scaling")
    Workload(Case("network", step, width=64, rows=4099, precision=precision), device).check(1 << 16)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32x3"])
@pytest.mark.parametrize("name", SOME)
def test_products_of_split_factors_within_the_bound(device, name, precision):
    assert_within(layer_accuracy(name, precision, device, 1001, 96, 80))


@pytest.mark.parametrize("precision", ["bf16x3", "tf32x3"])
@pytest.mark.parametrize(
    ("step", "way"),
    [("inference", "default"), ("training", "default"), ("training", "one-pass"), ("eikonal", "default")],
)
def test_a_network_of_split_factors_is_as_close_to_float64_as_eager_in_tf32(device, step, way, precision):
    work = Workload(Case("network", step, width=64, rows=4099, precision="tf32", way=way), device)
    with backends.float32_products(precision):
        assert work.backends() == [f"triton ({precision})"]
        work.check(1 << 16)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("way", ["default", "recompute", "one-pass"])
def test_training_at_width_128_is_as_close_to_float64_as_eager(device, way, precision):
    """Where gradients of the hidden weights may wait for registers."""
    Workload(Case("network", "training", width=128, rows=20_011, precision=precision, way=way), device).check(1 << 16)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize(
    ("k", "n"), [(1, 64), (2, 256), (3, 33), (8, 64), (9, 64), (64, 1), (64, 3), (64, 4), (2, 3), (1, 1)]
)
@pytest.mark.parametrize("name", ["sine", "split", "complex_gabor"])
def test_narrow_layers(device, name, k, n, precision):
    assert_within(layer_accuracy(name, precision, device, 517, k, n))


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 16, 16), (17, 17, 31), (127, 15, 129), (129, 257, 33), (8193, 256, 256), (300, 512, 512)]
)
def test_shapes_with_tails(device, m, k, n, precision):
    assert_within(layer_accuracy("sine", precision, device, m, k, n))


# -- the cuda backend: the same through C++, where there is an nvcc


@pytest.fixture
def on_cuda():
    """Operations run on the CUDA C++ backend within the test; the first one compiles it."""
    usable, reason = backends.TABLE["cuda"].available()
    if not usable:
        pytest.skip(f"backend 'cuda': {reason}")
    with backends.use("cuda"):
        yield


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", sorted(NAMES, key=lambda name: (name not in SOME, name)))
def test_cuda_value_and_derivatives_within_the_bound(device, name, precision, on_cuda):
    for m, k, n in ((1001, 96, 80), (517, 3, 33), (1, 16, 17)) if name in SOME else ((1001, 96, 80),):
        assert_within(layer_accuracy(name, precision, device, m, k, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cuda_has_the_same_bits_again_and_follows_a_captured_graph(device, dtype, on_cuda):
    net = torch.nn.Sequential(
        layer(device, 2, 64, "sine", dtype), layer(device, 64, 64, "split", dtype), layer(device, 64, 3, None, dtype)
    )
    x, g = torch.rand(20_011, 2, device=device).to(dtype), torch.randn(20_011, 3, device=device).to(dtype)
    first = outputs_and_gradients(net, x, g)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs_and_gradients(net, x, g)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs_and_gradients(net, x, g)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_and_gradients(net, x, g)
    x.copy_(torch.rand(20_011, 2, device=device))
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, outputs_and_gradients(net, x, g)))


def test_cuda_launches_on_the_current_stream(device, on_cuda):
    """What is queued on a stream comes first, though it takes its time."""
    net = layer(device, 256, 256, "sine")
    x = torch.randn(3000, 256, device=device)
    expected = net(x).detach()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = net(late)
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


def test_cuda_is_where_the_tensors_are(device, on_cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    net, x = layer(device, 64, 32, "sine"), torch.randn(100, 64, device=device)
    with torch.cuda.device(0):
        there = net.to("cuda:1")(x.to("cuda:1"))
    assert there.device == torch.device("cuda:1")
    torch.testing.assert_close(there.cpu(), net.to("cuda:0")(x).cpu())


def test_cuda_ignores_autocast_inside(device, on_cuda):
    net = layer(device, 64, 32, "sine")
    x = torch.randn(100, 64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    weight, bias = net.weight.bfloat16(), net.bias.bfloat16()
    assert torch.equal(y, linear_act(x.bfloat16(), weight, bias, net.activation))


def test_cuda_second_and_third_order(device, on_cuda):
    test_third_order(device)
    Workload(Case("network", "eikonal", width=64, rows=4099, precision="ieee"), device).check(1 << 16)


def test_cuda_formula_at_run_time(device, on_cuda):
    import sympy

    formula = activations.define("test_gpu_chirp", lambda z, a: sympy.sin(a * z**2), a=1.5)
    z = torch.randn(100, 32, device=device)
    y = linear_act(z, torch.eye(32, device=device), None, formula)
    torch.testing.assert_close(y, torch.sin(1.5 * z**2))


# -- shapes and layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 64, 32), (0, 2, 32)])
def test_no_rows(device, shape, dtype):
    m, k, n = shape
    net = layer(device, k, n, "sine", dtype)
    x = torch.ones(m, k, device=device, dtype=dtype)
    y, gx, gw, gb = outputs_and_gradients(net, x, torch.ones(m, n, device=device, dtype=dtype))
    assert y.shape == (0, n)
    assert gx.shape == (0, k)
    assert not gw.any()
    assert not gb.any()


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("layout", ["offset", "transposed", "strided", "expanded rows", "expanded gradient"])
def test_layouts(device, layout, precision):
    m, k, n, dtype = 300, 63, 65, PRECISIONS[precision]
    act = activations.get("sine")
    weight = (torch.rand(n, k, device=device) / 8 - 1 / 16).to(dtype)
    bias = torch.rand(n, device=device).to(dtype)
    x = (torch.rand(m, k + 1, device=device) * 2 - 1).to(dtype)
    x = {
        "offset": lambda: x[:, 1:],
        "transposed": lambda: x[:, :k].t().contiguous().t(),
        "strided": lambda: torch.cat((x, x), -1)[:, : 2 * k : 2],
        "expanded rows": lambda: x[:1, :k].expand(m, k),
        "expanded gradient": lambda: x[:, :k],
    }[layout]()
    g = torch.randn(m, n, device=device).to(dtype)
    g = g[:1].expand(m, n) if layout == "expanded gradient" else g
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with matmul_precision(precision):
        y = linear_act(*leaves, act)
        gx, gw, gb = torch.autograd.grad(y, leaves, g)
    exact, bound = bounds.layer_bounds(x, weight, bias, act, g, precision, kept=bounds.keeps(x, act))
    for name, value in (("y", y), ("gx", gx), ("gw", gw), ("gb", gb)):
        assert bounds.of_bound(value.detach(), exact[name], bound[name])["of_bound"] <= 1, name


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_of_weights_is_as_many_layers(device, shared, precision):
    groups, m, k, n, dtype = 3, 130, 48, 40, PRECISIONS[precision]
    act = activations.get("split")
    weight = (torch.randn(groups, 4 * n, k, device=device) / k**0.5).to(dtype).requires_grad_()
    bias = torch.randn(groups, 4 * n, device=device).to(dtype).requires_grad_()
    x = torch.randn(*(() if shared else (groups,)), m, k, device=device).to(dtype).requires_grad_()
    g = torch.randn(groups, m, n, device=device).to(dtype)
    with matmul_precision(precision):
        y = linear_act(x, weight, bias, act)
        gx, gw, gb = torch.autograd.grad(y, (x, weight, bias), g)
    total, total_bound = 0.0, 0.0
    for i in range(groups):
        xi = x if shared else x[i]
        exact, bound = bounds.layer_bounds(xi, weight[i], bias[i], act, g[i], precision, kept=bounds.keeps(x, act))
        for name, value in (("y", y[i]), ("gw", gw[i]), ("gb", gb[i])):
            assert bounds.of_bound(value.detach(), exact[name], bound[name])["of_bound"] <= 1, (i, name)
        if shared:  # summed in the stored type
            total, total_bound = total + exact["gx"], total_bound + bound["gx"]
        else:
            assert bounds.of_bound(gx[i], exact["gx"], bound["gx"])["of_bound"] <= 1, i
    if shared:
        slack = groups * bounds.UNIT[dtype] * (total.abs() + total_bound).max()
        assert bounds.of_bound(gx, total, total_bound + slack)["of_bound"] <= 1


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in NAMES if activations.lookup(name).n_params])
def test_learnable_parameters(device, name, dtype, per_feature):
    from fused_inr.bench.cases import twin

    m, k, n = 515, 32, 48
    net = layer(device, k, n, activations.lookup(name)(learnable=True, per_feature=per_feature), dtype)
    eager = twin(net)
    x = (torch.rand(m, k, device=device) * 2 - 1).to(dtype)
    g = torch.randn(m, net.output_features, device=device).to(dtype)
    ours = dict(zip(("y", "x", *(n for n, _ in net.named_parameters())), outputs_and_gradients(net, x, g)))
    names = ("y", "x", *(n.removeprefix("linear.") for n, _ in eager.named_parameters()))
    theirs = dict(zip(names, outputs_and_gradients(eager, x, g)))
    exact = dict(zip(names, outputs_and_gradients(eager.double(), x.double(), g.double())))
    for key, value in ours.items():
        summed = 1 if key in ("y", "x") else m if per_feature or key in ("weight", "bias") else m * n
        result = bounds.against_eager(value, theirs[key], exact[key], dtype, summed)
        assert result["of_bound"] <= 1, (key, result)


def test_third_order(device):
    act = activations.get("sine").with_params(omega=3.0)
    weight, bias = torch.randn(24, 20, device=device) / 5, torch.randn(24, device=device)
    x = torch.rand(70, 20, device=device)

    def third(f, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = f(*leaves).pow(2).sum()
        for _ in range(2):
            grads = torch.autograd.grad(out, leaves, create_graph=True)
            out = sum((grad**2).sum() for grad in grads)
        return torch.autograd.grad(out, leaves)

    def plain(x, weight, bias):
        return torch.sin(3.0 * (x @ weight.t() + bias))

    exact = third(plain, x.double(), weight.double(), bias.double())
    eager = third(plain, x, weight, bias)
    ours = third(lambda *t: linear_act(*t, act), x, weight, bias)
    for a, b, c in zip(ours, eager, exact):
        assert bounds.against_eager(a, b, c, torch.float32, 70)["of_bound"] <= 1


# -- bits, streams, graphs, addresses, memory


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", ["sine", "split"])
def test_the_same_bits_250_times(device, name, precision):
    dtype = PRECISIONS[precision]
    net = layer(device, 96, 64, activations.lookup(name)(learnable=True), dtype)
    x = torch.randn(20_011, 96, device=device).to(dtype)
    g = torch.randn(20_011, 64, device=device).to(dtype)
    with matmul_precision(precision):
        first = outputs_and_gradients(net, x, g)
        for _ in range(249):
            for a, b in zip(first, outputs_and_gradients(net, x, g)):
                assert torch.equal(a, b)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("second_order", [False, True])
def test_a_captured_graph_follows_its_inputs(device, second_order, precision):
    dtype = PRECISIONS[precision]
    net = torch.nn.Sequential(
        layer(device, 2, 64, "sine", dtype), layer(device, 64, 64, "split", dtype), layer(device, 64, 3, None, dtype)
    )
    x = torch.rand(1000, 2, device=device).to(dtype).requires_grad_()

    def step():
        out = net(x)
        if second_order:
            (out,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return [out, *torch.autograd.grad(out.pow(2).mean(), list(net.parameters())[:-1], materialize_grads=True)]

    with matmul_precision(precision):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            with torch.no_grad():
                x.copy_(torch.rand(1000, 2, device=device))
                for parameter in net.parameters():
                    parameter.mul_(1.01)
            graph.replay()
            replayed = [t.detach().clone() for t in captured]
            for a, b in zip(replayed, step()):
                assert torch.equal(a, b)


def test_two_streams(device):
    """Work goes to the stream that is current, and two at once do not meet."""
    net = layer(device, 256, 256, "sine")
    xs = [torch.randn(30_000, 256, device=device) for _ in range(2)]
    g = torch.randn(30_000, 256, device=device)
    alone = [outputs_and_gradients(net, x, g) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(10):
        results = []
        for stream, x in zip(streams, xs):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # a launch on another stream would overtake what is queued here
                late = x.clone() if stream is streams[0] else x
                results.append(outputs_and_gradients(net, late, g))
        torch.cuda.synchronize()
        for expected, got in zip(alone, results):
            assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda:1")
    net = fi.FusedLinear(64, 32, activation="sine").to(other)
    x = torch.randn(100, 64, device=other)
    expected = torch.sin(30 * torch.nn.functional.linear(x.double(), net.weight.double(), net.bias.double()))
    with torch.cuda.device(0):
        y = net(x)
    assert y.device == other
    assert (y - expected).abs().max() < 1e-3


def test_a_thousand_steps_hold_no_more_memory_than_ten(device):
    work = Workload(Case("network", "training", width=64, rows=1000), device)
    step = work.call("fused")
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        step()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == held


# -- the ways people call it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(device, dtype):
    net = torch.nn.Sequential(layer(device, 2, 64, "sine", dtype), layer(device, 64, 64, "gaussian", dtype))
    x, g = torch.rand(500, 2, device=device).to(dtype), torch.randn(500, 64, device=device).to(dtype)
    compiled = torch.compile(net, fullgraph=True)
    expected, got = outputs_and_gradients(net, x, g), outputs_and_gradients_compiled(compiled, net, x, g)
    for a, b in zip(expected, got):
        assert (a.double() - b.double()).abs().max() <= 64 * bounds.UNIT[dtype] * a.abs().max()


def outputs_and_gradients_compiled(compiled, net, x, g):
    x = x.detach().requires_grad_()
    y = compiled(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *net.parameters()), g)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    net = layer(device, 64, 32, "sine")
    x = torch.randn(100, 64, device=device)
    with torch.autocast(device.type, dtype=dtype):
        y = net(x)
    assert y.dtype == dtype
    assert torch.equal(y, linear_act(x.to(dtype), net.weight.to(dtype), net.bias.to(dtype), net.activation))
    y.float().sum().backward()
    assert net.weight.grad.dtype == torch.float32


def test_vmap_over_weights_and_rows(device):
    act = activations.get("sine")
    weights, x = torch.randn(5, 32, 48, device=device) / 48, torch.randn(5, 60, 48, device=device)
    together = torch.func.vmap(lambda w, x: linear_act(x, w, None, act))(weights, x)
    for i in range(5):
        exact, bound = bounds.layer_bounds(x[i], weights[i], None, act, torch.ones(60, 32, device=device), "ieee")
        assert bounds.of_bound(together[i], exact["y"], bound["y"])["of_bound"] <= 1


@pytest.mark.filterwarnings("ignore:fused_inr runs on the PyTorch reference")
def test_float64_runs_on_the_cuda_backend_or_the_reference_and_triton_says_why_not(device):
    net = layer(device, 8, 8, "sine", torch.float64)
    x = torch.ones(4, 8, device=device, dtype=torch.float64)
    assert net(x).dtype == torch.float64
    assert (": cuda (" if backends.TABLE["cuda"].available()[0] else ": reference (") in backends.explain(net, x)
    with backends.use("triton"), pytest.raises(RuntimeError, match="float64"):
        net(x)


@pytest.mark.parametrize("name", ["sine", "gaussian", "relu", "split", "sinc", "tanh"])
def test_values_that_are_not_finite_stay_in_their_rows(device, name):
    net = layer(device, 32, 32, name)
    x = torch.randn(64, 32, device=device)
    x[3, 5], x[40, 0], x[63, 31] = math.nan, math.inf, -math.inf
    g = torch.ones(64, 32, device=device)
    y, gx, *_ = outputs_and_gradients(net, x, g)
    with backends.use("reference"):
        expected, expected_gx, *_ = outputs_and_gradients(net, x, g)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(gx.isnan(), expected_gx.isnan())
    clean = torch.ones(64, dtype=torch.bool, device=device)
    clean[[3, 40, 63]] = False
    assert y[clean].isfinite().all()
    assert gx[clean].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_float32_sine_at_every_exponent(device, backend):
    """The accurate sine of the kernels: 2 ulp, absolute 2^-23 near zeros; also at the floats nearest multiples of
    pi/2."""
    exponents = torch.arange(-30, 31, device=device, dtype=torch.float64)
    mantissas = 1 + torch.rand(61, 4096, device=device, dtype=torch.float64)
    x = (mantissas * torch.exp2(exponents)[:, None]).float().flatten()
    near = (torch.arange(1, 100_001, device=device, dtype=torch.float64) * (math.pi / 2)).float()
    x = torch.cat((x, -x, near, -near))
    x = x[: len(x) // 64 * 64].view(-1, 64)
    usable, reason = backends.TABLE[backend].available()
    if not usable:
        pytest.skip(f"backend {backend!r}: {reason}")
    (y,) = raw.act_map([x], [None], [1.0], "sine", backend, 0, False)
    exact = torch.sin(x.double())
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-126))) - 23)
    error = (y.double() - exact).abs()
    assert (error <= torch.maximum(2 * ulp, torch.full_like(ulp, 2.0**-23))).all(), error.max()


# -- moments


def moments_backend(name: str):
    usable, reason = backends.TABLE[name].available()
    if not usable:
        pytest.skip(f"backend {name!r}: {reason}")
    return backends.implementation(name)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_stream_of_random_numbers_is_the_cpus(device, backend):
    moments_backend(backend)
    if backend == "triton":
        from fused_inr.kernels.moments import random_bits
    else:
        random_bits = torch.ops.fused_inr_cuda.random_bits
    for start, branch, seed in ((0, 0, 0), (4 * (2**32 - 100), 3, 2**62 + 7), (2**63 - 8192, 1, 1)):
        words = random_bits(start, 8192, branch, seed, device)
        assert torch.equal(words.cpu(), moments.random_bits(start, 8192, branch, seed))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", sorted(NAMES, key=lambda name: (name not in SOME, name)))
def test_moments_agree_with_the_cpus_and_are_the_same_bits(device, name, backend):
    """Means of v, v^2, v^4 over the same draws, within five standard errors; small parameters, so that float32 keeps
    the phase."""
    run = moments_backend(backend).moments
    map, samples = activations.lookup(name), 10 * moments.CHUNK + 77
    sigmas = torch.linspace(0.3, 1.2, 3 * map.branches).view(3, map.branches)
    params = torch.tensor([[min(c, 3.0) for c in map.defaults.values()]] * 3).reshape(3, map.n_params)
    expected = moments.reference(sigmas, params, 0, samples, 5, map)
    sigmas, params = sigmas.to(device), params.to(device)
    found = run(sigmas, params, 0, samples, 5, map)
    assert torch.equal(found, run(sigmas, params, 0, samples, 5, map))
    assert torch.equal(found[3:5], run(sigmas, params, 3 * moments.CHUNK, 2 * moments.CHUNK, 5, map))
    assert torch.equal(found[:, 1:2], run(sigmas[1:2], params[1:2], 0, samples, 5, map))
    ours, theirs = found.cpu().sum(0) / samples, expected.sum(0) / samples
    spread = ((theirs[..., 1] - theirs[..., 0] ** 2).clamp_min(0) / samples).sqrt()
    assert ((ours - theirs)[..., 0].abs() <= 5 * spread + 1e-6).all()
    spread = ((theirs[..., 2] - theirs[..., 1] ** 2).clamp_min(0) / samples).sqrt()
    assert ((ours - theirs)[..., 1].abs() <= 5 * spread + 1e-6).all()
    # the draws are the same: far closer than that
    assert moments_error(found.cpu(), expected) <= 1e-3


# -- what takes most of the device


@pytest.mark.alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_two_to_the_31_elements(device, dtype):
    rows, columns = (1 << 25) + 3, 64
    # the output, the gradient of the pre-activation, and what one of them takes once more, in float32
    needed = (2 * dtype.itemsize + 4) * rows * columns
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    net = layer(device, 2, columns, "sine", dtype)
    x = (torch.rand(rows, 2, device=device) * 2 - 1).to(dtype)
    g = torch.ones(1, 1, device=device, dtype=dtype).expand(rows, columns)
    y, gx, gw, gb = outputs_and_gradients(net, x, g)
    for part in (slice(0, 777), slice(rows // 2, rows // 2 + 777), slice(rows - 777, rows)):
        some = outputs_and_gradients(net, x[part], g[part])
        assert torch.equal(y[part], some[0])
        assert torch.equal(gx[part], some[1])
    del y, gx
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in (gw, gb)]
    sizes = [torch.zeros_like(t) for t in sums]
    weight, bias = net.weight.detach().double(), net.bias.detach().double()
    for piece in x.split(1 << 19):
        piece = piece.double()
        gz = 30 * torch.cos(30 * (piece @ weight.t() + bias))
        sums[0] += gz.t() @ piece
        sums[1] += gz.sum(0)
        sizes[0] += gz.abs().t() @ piece.abs()
        sizes[1] += gz.abs().sum(0)
    # each term is rounded to the stored type (2^-8 of it for bfloat16), errors of random sign; sums in float32 walk
    # likewise
    for value, exact, size in zip((gw, gb), sums, sizes):
        slack = bounds.UNIT[dtype] * exact.abs() + 16 * bounds.UNIT[dtype] * size / math.sqrt(rows) + 2.0**-20 * size
        assert ((value.double() - exact).abs() <= slack).all()
