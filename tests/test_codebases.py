"""`fuse` on networks as public codebases write them: values, gradients, second derivatives, steps of training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fused_inr.bench.codebases import codebases

import fused_inr as fi

CODEBASES = codebases()
#: The width of tests: several of everything, and no multiple of a vector.
WIDTH, ROWS = 20, 256


def made(name):
    if not CODEBASES[name].available:
        pytest.skip(f"{CODEBASES[name].requires} is not installed")
    torch.manual_seed(0)
    return CODEBASES[name].make(WIDTH)


class Derivative(torch.autograd.Function):
    """x, that notes how many times it has been differentiated."""

    @staticmethod
    def forward(ctx, x, order, seen):
        ctx.order, ctx.seen = order, seen
        return x.clone()  # what follows may change it in place

    @staticmethod
    def backward(ctx, g):
        ctx.seen.add(ctx.order + 1)
        return Derivative.apply(g, ctx.order + 1, ctx.seen), None, None


def noting(seen):
    """A mode in which what comes out of products notes the order of its derivatives."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if getattr(function, "__name__", "") in ("linear", "matmul", "__matmul__", "bmm", "addmm", "conv1d"):
                return Derivative.apply(result, 0, seen) if result.requires_grad else result
            return result

    return Mode()


@pytest.mark.parametrize("name", CODEBASES)
def test_original(name):
    """As published and small: a finite loss, derivatives of the order that is said, the same five steps twice."""
    codebase = CODEBASES[name]
    runs = []
    for noted in (True, False, False):
        model, inputs = made(name), codebase.inputs(64)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if noted:
            seen = set()
            with noting(seen):
                loss = codebase.loss(model, inputs)
            loss.backward()
            assert max(seen) == codebase.order, seen
            continue
        losses = []
        for _ in range(5):
            model.zero_grad()
            loss = codebase.loss(model, inputs)
            loss.backward()
            losses.append(float(loss.detach()))
            with torch.no_grad():  # plain descent, of steps as long as each parameter's gradient allows
                for p in parameters:
                    if p.grad is not None:
                        p.sub_(1e-4 * p.grad / (1e-6 + torch.linalg.vector_norm(p.grad)))
        assert all(map(math.isfinite, losses)) and losses[0] != losses[-1], losses
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
        runs.append((losses, [p.detach() for p in parameters]))
    (a, pa), (b, pb) = runs
    assert a == b and all(torch.equal(x, y) for x, y in zip(pa, pb))


@pytest.mark.parametrize("name", CODEBASES)
def test_fused(name):
    """All its layers with pointwise functions are fused, and nothing differs."""
    codebase = CODEBASES[name]
    model, inputs = made(name), codebase.inputs(ROWS)
    report = fi.fuse(model, inputs, codebase.methods, prefer="always")
    assert not [left for left in report.left if "differ" in left.reason or "compiled" in left.reason], report
    assert all(report.errors[kind] <= max(report.bounds[kind], 1e-5) for kind in report.errors)
    layers = sum(2 if "z2" in e.formula and codebase.name == "wire-real" else 1 for e in report.fused)
    assert layers >= codebase.fused, report


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
        given = {
            "color": lambda: (inputs[1], torch.randn(ROWS, 15, generator=torch.Generator().manual_seed(1))),
            "inference": lambda: (torch.randn(ROWS, 67, generator=torch.Generator().manual_seed(1)),),
        }
        if method == "modulated_forward":
            arguments = inputs if len(inputs) > 1 else (*inputs, torch.zeros(len(inputs[0]), plain.latent_dim))
        else:
            arguments = given.get(method, lambda: inputs[:1])()
        outputs = []
        for m in (plain, model):
            torch.manual_seed(2)  # of dropout
            outputs.append(getattr(m, method)(*copy.deepcopy(arguments)))
        a, b = outputs
        for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def test_there_are_as_many_as_are_known():
    assert len(CODEBASES) >= 70
    assert all(c.source and c.traps and 1 <= c.order <= 3 for c in CODEBASES.values())
