"""The Triton kernels in Triton's interpreter, against the generated PyTorch maps in float64.

A process of its own, with TRITON_INTERPRET=1 set before Triton is imported (`make test` starts it). The interpreter
ignores precision and inline assembly and runs programs one after another: it proves indices, masks, formulas and sums,
in float64 (tight) and in the storage types; tensor cores and the special-function unit are for the static report and
for a GPU.
"""

from __future__ import annotations

import math
import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "on"):
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
np = pytest.importorskip("numpy")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402
from fused_inr.kernels import maps, primitives  # noqa: E402
from fused_inr.kernels.act_map import act_map, groups  # noqa: E402
from fused_inr.kernels.configurations import linear_act as layer_configs  # noqa: E402
from fused_inr.kernels.linear_act import (  # noqa: E402
    launch_forward,
    launch_gz,
    launch_weight_grad,
    linear_act,
    linear_act_backward,
    weight_grad_splits,
)
from fused_inr.kernels.maps import param_arguments  # noqa: E402
from fused_inr.kernels.sums import launch_sum  # noqa: E402

import fused_inr.activations.primitives as reference_primitives  # noqa: E402
from fused_inr.activations import registered  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at inf and NaN

MAPS = {m.name: m for m in registered()}
F64 = torch.float64
#: float64 against float64, sums of at most a few hundred terms, relative to the largest value.
CLOSE = 2e-13


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value; shapes must agree."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


# ---------------------------------------------------------------- primitives


@triton.jit
def unary_kernel(x_ptr, y_ptr, n, F: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, F(x, MODE), mask=i < n)


@triton.jit
def pow_kernel(x_ptr, e_ptr, y_ptr, n, F: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    e = tl.load(e_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, F(x, e, MODE), mask=i < n)


@triton.jit
def binary_kernel(a_ptr, b_ptr, y_ptr, n, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < n, other=0.0)
    b = tl.load(b_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, F(a, b), mask=i < n)


def evaluate(name: str, x: torch.Tensor, mode: int, exponent: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    block = triton.next_power_of_2(x.numel())
    function = getattr(primitives, f"fi_{name}")
    if exponent is None:
        unary_kernel[(1,)](x, y, x.numel(), function, mode, block)
    else:
        pow_kernel[(1,)](x, exponent, y, x.numel(), function, mode, block)
    return y


@pytest.fixture
def fused_multiply_add(monkeypatch):
    """The interpreter rounds the product of `tl.fma`; the hardware does not. In float64 the product of floats is
    exact."""

    def create_fma(self, x, y, z):
        if x.data.dtype == np.float32:
            wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return interpreter.TensorHandle(wide.astype(np.float32), z.dtype.scalar)
        return interpreter.TensorHandle(x.data * y.data + z.data, z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


UNARY = (
    "sin cos tan exp log log1p expm1 tanh sinh cosh sigmoid softplus erf sqrt abs sign step saturate atan "
    "sinc0 sinc1 sinc2 sinc3 sinc4 sinc5 sinc6"
).split()
#: ulp of float32 (sinc_n: of its largest value 1/(n+1), the recurrence above its threshold being the worst).
ULP = {"sin": 2, "cos": 2, **{f"sinc{n}": bound for n, bound in enumerate((4, 4, 4, 8, 16, 24, 32))}}


def samples(name: str) -> torch.Tensor:
    """Every exponent that matters, and the floats nearest to multiples of pi/2, small and huge."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-40, 18).repeat_interleave(48)
    mantissa = 1 + torch.rand(exponents.numel(), generator=generator)
    sign = torch.where(torch.rand(exponents.numel(), generator=generator) < 0.5, -1.0, 1.0)
    x = mantissa * 2.0**exponents * sign
    multiples = torch.cat((torch.arange(1, 400), torch.randint(400, 2**24, (400,), generator=generator)))
    x = torch.cat((x, (multiples.double() * (math.pi / 2)).float()))
    if name in ("sin", "cos", "tan"):
        huge = 2.0 ** torch.randint(18, 127, (400,), generator=generator) * (1 + torch.rand(400, generator=generator))
        x = torch.cat((x, huge, -huge))
    if name in ("log", "sqrt"):
        return x.abs()
    return torch.where(x > -1, x, -1 / x) if name == "log1p" else x


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    """float64 values at float32 arguments (libm reduces huge arguments of sin and cos exactly)."""
    return getattr(reference_primitives, name)(x.double())


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("name", UNARY)
def test_primitive_in_float32(name, mode, fused_multiply_add):
    x = samples(name)
    expected = exact(name, x)
    y = evaluate(name, x, mode)
    rounded = expected.float()
    finite = torch.isfinite(rounded)
    assert torch.equal(y[~finite], rounded[~finite])
    if name.startswith("sinc"):
        ulp = torch.full_like(expected, 2.0**-24 / (1 + int(name[4:])))
    else:
        ulp = (torch.nextafter(rounded.abs(), torch.tensor(math.inf)) - rounded.abs()).double().clamp_min(2.0**-126)
    # MODE 2 is the interpreter's numpy: a bound to notice a wrong formula, wider where it goes through expm1 or log1p
    bound = ULP.get(name, 4) if mode == 0 else max(6, ULP.get(name, 6))
    worst = ((y.double() - expected).abs() / ulp)[finite]
    at = worst.argmax()
    assert worst[at] <= bound, f"{name}({x[finite][at].item():.9g}): {worst[at].item():.2f} ulp"


@pytest.mark.parametrize("name", UNARY)
def test_primitive_in_float64(name):
    x = samples(name).double()
    expected = exact(name, x)
    y = evaluate(name, x, 2)
    keep = torch.isfinite(expected)
    scale = expected.abs().clamp_min(1.0 / (1 + int(name[4:])) if name.startswith("sinc") else 1e-300)
    assert ((y - expected).abs() / scale)[keep].max() <= 16 * 2.0**-53


SPECIAL = torch.tensor(
    [0.0, -0.0, 2.0**-149, -(2.0**-149), math.inf, -math.inf, math.nan, 3.40282347e38, -3.40282347e38, 1e5]
)
INF, NAN = math.inf, math.nan
#: By hand: values at +-0, +-inf, NaN.
BY_HAND = {
    "sin": (0.0, -0.0, NAN, NAN, NAN),
    "cos": (1.0, 1.0, NAN, NAN, NAN),
    "tan": (0.0, -0.0, NAN, NAN, NAN),
    "exp": (1.0, 1.0, INF, 0.0, NAN),
    "log": (-INF, -INF, INF, NAN, NAN),
    "log1p": (0.0, -0.0, INF, NAN, NAN),
    "expm1": (0.0, -0.0, INF, -1.0, NAN),
    "tanh": (0.0, -0.0, 1.0, -1.0, NAN),
    "sinh": (0.0, -0.0, INF, -INF, NAN),
    "cosh": (1.0, 1.0, INF, INF, NAN),
    "sigmoid": (0.5, 0.5, 1.0, 0.0, NAN),
    "softplus": (math.log(2), math.log(2), INF, 0.0, NAN),
    "erf": (0.0, -0.0, 1.0, -1.0, NAN),
    "sqrt": (0.0, -0.0, INF, NAN, NAN),
    "abs": (0.0, 0.0, INF, INF, NAN),
    "sign": (0.0, 0.0, 1.0, -1.0, 0.0),
    "step": (0.0, 0.0, 1.0, 0.0, 0.0),
    "saturate": (0.0, -0.0, 40.0, -40.0, NAN),
    "atan": (0.0, -0.0, math.pi / 2, -math.pi / 2, NAN),
    "sinc0": (1.0, 1.0, 0.0, 0.0, NAN),
    "sinc1": (0.0, -0.0, 0.0, 0.0, NAN),
    "sinc2": (-1 / 3, -1 / 3, 0.0, 0.0, NAN),
    "sinc3": (0.0, 0.0, 0.0, 0.0, NAN),
    "sinc4": (1 / 5, 1 / 5, 0.0, 0.0, NAN),
    "sinc5": (0.0, 0.0, 0.0, 0.0, NAN),
    "sinc6": (-1 / 7, -1 / 7, 0.0, 0.0, NAN),
}


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("name", UNARY)
def test_special_values(name, mode, fused_multiply_add):
    y = evaluate(name, SPECIAL, mode)
    by_hand = torch.tensor(BY_HAND[name], dtype=torch.float32)
    at = y[[0, 1, 4, 5, 6]]
    torch.testing.assert_close(at, by_hand, rtol=1e-6, atol=0, equal_nan=True)
    if name not in ("sinc3", "sinc5", "sinc1", "sqrt", "erf"):  # odd functions: -0.0 stays
        zeros = by_hand[:2] == 0
        assert torch.equal(torch.signbit(at[:2][zeros]), torch.signbit(by_hand[:2][zeros]))
    expected = exact(name, SPECIAL).float()[[2, 3, 7, 8, 9]]
    torch.testing.assert_close(y[[2, 3, 7, 8, 9]], expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", [0, 2])
def test_pow(mode, fused_multiply_add):
    bases = torch.tensor([0.0, -0.0, 1, -1, 2, -2, 0.5, -0.5, INF, -INF, NAN, 1e-40, 3e38, 1.5, -3.3, 7])
    exponents = torch.tensor([0.0, -0.0, 1, -1, 2, -2, 0.5, -0.5, INF, -INF, NAN, 3, -3, 2.5, 127, 1e10])
    x, e = (t.reshape(-1).contiguous() for t in torch.meshgrid(bases, exponents, indexing="ij"))
    expected = torch.pow(x.double(), e.double()).float()
    y = evaluate("pow", x, mode, e)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0, equal_nan=True)
    zeros = expected == 0
    assert torch.equal(torch.signbit(y[zeros]), torch.signbit(expected[zeros]))
    x, e = torch.rand(2048) * 50, torch.randn(2048) * 8
    expected = torch.pow(x.double(), e.double())
    keep = (expected > 2.0**-126) & (expected < 2.0**127)
    y = evaluate("pow", x, mode, e)
    assert ((y - expected).abs() / expected)[keep].max() <= 4 * 2.0**-23


def test_binary_primitives():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, INF, -INF, NAN])
    a, b = (t.reshape(-1).contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    for name in ("gt", "ge", "lt", "le", "eq", "minimum", "maximum"):
        y = torch.empty_like(a)
        binary_kernel[(1,)](a, b, y, a.numel(), getattr(primitives, f"fi_{name}"), 64)
        torch.testing.assert_close(y, getattr(reference_primitives, name)(a, b), rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- linear_act


def reference(m, x, weight, bias, params):
    """float64 y and z by the generated PyTorch map."""
    z = x.double() @ weight.double().mT
    if bias is not None:
        z = z + bias.double().unsqueeze(-2)
    return torch.cat(m.torch_map(0)(*z.chunk(m.branches, -1), *params), -1), z


def reference_backward(m, g, x, weight, bias, params, learnable):
    """float64 gradients by the generated level-1 map and plain products: gx, gw, gb, gp (per feature)."""
    _, z = reference(m, x, weight, bias, params)
    streams = (*z.chunk(m.branches, -1), *params, *g.double().chunk(m.outputs, -1))
    out = m.torch_map(1, learnable)(*streams)
    like = z.chunk(m.branches, -1)[0]
    gz = torch.cat([o.expand_as(like) for o in out[: m.branches]], -1)
    gp = [o.expand_as(like).sum(-2) for o in out[m.branches :]]
    return gz @ weight.double(), gz.mT @ x.double(), gz.sum(-2), torch.stack(gp, -2) if gp else None


def make(m, M, K, N, dtype=F64, lead=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, M, K, generator=generator, dtype=F64).to(dtype)
    weight = (torch.randn(*lead, m.branches * N, K, generator=generator, dtype=F64) / max(1, K) ** 0.5).to(dtype)
    bias = torch.randn(*lead, m.branches * N, generator=generator, dtype=F64).to(dtype)
    g = torch.randn(*lead, M, m.outputs * N, generator=generator, dtype=F64).to(dtype)
    return x, weight, bias, g


def constants_of(m) -> list[float]:
    return [min(c, 3.0) for c in m.defaults.values()]


def check(m, x, weight, bias, g, params=None, *, bound=CLOSE, learnable=False) -> None:
    """Forward and backward, with z recomputed and with z read."""
    constants = constants_of(m)
    params = params or [None] * m.n_params
    values = [c if p is None else p.double() for p, c in zip(params, constants, strict=True)]
    y, z = linear_act(x, weight, bias, params, constants, m, "ieee", "preactivations")
    y_ref, z_ref = reference(m, x, weight, bias, values)
    assert error(y, y_ref) <= bound and error(z, z_ref) <= bound
    assert y.dtype == x.dtype and y.is_contiguous()
    expected = reference_backward(m, g, x, weight, bias, values, learnable)
    for saved in (None, z):
        needs = (True, True, bias is not None, learnable)
        gx, gw, gb, gp = linear_act_backward(g, x, weight, bias, params, constants, saved, m, "ieee", needs)
        assert error(gx, expected[0]) <= bound and error(gw, expected[1]) <= bound
        assert gx.dtype == x.dtype and gw.dtype == weight.dtype
        if bias is not None:
            assert error(gb, expected[2]) <= bound
        if learnable:
            assert error(gp, expected[3]) <= bound


@pytest.mark.parametrize("K", [1, 2, 3, 8, 9, 15, 16, 17, 31, 33])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (17, 3), (65, 17), (129, 5), (3, 129)])
def test_shapes(K, M, N):
    m = MAPS["sine"]
    x, weight, bias, g = make(m, M, K, N)
    check(m, x, weight, bias, g)


@pytest.mark.parametrize(("M", "K", "N"), [(0, 3, 5), (4, 0, 5), (4, 3, 0), (0, 0, 0), (0, 20, 20), (5, 20, 0)])
def test_empty(M, K, N):
    m = MAPS["gabor"]
    x, weight, bias, g = make(m, M, K, N)
    check(m, x, weight, bias, g)


@pytest.mark.parametrize("name", MAPS)
def test_every_activation(name):
    m = MAPS[name]
    x, weight, bias, g = make(m, 67, 18, 19)
    check(m, x, weight, bias, g)


@pytest.mark.parametrize("name", [n for n, m in MAPS.items() if m.n_params])
def test_parameter_gradients(name):
    m = MAPS[name]
    x, weight, bias, g = make(m, 67, 3, 18)
    params = [torch.rand(18, dtype=F64) + 0.5, torch.tensor(0.7, dtype=F64)] * m.n_params
    params = params[: m.n_params]
    check(m, x, weight, bias, g, params, learnable=True)


@pytest.mark.parametrize("name", ["sine", "gabor", "split"])
@pytest.mark.parametrize(("K", "N"), [(3, 17), (18, 3), (18, 17)])
def test_layers(name, K, N):
    """A batch of layers: own, shared by stride 0, and shared by having no G."""
    m = MAPS[name]
    x, weight, bias, g = make(m, 18, K, N, lead=(2,))
    check(m, x, weight, bias, g)
    check(m, x[:1].expand(2, -1, -1), weight, bias, g)
    check(m, x, weight[:1].expand(2, -1, -1), bias[:1].expand(2, -1), g)
    constants = constants_of(m)
    values = (None,) * m.n_params, constants, None, m
    full = linear_act_backward(g, x[:1].expand_as(x), weight, bias, *values)
    shared = linear_act_backward(g, x[0], weight, bias, *values)
    assert error(shared[0], full[0].sum(0)) <= CLOSE
    full = linear_act_backward(g, x, weight[:1].expand_as(weight), bias[:1].expand_as(bias), *values)
    shared = linear_act_backward(g, x, weight[0], bias[0], *values)
    assert error(shared[1], full[1].sum(0)) <= CLOSE and error(shared[2], full[2].sum(0)) <= CLOSE
    y, _ = linear_act(x[0], weight, bias, [None] * m.n_params, constants, m, "ieee", False)
    assert error(y, reference(m, x[0], weight, bias, constants)[0]) <= CLOSE


@pytest.mark.parametrize(("K", "N"), [(3, 17), (18, 3), (34, 17)])
def test_layouts(K, N):
    """Transposed, strided, offset by one element, and cotangents of stride 0."""
    m = MAPS["split"]
    x, weight, bias, g = make(m, 37, K, N)
    check(m, x.mT.contiguous().mT, weight.mT.contiguous().mT, bias, g.mT.contiguous().mT)
    wide = torch.zeros(37, 2 * K + 1, dtype=F64)
    strided = wide[:, 1::2]
    strided.copy_(x)
    check(m, strided, weight, torch.stack((bias, bias), -1)[:, 1], g[:1].expand_as(g))
    flat = torch.zeros(weight.numel() + 1, dtype=F64)
    offset = flat[1:].view_as(weight)
    offset.copy_(weight)
    check(m, x, offset, None, g.new_tensor(1.5).expand_as(g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "K", "N"), [(65, 3, 17), (129, 33, 17), (40, 33, 3)])
def test_storage_types(dtype, M, K, N):
    """The rounding of the storage type and float32's, each through the largest derivative of sin(omega z)."""
    m, omega = MAPS["sine"], 3.0
    x, weight, bias, g = make(m, M, K, N, dtype)
    unit, single = torch.finfo(dtype).eps / 2, 2.0**-24
    x64, w64, b64, g64 = x.double(), weight.double(), bias.double(), g.double()
    y, z = linear_act(x, weight, bias, [None], [omega], m, "ieee", "preactivations")
    dz = (K + 3) * single * (x64.abs() @ w64.abs().mT + b64.abs())
    y_ref, z_ref = reference(m, x, weight, bias, [omega])
    assert z.dtype == torch.float32 and ((z.double() - z_ref).abs() <= dz).all()
    assert ((y.double() - y_ref).abs() <= omega * dz + 4 * single + unit * y_ref.abs() + 2.0**-25).all()
    for saved in (None, z):
        gx, gw, gb, _ = linear_act_backward(g, x, weight, bias, [None], [omega], saved, m)
        gx_ref, gw_ref, gb_ref, _ = reference_backward(m, g, x, weight, bias, [omega], False)
        gz = g64 * omega * torch.cos(omega * z_ref)
        computed = g64.abs() * (omega**2 * dz + 4 * omega * single)  # before it is stored
        stored = computed + unit * gz.abs() + 2.0**-25
        size = gz.abs() + stored
        for actual, expected, bound in (
            (gx, gx_ref, stored @ w64.abs() + (N + 3) * single * (size @ w64.abs())),
            (gw, gw_ref, stored.mT @ x64.abs() + (M + 3) * single * (size.mT @ x64.abs())),
            (gb, gb_ref, computed.sum(0) + (M + 3) * single * size.sum(0)),
        ):
            assert actual.dtype == dtype
            limit = bound + unit * (expected.abs() + bound) + 2.0**-25
            assert ((actual.double() - expected).abs() <= limit).all()


def test_needs():
    """What is not needed comes back empty; what is needed agrees (a learnable map orders its operations
    differently)."""
    m = MAPS["gaussian"]
    x, weight, bias, g = make(m, 40, 17, 18)
    params, constants = [torch.tensor(0.8, dtype=F64)], constants_of(m)
    params += [None] * (m.n_params - 1)
    everything = linear_act_backward(g, x, weight, bias, params, constants, None, m)
    for mask in range(16):
        needs = tuple(bool(mask >> i & 1) for i in range(4))
        result = linear_act_backward(g, x, weight, bias, params, constants, None, m, "ieee", needs)
        for need, part, full in zip(needs, result, everything, strict=True):
            assert error(part, full) <= CLOSE if need else part.shape == (0,)
    assert linear_act_backward(g, x, weight, None, params, constants, None, m)[2].shape == (0,)
    assert linear_act(x, weight, bias, params, constants, m, "ieee", "")[1].shape == (0,)


def test_no_input_is_written():
    m = MAPS["gabor"]
    x, weight, bias, g = make(m, 40, 17, 18)
    constants = constants_of(m)
    z = linear_act(x, weight, bias, [None] * m.n_params, constants, m, "ieee", "preactivations")[1]
    before = [t.clone() for t in (x, weight, bias, g, z)]
    first = linear_act_backward(g, x, weight, bias, [None] * m.n_params, constants, z, m)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, g, z), strict=True))
    again = linear_act_backward(g, x, weight, bias, [None] * m.n_params, constants, z, m)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # the same bits


POLE = """@triton.jit
def pole_l{level}(z0{more}, MODE: tl.constexpr):
    return ({value},)
"""


class SquareRootPole:
    """sqrt: at rows and columns outside the tensors z is 0 and the derivative infinite."""

    name, branches, outputs, n_params = "pole", 1, 1, 0

    @staticmethod
    def triton_map(level, learnable=False):
        value, more = [("fi_sqrt(z0, MODE)", ""), ("0.5 * g0 / fi_sqrt(z0, MODE)", ", g0")][level]
        return maps.from_source(f"pole_l{level}", POLE.format(level=level, more=more, value=value))


@pytest.mark.parametrize(("K", "N"), [(3, 17), (18, 3), (18, 17)])
def test_rows_outside_do_not_reach_the_sums(K, N):
    x, weight = torch.rand(70, K, dtype=F64) + 0.1, torch.rand(N, K, dtype=F64) + 0.1
    bias, g = torch.zeros(N, dtype=F64), torch.rand(70, N, dtype=F64)
    z = x @ weight.T
    gz = 0.5 * g / z.sqrt()
    for saved in (None, z):
        gx, gw, gb, _ = linear_act_backward(g, x, weight, bias, [], [], saved, SquareRootPole)
        assert error(gx, gz @ weight) <= CLOSE and error(gw, gz.T @ x) <= CLOSE and error(gb, gz.sum(0)) <= CLOSE


def test_poisoned_outputs():
    """Every element of an output is written, and nothing beside it."""
    m = MAPS["gabor"]
    B, C, N = m.branches, m.outputs, 18
    x, weight, bias, g = make(m, 70, 17, N)
    constants = constants_of(m)
    arguments = param_arguments([None] * m.n_params, constants, True, x.device)

    def poisoned(*shape):
        flat = torch.full((math.prod(shape) + 32,), float("nan"), dtype=F64)
        return flat, flat[16 : 16 + math.prod(shape)].view(shape)

    def intact(flat, view):
        assert torch.isfinite(view).all()
        assert torch.isnan(flat[:16]).all() and torch.isnan(flat[16 + view.numel() :]).all()

    y, z = poisoned(70, C * N), poisoned(70, B * N)
    launch_forward(x, weight, bias, arguments, y[1], z[1], m.triton_map(0), B, C, "ieee")
    tiles = triton.cdiv(70, layer_configs.pick("interpreter", "gz", layer_configs.DOT, F64, "ieee", B, N, 17).block_m)
    gz, gb, gp = poisoned(1, 70, B * N), poisoned(1, tiles, B * N), poisoned(1, tiles, m.n_params * N)
    launch_gz(g, x, weight, bias, arguments, None, gz[1], gb[1], gp[1], m.triton_map(1, True), B, C, "ieee")
    config = layer_configs.pick("interpreter", "weight_grad", layer_configs.DOT, F64, "ieee", 1, B * N, 17)
    splits, rows = weight_grad_splits(70, B * N, 17, config, 1)
    gw, total = poisoned(1, splits, B * N, 17), poisoned(1, B * N)
    launch_weight_grad(gz[1], x, gw[1], splits, rows, config, "ieee")
    launch_sum(gb[1], total[1])
    for pair in (y, z, gz, gb, gp, gw, total):
        intact(*pair)


def test_long_sums():
    """Row splits of the weight gradient, and a sum in two passes: every row once, the order fixed."""
    config = layer_configs.pick("interpreter", "weight_grad", layer_configs.DOT, F64, "ieee", 1, 20, 18)
    for M in (1, 15, 16, 127, 128, 129, 1000, 4097):
        splits, rows = weight_grad_splits(M, 20, 18, config, 1)
        assert (splits - 1) * rows < M <= splits * rows and rows % config.block_m == 0
    assert weight_grad_splits(4097, 20, 18, config, 1)[0] > 4
    m = MAPS["sine"]
    for K, N in ((18, 20), (2, 20), (18, 2)):
        check(m, *make(m, 2100, K, N))
    partials = torch.randn(2, 4 * layer_configs.SUM.chunk + 3, 70, dtype=F64)
    out = torch.full((2, 70), float("nan"), dtype=F64)
    launch_sum(partials, out)
    assert error(out, partials.sum(1)) <= CLOSE


# ---------------------------------------------------------------- act_map


@pytest.mark.parametrize("name", MAPS)
def test_every_level(name):
    m = MAPS[name]
    M, N = 70, 21
    generator = torch.Generator().manual_seed(1)
    for level, learnable in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True)):
        ins, outs = groups(level, learnable and m.n_params > 0, m.branches, m.outputs, m.n_params)
        inputs = []
        for i, k in enumerate(ins):
            if not k:
                t = torch.randn(N, generator=generator, dtype=F64) if i % 2 else torch.tensor(0.3, dtype=F64)
            elif i == 1:
                t = torch.randn(1, k * N, generator=generator, dtype=F64).expand(M, k * N)
            elif i == 2:
                t = torch.randn(k * N, M, generator=generator, dtype=F64).T
            else:
                t = torch.randn(M, k * N, generator=generator, dtype=F64)
            inputs.append(t)
        constants = constants_of(m)
        params = [torch.rand(N, dtype=F64) + 0.5 if learnable and j % 2 == 0 else None for j in range(m.n_params)]
        actual = act_map(inputs, params, constants, m, level, learnable)
        streams = []
        for i, (t, k) in enumerate(zip(inputs, ins, strict=True)):
            streams += t.chunk(k, -1) if k else [t]
            if i == 0:
                streams += [c if p is None else p for p, c in zip(params, constants, strict=True)]
        values = iter(m.torch_map(level, learnable and m.n_params > 0)(*streams))
        for o, k in zip(actual, outs, strict=True):
            full = [torch.as_tensor(next(values), dtype=F64).expand(M, N) for _ in range(max(1, k))]
            assert error(o, torch.cat(full, -1) if k else full[0].sum(0)) <= CLOSE, (level, learnable)


def test_act_map_layouts():
    m = MAPS["sine"]
    z = torch.randn(3, 5, 7, dtype=F64)
    (y,) = act_map([z], [None], [2.0], m, 0, False)
    assert error(y, torch.sin(2 * z)) <= CLOSE  # leading dimensions
    for shape in ((0, 7), (5, 0)):
        dz, domega = act_map([torch.randn(shape, dtype=F64)] * 2, [None], [2.0], m, 1, True)
        assert dz.shape == shape and torch.equal(domega, torch.zeros(shape[1], dtype=F64))
    (half,) = act_map([torch.randn(5, 7, dtype=torch.bfloat16)], [None], [2.0], m, 0, False)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError) as caught:
        act_map([z], [None], [2.0], m, 1, False)
    assert "takes 2 groups" in str(caught.value) and "got 1" in str(caught.value)


# ---------------------------------------------------------------- maps and the table of block sizes


def test_maps():
    assert maps.INTERPRETED
    assert maps.get("sine", 1) is maps.get("sine", 1)
    assert maps.get("sine", 1, True) is not maps.get("sine", 1)
    assert maps.get("sine", 0, True) is maps.get("sine", 0)
    assert maps.get("relu", 1, True) is maps.get("relu", 1)  # no parameters, no variant
    for arguments in (("nonsense", 0), ("sine", 9), ("sine", 9, True)):
        with pytest.raises(KeyError) as caught:
            maps.get(*arguments)
        assert repr(arguments[0]) in str(caught.value)
    source = "@triton.jit\ndef double_l0(z0, MODE: tl.constexpr):\n    return (2 * z0,)\n"
    assert maps.from_source("double", source) is maps.from_source("double", source)
    assert maps.from_source("double", source.replace("2", "3")) is not maps.from_source("double", source)
    with pytest.raises(ValueError):
        maps.from_source("double", "x = 1")


def test_table_of_block_sizes():
    for entry in layer_configs.shipped():
        itemsize = entry.dtype.itemsize
        cls = layer_configs.type_class(entry.dtype, entry.precision)
        assert layer_configs.valid(entry.config, entry.arch, entry.op, entry.kind, entry.branches, itemsize, cls), entry
    assert layer_configs.arch_of_capability(8, 0) == "sm80" and layer_configs.arch_of_capability(9, 0) == "sm90"
    assert layer_configs.arch_of_capability(10, 0) == "sm100"
    assert {layer_configs.arch_of_capability(*c) for c in ((8, 6), (8, 9), (12, 0))} == {"sm86"}
    # many branches still fit, whatever a user's formula brings
    for arch in layer_configs.ARCHITECTURES:
        for dtype, precision in layer_configs.TYPES:
            for op in ("forward", "gz"):
                for branches in (3, 5, 8):
                    config = layer_configs.pick(arch, op, layer_configs.DOT, dtype, precision, branches, 256, 256)
                    cls = layer_configs.type_class(dtype, precision)
                    valid = layer_configs.valid(config, arch, op, layer_configs.DOT, branches, dtype.itemsize, cls)
                    assert valid, (config, branches)


def test_rows_are_no_key():
    """The row count changes every step in radiance fields: neither the configuration nor a constexpr may depend on
    it."""
    import inspect

    from fused_inr.kernels import act_map as act_map_module
    from fused_inr.kernels import linear_act as linear_act_module

    assert "M" not in inspect.signature(layer_configs.pick.__wrapped__).parameters
    kernels = (
        linear_act_module.forward_kernel,
        linear_act_module.gz_kernel,
        linear_act_module.weight_grad_kernel,
        act_map_module.act_map_kernel,
    )
    for kernel in kernels:
        source = inspect.getsource(kernel.fn)
        assert not re.search(r"\bM: tl.constexpr", source)
        assert re.search(r"\bM\b", source)
