"""Which code runs an operation: one table of backends, each with a reason where it cannot serve.

```python
fused_inr.backends.available()            # {'triton': (False, 'no CUDA device ...'), 'cpu': (True, ''), ...}
with fused_inr.backends.use("reference"):  # this or an error
    net(x)
print(fused_inr.backends.explain(net, x))  # what would run where, and why
with fused_inr.backends.float32_products("bf16x3"):  # of float32 on a GPU, whatever PyTorch's settings say
    net(x)
```

Without `use`, the first backend of the table that serves is taken; when that is the reference although a faster one
is meant for the device, a warning says so once, with the reason.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import Activation, ActivationMap, lookup

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: columns of the widest layer up to which the CPU engine is at its best with a whole network
_WIDEST_TILE = 1024


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Pre-activations, activations and accumulators: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: Of a layer's LayerNorm: weight and bias [C*N], or None for 1 and 0, and eps.
Norm = tuple[Tensor | None, Tensor | None, float]


def flat_norms(norms: Sequence[Norm | None]) -> tuple[list[Tensor | None], list[float]]:
    """The arguments `norms` and `norm_eps` of a raw operation: weight and bias of each layer's, eps (-1: no norm)."""
    tensors = [t for norm in norms for t in ((None, None) if norm is None else norm[:2])]
    return tensors, [-1.0 if norm is None else norm[2] for norm in norms]


def norms_by_layer(norms: Sequence[Tensor | None], norm_eps: Sequence[float]) -> list[Norm | None]:
    """Of each layer, from those arguments."""
    pairs = zip(norms[::2], norms[1::2], norm_eps, strict=True)
    return [None if eps < 0 else (weight, bias, eps) for weight, bias, eps in pairs]


#: factor of a skip connection: the mean square of a sum of two independent terms becomes that of each
SKIP = 0.5**0.5


def add_skip(y: Tensor, x: Tensor) -> Tensor:
    """(y + x) / sqrt(2), of a layer's output y and input x."""
    return (y + x) * SKIP


def layer_norm(y: Tensor, norm: Norm) -> Tensor:
    """nn.LayerNorm over the columns of y, computed in float32 for half types, in the type of y."""
    weight, bias, eps = norm
    dtype = compute_dtype(y.dtype)
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    return torch.nn.functional.layer_norm(y.to(dtype), y.shape[-1:], weight, bias, eps).to(y.dtype)


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


def _within_float16(mlp_loss):
    """float16: sums by `loss_factor` larger, then divided by it in float32, in which the gradients are returned."""

    @functools.wraps(mlp_loss)
    def wrapped(self, x, *arguments):
        if x.dtype != torch.float16:
            return mlp_loss(self, x, *arguments)
        *before, scale, precision, needs = arguments
        factor = loss_factor(x.dtype, scale)
        results = mlp_loss(self, x, *before, scale * factor, precision, needs)
        return [t.float() / factor for t in results]

    return wrapped


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
        raise NotImplementedError

    def act_map(self, inputs, params, constants, map, level, learnable) -> list[Tensor]:
        raise NotImplementedError

    def moments(self, sigmas, params, start, samples, seed, map) -> Tensor:
        """Sums per chunk of draws, [chunks, G, C * (1 + B), 3] (docs/architecture.md, section 8)."""
        raise NotImplementedError

    # -- whole networks (docs/architecture.md, section 7)

    def serves_network(self, x, shapes, maps, precision, direction, learnable, skips, norms) -> str:
        """Why it cannot run a whole network whose layers it serves; empty when it can.

        `direction` is "inference", "forward" (with its backward) or "loss" (one pass of both); `learnable`, a layer:
        some parameters of its activation are tensors; `skips`, `norms`, a layer: it has a skip connection, a LayerNorm
        (empty: none has).
        """
        return f"backend {self.name!r} runs layer by layer"

    def prefers_layers(self, shapes, maps, dtype) -> str:
        """Why layers are the better way for a network that it could run whole; empty when they are not."""
        return ""

    def prefers_plain(self, dtype: torch.dtype) -> str:
        """Why plain PyTorch is the better way for a network that it could run whole; empty when it is not."""
        return ""

    def mlp(self, x, weights, biases, params, constants, maps, skips, norms, precision, save) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def mlp_backward(
        self, g, x, weights, biases, params, constants, maps, skips, norms, saved, precision, needs
    ) -> list[Tensor]:
        raise NotImplementedError

    def mlp_loss(
        self, x, target, row_weights, weights, biases, params, constants, maps, skips, norms, loss, loss_constants,
        scale, precision, needs,
    ) -> list[Tensor]:  # fmt: skip
        raise NotImplementedError


# -- reference: plain PyTorch


def _expanded(params: Sequence[Tensor | None], constants: Sequence[float], like: Tensor) -> list[Tensor | float]:
    """Parameter values that broadcast over the rows of a branch of z [.., M, N]."""
    values: list[Tensor | float] = []
    for tensor, constant in zip(params, constants, strict=True):
        if tensor is None:
            values.append(constant)
        else:
            values.append(tensor.to(like.dtype))
    return values


def _row_sum(t: Tensor, like: Tensor) -> Tensor:
    """[.., N] or anything that broadcasts to `like`'s shape, summed over its rows."""
    return t.expand(like.shape).flatten(0, -2).sum(0)


def reference_map(
    map: ActivationMap,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor | None],
    constants: Sequence[float],
    level: int,
    learnable: bool,
) -> list[Tensor]:
    """`act_map` in plain PyTorch, which PyTorch can differentiate."""
    from .raw import group_branches

    branches, outputs = group_branches(map.key, level, learnable)
    z = inputs[0]
    streams: list[Tensor | float] = []
    for position, (group, k) in enumerate(zip(inputs, branches, strict=True)):
        group = group.to(z.dtype)
        streams.extend(group.chunk(k, -1) if k > 1 else (group,))
        if position == 0:
            streams.extend(_expanded(params, constants, z))
    results = list(map.torch_map(level, learnable)(*streams))
    like = z[..., : z.shape[-1] // branches[0]]
    grouped = []
    for k in outputs:
        if k:
            # no view: the output's owner may change it in place
            parts = [r if r.shape == like.shape else r.expand(like.shape).contiguous() for r in results[:k]]
            grouped.append(parts[0] if k == 1 else torch.cat(parts, -1))
            results = results[k:]
        else:
            grouped.append(_row_sum(results.pop(0), like))
    return grouped


def _preactivation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    return library_product(x.to(dtype), weight.to(dtype).transpose(-1, -2), bias)


def refuse_freed(*tensors: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: storage was freed under a tensor, where PyTorch's elementwise operators read what is not there.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # what a transform wraps does not show its storage
    for t in tensors:
        if t is not None and t.numel() and not t.untyped_storage().nbytes():
            raise RuntimeError(f"a tensor of shape {list(t.shape)} whose storage was freed; gather it first")


def product_and_map(x, weight, bias, params, constants, map: ActivationMap, keep):
    """`linear_act` as a matrix product of PyTorch's and the reference map of its result."""
    z = _preactivation(x, weight, bias)
    (y,) = reference_map(map, [z], params, constants, 0, False)
    y = y.to(x.dtype)
    if not keep:
        z = z.new_empty(0)
    elif y.untyped_storage().data_ptr() == z.untyped_storage().data_ptr():
        y = y.clone()  # identity: the output may be changed in place by its owner, z may not
    return y, z


def product_and_map_backward(
    g, x, weight, bias, params, constants, z, map: ActivationMap, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear_act_backward` as a map of z and g, and matrix products of PyTorch's."""
    if z is None:
        z = _preactivation(x, weight, bias)
    gz, *gp = reference_map(map, [z, g], params, constants, 1, needs[3])
    gx = (gz @ weight.to(gz.dtype)).to(x.dtype) if needs[0] else x.new_empty(0)
    gw = (gz.transpose(-1, -2) @ x.to(gz.dtype)).to(weight.dtype) if needs[1] else weight.new_empty(0)
    dtype = (weight if bias is None else bias).dtype
    gb = gz.sum(-2).to(dtype) if needs[2] else z.new_empty(0, dtype=dtype)
    if not needs[3]:
        return gx, gw, gb, z.new_empty(0)
    if z.dim() == 2:
        return gx, gw, gb, torch.stack(gp)
    batches = [reference_map(map, [zi, gi], params, constants, 1, True)[1:] for zi, gi in zip(z, g, strict=True)]
    return gx, gw, gb, torch.stack([torch.stack(b) for b in batches])


class Reference(Backend):
    """Plain PyTorch, emitted from the same formulas: runs on any device, differentiable any number of times."""

    name = "reference"

    def available(self):
        return True, ""

    def serves(self, map, device, dtype):
        return "" if dtype in _FLOATS else f"dtype {dtype} is not a floating-point type of {_FLOATS}"

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep):
        return product_and_map(x, weight, bias, params, constants, map, keep)

    def linear_act_backward(self, g, x, weight, bias, params, constants, z, map, precision, needs):
        return product_and_map_backward(g, x, weight, bias, params, constants, z, map, needs)

    def act_map(self, inputs, params, constants, map, level, learnable):
        outputs = reference_map(map, inputs, params, constants, level, learnable)
        taken = {t.untyped_storage().data_ptr() for t in inputs}
        return [o.clone() if o.untyped_storage().data_ptr() in taken else o for o in outputs]

    def moments(self, sigmas, params, start, samples, seed, map):
        from . import moments

        return moments.reference(sigmas, params, start, samples, seed, map)

    def serves_network(self, x, shapes, maps, precision, direction, learnable, skips, norms):
        return ""

    def prefers_layers(self, shapes, maps, dtype):
        return "plain PyTorch gains nothing from a whole network"

    def mlp(self, x, weights, biases, params, constants, maps, skips, norms, precision, save):
        layers = _by_layer(weights, biases, params, constants, maps, skips, norms)
        for weight, bias, own, values, map, skip, norm in layers:
            y = self.linear_act(x, weight, bias, own, values, map, precision, False)[0]
            y = y if norm is None else layer_norm(y, norm)
            x = add_skip(y, x) if skip else y
        return x, x.new_empty(0, dtype=compute_dtype(x.dtype))

    def mlp_backward(self, g, x, weights, biases, params, constants, maps, skips, norms, saved, precision, needs):
        layers = list(_by_layer(weights, biases, params, constants, maps, skips, norms))
        inputs, mapped = [x], []
        for weight, bias, own, values, map, skip, norm in layers if norms else layers[:-1]:
            y = self.linear_act(inputs[-1], weight, bias, own, values, map, precision, False)[0]
            mapped.append(y)
            y = y if norm is None else layer_norm(y, norm)
            inputs.append(add_skip(y, inputs[-1]) if skip else y)
        rest: list[list[Tensor]] = [[], [], []]
        of_norms: list[Tensor] = []
        for i in range(len(layers) - 1, -1, -1):
            weight, bias, own, values, map, skip, norm = layers[i]
            g = g * SKIP if skip else g
            around = g if skip else None
            if norm is not None:
                g, *grads = _layer_norm_backward(g, mapped[i], norm, needs[4])
                of_norms = grads + of_norms
            elif norms:
                of_norms = [g.new_empty(0), g.new_empty(0), *of_norms]
            wanted = [needs[0] or i > 0, needs[1], needs[2] and bias is not None, needs[3] and map.n_params > 0]
            g, *grads = self.linear_act_backward(g, inputs[i], weight, bias, own, values, None, map, precision, wanted)
            if around is not None and wanted[0]:
                g = (g + around).to(inputs[i].dtype)
            for group, grad in zip(rest, grads, strict=True):
                group.insert(0, grad)
        return [g, *rest[0], *rest[1], *rest[2], *of_norms]

    @_within_float16
    def mlp_loss(
        self, x, target, row_weights, weights, biases, params, constants, maps, skips, norms, loss, loss_constants,
        scale, precision, needs,
    ):  # fmt: skip
        y, _ = self.mlp(x, weights, biases, params, constants, maps, skips, norms, precision, False)
        dtype = compute_dtype(x.dtype)
        value, g, _ = loss.torch_jet()(y.to(dtype), target.to(dtype), *loss_constants)
        if row_weights is not None:
            value, g = (t * row_weights.to(dtype).unsqueeze(-1) for t in (value, g))
        # not in the type of y: a mean's gradient is below what half types hold
        g = g * scale
        grads = self.mlp_backward(g, x, weights, biases, params, constants, maps, skips, norms, None, precision, needs)
        return [value.sum() * scale, *grads]


def _by_layer(weights, biases, params, constants, maps, skips, norms):
    """(weight, bias, parameters, constants, map, skip, norm or None) of each layer of a raw call."""
    at = 0
    skips, norms = skips or [False] * len(maps), norms or [None] * len(maps)
    for weight, bias, map, skip, norm in zip(weights, biases, maps, skips, norms, strict=True):
        end = at + map.n_params
        yield weight, bias, list(params[at:end]), list(constants[at:end]), map, skip, norm
        at = end


def _layer_norm_backward(g: Tensor, y: Tensor, norm: Norm, needed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, and where needed of the weight and the bias: hat = (y - mean) rstd, scaled = g weight."""
    weight, bias, eps = norm
    dtype = compute_dtype(y.dtype)
    g, y = g.to(dtype), y.to(dtype)
    centred = y - y.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    hat = centred * rstd
    scaled = g if weight is None else g * weight.to(dtype)
    gy = rstd * (scaled - scaled.mean(-1, keepdim=True) - hat * (scaled * hat).mean(-1, keepdim=True))
    sums = []
    for t, terms in ((weight, g * hat), (bias, g)):
        sums.append(g.new_empty(0) if t is None else terms.sum(0).to(t.dtype) if needed else t.new_empty(0))
    return gy, sums[0], sums[1]


# -- native libraries: the CPU engine, CUDA C++


class _Native(Backend):
    """A backend whose operators a library of ours registers; a user's formula is compiled when it is first used."""

    def __init__(self) -> None:
        self._compiled: dict[str, str] = {}  # key of a run-time formula -> reason why it could not be compiled

    @staticmethod
    def _library():
        """The module that builds and loads the library."""
        raise NotImplementedError

    @staticmethod
    def _operators():
        raise NotImplementedError

    def available(self):
        library = self._library()
        return (True, "") if library.load() else (False, library.status()[1])

    def _compile(self, map: ActivationMap) -> str:
        if map.key not in self._compiled:
            try:
                self._library().compile_maps(map.key, map.cpp_source())
                self._compiled[map.key] = ""
            except Exception as error:  # no compiler, no space, a compiler's error: the reference serves
                self._compiled[map.key] = f"the formula of {map.name!r} could not be compiled: {error}"
        return self._compiled[map.key]

    def _ready(self, map: ActivationMap):
        if not map.generated and (reason := self._compile(map)):
            raise RuntimeError(f"backend {self.name!r}: {reason}")
        return self._operators()

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep):
        return self._ready(map).linear_act(x, weight, bias, params, constants, map.key, bool(keep))

    def linear_act_backward(self, g, x, weight, bias, params, constants, z, map, precision, needs):
        return self._ready(map).linear_act_backward(g, x, weight, bias, params, constants, z, map.key, needs)

    def act_map(self, inputs, params, constants, map, level, learnable):
        return self._ready(map).act_map(inputs, params, constants, map.key, level, learnable)

    def moments(self, sigmas, params, start, samples, seed, map):
        return self._ready(map).moments(sigmas, params, start, samples, seed, map.key)


# -- cpu: the native engine


class Cpu(_Native):
    """The C++ engine (csrc/cpu)."""

    name = "cpu"

    @staticmethod
    def _library():
        from .. import native

        return native

    @staticmethod
    def _operators():
        return torch.ops.fused_inr_native

    def serves(self, map, device, dtype):
        if device.type != "cpu":
            return f"the tensors are on {device}, this backend serves CPU tensors"
        if dtype not in _FLOATS:
            return f"dtype {dtype} is not one of {_FLOATS}"
        usable, reason = self.available()
        if not usable:
            return reason
        return "" if map.generated else self._compile(map)

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep):
        if x.dtype == torch.float64:  # PyTorch's products and maps are faster than the engine's (bench calls)
            refuse_freed(x, weight, bias, *params)
            return product_and_map(x, weight, bias, params, constants, map, keep)
        return super().linear_act(x, weight, bias, params, constants, map, precision, keep)

    def linear_act_backward(self, g, x, weight, bias, params, constants, z, map, precision, needs):
        if x.dtype == torch.float64:
            refuse_freed(g, x, weight, bias, z, *params)
            return product_and_map_backward(g, x, weight, bias, params, constants, z, map, needs)
        return super().linear_act_backward(g, x, weight, bias, params, constants, z, map, precision, needs)

    def serves_network(self, x, shapes, maps, precision, direction, learnable, skips, norms):
        return ""

    def prefers_layers(self, shapes, maps, dtype):
        if dtype == torch.float64:
            return "float64: PyTorch's matrix products are faster than those of a whole network"
        # a tile of rows and a layer's weights no longer fit the second-level cache together
        widest = max(rows for rows, _ in shapes)
        return "" if widest <= _WIDEST_TILE else f"layers of {widest} columns: a tile of them would hold few rows"

    def prefers_plain(self, dtype):
        return "PyTorch's products and maps of float64 are faster" if dtype == torch.float64 else ""

    def _network(self, maps: Sequence[ActivationMap]):
        for map in maps:
            self._ready(map)
        return self._operators(), [map.key for map in maps]

    def mlp(self, x, weights, biases, params, constants, maps, skips, norms, precision, save):
        ops, keys = self._network(maps)
        return ops.mlp(x, weights, biases, params, constants, keys, skips, *flat_norms(norms), save)

    def mlp_backward(self, g, x, weights, biases, params, constants, maps, skips, norms, saved, precision, needs):
        ops, keys = self._network(maps)
        return ops.mlp_backward(g, x, weights, biases, params, constants, keys, skips, *flat_norms(norms), saved, needs)

    @_within_float16
    def mlp_loss(
        self, x, target, row_weights, weights, biases, params, constants, maps, skips, norms, loss, loss_constants,
        scale, precision, needs,
    ):  # fmt: skip
        ops, keys = self._network([*maps, loss])
        return ops.mlp_loss(
            x, target, row_weights, weights, biases, params, constants, keys[:-1], skips, *flat_norms(norms), keys[-1],
            loss_constants, scale, needs,
        )  # fmt: skip


# -- triton


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


class Triton(Backend):
    """Triton kernels on CUDA devices; on CPU tensors under TRITON_INTERPRET=1, for tests."""

    name = "triton"
    chooses_products = True
    reads_any_weights = True

    def available(self):
        try:
            import triton
        except ImportError:
            return False, "Triton is not installed (pip install 'triton>=3.6'; Linux)"
        major, minor = (int(part) for part in triton.__version__.split(".")[:2])
        if (major, minor) < (3, 6):
            return False, f"Triton {triton.__version__} is too old: 3.6 or newer is needed"
        if _interpreted():
            return True, ""
        if not torch.cuda.is_available():
            return False, "no CUDA device, and TRITON_INTERPRET=1 (its interpreter, for tests) is not set"
        if torch.version.hip:
            return False, "ROCm devices have not been tried"
        return True, ""

    def serves(self, map, device, dtype):
        usable, reason = self.available()
        if not usable:
            return reason
        if _interpreted():
            return "" if dtype in _FLOATS else f"dtype {dtype} is not one of {_FLOATS}"
        if device.type != "cuda":
            return f"the tensors are on {device}, this backend serves CUDA tensors"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {dtype} is not float32, bfloat16 or float16"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor}: 8.0 or newer is needed"
        return ""

    def keeps(self, dtype, has_tensors):
        if dtype.itemsize >= 4:
            return "preactivations"
        return "" if has_tensors else "derivatives"

    @staticmethod
    def _by_library(op: str, x: Tensor, weight: Tensor, precision: str) -> bool:
        """Whether a matrix product is left to the library, with the map as one pointwise kernel: where it is the faster
        one (`kernels/tune.py`), which includes ieee, that no tensor core computes.

        The library goes by PyTorch's settings as they are now: where those are not the precision (`float32_products`,
        or changed since the forward), ours compute it.
        """
        if _interpreted() or not weight.is_cuda:
            return False
        from fused_inr.kernels import tune

        if x.dtype == torch.float32 and precision != _pytorch_products():
            return False
        return tune.library(tune.arch(x.device), op, x.dtype, precision, *weight.shape[-2:])

    def linear_act(self, x, weight, bias, params, constants, map, precision, keep):
        from fused_inr.kernels import act_map, linear_act

        if keep != "derivatives" and self._by_library("forward", x, weight, precision):
            z = library_product(x, weight.mT, bias)
            if map.key == "identity" and not keep:
                return z.to(x.dtype), z.new_empty(0)
            (y,) = act_map.act_map([z], params, constants, map, 0, False)
            return y.to(x.dtype), z if keep else z.new_empty(0)
        return linear_act.linear_act(x, weight, bias, params, constants, map, precision, keep)

    def linear_act_backward(self, g, x, weight, bias, params, constants, z, map, precision, needs):
        from fused_inr.kernels import linear_act

        def product(op: str) -> bool:
            return self._by_library(op, x, weight, precision)

        if z is None and product("forward"):
            z = library_product(x, weight.mT, bias)
        return linear_act.linear_act_backward(
            g, x, weight, bias, params, constants, z, map, precision, needs, product("input_grad"),
            product("weight_grad"),
        )  # fmt: skip

    def act_map(self, inputs, params, constants, map, level, learnable):
        from fused_inr.kernels import act_map

        return act_map.act_map(inputs, params, constants, map, level, learnable)

    def moments(self, sigmas, params, start, samples, seed, map):
        from fused_inr.kernels import moments

        return moments.moments(sigmas, params, start, samples, seed, map)

    def serves_network(self, x, shapes, maps, precision, direction, learnable, skips, norms):
        if any(skips):
            return "backend 'triton' takes skip connections layer by layer"
        if any(norms):
            return "backend 'triton' takes LayerNorm layer by layer"
        if learnable[-1]:
            return "backend 'triton' takes learnable parameters of the last layer's activation layer by layer"
        from fused_inr.kernels import mlp

        arch = None
        if x.is_cuda:
            major, minor = torch.cuda.get_device_capability(x.device)
            arch = 10 * major + minor
        directions = {"inference": ("forward",), "forward": ("forward", "backward")}.get(direction, ("loss",))
        reasons = (mlp.serves(shapes, maps, x.dtype, precision, arch, direction=d) for d in directions)
        return next(filter(None, reasons), "")

    def mlp(self, x, weights, biases, params, constants, maps, skips, norms, precision, save):
        from fused_inr.kernels import mlp

        return mlp.mlp(x, weights, biases, params, constants, maps, precision, save)

    def mlp_backward(self, g, x, weights, biases, params, constants, maps, skips, norms, saved, precision, needs):
        from fused_inr.kernels import mlp

        return mlp.mlp_backward(g, x, weights, biases, params, constants, maps, saved, precision, needs[:4])

    def mlp_loss(
        self, x, target, row_weights, weights, biases, params, constants, maps, skips, norms, loss, loss_constants,
        scale, precision, needs,
    ):  # fmt: skip
        from fused_inr.kernels import mlp

        return mlp.mlp_loss(
            x, target, row_weights, weights, biases, params, constants, maps, loss, loss_constants, scale, precision,
            needs[:4],
        )  # fmt: skip


# -- cuda: C++ without Triton


class Cuda(_Native):
    """CUDA C++ (csrc/cuda): the map in one elementwise kernel per direction, around PyTorch's own matrix products."""

    name = "cuda"

    @staticmethod
    def _library():
        from .. import native_cuda

        return native_cuda

    @staticmethod
    def _operators():
        return torch.ops.fused_inr_cuda

    def serves(self, map, device, dtype):
        if device.type != "cuda":
            return f"the tensors are on {device}, this backend serves CUDA tensors"
        if dtype not in _FLOATS:
            return f"dtype {dtype} is not one of {_FLOATS}"
        usable, reason = self.available()
        if not usable:
            return reason
        index = torch.cuda.current_device() if device.index is None else device.index
        return self._operators().refusal(index) or ("" if map.generated else self._compile(map))


# -- the table, and the choice

TABLE: dict[str, Backend] = {b.name: b for b in (Triton(), Cuda(), Cpu(), Reference())}
_warned: set[str] = set()


class _Setting:
    """What blocks ask for, each for its own thread (or asyncio task), and the process where no block does.

    Dynamo traces no ContextVar and its guards see no thread: what is compiled goes by `compiled`, which is what the
    block that was entered last, in any thread, asks for.
    """

    def __init__(self, name: str):
        self._block: ContextVar[tuple[str | None] | None] = ContextVar(f"fused_inr.backends.{name}", default=None)
        self._process: str | None = None
        self._blocks: list[tuple[object, str | None]] = []  # that some thread is in, the last one last
        self._lock = threading.Lock()
        self.compiled: str | None = None

    def _tell_compiled(self) -> None:
        self.compiled = self._blocks[-1][1] if self._blocks else self._process

    def set(self, value: str | None) -> str | None:
        """The process's value from now on; returns the former one."""
        with self._lock:
            former, self._process = self._process, value
            self._tell_compiled()
        return former

    @contextmanager
    def block(self, value: str | None) -> Iterator[None]:
        entry = (object(), value)  # its own, though another thread may ask for the same
        token = self._block.set((value,))
        with self._lock:
            self._blocks.append(entry)
            self._tell_compiled()
        try:
            yield
        finally:
            with self._lock:
                self._blocks.remove(entry)
                self._tell_compiled()
            self._block.reset(token)

    def get(self) -> str | None:
        if torch.compiler.is_compiling():
            return self.compiled
        block = self._block.get()
        return self._process if block is None else block[0]


_backend = _Setting("use")
_products = _Setting("float32_products")
_recorded: ContextVar[list[Choice] | None] = ContextVar("fused_inr.backends.explain", default=None)


def _records() -> list[Choice] | None:
    """Where `explain` of this thread writes; None where nobody asks (and in compiled functions)."""
    return None if torch.compiler.is_compiling() else _recorded.get()


@dataclass(frozen=True)
class Choice:
    """What runs a call, why not the others, and the call in words."""

    call: str
    backend: str
    precision: str
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = "".join(f"\n    not {name}: {reason}" for name, reason in self.rejected)
        if not self.backend:
            return self.call
        return f"{self.call}: {self.backend} ({self.precision}){reasons}"


def implementation(name: str) -> Backend:
    return TABLE[name]


def available() -> dict[str, tuple[bool, str]]:
    """Backend -> (can run in this process, the reason when not)."""
    return {name: backend.available() for name, backend in TABLE.items()}


def check(name: object) -> str:
    if not isinstance(name, str) or name not in TABLE:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(map(repr, TABLE))}")
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block every operation of this thread (or asyncio task) runs on the named backend, or raises with the
    reason why it cannot.

    The choice is made when the forward runs, and its backward follows it, wherever it runs. Other threads are not
    concerned; a thread started within the block is outside it. A function under torch.compile cannot tell threads
    apart: it follows the block that was entered last in any of them.
    """
    with _backend.block(check(name)):
        yield


# -- float32 products on a GPU

#: What `float32_products` accepts besides None.
PRODUCTS = ("ieee", "tf32", "tf32x3", "bf16x3")


def _check_products(precision: object) -> str | None:
    if precision is not None and precision not in PRODUCTS:
        accepted = ", ".join(map(repr, PRODUCTS))
        raise ValueError(f"precision: {precision!r} is not one of {accepted}, or None (PyTorch's settings)")
    return precision


def set_float32_products(precision: str | None) -> str | None:
    """How float32 products on a GPU are computed from now on, in every thread; returns the former setting.

    Args:
        precision: one of the table, or None: as PyTorch's settings say (`torch.set_float32_matmul_precision`: "highest"
            is ieee, "high" and "medium" are tf32).

    | | a factor is | relative error of a product of two | tensor cores |
    | --- | --- | --- | --- |
    | "ieee" | float32 | 2^-24 | none |
    | "tf32" | 10 bits of it | 2^-9 | TF32, once |
    | "tf32x3" | the sum of two of TF32; the product of the smaller ones is dropped | 2^-19 | TF32, three times |
    | "bf16x3" | the sum of two of bfloat16; likewise | 2^-14 | bfloat16, three times |

    Sums are float32 in all of them. With "tf32" activations are computed by the hardware's approximations (2^-19 of the
    largest value), else to a few ulp.

    Backend `triton` obeys: layers, whole networks, losses and all their derivatives. A network whose kernels have no
    configuration for the precision runs layer by layer. Every other backend leaves products to PyTorch and its
    settings, and products on a CPU are float32; `explain` says so. The choice is made when a forward runs, and its
    derivatives follow it, wherever they run.

    Raises:
        ValueError: another precision.
    """
    return _products.set(_check_products(precision))


@contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """`set_float32_products` for what this thread (or asyncio task) runs within the block; blocks nest.

    A function under torch.compile cannot tell threads apart: it follows the block that was entered last in any of them.
    A forward that a backward runs again (`torch.utils.checkpoint` on a GPU) is in a thread of PyTorch's, outside the
    block: `set_float32_products` reaches it.

    Raises:
        ValueError: another precision.
    """
    with _products.block(_check_products(precision)):
        yield


def _pytorch_products() -> str:
    # 'highest', PyTorch's default, is 'ieee': no tensor cores
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# Dynamo cannot trace the getter; it guards PyTorch's setting by itself
_pytorch_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def precision_of(device: torch.device, dtype: torch.dtype, backend: str = "triton") -> str:
    """The precision of a backend's products: 'bf16' or 'fp16' for half types, with float32 accumulation; for float32 on
    a CUDA device what was asked for (`float32_products`), where the backend obeys that, or else PyTorch's
    `torch.backends.cuda.matmul.fp32_precision`; 'ieee' for everything else.
    """
    if dtype != torch.float32:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "ieee")
    if device.type != "cuda":
        return "ieee"
    asked = _products.get() if TABLE[backend].chooses_products else None
    return _pytorch_products() if asked is None else asked


def products_of(precision: str, dtype: torch.dtype) -> str:
    """The precision of products of `dtype` in a derivative of an operation that ran in `precision`.

    Derivatives of higher order of half types multiply float32 numbers (gradients of pre-activations): in TF32, whose 10
    bits are as many as float16 and more than bfloat16 has.
    """
    return "tf32" if dtype == torch.float32 and precision in ("bf16", "fp16") else precision


def _not_obeyed(backend: str, precision: str, x: Tensor) -> tuple[tuple[str, str], ...]:
    """For `explain`: why products are not what was asked for."""
    asked = _products.get()
    if asked in (None, precision) or x.dtype != torch.float32:
        return ()
    reason = f"float32 products on {x.device} are float32"
    if x.device.type == "cuda":
        reason = f"backend {backend!r} leaves float32 products to PyTorch's settings"
    return ((f"{asked} products", reason),)


# -- who runs a call


def state(device: torch.device) -> tuple:
    """Everything about this process that a choice of backend and precision for a device depends on; first what `use`
    asks for."""
    own = torch.backends.cuda.matmul.fp32_precision if device.type == "cuda" else None
    return (_backend.get(), _products.get(), own, *TABLE.values())


def choose(activation: Activation, x: Tensor, weight: Tensor, *, record: bool = True) -> tuple[str, str]:
    """Backend and precision for `linear_act(x, weight, ...)`.

    Raises:
        RuntimeError: the backend that `use` asked for cannot serve.
    """
    device, dtype = x.device, x.dtype
    forced = _backend.get()
    name, rejected = _serving(forced, activation.map.key, device, dtype)
    if not name:
        raise RuntimeError(f"backend {forced!r} cannot run {activation!r} on {device} in {dtype}: {rejected[0][1]}")
    precision = precision_of(device, dtype, name)
    if record and (records := _records()) is not None:
        rejected += _not_obeyed(name, precision, x)
        records.append(Choice(_call(activation, x, weight), name, precision, rejected))
    return name, precision


def _call(activation: Activation, x: Tensor, weight: Tensor) -> str:
    shape = f"[{', '.join(map(str, x.shape))}] x [{', '.join(map(str, weight.shape))}]"
    return f"linear_act {shape} {x.dtype} {activation!r}"


def record_plain(activation: Activation, x: Tensor, weight: Tensor, reason: str) -> None:
    """For `explain`: a layer that plain PyTorch's functions compute, and why."""
    if (records := _records()) is not None:
        rejected = (("fused", reason),)
        records.append(Choice(_call(activation, x, weight), "plain PyTorch", _pytorch_products(), rejected))


def record_plain_network(x: Tensor, layers, normed: bool, reason: str) -> None:
    """For `explain`: a network that plain PyTorch's functions compute, and why."""
    if (records := _records()) is not None:
        rejected = (("fused", reason), *_not_obeyed("PyTorch", _pytorch_products(), x))
        records.append(Choice(_network_call(x, layers, normed), "plain PyTorch", _pytorch_products(), rejected))


def plain_layer(device: torch.device, dtype: torch.dtype) -> str:
    """Why plain PyTorch computes a layer of this type here; empty where a backend does (or is demanded)."""
    return TABLE["cpu"].prefers_plain(dtype) if device.type == "cpu" and _backend.get() is None else ""


def demanded() -> str | None:
    """The backend that `use` asks for."""
    return _backend.get()


def choose_moments(map: ActivationMap, device: torch.device) -> str:
    """The backend for `moments` on this device; raises RuntimeError as `choose` does."""
    forced = _backend.get()
    name, rejected = _serving(forced, map.key, device, torch.float32)
    if not name:
        raise RuntimeError(f"backend {forced!r} cannot serve moments of {map.name!r}: {rejected[0][1]}")
    return name


def record_network(x: Tensor, layers, normed: bool, backend: str, precision: str, loss: str = "") -> None:
    """For `explain`: a whole network that runs as one operation, `normed`: with LayerNorm between the layers."""
    if (records := _records()) is not None:
        call = _network_call(x, layers, normed)
        _, rejected = _serving(_backend.get(), layers[0][2].map.key, x.device, x.dtype)
        rejected += _not_obeyed(backend, precision, x)
        records.append(Choice(f"{call}{' with ' + loss if loss else ''}", backend, precision, rejected))


def _network_call(x: Tensor, layers, normed: bool) -> str:
    widths = " -> ".join(str(weight.shape[0] // activation.branches) for weight, _, activation in layers)
    names = ", ".join(dict.fromkeys(activation.name for _, _, activation in layers))
    names += ", LayerNorm" if normed else ""
    return f"whole network [{', '.join(map(str, x.shape))}] -> {widths} {x.dtype} ({names})"


def record_layers(reason: str) -> None:
    """For `explain`: why a network runs layer by layer."""
    if (records := _records()) is not None:
        records.append(Choice(f"layer by layer: {reason}", "", "", ()))


# -- memory of the native engine


def empty_cache() -> int:
    """Give the memory that the `cpu` backend keeps for its next results back to the system; returns its bytes.

    Large results (4 MiB and more) come from blocks that earlier ones gave back: mapping and faulting them in anew would
    cost more than the arithmetic. 0 where the native engine is not loaded.
    """
    return _engine().empty_cache() if TABLE["cpu"].available()[0] else 0


def set_cache_limit(size: int) -> int:
    """How many bytes of unused blocks the `cpu` backend may keep (an eighth of the machine's memory); the former limit.

    Raises:
        ValueError: a negative size.
        RuntimeError: no native engine.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"size: expected a number of bytes, 0 or more, got {size!r}")
    usable, reason = TABLE["cpu"].available()
    if not usable:
        raise RuntimeError(f"backend 'cpu': {reason}")
    return _engine().set_cache_limit(size)


def _engine():
    return torch.ops.fused_inr_native


# -- the automatic choice

_Serving = tuple[str, tuple[tuple[str, str], ...]]  # a backend ("": none), and why not the others
_serving_cache: dict[tuple, _Serving] = {}


def _serving(forced: str | None, key: str, device: torch.device, dtype: torch.dtype) -> _Serving:
    question = (forced, key, device, dtype)
    found = _serving_cache.get(question)
    if found is None:
        map = lookup(key)
        if forced is not None:
            reason = TABLE[forced].serves(map, device, dtype)
            return ("", ((forced, reason),)) if reason else (forced, ())  # a demand is asked anew each time
        found = _serving_cache[question] = _automatic(map, device, dtype)
    return found


def refusal(name: str, key: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot serve a map; empty when it can."""
    return TABLE[name].serves(lookup(key), device, dtype)


# what serves is a constant to Dynamo, which need not trace the search for it (a lock, a build)
_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _automatic(map: ActivationMap, device: torch.device, dtype: torch.dtype) -> _Serving:
    rejected = []
    for name, backend in TABLE.items():
        # the interpreter is for tests: it serves when asked by name
        interpreter = name == "triton" and device.type == "cpu"
        reason = "serves CPU tensors only when asked by name" if interpreter else backend.serves(map, device, dtype)
        if not reason:
            break
        rejected.append((name, reason))
    meant = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}.get(device.type)
    if name == "reference" and meant and dtype in _FLOATS:
        _say_once("; ".join(f"backend {m!r} cannot serve: {reason}" for m, reason in rejected if m in meant))
    return name, tuple(rejected)


def _say_once(reasons: str) -> None:
    if reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(
            f"fused_inr runs on the PyTorch reference, which is slower: {reasons}",
            RuntimeWarning,
            stacklevel=2,
        )


def explain(function: Callable, *args, **kwargs) -> str:
    """Runs `function(*args)` (a module, say) without gradients and tells, a line a call, what ran it and why.

    Raises:
        ValueError: no fused operation ran.
    """
    records: list[Choice] = []
    token = _recorded.set(records)
    try:
        with torch.no_grad():
            function(*args, **kwargs)
    finally:
        _recorded.reset(token)
    lines = [str(choice) for choice in records]
    if not lines:
        raise ValueError(
            "explain: no fused_inr operation ran in this call; pass a module (and its input) that uses one"
        )
    return "\n".join(lines)
