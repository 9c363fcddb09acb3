"""`fuse` on models of packages from the registry: values, gradients, second derivatives, five steps of training.

The packages are installed without their heavy needs (`make test` does); what of those a package imports on its way to a
network is stood in for by an empty module.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import fused_inr as fi


@pytest.fixture
def stand_ins(monkeypatch):
    """Empty modules for what is not installed, gone after the test."""

    def stand_in(*names):
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError:
                module = types.ModuleType(name)
                module.__getattr__ = lambda attribute: type(attribute, (), {})  # type: ignore[method-assign]
                module.__path__ = []  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, name, module)

    return stand_in


def points(rows, columns, groups=()):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*groups, rows, columns, generator=generator) * 2 - 1


class ByKeyword(nn.Module):
    """A wrapper whose forward takes keywords only."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, latent):
        return self.net(latent=latent)


def siren_pytorch(stand_ins):
    package = pytest.importorskip("siren_pytorch")
    return package.SirenNet(2, 24, 3, 3, w0_initial=30.0), (points(150, 2),), 3


def siren_pytorch_wrapped(stand_ins):
    """The modulated wrapper, whose output goes through einops."""
    pytest.importorskip("einops")
    package = pytest.importorskip("siren_pytorch")
    net = package.SirenNet(2, 24, 3, 3, w0_initial=30.0)
    latent = torch.randn(12, generator=torch.Generator().manual_seed(1))
    return ByKeyword(package.SirenWrapper(net, image_width=12, image_height=10, latent_dim=12)), (latent,), 3


def deepxde(stand_ins, kind="FNN"):
    os.environ["DDE_BACKEND"] = "pytorch"
    pytest.importorskip("scipy")
    stand_ins("sklearn", "sklearn.preprocessing", "skopt", "skopt.sampler", "skopt.space")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dde = pytest.importorskip("deepxde")
    if kind == "FNN":
        return dde.nn.pytorch.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal"), (points(150, 2),), 3
    return dde.nn.pytorch.PFNN([2, [12, 12], [12, 12], 2], "silu", "Glorot normal"), (points(150, 2),), 4


def deepxde_parallel(stand_ins):
    return deepxde(stand_ins, "PFNN")


def inr_collection(stand_ins, kind="SIREN"):
    package = pytest.importorskip("INR_collection.modules")
    if kind == "SIREN":
        return package.SIREN(2, 3, num_layers=3, num_hidden=20), (points(150, 2),), 3
    latent = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))
    if kind == "piGAN":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older weight_norm
            net = package.piGAN(3, 4, num_INR_layers=3, num_hidden_mapping=20, num_hidden_INR=20, z_size=16)
        return net, (points(150, 3, (2,)), latent), 6
    net = package.IMNET(2, 1, num_layers=3, initial_hidden=32, z_size=16, coord_multi=1, siren_first=True)
    net.net[0] = package.ImplicitMLPLayer(
        2, 32, activation="sine", omega_0=3, concat_conditioning=16,
        init_method={"weights": "siren_first", "bias": "polar"},
    )  # fmt: skip
    for i, layer in enumerate(net.net[1:-1]):
        columns = 32 // 2**i
        layer.linear = nn.Linear(columns + 18, columns // 2)
        layer.concat_conditioning = 18
    return net, (points(150, 2, (1,)), latent[:1]), 3


def inr_collection_film(stand_ins):
    return inr_collection(stand_ins, "piGAN")


def inr_collection_imnet(stand_ins):
    return inr_collection(stand_ins, "IMNET")


MODELS = [
    siren_pytorch, siren_pytorch_wrapped, deepxde, deepxde_parallel, inr_collection, inr_collection_film,
    inr_collection_imnet,
]  # fmt: skip


def _made(make, stand_ins):
    torch.manual_seed(0)
    return make(stand_ins)


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_fused(make, stand_ins):
    model, inputs, fused = _made(make, stand_ins)
    report = fi.fuse(model, inputs, prefer="always")
    assert len(report.fused) >= fused, report
    assert not [left for left in report.left if "differ" in left.reason or "compiled" in left.reason], report
    assert {"values", "gradients"} <= set(report.errors)


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_training(make, stand_ins):
    results = []
    for fuse in (False, True):
        model, inputs, _ = _made(make, stand_ins)
        if fuse:
            fi.fuse(model, prefer="always")
        found = []
        for _ in range(5):
            y = model(*inputs)
            loss = (y - torch.cos(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape)).square().mean()
            model.zero_grad()
            loss.backward()
            found.append(float(loss))
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(1e-4 * p.grad / (1e-6 + p.grad.norm()))
        results.append((found, [p.detach().clone() for p in model.parameters()]))
    (a, pa), (b, pb) = results
    assert a[0] != a[-1]
    torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-3, atol=1e-6)
    for x, y in zip(pa, pb):
        torch.testing.assert_close(y, x, rtol=1e-3, atol=2e-5)
