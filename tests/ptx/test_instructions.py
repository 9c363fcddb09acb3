"""Instructions that work lane by lane, each against NumPy (or exact fractions) on grids of special values."""

import contextlib
import math
import operator
import struct
from fractions import Fraction

import numpy as np
import pytest
from fused_inr.bench.ptx import library, reader

from .assemble import TYPES, elementwise, kernel, pairs


def grid_of(kind: str, many: bool = True) -> np.ndarray:
    """Special values of a type, and some at random; fewer where three operands meet."""
    dtype, rng = np.dtype(TYPES[kind]), np.random.default_rng(sum(kind.encode()))
    if kind == "bf16":
        values = [0, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 1, 0x0080, 0x7F7F, 0x4049, 0xC2F7, 0x3E80]
        return np.array(values + rng.integers(0, 1 << 16, 20 if many else 3).tolist(), dtype)
    if dtype.kind == "f":
        info = np.finfo(dtype)
        values = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, info.max, -info.max, info.tiny, -info.tiny]
        values += [info.smallest_subnormal, 0.5, 1.5, 2.5, -2.5, 1 + info.eps, np.pi, 3e4, -3e-3]
        drawn = rng.standard_normal(30 if many else 4) * np.exp(rng.uniform(-8, 8, 30 if many else 4))
        with np.errstate(over="ignore"):
            return np.array(values + drawn.tolist(), np.float64).astype(dtype)
    info = np.iinfo(dtype)
    values = {0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 100, info.max, info.max - 1, info.min, info.min + 1}
    values |= {-1, -2, -7, -31, -32, -33} if info.min else {info.max // 2, info.max // 2 + 1}
    drawn = rng.integers(info.min, info.max, 12 if many else 3, dtype=dtype, endpoint=True)
    return np.array([*sorted(values), *drawn.tolist()], dtype)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit by bit, except that one NaN is as good as another."""
    expected = np.asarray(expected).astype(found.dtype)
    different = found != expected
    if found.dtype.kind == "f":
        different = (found.view(f"u{found.itemsize}") != expected.view(f"u{found.itemsize}")) & ~(
            np.isnan(found) & np.isnan(expected)
        )
    assert not different.any(), (found[different][:5], expected[different][:5], np.flatnonzero(different)[:5])


def wrapped(value, kind: str):
    """A Python integer in so many bits."""
    bits = 8 * np.dtype(TYPES[kind]).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def by_integers(function, kind: str, *arrays: np.ndarray) -> np.ndarray:
    """A function of Python's integers, element by element."""
    return np.array([wrapped(function(*values), kind) for values in zip(*(a.tolist() for a in arrays))], TYPES[kind])


def rounded(value: Fraction, dtype) -> float:
    """The nearest number of a type, ties to even."""
    with np.errstate(over="ignore"):
        try:
            near = dtype(float(value))
        except OverflowError:
            return dtype(math.inf if value > 0 else -math.inf)
        if not np.isfinite(near):
            return near
        around = [np.nextafter(near, dtype(-np.inf)), near, np.nextafter(near, dtype(np.inf))]
    unsigned = f"u{near.itemsize}"
    return min(
        (c for c in around if np.isfinite(c)),
        key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(unsigned)) & 1),
    )


def exact_fma(a, b, c, dtype) -> np.ndarray:
    result = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist()):
        if math.isfinite(x) and math.isfinite(y) and math.isfinite(z):
            value = Fraction(x) * Fraction(y) + Fraction(z)
            result.append(rounded(value, dtype) if value else dtype(x) * dtype(y) + dtype(z))
        elif math.isfinite(x) and math.isfinite(y):
            result.append(dtype(z))  # whatever the product, which may be beyond the type's range
        else:
            with np.errstate(all="ignore"):
                result.append(dtype(x) * dtype(y) + dtype(z))
    return np.array(result, dtype)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x) -> np.ndarray:
    """Of float32 or, rounded once, of fractions."""
    result = []
    for v in x:
        if isinstance(v, Fraction):
            near = struct.unpack("<I", struct.pack("<f", np.float32(float(v))))[0] & 0xFFFF0000
            values = [struct.unpack("<f", struct.pack("<I", near + d))[0] for d in (0, 0x10000)]
            best = min(range(2), key=lambda i: (abs(Fraction(values[i]) - v), (near >> 16) + i & 1))
            result.append((near >> 16) + best)
            continue
        u = struct.unpack("<I", struct.pack("<f", v))[0]
        low, high = u & 0xFFFF, u >> 16
        up = low > 0x8000 or (low == 0x8000 and high & 1)
        result.append(0x7FFF if math.isnan(v) else high + up)
    return np.array(result, np.uint16)


# -- integers and bits


def trunc_div(a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add.{k}": ("usb", "16 32 64", lambda a, b: a + b),
    "sub.{k}": ("us", "16 32 64", lambda a, b: a - b),
    "mul.lo.{k}": ("us", "16 32 64", lambda a, b: a * b),
    "min.{k}": ("us", "16 32 64", min),
    "max.{k}": ("us", "16 32 64", max),
    "and.{k}": ("b", "16 32 64", lambda a, b: a & b),
    "or.{k}": ("b", "16 32 64", lambda a, b: a | b),
    "xor.{k}": ("b", "16 32 64", lambda a, b: a ^ b),
}
BINARY = [
    (name.format(k=letter + bits), letter + bits, function)
    for name, (letters, sizes, function) in INTEGERS.items()
    for letter in letters.replace("b", "b" if len(letters) == 1 else "")
    for bits in sizes.split()
]
BINARY += [
    (f"mul.hi.{k}", k, lambda a, b, n=int(k[1:]): a * b >> n) for k in ("u16", "s16", "u32", "s32", "u64", "s64")
]
DIVISIONS = [
    (f"{name}.{k}", k, function)
    for name, function in (("div", trunc_div), ("rem", lambda a, b: a - b * trunc_div(a, b)))
    for k in ("u32", "s32", "u64", "s64")
]


@pytest.mark.parametrize(("name", "kind", "function"), BINARY, ids=[b[0] for b in BINARY])
def test_integers(name, kind, function):
    a, b = pairs(grid_of(kind), grid_of(kind))
    same(elementwise(f"{name} d, a, b", kind, (kind, kind), a, b), by_integers(function, kind, a, b))


@pytest.mark.parametrize(("name", "kind", "function"), DIVISIONS, ids=[b[0] for b in DIVISIONS])
def test_divisions(name, kind, function):
    a, b = pairs(grid_of(kind), grid_of(kind))
    defined = (b != 0) & ~((b == -1) & (a == np.iinfo(TYPES[kind]).min)) if kind[0] == "s" else b != 0
    a, b = a[defined], b[defined]
    same(elementwise(f"{name} d, a, b", kind, (kind, kind), a, b), by_integers(function, kind, a, b))


def test_halves_of_a_word_are_added_apart():
    a, b = pairs(grid_of("u32"), grid_of("u32"))
    expected = by_integers(lambda x, y: (x + y & 0xFFFF) | ((x >> 16) + (y >> 16) << 16), "u32", a, b)
    same(elementwise("add.s16x2 d, a, b", "b32", ("b32", "b32"), a, b), expected)


@pytest.mark.parametrize("name", ["neg.s16", "neg.s32", "neg.s64", "abs.s32", "abs.s64"])
def test_signs(name):
    kind = name[4:]
    a = grid_of(kind)
    expected = by_integers(abs if name.startswith("abs") else lambda x: -x, kind, a)
    same(elementwise(f"{name} d, a", kind, (kind,), a), expected)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind):
    wide = kind[0] + str(2 * int(kind[1:]))
    a, b = pairs(grid_of(kind), grid_of(kind))
    same(elementwise(f"mul.wide.{kind} d, a, b", wide, (kind, kind), a, b), by_integers(lambda x, y: x * y, wide, a, b))
    a, b, c = pairs(grid_of(kind, False), grid_of(kind, False), grid_of(wide, False))
    expected = by_integers(lambda x, y, z: x * y + z, wide, a, b, c)
    same(elementwise(f"mad.wide.{kind} d, a, b, c", wide, (kind, kind, wide), a, b, c), expected)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_multiply_add(kind):
    a, b, c = pairs(*[grid_of(kind, False)] * 3)
    expected = by_integers(lambda x, y, z: x * y + z, kind, a, b, c)
    same(elementwise(f"mad.lo.{kind} d, a, b, c", kind, (kind,) * 3, a, b, c), expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ["shl.b", "shr.u", "shr.s"])
def test_shifts(name, bits):
    kind = f"{'u' if name[-1] == 'b' else name[-1]}{bits}"
    a, count = pairs(grid_of(kind), grid_of("u32"))

    def shift(x, n):
        n = min(n, bits)  # beyond, everything is shifted out
        return x << n if name == "shl.b" else x >> n

    same(elementwise(f"{name}{bits} d, a, b", kind, (kind, "u32"), a, count), by_integers(shift, kind, a, count))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_moves_and_complements(bits):
    a = grid_of(f"u{bits}")
    same(elementwise(f"mov.b{bits} d, a", f"u{bits}", (f"u{bits}",), a), a)
    same(elementwise(f"not.b{bits} d, a", f"u{bits}", (f"u{bits}",), a), ~a)


def test_counts_and_reversals_of_bits():
    a = grid_of("u32")
    same(elementwise("popc.b32 d, a", "u32", ("u32",), a), by_integers(lambda x: x.bit_count(), "u32", a))
    same(elementwise("clz.b32 d, a", "u32", ("u32",), a), by_integers(lambda x: 32 - x.bit_length(), "u32", a))
    same(elementwise("brev.b32 d, a", "u32", ("u32",), a), by_integers(lambda x: int(f"{x:032b}"[::-1], 2), "u32", a))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields_out(kind):
    bits = int(kind[1:])
    a, position, length = pairs(
        grid_of(kind, False), *[np.array([0, 1, 5, 16, 31, 32, 40, 63, 64, 255, 256], np.uint32)] * 2
    )

    def field(x, p, n):
        p, n = p & 255, n & 255
        sign = 0
        if kind[0] == "s" and n:
            sign = x >> min(p + n - 1, bits - 1) & 1
        found = 0
        for i in range(bits):
            found |= (x >> (p + i) & 1 if i < n and p + i < bits else sign) << i
        return found

    expected = by_integers(lambda x, p, n: field(x & (2**bits - 1), p, n), kind, a, position, length)
    same(elementwise(f"bfe.{kind} d, a, b, c", kind, (kind, "u32", "u32"), a, position, length), expected)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("position", "length"), [(0, 0), (0, 8), (5, 9), (31, 1), (16, 40), (40, 8), (0, 64), (63, 3)])
def test_bit_fields_in(bits, position, length):
    kind = f"u{bits}"
    a, b = pairs(grid_of(kind, False), grid_of(kind, False))

    def put(x, y):
        for i in range(length):
            if position + i < bits:
                y = y & ~(1 << position + i) | (x >> i & 1) << position + i
        return y

    same(
        elementwise(f"bfi.b{bits} d, a, b, {position}, {length}", kind, (kind, kind), a, b),
        by_integers(put, kind, a, b),
    )


def test_byte_permutations():
    a, b, selector = pairs(*[grid_of("u32", False)] * 2, np.array([0x3210, 0x7654, 0x9DC8, 0xBA01, 0xFFFF], np.uint32))

    def permute(x, y, s):
        source = [(x | y << 32) >> 8 * i & 255 for i in range(8)]
        chosen = [
            source[n & 7] if not n & 8 else 255 * (source[n & 7] >> 7) for n in (s >> 4 * i & 15 for i in range(4))
        ]
        return int.from_bytes(bytes(chosen), "little")

    same(
        elementwise("prmt.b32 d, a, b, c", "u32", ("u32",) * 3, a, b, selector),
        by_integers(permute, "u32", a, b, selector),
    )


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xCA, 0x2D, 0xFF])
def test_functions_of_three_bits(table):
    a, b, c = pairs(*[grid_of("u32", False)] * 3)

    def look_up(x, y, z):
        return sum((table >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1) << i for i in range(32))

    expected = by_integers(look_up, "u32", a, b, c)
    same(elementwise(f"lop3.b32 d, a, b, c, {table}", "u32", ("u32",) * 3, a, b, c), expected)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
@pytest.mark.parametrize("way", ["l", "r"])
def test_funnel_shifts(way, mode):
    a, b, count = pairs(*[grid_of("u32", False)] * 2, np.array([0, 1, 13, 31, 32, 33, 64], np.uint32))

    def shift(low, high, n):
        n = n & 31 if mode == "wrap" else min(n, 32)
        both = low | high << 32
        return both << n >> 32 if way == "l" else both >> n

    expected = by_integers(shift, "u32", a, b, count)
    same(elementwise(f"shf.{way}.{mode}.b32 d, a, b, c", "u32", ("u32",) * 3, a, b, count), expected)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "f32", "f64"])
def test_selections(kind):
    a, b, which = pairs(grid_of(kind), grid_of(kind), np.array([0, 1], np.uint32))
    same(elementwise(f"setp.ne.u32 %p1, c, 0; selp.{kind} d, a, b, %p1", kind, (kind, kind, "u32"), a, b, which),
         np.where(which, a, b))  # fmt: skip


def test_parts_of_registers():
    a = grid_of("u64")
    low = elementwise("mov.b64 {%r1, %r2}, a; mov.b32 d, %r1", "u32", ("u64",), a)
    high = elementwise("mov.b64 {%r1, %r2}, a; mov.b32 d, %r2", "u32", ("u64",), a)
    same(low, a.astype(np.uint32))
    same(high, (a >> np.uint64(32)).astype(np.uint32))
    swapped = elementwise("mov.b64 {%r1, %r2}, a; mov.b64 d, {%r2, %r1}", "u64", ("u64",), a)
    same(swapped, (a >> np.uint64(32)) | (a << np.uint64(32)))
    third = elementwise("mov.b64 {%h1, %h2, %h3, %h4}, a; mov.b16 d, %h3", "u16", ("u64",), a)
    same(third, (a >> np.uint64(32)).astype(np.uint16))


# -- floating point


def quiet(function):
    def call(*arrays):
        with np.errstate(all="ignore"):
            return function(*arrays)

    return call


FLOATS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div.rn": np.divide,
}


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", FLOATS)
def test_arithmetic(name, kind):
    a, b = pairs(grid_of(kind), grid_of(kind))
    same(elementwise(f"{name}.{kind} d, a, b", kind, (kind, kind), a, b), quiet(FLOATS[name])(a, b))


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_subnormal_numbers_are_flushed_where_asked(name):
    a, b = pairs(grid_of("f32"), grid_of("f32"))
    expected = flushed(quiet(FLOATS[name])(flushed(a), flushed(b)))
    same(elementwise(f"{name}.ftz.f32 d, a, b", "f32", ("f32", "f32"), a, b), expected)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fused_multiply_add_rounds_once(kind):
    a, b, c = pairs(*[grid_of(kind, False)] * 3)
    expected = exact_fma(a, b, c, TYPES[kind])
    same(elementwise(f"fma.rn.{kind} d, a, b, c", kind, (kind,) * 3, a, b, c), expected)
    if kind == "f32":
        a, b, c = (flushed(t) for t in (a, b, c))
        found = elementwise("fma.rn.ftz.f32 d, a, b, c", "f32", ("f32",) * 3, a, b, c)
        same(found, flushed(exact_fma(a, b, c, np.float32)))


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_two_floats_at_once(name):
    a, b = pairs(grid_of("f32"), grid_of("f32"))
    two = [np.stack((t, t[::-1]), 1).copy().view(np.uint64)[:, 0] for t in (a, b)]
    found = elementwise(f"{name}.f32x2 d, a, b", "b64", ("b64", "b64"), *two).view(np.float32).reshape(-1, 2)
    expected = quiet(FLOATS[name])(a, b)
    same(np.ascontiguousarray(found[:, 0]), expected)
    same(np.ascontiguousarray(found[:, 1]), np.ascontiguousarray(expected[::-1]))


def test_two_fused_multiply_adds_at_once():
    a, b, c = pairs(*[grid_of("f32", False)] * 3)
    two = [np.stack((t, t[::-1]), 1).copy().view(np.uint64)[:, 0] for t in (a, b, c)]
    found = elementwise("fma.rn.f32x2 d, a, b, c", "b64", ("b64",) * 3, *two).view(np.float32).reshape(-1, 2)
    expected = exact_fma(a, b, c, np.float32)
    same(np.ascontiguousarray(found[:, 0]), expected)
    same(np.ascontiguousarray(found[:, 1]), np.ascontiguousarray(expected[::-1]))


def test_bfloat16_pairs_round_once():
    a, b, c = pairs(*[grid_of("bf16", False)] * 3)
    values = [from_bf16(t) for t in (a, b, c)]
    finite = np.isfinite(values).all(0)
    a, b, c = a[finite], b[finite], c[finite]
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(*(from_bf16(t).tolist() for t in (a, b, c)))]
    fits = np.array([2.0**-126 < abs(v) < 3.3e38 for v in exact])
    a, b, c, exact = a[fits], b[fits], c[fits], [v for v, f in zip(exact, fits) if f]
    two = [t.astype(np.uint32) | (t[::-1].astype(np.uint32) << 16) for t in (a, b, c)]
    found = elementwise("fma.rn.bf16x2 d, a, b, c", "b32", ("b32",) * 3, *two)
    expected = to_bf16(exact)
    same((found & 0xFFFF).astype(np.uint16), expected)
    same((found >> 16).astype(np.uint16), expected[::-1])


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_bfloat16(name):
    a, b = pairs(grid_of("bf16", False), grid_of("bf16", False))
    finite = np.isfinite(from_bf16(a)) & np.isfinite(from_bf16(b))
    a, b = a[finite], b[finite]
    calculate = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[name]
    exact = [calculate(Fraction(x), Fraction(y)) for x, y in zip(from_bf16(a).tolist(), from_bf16(b).tolist())]
    fits = np.array([2.0**-126 < abs(v) < 3.3e38 for v in exact])
    found = elementwise(f"{name}.bf16 d, a, b", "b16", ("b16",) * 2, a[fits], b[fits])
    same(found, to_bf16([v for v, f in zip(exact, fits) if f]))


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_mixed_types(half):
    def wide(t):
        return from_bf16(t) if half == "bf16" else t.astype(np.float32)

    a, b, c = pairs(grid_of(half, False), grid_of(half, False), grid_of("f32", False))
    found = elementwise(f"fma.rn.f32.{half} d, a, b, c", "f32", (half, half, "f32"), a, b, c)
    same(found, exact_fma(wide(a), wide(b), c, np.float32))
    a, c = pairs(grid_of(half), grid_of("f32"))
    same(elementwise(f"add.rn.f32.{half} d, a, b", "f32", (half, "f32"), a, c), quiet(np.add)(wide(a), c))


def test_signs_of_halves():
    for kind in ("f16", "bf16"):
        a = grid_of(kind).view(np.uint16)
        found = elementwise(f"neg.{kind} d, a", "b16", ("b16",), a)
        same(found, a ^ np.uint16(0x8000))


def test_float32_arithmetic_has_one_nan():
    """As on the device; of x86 the sign and the payload depend on the operands."""
    a = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x7FFFFFFF], np.uint32).view(np.float32)
    b = np.array([1.0, 2.0, -np.inf, np.nan], np.float32)
    for name in ("add", "mul", "div.rn", "min.NaN"):
        found = elementwise(f"{name}.f32 d, a, b", "b32", ("f32", "f32"), a, b)
        assert (found[np.isnan(a) | np.isnan(b)] == 0x7FFFFFFF).all(), name
    assert (elementwise("add.f32 d, a, b", "b32", ("f32", "f32"), a, b) == 0x7FFFFFFF).all()


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_signs_of_floats(kind):
    a, b = pairs(grid_of(kind), grid_of(kind))
    same(elementwise(f"neg.{kind} d, a", kind, (kind,), a), -a)
    same(elementwise(f"abs.{kind} d, a", kind, (kind,), a), np.abs(a))
    same(elementwise(f"copysign.{kind} d, a, b", kind, (kind, kind), a, b), np.copysign(b, a))


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_the_smaller_and_the_larger(name, kind):
    a, b = pairs(grid_of(kind), grid_of(kind))
    expected = quiet(np.fmin if name == "min" else np.fmax)(a, b)
    zeros = (a == 0) & (b == 0)  # -0 is below +0
    either = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
    expected = np.where(zeros, np.where(either, -0.0, 0.0), expected)
    same(elementwise(f"{name}.{kind} d, a, b", kind, (kind, kind), a, b), expected)
    if kind == "f32":
        expected = np.where(np.isnan(a) | np.isnan(b), np.nan, expected)
        same(elementwise(f"{name}.NaN.f32 d, a, b", kind, (kind, kind), a, b), expected)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_roots_and_reciprocals(kind):
    a = grid_of(kind)
    same(elementwise(f"sqrt.rn.{kind} d, a", kind, (kind,), a), quiet(np.sqrt)(a))
    same(elementwise(f"rcp.rn.{kind} d, a", kind, (kind,), a), quiet(np.reciprocal)(a))


#: name -> the function in float64, and how far the hardware may be off: ulps, or an absolute error
APPROXIMATIONS = {
    "sqrt.approx.f32": (np.sqrt, 2, 0),
    "sqrt.approx.ftz.f32": (lambda x: np.sqrt(flushed(x)), 2, 0),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2, 0),
    "rsqrt.approx.ftz.f32": (lambda x: 1 / np.sqrt(flushed(x)), 2, 0),
    "rcp.approx.f32": (lambda x: 1 / x, 1, 0),
    "rcp.approx.ftz.f32": (lambda x: 1 / flushed(x), 1, 0),
    "ex2.approx.f32": (np.exp2, 2, 0),
    "ex2.approx.ftz.f32": (lambda x: np.exp2(flushed(x)), 2, 0),
    "lg2.approx.f32": (np.log2, 4, 2.0**-22),
    "lg2.approx.ftz.f32": (lambda x: np.log2(flushed(x)), 4, 2.0**-22),
    "sin.approx.f32": (np.sin, 0, 2.0**-20.5),
    "cos.approx.f32": (np.cos, 0, 2.0**-20.5),
    "tanh.approx.f32": (np.tanh, 1 << 12, 0),
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations(name):
    function, ulps, absolute = APPROXIMATIONS[name]
    a = grid_of("f32")
    expected = quiet(function)(a.astype(np.float64))
    with np.errstate(over="ignore"):
        narrow = expected.astype(np.float32)
    if "ftz" in name:
        narrow = flushed(narrow)
    exact = elementwise(f"{name} d, a", "f32", ("f32",), a)
    off = {"exact": exact}
    for way in ("up", "down", "either"):
        off[way] = elementwise(f"{name} d, a", "f32", ("f32",), a, errors=way)
    finite = np.isfinite(narrow)
    for found in off.values():
        assert (np.isnan(found) == np.isnan(narrow)).all()
        assert (found[~finite & ~np.isnan(narrow)] == narrow[~finite & ~np.isnan(narrow)]).all()
    for way, found in off.items():
        spacing = np.spacing(np.maximum(np.abs(narrow[finite]), np.abs(found[finite]))).astype(np.float64)
        error = np.abs(found[finite].astype(np.float64) - narrow[finite])
        allowed = (1.01 if way == "exact" else ulps + 1.01) * spacing + (0 if way == "exact" else absolute * 1.2)
        assert (error <= allowed).all(), way
    assert (off["up"][finite] >= exact[finite]).all() and (off["down"][finite] <= exact[finite]).all()
    assert (off["up"][finite] > off["down"][finite]).any()


def test_division_that_may_err():
    a, b = pairs(grid_of("f32"), grid_of("f32"))
    expected = quiet(np.divide)(a, b)
    same(elementwise("div.full.f32 d, a, b", "f32", ("f32", "f32"), a, b), expected)
    up = elementwise("div.full.f32 d, a, b", "f32", ("f32", "f32"), a, b, errors="up")
    normal = (np.abs(expected) < 1e38) & (np.abs(expected) > np.finfo(np.float32).tiny)
    error = up[normal].astype(np.float64) - expected[normal]
    assert (error >= 0).all() and (error <= 2.01 * np.spacing(np.abs(expected[normal]))).all() and (error > 0).any()


# -- conversions


def cut(x: float) -> int:
    return math.trunc(x)


@pytest.mark.parametrize("to", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_of_other_widths(source, to):
    a = grid_of(source)
    same(elementwise(f"cvt.{to}.{source} d, a", to, (source,), a), by_integers(lambda x: x, to, a))


@pytest.mark.parametrize(
    ("source", "to"),
    [("u16", "f32"), ("s16", "f32")] + [(k, to) for k in ("u32", "s32", "u64", "s64") for to in ("f32", "f64")],
)
def test_integers_to_floats(source, to):
    a = grid_of(source)
    same(elementwise(f"cvt.rn.{to}.{source} d, a", to, (source,), a), a.astype(TYPES[to]))


@pytest.mark.parametrize(
    ("name", "to", "function"),
    [("rzi", "s32", math.trunc), ("rni", "s32", round), ("rzi", "u32", math.trunc)],
)
def test_floats_to_integers(name, to, function):
    a = grid_of("f32")
    info = np.iinfo(TYPES[to])

    def convert(x):
        if math.isnan(x):
            return 0
        return int(min(max(function(x), info.min), info.max)) if math.isfinite(x) else info.max if x > 0 else info.min

    expected = np.array([convert(float(x)) for x in a], TYPES[to])
    same(elementwise(f"cvt.{name}.{to}.f32 d, a", to, ("f32",), a), expected)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize(
    ("name", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_floats_to_whole_numbers(name, function, kind):
    a = grid_of(kind)
    same(elementwise(f"cvt.{name}.{kind}.{kind} d, a", kind, (kind,), a), quiet(function)(a))


def test_floats_of_other_widths():
    a = grid_of("f32")
    a = np.concatenate(
        (a, np.float32(65504) + np.arange(0, 40, 4, dtype=np.float32), np.float32(2.0**-25) * np.arange(9))
    )
    same(elementwise("cvt.f64.f32 d, a", "f64", ("f32",), a), a.astype(np.float64))
    with np.errstate(over="ignore"):
        wide = grid_of("f64")
        same(elementwise("cvt.rn.f32.f64 d, a", "f32", ("f64",), wide), wide.astype(np.float32))
        same(elementwise("cvt.rn.f16.f32 d, a", "f16", ("f32",), a), a.astype(np.float16))
    half = grid_of("f16")
    same(elementwise("cvt.f32.f16 d, a", "f32", ("f16",), half), half.astype(np.float32))
    bits = grid_of("bf16")
    same(elementwise("cvt.f32.bf16 d, a", "f32", ("bf16",), bits), from_bf16(bits))
    same(elementwise("cvt.rn.bf16.f32 d, a", "bf16", ("f32",), a), to_bf16(a))


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_two_floats_to_two_halves(half):
    a, b = pairs(grid_of("f32"), grid_of("f32"))
    found = elementwise(f"cvt.rn.{half}x2.f32 d, a, b", "b32", ("f32", "f32"), a, b)

    def narrow(x):
        with np.errstate(over="ignore"):
            return to_bf16(x) if half == "bf16" else x.astype(np.float16)

    view = np.uint16 if half == "bf16" else np.float16
    same((found >> 16).astype(np.uint16).view(view), narrow(a))
    same((found & 0xFFFF).astype(np.uint16).view(view), narrow(b))


@pytest.mark.parametrize("name", ["rna", "rn"])
def test_tf32_keeps_ten_bits(name):
    a = grid_of("f32")
    a = np.concatenate((a, np.float32(1) + np.arange(64, dtype=np.float32) * np.float32(2.0**-12)))
    a = a[np.isfinite(a) & (np.abs(a) < 3e38) & ((a == 0) | (np.abs(a) >= np.finfo(np.float32).tiny))]
    found = elementwise(f"cvt.{name}.tf32.f32 d, a", "tf32", ("f32",), a)
    assert not (found.view(np.uint32) & 0x1FFF).any()
    mantissa, exponent = np.frexp(a.astype(np.float64))
    scaled = mantissa * 2**11
    whole = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled) if name == "rna" else np.rint(scaled)
    same(found, np.ldexp(whole / 2**11, exponent))


# -- comparisons

ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def compare(name: str, kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found = elementwise(f"setp.{name}.{kind} %p1, a, b; selp.b32 d, 1, 0, %p1", "u32", (kind, kind), a, b)
    return found.astype(bool)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_compare(kind):
    a, b = pairs(grid_of(kind), grid_of(kind))
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"} if kind[0] == "u" else {}
    for name in (*ORDERED, *unsigned):
        assert (compare(name, kind, a, b) == ORDERED[unsigned.get(name, name)](a, b)).all(), name


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_floats_compare(kind):
    a, b = pairs(grid_of(kind), grid_of(kind))
    nan = np.isnan(a) | np.isnan(b)
    for name, function in ORDERED.items():
        assert (compare(name, kind, a, b) == (quiet(function)(a, b) & ~nan)).all(), name
        assert (compare(name + "u", kind, a, b) == (quiet(function)(a, b) | nan)).all(), name
    assert (compare("num", kind, a, b) == ~nan).all()
    assert (compare("nan", kind, a, b) == nan).all()


# -- all of them, and no others

#: operations that other files of this folder test: lanes and warps, memory, matrices
ELSEWHERE = """
ld_param ld_global st_global ld_shared st_shared ld_local st_local ld_generic st_generic cp_async cp_commit
cp_wait ldmatrix stmatrix mma shfl redux vote elect bar_sync bar_arrive bar_warp bra brx ret trap fence_async
nop wgmma wgmma_fence wgmma_commit wgmma_wait mbarrier_init mbarrier_inval mbarrier_try_wait tcgen05_alloc
tcgen05_dealloc tcgen05_mma tcgen05_commit tcgen05_ld tcgen05_st tcgen05_wait
""".split()


def calls(test) -> list[dict]:
    """The arguments of each case of a parametrised test."""
    found: list[dict] = [{}]
    for mark in (m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"):
        names, values = mark.args
        names = (names,) if isinstance(names, str) else names
        rows = [dict(zip(names, (v,) if len(names) == 1 else v)) for v in values]
        found = [{**case, **row} for case in found for row in rows]
    return found


def test_every_operation_of_the_engine_has_its_test(monkeypatch):
    """Each elementwise one is reached by a test of this file."""
    reached, read = set(), reader.read

    def spy(*args, **kwargs):
        program = read(*args, **kwargs)
        reached.update(program.code["op"].tolist())
        return program

    monkeypatch.setattr(reader, "read", spy)
    for name, test in list(globals().items()):
        if name.startswith("test_") and not test.__code__.co_varnames[:1] == ("monkeypatch",):
            for case in calls(test):
                with contextlib.suppress(pytest.skip.Exception):
                    test(**case)
    missing = [n for n in reader.operations() if n not in ELSEWHERE and reader.operation(n) not in reached]
    assert not missing


@pytest.mark.parametrize(
    "text",
    [
        "add.rz.f32 %f1, %f2, %f3",
        "add.sat.f32 %f1, %f2, %f3",
        "dp4a.s32.s32 %r1, %r2, %r3, %r4",
        "atom.global.add.u32 %r1, [%a0], %r2",
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d1,%d2}, {%d3}, {%d4}, {%d1,%d2}",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2",
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile [%r1], [%a0, {%r2}], [%r3]",
        "setmaxnreg.inc.sync.aligned.u32 40",
        "setp.lt.and.f32 %p1, %f1, %f2, %p2",
    ],
)
def test_an_unknown_instruction_is_an_error_with_its_name(text):
    with pytest.raises(reader.UnknownInstruction, match=text.split()[0].replace(".", r"\.")):
        reader.read(kernel(text + ";", 1))


def test_what_the_engine_is_told_of_unknown_registers_and_symbols():
    for text in ("mov.u32 %r1, %clock;", "mov.u64 %d1, nowhere;", "mov.u32 %unknown, 1;"):
        with pytest.raises(reader.UnknownInstruction):
            reader.read(kernel(text, 1))


def test_the_library_has_the_operations_of_the_table():
    table = (library.SOURCES / "operations.inc").read_text()
    assert "BINARY(add_u32" in table and reader.operation("add_u32") >= 0
    with pytest.raises(reader.UnknownInstruction, match="nonsense"):
        reader.operation("nonsense")
