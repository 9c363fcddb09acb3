"""Functions that a formula may use beside sympy's own: stable primitives with their own code on every target.

`sigmoid(x)`, `softplus(x)` = log(1 + exp(x)) without overflow, `saturate(x)` = x limited to [-40, 40] with derivative 1
(for exp(-saturate(x)**2), whose derivatives then vanish at infinity), `detach(x)` = x with derivative 0,
`step(x)` = 1 where x > 0, `keep(x)` = x, a whole that sympy does not rearrange.
"""

import sympy


def _primitive(name: str) -> type[sympy.Function]:
    return type(name, (sympy.Function,), {"fused_inr_primitive": name, "is_real": True, "nargs": 1})


sigmoid = _primitive("sigmoid")
softplus = _primitive("softplus")
saturate = _primitive("saturate")
detach = _primitive("detach")
step = _primitive("step")
keep = _primitive("keep")
