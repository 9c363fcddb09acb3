"""Encodings: what comes between coordinates and the first layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._checks import finite_float, positive_int

__all__ = ["FourierFeatures"]


class FourierFeatures(nn.Module):
    """cos(2 pi B x), sin(2 pi B x) with frequencies B ~ N(0, std^2) (Tancik et al. 2020).

    Args:
        in_features: d, the coordinates.
        num_frequencies: F; the output has 2F columns, the cosines first.
        std: of the frequencies, in periods per unit of x.
        seed: of the frequencies; the same bits wherever the module lives. None takes PyTorch's global generator.
        device: of the frequencies.

    x [.., d] to [.., 2F], in the type of x. The angles are computed in float32 or better whatever autocast, `.half()`
    or the matrix-product precision say (at 40 periods, TF32 would be off by a tenth of a radian): the buffer
    `frequencies` [F, d] stays float32 (float64 after `.double()`). Differentiable in x any number of times.
    """

    frequencies: Tensor

    def __init__(
        self,
        in_features: int,
        num_frequencies: int = 128,
        std: float = 10.0,
        seed: int | None = 0,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features = positive_int("in_features", in_features)
        self.num_frequencies = positive_int("num_frequencies", num_frequencies)
        self.std = finite_float("std", std, above=0)
        self.seed = None if seed is None else positive_int("seed", seed, minimum=0)
        self.out_features = 2 * self.num_frequencies
        shape = (self.num_frequencies, self.in_features)
        self.register_buffer("frequencies", torch.empty(shape, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the frequencies again: the same ones if there is a seed."""
        if self.frequencies.is_meta:
            return
        rng = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        draws = torch.randn(self.frequencies.shape, generator=rng, dtype=torch.float32, device="cpu")
        self.frequencies.copy_(draws.mul_(self.std))

    def _apply(self, fn, recurse=True):
        kept = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype in (torch.float16, torch.bfloat16):
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor [.., {self.in_features}], got {got}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape [.., {self.in_features}], got {tuple(x.shape)}")
        with torch.autocast(device_type=x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, self.frequencies.dtype)
            coordinates, frequencies = x.to(wide), self.frequencies.to(wide)
            # one multiplication a coordinate and no matrix product, which may run in TF32
            turns = coordinates[..., :1] * frequencies[:, 0]
            for k in range(1, self.in_features):
                turns = torch.addcmul(turns, coordinates[..., k : k + 1], frequencies[:, k])
            angle = turns * (2 * math.pi)
            return torch.cat((angle.cos(), angle.sin()), -1).to(x.dtype)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, num_frequencies={self.num_frequencies}"
        return f"{shape}, std={self.std:g}, seed={self.seed}"
