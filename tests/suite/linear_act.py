"""linear_act: its derivatives against finite differences, its values against float64, its promises to autograd."""

import itertools
import math

import pytest
import torch
from linear_act_oracle import (
    DETACHED,
    NAMES,
    Problem,
    compiler,
    eager,
    expected,
    problem,
    pytest_generate_tests,  # noqa: F401
    unavailable,
    using,
)
from tolerances import UNIT, tolerance, worst
from torch.autograd import gradcheck, gradgradcheck

import fused_inr as fi
from fused_inr import backends
from fused_inr.functional import linear_act

SMOOTH = [n for n in NAMES if n not in DETACHED]
MASKS = [m for m in itertools.product((True, False), repeat=3) if any(m)]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded gradient"]
CHECK = {
    "atol": tolerance("gradcheck atol"),
    "rtol": tolerance("gradcheck rtol"),
    "nondet_tol": tolerance("nondeterminism"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_native_engine_runs_wherever_there_is_a_compiler():
    if compiler() is None:
        pytest.skip("no C++ compiler on PATH")
    assert unavailable("cpu") == ""


# -- derivatives against finite differences


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in memory of another shape."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided" or (layout == "transposed" and t.dim() == 1):
        padded = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)
        padded[..., 1::2] = t
        return padded[..., 1::2]
    return t.clone()


def call(p: Problem, layout: str):
    """The function under test, and its leaves in the layout."""
    leaves = [laid_out(t, layout).requires_grad_(t.requires_grad) for t in p.tensors]

    def f(x, weight, bias=None):
        y = linear_act(x, weight, bias, p.activation)
        # both sums hand a gradient of stride 0 to the backward, along rows and along columns
        return (y.sum(-2), y.sum(-1)) if layout == "expanded gradient" else y

    return f, leaves


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives(name, layout, exact_backend):
    with using(exact_backend):
        for mask in MASKS:
            f, leaves = call(problem(name, away_from_kinks=True).requires_grad(mask), layout)
            assert gradcheck(f, leaves, **CHECK), mask
            assert gradgradcheck(f, leaves, gen_non_contig_grad_outputs=layout == "strided", **CHECK), mask


@pytest.mark.parametrize("name", SMOOTH)
def test_without_bias(name, exact_backend):
    with using(exact_backend):
        for mask in ((True, True, True), (True, False, True), (False, True, True)):
            f, leaves = call(problem(name, bias=False, away_from_kinks=True).requires_grad(mask), "contiguous")
            assert gradcheck(f, leaves, **CHECK)
            assert gradgradcheck(f, leaves, **CHECK)


@pytest.mark.parametrize("name", SMOOTH)
def test_batched_gradients_and_forward_mode(name, exact_backend):
    with using(exact_backend):
        f, leaves = call(problem(name, away_from_kinks=True).requires_grad(), "contiguous")
        assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True, **CHECK)
        assert gradgradcheck(f, leaves, check_fwd_over_rev=True, **CHECK)


@pytest.mark.parametrize("name", SMOOTH)
def test_third_derivatives(name, exact_backend):
    with using(exact_backend):
        p = problem(name, 2, 2, 1, away_from_kinks=True).requires_grad()

        def slope(*leaves):
            y = linear_act(*leaves, p.activation)
            return torch.autograd.grad((y.sin() + y * y).sum(), leaves, create_graph=True)

        assert gradgradcheck(slope, p.tensors, **CHECK)


@pytest.mark.parametrize("per_feature", [False, True], ids=["scalar", "per feature"])
@pytest.mark.parametrize("name", [n for n in SMOOTH if fi.activations.get(n).param_names])
def test_learnable_parameters(name, per_feature, exact_backend):
    with using(exact_backend):
        p = problem(name, 3, 2, 2, away_from_kinks=True)
        params = {
            k: torch.tensor([v, 1.1 * v + 0.01] if per_feature else v, dtype=torch.float64, requires_grad=True)
            for k, v in p.activation.params.items()
        }

        def f(x, weight, bias, *values):
            return linear_act(x, weight, bias, p.activation.with_params(**dict(zip(params, values, strict=True))))

        for mask in ((True, True, True), (False, False, False)):
            p.requires_grad(mask)
            assert gradcheck(f, (*p.tensors, *params.values()), check_forward_ad=True, **CHECK)
            assert gradgradcheck(f, (*p.tensors, *params.values()), **CHECK)
        # some parameters learn, the others are numbers
        first = next(iter(params))
        p.requires_grad((True, False, True))
        some = lambda x, b, v: linear_act(x, p.weight, b, p.activation.with_params(**{first: v}))  # noqa: E731
        assert gradgradcheck(some, (p.x, p.bias, params[first]), **CHECK)


@pytest.mark.parametrize("name", ["sine", "gaussian", "split", "incode", "complex_gabor"])
def test_third_derivatives_with_learnable_parameters(name, exact_backend):
    with using(exact_backend):
        p = problem(name, 2, 1, 1).requires_grad()
        params = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in p.activation.params.values()]

        def slope(*leaves):
            values = dict(zip(p.activation.param_names, leaves[3:], strict=True))
            y = linear_act(*leaves[:3], p.activation.with_params(**values))
            return torch.autograd.grad((y.sin() + y * y).sum(), leaves, create_graph=True)

        assert gradgradcheck(slope, (*p.tensors, *params), fast_mode=True, **CHECK)


@pytest.mark.parametrize("shared", [False, True], ids=["own x", "shared x"])
@pytest.mark.parametrize("name", SMOOTH)
def test_a_batch_of_weights(name, shared, exact_backend):
    with using(exact_backend):
        p = problem(name, 2, 2, 1, batch=2, away_from_kinks=True)
        p.x = p.x[0].clone() if shared else p.x
        for mask in ((True, True, True), (False, True, True), (True, False, False)):
            p.requires_grad(mask)
            f, leaves = call(p, "contiguous")
            assert gradcheck(f, leaves, **CHECK)
            assert gradgradcheck(f, leaves, **CHECK)


@pytest.mark.parametrize("name", ["sine", "split"])
def test_a_batch_of_weights_is_the_stack_of_layers(name, exact_backend):
    p = problem(name, 5, 3, 4, batch=6)
    batched = {
        "weight": p.weight.view(2, 3, *p.weight.shape[1:]),
        "bias": p.bias.view(2, 3, -1),
        "activation": p.activation,
    }
    each = [eager(p.x[i], p.weight[i], p.bias[i], p.activation) for i in range(6)]
    shared = [eager(p.x[0], p.weight[i], p.bias[i], p.activation) for i in range(6)]
    one_bias = [eager(p.x[i], p.weight[i], p.bias[0], p.activation) for i in range(6)]
    close = {"rtol": tolerance("same arithmetic"), "atol": tolerance("same arithmetic")}
    with using(exact_backend):
        torch.testing.assert_close(
            linear_act(p.x.view(2, 3, 5, 3), **batched).flatten(0, 1), torch.stack(each), **close
        )
        torch.testing.assert_close(linear_act(p.x[0], **batched).flatten(0, 1), torch.stack(shared), **close)
        torch.testing.assert_close(linear_act(p.x[:1, None], **batched).flatten(0, 1), torch.stack(shared), **close)
        torch.testing.assert_close(linear_act(p.x[0, 2], **batched).flatten(0, 1), torch.stack(shared)[:, 2], **close)
        y = linear_act(p.x, p.weight, p.bias[0], p.activation)
        torch.testing.assert_close(y, torch.stack(one_bias), **close)


@pytest.mark.parametrize("name", sorted(DETACHED))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_that_detach_follow_eager(name, layout, exact_backend):
    """Gradients that are not those of the function: eager PyTorch in float64 says what they are."""
    for mask in MASKS:
        p = problem(name, 4, 3, 2, away_from_kinks=True).requires_grad(mask)
        chosen = [torch.randn_like(t) for t in p.tensors if t.requires_grad]
        results = []
        for f in (linear_act, eager):
            leaves = [laid_out(t, layout).requires_grad_(t.requires_grad) for t in p.tensors]
            wanted = [t for t in leaves if t.requires_grad]
            with using(exact_backend):
                y = f(*leaves, p.activation)
                y = y.sum(-2) if layout == "expanded gradient" else y
                first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
                total = sum((d * g).sum() for d, g in zip(chosen, first))
                second = torch.autograd.grad(total, wanted, create_graph=True)
                third = torch.autograd.grad(sum((d * s).sum() for d, s in zip(chosen, second)), wanted)
            results.append((y, *first, *second, *third))
        for ours, theirs in zip(*results):
            allowed = tolerance("same arithmetic") * max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed)


# -- values and derivatives within the bound

KEYS = ("y", "x", "weight", "bias")
SECOND = ("xx", "ww", "bb", "gg")


def derivatives(p: Problem, f=linear_act, order: int = 1) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Value, gradients of <g, y>, gradients of those along random directions; and the directions."""
    leaves = [t.detach().requires_grad_() for t in p.tensors]
    g = p.g.detach().clone().requires_grad_()
    y = f(*leaves, p.activation)
    first = torch.autograd.grad(y, leaves, g, create_graph=order > 1)
    found = dict(zip(KEYS, (y, *first)))
    if order == 1:
        return {k: v.detach().cpu() for k, v in found.items()}, []
    rng = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=rng).to(t) for t in leaves]
    second = torch.autograd.grad(first, [*leaves, g], directions, allow_unused=True, materialize_grads=True)
    found |= dict(zip(SECOND, second))
    return {k: v.detach().cpu() for k, v in found.items()}, directions


SHAPES = [(127, 1, 17), (17, 3, 127), (129, 33, 17), (17, 256, 33)]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rounding_stays_within_the_bound(name, dtype, backend, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend has no float64")
    # second derivatives of float16 beyond 65504 are infinite, as they are in any float16 computation
    with using(backend):
        for m, k, n in SHAPES if dtype == torch.float32 else SHAPES[1:3]:
            p = problem(name, m, k, n, dtype=dtype).to(dtype, device)
            found, directions = derivatives(p, order=2)
            oracle = expected(p, 2, directions, backend)
            for key, value in found.items():
                assert value.dtype == dtype
                assert worst(value, oracle[key], dtype) <= 1, (key, (m, k, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_worse_than_twice_eager(name, dtype, backend, device):
    p = problem(name, 257, 33, 33, dtype=dtype).to(dtype, device)
    theirs, directions = derivatives(p, eager, order=2)
    truth, _ = derivatives_in_float64(p, directions)
    with using(backend):
        ours, _ = derivatives(p, order=2)
    for key in ours:
        scale = truth[key].abs().max().item()
        if scale >= torch.finfo(dtype).max:
            continue  # not representable
        error, eager_error = ((v[key].double() - truth[key]).abs().max().item() for v in (ours, theirs))
        floor = tolerance("eager floor") * 2 * UNIT[dtype] * scale
        assert not error > tolerance("eager") * eager_error + floor, (key, error / scale, eager_error / scale)
        assert math.isfinite(error) or not math.isfinite(eager_error)


def derivatives_in_float64(p: Problem, directions):
    exact = expected(p, 2, directions)
    return {k: exact[k].value for k in (*KEYS, *SECOND)}, directions


def check_shape(name, m, k, n, dtype, backend, device):
    p = problem(name, m, k, n, dtype=dtype).to(dtype, device)
    # storage offset 1: no kernel may assume more alignment than an element's
    for key in ("x", "weight", "bias"):
        t = getattr(p, key)
        moved = torch.empty(t.numel() + 1, dtype=dtype, device=device)[1:].view(t.shape)
        setattr(p, key, moved.copy_(t))
    found, _ = derivatives(p)
    oracle = expected(p, 1, backend=backend)
    assert found["y"].shape == (m, n * p.activation.outputs)
    for key, value in found.items():
        assert worst(value, oracle[key], dtype) <= 1, (key, (m, k, n))


@pytest.mark.parametrize("k", [1, 2, 3, 15, 16, 17, 31, 33, 256])
@pytest.mark.parametrize("name", ["sine", "split"])
def test_every_shape(name, k, backend, device):
    sizes = (0, 1, 17, 127, 129)
    # four branches cost the oracle eight times as much: every size, but not every pair
    pairs = itertools.product(sizes, sizes[1:]) if name == "sine" else zip(sizes, (129, 127, 17, 1, 129))
    with using(backend):
        for m, n in pairs:
            check_shape(name, m, k, n, torch.float32, backend, device)
    if name == "sine":
        for dtype in (torch.bfloat16, torch.float16):
            with using(backend):
                check_shape(name, 129, k, 17, dtype, backend, device)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_every_activation(name, backend, device):
    with using(backend):
        for m, k, n in ((1, 1, 1), (0, 3, 17), (17, 2, 1), (129, 17, 1), (1, 31, 129), (127, 15, 17)):
            check_shape(name, m, k, n, torch.float32, backend, device)


@pytest.mark.parametrize("name", ["sine", "split", "complex_gabor"])
def test_no_features_and_no_inputs(name, backend, device):
    """N = 0 gives an empty result; K = 0 leaves f(b)."""
    activation = fi.activations.get(name)
    with using(backend):
        x = torch.randn(5, 3, device=device, requires_grad=True)
        y = linear_act(x, torch.zeros(0, 3, device=device), torch.zeros(0, device=device), activation)
        assert y.shape == (5, 0)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))
        p = problem(name, 5, 0, 3, dtype=torch.float32).to(torch.float32, device)
        found, _ = derivatives(p)
        oracle = expected(p, 1)
        for key, value in found.items():
            assert worst(value, oracle[key], torch.float32) <= 1, key


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (2, 0, 3), (1, 1, 1, 3)])
def test_leading_dimensions(shape, backend, device):
    p = problem("sine", math.prod(shape[:-1]), 3, 4, dtype=torch.float32).to(torch.float32, device)
    with using(backend):
        y = linear_act(p.x.view(shape), p.weight, p.bias, p.activation)
        assert y.shape == (*shape[:-1], 4)
        assert torch.equal(y.reshape(-1, 4), linear_act(p.x, p.weight, p.bias, p.activation))


def test_gradients_of_parameters_within_the_bound(backend, device):
    for name in (n for n in NAMES if fi.activations.get(n).param_names):
        p = problem(name, 129, 3, 17, dtype=torch.float32).to(torch.float32, device)
        params = {k: torch.full((17,), v, device=device).requires_grad_() for k, v in p.activation.params.items()}
        p.activation = p.activation.with_params(**params)
        with using(backend):
            y = linear_act(p.x, p.weight, p.bias, p.activation)
            got = torch.autograd.grad(y, list(params.values()), p.g)
        p.activation = p.activation.with_params(**{k: v.detach() for k, v in params.items()})
        oracle = expected(p, 1)
        for key, value in zip(params, got):
            assert worst(value.cpu(), oracle[key], torch.float32) <= 1, (name, key)


def test_large_arguments_of_the_sine(backend, device):
    """SIREN's audio networks have omega = 3000: omega z of thousands is real; its rounding is all that may be lost."""
    for omega in (30.0, 3000.0, 1e5):
        p = problem(fi.activations.sine(omega=omega), 129, 1, 17, dtype=torch.float32).to(torch.float32, device)
        p.weight = p.weight / p.weight.abs().max()
        with using(backend):
            found, _ = derivatives(p)
        oracle = expected(p, 1)
        for key, value in found.items():
            assert worst(value, oracle[key], torch.float32) <= 1, (omega, key)


# -- promises to autograd


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_twice(name, backend, device):
    for p in (
        problem(name, 517, 33, 65, dtype=torch.float32).to(torch.float32, device),
        problem(name, 129, 3, 17, dtype=torch.bfloat16).to(torch.bfloat16, device),
    ):
        with using(backend):
            first, second = derivatives(p, order=2)[0], derivatives(p, order=2)[0]
        assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_output_may_be_changed_in_place(name, dtype, backend, device):
    p = problem(name, 9, 3, 4, dtype=dtype).to(dtype, device).requires_grad()
    with using(backend):
        y = linear_act(*p.tensors, p.activation)
        plain = torch.autograd.grad(y * 3, p.tensors, p.g)
        y = linear_act(*p.tensors, p.activation)
        changed = torch.autograd.grad(y.mul_(3), p.tensors, p.g)
    assert all(torch.equal(a, b) for a, b in zip(plain, changed))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_was_passed_is_overwritten(name, backend, device):
    p = problem(name, 9, 3, 4, dtype=torch.float32).to(torch.float32, device).requires_grad()
    before = [t.detach().clone() for t in (*p.tensors, p.g)]
    with using(backend):
        y = linear_act(*p.tensors, p.activation)
        kept = y.detach().clone()
        once = torch.autograd.grad(y, p.tensors, p.g, retain_graph=True)
        copies = [t.clone() for t in once]
        double = torch.autograd.grad(y, p.tensors, p.g, create_graph=True)
        torch.autograd.grad(sum(d.square().sum() for d in double), p.tensors, retain_graph=True, allow_unused=True)
        twice = torch.autograd.grad(y, p.tensors, p.g)
    assert all(torch.equal(a, b) for a, b in zip(before, (*p.tensors, p.g)))
    assert torch.equal(kept, y)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(once, copies, twice))


def test_inputs_changed_in_place_before_the_backward_are_noticed(backend, device):
    p = problem("sine", 9, 3, 4, dtype=torch.float32).to(torch.float32, device).requires_grad()
    with using(backend):
        y = linear_act(*p.tensors, p.activation)
        with torch.no_grad():
            p.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Recorder:
    """Writes down which gradients each raw backward was asked for."""

    def __init__(self, monkeypatch, backend):
        self.needs = []
        run = backends.TABLE[backend].linear_act_backward

        def recorded(*args):
            self.needs.append(tuple(args[-1]))
            return run(*args)

        monkeypatch.setattr(backends.TABLE[backend], "linear_act_backward", recorded)


@pytest.mark.parametrize("mask", MASKS)
def test_a_frozen_input_costs_nothing(mask, backend, device, monkeypatch):
    p = problem("sine", 5, 3, 4, dtype=torch.float32).to(torch.float32, device).requires_grad(mask)
    with using(backend):
        recorder = Recorder(monkeypatch, backend)
        linear_act(*p.tensors, p.activation).sum().backward()
    assert recorder.needs == [(*mask, False)]
    assert tuple(t.grad is not None for t in p.tensors) == mask


def test_a_backward_is_asked_for_no_more_than_wanted(backend, device, monkeypatch):
    """All inputs require gradients; torch.autograd.grad asks for that of a tensor before them."""
    p = problem("sine", 5, 3, 4, dtype=torch.float32).to(torch.float32, device).requires_grad()
    with using(backend):
        recorder = Recorder(monkeypatch, backend)
        first = linear_act(*p.tensors, p.activation)
        # not leaves: of those the engine does not say whether they are wanted
        weight, bias = torch.randn(2, 4, device=device, requires_grad=True) * 1.0, torch.zeros(2, device=device) * 1.0
        y = linear_act(first, weight, bias, p.activation)
        torch.autograd.grad(y.sum(), p.x)
    assert recorder.needs[0] == (True, False, False, False)


def test_nothing_is_saved_where_nothing_needs_a_gradient(backend, device):
    p = problem("sine", 5, 3, 4, dtype=torch.float32).to(torch.float32, device)
    with using(backend):
        assert linear_act(*p.tensors, p.activation).grad_fn is None
        p.requires_grad()
        with torch.no_grad():
            assert not linear_act(*p.tensors, p.activation).requires_grad
        with torch.inference_mode():
            assert linear_act(*p.tensors, p.activation).is_inference()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (2, 0)])
def test_grad_of_some_inputs_alone(wanted, backend, device, monkeypatch):
    """All inputs require gradients, torch.autograd.grad asks for some of them, also through a further layer."""
    p = problem("split", 5, 3, 3, dtype=torch.float32).to(torch.float32, device).requires_grad()
    with using(backend):
        all_of_them = derivatives(p)[0]
        y = linear_act(*p.tensors, p.activation)
        leaves = [p.tensors[i] for i in wanted]
        alone = torch.autograd.grad(y, leaves, p.g)
        for i, g in zip(wanted, alone):
            assert torch.equal(g.cpu(), all_of_them[KEYS[1 + i]])
        first = [t * 1.0 for t in p.tensors]
        inner = linear_act(*first, p.activation)
        outer = linear_act(inner, torch.eye(3, device=device).repeat(4, 1), None, p.activation)
        some = torch.autograd.grad(outer.sum(), leaves, retain_graph=True)
        everything = torch.autograd.grad(outer.sum(), p.tensors)
        assert all(torch.equal(g, everything[i]) for i, g in zip(wanted, some))


def test_an_eikonal_step_asks_its_first_backward_for_the_coordinates_alone(backend, device):
    """And gets the weights' gradients from the second."""
    p = problem("sine", 17, 3, 4, dtype=torch.float64 if backend != "triton" else torch.float32)
    p = p.to(p.x.dtype, device).requires_grad()
    results = []
    for f in (linear_act, eager):
        with using(backend):
            y = f(*p.tensors, p.activation)
            (slope,) = torch.autograd.grad(y.sum(), p.x, create_graph=True)
            loss = (slope.norm(dim=-1) - 1).square().mean() + y.square().mean()
            results.append((slope, *torch.autograd.grad(loss, p.tensors)))
    scale = tolerance("same arithmetic") if p.x.dtype == torch.float64 else 2e3 * UNIT[torch.float32]
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=scale, atol=scale * theirs.abs().max().item())


def test_autograd_grad_after_backward_through_a_shared_graph(exact_backend):
    """x enters both layers and the loss: gradients add up."""
    p = problem("gaussian", 6, 3, 3).requires_grad()
    results = []
    for f in (linear_act, eager):
        with using(exact_backend):
            y = f(f(p.x, p.weight, p.bias, p.activation), p.weight, p.bias, p.activation) * p.x
            results.append(torch.autograd.grad(y.sum(), p.tensors))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=tolerance("same arithmetic"), atol=tolerance("same arithmetic"))


def test_an_expanded_input(exact_backend):
    """x of stride 0: every row the same point."""
    p = problem("sine", 1, 3, 4).requires_grad()
    with using(exact_backend):
        f = lambda x, w, b: linear_act(x.expand(7, 3), w, b, p.activation)  # noqa: E731
        assert gradcheck(f, p.tensors, **CHECK)
        assert gradgradcheck(f, p.tensors, **CHECK)
