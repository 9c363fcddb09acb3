"""LSUV: layer-sequential unit variance (Mishkin and Matas 2016), for each branch, on real data.

Layer after layer, with what the layers before it make of the data: each branch's weights are scaled until the standard
deviation of its pre-activation, over rows and features, is its target. It needs no formula of the activation, so it
serves networks that VI3NR cannot look into (skip connections, LayerNorm, gates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._checks import described, finite_float, one_of, positive_int
from .walk import chain, fused_layers, is_fused, refuse_computed, warn_of_others, watch
from .weights import vi3nr_orthogonal_


@dataclass
class _Product:
    """A product that the data passes: its weight in blocks of rows, one a branch."""

    name: str
    weight: Tensor
    bias: Tensor | None
    branches: int
    targets: list[float] | None = None


def lsuv_init_(
    module: nn.Module,
    sample_input: Tensor,
    target_std: float | Sequence[float | Sequence[float] | None] = 1.0,
    *,
    tolerance: float = 0.02,
    iterations: int = 10,
    start: str = "orthogonal",
    bias: str = "zero",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Scale the weights of a network until every pre-activation has its standard deviation on `sample_input`.

    Args:
        module: one of our layers or models, or any module whose products are `nn.Linear` or `F.linear` with a parameter
            as weight; skip connections and normalisation may be in it. A product that runs several times counts where
            it runs first.
        sample_input: what the network is given, e.g. coordinates [.., in_features]: enough rows to stand for the data.
        target_std: of z = W x + b (before omega): one for all; or a sequence with one entry a product in the order of
            the data, an entry being a number, one a branch (SplitNet: tanh, sigmoid, sin, cos), or None: not touched.
        tolerance: largest relative difference from the target that is accepted, > 0.
        iterations: passes over the data, at most; two do it unless rounding or a bias are in the way.
        start: "orthogonal" (`vi3nr_orthogonal_`, each branch by itself) or "keep": scale the weights that are there.
        bias: "zero", or "keep": not scaled, and part of z, so that the weights make up what it leaves of the target.
        generator: source of the orthogonal start; PyTorch's global one if None.

    Returns `module`. Branches of modules that are not ours are found by torch.fx where it can trace them; else a weight
    is one branch. Dropout is off meanwhile. Raises TypeError or ValueError for other arguments, and RuntimeError naming
    the layer where a target cannot be reached (a constant input, a kept bias that varies more than the target,
    values that are not finite, too few iterations); the parameters are then as they were.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a network or a layer, got {type(module).__name__}")
    if not isinstance(sample_input, Tensor) or not sample_input.is_floating_point():
        raise TypeError(f"sample_input must be a floating-point tensor, got {described(sample_input)}")
    if sample_input.dim() == 0:
        raise ValueError("sample_input must have shape [.., in_features], got a scalar")
    if sample_input.numel() == 0 or not bool(torch.isfinite(sample_input).all()):
        raise ValueError("sample_input must have rows and be finite")
    tolerance = finite_float("tolerance", tolerance, above=0)
    iterations = positive_int("iterations", iterations)
    one_of("start", start, ("orthogonal", "keep"))
    one_of("bias", bias, ("zero", "keep"))
    if any(p.is_meta for p in module.parameters()):
        return module
    covered = _refuse_computed(module)
    products = _products(module, sample_input)
    warn_of_others(module, covered, "lsuv_init_")
    _set_targets(products, target_std)
    touched = [p for p in products if p.targets is not None]
    before = [(t, t.detach().clone()) for p in touched for t in (p.weight, p.bias) if t is not None]
    try:
        with torch.no_grad():
            for p in touched:
                if start == "orthogonal":
                    vi3nr_orthogonal_(p.weight, 1.0, generator, branches=p.branches)
                if bias == "zero" and p.bias is not None:
                    p.bias.zero_()
        _scale(module, sample_input, {p.name: p for p in touched}, tolerance, iterations)
    except BaseException:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
        raise
    return module


def _refuse_computed(module: nn.Module) -> list[nn.Module]:
    """Return the modules whose products count.

    Raises:
        ValueError: a weight that is computed before each call.
    """
    covered = [m for m in module.modules() if isinstance(m, nn.Linear) or is_fused(m)]
    for name, m in module.named_modules():
        if isinstance(m, nn.Linear) or (is_fused(m) and not hasattr(m, "linear")):
            if not isinstance(m._parameters.get("weight"), nn.Parameter):
                refuse_computed(name, m)
                raise ValueError(
                    f"{name}: its weight is parametrised, and LSUV scales plain ones; take the parametrisation off "
                    "(torch.nn.utils.parametrize.remove_parametrizations), initialise, and put it on again"
                )
    return covered


def _products(module: nn.Module, sample_input: Tensor) -> list[_Product]:
    """Return the products that `sample_input` passes, in that order."""
    branches: dict[int, int] = {}
    if any(is_fused(m) for m in module.modules()):
        weights = [getattr(getattr(layer, "linear", layer), "weight", None) for layer in fused_layers(module)]
        branches = {id(w): m.activation.branches for w, m in zip(weights, fused_layers(module)) if w is not None}
    try:
        branches |= {id(link.weight): link.branches for link in chain(module).links}
    except ValueError:
        pass  # no chain: nothing is known of the functions, and nothing needs to be
    found: dict[str, _Product] = {}

    def visit(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if name not in found:
            found[name] = _Product(name, weight, bias, branches.get(id(weight), 1))
        return nn.functional.linear(x, weight, bias)

    with torch.no_grad(), watch(module, visit):
        module(sample_input)
    if not found:
        raise ValueError(
            f"module: {type(module).__name__} computes no product by nn.Linear, F.linear or a fused layer "
            "with one of its parameters as weight"
        )
    return list(found.values())


def _set_targets(products: list[_Product], target_std: object) -> None:
    name = "target_std"
    if not isinstance(target_std, Sequence) or isinstance(target_std, str):
        number = finite_float(name, target_std, above=0)
        for p in products:
            p.targets = [number] * p.branches
        return
    if len(target_std) != len(products):
        places = ", ".join(p.name for p in products)
        raise ValueError(f"{name} must have one entry a layer, {len(products)} ({places}), got {len(target_std)}")
    for p, entry in zip(products, target_std):
        if entry is None:
            continue
        if isinstance(entry, Sequence) and not isinstance(entry, str):
            if len(entry) != p.branches:
                raise ValueError(f"{name}: {p.name} has {p.branches} branches, got {len(entry)} numbers for it")
            p.targets = [finite_float(name, value, above=0) for value in entry]
        else:
            p.targets = [finite_float(name, entry, above=0)] * p.branches


def _scale(
    module: nn.Module, sample_input: Tensor, products: dict[str, _Product], tolerance: float, iterations: int
) -> None:
    """Pass the data through until a pass finds nothing left to do; each pass scales on its way."""
    seen: set[str] = set()
    off: dict[str, tuple[int, float, float]] = {}

    def visit(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        p = products.get(name)
        if p is not None and name not in seen:
            seen.add(name)
            z = nn.functional.linear(x, weight, None).double().reshape(-1, weight.shape[0])
            blocks = zip(z.chunk(p.branches, 1), weight.detach().chunk(p.branches), p.targets or ())
            for b, (block, rows, target) in enumerate(blocks):
                offset = torch.zeros(1) if bias is None else bias.detach().double().chunk(p.branches)[b]
                std = (block + offset).std(correction=0).item()
                if not abs(std / target - 1) <= tolerance:
                    off[name] = b, std, target
                    rows.mul_(_factor(name, block, offset, target))
        return nn.functional.linear(x, weight, bias)

    for _ in range(iterations):
        seen.clear()
        off.clear()
        with torch.no_grad(), watch(module, visit):
            module(sample_input)
        if not off:
            return
    name, (b, std, target) = next(iter(off.items()))
    raise RuntimeError(
        f"{name}, branch {b}: standard deviation {std:.4g} after {iterations} iterations, {target:.4g} was asked for "
        f"within {tolerance:g}; allow more iterations or a larger tolerance"
    )


def _factor(name: str, z: Tensor, offset: Tensor, target: float) -> float:
    """Solve std(s z + offset) = target for s > 0: s^2 var(z) + 2 s cov(z, offset) + var(offset) = target^2."""
    square = z.var(correction=0).item()
    if not math.isfinite(square):
        raise RuntimeError(f"{name}: its pre-activation is not finite on sample_input")
    if square == 0:
        raise RuntimeError(f"{name}: its input is constant 0 on sample_input, so no scale gives it a spread")
    offset = offset.expand_as(z)
    fixed = offset.var(correction=0).item()
    together = ((z - z.mean()) * (offset - offset.mean())).mean().item()
    root = together * together - square * (fixed - target * target)
    factor = (math.sqrt(root) - together) / square if root >= 0 else -1.0
    if factor <= 0:
        raise RuntimeError(
            f"{name}: its bias alone has standard deviation {math.sqrt(fixed):.4g}, more than target_std "
            f"= {target:.4g}; take bias='zero', or a larger target"
        )
    return factor
