"""Initialises whole layers and networks by VI3NR (`vi3nr_init_`): a gain for each product from what comes before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from .._checks import boolean, described, finite_float, one_of, positive_int
from ..activations import Activation
from ..activations.facts import Facts
from .estimates import moments
from .search import search_sigma_p
from .vi3nr import default_sigma_p
from .walk import Link, ProductChain, assign, chain, is_fused, refuse_computed, sees_coordinates, warn_of_others
from .weights import vi3nr_normal_, vi3nr_orthogonal_, vi3nr_uniform_

#: Rows of the sample of coordinates that stands for a network's input where an encoding comes first.
_INPUT_ROWS = 1 << 14
DISTRIBUTIONS = ("uniform", "normal", "orthogonal")
#: Draws from which sigma_p is sought for a function of several branches.
_SEARCH_SAMPLES = 1 << 17
_FEW_SAMPLES = 1 << 14

Sigma = float | str | Sequence[float | Sequence[float]] | None


def vi3nr_init_(
    module: nn.Module,
    sample_input: Tensor | None = None,
    sigma_p: Sigma = "auto",
    *,
    first_sigma_p: float | None = None,
    is_first: bool | None = None,
    distribution: str = "uniform",
    bias: str = "zero",
    samples: int = 1_000_000,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Initialise a network, ours or any stack of `nn.Linear` and activations, by VI3NR, in place.

    Layer i, followed by the function f_i, gets Var(W_i) = (sigma_i^2 - E[b_i^2]) / (n_i E[x_i^2]), where x_0 is what
    the first layer sees and E[x_i^2] = E[f_{i-1}(z)^2], z ~ N(0, sigma_{i-1}^2) (branches independent; mean over
    several outputs).

    Args:
        module: a fused layer; a model or `nn.Sequential` of them (a model's `encoding` is passed first); or any module
            that torch.fx can trace to products (`nn.Linear`, `F.linear`) with a function of one pre-activation, or of
            as many equal blocks of it as there are branches, between each and the next.
        sample_input: coordinates as the network will see them, [.., in_features], to take the first layer's input
            from; by default uniform on [-1, 1]^in_features.
        sigma_p: standard deviation of pre-activations before omega: a number for all; a sequence with one entry a
            layer, an entry being a number or one a branch; None for `default_sigma_p` of each activation; or "auto":
            for each activation what `search_sigma_p` solves for its fan ratio, `default_sigma_p` where it does not. A
            linear (identity) layer takes that of the layer before it. The product of the last layer scales all
            gradients alike, so the activation before it is solved for the fan ratio 1.
        first_sigma_p: another one for the first layer, which decides the frequencies that a network starts with. By
            default sigma_p if that is given; else, for a sine, finer or incode layer of d bare coordinates,
            1 / (3 sqrt d), which is SIREN's first layer, so that its omega keeps setting the bandwidth.
        is_first: whether the first layer found sees the coordinates; by default its own `is_first`, else True for
            a network and False for a single layer, whose input then is taken for the output of one like itself.
        distribution: "uniform", "normal" or "orthogonal" (`vi3nr_orthogonal_`, each branch by itself).
        bias: "zero", or "keep": as they are, their mean square counted in the gain.
        samples, seed: of the moments' Monte Carlo estimate. PyTorch's global random state is not touched by it.
        generator: source of the weights; PyTorch's global one if None.

    A model's own skip connections and norms are counted: E[x_i^2] is that behind LayerNorm (its weight and bias),
    and of (y + x) / sqrt(2) with y and x independent. Parametrised weights (torch.nn.utils.parametrize) are assigned.
    Of a model its layers in `net` count, whatever a subclass's forward does around them.
    Modules with other weights (convolutions, embeddings) stay as they are, and a warning names them.

    Returns `module`. Raises TypeError or ValueError for other arguments and modules (other skip connections, weights
    that a hook computes, ...: the message names the place; `lsuv_init_` needs no formula), leaving the weights as they
    were.
    """
    one_of("distribution", distribution, DISTRIBUTIONS)
    one_of("bias", bias, ("zero", "keep"))
    network = chain(module)
    links = network.links
    wanted = _wanted(sigma_p, links)
    if first_sigma_p is not None:
        wanted[0] = [finite_float("first_sigma_p", first_sigma_p, above=0)] * links[0].branches
    own_input = is_fused(module) or any(is_fused(m) for m in module.modules())
    first = sees_coordinates(module, [_holder(module, links[0])]) if own_input else True
    first = boolean("is_first", is_first) if is_first is not None else first
    first = first or sample_input is not None
    if any(link.weight.is_meta for link in links):
        return module  # shapes only: there is nothing to fill
    for link in links:
        refuse_computed(link.name, link.holder)
    warn_of_others(module, [link.holder or _holder(module, link) for link in links], "vi3nr_init_")

    gains: list[list[float]] = []  # all of them before the first weight changes: what is refused changes nothing
    sigmas: list[list[float]] = []
    for i, link in enumerate(links):
        offsets = _bias_squares(link) if bias == "keep" else [0.0] * link.branches
        bare = first and i == 0 and network.enter is None
        sigma = wanted[i] or _chosen(links, i, sigmas, sigma_p == "auto", bare, max(offsets), seed)
        if i == 0 and first:
            mean, second = _input_moments(module, network, sample_input)
        else:
            before, there = (links[i - 1], sigmas[i - 1]) if i else (link, sigma)
            mean, second = _behind(before, _moments(before, there, samples, seed), (mean, second) if i else None)
        gains.append([_gain(link, s, b, second) for s, b in zip(sigma, offsets)])
        sigmas.append(sigma)
    for link, gain in zip(links, gains):
        weight = link.weight.detach()
        computed = link.holder is not None and not isinstance(link.holder._parameters.get("weight"), nn.Parameter)
        weight = weight.clone() if computed else weight
        for block, g in zip(weight.chunk(link.branches), gain):
            fill_(block, g, distribution, generator)
        if computed and link.holder is not None:
            assign(link.holder, weight)
        if link.bias is not None and bias == "zero":
            nn.init.zeros_(link.bias)
    return module


def fill_(weight: Tensor, gain: float, distribution: str, generator: torch.Generator | None = None) -> Tensor:
    """Fill one branch's weights, in place, from a distribution with this gain."""
    fill = {"uniform": vi3nr_uniform_, "normal": vi3nr_normal_, "orthogonal": vi3nr_orthogonal_}[distribution]
    return fill(weight, gain, generator)


# -- sigma_p


def _wanted(sigma_p: Sigma, links: list[Link]) -> list[list[float] | None]:
    """Return what was asked for: one number a branch for each layer, or None where it is to be chosen."""
    if sigma_p is None or (isinstance(sigma_p, str) and sigma_p == "auto"):
        return [None] * len(links)
    if isinstance(sigma_p, Sequence) and not isinstance(sigma_p, str):
        return [list(values) for values in per_layer("sigma_p", sigma_p, links)]
    if isinstance(sigma_p, str):
        raise TypeError(f"sigma_p must be a number, a sequence of them, None or 'auto', got {sigma_p!r}")
    number = finite_float("sigma_p", sigma_p, above=0)
    return [[number] * link.branches for link in links]


def per_layer(name: str, values: Sequence, links: list[Link]) -> list[list[float]]:
    """Expand one entry a layer, each a positive number or one a branch, to one number a branch for each layer."""
    if len(values) != len(links):
        places = ", ".join(link.name for link in links)
        raise ValueError(f"{name} must have one entry a layer, {len(links)} ({places}), got {len(values)}")
    result = []
    for link, entry in zip(links, values):
        if isinstance(entry, Sequence) and not isinstance(entry, str):
            if len(entry) != link.branches:
                raise ValueError(f"{name}: {link.name} has {link.branches} branches, got {len(entry)} numbers for it")
            result.append([finite_float(name, value, above=0) for value in entry])
        else:
            result.append([finite_float(name, entry, above=0)] * link.branches)
    return result


def _chosen(
    links: list[Link], i: int, sigmas: list[list[float]], search: bool, bare: bool, bias_variance: float, seed: int
) -> list[float]:
    link = links[i]
    facts = link.activation.map.facts if link.activation is not None else Facts()
    if bare and facts.init == "siren":
        # measured, 96x96 picture, 3x96, 150 steps of Adam at 1e-3: 51.9 dB; 21.6 dB with 1/omega here too
        return [1 / (3 * math.sqrt(link.fan_in))] * link.branches
    if facts.linear and i > 0:
        return [math.sqrt(sum(s * s for s in sigmas[i - 1]) / len(sigmas[i - 1]))] * link.branches
    # the last product scales all gradients alike: nothing for sigma_p to make up for
    ratio = links[i + 1].units / link.units if i + 2 < len(links) else 1.0
    solved = _solved(link, ratio, bias_variance, seed) if search else None
    if solved is not None:
        return [solved] * link.branches
    if link.activation is None:
        return [1.0] * link.branches
    return [default_sigma_p(link.activation)] * link.branches


def _solved(link: Link, fan_ratio: float, bias_variance: float, seed: int) -> float | None:
    """Return the sigma_p where both conditions hold, or None."""
    if link.activation is not None:
        return _solved_activation(_mean_parameters(link.activation), round(fan_ratio, 6), bias_variance, seed)
    if link.branches > 1:
        return None

    def function(z: Tensor) -> Tensor:
        return link.values(z.unsqueeze(-1)).squeeze(-1)

    # a percent of sigma_p is enough; quadrature of a function with kinks takes a minute, many draws ten seconds
    try:
        found = search_sigma_p(
            function,
            fan_ratio=fan_ratio,
            bias_variance=bias_variance,
            method="montecarlo",
            samples=_FEW_SAMPLES,
            seed=seed,
        )
    except ValueError:  # of which no estimate says anything
        return None
    return found.sigma_p if found.status == "solved" else None


@lru_cache(maxsize=256)
def _solved_activation(activation: Activation, fan_ratio: float, bias_variance: float, seed: int) -> float | None:
    found = search_sigma_p(
        activation, fan_ratio=fan_ratio, bias_variance=bias_variance, samples=_SEARCH_SAMPLES, seed=seed
    )
    return found.sigma_p if found.status == "solved" else None


def _mean_parameters(activation: Activation) -> Activation:
    return activation.with_params(
        **{k: v.double().mean().item() for k, v in activation.params.items() if isinstance(v, Tensor)}
    )


# -- moments


def _behind(link: Link, of: tuple[float, float], before: tuple[float, float] | None) -> tuple[float, float]:
    """Return mean and mean square of what the next product sees, from those of the values and of the layer's input.

    LayerNorm leaves 0 and 1, then its weight and bias; RMSNorm 1 too, and its mean counts as 0. A sum with the input
    counts both as independent.
    """
    mean, second = of
    if link.norm is not None:
        n: float = len(link.norm.weight) if link.norm.weight is not None else 1
        weight = 1.0 if link.norm.weight is None else link.norm.weight.detach().double().square().sum().item() / n
        bias = getattr(link.norm, "bias", None)
        mean = 0.0 if bias is None else bias.detach().double().mean().item()
        second = weight + (0.0 if bias is None else bias.detach().double().square().mean().item())
    if link.skip and before is not None:
        second = (second + before[1] + 2 * mean * before[0]) / 2
        mean = (mean + before[0]) / math.sqrt(2)
    return mean, second


def _moments(link: Link, sigmas: list[float], samples: int, seed: int) -> tuple[float, float]:
    """Return E[f(z)] and E[f(z)^2], means over outputs, for z_b ~ N(0, sigma_b^2).

    E[f(z)] of a foreign function, behind which no skip connection is counted, is NaN.
    """
    if link.activation is None:
        return math.nan, drawn_moments(link, sigmas, positive_int("samples", samples, minimum=2), seed)[0]
    plain = {}
    for name, value in link.activation.params.items():
        if isinstance(value, Tensor):
            number = value.flatten()[0].item()
            if bool((value == number).all()):
                plain[name] = number
    activation = link.activation.with_params(**plain)
    if activation.has_tensors:
        return _activation_moments(activation, tuple(sigmas), samples, seed)
    return _remembered_moments(activation, tuple(sigmas), samples, seed)


def _activation_moments(
    activation: Activation, sigmas: tuple[float, ...], samples: int, seed: int
) -> tuple[float, float]:
    sigma = sigmas if len(sigmas) > 1 else sigmas[0]
    found = moments(activation, sigma, samples=samples, seed=seed)
    return found.mean.mean().item(), found.second.mean().item()


#: 40 ms a split layer otherwise, where plain numbers describe the activation
_remembered_moments = lru_cache(maxsize=256)(_activation_moments)


def drawn_moments(link: Link, sigmas: list[float], samples: int, seed: int) -> tuple[float, list[float]]:
    """Estimate E[f^2] and, a branch, E[(df/dz_b)^2], of a function that is no activation of this package."""
    rng = torch.Generator().manual_seed(positive_int("seed", seed, minimum=0))
    device = link.weight.device
    second, slopes, chunk = 0.0, torch.zeros(link.branches, dtype=torch.float64), 1 << 16
    for start in range(0, samples, chunk):
        n = min(chunk, samples - start)
        z = torch.randn(n, link.branches, generator=rng).mul_(torch.tensor(sigmas)).to(device).requires_grad_()
        with torch.enable_grad():
            y = link.values(z)
            slope = torch.autograd.grad(y.sum(), z)[0] if y.requires_grad else torch.zeros_like(z)
        second += y.detach().double().square().sum().item() / link.outputs
        slopes += slope.double().square().sum(0).cpu()
    if not math.isfinite(second):
        raise ValueError(f"what follows {link.name} returned values that are not finite for z ~ N(0, {sigmas}^2)")
    return second / samples, (slopes / samples).tolist()


def _gain(link: Link, sigma: float, bias_square: float, second: float) -> float:
    room = sigma * sigma - bias_square
    if room <= 0:
        raise ValueError(
            f"bias: that of {link.name} has root mean square {math.sqrt(bias_square):.4g}, which leaves nothing of "
            f"sigma_p = {sigma:.4g} for the weights; take bias='zero', or a larger sigma_p"
        )
    if not second > 0:
        raise ValueError(f"the input of {link.name} is 0 everywhere: no gain makes its pre-activation vary")
    return math.sqrt(room / second)


def _bias_squares(link: Link) -> list[float]:
    if link.bias is None:
        return [0.0] * link.branches
    return [block.detach().double().square().mean().item() for block in link.bias.chunk(link.branches)]


# -- the first layer's input


def _holder(module: nn.Module, link: Link):
    return module.get_submodule(link.name)


def _input_moments(module: nn.Module, network: ProductChain, sample_input: Tensor | None) -> tuple[float, float]:
    """Return E[x] and E[x^2] of what the first layer sees."""
    if sample_input is None and network.enter is None:
        return 0.0, 1 / 3
    x = first_input(module, network, sample_input).double()
    mean, std = x.mean().item(), x.std(correction=0).item()
    if not math.isfinite(mean + std):
        what = "sample_input" if network.enter is None else "the encoding of sample_input"
        raise ValueError(f"{what} must be finite, got NaN or infinity in it")
    if mean == 0 and std == 0:
        raise ValueError("sample_input: mean and std of what the first layer sees must not both be 0")
    return mean, mean * mean + std * std


def first_input(module: nn.Module, network: ProductChain, sample_input: Tensor | None) -> Tensor:
    """Return what the first layer sees of `sample_input`, by default of coordinates uniform on [-1, 1]."""
    first = network.links[0]
    width: int | None = getattr(module, "in_features", None) if network.enter is not None else first.fan_in
    if sample_input is None:
        if width is None:
            raise ValueError(
                f"sample_input: something comes before {first.name}; give coordinates as the network will see them"
            )
        rng = torch.Generator().manual_seed(0)
        sample_input = (torch.rand(_INPUT_ROWS, width, generator=rng) * 2 - 1).to(first.weight)
    elif not isinstance(sample_input, Tensor) or not sample_input.is_floating_point():
        raise TypeError(f"sample_input must be a floating-point tensor [.., {width}], got {described(sample_input)}")
    elif sample_input.dim() == 0 or (width or sample_input.shape[-1]) != sample_input.shape[-1]:
        raise ValueError(f"sample_input must have shape [.., {width}], got {tuple(sample_input.shape)}")
    if sample_input.numel() < 2:
        raise ValueError(f"sample_input must have shape [.., {width}] and rows, got {tuple(sample_input.shape)}")
    with torch.no_grad():
        return sample_input if network.enter is None else network.enter(sample_input.to(first.weight.device))
