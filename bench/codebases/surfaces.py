"""Signed distance networks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._registry import eikonal, grid, register, squares
from .radiance import positional


def _old_weight_norm(layer: nn.Linear) -> nn.Linear:
    """PyTorch's weight_norm by hooks, that sets `weight` before each forward."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


class SdfNetwork(nn.Module):
    """NeuS: 8 layers of 256 by setattr, weight_norm, softplus(100), the input concatenated at layer 4 over sqrt 2."""

    def __init__(self, width, d_out=257, n_layers=8, skip_in=(4,), multires=6, weight_norm=True):
        super().__init__()
        self.multires, self.skip_in, self.scale = multires, skip_in, 1.0
        d_in = 3 + 6 * multires
        dims = [d_in] + [width] * n_layers + [min(d_out, width + 1)]
        self.num_layers = len(dims)
        for i in range(self.num_layers - 1):
            out_dim = dims[i + 1] - d_in if i + 1 in skip_in else dims[i + 1]
            lin = nn.Linear(dims[i], out_dim)
            with torch.no_grad():
                if i == self.num_layers - 2:
                    lin.weight.normal_(math.sqrt(math.pi) / math.sqrt(dims[i]), 0.0001)
                    lin.bias.fill_(-0.5)
                else:
                    lin.bias.zero_()
                    lin.weight.normal_(0.0, math.sqrt(2) / math.sqrt(out_dim))
            setattr(self, "lin" + str(i), _old_weight_norm(lin) if weight_norm else lin)
        self.activation = nn.Softplus(beta=100)

    def forward(self, inputs):
        inputs = inputs * self.scale
        inputs = positional(inputs, self.multires)
        x = inputs
        for i in range(self.num_layers - 1):
            lin = getattr(self, "lin" + str(i))
            if i in self.skip_in:
                x = torch.cat([x, inputs], 1) / math.sqrt(2)
            x = lin(x)
            if i < self.num_layers - 2:
                x = self.activation(x)
        return torch.cat([x[:, :1] / self.scale, x[:, 1:]], dim=-1)

    def sdf(self, x):
        return self.forward(x)[:, :1]

    def gradient(self, x):
        x.requires_grad_(True)
        y = self.sdf(x)
        ones = torch.ones_like(y, requires_grad=False)
        return torch.autograd.grad(y, x, ones, create_graph=True, retain_graph=True, only_inputs=True)[0].unsqueeze(1)


@register(
    source="Totoro97/NeuS",
    traps="layers by setattr; old weight_norm; concatenation over sqrt 2; sdf and gradient call self.forward",
    inputs=grid(3),
    loss=eikonal,
    rows=4096,
    order=2,
    fused=8,
    methods=("forward", "sdf", "gradient"),
)
def neus(width):
    return SdfNetwork(max(width or 256, 48))


@register(
    source="lioryariv/volsdf",
    traps="the same without weight_norm, with 9 outputs",
    inputs=grid(3),
    loss=eikonal,
    rows=4096,
    order=2,
    fused=8,
    methods=("forward", "sdf", "gradient"),
)
def volsdf(width):
    return SdfNetwork(max(width or 256, 48), d_out=9, weight_norm=False)


class ImplicitNet(nn.Module):
    """IGR: softplus(100) or ReLU, the input concatenated over sqrt 2, layers by setattr."""

    def __init__(self, width, layers=8, skip_in=(4,), beta=100.0):
        super().__init__()
        dims = [3] + [width] * layers + [1]
        self.num_layers, self.skip_in = len(dims), skip_in
        for i in range(self.num_layers - 1):
            out_dim = dims[i + 1] - 3 if i + 1 in skip_in else dims[i + 1]
            lin = nn.Linear(dims[i], out_dim)
            with torch.no_grad():
                if i == self.num_layers - 2:
                    lin.weight.normal_(math.sqrt(math.pi) / math.sqrt(dims[i]), 0.00001)
                    lin.bias.fill_(-1.0)
                else:
                    lin.bias.zero_()
                    lin.weight.normal_(0.0, math.sqrt(2) / math.sqrt(out_dim))
            setattr(self, "lin" + str(i), lin)
        self.activation = nn.Softplus(beta=beta) if beta > 0 else nn.ReLU()

    def forward(self, input):
        x = input
        for i in range(self.num_layers - 1):
            lin = getattr(self, "lin" + str(i))
            if i in self.skip_in:
                x = torch.cat([x, input], -1) / 2**0.5
            x = lin(x)
            if i < self.num_layers - 2:
                x = self.activation(x)
        return x


@register(
    source="amosgropp/IGR",
    traps="softplus(100); concatenation over sqrt 2 before layer 4",
    inputs=grid(3),
    loss=eikonal,
    rows=1024,
    order=2,
    fused=8,
)
def igr(width):
    return ImplicitNet(width or 512)


class SignAgnostic(ImplicitNet):
    """SAL: ReLU layers, the output's sign times a root or its own absolute value."""

    def forward(self, input):
        y = super().forward(input)
        return torch.sign(y) * torch.sqrt(y.abs() + 1e-8)


@register(
    source="matanatz/SAL",
    traps="sign(y) sqrt(abs y) of the last linear layer",
    inputs=grid(3),
    loss=squares,
    rows=4096,
    order=1,
    fused=9,
)
def sal(width):
    return SignAgnostic(width or 512, beta=0.0)


class DigsNet(nn.Module):
    """DiGS: a SIREN of geometric initialisation, trained on the divergence of its gradient."""

    def __init__(self, width, layers=4):
        super().__init__()
        self.fc_block = nn.ModuleList([nn.Linear(3 if i == 0 else width, width) for i in range(layers)])
        self.last = nn.Linear(width, 1)
        with torch.no_grad():
            for i, layer in enumerate(self.fc_block):
                k = layer.in_features
                bound = 1 / k if i == 0 else (6 / k) ** 0.5 / 30
                layer.weight.uniform_(-bound, bound)

    def forward(self, mnfld_pnts):
        x = mnfld_pnts
        for layer in self.fc_block:
            x = torch.sin(30 * layer(x))
        output = self.last(x)
        return torch.sign(output) * torch.sqrt(output.abs() + 1e-8)


def _divergence(model, inputs):
    x = inputs[0].detach().clone().requires_grad_()
    y = model(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    terms = [torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3)]
    return (
        y.abs().mean() + 1e-3 * torch.stack(terms).sum(0).abs().clamp(0, 50).mean() + (g.norm(dim=-1) - 1).abs().mean()
    )


@register(
    source="Chumbyte/DiGS",
    traps="third derivatives of a network that ends in sign(y) sqrt(abs y)",
    inputs=grid(3),
    loss=_divergence,
    rows=2048,
    order=3,
    fused=5,
)
def digs(width):
    return DigsNet(width or 256)


class DeepSdf(nn.Module):
    """DeepSDF: a latent before the coordinates, weight_norm or LayerNorm between linear and ReLU, dropout, tanh."""

    def __init__(self, width, latent=64, layers=8, latent_in=(4,), norm_layers=True):
        super().__init__()
        dims = [latent + 3] + [width] * layers + [1]
        self.num_layers, self.latent_in = len(dims), latent_in
        for i in range(self.num_layers - 1):
            out_dim = dims[i + 1] - dims[0] if i + 1 in latent_in else dims[i + 1]
            lin = nn.Linear(dims[i], out_dim)
            setattr(self, "lin" + str(i), nn.utils.parametrizations.weight_norm(lin) if norm_layers else lin)
            if not norm_layers and i < self.num_layers - 2:
                setattr(self, "bn" + str(i), nn.LayerNorm(out_dim))
        self.relu, self.th = nn.ReLU(), nn.Tanh()

    def forward(self, input):
        x = input
        for i in range(self.num_layers - 1):
            if i in self.latent_in:
                x = torch.cat([x, input], 1)
            x = getattr(self, "lin" + str(i))(x)
            if i < self.num_layers - 2:
                if hasattr(self, "bn" + str(i)):
                    x = getattr(self, "bn" + str(i))(x)
                x = self.relu(x)
                x = F.dropout(x, p=0.2, training=False)
        return self.th(x)


@register(
    source="facebookresearch/DeepSDF",
    traps="weight_norm; dropout; concatenation; tanh at the end",
    inputs=grid(67),
    loss=squares,
    rows=8192,
    order=1,
    fused=9,
)
def deepsdf(width):
    return DeepSdf(max(width or 512, 80))


@register(
    source="facebookresearch/DeepSDF, LayerNorm",
    traps="LayerNorm BETWEEN linear and ReLU",
    inputs=grid(67),
    loss=squares,
    rows=8192,
    order=1,
    fused=1,
)
def deepsdf_layernorm(width):
    return DeepSdf(max(width or 512, 80), norm_layers=False)
