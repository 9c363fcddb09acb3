"""Which modules an initialisation applies to. Told by their interface, so that `init` imports no layer."""

from __future__ import annotations

from torch import nn


def fused_layers(module: nn.Module) -> list[nn.Module]:
    """The fused layers of a network in the order in which the data passes them (of `module.net` if there is one).

    Raises TypeError if `module` is no module and ValueError if it contains no fused layer.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a fused layer or a network of them, got {type(module).__name__}")
    network = getattr(module, "net", module)
    layers = [m for m in network.modules() if hasattr(m, "activation_with_parameters")]
    if not layers:
        raise ValueError(
            f"module contains no fused layer (FusedLinear, SineLayer, ...): {type(module).__name__}; "
            "for other modules initialise each weight with vi3nr_uniform_, vi3nr_normal_ or siren_uniform_"
        )
    return layers
