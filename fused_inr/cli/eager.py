"""What `--compare` compares with: the network as people write it, `nn.Linear` and PyTorch's own functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import Activation
from ..layers import FusedLayer
from ..models import Chain


def _split(z: Tensor, m, w1, w2, w3, w4) -> Tensor:
    a, b, c, d = z.chunk(4, -1)
    return m * torch.tanh(w1 * a) * torch.sigmoid(w2 * b) * torch.sin(w3 * c) * torch.cos(w4 * d)


def _gabor(z: Tensor, omega, scale) -> Tensor:
    a, b = z.chunk(2, -1)
    return torch.cos(omega * a) * torch.exp(-((scale * b) ** 2))


#: The idioms of the published codes. Any other activation is evaluated by its reference, which is plain PyTorch too.
_IDIOMS: dict[str, Callable[..., Tensor]] = {
    "sine": lambda z, omega: torch.sin(omega * z),
    "gaussian": lambda z, sigma: torch.exp(-(z**2) / (2 * sigma**2)),
    "gaussian_scale": lambda z, scale: torch.exp(-((scale * z) ** 2)),
    "sinc": lambda z, omega: torch.sinc(z * (omega / math.pi)),
    "split": _split,
    "gabor": _gabor,
    "finer": lambda z, omega: torch.sin(omega * (torch.abs(z) + 1) * z),
    "hosc": lambda z, beta, omega: torch.tanh(beta * torch.sin(omega * z)),
    "wavelet": lambda z: torch.cos(z) * torch.exp(-(z**2)),
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    # PyTorch's takes a number only
    "softplus": lambda z, beta: F.softplus(z, beta) if isinstance(beta, float) else F.softplus(beta * z) / beta,
    "identity": lambda z: z,
}


class EagerLayer(nn.Module):
    """activation(linear(x)) with the weights of a fused layer, as two modules would compute it."""

    def __init__(self, layer: FusedLayer):
        super().__init__()
        weight: Any = layer.weight
        bias: Any = layer.bias
        rows, columns = weight.shape
        self.linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        self.linear.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            self.linear.bias = nn.Parameter(bias.detach().clone())
        self.activation: Activation = layer.activation
        self.values: list[float | None] = []  # None: a tensor of this module, learnable or not
        present = layer.activation_with_parameters()
        for name, value in present.params.items():
            learnable = name in present.learnable
            self.values.append(None if isinstance(value, Tensor) else value)
            if isinstance(value, Tensor) and learnable:
                self.register_parameter(name, nn.Parameter(value.detach().clone()))
            elif isinstance(value, Tensor):
                self.register_buffer(name, value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        names = self.activation.param_names
        params = [getattr(self, n) if v is None else v for n, v in zip(names, self.values)]
        idiom = _IDIOMS.get(self.activation.name)
        if idiom is not None:
            return idiom(z, *params)
        streams = z.chunk(self.activation.branches, -1)
        outputs = self.activation.map.torch_map(0)(*streams, *params)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


class EagerNetwork(nn.Module):
    """Plain layers with the skip connections and the norms of `model`."""

    def __init__(self, layers: list[EagerLayer], model: nn.Module):
        super().__init__()
        norms: Any = copy.deepcopy(getattr(model, "norms", None))
        self.net = Chain(layers, cast(Chain, model.net).skips, norms)
        if norms is not None:
            self.norms = norms

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def eager_twin(model: nn.Module) -> nn.Module:
    """A network of plain PyTorch layers with the weights that `model` (an `MLP`, `SIREN` or `SplitNet`) has now."""
    layers = [EagerLayer(layer) for layer in model.modules() if isinstance(layer, FusedLayer)]
    return EagerNetwork(layers, model) if isinstance(getattr(model, "net", None), Chain) else nn.Sequential(*layers)
