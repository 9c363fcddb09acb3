"""Multiplicative filters, Gabor functions of two products, and frequencies that are plain tensors."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from ._registry import grid, register, squares


class ComplexGaborTwo(nn.Module):
    """WIRE-2D: exp(j omega z) exp(-scale^2 (abs(z)^2 + abs(y)^2)), y of a second layer; complex but the first."""

    def __init__(self, in_features, out_features, is_first=False, omega0=10.0, sigma0=10.0, trainable=False):
        super().__init__()
        dtype = torch.float if is_first else torch.cfloat
        self.omega_0 = nn.Parameter(omega0 * torch.ones(1), trainable)
        self.scale_0 = nn.Parameter(sigma0 * torch.ones(1), trainable)
        self.linear = nn.Linear(in_features, out_features, dtype=dtype)
        self.scale_orth = nn.Linear(in_features, out_features, dtype=dtype)

    def forward(self, input):
        lin = self.linear(input)
        window = lin.abs().square() + self.scale_orth(input).abs().square()
        wave = torch.exp(1j * self.omega_0 * lin)
        return wave * torch.exp(-self.scale_0 * self.scale_0 * window)


class WireTwo(nn.Module):
    """The network of them, its width halved because weights are complex and double."""

    def __init__(self, width, hidden_layers=2):
        super().__init__()
        options = dict(omega0=10.0, sigma0=10.0)
        layers = [ComplexGaborTwo(2, width, is_first=True, **options)]
        layers += [ComplexGaborTwo(width, width, **options) for _ in range(hidden_layers)]
        self.net = nn.Sequential(*layers, nn.Linear(width, 3, dtype=torch.cfloat))

    def forward(self, coords):
        output = self.net(coords)
        return output.real


@register(
    source="vishwa91/wire, 2D",
    traps="two complex linear layers of the same rows under one function; -scale * scale * (a + b)",
    inputs=grid(2),
    loss=squares,
    rows=8192,
    order=1,
    fused=0,
    pointwise=False,
)
def wire_2d(width):
    return WireTwo(width or 128)


class Fourier(nn.Module):
    """A filter of a multiplicative filter network: sin(linear(x)), frequencies scaled once."""

    def __init__(self, in_features, out_features, weight_scale):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.linear.weight.data *= weight_scale
        self.linear.bias.data.uniform_(-np.pi, np.pi)

    def forward(self, x):
        return torch.sin(self.linear(x))


class Gabor(nn.Module):
    """A Gabor filter: sin(linear(x)) exp(-gamma D / 2), D = abs(x)^2 + abs(mu)^2 - 2 x mu^T."""

    def __init__(self, in_features, out_features, weight_scale, alpha=1.5):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.mu = nn.Parameter(2 * torch.rand(out_features, in_features) - 1)
        self.gamma = nn.Parameter(torch.distributions.gamma.Gamma(alpha, 1.0).sample((out_features,)))
        self.linear.weight.data *= weight_scale * torch.sqrt(self.gamma.data[:, None])
        self.linear.bias.data.uniform_(-np.pi, np.pi)

    def forward(self, x):
        squares = (x**2).sum(-1, keepdim=True) + (self.mu**2).sum(-1)
        distance = squares - 2 * x @ self.mu.T
        return torch.sin(self.linear(x)) * torch.exp(-0.5 * distance * self.gamma[None, :])


class FilterNetwork(nn.Module):
    """Multiplicative filter networks: filters that are learned, one output, which may be a sine of it."""

    def __init__(self, width, filter, n_layers=3, input_scale=64.0, output_act=False):
        super().__init__()
        self.linear = nn.ModuleList([nn.Linear(width, width) for _ in range(n_layers)])
        self.output_linear = nn.Linear(width, 3)
        self.output_act = output_act
        for lin in self.linear:
            lin.weight.data.uniform_(-np.sqrt(1.0 / width), np.sqrt(1.0 / width))
        scale = input_scale / np.sqrt(n_layers + 1)
        self.filters = nn.ModuleList([filter(2, width, scale) for _ in range(n_layers + 1)])

    def forward(self, x):
        first, *others = self.filters
        h = first(x)
        for filter, linear in zip(others, self.linear):
            h = filter(x) * linear(h)
        y = self.output_linear(h)
        return torch.sin(y) if self.output_act else y


@register(
    source="boschresearch/multiplicative-filter-networks, Fourier",
    traps="a sine layer times another linear layer, both learned; the output may be a sine",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=5,
)
def mfn_fourier(width):
    return FilterNetwork(width or 256, Fourier, output_act=True)


@register(
    source="boschresearch/multiplicative-filter-networks, Gabor",
    traps="x @ mu.T without a bias, less than zero times it, inside a sum with [M, 1] and [1, N]; gamma of shape [N]",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=4,
    pointwise=False,
)
def mfn_gabor(width):
    return FilterNetwork(width or 256, Gabor)


class QuantisedFourier(nn.Module):
    """BACON's filter: frozen frequencies that are multiples of an interval, a learned phase."""

    def __init__(self, in_features, out_features, weight_scale, quantization_interval=2 * np.pi):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        for i in range(in_features):
            steps = int(2 * weight_scale[i] / quantization_interval) + 1
            init = torch.randint_like(self.linear.weight.data[:, i], 0, steps)
            self.linear.weight.data[:, i] = init * quantization_interval - weight_scale[i]
        self.linear.weight.requires_grad = False
        self.linear.bias.data.uniform_(-np.pi, np.pi)

    def forward(self, x):
        return torch.sin(self.linear(x))


class MultiscaleBacon(nn.Module):
    """BACON of several scales: a dictionary in; a dictionary of a list out, one output after each layer."""

    def __init__(self, width, hidden_layers=4, frequency=(32, 32), reuse_filters=False):
        super().__init__()
        interval = 2 * np.pi
        self.reuse_filters = reuse_filters
        self.stop_after: int | None = None
        self.linear = nn.ModuleList([nn.Linear(width, width) for _ in range(hidden_layers)])
        scale = [round((np.pi * f / (hidden_layers + 1)) / interval) * interval for f in frequency]
        self.filters = nn.ModuleList([QuantisedFourier(2, width, scale) for _ in range(hidden_layers + 1)])
        self.output_linear = nn.ModuleList([nn.Linear(width, 1) for _ in self.filters])
        for lin in (*self.linear, *self.output_linear):
            bound = np.sqrt(6 / width)
            lin.weight.data.uniform_(-bound, bound)
        self.output_layers = np.arange(1, len(self.filters))

    def forward(self, model_input):
        coords, outputs = model_input["coords"], []
        count = len(self.filters)
        if self.reuse_filters:  # two values for all layers
            low, high = self.filters[0](coords), self.filters[-1](coords)
            made = [low, low] + [high] * (count - 2)
        h = made[0] if self.reuse_filters else self.filters[0](coords)
        for i in range(1, count):
            h = (made[i] if self.reuse_filters else self.filters[i](coords)) * self.linear[i - 1](h)
            if i in self.output_layers:
                outputs.append(self.output_linear[i](h))
            if self.stop_after is not None and len(outputs) > self.stop_after:
                break
        return {"model_in": model_input, "model_out": {"output": outputs}}


def _in_dictionary(rows):
    return ({"coords": grid(2)(rows)[0] * 0.5},)


def _all_scales(model, inputs):
    outputs = model(*inputs)["model_out"]["output"]
    target = torch.cos(7 * inputs[0]["coords"].sum(-1, keepdim=True))
    return torch.stack([(y - target).square().mean() for y in outputs]).sum()


@register(
    source="computational-imaging/bacon, several scales",
    traps="frozen weights and learned biases; every output is in the loss; dictionaries in and out",
    inputs=_in_dictionary,
    loss=_all_scales,
    rows=16384,
    order=1,
    fused=5,
)
def bacon_multiscale(width):
    return MultiscaleBacon(width or 256)


@register(
    source="computational-imaging/bacon, filters used again",
    traps="one filter's output is a factor in several layers",
    inputs=_in_dictionary,
    loss=_all_scales,
    rows=16384,
    order=1,
    fused=2,
)
def bacon_reuse(width):
    return MultiscaleBacon(width or 256, reuse_filters=True)


class TensorSine(nn.Module):
    """BACON's baseline sine: w0 is a tensor that is neither parameter nor buffer, of an integer."""

    def __init__(self, w0=20):
        super().__init__()
        self.w0 = torch.tensor(w0)

    def forward(self, input):
        return torch.sin(self.w0 * input)


class ShiftedSoftplus(nn.Module):
    """BACON's softplus less the logarithm of two, that is a plain tensor."""

    def __init__(self):
        super().__init__()
        self.softplus = nn.Softplus()
        self.cst = torch.log(torch.tensor(2.0))

    def forward(self, input):
        return self.softplus(input) - self.cst


class Multiscale(nn.Module):
    """BACON's coordinate network: hidden layers have an output each."""

    def __init__(self, width, nonlinearity, hidden_layers=3):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width if i else 2, width), nonlinearity) for i in range(hidden_layers)]
        self.net = nn.Sequential(*layers)
        self.output_linear = nn.ModuleList([nn.Linear(width, 1) for _ in range(hidden_layers)])
        for i, (layer, _) in enumerate(self.net):
            bound = 1 / 2 if i == 0 else math.sqrt(6 / width) / 20
            layer.weight.data.uniform_(-bound, bound)

    def forward(self, model_input):
        outputs, out = [], model_input["coords"]
        for layer, output in zip(self.net, self.output_linear):
            out = layer(out)
            outputs.append(torch.sigmoid(output(out)))
        return {"model_in": model_input, "model_out": {"output": outputs}}


@register(
    source="computational-imaging/bacon, its SIREN of several scales",
    traps="w0 is a 0-dimensional integer tensor, no buffer; each layer's value is used twice",
    inputs=_in_dictionary,
    loss=_all_scales,
    rows=16384,
    order=1,
    fused=6,
)
def bacon_siren(width):
    return Multiscale(width or 256, TensorSine())


@register(
    source="computational-imaging/bacon, its softplus less a constant",
    traps="a constant that is a 0-dimensional tensor, no buffer, subtracted behind the function",
    inputs=_in_dictionary,
    loss=_all_scales,
    rows=16384,
    order=1,
    fused=6,
)
def bacon_softplus(width):
    return Multiscale(width or 256, ShiftedSoftplus())
