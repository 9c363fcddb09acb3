"""What counts as correct, in one table with its reasons; the checks of the benches and the GPU tests read it.

Two measures. `against_eager`: no further from float64 than twice what eager PyTorch is in the same types, for anything
whose bound would be as long as its program (networks, second derivatives). `layer_bounds`: an error bound for the
output and the first derivatives of one layer, element by element, from what rounding may have done to each intermediate
value.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation

#: unit roundoff of a stored value
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: what underflow may lose: float16's subnormal numbers lie 2^-24 apart, elsewhere subnormal numbers may become 0
TINY = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}
#: relative error of a factor in a product whose operands are rounded on the way into the matrix unit: TF32 keeps 10
#: bits, and both factors are rounded or cut. Half types go in as they are. bf16x3 keeps two pieces of 8 bits and drops
#: the product of the smaller ones; tf32x3 two of 11.
FACTOR = {"ieee": 0.0, "tf32": 2.0**-9, "tf32x3": 2.0**-19, "bf16x3": 2.0**-14, "bf16": 0.0, "fp16": 0.0}
#: absolute error of an activation or derivative relative to its largest values, where the hardware's approximations
#: serve (sin.approx and its like, 2^-21 absolute on their range, two of them in a product and one ulp for the
#: arithmetic around)
APPROXIMATE = dict.fromkeys(("ieee", "tf32x3", "bf16x3"), 2.0**-22) | dict.fromkeys(("tf32", "bf16", "fp16"), 2.0**-19)
#: how often an activation magnifies what the elementary functions inside it are off by, by its parameters: hosc's
#: tanh(beta sin(..)) has the slope beta
MAGNIFIED = {"hosc": "beta"}
#: how much further than eager a result may be, and how many units of the stored type are always granted: a result that
#: eager happens to hit exactly (a loss, one number) leaves twice nothing
TWICE, ALWAYS = 2.0, 8.0


#: how often `simulate_factors` draws: one number, a loss say, is sometimes hit by luck
DRAWS = 3


def against_eager(
    value: Tensor,
    eager: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    summed: int = 1,
    moved: Tensor | None = None,
    rounded: Sequence[Tensor] = (),
) -> dict[str, float]:
    """Errors of `value` and `eager` against `exact` (float64), relative to its largest value, and the bound in the same
    unit: twice eager's error, and what any order of summation is granted.

    `summed`: over how many rows each value is a sum; rounding in a float32 sum of n terms in a fixed order walks at
    random to about sqrt(n) 2^-24 of the result. `moved`: `exact` with such a walk simulated in every pre-activation
    (`simulate_rounding`); a map of high frequency magnifies it, and eager's library may happen to sum in a better
    order. `rounded`: `exact` with the factors of every product rounded as its precision says (`simulate_factors`): the
    largest error among them and eager's is what is doubled. Eager's library computes narrow products without tensor
    cores, and one number comes out nearly exact by luck. Nothing is claimed of elements beyond the stored type's range.
    `of_bound` is error / bound, NaN where `value` is not finite within it or the shapes differ.
    """
    if value.shape != exact.shape:
        return dict.fromkeys(("error", "eager_error", "bound", "of_bound"), math.nan)
    exact, value, eager = exact.double(), value.double(), eager.double()
    within = exact.abs() < torch.finfo(dtype).max
    scale = _largest(exact, within) or 1.0
    error, eager_error = (
        _largest(value - exact, within) / scale,
        _largest(eager - exact, within & eager.isfinite()) / scale,
    )
    usual = max([eager_error, *(_largest(t.double() - exact, within) / scale for t in rounded)])
    walk = summed**0.5 * UNIT[torch.float32] if summed > 1 else 0.0
    walk += _largest(moved.double() - exact, within) / scale if moved is not None else 0.0
    bound = TWICE * usual + ALWAYS * UNIT[dtype] + walk
    return {"error": error, "eager_error": eager_error, "bound": bound, "of_bound": error / bound}


def _largest(t: Tensor, where: Tensor) -> float:
    chosen = t[where].abs()
    return chosen.max().item() if chosen.numel() else 0.0


def simulate_rounding(module: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a float64 module whose every `nn.Linear` errs as a float32 sum of its K products may.

    Summing K + 1 terms t one after the other walks to a standard deviation of sqrt(K) 2^-24 |t|_2 / 2.4; normal numbers
    of 2.4 times that are added to each pre-activation, constant under differentiation.
    """
    module = copy.deepcopy(module)
    generators: dict[torch.device, torch.Generator] = {}

    def err(linear: nn.Linear, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor:
        with torch.no_grad():
            squares = torch.nn.functional.linear(inputs[0] ** 2, linear.weight**2)
            if linear.bias is not None:
                squares = squares + linear.bias**2
            if z.device not in generators:
                generators[z.device] = torch.Generator(z.device).manual_seed(seed)
            normal = torch.randn(z.shape, generator=generators[z.device], device=z.device, dtype=z.dtype)
            noise = UNIT[torch.float32] * linear.in_features**0.5 * squares.sqrt() * normal
        return z + noise

    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(err)
    return module


def simulate_factors(module: nn.Module, seed: int) -> nn.Module:
    """A copy of a float64 module in whose every `nn.Linear` both factors are off as if rounded to TF32: each by up to
    2^-11 of itself, constant under differentiation."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)

    def off(t: Tensor) -> Tensor:
        return t * (1 + 2.0**-11 * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1).to(t.device))

    def err(weight: Tensor, linear: nn.Linear, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor:
        with torch.no_grad():
            exact = torch.nn.functional.linear(inputs[0], linear.weight)
            noise = torch.nn.functional.linear(off(inputs[0]), weight) - exact
        return z + noise

    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(partial(err, off(part.weight.detach())))  # the same for all rows
    return module


def keeps(x: Tensor, activation: Activation) -> bool:
    """Whether the Triton kernels' forward keeps derivatives in x's type for the backward (`layer_bounds`)."""
    from .. import backends

    return backends.TABLE["triton"].keeps(x.dtype, activation.has_tensors) == "derivatives"


def layer_bounds(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    g: Tensor,
    precision: str,
    *,
    kept: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Exact values (float64) and error bounds of a layer's output and gradients: "y", "gx", "gw", "gb".

    x [M, K], weight [B N, K], bias [B N] or None, g [M, C N], in the stored types; the exact values are those of
    exactly these numbers. A pre-activation is off by dz = ((K + 3) u + f) (|x| |W|^T + |b|), u = 2^-24 the unit of the
    float32 accumulator (2^-53 for float64) and f the loss of a factor of the products; a value computed from it by at
    most as much as the map moves when each branch moves by dz, plus the accuracy of the activation and the rounding of
    what is stored. `kept`: derivatives of the outputs with respect to the branches are stored by the forward, and
    rounded to x's type (`Backend.keeps`).
    """
    stored = UNIT[x.dtype]
    unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    factor = FACTOR[precision]
    x64, w64, g64 = x.detach().double(), weight.detach().double(), g.detach().double()
    b64 = x64.new_zeros(weight.shape[0]) if bias is None else bias.detach().double()
    params = [p.detach().double() if isinstance(p, Tensor) else p for p in activation.params.values()]
    branches, outputs = activation.branches, activation.outputs
    rows, k = x.shape
    z = x64 @ w64.t() + b64
    dz = ((k + 3) * unit + factor) * (x64.abs() @ w64.abs().t() + b64.abs())
    zs, dzs, gs = z.chunk(branches, -1), dz.chunk(branches, -1), g64.chunk(outputs, -1)

    def value(at: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.expand_as(at[0]) for t in activation.map.torch_map(0)(*at, *params)], -1)

    def gradient(at: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.expand_as(at[0]) for t in activation.map.torch_map(1)(*at, *params, *gs)], -1)

    approximate = APPROXIMATE[precision] if x.dtype != torch.float64 else 2.0**-50
    if activation.name in MAGNIFIED:
        slope = activation.params[MAGNIFIED[activation.name]]
        approximate *= max(1.0, float(torch.as_tensor(slope).abs().max()))
    tiny = TINY[x.dtype]
    y, dy = _moved(value, zs, dzs)
    dy = dy + approximate * y.abs().max() + (4 * unit + stored) * (y.abs() + dy) + tiny
    gz, dgz = _moved(gradient, zs, dzs)
    # gz is kept in the compute type: half types round it, TF32 and half products read it rounded
    dgz = dgz + approximate * gz.abs().max() + (4 * unit + (stored if stored > unit else 0.0)) * (gz.abs() + dgz) + tiny
    if kept:
        for i in range(outputs):
            alone = [t if n == i else torch.zeros_like(t) for n, t in enumerate(gs)]
            parts = activation.map.torch_map(1)(*zs, *params, *alone)
            dgz = dgz + stored * torch.cat([t.expand_as(zs[0]) for t in parts], -1).abs()
    columns = gz.shape[-1]
    exact = {"y": y, "gx": gz @ w64, "gw": gz.t() @ x64, "gb": gz.sum(0)}
    loose = gz.abs() + dgz
    bound = {
        "y": dy,
        "gx": dgz @ w64.abs() + ((columns + 3) * unit + factor) * (loose @ w64.abs()),
        "gw": dgz.t() @ x64.abs() + ((rows + 3) * unit + factor) * (loose.t() @ x64.abs()),
        "gb": dgz.sum(0) + (rows + 3) * unit * loose.sum(0),
    }
    for name in ("gx", "gw", "gb"):
        bound[name] = bound[name] + stored * exact[name].abs() + tiny
    return exact, bound


def _moved(function, zs: Sequence[Tensor], dzs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The function's value, and the most it moves when each branch moves by up to its dz: seen at nine points a
    branch."""
    at = function(zs)
    total = torch.zeros_like(at)
    for i, (z, dz) in enumerate(zip(zs, dzs)):
        most = torch.zeros_like(at)
        for step in (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0):
            most = torch.maximum(most, (function([*zs[:i], z + step * dz, *zs[i + 1 :]]) - at).abs())
        total += most
    return at, total


def of_bound(value: Tensor, exact: Tensor, bound: Tensor) -> dict[str, Any]:
    """The largest error, and the largest share of its bound; NaN anywhere makes both NaN."""
    if value.shape != exact.shape:
        return {"error": float("nan"), "of_bound": float("nan"), "shape": list(value.shape)}
    if not value.numel():
        return {"error": 0.0, "of_bound": 0.0}
    error = (value.double() - exact).abs()
    share = error / bound.clamp_min(1e-300)
    return {"error": error.max().item(), "of_bound": share.max().item(), "largest": exact.abs().max().item()}
