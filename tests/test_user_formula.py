"""An activation from a formula given at run time: every order, every layer, every backend, compiled or not."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import sympy
import torch
from linear_act_oracle import compiler, pytest_generate_tests, using  # noqa: F401
from tolerances import UNIT, Map, Rounded, cat, tolerance, worst
from torch.autograd import gradcheck, gradgradcheck

import fused_inr as fi
from fused_inr import activations
from fused_inr.activations import symbols
from fused_inr.functional import linear_act

#: name -> (formula, parameters, the same in PyTorch)
FORMULAS = {
    "test_chirp": (lambda z, omega: sympy.sin(omega * z**2), {"omega": 2.0}, lambda z, omega: torch.sin(omega * z**2)),
    "test_snake": (
        lambda z, a: z + sympy.sin(a * z) ** 2 / a,
        {"a": 1.5},
        lambda z, a: z + torch.sin(a * z) ** 2 / a,
    ),
    "test_gated": (
        lambda z, gate, k: symbols.sigmoid(k * gate) * sympy.tanh(z),
        {"k": 2.0},
        lambda z, gate, k: torch.sigmoid(k * gate) * torch.tanh(z),
    ),
    "test_polar": (
        lambda z, w: (sympy.exp(-(w**2)) * sympy.cos(z), sympy.exp(-(w**2)) * sympy.sin(z)),
        {},
        lambda z, w: (torch.exp(-(w**2)) * torch.cos(z), torch.exp(-(w**2)) * torch.sin(z)),
    ),
}


@pytest.fixture(params=FORMULAS)
def defined(request):
    """The activation, and PyTorch's version on branches side by side with the present parameters."""
    formula, parameters, by_hand = FORMULAS[request.param]
    activation = activations.define(request.param, formula, **parameters)

    def plain(z, **values):
        values = {**activation.params, **values}
        # by position: the branches, then the parameters
        y = by_hand(*z.chunk(activation.branches, -1), *(torch.as_tensor(v, dtype=z.dtype) for v in values.values()))
        return torch.cat(y, -1) if isinstance(y, tuple) else y

    return activation, plain, by_hand


def tensors(activation, m=4, k=3, n=2, dtype=torch.float64):
    shapes = ((m, k), (activation.branches * n, k), (activation.branches * n,))
    return [torch.randn(*s, dtype=dtype).mul_(0.5).requires_grad_() for s in shapes]


def test_every_order(defined, exact_backend):
    activation, plain, _ = defined
    leaves = tensors(activation)
    with using(exact_backend):
        f = lambda *t: linear_act(*t, activation)  # noqa: E731
        y = f(*leaves)
        expected = plain(torch.nn.functional.linear(*leaves))
        torch.testing.assert_close(y, expected, rtol=tolerance("same arithmetic"), atol=tolerance("same arithmetic"))
        assert gradcheck(f, leaves, check_forward_ad=True, nondet_tol=tolerance("nondeterminism"))
        assert gradgradcheck(f, leaves, check_fwd_over_rev=True, nondet_tol=tolerance("nondeterminism"))

        def slope(*t):
            return torch.autograd.grad((f(*t).sin() ** 2).sum(), t[0], create_graph=True)

        assert gradgradcheck(slope, leaves, fast_mode=True, nondet_tol=tolerance("nondeterminism"))


def test_learnable_parameters(defined, exact_backend):
    activation, _, _ = defined
    if not activation.param_names:
        pytest.skip("no parameters")
    for shape in ((), (2,)):
        values = [torch.full(shape, v, dtype=torch.float64).requires_grad_() for v in activation.params.values()]

        def f(x, w, b, *p):
            return linear_act(x, w, b, activation.with_params(**dict(zip(activation.param_names, p, strict=True))))

        with using(exact_backend):
            leaves = (*tensors(activation), *values)
            assert gradcheck(f, leaves, nondet_tol=tolerance("nondeterminism"))
            assert gradgradcheck(f, leaves, nondet_tol=tolerance("nondeterminism"))


def test_rounding_in_float32(defined, backend, device):
    activation, _, by_hand = defined
    leaves = [t.detach().to(device).requires_grad_() for t in tensors(activation, 129, 17, 33, torch.float32)]
    with using(backend):
        y = linear_act(*leaves, activation)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    unit = UNIT[torch.float32]
    x, weight, bias = (Rounded.exact(t.cpu(), unit) for t in leaves)
    z = (x @ weight.T) + bias
    z = Rounded(z.value, z.error + 2 * unit * z.size, unit)
    parameters = [torch.tensor(v, dtype=torch.float64) for v in activation.params.values()]
    map = Map(by_hand, activation.branches, z, parameters, 1)
    assert worst(y.cpu(), cat(map.value), torch.float32) <= 1
    gz = []
    for b in range(activation.branches):
        total = map.first[0][b]
        for c in range(1, activation.outputs):
            total = total + map.first[c][b]
        gz.append(total)
    gz = cat(gz)
    for got, bound in zip(gradients, (gz @ weight, gz.T @ x, gz.sum(0))):
        assert worst(got.cpu(), bound, torch.float32) <= 1


def test_in_every_layer_and_model(defined, backend, device):
    """It trains in layers, models, under torch.compile and torch.func, and is initialised by VI3NR."""
    activation, plain, _ = defined
    learnable = activation.map(learnable=True) if activation.param_names else activation
    layer = fi.FusedLinear(3, 4, activation=learnable, device=device)
    net = fi.MLP(3, 8, 1, 2, activation=learnable, init="vi3nr", device=device)
    x = torch.rand(17, 3, device=device)
    with using(backend):
        values = {n: getattr(layer, n) for n in activation.param_names}
        torch.testing.assert_close(layer(x), plain(torch.nn.functional.linear(x, layer.weight, layer.bias), **values))
        net(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        torch._dynamo.reset()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), net(x))
        torch.testing.assert_close(torch.func.vmap(net)(x), net(x))
        assert backend in fi.backends.explain(net, x)
    assert fi.init.vi3nr_gain_MC(1.0, activation, samples=1000, seed=0) > 0


def test_it_is_compiled_once_and_only_when_used(monkeypatch):
    if compiler() is None:
        pytest.skip("no C++ compiler on PATH")
    from fused_inr import native

    built = []
    run = native.compile_maps
    monkeypatch.setattr(native, "compile_maps", lambda key, source: built.append(key) or run(key, source))
    with using("cpu"):
        mine = activations.define("test_once", lambda z, a: sympy.cos(a * z) * z, a=0.7)
        assert not built
        x, w, b = tensors(mine)
        for a in (0.7, 0.9):
            for _ in range(2):
                linear_act(x, w, b, mine.with_params(a=a)).sum().backward()
        assert built == [mine.map.key]
        again = activations.define("test_once", lambda z, a: sympy.cos(a * z) * z, a=0.7)
        linear_act(x, w, b, again)
        assert built == [mine.map.key]
        other = activations.define("test_once", lambda z, a: sympy.sin(a * z) * z, a=0.7)
        z = torch.nn.functional.linear(x, w, b)
        torch.testing.assert_close(linear_act(x, w, b, other), torch.sin(0.7 * z) * z)
        torch.testing.assert_close(linear_act(x, w, b, mine), torch.cos(0.7 * z) * z)
        assert len(built) == 2


def test_it_travels(defined, exact_backend, tmp_path):
    """Copies and pickles carry the formula, also into a process that never saw it."""
    activation, _, _ = defined
    net = fi.MLP(3, 8, 1, 2, activation=activation)
    x = torch.rand(5, 3)
    with using(exact_backend):
        y = net(x)
        assert torch.equal(copy.deepcopy(net)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    (tmp_path / "net.pickle").write_bytes(pickle.dumps((net, x, y.detach())))
    script = f"""
        import pickle, torch, fused_inr as fi
        net, x, y = pickle.load(open("net.pickle", "rb"))
        with fi.backends.use({exact_backend!r}):
            assert torch.equal(net(x), y)
    """
    run(script, tmp_path)


def run(script: str, folder, **environment) -> subprocess.CompletedProcess:
    # the package as this process sees it, whether installed or from a checkout
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-W", "always", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_without_a_compiler_the_reference_serves_and_says_so_once(tmp_path):
    script = """
        import sympy, torch, fused_inr as fi
        mine = fi.activations.define("chirp", lambda z, omega: sympy.sin(omega * z**2), omega=2.0)
        layer = fi.FusedLinear(3, 4, activation=mine)
        x = torch.rand(5, 3)
        for _ in range(3):
            y = layer(x)
            y.sum().backward()
        z = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, torch.sin(2 * z**2))
        print(fi.backends.explain(layer, x))
        try:
            with fi.backends.use("cpu"):
                layer(x)
        except RuntimeError as error:
            print("refused:", error)
    """
    done = run(script, tmp_path, CXX=str(tmp_path / "no-such-compiler"), XDG_CACHE_HOME=str(tmp_path))
    assert "reference" in done.stdout
    assert "refused: backend 'cpu' cannot run" in done.stdout
    assert "no-such-compiler" in done.stdout
    assert done.stderr.count("RuntimeWarning: fused_inr runs on the PyTorch reference") == 1, done.stderr


def test_a_formula_beyond_its_compiled_orders_still_differentiates(exact_backend):
    """Fifth derivative of z -> sin(omega z): omega^5 cos(omega z)."""
    mine = activations.define("test_deep", lambda z, omega: sympy.sin(omega * z), omega=2.0)
    x = torch.rand(4, 1, dtype=torch.float64, requires_grad=True)
    with using(exact_backend):
        y = linear_act(x, torch.eye(1, dtype=torch.float64), None, mine)
        for _ in range(5):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    expected = 32 * torch.cos(2 * x)
    torch.testing.assert_close(y, expected, rtol=tolerance("same arithmetic"), atol=tolerance("same arithmetic"))


# -- pieces that are not taken

PIECEWISE = {
    # name -> (formula, parameters, points, values, first, second derivatives)
    "test_elu": (
        lambda z: sympy.Piecewise((z, z > 0), (sympy.exp(z) - 1, True)),
        [1e3, 100.0, 2.0, -1.0, -800.0],
        lambda z: torch.where(z > 0, z, torch.expm1(z.clamp(max=0))),
    ),
    "test_entropy": (
        lambda z: sympy.Piecewise((z * sympy.log(z), z > 0), (z, True)),
        [1e3, 3.0, 0.5, -1.0, -3.0, 0.0],
        lambda z: torch.where(z > 0, z * torch.where(z > 0, z, 1.0).log(), z),
    ),
    "test_three_pieces": (
        lambda z: sympy.Piecewise((sympy.sqrt(-z - 1), z < -1), (1 / (z + 2), z < 1), (sympy.exp(-(z**2)), True)),
        [-900.0, -5.0, -2.0, -0.5, 0.9, 3.0, 900.0],
        lambda z: torch.where(
            z < -1,
            (-torch.where(z < -1, z, -2.0) - 1).sqrt(),
            torch.where(z < 1, 1 / (torch.where((z < 1) & (z > -1.5), z, 0.0) + 2), torch.exp(-(z**2))),
        ),
    ),
}


@pytest.mark.parametrize("name", PIECEWISE)
def test_pieces_that_are_not_taken_do_no_harm(name, exact_backend):
    formula, points, by_hand = PIECEWISE[name]
    activation = activations.define(name, formula)
    z = torch.tensor([points], dtype=torch.float64, requires_grad=True)
    eye = torch.eye(len(points), dtype=torch.float64)

    def derivatives(f):
        found = [f(z)]
        for _ in range(3):
            found.append(torch.autograd.grad(found[-1].sum(), z, create_graph=True)[0])
            if not found[-1].requires_grad:
                break
        return found

    with using(exact_backend):
        ours = derivatives(lambda z: linear_act(z, eye, None, activation))
    for found in (ours, derivatives(activation)):
        for a, b in zip(found, derivatives(by_hand)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert bool(torch.isnan(activation(torch.tensor([float("nan")]))).all())


def test_pieces_with_parameters_and_branches(exact_backend):
    activation = activations.define(
        "test_hinge", lambda z, w, a: sympy.Piecewise((sympy.exp(a * z) * w, z < w), (a * z + w, True)), a=1.0
    ).with_params(a=torch.tensor(1.5, dtype=torch.float64, requires_grad=True))
    a = activation.params["a"]
    z = torch.tensor([[900.0, -0.5, -0.5, 0.3]], dtype=torch.float64, requires_grad=True)
    with using(exact_backend):
        y = linear_act(z, torch.eye(4, dtype=torch.float64), None, activation)
        gz, ga = torch.autograd.grad(y.sum(), (z, a))
    # element 0: z = 900, w = -0.5, not taken exp(1350); element 1: z = -0.5, w = 0.3, taken
    e = torch.tensor(-0.75, dtype=torch.float64).exp()
    torch.testing.assert_close(y, torch.stack([torch.tensor(1349.5).double(), 0.3 * e]).unsqueeze(0))
    expected = torch.stack([torch.tensor(1.5).double(), 0.45 * e, torch.tensor(1.0).double(), e])
    torch.testing.assert_close(gz, expected[None])
    torch.testing.assert_close(ga, 900 + 0.3 * -0.5 * e)


# -- names


def test_parameters_may_have_any_name(exact_backend):
    names = ("t0", "t1", "g0", "p", "z0", "new", "V", "out", "double", "tl", "u_z", "lambda_", "param1", "torch")

    def formula(z, **values):
        return sum(sympy.sin((i + 1) * v * z) * v for i, v in enumerate(values.values()))

    def signed(z, t0, t1, g0, p, z0, new, V, out, double, tl, u_z, lambda_, param1, torch):
        given = locals()
        return formula(z, **{n: given[n] for n in names})

    values = {name: 0.5 + 0.05 * i for i, name in enumerate(names)}
    activation = activations.define("test_names", signed, **values)
    assert activation.param_names == names

    def plain(z):
        return sum(torch.sin((i + 1) * v * z) * v for i, v in enumerate(values.values()))

    x, weight, bias = tensors(activation)
    with using(exact_backend):
        ours = linear_act(x, weight, bias, activation)
        expected = plain(torch.nn.functional.linear(x, weight, bias))
        first = [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in (ours, expected)]
        second = [torch.autograd.grad(g.square().sum(), weight)[0] for g in first]
    for a, b in ((ours, expected), first, second):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    layer = fi.FusedLinear(3, 2, activation=activation.map(learnable=("t0", "new")), dtype=torch.float64)
    assert {"t0", "new"} < set(layer.state_dict())
    with using(exact_backend):
        assert gradcheck(lambda t0: torch.func.functional_call(layer, {"t0": t0}, (x.detach(),)), (layer.t0,))


def test_names_of_arguments_are_refused():
    with pytest.raises(ValueError, match="'per_feature'"):
        activations.define("test_taken", lambda z, per_feature: per_feature * z, per_feature=1.0)


@pytest.mark.parametrize("result", ["z + 1", b"z", None, True, [["z"]], ("sin(z)",)])
def test_what_a_formula_returns_is_not_evaluated(result):
    for make in (
        lambda: activations.define("test_text", lambda z: result),
        lambda: fi.losses.define("test_text_loss", lambda p, t: result),
    ):
        with pytest.raises(TypeError, match="must return a sympy expression"):
            make()


def test_a_learnable_power_of_zero(exact_backend):
    power = activations.define("test_power", lambda z, a: sympy.Abs(z) ** a, a=2.5)
    a = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[0.0, 0.5, -2.0]], dtype=torch.float64)
    with using(exact_backend):
        y = linear_act(z, torch.eye(3, dtype=torch.float64), None, power.with_params(a=a))
        (found,) = torch.autograd.grad(y.sum(), a)
    (expected,) = torch.autograd.grad((z.abs() ** a).sum(), a)
    torch.testing.assert_close(found, expected)
