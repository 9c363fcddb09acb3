"""The primitives of the native CPU engine against the C library in higher precision, for every capability that runs.

Each capability is checked by the `check_*` functions. "wide", the 64-byte vectors of AVX-512 compiled for AVX2, needs a
library of its own, and a process of its own, since two cannot register the same operators: this file run as a script is
that process.
"""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_inr import native

F32 = np.finfo(np.float32)
# k pi/2 for the k up to which the fast reduction serves (kTrigLimit in csrc/primitives.h), and past it
TRIG_LIMIT = 1e5


def _op(name: str, *arguments: np.ndarray) -> list[np.ndarray]:
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arguments]
    return [r.numpy() for r in torch.ops.fused_inr_native.primitive(name, tensors)]


def _per_exponent(dtype=np.float32, count: int = 96) -> np.ndarray:
    """Random significands for every exponent, subnormals included, both signs; the count is no multiple of a vector."""
    rng = np.random.default_rng(0)
    if dtype == np.float32:
        exponents, bits = np.arange(0, 255, dtype=np.uint32), 23
        raw = (exponents[:, None] << bits) | rng.integers(0, 1 << bits, (255, count), dtype=np.uint32)
        x = raw.astype(np.uint32).view(np.float32).ravel()
    else:
        exponents, bits = np.arange(1, 2047, 5, dtype=np.uint64), 52
        raw = (exponents[:, None] << np.uint64(bits)) | rng.integers(0, 1 << bits, (len(exponents), 7), dtype=np.uint64)
        x = raw.view(np.float64).ravel()
    return np.concatenate([x, -x, np.array([0.0, -0.0, 1.0], dtype=dtype)])


def _near_multiples_of_half_pi() -> np.ndarray:
    k = np.arange(1, int(1.3 * TRIG_LIMIT / (math.pi / 2)), dtype=np.float64)
    nearest = (k * (math.pi / 2)).astype(np.float32)
    around = [nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))]
    x = np.concatenate(around)
    return np.concatenate([x, -x])


def _between(low: float, high: float, count: int = 200_001) -> np.ndarray:
    return np.linspace(low, high, count, dtype=np.float64).astype(np.float32)


def _sinc_derivative(order: int, x: np.ndarray) -> np.ndarray:
    """By quadrature of int_0^1 t^n cos(x t + n pi/2) dt, which shares nothing with series or recurrence."""
    nodes, weights = np.polynomial.legendre.leggauss(160)
    t, w = (nodes + 1) / 2, weights / 2 * ((nodes + 1) / 2) ** order
    result = np.empty_like(x)
    for i in range(0, len(x), 4096):
        result[i : i + 4096] = np.cos(np.multiply.outer(x[i : i + 4096], t) + order * (math.pi / 2)) @ w
    return result


def _errors(value: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """In units of the last place of the float32 nearest to `exact`, at least of the smallest normal number."""
    with np.errstate(over="ignore", invalid="ignore"):
        unit = np.spacing(np.maximum(np.abs(exact), F32.tiny).astype(np.float32)).astype(np.float64)
        error = np.abs(value.astype(np.float64) - exact) / unit
        error[(value == exact.astype(np.float32)) | (np.isnan(value) & np.isnan(exact))] = 0
    return error


def _erf(x: np.ndarray) -> np.ndarray:
    return torch.erf(torch.from_numpy(x)).numpy()


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1 + e)


# name: (reference in float64, ulp, further inputs)
UNARY = {
    "sin": (np.sin, 2, _near_multiples_of_half_pi),
    "cos": (np.cos, 2, _near_multiples_of_half_pi),
    "tan": (np.tan, 4, _near_multiples_of_half_pi),
    "exp": (np.exp, 4, lambda: _between(-104, 89)),
    "expm1": (np.expm1, 4, lambda: _between(-20, 89)),
    "log": (np.log, 4, lambda: _between(0.2, 5)),
    "log1p": (np.log1p, 4, lambda: _between(-0.999, 5)),
    "tanh": (np.tanh, 4, lambda: _between(-11, 11)),
    "sinh": (np.sinh, 4, lambda: _between(-90, 90)),
    "cosh": (np.cosh, 4, lambda: _between(-90, 90)),
    "sigmoid": (_sigmoid, 4, lambda: _between(-104, 30)),
    "softplus": (_softplus, 4, lambda: _between(-104, 30)),
    "erf": (_erf, 4, lambda: _between(-4.5, 4.5)),
    "atan": (np.arctan, 4, lambda: _between(-30, 30)),
    "sqrt": (np.sqrt, 0.501, lambda: _between(0, 4)),
}


def check_unary(name: str) -> None:
    reference, bound, more = UNARY[name]
    x = np.concatenate([_per_exponent(), more()])
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
    value = _op(name, x)[0]
    error = _errors(value, exact)
    worst = int(np.nanargmax(error))
    assert not np.isnan(error).any(), f"{name}({x[np.isnan(error)][0]!r}) is NaN or should be"
    assert error[worst] <= bound, (
        f"{name}({x[worst]!r}): {value[worst]!r}, exact {exact[worst]!r}, {error[worst]:.2f} ulp"
    )


def check_sincos() -> None:
    x = np.concatenate([_per_exponent(), _near_multiples_of_half_pi()])
    s, c = _op("sincos", x)
    for name, value, exact in (("sin", s, np.sin(x.astype(np.float64))), ("cos", c, np.cos(x.astype(np.float64)))):
        error = _errors(value, exact)
        worst = int(np.argmax(error))
        assert error[worst] <= 2, f"sincos, {name}({x[worst]!r}): {error[worst]:.2f} ulp"


def check_sinc(order: int) -> None:
    x = np.concatenate(
        [_between(-12, 12), _between(-100, 100, 20_001), np.float32(2.0) ** -np.arange(1, 149, dtype=np.float32)]
    )
    exact = _sinc_derivative(order, x.astype(np.float64))
    value = _op(f"sinc{order}", x)[0]
    # 2^-23 is the unit near zeros; order 4 and above lose a factor that grows with the order: see kSincLimit
    unit = 4 * np.spacing(np.abs(exact).astype(np.float32)) + 2.0**-23
    error = np.abs(value - exact) / unit
    worst = int(np.argmax(error))
    assert error[worst] <= 1, f"sinc{order}({x[worst]!r}): {value[worst]!r}, exact {exact[worst]!r}"

    near = np.abs(x) <= 12  # beyond, the quadrature itself errs by more
    wide, exact = x[near].astype(np.float64), exact[near]
    error = np.abs(_op(f"sinc{order}", wide)[0] - exact)
    assert error.max() <= 4e-15, f"sinc{order} in float64 at {wide[np.argmax(error)]!r}: {error.max()}"


def check_special_values() -> None:
    inf, nan, tiny = math.inf, math.nan, 1e-40
    odd = [(0.0, 0.0), (-0.0, -0.0), (nan, nan)]
    table: dict[str, list[tuple[float, float]]] = {
        "sin": [*odd, (inf, nan), (-inf, nan), (tiny, tiny)],
        "cos": [(0.0, 1.0), (-0.0, 1.0), (inf, nan), (-inf, nan), (nan, nan), (tiny, 1.0)],
        "tan": [*odd, (inf, nan)],
        "exp": [(0.0, 1.0), (-0.0, 1.0), (inf, inf), (-inf, 0.0), (nan, nan), (1e4, inf), (-1e4, 0.0)],
        "expm1": [*odd, (inf, inf), (-inf, -1.0), (tiny, tiny), (1e4, inf), (-1e4, -1.0)],
        "log": [(0.0, -inf), (-0.0, -inf), (1.0, 0.0), (inf, inf), (-1.0, nan), (-inf, nan), (nan, nan)],
        "log1p": [*odd, (-1.0, -inf), (inf, inf), (-1.5, nan), (-inf, nan), (tiny, tiny)],
        "tanh": [*odd, (inf, 1.0), (-inf, -1.0), (tiny, tiny)],
        "sinh": [*odd, (inf, inf), (-inf, -inf), (tiny, tiny)],
        "cosh": [(0.0, 1.0), (inf, inf), (-inf, inf), (nan, nan)],
        "sigmoid": [(0.0, 0.5), (inf, 1.0), (-inf, 0.0), (nan, nan)],
        "softplus": [(inf, inf), (-inf, 0.0), (nan, nan), (100.0, 100.0)],
        "erf": [*odd, (inf, 1.0), (-inf, -1.0)],
        "atan": [*odd, (inf, math.pi / 2), (-inf, -math.pi / 2)],
        "sqrt": [*odd, (inf, inf), (-1.0, nan)],
        "abs": [(0.0, 0.0), (-0.0, 0.0), (-inf, inf), (nan, nan)],
        "sign": [(0.0, 0.0), (-0.0, 0.0), (inf, 1.0), (-inf, -1.0), (nan, 0.0), (-tiny, -1.0)],
        "step": [(0.0, 0.0), (-0.0, 0.0), (tiny, 1.0), (-inf, 0.0), (nan, 0.0)],
        "saturate": [(inf, 40.0), (-inf, -40.0), (nan, nan), (3.0, 3.0)],
        **{f"sinc{n}": [(inf, 0.0), (-inf, 0.0), (nan, nan)] for n in range(7)},
    }
    for dtype in (np.float32, np.float64):
        for name, row in table.items():
            for x, expected in row:
                value = _op(name, np.full(3, x, dtype))[0]
                wanted = dtype(expected)
                same = (
                    np.isnan(value)
                    if np.isnan(wanted)
                    else (value == wanted) & (np.signbit(value) == np.signbit(wanted))
                )
                assert same.all(), f"{name}({x!r}) in {dtype.__name__}: {value[0]!r}, not {wanted!r}"


def check_binary() -> None:
    values = np.array([-math.inf, -2.5, -1.0, -0.0, 0.0, 0.5, 3.0, math.inf, math.nan])
    for dtype in (np.float32, np.float64):
        a, b = (v.ravel().astype(dtype) for v in np.meshgrid(values, values))
        with np.errstate(all="ignore"):
            expected = {
                "pow": np.power(a.astype(np.float64), b.astype(np.float64)),  # in float32 NumPy's is an ulp off
                "gt": a > b,
                "ge": a >= b,
                "lt": a < b,
                "le": a <= b,
                "eq": a == b,
                "minimum": np.minimum(a, b),
                "maximum": np.maximum(a, b),
            }
        for name, wanted in expected.items():
            found, wanted = _op(name, a, b)[0], wanted.astype(dtype)
            if name == "pow" and dtype is np.float64:  # nor is NumPy's to the last bit in float64
                with np.errstate(invalid="ignore"):
                    near = np.isfinite(wanted) & (np.abs(found - wanted) <= np.spacing(np.abs(wanted)))
                found[near] = wanted[near]
            np.testing.assert_array_equal(found, wanted, err_msg=f"{name}, {dtype.__name__}")
        np.testing.assert_array_equal(_op("where", a, b, -b)[0], np.where(a != 0, b, -b), err_msg="where")
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.01, 50, 20_001).astype(np.float32), rng.uniform(-10, 10, 20_001).astype(np.float32)
    assert _errors(_op("pow", a, b)[0], np.power(a.astype(np.float64), b.astype(np.float64))).max() <= 1


def check_float64() -> None:
    x = _per_exponent(np.float64)
    for name, (reference, _, _) in UNARY.items():
        with np.errstate(all="ignore"):
            exact = reference(x)
        value = _op(name, x)[0]
        with np.errstate(all="ignore"):
            error = np.abs(value - exact) / np.spacing(np.maximum(np.abs(exact), np.finfo(np.float64).tiny))
        error[(value == exact) | (np.isnan(value) & np.isnan(exact))] = 0
        worst = int(np.argmax(error))
        assert error[worst] <= 4, f"{name}({x[worst]!r}) in float64: {value[worst]!r}, not {exact[worst]!r}"


def check_position() -> None:
    """A value does not depend on where in an array it stands, nor on how long the array is."""
    x = np.linspace(-5, 5, 77, dtype=np.float32)
    for name in UNARY:
        whole = _op(name, x)[0]
        for n in range(1, 40):
            np.testing.assert_array_equal(_op(name, x[-n:])[0], whole[-n:], err_msg=f"{name}, {n} elements")


def check_layers() -> None:
    """linear_act with this capability's vectors: tails in every direction, less and more than a tile of rows."""
    ops = torch.ops.fused_inr_native
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1, 1), (3, 2, 17), (29, 3, 33), (300, 31, 1), (257, 65, 70), (130, 520, 96)]
    for dtype in (torch.float32, torch.float64):
        for m, k, n in sizes:
            x, w, b, g = (
                torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, k), (n, k), (n,), (m, n))
            )
            w /= k**0.5
            leaves = [t.to(dtype).double().requires_grad_() for t in (x, w, b)]
            y = torch.sin(2 * torch.nn.functional.linear(*leaves))
            gradients = torch.autograd.grad(y, leaves, g.to(dtype).double())
            x, w, b, g = (t.to(dtype) for t in (x, w, b, g))
            value, z = ops.linear_act(x, w, b, [], [2.0], "sine", True)
            results = [value, *ops.linear_act_backward(g, x, w, b, [], [2.0], z, "sine", [True, True, True, False])[:3]]
            for name, result, exact in zip(("y", "gx", "gw", "gb"), results, [y, *gradients], strict=True):
                error = ((result.double() - exact).abs().max() / exact.abs().max()).item()
                # one rounding an operation of the longest sum, omega = 2 times
                assert error < 2 * (max(k, m) + 8) * torch.finfo(dtype).eps / 2, (
                    f"{name} for {(m, k, n)} in {dtype}: {error}"
                )


def check_streams() -> None:
    """Inputs of a map that are one value for all elements, or one a feature, in any mixture; a last vector in part."""
    ops = torch.ops.fused_inr_native
    generator = torch.Generator().manual_seed(0)
    rows, n = 37, 19
    for dtype in (torch.float32, torch.float64):
        z = torch.randn(rows, n, generator=generator, dtype=torch.float64).to(dtype)
        g = torch.randn(1, n, generator=generator, dtype=torch.float64).to(dtype).expand(rows, n)
        scales = [1.7, torch.rand(n, generator=generator, dtype=torch.float64).to(dtype) + 0.5]
        for scale in scales:
            given = scale if isinstance(scale, torch.Tensor) else None
            constant = 0.0 if given is not None else scale
            for cotangent in (g, g.contiguous(), g[:, :1].expand(rows, n)):
                (y,) = ops.act_map([z], [given], [constant], "sine", 0, False)
                (dz,) = ops.act_map([z, cotangent], [given], [constant], "sine", 1, False)
                exact = torch.sin(z.double() * scale)
                slope = torch.cos(z.double() * scale) * scale * cotangent.double()
                unit = torch.finfo(dtype).eps
                assert (y.double() - exact).abs().max() <= 8 * unit
                assert (dz.double() - slope).abs().max() <= 16 * unit * slope.abs().max()


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """float64, rounded to bfloat16."""
    return torch.from_numpy(values).to(torch.bfloat16).double().numpy()


def _network(x, weights, biases, words, constants=(), gammas=(), eps=0.1, save=False) -> np.ndarray:
    """In bfloat16; `constants` of every layer but the last, `gammas` of as many norms as the words name."""

    def half(t):
        return torch.from_numpy(t).to(torch.bfloat16)

    tensors: list[torch.Tensor | None] = []
    numbers: list[float] = []
    last = len(words) - 1
    for i, (weight, bias, word) in enumerate(zip(weights, biases, words, strict=True)):
        own = list(constants) if i < last else []
        tensors += [half(weight), half(bias), *[None] * len(own)]
        numbers += own
        if word.endswith("norm"):
            tensors += [half(gammas[i]), None]
            numbers.append(eps)
    y, saved = torch.ops.fused_inr_native.mlp(half(x), tensors, words, numbers, save)
    assert y.dtype == torch.bfloat16 and bool(saved.numel()) == save
    return y.double().numpy()


def check_network_bfloat16_exact() -> None:
    """A network of bfloat16 on small whole numbers, where every product, sum and rounding is exact: equal bits.

    Rows less and more than a tile, odd widths, parts of panels, a depth beyond the first-level cache's part of a panel.
    """
    generator = np.random.default_rng(0)
    widths = [(1, 1, 1), (3, 17, 2), (31, 33, 5), (64, 96, 64), (70, 520, 3), (777, 65, 40)]
    for m, (k, hidden, out) in zip((1, 5, 83, 300, 97, 200), widths, strict=True):
        x = generator.integers(-2, 3, (m, k)).astype(np.float64)
        weights, biases = [], []
        y = x
        for i, (before, after) in enumerate(((k, hidden), (hidden, hidden), (hidden, out))):
            w = generator.integers(-1, 2, (after, before)).astype(np.float64)
            w *= generator.random(w.shape) < 6 / before  # few terms: what is rounded to bfloat16 stays below 257
            b = generator.integers(-3, 4, after).astype(np.float64)
            weights.append(w)
            biases.append(b)
            y = y @ w.T + b
            y = np.maximum(y, 0) if i < 2 else y
            assert np.abs(y).max() <= 256
        keys = ["relu", "relu", "identity"]
        for save in (False, True):
            got = _network(x, weights, biases, keys, save=save)
            np.testing.assert_array_equal(got, y, err_msg=f"{m} rows, {k} -> {hidden} -> {out}, save={save}")


def check_network_bfloat16() -> None:
    """A network of bfloat16 with several branches, two outputs and skip connections, against float64."""
    generator = np.random.default_rng(1)

    def split(z):
        a, b, c, d = np.split(z, 4, axis=1)
        return 2 * np.tanh(a) / (1 + np.exp(-b)) * np.sin(c) * np.cos(d)

    def complex_gabor(z):
        a, b = np.split(z, 2, axis=1)
        size = np.exp(-b - (a * a + b * b))
        return np.concatenate([size * np.cos(a), size * np.sin(a)], axis=1)

    maps = {  # branches, outputs, constants, function
        "split": (4, 1, [2.0, 1.0, 1.0, 1.0, 1.0], split),
        "complex_gabor": (2, 2, [1.0, 1.0], complex_gabor),
        "sine": (1, 1, [2.0], lambda z: np.sin(2 * z)),
    }
    for key, (branches, outputs, constants, function) in maps.items():
        for n in (1, 16, 37, 72):
            x = _bfloat16(generator.uniform(-1, 1, (150, 3)))
            for norm in ("", "layernorm", "rmsnorm"):
                weights, biases, gammas = [], [], []
                y, columns = x, 3
                for i in range(4):
                    rows = 5 if i == 3 else branches * n
                    weights.append(_bfloat16(generator.uniform(-1.5, 1.5, (rows, columns)) / columns**0.5))
                    biases.append(_bfloat16(generator.uniform(-0.5, 0.5, rows)))
                    z = y @ weights[-1].T + biases[-1]
                    if i < 3:
                        z = function(z)
                        if norm:
                            gammas.append(_bfloat16(generator.uniform(0.5, 1, outputs * n)))
                            z = z - z.mean(1, keepdims=True) if norm == "layernorm" else z
                            z = z / np.sqrt((z * z).mean(1, keepdims=True) + 0.1) * gammas[-1]
                        z = (z + y) / 2**0.5 if i > 0 else z
                    y, columns = z, outputs * n
                words = [f"{key}{skip} {norm}".strip() for skip in ("", " skip", " skip")] + ["identity"]
                for save in (False, True):
                    got = _network(x, weights, biases, words, constants, gammas, 0.1, save)
                    error = np.abs(got - y).max() / np.abs(y).max()
                    # what each of the four layers reads, and the result, are rounded: 2^-9 each; the slope of a map
                    # is at most 3, that of a norm 1 / sqrt(0.1)
                    bound = (30 if norm else 12) * 2.0**-9
                    assert error <= bound, f"{key}, {n} features, norm {norm!r}, save={save}: {error}"


CHECKS = {
    "streams": (check_streams,),
    **{f"unary {name}": (check_unary, name) for name in UNARY},
    **{f"sinc{n}": (check_sinc, n) for n in range(7)},
    "sincos": (check_sincos,),
    "special values": (check_special_values,),
    "binary": (check_binary,),
    "float64": (check_float64,),
    "position": (check_position,),
    "layers": (check_layers,),
    "network in bfloat16, exact": (check_network_bfloat16_exact,),
    "network in bfloat16": (check_network_bfloat16,),
}


def _capabilities() -> list[str]:
    if __name__ == "__main__" or not native.load():
        return []
    return list(torch.ops.fused_inr_native.capabilities())


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("capability", _capabilities())
def test_capability(capability, check):
    ops = torch.ops.fused_inr_native
    ops.set_capability(capability)
    try:
        assert ops.capability() == capability
        function, *arguments = CHECKS[check]
        function(*arguments)
    finally:
        ops.set_capability("")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs AVX2")
def test_avx512_code_on_avx2():
    if not native.load():
        pytest.skip(native.status()[1])
    if "avx2" not in _capabilities():
        pytest.skip("this processor has no AVX2")
    library = native.cached_library(capabilities=("wide",))
    done = subprocess.run([sys.executable, __file__, str(library), "wide"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_capability_and_primitive_are_refused():
    if not native.load():
        pytest.skip(native.status()[1])
    ops = torch.ops.fused_inr_native
    with pytest.raises(ValueError, match="expected one of"):
        ops.set_capability("avx3")
    with pytest.raises(ValueError, match="no primitive"):
        ops.primitive("sine", [torch.zeros(1)])


def main(library: str, capability: str) -> int:
    torch.ops.load_library(library)
    torch.ops.fused_inr_native.set_capability(capability)
    assert torch.ops.fused_inr_native.multiplies_bfloat16()
    failures = 0
    for name, (function, *arguments) in CHECKS.items():
        try:
            function(*arguments)
        except AssertionError as error:
            failures += 1
            print(f"{capability}, {name}: {error}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main(*sys.argv[1:]))
