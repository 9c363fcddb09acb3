"""Networks of packages from the registry, imported when they are made."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
import warnings
from collections.abc import Iterator

import torch

from ._registry import grid, laplacian, register, squares

#: what deepxde imports beside its networks, and its networks do without
_UNUSED = ("sklearn", "sklearn.preprocessing", "skopt", "skopt.sampler", "skopt.space")


@contextlib.contextmanager
def _standing_in(*names: str) -> Iterator[None]:
    """Empty modules for what is not installed, until the package is imported."""
    made = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__getattr__ = lambda attribute: type(attribute, (), {})  # type: ignore[method-assign]
            module.__path__ = []
            sys.modules[name] = module
            made.append(name)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)


def deepxde() -> types.ModuleType:
    """deepxde with PyTorch; on a machine with a GPU its import makes CUDA PyTorch's default device, which is undone."""
    os.environ["DDE_BACKEND"] = "pytorch"
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    with warnings.catch_warnings(), _standing_in(*_UNUSED):
        warnings.simplefilter("ignore")
        package = importlib.import_module("deepxde")
    if torch.get_default_device() != device:
        torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    return package


@register(
    source="the package siren-pytorch",
    traps="the package's own code",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=5,
    requires="siren-pytorch",
)
def package_siren_pytorch(width):
    return importlib.import_module("siren_pytorch").SirenNet(2, width or 256, 3, 5, w0_initial=30.0)


@register(
    source="the package deepxde, FNN",
    traps="the package's own code; DDE_BACKEND is read at import",
    inputs=grid(2),
    loss=laplacian,
    rows=4096,
    order=3,
    fused=3,
    requires="deepxde",
)
def package_deepxde(width):
    return deepxde().nn.pytorch.FNN([2, *[width or 32] * 3, 1], "tanh", "Glorot normal")


@register(
    source="the package deepxde, PFNN",
    traps="the package's own code: lists of sub-networks",
    inputs=grid(2),
    loss=laplacian,
    rows=4096,
    order=3,
    fused=4,
    requires="deepxde",
)
def package_deepxde_parallel(width):
    n = width or 32
    return deepxde().nn.pytorch.PFNN([2, [n, n], [n, n], 2], "silu", "Glorot normal")


@register(
    source="the package INR-collection, SIREN",
    traps="the package's own code",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=3,
    requires="INR-collection",
)
def package_inr_collection(width):
    return importlib.import_module("INR_collection.modules").SIREN(2, 3, num_layers=3, num_hidden=width or 256)
