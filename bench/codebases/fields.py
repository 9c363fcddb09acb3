"""More of radiance fields, pictures and equations: what their networks do beyond a chain of layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._registry import grid, register, squares, target
from .physics import Fnn, FullyConnected
from .radiance import StudioMLP, WispDecoder, positional

# -- SplitNet as its author wrote it


class GaussianEncoding(nn.Module):
    """cos and sin of 2 pi x b^T, b a buffer."""

    def __init__(self, sigma, input_size, encoded_size):
        super().__init__()
        self.register_buffer("b", torch.randn(encoded_size, input_size) * sigma)

    def forward(self, v):
        vp = 2 * math.pi * v @ self.b.T
        return torch.cat((torch.cos(vp), torch.sin(vp)), dim=-1)


class SplitOmegas(nn.Module):
    """SplitNet's layer: a list of the four parts of z is changed part by part; forward drops nine of ten tensors."""

    def __init__(self, input_dim, output_dim, m=1.0, omegas=(1, 1, 1.0, 1), use_bias=True):
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim * 4, bias=use_bias)
        self.dropout = nn.Dropout(0)
        self.m, self.omegas = m, omegas

    def forward(self, x):
        h, _ = self.forward_with_activations(x)
        return h

    def forward_with_activations(self, x):
        z = self.linear(x)
        parts = list(z.chunk(4, dim=-1))
        for i, omega in enumerate(self.omegas):
            parts[i] = omega * parts[i]
        functions = [parts[0].tanh(), parts[1].sigmoid(), parts[2].sin(), parts[3].cos()]
        h = functions[0] * functions[1] * functions[2] * functions[3]
        return h * self.m, [x, z, *parts, *functions]


class SplitLinear(nn.Module):
    """Its variant whose last part has no function."""

    def __init__(self, input_dim, output_dim, m=1.0):
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim * 4)
        self.m = m

    def forward(self, x):
        a, b, c, d = self.linear(x).chunk(4, dim=-1)
        return a.tanh() * b.sigmoid() * c.sin() * d * self.m


class SplitPicture(nn.Module):
    """SplitNet on pictures: an encoding, then split layers to the last, or a linear one."""

    def __init__(self, width, layer, encoding_size=128, hidden_layers=1, m=(10.0, 10.0, 1.0), outermost_linear=False):
        super().__init__()
        self.encoding = GaussianEncoding(10.0, 2, encoding_size)
        net = [layer(2 * encoding_size, width, m=m[0])]
        net += [layer(width, width, m=m[i + 1]) for i in range(hidden_layers)]
        net.append(nn.Linear(width, 1) if outermost_linear else layer(width, 1, m=m[-1]))
        self.net = nn.Sequential(*net)

    def forward(self, x):
        x = self.encoding(x)
        return self.net(x)

    def forward_with_activations(self, x):
        h, made = self.encoding(x), []
        for layer in self.net:
            if isinstance(layer, SplitOmegas):
                h, acts = layer.forward_with_activations(h)
            else:
                h, acts = layer(h), []
            made.append((h, acts))
        return h, made


@register(
    source="SplitNet on pictures",
    traps="parts of z in a list that is changed; nine more tensors that forward drops and another method returns",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=3,
    methods=("forward", "forward_with_activations"),
)
def splitnet_picture(width):
    return SplitPicture(width or 128, SplitOmegas)


@register(
    source="SplitNet, the last part linear",
    traps="a part of z without a function, times functions of the other parts",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=2,
)
def splitnet_linear(width):
    return SplitPicture(width or 64, SplitLinear, encoding_size=64, outermost_linear=True)


class SplitRender(nn.Module):
    """TensoRF with SplitNet: the encoded features through several split networks, the sum of their sigmoids."""

    def __init__(self, width, configs, inChanel=27, viewpe=2, feape=2):
        super().__init__()
        self.viewpe, self.feape = viewpe, feape
        columns = 2 * viewpe * 3 + 2 * feape * inChanel + 3 + inChanel
        self.networks = nn.ModuleList([
            nn.Sequential(SplitOmegas(columns, width, m=m[0]), SplitOmegas(width, width, m=m[1]), nn.Linear(width, 3))
            for m in configs
        ])  # fmt: skip

    def forward(self, pts, viewdirs, features):
        indata = [features, viewdirs]
        indata += [positional(features, self.feape, False), positional(viewdirs, self.viewpe, False)]
        mlp_in = torch.cat(indata, dim=-1)
        rgb = 0
        for net in self.networks:
            rgb = rgb + net(mlp_in).sigmoid()
        return rgb


def _features(rows):
    generator = torch.Generator().manual_seed(0)
    views = F.normalize(torch.randn(rows, 3, generator=generator), dim=-1)
    return torch.rand(rows, 3, generator=generator), views, torch.randn(rows, 27, generator=generator)


@register(
    source="TensoRF with SplitNet",
    traps="a sum of sigmoids that begins with the number 0; a width of 42; rows change every step",
    inputs=_features,
    loss=squares,
    rows=8192,
    order=1,
    fused=6,
)
def splitnet_render(width):
    return SplitRender(width or 42, [(10.0, 10.0), (10.0, 10.0)])


# -- functions that are not pointwise


class MinMax(nn.Module):
    """kaolin-wisp's function that orders neighbouring columns."""

    def forward(self, x):
        rows, columns = x.shape
        pairs = x.reshape(rows, columns // 2, 2)
        low, high = pairs.min(-1).values, pairs.max(-1).values
        return torch.stack([low, high], dim=-1).reshape(rows, columns)


class FullSort(nn.Module):
    """kaolin-wisp's function that sorts a row."""

    def forward(self, x):
        return x.sort(dim=-1).values


def _sorting(width, function):
    decoder = WispDecoder(width or 128)
    decoder.activation = function
    return decoder


@register(
    source="NVIDIAGameWorks/kaolin-wisp, minmax",
    traps="a function of pairs of columns is not pointwise",
    inputs=grid(32),
    loss=squares,
    rows=8192,
    order=1,
    fused=0,
    pointwise=False,
)
def kaolin_wisp_minmax(width):
    return _sorting(width, MinMax())


@register(
    source="NVIDIAGameWorks/kaolin-wisp, fullsort",
    traps="a function of a whole row is not pointwise",
    inputs=grid(32),
    loss=squares,
    rows=8192,
    order=1,
    fused=0,
    pointwise=False,
)
def kaolin_wisp_fullsort(width):
    return _sorting(width, FullSort())


class WispSkip(nn.Module):
    """kaolin-wisp's decoder with a skip: the input put before a layer's output, sines as a plain function."""

    def __init__(self, width, input_dim=16, num_layers=4, skip=(2,)):
        super().__init__()
        self.activation, self.skip = torch.sin, list(skip)
        self.layers = nn.ModuleList([
            nn.Linear(input_dim if i == 0 else width + input_dim * (i - 1 in skip), width, bias=False)
            for i in range(num_layers)
        ])  # fmt: skip
        self.lout = nn.Linear(width, 4, bias=False)

    def forward(self, x, return_h=False):
        h = self.activation(self.layers[0](x))
        for i in range(1, len(self.layers)):
            h = self.activation(self.layers[i](h))
            if i in self.skip:
                h = torch.cat([x, h], dim=-1)
        return (self.lout(h), h) if return_h else self.lout(h)


@register(
    source="NVIDIAGameWorks/kaolin-wisp, skip",
    traps="no biases; torch.sin itself as the activation; the input BEFORE the output of a layer",
    inputs=grid(16),
    loss=squares,
    rows=8192,
    order=1,
    fused=4,
)
def kaolin_wisp_skip(width):
    return WispSkip(width or 128)


# -- fields and their normals


class AccBase(nn.Module):
    """nerfacc's MLP: one function for all by a default argument, the input behind outputs of layers, or no layers."""

    shared = nn.ReLU()

    def __init__(self, input_dim, output_dim=None, net_depth=8, net_width=256, skip_layer=4):
        super().__init__()
        self.net_depth, self.skip_layer, self.output_enabled = net_depth, skip_layer, output_dim is not None
        self.hidden_activation, self.output_activation = AccBase.shared, nn.Identity()
        self.hidden_layers, columns = nn.ModuleList(), input_dim
        for i in range(net_depth):
            self.hidden_layers.append(nn.Linear(columns, net_width))
            columns = net_width + input_dim * (skip_layer is not None and i % skip_layer == 0 and i > 0)
        self.output_dim = columns
        if self.output_enabled:
            self.output_layer = nn.Linear(columns, output_dim)

    def forward(self, x):
        inputs = x
        for i in range(self.net_depth):
            x = self.hidden_layers[i](x)
            x = self.hidden_activation(x)
            if self.skip_layer is not None and i % self.skip_layer == 0 and i > 0:
                x = torch.cat([x, inputs], dim=-1)
        if self.output_enabled:
            x = self.output_layer(x)
            x = self.output_activation(x)
        return x


class AccField(nn.Module):
    """nerfacc's field: an encoding by a buffer of integers, the direction of a ray expanded to its samples."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("scales", torch.tensor([2**i for i in range(10)]))
        self.base = AccBase(63, net_width=width)
        self.sigma_layer = AccBase(self.base.output_dim, 1, net_depth=0)
        self.bottleneck_layer = AccBase(self.base.output_dim, width, net_depth=0)
        self.rgb_layer = AccBase(width + 27, 3, net_depth=1, net_width=max(1, width // 2), skip_layer=None)

    def encode(self, x, n):
        xb = torch.reshape(x[..., None, :] * self.scales[:n, None], [*x.shape[:-1], 3 * n])
        latent = torch.sin(torch.cat([xb, xb + 0.5 * math.pi], dim=-1))
        return torch.cat([x, latent], dim=-1)

    def query_density(self, x):
        return F.relu(self.sigma_layer(self.base(self.encode(x, 10))))

    def query_opacity(self, x):
        return self.query_density(x) * 5e-3

    def forward(self, x, condition):
        x = self.base(self.encode(x, 10))
        raw_sigma = self.sigma_layer(x)
        condition = self.encode(condition, 4)
        rays, columns = condition.shape
        condition = condition.view([rays, 1, columns]).expand([*x.shape[:-1], columns])
        x = torch.cat([self.bottleneck_layer(x), condition], dim=-1)
        return torch.sigmoid(self.rgb_layer(x)), F.relu(raw_sigma)


def _rays(rows):
    generator = torch.Generator().manual_seed(0)
    rays = max(1, rows // 16)
    points = torch.rand(rays, 16, 3, generator=generator)
    return points, F.normalize(torch.randn(rays, 3, generator=generator), dim=-1)


@register(
    source="nerfstudio-project/nerfacc, its vanilla field",
    traps="ONE function for all networks by a default argument; rays x samples; a view direction expanded",
    inputs=_rays,
    loss=squares,
    rows=8192,
    order=1,
    fused=9,
    methods=("forward", "query_density", "query_opacity"),
)
def nerfacc_field(width):
    return AccField(width or 256)


class FieldWithNormals(nn.Module):
    """nerfstudio's field: density from the first column, kept before its function; normals are the gradient of that."""

    def __init__(self, width):
        super().__init__()
        self.mlp_base = StudioMLP(39, 4, width, 16, skip_connections=(2,))
        self.mlp_pred_normals = StudioMLP(54, 3, width, 3, skip_connections=(), out_activation=nn.Tanh())
        self._density_before_activation = self._sample_locations = None

    def get_density(self, positions):
        self._sample_locations = positions
        if not self._sample_locations.requires_grad:
            self._sample_locations.requires_grad = True
        h = self.mlp_base(positional(positions, 6))
        before, geometry = torch.split(h, [1, 15], dim=-1)
        self._density_before_activation = before
        return F.softplus(before), geometry

    def get_normals(self):
        (normals,) = torch.autograd.grad(
            self._density_before_activation,
            self._sample_locations,
            grad_outputs=torch.ones_like(self._density_before_activation),
            retain_graph=True,
        )
        return -F.normalize(normals, dim=-1)

    def forward(self, positions):
        density, geometry = self.get_density(positions.clone())
        with torch.enable_grad():
            normals = self.get_normals() if density.requires_grad else torch.zeros_like(positions)
        predicted = self.mlp_pred_normals(torch.cat([positional(positions, 6), geometry], dim=-1))
        return density, normals, F.normalize(predicted, dim=-1)

    def __getstate__(self):
        return {**self.__dict__, "_density_before_activation": None, "_sample_locations": None}


def _predicted_normals(model, inputs):
    density, normals, predicted = model(*inputs)
    distance = (1.0 - (normals * predicted).sum(-1)).mean()
    return distance + (density - target(density.shape).to(density.device)).square().mean()


@register(
    source="nerfstudio-project/nerfstudio, predicted normals",
    traps="a gradient with retain_graph and no create_graph inside forward, then the same graph's weight gradients",
    inputs=lambda rows: (grid(3)(rows)[0],),
    loss=_predicted_normals,
    rows=4096,
    order=1,
    fused=6,
)
def nerfstudio_normals(width):
    return FieldWithNormals(width or 128)


# -- batches of networks


class ManyLinear(nn.Module):
    """KiloNeRF's layer: weights [G, N, K] permuted for bmm, a bias [G, N]; or rows of different number for each."""

    def __init__(self, networks, in_features, out_features):
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(networks, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(networks, out_features).uniform_(-bound, bound))

    def forward(self, x, batch_size_per_network=None):
        if batch_size_per_network is None:
            z = torch.bmm(x, self.weight.permute(0, 2, 1)) + self.bias.unsqueeze(1)
            return z.view(len(self.weight), x.size(1), self.out_features)
        result, start = torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device), 0
        for g, rows in enumerate(batch_size_per_network):
            end = start + int(rows)
            result[start:end] = torch.addmm(self.bias[g], x[start:end], self.weight[g].t())
            start = end
        return result


class ManyNerfs(nn.Module):
    """KiloNeRF: a network for each cell, with directions fed late; rows ragged where their numbers are given."""

    def __init__(self, width, networks=16):
        super().__init__()
        self.activation = nn.ReLU()
        self.pts_linears = nn.ModuleList([ManyLinear(networks, 63 if i == 0 else width, width) for i in range(2)])
        self.direction_layer = ManyLinear(networks, 27 + width, width)
        self.feature_linear = ManyLinear(networks, width, width)
        self.alpha_linear = ManyLinear(networks, width, 1)
        self.rgb_linear = ManyLinear(networks, width, 3)

    def forward(self, x, batch_size_per_network=None):
        positions, directions = torch.split(x, [63, 27], dim=-1)
        h = positions
        for l in self.pts_linears:
            h = l(h, batch_size_per_network)
            h = self.activation(h)
        alpha = self.alpha_linear(h, batch_size_per_network)
        feature = self.feature_linear(h, batch_size_per_network)
        h = torch.cat([feature, directions], -1)
        h = self.direction_layer(h, batch_size_per_network)
        h = self.activation(h)
        rgb = self.rgb_linear(h, batch_size_per_network)
        return torch.cat([rgb, alpha], -1)


def _encoded(*lead):
    points = torch.rand(*lead, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([positional(points[..., :3], 10), positional(points[..., 3:], 4)], -1)


def _ragged(rows):
    weights = torch.rand(16, generator=torch.Generator().manual_seed(1))
    each = (weights / weights.sum() * max(0, rows - 16)).long() + 1
    each[-1] += rows - int(each.sum())
    return _encoded(rows), each.clamp(min=1)


@register(
    source="creiser/kilonerf, its own layers",
    traps="bmm with a permuted weight, a view of the result, a bias [G, N] unsqueezed",
    inputs=lambda rows: (_encoded(16, max(1, rows // 16)),),
    loss=squares,
    rows=16384,
    order=1,
    fused=3,
)
def kilonerf_layers(width):
    return ManyNerfs(width or 32)


@register(
    source="creiser/kilonerf, ragged",
    traps="addmm with slices of rows and of weights, written into an empty tensor, of which the function is taken",
    inputs=_ragged,
    loss=squares,
    rows=16384,
    order=1,
    fused=0,
    pointwise=False,
)
def kilonerf_ragged(width):
    return ManyNerfs(width or 32)


# -- equations


def _poisson(model, inputs):
    """A Laplacian against a source, and values at the points."""
    x = inputs[0].detach().clone().requires_grad_()
    u = model(x)
    (g,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    terms = [torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[-1])]
    source = torch.sin(3 * x).prod(-1)
    return (torch.stack(terms).sum(0) - source).square().mean() + (u - x.norm(dim=-1, keepdim=True)).square().mean()


@register(
    source="NVIDIA/physicsnemo, FullyConnected on an equation",
    traps="second derivatives through ONE learnable activation_par, silu, and skips",
    inputs=grid(3),
    loss=_poisson,
    rows=2048,
    order=3,
    fused=6,
)
def physicsnemo_equation(width):
    return FullyConnected(width or 512)


def _hard_constraint(width):
    net = Fnn([4, *[width] * 3, 1], torch.tanh)
    net._input_transform = lambda x: torch.cat([torch.sin(math.pi * x), torch.cos(math.pi * x)], dim=1)
    net._output_transform = lambda x, y: x[:, 0:1] * (1 - x[:, 0:1]) * y
    return net


@register(
    source="lululxvi/deepxde, FNN with transforms",
    traps="functions of the user before and behind the layers: a factor [M, 1] on the last one; held by no module",
    inputs=grid(2),
    loss=_poisson,
    rows=4096,
    order=3,
    fused=3,
)
def deepxde_transforms(width):
    return _hard_constraint(width or 32)
