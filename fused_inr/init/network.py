"""VI3NR for whole layers and networks (`vi3nr_init_`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._checks import boolean, finite_float, one_of
from ..activations import Activation
from .siren import _described
from .vi3nr import _known_moment, default_sigma_p, vi3nr_input_gain
from .walk import Layer, fused_layers, sees_coordinates
from .weights import vi3nr_normal_, vi3nr_uniform_

#: Rows of the sample of coordinates that stands for a network's input where an encoding comes first.
_INPUT_ROWS = 1 << 14
_DISTRIBUTIONS = {"uniform": vi3nr_uniform_, "normal": vi3nr_normal_}

#: Activations whose first layer keeps SIREN's spread where no sigma_p is given.
_FIRST_AS_SIREN = ("sine", "finer", "finer_detached", "incode")


def vi3nr_init_(
    module: nn.Module,
    sigma_p: float | None = None,
    *,
    first_sigma_p: float | None = None,
    sample_input: Tensor | None = None,
    is_first: bool | None = None,
    distribution: str = "uniform",
    samples: int = 1_000_000,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Initialise a fused layer, or all fused layers of a network, by VI3NR, in place; biases become zero.

    Layer i with activation f_i gets Var(W_i) = sigma_i^2 / (n_i E[x_i^2]), where E[x_0^2] = mean^2 + std^2 of the
    network's input and E[x_i^2] = E[f_{i-1}(z)^2], z ~ N(0, sigma_{i-1}^2) (branches independent, all of that standard
    deviation; mean over several outputs).

    Args:
        module: a fused layer, or a model or `nn.Sequential` of them (in the order of the data). A model's `encoding`
            is passed first.
        sigma_p: standard deviation of every pre-activation before omega; by default `default_sigma_p` of each layer's
            activation. A linear (identity) layer takes that of the layer before it.
        first_sigma_p: another one for the first layer, which decides the frequencies that a network starts with. By
            default sigma_p if that is given; else, for a sine, finer or incode layer of d bare coordinates,
            1 / (3 sqrt d), which is SIREN's first layer, so that its omega keeps setting the bandwidth.
        sample_input: coordinates as the network will see them, [.., in_features], to take the input's mean and
            standard deviation from; by default uniform on [-1, 1]^in_features.
        is_first: whether the first layer found sees the coordinates; by default its own `is_first`, else True for
            a network and False for a single layer, whose input then is taken for the output of one like itself.
        distribution: "uniform" (`vi3nr_uniform_`) or "normal" (`vi3nr_normal_`).
        samples, seed: of the gains' Monte Carlo estimate. PyTorch's global random state is not touched by it.
        generator: source of the weights; PyTorch's global one if None.

    Returns `module`. Raises TypeError or ValueError for other arguments.
    """
    layers = fused_layers(module)
    fill = _DISTRIBUTIONS[one_of("distribution", distribution, tuple(_DISTRIBUTIONS))]
    if sigma_p is not None:
        sigma_p = finite_float("sigma_p", sigma_p, above=0)
    if first_sigma_p is not None:
        first_sigma_p = finite_float("first_sigma_p", first_sigma_p, above=0)
    is_first = sees_coordinates(module, layers) if is_first is None else boolean("is_first", is_first)
    is_first = is_first or sample_input is not None
    bare = is_first and getattr(module, "encoding", None) is None

    if any(layer.weight.is_meta for layer in layers):
        return module  # shapes only: there is nothing to fill
    gains: list[float] = []  # all of them before the first weight changes: what is refused leaves the module as it was
    previous: tuple[Activation, float] | None = None
    for layer in layers:
        activation = layer.activation_with_parameters()
        if previous is None and first_sigma_p is not None:
            sigma = first_sigma_p
        elif sigma_p is not None:
            sigma = sigma_p
        elif previous is None and bare and activation.name in _FIRST_AS_SIREN:
            # measured, 96x96 picture, 3x96, 150 steps of Adam at 1e-3: 51.9 dB; 21.6 dB with 1/omega here too
            sigma = 1 / (3 * math.sqrt(layer.in_features))
        elif activation.name == "identity" and previous is not None:
            sigma = previous[1]
        else:
            sigma = default_sigma_p(activation)
        if previous is None and is_first:
            gains.append(vi3nr_input_gain(sigma, *_input_statistics(module, layers[0], sample_input)))
        else:
            before, sigma_before = previous or (activation, sigma)
            gains.append(sigma / math.sqrt(_known_moment(before, sigma_before, samples, seed)))
        previous = (activation, sigma)
    for layer, gain in zip(layers, gains):
        fill(layer.weight, gain, generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def _input_statistics(module: nn.Module, first: Layer, sample_input: Tensor | None) -> tuple[float, float]:
    """Mean and standard deviation of what the first layer sees."""
    encoding = getattr(module, "encoding", None)
    if sample_input is None and encoding is None:
        return 0.0, math.sqrt(1 / 3)
    width: int = first.in_features if encoding is None else getattr(module, "in_features")  # noqa: B009 (for mypy)
    weight = first.weight
    if sample_input is None:
        rng = torch.Generator().manual_seed(0)
        sample_input = (torch.rand(_INPUT_ROWS, width, generator=rng) * 2 - 1).to(weight)
    elif not isinstance(sample_input, Tensor) or not sample_input.is_floating_point():
        raise TypeError(f"sample_input must be a floating-point tensor [.., {width}], got {_described(sample_input)}")
    elif sample_input.dim() == 0 or sample_input.shape[-1] != width or sample_input.numel() < 2:
        raise ValueError(f"sample_input must have shape [.., {width}], got {tuple(sample_input.shape)}")
    with torch.no_grad():
        x = sample_input if encoding is None else encoding(sample_input.to(weight.device))
        x = x.double()
        mean, std = x.mean().item(), x.std(correction=0).item()
    if not math.isfinite(mean + std):
        what = "sample_input" if encoding is None else "the encoding of sample_input"
        raise ValueError(f"{what} must be finite, got NaN or infinity in it")
    return mean, std
