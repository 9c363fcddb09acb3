"""Which modules an initialisation applies to. Told by their interface, so that `init` imports no layer."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor, nn

from ..activations import Activation


class Layer(Protocol):
    """What an initialisation needs to know of a fused layer."""

    in_features: int
    activation: Activation

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    def activation_with_parameters(self) -> Activation: ...


def fused_layers(module: nn.Module) -> list[Layer]:
    """The fused layers of a network in the order in which the data passes them (of `module.net` if there is one).

    Raises TypeError if `module` is no module and ValueError if it contains no fused layer.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a fused layer or a network of them, got {type(module).__name__}")
    network: nn.Module = getattr(module, "net", module)
    layers = [cast(Layer, m) for m in network.modules() if hasattr(m, "activation_with_parameters")]
    if not layers:
        raise ValueError(
            f"module contains no fused layer (FusedLinear, SineLayer, ...): {type(module).__name__}; "
            "for other modules initialise each weight with vi3nr_uniform_, vi3nr_normal_ or siren_uniform_"
        )
    return layers


def sees_coordinates(module: nn.Module, layers: list[Layer]) -> bool:
    """Whether the first layer's input are the coordinates: its own `is_first`, else True for a network."""
    own = getattr(layers[0], "is_first", None)
    return not hasattr(module, "activation_with_parameters") if own is None else bool(own)
