"""`fuse` on networks as public codebases write them: values, gradients, second derivatives, steps of training."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_inr.bench.codebases import codebases

import fused_inr as fi

CODEBASES = codebases()
#: The width of tests: several of everything, and no multiple of a vector.
WIDTH, ROWS = 20, 256


def made(name):
    torch.manual_seed(0)
    return CODEBASES[name].make(WIDTH)


@pytest.mark.parametrize("name", CODEBASES)
def test_fused(name):
    """All its layers with pointwise functions are fused, and nothing differs."""
    codebase = CODEBASES[name]
    model, inputs = made(name), codebase.inputs(ROWS)
    report = fi.fuse(model, inputs, codebase.methods, prefer="always")
    assert not [left for left in report.left if "differ" in left.reason or "compiled" in left.reason], report
    layers = sum(2 if "z2" in e.formula and codebase.name == "wire-real" else 1 for e in report.fused)
    assert layers >= codebase.fused, report
    assert all(report.errors[kind] <= max(report.bounds[kind], 1e-5) for kind in report.errors)


@pytest.mark.parametrize("name", CODEBASES)
def test_training(name):
    """Five steps on its own loss arrive where the original's do, and the derivatives of the loss are the original's."""
    codebase = CODEBASES[name]
    # made twice: the old weight_norm cannot be copied
    plain, model, inputs = made(name), made(name), codebase.inputs(ROWS)
    fi.fuse(model, None, codebase.methods, prefer="always")
    double = _double(made(name))
    losses = []
    for m in (plain, model):
        given = inputs
        parameters = [p for p in m.parameters() if p.requires_grad]
        steps = [torch.zeros_like(p) for p in parameters]
        found = []
        for _ in range(5):
            loss = codebase.loss(m, given)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            found.append((float(loss), [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters)]))
            with torch.no_grad():
                for p, s, g in zip(parameters, steps, found[-1][1]):
                    s.mul_(0.9).add_(g)
                    p.sub_(1e-4 * s / (1e-6 + torch.linalg.vector_norm(s)))
        losses.append(found)
    exact = _reference(codebase, double, inputs)
    for (a, ga), (b, gb) in zip(*losses):
        assert abs(a - b) <= 1e-3 * abs(a) + 1e-6, (a, b)
        size = max(float(g.abs().max()) for g in ga)
        for x, y in zip(ga, gb):
            torch.testing.assert_close(y, x, rtol=2e-2, atol=2e-3 * size)
    if exact is not None:
        (_, ga), (_, gb) = losses[0][0], losses[1][0]
        errors = [max(float((g - e).abs().max()) for g, e in zip(gs, exact)) for gs in (ga, gb)]
        size = max(float(e.abs().max()) for e in exact)
        assert errors[1] <= 4 * errors[0] + 1e-5 * size, errors


def _double(model):
    return model if any(p.is_complex() for p in model.parameters()) else model.double()


def _reference(codebase, double, inputs):
    """Gradients in float64, None where the network cannot be of that type."""
    if any(p.is_complex() for p in double.parameters()):
        return None
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.double(), inputs)
    parameters = [p for p in double.parameters() if p.requires_grad]
    if codebase.name == "nerp":  # its matrix is no buffer, and stays float32
        double.B = double.B.double()
    grads = torch.autograd.grad(codebase.loss(double, inputs), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.float() for g, p in zip(grads, parameters)]


@pytest.mark.parametrize("name", [n for n, c in CODEBASES.items() if len(c.methods) > 1])
def test_methods(name):
    """The other methods give what they gave."""
    codebase = CODEBASES[name]
    plain, model = made(name), made(name)
    fi.fuse(model, None, codebase.methods, prefer="always")
    inputs = codebase.inputs(ROWS)
    for method in codebase.methods[1:]:
        given = {"color": lambda: (inputs[1], torch.randn(ROWS, 15, generator=torch.Generator().manual_seed(1)))}
        arguments = given.get(method, lambda m=method: inputs if m == "modulated_forward" else inputs[:1])()
        a, b = (getattr(m, method)(*copy.deepcopy(arguments)) for m in (plain, model))
        for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def test_there_are_as_many_as_are_known():
    assert len(CODEBASES) >= 32
    assert all(c.source and c.traps and 1 <= c.order <= 3 for c in CODEBASES.values())
