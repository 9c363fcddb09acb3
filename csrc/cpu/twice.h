// Two vectors side by side as one: what is done to it is done to both, operation by operation. An elementwise function is a
// chain of dependent steps, each of a few cycles; two chains between each other fill the time in which one waits.
#pragma once

#include "vec.h"

namespace fused_inr {

template <class M>
struct TwiceMask {
  M lo, hi;

  TwiceMask() = default;
  FI_MEMBER TwiceMask(M l, M h) : lo(l), hi(h) {}

#define FI_BOTH(op)                                                                                                   \
  friend FI_MEMBER TwiceMask operator op(TwiceMask a, TwiceMask b) { return {M(a.lo op b.lo), M(a.hi op b.hi)}; } \
  friend FI_MEMBER TwiceMask operator op(TwiceMask a, int b) { return {M(a.lo op b), M(a.hi op b)}; }
  FI_BOTH(+)
  FI_BOTH(-)
  FI_BOTH(&)
  FI_BOTH(|)
  FI_BOTH(^)
  FI_BOTH(<<)
  FI_BOTH(>>)
  FI_BOTH(<)
  FI_BOTH(>)
#undef FI_BOTH
  // b - 0: every lane b
  template <class B>
  friend FI_MEMBER TwiceMask operator-(B b, TwiceMask z) { return {M(b - z.lo), M(b - z.hi)}; }
  FI_MEMBER TwiceMask operator~() const { return {~lo, ~hi}; }
  FI_MEMBER TwiceMask& operator+=(int b) { return *this = *this + b; }
};

template <class V>
struct Twice {
  using scalar = typename V::scalar;
  using Bits = typename V::Bits;
  using Mask = TwiceMask<typename V::Mask>;
  static constexpr int size = 2 * V::size;
  static constexpr int bytes = 2 * V::bytes;

  V lo, hi;

  Twice() = default;
  FI_MEMBER Twice(V l, V h) : lo(l), hi(h) {}
  FI_MEMBER Twice(double s) : lo(s), hi(s) {}

  static FI_MEMBER Twice load(const scalar* p) { return {V::load(p), V::load(p + V::size)}; }
  FI_MEMBER void store(scalar* p) const {
    lo.store(p);
    hi.store(p + V::size);
  }
  static FI_MEMBER Twice from_bits(Mask m) { return {V::from_bits(m.lo), V::from_bits(m.hi)}; }
  FI_MEMBER Mask bits() const { return {lo.bits(), hi.bits()}; }

  FI_MEMBER Twice operator-() const { return {-lo, -hi}; }
  FI_MEMBER Twice& operator+=(Twice b) {
    lo += b.lo;
    hi += b.hi;
    return *this;
  }
#define FI_BOTH(result, op)                                                                                   \
  friend FI_MEMBER result operator op(Twice a, Twice b) { return {a.lo op b.lo, a.hi op b.hi}; }
  FI_BOTH(Twice, +)
  FI_BOTH(Twice, -)
  FI_BOTH(Twice, *)
  FI_BOTH(Twice, /)
  FI_BOTH(Mask, <)
  FI_BOTH(Mask, <=)
  FI_BOTH(Mask, >)
  FI_BOTH(Mask, >=)
  FI_BOTH(Mask, ==)
  FI_BOTH(Mask, !=)
#undef FI_BOTH
};

template <class V>
FI_INLINE Twice<V> select(typename Twice<V>::Mask m, Twice<V> a, Twice<V> b) {
  return {select(m.lo, a.lo, b.lo), select(m.hi, a.hi, b.hi)};
}
template <class V>
FI_INLINE Twice<V> select_by_sign(typename Twice<V>::Mask m, Twice<V> a, Twice<V> b) {
  return {select_by_sign(m.lo, a.lo, b.lo), select_by_sign(m.hi, a.hi, b.hi)};
}
template <class V>
FI_INLINE Twice<V> absolute(Twice<V> x) {
  return {absolute(x.lo), absolute(x.hi)};
}
template <class V>
FI_INLINE Twice<V> copy_sign(Twice<V> magnitude, Twice<V> sign) {
  return {copy_sign(magnitude.lo, sign.lo), copy_sign(magnitude.hi, sign.hi)};
}
template <class M>
FI_INLINE bool any(TwiceMask<M> m) {
  return any(m.lo | m.hi);
}
template <class V>
FI_INLINE Twice<V> fma(Twice<V> a, Twice<V> b, Twice<V> c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
template <class V>
FI_INLINE Twice<V> fnma(Twice<V> a, Twice<V> b, Twice<V> c) {
  return {fnma(a.lo, b.lo, c.lo), fnma(a.hi, b.hi, c.hi)};
}
template <class V>
FI_INLINE Twice<V> less_exactly(Twice<V> x, Twice<V> n, double part1, double part2) {
  return {less_exactly(x.lo, n.lo, part1, part2), less_exactly(x.hi, n.hi, part1, part2)};
}
template <class V>
FI_INLINE Twice<V> square_root(Twice<V> a) {
  return {square_root(a.lo), square_root(a.hi)};
}

}  // namespace fused_inr
