"""Who runs a call: the table of backends and the choice among them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..activations import Activation, ActivationMap, lookup
from ..network import Layer
from ..pytorch import constant_to_dynamo
from .base import FLOATS, Backend
from .cuda import Cuda
from .explanation import Choice, call_of_layer, call_of_network, records
from .native import CPU
from .precision import PRODUCTS_SETTING, not_obeyed, precision_for, pytorch_products
from .reference import Reference
from .settings import Setting
from .triton import Triton

#: All backends by name, in the order in which they are tried.
TABLE: dict[str, Backend] = {b.name: b for b in (Triton(), Cuda(), CPU, Reference())}
#: What `use` asks for.
BACKEND_SETTING = Setting("use")
_warned: set[str] = set()


def implementation(name: str) -> Backend:
    """The backend of this name."""
    return TABLE[name]


def available() -> dict[str, tuple[bool, str]]:
    """Backend -> (can run in this process, the reason when not)."""
    return {name: backend.available() for name, backend in TABLE.items()}


def check(name: object) -> str:
    """The name of a backend, as it is.

    Raises:
        ValueError: any other object.
    """
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
    with BACKEND_SETTING.block(check(name)):
        yield


def precision_of(device: torch.device, dtype: torch.dtype, backend: str = "triton") -> str:
    """The precision of a backend's products: 'bf16' or 'fp16' for half types, with float32 accumulation; for float32 on
    a CUDA device what was asked for (`float32_products`), where the backend obeys that, or else PyTorch's
    `torch.backends.cuda.matmul.fp32_precision`; 'ieee' for everything else.
    """
    return precision_for(device, dtype, TABLE[backend].chooses_products)


def state(device: torch.device) -> tuple:
    """Everything about this process that a choice of backend and precision for a device depends on; first what `use`
    asks for."""
    own = torch.backends.cuda.matmul.fp32_precision if device.type == "cuda" else None
    return (BACKEND_SETTING.get(), PRODUCTS_SETTING.get(), own, *TABLE.values())


def choose(activation: Activation, x: Tensor, weight: Tensor, *, record: bool = True) -> tuple[str, str]:
    """Backend and precision for `linear_act(x, weight, ...)`.

    Raises:
        RuntimeError: the backend that `use` asked for cannot serve.
    """
    device, dtype = x.device, x.dtype
    forced = BACKEND_SETTING.get()
    name, rejected = serving(forced, activation.map.key, device, dtype)
    if not name:
        raise RuntimeError(f"backend {forced!r} cannot run {activation!r} on {device} in {dtype}: {rejected[0][1]}")
    precision = precision_of(device, dtype, name)
    if record and (found := records()) is not None:
        rejected += not_obeyed(name, precision, x)
        found.append(Choice(call_of_layer(activation, x, weight), name, precision, rejected))
    return name, precision


def record_plain(activation: Activation, x: Tensor, weight: Tensor, reason: str) -> None:
    """Tells `explain` of a layer that plain PyTorch's functions compute, and why."""
    if (found := records()) is not None:
        rejected = (("fused", reason),)
        found.append(Choice(call_of_layer(activation, x, weight), "plain PyTorch", pytorch_products(), rejected))


def record_plain_network(x: Tensor, layers: Sequence[Layer], reason: str) -> None:
    """Tells `explain` of a network that plain PyTorch's functions compute, and why."""
    if (found := records()) is not None:
        rejected = (("fused", reason), *not_obeyed("PyTorch", pytorch_products(), x))
        found.append(Choice(call_of_network(x, layers), "plain PyTorch", pytorch_products(), rejected))


def record_network(x: Tensor, layers: Sequence[Layer], backend: str, precision: str, loss: str = "") -> None:
    """Tells `explain` of a whole network that runs as one operation, with a loss perhaps."""
    if (found := records()) is not None:
        call = call_of_network(x, layers)
        _, rejected = serving(BACKEND_SETTING.get(), layers[0].activation.map.key, x.device, x.dtype)
        rejected += not_obeyed(backend, precision, x)
        found.append(Choice(f"{call}{' with ' + loss if loss else ''}", backend, precision, rejected))


def why_plain(device: torch.device, dtype: torch.dtype) -> str:
    """Why plain PyTorch computes a layer of this type here; empty where a backend does (or is demanded)."""
    return TABLE["cpu"].prefers_plain(dtype) if device.type == "cpu" and BACKEND_SETTING.get() is None else ""


def demanded() -> str | None:
    """The backend that `use` asks for."""
    return BACKEND_SETTING.get()


def choose_moments(map: ActivationMap, device: torch.device) -> str:
    """The backend for `moments` on this device; raises RuntimeError as `choose` does."""
    forced = BACKEND_SETTING.get()
    name, rejected = serving(forced, map.key, device, torch.float32)
    if not name:
        raise RuntimeError(f"backend {forced!r} cannot serve moments of {map.name!r}: {rejected[0][1]}")
    return name


# -- the automatic choice

_Serving = tuple[str, tuple[tuple[str, str], ...]]  # a backend ("": none), and why not the others
_serving_cache: dict[tuple, _Serving] = {}


@constant_to_dynamo  # which need not trace the search (a lock, a build)
def serving(forced: str | None, key: str, device: torch.device, dtype: torch.dtype) -> _Serving:
    """The backend that serves a map on a device ("": none), and why not those before it; remembered."""
    question = (forced, key, device, dtype)
    found = _serving_cache.get(question)
    if found is None:
        map = lookup(key)
        if forced is not None:
            reason = TABLE[forced].serves(map, device, dtype)
            return ("", ((forced, reason),)) if reason else (forced, ())  # a demand is asked anew each time
        found = _serving_cache[question] = _automatic(map, device, dtype)
    return found


@constant_to_dynamo
def refusal(name: str, key: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot serve a map; empty when it can."""
    return TABLE[name].serves(lookup(key), device, dtype)


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
    if name == "reference" and meant and dtype in FLOATS:
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
