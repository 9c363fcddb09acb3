"""WIRE, and filters that multiply."""

from __future__ import annotations

import math

import torch
from torch import nn

from ._registry import grid, register, squares


class ComplexGabor(nn.Module):
    """WIRE's layer: exp(j omega z - abs(scale z)^2), omega and scale of shape [1], weights complex but the first's."""

    def __init__(self, in_features, out_features, is_first=False, omega0=10.0, sigma0=40.0, trainable=False):
        super().__init__()
        self.omega_0 = nn.Parameter(omega0 * torch.ones(1), trainable)
        self.scale_0 = nn.Parameter(sigma0 * torch.ones(1), trainable)
        self.linear = nn.Linear(in_features, out_features, dtype=torch.float if is_first else torch.cfloat)

    def forward(self, input):
        lin = self.linear(input)
        omega = self.omega_0 * lin
        scale = self.scale_0 * lin
        return torch.exp(1j * omega - scale.abs().square())


class Wire(nn.Module):
    """WIRE: complex layers, the real part of a complex linear layer."""

    def __init__(self, width, hidden_layers=2, trainable=False):
        super().__init__()
        layers = [ComplexGabor(2, width, is_first=True, omega0=20.0, sigma0=10.0, trainable=trainable)]
        layers += [
            ComplexGabor(width, width, omega0=20.0, sigma0=10.0, trainable=trainable) for _ in range(hidden_layers)
        ]
        self.net = nn.Sequential(*layers, nn.Linear(width, 3, dtype=torch.cfloat))

    def forward(self, coords):
        output = self.net(coords)
        return output.real


@register(
    source="vishwa91/wire, complex",
    traps="complex weights; omega and scale Parameters of shape [1]; .real at the end",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=3,
)
def wire(width):
    return Wire(width or 181)


@register(
    source="vishwa91/wire, complex, omega and scale trained",
    traps="the same with gradients of omega and scale",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=3,
)
def wire_trained(width):
    return Wire(width or 181, trainable=True)


class RealGabor(nn.Module):
    """WIRE's real layer: two linear layers of the same rows."""

    def __init__(self, in_features, out_features, omega0=10.0, sigma0=10.0):
        super().__init__()
        self.omega_0, self.scale_0 = omega0, sigma0
        self.freqs = nn.Linear(in_features, out_features)
        self.scale = nn.Linear(in_features, out_features)

    def forward(self, input):
        omega = self.omega_0 * self.freqs(input)
        scale = self.scale(input) * self.scale_0
        return torch.cos(omega) * torch.exp(-(scale**2))


@register(
    source="vishwa91/wire, real",
    traps="two linear layers of the same rows",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=6,
)
def wire_real(width):
    width = width or 128
    return nn.Sequential(RealGabor(2, width), RealGabor(width, width), RealGabor(width, width), nn.Linear(width, 3))


class GaussLayer(nn.Module):
    """exp(-(scale linear(x))^2)."""

    def __init__(self, in_features, out_features, sigma0=30.0):
        super().__init__()
        self.scale = sigma0
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, input):
        return torch.exp(-((self.scale * self.linear(input)) ** 2))


@register(
    source="vishwa91/wire, gauss",
    traps="-(scale z)**2 of a Python number",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=4,
)
def gauss(width):
    width = width or 256
    return nn.Sequential(GaussLayer(2, width), *[GaussLayer(width, width) for _ in range(3)], nn.Linear(width, 3))


class Bacon(nn.Module):
    """BACON and multiplicative filter networks: filters of the coordinates times linear layers of the product."""

    def __init__(self, width, layers=3):
        super().__init__()
        self.filters = nn.ModuleList([nn.Linear(2, width) for _ in range(layers + 1)])
        self.linear = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.output_linear = nn.ModuleList([nn.Linear(width, 3) for _ in range(layers + 1)])
        for f in self.filters:
            f.weight.requires_grad = False
            with torch.no_grad():
                f.weight.mul_(16.0)
                f.bias.uniform_(-math.pi, math.pi)

    def forward(self, coords):
        outputs = []
        out = torch.sin(self.filters[0](coords))
        for i in range(1, len(self.filters)):
            out = torch.sin(self.filters[i](coords)) * self.linear[i - 1](out)
            outputs.append(self.output_linear[i](out))
        return outputs[-1], outputs


@register(
    source="computational-imaging/bacon, multiplicative filter networks",
    traps="a frozen sine layer times another linear layer; several outputs, of which one is used",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=4,
)
def bacon(width):
    return Bacon(width or 256)
