"""What a backend is: one way to run the raw operations."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import pytorch
from ..activations import ActivationMap
from ..network import Criterion, Layer, Spec

#: Types that operations accept.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def library_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias by PyTorch, [.., M, K] and [.., K, N] with a batch on either, in the compute type."""
    if a.dtype.itemsize >= 4:
        if bias is None:
            return a @ b
        if a.dim() == b.dim() == 2:
            return torch.addmm(bias, a, b)
        return a @ b + bias.unsqueeze(-2)
    # half types: sums of parts of a split product stay float32
    if a.dim() == b.dim() == 2:
        product = torch.mm(a, b, out_dtype=torch.float32)
    else:
        count = max(t.shape[0] for t in (a, b) if t.dim() == 3)
        product = torch.bmm(a.expand(count, *a.shape[-2:]), b.expand(count, *b.shape[-2:]), out_dtype=torch.float32)
    return product if bias is None else product + bias.float().unsqueeze(-2)


def loss_factor(dtype: torch.dtype, scale: float) -> float:
    """A power of two that takes a loss's scale to about 1 where gradients have little range: those of a mean over many
    rows are below what float16 holds, and a loss scaler, which multiplies them afterwards, finds zeros."""
    return 2.0 ** -round(math.log2(scale)) if dtype == torch.float16 and 0 < scale < 1 else 1.0


def within_float16(mlp_loss):
    """Makes a backend's `mlp_loss` compute float16 with sums by `loss_factor` larger, then divided by it in float32, in
    which the gradients are returned."""

    @functools.wraps(mlp_loss)
    def wrapped(self, x, target, row_weights, tensors, spec, criterion, precision, needs):
        if x.dtype != torch.float16:
            return mlp_loss(self, x, target, row_weights, tensors, spec, criterion, precision, needs)
        factor = loss_factor(x.dtype, criterion.scale)
        larger = Criterion(criterion.loss, criterion.constants, criterion.scale * factor)
        results = mlp_loss(self, x, target, row_weights, tensors, spec, larger, precision, needs)
        return [t.float() / factor for t in results]

    return wrapped


def refuse_freed(*tensors: Tensor | None) -> None:
    """Looks whether storage was freed under a tensor, where PyTorch's elementwise operators read what is not there.

    Raises:
        RuntimeError: it was.
    """
    if torch.compiler.is_compiling() or pytorch.transforms_active():
        return  # what a transform wraps does not show its storage
    for t in tensors:
        if t is not None and t.numel() and not t.untyped_storage().nbytes():
            raise RuntimeError(f"a tensor of shape {list(t.shape)} whose storage was freed; gather it first")


def group_branches(map: ActivationMap, level: int, learnable: bool) -> tuple[list[int], list[int]]:
    """Branches of each input group of `act_map`, parameters left out, and of each output group; 0: one a feature."""
    inputs, outputs = [map.branches], [map.outputs]
    with_gradient = [map.branches] + ([0] * map.n_params if learnable else [])
    for _ in range(level):
        inputs, outputs, with_gradient = inputs + outputs, with_gradient, with_gradient + outputs
    return inputs, outputs


class Backend:
    """One way to run the raw operations (docs/architecture.md, section 3)."""

    name: str
    #: whether it has products of its own for float32 on a GPU, or those that PyTorch's settings say
    chooses_products = False
    #: whether a whole network takes weights of other floating-point types than its rows (under autocast)
    reads_any_weights = False

    def available(self) -> tuple[bool, str]:
        """Whether it can run in this process, and the reason when not."""
        raise NotImplementedError

    def serves(self, map: ActivationMap, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve this call; empty when it can."""
        raise NotImplementedError

    def keeps(self, dtype: torch.dtype, has_tensors: bool) -> str:
        """What a layer's forward stores for its backward: "preactivations", "derivatives" of the outputs with respect
        to the branches, or "" (the backward computes anew). `has_tensors`: some parameters are tensors, whose gradients
        need pre-activations."""
        # float32 pre-activations of half types would take twice the output's memory
        return "preactivations" if dtype.itemsize >= 4 else ""

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep) -> tuple[Tensor, Tensor]:
        """y, and what `keep` says, else an empty tensor: pre-activations in float32 (float64), derivatives in x's
        type."""
        raise NotImplementedError

    def linear_act_backward(
        self, g, x, weight, bias, params, constants, z, map, precision, needs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, weight, bias and of the parameters, [P, N] together; empty where `needs` says so.

        z is what the forward kept, or None: it is computed again.
        """
        raise NotImplementedError

    def act_map(self, inputs, params, constants, map, level, learnable) -> list[Tensor]:
        """The map of a level: a tensor for each group of streams, as `group_branches` has them."""
        raise NotImplementedError

    def moments(self, sigmas, params, start, samples, seed, map) -> Tensor:
        """Sums per chunk of draws, [chunks, G, C * (1 + B), 3] (docs/architecture.md, section 8)."""
        raise NotImplementedError

    # -- whole networks (docs/architecture.md, section 7)

    def serves_network(self, x: Tensor, layers: Sequence[Layer], precision: str, direction: str) -> str:
        """Why it cannot run a whole network whose layers it serves; empty when it can.

        `direction` is "inference", "forward" (with its backward) or "loss" (one pass of both).
        """
        return f"backend {self.name!r} runs layer by layer"

    def prefers_layers(self, layers: Sequence[Layer], dtype: torch.dtype) -> str:
        """Why layers are the better way for a network that it could run whole; empty when they are not."""
        return ""

    def prefers_plain(self, dtype: torch.dtype) -> str:
        """Why plain PyTorch is the better way for a network that it could run whole; empty when it is not."""
        return ""

    def mlp(
        self, x: Tensor, tensors: Sequence[Tensor | None], spec: Spec, precision: str, save: bool
    ) -> tuple[Tensor, Tensor]:
        """y [M, C*N] of x [M, K], and what the backward may take, a flat tensor (empty without `save`)."""
        raise NotImplementedError

    def mlp_backward(
        self, g: Tensor, x: Tensor, tensors: Sequence[Tensor | None], spec: Spec, saved: Tensor | None, precision: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:  # fmt: skip
        """Gradients of x, then of each layer's weight, bias, parameters ([P, N] together, where it has any) and of the
        weight and bias of its norm, where it has one; empty where `needs` (`network.groups_needed`) says so or there is
        nothing.
        """
        raise NotImplementedError

    def mlp_loss(
        self, x: Tensor, target: Tensor, row_weights: Tensor | None, tensors: Sequence[Tensor | None], spec: Spec,
        criterion: Criterion, precision: str, needs: Sequence[bool],
    ) -> list[Tensor]:  # fmt: skip
        """The criterion's value, then the gradients as in `mlp_backward`."""
        raise NotImplementedError
