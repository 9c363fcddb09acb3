"""Draws weights of a given gain: Var(W) = gain^2 / fan_in, from a uniform, a normal or an orthogonal distribution.

All three fill in place and take a source of random numbers; the variance of z = W x is then gain^2 E[x^2]. Orthogonal
square weights keep the length of every x, where independent ones keep it on average: a deep stack drifts less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import described, finite_float, positive_int


def vi3nr_uniform_(tensor: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill `tensor` [out, n, ...] in place from U(-b, b), b = gain sqrt(3 / fan_in): variance gain^2 / fan_in.

    fan_in is that of `torch.nn.init` (the second dimension times the receptive field), so the 4N rows of a split
    layer's weight [4N, n] have fan-in n. Returns `tensor`. Raises TypeError or ValueError if it is no floating-point
    tensor of two or more dimensions, or the gain not finite and >= 0.
    """
    fan_in, gain = _fan_in(tensor), finite_float("gain", gain, least=0)
    bound = gain * math.sqrt(3.0 / fan_in)
    with torch.no_grad():
        return tensor.uniform_(-bound, bound, generator=generator)


def vi3nr_normal_(tensor: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill `tensor` [out, n, ...] in place from N(0, gain^2 / fan_in); otherwise as `vi3nr_uniform_`."""
    fan_in, gain = _fan_in(tensor), finite_float("gain", gain, least=0)
    with torch.no_grad():
        return tensor.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)


def vi3nr_orthogonal_(
    tensor: Tensor, gain: float = 1.0, generator: torch.Generator | None = None, *, branches: int = 1
) -> Tensor:
    """Fill `tensor` [out, n, ...] in place with scaled orthogonal matrices: mean square gain^2 / fan_in.

    With B branches the blocks of out/B rows are drawn independently, uniformly among the semi-orthogonal matrices
    (orthonormal rows where out/B <= n, else orthonormal columns) times gain sqrt(max(1, out / (B n))), so that the mean
    square of the weights is gain^2 / fan_in exactly (Saxe et al. 2014 for the idea, `torch.nn.init.orthogonal_` for
    the distribution). Other arguments, and what is raised, as `vi3nr_uniform_`; ValueError where B does not divide out.
    """
    fan_in, gain = _fan_in(tensor), finite_float("gain", gain, least=0)
    branches = positive_int("branches", branches)
    rows, rest = divmod(tensor.shape[0], branches)
    if rest:
        raise ValueError(f"branches must divide the {tensor.shape[0]} rows of tensor, got {branches}")
    tall = rows > fan_in
    device = tensor.device if generator is None else generator.device
    wide = torch.promote_types(tensor.dtype, torch.float32)
    with torch.no_grad():
        for block in tensor.chunk(branches) if rows else ():
            normal = torch.empty(max(rows, fan_in), min(rows, fan_in), device=device, dtype=wide)
            q, r = torch.linalg.qr(normal.normal_(generator=generator))
            q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # uniform (Haar), whatever signs QR prefers
            scale = gain * math.sqrt(max(rows, fan_in) / fan_in)
            block.copy_((scale * (q if tall else q.T)).reshape(block.shape))
    return tensor


def _fan_in(tensor: Tensor) -> int:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"tensor must be a floating-point tensor [out, fan_in, ...], got {described(tensor)}")
    fan_in = math.prod(tensor.shape[1:])
    if tensor.dim() < 2 or fan_in == 0:
        raise ValueError(f"tensor must have shape [out, fan_in, ...] with fan_in >= 1, got {tuple(tensor.shape)}")
    return fan_in
