"""Radiance fields and networks of pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._registry import grid, register, squares


def positional(x: Tensor, n: int, include: bool = True) -> Tensor:
    """Sines and cosines of x times powers of two, x itself before them or not."""
    parts = [x] if include else []
    for i in range(n):
        parts += [torch.sin(2.0**i * x), torch.cos(2.0**i * x)]
    return torch.cat(parts, -1)


class RenderFeatures(nn.Module):
    """TensoRF's MLPRender_Fea: features, directions and their encodings through three layers."""

    def __init__(self, width, inChanel=27, viewpe=2, feape=2):
        super().__init__()
        self.in_mlpC = 2 * viewpe * 3 + 2 * feape * inChanel + 3 + inChanel
        self.viewpe, self.feape = viewpe, feape
        layer1 = nn.Linear(self.in_mlpC, width)
        layer2 = nn.Linear(width, width)
        layer3 = nn.Linear(width, 3)
        self.mlp = nn.Sequential(layer1, nn.ReLU(inplace=True), layer2, nn.ReLU(inplace=True), layer3)
        nn.init.constant_(self.mlp[-1].bias, 0)

    def forward(self, pts, viewdirs, features):
        indata = [features, viewdirs]
        indata += [positional(features, self.feape, False), positional(viewdirs, self.viewpe, False)]
        mlp_in = torch.cat(indata, dim=-1)
        return torch.sigmoid(self.mlp(mlp_in))


def _features(rows):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(rows, 3, generator=generator),
        F.normalize(torch.randn(rows, 3, generator=generator), dim=-1),
        torch.randn(rows, 27, generator=generator),
    )


@register(
    source="apchenstu/TensoRF",
    traps="ReLU in place in a Sequential; the number of rows changes at every step",
    inputs=_features,
    loss=squares,
    rows=16384,
    order=1,
    fused=3,
)
def tensorf(width):
    return RenderFeatures(width or 128)


class StudioMLP(nn.Module):
    """nerfstudio's MLP: one activation module for all layers, the input put before layers of skip_connections."""

    def __init__(self, in_dim, num_layers, layer_width, out_dim, skip_connections=(4,), out_activation=None):
        super().__init__()
        self.activation, self.out_activation = nn.ReLU(), out_activation
        self._skip_connections = set(skip_connections)
        layers = []
        for i in range(num_layers - 1):
            layers.append(
                nn.Linear(in_dim if i == 0 else layer_width + in_dim * (i in self._skip_connections), layer_width)
            )
        layers.append(nn.Linear(layer_width, out_dim))
        self.layers = nn.ModuleList(layers)

    def forward(self, in_tensor):
        x = in_tensor
        for i, layer in enumerate(self.layers):
            if i in self._skip_connections:
                x = torch.cat([in_tensor, x], -1)
            x = layer(x)
            if self.activation is not None and i < len(self.layers) - 1:
                x = self.activation(x)
        if self.out_activation is not None:
            x = self.out_activation(x)
        return x


@register(
    source="nerfstudio-project/nerfstudio",
    traps="ONE activation module; concatenation before a layer",
    inputs=grid(63),
    loss=squares,
    rows=16384,
    order=1,
    fused=8,
)
def nerfstudio(width):
    return StudioMLP(63, 8, width or 256, 4, out_activation=nn.Sigmoid())


class _TruncExp(torch.autograd.Function):
    """exp whose derivative is cut off."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.exp(x.clamp(-15, 15))


trunc_exp = _TruncExp.apply


class NgpNetwork(nn.Module):
    """torch-ngp: no biases, ReLU in place, a Function of its own on the first column."""

    def __init__(self, width, geo_feat_dim=15, num_layers=2, num_layers_color=3):
        super().__init__()
        self.sigma_net = nn.ModuleList([
            nn.Linear(32 if i == 0 else width, 1 + geo_feat_dim if i == num_layers - 1 else width, bias=False)
            for i in range(num_layers)
        ])  # fmt: skip
        self.color_net = nn.ModuleList([
            nn.Linear(16 + geo_feat_dim if i == 0 else width, 3 if i == num_layers_color - 1 else width, bias=False)
            for i in range(num_layers_color)
        ])  # fmt: skip

    def density(self, x):
        h = x
        for i, layer in enumerate(self.sigma_net):
            h = layer(h)
            if i != len(self.sigma_net) - 1:
                h = F.relu(h, inplace=True)
        sigma = trunc_exp(h[..., 0])
        return {"sigma": sigma, "geo_feat": h[..., 1:]}

    def color(self, d, geo_feat):
        h = torch.cat([d, geo_feat], dim=-1)
        for i, layer in enumerate(self.color_net):
            h = layer(h)
            if i != len(self.color_net) - 1:
                h = F.relu(h, inplace=True)
        return torch.sigmoid(h)

    def forward(self, x, d):
        found = self.density(x)
        return torch.cat([self.color(d, found["geo_feat"]), found["sigma"].unsqueeze(-1)], -1)


def _encoded(rows):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 32, generator=generator), torch.randn(rows, 16, generator=generator)


@register(
    source="ashawkey/torch-ngp",
    traps="no biases; F.relu in place; trunc_exp, a Function bound at import, on column 0; methods density and color",
    inputs=_encoded,
    loss=squares,
    rows=16384,
    order=1,
    fused=4,
    methods=("forward", "density", "color"),
)
def torch_ngp(width):
    return NgpNetwork(width or 64)


class AccMLP(nn.Module):
    """nerfacc's examples: the input put behind the output of layer 4, separate density and colour."""

    def __init__(self, width, net_depth=8, input_dim=63, condition_dim=27):
        super().__init__()
        self.skip_layer, self.hidden_activation = 4, nn.ReLU()
        self.hidden_layers, columns = nn.ModuleList(), input_dim
        for i in range(net_depth):
            self.hidden_layers.append(nn.Linear(columns, width))
            columns = width + input_dim if i % self.skip_layer == 0 and i > 0 else width
        self.sigma_layer = nn.Linear(columns, 1)
        self.bottleneck_layer = nn.Linear(columns, width)
        self.rgb_hidden = nn.Linear(width + condition_dim, max(1, width // 2))
        self.rgb_output = nn.Linear(max(1, width // 2), 3)

    def query_density(self, x):
        inputs = x
        for i, layer in enumerate(self.hidden_layers):
            x = self.hidden_activation(layer(x))
            if i % self.skip_layer == 0 and i > 0:
                x = torch.cat([x, inputs], dim=-1)
        return F.relu(self.sigma_layer(x)), x

    def forward(self, x, condition):
        sigma, h = self.query_density(x)
        h = torch.cat([self.bottleneck_layer(h), condition], dim=-1)
        h = self.hidden_activation(self.rgb_hidden(h))
        return torch.cat([torch.sigmoid(self.rgb_output(h)), sigma], -1)


def _points_and_views(rows):
    generator = torch.Generator().manual_seed(0)
    points, views = torch.rand(rows, 3, generator=generator), torch.randn(rows, 3, generator=generator)
    return positional(points, 10), positional(F.normalize(views, dim=-1), 4)


@register(
    source="nerfstudio-project/nerfacc",
    traps="concatenation after a layer; query_density",
    inputs=_points_and_views,
    loss=squares,
    rows=8192,
    order=1,
    fused=11,
    methods=("forward", "query_density"),
)
def nerfacc(width):
    return AccMLP(width or 256)


class WispDecoder(nn.Module):
    """kaolin-wisp's BasicDecoder: the activation a plain function, an optional skip."""

    def __init__(self, width, num_layers=2, input_dim=32, output_dim=16):
        super().__init__()
        self.activation = torch.relu
        self.layers = nn.ModuleList([nn.Linear(input_dim if i == 0 else width, width) for i in range(num_layers)])
        self.lout = nn.Linear(width, output_dim)

    def forward(self, x, return_h=False):
        h = x
        for layer in self.layers:
            h = self.activation(layer(h))
        out = self.lout(h)
        return (out, h) if return_h else out


@register(
    source="NVIDIAGameWorks/kaolin-wisp",
    traps="the activation is a plain function; the last hidden layer may be returned, too",
    inputs=grid(32),
    loss=squares,
    rows=16384,
    order=1,
    fused=2,
)
def kaolin_wisp(width):
    return WispDecoder(width or 128)


class PlainNerf(nn.Module):
    """nerf-pytorch: 8 layers of 256 with the input concatenated after layer 4, a branch with view directions."""

    def __init__(self, width, depth=8, input_ch=63, input_ch_views=27, skips=(4,)):
        super().__init__()
        self.skips, self.input_ch, self.input_ch_views = skips, input_ch, input_ch_views
        self.pts_linears = nn.ModuleList(
            [nn.Linear(input_ch, width)]
            + [nn.Linear(width if i not in skips else width + input_ch, width) for i in range(depth - 1)]
        )
        self.views_linears = nn.ModuleList([nn.Linear(input_ch_views + width, max(1, width // 2))])
        self.feature_linear = nn.Linear(width, width)
        self.alpha_linear = nn.Linear(width, 1)
        self.rgb_linear = nn.Linear(max(1, width // 2), 3)

    def forward(self, x):
        input_pts, input_views = torch.split(x, [self.input_ch, self.input_ch_views], dim=-1)
        h = input_pts
        for i, _ in enumerate(self.pts_linears):
            h = self.pts_linears[i](h)
            h = F.relu(h)
            if i in self.skips:
                h = torch.cat([input_pts, h], -1)
        alpha = self.alpha_linear(h)
        feature = self.feature_linear(h)
        h = torch.cat([feature, input_views], -1)
        for i, _ in enumerate(self.views_linears):
            h = self.views_linears[i](h)
            h = F.relu(h)
        rgb = self.rgb_linear(h)
        return torch.cat([rgb, alpha], -1)


@register(
    source="yenchenlin/nerf-pytorch",
    traps="concatenation after a layer; two linear layers of the same rows without a function",
    inputs=lambda rows: (torch.cat(_points_and_views(rows), -1),),
    loss=squares,
    rows=16384,
    order=1,
    fused=9,
)
def nerf_pytorch(width):
    return PlainNerf(width or 256)


class Attenuation(nn.Module):
    """NAF: the input put before a layer, activations sorted by name."""

    def __init__(self, width, num_layers=4, in_dim=32):
        super().__init__()
        self.skips = (2,)
        self.layers = nn.ModuleList([
            nn.Linear(in_dim if i == 0 else width + in_dim * (i in self.skips), width if i < num_layers - 1 else 1)
            for i in range(num_layers)
        ])  # fmt: skip
        self.activations = nn.ModuleList([nn.LeakyReLU() for _ in range(num_layers - 1)] + [nn.Sigmoid()])

    def forward(self, x):
        inputs = x[..., : self.layers[0].in_features]
        for i, (layer, activation) in enumerate(zip(self.layers, self.activations)):
            if i in self.skips:
                x = torch.cat([inputs, x], -1)
            x = activation(layer(x))
        return x


@register(
    source="Ruyi-Zha/naf_cbct",
    traps="LeakyReLU, concatenation before a layer, sigmoid at the end",
    inputs=grid(32),
    loss=squares,
    rows=16384,
    order=1,
    fused=4,
)
def naf(width):
    return Attenuation(width or 32)


class ManyTiny(nn.Module):
    """KiloNeRF: one tiny network for each cell, as batched products."""

    def __init__(self, width, networks=64, layers=3, inputs=27):
        super().__init__()
        sizes = [inputs, *[width] * layers, 4]
        bounds = [(6 / a) ** 0.5 / 2 for a in sizes]
        self.weights = nn.ParameterList([
            nn.Parameter(torch.empty(networks, a, b).uniform_(-k, k)) for a, b, k in zip(sizes, sizes[1:], bounds)
        ])  # fmt: skip
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(networks, 1, b)) for b in sizes[1:]])

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight) if i % 2 else torch.bmm(x, weight) + bias
            if i < len(self.weights) - 1:
                x = F.relu(x)
        return x


def _cells(rows):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(64, max(1, rows // 64), 27, generator=generator) * 2 - 1,)


@register(
    source="creiser/kilonerf",
    traps="a batch of networks: bmm with a bias [G, 1, N], and baddbmm",
    inputs=_cells,
    loss=squares,
    rows=16384,
    order=1,
    fused=3,
)
def kilonerf(width):
    return ManyTiny(width or 32)


class Liif(nn.Module):
    """LIIF's decoder: 580 columns of features and coordinates, four layers of 256."""

    def __init__(self, width, in_dim=580, out_dim=3):
        super().__init__()
        layers, last = [], in_dim
        for _ in range(4):
            layers += [nn.Linear(last, width), nn.ReLU()]
            last = width
        self.layers = nn.Sequential(*layers, nn.Linear(last, out_dim))

    def forward(self, x):
        shape = x.shape[:-1]
        x = self.layers(x.view(-1, x.shape[-1]))
        return x.view(*shape, -1)


@register(
    source="yinboc/liif",
    traps="580 columns; view before and after",
    inputs=lambda rows: (grid(580)(rows)[0].view(2, -1, 580),),
    loss=squares,
    rows=4608,
    order=1,
    fused=4,
)
def liif(width):
    return Liif(width or 256)


class Nerp(nn.Module):
    """NeRP: Fourier features of a matrix that is no buffer, then a SIREN."""

    def __init__(self, width, embedding=128, layers=6):
        super().__init__()
        self.B = torch.randn(embedding, 3, generator=torch.Generator().manual_seed(0)) * 4
        self.linears = nn.ModuleList([nn.Linear(2 * embedding if i == 0 else width, width) for i in range(layers)])
        self.out = nn.Linear(width, 1)
        with torch.no_grad():
            for layer in self.linears:
                k = layer.in_features
                layer.weight.uniform_(-((6 / k) ** 0.5) / 30, (6 / k) ** 0.5 / 30)

    def forward(self, x):
        projected = (2.0 * torch.pi * x) @ self.B.t()
        x = torch.cat([torch.sin(projected), torch.cos(projected)], dim=-1)
        for layer in self.linears:
            x = torch.sin(30 * layer(x))
        return torch.sigmoid(self.out(x))


@register(
    source="liyues/NeRP",
    traps="an encoding by a matrix that is no buffer; its product has two consumers",
    inputs=grid(3, 0.0),
    loss=squares,
    rows=16384,
    order=1,
    fused=7,
)
def nerp(width):
    return Nerp(width or 256)
