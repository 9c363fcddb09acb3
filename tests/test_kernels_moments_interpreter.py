"""The moments kernel in Triton's interpreter: Philox's known answers, one stream whatever the tiling, and sums against
float64.

A process of its own, as test_kernels_interpreter.py says.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "on"):
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
np = pytest.importorskip("numpy")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from fused_inr.kernels import moments as kernel  # noqa: E402

from fused_inr import activations  # noqa: E402
from fused_inr.activations import registered  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: integers that wrap, inf and NaN

MAPS = {m.name: m for m in registered()}
CHUNK = kernel.CHUNK


# ---------------------------------------------------------------- random numbers, written once more in 64 bits


def philox(counter, key: list[int]) -> list:
    """Counters are integers or arrays of uint64 below 2^32."""
    c, k = [np.asarray(x, np.uint64) for x in counter], list(key)
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        low, high = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        k0, k1 = np.uint64(k[0]), np.uint64(k[1])
        c = [(high >> half) ^ c[1] ^ k0, high & word, (low >> half) ^ c[3] ^ k1, low & word]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def stream(start: int, count: int, branch: int, seed: int) -> list[int]:
    q = np.arange(start // 4, (start + count) // 4, dtype=np.uint64)
    counter = [q & np.uint64(0xFFFFFFFF), q >> np.uint64(32), np.full_like(q, branch), np.zeros_like(q)]
    return np.stack(philox(counter, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]), 1).reshape(-1).tolist()


def normals(start: int, samples: int, branch: int, seed: int) -> torch.Tensor:
    """float64 normals of the words; u and t rounded to float32 as the kernels round them."""
    x = np.array(stream(start, -(-samples // 4) * 4, branch, seed), dtype=np.uint32).reshape(-1, 2)
    u = x[:, 0].astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    t = x[:, 1].view(np.int32).astype(np.float32) * np.float32(np.pi * 2.0**-31)
    r = np.sqrt(np.maximum(-2 * np.log(u.astype(np.float64)), 0))
    pair = np.stack((r * np.cos(t.astype(np.float64)), r * np.sin(t.astype(np.float64))), 1)
    return torch.from_numpy(pair.reshape(-1)[:samples])


ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@triton.jit
def philox_kernel(c_ptr, k_ptr, out_ptr):
    i = tl.arange(0, 1)
    k0, k1 = tl.load(k_ptr), tl.load(k_ptr + 1)
    words = kernel.philox4x32(
        tl.load(c_ptr + i), tl.load(c_ptr + 1 + i), tl.load(c_ptr + 2 + i), tl.load(c_ptr + 3 + i), k0, k1
    )
    for n in tl.static_range(4):
        tl.store(out_ptr + n + i, words[n])


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter, key, answer):
    expected = [int(word, 16) for word in answer.split()]
    assert [int(x) for x in philox(counter, key)] == expected
    out = torch.zeros(4, dtype=torch.uint32)
    philox_kernel[(1,)](torch.tensor(counter).to(torch.uint32), torch.tensor(key).to(torch.uint32), out)
    assert out.tolist() == expected


@pytest.mark.parametrize(
    ("start", "count", "branch", "seed"),
    [
        (0, 12, 0, 0),
        (8, 4104, 3, 1),  # more than one program, the last one short
        (4 * (2**32 - 1), 12, 1, 2**32 - 1),  # the counter's second word begins
        (2**62, 8, 2, 2**63 + 12345),
        (2**63 - 8, 8, 0, 2**64 - 1),
    ],
)
def test_the_stream(start, count, branch, seed):
    assert kernel.random_bits(start, count, branch, seed, "cpu").tolist() == stream(start, count, branch, seed)


def test_random_bits_wants_whole_quads():
    for start, count in ((2, 4), (4, 3)):
        with pytest.raises(ValueError, match="multiples of 4"):
            kernel.random_bits(start, count, 0, 0, "cpu")
    assert kernel.random_bits(4, 0, 0, 0, "cpu").tolist() == []


# ---------------------------------------------------------------- moments


def defaults(m, G: int) -> torch.Tensor:
    """Constants of moderate size: at omega 30 a float32 product has lost the phase that float64 keeps."""
    return torch.tensor([[min(c, 3.0) for c in m.defaults.values()]] * G).reshape(G, m.n_params)


def expected(m, sigmas, params, start, samples, seed):
    """Sums in float64 of the jet that PyTorch differentiates by itself, and what each is made of: [chunks, G, V, 3]."""
    B, C = m.branches, m.outputs
    n = torch.stack([normals(start, samples, b, seed) for b in range(B)], -1)
    value = m.torch_map(0)
    sums, sizes = [], []
    for g in range(len(sigmas)):
        z = (sigmas[g].double() * n).requires_grad_()
        y = value(*z.unbind(-1), *params[g].double())
        v = [t + 0 * z[:, 0] for t in y]
        for t in list(v):
            v += list((torch.autograd.grad(t.sum(), z, retain_graph=True)[0] if t.requires_grad else 0 * z).unbind(-1))
        v = torch.stack(v[: C * (1 + B)], -1).detach()
        powers = torch.stack((v, v**2, v**4), -1)
        chunks = powers.split(CHUNK)
        sums.append(torch.stack([c.sum(0) for c in chunks]))
        sizes.append(torch.stack([c.abs().sum(0) for c in chunks]))
    return torch.stack(sums, 1), torch.stack(sizes, 1)


def check(m, sigmas, params, start, samples, seed):
    out = kernel.moments(sigmas, params, start, samples, seed, m)
    exact, size = expected(m, sigmas, params, start, samples, seed)
    assert out.dtype == torch.float64 and out.shape == exact.shape
    # an evaluation in float32 of a few units in the last place of the largest value; steep maps multiply the error of z
    assert ((out - exact).abs() <= 2e-5 * size + 1e-9).all(), ((out - exact).abs() / (2e-5 * size + 1e-9)).amax((0, 1))
    return out


@pytest.mark.parametrize("name", MAPS)
def test_every_activation(name):
    """Two settings, and a draw more than a chunk less three: neither a multiple of 4096 nor of 4."""
    m = MAPS[name]
    sigmas = torch.linspace(0.4, 1.3, 2 * m.branches).view(2, m.branches)
    check(m, sigmas, defaults(m, 2), 0, 2 * CHUNK - 3, 7)


def test_a_formula_at_run_time():
    import sympy

    chirp = activations.define("test_moments_chirp", lambda z, a: sympy.sin(a * z**2), a=1.5).map
    check(chirp, torch.tensor([[0.5], [1.0]]), torch.tensor([[1.5], [0.5]]), 4096, 1001, 3)
    two = activations.define("test_moments_two", lambda a, b, s: (a * b, s * a), s=2.0).map
    out = check(two, torch.tensor([[0.5, 2.0]]), torch.tensor([[3.0]]), 0, 4096, 3)
    # y1 = s a: its derivatives are numbers, and count each draw
    assert out[0, 0, 4:, 0].tolist() == [3.0 * 4096, 0.0]


def test_parameters_of_each_setting():
    m = MAPS["sine"]
    out = check(m, torch.tensor([[0.5], [0.5], [1.0]]), torch.tensor([[1.0], [2.0], [0.5]]), 0, 100, 0)
    assert out[0, 0, 1, 1] < out[0, 1, 1, 1]  # omega^2 cos^2
    # sine at omega 2 and sigma 0.5 has the value of omega 1 at sigma 1; bits too, as powers of two scale
    again = kernel.moments(torch.tensor([[1.0]]), torch.tensor([[1.0]]), 0, 100, 0, m)
    assert torch.equal(again[0, 0, 0], out[0, 1, 0])


@pytest.mark.parametrize("samples", [1, 2, 3, 5, CHUNK, CHUNK + 1])
def test_few_draws(samples):
    m = MAPS["relu"]
    out = check(m, torch.tensor([[1.0]]), torch.zeros(1, 0), 8, samples, 5)
    assert out.shape[0] == -(-samples // CHUNK)


def test_nothing_to_do():
    m = MAPS["sine"]
    assert kernel.moments(torch.zeros(0, 1), torch.zeros(0, 1), 0, 5000, 0, m).shape == (2, 0, 2, 3)
    assert kernel.moments(torch.zeros(3, 1), torch.zeros(3, 1), 0, 0, 0, m).shape == (0, 3, 2, 3)


def test_counters_beyond_32_bits():
    m = MAPS["tanh"]
    start = 4 * (2**32 - 512)  # the counter's second word begins within the chunk
    out = check(m, torch.tensor([[1.0]]), torch.zeros(1, 0), start, CHUNK, 2**40 + 5)
    assert not torch.equal(out, kernel.moments(torch.tensor([[1.0]]), torch.zeros(1, 0), 0, CHUNK, 2**40 + 5, m))
    check(m, torch.tensor([[1.0]]), torch.zeros(1, 0), 2**63 - CHUNK, CHUNK, 2**64 - 1)


@pytest.mark.parametrize("name", ["sine", "split"])
def test_bits_do_not_depend_on_the_tiling(name):
    m = MAPS[name]
    G, samples = 3, CHUNK + 40
    sigmas = torch.linspace(0.2, 2, G * m.branches).view(G, m.branches)
    params = defaults(m, G)
    whole = kernel.moments(sigmas, params, 0, samples, 1, m)
    for settings in (1, 2):
        out = torch.full_like(whole, float("nan"))
        kernel.launch_moments(sigmas, params, out, 0, samples, 1, m, settings, "ieee")
        assert torch.equal(out, whole), settings
    # calls of a chunk each, and of one setting
    for k, n in ((0, CHUNK), (1, 40)):
        assert torch.equal(kernel.moments(sigmas, params, CHUNK * k, n, 1, m)[0], whole[k])
    assert torch.equal(kernel.moments(sigmas[2:], params[2:], 0, samples, 1, m)[:, 0], whole[:, 2])


def test_branches_and_seeds_have_streams_of_their_own():
    first = kernel.random_bits(0, 400, 0, 0, "cpu")
    for branch, seed in ((1, 0), (0, 1), (0, 2**32)):
        assert (kernel.random_bits(0, 400, branch, seed, "cpu") == first).sum() == 0


def test_extreme_words_give_finite_normals(monkeypatch):
    """All bits set: u is 1 and the radius 0, not the root of a negative number; none: the largest draw there is."""

    @triton.jit
    def run(x_ptr, out_ptr):
        i = tl.arange(0, 4)
        x = tl.load(x_ptr + i)
        a, b = kernel.box_muller(x, x, 2)
        tl.store(out_ptr + i, a)
        tl.store(out_ptr + 4 + i, b)

    out = torch.full((8,), float("nan"))
    run[(1,)](torch.tensor([0, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF]).to(torch.uint32), out)
    assert torch.isfinite(out).all()
    assert out[1] == 0 and out[0] == pytest.approx((2 * 33 * np.log(2)) ** 0.5)
    assert out.abs().max() < 6.8


@pytest.mark.parametrize(("start", "message"), [(2, "start: 2 is not a multiple of 4"), (-1, "multiple of 4")])
def test_bad_starts(start, message):
    with pytest.raises(ValueError, match=message):
        kernel.moments(torch.ones(1, 1), torch.zeros(1, 0), start, 10, 0, MAPS["relu"])


def test_moments_of_a_normal():
    """Of the identity: 0, 1 and 3, within five standard errors of 40 chunks."""
    m, n = MAPS["identity"], 40 * CHUNK
    total = kernel.moments(torch.ones(1, 1), torch.zeros(1, 0), 0, n, 11, m).sum(0)[0, 0] / n
    for found, exact, spread in zip(total.tolist(), (0, 1, 3), (1, 2, 96), strict=True):
        assert abs(found - exact) < 5 * (spread / n) ** 0.5


def test_fewer_programs_than_settings_times_chunks():
    assert kernel.settings_of(1, 245) == 1
    assert kernel.settings_of(10_000, 245) == kernel.MAX_SETTINGS
    assert kernel.settings_of(10, 1) == 1
    assert all(1 <= kernel.settings_of(g, c) <= max(1, g) for g in (1, 3, 1000) for c in (1, 100))
