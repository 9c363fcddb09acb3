"""Bad calls of every public function: the right exception, and a message that names the argument and says what to do.

The command line's are in test_cli.py.
"""

import functools
import math

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_act_oracle import eager, unavailable
from tolerances import UNIT, tolerance
from torch import nn

import fused_inr as fi
from fused_inr import activations
from fused_inr.encodings import FourierFeatures
from fused_inr.functional import linear_act

F32, F64, BF16, I64 = torch.float32, torch.float64, torch.bfloat16, torch.int64
NAN, INF = math.nan, math.inf


def t(*shape, dtype=F32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


sine = activations.sine
call = linear_act

#: call, exception, words that its message must contain
LINEAR_ACT = [
    # no tensors
    (lambda: call([[1.0, 2.0]], t(4, 2)), TypeError, "x: expected a tensor, got list"),
    (lambda: call(None, t(4, 2)), TypeError, "x: expected a tensor, got NoneType"),
    (lambda: call(1.0, t(4, 2)), TypeError, "x: expected a tensor"),
    (lambda: call(t(3, 2), [[1.0, 2.0]]), TypeError, "weight: expected a tensor, got list"),
    (lambda: call(t(3, 2), None), TypeError, "weight: expected a tensor"),
    (lambda: call(t(3, 2), nn.Linear(2, 4)), TypeError, "weight: expected a tensor, got Linear"),
    (lambda: call(t(3, 2), t(4, 2), 0.0), TypeError, "bias: expected a tensor, got float"),
    (lambda: call(t(3, 2), t(4, 2), [0.0] * 4), TypeError, "bias: expected a tensor, got list"),
    (lambda: call(t(3, 2), t(4, 2), True), TypeError, "bias: expected a tensor, got bool"),
    # the activation in the wrong place, or none
    (lambda: call(t(3, 2), t(4, 2), sine()), TypeError, "bias: expected a tensor, got Activation"),
    (lambda: call(t(3, 2), t(4, 2), None, torch.sin), TypeError, "activation: expected a name"),
    (lambda: call(t(3, 2), t(4, 2), None, nn.ReLU()), TypeError, "activation: expected a name.*got ReLU"),
    (lambda: call(t(3, 2), t(4, 2), None, 30.0), TypeError, "activation: expected a name"),
    (lambda: call(t(3, 2), t(4, 2), None, "sinus"), ValueError, "'sinus' is not registered.*sine"),
    (lambda: call(t(3, 2), t(4, 2), None, ""), ValueError, "is not registered"),
    (lambda: call(t(3, 2), t(4, 2), None, activations.gaussian), TypeError, "activation: expected a name"),
    # types
    (lambda: call(t(3, 2, dtype=I64), t(4, 2)), TypeError, "x: dtype torch.int64 is not supported; use float32"),
    (lambda: call(t(3, 2, dtype=torch.bool), t(4, 2)), TypeError, "x: dtype torch.bool"),
    (lambda: call(t(3, 2, dtype=torch.complex64), t(4, 2)), TypeError, "x: dtype torch.complex64"),
    (lambda: call(t(3, 2, dtype=torch.float8_e4m3fn), t(4, 2)), TypeError, "x: dtype torch.float8"),
    (lambda: call(t(3, 2), t(4, 2, dtype=I64)), TypeError, "weight: its dtype torch.int64 differs.*convert"),
    (lambda: call(t(3, 2), t(4, 2, dtype=F64)), TypeError, "weight: its dtype torch.float64 differs.*autocast"),
    (lambda: call(t(3, 2, dtype=BF16), t(4, 2)), TypeError, "weight: its dtype torch.float32 differs from x's.*bfloat16"),  # noqa: E501
    (lambda: call(t(3, 2), t(4, 2), t(4, dtype=F64)), TypeError, "bias: its dtype torch.float64 differs.*convert"),
    (lambda: call(t(3, 2), t(4, 2), t(4, dtype=I64)), TypeError, "bias: its dtype torch.int64"),
    # shapes
    (lambda: call(t(), t(4, 2)), ValueError, r"x: expected shape \[..., K\], got a scalar"),
    (lambda: call(t(3, 5), t(4, 2)), ValueError, r"x: its last dimension is 5 .*takes 2 input features"),
    (lambda: call(t(2, 3), t(4, 2)), ValueError, r"x: its last dimension is 3"),
    (lambda: call(t(0), t(4, 2)), ValueError, "x: its last dimension is 0"),
    (lambda: call(t(3, 2), t(2)), ValueError, r"weight: expected shape \[B\*N, K\].*got \[2\]"),
    (lambda: call(t(3, 2), t()), ValueError, "weight: expected shape"),
    (lambda: call(t(3, 2), t(2, 4)), ValueError, "x: its last dimension is 2 .*takes 4 input features"),
    (lambda: call(t(3, 2), t(4, 2), t(3)), ValueError, r"bias: expected shape \[4\] to match weight \[4, 2\], got \[3\]"),  # noqa: E501
    (lambda: call(t(3, 2), t(4, 2), t(4, 1)), ValueError, r"bias: expected shape \[4\].*got \[4, 1\]"),
    (lambda: call(t(3, 2), t(4, 2), t(1, 4)), ValueError, r"bias: expected shape"),
    (lambda: call(t(3, 2), t(4, 2), t()), ValueError, "bias: expected shape"),
    (lambda: call(t(3, 2), t(4, 2), t(1)), ValueError, "bias: expected shape"),
    (lambda: call(t(3, 2), t(6, 2), None, "split"), ValueError, r"weight: split has 4 branches.*4\*N rows; got \[6, 2\]"),  # noqa: E501
    (lambda: call(t(3, 2), t(5, 2), None, "gabor"), ValueError, "weight: gabor has 2 branches"),
    (lambda: call(t(3, 2), t(8, 2), t(2), "split"), ValueError, r"bias: expected shape \[8\]"),
    (lambda: call(t(3, 2, 2), t(4, 8, 2), None, "split"), ValueError, r"leading dimensions of x must be \[4\]"),
    (lambda: call(t(3, 5, 2), t(4, 8, 2)), ValueError, r"leading dimensions of x must be \[4\] .*got \[3, 5, 2\]"),
    (lambda: call(t(4, 5, 2), t(2, 3, 8, 2)), ValueError, r"leading dimensions of x must be \[2, 3\]"),
    (lambda: call(t(3, 3, 2), t(2, 3, 8, 2)), ValueError, r"leading dimensions of x must be \[2, 3\]"),
    (lambda: call(t(2, 4, 5, 2), t(2, 3, 8, 2)), ValueError, r"leading dimensions of x"),
    (lambda: call(t(5, 2), t(4, 8, 2), t(4, 7)), ValueError, r"bias: expected shape \[4, 8\]"),
    (lambda: call(t(5, 2), t(4, 8, 2), t(3, 8)), ValueError, r"bias: expected shape \[4, 8\]"),
    (lambda: call(t(5, 2), t(4, 8, 2), t(1, 8)), ValueError, r"bias: expected shape \[4, 8\]"),
    # devices
    (lambda: call(t(3, 2), t(4, 2, device="meta")), ValueError, "weight: it is on meta, x on cpu; move them"),
    (lambda: call(t(3, 2, device="meta"), t(4, 2)), ValueError, "weight: it is on cpu, x on meta"),
    (lambda: call(t(3, 2), t(4, 2), t(4, device="meta")), ValueError, "bias: it is on meta, x on cpu; move them"),
    # parameters of the activation
    (lambda: call(t(3, 2), t(4, 2), None, sine(omega=t(3))), ValueError, r"parameter 'omega' has shape \[3\].*4 features"),  # noqa: E501
    (lambda: call(t(3, 2), t(4, 2), None, sine(omega=t(1))), ValueError, r"parameter 'omega' has shape \[1\]"),
    (lambda: call(t(3, 2), t(8, 2), None, activations.split(m=t(8))), ValueError, "'m' has shape.*2 features"),
    (lambda: call(t(3, 2), t(4, 2), None, sine(omega=t(device="meta"))), ValueError, "'omega' is on meta, x on cpu"),
    # arguments
    (lambda: call(t(3, 2)), TypeError, "weight"),
    (lambda: call(), TypeError, "x.*weight|missing"),
    (lambda: call(t(3, 2), t(4, 2), None, None, None), TypeError, "positional"),
    (lambda: call(t(3, 2), t(4, 2), omega=30.0), TypeError, "omega"),
    (lambda: call(t(3, 2).to_sparse(), t(4, 2)), TypeError, "x: .*sparse.*to_dense"),
    (lambda: call(t(3, 2), t(4, 2).to_sparse()), TypeError, "weight: .*sparse.*to_dense"),
]  # fmt: skip

ACTIVATIONS = [
    *[
        (functools.partial(make, **{p: bad}), error, p)
        for make, p in [
            (sine, "omega"), (activations.gaussian, "sigma"), (activations.gaussian, "scale"),
            (activations.sinc, "omega"), (activations.softplus, "beta"), (activations.finer, "omega"),
            (activations.hosc, "beta"), (activations.gabor, "scale"), (activations.complex_gabor, "omega"),
            (activations.split, "m"), (activations.incode, "a"),
        ]
        for bad, error in [(NAN, ValueError), (INF, ValueError), ("30", (TypeError, ValueError)), (None, TypeError)]
        if not (make is activations.gaussian and bad is None)  # None: not given
    ],
    (lambda: sine(omega=True), (TypeError, ValueError), "omega"),
    (lambda: sine(omega=[30.0]), TypeError, "omega.*number or a tensor"),
    (lambda: sine(omega=1j), TypeError, "omega"),
    (lambda: sine(omega=t(2, 2)), ValueError, r"omega.*shape \[\] or \[features\]"),
    (lambda: sine(omega=t(2, dtype=I64)), TypeError, "omega.*floating-point"),
    (lambda: sine(omega=t(2, dtype=torch.complex64)), TypeError, "omega.*floating-point"),
    (lambda: sine(sigma=1.0), TypeError, "'sigma'; accepted: omega"),
    (lambda: activations.relu(omega=1.0), TypeError, "'omega'; accepted: none"),
    (lambda: sine(30.0), TypeError, "positional"),
    (lambda: sine(learnable="sigma"), ValueError, "learnable: sine has no parameter 'sigma'; it has: omega"),
    (lambda: sine(learnable=("omega", "phase")), ValueError, "no parameter 'phase'"),
    (lambda: activations.relu(learnable="omega"), ValueError, "it has: none"),
    (lambda: sine(learnable=3), TypeError, "learnable"),
    (lambda: activations.gaussian(sigma=1.0, scale=1.0), ValueError, "sigma or scale, not both"),
    (lambda: activations.gaussian(0.05), TypeError, "positional"),
    (lambda: activations.split(omegas=(1.0, 2.0)), ValueError, "omegas needs one number or four"),
    (lambda: activations.split(omegas=()), ValueError, "omegas"),
    (lambda: activations.split(omegas=(1.0, 2.0, NAN, 1.0)), ValueError, "w3"),
    (lambda: activations.split(omegas="1"), (TypeError, ValueError), "w1"),
    (lambda: sine().with_params(sigma=1.0), TypeError, "no parameter 'sigma'; it has: omega"),
    (lambda: sine().with_params(omega=NAN), ValueError, "omega.*finite"),
    (lambda: sine().with_params(omega="x"), TypeError, "omega"),
    (lambda: sine().with_params(omega=t(2, 2)), ValueError, "omega.*shape"),
    (lambda: activations.split()(t(3, 6)), ValueError, "z: split has 4 branches.*multiple of 4"),
    (lambda: activations.get("sinus"), ValueError, "registered: .*sine"),
    (lambda: activations.get(torch.sin), TypeError, "activation: expected a name"),
    (lambda: activations.lookup("nosuch"), ValueError, "nosuch"),
    # define
    (lambda: activations.define("sine", lambda z: z), ValueError, "'sine' is a registered activation"),
    (lambda: activations.define("two words", lambda z: z), ValueError, "identifier"),
    (lambda: activations.define("", lambda z: z), ValueError, "identifier"),
    (lambda: activations.define(3, lambda z: z), ValueError, "name: .*got 3"),
    (lambda: activations.define("bad", "sin(z)"), TypeError, "formula: expected a function of sympy symbols, got str"),
    (lambda: activations.define("bad", None), TypeError, "formula"),
    (lambda: activations.define("bad", lambda: 1), ValueError, "at least one argument"),
    (lambda: activations.define("bad", lambda z, a: a * z, a="1"), TypeError, "parameter 'a': expected a number"),
    (lambda: activations.define("bad", lambda z, a: a * z, a=True), TypeError, "parameter 'a'"),
    (lambda: activations.define("bad", lambda z, a: a * z, a=NAN), ValueError, "'a'.*finite"),
    (lambda: activations.define("bad", lambda z: z, a=1.0), (TypeError, ValueError), "'a'"),
    (lambda: activations.define("bad", lambda z: sympy.gamma(z)), ValueError, "gamma.*cannot be compiled; known functions"),  # noqa: E501
    (lambda: activations.define("bad", lambda z: sympy.Symbol("q") * z), ValueError, "unknown symbols"),
    (lambda: activations.define("bad", lambda z: torch.sin(z)), (TypeError, ValueError), "sympy|formula"),
    (lambda: activations.define("bad", lambda z: None), TypeError, "must return a sympy expression"),
    (lambda: activations.define("bad", lambda z: ()), ValueError, "must return|at least one"),
    (lambda: activations.define("bad", lambda z: sympy.I * z), ValueError, "real"),
    (lambda: activations.define("bad", lambda z: z / 0), ValueError, "finite"),
    (lambda: activations.define("bad", lambda z: sympy.Piecewise((z, z > 0))), ValueError, "Piecewise.*True"),
]  # fmt: skip

LAYERS = [
    *[
        (functools.partial(layer, *sizes), error, words)
        for layer in (fi.FusedLinear, fi.SineLayer, fi.GaussianLayer, fi.SincLayer, fi.SplitLayer)
        for sizes, error, words in [
            ((0, 4), ValueError, "in_features must be an integer of at least 1, got 0"),
            ((2, -1), ValueError, "out_features"),
            ((2.0, 4), TypeError, "in_features"),
            ((2, None), TypeError, "out_features"),
            ((2, 4, "yes"), TypeError, "bias must be True or False"),
        ]
    ],
    (lambda: fi.FusedLinear(2), TypeError, "out_features"),
    (lambda: fi.FusedLinear(2, 4, activation="sinus"), ValueError, "'sinus' is not registered"),
    (lambda: fi.FusedLinear(2, 4, activation=torch.sin), TypeError, "activation"),
    (lambda: fi.FusedLinear(2, 4, init="xavier"), ValueError, "init must be one of"),
    (lambda: fi.FusedLinear(2, 4, init="siren"), ValueError, "omega"),
    (lambda: fi.FusedLinear(2, 4, dtype=I64), TypeError, "dtype"),
    (lambda: fi.FusedLinear(2, 4, dtype="float32"), TypeError, "dtype"),
    (lambda: fi.FusedLinear(2, 4, device="abacus"), RuntimeError, "abacus"),
    (lambda: fi.FusedLinear(2, 4, activation=sine(omega=t(3))), ValueError, "omega.*out_features"),
    (lambda: fi.SineLayer(2, 4, omega=NAN), ValueError, "omega"),
    (lambda: fi.SineLayer(2, 4, omega=0.0), ValueError, "omega must not be 0"),
    (lambda: fi.SineLayer(2, 4, omega=1.0, omega_0=1.0), TypeError, "omega and omega_0 are the same argument"),
    (lambda: fi.SineLayer(2, 4, flic=-1.0), ValueError, "flic"),
    (lambda: fi.SineLayer(2, 4, initc=NAN), ValueError, "initc"),
    (lambda: fi.GaussianLayer(2, 4, sigma=1.0, scale=1.0), ValueError, "not both"),
    (lambda: fi.GaussianLayer(2, 4, sigma=INF), ValueError, "sigma"),
    (lambda: fi.SplitLayer(2, 4, omegas=(1.0,)), ValueError, "omegas"),
    (lambda: fi.SplitLayer(2, 4, m=None), TypeError, "m"),
    (lambda: fi.FusedLinear(2, 4)(t(3, 5)), ValueError, "x: its last dimension is 5"),
    (lambda: fi.FusedLinear(2, 4)(t(3, 2, dtype=F64)), TypeError, "weight: its dtype"),
    (lambda: fi.FusedLinear(2, 4)([1.0, 2.0]), TypeError, "x: expected a tensor"),
    (lambda: fi.SineLayer(2, 4)(t()), ValueError, "x: expected shape"),
    (lambda: fi.SineLayer(2, 4)(t(3, 2, dtype=I64)), TypeError, "x: dtype"),
    (lambda: FourierFeatures(0), ValueError, "in_features"),
    (lambda: FourierFeatures(2, 8, std=-1.0), ValueError, "std"),
    (lambda: FourierFeatures(2, 8)(t(3, 5)), ValueError, "x must have shape"),
]  # fmt: skip

MODELS = [
    *[
        (functools.partial(model, **{**dict.fromkeys(("in_features", "hidden_features", "out_features"), 2),
                                     "hidden_layers": 1, name: bad}), error, name)
        for model in (fi.MLP, fi.SIREN, fi.SplitNet)
        for name, bad, error in [
            ("in_features", 0, ValueError), ("in_features", "2", TypeError), ("hidden_features", -8, ValueError),
            ("hidden_features", 8.0, TypeError), ("hidden_layers", -1, ValueError), ("hidden_layers", 1.5, TypeError),
            ("out_features", 0, ValueError), ("out_features", None, TypeError), ("init", "nope", ValueError),
            ("outermost_linear", 1, TypeError), ("bias", None, TypeError), ("encoding", torch.sin, TypeError),
            ("dtype", I64, TypeError),
        ]
    ],
    (lambda: fi.SIREN(2, 8, 1, 3, omega=NAN), ValueError, "omega"),
    (lambda: fi.SIREN(2, 8, 1, 3, first_omega="a"), TypeError, "first_omega"),
    (lambda: fi.SIREN(2, 8, 1, 3, omega=1.0, omega_0=1.0), TypeError, "omega_0"),
    (lambda: fi.SIREN(2, 8, 1, 3, initc=0.0), ValueError, "initc"),
    (lambda: fi.SIREN(2, 8, 1, 3, width=8), TypeError, "width"),
    (lambda: fi.SplitNet(2, 8, 1, 3, m=INF), ValueError, "m"),
    (lambda: fi.SplitNet(2, 8, 1, 3, omegas=(1, 2)), ValueError, "omegas"),
    (lambda: fi.MLP(2, 8, 1, 3, activation="nope"), ValueError, "nope"),
    (lambda: fi.MLP(2, 8, 1, 3, activation=nn.ReLU()), TypeError, "activation"),
    (lambda: fi.MLP(2, 8, 1, 3, init="vi3nr", sigma_p=0.0), ValueError, "sigma_p"),
    (lambda: fi.MLP(2, 8, 1, 3, outermost_linear=False, activation="fourier"), ValueError, "out_features"),
    (lambda: fi.SIREN(2, 8, 1, 3)(t(5, 3)), ValueError, "last dimension is 3|in_features"),
    (lambda: fi.SIREN(2, 8, 1, 3)(t(5, 2, dtype=I64)), TypeError, "x: dtype|coordinates"),
]  # fmt: skip

init = fi.init
INIT = [
    (lambda: init.vi3nr_gain_MC(0.0, torch.tanh), ValueError, "sigma_p must be a finite number greater than 0"),
    (lambda: init.vi3nr_gain_MC(-1.0, torch.tanh), ValueError, "sigma_p"),
    (lambda: init.vi3nr_gain_MC(NAN, torch.tanh), ValueError, "sigma_p"),
    (lambda: init.vi3nr_gain_MC("1", torch.tanh), TypeError, "sigma_p"),
    (lambda: init.vi3nr_gain_MC(1.0, 3.0), TypeError, "act_func must be a callable"),
    (lambda: init.vi3nr_gain_MC(1.0, "nope"), ValueError, "nope"),
    (lambda: init.vi3nr_gain_MC(1.0, torch.tanh, samples=1), ValueError, "samples"),
    (lambda: init.vi3nr_gain_MC(1.0, torch.tanh, samples=1e6), TypeError, "samples"),
    (lambda: init.vi3nr_gain_MC(1.0, torch.zeros_like, samples=9), ValueError, "act_func returned 0 for every z"),
    (lambda: init.vi3nr_gain_MC(1.0, lambda z: z / 0, samples=9), ValueError, "act_func must return finite values"),
    (lambda: init.vi3nr_gain_MC(1.0, lambda z: z.sum(), samples=9), ValueError, "act_func.*element by element"),
    (lambda: init.vi3nr_gain_MC(1.0, lambda z: None, samples=9), TypeError, "act_func must return"),
    (lambda: init.vi3nr_gain_MC(1.0, torch.tanh, seed=1, generator=torch.Generator()), ValueError, "generator or seed"),
    (lambda: init.vi3nr_gain_MC(1.0, torch.tanh, seed=-1), ValueError, "seed"),
    (lambda: init.vi3nr_gain_MC(1.0, torch.tanh, generator=3), TypeError, "generator must be a torch.Generator"),
    (lambda: init.vi3nr_gain_MC(1.0, torch.tanh, device="meta"), ValueError, "device"),
    (lambda: init.vi3nr_input_gain(0.0, 0.0, 1.0), ValueError, "sigma_p"),
    (lambda: init.vi3nr_input_gain(1.0, 0.0, 0.0), ValueError, "mean and std must not both be 0"),
    (lambda: init.vi3nr_input_gain(1.0, 0.0, -1.0), ValueError, "std"),
    (lambda: init.vi3nr_input_gain(1.0, NAN, 1.0), ValueError, "mean"),
    (lambda: init.vi3nr_uniform_(t(4)), ValueError, "tensor"),
    (lambda: init.vi3nr_uniform_(t(4, 2, dtype=I64)), TypeError, "tensor"),
    (lambda: init.vi3nr_uniform_([1.0]), TypeError, "tensor"),
    (lambda: init.vi3nr_uniform_(t(4, 2), gain=-1.0), ValueError, "gain"),
    (lambda: init.vi3nr_normal_(t(4, 2), gain=NAN), ValueError, "gain"),
    (lambda: init.vi3nr_normal_(t(4, 2), gain="1"), TypeError, "gain"),
    (lambda: init.siren_uniform_(t(4), False, 30.0), ValueError, "weight must be a matrix"),
    (lambda: init.siren_uniform_(None, False, 30.0), TypeError, "weight"),
    (lambda: init.siren_uniform_(t(4, 2), False, 0.0), ValueError, "omega must not be 0"),
    (lambda: init.siren_uniform_(t(4, 2), False, t(3)), ValueError, "omega must be a number or a tensor of shape"),
    (lambda: init.siren_uniform_(t(4, 2), "no", 30.0), TypeError, "is_first must be True or False"),
    (lambda: init.siren_uniform_(t(4, 2), True, 30.0, flic=0.0), ValueError, "flic"),
    (lambda: init.siren_init_(t(4, 2)), TypeError, "module must be a fused layer"),
    (lambda: init.siren_init_(nn.Linear(2, 4)), ValueError, "no fused layer"),
    (lambda: init.vi3nr_init_(nn.Linear(2, 4)), ValueError, "no fused layer"),
    (lambda: init.vi3nr_init_(fi.SIREN(2, 8, 1, 3), distribution="cauchy"), ValueError, "distribution must be one of"),
    (lambda: init.vi3nr_init_(fi.SIREN(2, 8, 1, 3), sigma_p=-1.0), ValueError, "sigma_p"),
    (lambda: init.vi3nr_init_(fi.SIREN(2, 8, 1, 3), sample_input=t(9, 5)), ValueError, "sample_input"),
    (lambda: init.vi3nr_init_(fi.SIREN(2, 8, 1, 3), sample_input=3), TypeError, "sample_input"),
]  # fmt: skip


def enter(context):
    with context:
        pass


def forced(name, f):
    with fi.backends.use(name):
        return f()


BACKENDS = [
    (lambda: enter(fi.backends.use("gpu")), ValueError, "'gpu' is not one of 'triton', 'cuda', 'cpu', 'reference'"),
    (lambda: enter(fi.backends.use("")), ValueError, "is not one of"),
    (lambda: enter(fi.backends.use(None)), ValueError, "None is not one of"),
    (lambda: enter(fi.backends.use(["cpu"])), (TypeError, ValueError), "is not one of"),
    (lambda: fi.backends.explain(torch.sin, t(3)), ValueError, "no fused_inr operation ran"),
    (lambda: fi.backends.explain(nn.Linear(2, 4), t(3, 2)), ValueError, "pass a module"),
    (lambda: fi.backends.explain(3), TypeError, "function|callable"),
    (lambda: fi.backends.explain(fi.SineLayer(2, 4), t(3, 5)), ValueError, "last dimension"),
    (lambda: forced("cpu", lambda: call(t(3, 2, device="meta"), t(4, 2, device="meta"))), RuntimeError,
     "backend 'cpu' cannot run.*meta"),
]  # fmt: skip

ALL = {
    "linear_act": LINEAR_ACT,
    "activations": ACTIVATIONS,
    "layers": LAYERS,
    "models": MODELS,
    "init": INIT,
    "backends": BACKENDS,
}


def test_there_are_enough_of_them():
    assert sum(map(len, ALL.values())) >= 150


@pytest.mark.parametrize(("group", "i"), [(g, i) for g, cases in ALL.items() for i in range(len(cases))])
def test_bad_calls_are_explained(group, i):
    bad, error, words = ALL[group][i]
    with pytest.raises(error, match=f"(?s){words}"):
        bad()


def test_a_refused_backend_leaves_the_previous_choice():
    with fi.backends.use("reference"):
        with pytest.raises(ValueError):
            enter(fi.backends.use("gpu"))
        assert "reference" in fi.backends.explain(fi.SineLayer(2, 4), t(3, 2))


def test_an_error_inside_use_restores_the_choice_before():
    before = fi.backends.explain(fi.SineLayer(2, 4), t(3, 2))
    with pytest.raises(ZeroDivisionError), fi.backends.use("reference"):
        raise ZeroDivisionError
    assert fi.backends.explain(fi.SineLayer(2, 4), t(3, 2)) == before


# -- any arguments at all

DTYPES = st.sampled_from([F32, F32, F64, BF16, torch.float16, I64, torch.bool, torch.complex64])
SIZES = st.integers(0, 5)


@st.composite
def shapes(draw, features, rank=4):
    return (*draw(st.lists(SIZES, max_size=rank - 1)), features)


@st.composite
def arguments(draw):
    """Mostly arguments that fit, and of each kind some that do not."""
    activation = activations.get(
        draw(st.sampled_from(["sine", "split", "complex_gabor", "relu", "identity", "gaussian"]))
    )
    k, n = draw(st.integers(0, 5)), draw(SIZES)
    dtype = draw(DTYPES)
    misfit = draw(st.sampled_from(["none"] * 8 + ["k", "rows", "bias", "dtype", "device", "rank"]))
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=2))) if draw(st.booleans()) else ()
    x_shape = (*batch, *draw(st.lists(SIZES, max_size=2)), k + (misfit == "k"))
    w_shape = (*batch, n * activation.branches + (misfit == "rows"), k)
    b_shape = None if draw(st.booleans()) else (*batch, n * activation.branches)
    if misfit == "bias" and b_shape is not None:
        b_shape = (*b_shape[:-1], b_shape[-1] + 1)
    if misfit == "rank":
        x_shape = x_shape[draw(st.integers(0, len(x_shape))) :]
    device = "meta" if draw(st.integers(0, 9)) == 0 else "cpu"
    made = []
    for position, shape in enumerate((x_shape, w_shape, b_shape)):
        if shape is None:
            made.append(None)
            continue
        kind = draw(DTYPES) if misfit == "dtype" and position else dtype
        where = ("meta" if device == "cpu" else "cpu") if misfit == "device" and position == 2 else device
        values = torch.randn(shape, generator=torch.Generator().manual_seed(position))
        values = (values * 0.3).to(kind).to(where)
        layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"]))
        if layout == "transposed" and values.dim() > 1:
            values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout == "strided" and values.dim():
            values = torch.stack([values, values], -1)[..., 0]
        elif layout == "offset":
            values = torch.cat([values.new_zeros(1), values.flatten()])[1:].view(shape)
        elif layout == "expanded" and values.dim() > 1 and shape[0]:
            values = values[:1].expand(shape)
        if kind.is_floating_point and draw(st.booleans()):
            values = values.detach().requires_grad_()
        made.append(values)
    return (*made, activation)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(arguments())
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_any_arguments_match_the_reference_or_are_explained(backend, args):
    if reason := unavailable(backend):
        pytest.skip(f"backend {backend!r}: {reason}")
    x, weight, bias, activation = args
    refusal = None
    try:
        with fi.backends.use(backend):
            y = linear_act(x, weight, bias, activation)
            leaves = [v for v in (x, weight, bias) if v is not None and v.requires_grad]
            gradients = torch.autograd.grad(y.sum(), leaves) if leaves and not y.is_meta else []
    except (TypeError, ValueError, RuntimeError) as error:
        refusal = error
    if refusal is not None:
        assert len(str(refusal)) > 20, f"{type(refusal).__name__}: {refusal}"
        assert not isinstance(refusal, NotImplementedError | UnicodeError)
        fits = (
            x.dtype in (F32, F64, BF16, torch.float16)
            and all(v is None or (v.dtype, v.device) == (x.dtype, x.device) for v in (weight, bias))
            and not x.is_meta
            and x.dim() > 0
            and x.shape[-1] == weight.shape[-1]
        )
        assert not fits or weight.dim() > 2 or weight.shape[-2] % activation.branches or bias is not None, refusal
        return
    assert y.dtype == x.dtype
    if y.is_meta:
        return
    wide = [None if v is None else v.detach().double() for v in (x, weight, bias)]
    lead = weight.dim() - 2
    if lead and wide[0].dim() > 2:
        flat = (
            wide[0].expand(*weight.shape[:lead], *x.shape[lead:]).flatten(lead, -2) if x.dim() > lead + 1 else wide[0]
        )
        flat = flat if x.dim() > lead + 1 else flat.unsqueeze(-2)
        truth = eager(flat, wide[1], wide[2], activation)
    else:
        truth = eager(wide[0], wide[1], wide[2], activation)
    assert y.numel() == truth.numel()
    # K <= 6 and omega <= 30: the bound of tolerances.py for values below 3 and slopes below 100
    allowed = 100 * (x.shape[-1] + tolerance("dot")) * 3 * UNIT[F64 if x.dtype == F64 else F32] + 3 * UNIT[x.dtype]
    assert not y.numel() or (y.detach().double().flatten() - truth.flatten()).abs().max() <= allowed * max(
        1.0, truth.abs().max().item()
    )
    for leaf, g in zip(leaves, gradients):
        assert (g.shape, g.dtype) == (leaf.shape, leaf.dtype)
