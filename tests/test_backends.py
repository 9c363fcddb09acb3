"""Who runs an operation: the choice, its explanation, and what is said when the wanted backend cannot serve."""

import threading
import warnings

import pytest
import torch

import fused_inr as fi
from fused_inr import backends
from fused_inr.backends import choice, explanation
from fused_inr.functional import linear_act


@pytest.fixture
def fresh(monkeypatch):
    """Forget earlier choices and warnings."""
    monkeypatch.setattr(choice, "_serving_cache", {})
    monkeypatch.setattr(choice, "_warned", set())


def call(dtype=torch.float32, device="cpu"):
    x = torch.ones(4, 3, dtype=dtype, device=device)
    return fi.functional.linear_act(
        x, torch.ones(5, 3, dtype=dtype, device=device), None, fi.activations.sine(omega=2.0)
    )


def test_table_names_every_backend_with_a_reason_where_it_cannot_run():
    table = fi.backends.available()
    assert set(table) == {"triton", "cuda", "cpu", "reference"}
    assert table["reference"] == (True, "")
    for usable, reason in table.values():
        assert usable == (reason == "")


def test_use_is_nested_and_restored_even_after_an_error():
    with fi.backends.use("reference"):
        assert "reference" in fi.backends.explain(call)
        with pytest.raises(KeyError), fi.backends.use("reference"):
            raise KeyError
        assert backends.demanded() == "reference"
    assert backends.demanded() is None


def test_use_belongs_to_its_thread():
    """Two threads whose blocks overlap: each has its own, and nothing is left behind."""
    inside, leave, seen = threading.Event(), threading.Event(), {}

    def other():
        seen["before"] = backends.demanded()
        with fi.backends.use("reference"):
            seen["explained"] = fi.backends.explain(call)
            inside.set()
            leave.wait(60)
        seen["after"] = backends.demanded()

    thread = threading.Thread(target=other)
    with fi.backends.use("reference"):
        thread.start()
        assert inside.wait(60)
    assert backends.demanded() is None  # the other one is still within its block
    leave.set()
    thread.join()
    assert seen["before"] is seen["after"] is None and "reference" in seen["explained"]
    assert backends.demanded() is None and choice.BACKEND_SETTING.compiled is None


def test_a_compiled_function_follows_a_block_and_leaves_it():
    torch._dynamo.reset()
    x = torch.randn(5, 3)
    layer = fi.FusedLinear(3, 4, activation="sine")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ran = []
    reference = backends.Reference.linear_act
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.Reference, "linear_act", lambda self, *a: ran.append(1) or reference(self, *a))
        with fi.backends.use("reference"):
            y = compiled(x)
        assert ran == [1]
        torch.testing.assert_close(compiled(x), y)
        if backends.available()["cpu"][0]:
            assert ran == [1]


@pytest.mark.skipif(not backends.available()["cpu"][0], reason="needs the native engine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_freed_storage_is_refused(dtype):
    """As FSDP frees parameters between their uses: an error, and no access to what is not there."""

    def freed(t):
        t = t.detach().clone()
        t.untyped_storage().resize_(0)
        return t

    act = fi.activations.sine(omega=torch.ones(4, dtype=dtype))
    x, w, b = torch.randn(6, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype), torch.randn(4, dtype=dtype)
    short = torch.randn(6, 3, dtype=dtype)
    short.untyped_storage().resize_(short.untyped_storage().nbytes() - 1)
    wrong = [(freed(x), w, b), (x, freed(w), b), (x, w, freed(b))]
    if dtype != torch.float64:  # whose products are PyTorch's, which looks at what is freed, not at what is short
        wrong.append((short, w, b))
    for arguments in wrong:
        with pytest.raises(RuntimeError, match=r"freed|not allocated|out of bounds|storage"):
            linear_act(*arguments, act)
    with pytest.raises(RuntimeError, match=r"freed|not allocated|storage"):
        linear_act(x, w, b, fi.activations.sine(omega=freed(torch.ones(4, dtype=dtype))))
    net = fi.SIREN(3, 8, 1, 2, norm="layer", dtype=dtype, fusion="network")
    target, weight = torch.randn(6, 2, dtype=dtype), torch.ones(6, dtype=dtype)
    for arguments in ((freed(x), target, weight), (x, freed(target), weight), (x, target, freed(weight))):
        with pytest.raises(RuntimeError, match="freed"):
            fi.losses.mse(net, *arguments)
    for parameter in list(net.parameters()):
        kept = parameter.detach().clone()
        parameter.untyped_storage().resize_(0)
        for call in (lambda: net(x), lambda: fi.losses.mse(net, x, target, weight)):
            with pytest.raises(RuntimeError, match="freed"):
                call()
        parameter.untyped_storage().resize_(kept.untyped_storage().nbytes())
        with torch.no_grad():
            parameter.copy_(kept)
    y = net(x)
    net.net[0].linear.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"freed"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["cuda-graphs", "", None, 3])
def test_use_refuses_unknown_names(name):
    with pytest.raises(ValueError, match="'triton', 'cuda', 'cpu', 'reference'"), fi.backends.use(name):
        pass


def test_a_demanded_backend_runs_or_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(backends.Cpu, "available", lambda self: (False, "no compiler found"))
    with (
        fi.backends.use("cpu"),
        pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run sine\(omega=2\).*no compiler"),
    ):
        call()


def test_automatic_fallback_computes_the_same_and_warns_once(monkeypatch, fresh):
    with fi.backends.use("reference"):
        expected = call()
    monkeypatch.setattr(backends.Cpu, "available", lambda self: (False, "no compiler found"))
    monkeypatch.setattr("fused_inr.ops.linear_act._FEW", 0)  # a few rows are PyTorch's in any case
    with pytest.warns(RuntimeWarning, match="backend 'cpu' cannot serve: no compiler found"):
        assert call().equal(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call().equal(expected)
        call(torch.float64)


def test_devices_without_a_backend_of_their_own_use_the_reference_silently(fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(device="meta").shape == (4, 5)


def test_explain_lists_each_call_with_reasons():
    net = fi.SIREN(in_features=2, hidden_features=16, hidden_layers=1, out_features=3, fusion="layers")
    text = fi.backends.explain(net, torch.zeros(2000, 2))
    assert "linear_act [2000, 2] x [16, 2] torch.float32 sine(omega=30)" in text
    assert "linear_act [2000, 16] x [16, 16]" in text
    assert "not triton: " in text
    with pytest.raises(ValueError, match="no fused_inr operation ran"):
        fi.backends.explain(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_explain_leaves_no_recording_behind():
    fi.backends.explain(call)
    assert explanation.records() is None


def test_memory_of_large_results_is_kept_and_given_back():
    if not fi.backends.available()["cpu"][0]:
        pytest.skip("no native engine")
    weight = torch.ones(256, 3)
    before = fi.backends.set_cache_limit(1 << 30)
    try:
        fi.backends.empty_cache()
        y = fi.functional.linear_act(torch.ones(8192, 3), weight, None, "tanh")
        kept, address = y.clone(), y.data_ptr()
        z = y[:10]
        del y
        assert z.equal(kept[:10])  # a view keeps its block
        again = fi.functional.linear_act(torch.zeros(8192, 3), weight, None, "tanh")
        assert again.data_ptr() != address and z.equal(kept[:10])
        del z
        third = fi.functional.linear_act(torch.ones(8192, 3), weight, None, "tanh")
        assert third.data_ptr() == address and third.equal(kept)
        del again, third
        assert fi.backends.empty_cache() == 2 * 8192 * 256 * 4
        assert fi.backends.empty_cache() == 0
        fi.backends.set_cache_limit(0)
        fi.functional.linear_act(torch.ones(8192, 3), weight, None, "tanh")
        assert fi.backends.empty_cache() == 0
    finally:
        fi.backends.set_cache_limit(before)


@pytest.mark.parametrize("size", [-1, 1.5, True, None])
def test_cache_limit_refuses(size):
    with pytest.raises(ValueError, match="size: expected a number of bytes"):
        fi.backends.set_cache_limit(size)


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_precision_follows_pytorch(setting, expected):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert backends.precision_of(cuda, torch.float32) == expected
        assert backends.precision_of(cpu, torch.float32) == "ieee"
        assert backends.precision_of(cuda, torch.bfloat16) == "bf16"
        assert backends.precision_of(cuda, torch.float16) == "fp16"
    finally:
        torch.set_float32_matmul_precision(before)
