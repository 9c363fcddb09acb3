"""Moments: the random numbers, bits over tilings and backends, estimates against quadrature and closed forms, errors
that are what they say."""

import math

import pytest
import sympy
import torch

import fused_inr as fi
from fused_inr import backends
from fused_inr.init import moments
from fused_inr.ops import moments as raw

A = fi.activations
NATIVE, WHY_NOT = backends.TABLE["cpu"].available()
native = pytest.mark.skipif(not NATIVE, reason=f"no native engine: {WHY_NOT}")


def settings_of(activation, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """sigmas [count, B] in (0.05, 2), params [count, P] near the activation's own."""
    rng = torch.Generator().manual_seed(seed)
    sigmas = torch.rand(count, activation.branches, generator=rng) * 1.95 + 0.05
    constants = torch.tensor(activation.constants, dtype=torch.float32).expand(count, -1)
    return sigmas, constants * (1 + 0.1 * torch.rand(constants.shape, generator=rng))


# -- random numbers

#: Random123's known answers for Philox4x32-10: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_its_known_answers(counter, key, expected):
    words = raw.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(w.item() for w in words) == expected


STREAMS = [(0, 0, 0), (4096, 3, 7), (1 << 34, 1, 1 << 40), ((1 << 62) + 8, 15, (1 << 63) - 1)]


@native
@pytest.mark.parametrize(("start", "branch", "seed"), STREAMS)
def test_the_engine_draws_the_same_words(start, branch, seed):
    words = torch.ops.fused_inr_native.random_bits(start, 4096, branch, seed)
    assert torch.equal(words, raw.random_bits(start, 4096, branch, seed))


@native
def test_words_do_not_depend_on_where_a_call_begins():
    whole = raw.random_bits((1 << 34) - 64, 128, 2, 5)  # over the end of 32 bits
    for begin in (0, 4, 60, 64, 100):
        for draw in (raw.random_bits, torch.ops.fused_inr_native.random_bits):
            assert torch.equal(whole[begin : begin + 28], draw((1 << 34) - 64 + begin, 28, 2, 5))
    assert len(whole.unique()) == len(whole)


def test_normals_are_normal():
    n = 1 << 20
    z = raw.normals(0, n, 0, 11).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 5 * math.sqrt(variance / n)
    other = raw.normals(0, n, 1, 11).double()
    for shift in (0, 1, 2, 3):  # pairs of one counter, and branches, are independent
        assert abs((z[: n - 4] * other[shift : n - 4 + shift]).mean()) < 5 / math.sqrt(n)
        if shift:
            assert abs((z[: n - 4] * z[shift : n - 4 + shift]).mean()) < 5 / math.sqrt(n)
    assert torch.isfinite(z).all() and z.abs().max() > 4
    assert torch.equal(raw.normals(4, 5, 0, 11).double(), z[4:9])


# -- sums

NAMES = A.names()


def oracle(activation, sigmas, params, start: int, samples: int, seed: int) -> torch.Tensor:
    """[G, V, 3] in float64 from the formula and PyTorch's own derivative, over the same draws."""
    draws = [raw.normals(start, samples, b, seed) for b in range(activation.branches)]
    result = []
    for sigma, param in zip(sigmas, params):
        z = [(s * d).double().requires_grad_() for s, d in zip(sigma, draws)]
        y = activation.map.torch_map(0)(*z, *param.double())
        values = [v.detach() for v in y]
        for v in y:
            grads = torch.autograd.grad(v.sum(), z, retain_graph=True, allow_unused=True)
            values += [torch.zeros_like(z[0]) if g is None else g for g in grads]
        result.append(torch.stack([torch.stack([(v**p).sum() for p in (1, 2, 4)]) for v in values]))
    return torch.stack(result)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sums_are_those_of_the_formula(backend, name):
    if backend == "cpu" and not NATIVE:
        pytest.skip(f"no native engine: {WHY_NOT}")
    activation = A.get(name)
    sigmas, params = settings_of(activation, 3)
    for start, samples in ((0, 4096), (1 << 34, 4099), (8, 5)):
        sums = backends.TABLE[backend].moments(sigmas, params, start, samples, 3, activation.map)
        chunks = -(-samples // raw.CHUNK)
        assert sums.shape == (chunks, 3, activation.outputs * (1 + activation.branches), 3)
        if activation.map.facts.detached:  # its derivative is not that of the formula
            sums, expected = sums[:, :, :1], oracle(activation, sigmas, params, start, samples, 3)[:, :1]
        else:
            expected = oracle(activation, sigmas, params, start, samples, 3)
        # values are float32: each is off by some units in the last place of the largest that occurs (omega z is
        # rounded, too), which sums add up
        size = expected[..., 1:2].sqrt() * math.sqrt(samples)
        size = torch.cat((size, expected[..., 1:]), -1)
        assert bool(((sums.sum(0) - expected).abs() <= 1e-4 * size + 1e-30).all())


def test_sums_of_a_formula_of_the_user():
    chirp = A.define("chirp_moments", lambda z, omega: sympy.sin(omega * z**2), omega=2.0)
    sigmas, params = settings_of(chirp, 2)
    got = raw.sums(sigmas, params, 5000, 1, chirp.map)
    expected = oracle(chirp, sigmas, params, 0, 5000, 1)
    assert torch.allclose(got.powers, expected, rtol=1e-4, atol=1e-2)
    assert got.chunks == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["sine", "split", "complex_gabor"])
def test_same_bits_over_threads_grids_windows_and_calls(backend, name, monkeypatch):
    if backend == "cpu" and not NATIVE:
        pytest.skip(f"no native engine: {WHY_NOT}")
    activation = A.get(name)
    count = 70 if backend == "cpu" else 9  # more than one task of settings
    sigmas, params = settings_of(activation, count)
    samples, end = 5 * raw.CHUNK + 17, slice(count - 3, count - 1)
    with backends.use(backend):
        whole = raw.sums(sigmas, params, samples, 9, activation.map)
        some = raw.sums(sigmas[end], params[end], samples, 9, activation.map)
        assert torch.equal(whole.powers[end], some.powers)
        assert torch.equal(whole.squares[end], some.squares)
        threads = torch.get_num_threads()
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            try:
                again = raw.sums(sigmas, params, samples, 9, activation.map)
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(whole.powers, again.powers)
        monkeypatch.setattr(raw, "_WINDOW_BYTES", 1)  # a chunk a call
        again = raw.sums(sigmas, params, samples, 9, activation.map)
        assert torch.equal(whole.powers, again.powers) and torch.equal(whole.squares, again.squares)
        parts = backends.TABLE[backend]
        first = parts.moments(sigmas, params, 0, samples, 9, activation.map)
        later = parts.moments(sigmas, params, 2 * raw.CHUNK, samples - 2 * raw.CHUNK, 9, activation.map)
        assert torch.equal(first[2:], later)


@native
def test_every_capability_draws_and_adds_alike():
    activation = A.get("gabor")
    sigmas, params = settings_of(activation, 4)
    engine = torch.ops.fused_inr_native
    results = {}
    try:
        for capability in engine.capabilities():
            engine.set_capability(capability)
            results[capability] = engine.moments(sigmas, params, 0, 9000, 1, "gabor")
            assert torch.equal(engine.random_bits(16, 4000, 1, 2), raw.random_bits(16, 4000, 1, 2))
    finally:
        engine.set_capability("")
    first = next(iter(results.values()))
    for sums in results.values():
        assert torch.allclose(sums, first, rtol=1e-4, atol=1e-3)


def test_nothing_to_do():
    activation = A.get("sine")
    for backend in ("reference", "cpu") if NATIVE else ("reference",):
        none = backends.TABLE[backend].moments(torch.ones(0, 1), torch.ones(0, 1), 0, 100, 0, activation.map)
        assert none.shape == (1, 0, 2, 3)
        none = backends.TABLE[backend].moments(torch.ones(2, 1), torch.ones(2, 1), 0, 0, 0, activation.map)
        assert none.shape == (0, 2, 2, 3)


@native
def test_the_operator_checks_its_arguments():
    engine, one = torch.ops.fused_inr_native, torch.ones(1, 1)
    bad = [
        (torch.ones(1, 2), one, 0, 8, 0, "sine"),
        (one, torch.ones(1, 2), 0, 8, 0, "sine"),
        (one, torch.ones(2, 1), 0, 8, 0, "sine"),
        (one, one, 2, 8, 0, "sine"),
        (one, one, -4, 8, 0, "sine"),
        (one, one, 0, -8, 0, "sine"),
        (one, one, 0, 8, 0, "sin"),
    ]
    for arguments in bad:
        with pytest.raises(ValueError, match=r"expected|knows no"):
            engine.moments(*arguments)
    for start, count in ((1, 4), (0, 3), (-4, 4)):
        with pytest.raises(ValueError, match="multiples of 4"):
            engine.random_bits(start, count, 0, 0)


# -- estimates

CASES_EACH = 53


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_cases_lie_within_five_standard_errors_of_quadrature(name):
    """53 cases for each activation of one or two branches: first and second moments of f and its derivatives."""
    facts = A.lookup(name).facts
    activation = A.get(name).with_params(**facts.test_values)
    # to where a quadrature of a second serves, and 100,000 draws know their own spread
    unit = facts.test_sigma
    rng = torch.Generator().manual_seed(len(name))
    cases = 3 if activation.branches == 4 else CASES_EACH
    sigma = unit * 10 ** (torch.rand(cases, generator=rng, dtype=torch.float64) * 1.3 - 1)
    if activation.branches == 4:
        sigma = sigma.clamp_max(1.0)
    expected = moments(activation, sigma, method="quadrature")
    for i, s in enumerate(sigma):
        drawn = moments(activation, s, samples=100_000, seed=1000 + i)
        for what in ("mean", "second", "derivative_mean", "derivative_second"):
            value, known = getattr(drawn, what), getattr(expected, what)[i]
            error = 5 * getattr(drawn, f"{what}_error") + getattr(expected, f"{what}_error")[i]
            # and what evaluation in float32 costs
            size = known.abs() if "second" in what else getattr(expected, what.replace("mean", "second"))[i].sqrt()
            assert bool(((value - known).abs() <= error + 1e-6 * size).all()), (what, s)


CLOSED = {
    "relu": ("relu", lambda s: s**2 / 2, lambda s: 1.0),
    "gaussian": (A.gaussian(sigma=0.05), lambda s: 1 / math.sqrt(1 + 2 * (s / 0.05) ** 2), None),
    "sine": (A.sine(omega=3.0), lambda s: (1 - math.exp(-18 * s**2)) / 2, lambda s: 9 * s**2 / math.tanh(9 * s**2)),
    "sinc": (
        "sinc",
        lambda s: math.sqrt(math.pi / 2) * math.erf(math.sqrt(2) * s) / s - (1 - math.exp(-2 * s**2)) / (2 * s**2),
        None,
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name):
    activation, second, condition = CLOSED[name]
    if name == "gaussian":
        condition = lambda s: (r := (s / 0.05) ** 2) ** 2 / (1 + 2 * r)  # noqa: E731
    for s in (0.02, 0.0777, 0.4, 1.0):
        exact = moments(activation, s, method="quadrature")
        assert exact.second.item() == pytest.approx(second(s), rel=1e-9)
        drawn = moments(activation, s, samples=200_000, seed=2)
        assert abs(drawn.second.item() - second(s)) <= 5 * drawn.second_error.item() + 1e-6 * second(s)
        if condition is not None:
            assert exact.condition().item() == pytest.approx(condition(s), rel=1e-9)
            assert abs(drawn.condition().item() - condition(s)) <= 5 * drawn.condition_error().item() + 1e-5


def test_split_at_unit_std_keeps_variance_at_m_5_935():
    m = moments(A.split(m=5.935), 1.0, method="quadrature")
    assert m.second.item() == pytest.approx(1.0, abs=2e-4)
    assert moments(A.split(m=10.0), 1.0).second.item() == pytest.approx(2.839, rel=0.01)


def test_branches_have_standard_deviations_of_their_own():
    # E[f^2] is a product over the branches
    sigmas = (0.5, 1.0, 2.0, 0.3)
    parts = ("tanh", "sigmoid", A.sine(omega=1.0), lambda z: torch.cos(z))
    expected = math.prod(moments(f, s, method="quadrature").second.item() for f, s in zip(parts, sigmas))
    m = moments(A.split(m=1.0), sigmas, samples=400_000)
    assert abs(m.second.item() - expected) <= 5 * m.second_error.item()
    assert m.sigma.tolist() == list(sigmas)
    assert m.gain().tolist() == pytest.approx([s / math.sqrt(m.second.item()) for s in sigmas])
    grid = moments(A.split(m=1.0), (torch.tensor([0.5, 0.6]), 1.0, 2.0, 0.3), samples=4096)
    assert grid.second.shape == (2, 1) and grid.derivative_second.shape == (2, 1, 4)


def test_a_grid_of_sigma_and_a_parameter():
    sigma, omega = torch.tensor([[0.1], [0.2], [0.5]]), torch.tensor([1.0, 3.0])
    m = moments("sine", sigma, parameters={"omega": omega}, samples=10_000, seed=4)
    assert m.second.shape == (3, 2, 1)
    for i in range(3):
        for j in range(2):
            one = moments(A.sine(omega=omega[j].item()), sigma[i, 0].item(), samples=10_000, seed=4)
            assert torch.equal(one.second, m.second[i, j]) and torch.equal(one.mean_error, m.mean_error[i, j])


def test_features_are_averaged():
    layer = fi.SineLayer(2, 3, omega=torch.tensor([1.0, 2.0, 30.0]), learnable=True)
    m = moments(layer.activation_with_parameters(), 0.4, samples=10_000)
    each = moments("sine", 0.4, parameters={"omega": torch.tensor([1.0, 2.0, 30.0])}, samples=10_000)
    assert torch.allclose(m.second, each.second.mean(0))
    assert torch.allclose(m.derivative_second, each.derivative_second.mean(0))


def test_a_callable_sees_the_same_draws():
    for samples in (100, 5000, 200_000):
        ours, theirs = moments("tanh", 0.7, samples=samples), moments(torch.tanh, 0.7, samples=samples)
        assert torch.allclose(ours.second, theirs.second, rtol=1e-5)
        assert torch.allclose(ours.derivative_second, theirs.derivative_second, rtol=1e-5)
        assert torch.allclose(ours.condition_error(), theirs.condition_error(), rtol=1e-3)
    wave = moments(lambda z: torch.exp(3j * z), 0.5, samples=1000)
    assert wave.second.item() == pytest.approx(1) and wave.derivative_second.item() == pytest.approx(9)


def test_variance_where_the_mean_is_ten_thousand_times_the_standard_deviation():
    far = A.define("far_from_zero", lambda z, c: z + c, c=1e4)
    n = 1_000_000
    m = moments(far, 1.0, samples=n)
    variance = (m.second - m.mean**2).item()
    # float32 values of that size are 2^-10 apart
    assert abs(variance - 1) <= 5 * math.sqrt(2 / n) + 2.0**-20 / 12 + 1e-5
    assert m.mean_error.item() == pytest.approx(1e-3, rel=0.01)


def test_errors_are_what_they_say():
    """Over 200 seeds, deviations from quadrature over the stated error have standard deviation 1."""
    for name, sigma in (("gaussian", 0.0777), ("tanh", 1.0), ("relu", 1.0), ("gabor", 0.1)):
        exact = moments(name, sigma, method="quadrature")
        scores = {"mean": [], "second": [], "gain": [], "condition": []}
        for seed in range(200):
            m = moments(name, sigma, samples=40 * raw.CHUNK, seed=seed)
            scores["mean"].append(((m.mean - exact.mean) / m.mean_error).item())
            scores["second"].append(((m.second - exact.second) / m.second_error).item())
            scores["gain"].append(((m.gain() - exact.gain()) / m.gain_error())[0].item())
            scores["condition"].append(((m.condition() - exact.condition()) / m.condition_error()).item())
        for values in scores.values():
            spread = math.sqrt(sum(v * v for v in values) / len(values))
            assert 0.85 < spread < 1.2, (name, spread)  # 200 draws: 1 +- 0.05; 39 chunks know their spread to 11 %


def test_with_few_draws_errors_are_bounds():
    exact = moments("gaussian", 0.0777, method="quadrature").condition()
    off = [
        ((m := moments("gaussian", 0.0777, samples=2000, seed=s)).condition() - exact) / m.condition_error()
        for s in range(100)
    ]
    assert math.sqrt(sum(o.item() ** 2 for o in off) / 100) < 1.2


def test_further_draws_continue_the_stream():
    whole = moments("tanh", 1.0, samples=8 * raw.CHUNK, seed=1)
    first = moments("tanh", 1.0, samples=4 * raw.CHUNK, seed=1)
    second = moments("tanh", 1.0, samples=4 * raw.CHUNK, seed=1, start=4 * raw.CHUNK)
    assert torch.equal(whole.second, (first.second + second.second) / 2)


def test_quadrature_says_when_it_does_not_converge():
    with pytest.raises(ValueError, match=r"does not converge.*montecarlo"):
        moments("sine", 1e4, method="quadrature")
    assert moments("sine", 1e4, method="auto", samples=1000).method == "montecarlo"
    assert moments("sine", 0.1, method="auto").method == "quadrature"


def test_quadrature_of_a_kink_away_from_zero():
    m = moments(lambda z: torch.relu(z - 0.3), 1.0, method="quadrature")
    # E[(z - a)_+^2] = (1 + a^2) (1 - Phi(a)) - a phi(a)
    a, phi, tail = 0.3, math.exp(-0.045) / math.sqrt(2 * math.pi), 0.5 * math.erfc(0.3 / math.sqrt(2))
    assert m.second.item() == pytest.approx((1 + a * a) * tail - a * phi, rel=1e-9)
    assert m.derivative_second.item() == pytest.approx(tail, rel=1e-9)


def test_fourier_features_have_second_moment_one_half():
    for sigma in (0.1, 1.0, 10.0):
        m = moments("fourier", sigma, samples=100_000)
        assert m.second.mean().item() == pytest.approx(0.5, rel=1e-6)


# -- bad input


def everywhere(value):
    return lambda z: z * 0 + value


BAD = [
    (lambda: moments("sine", 0.0), ValueError, "sigma"),
    (lambda: moments("sine", -1.0), ValueError, "sigma"),
    (lambda: moments("sine", math.nan), ValueError, "sigma"),
    (lambda: moments("sine", math.inf), ValueError, "sigma"),
    (lambda: moments("sine", torch.tensor([1.0, 0.0])), ValueError, "sigma"),
    (lambda: moments("sine", "1"), TypeError, "sigma"),
    (lambda: moments("sine", True), TypeError, "sigma"),
    (lambda: moments("sine", None), TypeError, "sigma"),
    (lambda: moments("split", (1.0, 2.0)), ValueError, "one entry a branch, 4"),
    (lambda: moments("gabor", (torch.ones(2), torch.ones(3))), ValueError, "broadcast"),
    (lambda: moments("sin", 1.0), ValueError, "sin"),
    (lambda: moments(3, 1.0), TypeError, "callable"),
    (lambda: moments("sine", 1.0, samples=1), ValueError, "samples"),
    (lambda: moments("sine", 1.0, samples=-5), ValueError, "samples"),
    (lambda: moments("sine", 1.0, samples=1e6), TypeError, "samples"),
    (lambda: moments("sine", 1.0, seed=-1), ValueError, "seed"),
    (lambda: moments("sine", 1.0, seed=1 << 63), ValueError, "seed"),
    (lambda: moments("sine", 1.0, seed=0.5), TypeError, "seed"),
    (lambda: moments("sine", 1.0, start=3), ValueError, "multiple of 4"),
    (lambda: moments("sine", 1.0, start=(1 << 63) - 4), ValueError, "start"),
    (lambda: moments("sine", 1.0, method="mc"), ValueError, "method"),
    (lambda: moments("sine", 1.0, device="meta"), ValueError, "device"),
    (lambda: moments("sine", 1.0, parameters={"omga": 3.0}), ValueError, "omga"),
    (lambda: moments("sine", 1.0, parameters={"omega": math.nan}), ValueError, "omega"),
    (lambda: moments("sine", torch.ones(2), parameters={"omega": torch.ones(3)}), ValueError, "broadcast"),
    (lambda: moments(torch.tanh, 1.0, parameters={"omega": 3.0}), TypeError, "parameters"),
    (lambda: moments(torch.log, 1.0, samples=100), ValueError, "finite"),
    (lambda: moments(torch.log, 1.0, method="quadrature"), ValueError, "finite|converge"),
    (lambda: moments(lambda z: torch.exp(z**2 * 100), 1.0, samples=10_000), ValueError, "finite"),
    (lambda: moments(lambda z: z[:-1], 1.0, samples=100), ValueError, "element by element"),
    (lambda: moments(lambda z: z > 0, 1.0, samples=100), TypeError, "floating-point"),
    (lambda: moments(lambda z: 1.0, 1.0, samples=100), TypeError, "floating-point"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_input_is_explained(i):
    call, error, words = BAD[i]
    with pytest.raises(error, match=words):
        call()
