"""Estimates moments of an activation under normal pre-activations, of which VI3NR's conditions are made.

    z_b ~ N(0, sigma_b^2) independent:    E[f], E[f^2], E[df/dz_b], E[(df/dz_b)^2], each with its error

By Monte Carlo on the device (`ops/moments.py`: Philox draws that depend on seed and position alone), with standard
errors; or by quadrature (`quadrature.py`), with the difference of its last two rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import activations
from .._checks import described, one_of, positive_int
from ..activations import Activation, ActivationMap
from ..ops import moments as raw

METHODS = ("auto", "montecarlo", "quadrature")
#: Chunks of draws from which their spread tells the covariance of second moments; with fewer, a bound serves.
_ENOUGH_CHUNKS = 30


@dataclass(frozen=True)
class Moments:
    """Moments for a grid of settings of any shape [..]; float64, on the CPU.

    Attributes:
        sigma: [.., B], standard deviation of each branch's pre-activation.
        mean, second: [.., C], E[f_c] and E[f_c^2].
        derivative_mean, derivative_second: [.., C, B], E[df_c/dz_b] and E[(df_c/dz_b)^2].
        mean_error, second_error, derivative_mean_error, derivative_second_error: standard errors (Monte Carlo), or
            differences of the last two rules (quadrature).
        method: "montecarlo" or "quadrature".
        samples: draws, 0 for quadrature.
    """

    sigma: Tensor
    mean: Tensor
    second: Tensor
    derivative_mean: Tensor
    derivative_second: Tensor
    mean_error: Tensor
    second_error: Tensor
    derivative_mean_error: Tensor
    derivative_second_error: Tensor
    method: str
    samples: int
    _covariance: Tensor | None = None  # [.., V, V] of the second moments

    def gain(self, bias_variance: float = 0.0) -> Tensor:
        """Return the gain of a following layer's weights, [.., B]: sqrt((sigma_b^2 - bias_variance) / mean_c E[f_c^2]).

        Weights of variance gain^2 / fan_in, plus biases of that variance, give its pre-activations sigma_b again.
        """
        return ((self.sigma**2 - bias_variance) / self.second.mean(-1, keepdim=True)).sqrt()

    def gain_error(self, bias_variance: float = 0.0) -> Tensor:
        """Return the standard error of `gain`, [.., B]."""
        pull = torch.zeros(*self.second.shape[:-1], self._values, dtype=torch.float64)
        pull[..., : self.second.shape[-1]] = -0.5 / self.second.sum(-1, keepdim=True)
        return self.gain(bias_variance) * self._error(pull).unsqueeze(-1)

    def condition(self, fan_ratio: float = 1.0, bias_variance: float = 0.0) -> Tensor:
        """Return fan_ratio sum_b (sigma_b^2 - bias_variance) sum_c E[(df_c/dz_b)^2] / sum_c E[f_c^2], [..].

        By how much the variance of gradients grows when a backward pass goes through one such layer whose weights
        have that gain; fan_ratio = M_{i+1} / M_i, features out over features in. VI3NR's backward condition: it is 1.
        """
        weight = (self.sigma**2 - bias_variance).unsqueeze(-2)
        return fan_ratio * (weight * self.derivative_second).sum((-1, -2)) / self.second.sum(-1)

    def condition_error(self, fan_ratio: float = 1.0, bias_variance: float = 0.0) -> Tensor:
        """Return the standard error of `condition`, [..]."""
        weight = (self.sigma**2 - bias_variance).unsqueeze(-2).expand_as(self.derivative_second)
        top = (weight * self.derivative_second).sum((-1, -2)).unsqueeze(-1)
        pull = torch.cat(
            ((-1 / self.second.sum(-1, keepdim=True)).expand_as(self.second), weight.flatten(-2) / top), -1
        )
        return self.condition(fan_ratio, bias_variance) * self._error(pull)

    @property
    def _values(self) -> int:
        return self.second.shape[-1] * (1 + self.sigma.shape[-1])

    def _error(self, pull: Tensor) -> Tensor:
        """Return the standard error of a function of the second moments that has this gradient."""
        if self._covariance is None:
            errors = torch.cat((self.second_error, self.derivative_second_error.flatten(-2)), -1)
            return (pull.abs() * errors).sum(-1)  # whatever their correlation
        variance = (pull.unsqueeze(-2) @ self._covariance @ pull.unsqueeze(-1)).squeeze(-1).squeeze(-1)
        return variance.clamp_min(0).sqrt()


def moments(
    activation: Activation | Callable[[Tensor], Tensor] | str,
    sigma: float | Tensor | Sequence[float | Tensor],
    *,
    parameters: Mapping[str, float | Tensor] | None = None,
    method: str = "montecarlo",
    samples: int = 1_000_000,
    seed: int = 0,
    start: int = 0,
    device: torch.device | str | None = None,
) -> Moments:
    """Estimate E[f], E[f^2], E[f'], E[f'^2] for z ~ N(0, sigma^2), with their errors, for a whole grid at once.

    Args:
        activation: an activation of this package or its name; or a differentiable callable on tensors [n] (one branch,
            one output; complex values count by their absolute value, with abs(df/dz)).
        sigma: standard deviation of z before omega, > 0: a number or a tensor [..]; or a tuple of B of them, one a
            branch.
        parameters: other values for parameters of the activation, numbers or tensors that broadcast with [..].
        method: "montecarlo"; "quadrature", in float64, which raises where it does not converge; "auto": the latter
            where it converges, else the former.
        samples: draws of each branch, at least 2; all settings share them. Standard errors fall with its square root.
        seed: of the draws, 0 <= seed < 2^63. The same seed, samples and device give the same bits.
        start: first draw of the stream, a multiple of 4: further draws continue an estimate.
        device: where Monte Carlo runs; by default where the activation's tensors are, else the CPU.

    An activation's own tensors of shape [features] are averaged over the features.

    Returns `Moments` of shape [..]. Raises TypeError or ValueError for other arguments, and where f or its derivative
    is not finite.
    """
    f = function_of(activation)
    method = one_of("method", method, METHODS)
    samples = positive_int("samples", samples, minimum=2)
    seed = _seed(seed)
    start = positive_int("start", start, minimum=0)
    if start % 4 or start + samples >= 1 << 63:
        raise ValueError(f"start must be a multiple of 4 such that start + samples < 2^63, got {start}")
    grid = Grid(f, sigma, parameters, device)
    if method != "montecarlo":
        from .quadrature import NotConverged, integrate

        try:
            return grid.result("quadrature", 0, *integrate(grid))
        except NotConverged as error:
            if method == "quadrature":
                raise ValueError(f"{error}; use method='montecarlo'") from None
    return grid.result("montecarlo", samples, *_drawn(grid, samples, seed, start))


# -- arguments


def function_of(activation: object) -> Activation | Callable[[Tensor], Tensor]:
    """Return the function that an argument `activation` means: an activation of this package, or a callable on tensors.

    Raises:
        TypeError: it is neither a callable nor a name.
    """
    f = activations.get(activation) if isinstance(activation, str | ActivationMap) else activation
    if not callable(f):
        raise TypeError(
            f"activation must be a callable from tensor to tensor, an activation or its name, got {type(f).__name__}"
        )
    return f


def _seed(seed: object) -> int:
    seed = positive_int("seed", seed, minimum=0)
    if seed >= 1 << 63:
        raise ValueError(f"seed must be less than 2^63, got {seed}")
    return seed


class Grid:
    """The settings of a call to `moments`, broadcast against each other and flat.

    Attributes:
        sigmas, params: [G, B] and [G, P] in float64; G is the number of settings times that of features.
        shape: of the settings as they were given.
        features: how many features of the activation the moments are averaged over, 0 for none.
    """

    def __init__(self, f, sigma, parameters, device) -> None:
        self.f = f
        self.map = f.map if isinstance(f, Activation) else None
        self.branches, self.outputs = (f.branches, f.outputs) if isinstance(f, Activation) else (1, 1)
        given = _parameters(f, parameters)
        own = dict(f.params) if isinstance(f, Activation) else {}
        tensors = [v for v in own.values() if isinstance(v, Tensor)]
        self.device = torch.device(device if device is not None else tensors[0].device if tensors else "cpu")
        if self.device.type == "meta" or any(t.is_meta for t in tensors):
            raise ValueError("device must hold data to estimate moments, got 'meta'")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {self.device} cannot be used here: {error}") from None
        sigma = _sigma(sigma, self.branches)
        sizes = {v.shape[0] for n, v in own.items() if isinstance(v, Tensor) and v.dim() == 1 and n not in given}
        if len(sizes) > 1:
            raise ValueError(f"activation: its parameters have different numbers of features: {sorted(sizes)}")
        self.features = sizes.pop() if sizes else 0
        try:
            self.shape = torch.broadcast_shapes(sigma.shape[:-1], *(v.shape for v in given.values()))
        except RuntimeError:
            shapes = {n: tuple(v.shape) for n, v in given.items()}
            raise ValueError(
                f"sigma and parameters must broadcast, got sigma {tuple(sigma.shape[:-1])} and {shapes}"
            ) from None
        full = (*self.shape, self.features or 1)
        self.sigma = sigma.expand(*self.shape, self.branches)
        self.sigmas = self.sigma.unsqueeze(-2).expand(*full, self.branches).reshape(-1, self.branches)
        columns = []
        for name, value in own.items():
            if name in given:
                column = given[name].unsqueeze(-1)
            else:
                column = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
            columns.append(column.expand(full).reshape(-1))
        self.params = torch.stack(columns, -1) if columns else self.sigmas.new_empty(len(self.sigmas), 0)

    def values(self, z: list[Tensor], params: Tensor) -> list[Tensor]:
        """Compute f_c, then df_c/dz_b, at z (one tensor [G', n] a branch, params [G', P]), in z's type."""
        if self.map is not None:
            own = params.to(z[0]).unsqueeze(-1).unbind(1)
            return [torch.as_tensor(v).to(z[0]).expand_as(z[0]) for v in self.map.torch_jet()(*z, *own)]
        rows = [value_and_derivative(self.f, row) for row in z[0]]
        return [torch.stack([r[i] for r in rows]) for i in range(2)]

    def result(self, method: str, samples: int, means, seconds, mean_errors, second_errors, covariance) -> Moments:
        """Make `Moments`, checked, from tensors [G, V] (covariance [G, V, V] or None)."""

        def shaped(t: Tensor) -> Tensor:
            t = t.cpu().reshape(*self.shape, self.features or 1, *t.shape[1:])
            return t.mean(len(self.shape))  # errors, too: the features' draws are the same

        means, seconds, mean_errors, second_errors = map(shaped, (means, seconds, mean_errors, second_errors))
        if not bool(torch.isfinite(seconds).all()):
            where = self.sigma[~torch.isfinite(seconds).all(-1)][0]
            raise ValueError(
                f"activation must return finite values and derivatives, got NaN, infinity or an overflow for "
                f"z ~ N(0, {where[0]:g}^2): {self.f!r}"
            )
        c = self.outputs

        def matrix(t: Tensor) -> Tensor:
            return t[..., c:].unflatten(-1, (c, self.branches))

        return Moments(
            self.sigma, means[..., :c], seconds[..., :c], matrix(means), matrix(seconds), mean_errors[..., :c],
            second_errors[..., :c], matrix(mean_errors), matrix(second_errors), method, samples,
            None if covariance is None else shaped(covariance),
        )  # fmt: skip


def _parameters(f, parameters) -> dict[str, Tensor]:
    if not parameters:
        return {}
    if not isinstance(f, Activation):
        raise TypeError("parameters: a callable has none; give an activation of this package")
    given = {}
    for name, value in dict(parameters).items():
        if name not in f.param_names:
            accepted = ", ".join(f.param_names) or "none"
            raise ValueError(f"parameters: {f.name} has no parameter {name!r}; it has: {accepted}")
        given[name] = _numbers(f"parameters[{name!r}]", value)
        if not bool(torch.isfinite(given[name]).all()):
            raise ValueError(f"parameters[{name!r}] must be finite, got NaN or infinity in it")
    return given


def _sigma(sigma: object, branches: int) -> Tensor:
    """Return the argument `sigma` as a tensor [.., B], checked."""
    if isinstance(sigma, tuple | list):
        if len(sigma) != branches:
            raise ValueError(f"sigma must be a number, a tensor or one entry a branch, {branches}, got {len(sigma)}")
        entries = [_numbers(f"sigma[{b}]", s) for b, s in enumerate(sigma)]
        try:
            value = torch.stack(torch.broadcast_tensors(*entries), -1)
        except RuntimeError:
            raise ValueError(f"sigma: entries must broadcast, got shapes {[tuple(e.shape) for e in entries]}") from None
    else:
        value = _numbers("sigma", sigma)
        value = value.unsqueeze(-1).expand(*value.shape, branches)
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        raise ValueError(f"sigma must be finite and greater than 0, got {sigma!r}")
    return value


def _numbers(name: str, value: object) -> Tensor:
    if isinstance(value, bool | str | bytes) or (isinstance(value, Tensor) and value.is_complex()):
        raise TypeError(f"{name} must be a number or a tensor of numbers, got {value!r}")
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or a tensor of numbers, got {value!r}") from None


def value_and_derivative(f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute f(z) and f'(z) of a callable, or their absolute values if it is complex; z [n]."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        y = checked_values(f, f(z), z)
        if not y.requires_grad:
            return (y.abs() if y.is_complex() else y).detach().to(z.dtype), torch.zeros_like(z)
        if y.is_complex():
            parts = [torch.autograd.grad(part.sum(), z, retain_graph=True)[0] for part in (y.real, y.imag)]
            return y.detach().abs().to(z.dtype), torch.hypot(*parts)
        (slope,) = torch.autograd.grad(y.sum(), z)
        return y.detach().to(z.dtype), slope


def checked_values(f: object, y: object, z: Tensor) -> Tensor:
    """Compute y = f(z) of a callable, and check that it is what an activation returns."""
    if not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
        got = described(y) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"activation must return a floating-point or complex tensor, got {got} from {f!r}")
    if y.shape != z.shape:
        raise ValueError(
            f"activation must work element by element: shape {tuple(z.shape)} was expected, "
            f"got {tuple(y.shape)} from {f!r}"
        )
    return y


# -- Monte Carlo


def _drawn(grid: Grid, samples: int, seed: int, start: int):
    sigmas = grid.sigmas.float().to(grid.device)
    if grid.map is not None:
        sums = raw.sums(sigmas, grid.params.float().to(grid.device), samples, seed, grid.map, start)
    else:
        sums = raw.accumulate(_callable_part(grid, sigmas[:, 0], seed), len(sigmas), 2, samples, start)
    return statistics(sums, samples)


#: Draws that a callable sees at a time: whole chunks, and fewer numbers than PyTorch divides among threads, which would
#: change bits.
CALL = 4 * raw.CHUNK


def _callable_part(grid: Grid, sigmas: Tensor, seed: int):
    def part(start: int, samples: int) -> Tensor:
        out = []
        for at in range(0, samples, CALL):
            draws = raw.normals(start + at, min(CALL, samples - at), 0, seed, sigmas.device)
            rows = [[raw.chunk_powers(v) for v in value_and_derivative(grid.f, sigma * draws)] for sigma in sigmas]
            out.append(torch.stack([torch.stack(row, 1) for row in rows], 1))
        return torch.cat(out)

    return part


def statistics(sums: raw.Sums, samples: int):
    """Compute means, second moments, their errors, and the second moments' covariance (None: too few chunks)."""
    mean, second, fourth = (sums.powers / samples).unbind(-1)
    mean_error = ((second - mean**2).clamp_min(0) / (samples - 1)).sqrt()
    second_error = ((fourth - second**2).clamp_min(0) / (samples - 1)).sqrt()
    covariance = None
    if sums.chunks >= _ENOUGH_CHUNKS:
        n = sums.chunks
        # spread of the chunks' sums about the mean: second is that of all draws, nearly that of whole chunks
        centre = second * raw.CHUNK
        spread = sums.squares / n - centre.unsqueeze(-1) * centre.unsqueeze(-2)
        covariance = spread / (n - 1) * n / raw.CHUNK**2 / (samples / raw.CHUNK)
    return mean, second, mean_error, second_error, covariance
