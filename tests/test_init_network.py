"""VI3NR over whole networks, ours and others': what torch.fx finds, orthogonal weights, the report, the refusals."""

import math
from itertools import pairwise

import pytest
import torch
from published import PublishedSplit
from torch import nn

import fused_inr as fi
from fused_inr.encodings import FourierFeatures
from fused_inr.init import (
    default_sigma_p,
    report,
    vi3nr_init_,
    vi3nr_orthogonal_,
)
from fused_inr.init.walk import chain

A = fi.activations


class Sine(nn.Module):
    """The layer of most SIREN forks."""

    def __init__(self, n_in, n_out, omega_0=30.0):
        super().__init__()
        self.omega_0 = omega_0
        self.linear = nn.Linear(n_in, n_out)

    def forward(self, x):
        return torch.sin(self.omega_0 * self.linear(x))


class OwnWeight(nn.Module):
    """siren-pytorch's way: the weight is a parameter of the layer."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.sin(30.0 * nn.functional.linear(x, self.weight, self.bias))


class Formula(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, z):
        return self.activation(z)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(h + torch.relu(self.b(h)))


class Encoded(nn.Module):
    """Something before the first layer, written into the forward."""

    def __init__(self, width=512):
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, width)

    def forward(self, x):
        x = torch.cat((torch.sin(7 * x), torch.cos(7 * x)), -1)
        return self.b(torch.tanh(self.a(x)))


def stack(*layers):
    return nn.Sequential(*layers)


# -- finding the chain


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.Tanh(), A.tanh()),
        (nn.ReLU(), A.relu()),
        (nn.SiLU(), A.silu()),
        (nn.GELU(), A.gelu()),
        (nn.Sigmoid(), A.sigmoid()),
        (nn.Softplus(beta=20.0), A.softplus(beta=20.0)),
        (nn.Identity(), A.identity()),
        (A.sine(omega=12.0), A.sine(omega=12.0)),
        (A.gaussian(sigma=0.05), A.gaussian(sigma=0.05)),
        (A.sinc(omega=3.0), A.sinc(omega=3.0)),
        (A.finer(omega=30.0), A.finer(omega=30.0)),
        (A.wavelet(), A.wavelet()),
        (nn.LeakyReLU(), None),
        (nn.ELU(), None),
        (nn.Hardtanh(), None),
    ],
    ids=str,
)
def test_functions_between_layers_are_recognised(function, expected):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 24), nn.Linear(24, 3)
            self.f = function if isinstance(function, nn.Module) else Formula(function)

        def forward(self, x):
            return self.b(self.f(self.a(x)))

    found = chain(Plain()).links
    assert [link.name for link in found] == ["a", "b"]
    if expected is None:
        assert found[0].activation is None
    else:
        assert found[0].activation.name == expected.name
        for name, value in expected.params.items():
            assert found[0].activation.params[name] == pytest.approx(value, rel=1e-5)
    assert found[1].activation.name == "identity"


def test_chains_of_other_peoples_modules():
    def names(module):
        return [(link.name, link.branches) for link in chain(module).links]

    assert names(stack(Sine(2, 8), Sine(8, 6), nn.Linear(6, 1))) == [("0.linear", 1), ("1.linear", 1), ("2", 1)]
    assert names(stack(OwnWeight(2, 8), OwnWeight(8, 3))) == [("0", 1), ("1", 1)]
    split = stack(PublishedSplit(2, 8), PublishedSplit(8, 5), nn.Linear(5, 1))
    assert names(split) == [("0.linear", 4), ("1.linear", 4), ("2", 1)]
    # ours inside theirs
    mixed = stack(FourierFeatures(2, 4), fi.SIREN(8, 8, 1, 5), nn.Linear(5, 1))
    assert names(mixed) == [("1.net.0", 1), ("1.net.1", 1), ("1.net.2", 1), ("2", 1)]
    # dropout is no obstacle, and the mode stays
    net = stack(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).train()
    assert chain(net).links[0].activation.name == "relu"
    assert net.training


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Residual(), r"the input of c depends on a, b.*lsuv_init_"),
        (stack(nn.Linear(2, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1)), r"what follows 0 mixes elements.*lsuv"),
        (stack(nn.Linear(2, 8), nn.Softmax(-1), nn.Linear(8, 1)), "what follows 0 mixes elements"),
        (stack(nn.Linear(2, 8), nn.PReLU(8, init=0.1), nn.Linear(8, 1)), None),
        (nn.Linear(2, 3), "no fused layer, it is a single nn.Linear"),
        (nn.ReLU(), "no fused layer .* and no nn.Linear"),
    ],
    ids=["skip", "norm", "softmax", "prelu", "single", "none"],
)
def test_what_is_no_chain_is_refused_with_the_place_and_a_way_out(module, words):
    if words is None:  # equal slopes are one function of each element; different ones are not
        assert chain(module).links[0].activation is None
        with torch.no_grad():
            module[1].weight[3] = 0.7
        words = "differs from feature to feature"
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=words):
        vi3nr_init_(module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


def test_a_forward_that_fx_cannot_trace_is_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)) if x.sum() > 0 else self.a(x))

    with pytest.raises(ValueError, match=r"Branching: torch.fx cannot trace it .*lsuv_init_"):
        vi3nr_init_(Branching())


# -- the standard deviations that come out


def spreads(module, x, omega=1.0):
    rows = report(module, x, samples=50_000).rows
    return [row.measured for row in rows]


@pytest.mark.parametrize("distribution", ["uniform", "normal", "orthogonal"])
def test_stacks_of_nn_linear_reach_sigma_p(distribution):
    torch.manual_seed(0)
    x = torch.rand(2048, 16) * 2 - 1
    net = stack(nn.Linear(16, 512), nn.Tanh(), nn.Linear(512, 300), nn.ReLU(), nn.Linear(300, 400))
    assert vi3nr_init_(net, sigma_p=0.7, distribution=distribution) is net
    assert spreads(net, x) == pytest.approx([0.7] * 3, rel=0.1)
    # one for each layer
    vi3nr_init_(net, sigma_p=[0.2, 1.5, 3.0], distribution=distribution)
    assert spreads(net, x) == pytest.approx([0.2, 1.5, 3.0], rel=0.1)


def test_variances_are_the_formula_for_widths_that_differ():
    torch.manual_seed(1)
    net = stack(nn.Linear(2, 2000), nn.ReLU(), nn.Linear(2000, 700), nn.ReLU(), nn.Linear(700, 900))
    vi3nr_init_(net, sigma_p=1.0)
    # first: E[x^2] = 1/3; then E[relu^2] = 1/2
    for layer, expected in ((net[0], 3 / 2), (net[2], 2 / 2000), (net[4], 2 / 700)):
        w = layer.weight
        assert w.var().item() == pytest.approx(expected, rel=5 * math.sqrt(0.8 / w.numel()) + 0.01)
    assert not any(layer.bias.any() for layer in (net[0], net[2], net[4]))


def test_a_foreign_split_layer_is_ours():
    torch.manual_seed(2)
    x = torch.rand(2000, 2) * 2 - 1
    weights = []
    for net in (
        stack(PublishedSplit(2, 256), PublishedSplit(256, 256), nn.Linear(256, 64)),
        fi.SplitNet(2, 256, 1, 64),
    ):
        vi3nr_init_(net, sigma_p=1.0, generator=torch.Generator().manual_seed(3))
        weights.append([p for name, p in net.named_parameters() if name.endswith("weight")])
        assert [link.branches for link in chain(net).links] == [4, 4, 1]
        assert spreads(net, x) == pytest.approx([1.0] * len(spreads(net, x)), rel=0.25)
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0)  # the same draws; gains from two Monte Carlo estimates


def test_a_standard_deviation_for_each_branch():
    torch.manual_seed(3)
    net = fi.MLP(16, 400, 1, 100, activation=A.gabor(omega=3.0))
    vi3nr_init_(net, sigma_p=[(0.2, 0.8), (0.5, 0.1), 0.3])
    assert spreads(net, torch.rand(2000, 16) * 2 - 1) == pytest.approx([0.2, 0.8, 0.5, 0.1, 0.3], rel=0.15)


def test_auto_takes_what_the_solver_solves_and_the_rule_elsewhere():
    def sigma(net):
        torch.manual_seed(0)
        vi3nr_init_(net)
        return spreads(net, torch.rand(2048, 16) * 2 - 1)

    gaussian = math.sqrt(1 + math.sqrt(2)) * 0.05
    assert sigma(fi.MLP(16, 512, 1, 512, activation=A.gaussian(sigma=0.05))) == pytest.approx([gaussian] * 3, rel=0.1)
    # a fan ratio of 2 before the second layer: r^2 / (1 + 2r) = 1/2 has the root r = (1 + sqrt 3)/2
    net = stack(
        fi.FusedLinear(16, 300, activation=A.gaussian(sigma=0.05)),
        fi.FusedLinear(300, 600, activation=A.gaussian(sigma=0.05)),
        fi.FusedLinear(600, 300),
    )
    wide = 0.05 * math.sqrt((1 + math.sqrt(3)) / 2)
    assert sigma(net) == pytest.approx([wide, gaussian, gaussian], rel=0.1)
    assert sigma(fi.MLP(16, 512, 1, 512, activation="tanh")) == pytest.approx([0.25] * 3, rel=0.1)
    assert sigma(fi.MLP(16, 512, 1, 512, activation="relu")) == pytest.approx([1.0] * 3, rel=0.12)
    # sine: no solution; its first layer keeps SIREN's spread, 1 / (3 sqrt 16)
    assert sigma(fi.SIREN(16, 512, 1, 512)) == pytest.approx([1 / 12, 1 / 30, 1 / 30], rel=0.1)
    # None is the rule without the solver
    net = fi.MLP(16, 512, 1, 512, activation="sinc")
    vi3nr_init_(net, sigma_p=None)
    measured = spreads(net, torch.rand(2048, 16) * 2 - 1)
    assert measured == pytest.approx([default_sigma_p(A.sinc())] * 3, rel=0.1)


def test_a_function_that_is_none_of_ours_is_solved_too():
    torch.manual_seed(4)
    net = stack(nn.Linear(16, 400), nn.Hardswish(), nn.Linear(400, 400), nn.Hardswish(), nn.Linear(400, 400))
    vi3nr_init_(net)
    found = spreads(net, torch.rand(2048, 16) * 2 - 1)
    assert found == pytest.approx([found[0]] * 3, rel=0.12)


# -- input and biases


def test_the_first_layer_follows_the_input_through_whatever_comes_before():
    torch.manual_seed(5)
    net = Encoded()
    x = torch.rand(4000, 2) * 3
    vi3nr_init_(net, x, 0.5)
    assert spreads(net, x) == pytest.approx([0.5, 0.5], rel=0.1)
    with pytest.raises(ValueError, match="sample_input: something comes before a"):
        vi3nr_init_(net, sigma_p=0.5)
    with pytest.raises(ValueError, match="sample_input"):
        vi3nr_init_(stack(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), torch.zeros(9, 3))


def test_fourier_features_have_second_moment_one_half():
    torch.manual_seed(6)
    encoding = FourierFeatures(2, 256, std=10.0)
    assert encoding(torch.rand(500, 2)).square().mean().item() == pytest.approx(0.5, rel=1e-5)
    net = fi.MLP(2, 600, 0, 8, activation="relu", encoding=encoding)
    vi3nr_init_(net, sigma_p=1.0)
    # Var(W) = 1 / (512 * 1/2)
    w = net.net[0].weight
    assert w.var().item() == pytest.approx(2 / 512, rel=5 * math.sqrt(0.8 / w.numel()) + 0.001)


def test_kept_biases_count_in_the_gain():
    torch.manual_seed(7)
    x = torch.rand(4000, 16) * 2 - 1
    net = stack(nn.Linear(16, 800), nn.Tanh(), nn.Linear(800, 800))
    biases = [net[0].bias.clone(), net[2].bias.clone()]
    vi3nr_init_(net, x, 0.5, bias="keep")
    assert torch.equal(net[0].bias, biases[0])
    assert torch.equal(net[2].bias, biases[1])
    # the first: mean square 1/48 of the wanted 1/4 is bias
    expected = (0.25 - biases[0].square().mean().item()) * 3 / 16
    assert net[0].weight.var().item() == pytest.approx(expected, rel=0.05)
    assert spreads(net, x) == pytest.approx([0.5, 0.5], rel=0.1)
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match=r"bias: that of 0 has root mean square 0\.1.*larger sigma_p"):
        vi3nr_init_(net, x, 0.1, bias="keep")
    assert torch.equal(before, net[0].weight)


# -- orthogonal weights


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (24, 60), (60, 24), (1, 9), (9, 1)])
def test_orthogonal_weights(rows, columns):
    w = torch.empty(rows, columns, dtype=torch.float64)
    assert vi3nr_orthogonal_(w, 1.7, torch.Generator().manual_seed(0)) is w
    gram = w @ w.T if rows <= columns else w.T @ w
    scale = 1.7**2 * max(1.0, rows / columns)
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64) * scale, rtol=1e-12, atol=1e-12)
    assert w.square().mean().item() == pytest.approx(1.7**2 / columns, rel=1e-12)
    again = vi3nr_orthogonal_(torch.empty_like(w), 1.7, torch.Generator().manual_seed(0))
    assert torch.equal(w, again)
    assert not torch.equal(w, vi3nr_orthogonal_(torch.empty_like(w), 1.7, torch.Generator().manual_seed(1)))


def test_each_branch_is_orthogonal_by_itself():
    w = vi3nr_orthogonal_(torch.empty(4 * 16, 32), 1.0, branches=4)
    for block in w.chunk(4):
        torch.testing.assert_close(block @ block.T, torch.eye(16), rtol=1e-5, atol=1e-6)
    assert (w[:16] @ w[16:32].T).abs().max() > 0.1
    half = vi3nr_orthogonal_(torch.empty(16, 32, dtype=torch.bfloat16))
    assert half.float().square().mean().item() == pytest.approx(1 / 32, rel=0.01)
    net = fi.SplitNet(2, 16, 1, 1)
    vi3nr_init_(net, sigma_p=1.0, distribution="orthogonal")
    for block in net.net[1].weight.chunk(4):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.eye(16) * gram[0, 0], rtol=1e-4, atol=1e-4)


def test_orthogonal_signs_are_uniform():
    # QR alone prefers some: the mean of the first entry of many 2x2 rotations is 0
    rng = torch.Generator().manual_seed(0)
    first = torch.stack([vi3nr_orthogonal_(torch.empty(2, 2), 1.0, rng)[0] for _ in range(2000)])
    assert first.mean(0).abs().max().item() < 5 * math.sqrt(0.5 / 2000)


# -- the report


def test_prediction_and_measurement_agree():
    torch.manual_seed(8)
    x = torch.rand(4000, 8) * 2 - 1
    for net in (
        fi.SIREN(8, 400, 2, 30),
        fi.SplitNet(8, 400, 1, 30, m=5.935),
        fi.MLP(8, 400, 2, 30, activation=A.gabor(omega=2.0), init="vi3nr"),
        stack(nn.Linear(8, 400), nn.Tanh(), nn.Linear(400, 300), nn.GELU(), nn.Linear(300, 30)),
        stack(PublishedSplit(8, 400, 5.935), nn.Linear(400, 30)),
    ):
        found = report(net, x)
        assert not found.note
        for row in found.rows:
            assert row.measured == pytest.approx(row.predicted, rel=0.15), (net, row)
            assert row.measured_gradient == pytest.approx(row.predicted_gradient, rel=0.3), (net, row)


def test_report_measures_what_autograd_gives():
    torch.manual_seed(9)
    x, target = torch.rand(50, 2), torch.rand(50, 3)
    net = fi.SIREN(2, 16, 0, 3)
    found = report(net, x, loss=lambda y: ((y - target) ** 2).sum())
    z = nn.functional.linear(x, net.net[0].weight, net.net[0].bias).detach().requires_grad_()
    y = net.net[1](torch.sin(30 * z))
    (slope,) = torch.autograd.grad(((y - target) ** 2).sum(), z)
    assert found.rows[0].measured == pytest.approx(z.std(correction=0).item(), rel=1e-5)
    assert found.rows[0].measured_gradient == pytest.approx(slope.std(correction=0).item(), rel=1e-4)
    # nothing of it stays with the network
    assert all(p.grad is None for p in net.parameters())
    assert net.fusion == "auto"
    assert "forward" not in vars(net.net[0])
    torch.testing.assert_close(net(x), y)


def test_report_of_a_network_without_a_chain_still_measures():
    found = report(Residual(), torch.rand(100, 2))
    assert [row.layer for row in found.rows] == ["a", "b", "c"]
    assert all(row.measured > 0 and math.isnan(row.predicted) for row in found.rows)
    assert "skip connections" in str(found)


def test_report_as_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = report(fi.SplitNet(2, 16, 1, 1), torch.rand(100, 2))
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["layer", "function"]
    assert len(lines) == 2 + len(found.rows)
    assert lines[3].startswith("net.0[1]")
    found.save(tmp_path / "spread.png")
    assert (tmp_path / "spread.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["spread.png"]


# -- bad input

TANHS = [nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)]

BAD = [
    (lambda: vi3nr_init_(3), TypeError, "module must be"),
    (lambda: vi3nr_init_(stack(*TANHS), 0.5), TypeError, "sample_input must be a floating-point tensor"),
    (lambda: vi3nr_init_(stack(*TANHS), sigma_p="solve"), TypeError, "sigma_p must be a number"),
    (lambda: vi3nr_init_(stack(*TANHS), sigma_p=[1.0]), ValueError, r"sigma_p must have one entry a layer, 2 \(0, 2\)"),
    (lambda: vi3nr_init_(stack(*TANHS), sigma_p=[1.0, -1.0]), ValueError, "sigma_p"),
    (lambda: vi3nr_init_(stack(*TANHS), sigma_p=[1.0, (1.0, 2.0)]), ValueError, "2 has 1 branches, got 2 numbers"),
    (lambda: vi3nr_init_(stack(*TANHS), bias="half"), ValueError, "bias must be one of"),
    (lambda: vi3nr_init_(stack(*TANHS), distribution="cauchy"), ValueError, "distribution must be one of"),
    (lambda: vi3nr_init_(stack(*TANHS), first_sigma_p=0.0), ValueError, "first_sigma_p"),
    (lambda: vi3nr_init_(stack(*TANHS), torch.full((4, 2), math.inf)), ValueError, "finite"),
    (lambda: vi3nr_orthogonal_(torch.zeros(4, 4), branches=3), ValueError, "branches must divide the 4 rows"),
    (lambda: vi3nr_orthogonal_(torch.zeros(4, 4), branches=0), ValueError, "branches"),
    (lambda: vi3nr_orthogonal_(torch.zeros(4)), ValueError, "tensor"),
    (lambda: vi3nr_orthogonal_(torch.zeros(4, 4), -1.0), ValueError, "gain"),
    (lambda: report("net", torch.zeros(3, 2)), TypeError, "model must be"),
    (lambda: report(stack(*TANHS), [1.0]), TypeError, "sample_input"),
    (lambda: report(stack(*TANHS), torch.zeros(0, 2)), ValueError, "rows"),
    (lambda: report(stack(*TANHS), torch.rand(3, 2), loss=lambda y: y), ValueError, "loss must return"),
    (lambda: report(stack(*TANHS), torch.rand(3, 2), samples=1), ValueError, "samples"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_input_is_explained(i):
    call, error, words = BAD[i]
    with pytest.raises(error, match=words):
        call()


# -- what used to be passed by


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"residual": True}, {"norm": "layer", "residual": True}])
@pytest.mark.parametrize("name", ["sine", "gaussian", "sigmoid"])
def test_norms_and_skips_are_counted(name, options):
    torch.manual_seed(0)
    net = fi.MLP(2, 512, 4, 3, name, fusion="layers", **options)
    for norm in getattr(net, "norms", ()):
        nn.init.constant_(norm.weight, 2.0)
    sigma = 0.7
    vi3nr_init_(net, sigma_p=sigma)
    x, spreads = torch.rand(4000, 2) * 2 - 1, []
    with torch.no_grad():
        for i, layer in enumerate(net.net):
            z = torch.nn.functional.linear(x, layer.weight, layer.bias)
            spreads.append(z.square().mean().sqrt().item())
            y = layer.activation(z)
            y = net.norms[i](y) if "norm" in options and i < len(net.norms) else y
            x = (y + x) / 2**0.5 if net._skips and net._skips[i] else y
    assert spreads[1:-1] == pytest.approx([sigma] * len(spreads[1:-1]), rel=0.2)


def test_what_is_not_initialised_is_named():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.body = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))

        def forward(self, x):
            return self.body(self.conv(x).flatten(2).mT)

    net = Mixed()
    before = net.conv.weight.detach().clone()
    x = torch.rand(2, 3, 5, 5)
    with pytest.warns(RuntimeWarning, match=r"vi3nr_init_ leaves weights as they are: conv \(Conv2d\)"):
        vi3nr_init_(net, sample_input=x)
    with pytest.warns(RuntimeWarning, match=r"lsuv_init_ leaves weights as they are: conv \(Conv2d\)"):
        fi.init.lsuv_init_(net, x)
    assert torch.equal(net.conv.weight, before)


def tanh_layers(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return layers[:-1]


def test_parametrised_weights_are_assigned():
    torch.manual_seed(0)
    for make in (
        lambda: (net := fi.SIREN(2, 256, 1, 3), net.net[1].linear),
        lambda: (net := nn.Sequential(*tanh_layers(2, 256, 256, 3)), net[2]),
    ):  # fmt: skip
        net, linear = make()
        nn.utils.parametrizations.weight_norm(linear)
        before = linear.weight.detach().clone()
        vi3nr_init_(net, sigma_p=0.5)
        plain, other = make()
        vi3nr_init_(plain, sigma_p=0.5)
        assert not torch.allclose(linear.weight, before)
        assert linear.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.03)
        with pytest.raises(ValueError, match="its weight is parametrised"):
            fi.init.lsuv_init_(net, torch.rand(100, 2))


@pytest.mark.filterwarnings("ignore")
def test_weights_that_hooks_compute_are_refused():
    for initialise in (vi3nr_init_, lambda net: fi.init.lsuv_init_(net, torch.rand(100, 2))):
        net = fi.SIREN(2, 32, 1, 3)
        nn.utils.weight_norm(net.net[1].linear)
        before = net.net[0].linear.weight.detach().clone()
        with pytest.raises(ValueError, match=r"net\.1.*weight_norm"):
            initialise(net)
        assert torch.equal(net.net[0].linear.weight, before)


def test_what_stands_between_fused_layers_is_no_secret():
    net = nn.Sequential(fi.SineLayer(2, 16), nn.Tanh(), fi.FusedLinear(16, 3))
    with pytest.raises(ValueError, match="something follows the fused layer 0"):
        vi3nr_init_(net)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_siren_reaches_parametrised_weights_and_names_the_rest():
    layer = fi.SineLayer(64, 64)
    nn.utils.parametrizations.weight_norm(layer.linear)
    with torch.no_grad():
        layer.linear.weight = torch.ones(64, 64)
    fi.init.siren_init_(layer)
    assert 0 < layer.linear.weight.abs().max().item() <= math.sqrt(6 / 64) / 30 * 1.001
    other = fi.SineLayer(64, 64)
    nn.utils.weight_norm(other.linear)
    with pytest.raises(ValueError, match="weight_norm"):
        fi.init.siren_init_(other)
    with pytest.warns(RuntimeWarning, match=r"siren_init_ leaves weights as they are: 1 \(Linear\)"):
        fi.init.siren_init_(nn.Sequential(fi.SineLayer(2, 8), nn.Linear(8, 1)))
