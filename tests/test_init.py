"""Gains against closed forms and quadrature, reproducibility, weights, whole networks, bad input."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fused_inr as fi
from fused_inr.encodings import FourierFeatures
from fused_inr.init import (
    default_sigma_p,
    siren_init_,
    siren_uniform_,
    vi3nr_gain_MC,
    vi3nr_init_,
    vi3nr_input_gain,
    vi3nr_normal_,
    vi3nr_uniform_,
)

A = fi.activations
SAMPLES = 200_000


def moments(f, sigma: float) -> tuple[float, float]:
    """E[f(z)^2] and E[f(z)^4], z ~ N(0, sigma^2), by the trapezoidal rule in float64 (spectrally accurate here)."""
    t = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    density = torch.exp(-(t**2) / 2) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    squares = f(sigma * t).double() ** 2
    return (squares * density).sum().item(), (squares**2 * density).sum().item()


def assert_gain(gain: float, sigma: float, second: float, fourth: float, samples: int = SAMPLES) -> None:
    """Within 5 standard errors of sigma / sqrt(second), given the fourth moment of f."""
    estimate = sigma**2 / gain**2
    error = math.sqrt(max(fourth - second**2, 0.0) / samples)
    assert abs(estimate - second) <= 5 * error + 1e-6 * second


# -- the gain: closed forms of MATH.md

CLOSED = {
    "relu": ("relu", lambda s: s**2 / 2, (0.1, 1.0, 30.0)),
    "identity": ("identity", lambda s: s**2, (0.01, 1.0)),
    "gaussian": (A.gaussian(sigma=0.05), lambda s: 1 / math.sqrt(1 + 2 * (s / 0.05) ** 2), (0.02, 0.0777, 1.0)),
    "gaussian scale": (A.gaussian(scale=4.0), lambda s: 1 / math.sqrt(1 + 64 * s**2), (0.1, 1.0)),
    "sine": (A.sine(omega=30.0), lambda s: (1 - math.exp(-2 * 900 * s**2)) / 2, (0.001, 1 / 30, 1.0)),
    "sinc": (
        A.sinc(omega=1.0),
        lambda s: math.sqrt(math.pi / 2) * math.erf(math.sqrt(2) * s) / s - (1 - math.exp(-2 * s**2)) / (2 * s**2),
        (0.3, 1.0, 2.2233),
    ),
    "fourier": ("fourier", lambda s: 0.5, (0.1, 1.0)),
    "split": (A.split(m=10.0), lambda s: 2.839, (1.0,)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_gain_agrees_with_the_closed_form(name):
    activation, second, sigmas = CLOSED[name]
    activation = A.get(activation)
    for i, sigma in enumerate(sigmas):
        gain = vi3nr_gain_MC(sigma, activation, SAMPLES, seed=i)
        if name == "split":
            # four digits of the closed form are known; the fourth moment is a product over the branches
            t = (torch.tanh, torch.sigmoid, torch.sin, torch.cos)
            fourth = 10.0**4 * math.prod(moments(f, sigma)[1] for f in t)
            assert math.prod(moments(f, sigma)[0] for f in t) * 100 == pytest.approx(second(sigma), rel=1e-3)
            assert_gain(gain, sigma, 100 * math.prod(moments(f, sigma)[0] for f in t), fourth)
            continue
        if name == "fourier":
            assert gain == pytest.approx(sigma * math.sqrt(2), rel=1e-6)  # cos^2 + sin^2 = 1 in every sample
            continue
        quadrature, fourth = moments(activation, sigma)
        assert quadrature == pytest.approx(second(sigma), rel=1e-7)
        assert_gain(gain, sigma, second(sigma), fourth)


@pytest.mark.parametrize(
    ("f", "sigma", "squared"),
    [(torch.tanh, 1.0, 2.54), (torch.tanh, 0.1, 1.02), (torch.sigmoid, 1.0, 3.41), (torch.sigmoid, 6.8, 104.28)],
)
def test_gain_of_the_reference_code(f, sigma, squared):
    assert vi3nr_gain_MC(sigma_p=sigma, act_func=f) ** 2 == pytest.approx(squared, rel=0.01)


@pytest.mark.parametrize("name", A.names())
def test_an_activation_and_its_formula_have_the_same_gain(name):
    activation = A.get(name)
    sigma = default_sigma_p(activation)
    gain = vi3nr_gain_MC(sigma, activation, 50_000, seed=3)
    assert 0 < gain < math.inf
    if activation.branches == activation.outputs == 1:
        formula = vi3nr_gain_MC(sigma, lambda z: activation(z[:, None])[:, 0], 50_000, seed=3)
        assert gain == pytest.approx(formula, rel=1e-6)  # the same draws; sine and exp of two libraries
        second, fourth = moments(activation, sigma)
        assert_gain(gain, sigma, second, fourth, 50_000)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(-3, 3), st.floats(0.05, 3), st.integers(0, 2**31))
def test_gain_of_a_shifted_sine(shift, sigma, seed):
    # E sin^2(a + sigma z) = (1 - exp(-2 sigma^2) cos 2a) / 2
    second = (1 - math.exp(-2 * sigma**2) * math.cos(2 * shift)) / 2

    def f(z):
        return torch.sin(z + shift)

    assert_gain(vi3nr_gain_MC(sigma, f, 20_000, seed=seed), sigma, second, moments(f, sigma)[1], 20_000)


def test_gain_takes_modules_names_maps_and_complex_values():
    assert len({vi3nr_gain_MC(0.5, f, 30_000, seed=1) for f in ("tanh", A.tanh, A.get("tanh"))}) == 1
    assert len({vi3nr_gain_MC(0.5, f, 30_000, seed=1) for f in (nn.Tanh(), torch.tanh)}) == 1
    assert vi3nr_gain_MC(0.5, "tanh", 30_000, seed=1) == pytest.approx(vi3nr_gain_MC(0.5, torch.tanh, 30_000, seed=1))
    assert vi3nr_gain_MC(0.5, lambda z: torch.exp(1j * z), 1000, seed=0) == pytest.approx(0.5)


def test_gain_of_a_formula_of_the_user():
    import sympy

    chirp = A.define("chirp_gain", lambda z, omega: sympy.sin(omega * z**2), omega=2.0)
    second, fourth = moments(lambda z: torch.sin(2 * z**2), 0.7)
    assert_gain(vi3nr_gain_MC(0.7, chirp, SAMPLES, seed=0), 0.7, second, fourth)


def test_gain_of_learnable_and_per_feature_parameters():
    layer = fi.SineLayer(2, 3, omega=torch.tensor([1.0, 2.0, 30.0]), learnable=True)
    gain = vi3nr_gain_MC(0.4, layer.activation_with_parameters(), SAMPLES, seed=0)
    parts = [moments(lambda z, w=w: torch.sin(w * z), 0.4) for w in (1.0, 2.0, 30.0)]
    assert_gain(gain, 0.4, sum(p[0] for p in parts) / 3, sum(p[1] for p in parts) / 3)
    assert layer.omega.grad is None


# -- reproducibility


def test_same_seed_same_bits_whatever_the_threads():
    threads = torch.get_num_threads()
    try:
        gains = []
        for n in (1, 2):
            torch.set_num_threads(n)
            gains += [vi3nr_gain_MC(1.0, "split", 100_000, seed=5), vi3nr_gain_MC(1.0, "split", 100_000, seed=5)]
    finally:
        torch.set_num_threads(threads)
    assert len(set(gains)) == 1
    assert gains[0] != vi3nr_gain_MC(1.0, "split", 100_000, seed=6)


def test_generator_and_global_state():
    def draw(seed):
        return vi3nr_gain_MC(1.0, torch.tanh, 1000, generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)
    torch.manual_seed(3)
    first = vi3nr_gain_MC(1.0, torch.tanh, 1000)
    torch.manual_seed(3)
    assert vi3nr_gain_MC(1.0, torch.tanh, 1000) == first != vi3nr_gain_MC(1.0, torch.tanh, 1000)
    state = torch.get_rng_state()
    vi3nr_gain_MC(1.0, torch.tanh, 1000, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_on_a_device(device):
    gains = [vi3nr_gain_MC(1.0, torch.relu, SAMPLES, device, seed=0) for _ in range(2)]
    assert gains[0] == gains[1]
    assert_gain(gains[0], 1.0, 0.5, 1.5)
    w = vi3nr_normal_(torch.empty(300, 200, device=device), gains[0])
    assert w.device.type == device.type


def test_memory_does_not_grow_with_samples():
    sizes = []

    def f(z):
        sizes.append(z.numel())
        return z

    vi3nr_gain_MC(1.0, f, 300_001, seed=0)
    assert sum(sizes) == 300_001
    assert max(sizes) <= 1 << 16


def test_no_gradient_is_recorded():
    seen = []
    vi3nr_gain_MC(1.0, lambda z: seen.append(torch.is_grad_enabled()) or z, 10)
    assert not any(seen)


# -- the reference's interface


def test_names_and_order_of_the_reference():
    def names(f):
        return [(p.name, p.default) for p in inspect.signature(f).parameters.values() if p.kind != p.KEYWORD_ONLY]

    empty = inspect.Parameter.empty
    assert names(vi3nr_input_gain) == [("sigma_p", empty), ("mean", empty), ("std", empty)]
    assert names(vi3nr_gain_MC) == [("sigma_p", empty), ("act_func", empty), ("samples", 1_000_000), ("device", None)]
    assert names(vi3nr_uniform_) == [("tensor", empty), ("gain", 1.0), ("generator", None)]
    assert names(vi3nr_normal_) == [("tensor", empty), ("gain", 1.0), ("generator", None)]


def test_input_gain():
    assert vi3nr_input_gain(2.0, 3.0, 4.0) == pytest.approx(0.4)
    assert vi3nr_input_gain(sigma_p=1, mean=torch.tensor(0.0), std=np.float32(0.5)) == pytest.approx(2)


@pytest.mark.parametrize(("fill", "peak"), [(vi3nr_uniform_, math.sqrt(3)), (vi3nr_normal_, None)])
def test_weights(fill, peak):
    rng = torch.Generator().manual_seed(0)
    w = torch.empty(500, 300)
    assert fill(w, 1.7, rng) is w
    std = 1.7 / math.sqrt(300)
    # variance of the sample variance: (kurtosis - 1) / n
    kurtosis = 1.8 if peak else 3.0
    assert w.var().item() == pytest.approx(std**2, rel=5 * math.sqrt((kurtosis - 1) / w.numel()))
    assert abs(w.mean().item()) < 5 * std / math.sqrt(w.numel())
    if peak:
        assert 0.999 * peak * std < w.abs().max().item() <= peak * std * (1 + 1e-6)
    again = fill(torch.empty(500, 300), 1.7, torch.Generator().manual_seed(0))
    assert torch.equal(w, again)
    parameter = nn.Parameter(torch.empty(4, 5))
    assert fill(parameter, gain=2.0) is parameter
    assert parameter.is_leaf
    assert parameter.requires_grad
    # as torch.nn.init counts a convolution's fan-in
    assert fill(torch.empty(64, 8, 3, 3)).std().item() == pytest.approx(1 / math.sqrt(72), rel=0.06)


def test_weights_are_the_references():
    # xavier_uniform_ of a square matrix with this gain has the same bound, so the same draws
    torch.manual_seed(1)
    expected = nn.init.xavier_uniform_(torch.empty(20, 20), gain=1.3)
    torch.manual_seed(1)
    torch.testing.assert_close(vi3nr_uniform_(torch.empty(20, 20), 1.3), expected, rtol=1e-6, atol=1e-8)


# -- siren


def test_siren_uniform():
    first = siren_uniform_(torch.empty(500, 4), True, 30.0)
    assert 0.99 / 4 < first.abs().max().item() <= 1 / 4
    hidden = siren_uniform_(torch.empty(500, 100), False, -20.0, initc=40.0)
    bound = math.sqrt(40 / 100) / 20
    assert 0.99 * bound < hidden.abs().max().item() <= bound
    omega = torch.linspace(1, 10, 500)
    rows = siren_uniform_(torch.empty(500, 400), False, omega, generator=torch.Generator().manual_seed(0))
    largest = rows.abs().amax(1) * omega / math.sqrt(6 / 400)
    assert 0.95 < largest.min() <= largest.max() <= 1 + 1e-6


def test_siren_init_of_networks():
    net = nn.Sequential(fi.SineLayer(2, 300, omega=10.0), fi.SineLayer(300, 200, omega=10.0), fi.FusedLinear(200, 64))
    assert siren_init_(net, is_first=True, flic=2.0, initc=24.0) is net
    bounds = [2 / 2, math.sqrt(24 / 300) / 10, math.sqrt(24 / 200) / 10]
    for layer, bound in zip(net, bounds):
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound


# -- whole networks


def spread(net, x) -> list[float]:
    """Standard deviation about zero of the pre-activations of each layer."""
    x = x if getattr(net, "encoding", None) is None else net.encoding(x)
    result = []
    with torch.no_grad():
        for layer in getattr(net, "net", net):
            z = nn.functional.linear(x, layer.weight, layer.bias)
            result.append(z.square().mean().sqrt().item())
            x = layer(x)
    return result


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize(
    ("activation", "sigma_p"),
    [
        (A.relu(), 1.0),
        (A.tanh(), 0.25),
        (A.gaussian(sigma=0.05), 0.0777),
        (A.gaussian(scale=10.0), None),
        (A.sinc(omega=1.0), None),
        (A.sine(omega=30.0), None),
        (A.sine(omega=30.0), 1.0),
        (A.wavelet(), None),
        (A.fourier(), 0.3),
        (A.split(m=10.0), None),
        (A.gabor(), None),
    ],
    ids=str,
)
def test_every_preactivation_has_the_standard_deviation_asked_for(activation, sigma_p, distribution):
    torch.manual_seed(0)
    net = fi.MLP(16, 512, 2, 512, activation=activation)
    vi3nr_init_(net, sigma_p=sigma_p, distribution=distribution, samples=100_000)
    wanted = [sigma_p or default_sigma_p(activation)] * 4
    if activation.map.facts.init == "siren" and sigma_p is None:
        wanted[0] = 1 / (3 * math.sqrt(16))
    x = torch.rand(1024, 16) * 2 - 1
    # widths of 512 and the 16 inputs leave some percent of spread, which adds up over layers (split the most)
    assert spread(net, x) == pytest.approx(wanted, rel=0.2 if activation.branches > 1 else 0.12)
    assert all(not layer.bias.any() for layer in net.net)


def test_first_layer_follows_the_input():
    torch.manual_seed(1)
    x = torch.randn(4000, 64) * 20 + 5
    net = vi3nr_init_(fi.MLP(64, 512, 1, 256, activation="tanh"), sigma_p=0.5, sample_input=x)
    assert spread(net, x) == pytest.approx([0.5] * 3, rel=0.1)
    # a first standard deviation of its own, and the next layer still at sigma_p
    net = vi3nr_init_(fi.MLP(64, 512, 1, 256, activation="tanh"), sigma_p=0.5, first_sigma_p=2.0, sample_input=x)
    assert spread(net, x) == pytest.approx([2.0, 0.5, 0.5], rel=0.1)


def test_the_first_sine_layer_keeps_the_spread_of_siren():
    torch.manual_seed(5)
    net = fi.SIREN(2, 800, 0, 300, first_omega=60.0, omega=30.0, init="vi3nr")
    # U(-1/2, 1/2) as in SIREN, whatever omega; after it the theory: here the identity layer takes its sigma_p
    assert 0.99 / 2 < net.net[0].weight.abs().max().item() <= 0.5 * (1 + 1e-6)
    net = fi.SIREN(2, 800, 1, 300, init="vi3nr")
    assert spread(net, torch.rand(1000, 2) * 2 - 1) == pytest.approx([1 / (3 * math.sqrt(2)), 1 / 30, 1 / 30], rel=0.1)
    net = fi.SIREN(2, 800, 1, 300, init="vi3nr", sigma_p=0.5)
    assert spread(net, torch.rand(1000, 2) * 2 - 1) == pytest.approx([0.5] * 3, rel=0.1)


def test_an_encoding_is_part_of_the_input():
    torch.manual_seed(2)
    net = fi.MLP(2, 512, 1, 64, activation="relu", init="vi3nr", encoding=FourierFeatures(2, 128))
    assert spread(net, torch.rand(4000, 2) * 2 - 1) == pytest.approx([1.0] * 3, rel=0.15)


def test_layers_with_different_activations():
    torch.manual_seed(3)
    net = nn.Sequential(
        fi.FusedLinear(32, 512, activation="sigmoid"),
        fi.GaussianLayer(512, 512, sigma=0.05),
        fi.FusedLinear(512, 512, bias=False),
    )
    x = torch.rand(2000, 32) * 2 - 1
    vi3nr_init_(net)
    assert spread(net, x) == pytest.approx([6.7546, 0.077688, 0.077688], rel=0.12)


def test_a_single_layer_follows_one_like_itself():
    torch.manual_seed(4)
    layer = vi3nr_init_(fi.FusedLinear(1000, 1000, activation="relu"), sigma_p=3.0)
    assert layer.weight.var().item() == pytest.approx(2 / 1000, rel=0.02)
    layer = vi3nr_init_(fi.SineLayer(1000, 1000, is_first=True), sigma_p=3.0)
    assert layer.weight.var().item() == pytest.approx(9 * 3 / 1000, rel=0.02)


def test_network_init_is_reproducible():
    def weights(seed):
        net = fi.SIREN(2, 16, 1, 3)
        vi3nr_init_(net, generator=torch.Generator().manual_seed(seed), samples=1000)
        return [layer.weight for layer in net.net]

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0)))
    assert not torch.equal(weights(0)[0], weights(1)[0])
    # two nets built after the same manual_seed are the same
    nets = []
    for _ in range(2):
        torch.manual_seed(7)
        nets.append(fi.SplitNet(2, 16, 1, 3))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_equal_learnable_values_count_as_the_constant():
    weights = []
    for learnable, per_feature in ((False, False), (True, False), (True, True)):
        net = fi.SIREN(2, 16, 1, 3, learnable=learnable, per_feature=per_feature)
        vi3nr_init_(net, sigma_p=0.1, samples=1000, generator=torch.Generator().manual_seed(0))
        weights.append([layer.weight for layer in net.net])
    for others in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], others))


def test_default_sigma_p():
    assert default_sigma_p(A.gaussian(sigma=0.05)) == pytest.approx(0.0777, abs=1e-4)
    # the same bump in the other parametrisation
    assert default_sigma_p(A.gaussian(scale=1 / (math.sqrt(2) * 0.05))) == pytest.approx(0.0777, abs=1e-4)
    assert default_sigma_p(A.sinc(omega=10.0)) == pytest.approx(0.22233)
    assert default_sigma_p(A.get("wavelet")) == 0.8705
    assert default_sigma_p(A.get("sigmoid")) == 6.7546
    assert default_sigma_p(A.get("tanh")) == 0.25
    assert default_sigma_p(A.get("relu")) == 1
    assert default_sigma_p(A.sine(omega=30.0)) == pytest.approx(1 / 30)
    assert default_sigma_p(fi.SineLayer(2, 3, omega=torch.tensor([1.0, 2.0, 3.0])).activation) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["gaussian", "sinc", "wavelet", "sigmoid"])
def test_default_sigma_p_solves_the_backward_condition(name):
    activation = A.get(name)
    sigma = default_sigma_p(activation)
    t = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-(t**2) / 2) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    z = (sigma * t).requires_grad_()
    y = activation(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    condition = sigma**2 * (slope**2 * density).sum() / (y.detach() ** 2 * density).sum()
    assert condition.item() == pytest.approx(1, abs=2e-4)


# -- bad input


def everywhere(value):
    return lambda z: torch.full_like(z, value)


BAD = [
    (lambda: vi3nr_gain_MC(0.0, torch.tanh), ValueError, "sigma_p must be a finite number greater than 0, got 0.0"),
    (lambda: vi3nr_gain_MC(-1.0, torch.tanh), ValueError, "sigma_p"),
    (lambda: vi3nr_gain_MC(math.nan, torch.tanh), ValueError, "sigma_p"),
    (lambda: vi3nr_gain_MC(math.inf, torch.tanh), ValueError, "sigma_p"),
    (lambda: vi3nr_gain_MC("1", torch.tanh), TypeError, "sigma_p"),
    (lambda: vi3nr_gain_MC(True, torch.tanh), TypeError, "sigma_p"),
    (lambda: vi3nr_gain_MC(None, torch.tanh), TypeError, "sigma_p"),
    (lambda: vi3nr_gain_MC(torch.ones(2), torch.tanh), TypeError, "sigma_p"),
    (lambda: vi3nr_gain_MC(1.0, "tahn"), ValueError, "tahn"),
    (lambda: vi3nr_gain_MC(1.0, 3), TypeError, "act_func must be a callable"),
    (lambda: vi3nr_gain_MC(1.0, None), TypeError, "act_func"),
    (lambda: vi3nr_gain_MC(1.0, everywhere(0.0)), ValueError, "0 for every"),
    (lambda: vi3nr_gain_MC(1.0, everywhere(math.nan)), ValueError, "finite"),
    (lambda: vi3nr_gain_MC(1.0, everywhere(math.inf)), ValueError, "finite"),
    (lambda: vi3nr_gain_MC(1.0, torch.log), ValueError, "finite"),
    (lambda: vi3nr_gain_MC(1.0, lambda z: z.sum()), ValueError, "element by element"),
    (lambda: vi3nr_gain_MC(1.0, lambda z: z[:-1]), ValueError, "element by element"),
    (lambda: vi3nr_gain_MC(1.0, lambda z: 1.0), TypeError, "act_func must return a floating-point"),
    (lambda: vi3nr_gain_MC(1.0, lambda z: z > 0), TypeError, "act_func must return a floating-point"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, samples=1), ValueError, "samples"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, samples=0), ValueError, "samples"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, samples=1e6), TypeError, "samples"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, samples=True), TypeError, "samples"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, device="meta"), ValueError, "device"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, seed=-1), ValueError, "seed"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, seed=1.5), TypeError, "seed"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, seed=1, generator=torch.Generator()), ValueError, "not both"),
    (lambda: vi3nr_gain_MC(1.0, torch.tanh, generator=3), TypeError, "generator"),
    (lambda: vi3nr_input_gain(0.0, 0.0, 1.0), ValueError, "sigma_p"),
    (lambda: vi3nr_input_gain(1.0, math.nan, 1.0), ValueError, "mean"),
    (lambda: vi3nr_input_gain(1.0, 0.0, -1.0), ValueError, "std"),
    (lambda: vi3nr_input_gain(1.0, 0.0, 0.0), ValueError, "both be 0"),
    (lambda: vi3nr_input_gain(1.0, torch.zeros(3), 1.0), TypeError, "mean"),
    (lambda: vi3nr_uniform_([1.0]), TypeError, "tensor"),
    (lambda: vi3nr_uniform_(torch.zeros(3)), ValueError, "tensor"),
    (lambda: vi3nr_uniform_(torch.zeros(3, 0)), ValueError, "fan_in"),
    (lambda: vi3nr_uniform_(torch.zeros(3, 3, dtype=torch.int64)), TypeError, "floating-point"),
    (lambda: vi3nr_uniform_(torch.zeros(3, 3), gain=-1.0), ValueError, "gain"),
    (lambda: vi3nr_normal_(torch.zeros(3, 3), gain=math.nan), ValueError, "gain"),
    (lambda: vi3nr_normal_(torch.zeros(3)), ValueError, "tensor"),
    (lambda: siren_uniform_(torch.zeros(3), True, 30.0), ValueError, "weight"),
    (lambda: siren_uniform_(None, True, 30.0), TypeError, "weight"),
    (lambda: siren_uniform_(torch.zeros(3, 3), 30.0, 30.0), TypeError, "is_first"),
    (lambda: siren_uniform_(torch.zeros(3, 3), False, 0.0), ValueError, "omega"),
    (lambda: siren_uniform_(torch.zeros(3, 3), False, math.nan), ValueError, "omega"),
    (lambda: siren_uniform_(torch.zeros(3, 3), False, torch.zeros(3)), ValueError, "omega"),
    (lambda: siren_uniform_(torch.zeros(3, 3), False, torch.ones(2)), ValueError, "omega"),
    (lambda: siren_uniform_(torch.zeros(3, 3), True, 30.0, flic=-1.0), ValueError, "flic"),
    (lambda: siren_uniform_(torch.zeros(3, 3), False, 30.0, initc=0.0), ValueError, "initc"),
    (lambda: siren_init_(nn.Linear(2, 3)), ValueError, "no fused layer"),
    (lambda: siren_init_("net"), TypeError, "module"),
    (lambda: siren_init_(fi.FusedLinear(2, 3)), ValueError, "omega"),
    (lambda: vi3nr_init_(nn.Linear(2, 3)), ValueError, "no fused layer"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), sigma_p=-1.0), ValueError, "sigma_p"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), distribution="cauchy"), ValueError, "distribution"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), sample_input=torch.zeros(5, 3)), ValueError, "sample_input"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), sample_input=torch.zeros(5, 2)), ValueError, "both be 0"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), sample_input=[1.0, 2.0]), TypeError, "sample_input"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), sample_input=torch.full((5, 2), math.nan)), ValueError, "finite"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), is_first=1.0), TypeError, "is_first"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), seed=-1), ValueError, "seed"),
    (lambda: vi3nr_init_(fi.SIREN(2, 4, 0, 1), samples=1), ValueError, "samples"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_input_is_explained(i):
    call, error, words = BAD[i]
    with pytest.raises(error, match=words):
        call()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.one_of(st.floats().filter(lambda s: not 0 < s < 1e-30), st.none(), st.text(max_size=3), st.integers(-2, 2)),
    st.one_of(st.floats(), st.none(), st.integers(-3, 50)),
)
def test_gain_returns_a_gain_or_explains(sigma_p, samples):
    # (between 0 and the smallest float32 tanh(z) may be 0 everywhere, which is refused as such)
    good = isinstance(sigma_p, int | float) and 0 < sigma_p < math.inf and isinstance(samples, int) and samples > 1
    if good:
        assert 0 < vi3nr_gain_MC(sigma_p, torch.tanh, samples, seed=0) < math.inf
    else:
        with pytest.raises((TypeError, ValueError), match=r"sigma_p|samples|act_func"):
            vi3nr_gain_MC(sigma_p, torch.tanh, samples, seed=0)


def test_what_is_refused_leaves_the_network_as_it_was():
    net = fi.SIREN(2, 4, 1, 3)
    before = [p.clone() for p in net.parameters()]
    for arguments in ({"sigma_p": math.nan}, {"distribution": "x"}, {"sample_input": torch.zeros(3)}, {"samples": 0}):
        with pytest.raises((TypeError, ValueError)):
            vi3nr_init_(net, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
