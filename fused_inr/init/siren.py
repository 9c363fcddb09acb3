"""Initialises sine networks (SIREN, Sitzmann et al. 2020), with its two constants free.

    first layer     W ~ U(-flic / n, flic / n)
    other layers    W ~ U(-sqrt(initc / n) / omega, sqrt(initc / n) / omega)

n is the fan-in; omega multiplies the whole pre-activation afterwards, so that omega z has unit variance in the hidden
layers for the original constants flic = 1 and initc = 6. The tuned pair is flic = 2, initc = 40 (better on images and
audio, worse on video). Biases keep PyTorch's default U(-1/sqrt(n), 1/sqrt(n)), as in the published code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._checks import boolean, described, finite_float
from .walk import assign, fused_layers, holder_of, refuse_computed, sees_coordinates, warn_of_others

#: The tuned pair as arguments: `siren_init_(net, **TUNED)`, `SIREN(..., **TUNED)`.
TUNED = {"flic": 2.0, "initc": 40.0}


def siren_uniform_(
    weight: Tensor,
    is_first: bool,
    omega: float | Tensor,
    flic: float = 1.0,
    initc: float = 6.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill `weight` [out, n] in place from U(-b, b), b = flic / n if `is_first`, else sqrt(initc / n) / abs(omega).

    Args:
        weight: floating-point tensor [out, n].
        is_first: whether the layer's input are the coordinates.
        omega: what the layer multiplies its pre-activation by: a number, or a tensor of shape [] or [out] (one for
            each row). Not used in a first layer.
        flic: first-layer constant, > 0.
        initc: hidden-layer constant, > 0.
        generator: source of random numbers; PyTorch's global one if None.

    Returns `weight`. Raises TypeError or ValueError for anything else, naming the argument.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a floating-point tensor [out, fan_in], got {described(weight)}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must be a matrix [out, fan_in] with fan_in >= 1, got {described(weight)}")
    boolean("is_first", is_first)
    flic = finite_float("flic", flic, above=0)
    initc = finite_float("initc", initc, above=0)
    fan_in = weight.shape[1]
    with torch.no_grad():
        if is_first:
            return weight.uniform_(-flic / fan_in, flic / fan_in, generator=generator)
        if isinstance(omega, Tensor) and omega.dim():
            if omega.shape != weight.shape[:1]:
                raise ValueError(
                    f"omega must be a number or a tensor of shape [] or [{weight.shape[0]}], got {described(omega)}"
                )
            if omega.device.type != "meta" and not bool((torch.isfinite(omega) & (omega != 0)).all()):
                raise ValueError("omega must be finite and not 0 in every feature")
            bound = math.sqrt(initc / fan_in) / omega.detach().abs().to(weight)
            return weight.uniform_(-1.0, 1.0, generator=generator).mul_(bound.unsqueeze(1))
        number = 1.0 if isinstance(omega, Tensor) and omega.device.type == "meta" else finite_float("omega", omega)
        if number == 0:
            raise ValueError("omega must not be 0")
        limit = math.sqrt(initc / fan_in) / abs(number)
        return weight.uniform_(-limit, limit, generator=generator)


def siren_init_(
    module: nn.Module,
    *,
    is_first: bool | None = None,
    omega: float | Tensor | None = None,
    flic: float = 1.0,
    initc: float = 6.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Give the weights of a fused layer, or of all fused layers of a network, their SIREN distribution, in place.

    Args:
        module: a fused layer, or a model or `nn.Sequential` of them.
        is_first: whether the first layer found sees the coordinates; by default its own `is_first`, else True for a
            network and False for a single layer.
        omega: by default each layer's own parameter `omega` (the mean over features counts where it is the layer
            before that has it: a last linear layer takes that of the layer before it, as the published code does).
        flic, initc: the constants of `siren_uniform_`.
        generator: source of random numbers; PyTorch's global one if None.

    Biases stay as they are, and so do weights outside the fused layers, which a warning names; parametrised weights are
    assigned. Returns `module`. Raises ValueError where a layer has no omega and none is given.
    """
    layers = fused_layers(module)
    is_first = sees_coordinates(module, layers) if is_first is None else boolean("is_first", is_first)
    names = {id(m): name for name, m in module.named_modules()}
    holders = [holder_of(names[id(layer)], layer) for layer in layers]
    for layer, holder in zip(layers, holders):
        refuse_computed(names[id(layer)], holder)
    warn_of_others(module, holders, "siren_init_")
    previous = None
    for layer, holder in zip(layers, holders):
        own = layer.activation_with_parameters().params.get("omega")
        if own is None and previous is not None:
            own = previous
        chosen = omega if omega is not None else own
        if chosen is None:
            if not is_first:
                raise ValueError(
                    f"siren initialisation: the activation {layer.activation!r} has no parameter omega; "
                    "give omega=..., or choose init='default' or init='vi3nr'"
                )
            chosen = 1.0
        if isinstance(chosen, Tensor) and chosen.dim():
            chosen = chosen.repeat(layer.activation.branches)
        plain = isinstance(holder._parameters.get("weight"), nn.Parameter)
        weight = layer.weight if plain else layer.weight.detach().clone()
        siren_uniform_(weight, is_first, chosen, flic, initc, generator)
        if not plain:
            assign(holder, weight)
        previous = own.detach().mean() if isinstance(own, Tensor) else own
        is_first = False
    return module
