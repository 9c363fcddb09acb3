"""The elementwise primitives of the generated maps, in Triton.

Unary primitives and `fi_pow` take a constexpr MODE:

| MODE | for | working type | error |
| --- | --- | --- | --- |
| 0, accurate | ieee, tf32x3, bf16x3 | float32 | sin, cos 2 ulp for any finite argument, others 4 ulp (div.full: 2) |
| 1, fast | tf32, bfloat16, float16 | float32 | as each function says, through the special-function unit |
| 2, pure `tl` | the interpreter | float32, float64 | that of `tl.sin`, `tl.exp`, ... |

MODE 0 is polynomials and `tl.fma`: no table, no local memory (libdevice's sin and cos keep a table there). Its steps
are written as `tl.fma` because whether Triton contracts a*b + c depends on version and option. NaN gives NaN, odd
functions keep the sign of zero; `fi_sign(0) = 0`, and comparisons are 1.0 or 0.0.
"""

import math

import triton
import triton.language as tl

# ---------------------------------------------------------------- special-function unit (MODE 1)


@triton.jit
def _sin_approx(x):
    return tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _cos_approx(x):
    return tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _ex2_approx(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _lg2_approx(x):
    return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _rcp_approx(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


# ---------------------------------------------------------------- sine and cosine


@triton.jit
def _two_over_pi_word(i, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    word = tl.where(i == 0, A, tl.where(i == 1, B, tl.where(i == 2, C, tl.where(i == 3, D, E))))
    return word.to(tl.uint64)


@triton.jit
def _reduce_large(x):
    """Payne-Hanek: r and n with x = n pi/2 + r, abs(r) <= pi/4, for float32 abs(x) >= 2^16; n modulo 4.

    x = m 2^s with a 24-bit m, so the bits of 2/pi of weight above 2^(2 - s) only add multiples of 4 to x 2/pi: 96 bits
    from there on leave 62 behind the binary point after the product.
    """
    bits = x.to(tl.uint32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x800000).to(tl.uint64)
    start = ((bits >> 23) & 0xFF).to(tl.int32) - 120  # first bit, counted from a leading word of zeros
    start = tl.where(start > 0, start, 0)  # elements that do not need this path
    shift = (start & 31).to(tl.uint64)
    i = start >> 5  # at most 4, for the largest finite x
    w0 = _two_over_pi_word(i, 0x0, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0)
    w1 = _two_over_pi_word(i, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599)
    w2 = _two_over_pi_word(i, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041)
    w3 = _two_over_pi_word(i, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB)
    high = (((w0 << 32) | w1) << shift) | (w2 >> (32 - shift))
    low = (((w2 << 32) | w3) << shift) >> 32
    p = m * high + ((m * low) >> 32)  # x 2/pi modulo 4, in units of 2^-62
    n = (p + 0x2000000000000000) >> 62
    r = (p - (n << 62)).to(tl.int64, bitcast=True).to(tl.float64) * 3.4061215800304430e-19  # pi/2 2^-62
    negative = x < 0
    r = r.to(tl.float32)
    n = n.to(tl.int32)
    return tl.where(negative, -r, r), tl.where(negative, -n, n)


@triton.jit
def _sincos_accurate(x, BOUNDED: tl.constexpr = False):
    # n = round(x 2/pi): adding 1.5 * 2^23 leaves it in the low bits (a cvt would be a slow FRND)
    shifted = tl.fma(x, 0.6366197723675814, 12582912.0)
    n = shifted - 12582912.0
    quadrant = shifted.to(tl.int32, bitcast=True)
    # pi/2 in parts of 8, 11, 24 and 24 bits: the first two products are exact up to n = 2^16, which keeps r's relative
    # accuracy at the floats nearest to multiples of pi/2 (and holds without a fused multiply-add as well)
    r = tl.fma(n, -1.5703125, x)
    r = tl.fma(n, -4.837512969970703e-04, r)
    r = tl.fma(n, -7.549789415861596e-08, r)
    r = tl.fma(n, -5.390302953474238e-15, r)  # (-: the sign of x = -0.0 survives)
    if not BOUNDED:
        large = tl.abs(x) > 100000.0
        if large.type.is_block():
            any_large = tl.max(large.to(tl.int32)) != 0
        else:
            any_large = large
        if any_large:  # one branch for the whole tile
            slow_r, slow_quadrant = _reduce_large(x)
            slow_r = tl.where(tl.abs(x) < float("inf"), slow_r, float("nan"))
            r = tl.where(large, slow_r, r)
            quadrant = tl.where(large, slow_quadrant, quadrant)
    r2 = r * r
    s = tl.fma(r2, 2.8328051939752186e-06, -1.9853078993037343e-04)
    s = tl.fma(r2, s, 8.333379402756691e-03)
    s = tl.fma(r2, s, -1.6666667163372040e-01)
    s = tl.fma(s, tl.fma(r, r2, 0.0), r)  # the + 0.0 keeps the sign of r = -0.0
    c = tl.fma(r2, 2.4430661142105237e-05, -1.3887301320210100e-03)
    c = tl.fma(r2, c, 4.1666645556688310e-02)
    c = tl.fma(r2, c, -0.5)
    c = tl.fma(r2, c, 1.0)
    odd = (quadrant & 1) != 0
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    return tl.where((quadrant & 2) != 0, -sin, sin), tl.where(((quadrant + 1) & 2) != 0, -cos, cos)


@triton.jit
def fi_sincos(x, MODE: tl.constexpr):
    """sin(x), cos(x) from one reduction. MODE 1: absolute error 2^-20 + 2^-25 abs(x), the second part what one float32
    for 2 pi leaves (a pre-activation of float32 sums is off by 2^-24 abs(x) at least); always within [-1, 1]."""
    if MODE == 0:
        return _sincos_accurate(x)
    elif MODE == 1:
        n = tl.fma(x, 0.15915494309189535, 12582912.0) - 12582912.0
        r = tl.fma(n, -6.2831854820251465, x)  # the product is exact within the fma
        return _sin_approx(r), _cos_approx(r)
    else:
        return tl.sin(x), tl.cos(x)


@triton.jit
def sincos_bounded(x, MODE: tl.constexpr):
    """fi_sincos for abs(x) <= 2^16: without the question whether an argument is larger."""
    if MODE == 0:
        return _sincos_accurate(x, True)
    else:
        return fi_sincos(x, MODE)


@triton.jit
def fi_sin(x, MODE: tl.constexpr):
    s, c = fi_sincos(x, MODE)
    return s


@triton.jit
def fi_cos(x, MODE: tl.constexpr):
    s, c = fi_sincos(x, MODE)
    return c


@triton.jit
def fi_tan(x, MODE: tl.constexpr):
    s, c = fi_sincos(x, MODE)
    return s / c


# ---------------------------------------------------------------- exponentials and logarithms


@triton.jit
def _odd(x, y):
    """The value y(abs(x)) of an odd function with the sign of x, of -0.0 too."""
    return tl.where(x == 0, x, tl.where(x < 0, -y, y))


@triton.jit
def power_of_two(k):
    """2^k for an integer k in -126 .. 127, from its bits."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _expm1_reduced(x):
    """k and expm1(r) with x = k ln 2 + r, abs(r) <= ln(2)/2."""
    shifted = tl.fma(x, 1.4426950408889634, 12582912.0)
    n = shifted - 12582912.0
    k = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    r = tl.fma(n, -0.693115234375, x)
    r = tl.fma(n, -3.194618329871446e-05, r)
    p = tl.fma(r, 1.9760934810619801e-04, 1.3932313304394484e-03)
    p = tl.fma(r, p, 8.333547040820122e-03)
    p = tl.fma(r, p, 4.1666492819786070e-02)
    p = tl.fma(r, p, 1.6666665673255920e-01)
    p = tl.fma(r, p, 0.5)
    return k, tl.fma(r * r, p, r)


@triton.jit
def fi_exp(x, MODE: tl.constexpr):
    """MODE 1: relative error 2^-22 + 2^-24 abs(x); below 2^-126 it is 0."""
    if MODE == 0:
        x = tl.where(x > 89.5, 89.5, tl.where(x < -105.0, -105.0, x))  # NaN stays
        k, p = _expm1_reduced(x)
        half = k >> 1  # 2^k itself may overflow where the product does not
        return (1.0 + p) * power_of_two(half) * power_of_two(k - half)
    elif MODE == 1:
        return _ex2_approx(x * 1.4426950408889634)
    else:
        return tl.exp(x)


@triton.jit
def fi_log(x, MODE: tl.constexpr):
    """MODE 1: absolute error 2^-22 near 1, relative 2^-22 elsewhere."""
    if MODE == 1:
        return _lg2_approx(x) * 0.6931471805599453
    else:
        return tl.log(x)


@triton.jit
def fi_expm1(x, MODE: tl.constexpr):
    """The same in MODE 1, but for a division in what uses it."""
    if MODE == 2:
        e = tl.exp(x)
        y = (e - 1) * (x / tl.log(e))  # Kahan: the error of e - 1 and of log(e) cancel
        y = tl.where((e == 1) | (e == float("inf")), e * x, y)
        y = tl.where(e == float("inf"), e, tl.where(e == 1, x, y))
        return tl.where(e - 1 == -1, -1.0, y)
    else:
        clamped = tl.where(x > 89.0, 89.0, tl.where(x < -20.0, -20.0, x))
        k, p = _expm1_reduced(clamped)
        half = power_of_two(k - 1)
        y = tl.fma(half, p, half - 0.5) * 2.0
        return tl.where(x == 0, x, tl.where(k == 0, p, y))


@triton.jit
def fi_log1p(x, MODE: tl.constexpr):
    u = 1 + x
    y = fi_log(u, MODE)
    # what the rounding of 1 + x lost, to first order
    y = tl.where((u > 0) & (u < float("inf")), y + (x - (u - 1)) / u, y)
    return tl.where(x == 0, x, y)


@triton.jit
def fi_sigmoid(x, MODE: tl.constexpr):
    """MODE 1: relative error 2^-21 for abs(x) <= 8, absolute 2^-22."""
    if MODE == 1:
        return _rcp_approx(1.0 + _ex2_approx(x * -1.4426950408889634))
    else:
        return 1.0 / (1.0 + fi_exp(-x, MODE))


@triton.jit
def fi_tanh(x, MODE: tl.constexpr):
    """MODE 1: relative error 2^-20 (tanh.approx has 2^-11, which tf32 would notice)."""
    if MODE == 1:
        e = _ex2_approx(tl.abs(x) * 2.8853900817779268)
        y = tl.fma(_rcp_approx(1.0 + e), -2.0, 1.0)
        x2 = x * x
        p = tl.fma(x2, -5.396825396825397e-02, 1.3333333333333333e-01)
        p = tl.fma(x2, p, -3.3333333333333333e-01)
        near = tl.fma(p, tl.fma(x, x2, 0.0), x)
        return tl.where(tl.abs(x) < 0.15, near, tl.where(x < 0, -y, y))
    else:
        a = tl.abs(x)
        e = fi_expm1(2 * tl.where(a > 20.0, 20.0, a), MODE)
        return _odd(x, e / (e + 2))


@triton.jit
def fi_sinh(x, MODE: tl.constexpr):
    a = tl.abs(x)
    far = a > 40.0  # exp(a) overflows before sinh does
    e = fi_expm1(tl.where(far, 40.0, a), MODE)
    h = fi_exp(tl.where(far, 0.5 * a, 20.0), MODE if MODE == 2 else 0)
    return _odd(x, tl.where(far, (0.5 * h) * h, 0.5 * (e + e / (e + 1))))


@triton.jit
def fi_cosh(x, MODE: tl.constexpr):
    a = tl.abs(x)
    far = a > 40.0
    e = fi_exp(tl.where(far, 40.0, a), MODE if MODE == 2 else 0)
    h = fi_exp(tl.where(far, 0.5 * a, 20.0), MODE if MODE == 2 else 0)
    return tl.where(far, (0.5 * h) * h, 0.5 * (e + 1 / e))


@triton.jit
def fi_softplus(x, MODE: tl.constexpr):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-abs(x))); NaN comes through the second term."""
    return tl.where(x > 0, x, 0.0) + fi_log1p(fi_exp(-tl.abs(x), MODE), MODE)


@triton.jit
def fi_erf(x, MODE: tl.constexpr):
    return tl.erf(x)


# ---------------------------------------------------------------- powers and roots


@triton.jit
def fi_sqrt(x, MODE: tl.constexpr):
    if MODE == 0:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _pow_positive(x, y):
    """x^y for finite float32 x > 0: log2(x) as a sum of two floats, so that its error does not grow with y."""
    subnormal = x < 1.1754943508222875e-38
    bits = tl.where(subnormal, x * 16777216.0, x).to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)  # sqrt(1/2) <= m < sqrt(2)
    k = tl.where(subnormal, k - 24, k).to(tl.float32)
    # s = (m - 1) / (m + 1) and what its rounding lost; log(m) = 2 atanh(s)
    f = m - 1.0
    d = m + 1.0
    s = f / d
    lost = (tl.fma(-s, d, f) - s * (m - (d - 1.0))) / d
    s2 = s * s
    p = tl.fma(s2, 0.24286235868930817, 0.28498485684394836)
    p = tl.fma(s2, p, 0.40000975131988525)
    p = tl.fma(s2, p, 0.6666666269302368)
    high = 2.0 * s
    low = tl.fma(s * s2, p, 2.0 * lost)
    # times log2(e), plus k. The products that are used again are written as fma(.., 0), lest they be contracted
    h = tl.fma(high, 1.4426950216293335, 0.0)
    low = tl.fma(high, 1.4426950216293335, -h) + tl.fma(high, 1.925963033500011e-08, low * 1.4426950216293335)
    log2 = k + h
    low += (k - log2) + h
    e = tl.fma(y, log2, 0.0)
    rest = tl.fma(y, log2, -e) + y * low
    rest = tl.where(tl.abs(e) < 200.0, rest, 0.0)
    e = tl.where(e > 130.0, 130.0, tl.where(e < -155.0, -155.0, e))
    shifted = e + 12582912.0
    n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    unused, p = _expm1_reduced(((e - (shifted - 12582912.0)) + rest) * 0.6931471805599453)
    # the argument may round just past ln(2)/2: undo the octave it then took
    value = (1.0 + p) * power_of_two(unused)
    half = n >> 1
    return value * power_of_two(half) * power_of_two(n - half)


@triton.jit
def fi_pow(x, y, MODE: tl.constexpr):
    """x^y with the special cases of C's pow. MODE 1: relative error 2^-21 + 2^-23 abs(y log2(x))."""
    a = tl.abs(x)
    y = tl.zeros_like(x) + y  # a constant exponent takes the shape and type of x
    regular = (a > 0) & (a < float("inf"))
    safe = tl.where(regular, a, 1.0)
    if MODE == 0:
        value = _pow_positive(safe, y)
    elif MODE == 1:
        value = _ex2_approx(y * _lg2_approx(safe))
    else:
        value = tl.exp2(y.to(tl.float64) * tl.log2(safe.to(tl.float64))).to(x.dtype)
    integer = tl.floor(y) == y
    odd = integer & (tl.floor(0.5 * y) != 0.5 * y)
    value = tl.where(a == 0, tl.where(y > 0, 0.0, float("inf")), value)
    value = tl.where(a == float("inf"), tl.where(y > 0, float("inf"), 0.0), value)
    value = tl.where((x < 0) & regular & (integer == 0), float("nan"), value)
    # the sign of x, which a comparison does not see at -0.0
    negative = (x < 0) | ((a == 0) & (1.0 / x < 0))
    value = tl.where(odd & negative, value * -1.0, value)  # Triton's -x is 0 - x, which loses the sign of 0
    value = tl.where((x != x) | (y != y), float("nan"), value)
    return tl.where((y == 0) | (x == 1) | ((x == -1) & (tl.abs(y) == float("inf"))), 1.0, value)


# ---------------------------------------------------------------- pieces


@triton.jit
def fi_abs(x, MODE: tl.constexpr):
    return tl.abs(x)


@triton.jit
def fi_sign(x, MODE: tl.constexpr):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def fi_step(x, MODE: tl.constexpr):
    return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def fi_saturate(x, MODE: tl.constexpr):
    """x within [-40, 40]; NaN stays NaN. Its derivative is taken as 1."""
    return tl.where(x > 40.0, 40.0, tl.where(x < -40.0, -40.0, x))


@triton.jit
def fi_where(c, a, b):
    return tl.where(c != 0, a, b)


@triton.jit
def fi_gt(a, b):
    return tl.where(a > b, 1.0, 0.0)


@triton.jit
def fi_ge(a, b):
    return tl.where(a >= b, 1.0, 0.0)


@triton.jit
def fi_lt(a, b):
    return tl.where(a < b, 1.0, 0.0)


@triton.jit
def fi_le(a, b):
    return tl.where(a <= b, 1.0, 0.0)


@triton.jit
def fi_eq(a, b):
    return tl.where(a == b, 1.0, 0.0)


@triton.jit
def fi_minimum(a, b):
    return tl.where((a < b) | (a != a), a, b)  # b where b is NaN


@triton.jit
def fi_maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)


# ---------------------------------------------------------------- atan, and the derivatives of sin(x)/x


@triton.jit
def fi_atan(x, MODE: tl.constexpr):
    a = tl.abs(x)
    inverted = a > 1
    z = tl.where(inverted, 1 / a, a)
    if MODE == 2:
        # atan(z) = 2 atan(z / (1 + sqrt(1 + z^2))), twice: z <= tan(pi/16), where 13 terms reach float64
        z = z / (1 + tl.sqrt(1 + z * z))
        z = z / (1 + tl.sqrt(1 + z * z))
        z2 = z * z
        y = z2 * 0.0
        for k in tl.static_range(12, -1, -1):
            y = y * z2 + (1 - 2 * (k % 2)) / (2 * k + 1)
        y = tl.where(a < 1e-8, a, 4 * (y * z))  # the quarter of a subnormal would be lost
    else:
        z2 = z * z
        y = tl.fma(z2, 2.9203302692621946e-03, -1.6366431489586830e-02)
        y = tl.fma(z2, y, 4.3209329247474670e-02)
        y = tl.fma(z2, y, -7.5519889593124390e-02)
        y = tl.fma(z2, y, 1.0665892064571380e-01)
        y = tl.fma(z2, y, -1.4211024343967438e-01)
        y = tl.fma(z2, y, 1.9993768632411957e-01)
        y = tl.fma(z2, y, -3.3333152532577515e-01)
        y = tl.fma(y, z * z2, z)
    return _odd(x, tl.where(inverted, 1.5707963267948966 - y, y))


@triton.constexpr_function
def _sinc_coefficient(order, i):
    """Of (x^2)^i (times x, for odd orders) in the order-th derivative of the series of sin(x)/x:
    (-1)^k (2k)! / ((2k - n)! (2k + 1)!), the first k being the first with 2k >= n."""
    k = (order + 1) // 2 + i
    return (-1.0) ** k * math.factorial(2 * k) / (math.factorial(2 * k - order) * math.factorial(2 * k + 1))


@triton.jit
def _sinc_derivative(x, ORDER: tl.constexpr, MODE: tl.constexpr):
    """The ORDER-th derivative s_n of sin(x)/x: by its series below 2 + n/2, above by x s_n = sin(x + n pi/2) - n
    s_(n-1). Errors are relative to the largest abs(s_n), 1/(n + 1). At infinity, 0."""
    a = tl.abs(x)
    s, c = fi_sincos(x, MODE)
    if ORDER == 0:
        y = tl.where(x == 0, 1.0, s / x)
        if MODE == 1:  # the error of s is absolute: below 0.5 three terms of the series are nearer
            x2 = tl.minimum(a, 0.5) * tl.minimum(a, 0.5)
            near = tl.fma(x2, -1.984126984126984e-04, 8.333333333333333e-03)
            near = tl.fma(x2, tl.fma(x2, near, -1.6666666666666666e-01), 1.0)
            y = tl.where(a < 0.5, near, y)
    else:
        small = a < 2.0 + 0.5 * ORDER
        near = tl.where(small, x, 0.0)
        far = tl.where(small, 2.0 + 0.5 * ORDER, x)  # finite, though not a value of the function, where unused
        y = s / far
        for n in tl.static_range(1, ORDER + 1):
            if n % 4 == 0:
                y = (s - n * y) / far
            elif n % 4 == 1:
                y = (c - n * y) / far
            elif n % 4 == 2:
                y = (-s - n * y) / far
            else:
                y = (-c - n * y) / far
        TERMS: tl.constexpr = 18 if MODE == 2 else 12
        x2 = near * near
        series = tl.zeros_like(x2) + _sinc_coefficient(ORDER, TERMS - 1)
        for i in tl.static_range(TERMS - 1):
            if MODE == 2:
                series = series * x2 + _sinc_coefficient(ORDER, TERMS - 2 - i)
            else:
                series = tl.fma(series, x2, _sinc_coefficient(ORDER, TERMS - 2 - i))
        if ORDER % 2 == 1:
            series = series * near
        y = tl.where(small, series, y)
    return tl.where(a == float("inf"), 0.0, y)


@triton.jit
def fi_sinc0(x, MODE: tl.constexpr):
    return _sinc_derivative(x, 0, MODE)


@triton.jit
def fi_sinc1(x, MODE: tl.constexpr):
    return _sinc_derivative(x, 1, MODE)


@triton.jit
def fi_sinc2(x, MODE: tl.constexpr):
    return _sinc_derivative(x, 2, MODE)


@triton.jit
def fi_sinc3(x, MODE: tl.constexpr):
    return _sinc_derivative(x, 3, MODE)


@triton.jit
def fi_sinc4(x, MODE: tl.constexpr):
    return _sinc_derivative(x, 4, MODE)


@triton.jit
def fi_sinc5(x, MODE: tl.constexpr):
    return _sinc_derivative(x, 5, MODE)


@triton.jit
def fi_sinc6(x, MODE: tl.constexpr):
    return _sinc_derivative(x, 6, MODE)
