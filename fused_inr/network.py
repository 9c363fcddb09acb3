"""What a network is: its layers as values, its description without tensors, and its computation in plain PyTorch.

A network travels through the operations as one list of tensors and one `Spec`, which says in words what each layer is
("sine skip layernorm") and holds its numbers. A new kind of norm or of connection is one word: read here (`Spec`,
`NORMS`) and in C++ (`csrc/mlp.cpp`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .activations import Activation, ActivationMap, lookup
from .pytorch import constant_to_dynamo

__all__ = [
    "NORMS",
    "SKIP",
    "Criterion",
    "Layer",
    "Norm",
    "Spec",
    "add_skip",
    "compute_dtype",
    "gradients_by_layer",
    "groups_needed",
    "in_sequence",
    "plain_layer",
    "plain_loss",
    "spec_of",
    "steps",
]

#: Factor of a skip connection: the mean square of a sum of two independent terms becomes that of each.
SKIP = 0.5**0.5


class NormKind(NamedTuple):
    """What distinguishes a kind of norm: its word in a `Spec`, whether it subtracts the mean, the module for it."""

    word: str
    centred: bool
    module: type[nn.Module]

    @property
    def name(self) -> str:
        """The name of the module."""
        return self.module.__name__


#: Norms that can stand behind a layer, over the columns of its output.
NORMS = {"layer": NormKind("layernorm", True, nn.LayerNorm), "rms": NormKind("rmsnorm", False, nn.RMSNorm)}
_KIND_OF = {kind.word: name for name, kind in NORMS.items()}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of pre-activations, activations and accumulators: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Norm(NamedTuple):
    """A norm over the columns of a layer's output y [.., C*N]: weight (y - mean) / sqrt(variance + eps) + bias.

    Attributes:
        kind: a key of `NORMS`: "layer" as written; "rms" without the mean, the mean square in place of the variance.
        weight, bias: [C*N], or None for 1 and 0.
        eps: at least 0.

    A call computes it in plain PyTorch, in float32 for half types, in the type of y; differentiable any number of
    times.
    """

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, y: Tensor) -> Tensor:
        dtype = compute_dtype(y.dtype)
        weight, bias = (t if t is None else t.to(dtype) for t in (self.weight, self.bias))
        z = y.to(dtype)
        if NORMS[self.kind].centred:
            return torch.nn.functional.layer_norm(z, y.shape[-1:], weight, bias, self.eps).to(y.dtype)
        z = torch.nn.functional.rms_norm(z, y.shape[-1:], weight, self.eps)
        return (z if bias is None else z + bias).to(y.dtype)

    def backward(self, g: Tensor, y: Tensor, needed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of y, and where needed of the weight and the bias, from the cotangent g of the norm's output."""
        dtype = compute_dtype(y.dtype)
        g, y = g.to(dtype), y.to(dtype)
        centred = NORMS[self.kind].centred
        centre = y - y.mean(-1, keepdim=True) if centred else y
        rstd = (centre.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        hat = centre * rstd
        scaled = g if self.weight is None else g * self.weight.to(dtype)
        gy = scaled - hat * (scaled * hat).mean(-1, keepdim=True)
        gy = rstd * (gy - scaled.mean(-1, keepdim=True) if centred else gy)
        sums = []
        for t, terms in ((self.weight, g * hat), (self.bias, g)):
            sums.append(g.new_empty(0) if t is None else terms.sum(0).to(t.dtype) if needed else t.new_empty(0))
        return gy, sums[0], sums[1]


class Layer(NamedTuple):
    """A layer of a network: x <- norm(activation(x weight^T + bias)), and with a skip (that + x) / sqrt(2).

    Attributes:
        weight: [B*N, K], of B branches and N features.
        bias: [B*N] or None.
        activation: of B branches and C outputs, with its parameters.
        norm: over the C*N columns of the activation's output, or None.
        skip: whether the layer's input is added to its output.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Activation
    norm: Norm | None = None
    skip: bool = False

    @property
    def tensors(self) -> list[Tensor | None]:
        """The tensors as an operation takes them: weight, bias, parameters, and a norm's weight and bias."""
        own = [self.weight, self.bias, *self.activation.tensors]
        return own if self.norm is None else [*own, self.norm.weight, self.norm.bias]

    @property
    def word(self) -> str:
        """The layer in words: the key of its map, `skip`, the word of its norm."""
        words = [self.activation.map.key]
        words += ["skip"] if self.skip else []
        words += [] if self.norm is None else [NORMS[self.norm.kind].word]
        return " ".join(words)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers as an operation takes them: parameters (0 where one is a tensor), and a norm's eps."""
        own = self.activation.constants
        return own if self.norm is None else (*own, self.norm.eps)

    @property
    def columns(self) -> int:
        """Columns of the output."""
        return self.weight.shape[0] // self.activation.branches * self.activation.outputs


@dataclass(frozen=True)
class Spec:
    """A network without its tensors: what each layer is, and its numbers.

    Attributes:
        words: of each layer the key of its map, then `skip` where it has a skip connection, then the word of its norm.
        numbers: layer by layer the parameters that are numbers (0 where one is a tensor), then the eps of its norm.

    The network's tensors come layer by layer: weight, bias or None, each parameter or None where it is a number, and
    where there is a norm its weight and bias, or None.
    """

    words: tuple[str, ...]
    numbers: tuple[float, ...]
    #: of each layer its activation's map, whether it has a skip connection, the kind of its norm or None
    maps: tuple[ActivationMap, ...] = field(init=False, compare=False, repr=False)
    skips: tuple[bool, ...] = field(init=False, compare=False, repr=False)
    norms: tuple[str | None, ...] = field(init=False, compare=False, repr=False)
    #: of each layer how many parameters its activation has
    counts: tuple[int, ...] = field(init=False, compare=False, repr=False)
    #: of each tensor of the network: WEIGHT, BIAS, PARAMETER or NORM
    groups: tuple[int, ...] = field(init=False, compare=False, repr=False)
    #: whether the code of all maps is among the committed files
    generated: bool = field(init=False, compare=False, repr=False)

    #: groups of tensors whose gradients are asked for together
    INPUT: ClassVar = 0
    WEIGHT: ClassVar = 1
    BIAS: ClassVar = 2
    PARAMETER: ClassVar = 3
    NORM: ClassVar = 4

    def __post_init__(self) -> None:
        maps, skips, norms, groups = [], [], [], []
        for word in self.words:
            key, *rest = word.split()
            maps.append(lookup(key))
            skips.append("skip" in rest)
            norms.append(next((_KIND_OF[w] for w in rest if w != "skip"), None))
            groups += [self.WEIGHT, self.BIAS, *[self.PARAMETER] * maps[-1].n_params]
            groups += [] if norms[-1] is None else [self.NORM, self.NORM]
        found: dict[str, list] = {"maps": maps, "skips": skips, "norms": norms, "groups": groups}
        found["counts"] = [map.n_params for map in maps]
        for name, values in found.items():
            object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "generated", all(map.generated for map in maps))

    def layers(self, tensors: Sequence[Tensor | None]) -> list[Layer]:
        """The network's layers."""
        layers, at, number = [], 0, 0
        for map, skip, norm, count in zip(self.maps, self.skips, self.norms, self.counts):
            weight, bias = tensors[at], tensors[at + 1]
            params = tensors[at + 2 : at + 2 + count]
            constants = self.numbers[number : number + count]
            at, number = at + 2 + count, number + count
            values = {
                name: constant if tensor is None else tensor
                for name, tensor, constant in zip(map.param_names, params, constants, strict=True)
            }
            behind = None
            if norm is not None:
                behind = Norm(norm, tensors[at], tensors[at + 1], self.numbers[number])
                at, number = at + 2, number + 1
            assert weight is not None
            layers.append(Layer(weight, bias, Activation(map, values), behind, skip))
        return layers


_specs: dict[tuple, Spec] = {}
_MOST_SPECS = 1024


@constant_to_dynamo
def spec_of(words: tuple[str, ...], numbers: tuple[float, ...]) -> Spec:
    """The spec of these words and numbers; the same object for the same ones."""
    found = _specs.get((words, numbers))
    if found is None:
        if len(_specs) >= _MOST_SPECS:
            _specs.clear()
        found = _specs[words, numbers] = Spec(words, numbers)
    return found


# functions, not methods: Dynamo (2.13) cannot call a method of an object that it holds as a constant


def groups_needed(spec: Spec, of_input: bool, of_tensors: Sequence[bool]) -> list[bool]:
    """Which groups need gradients: the input, any weight, bias, parameter, norm."""
    needs = [of_input, False, False, False, False]
    for group, need in zip(spec.groups, of_tensors, strict=True):
        if need:
            needs[group] = True
    return needs


def gradients_by_layer(spec: Spec, results: Sequence[Any]) -> list[tuple[Any, Any, Sequence[Any], Sequence[Any]]]:
    """Of each layer, from what a raw backward returns behind the gradient of x: the gradients of its weight and its
    bias, of each of its parameters (None where they were not asked for), of its norm's weight and bias."""
    found: list[tuple[Any, Any, Sequence[Any], Sequence[Any]]] = []
    at = 0
    for count, norm in zip(spec.counts, spec.norms):
        weight, bias, at = results[at], results[at + 1], at + 2
        params: Sequence[Any] = ()
        if count:
            together, at = results[at], at + 1
            params = together if together.dim() == 2 else [None] * count
        behind: Sequence[Any] = ()
        if norm is not None:
            behind, at = results[at : at + 2], at + 2
        found.append((weight, bias, params, behind))
    return found


@dataclass(frozen=True)
class Criterion:
    """An elementwise loss: `scale` times the sum over rows of their weight times the sum over columns."""

    loss: str
    constants: tuple[float, ...]
    scale: float

    @property
    def map(self) -> ActivationMap:
        """The map of (prediction, target) to the loss of an element."""
        return lookup(self.loss)


# -- in plain PyTorch


def add_skip(y: Tensor, x: Tensor) -> Tensor:
    """(y + x) / sqrt(2), of a layer's output y and input x."""
    return (y + x) * SKIP


def in_sequence(x: Tensor, steps: Iterable[tuple[Callable, Any, bool]]) -> Tensor:
    """Computes a network a layer after the other: x <- norm(layer(x)), and with a skip (norm(layer(x)) + x) / sqrt(2).

    Args:
        x: [.., K].
        steps: of each layer a function of its input, one that normalises its output or None, and whether it has a skip
            connection.

    Raises:
        ValueError: an output that is added to an input of another shape.
    """
    for i, (layer, norm, skip) in enumerate(steps):
        y = layer(x)
        if norm is not None:
            y = norm(y)
        if skip:
            if y.shape != x.shape:
                raise ValueError(
                    f"net.{i}: a skip connection adds its input of shape {list(x.shape)} to an output of shape "
                    f"{list(y.shape)}; they must be equal"
                )
            y = add_skip(y, x)
        x = y
    return x


def plain_layer(weight: Tensor, bias: Tensor | None, activation: Activation) -> Callable[[Tensor], Tensor]:
    """activation(x weight^T + bias) as a function of x by PyTorch's own functions, differentiable any number of times.

    x is [.., K], weight [B*N, K] or [G, B*N, K] with bias to match; computed in float32 for half types.
    """
    function, branches = activation.map.torch_map(0), activation.branches
    values = tuple(activation.params.values())
    linear, own = torch.nn.functional.linear, weight.dtype

    def general(x: Tensor) -> Tensor:
        z = _product(x, weight, bias)
        outputs = function(*z.chunk(branches, -1), *values) if branches > 1 else function(z, *values)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)).to(x.dtype)

    if weight.dim() != 2 or own.itemsize < 4 or branches > 1 or activation.outputs > 1 or activation.has_tensors:
        return general

    def simple(x: Tensor) -> Tensor:
        return function(linear(x, weight, bias), *values)[0] if x.dtype is own else general(x)

    return simple


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    z = x @ weight.transpose(-1, -2)
    return z if bias is None else z + bias.unsqueeze(-2)


def steps(
    layers: Iterable[Layer], function: Callable[[Tensor, Tensor | None, Activation], Callable] = plain_layer
) -> list[tuple[Callable, Norm | None, bool]]:
    """The layers for `in_sequence`; `function` makes a layer of weight, bias and activation a function of its input."""
    return [(function(weight, bias, activation), norm, skip) for weight, bias, activation, norm, skip in layers]


def plain_loss(y: Tensor, target: Tensor, row_weights: Tensor | None, criterion: Criterion) -> Tensor:
    """The criterion in plain PyTorch, differentiable any number of times: y and target [M, N], row_weights [M]."""
    dtype = compute_dtype(y.dtype)
    (loss,) = criterion.map.torch_map(0)(y.to(dtype), target.to(dtype), *criterion.constants)
    if row_weights is not None:
        loss = loss * row_weights.to(dtype).unsqueeze(-1)
    return loss.sum() * criterion.scale
