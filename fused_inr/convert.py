"""Models of this package as plain PyTorch, for what takes no custom operation: `to_pytorch`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .activations import Activation
from .layers import OUR_FORWARDS, FusedLayer, has_hooks
from .models import Chain, CoordinateNetwork
from .network import compute_dtype, in_sequence, plain_layer

__all__ = ["to_pytorch"]


class PlainActivatedLinear(nn.Module):
    """activation(x weight^T + bias) by PyTorch's own functions, the parameters under the names of a fused layer's."""

    def __init__(self, layer: FusedLayer):
        super().__init__()
        self.activation = layer.activation
        self.tensor_names = layer._tensor_names
        # parameters, buffers and the inner linear layer, in their order: the state_dict is the layer's
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in layer._non_persistent_buffers_set)
        for name, module in layer._modules.items():
            self.add_module(name, module)

    def _activation(self) -> Activation:
        return self.activation.with_params(**{name: getattr(self, name) for name in self.tensor_names})

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] to [.., C*N]."""
        linear: Any = self._modules.get("linear")
        if linear is None:
            return plain_layer(self.weight, self.bias, self._activation())(x)  # type: ignore[arg-type]
        if type(linear) is nn.Linear and not has_hooks(linear):
            return plain_layer(linear.weight, linear.bias, self._activation())(x)
        z = linear(x)
        return self._activation()(z.to(compute_dtype(z.dtype))).to(z.dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class PlainNetwork(nn.Module):
    """A coordinate network by PyTorch's own functions: encoding, layers, norms behind them, skip connections."""

    def __init__(self, network: CoordinateNetwork):
        super().__init__()
        self.encoding = network.encoding
        skips = network.net.skips if isinstance(network.net, Chain) else ()
        self.skips = tuple(skips) or (False,) * len(network.net)
        self.net = nn.Sequential(*network.net)
        if network._modules.get("norms") is not None:
            self.norms = network.norms

    def forward(self, coordinates: Tensor) -> Tensor:
        """coordinates [.., in_features] to [.., out_features]."""
        if self.encoding is not None:
            coordinates = self.encoding(coordinates)
        norms: list = list(self.norms)[: len(self.net)] if "norms" in self._modules else []
        return in_sequence(coordinates, zip(self.net, [*norms, *[None] * (len(self.net) - len(norms))], self.skips))


def to_pytorch(model: nn.Module) -> nn.Module:
    """A copy of a model in which all that is of this package is plain PyTorch: same functions, same `state_dict`.

    ```python
    plain = fused_inr.to_pytorch(net)
    torch.jit.trace(plain, x)  # or torch.onnx.export(plain, (x,), "net.onnx", dynamo=True)
    ```

    For ONNX, TorchScript, AOTInductor and other tools that know PyTorch's own operations only. Layers (`FusedLinear`,
    `SineLayer` and their kind) become modules with the same parameters under the same names, networks (`SIREN`,
    `SplitNet`, `MLP`) sequences of them; both also anywhere inside of a model that is not ours. Values and gradients
    are those of the reference backend, differentiable any number of times.

    Args:
        model: any module; it stays as it is.

    Returns:
        A copy with copied parameters.

    Raises:
        TypeError: what is no module, a network whose forward is a subclass's own, or a model that `fuse` has changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__qualname__}")
    for name, module in model.named_modules():
        if hasattr(type(module), "_fused_inr"):
            raise TypeError(f"model{'.' if name else ''}{name}: it is fused, which is undone exactly: unfuse it first")
    return _plain(copy.deepcopy(model))


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, FusedLayer):
        if type(module).forward not in OUR_FORWARDS:
            raise TypeError(
                f"model: {type(module).__qualname__} has a forward of its own; give it one in plain PyTorch"
            )
        return PlainActivatedLinear(module)
    if isinstance(module, CoordinateNetwork):
        if not (type(module).forward is CoordinateNetwork.forward and type(module).decode is CoordinateNetwork.decode):
            raise TypeError(
                f"model: {type(module).__qualname__} has a forward of its own; give it one in plain PyTorch"
            )
        made: nn.Module = PlainNetwork(module)
    else:
        made = module
    for name, child in list(made._modules.items()):
        if child is not None:
            made._modules[name] = _plain(child)
    made.train(module.training)
    return made
