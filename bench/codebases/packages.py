"""Networks of packages from the registry, imported when they are made."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator

import torch

from ._registry import grid, laplacian, register, squares

#: what deepxde imports beside its networks, and its networks do without
_UNUSED = ("sklearn", "sklearn.preprocessing", "skopt", "skopt.sampler", "skopt.space")


def _anything(attribute: str) -> type:
    if attribute.startswith("__"):  # what tools ask of every module, such as __file__
        raise AttributeError(attribute)
    return type(attribute, (), {})


@contextlib.contextmanager
def _standing_in(*names: str) -> Iterator[None]:
    """Empty modules for what is not installed, until the package is imported."""
    made = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__getattr__ = _anything  # type: ignore[method-assign]
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
        torch.set_default_device(None if device.type == "cpu" else device)
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


@register(
    source="the package msa-inr",
    traps="frequencies and their inverses from logspace at each call, of x.size(1): to 1e5, so that rounding counts",
    inputs=grid(2),
    loss=squares,
    rows=16384,
    order=1,
    fused=2,
    requires="msa-inr",
)
def package_msa_inr(width):
    return importlib.import_module("msa_inr").MSANet(2, width or 256, 2, 3)


def _pinnrl(kind: str, width: int, **options) -> torch.nn.Module:
    config = {"input_dim": 2, "output_dim": 1, "hidden_dims": [width] * 3, "device": torch.device("cpu"), **options}
    return getattr(importlib.import_module("pinnrl.neural_networks"), kind)(config)


@register(
    source="the package pinnrl, SIREN",
    traps="the package's own code: inputs may be arrays",
    inputs=grid(2),
    loss=laplacian,
    rows=4096,
    order=3,
    fused=3,
    requires="pinnrl",
)
def package_pinnrl(width):
    return _pinnrl("SIREN", width or 128)


@register(
    source="the package pinnrl, FourierNetwork",
    traps="a product with a buffer that has two consumers, a sine and a cosine; ONE activation module",
    inputs=grid(2),
    loss=laplacian,
    rows=4096,
    order=3,
    fused=3,
    requires="pinnrl",
)
def package_pinnrl_fourier(width):
    return _pinnrl("FourierNetwork", width or 128, activation="tanh", scale=1.0)


def _file_of(distribution: str, path: str) -> types.ModuleType:
    """A module by itself, without the package around it and what that imports."""
    file = str(importlib.metadata.distribution(distribution).locate_file(path))
    spec = importlib.util.spec_from_file_location(path.rpartition("/")[2].removesuffix(".py"), file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@register(
    source="the package neuraloperator, ChannelMLP",
    traps="the package's own code: Conv1d of width 1 behind a reshape",
    inputs=lambda rows: (torch.randn(2, 16, max(1, rows // 8), 4, generator=torch.Generator().manual_seed(0)),),
    loss=squares,
    rows=8192,
    order=1,
    fused=2,
    requires="neuraloperator",
)
def package_neuraloperator(width):
    return _file_of("neuraloperator", "neuralop/layers/channel_mlp.py").ChannelMLP(16, 4, width or 128, n_layers=3)
