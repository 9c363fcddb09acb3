"""`fuse`: models of plain PyTorch on the fused operations are the models that they were.

What is compared is the fused model with itself before: values, gradients, second and third derivatives, to float32's
rounding. Models of published codebases are in tests/test_codebases.py.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_inr as fi
from fused_inr.fusion import functions
from fused_inr.fusion.memory import Memory
from fused_inr.fusion.pending import Pending, Region


class Act(nn.Module):
    """Any function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


class PublishedSine(nn.Module):
    """SIREN's layer as its users write it."""

    def __init__(self, inputs, outputs, omega_0=30.0):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.omega_0 = omega_0
        with torch.no_grad():
            self.linear.weight.uniform_(-0.1, 0.1)

    def forward(self, x):
        return torch.sin(self.omega_0 * self.linear(x))


def siren(width=16):
    torch.manual_seed(1)
    return nn.Sequential(
        PublishedSine(2, width), PublishedSine(width, width), PublishedSine(width, width), nn.Linear(width, 3)
    )


def rows(n=37, columns=2, seed=0):
    return torch.rand(n, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def derivatives(model, x, orders=2, call=None):
    """The value and gradients up to an order, each of a fixed combination of those before."""
    x = x.detach().clone().requires_grad_()
    y = (call or model)(x)
    y = y[0] if isinstance(y, tuple) else y
    y = torch.view_as_real(y) if y.is_complex() else y
    found = [y.detach()]
    wanted = [x, *model.parameters()]
    for order in range(orders):
        weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).reshape(y.shape)
        grads = torch.autograd.grad((y * weights).sum(), wanted, create_graph=order + 1 < orders, allow_unused=True)
        found += [torch.zeros_like(w) if g is None else g.detach() for g, w in zip(grads, wanted)]
        if grads[0] is None or not grads[0].requires_grad:
            break
        y = grads[0]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]


def check_same(model, x=None, orders=2, tolerance=2e-4, call=None, **options):
    """Fuses the model (without measuring) and compares it with itself unfused; returns the report."""
    x = rows() if x is None else x
    method = call or "forward"
    before = derivatives(model, x, orders, getattr(model, method))
    report = fi.fuse(model, x, (method,), prefer="always", **options)
    for again in range(2):  # the second call goes by what the first has learned
        after = derivatives(model, x, orders, getattr(model, method))
        assert len(before) == len(after)
        for a, b in zip(before, after):
            assert a.dtype == b.dtype
            torch.testing.assert_close(
                b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()), msg=lambda m, n=again: f"call {n}: {m}"
            )
    return report


# -- what can follow a linear layer


def points(name):
    if name in ("log", "sqrt", "rsqrt", "reciprocal", "log1p"):
        return torch.rand(40, dtype=torch.float64) * 3 + 0.1
    return torch.randn(40, dtype=torch.float64) * 2


#: Of functions with more than one argument what to call them with beside z.
ARGUMENTS = {
    "add": (1.5,),
    "addcdiv": (torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)),
    "addcmul": (torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)),
    "clamp": (-0.5, 1.5),
    "clamp_max": (1.5,),
    "clamp_min": (-0.5,),
    "div": (1.5,),
    "ge": (0.5,),
    "gt": (0.5,),
    "le": (0.5,),
    "lt": (0.5,),
    "maximum": (torch.tensor(0.3, dtype=torch.float64),),
    "minimum": (torch.tensor(0.3, dtype=torch.float64),),
    "mul": (1.5,),
    "pow": (3,),
    "prelu": (torch.tensor([0.3], dtype=torch.float64),),
    "sub": (1.5,),
    "threshold": (0.2, -1.0),
    "where": None,
}


@pytest.mark.parametrize("name", sorted(functions.NAMES))
def test_each_function_is_its_formula(name, monkeypatch):
    """The map that a function becomes has PyTorch's values and derivatives."""
    from fused_inr.fusion import formulas

    monkeypatch.setattr(formulas, "_own_maps", {})
    if name == "where":
        expression = ("where", (("gt", (("z", 0), ("=", 0.0)), ()), ("sin", (("z", 0),), ()), ("=", 0.5)), ())
        leaves = ()
    else:
        leaves = ARGUMENTS.get(name, ())
        expression = (
            name,
            (("z", 0), *(("v", i) if isinstance(a, Tensor) else ("=", a) for i, a in enumerate(leaves))),
            (),
        )
        if name in functions.COMPARISONS:
            expression = ("where", (expression, ("sin", (("z", 0),), ()), ("=", 0.5)), ())
    if any(isinstance(a, Tensor) for a in leaves):
        leaves = tuple(leaves)
    else:
        leaves = ()
    state = formulas.State(expression, 1, torch.float64)
    torch.manual_seed(0)
    z = points(name).requires_grad_()
    expected = functions.evaluate(expression, (z,), leaves)
    zs = [__import__("sympy").Symbol("z0", real=True)]
    found = formulas._outputs(state.expression, zs, False, False)
    matched = formulas._own(found, formulas._used(found), zs)
    values = [float(leaves[n]) if type(n) is int else n for n in matched.leaves]
    (given,) = matched.map.torch_map(0)(z, *values)
    torch.testing.assert_close(given, expected)
    if expected.requires_grad:
        (a,), (b,) = torch.autograd.grad(expected.sum(), z), torch.autograd.grad(given.sum(), z, allow_unused=True)
        torch.testing.assert_close(torch.zeros_like(z) if b is None else b, a, rtol=1e-6, atol=1e-9)


def test_names_are_those_of_the_formulas():
    """Which functions have a formula is known without sympy: the same list twice."""
    from fused_inr.fusion.symbolic import FORMULAS

    assert set(FORMULAS) == functions.NAMES


CHAINS = {
    "sine": (lambda z: torch.sin(30 * z), "sine"),
    "method": (lambda z: z.mul(30).sin(), "sine"),
    "in place": (lambda z: z.mul_(30.0).sin_(), "sine"),
    "omega by division": (lambda z: torch.sin(z * 2.5), "sine"),
    "gaussian": (lambda z: torch.exp(-((4.0 * z) ** 2)), "gaussian_scale"),
    "gaussian by sigma": (lambda z: torch.exp(-(z**2) / (2 * 0.3**2)), None),
    "silu by hand": (lambda z: z * torch.sigmoid(z), "silu"),
    "silu": (F.silu, "silu"),
    "silu in place": (lambda z: F.silu(z, inplace=True), "silu"),
    "softplus 100": (lambda z: F.softplus(z, beta=100), "softplus"),
    "softplus with a threshold": (lambda z: F.softplus(z, 100, 20), "softplus"),
    "softplus with a low threshold": (lambda z: F.softplus(z, beta=2, threshold=1), "own"),
    "relu": (F.relu, "relu"),
    "relu in place": (lambda z: F.relu(z, inplace=True), "relu"),
    "clamp": (lambda z: z.clamp(min=0), None),
    "clamped sine": (lambda z: torch.sin(z).clamp(-0.5, 0.5), "own"),
    "leaky relu": (nn.LeakyReLU(0.2), "own"),
    "elu": (nn.ELU(), "own"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu tanh": (nn.GELU("tanh"), "own"),
    "where": (lambda z: torch.where(z > 0, torch.sin(z), z), "own"),
    "tanh": (torch.tanh, "tanh"),
    "finer": (lambda z: torch.sin(30 * (z.abs() + 1) * z), "finer"),
    "two of the same": (lambda z: torch.sin(5 * z) * torch.exp(-((3 * z) ** 2)), "own"),
    "number first": (lambda z: 1.0 - torch.sigmoid(z), "own"),
    "power of a number": (lambda z: 2.0 ** torch.sin(z), "own"),
    "reciprocal": (lambda z: 1.0 / (1.0 + z**2), "own"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    function, activation = CHAINS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 12), Act(function), nn.Linear(12, 12), Act(function), nn.Linear(12, 2))
    kinked = "clamp" in name or "relu" in name
    report = check_same(model, orders=1 if kinked else 2, tolerance=2e-3 if name == "finer" else 2e-4)
    assert [e.where for e in report.fused] == ["0", "2"], report
    if activation is not None:
        assert report.fused[0].activation == activation, report


def test_branches_of_one_layer():
    class Split(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.linear = nn.Linear(inputs, 4 * outputs)

        def forward(self, x):
            a, b, c, d = self.linear(x).chunk(4, dim=-1)
            return 10 * torch.tanh(a) * torch.sigmoid(b) * torch.sin(2 * c) * torch.cos(3 * d)

    report = check_same(nn.Sequential(Split(2, 8), Split(8, 8), nn.Linear(8, 1)))
    assert [e.activation for e in report.fused] == ["split", "split"] and not report.left
    assert {e.network for e in report.fused} == {1}


@pytest.mark.parametrize("how", ["chunk", "split", "sizes", "slices", "colons", "glu"])
def test_gated_units(how):
    class Gated(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.linear = nn.Linear(inputs, 2 * outputs)
            self.half = outputs

        def forward(self, x):
            z = self.linear(x)
            if how == "glu":
                return F.glu(z, -1)
            if how == "slices":
                a, b = z[..., : self.half], z[..., self.half :]
            elif how == "colons":
                a, b = z[:, : self.half], z[:, self.half :]
            else:
                parts = {"chunk": lambda: z.chunk(2, -1), "split": lambda: z.split(self.half, -1)}
                parts["sizes"] = lambda: torch.split(z, [self.half, self.half], dim=-1)
                a, b = parts[how]()
            return a * torch.sigmoid(b)

    report = check_same(nn.Sequential(Gated(2, 8), Gated(8, 8), nn.Linear(8, 1)))
    assert len(report.fused) == 2 and not report.left, report


def test_unequal_parts_are_values():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 9)

        def forward(self, x):
            z = self.linear(x)
            return torch.cat([torch.sigmoid(z[..., :3]), F.relu(z[..., 3:])], -1)

    report = check_same(Parts(), orders=1)
    assert not report.fused


def test_two_layers_of_the_same_rows():
    """The real Gabor layer: two linear layers become one with two branches, and a chain one network."""

    class Gabor(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.freqs, self.scale = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

        def forward(self, x):
            return torch.cos(10 * self.freqs(x)) * torch.exp(-((4 * self.scale(x)) ** 2))

    report = check_same(nn.Sequential(Gabor(2, 8), Gabor(8, 8), nn.Linear(8, 1)))
    assert [e.activation for e in report.fused] == ["gabor", "gabor"], report
    assert {e.network for e in report.fused} == {1} and not report.left


def test_complex_layers():
    """WIRE: complex weights as real blocks, the whole network as one operation."""

    class Wire(nn.Module):
        def __init__(self, inputs, outputs, first):
            super().__init__()
            dtype = torch.float32 if first else torch.complex64
            self.linear = nn.Linear(inputs, outputs, dtype=dtype)
            self.omega_0 = nn.Parameter(torch.tensor([10.0]))
            self.scale_0 = nn.Parameter(torch.tensor([4.0]))

        def forward(self, x):
            lin = self.linear(x)
            omega, scale = self.omega_0 * lin, self.scale_0 * lin
            return torch.exp(1j * omega - scale.abs().square())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(Wire(2, 8, True), Wire(8, 8, False), nn.Linear(8, 3, dtype=torch.complex64))

        def forward(self, x):
            return self.net(x).real

    torch.manual_seed(0)
    report = check_same(Net())
    assert [e.activation for e in report.fused] == ["own", "complex_gabor"] and not report.left, report
    assert {e.network for e in report.fused} == {1} and not report.left


def test_no_grad_is_detach():
    class Finer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 8)

        def forward(self, x):
            z = self.linear(x)
            with torch.no_grad():
                scale = torch.abs(z) + 1
            return torch.sin(30 * scale * z)

    report = check_same(nn.Sequential(Finer(), nn.Linear(8, 1)))
    assert [e.activation for e in report.fused] == ["finer_detached"]


@pytest.mark.parametrize("shape", [(), (1,), (12,), (1, 12)])
@pytest.mark.parametrize("learnable", [False, True])
def test_parameters_of_the_activation(shape, learnable):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 12)
            scale = torch.full(shape, 1.5)
            if learnable:
                self.scale = nn.Parameter(scale)
            else:
                self.register_buffer("scale", scale)

        def forward(self, x):
            return torch.tanh(self.scale * self.linear(x))

    model = nn.Sequential(Scaled(), nn.Linear(12, 1))
    report = check_same(model)
    assert len(report.fused) == 1, report


def test_norms_join_the_network():
    model = nn.Sequential(
        nn.Linear(2, 16), nn.SiLU(), nn.LayerNorm(16),
        nn.Linear(16, 16), nn.SiLU(), nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 1),
    )  # fmt: skip
    report = check_same(model)
    assert len(report.fused) == 2 and {e.network for e in report.fused} == {1}


class BatchLinear(nn.Linear):
    """The linear layer of SIREN's modules: matmul with a permuted weight, the bias added in place."""

    def forward(self, x, params=None):
        params = dict(self.named_parameters()) if params is None else params
        weight, bias = params["weight"], params.get("bias")
        out = x.matmul(weight.permute(*range(weight.dim() - 2), -1, -2))
        out += bias.unsqueeze(-2)
        return out


def test_matmul_with_a_permuted_weight():
    report = check_same(nn.Sequential(BatchLinear(2, 16), Act(lambda z: torch.sin(30 * z)), BatchLinear(16, 1)))
    assert [e.activation for e in report.fused] == ["sine"] and report.fused[0].network == 1


def test_weights_of_a_hypernetwork():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = BatchLinear(3, 8)
            self.made = nn.Parameter(torch.randn(4, 8, 3))
            self.bias = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return torch.sin(self.layer(x.reshape(4, -1, 3), {"weight": self.made, "bias": self.bias}))

    report = check_same(Net(), rows(40, 3))
    assert [e.activation for e in report.fused] == ["sine"]


@pytest.mark.parametrize("how", ["bmm", "baddbmm", "addmm", "matmul operator"])
def test_other_products(how):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            groups = () if how == "addmm" or how == "matmul operator" else (4,)
            self.weight = nn.Parameter(torch.randn(*groups, 3, 8))
            self.bias = nn.Parameter(torch.randn(*groups, *(() if not groups else (1,)), 8))

        def forward(self, x):
            if how == "addmm":
                return torch.tanh(torch.addmm(self.bias, x, self.weight))
            if how == "matmul operator":
                return torch.tanh(x @ self.weight + self.bias)
            x = x.reshape(4, -1, 3)
            if how == "bmm":
                return torch.tanh(torch.bmm(x, self.weight) + self.bias)
            return torch.tanh(torch.baddbmm(self.bias, x, self.weight))

    report = check_same(Net(), rows(40, 3))
    assert [e.activation for e in report.fused] == ["tanh"], report


def test_convolutions_of_width_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)

        def forward(self, x):
            return self.b(F.gelu(self.a(x.reshape(2, 3, -1))))

    report = check_same(Net(), rows(40, 3))
    assert [e.activation for e in report.fused] == ["gelu"]


@pytest.mark.parametrize("how", ["shift", "scale", "both"])
def test_modulation_of_groups(how):
    """A shift or a factor for each group of rows is part of its layer (COIN++, FiLM)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 8)
            self.latent = nn.Parameter(torch.randn(3, 1, 8))
            self.factor = nn.Parameter(torch.rand(3, 1, 8) + 0.5)

        def forward(self, x):
            z = self.linear(x.reshape(3, -1, 2))
            z = z * self.factor if how != "shift" else z
            z = z + self.latent if how != "scale" else z
            return torch.sin(5 * z)

    report = check_same(Net(), rows(120, 2))
    assert [e.activation for e in report.fused] == ["sine"]


def test_weight_norm_old_and_new():
    for make in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        with __import__("warnings").catch_warnings():
            __import__("warnings").simplefilter("ignore")
            model = nn.Sequential(
                make(nn.Linear(2, 16)), nn.Softplus(100), make(nn.Linear(16, 16)), nn.Softplus(100), nn.Linear(16, 1)
            )
        report = check_same(model, tolerance=1e-3)
        assert len(report.fused) == 2 and {e.network for e in report.fused} == {1}


def test_skips_by_concatenation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(18, 16), nn.Linear(16, 16)])
            self.out, self.side = nn.Linear(16, 1), nn.Linear(16, 2)

        def forward(self, x):
            h = x
            for i, layer in enumerate(self.layers):
                h = torch.tanh(layer(h))
                if i == 1:
                    h = torch.cat([x, h], -1)
            return torch.cat([self.out(h), self.side(h)], -1)

    report = check_same(Net())
    assert len(report.fused) == 4, report


# -- never wrong


class TwoConsumers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        z = self.linear(x)
        return torch.cat([torch.sin(z), z], -1)


class ChangedBefore(nn.Module):
    """x, the weight and the pre-activation are changed in place before they are used."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        rows = x * 1.0
        z = self.linear(rows.clone())
        held = rows.clone()
        w = self.linear.weight.clone()
        second = F.linear(held, w)
        with torch.no_grad():
            held.data.mul_(2.0)
            w.data.mul_(3.0)
        return torch.sin(z) + torch.sin(second)


class ViewWritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        z = self.linear(x)
        a, b = z.chunk(2, -1)
        z = z * 1.0
        a = torch.sin(a)
        z[..., :3] = 0.0
        return torch.cat([a * torch.sigmoid(b), z], -1)


class InPlaceOnAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        z = self.linear(x)
        a, b = z.chunk(2, -1)
        if not torch.is_grad_enabled():
            a.mul_(2.0)
        return torch.cat([torch.sin(z), a * torch.sigmoid(b)], -1)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


doubled = _Doubled.apply  # bound before anything is fused, as trunc_exp is


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(2, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.sin(self.last(doubled(self.linear(x))))


class Kept(nn.Module):
    """Leaves what it computes on itself and in a list."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, x):
        self.feature = torch.sin(self.linear(x))
        self.all = [self.feature, self.linear.weight]
        return self.last(self.feature)


class ManyResults(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, x):
        x = x.clone().requires_grad_()
        z = self.linear(x)
        h = torch.sin(z)
        return {"out": self.last(h), "all": (z, [h]), "in": x}


class LooksAtGradients(nn.Module):
    """NeuS: a method differentiates another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 16), nn.Linear(16, 1)

    def sdf(self, x):
        return self.b(F.softplus(self.a(x), beta=100))

    def forward(self, x):
        x = x.clone().requires_grad_() if not x.requires_grad else x
        with torch.enable_grad():
            y = self.sdf(x)
            (g,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        return torch.cat([y, g], -1)


class SharedMemory(nn.Module):
    """What is contiguous already, and what is detached, are the tensor itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        z = self.linear(x)
        z.contiguous().mul_(2.0)
        w = self.linear(x)
        w.detach().mul_(0.5)
        return torch.cat([torch.sin(z), torch.sin(w)], -1)


class Copies(nn.Module):
    """What is copied, or multiplied by 1, is another tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        z = self.linear(x)
        a, b = z.clone(), z * 1.0
        a[..., :3] = 0.0
        b[..., 3:] = 1.0
        return torch.cat([torch.sin(z), a, b, z], -1)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Containers(nn.Module):
    """Pendings in containers that are no tuple, list or dictionary themselves."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        pair = Pair(torch.sin(self.linear(x)), torch.cos(self.linear(x)))
        return torch.cat(pair, -1), pair, OrderedDict(z=self.linear(x))


class Unrecorded(nn.Module):
    """A bias and a factor under no_grad have no gradient, nor has what they are applied to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8, bias=False)
        self.bias, self.factor = nn.Parameter(torch.randn(8)), nn.Parameter(torch.rand(1, 1, 8) + 0.5)

    def forward(self, x):
        z = self.linear(x)
        with torch.no_grad():
            a = z + self.bias
            b = self.linear(x.reshape(1, -1, 2)) * self.factor
        return torch.sin(z) * torch.sin(a) + torch.cos(z) * torch.sin(b).reshape(z.shape)


class Reductions(nn.Module):
    """Functions that are element by element with a second tensor only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        z = self.linear(x)
        return torch.max(z, 1)[0] + torch.min(self.linear(x), -1)[0] + torch.max(torch.sin(self.linear(x)))


class PowersBothWays(nn.Module):
    """The same function with a number before a tensor, and behind it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        z = torch.sigmoid(self.linear(x))
        return torch.pow(z, 3) + torch.sin(torch.pow(3, torch.sigmoid(self.linear(x)))) + torch.sin(2.5 * z * 2.5)


@pytest.mark.parametrize(
    "kind",
    [
        SharedMemory,
        Copies,
        Containers,
        Unrecorded,
        Reductions,
        PowersBothWays,
        TwoConsumers,
        ChangedBefore,
        ViewWritten,
        InPlaceOnAPart,
        OwnFunction,
        LooksAtGradients,
    ],
)
def test_traps(kind):
    torch.manual_seed(0)
    check_same(kind())


def test_what_is_detached_shares_memory_at_every_call():
    model = SharedMemory()
    plain = copy.deepcopy(model)
    fi.fuse(model, prefer="always")
    for _ in range(3):
        torch.testing.assert_close(model(rows()), plain(rows()))


def test_a_view_is_of_the_value_that_a_network_made():
    """A part of a pre-activation is taken, all of it computed with the layers before it, then changed in place."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 16), nn.Linear(16, 8)

        def forward(self, x):
            z = self.b(torch.tanh(self.a(x)))
            left, _ = z.chunk(2, -1)
            total = z.sum()
            z[..., :2] = 1.0
            return torch.cat([left, z], -1) + 0 * total

    model = Net()
    plain = copy.deepcopy(model)
    fi.fuse(model, prefer="always")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(rows()), plain(rows()))


def test_inference_is_measured_as_inference():
    """What is timed without gradients records none."""
    from fused_inr.fusion.install import run
    from fused_inr.fusion.measure import MeasuredChain

    model = siren()
    recorder = fi.fusion.SiteRecorder(model)
    memory = Memory()
    memory.recorder = recorder
    run(memory, model, rows())
    chain = MeasuredChain([node for node, _ in recorder.chains[-1][0]], rows())
    region = Region(Memory())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert chain.fused(region, rows()).requires_grad is grad
            assert chain.original(region, rows()).requires_grad is grad


def test_values_that_stay():
    torch.manual_seed(0)
    model = Kept()
    plain = copy.deepcopy(model)
    check_same(model)
    y, expected = model(rows()), plain(rows())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(model.feature + 0, plain.feature + 0)
    assert model.feature.shape == (37, 8) and model.feature.requires_grad
    (a,) = torch.autograd.grad(model.feature.sum(), model.linear.weight)
    (b,) = torch.autograd.grad(plain.feature.sum(), plain.linear.weight)
    torch.testing.assert_close(a, b)
    copied = copy.deepcopy(model.feature.detach())
    assert type(copied) is Tensor


def test_results_are_tensors():
    torch.manual_seed(0)
    model = ManyResults()
    plain = copy.deepcopy(model)
    fi.fuse(model, prefer="always")
    found, expected = model(rows()), plain(rows())
    for a, b in (
        (found["out"], expected["out"]),
        (found["all"][0], expected["all"][0]),
        (found["all"][1][0], expected["all"][1][0]),
    ):
        assert type(a) is Tensor
        torch.testing.assert_close(a, b)
    (a,) = torch.autograd.grad(found["out"].sum(), found["in"])
    (b,) = torch.autograd.grad(expected["out"].sum(), expected["in"])
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trace", [False, True])
def test_hooks(trace):
    """Hooks see values: of a linear layer's output, of gradients, of the whole module's backward."""
    seen: list[Tensor] = []
    model, plain = siren(), siren()
    fi.fuse(model, prefer="always")
    for m in (model, plain):
        m[1].linear.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
        m[2].register_full_backward_hook(lambda module, gi, go: seen.append(go[0].clone()))
        m[0].register_forward_hook(lambda module, args, out: out * 2 if trace else None)
    grads = []
    for m in (model, plain):
        m(rows()).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    half = len(seen) // 2
    assert half == 2 and all(torch.is_tensor(t) for t in seen)
    for a, b in zip(seen[:half], seen[half:]):
        a = a + 0
        assert type(a) is Tensor
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_attributes_that_change():
    model, plain = siren(), siren()
    fi.fuse(model, rows(), prefer="always")
    for m in (model, plain):
        m[1].omega_0 = 7.0
    torch.testing.assert_close(model(rows()), plain(rows()), rtol=1e-4, atol=1e-5)
    for m in (model, plain):
        m[0].linear.weight = nn.Parameter(torch.full((16, 2), 0.01))
    torch.testing.assert_close(model(rows()), plain(rows()), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for m in (model, plain):
            m[1].linear.weight.mul_(0.5)
    torch.testing.assert_close(model(rows()), plain(rows()), rtol=1e-4, atol=1e-5)
    for m in (model, plain):
        m.double()
    torch.testing.assert_close(model(rows().double()), plain(rows().double()))


def test_states_go_both_ways():
    model, plain = siren(), siren()
    kind, keys, attributes = type(plain), list(plain.state_dict()), set(vars(plain))
    fi.fuse(model, rows(), prefer="always")
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__ and set(vars(model)) == attributes
    assert list(model.state_dict()) == keys
    other = siren()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.7)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(rows()), other(rows()), rtol=1e-4, atol=1e-5)
    plain.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _saved(model)):
        assert fi.fusion.installed(copied) is not None and isinstance(copied, kind)
        assert torch.equal(copied(rows()), model(rows()))
        assert type(fi.unfuse(copied)) is kind
    bits = [p.clone() for p in model.parameters()]
    fi.unfuse(model)
    assert type(model) is kind and set(vars(model)) == attributes
    assert all(torch.equal(a, b) for a, b in zip(bits, model.parameters()))
    assert torch.equal(model(rows()), plain(rows()))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_transformations():
    model, plain = siren(), siren()
    fi.fuse(model, rows(), prefer="always")
    x = rows(5)
    for transform in (
        lambda m: torch.func.vmap(m)(x),
        lambda m: torch.func.vmap(torch.func.jacrev(m))(x),
        lambda m: torch.func.hessian(lambda v: m(v).sum())(x[0]),
        lambda m: torch.func.jvp(m, (x,), (x,))[1],
        lambda m: torch.func.functional_call(m, {n: p * 0.5 for n, p in m.named_parameters()}, (x,)),
        lambda m: torch.func.grad(lambda p: torch.func.functional_call(m, p, (x,)).sum())(dict(m.named_parameters()))[
            "0.linear.weight"
        ],
    ):
        expected = transform(plain)
        torch.testing.assert_close(transform(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_third_derivatives():
    check_same(
        nn.Sequential(nn.Linear(2, 8), Act(lambda z: torch.sin(2 * z)), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)),
        orders=3,
        tolerance=1e-3,
    )


def test_graphs_that_are_retained():
    model, plain = siren(), siren()
    fi.fuse(model, prefer="always")
    grads = []
    for m in (model, plain):
        y = m(rows()).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """Checkpoints around the model, and inside of it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = siren(), nn.Linear(3, 1)

        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=reentrant)
            return self.last(torch.tanh(y))

    torch.manual_seed(0)
    model = Net()
    grads = []
    for fused in (False, True):
        if fused:
            fi.fuse(model, prefer="always")
        model.zero_grad()
        model(rows().requires_grad_()).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
    inner = model.net
    fi.fuse(inner, prefer="always")
    plain = siren()
    plain.load_state_dict(inner.state_dict())
    grads = []
    for m in (inner, plain):
        m.zero_grad()
        torch.utils.checkpoint.checkpoint(m, rows().requires_grad_(), use_reentrant=reentrant).sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, plain = siren(), siren()
    fi.fuse(model, rows(), prefer="always")
    with torch.autocast("cpu", dtype=dtype):
        found, expected = model(rows()), plain(rows())
    assert found.dtype == expected.dtype
    with torch.no_grad():
        exact = plain(rows())
    error, bound = (found.float() - exact).abs().max(), (expected.float() - exact).abs().max()
    assert error <= 2 * bound + 0.02 * exact.abs().max()


def test_training_equals():
    """Steps of an optimiser arrive where the original's do."""
    model, plain = siren(32), siren(32)
    fi.fuse(model, rows(), prefer="always")
    for m in (model, plain):
        optimizer = torch.optim.Adam(m.parameters(), 1e-3)
        for step in range(5):
            optimizer.zero_grad()
            m(rows(64, seed=step)).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_an_exception_leaves_the_original():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 8)

        def forward(self, x):
            y = torch.sin(self.linear(x))
            if y.shape[0] > 4:
                raise ArithmeticError("too many rows")
            return y

    model = Broken()
    with pytest.raises(ArithmeticError):
        fi.fuse(model, rows())
    assert type(model) is Broken
    fi.fuse(model, rows(3), prefer="always")
    with pytest.raises(ArithmeticError):
        model(rows())
    assert fi.fusion.pending.current() is None
    torch.testing.assert_close(model(rows(3)), torch.sin(model.linear(rows(3))))


def test_what_differs_is_left():
    """A map that is wrong is found on the sample, and its layer left with the reason."""
    model = siren()
    original = fi.fusion.formulas.State.matched
    wrong = fi.activations.sine(omega=1.0).map

    def matched(self, *args):
        found = original(self, *args)
        return found if found is None else type(found)(fi.activations.lookup("wavelet") and wrong, (29.0,), False)

    fi.fusion.formulas.State.matched = matched
    try:
        report = fi.fuse(model, rows(), prefer="always")
    finally:
        fi.fusion.formulas.State.matched = original
    assert not report.fused and all("differ" in left.reason for left in report.left[:3]), report
    assert torch.equal(model(rows()), siren()(rows()))


def test_what_an_operation_refuses_is_left(monkeypatch):
    """An error of ours is no error of the model's."""
    from fused_inr.fusion import pending

    def refuse(*args):
        raise ValueError("not this one")

    model = siren()
    monkeypatch.setattr(pending, "linear_act", refuse)
    monkeypatch.setattr(pending._op, "network", refuse)
    report = fi.fuse(model, rows(), prefer="always")
    assert not report.fused and any("not this one" in left.reason for left in report.left), report
    assert torch.equal(model(rows()), siren()(rows()))


def test_memory_is_given_back():
    model = siren()
    fi.fuse(model, prefer="always")
    model(rows())
    gc.collect()
    before = sum(isinstance(o, Pending) for o in gc.get_objects())
    for _ in range(3):
        with torch.no_grad():
            model(rows())
    gc.collect()
    assert sum(isinstance(o, Pending) for o in gc.get_objects()) == before == 0


def test_random_layers():
    """Dropout in training draws what it would draw; in evaluation it is nothing."""
    model = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 1))
    report = check_same(model.eval())
    assert len(report.fused) == 1
    plain = copy.deepcopy(fi.unfuse(model))
    fi.fuse(model.train(), rows(), prefer="always")
    plain.train()
    torch.manual_seed(3)
    found = model(rows())
    torch.manual_seed(3)
    torch.testing.assert_close(found, plain(rows()))


# -- blocks


def test_a_block():
    model = siren()
    expected = model(rows())
    with fi.fused():
        y = model(rows())
        assert type(y) is Pending and y.shape == (37, 3)
    assert torch.is_tensor(y)
    torch.testing.assert_close(y + 0, expected, rtol=1e-4, atol=1e-5)
    assert type(model) is nn.Sequential

    @fi.fused()
    def run(x):
        return model(x)

    y = run(rows())
    assert type(y) is Tensor
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_threads():
    """A block concerns its own thread."""
    import threading

    model, found = siren(), []

    def other():
        found.append(type(model(rows())))

    with fi.fused():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [Tensor]


# -- reports and bad input


def test_the_report(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(PublishedSine(2, 64), PublishedSine(64, 64), nn.Linear(64, 3), nn.Softmax(-1))
    report = fi.fuse(model, rows(2048), prefer="always")
    assert [(e.where, e.activation, e.formula) for e in report.fused] == [
        ("0.linear", "sine", "sin(30*z)"), ("1.linear", "sine", "sin(30*z)")
    ]  # fmt: skip
    assert all(e.backend in fi.backends.available() and e.error < 1e-3 for e in report.fused)
    assert set(report.errors) == {"values", "gradients", "second derivatives"}
    assert all(report.errors[k] <= report.bounds[k] for k in report.errors)
    assert report.saved[1] < report.saved[0]
    text = str(report)
    assert "2 fused, 0 left" in text and "0.linear" in text
    assert "<table>" in report._repr_html_()
    file = tmp_path / "report.json"
    report.to_json(file)
    assert json.loads(file.read_text())["fused"][0]["where"] == "0.linear"


def test_speed_decides():
    """What the model's own functions compute faster is left to them, by the number of rows."""
    model = siren()
    report = fi.fuse(model, rows(64))
    assert report.inference is not None and report.training is not None
    assert len(report.fused) + len(report.left) >= 3
    torch.testing.assert_close(model(rows()), siren()(rows()), rtol=1e-4, atol=1e-5)
    memory = fi.fusion.installed(model).memory
    memory.site(0).slow = {True: frozenset(range(30)), False: frozenset()}
    region = Region(memory)
    with region:
        model.forward.__wrapped__(model, rows())
    assert not isinstance(region.memory, type(None)) and memory.site(0).eager((37, 16))
    with torch.no_grad():
        assert not memory.site(0).eager((37, 16))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((lambda: "model",), TypeError, "nn.Module"),
        ((siren, None, ("sdf",)), ValueError, "sdf"),
        ((siren, None, ()), ValueError, "at least one"),
        ((lambda: torch.compile(siren()),), TypeError, "fuse it first"),
        ((lambda: torch.jit.trace(siren(), rows()),), TypeError, "fuse it first"),
        ((lambda: nn.DataParallel(siren()),), TypeError, "model.module"),
    ],
)
def test_bad_arguments(arguments, error, says):
    make, *rest = arguments
    with pytest.raises(error, match=says):
        fi.fuse(make(), *rest)


def test_bad_states():
    model = siren()
    with pytest.raises(ValueError, match="not fused"):
        fi.unfuse(model)
    with pytest.raises(ValueError, match="prefer"):
        fi.fuse(model, prefer="size")
    fi.fuse(model)
    with pytest.raises(ValueError, match="unfuse it first"):
        fi.fuse(model)


# -- torch.compile


def test_compile_backend():
    model, plain = siren(), siren()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("fused_inr")
    compiled = torch.compile(model, backend=counter)
    for n in range(3, 23):
        a, b = derivatives(model, rows(n), 2, compiled), derivatives(plain, rows(n), 2)
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    assert counter.frame_count <= 2
    record = fi.backends.explain(torch.compile(model, backend="fused_inr"), rows(300))
    assert "network" in record or "SIREN" in record or "sine" in record


def test_compile_backend_has_no_options():
    with pytest.raises(Exception, match="no options"):
        torch.compile(siren(), backend="fused_inr", options={"mode": 1})(rows())


def test_fused_models_compile():
    model, plain = siren(), siren()
    fi.fuse(model, rows(), prefer="always")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows()), plain(rows()))


def test_command(tmp_path, capsys):
    from fused_inr.cli.main import main

    file = tmp_path / "model.py"
    file.write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))\n"
    )
    out = tmp_path / "report.json"
    assert main(["fuse", f"{file}:make", "--input", "256x2", "--prefer", "always", "--json", str(out)]) == 0
    assert "1 fused, 0 left" in capsys.readouterr().out
    assert json.loads(out.read_text())["fused"][0]["activation"] == "tanh"
    for arguments in (
        ["nothing", "--input", "2x2"],
        [f"{file}:absent", "--input", "2x2"],
        [f"{file}:make", "--input", "2,2"],
    ):
        assert main(["fuse", *arguments]) == 2
        assert "error" in capsys.readouterr().err


def test_memories_are_by_place():
    memory = Memory()
    assert memory.site(2) is memory.site(2) and memory.site(0) is not memory.site(1)


@pytest.mark.parametrize("width", [16, 300])
def test_parts_of_ours_inside(width):
    """Layers and networks of this package in a model that is not ours take pendings as what they are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), fi.SineLayer(width, width, omega=3.0), nn.Linear(width, 4),
        fi.SIREN(4, width, 1, 3, omega=2.0), nn.Linear(3, 2), nn.Sigmoid(),
    )  # fmt: skip
    report = check_same(model, rows(150))
    assert len(report.fused) >= 2, report
