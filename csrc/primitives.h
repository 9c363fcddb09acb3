// The elementwise primitives of the generated maps (`generated/activations.h`).
//
// Every one takes and returns V: a `Vec<T, Bytes>` on CPUs, a `Scalar<T>` on a CUDA device, where FI_ONE_LANE is 1 (set it
// to run the device's functions on the host).
//
// Accuracy in float32 (tests/test_cpu_primitives.py): sin, cos, sincos within 2 ulp, also at the floats nearest to
// k pi/2, for every finite argument (beyond `kTrigLimit` the C library serves, lane by lane, in double precision); all
// others within 4 ulp, sinc and its derivatives within 2^-22 of the largest value. NaN, infinities, signed zeros and
// subnormals as the C library. float64 is here for correctness: the C library, lane by lane.
#pragma once

#if defined(__CUDACC__) && !defined(FI_ONE_LANE)
#define FI_ONE_LANE 1
#endif

#if FI_ONE_LANE
#include "cuda/scalar.h"
#else
#define FI_INLINE static inline __attribute__((always_inline))
#include "cpu/vec.h"
#define FI_COLD static __attribute__((noinline, cold, unused))
#define FI_CALL static __attribute__((noinline, unused))
#define FI_UNROLL _Pragma("GCC unroll 8")
#endif

namespace fused_inr {

// -- helpers

template <class V>
inline constexpr bool is_float = sizeof(typename V::scalar) == 4;

// arguments after the first may be anything that converts to V
template <class V>
struct Same {
  using type = V;
};
template <class V>
using Other = typename Same<V>::type;

template <class V>
FI_INLINE V fi_const(double c) {
  return V(c);
}

template <class V>
FI_INLINE V polynomial(V, double c) {
  return V(c);
}
// c0 + c1 x + c2 x^2 ...
template <class V, class... C>
FI_INLINE V polynomial(V x, double c, C... rest) {
  return fma(polynomial(x, rest...), x, V(c));
}

template <class V>
FI_INLINE V nan_of() {
  return V(__builtin_nan(""));
}
template <class V>
FI_INLINE V infinity() {
  return V(__builtin_inf());
}

#if FI_ONE_LANE
#define FI_LANES(name, expression)         \
  template <class V>                       \
  FI_INLINE V name##_double(V value) {     \
    const double x = value.v;              \
    return V(expression);                  \
  }
#else
// Lane by lane through the C library; out of line, since it is called from hundreds of places.
#define FI_LANES(name, expression)                                                 \
  FI_CALL void name##_lanes(double* p, int n) {                                    \
    for (int i = 0; i < n; ++i) {                                                  \
      const double x = p[i];                                                       \
      p[i] = (expression);                                                         \
    }                                                                              \
  }                                                                                \
  template <class V>                                                               \
  FI_INLINE V name##_double(V x) {                                                 \
    alignas(64) double lane[V::size];                                              \
    x.store(lane);                                                                 \
    name##_lanes(lane, V::size);                                                   \
    return V::load(lane);                                                          \
  }
#endif
FI_LANES(sin, ::sin(x))
FI_LANES(cos, ::cos(x))
FI_LANES(tan, ::tan(x))
FI_LANES(exp, ::exp(x))
FI_LANES(log, ::log(x))
FI_LANES(log1p, ::log1p(x))
FI_LANES(expm1, ::expm1(x))
FI_LANES(tanh, ::tanh(x))
FI_LANES(sinh, ::sinh(x))
FI_LANES(cosh, ::cosh(x))
FI_LANES(erf, ::erf(x))
FI_LANES(atan, ::atan(x))
#undef FI_LANES

#if !FI_ONE_LANE
FI_CALL void sincos_lanes(const double* x, double* s, double* c, int n) {
  for (int i = 0; i < n; ++i) {
    s[i] = ::sin(x[i]);
    c[i] = ::cos(x[i]);
  }
}

template <class T>
FI_CALL void pow_lanes(const T* a, const T* b, T* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = static_cast<T>(::pow(static_cast<double>(a[i]), static_cast<double>(b[i])));
}
#endif

// -- sine and cosine

// Up to here n = round(x / pi) is exact and three parts of pi suffice; checked at the floats nearest to k pi/2.
inline constexpr double kTrigLimit = 1e5;

// The rounding of x by adding 1.5 * 2^23: the integer also stands in the low bits of the sum.
inline constexpr double kRound = 12582912.0;

#if !FI_HAS_FMA
template <class V>
FI_INLINE V less_exactly(V x, V n, double part1, double part2) {
  // without fused multiply-add the products round; in double precision 33 bits of pi times 17 of n are exact
  typedef double Wide __attribute__((vector_size(2 * V::bytes)));
  const Wide wx = __builtin_convertvector(x.v, Wide), wn = __builtin_convertvector(n.v, Wide);
  return V(__builtin_convertvector((wx - wn * part1) - wn * part2, typename V::Native));
}
#endif

// x less n times pi / (1 << Halvings), in two steps: after the first, `near`, products with it are right to float's precision;
// the second adds what counts close to a zero. The parts of pi are all positive (rounded towards zero), so that n = 0 leaves
// -0 as it is.
template <int Halvings, class V>
FI_INLINE V less_multiple(V x, V n, V& near) {
  constexpr double unit = 1.0 / (1 << Halvings);
#if FI_HAS_FMA
  near = fnma(n, V(0x1.921fb4p+1 * unit), x);  // exact
  near = fnma(n, V(0x1.4442dp-23 * unit), near);
  return fnma(n, V(0x1.84698ap-47 * unit), near);
#else
  return near = less_exactly(x, n, 0x1.921fb544p+1 * unit, 0x1.0b4611a626331p-33 * unit);
#endif
}

#if !FI_ONE_LANE
FI_COLD void slow_sin(const float* x, float* y, int n) {
  for (int i = 0; i < n; ++i)
    if (!(::fabsf(x[i]) <= static_cast<float>(kTrigLimit))) y[i] = static_cast<float>(::sin(static_cast<double>(x[i])));
}
FI_COLD void slow_cos(const float* x, float* y, int n) {
  for (int i = 0; i < n; ++i)
    if (!(::fabsf(x[i]) <= static_cast<float>(kTrigLimit))) y[i] = static_cast<float>(::cos(static_cast<double>(x[i])));
}

#endif

template <class V>
FI_INLINE bool beyond_trig_limit(V x) {  // or NaN
  return __builtin_expect(any(absolute(x).bits() > V(kTrigLimit).bits()), false);
}

#if !FI_ONE_LANE
template <class V>
FI_INLINE V with_slow_lanes(void (*slow)(const float*, float*, int), V x, V y) {
  alignas(64) float lanes[V::size], values[V::size];
  x.store(lanes);
  y.store(values);
  slow(lanes, values, V::size);
  return V::load(values);
}
#endif

// sin r on [-pi/2, pi/2], `near`: r but for its last bits. The 0 that the polynomial ends with makes u = 0 give +0, and -0 stay.
template <class V>
FI_INLINE V sin_half_turn(V near, V r) {
  const V u = near * near;
  return fma(r, polynomial(u, 0.0, -0.166666597, 0.00833306927, -0.000198097769, 2.6060957e-06), r);
}

template <class V>
FI_INLINE V fi_sin(V x) {
  if constexpr (!is_float<V>) {
    return sin_double(x);
  } else {
#if FI_ONE_LANE
    int32_t turns = 0;
    if (beyond_trig_limit(x)) x = far_remainder<1>(x, turns);
    const V t = fma(x, V(0.31830988618379067), V(kRound));
    V near;
    const V r = less_multiple<0>(x, t - V(kRound), near);
    return V::from_bits(sin_half_turn(near, r).bits() ^ ((t.bits() + turns) << 31));
#else
    const V t = fma(x, V(0.31830988618379067), V(kRound));
    V near;
    const V r = less_multiple<0>(x, t - V(kRound), near);
    const V y = sin_half_turn(near, r);
    const V signed_y = V::from_bits(y.bits() ^ (t.bits() << 31));
    return beyond_trig_limit(x) ? with_slow_lanes(slow_sin, x, signed_y) : signed_y;
#endif
  }
}

// sin and cos of x reduced to [-pi/4, pi/4], and the quadrant in the low bits of q
template <class V>
FI_INLINE void quadrant(V x, V& sine, V& cosine, typename V::Mask& q) {
#if FI_ONE_LANE
  int32_t turns = 0;
  if (beyond_trig_limit(x)) x = far_remainder<2>(x, turns);
#endif
  const V t = fma(x, V(0.63661977236758138), V(kRound));
  V near;
  const V r = less_multiple<1>(x, t - V(kRound), near);
  q = t.bits();
#if FI_ONE_LANE
  q += turns;
#endif
  const V u = near * near;
  sine = fma(r, polynomial(u, 0.0, -0.166666552, 0.00833218917, -0.000195182846), r);  // as in sin_half_turn
  cosine = polynomial(u, 1.0, -0.5, 0.0416666456, -0.00138873095, 2.44323273e-05);
}

// a where the sign bit of m is set, else b
template <class V>
FI_INLINE V by_sign(typename V::Mask m, V a, V b) {
#if FI_ONE_LANE
  return select(m < 0, a, b);
#else
  return select_by_sign(m, a, b);
#endif
}

// sin and cos in the quadrant q: exchanged in the odd ones; the signs of sin are those of bit 1 of q, of cos of bit 1 of q + 1
template <class V>
FI_INLINE V sin_of_quadrant(V sine, V cosine, typename V::Mask q) {
  return V::from_bits(by_sign(q << 31, cosine, sine).bits() ^ ((q << 30) & sign_bit<V>()));
}
template <class V>
FI_INLINE V cos_of_quadrant(V sine, V cosine, typename V::Mask q) {
  return V::from_bits(by_sign(q << 31, sine, cosine).bits() ^ (((q << 31) ^ (q << 30)) & sign_bit<V>()));
}

// One reduction serves both.
template <class V>
FI_INLINE void fi_sincos(V x, V& s, V& c) {
  if constexpr (!is_float<V>) {
#if FI_ONE_LANE
    ::sincos(x.v, &s.v, &c.v);
#else
    alignas(64) double lanes[V::size], sines[V::size], cosines[V::size];
    x.store(lanes);
    sincos_lanes(lanes, sines, cosines, V::size);
    s = V::load(sines);
    c = V::load(cosines);
#endif
  } else {
    V sine, cosine;
    typename V::Mask q;
    quadrant(x, sine, cosine, q);
    const V ys = sin_of_quadrant(sine, cosine, q);
    const V yc = cos_of_quadrant(sine, cosine, q);
#if FI_ONE_LANE
    s = ys;
    c = yc;
#else
    const bool slow = beyond_trig_limit(x);
    s = slow ? with_slow_lanes(slow_sin, x, ys) : ys;
    c = slow ? with_slow_lanes(slow_cos, x, yc) : yc;
#endif
  }
}
template <class V>
FI_INLINE void fi_sincos(V x, V* s, V* c) {
  fi_sincos(x, *s, *c);
}

template <class V>
FI_INLINE V fi_cos(V x) {
  if constexpr (!is_float<V>) {
    return cos_double(x);
  } else {
    // not sin(x + pi/2) by the one longer polynomial, as fi_sin: cos 0 shall be 1
    V sine, cosine;
    typename V::Mask q;
    quadrant(x, sine, cosine, q);
    const V y = cos_of_quadrant(sine, cosine, q);
#if FI_ONE_LANE
    return y;
#else
    return beyond_trig_limit(x) ? with_slow_lanes(slow_cos, x, y) : y;
#endif
  }
}

template <class V>
FI_INLINE V fi_tan(V x) {
  if constexpr (!is_float<V>) {
    return tan_double(x);
  } else {
    V s, c;
    fi_sincos(x, s, c);
    return s / c;
  }
}

// -- exponential family

template <class V>
FI_INLINE V power_of_two(typename V::Mask n) {  // -126 <= n <= 127
  return V::from_bits((n + 127) << 23);
}

// e^x = 2^n (1 + p), for x in float's range
template <class V>
FI_INLINE void exp_parts(V x, typename V::Mask& n, V& p) {
  const V t = fma(x, V(1.4426950408889634), V(kRound));
  const V turns = t - V(kRound);
  n = t.bits() - V(kRound).bits();
  V r = fnma(turns, V(0.693359375), x);  // few bits: exact without fused multiply-add too
  r = fnma(turns, V(-2.12194440054690583e-4), r);
  p = fma(r * r, polynomial(r, 0.5, 0.166666672, 0.0416663401, 0.00833327137, 0.00139420596, 0.000199150323), r);
}

template <class V>
FI_INLINE V limit(V x, double low, double high) {  // NaN stays
  const V raised = select(x < V(low), V(low), x);
  return select(raised > V(high), V(high), raised);
}

// e^x 2^shift without intermediate overflow
template <class V>
FI_INLINE V exp_scaled(V x, int shift) {
  typename V::Mask n;
  V p;
  exp_parts(limit(x, -106.0, 90.0), n, p);
  n += shift;
  const typename V::Mask half = n >> 1;  // in two factors, so that subnormal results are reached
  return (V(1.0) + p) * power_of_two<V>(half) * power_of_two<V>(n - half);
}

template <class V>
FI_INLINE V fi_exp(V x) {
  if constexpr (!is_float<V>) {
    return exp_double(x);
  } else {
    return exp_scaled(x, 0);
  }
}

// for x <= 60
template <class V>
FI_INLINE V expm1_bounded(V x) {
  typename V::Mask n;
  V p;
  exp_parts(select(x < V(-30.0), V(-30.0), x), n, p);
  const V scale = power_of_two<V>(n);
  return fma(p, scale, scale - V(1.0));
}

template <class V>
FI_INLINE V fi_expm1(V x) {
  if constexpr (!is_float<V>) {
    return expm1_double(x);
  } else {
    const V small = select(x == V(0.0), x, expm1_bounded(select(x > V(60.0), V(60.0), x)));
    return select(x > V(30.0), exp_scaled(x, 0), small);
  }
}

template <class V>
FI_INLINE V fi_tanh(V x) {
  if constexpr (!is_float<V>) {
    return tanh_double(x);
  } else {
    const V a = absolute(x);
    const V t = expm1_bounded(V(2.0) * select(a > V(20.0), V(20.0), a));
    return copy_sign(t / (t + V(2.0)), x);
  }
}

template <class V>
FI_INLINE V fi_sinh(V x) {
  if constexpr (!is_float<V>) {
    return sinh_double(x);
  } else {
    const V a = absolute(x);
    const V t = expm1_bounded(select(a > V(2.0), V(2.0), a));
    const V e = exp_scaled(a, -1);
    return copy_sign(select(a < V(1.0), V(0.5) * (t + t / (t + V(1.0))), e - V(0.25) / e), x);
  }
}

template <class V>
FI_INLINE V fi_cosh(V x) {
  if constexpr (!is_float<V>) {
    return cosh_double(x);
  } else {
    const V e = exp_scaled(absolute(x), -1);
    return e + V(0.25) / e;
  }
}

template <class V>
FI_INLINE V fi_sigmoid(V x) {
  const V e = fi_exp(-absolute(x));
  return select(x < V(0.0), e, V(1.0)) / (V(1.0) + e);
}

// -- logarithms

template <class V>
FI_INLINE V fi_log(V x) {
  if constexpr (!is_float<V>) {
    return log_double(x);
  } else {
    const auto tiny = x < V(0x1p-126);
    const V scaled = select(tiny, x * V(0x1p23), x);
    const auto from_root = scaled.bits() - 0x3f3504f3;  // the bits of sqrt(1/2)
    const V f = V::from_bits((from_root & 0x7fffff) + 0x3f3504f3) - V(1.0);
    const V exponent = (V::from_bits((from_root >> 23) + V(kRound).bits()) - V(kRound)) - select(tiny, V(23.0), V(0.0));
    const V square = f * f;
    V y = square * f *
          polynomial(f, 0.333333105, -0.249999866, 0.200022265, -0.166692495, 0.142186552,
                     -0.123843722, 0.118730202, -0.117896847, 0.06915126);
    y = fma(exponent, V(-2.12194440054690583e-4), y);
    y = fma(V(-0.5), square, y) + f;
    y = fma(exponent, V(0.693359375), y);
    y = select(x == infinity<V>(), x, y);
    y = select(x == V(0.0), -infinity<V>(), y);
    return select(x >= V(0.0), y, nan_of<V>());
  }
}

template <class V>
FI_INLINE V fi_log1p(V x) {
  if constexpr (!is_float<V>) {
    return log1p_double(x);
  } else {
    // log(u) for the rounded u = 1 + x, and what the rounding lost
    const V u = V(1.0) + x;
    const V rest = (x - (u - V(1.0))) / u;
    const V y = fi_log(u) + select(u > V(0.0), rest, V(0.0));
    return select(x == V(0.0), x, select(x == infinity<V>(), x, y));
  }
}

template <class V>
FI_INLINE V fi_softplus(V x) {
  const V rest = fi_log1p(fi_exp(-absolute(x)));
  return select(x > V(0.0), x + rest, rest);
}

// -- others

template <class V>
FI_INLINE V fi_erf(V x) {
  if constexpr (!is_float<V>) {
    return erf_double(x);
  } else {
    const V a = absolute(x), u = x * x;
    const V near = fma(x, polynomial(u, 0.128379166, -0.376126349, 0.112837151, -0.0268605091,
                                     0.00520385895, -0.000817563909, 8.51310251e-05), x);
    const V b = select(a > V(4.0), V(4.0), a);
    const V q = polynomial(b, 0.000154503388, -1.12941563, -0.633552015, -0.108049802,
                           0.0249677114, -0.00411245832, 0.000422179408, -2.00178766e-05);
    return select(a < V(0.9), near, copy_sign(V(1.0) - exp_scaled(q, 0), x));
  }
}

template <class V>
FI_INLINE V fi_atan(V x) {
  if constexpr (!is_float<V>) {
    return atan_double(x);
  } else {
    const V a = absolute(x);
    const auto inverse = a > V(1.0);
    const V r = select(inverse, V(1.0) / a, a);
    const V u = r * r;
    const V y = fma(r * u,
                    polynomial(u, -0.333333284, 0.19999671, -0.142798319, 0.110582188, -0.0881107375,
                               0.0674155653, -0.0446893685, 0.0225393809, -0.00731772697, 0.00111374282),
                    r);
    return copy_sign(select(inverse, V(1.5707963267948966) - y, y), x);
  }
}

template <class V>
FI_INLINE V fi_sqrt(V x) {
  return square_root(x);
}

template <class V>
FI_INLINE V fi_pow(V a, Other<V> b) {
  using T = typename V::scalar;
#if FI_ONE_LANE
  return V(static_cast<T>(::pow(static_cast<double>(a.v), static_cast<double>(b.v))));
#else
  alignas(64) T base[V::size], exponent[V::size], value[V::size];
  a.store(base);
  b.store(exponent);
  pow_lanes(base, exponent, value, V::size);
  return V::load(value);
#endif
}

template <class V>
FI_INLINE V fi_abs(V x) {
  return absolute(x);
}
template <class V>
FI_INLINE V fi_sign(V x) {  // 0 at NaN, as torch.sign
  return select(x > V(0.0), V(1.0), select(x < V(0.0), V(-1.0), V(0.0)));
}
template <class V>
FI_INLINE V fi_step(V x) {
  return select(x > V(0.0), V(1.0), V(0.0));
}
template <class V>
FI_INLINE V fi_saturate(V x) {
  return limit(x, -40.0, 40.0);
}
template <class V>
FI_INLINE V fi_detach(V x) {
  return x;
}
template <class V>
FI_INLINE V fi_where(V c, Other<V> a, Other<V> b) {
  return select(c != V(0.0), a, b);
}
template <class V>
FI_INLINE V fi_gt(V a, Other<V> b) {
  return select(a > b, V(1.0), V(0.0));
}
template <class V>
FI_INLINE V fi_ge(V a, Other<V> b) {
  return select(a >= b, V(1.0), V(0.0));
}
template <class V>
FI_INLINE V fi_lt(V a, Other<V> b) {
  return select(a < b, V(1.0), V(0.0));
}
template <class V>
FI_INLINE V fi_le(V a, Other<V> b) {
  return select(a <= b, V(1.0), V(0.0));
}
template <class V>
FI_INLINE V fi_eq(V a, Other<V> b) {
  return select(a == b, V(1.0), V(0.0));
}
template <class V>
FI_INLINE V fi_minimum(V a, Other<V> b) {  // NaN where either is NaN
  return select((a < b) | (a != a), a, b);
}
template <class V>
FI_INLINE V fi_maximum(V a, Other<V> b) {
  return select((a > b) | (a != a), a, b);
}

// -- the derivatives of sin(x)/x

inline constexpr double kSincLimit[7] = {2.0, 2.0, 2.5, 3.0, 3.5, 3.75, 4.0};

// the k-th coefficient of the series, in x^(2k - order): (-1)^k / ((2k + 1) (2k - order)!)
constexpr double sinc_coefficient(int order, int k) {
  double factorial = 1.0;
  for (int i = 2; i <= 2 * k - order; ++i) factorial *= i;
  return (k % 2 ? -1.0 : 1.0) / ((2 * k + 1) * factorial);
}

template <int Order, int Index, int Count, class V>
FI_INLINE V sinc_series(V square) {
  constexpr double c = sinc_coefficient(Order, (Order + 1) / 2 + Index);
  if constexpr (Index + 1 == Count) {
    return V(c);
  } else {
    return fma(sinc_series<Order, Index + 1, Count>(square), square, V(c));
  }
}

// The series below kSincLimit, until its terms fall below 2^-27 (float) or 2^-60 (double) of the largest; above it the
// recurrence x s_n = sin(x + n pi/2) - n s_(n-1). At the limits both err by about 2^-23.
template <int Order, class V>
FI_INLINE V sinc_derivative(V x) {
  constexpr int terms = is_float<V> ? 8 + Order / 2 + (Order > 3) : 16 + Order / 2 + (Order > 3);
  constexpr double boundary = kSincLimit[Order];
  const auto small = absolute(x) < V(boundary);
  const V near = select(small, x, V(0.0));
  V series = sinc_series<Order, 0, terms>(near * near);
  if constexpr (Order % 2) series = series * near;
  const V far = select(small, V(boundary), x);
  V s, c;
  fi_sincos(far, s, c);
  const V cycle[4] = {s, c, -s, -c};
  V value = s / far;
  FI_UNROLL
  for (int n = 1; n <= Order; ++n) value = (cycle[n % 4] - V(static_cast<double>(n)) * value) / far;
  value = select(absolute(x) == infinity<V>(), V(0.0), value);
  return select(small, series, value);
}

#define FI_SINC(n)                 \
  template <class V>               \
  FI_INLINE V fi_sinc##n(V x) {    \
    return sinc_derivative<n>(x);  \
  }
FI_SINC(0)
FI_SINC(1)
FI_SINC(2)
FI_SINC(3)
FI_SINC(4)
FI_SINC(5)
FI_SINC(6)
#undef FI_SINC

}  // namespace fused_inr
