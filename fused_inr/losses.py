"""Losses that are computed together with the network and its gradients, in one pass over the rows.

```python
loss = fused_inr.losses.mse(net, x, target)  # forward, loss and every gradient, tile by tile
loss.backward()                              # only scales them
```

Nothing is stored between forward and backward and nothing is computed twice, so that memory does not grow with depth.
`net` is any module; where one pass cannot serve (`fused_inr.backends.explain` tells why), the loss is composed of the
network's output and PyTorch operations, with the same value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import activations, backends
from ._checks import finite_float, one_of
from .activations import Activation
from .models import CoordinateNetwork
from .network import Criterion
from .ops import mlp as _op

__all__ = ["ElementwiseLoss", "define", "huber", "l1", "mse"]


class ElementwiseLoss:
    """A loss that is a sum over elements: l(prediction, target), times a weight a row.

    `loss(net, x, target, weight=None, reduction="mean")`; the arguments are those of `mse`. Made by `define`.
    """

    def __init__(self, form: Activation):
        self._form = form

    def __repr__(self) -> str:
        return f"ElementwiseLoss({self._form!r})"

    def __call__(
        self,
        net: nn.Module,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        return _loss(self._form, net, x, target, weight, reduction)


def mse(net: nn.Module, x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Mean of weight * (net(x) - target)^2.

    Args:
        net: `MLP`, `SIREN`, `SplitNet` (one pass), or any module (composed).
        x: coordinates [.., K].
        target: [.., N], of the shape of net(x).
        weight: [..], one number a row, or None for 1. The mean divides by the number of elements, not by the weights.
        reduction: "mean", "sum", or "none" ([.., N]; composed).

    Returns:
        The loss, 0-D in float32 (float64 for float64).

    Differentiable with respect to the network's parameters and x; once in one pass. A derivative of higher order
    (`create_graph=True`) is computed through the layers. Where target or weight require gradients, it is composed.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes that do not fit, an unknown reduction.
        RuntimeError: `net.fusion == "network"` where one pass cannot be had.
    """
    return _loss(_squared, net, x, target, weight, reduction)


def l1(net: nn.Module, x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Mean of weight * abs(net(x) - target), with derivative 0 at 0; arguments as for `mse`."""
    return _loss(_absolute, net, x, target, weight, reduction)


def huber(
    net: nn.Module,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    delta: float = 1.0,
) -> Tensor:
    """Mean of weight * h(abs(net(x) - target)), h(e) = e^2 / 2 up to delta, then delta (e - delta / 2).

    Other arguments as for `mse`; delta > 0, as `torch.nn.functional.huber_loss` (Huber, 1964).
    """
    return _loss(_huber(delta=finite_float("delta", delta, above=0)), net, x, target, weight, reduction)


def define(name: str, formula: Callable, **parameters: float) -> ElementwiseLoss:
    """A loss from a formula of (prediction, target), with the standing of the others.

    ```python
    import sympy
    cauchy = fused_inr.losses.define("cauchy", lambda p, t, scale: sympy.log(1 + ((p - t) / scale) ** 2), scale=0.1)
    cauchy(net, x, target).backward()
    ```

    Args:
        name: a Python identifier that no registered activation or loss has.
        formula: function of two real sympy symbols and then the parameters by name, returning one sympy expression;
            see `fused_inr.activations.define`.
        parameters: their values.

    Raises:
        ValueError, TypeError: as `fused_inr.activations.define`; a formula of other than two symbols or one value.
    """
    form = activations.define(name, formula, **parameters)
    if form.branches != 2 or form.outputs != 1:
        raise ValueError(
            f"formula: a loss is one expression of (prediction, target), got {form.outputs} of {form.branches} symbols"
        )
    return ElementwiseLoss(form)


_squared = activations.lookup("squared_error")()
_absolute = activations.lookup("absolute_error")()
_huber = activations.lookup("huber_error")


def _loss(form: Activation, net: nn.Module, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    one_of("reduction", reduction, ("mean", "sum", "none"))
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected an nn.Module, got {type(net).__name__}")
    for name, t in (("x", x), ("target", target), ("weight", weight)):
        if not isinstance(t, Tensor) and not (name == "weight" and t is None):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if x.dim() < 1:
        raise ValueError("x: expected shape [..., K], got a scalar; reshape it to [1, 1]")
    if target.dim() < 1 or target.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"target: expected {list(x.shape[:-1])} rows as x has, got shape {list(target.shape)}")
    if weight is not None and weight.shape != x.shape[:-1]:
        raise ValueError(f"weight: expected one number a row, shape {list(x.shape[:-1])}, got {list(weight.shape)}")
    nothing = reduction == "mean" and target.numel() == 0  # the mean is no number, as PyTorch has it
    if not isinstance(net, CoordinateNetwork) or net.fusion == "layers" or nothing:
        return _composed(form, net(x), target, weight, reduction)
    if not net.own_forward:
        reason = f"{type(net).__name__} has a forward of its own, or hooks"
        if net.fusion == "network":
            raise RuntimeError(f"fusion='network': {reason}; fusion='auto' composes this loss")
        backends.record_layers(f"{form.name} composed: {reason}")
        return _composed(form, net(x), target, weight, reduction)
    encoded = x if net.encoding is None else net.encoding(x)
    operands, decision = net.whole_call(encoded, "loss")
    reason = decision.reason
    if operands is None:
        trained = any(p.requires_grad for m in (net.net, *net.norm_modules()) for p in m.parameters())
        needed = torch.is_grad_enabled() and (encoded.requires_grad or trained)
    else:
        needed = operands.tracked(encoded)
    if not reason and operands is not None:
        reason = _why_composed(form, encoded, target, weight, reduction, decision.backend, needed, operands.layers)
    if reason:
        if net.fusion == "network" and needed:
            raise RuntimeError(f"fusion='network': {reason}; fusion='auto' composes this loss")
        backends.record_layers(f"{form.name} composed: {reason}")
        return _composed(form, net.decode(encoded), target, weight, reduction)
    rows = encoded.reshape(-1, encoded.shape[-1])
    scale = 1.0 / max(1, target.numel()) if reduction == "mean" else 1.0
    criterion = Criterion(form.map.key, form.constants, scale)
    flat = None if weight is None else weight.detach().reshape(-1)
    target = target.detach().reshape(-1, target.shape[-1])
    assert operands is not None
    return _op.network_loss(rows, target, flat, operands, criterion, decision)


def _why_composed(form, x, target, weight, reduction, backend, needed, layers) -> str:
    if not needed:
        return "no gradient is asked for"
    if reduction == "none":
        return "reduction='none' has no sum to differentiate"
    if target.requires_grad or (weight is not None and weight.requires_grad):
        return "target or weight require a gradient"
    if target.device != x.device or not target.is_floating_point():
        return f"a target of {target.dtype} on {target.device}"
    columns = layers[-1].columns
    if target.shape[-1] != columns:
        raise ValueError(f"target: expected {columns} columns as the network's output has, got {target.shape[-1]}")
    return backends.refusal(backend, form.map.key, x.device, x.dtype)


def _composed(form: Activation, y: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if target.shape != y.shape:
        raise ValueError(
            f"target: expected the shape of the network's output, {list(y.shape)}, got {list(target.shape)}"
        )
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    (loss,) = form.map.torch_map(0)(y.to(dtype), target.to(dtype), *form.params.values())
    if weight is not None:
        loss = loss * weight.to(dtype).unsqueeze(-1)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
