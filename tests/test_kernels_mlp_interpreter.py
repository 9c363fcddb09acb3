"""The whole-network kernels in Triton's interpreter, against plain float64 PyTorch.

A process of its own, with TRITON_INTERPRET=1 set before Triton is imported (`make test` starts it). The interpreter's
configurations are small, so that few rows make several tiles and programs; between them they take every path: weights
that stay on chip (width 16) and streamed ones, feature tiles (32), pre-activations read again, weight gradients tile by
tile (to 32) and of factors that wait in memory (64); chunks of rows where a test asks for them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "on"):
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from fused_inr.kernels import maps
from fused_inr.kernels.configurations import mlp as network_configs
from fused_inr.kernels.mlp import forward_kernel, serves, train_kernel
from operands import mlp, mlp_backward, mlp_loss
from tolerances import UNIT, Map, Rounded, cat, chunk, times, total, worst

from fused_inr.activations import registered, registered_losses, store

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in padded columns

MAPS = {m.name: m for m in registered()}
ARCHS = ("sm80", "sm86", "sm90", "sm100")
IDENTITY = MAPS["identity"]
F64 = torch.float64
#: float64 against float64, relative to the largest value: sums of at most a few hundred terms, through four layers
CLOSE = 1e-12
ALL = (True, True, True, True)


@dataclass
class NetworkProblem:
    """A problem: M rows of K inputs, `hidden` + 1 layers of N features with the map m, `out` outputs."""

    m: object
    x: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    constants: list[float]
    g: torch.Tensor
    last: object = IDENTITY

    @property
    def layers(self) -> int:
        return len(self.weights) - 1

    @property
    def maps(self) -> list:
        return [self.m] * self.layers + [self.last]

    @property
    def numbers(self) -> list[None]:
        return [None] * len(self.constants)

    def arguments(self, params=None):
        return self.weights, self.biases, self.numbers if params is None else params, self.constants, self.maps


def make(name, M=37, K=2, N=16, hidden=2, out=3, dtype=F64, last="identity", scale=1.0) -> NetworkProblem:
    m, generator = MAPS[name], torch.Generator().manual_seed(M + N)
    B, C = m.branches, m.outputs

    def draw(*shape, by=1.0):
        return (torch.randn(*shape, generator=generator, dtype=F64) * by).to(dtype)

    weights = [draw(B * N, K, by=scale / K**0.5)]
    weights += [draw(B * N, C * N, by=scale / (C * N) ** 0.5) for _ in range(hidden)]
    weights.append(draw(out, C * N, by=(C * N) ** -0.5))
    biases = [draw(len(w), by=0.3) for w in weights]
    if hidden:
        biases[1] = None
    constants = [min(c, 3.0) + 0.25 * i for i in range(hidden + 1) for c in m.defaults.values()]
    constants += MAPS[last].defaults.values()
    return NetworkProblem(m, draw(M, K), weights, biases, constants, draw(M, out), MAPS[last])


def evaluate(net: NetworkProblem, x, weights, biases, params) -> torch.Tensor:
    """y by the generated PyTorch maps."""
    h, params = x, list(params)
    for m, w, b in zip(net.maps, weights, biases, strict=True):
        z = h @ w.mT if b is None else h @ w.mT + b
        own, params = params[: m.n_params], params[m.n_params :]
        h = torch.cat(m.torch_map(0)(*z.chunk(m.branches, -1), *own), -1)
    return h


def leaves(tensors):
    return [None if t is None else t.detach().double().clone().requires_grad_() for t in tensors]


def reference(net: NetworkProblem, value, params=None):
    """value(y) and its gradients in float64, in the order of the kernels' lists, None where there is nothing; those of
    parameters, [P, N] a layer, if `params` are given."""
    x, *rest = leaves([net.x, *net.weights, *net.biases])
    weights, biases = rest[: len(net.weights)], rest[len(net.weights) :]
    N, P, L = net.weights[0].shape[0] // net.m.branches, net.m.n_params, net.layers
    used = [c if p is None else p for p, c in zip(params or net.numbers, net.constants, strict=True)]
    used = leaves([torch.as_tensor(p, dtype=F64).expand(N) for p in used[: L * P]]) + used[L * P :]
    result = value(evaluate(net, x, weights, biases, used))
    inputs = [x, *weights, *biases, *used[: L * P]]
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(result, wanted, allow_unused=True, materialize_grads=True))
    found = [None if t is None else next(found) for t in inputs]
    gradients, gp = found[: 1 + 2 * (L + 1)], found[1 + 2 * (L + 1) :]
    per_layer = [torch.stack(gp[i * P : (i + 1) * P]) if params is not None and P else None for i in range(L)]
    return result.detach(), [*gradients, *per_layer, None]


def agree(actual, expected, bound=CLOSE) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e is None:
            assert a.shape == (0,)
            continue
        assert a.shape == e.shape, (i, a.shape, e.shape)
        if e.numel():
            assert torch.isfinite(a).all()
            difference = ((a.double() - e).abs().max() / e.abs().max().clamp_min(1e-30)).item()
            assert difference <= bound, (i, difference)


def check(net: NetworkProblem, params=None) -> None:
    """Forward, and the backward from the saved pre-activations and from x alone."""
    g = net.g.double()
    _, expected = reference(net, lambda y: (y * g).sum(), params)
    used = [c if p is None else p for p, c in zip(params or net.numbers, net.constants, strict=True)]
    y, saved = mlp(net.x, *net.arguments(params), "ieee", True)
    agree([y], [evaluate(net, net.x, net.weights, net.biases, used)])
    plain, nothing = mlp(net.x, *net.arguments(params), "ieee", False)
    assert torch.equal(plain, y) and nothing.shape == (0,) and y.dtype == net.x.dtype
    for z in (saved, None):
        needs = (True, True, True, params is not None)
        agree(mlp_backward(net.g, net.x, *net.arguments(params), z, "ieee", needs), expected)


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("name", ["sine", "gaussian", "relu", "gabor", "complex_gabor", "split"])
def test_activations(name):
    check(make(name, M=35, N=13, hidden=1))


@pytest.mark.parametrize("name", sorted(set(MAPS) - {"identity"}))
def test_every_activation_forward(name):
    net = make(name, M=17, N=5, hidden=1, out=2, scale=0.3)
    y, _ = mlp(net.x, *net.arguments())
    agree([y], [evaluate(net, net.x, net.weights, net.biases, net.constants)])


@pytest.mark.parametrize("hidden", [0, 1, 3])
@pytest.mark.parametrize("N", [1, 16])
def test_depths(hidden, N):
    check(make("sine", M=33, N=N, hidden=hidden, out=1))


@pytest.mark.parametrize(("name", "N"), [("sine", 32), ("gabor", 20), ("sine", 40)])
def test_feature_tiles_and_factors_that_wait(name, N):
    check(make(name, M=34, N=N, hidden=2 if N == 32 else 1))


@pytest.mark.parametrize("K", [1, 8, 9, 16, 17, 35, 64])
def test_inputs(K):
    check(make("sine", M=18, K=K, hidden=0, out=2))


@pytest.mark.parametrize("out", [1, 16, 17, 33])
def test_outputs(out):
    check(make("gaussian", M=18, hidden=0, out=out))


@pytest.mark.parametrize("M", [1, 15, 16, 17, 65])
def test_rows(M):
    check(make("sine", M=M, hidden=1))


@pytest.mark.parametrize("N", [16, 40])
def test_no_rows(N):
    net = make("gabor", M=0, N=N)
    y, saved = mlp(net.x, *net.arguments(), "ieee", True)
    assert y.shape == (0, 3) and mlp(net.x, *net.arguments())[1].shape == (0,)
    for z in (saved, None):
        gradients = mlp_backward(net.g, net.x, *net.arguments(), z)
        given = (net.x, *net.weights, *net.biases, *[None] * len(net.maps))
        agree(gradients, [torch.zeros_like(t) if t is not None else t for t in given])
    value, *gradients = mlp_loss(net.x, net.g, None, *net.arguments())
    assert value.shape == () and value == 0 and all(not t.any() for t in gradients)


def test_last_activation():
    check(make("sine", M=20, hidden=1, last="sigmoid"))


def test_layouts():
    """Rows of any stride, columns too; cotangents of stride 0."""
    net = make("sine", M=20, K=3, hidden=1)
    y, saved = mlp(net.x, *net.arguments(), "ieee", True)
    expected = mlp_backward(net.g[:1].expand_as(net.g).contiguous(), net.x, *net.arguments(), saved)
    wide = torch.zeros(20, 5, dtype=F64)[:, 1:4]
    wide.copy_(net.x)
    for x in (wide, net.x.mT.contiguous().mT):
        net.x = x
        assert torch.equal(mlp(x, *net.arguments())[0], y)
        for g in (net.g[:1].expand_as(net.g), net.g[:1].expand_as(net.g).mT.contiguous().mT):
            agree(mlp_backward(g, x, *net.arguments(), saved), [t if t.numel() else None for t in expected], 0.0)


# ---------------------------------------------------------------- parameters


def test_layouts_of_weights():
    """Weights of any strides: transposed, every other row, parts of a larger tensor; a first layer tied to the last."""
    net = make("sine", M=20, K=16, N=16, hidden=2, out=16)
    net.weights[-1] = net.weights[0].mT.contiguous()
    y, saved = mlp(net.x, *net.arguments(), "ieee", True)
    value, *expected = mlp_loss(net.x, net.g, None, *net.arguments())

    def other(w):
        return w.mT.contiguous().mT

    def wider(w):
        large = torch.full((2 * len(w), w.shape[1] + 3), torch.nan, dtype=F64)
        large[::2, 1:-2] = w
        return large[::2, 1:-2]

    contiguous = list(net.weights)
    for layout in (other, wider):
        net.weights = [layout(w) for w in contiguous[:-1]] + [contiguous[0].mT]  # tied: one storage
        given = [w.clone() for w in net.weights]
        assert torch.equal(mlp(net.x, *net.arguments())[0], y)
        again, *gradients = mlp_loss(net.x, net.g, None, *net.arguments())
        assert torch.equal(again, value)
        agree(gradients, [t if t.numel() else None for t in expected], 0.0)
        backward = mlp_backward(net.g, net.x, *net.arguments(), saved)
        agree(mlp_backward(net.g, net.x, *net.arguments(), None), [t if t.numel() else None for t in backward])
        assert all(torch.equal(a, b) for a, b in zip(net.weights, given, strict=True))


def test_parameter_gradients():
    net = make("gabor", M=20, N=9, hidden=1)
    params = [torch.rand(9, dtype=F64) + 0.5, torch.tensor(0.7, dtype=F64), None, torch.rand(9, dtype=F64) + 0.5]
    check(net, params)


def test_numbers_have_gradients_too():
    net = make("sine", M=20, hidden=1)
    _, expected = reference(net, lambda y: (y * net.g).sum(), net.numbers)
    agree(mlp_backward(net.g, net.x, *net.arguments(), None, "ieee", ALL), expected)


def test_parameters_of_the_last_layer_are_numbers():
    net = make("sine", M=5, last="sine")
    check(net)
    with pytest.raises(ValueError, match="last activation, sine, must be numbers"):
        mlp(net.x, *net.arguments([None] * 3 + [torch.tensor(1.0)]))
    with pytest.raises(ValueError, match="last activation, sine, are not computed"):
        mlp_backward(net.g, net.x, *net.arguments(), None, "ieee", ALL)


def test_needs():
    """What is not needed comes back empty, and what is does not depend on it."""
    net = make("sine", M=20, hidden=1)
    params = [torch.tensor(2.0, dtype=F64), None]
    full = mlp_backward(net.g, net.x, *net.arguments(params), None, "ieee", ALL)
    part_of = [0] + [1] * 3 + [2] * 3 + [3] * 3
    for mask in range(16):
        needs = tuple(bool(mask >> i & 1) for i in range(4))
        got = mlp_backward(net.g, net.x, *net.arguments(params), None, "ieee", needs)
        agree(got, [t if needs[part_of[i]] and t.numel() else None for i, t in enumerate(full)], 1e-14)
        assert all(t.dtype == torch.float64 for t in got)


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "N", "last"), [("sine", 16, "identity"), ("gabor", 9, "sigmoid"), ("sine", 40, "identity")]
)
def test_loss(name, N, last, weighted):
    net = make(name, M=50, N=N, hidden=1, last=last)
    target, scale = net.g * 0.5, 0.3
    row_weights = torch.rand(50, dtype=F64) if weighted else None

    def loss(y):
        rows = (y - target).square().sum(-1)
        return scale * (rows if row_weights is None else rows * row_weights).sum()

    value, gradients = reference(net, loss)
    got = mlp_loss(net.x, target, row_weights, *net.arguments(), "squared_error", [], scale)
    agree(got, [value, *gradients])


@pytest.mark.parametrize("N", [16, 40])
def test_gradients_of_a_float16_loss_stay_within_its_range(N):
    """A mean over 2e7 numbers: its gradients are float16's smallest numbers, and a loss scaler comes later."""
    net = make("gaussian", M=50, N=N, hidden=1, dtype=torch.float16)
    scale = 5e-8
    value, expected = reference(net, lambda y: scale * (y - net.g.double()).square().sum())
    found = mlp_loss(net.x, net.g, None, *net.arguments(), "squared_error", [], scale)
    assert abs(found[0].item() / value.item() - 1) <= 1e-2
    for got, want in zip(found[1:], expected, strict=False):
        if got.numel():
            assert got.dtype == torch.float32
            assert (got.double() - want).abs().max() <= 1e-2 * want.abs().max()


def test_loss_of_the_registry():
    net = make("sine", M=20, hidden=0)
    for loss_map in registered_losses():
        constants = list({**loss_map.defaults, **loss_map.facts.test_values}.values())
        value, gradients = reference(net, lambda y: loss_map.torch_map(0)(y, net.g, *constants)[0].sum())  # noqa: B023
        agree(mlp_loss(net.x, net.g, None, *net.arguments(), loss_map.key, constants), [value, *gradients])


def train_both_ways(name, M, N, hidden):
    """Loss and its gradients, and those of a cotangent from saved pre-activations, against the reference."""
    net = make(name, M=M, N=N, hidden=hidden)
    value, gradients = reference(net, lambda y: (y - net.g).square().sum())
    agree(mlp_loss(net.x, net.g, None, *net.arguments()), [value, *gradients])
    _, gradients = reference(net, lambda y: (y * net.g).sum())
    saved = mlp(net.x, *net.arguments(), "ieee", True)[1]
    agree(mlp_backward(net.g, net.x, *net.arguments(), saved), gradients)


@pytest.fixture
def launches(monkeypatch):
    """The launches of training passes and weight gradients, by name."""
    from fused_inr.kernels import mlp as module

    seen = []

    def count(name, run, *args):
        seen.append(name)
        return run(*args)

    for name in ("_train_pass", "launch_weight_grad"):
        monkeypatch.setattr(module, name, partial(count, name, getattr(module, name)))
    return seen


@pytest.mark.parametrize(("name", "M"), [("sine", 149), ("sine", 128), ("sine", 10), ("complex_gabor", 80)])
def test_factors_that_wait_take_one_launch(name, M, monkeypatch, launches):
    """Two tiles wait at a time, and fewer at the end of a program's: 10 tiles for 2 programs, 8, 1 for one program."""
    monkeypatch.setattr(network_configs, "LATER_ROWS", 32)
    train_both_ways(name, M, 33, hidden=2 if name == "sine" else 1)
    assert launches == ["_train_pass"] * 2


def test_factors_that_wait_in_feature_tiles(monkeypatch, launches):
    """The sums lie row by row then, not block by block."""
    pick = network_configs.pick

    def later(arch, op, *rest):
        return None if op == "one_pass" else replace(pick(arch, op, *rest), sums=False)

    monkeypatch.setattr(network_configs, "pick", later)
    train_both_ways("sine", 50, 20, hidden=2)
    assert launches == ["_train_pass"] * 2


def test_chunks_of_rows(monkeypatch, launches):
    """Where sums of a program would leave the cache, and there are more rows than a chunk's scratch holds."""
    monkeypatch.setattr(network_configs, "SUMS_BYTES", 1)
    monkeypatch.setattr(network_configs, "CHUNK_BYTES", 32 * 128 * 8)  # 32 rows of gz and h
    train_both_ways("sine", 50, 33, hidden=1)
    assert launches == ["_train_pass", "launch_weight_grad"] * 4


def test_deep_networks_leave_the_sums(monkeypatch):
    net = make("sine", M=20, hidden=2)
    expected = mlp_backward(net.g, net.x, *net.arguments(), None)
    monkeypatch.setattr(network_configs, "SUMS_BYTES", 1)
    agree(mlp_backward(net.g, net.x, *net.arguments(), None), [t if t.numel() else None for t in expected])


# ---------------------------------------------------------------- storage types


def bounded(net: NetworkProblem):
    """y and the gradients of <g, y> with bounds, where every activation, derivative and gradient of z is stored in x's
    type; those of a bias are sums of what is stored."""
    dtype, u = net.x.dtype, 2.0**-24
    unit = UNIT[dtype] if dtype.itemsize < 4 else 0.0

    def stored(t: Rounded) -> Rounded:
        return Rounded(t.value, t.error + unit * t.size, u)

    weights = [Rounded.exact(w, u) for w in net.weights]
    activations, around, params = [Rounded.exact(net.x, u)], [], list(net.constants)
    for m, w, b in zip(net.maps, weights, net.biases, strict=True):
        z = activations[-1] @ w.T
        if b is not None:
            z = z + Rounded.exact(b, u)
        z = Rounded(z.value, z.error + 2 * u * z.size, u)
        own, params = [torch.tensor(p, dtype=F64) for p in params[: m.n_params]], params[m.n_params :]
        formula = lambda *args, m=m: m.torch_map(0)(*args)  # noqa: E731
        around.append(Map(formula, m.branches, z, own, 1))
        activations.append(stored(cat(around[-1].value)))
    g, gw, gb = Rounded.exact(net.g, u), [], []
    for m, w, h, at in zip(net.maps[::-1], weights[::-1], activations[-2::-1], around[::-1], strict=True):
        gs = chunk(g, m.outputs)
        gz = [total([times(gs[c], stored(at.first[c][b])) for c in range(m.outputs)]) for b in range(m.branches)]
        gz = stored(cat(gz))
        gb.insert(0, gz.sum(0))
        gw.insert(0, gz.T @ h)
        g = gz @ w
    return activations[-1], [g, *gw, *gb]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "N"), [("sine", 16), ("split", 7), ("complex_gabor", 16), ("sine", 40)])
def test_storage_types(name, N, dtype):
    """The roundings of activations, gradients of z and results, and float32's, each through the slopes of the maps."""
    net = make(name, M=19, N=N, hidden=1, dtype=dtype, scale=0.5)
    net.constants = [min(c, 1.0) for c in net.constants]
    y_bound, bounds = bounded(net)
    y, saved = mlp(net.x, *net.arguments(), "ieee", True)
    assert y.dtype == dtype and saved.dtype == torch.float32
    assert worst(y, y_bound, dtype) <= 1
    for z in (saved, None):
        gradients = mlp_backward(net.g, net.x, *net.arguments(), z)
        for i, (gradient, bound) in enumerate(zip(gradients, bounds, strict=False)):
            if gradient.numel():
                assert gradient.dtype == dtype
                assert worst(gradient, bound, dtype) <= 1, i


def test_other_types_of_weights():
    """Master weights in float32 under half-type rows: products in the half type, gradients as the weights are."""
    net = make("sine", M=20, hidden=1, dtype=torch.bfloat16)
    expected = mlp_backward(net.g, net.x, *net.arguments(), None)
    net.weights, net.biases = [w.float() for w in net.weights], [b if b is None else b.float() for b in net.biases]
    got = mlp_backward(net.g, net.x, *net.arguments(), None)
    assert got[0].dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in got[1:7] if t.numel())
    agree([t.bfloat16() for t in got[:7]], [t.double() if t.numel() else None for t in expected[:7]], 0.0)


# ---------------------------------------------------------------- what must not happen


def test_bits_and_inputs():
    """The same bits every time; nothing that was given is written."""
    net = make("gabor", M=50, hidden=1, dtype=torch.float32)
    saved = mlp(net.x, *net.arguments(), "ieee", True)[1]
    given = [net.x, net.g, saved, *net.weights, *(b for b in net.biases if b is not None)]
    before = [t.clone() for t in given]
    first = mlp_backward(net.g, net.x, *net.arguments(), saved)
    again = mlp_backward(net.g, net.x, *net.arguments(), saved)
    loss = [mlp_loss(net.x, net.g, None, *net.arguments(), "squared_error", [], 0.1) for _ in range(2)]

    def bits(tensors):  # what lies between the parts of `saved` is no number
        return [t.reshape(-1).view(torch.uint8) for t in tensors]

    assert all(torch.equal(a, b) for a, b in zip(bits(first), bits(again), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bits(loss[0]), bits(loss[1]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bits(given), bits(before), strict=True))


def test_results_are_no_views():
    net = make("sine", M=20, hidden=1)
    results = [t for t in mlp_loss(net.x, net.g, None, *net.arguments()) if t.numel()]
    for t in results:
        assert t._base is None and t.is_contiguous()
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


class LogPole:
    """log: at the zeros of padded columns it and its derivative are infinite."""

    name, branches, outputs, n_params, defaults = "log_pole", 1, 1, 0, {}
    key, generated = "log_pole", True

    @staticmethod
    def triton_map(level, learnable=False):
        value, more = [("fi_log(z0, MODE)", ""), ("g0 / z0", ", g0")][level]
        source = f"@triton.jit\ndef log_pole_l{level}(z0{more}, MODE: tl.constexpr):\n    return ({value},)\n"
        return maps.from_source(f"log_pole_l{level}", source)

    @staticmethod
    def triton_jet():
        source = "@triton.jit\ndef log_pole_j(z0, MODE: tl.constexpr):\n    return fi_log(z0, MODE), 1 / z0\n"
        return maps.from_source("log_pole_j", source)

    @staticmethod
    def torch_map(level, learnable=False):
        return lambda z: (z.log(),)


@pytest.mark.parametrize("N", [9, 33])
def test_padding_does_not_reach_the_sums(N, monkeypatch):
    monkeypatch.setitem(store.DEFINED, LogPole.key, LogPole)
    net = make("relu", M=21, N=N, hidden=0, out=2)
    net.m, net.x = LogPole, net.x.abs() + 1
    net.weights[0], net.biases[0] = net.weights[0].abs() + 1, torch.zeros(N, dtype=F64)
    check(net)


def test_rows_are_no_key():
    """Neither a constant of the kernels nor of the configuration depends on the number of rows."""
    import inspect
    import re

    assert "M" not in inspect.signature(network_configs.pick.__wrapped__).parameters
    for kernel in (forward_kernel, train_kernel):
        source = inspect.getsource(kernel.fn)
        assert not re.search(r"\bM: tl.constexpr", source) and re.search(r"\bM, L\b", source)


# ---------------------------------------------------------------- what is served


def test_serves():
    sine, gabor, split = MAPS["sine"], MAPS["gabor"], MAPS["split"]
    shapes = [(64, 2), (64, 64), (3, 64)]
    maps_of = [sine, sine, IDENTITY]

    def reason(shapes=shapes, maps=maps_of, dtype=torch.bfloat16, precision="ieee", arch=90, direction="forward"):
        return serves(shapes, maps, dtype, precision, arch, direction=direction)

    for arch in (80, 90, 100, None):
        for direction in ("forward", "backward", "loss"):
            assert reason(arch=arch, direction=direction) == ""
    assert reason(dtype=torch.float32, precision="tf32") == "" and reason(dtype=F64, arch=None) == ""
    assert "one by one" in reason(dtype=torch.float32, precision="ieee")
    assert "float32 in bf16x3 on sm80 (loss)" in reason(
        [(128, 2), (128, 128), (3, 128)], dtype=torch.float32, precision="bf16x3", arch=80, direction="loss"
    )
    assert "float64" not in reason(dtype=torch.float32, arch=None)
    assert "two layers" in reason([(3, 2)], [IDENTITY]) and "two layers" in reason(shapes, maps_of[1:])
    assert "different activations" in reason(maps=[sine, MAPS["gaussian"], IDENTITY])
    assert "last activation, gabor" in reason([(64, 2), (64, 64), (6, 64)], [sine, sine, gabor])
    assert "width" in reason([(64, 2), (32, 64), (3, 32)]) and "width" in reason([(64, 2), (64, 64), (3, 32)])
    assert "inputs" in reason([(64, 4096), (64, 64), (3, 64)]) and "outputs" in reason([(64, 2), (64, 64), (65, 64)])
    assert "no configuration for width 2048" in reason([(2048, 2), (2048, 2048), (3, 2048)])
    assert "empty" in reason([(64, 0), (64, 64), (3, 64)]) and "int32" in reason(dtype=torch.int32)
    fourier = MAPS["fourier"]
    assert "1 branches and 2 outputs" in reason([(64, 2), (64, 128), (3, 128)], [fourier, fourier, IDENTITY])
    assert reason([(4 * 32, 3), (4 * 32, 32), (1, 32)], [split, split, IDENTITY]) == ""
    with pytest.raises(ValueError, match="direction"):
        reason(direction="sideways")


def test_table():
    for (arch, op, cls, B, C, width), numbers in network_configs.TUNED.items():
        config, itemsize = network_configs.NetworkConfig(*numbers), 2 if cls == "half" else 4
        assert network_configs.valid(config, arch, op, B, C, width, itemsize), (arch, op, cls, B, C, width, config)
    assert network_configs.width(33, "sm90") == 64 and network_configs.width(1, "sm90") == 32
    keys = [k for k in network_configs.TUNED if k[1] in ("forward", "train")]
    served = {arch: {k[1:] for k in keys if k[0] == arch} for arch in ARCHS}
    assert served["sm80"] <= served["sm86"]  # 99 KB are enough for whatever 163 KB serve
