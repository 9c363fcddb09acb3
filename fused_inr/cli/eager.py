"""Writes a network as people do, with `nn.Linear` and PyTorch's own functions: what `--compare` compares with."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn

from ..activations import Activation
from ..layers import FusedLayer
from ..models import Chain


class EagerLayer(nn.Module):
    """Computes activation(linear(x)) with the weights of a fused layer, as two modules would."""

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
        """Compute the layer."""
        z = self.linear(x)
        names = self.activation.param_names
        params = [getattr(self, n) if v is None else v for n, v in zip(names, self.values)]
        return self.activation.map.eager(z, *params)


class EagerNetwork(nn.Module):
    """A network of plain layers with the skip connections and the norms of `model`."""

    def __init__(self, layers: list[EagerLayer], model: nn.Module):
        super().__init__()
        norms: Any = copy.deepcopy(getattr(model, "norms", None))
        self.net = Chain(layers, cast(Chain, model.net).skips, norms)
        if norms is not None:
            self.norms = norms

    def forward(self, x: Tensor) -> Tensor:
        """Compute the network."""
        return self.net(x)


def eager_twin(model: nn.Module) -> nn.Module:
    """Make a network of plain PyTorch layers with the weights that `model` (`MLP`, `SIREN` or `SplitNet`) has now."""
    layers = [EagerLayer(layer) for layer in model.modules() if isinstance(layer, FusedLayer)]
    return EagerNetwork(layers, model) if isinstance(getattr(model, "net", None), Chain) else nn.Sequential(*layers)
