"""Functional interface: `linear_act`."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import Activation, get
from .ops import linear_act as _op

__all__ = ["linear_act"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | Activation | None = None
) -> Tensor:
    """y = f(x W^T + b), f element by element: a linear layer and its activation in one operation.

    For an activation of B branches and C outputs, branch b sees rows b N .. (b+1) N of the weight, and output c
    fills columns c N .. (c+1) N of y. The activation's frequency multiplies the whole pre-activation, bias included.

    Args:
        x: [..., K].
        weight: [B N, K], or [*L, B N, K]: a leading batch of independent layers. The leading dimensions of x are then
            L (or 1 where shared), as in `torch.matmul`; x of one or two dimensions is shared by all.
        bias: [B N] or [*L, B N], or None.
        activation: an `Activation` (`fused_inr.activations.sine(omega=30.0)`), a registered name, or None (identity).
            Its parameters may be tensors of shape [] or [N] that require gradients.

    Returns:
        [..., C N] in x's dtype (under autocast: the autocast dtype).

    Types: float32, bfloat16, float16, and float64 (CPU and reference). Pre-activations, activations and accumulators
    are float32 (float64 for float64). float32 products follow PyTorch's precision settings.

    Differentiable any number of times in reverse mode with respect to x, weight, bias and tensor parameters; once in
    forward mode, over which and under which reverse mode works; `torch.func.vmap` over every argument.
    `torch.compile` differentiates it once (a PyTorch limit).

    Raises:
        TypeError: an argument that is no tensor, or dtypes that differ or are not floating-point.
        ValueError: shapes that do not fit, devices that differ.
        RuntimeError: a backend demanded with `fused_inr.backends.use` that cannot serve.
    """
    if not isinstance(activation, Activation):
        activation = get(activation)
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor) and not (name == "bias" and t is None):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias, activation)
    if weight.dim() == 2:
        if x.dim() == 2:
            return _op.linear_act(x, weight, bias, activation)
        flat = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
        y = _op.linear_act(flat, weight, bias, activation)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    batch = weight.shape[:-2]
    shared = x.dim() <= 2
    x = x.reshape(*(1 for _ in batch), *x.shape) if shared else x
    inner = x.shape[len(batch) : -1]
    x = x.expand(*batch, *x.shape[len(batch) :])
    rows = 1
    for n in inner:
        rows *= n
    groups = batch.numel()
    if len(batch) > 1 or len(inner) != 1:
        x = x.reshape(groups, rows, x.shape[-1])
        weight = weight.reshape(groups, *weight.shape[-2:])
    if bias is not None:
        bias = bias.expand(*batch, bias.shape[-1]).reshape(groups, bias.shape[-1])
    y = _op.linear_act(x, weight, bias, activation)
    return y.reshape(*batch, *inner, y.shape[-1])


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `torch.nn.functional.linear` does: float32 and half types to the autocast dtype, float64 untouched."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    if not (x.is_floating_point() and weight.is_floating_point()):
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in t.shape) + "]"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> None:
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and t.layout != torch.strided:
            raise TypeError(f"{name}: tensors of layout {t.layout} are not supported; convert with {name}.to_dense()")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: dtype {x.dtype} is not supported; use float32, float64, bfloat16 or float16")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: its dtype {weight.dtype} differs from x's {x.dtype}; convert one (or use autocast)")
    if weight.dim() < 2:
        raise ValueError(f"weight: expected shape [B*N, K] or [*batch, B*N, K], got {_shape(weight)}")
    if x.dim() < 1:
        raise ValueError("x: expected shape [..., K], got a scalar; reshape it to [1, 1]")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"x: its last dimension is {x.shape[-1]} (shape {_shape(x)}), but weight of shape {_shape(weight)} "
            f"takes {weight.shape[-1]} input features"
        )
    branches = activation.branches
    if weight.shape[-2] % branches:
        raise ValueError(
            f"weight: {activation.name} has {branches} branches, so weight needs {branches}*N rows; "
            f"got {_shape(weight)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight: it is on {weight.device}, x on {x.device}; move them to one device")
    batch = weight.shape[:-2]
    if batch and x.dim() > 2:
        leading = x.shape[: len(batch)]
        if (
            len(leading) < len(batch)
            or any(a not in (1, b) for a, b in zip(leading, batch, strict=True))
            or x.dim() <= len(batch)
        ):
            raise ValueError(
                f"x: with a batch of weights {_shape(weight)}, the leading dimensions of x must be {list(batch)} "
                f"(or 1 where shared); got {_shape(x)}"
            )
    if bias is not None:
        if bias.dtype != x.dtype:
            raise TypeError(f"bias: its dtype {bias.dtype} differs from x's {x.dtype}; convert one (or use autocast)")
        if bias.shape != weight.shape[:-1] and bias.shape != weight.shape[-2:-1]:
            raise ValueError(
                f"bias: expected shape {list(weight.shape[:-1])} to match weight {_shape(weight)}, got {_shape(bias)}"
            )
        if bias.device != x.device:
            raise ValueError(f"bias: it is on {bias.device}, x on {x.device}; move them to one device")
    if activation.has_tensors:
        features = weight.shape[-2] // branches
        for name, p in activation.params.items():
            if isinstance(p, Tensor):
                if p.dim() and p.shape[0] != features:
                    raise ValueError(
                        f"activation: parameter {name!r} has shape {_shape(p)}, but the layer has {features} features; "
                        f"give [] or [{features}]"
                    )
                if p.device != x.device:
                    raise ValueError(f"activation: parameter {name!r} is on {p.device}, x on {x.device}")
