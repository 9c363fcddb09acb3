"""What is known of a model's linear layers from its earlier calls.

The layers of a model are told apart by the order of their calls (`Site`). Nothing here decides what is right: where a
call goes otherwise than the ones before it, it takes longer, and is right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..network import Layer
from ..ops import mlp as _op
from .formulas import Matched

__all__ = ["Memory", "Site", "bucket"]


def bucket(rows: int) -> int:
    """The number of a count of rows among powers of four."""
    return (max(1, rows).bit_length() + 1) // 2


class Site:
    """A linear layer of a model, by its place in the order of calls.

    Attributes:
        position: this place.
        value: whether its pre-activation itself is wanted, besides what follows it: it is computed at once.
        shared: whether what follows it is wanted by more than the next linear layer.
        joins: whether what follows it is wanted by two linear layers that become one.
        off: why it is computed as the model wrote it ("": it is not).
        slow: the numbers of rows (`bucket`) for which the model's own functions are faster, by whether gradients are
            recorded.
        same: the parameters that the last call had, which are looked at no more.
        note: what was measured, where they are faster on the sample.
    """

    def __init__(self, memory: Memory, position: int):
        self.memory, self.position = memory, position
        self.value = False
        self.shared = False
        self.joins = False
        self.off = ""
        self.slow: dict[bool, frozenset[int]] = {}
        self.note = ""
        self.same: tuple[Tensor, Tensor | None] | None = None
        self._activation: tuple[Matched, tuple, Activation] | None = None
        self._operands: tuple[list, _op.Operands] | None = None
        self._decisions: tuple[Any, dict] | None = None

    def eager(self, shape: Any) -> bool:
        """Whether a layer with a pre-activation of this shape is computed at once."""
        if self.value or self.off:
            return True
        chosen = self.memory.chosen
        if self.slow or chosen is not None:
            if chosen is not None and self.position not in chosen:
                return True
            rows = 1
            for n in shape[:-1]:
                rows *= n
            slow = self.slow.get(torch.is_grad_enabled())
            return slow is not None and bucket(rows) in slow
        return False

    def activation(self, matched: Matched, leaves: tuple, features: int) -> Activation:
        """The activation with the numbers and tensors of this call; the same object while these are the same."""
        kept = self._activation
        if kept is not None and kept[0] is matched and len(kept[1]) == len(leaves):
            for a, b in zip(kept[1], leaves):
                if a is not b and not (type(a) is type(b) and type(a) in (float, int) and a == b):
                    break
            else:
                return kept[2]
        values: dict[str, float | Tensor] = {}
        whole = True
        for name, n in zip(matched.map.param_names, matched.leaves):
            value = leaves[n] if type(n) is int else n
            if isinstance(value, Tensor):
                whole &= type(value) is torch.nn.Parameter or not value.requires_grad
                if value.numel() == 1:
                    if value.dim():  # a view has the derivative of the call that made it
                        whole, value = False, value.reshape(())
                elif value.dim() > 1:
                    whole, value = False, value.reshape(features)
            values[name] = value
        made = Activation(matched.map, values)
        if whole:
            self._activation = matched, leaves, made
        return made

    def operands(self, chain: list, complex_rows: bool) -> _op.Operands:
        """The chain of layers that begins here as operands; the same object while its tensors are the same."""
        kept = self._operands
        if kept is not None and len(kept[0]) == len(chain):
            for (weight, bias, activation, norm, dtype), (node, a) in zip(kept[0], chain):
                root = node.root
                if (
                    root.weight is not weight
                    or root.bias is not bias
                    or a is not activation
                    or weight.dtype is not dtype
                ):
                    break
                if norm is not node.norm and not _same_norm(norm, node.norm):
                    break
            else:
                return kept[1]
        layers = []
        for node, a in chain:
            weight, bias = node.root.blocks(complex_rows)
            layers.append(Layer(weight, bias, a, node.norm))
            complex_rows = node.dtype.is_complex
        operands = _op.Operands(layers)
        described = operands.spec, [None if t is None else (t.shape, t.dtype, t.device) for t in operands.tensors]
        if self._decisions is not None and self._decisions[0] == described:
            operands.decisions = self._decisions[1]
        else:
            self._decisions = described, operands.decisions
        if operands.parameters and not any(node.root.complex for node, _ in chain):
            self._operands = [(*layer[:4], layer.weight.dtype) for layer in layers], operands
        return operands

    # -- for the report

    def saw(self, weight: Tensor, shape: Any) -> None:
        """A pre-activation of this shape is pending."""
        if self.memory.recorder is not None:
            self.memory.recorder.saw(self, weight, shape)

    def ran(self, chain: list, decision: _op.Decision | None) -> None:
        """A chain of layers has been computed, as one operation by `decision`, or one layer."""
        if self.memory.recorder is not None:
            self.memory.recorder.ran(chain, decision)

    def left(self, reason: str) -> None:
        """PyTorch computes what follows this layer, for this reason."""
        if self.memory.recorder is not None:
            self.memory.recorder.left(self, reason)


def _same_norm(a, b) -> bool:
    return a is not None and b is not None and a[0] == b[0] and a[1] is b[1] and a[2] is b[2] and a[3] == b[3]


class Memory:
    """The sites of a model, or of a block of code.

    Attributes:
        chosen: the positions of sites that may be fused; None: all.
        recorder: what is told of every site, or None.
        layers_only: whether no chain of layers becomes one operation.
        measured: whether it is known for which numbers of rows the model's own functions are faster.
        idle: the kinds of calls in which they are everywhere.
    """

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.chosen: frozenset[int] | None = None
        self.recorder: Any = None
        self.layers_only = False
        self.measured = False
        self.idle: set[tuple[bool, int]] = set()

    def site(self, position: int) -> Site:
        """The site of a place."""
        while len(self.sites) <= position:
            self.sites.append(Site(self, len(self.sites)))
        return self.sites[position]
