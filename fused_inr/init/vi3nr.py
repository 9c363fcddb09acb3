"""VI3NR: variance-informed initialisation for any activation (Koneputugodage et al., CVPR 2025, arXiv 2504.19270).

With z = W x + b, fan-in n and x = f(z'), z' ~ N(0, sigma_p^2), the pre-activations keep the standard deviation sigma_p
from layer to layer if

    Var(W) = gain^2 / n,   gain^2 = sigma_p^2 / E[f(z')^2]           (first layer: sigma_p^2 / (mean^2 + std^2) of x)

sigma_p is the standard deviation of z itself: omega, scale, m, ... belong to f and are applied after it. The theory
has no bias: `vi3nr_init_` sets biases to zero.

The four functions of the published code keep its names and the order of its arguments; `generator` and `seed` make
the Monte Carlo estimate reproducible, and any activation of this package may stand for a callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import activations
from .._checks import described, finite_float, positive_int
from ..activations import Activation, ActivationMap
from ..ops import moments as raw
from . import estimates

# -- gains


def vi3nr_input_gain(sigma_p: float, mean: float, std: float) -> float:
    """Compute gain = sigma_p / sqrt(mean^2 + std^2), for a layer (the first) whose input has this mean and deviation.

    Args:
        sigma_p: wanted standard deviation of the layer's pre-activation (before omega), > 0.
        mean, std: of the input's elements; numbers or one-element tensors, std >= 0, not both 0.

    Returns the gain: weights from U(-gain sqrt(3/n), gain sqrt(3/n)) or N(0, gain^2/n) give that pre-activation.
    Raises TypeError or ValueError for anything else.
    """
    sigma_p = finite_float("sigma_p", sigma_p, above=0)
    mean = finite_float("mean", mean)
    std = finite_float("std", std, least=0)
    if mean == 0 and std == 0:
        raise ValueError("mean and std must not both be 0: no gain makes a layer's output vary whose input is zero")
    return sigma_p / math.hypot(mean, std)


def vi3nr_gain_MC(
    sigma_p: float,
    act_func: Callable[[Tensor], Tensor] | Activation | str,
    samples: int = 1_000_000,
    device: torch.device | str | None = None,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> float:
    """Estimate gain = sigma_p / sqrt(E[f(z)^2]), z ~ N(0, sigma_p^2), for a layer that follows activation f.

    Args:
        sigma_p: standard deviation of pre-activations (before omega), the same in both layers, > 0.
        act_func: f as a callable on float32 tensors [samples'] that returns the same shape; or an activation of this
            package or its name, whose branches then get independent pre-activations of standard deviation sigma_p
            (its m, omegas, ... are those of f, learnable ones at their present value).
        samples: values of f to average, at least 2. The relative standard error of the gain is
            std(f^2) / (2 E[f^2] sqrt(samples)): 0.11 % for relu at the default.
        device: where to draw; by default the CPU, or where the activation's parameters are.
        generator: source of the seed, or
        seed: of the draws (`fused_inr.init.moments`), 0 <= seed < 2^63; PyTorch's global generator gives one if neither
            is given. The same seed gives the same bits on the same kind of device, whatever the threads.

    Returns the gain as a float. Raises TypeError or ValueError for other arguments, and where f returns something
    that is not finite, zero everywhere, or of another shape.
    """
    sigma_p = finite_float("sigma_p", sigma_p, above=0)
    moment = _second_moment(sigma_p, act_func, samples, device, generator, seed)
    return sigma_p / math.sqrt(moment)


def _second_moment(
    sigma: float,
    act_func: Callable[[Tensor], Tensor] | Activation | str,
    samples: int,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> float:
    """Estimate E[f(z)^2], z ~ N(0, sigma^2), mean over outputs and features."""
    samples = positive_int("samples", samples, minimum=2)
    f = activations.get(act_func) if isinstance(act_func, str | ActivationMap) else act_func
    if not callable(f):
        raise TypeError(
            f"act_func must be a callable from tensor to tensor, an activation or its name, got {type(f).__name__}"
        )
    device, seed = _source(f, device, generator, seed)
    if isinstance(f, Activation):
        rows = max(2, -(-samples // _features(f)))  # every feature sees the same draws
        moment = estimates.moments(f, sigma, samples=rows, seed=seed, device=device).second.mean().item()
    else:
        moment = _second_moment_of_values(f, sigma, samples, device, seed)
    if not math.isfinite(moment):
        raise ValueError(f"act_func must return finite values, got NaN or infinity for z ~ N(0, {sigma:g}^2): {f!r}")
    if moment == 0:
        raise ValueError(
            f"act_func returned 0 for every z ~ N(0, {sigma:g}^2): no gain can restore the variance; "
            f"give another sigma_p or activation than {f!r}"
        )
    return moment


def _second_moment_of_values(f: Callable, sigma: float, samples: int, device: torch.device, seed: int) -> float:
    """Estimate E[f(z)^2] of a callable, which need not be differentiable."""
    sums = []
    with torch.no_grad():
        for start in range(0, samples, estimates.CALL):
            z = raw.normals(start, min(estimates.CALL, samples - start), 0, seed, device).mul_(sigma)
            y = f(z.clone())  # which may work in place
            _check_values(f, y, tuple(z.shape))
            sums += raw.chunk_powers(y.abs() if y.is_complex() else y)[:, 1].tolist()
    return math.fsum(sums) / samples


def _source(f, device, generator, seed) -> tuple[torch.device, int]:
    """Return where to draw, and the seed of the draws."""
    if generator is not None and seed is not None:
        raise ValueError("give generator or seed, not both")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
    if device is None:
        if generator is not None:
            device = generator.device
        else:
            tensors = [v for v in f.params.values() if isinstance(v, Tensor)] if isinstance(f, Activation) else []
            device = tensors[0].device if tensors else "cpu"
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("device must hold data to estimate a gain, got 'meta'")
    if seed is not None:
        return device, positive_int("seed", seed, minimum=0)
    where = "cpu" if generator is None else generator.device
    return device, int(torch.randint(1 << 62, (), generator=generator, device=where))


def _features(activation: Activation) -> int:
    """Count the features that the activation's tensors distinguish (1 if none does)."""
    sizes = {v.shape[0] for v in activation.params.values() if isinstance(v, Tensor) and v.dim() == 1}
    if len(sizes) > 1:
        raise ValueError(f"act_func: its parameters have different numbers of features: {sorted(sizes)}")
    return sizes.pop() if sizes else 1


def _check_values(f: object, y: object, shape: tuple[int, ...]) -> None:
    if not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
        got = described(y) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"act_func must return a floating-point or complex tensor, got {got} from {f!r}")
    if tuple(y.shape) != shape:
        raise ValueError(
            f"act_func must work element by element: shape {shape} was expected for an input of {shape[0]} rows, "
            f"got {tuple(y.shape)} from {f!r}"
        )


# -- sigma_p


def default_sigma_p(activation: Activation) -> float:
    """Return the sigma_p, of z before omega, that `vi3nr_init_` takes where none is given (but see `first_sigma_p`).

    The file of each activation states its own, and why (`Facts.sigma_p`); 1 where it states none. It is the sigma_p
    that solves the backward condition beside the forward one, if there is one. If the condition holds only in the
    limit 0, it is one at which it nearly holds. If there is no solution and the activation has a frequency omega, it
    is 1 / omega: the phase omega z gets SIREN's standard deviation 1.

    Raises:
        ValueError: the parameters give no positive number, omega = 0 for instance.
    """
    params = {k: v.double().mean().item() if isinstance(v, Tensor) else v for k, v in activation.params.items()}
    rule = activation.map.facts.sigma_p
    try:
        sigma_p = 1.0 if rule is None else abs(rule(**params))
    except ZeroDivisionError:
        sigma_p = math.nan
    if not (math.isfinite(sigma_p) and sigma_p > 0):
        raise ValueError(f"sigma_p: no default for {activation!r}; give it")
    return sigma_p
