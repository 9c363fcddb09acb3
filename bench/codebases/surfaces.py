"""Signed distance networks."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ._registry import eikonal, grid, register, squares
from .radiance import positional
from .sirens import FullyConnectedBlock


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
                x = torch.cat([x, inputs], 1) / np.sqrt(2)
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


class BoundedSdf(SdfNetwork):
    """volsdf: the same layers; the distance at most that to a bounding sphere, gradients of the bounded distance."""

    def __init__(self, width, **options):
        super().__init__(width, **options)
        self.sdf_bounding_sphere, self.sphere_scale = 3.0, 20.0
        self.softplus = self.activation

    def forward(self, input):
        input = positional(input, self.multires)
        x = input
        for l in range(self.num_layers - 1):
            lin = getattr(self, "lin" + str(l))
            if l in self.skip_in:
                x = torch.cat([x, input], 1) / np.sqrt(2)
            x = lin(x)
            if l < self.num_layers - 2:
                x = self.softplus(x)
        return x

    def gradient(self, x):
        x.requires_grad_(True)
        y = self.forward(x)[:, :1]
        ones = torch.ones_like(y, requires_grad=False)
        return torch.autograd.grad(y, x, ones, create_graph=True, retain_graph=True, only_inputs=True)[0]

    def get_sdf_vals(self, x):
        sdf = self.forward(x)[:, :1]
        return torch.minimum(sdf, self.sphere_scale * (self.sdf_bounding_sphere - x.norm(2, 1, keepdim=True)))

    def get_outputs(self, x):
        x.requires_grad_(True)
        output = self.forward(x)
        sdf = output[:, :1]
        sdf = torch.minimum(sdf, self.sphere_scale * (self.sdf_bounding_sphere - x.norm(2, 1, keepdim=True)))
        ones = torch.ones_like(sdf, requires_grad=False)
        gradients = torch.autograd.grad(sdf, x, ones, create_graph=True, retain_graph=True, only_inputs=True)[0]
        return sdf, output[:, 1:], gradients


def _bounded(model, inputs):
    """What its renderer takes, and the length of gradients at other points."""
    x = inputs[0].detach().clone()
    sdf, features, gradients = model.get_outputs(x)
    other = model.gradient(0.5 * x.detach())
    return (
        sdf.abs().mean()
        + features.square().mean() * 1e-2
        + (gradients.sum(-1)).square().mean()
        + ((other.norm(2, dim=1) - 1) ** 2).mean()
    )


@register(
    source="lioryariv/volsdf",
    traps="old weight_norm; get_outputs and get_sdf_vals bound the distance by minimum(); a gradient inside a method",
    inputs=grid(3),
    loss=_bounded,
    rows=4096,
    order=2,
    fused=8,
    methods=("forward", "gradient", "get_outputs", "get_sdf_vals"),
)
def volsdf(width):
    return BoundedSdf(max(width or 256, 48))


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
                x = torch.cat([x, input], -1) / np.sqrt(2)
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


class SignAgnostic(nn.Module):
    """SAL's decoder: ReLU layers, rows flattened by view, the last one's tanh added to itself; a dictionary out."""

    def __init__(self, width, layers=8, latent_in=(4,)):
        super().__init__()
        dims = [3] + [width] * layers + [1]
        self.num_layers, self.latent_in = len(dims), latent_in
        for l in range(self.num_layers - 1):
            out_dim = dims[l + 1] - dims[0] if l + 1 in latent_in else dims[l + 1]
            lin = nn.Linear(dims[l], out_dim)
            if l == self.num_layers - 2:
                nn.init.normal_(lin.weight, mean=2 * np.sqrt(np.pi) / np.sqrt(dims[l]), std=0.000001)
                nn.init.constant_(lin.bias, -1.0)
            else:
                nn.init.constant_(lin.bias, 0.0)
                nn.init.normal_(lin.weight, 0.0, np.sqrt(2) / np.sqrt(out_dim))
            setattr(self, "lin" + str(l), lin)
        self.relu, self.last_activation = nn.ReLU(), nn.Tanh()

    def decoder(self, input):
        x = input
        for l in range(self.num_layers - 1):
            lin = getattr(self, "lin" + str(l))
            if l in self.latent_in:
                x = torch.cat([x, input], 1) / np.sqrt(2)
            x = lin(x)
            if l < self.num_layers - 2:
                x = self.relu(x)
        x = self.last_activation(x) + 1.0 * x
        return x

    def forward(self, non_mnfld_pnts):
        return {"nonmanifold_pnts_pred": self.decoder(non_mnfld_pnts.view(-1, non_mnfld_pnts.shape[-1]))}


def _unsigned(model, inputs):
    """SAL's loss: the absolute value of the prediction from an unsigned distance."""
    y = model(*inputs)["nonmanifold_pnts_pred"].squeeze()
    return ((y.abs() - inputs[0].norm(dim=-1).reshape(-1).sub(0.5).abs()).abs()).mean()


@register(
    source="matanatz/SAL",
    traps="tanh(z) + 1.0 * z of the last linear layer: two consumers; a dictionary out",
    inputs=lambda rows: (grid(3)(rows)[0].view(1, -1, 3),),
    loss=_unsigned,
    rows=4096,
    order=1,
    fused=9,
)
def sal(width):
    return SignAgnostic(width or 512)


class DigsNet(nn.Module):
    """DiGS: SIREN's block in a decoder, then sign(y) sqrt(abs(y) + 1e-8), less a radius and scaled, both in place."""

    def __init__(self, width, layers=4):
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.fc_block = FullyConnectedBlock(3, 1, layers - 1, width)
        self.sphere_init_params = [1.6, 1.0]

    def forward(self, mnfld_pnts):
        output = self.decoder.fc_block(mnfld_pnts)
        radius, scaling = self.sphere_init_params
        output = torch.sign(output) * torch.sqrt(output.abs() + 1e-8)
        output -= radius
        output *= scaling
        return output


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
    traps="third derivatives; sign(y) sqrt(abs y) of the last linear layer, changed in place twice",
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


class DeepSdfDecoder(nn.Module):
    """DeepSDF as trained: old weight_norm, dropout that is active in training, `inference` called by forward."""

    def __init__(self, width, latent=64, layers=8, latent_in=(4,)):
        super().__init__()
        dims = [latent + 3] + [width] * layers + [1]
        self.num_layers, self.latent_in, self.dropout, self.dropout_prob = len(dims), latent_in, range(layers), 0.2
        for layer in range(self.num_layers - 1):
            out_dim = dims[layer + 1] - dims[0] if layer + 1 in latent_in else dims[layer + 1]
            lin = nn.Linear(dims[layer], out_dim)
            setattr(self, "lin" + str(layer), _old_weight_norm(lin) if layer < self.num_layers - 2 else lin)
        self.relu, self.th = nn.ReLU(), nn.Tanh()

    def inference(self, input):
        x = input
        for layer in range(self.num_layers - 1):
            lin = getattr(self, "lin" + str(layer))
            if layer in self.latent_in:
                x = torch.cat([x, input], 1)
            x = lin(x)
            if layer < self.num_layers - 2:
                x = self.relu(x)
                if self.dropout is not None and layer in self.dropout:
                    x = F.dropout(x, p=self.dropout_prob, training=self.training)
        if hasattr(self, "th"):
            x = self.th(x)
        return x

    def forward(self, sdf_data, lat_vecs_idx):
        xyz = sdf_data.reshape(-1, 4)[:, 0:3]
        latent_inputs = lat_vecs_idx.repeat(1, sdf_data.shape[1]).view(-1, lat_vecs_idx.shape[1])
        return self.inference(torch.cat([latent_inputs, xyz], 1))


def _scenes(rows):
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(4, max(1, rows // 4), 4, generator=generator) * 2 - 1
    return data, torch.randn(4, 64, generator=generator) * 0.1


def _clamped(model, inputs):
    """Its loss: absolute differences of values clamped to 0.1; dropout draws the same each time, to be compared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = model(*inputs)
    truth = inputs[0].reshape(-1, 4)[:, 3:]
    return (y.clamp(-0.1, 0.1) - truth.clamp(-0.1, 0.1)).abs().mean() + 1e-2 * y.square().mean()


@register(
    source="facebookresearch/DeepSDF, trained",
    traps="old weight_norm on all but the last layer; dropout draws in training; methods call each other",
    inputs=_scenes,
    loss=_clamped,
    rows=8192,
    order=1,
    fused=9,
    methods=("forward", "inference"),
)
def deepsdf_trained(width):
    return DeepSdfDecoder(max(width or 512, 80))


class ColourNetwork(nn.Module):
    """NeuS's renderer: points, encoded directions, normals, features; old weight_norm; sigmoid behind."""

    def __init__(self, width, feature_vector_size=256, n_layers=4):
        super().__init__()
        dims = [3 + 27 + 3 + feature_vector_size] + [width] * n_layers + [3]
        self.num_layers, self.squeeze_out = len(dims), True
        for l in range(self.num_layers - 1):
            setattr(self, "lin" + str(l), _old_weight_norm(nn.Linear(dims[l], dims[l + 1])))
        self.relu = nn.ReLU()

    def forward(self, points, normals, view_dirs, feature_vectors):
        x = torch.cat([points, positional(view_dirs, 4), normals, feature_vectors], dim=-1)
        for l in range(self.num_layers - 1):
            lin = getattr(self, "lin" + str(l))
            x = lin(x)
            if l < self.num_layers - 2:
                x = self.relu(x)
        if self.squeeze_out:
            x = torch.sigmoid(x)
        return x


def _rendered(rows):
    generator = torch.Generator().manual_seed(0)
    points, normals, views = (torch.randn(rows, 3, generator=generator) for _ in range(3))
    return points, F.normalize(normals, dim=-1), F.normalize(views, dim=-1), torch.randn(rows, 256, generator=generator)


@register(
    source="Totoro97/NeuS, colours",
    traps="old weight_norm on all layers, also the last one; its sigmoid is called under a condition",
    inputs=_rendered,
    loss=squares,
    rows=8192,
    order=1,
    fused=5,
)
def neus_colour(width):
    return ColourNetwork(width or 256)
