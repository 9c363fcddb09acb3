"""Zeros, subnormal numbers, infinities, NaN and the largest numbers: every activation and its first two derivatives.

The table is written by hand: where the limit exists it is the answer; where eager PyTorch has NaN because of 0 * inf
(derivatives of the gaussian at infinity) the limit counts all the same; arguments of sin and cos that are infinite, or
overflow, give NaN as in PyTorch. All parameters are 1 (offsets 0): the largest number is an argument, not an overflow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from linear_act_oracle import NAMES, pytest_generate_tests, using  # noqa: F401
from tolerances import TINY, UNIT, tolerance

import fused_inr as fi
from fused_inr.functional import linear_act

NAN, INF, PI = math.nan, math.inf, math.pi
LN2, PHI = math.log(2), math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class OneOf:
    """Several answers are right: the limit, and what PyTorch's own function gives."""

    answers: tuple[float, ...]


#: f(-inf) = -inf * 0 in PyTorch's silu and gelu, and so are derivatives at both ends; the limits are 0 and 1
ZERO_OR_NAN, ONE_OR_NAN = OneOf((0.0, NAN)), OneOf((1.0, NAN))
#: PyTorch's relu passes gradients where the input is NaN; one that passes none is as good
ANY = OneOf((0.0, 1.0, NAN))

Triple = tuple  # value, first derivative, second derivative


@dataclass(frozen=True)
class SpecialValues:
    """(f, f', f'') of one output at special values of one branch, the other branches at `others`.

    `tiny` takes a subnormal number s of either sign, `largest` the largest number or its negative.
    """

    zero: Triple
    tiny: Callable[[float], Triple]
    plus_inf: Triple
    minus_inf: Triple
    largest: Callable[[float], Triple]
    nan: Triple = (NAN, NAN, NAN)
    branch: int = 0
    output: int = 0
    others: float = 0.5


NANS = (NAN, NAN, NAN)
ZEROS = (0.0, 0.0, 0.0)


def scaled(k: float, row: SpecialValues, **changes) -> SpecialValues:
    """The row of k f."""

    def times(t: Triple) -> Triple:
        return tuple(k * v for v in t)

    fields = {
        "zero": times(row.zero),
        "tiny": lambda s: times(row.tiny(s)),
        "plus_inf": times(row.plus_inf),
        "minus_inf": times(row.minus_inf),
        "largest": lambda m: times(row.largest(m)),
    }
    return SpecialValues(**fields, **changes)


SIN = SpecialValues(
    zero=(0.0, 1.0, 0.0),
    tiny=lambda s: (s, 1.0, 0.0),
    plus_inf=NANS,
    minus_inf=NANS,
    largest=lambda m: (math.sin(m), math.cos(m), -math.sin(m)),
)
COS = SpecialValues(
    zero=(1.0, 0.0, -1.0),
    tiny=lambda s: (1.0, 0.0, -1.0),
    plus_inf=NANS,
    minus_inf=NANS,
    largest=lambda m: (math.cos(m), -math.sin(m), -math.cos(m)),
)
TANH = SpecialValues(
    zero=(0.0, 1.0, 0.0),
    tiny=lambda s: (s, 1.0, 0.0),
    plus_inf=(1.0, 0.0, 0.0),
    minus_inf=(-1.0, 0.0, 0.0),
    largest=lambda m: (math.copysign(1.0, m), 0.0, 0.0),
)
SIGMOID = SpecialValues(
    zero=(0.5, 0.25, 0.0),
    tiny=lambda s: (0.5, 0.25, 0.0),
    plus_inf=(1.0, 0.0, 0.0),
    minus_inf=ZEROS,
    largest=lambda m: (1.0 if m > 0 else 0.0, 0.0, 0.0),
)
#: exp(-z^2)
BELL = SpecialValues(
    zero=(1.0, 0.0, -2.0),
    tiny=lambda s: (1.0, 0.0, -2.0),
    plus_inf=ZEROS,
    minus_inf=ZEROS,
    largest=lambda m: ZEROS,
)
#: cos(z) exp(-z^2)
WAVELET = SpecialValues(
    zero=(1.0, 0.0, -3.0),
    tiny=lambda s: (1.0, 0.0, -3.0),
    plus_inf=ZEROS,
    minus_inf=ZEROS,
    largest=lambda m: ZEROS,
)


def ramp(at_zero: Triple, slope_at_inf, second_at_inf, at_minus_inf: Triple) -> SpecialValues:
    """Functions that grow like z to the right and vanish to the left."""
    return SpecialValues(
        zero=at_zero,
        tiny=lambda s: (at_zero[1] * s + at_zero[0], at_zero[1], at_zero[2]),
        plus_inf=(INF, slope_at_inf, second_at_inf),
        minus_inf=at_minus_inf,
        largest=lambda m: (m, 1.0, 0.0) if m > 0 else ZEROS,
    )


def _hosc(m: float) -> Triple:
    s, c = math.sin(m), math.cos(m)
    t = math.tanh(s)
    return t, (1 - t * t) * c, -(1 - t * t) * (2 * t * c * c + s)


def _sinc(m: float) -> Triple:
    s, c = math.sin(m), math.cos(m)
    return s / m, c / m, -s / m  # terms in 1/m^2 vanish in every type


_tanh, _sigmoid, _sin, _cos = math.tanh(0.5), 1 / (1 + math.exp(-0.5)), math.sin(0.5), math.cos(0.5)
_edge = math.exp(-0.25)

TABLE: dict[str, list[SpecialValues]] = {
    "identity": [
        SpecialValues((0.0, 1.0, 0.0), lambda s: (s, 1.0, 0.0), (INF, 1.0, 0.0), (-INF, 1.0, 0.0),
            lambda m: (m, 1.0, 0.0), nan=(NAN, 1.0, 0.0)),
    ],
    "sine": [SIN],
    "incode": [SIN],
    "finer": [
        # f'' = 2 sign(z) cos(..) near 0, and sign(0) = 0; z abs(z) overflows
        SpecialValues((0.0, 1.0, 0.0), lambda s: (s, 1.0, math.copysign(2.0, s)), NANS, NANS, lambda m: NANS),
    ],
    "finer_detached": [SpecialValues((0.0, 1.0, 0.0), lambda s: (s, 1.0, 0.0), NANS, NANS, lambda m: NANS)],
    "fourier": [
        # 2 pi times the largest number overflows
        SpecialValues((1.0, 0.0, -4 * PI**2), lambda s: (1.0, 0.0, -4 * PI**2), NANS, NANS, lambda m: NANS, output=0),
        SpecialValues((0.0, 2 * PI, 0.0), lambda s: (2 * PI * s, 2 * PI, 0.0), NANS, NANS, lambda m: NANS, output=1),
    ],
    "hosc": [SpecialValues((0.0, 1.0, 0.0), lambda s: (s, 1.0, 0.0), NANS, NANS, _hosc)],
    "sinc": [
        SpecialValues((1.0, 0.0, -1 / 3), lambda s: (1.0, 0.0, -1 / 3), ZEROS, ZEROS, _sinc),
    ],
    "gaussian": [SpecialValues((1.0, 0.0, -1.0), lambda s: (1.0, 0.0, -1.0), ZEROS, ZEROS, lambda m: ZEROS)],
    "gaussian_scale": [BELL],
    "wavelet": [WAVELET],
    "tanh": [TANH],
    "sigmoid": [SIGMOID],
    "relu": [
        SpecialValues(ZEROS, lambda s: (s, 1.0, 0.0) if s > 0 else ZEROS, (INF, 1.0, 0.0), ZEROS,
            lambda m: (m, 1.0, 0.0) if m > 0 else ZEROS, nan=(NAN, ANY, ANY)),
    ],
    "softplus": [
        SpecialValues((LN2, 0.5, 0.25), lambda s: (LN2, 0.5, 0.25), (INF, 1.0, 0.0), ZEROS,
            lambda m: (m, 1.0, 0.0) if m > 0 else ZEROS),
    ],
    "silu": [ramp((0.0, 0.5, 0.5), ONE_OR_NAN, ZERO_OR_NAN, (ZERO_OR_NAN, ZERO_OR_NAN, ZERO_OR_NAN))],
    "gelu": [ramp((0.0, 0.5, PHI), ONE_OR_NAN, ZERO_OR_NAN, (ZERO_OR_NAN, ZERO_OR_NAN, ZERO_OR_NAN))],
    "split": [
        scaled(_sigmoid * _sin * _cos, TANH, branch=0),
        scaled(_tanh * _sin * _cos, SIGMOID, branch=1),
        scaled(_tanh * _sigmoid * _cos, SIN, branch=2),
        scaled(_tanh * _sigmoid * _sin, COS, branch=3),
    ],
    "gabor": [scaled(_edge, COS, branch=0), scaled(_cos, BELL, branch=1)],
    # exp(-zi - zr^2 - zi^2) (cos zr, sin zr)
    "complex_gabor": [
        scaled(math.exp(-0.75), WAVELET, branch=0, output=0),
        SpecialValues((0.0, math.exp(-0.75), 0.0), lambda s: (math.exp(-0.75) * s, math.exp(-0.75), 0.0), ZEROS, ZEROS,
            lambda m: ZEROS, branch=0, output=1),
        # E = exp(-z - z^2): E' = -(1 + 2z) E, E'' = ((1 + 2z)^2 - 2) E
        *(SpecialValues((_edge * f, -_edge * f, -_edge * f), lambda s, f=f: (_edge * f, -_edge * f, -_edge * f), ZEROS,
              ZEROS, lambda m: ZEROS, branch=1, output=i) for i, f in enumerate((_cos, _sin))),
    ],
}  # fmt: skip


def test_every_activation_has_its_rows():
    assert set(TABLE) == set(NAMES)
    for name, rows in TABLE.items():
        activation = fi.activations.get(name)
        assert {r.branch for r in rows} == set(range(activation.branches))
        assert {r.output for r in rows} == set(range(activation.outputs))


def unit_activation(name: str):
    activation = fi.activations.get(name)
    # what is 0 by default is an offset
    return activation.with_params(**{n: 1.0 if value else 0.0 for n, value in activation.params.items()})


def cases(row: SpecialValues, dtype: torch.dtype) -> list[tuple[float, Triple]]:
    info = torch.finfo(dtype)
    tiny = 1000 * info.smallest_normal * info.eps  # subnormal, with ten bits
    return [
        (0.0, row.zero),
        (-0.0, row.zero),
        (tiny, row.tiny(tiny)),
        (-tiny, row.tiny(-tiny)),
        (INF, row.plus_inf),
        (-INF, row.minus_inf),
        (NAN, row.nan),
        (info.max, row.largest(info.max)),
        (-info.max, row.largest(-info.max)),
    ]


def right(actual: float, wanted, dtype: torch.dtype) -> bool:
    if isinstance(wanted, OneOf):
        return any(right(actual, w, dtype) for w in wanted.answers)
    if math.isnan(wanted) or math.isinf(wanted):
        return math.isnan(actual) if math.isnan(wanted) else actual == wanted
    ulps = 4 * tolerance("evaluation") * UNIT[dtype]
    if 0 < abs(wanted) < torch.finfo(dtype).smallest_normal:
        # not flushed to zero: right to ten bits of the subnormal argument
        return abs(actual - wanted) <= 2.0**-9 * abs(wanted) + 4 * TINY[dtype]
    return abs(actual - wanted) <= ulps * max(1.0, abs(wanted))


def evaluate(activation, z: torch.Tensor, output: int, branch: int):
    """f, f' (by the fused backward and by the one that differentiates again) and f'' of a row of pre-activations [B*N].

    They come in through the bias: 0 x 0 + z, which no product turns into NaN.
    """
    bias = z.clone().requires_grad_()
    y = linear_act(z.new_zeros(1, 1), z.new_zeros(z.shape[0], 1), bias, activation)[0].chunk(activation.outputs)[output]
    ones = torch.ones_like(y)
    (fused,) = torch.autograd.grad(y, bias, ones, retain_graph=True)
    (again,) = torch.autograd.grad(y, bias, ones, create_graph=True)
    pick = lambda t: t.chunk(activation.branches)[branch]  # noqa: E731
    second = torch.zeros_like(bias)
    if again.requires_grad:  # else the slope is constant
        (second,) = torch.autograd.grad(pick(again), bias, ones, allow_unused=True, materialize_grads=True)
    return tuple(pick(t).detach().cpu().tolist() for t in (fused, again, second)), y.detach().cpu().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_special_values(name, dtype, backend, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend has no float64")
    activation = unit_activation(name)
    wrong = []
    for row in TABLE[name]:
        listed = cases(row, dtype)
        z = torch.full((activation.branches, len(listed)), row.others, dtype=dtype, device=device)
        z[row.branch] = torch.tensor([v for v, _ in listed], dtype=dtype)
        with using(backend):
            (fused, again, second), y = evaluate(activation, z.flatten(), row.output, row.branch)
        for i, (at, wanted) in enumerate(listed):
            answers = (y[i], fused[i], again[i], second[i])
            for what, got, want in zip(("f", "f' fused", "f'", "f''"), answers, (*wanted[:2], *wanted[1:])):
                if not right(got, want, dtype):
                    wrong.append(f"{what} at branch {row.branch} = {at}, output {row.output}: {got}, not {want}")
    assert not wrong, "\n".join([name, *wrong])


@pytest.mark.parametrize("name", ["gaussian", "gaussian_scale", "wavelet", "gabor", "complex_gabor", "sinc"])
def test_bells_vanish_far_away_with_their_usual_parameters(name, backend, device):
    """scale z overflows here, and the value and both derivatives are 0 all the same."""
    activation = fi.activations.get(name)
    if name == "gabor":
        row = SpecialValues(ZEROS, lambda s: ZEROS, ZEROS, ZEROS, lambda m: ZEROS, branch=1)
    else:
        row = SpecialValues(ZEROS, lambda s: ZEROS, ZEROS, ZEROS, lambda m: ZEROS, branch=0)
    far = [INF, -INF, 1e30, -1e30] + ([] if name == "sinc" else [torch.finfo(torch.float32).max])
    z = torch.zeros(activation.branches, len(far), device=device)
    z[row.branch] = torch.tensor(far)
    with using(backend):
        for output in range(activation.outputs):
            derivatives, y = evaluate(activation, z.flatten(), output, row.branch)
            for values in (y, *derivatives):
                assert all(abs(v) <= 1e-28 for v in values), (name, output, values)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_own_element(name, backend, device):
    """And does not leak into its neighbours, whatever is computed together."""
    activation = fi.activations.get(name)
    x = torch.randn(37, 3, device=device)
    weight, bias = torch.randn(activation.branches * 19, 3, device=device) * 0.1, torch.zeros(1, device=device)
    bias = bias.expand(activation.branches * 19).contiguous()
    with using(backend):
        clean = linear_act(x, weight, bias, activation)
        x[11, 1] = NAN
        bias[5] = INF
        dirty = linear_act(x, weight, bias, activation)
    kept = torch.ones(37, 19, dtype=torch.bool, device=device)
    kept[11], kept[:, 5] = False, False
    kept = kept.repeat(1, activation.outputs)
    assert torch.equal(clean[kept], dirty[kept])
    assert dirty[11].isnan().sum() >= 18
