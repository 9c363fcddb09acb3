"""Networks that other networks modulate, and losses that fit the modulations inside a step of training."""

from __future__ import annotations

import torch
from torch import nn

from ._registry import grid, register, squares, target
from .sirens import CoinLayer, FilmLayer, SirenNet

# -- siren-pytorch with its modulator


class Modulator(nn.Module):
    """siren-pytorch's modulator: ReLU layers of a latent, the latent concatenated after each; one tensor a layer."""

    def __init__(self, dim_in, dim_hidden, num_layers):
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Sequential(nn.Linear(dim_in if i == 0 else dim_hidden + dim_in, dim_hidden), nn.ReLU())
            for i in range(num_layers)
        ])  # fmt: skip

    def forward(self, z):
        x, hiddens = z, []
        for layer in self.layers:
            x = layer(x)
            hiddens.append(x)
            x = torch.cat((x, z))
        return tuple(hiddens)


class ModulatedSirenNet(nn.Module):
    """siren-pytorch's wrapper: a latent [D] of one signal, outputs of layers multiplied in place by its modulations."""

    def __init__(self, width, latent_dim=64, num_layers=5):
        super().__init__()
        self.net = SirenNet(2, width, 3, num_layers)
        self.modulator = Modulator(latent_dim, width, num_layers)

    def forward(self, coords, latent):
        return self.net(coords, self.modulator(latent))


def _one_latent(size):
    def inputs(rows):
        return *grid(2)(rows), torch.randn(size, generator=torch.Generator().manual_seed(1))

    return inputs


@register(
    source="lucidrains/siren-pytorch, SirenWrapper with a latent",
    traps="a layer's output is changed in place, by a product with [1, N]; rows of one vector, without a batch",
    inputs=_one_latent(64),
    loss=squares,
    rows=16384,
    order=1,
    fused=10,
)
def siren_pytorch_modulated(width):
    return ModulatedSirenNet(width or 256)


# -- COIN++ as it is trained


class ModulationBias(nn.Module):
    """COIN++ without a latent map: the modulations and a bias."""

    def __init__(self, size):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size), requires_grad=True)

    def forward(self, x):
        return x + self.bias


class CoinLast(CoinLayer):
    """COIN++'s last layer: 0.5 is added to the linear layer's output in place."""

    def forward(self, x):
        out = self.linear(x)
        out += 0.5
        return out


class CoinModulated(nn.Module):
    """COIN++: scale (a number where it is not modulated) times z plus shift [B, 1, N]; views before and after."""

    def __init__(self, width, num_layers=5, modulate_scale=False, latent_dim=None):
        super().__init__()
        self.dim_hidden, self.modulate_scale = width, modulate_scale
        self.net = nn.Sequential(*[CoinLayer(width if i else 2, width, is_first=i == 0) for i in range(num_layers - 1)])
        self.last_layer = CoinLast(width, 3, is_last=True)
        self.num_modulations = width * (num_layers - 1) * (2 if modulate_scale else 1)
        self.latent_dim = self.num_modulations if latent_dim is None else latent_dim
        self.modulation_net: nn.Module
        if latent_dim is None:
            self.modulation_net = ModulationBias(self.num_modulations)
        else:
            self.modulation_net = nn.Linear(latent_dim, self.num_modulations)

    def forward(self, x):
        x = self.net(x)
        return self.last_layer(x)

    def modulated_forward(self, x, latent):
        lead, n = x.shape[:-1], self.dim_hidden
        h = x.view(len(x), -1, x.shape[-1])
        modulations = self.modulation_net(latent)
        shifts = self.num_modulations // 2 if self.modulate_scale else 0  # scales come first
        for i, module in enumerate(self.net):
            scale = modulations[:, i * n : (i + 1) * n].unsqueeze(1) + 1.0 if self.modulate_scale else 1.0
            shift = modulations[:, shifts + i * n : shifts + (i + 1) * n].unsqueeze(1)
            h = module.linear(h)
            h = scale * h + shift
            h = module.activation(h)
        y = self.last_layer(h)
        return y.view(*lead, y.shape[-1])


def _fit_modulations(model, inputs, steps=3, rate=1e-2):
    """COIN++'s outer loss: modulations from zero by `steps` gradient steps, whose graph is kept."""
    coords = inputs[0]
    modulations = torch.zeros(len(coords), model.latent_dim).to(coords).requires_grad_()
    features = target((*coords.shape[:-1], 3)).to(coords)
    for _ in range(steps):
        with torch.enable_grad():
            loss = (model.modulated_forward(coords, modulations) - features).square().mean() * len(coords)
            (grad,) = torch.autograd.grad(loss, modulations, create_graph=True)
        modulations = modulations - rate * grad
    return (model.modulated_forward(coords, modulations) - features).square().mean()


def _patches(size):
    def inputs(rows):
        generator = torch.Generator().manual_seed(0)
        coords = torch.rand(4, max(1, rows // 4), 2, generator=generator) * 2 - 1
        return coords, torch.randn(4, size, generator=generator) * 1e-2

    return inputs


@register(
    source="EmilienDupont/coinpp, trained as published",
    traps="1.0 * z + shift; the linear layer's output plus 0.5 in place; three gradient steps inside the loss",
    inputs=_patches(128),
    loss=_fit_modulations,
    rows=4096,
    order=2,
    fused=4,
    method="modulated_forward",
    methods=("modulated_forward", "forward"),
)
def coinpp_meta(width):
    return CoinModulated(width or 256, latent_dim=128)


@register(
    source="EmilienDupont/coinpp, modulations themselves",
    traps="modulations [B, layers x N] that are fitted, plus a bias",
    inputs=lambda rows: grid(2)(rows)[0].view(4, -1, 2).split([4]),
    loss=_fit_modulations,
    rows=4096,
    order=2,
    fused=4,
    methods=("forward", "modulated_forward"),
)
def coinpp_modulations(width):
    return CoinModulated(width or 256)


@register(
    source="EmilienDupont/coinpp, scales and shifts",
    traps="a factor and a shift [B, 1, N] for each item, both slices of one tensor",
    inputs=_patches(128),
    loss=_fit_modulations,
    rows=4096,
    order=2,
    fused=4,
    method="modulated_forward",
    methods=("modulated_forward", "forward"),
)
def coinpp_scales(width):
    return CoinModulated(width or 256, modulate_scale=True, latent_dim=128)


# -- functa with learned rates


class LayerOfFuncta(nn.Module):
    """A port of functa: its own map from latent to shift in each layer, sin(w0 (z + shift))."""

    def __init__(self, in_size, out_size, latent_modulation_dim, w0=30.0, is_first=False, is_last=False):
        super().__init__()
        self.w0, self.is_last = w0, is_last
        self.linear = nn.Linear(in_size, out_size)
        self.modulate_shift = nn.Linear(latent_modulation_dim, out_size)
        bound = 1 / in_size if is_first else (6 / in_size) ** 0.5 / w0
        nn.init.uniform_(self.linear.weight, -bound, bound)
        nn.init.uniform_(self.linear.bias, -bound, bound)

    def forward(self, x, latent):
        x = self.linear(x)
        if not self.is_last:
            shift = self.modulate_shift(latent)
            if len(shift.shape) == 2:
                shift = shift.unsqueeze(dim=1)
            x = x + shift
            x = torch.sin(self.w0 * x)
        return x


class FunctaSkips(nn.Module):
    """functa: skips by sum around the middle layers, and a learned rate for each column of the latent."""

    def __init__(self, width, num_layers=5, latent=64):
        super().__init__()
        self.layers = nn.ModuleList([
            LayerOfFuncta(width if i else 2, width, latent, is_first=i == 0) for i in range(num_layers - 1)
        ])  # fmt: skip
        self.last = LayerOfFuncta(width, 3, latent, is_last=True)
        self.meta_sgd_lrs = nn.Parameter(torch.rand(latent, generator=torch.Generator().manual_seed(0)) * 0.095 + 5e-3)

    def forward(self, x, latent):
        x = self.layers[0](x, latent)
        for layer in self.layers[1:]:
            y = layer(x, latent)
            x = x + y
        return self.last(x, latent) + 0.5


def _fit_latents(model, inputs, steps=2):
    coords, latents = inputs[0], torch.zeros_like(inputs[1]).requires_grad_()
    features = target((*coords.shape[:-1], 3)).to(coords)
    for _ in range(steps):
        loss = (model(coords, latents) - features).square().mean(dim=(1, 2)).sum()
        (grad,) = torch.autograd.grad(loss, latents, create_graph=True)
        latents = latents - model.meta_sgd_lrs * grad
    return (model(coords, latents) - features).square().mean()


@register(
    source="functa and its ports, with learned rates",
    traps="a shift [B, 1, N] from a layer of its own; skips by sum; rates of the inner steps are parameters",
    inputs=_patches(64),
    loss=_fit_latents,
    rows=4096,
    order=2,
    fused=4,
)
def functa_meta(width):
    return FunctaSkips(width or 256)


# -- pi-GAN whole


class SpatialSiren(nn.Module):
    """pi-GAN: points scaled, eight FiLM layers, density; a FiLM layer of directions and features, and a colour."""

    def __init__(self, width, z_dim=100):
        super().__init__()
        self.hidden_dim = width
        self.network = nn.ModuleList([FilmLayer(width if i else 3, width) for i in range(8)])
        self.final_layer = nn.Linear(width, 1)
        self.color_layer_sine = FilmLayer(width + 3, width)
        self.color_layer_linear = nn.Sequential(nn.Linear(width, 3), nn.Sigmoid())
        hidden = min(256, 4 * width)
        mapping = [nn.Linear(z_dim, hidden), nn.LeakyReLU(0.2, inplace=True)]
        for _ in range(2):
            mapping += [nn.Linear(hidden, hidden), nn.LeakyReLU(0.2, inplace=True)]
        self.mapping_network = nn.Sequential(*mapping, nn.Linear(hidden, 2 * 9 * width))
        with torch.no_grad():
            self.mapping_network[-1].weight *= 0.25

    def forward(self, input, z, ray_directions):
        both = self.mapping_network(z)
        half = both.shape[-1] // 2
        return self.forward_with_frequencies_phase_shifts(input, both[..., :half], both[..., half:], ray_directions)

    def forward_with_frequencies_phase_shifts(self, input, frequencies, phase_shifts, ray_directions):
        frequencies = frequencies * 15 + 30
        x = input * (2 / 0.24)
        n = self.hidden_dim
        for index, layer in enumerate(self.network):
            x = layer(x, frequencies[..., index * n : (index + 1) * n], phase_shifts[..., index * n : (index + 1) * n])
        sigma = self.final_layer(x)
        rbg = self.color_layer_sine(
            torch.cat([ray_directions, x], dim=-1), frequencies[..., -n:], phase_shifts[..., -n:]
        )
        return torch.cat([self.color_layer_linear(rbg), sigma], dim=-1)


def _rays(rows):
    generator = torch.Generator().manual_seed(0)
    n = max(1, rows // 2)
    points = torch.rand(2, n, 3, generator=generator) * 0.24 - 0.12
    directions = nn.functional.normalize(torch.randn(2, n, 3, generator=generator), dim=-1)
    return points, torch.randn(2, 100, generator=generator), directions


@register(
    source="marcoamonteiro/pi-GAN, with directions",
    traps="a FiLM layer of a concatenation; ONE mapping network whose LeakyReLU is in place; sigma beside colour",
    inputs=_rays,
    loss=squares,
    rows=8192,
    order=1,
    fused=13,
)
def pi_gan_directions(width):
    return SpatialSiren(width or 256)
