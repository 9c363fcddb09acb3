"""SIREN and what is built like it."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from ._registry import grid, laplacian, register, squares


class NotebookSine(nn.Module):
    """The layer of SIREN's notebook: sin(omega_0 * linear(x))."""

    def __init__(self, in_features, out_features, bias=True, is_first=False, omega_0=30.0):
        super().__init__()
        self.omega_0, self.is_first = omega_0, is_first
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        bound = 1 / in_features if is_first else (6 / in_features) ** 0.5 / omega_0
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, input):
        return torch.sin(self.omega_0 * self.linear(input))

    def forward_with_intermediate(self, input):
        intermediate = self.omega_0 * self.linear(input)
        return torch.sin(intermediate), intermediate


class CoordinateSiren(nn.Module):
    """SIREN's notebook: the output together with the coordinates, which it makes differentiable."""

    def __init__(self, in_features, width, hidden_layers, out_features):
        super().__init__()
        net = [NotebookSine(in_features, width, is_first=True)]
        net += [NotebookSine(width, width) for _ in range(hidden_layers)]
        net.append(nn.Linear(width, out_features))
        with torch.no_grad():
            net[-1].weight.uniform_(-((6 / width) ** 0.5) / 30, (6 / width) ** 0.5 / 30)
        self.net = nn.Sequential(*net)

    def forward(self, coords):
        coords = coords.clone().detach().requires_grad_(True)
        return self.net(coords), coords

    def forward_with_activations(self, coords):
        activations, x = OrderedDict(), coords.clone().detach().requires_grad_(True)
        activations["input"] = x
        for i, layer in enumerate(self.net):
            if isinstance(layer, NotebookSine):
                x, intermediate = layer.forward_with_intermediate(x)
                activations[f"{type(layer).__name__}_{i}"] = intermediate
            else:
                x = layer(x)
            activations[f"{type(layer).__name__}_out_{i}"] = x
        return activations


def _picture_gradients(model, inputs):
    y, coords = model(*inputs)
    (g,) = torch.autograd.grad(y, coords, torch.ones_like(y), create_graph=True)
    return (g - torch.cos(coords)).square().mean()


@register(
    source="vsitzmann/siren, notebook",
    traps="returns (output, coordinates) after requires_grad_(); another method returns pre-activations too",
    inputs=grid(2),
    loss=squares,
    rows=65536,
    order=1,
    fused=4,
    methods=("forward", "forward_with_activations"),
)
def siren_notebook(width):
    return CoordinateSiren(2, width or 256, 3, 3)


@register(
    source="vsitzmann/siren, notebook, a picture from its gradients",
    traps="the loss is on the gradient with respect to the coordinates that the model made differentiable",
    inputs=grid(2),
    loss=_picture_gradients,
    rows=16384,
    order=2,
    fused=4,
)
def siren_gradients(width):
    return CoordinateSiren(2, width or 256, 3, 1)


class MetaLinear(nn.Linear):
    """A linear layer whose parameters may be given, also one set for each of a batch."""

    def forward(self, input, params=None):
        params = OrderedDict(self.named_parameters()) if params is None else params
        weight, bias = params["weight"], params.get("bias")
        output = input.matmul(weight.permute(*range(len(weight.shape) - 2), -1, -2))
        output += bias.unsqueeze(-2)
        return output


class ModuleSine(nn.Module):
    """sin(30 x), the number in the code."""

    def forward(self, input):
        return torch.sin(30 * input)


class MetaSequential(nn.Sequential):
    """A sequence that passes given parameters on by name."""

    def forward(self, input, params=None):
        for name, module in self._modules.items():
            if params is not None and isinstance(module, MetaLinear | MetaSequential):
                own = OrderedDict((k[len(name) + 1 :], v) for k, v in params.items() if k.startswith(name + "."))
                input = module(input, params=own)
            else:
                input = module(input)
        return input


class FullyConnectedBlock(nn.Module):
    """The network of SIREN's modules: one instance of the nonlinearity for all layers."""

    def __init__(self, in_features, out_features, hidden_layers, width):
        super().__init__()
        nonlinearity = ModuleSine()
        net = [MetaSequential(MetaLinear(in_features, width), nonlinearity)]
        net += [MetaSequential(MetaLinear(width, width), nonlinearity) for _ in range(hidden_layers)]
        net.append(MetaSequential(MetaLinear(width, out_features)))
        self.net = MetaSequential(*net)
        with torch.no_grad():
            for i, block in enumerate(self.net):
                fan_in = block[0].weight.shape[-1]
                bound = 1 / fan_in if i == 0 else (6 / fan_in) ** 0.5 / 30
                block[0].weight.uniform_(-bound, bound)

    def forward(self, coords, params=None):
        params = OrderedDict(self.named_parameters()) if params is None else params
        own = OrderedDict((k[4:] if k.startswith("net.") else k, v) for k, v in params.items())
        return self.net(coords, params=own)


class SingleBVPNet(nn.Module):
    """A dictionary in, a dictionary out."""

    def __init__(self, width, in_features=3, out_features=1, hidden_layers=3):
        super().__init__()
        self.net = FullyConnectedBlock(in_features, out_features, hidden_layers, width)

    def forward(self, model_input, params=None):
        coords = model_input["coords"].clone().detach().requires_grad_(True)
        return {"model_in": coords, "model_out": self.net(coords, params)}


def _dictionary(rows):
    generator = torch.Generator().manual_seed(0)
    return ({"coords": torch.rand(1, rows, 3, generator=generator) * 2 - 1},)


def _boundary_value(model, inputs):
    out = model(*inputs)
    y, x = out["model_out"], out["model_in"]
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    return y.abs().mean() + torch.exp(-1e2 * y.abs()).mean() + (g.norm(dim=-1) - 1).abs().mean()


@register(
    source="vsitzmann/siren, modules, a signed distance",
    traps="matmul with a permuted weight, the bias added in place; params= dictionaries; one activation instance",
    inputs=_dictionary,
    loss=_boundary_value,
    rows=2800,
    order=2,
    fused=4,
)
def siren_modules(width):
    return SingleBVPNet(width or 256)


class HyperNetworkSiren(nn.Module):
    """A hypernetwork of ReLU layers that makes the weights of a SIREN for each of a batch of latents."""

    def __init__(self, width, latent=16):
        super().__init__()
        self.hypo = FullyConnectedBlock(2, 3, 1, width)
        self.shapes = OrderedDict((n, p.shape) for n, p in self.hypo.named_parameters())
        self.made = nn.ModuleList()
        for shape in self.shapes.values():
            self.made.append(nn.Sequential(nn.Linear(latent, 32), nn.ReLU(inplace=True), nn.Linear(32, shape.numel())))
            with torch.no_grad():
                self.made[-1][-1].weight.mul_(1e-2)
        for p in self.hypo.parameters():
            p.requires_grad_(False)
        self.base = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in self.hypo.parameters()])

    def forward(self, coords, latents):
        params = OrderedDict()
        for (name, shape), make, base in zip(self.shapes.items(), self.made, self.base):
            params[name] = base + make(latents).reshape(-1, *shape)
        return self.hypo(coords, params=params)


def _latents(rows):
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(1, max(1, rows // 4), 2, generator=generator).expand(4, -1, -1) * 2 - 1
    return coords, torch.randn(4, 16, generator=generator)


@register(
    source="vsitzmann/siren, hypernetwork",
    traps="weights of shape [B, N, K], computed at each call",
    inputs=_latents,
    loss=squares,
    rows=4096,
    order=1,
    fused=8,
)
def siren_hypernetwork(width):
    return HyperNetworkSiren(width or 64)


class OwnWeights(nn.Module):
    """siren-pytorch's layer: its own weight and bias, any activation module, dropout."""

    def __init__(self, dim_in, dim_out, w0=1.0, activation=None, is_first=False, dropout=0.0):
        super().__init__()
        bound = 1 / dim_in if is_first else (6 / dim_in) ** 0.5 / w0
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim_out).uniform_(-bound, bound))
        self.activation = ScaledSine(w0) if activation is None else activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        out = self.activation(out)
        return self.dropout(out)


class ScaledSine(nn.Module):
    """sin(w0 x)."""

    def __init__(self, w0=1.0):
        super().__init__()
        self.w0 = w0

    def forward(self, x):
        return torch.sin(self.w0 * x)


class SirenNet(nn.Module):
    """siren-pytorch's network: modulations multiply the outputs of layers in place."""

    def __init__(self, dim_in, width, dim_out, num_layers, w0=1.0, w0_initial=30.0):
        super().__init__()
        self.layers = nn.ModuleList([
            OwnWeights(width if i else dim_in, width, w0 if i else w0_initial, is_first=i == 0)
            for i in range(num_layers)
        ])  # fmt: skip
        self.last_layer = OwnWeights(width, dim_out, w0, activation=nn.Identity())

    def forward(self, x, mods=None):
        mods = (None,) * len(self.layers) if mods is None else mods
        for layer, mod in zip(self.layers, mods):
            x = layer(x)
            if mod is not None:
                x *= mod[None]
        return self.last_layer(x)


def _modulated(rows):
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(rows, 2, generator=generator) * 2 - 1
    return coords, None


@register(
    source="lucidrains/siren-pytorch",
    traps="its own weight and bias; activation and dropout are modules; outputs multiplied in place",
    inputs=_modulated,
    loss=squares,
    rows=16384,
    order=1,
    fused=5,
)
def siren_pytorch(width):
    return SirenNet(2, width or 256, 3, 5)


class FinerLayer(nn.Module):
    """FINER: sin(omega_0 (abs(z) + 1) z), the growing factor under no_grad."""

    def __init__(self, in_features, out_features, is_first=False, omega_0=30, is_last=False):
        super().__init__()
        self.omega_0, self.is_last = omega_0, is_last
        self.linear = nn.Linear(in_features, out_features)
        bound = 1 / in_features if is_first else (6 / in_features) ** 0.5 / omega_0
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound)

    def generate_scale(self, x):
        with torch.no_grad():
            scale = torch.abs(x) + 1
        return scale

    def forward(self, input):
        x = self.linear(input)
        scale = self.generate_scale(x)
        out = self.omega_0 * scale * x
        if not self.is_last:
            out = torch.sin(out)
        return out


@register(
    source="liuzhen0212/FINER",
    traps="a factor computed under no_grad, of which a captured graph forgets that it has no gradient",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=4,
)
def finer(width):
    width = width or 256
    layers = [FinerLayer(2, width, is_first=True)] + [FinerLayer(width, width) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(width, 3))


class IncodeSine(nn.Module):
    """INCODE's layer, of the same name as SIREN's in its code, with four scalars at each call."""

    def __init__(self, in_features, out_features, is_first=False, omega_0=30.0):
        super().__init__()
        self.omega_0 = omega_0
        self.linear = nn.Linear(in_features, out_features)
        bound = 1 / in_features if is_first else (6 / in_features) ** 0.5 / omega_0
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, input, a_param, b_param, c_param, d_param):
        output = self.linear(input)
        output = torch.exp(a_param) * torch.sin(torch.exp(b_param) * self.omega_0 * output + c_param) + d_param
        return output


class Incode(nn.Module):
    """INCODE: a harmoniser makes amplitude, frequency, phase and offset from a latent."""

    def __init__(self, width, hidden_layers=3):
        super().__init__()
        self.nonlin = nn.ModuleList([IncodeSine(2, width, is_first=True)])
        self.nonlin.extend(IncodeSine(width, width) for _ in range(hidden_layers))
        self.last = nn.Linear(width, 3)
        self.aux_mlp = nn.Sequential(nn.Linear(64, 32), nn.SiLU(inplace=True), nn.Linear(32, 4))
        self.register_buffer("latents", torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
        with torch.no_grad():
            self.aux_mlp[2].weight.mul_(0.1)

    def forward(self, coords):
        coef = self.aux_mlp(self.latents)
        a_param, b_param, c_param, d_param = coef[0]
        output = coords
        for layer in self.nonlin:
            output = layer(output, a_param, b_param, c_param, d_param)
        return [self.last(output), coef]


@register(
    source="xmindflow/INCODE",
    traps="forward(x, a, b, c, d), 0-dimensional from a network at each call; a class named as SIREN's; a list out",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=5,
)
def incode(width):
    return Incode(width or 256)


class CoinLayer(nn.Module):
    """A SIREN layer whose linear part and activation others call themselves."""

    def __init__(self, dim_in, dim_out, w0=30.0, is_first=False, is_last=False):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)
        self.activation = nn.Identity() if is_last else ScaledSine(w0)
        bound = 1 / dim_in if is_first else (6 / dim_in) ** 0.5 / w0
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, x):
        return self.activation(self.linear(x))


class ModulatedSiren(nn.Module):
    """COIN++: a shift for each item of a batch between the linear layer and the sine."""

    def __init__(self, width, layers=5, latent=128):
        super().__init__()
        self.net = nn.Sequential(
            CoinLayer(2, width, is_first=True), *[CoinLayer(width, width) for _ in range(layers - 1)]
        )
        self.last_layer = CoinLayer(width, 3, is_last=True)
        self.to_shifts = nn.Linear(latent, width * layers)
        self.width = width

    def modulated_forward(self, x, latent):
        shape, x = x.shape, x.reshape(x.shape[0], -1, x.shape[-1])
        shift = self.to_shifts(latent)
        at = 0
        for module in self.net:
            x = module.linear(x)
            x = x + shift[:, at : at + self.width].unsqueeze(1)
            x = module.activation(x)
            at += self.width
        return self.last_layer(x).reshape(*shape[:-1], 3)

    def forward(self, x, latent):
        return self.modulated_forward(x, latent)


def _coin(rows):
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(1, max(1, rows // 4), 2, generator=generator) * 2 - 1
    return coords.expand(4, -1, -1), torch.randn(4, 128, generator=generator) * 1e-2


@register(
    source="EmilienDupont/coinpp",
    traps="calls .linear and .activation itself, with a shift [B, 1, N] between them",
    inputs=_coin,
    loss=squares,
    rows=16384,
    order=1,
    fused=5,
    methods=("forward", "modulated_forward"),
)
def coinpp(width):
    return ModulatedSiren(width or 256)


class FunctaSiren(nn.Module):
    """functa ports: w0 times the modulated pre-activation, shifts of one signal from one latent."""

    def __init__(self, width, depth=9, latent=256):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2 if i == 0 else width, width) for i in range(depth)])
        self.out = nn.Linear(width, 3)
        self.modulation = nn.Linear(latent, width * depth)
        self.w0 = 30.0
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                bound = 1 / 2 if i == 0 else (6 / width) ** 0.5 / 30
                layer.weight.uniform_(-bound, bound)

    def forward(self, x, latent):
        shifts = self.modulation(latent).chunk(len(self.layers), dim=-1)
        for layer, shift in zip(self.layers, shifts):
            x = torch.sin(self.w0 * (layer(x) + shift))
        return self.out(x) + 0.5


def _functa(rows):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, 2, generator=generator), torch.randn(256, generator=generator) * 1e-2


@register(
    source="functa and its ports",
    traps="a shift [N], computed from a latent by chunks, added before omega",
    inputs=_functa,
    loss=squares,
    rows=4096,
    order=1,
    fused=9,
)
def functa(width):
    return FunctaSiren(width or 256)


class FilmLayer(nn.Module):
    """pi-GAN's layer: sin(freq * linear(x) + phase), frequencies and phases of each image."""

    def __init__(self, input_dim, hidden_dim):
        super().__init__()
        self.layer = nn.Linear(input_dim, hidden_dim)
        with torch.no_grad():
            self.layer.weight.uniform_(-((6 / input_dim) ** 0.5) / 25, (6 / input_dim) ** 0.5 / 25)

    def forward(self, x, freq, phase_shift):
        x = self.layer(x)
        freq = freq.unsqueeze(1).expand_as(x)
        phase_shift = phase_shift.unsqueeze(1).expand_as(x)
        return torch.sin(freq * x + phase_shift)


class PiGan(nn.Module):
    """pi-GAN's SPATIALSIREN: a mapping network, FiLM layers, density and colour."""

    def __init__(self, width, layers=8, z_dim=100):
        super().__init__()
        self.network = nn.ModuleList([FilmLayer(3 if i == 0 else width, width) for i in range(layers)])
        self.final_layer = nn.Linear(width, 1)
        self.color_layer_linear = nn.Sequential(nn.Linear(width, 3), nn.Sigmoid())
        self.mapping_network = nn.Sequential(
            nn.Linear(z_dim, 64), nn.LeakyReLU(0.2, inplace=True), nn.Linear(64, 2 * layers * width)
        )
        self.width = width

    def forward(self, input, z):
        both = self.mapping_network(z)
        half = both.shape[-1] // 2
        frequencies, phase_shifts = both[..., :half] * 15 + 30, both[..., half:]
        x = input
        for i, layer in enumerate(self.network):
            at = slice(i * self.width, (i + 1) * self.width)
            x = layer(x, frequencies[..., at], phase_shifts[..., at])
        sigma = self.final_layer(x)
        return torch.cat([self.color_layer_linear(x), sigma], dim=-1)


def _images(rows):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, max(1, rows // 2), 3, generator=generator) * 0.24 - 0.12
    return points, torch.randn(2, 100, generator=generator)


@register(
    source="marcoamonteiro/pi-GAN",
    traps="a factor and a shift for each image, expanded to all rows by expand_as",
    inputs=_images,
    loss=squares,
    rows=16384,
    order=1,
    fused=10,
)
def pi_gan(width):
    return PiGan(width or 256)


@register(
    source="vsitzmann/siren, notebook, a picture from its Laplacian",
    traps="derivatives of third order through the layers",
    inputs=grid(2),
    loss=laplacian,
    rows=4096,
    order=3,
    fused=4,
)
def siren_laplacian(width):
    class Net(CoordinateSiren):
        def forward(self, coords):
            return self.net(coords)

    return Net(2, width or 256, 3, 1)
