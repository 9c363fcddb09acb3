"""The elementwise primitives of the generated maps, in plain PyTorch (the reference).

Each takes and returns tensors or Python floats, and can be differentiated by PyTorch itself.
"""

from __future__ import annotations

import inspect
import math

import torch

Value = torch.Tensor | float


def _unary(of_tensor, of_float):
    def primitive(x: Value) -> Value:
        """Computes the function of this name, of a tensor or of a number."""
        return of_tensor(x) if isinstance(x, torch.Tensor) else of_float(x)

    primitive.composite = inspect.isfunction(of_tensor)  # type: ignore[attr-defined]
    return primitive


def _tensor(x: Value) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)


def _by_tensor(of_tensor):
    def primitive(*args: Value) -> Value:
        """Computes the function of this name, of tensors and numbers."""
        if any(isinstance(a, torch.Tensor) for a in args):
            like = next(a for a in args if isinstance(a, torch.Tensor))
            return of_tensor(*(a if isinstance(a, torch.Tensor) else torch.full_like(like, a) for a in args))
        return of_tensor(*map(_tensor, args)).item()

    primitive.composite = inspect.isfunction(of_tensor)  # type: ignore[attr-defined]
    return primitive


sin = _unary(torch.sin, math.sin)
cos = _unary(torch.cos, math.cos)
tan = _unary(torch.tan, math.tan)
exp = _unary(torch.exp, math.exp)
log = _unary(torch.log, math.log)
log1p = _unary(torch.log1p, math.log1p)
expm1 = _unary(torch.expm1, math.expm1)
tanh = _unary(torch.tanh, math.tanh)
sinh = _unary(torch.sinh, math.sinh)
cosh = _unary(torch.cosh, math.cosh)
atan = _unary(torch.atan, math.atan)
erf = _unary(torch.erf, math.erf)
sqrt = _unary(torch.sqrt, math.sqrt)
abs = _unary(torch.abs, math.fabs)
sigmoid = _by_tensor(torch.sigmoid)
softplus = _by_tensor(lambda x: torch.logaddexp(x, torch.zeros_like(x)))
sign = _by_tensor(torch.sign)
step = _by_tensor(lambda x: (x > 0).to(x.dtype))
saturate = _by_tensor(lambda x: torch.clamp(x, -40.0, 40.0))
detach = _by_tensor(torch.detach)
# at equal values the derivative is that of the second, as in the generated maps: relu = Max(z, 0) has 0 at 0
minimum = _by_tensor(lambda a, b: torch.where((a < b) | torch.isnan(a), a, b))
maximum = _by_tensor(lambda a, b: torch.where((a > b) | torch.isnan(a), a, b))
gt = _by_tensor(lambda a, b: (a > b).to(a.dtype))
ge = _by_tensor(lambda a, b: (a >= b).to(a.dtype))
lt = _by_tensor(lambda a, b: (a < b).to(a.dtype))
le = _by_tensor(lambda a, b: (a <= b).to(a.dtype))
eq = _by_tensor(lambda a, b: (a == b).to(a.dtype))
where = _by_tensor(lambda c, a, b: torch.where(c != 0, a, b))
pow = _by_tensor(torch.pow)


def _sinc_derivative(x: torch.Tensor, order: int) -> torch.Tensor:
    """Compute the order-th derivative of sin(x)/x.

    Below abs(x) = 2 + order / 2 by the series sum_k (-1)^k x^(2k - n) (2k)! / ((2k - n)! (2k + 1)!), whose terms fall
    below 2^-60 of the largest; above by the recurrence x s_n = sin(x + n pi/2) - n s_(n-1).
    """
    limit = 2.0 + order / 2
    small = torch.abs(x) < limit
    near = torch.where(small, x, torch.zeros_like(x))
    first = (order + 1) // 2  # the first k with 2k >= n
    coefficients = [
        (-1.0) ** k * math.factorial(2 * k) / (math.factorial(2 * k - order) * math.factorial(2 * k + 1))
        for k in range(first, first + 18)
    ]
    square = near * near
    series = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        series = series * square + c
    if order % 2:
        series = series * near
    far = torch.where(small, torch.full_like(x, limit), x)
    sine, cosine = torch.sin(far), torch.cos(far)
    cycle = (sine, cosine, -sine, -cosine)
    value = sine / far
    for n in range(1, order + 1):
        value = (cycle[n % 4] - n * value) / far
    # at infinity sin and cos have no value, but every derivative of sinc is 0 there
    value = torch.where(torch.isinf(far), torch.zeros_like(x), value)
    return torch.where(small, series, value)


def _sinc(order: int):
    return _by_tensor(lambda x: _sinc_derivative(x, order))


sinc0, sinc1, sinc2, sinc3, sinc4, sinc5, sinc6 = (_sinc(n) for n in range(7))
