"""SplitNet and its variants."""

from __future__ import annotations

import torch
from torch import nn

from ._registry import grid, register, squares


class QuarteredLayer(nn.Module):
    """m tanh(w0 a) sigmoid(w1 b) sin(w2 c) cos(w3 d) of the four quarters of one linear layer."""

    def __init__(self, input_dim, output_dim, m=1.0, omegas=(1.0, 1.0, 1.0, 1.0), use_bias=True):
        super().__init__()
        self.linear = nn.Linear(input_dim, 4 * output_dim, bias=use_bias)
        self.m, self.omegas = m, omegas

    def forward(self, x):
        tanh, sig, sin, cos = self.linear(x).chunk(4, dim=-1)
        w = self.omegas
        return (
            self.m * torch.tanh(w[0] * tanh) * torch.sigmoid(w[1] * sig) * torch.sin(w[2] * sin) * torch.cos(w[3] * cos)
        )


class SplitNetwork(nn.Module):
    """SplitNet: its forward returns what each layer made, too."""

    def __init__(self, width, depth=3):
        super().__init__()
        self.layers = nn.ModuleList([QuarteredLayer(2, width, 10.0, (1.0, 1.0, 20.0, 20.0))])
        self.layers.extend(QuarteredLayer(width, width, 2.0) for _ in range(depth - 1))
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        made = []
        for layer in self.layers:
            x = layer(x)
            made.append(x)
        return self.last(x), *made


@register(
    source="SplitNet",
    traps="four quarters of one weight; what each layer made is returned, too",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=3,
)
def splitnet(width):
    return SplitNetwork(width or 128)


class LinearLast(nn.Module):
    """A variant whose last branch is linear."""

    def __init__(self, input_dim, output_dim):
        super().__init__()
        self.linear = nn.Linear(input_dim, 3 * output_dim)
        self.n = output_dim

    def forward(self, x):
        z = self.linear(x)
        return torch.tanh(z[..., : self.n]) * torch.sin(z[..., self.n : 2 * self.n]) * z[..., 2 * self.n :]


@register(
    source="TensoRF's fork with SplitNet",
    traps="slices of the pre-activation; a branch without a function of its own",
    inputs=grid(3),
    loss=squares,
    rows=8192,
    order=1,
    fused=2,
)
def splitnet_tensorf(width):
    width = width or 128
    return nn.Sequential(LinearLast(3, width), LinearLast(width, width), nn.Linear(width, 3), nn.Sigmoid())


class ParallelSplit(nn.Module):
    """Four networks of one function each, multiplied at the end."""

    def __init__(self, width, depth=2):
        super().__init__()
        self.functions = (torch.tanh, torch.sigmoid, torch.sin, torch.cos)
        self.nets = nn.ModuleList([
            nn.ModuleList([nn.Linear(2 if i == 0 else width, width) for i in range(depth)]) for _ in self.functions
        ])  # fmt: skip
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        product = None
        for function, net in zip(self.functions, self.nets):
            h = x
            for layer in net:
                h = function(layer(h))
            product = h if product is None else product * h
        return self.last(product)


@register(
    source="SplitNet, parallel",
    traps="four chains of the same rows, multiplied at the end",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=8,
)
def splitnet_parallel(width):
    return ParallelSplit(width or 64)
