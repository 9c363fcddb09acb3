"""How float32 products on a GPU are computed: who decides, in which thread, who obeys, and how far off they may be.

No GPU is needed: the choice asks a device for its type alone, and what an operation was told is read off its call.
"""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from fused_inr.bench import bounds
from torch.utils._python_dispatch import TorchDispatchMode

import fused_inr as fi
from fused_inr import backends
from fused_inr.backends import choice, triton
from fused_inr.backends.precision import PRODUCTS_SETTING
from fused_inr.network import Layer

CUDA, CPU, F32 = torch.device("cuda"), torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """As they are in a fresh process, before and after; PyTorch's own come back, too."""
    monkeypatch.setattr(choice, "_serving_cache", {})
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    assert backends.set_float32_products(None) is None
    assert not PRODUCTS_SETTING._blocks and PRODUCTS_SETTING.compiled is None


@pytest.fixture
def on_cuda(monkeypatch):
    """What stands for a call on a CUDA device: nothing is computed there."""
    monkeypatch.setattr(backends.Triton, "serves", lambda self, map, device, dtype: "")
    monkeypatch.setattr(backends.Cuda, "serves", lambda self, map, device, dtype: "")
    return SimpleNamespace(device=CUDA, dtype=F32, shape=(4, 3))


def now(device=CUDA, dtype=F32, backend="triton") -> str:
    return backends.precision_of(device, dtype, backend)


# -- what was asked for


@pytest.mark.parametrize("of_pytorch", ["ieee", "tf32"])
@pytest.mark.parametrize("asked", [None, "ieee", "tf32", "tf32x3", "bf16x3"])
def test_the_choice_holds_where_it_means_something(asked, of_pytorch):
    torch.backends.cuda.matmul.fp32_precision = of_pytorch
    with fi.backends.float32_products(asked):
        assert now() == (asked or of_pytorch)
        assert now(backend="cuda") == now(backend="reference") == of_pytorch
        assert now(device=CPU) == now(dtype=torch.float64) == "ieee"
        assert (now(dtype=torch.bfloat16), now(dtype=torch.float16)) == ("bf16", "fp16")
    assert now() == of_pytorch


def test_blocks_nest_and_go_over_the_setting_of_the_process():
    assert fi.backends.set_float32_products("tf32") is None
    assert now() == "tf32"
    with fi.backends.float32_products("bf16x3"):
        with fi.backends.float32_products(None):
            assert now() == "ieee"  # PyTorch's, whatever the process asks for
        assert now() == "bf16x3"
        with pytest.raises(KeyError), fi.backends.float32_products("tf32x3"):
            raise KeyError(now())
        assert now() == "bf16x3"
        assert fi.backends.set_float32_products("ieee") == "tf32"
        assert now() == "bf16x3"
    assert now() == "ieee"
    assert fi.backends.set_float32_products(None) == "ieee"


@pytest.mark.parametrize("precision", ["bf16", "highest", "TF32", "", 3, True, ["ieee"]])
def test_unknown_names_are_refused_with_the_known_ones(precision):
    accepted = "not one of 'ieee', 'tf32', 'tf32x3', 'bf16x3', or None"
    with pytest.raises(ValueError, match=accepted), fi.backends.float32_products(precision):
        pass
    with pytest.raises(ValueError, match=accepted):
        fi.backends.set_float32_products(precision)
    assert now() == "ieee"


def test_each_thread_has_its_own_blocks():
    inside, seen = threading.Barrier(3), {}

    def run(name, asked):
        with fi.backends.float32_products(asked):
            inside.wait(60)
            seen[name] = now()
            inside.wait(60)

    threads = [threading.Thread(target=run, args=job) for job in (("a", "bf16x3"), ("b", "tf32"))]
    for thread in threads:
        thread.start()
    inside.wait(60)
    seen["outside"] = now()
    fi.backends.set_float32_products("tf32x3")
    seen["outside, set"] = now()
    inside.wait(60)
    for thread in threads:
        thread.join(60)
    assert seen == {"a": "bf16x3", "b": "tf32", "outside": "ieee", "outside, set": "tf32x3"}
    fi.backends.set_float32_products(None)


def test_threads_that_leave_in_another_order_leave_nothing_behind():
    first, second = threading.Event(), threading.Event()

    def run():
        with fi.backends.float32_products("bf16x3"):
            first.set()
            second.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    first.wait(60)
    with fi.backends.float32_products("bf16x3"):
        second.set()
        thread.join(60)
        assert now() == PRODUCTS_SETTING.compiled == "bf16x3"
    assert now() == "ieee" and PRODUCTS_SETTING.compiled is None


def test_tasks_of_one_thread_have_their_own_blocks():
    async def run(asked):
        with fi.backends.float32_products(asked):
            await asyncio.sleep(0)
            return now()

    async def both():
        return await asyncio.gather(run("bf16x3"), run("tf32"))

    assert asyncio.run(both()) == ["bf16x3", "tf32"]


# -- who obeys, and what is said


def test_explain_tells_what_runs_and_what_was_not_obeyed(on_cuda, monkeypatch):
    sine = fi.activations.sine()
    torch.backends.cuda.matmul.fp32_precision = "tf32"

    def lines(x):
        records = []
        monkeypatch.setattr(choice, "records", lambda: records)
        backends.choose(sine, x, SimpleNamespace(shape=(5, 3)))
        backends.record_network(x, [Layer(torch.ones(5, 3), None, sine)], *backends.choose(sine, x, x, record=False))
        return [str(choice) for choice in records]

    reason = "not bf16x3 products: backend '{}' leaves float32 products to PyTorch's settings"
    with fi.backends.float32_products("bf16x3"):
        for line in lines(on_cuda):
            assert "triton (bf16x3)" in line and "not " not in line
        for name in ("cuda", "reference"):
            with fi.backends.use(name):
                for line in lines(on_cuda):
                    assert f"{name} (tf32)" in line and reason.format(name) in line
        half = SimpleNamespace(**{**vars(on_cuda), "dtype": torch.bfloat16})
        assert all("bf16x3" not in line and "triton (bf16)" in line for line in lines(half))
    with fi.backends.use("cuda"), fi.backends.float32_products("tf32"):
        assert all("products" not in line for line in lines(on_cuda))


def test_explain_on_a_cpu():
    net = fi.SIREN(2, 16, 1, 3)
    with fi.backends.float32_products("bf16x3"):
        text = fi.backends.explain(net, torch.zeros(7, 2))
    assert "(ieee)" in text and "not bf16x3 products: float32 products on cpu are float32" in text
    assert "products" not in fi.backends.explain(net, torch.zeros(7, 2))


@pytest.mark.parametrize("of_pytorch", ["ieee", "tf32"])
def test_a_product_in_ieee_goes_to_the_library_only_where_that_is_what_the_library_does(of_pytorch, monkeypatch):
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    torch.backends.cuda.matmul.fp32_precision = of_pytorch
    layer_configs = pytest.importorskip("fused_inr.kernels.configurations.linear_act")
    monkeypatch.setattr(layer_configs, "arch", lambda device: "sm80")
    x, weight = torch.ones(1, 64), SimpleNamespace(shape=(64, 64), is_cuda=True)
    for op in ("forward", "input_grad", "weight_grad"):
        assert backends.Triton._by_library(op, x, weight, "ieee") == (of_pytorch == "ieee")
        # few inputs or few outputs are ours, but for the gradient of a weight with few inputs
        for shape, by_library in (((64, 8), op == "weight_grad"), ((8, 64), False)):
            narrow = SimpleNamespace(shape=shape, is_cuda=True)
            assert backends.Triton._by_library(op, x, narrow, "ieee") == (by_library and of_pytorch == "ieee")
        for precision in ("tf32x3", "bf16x3"):
            assert not backends.Triton._by_library(op, x, weight, precision)
        monkeypatch.setitem(layer_configs.LIBRARY, ("sm80", op, "tf32"), 64)
        assert backends.Triton._by_library(op, x, weight, "tf32") == (of_pytorch == "tf32")


class Told(TorchDispatchMode):
    """Which precision each raw operation is told."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = [a.name for a in function._schema.arguments]
        if function.namespace == "fused_inr" and "precision" in names:
            self.calls.append((function._schema.name.split("::")[1], args[names.index("precision")]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fusion", ["network", "layers"])
@pytest.mark.parametrize("step", ["training", "second order", "loss", "second order of the loss"])
def test_derivatives_follow_their_forward(fusion, step, monkeypatch):
    """Of layer, network and loss, through the layers of a network where a derivative is differentiated: the precision
    of the forward, though its block was left and the setting is another one."""
    real = backends.precision_of
    monkeypatch.setattr(choice, "precision_of", lambda device, dtype, backend: real(CUDA, dtype, "triton"))
    net = fi.SIREN(2, 16, 1, 3, fusion=fusion)
    x, target = torch.rand(9, 2), torch.rand(9, 3)
    first = net.parameters().__next__()
    with fi.backends.use("reference"), Told() as told:
        with fi.backends.float32_products("bf16x3"):
            value = fi.losses.mse(net, x, target) if "loss" in step else net(x).square().sum()
        fi.backends.set_float32_products("tf32")
        if "second" in step:
            (g,) = torch.autograd.grad(value, first, create_graph=True)
            value = g.square().sum()
        value.backward()
    fi.backends.set_float32_products(None)
    names = {name for name, _ in told.calls}
    assert {precision for _, precision in told.calls} == {"bf16x3"}
    if fusion == "layers" or "second" in step:
        assert {"linear_act", "linear_act_backward"} <= names
    if fusion == "network":
        assert names >= ({"mlp_loss"} if "loss" in step else {"mlp"})
    assert first.grad.abs().sum() > 0


def test_compiled_functions_follow_every_change():
    codes = {"ieee": 1.0, "tf32": 2.0, "tf32x3": 3.0, "bf16x3": 4.0}

    def f(x):
        return x + codes[backends.precision_of(CUDA, F32)]

    compiled, x = torch.compile(f, fullgraph=True, backend="eager"), torch.zeros(())
    assert compiled(x) == 1
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert compiled(x) == 2
    with fi.backends.float32_products("bf16x3"):
        assert compiled(x) == 4
        with fi.backends.float32_products("ieee"):
            assert compiled(x) == 1
        assert compiled(x) == 4
    assert compiled(x) == 2
    fi.backends.set_float32_products("tf32x3")
    assert compiled(x) == 3
    fi.backends.set_float32_products(None)
    assert compiled(x) == 2


# -- how far off


def rounded(t: torch.Tensor, precision: str) -> torch.Tensor:
    """The piece of t that a matrix unit takes, to nearest."""
    if precision == "bf16x3":
        return t.bfloat16().double()
    bits = t.float().view(torch.int32)  # 10 bits of the significand stay
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def pieces(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    """a b^T out of two pieces of each factor without the product of the smaller ones, added exactly."""
    big_a, big_b = rounded(a, precision), rounded(b, precision)
    small_a, small_b = (rounded(t - big, precision) for t, big in ((a.double(), big_a), (b.double(), big_b)))
    return big_a @ big_b.t() + big_a @ small_b.t() + small_a @ big_b.t()


@pytest.mark.parametrize("precision", ["bf16x3", "tf32x3"])
def test_the_stated_bound_holds_for_what_the_pieces_lose(precision):
    """Against all of a product's bound, and that of full precision does not hold: the pieces are what is measured."""
    torch.manual_seed(0)
    x, weight = torch.randn(200, 64), torch.randn(96, 64)
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    error = (pieces(x, weight, precision) - exact).abs() / size
    assert 0.01 * bounds.FACTOR[precision] < error.max() < bounds.FACTOR[precision]
    assert bounds.FACTOR["ieee"] < bounds.FACTOR["tf32x3"] < bounds.FACTOR["bf16x3"] < bounds.FACTOR["tf32"]


def test_the_bound_of_a_layer_in_bf16x3():
    torch.manual_seed(0)
    x, weight, bias, g = torch.randn(50, 9), torch.randn(32, 9) / 3, torch.zeros(32), torch.randn(50, 32)
    sine = fi.activations.sine(omega=30.0)
    y = torch.sin(30.0 * (pieces(x, weight, "bf16x3") + bias.double())).float()
    for precision, within in (("bf16x3", True), ("ieee", False)):
        exact, bound = bounds.layer_bounds(x, weight, bias, sine, g, precision)
        assert (bounds.of_bound(y, exact["y"], bound["y"])["of_bound"] <= 1) == within
