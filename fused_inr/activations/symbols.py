"""Functions that a formula may use beside sympy's own: stable primitives with their own code on every target.

`sigmoid(x)`, `softplus(x)` = log(1 + exp(x)) without overflow, `saturate(x)` = x limited to [-40, 40] with derivative 1
(for exp(-saturate(x)**2), whose derivatives then vanish at infinity), `detach(x)` = x with derivative 0,
`step(x)` = 1 where x > 0, `expm1(x)` = exp(x) - 1 and `log1p(x)` = log(1 + x) exact near 0, `keep(x)` = x, a whole that
sympy does not rearrange.
"""

import sympy


def _primitive(name: str, text: str) -> type[sympy.Function]:
    return type(name, (sympy.Function,), {"__doc__": text, "fused_inr_primitive": name, "is_real": True, "nargs": 1})


sigmoid = _primitive("sigmoid", "1 / (1 + exp(-x)).")
softplus = _primitive("softplus", "log(1 + exp(x)), without overflow.")
saturate = _primitive("saturate", "x limited to [-40, 40], with derivative 1.")
detach = _primitive("detach", "x, with derivative 0.")
step = _primitive("step", "1 where x > 0, else 0.")
keep = _primitive("keep", "x, a whole that sympy does not rearrange.")
expm1 = _primitive("expm1", "exp(x) - 1, exact near 0.")
log1p = _primitive("log1p", "log(1 + x), exact near 0.")
