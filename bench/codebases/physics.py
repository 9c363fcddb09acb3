"""Networks of differential equations and operators."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from ._registry import grid, laplacian, register, squares


class Fnn(nn.Module):
    """deepxde's FNN: the activation a function, or one for each layer."""

    def __init__(self, sizes, activation):
        super().__init__()
        self.activation = activation
        self.linears = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
        self._input_transform = self._output_transform = None

    def forward(self, inputs):
        x = inputs
        if self._input_transform is not None:
            x = self._input_transform(x)
        for i, linear in enumerate(self.linears[:-1]):
            x = self.activation[i](linear(x)) if isinstance(self.activation, list) else self.activation(linear(x))
        x = self.linears[-1](x)
        if self._output_transform is not None:
            x = self._output_transform(inputs, x)
        return x


@register(
    source="lululxvi/deepxde, FNN",
    traps="the activation is a function, or a list of them",
    inputs=grid(2),
    loss=laplacian,
    rows=4096,
    order=3,
    fused=3,
)
def deepxde(width):
    return Fnn([2, *[width or 32] * 3, 1], torch.tanh)


@register(
    source="lululxvi/deepxde, FNN with a list of activations",
    traps="a list of activations",
    inputs=grid(2),
    loss=squares,
    rows=4096,
    order=1,
    fused=3,
)
def deepxde_list(width):
    return Fnn([2, *[width or 32] * 3, 1], [torch.tanh, torch.sin, F.silu])


class ParallelFnn(nn.Module):
    """deepxde's PFNN: sub-networks side by side, joined at the end."""

    def __init__(self, width, outputs=2):
        super().__init__()
        self.layers = nn.ModuleList([
            nn.ModuleList([nn.Linear(2, width) for _ in range(outputs)]),
            nn.ModuleList([nn.Linear(width, width) for _ in range(outputs)]),
            nn.ModuleList([nn.Linear(width, 1) for _ in range(outputs)]),
        ])  # fmt: skip

    def forward(self, inputs):
        x = inputs
        for layer in self.layers[:-1]:
            if isinstance(x, list):
                x = [torch.tanh(f(v)) for f, v in zip(layer, x)]
            else:
                x = [torch.tanh(f(x)) for f in layer]
        return torch.cat([f(v) for f, v in zip(self.layers[-1], x)], dim=1)


@register(
    source="lululxvi/deepxde, PFNN",
    traps="lists of pre-activations; several layers of the same rows",
    inputs=grid(2),
    loss=squares,
    rows=4096,
    order=1,
    fused=4,
)
def deepxde_parallel(width):
    return ParallelFnn(width or 64)


class WeightFact(nn.Module):
    """physicsnemo's WeightFactLinear: weight = g v, a factor for each row."""

    def __init__(self, in_features, out_features):
        super().__init__()
        made = nn.Linear(in_features, out_features)
        g = torch.exp(torch.randn(out_features, 1, generator=torch.Generator().manual_seed(0)) * 0.1 + 1.0)
        self.g, self.v = nn.Parameter(g), nn.Parameter(made.weight.detach() / g)
        self.bias = nn.Parameter(made.bias.detach())

    def forward(self, input):
        return F.linear(input, self.g * self.v, self.bias)


class WeightNorm(nn.Module):
    """physicsnemo's WeightNormLinear: weight = weight_g v / abs(v), rows normed at each call, biases from 0."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, input):
        norm = self.weight.norm(dim=1, p=2, keepdim=True)
        weight = self.weight_g * self.weight / norm
        return F.linear(input, weight, self.bias)


class FcLayer(nn.Module):
    """physicsnemo's FCLayer: activation_fn(activation_par * linear(x)), the parameter that of all layers."""

    def __init__(self, in_features, out_features, activation_fn, activation_par, weight_fact=False, weight_norm=False):
        super().__init__()
        kind = WeightNorm if weight_norm else WeightFact if weight_fact else nn.Linear
        self.linear = kind(in_features, out_features)
        self.activation_fn, self.activation_par = activation_fn, activation_par

    def forward(self, x):
        x = self.linear(x)
        if self.activation_fn is not None:
            if self.activation_par is None:
                x = self.activation_fn(x)
            else:
                x = self.activation_fn(self.activation_par * x)
        return x


class FullyConnected(nn.Module):
    """physicsnemo's FullyConnected: skips every two layers without a factor, adaptive activations."""

    def __init__(self, width, layers=6, skip=True, **options):
        super().__init__()
        self.activation_par = nn.Parameter(torch.ones(1))
        self.skip_connections = skip
        self.layers = nn.ModuleList([
            FcLayer(3 if i == 0 else width, width, F.silu, self.activation_par, **options) for i in range(layers)
        ])  # fmt: skip
        self.final_layer = FcLayer(width, 1, None, None)

    def forward(self, x):
        x_skip = None
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.skip_connections and i % 2 == 0:
                if x_skip is not None:
                    x, x_skip = x + x_skip, x
                else:
                    x_skip = x
        return self.final_layer(x)


@register(
    source="NVIDIA/physicsnemo, FullyConnected",
    traps="ONE learnable activation_par of shape [1] for all layers; skips without a factor",
    inputs=grid(3),
    loss=squares,
    rows=8192,
    order=1,
    fused=6,
)
def physicsnemo(width):
    return FullyConnected(width or 512)


@register(
    source="NVIDIA/physicsnemo, weight_fact",
    traps="weights that are computed at each call",
    inputs=grid(3),
    loss=squares,
    rows=8192,
    order=1,
    fused=6,
)
def physicsnemo_weight_fact(width):
    return FullyConnected(width or 256, skip=False, weight_fact=True)


@register(
    source="NVIDIA/physicsnemo, weight_norm",
    traps="a layer of its own that norms the rows of its weight at each call",
    inputs=grid(3),
    loss=laplacian,
    rows=2048,
    order=3,
    fused=6,
)
def physicsnemo_weight_norm(width):
    return FullyConnected(width or 256, skip=False, weight_norm=True)


class ChannelMlp(nn.Module):
    """neuralop's ChannelMLP: convolutions of width 1 over channels."""

    def __init__(self, width, channels=16):
        super().__init__()
        self.fcs = nn.ModuleList([nn.Conv1d(channels, width, 1), nn.Conv1d(width, width, 1), nn.Conv1d(width, 4, 1)])
        self.non_linearity = F.gelu

    def forward(self, x):
        shape, reshaped = list(x.shape), False
        if x.ndim > 3:
            x, reshaped = x.reshape(*shape[:2], -1), True
        for i, fc in enumerate(self.fcs):
            x = fc(x)
            if i < len(self.fcs) - 1:
                x = self.non_linearity(x)
        return x.reshape((shape[0], x.shape[1], *shape[2:])) if reshaped else x


@register(
    source="neuraloperator/neuraloperator, ChannelMLP",
    traps="Conv1d of width 1: features are dimension 1",
    inputs=lambda rows: (torch.randn(2, 16, max(1, rows // 8), 4, generator=torch.Generator().manual_seed(0)),),
    loss=squares,
    rows=8192,
    order=1,
    fused=2,
)
def neuralop(width):
    return ChannelMlp(width or 128)
