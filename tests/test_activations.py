"""The maps: formulas, generated derivatives, definitions at run time."""

import copy
import pickle
import subprocess
import sys

import pytest
import sympy
import torch

import fused_inr as fi
from fused_inr import activations
from fused_inr.activations import printing
from fused_inr.activations.spec import MAX_LEARNABLE_LEVEL, MAX_LEVEL

NAMES = activations.names()
MAPS = activations.registered()
#: Activations whose derivatives are, on purpose, not those of their values.
DETACHED = {m.name for m in MAPS if m.facts.detached}
#: The formula of each activation and loss as a user of PyTorch would write it.
BY_HAND = {m.name: m.facts.eager for m in (*MAPS, *activations.registered_losses())}
LOSSES = tuple(m.name for m in activations.registered_losses())


def streams(map, n=64, seed=0):
    """Random pre-activations in a range where the map does something, and its default parameters, as leaves."""
    g = torch.Generator().manual_seed(seed)
    z = [torch.randn(n, generator=g, dtype=torch.float64) * 0.3 for _ in range(map.branches)]
    p = [torch.tensor(v if v else 0.1, dtype=torch.float64) for v in map.defaults.values()]
    return [t.requires_grad_() for t in z], [t.requires_grad_() for t in p]


def test_everything_registered_has_a_formula_by_hand():
    assert set(BY_HAND) == {*NAMES, *LOSSES}
    assert all(BY_HAND.values()), [name for name, formula in BY_HAND.items() if formula is None]


def test_facts_name_what_there_is():
    for map in MAPS:
        facts = map.facts
        values = {**map.defaults, **facts.test_values}
        assert set(values) == set(map.defaults)
        assert issubclass(getattr(fi.models, facts.model), torch.nn.Module)
        assert issubclass(getattr(fi.layers, facts.layer), torch.nn.Module)
        for rule in (facts.sigma_p, facts.slope, facts.model_arguments):
            assert rule is None or rule(**values)
    for map in activations.registered_losses():
        assert callable(getattr(fi.losses, map.facts.public))


def test_complex_gabor_is_the_exponential_of_complex_numbers():
    map = activations.lookup("complex_gabor")
    (a, b), (omega, scale) = streams(map)
    z = torch.complex(a, b)
    expected = torch.view_as_real(torch.exp(1j * omega * z - (scale * z).abs() ** 2)).unbind(-1)
    for got, want in zip(map.facts.eager(a, b, omega, scale), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [m.name for m in MAPS if m.facts.slope])
def test_the_slope_is_the_largest(name):
    map = activations.lookup(name)
    values = {**map.defaults, **map.facts.test_values}
    bound, unit = map.facts.slope(**values), 4 * map.facts.test_sigma
    axis = torch.linspace(-unit, unit, 20001 if map.branches == 1 else 201 if map.branches == 2 else 17)
    axis = axis.double()
    z = [t.flatten().requires_grad_() for t in torch.meshgrid(*[axis] * map.branches, indexing="ij")]
    steepest = 0.0
    for y in map.torch_map(0)(*z, *values.values()):
        for slope in torch.autograd.grad(y.sum(), z, retain_graph=True):
            steepest = max(steepest, slope.abs().max().item())
    assert steepest <= bound * (1 + 1e-9)
    assert map.branches > 2 or steepest >= 0.98 * bound


@pytest.mark.parametrize("name", [*NAMES, *LOSSES])
def test_value(name):
    map = activations.lookup(name)
    z, p = streams(map)
    expected = BY_HAND[name](*z, *p)
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = map.torch_map(0)(*z, *p)
    assert len(got) == map.outputs == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [*NAMES, *LOSSES])
@pytest.mark.parametrize("learnable", [False, True])
def test_each_level_is_the_vjp_of_the_level_below(name, learnable):
    map = activations.lookup(name)
    if learnable and not map.n_params:
        pytest.skip("no parameters")
    g = torch.Generator().manual_seed(1)
    for level in range(1, (MAX_LEARNABLE_LEVEL if learnable else MAX_LEVEL) + 1):
        lower, upper = map.program(level - 1, learnable), map.program(level, learnable)
        z, p = streams(map)
        values = {}
        for group, names in lower.inputs:
            for n in names:
                if n in map.param_names:
                    values[n] = p[map.param_names.index(n)]
                elif group == "z":
                    values[n] = z[int(n[1:])]
                else:
                    shape = z[0].shape if lower.is_row(group) else ()
                    values[n] = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        inputs = [values[n] for n in lower.input_names]
        if name in DETACHED and level == 1:
            outputs = BY_HAND[name](*inputs)
            outputs = (outputs,)
        else:
            outputs = map.torch_map(level - 1, learnable)(*inputs)
        # a parameter's gradient is summed over the rows before it goes on
        rows = [lower.is_row(group) for group, nodes in lower.outputs for _ in nodes]
        cotangents = [
            torch.randn(o.shape if r else (), generator=g, dtype=torch.float64)
            for o, r in zip(outputs, rows, strict=True)
        ]
        total = sum((o * c).sum() for o, c in zip(outputs, cotangents, strict=True))
        wanted = [n for group, names in lower.inputs for n in names if learnable or n not in map.param_names]
        expected = torch.autograd.grad(total, [values[n] for n in wanted], allow_unused=True, materialize_grads=True)
        got = map.torch_map(level, learnable)(*[v.detach() for v in inputs], *cotangents)
        kinds = [upper.is_row(group) for group, nodes in upper.outputs for _ in nodes]
        assert len(got) == len(expected)
        for n, a, b, row in zip(wanted, got, expected, kinds, strict=True):
            a = a if row else a.sum()
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-9 * (1 + b.abs().max().item()), msg=f"{name} {level} {n}"
            )


def test_committed_files_are_what_the_generator_writes():
    result = subprocess.run(
        [sys.executable, "-m", "fused_inr.activations.emit", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_generated_code_is_reproducible():
    source = printing.torch_source(activations.registered())
    assert source == printing.torch_source(activations.registered())
    assert "nan" not in source and "inf" not in source


@pytest.mark.parametrize("name", NAMES)
def test_construction_and_identity(name):
    a, b = activations.get(name), activations.get(name)
    assert a == b and hash(a) == hash(b) and a.name == name
    assert copy.deepcopy(a) == a and pickle.loads(pickle.dumps(a)) == a
    assert repr(a).startswith(name + "(")
    z = torch.randn(3, 2 * a.branches)
    assert a(z).shape == (3, 2 * a.outputs)
    for p in a.param_names:
        assert a.with_params(**{p: 0.77}) != a


def test_pickles_of_earlier_versions_load():
    from fused_inr.activations import registry

    made = activations.define("pickled_test", lambda z, omega: sympy.sin(omega * z), omega=2.0)
    for activation in (activations.sine(omega=3.0), made):
        _, arguments = activation.map.__reduce__()
        assert registry._unpickle_map(*arguments) is activation.map


def test_gaussian_parametrisations():
    z = torch.linspace(-1, 1, 101, dtype=torch.float64)
    s = 0.3
    a, b = activations.gaussian(sigma=s)(z), activations.gaussian(scale=1 / (2**0.5 * s))(z)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="sigma or scale, not both"):
        activations.gaussian(sigma=1.0, scale=1.0)


def test_define_matches_the_formula_at_every_order():
    mine = activations.define("chirp_test", lambda z, omega: sympy.sin(omega * z**2), omega=2.0)
    z = torch.randn(20, dtype=torch.float64, requires_grad=True)
    y = mine(z)
    torch.testing.assert_close(y, torch.sin(2 * z**2))
    g = torch.randn(20, dtype=torch.float64)
    torch.testing.assert_close(mine.map.torch_map(1)(z, 2.0, g)[0], 4 * z * torch.cos(2 * z**2) * g)
    assert mine.with_params(omega=3.0)(z).allclose(torch.sin(3 * z**2))
    again = pickle.loads(pickle.dumps(mine))
    assert again == mine and again(z).equal(y)
    assert activations.get("chirp_test") == mine


@pytest.mark.parametrize(
    ("formula", "by_hand"),
    [
        (
            lambda z: sympy.Piecewise((z**2, z > 0), (sympy.sin(z), True)),
            lambda z: torch.where(z > 0, z**2, torch.sin(z)),
        ),
        (lambda z: sympy.Max(z, 0) ** 2 + sympy.Min(z, 1), lambda z: torch.relu(z) ** 2 + torch.clamp(z, max=1)),
        (lambda z: sympy.sqrt(1 + z**2) ** -1, lambda z: (1 + z**2) ** -0.5),
        (
            lambda z: sympy.log(2 + sympy.cos(z)) / (1 + sympy.Abs(z)),
            lambda z: torch.log(2 + torch.cos(z)) / (1 + z.abs()),
        ),
        (lambda z: sympy.sech(z), lambda z: 1 / torch.cosh(z)),
        (lambda z: (1 + z**2) ** sympy.Rational(1, 3), lambda z: (1 + z**2) ** (1 / 3)),
        (lambda z: sympy.erfc(z) * sympy.atan(z), lambda z: torch.erfc(z) * torch.atan(z)),
        (lambda z: sympy.Heaviside(z) * z, torch.relu),
    ],
)
def test_formula_language(formula, by_hand):
    mine = activations.define("language_test", formula)
    z = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mine(z), by_hand(z), rtol=1e-12, atol=1e-14)
    g = torch.randn(41, dtype=torch.float64)
    expected = torch.autograd.grad((by_hand(z) * g).sum(), z, create_graph=True)[0]
    u = torch.randn(41, dtype=torch.float64)
    torch.testing.assert_close(mine.map.torch_map(1)(z, g)[0], expected, rtol=1e-11, atol=1e-13)
    second = torch.autograd.grad((expected * u).sum(), z, allow_unused=True, materialize_grads=True)[0]
    torch.testing.assert_close(mine.map.torch_map(2)(z, g, u)[0], second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: activations.define("sine", lambda z: z), ValueError, "registered activation"),
        (lambda: activations.define("not a name", lambda z: z), ValueError, "identifier"),
        (lambda: activations.define("f", 3), TypeError, "function of sympy symbols"),
        (lambda: activations.define("f", lambda z: sympy.Symbol("q", real=True) * z), ValueError, "unknown symbols"),
        (lambda: activations.define("f", lambda z: sympy.gamma(z)), ValueError, "cannot be compiled"),
        (lambda: activations.define("f", lambda omega: omega, omega=1.0), ValueError, "at least one argument"),
        (lambda: activations.define("f", lambda z, a: a * z, a="x"), TypeError, "expected a number"),
        (lambda: activations.define("f", lambda z: "no"), TypeError, None),
        (lambda: activations.sine(omega=float("nan")), ValueError, "finite"),
        (lambda: activations.sine(omega="a"), TypeError, "omega"),
        (lambda: activations.sine(omga=1.0), TypeError, "unknown parameter"),
        (lambda: activations.sine(omega=torch.ones(2, 2)), ValueError, "shape"),
        (lambda: activations.sine(omega=torch.ones(2, dtype=torch.int64)), TypeError, "floating"),
        (lambda: activations.sine(learnable="sigma"), ValueError, "no parameter"),
        (lambda: activations.get("nosuch"), ValueError, "registered"),
        (lambda: activations.get(3), TypeError, "activation"),
        (lambda: activations.split(omegas=(1.0, 2.0)), ValueError, "four"),
        (lambda: activations.sine().with_params(w=1), TypeError, "no parameter"),
        (lambda: activations.split()(torch.zeros(3, 5)), ValueError, "multiple of 4"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_operations_are_counted():
    """What decides that a layer of few rows is PyTorch's: the functions of the plain map, composite ones as several."""
    counts = {name: fi.activations.get(name).map.operations for name in activations.names()}
    assert counts["identity"] == 0 and counts["tanh"] == 1 and counts["sine"] == 2
    assert counts["sinc"] > 4 and counts["split"] > 10
