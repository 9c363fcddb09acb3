"""Whole networks as one operation: against float64, against the layers, in every way to train, at every order."""

from functools import partial

import pytest
import sympy
import torch
from linear_act_oracle import BY_HAND, eager_act, spread
from tolerances import UNIT, tolerance
from torch import nn

import fused_inr as fi
from fused_inr import activations, backends, losses
from fused_inr.network import NORMS, Criterion, Layer, Norm
from fused_inr.ops import mlp as op
from fused_inr.ops import raw

NAMES = activations.names()
#: hidden widths: whole panels, part of one, several channels
WIDTHS = (33, 16, 50)


@pytest.fixture(autouse=True)
def _backend(request):
    """The native engine where there is one, else the reference; both run everything here that names no backend."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def engine() -> str:
    return "cpu" if backends.available()["cpu"][0] else "reference"


def network(name: str, dtype=torch.float64, widths=WIDTHS, out_features: int = 3, **kwargs) -> list[Layer]:
    """Hidden layers of one activation at a usual spread of pre-activations, and a linear one."""
    layers, columns = [], 2
    for n in (*widths, out_features):
        last = len(layers) == len(widths)
        activation = (
            activations.get("identity")
            if last
            else activations.get(name)(**kwargs)
            if kwargs
            else activations.get(name)
        )
        sigma = 1.0 if last else spread(name)
        weight = torch.randn(activation.branches * n, columns, dtype=torch.float64) * sigma / columns**0.5
        bias = torch.randn(activation.branches * n, dtype=torch.float64) * sigma / 3
        layers.append(Layer(weight.to(dtype), bias.to(dtype), activation))
        columns = n * activation.outputs
    return layers


def convert(layers, dtype):
    return [Layer(w.to(dtype), None if b is None else b.to(dtype), a) for w, b, a, *_ in layers]


def plain(x, layers):
    """Eager PyTorch, by formulas written by hand."""
    for weight, bias, activation, *_ in layers:
        z = x @ weight.mT
        x = eager_act(activation, z if bias is None else z + bias)
    return x


def leaves(x, layers):
    """A copy whose tensors require gradients, and those tensors."""
    x = x.detach().clone().requires_grad_()
    layers = [
        Layer(w.detach().clone().requires_grad_(), None if b is None else b.detach().clone().requires_grad_(), a)
        for w, b, a, *_ in layers
    ]
    return x, layers, [x, *(layer.weight for layer in layers), *(t.bias for t in layers if t.bias is not None)]


def gradients(function, x, layers, *args):
    x, layers, wanted = leaves(x, layers)
    y = function(x, layers, *args)
    return y.detach(), torch.autograd.grad(y, wanted, torch.cos(y.detach()), allow_unused=True)


def joined(layers, skips=(), norms=()):
    """Layers with skip connections and norms."""
    n = len(layers)
    return [
        Layer(w, b, a, norm, skip)
        for (w, b, a, *_), skip, norm in zip(layers, skips or [False] * n, norms or [None] * n, strict=True)
    ]


def run_whole(x, layers, decision, save, skips=(), norms=()):
    return op.network(x, op.Operands(joined(layers, skips, norms)), decision, save)


def one_pass_of(x, target, row_weights, layers, criterion, decision, skips=(), norms=()):
    return op.network_loss(x, target, row_weights, op.Operands(joined(layers, skips, norms)), criterion, decision)


def whole(x, layers, save=True, backend=None):
    return run_whole(x, layers, op.Decision(backend or engine(), "ieee", ""), save)


def no_worse(ours, theirs, truth, dtype):
    """Twice the error of eager PyTorch in the same type, or two ulp of the largest value."""
    scale = truth.abs().max().item()
    error, eager_error = ((v.double() - truth).abs().max().item() for v in (ours, theirs))
    assert error <= tolerance("eager") * eager_error + tolerance("eager floor") * 2 * UNIT[dtype] * scale


def same(a, b, scale=1.0):
    assert a.shape == b.shape
    worst = (a - b).abs().max().item() if a.numel() else 0.0
    assert worst <= tolerance("same arithmetic") * scale * max(1.0, b.abs().max().item() if b.numel() else 0.0)


# -- values and first derivatives


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_in_float64(name):
    layers, x = network(name), torch.randn(129, 2, dtype=torch.float64)
    truth, expected = gradients(plain, x, layers)
    for save in (True, False):
        y, grads = gradients(whole, x, layers, save)
        same(y, truth)
        for got, want in zip(grads, expected, strict=True):
            same(got, want)


@pytest.mark.parametrize("name", ["sine", "gaussian", "split", "gabor", "complex_gabor", "relu", "sinc"])
@pytest.mark.parametrize("rows", [64, 1001])
def test_float32_is_no_worse_than_twice_eager(name, rows):
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    layers, x = network(name, torch.float32), torch.randn(rows, 2)
    truth, expected = gradients(plain, x.double(), convert(layers, torch.float64))
    theirs, their_grads = gradients(plain, x, layers)
    for save in (True, False):
        y, grads = gradients(whole, x, layers, save)
        no_worse(y, theirs, truth, torch.float32)
        for got, eager, want in zip(grads, their_grads, expected, strict=True):
            no_worse(got, eager, want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    layers, x = network("sine", dtype), torch.randn(77, 2).to(dtype)
    exact = convert(layers, torch.float64)
    truth, expected = gradients(plain, x.double(), exact)
    y, grads = gradients(whole, x, layers)
    assert y.dtype == dtype
    # float32 between the layers, rounded once, at the end: one ulp of the stored type. Where the processor multiplies
    # bfloat16, what each of the three layers reads is rounded, too
    rounded = engine() == "cpu" and dtype == torch.bfloat16 and torch.ops.fused_inr_native.multiplies_bfloat16()
    assert (y.double() - truth).abs().max() <= (4 if rounded else 1.01) * UNIT[dtype] * truth.abs().max()
    for got, want, leaf in zip(grads, expected, leaves(x, layers)[2], strict=True):
        assert got.dtype == leaf.dtype
        # the cotangent is cos of a rounded output: it differs by as much again
        assert (got.double() - want).abs().max() <= 6 * UNIT[dtype] * want.abs().max() * y.shape[1] ** 0.5


@pytest.mark.parametrize("name", ["sine", "split", "complex_gabor"])
@pytest.mark.parametrize("widths", [(), (5,), (16,), (17, 129), (256, 3), (64, 64, 64, 64)])
def test_widths_and_depths(name, widths):
    layers, x = network(name, widths=widths, out_features=5), torch.randn(70, 2, dtype=torch.float64)
    truth, expected = gradients(plain, x, layers)
    y, grads = gradients(whole, x, layers)
    same(y, truth)
    for got, want in zip(grads, expected, strict=True):
        same(got, want)


def test_layers_of_several_activations_an_output_activation_and_no_bias():
    a = activations
    layers, columns = [], 3
    for n, activation in ((20, a.split(m=2.0)), (7, a.complex_gabor()), (9, a.get("fourier")), (4, a.sine(omega=2.0))):
        weight = torch.randn(activation.branches * n, columns, dtype=torch.float64) * 0.3
        layers.append(Layer(weight, None, activation))
        columns = n * activation.outputs
    x = torch.randn(31, 3, dtype=torch.float64)
    truth, expected = gradients(plain, x, layers)
    y, grads = gradients(whole, x, layers)
    same(y, truth)
    for got, want in zip(grads, expected, strict=True):
        same(got, want)


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("name", ["sine", "split", "complex_gabor"])
def test_learnable_parameters(name, per_feature):
    map = activations.get(name).map
    layers, x = [], torch.randn(300, 2, dtype=torch.float64)
    for weight, bias, activation, *_ in network(name):
        if activation.name != "identity":
            n = weight.shape[0] // activation.branches
            shape = (n,) if per_feature else ()
            values = {p: v * (1 + 0.1 * torch.rand(shape, dtype=torch.float64)) for p, v in activation.params.items()}
            activation = map(**{p: v.requires_grad_() for p, v in values.items()})
        layers.append(Layer(weight, bias, activation))
    params = [t for _, _, a, *_ in layers for t in a.tensors if t is not None]
    results = []
    for run in (plain, whole, lambda x, layers: whole(x, layers, False)):
        y = run(x, layers)
        results.append(torch.autograd.grad(y, params, torch.cos(y.detach())))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            same(a, b, 10.0)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_rows(rows):
    layers, x = network("sine"), torch.randn(rows, 2, dtype=torch.float64)
    y, grads = gradients(whole, x, layers)
    assert y.shape == (rows, 3)
    _, expected = gradients(plain, x, layers)
    for got, want in zip(grads, expected, strict=True):
        same(got, want)


def test_strides_and_leading_dimensions():
    layers = network("sine")
    wide = torch.randn(40, 5, dtype=torch.float64)
    for x in (wide[:, 1:3], wide.T[1:3].T, wide[:1, :2].expand(40, 2), wide[:, :2].reshape(4, 10, 2)):
        same(whole(x, layers), plain(x, layers))


def test_only_what_is_needed_is_computed():
    layers, x = network("sine"), torch.randn(20, 2, dtype=torch.float64)
    o = op.Operands(layers)
    operands = (o.tensors, o.spec.words, o.spec.numbers)
    y, saved = raw.mlp(x, *operands, engine(), "ieee", False)
    assert saved.numel() == 0
    out = raw.mlp_backward(y, x, *operands, None, engine(), "ieee", [False, True, False, False, False])
    assert [t.numel() > 0 for t in out] == [False, *[True, False, False] * 3, True, False]


def test_sums_do_not_depend_on_chance_and_hardly_on_threads():
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    layers, x = network("sine", torch.float32, widths=(64, 64)), torch.randn(40000, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = [gradients(whole, x, layers, save)[1] for save in (True, False)]
        again = [gradients(whole, x, layers, save)[1] for save in (True, False)]
        torch.set_num_threads(3)
        three = [gradients(whole, x, layers, save)[1] for save in (True, False)]
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, again, three, strict=True):
        # with this many rows the sums are cut into parts whose number is fixed
        assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(a, b, c, strict=True))


# -- higher orders


@pytest.mark.parametrize("name", ["sine", "gabor", "split"])
def test_second_derivatives(name):
    layers, x = network(name, widths=(6, 5)), torch.randn(4, 2, dtype=torch.float64)
    x, layers, wanted = leaves(x, layers)

    def run(*tensors):
        n = len(layers)
        again = [
            Layer(w, b, t.activation) for w, b, t in zip(tensors[1 : 1 + n], tensors[1 + n :], layers, strict=True)
        ]
        return whole(tensors[0], again)

    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted)


def test_third_order_agrees_with_the_layers():
    layers, x = network("sine", widths=(8, 8)), torch.randn(5, 2, dtype=torch.float64)
    results = []
    for run in (whole, plain):
        again, own, wanted = leaves(x, layers)
        (g,) = torch.autograd.grad(run(again, own).sum(), again, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), again, create_graph=True)
        results.append(torch.autograd.grad(h.square().sum(), wanted, allow_unused=True))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same(a, b, 1e3)


def test_a_batch_of_cotangents():
    layers, x = network("sine", widths=(8,)), torch.randn(5, 2, dtype=torch.float64)
    x, layers, wanted = leaves(x, layers)
    y = whole(x, layers)
    basis = torch.eye(15, dtype=torch.float64).view(15, 5, 3)
    batched = torch.autograd.grad(y, wanted, basis, is_grads_batched=True, retain_graph=True)
    for i in (0, 7):
        for a, b in zip(batched, torch.autograd.grad(y, wanted, basis[i], retain_graph=True), strict=True):
            same(a[i], b)


# -- modules


def siren(fusion="network", **kwargs):
    """In float64, which by itself goes layer by layer."""
    return fi.SIREN(2, 32, 2, 3, dtype=torch.float64, fusion=fusion, **kwargs)


def coordinates(rows: int = 50):
    return torch.rand(rows, 2, dtype=torch.float64) * 2 - 1


def grads_of(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


def check_ways(net) -> None:
    """Layer by layer and in all ways to train a whole network: the same gradients."""
    x, target = coordinates(), torch.randn(50, net.out_features, dtype=torch.float64)
    with backends.use(engine()):
        results = []
        for fusion, save in (("layers", "nothing"), ("network", "preactivations"), ("network", "nothing")):
            net.fusion, net.save = fusion, save
            results.append(grads_of(net, (net(x) - target).square().mean()))
        results.append(grads_of(net, losses.mse(net, x, target)))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            same(a, b, 100.0)


@pytest.mark.parametrize(
    "net",
    [
        lambda **k: fi.SIREN(2, 32, 2, 3, dtype=torch.float64, **k),
        lambda **k: fi.SIREN(2, 32, 2, 3, dtype=torch.float64, outermost_linear=False, learnable=True, **k),
        lambda **k: fi.SplitNet(2, 20, 2, 3, dtype=torch.float64, **k),
        lambda **k: fi.MLP(2, 20, 2, 4, "complex_gabor", dtype=torch.float64, bias=False, **k),
        lambda **k: fi.MLP(
            2, 20, 2, 3, "gaussian", dtype=torch.float64, encoding=fi.FourierFeatures(2, 8).double(), **k
        ),
    ],
)
def test_fusion_and_save_change_no_result(net):
    net = net(fusion="network")
    check_ways(net)


def test_the_choice_can_be_asked():
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    net, x = siren(fusion="auto"), coordinates()
    assert "plain PyTorch (ieee)\n    not fused: PyTorch's products and maps of float64" in backends.explain(net, x)
    with backends.use("cpu"):
        assert "layer by layer: float64: PyTorch's matrix products are faster" in backends.explain(net, x)
    net, x = net.float(), x.float()
    assert "whole network [50, 2] -> 32 -> 32 -> 32 -> 3" in backends.explain(net, x)
    net.fusion = "layers"
    assert backends.explain(net, x).count("linear_act") == 4
    net.fusion = "auto"
    x.requires_grad_()

    def differentiated(x):
        with torch.enable_grad():
            net(x)

    said = backends.explain(differentiated, x)
    assert said.startswith("layer by layer: the coordinates require a gradient") and said.count("linear_act") == 4
    net.net[1].register_forward_hook(lambda *_: None)
    assert "hooks" in backends.explain(net, x.detach())
    with backends.use("reference"):
        assert "layer by layer: plain PyTorch" in backends.explain(siren(fusion="auto").float(), x.detach())


def test_the_choice_can_be_forced():
    net, x = siren(fusion="network"), coordinates()
    net.net[1].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"fusion='network': a layer has hooks.*fusion='auto' runs"):
        net(x)
    with pytest.raises(ValueError, match="fusion"):
        siren(fusion="fast")
    with pytest.raises(ValueError, match="save"):
        siren(save="all")
    assert "fusion='network'" in repr(siren(fusion="network")) and "save='nothing'" in repr(siren(save="nothing"))


def test_hooks_run():
    net, x = siren(fusion="auto").float(), coordinates().float()
    seen = []
    net.net[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    net(x)
    assert seen == [(50, 32)]


def test_a_replaced_layer_runs():
    net, x = siren(fusion="auto").float(), coordinates().float()
    before = net(x)
    net.net[1] = nn.Sequential(net.net[1], nn.Tanh())
    assert not torch.allclose(net(x), before)


def test_wrong_shapes_raise_as_the_layers_do():
    with pytest.raises(ValueError, match="x: its last dimension is 3"):
        siren(fusion="auto").float()(torch.rand(5, 3))
    with pytest.raises(TypeError, match="dtype"):
        siren(fusion="auto").float()(torch.rand(5, 2, dtype=torch.float64))


def test_transforms_go_through_the_layers():
    net, x = siren(fusion="auto"), coordinates(4)
    jacobian = torch.func.vmap(torch.func.jacrev(net))(x)
    y = net(x.requires_grad_())
    rows = torch.stack([torch.autograd.grad(y[:, c].sum(), x, retain_graph=True)[0] for c in range(3)], 1)
    same(jacobian, rows, 100.0)
    parameters = dict(net.named_parameters())

    def loss(p):
        return torch.func.functional_call(net, p, (x.detach(),)).square().mean()

    by_func = torch.func.grad(loss)(parameters)
    by_hand = grads_of(net, net(x.detach()).square().mean())
    for a, b in zip(by_func.values(), by_hand, strict=True):
        same(a, b, 100.0)


def test_autocast():
    net, x = fi.SIREN(2, 32, 2, 3, omega=3.0, first_omega=3.0), torch.rand(50, 2)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 16 * UNIT[torch.bfloat16] * exact.abs().max()


def test_what_is_saved_does_not_outlive_a_change_of_the_output():
    net, x = siren(fusion="network"), coordinates()
    expected = grads_of(net, net(x).mul(2).square().sum())
    with backends.use(engine()):
        y = net(x)
        y.mul_(2)
        for a, b in zip(grads_of(net, y.square().sum()), expected, strict=True):
            same(a, b, 100.0)


# -- losses

LOSSES = {m.name: m for m in activations.registered_losses()}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("fusion", ["auto", "layers"])
def test_losses_are_those_of_pytorch(name, reduction, fusion):
    facts = LOSSES[name].facts
    values = {**LOSSES[name].defaults, **facts.test_values}
    ours = partial(getattr(losses, facts.public), **values)

    def theirs(y, target, reduction):
        each = facts.eager(y, target, *values.values())
        return {"mean": each.mean, "sum": each.sum, "none": lambda: each}[reduction]()

    net, x = siren(fusion=fusion), coordinates(333)
    target = torch.randn(333, 3, dtype=torch.float64)
    a, b = ours(net, x, target, reduction=reduction), theirs(net(x), target, reduction=reduction)
    same(a, b, 100.0)
    for p, q in zip(grads_of(net, a.sum()), grads_of(net, b.sum()), strict=True):
        same(p, q, 100.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_rows(reduction):
    net, x = siren(), coordinates(60).view(6, 10, 2)
    target, weight = torch.randn(6, 10, 3, dtype=torch.float64), torch.rand(6, 10, dtype=torch.float64)
    ours = losses.mse(net, x, target, weight, reduction)
    error = weight[..., None] * (net(x) - target).square()
    theirs = error.mean() if reduction == "mean" else error.sum()
    same(ours, theirs, 100.0)
    for p, q in zip(grads_of(net, ours), grads_of(net, theirs), strict=True):
        same(p, q, 100.0)


def test_a_loss_from_a_formula():
    cauchy = losses.define("cauchy", lambda p, t, scale: sympy.log(1 + ((p - t) / scale) ** 2), scale=0.5)
    net, x = siren(), coordinates(100)
    target = torch.randn(100, 3, dtype=torch.float64)
    ours, theirs = cauchy(net, x, target), torch.log1p(((net(x) - target) / 0.5).square()).mean()
    same(ours, theirs, 100.0)
    for p, q in zip(grads_of(net, ours), grads_of(net, theirs), strict=True):
        same(p, q, 100.0)
    with pytest.raises(ValueError, match="one expression of"):
        losses.define("alone", lambda p: p**2)


def test_one_pass_is_taken_and_says_when_not():
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    net, x = siren(fusion="auto").float(), coordinates().float()
    target = torch.randn(50, 3)

    def said(function):
        with torch.no_grad():
            return backends.explain(lambda: _with_grad(function))

    assert "with squared_error: cpu" in said(lambda: losses.mse(net, x, target))
    assert "composed: reduction='none'" in said(lambda: losses.mse(net, x, target, reduction="none"))
    assert "composed: target or weight" in said(lambda: losses.mse(net, x, target.clone().requires_grad_()))
    assert "no gradient" in backends.explain(lambda: losses.mse(net, x, target))
    net.fusion = "network"
    with pytest.raises(RuntimeError, match="reduction='none'"):
        losses.mse(net, x, target, reduction="none")


def _with_grad(function):
    with torch.enable_grad():
        return function()


def test_the_backward_of_a_loss_scales_and_can_run_twice():
    net, x = siren(), coordinates()
    loss = losses.mse(net, x, torch.zeros(50, 3, dtype=torch.float64))
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    scaled = torch.autograd.grad(3 * loss, list(net.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(net.parameters()))
    for a, b, c in zip(first, scaled, again, strict=True):
        same(3 * a, b)
        assert torch.equal(a, c)


def test_a_second_derivative_of_a_loss():
    net, x = siren(), coordinates(20)
    target = torch.zeros(20, 3, dtype=torch.float64)
    weights = [p for p in net.parameters() if p.dim() == 2]
    results = []
    for loss in (losses.mse(net, x, target), (net(x) - target).square().mean()):
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), weights))
    for a, b in zip(*results, strict=True):
        same(a, b, 1e4)


def test_gradients_of_coordinates_and_frozen_layers():
    net, x = siren(), coordinates(40).requires_grad_()
    target = torch.zeros(40, 3, dtype=torch.float64)
    for p in net.net[0].parameters():
        p.requires_grad_(False)
    losses.l1(net, x, target).backward()
    got = [x.grad, *(p.grad for p in net.parameters())]
    again = x.detach().clone().requires_grad_()
    net.zero_grad()
    (net(again) - target).abs().mean().backward()
    for a, b in zip(got, [again.grad, *(p.grad for p in net.parameters())], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same(a, b, 100.0)


def test_a_module_of_others_is_composed():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    x, target = torch.rand(10, 2), torch.rand(10, 1)
    assert torch.allclose(losses.mse(net, x, target), nn.functional.mse_loss(net(x), target))


def test_bad_losses():
    net, x = siren(), coordinates(10)
    target = torch.zeros(10, 3, dtype=torch.float64)
    for wrong, error, match in (
        ((net, x, target[:5]), ValueError, "target: expected"),
        ((net, x, target[:, :2]), ValueError, "target: expected 3 columns"),
        ((net, x, target, torch.ones(9)), ValueError, "weight: expected one number a row"),
        ((net, x, 0.0), TypeError, "target: expected a tensor"),
        ((lambda x: x, x, target), TypeError, "net: expected an nn.Module"),
        ((net, x, target, None, "median"), ValueError, "reduction"),
    ):
        with pytest.raises(error, match=match):
            losses.mse(*wrong)
    with pytest.raises(ValueError, match="delta"):
        losses.huber(net, x, target, delta=0.0)


def test_memory_of_training_does_not_grow_with_depth():
    """What the forward keeps for the backward, counted; time and peak memory are the bench's affair."""
    x = torch.rand(1000, 2)
    for depth in (2, 8):
        net = fi.SIREN(2, 64, depth, 1)
        sizes = {}
        for save in ("preactivations", "nothing"):
            net.save, kept = save, []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
                net(x)
            parameters = {p.data_ptr() for p in net.parameters()} | {x.data_ptr()}
            sizes[save] = sum(t.numel() for t in kept if t.data_ptr() not in parameters)
        if engine() == "cpu":
            assert sizes["nothing"] == 0
            assert 1000 * 64 * (depth + 1) <= sizes["preactivations"] <= 1000 * 64 * (depth + 1) + 64


def test_the_jet_is_the_value_and_its_derivatives():
    for name in (*NAMES, *LOSSES):
        map = activations.lookup(name)
        z = [torch.randn(50, dtype=torch.float64) for _ in range(map.branches)]
        params = [torch.full((), v, dtype=torch.float64) for v in map.defaults.values()]
        for learnable in (False, True):
            jet = map.torch_jet(learnable)(*z, *params)
            (values, rest) = jet[: map.outputs], list(jet[map.outputs :])
            for v, w in zip(values, map.torch_map(0)(*z, *params), strict=True):
                same(v, w)
            for c in range(map.outputs):
                g = [torch.full((50,), float(i == c), dtype=torch.float64) for i in range(map.outputs)]
                for want in map.torch_map(1, learnable and map.n_params > 0)(*z, *params, *g):
                    same(rest.pop(0).expand(50), want.expand(50), 100.0)
            assert not rest


# -- skip connections


def plain_with_skips(x, layers, skips):
    for layer, skip in zip(layers, skips, strict=True):
        y = plain(x, [layer])
        x = (y + x) / 2**0.5 if skip else y
    return x


def whole_with_skips(x, layers, skips, save):
    return run_whole(x, layers, op.Decision(engine(), "ieee", ""), save, skips)


def square(name: str, dtype=torch.float64, columns: int = 21, depth: int = 4):
    """Layers from `columns` to `columns`, all but the last of one activation; skips around some."""
    outputs = activations.get(name).outputs
    layers = network(name, dtype, widths=(columns,) * depth)
    first = layers[0][0].shape[0]
    layers[0] = layers[0]._replace(weight=(torch.randn(first, outputs * columns, dtype=torch.float64) * 0.2).to(dtype))
    return layers, (outputs == 1, True, False, True, False)


@pytest.mark.parametrize("name", NAMES)
def test_skip_connections_in_float64(name):
    if name == "identity":
        pytest.skip("a skip connection needs an activation")
    layers, skips = square(name)
    x = torch.randn(200, layers[0][0].shape[1], dtype=torch.float64)
    truth, expected = gradients(lambda x, layers: plain_with_skips(x, layers, skips), x, layers)
    for save in (True, False):
        y, grads = gradients(whole_with_skips, x, layers, skips, save)
        same(y, truth)
        for got, want in zip(grads, expected, strict=True):
            same(got, want, 10.0)


@pytest.mark.parametrize("name", ["sine", "gaussian", "split", "relu"])
@pytest.mark.parametrize("rows", [64, 1001])
def test_skip_connections_in_float32_are_no_worse_than_twice_eager(name, rows):
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    layers, skips = network(name, torch.float32, widths=(33, 33, 33)), (False, True, True, False)
    x = torch.randn(rows, 2)
    truth, expected = gradients(
        lambda x, layers: plain_with_skips(x, layers, skips), x.double(), convert(layers, torch.float64)
    )
    theirs, their_grads = gradients(lambda x, layers: plain_with_skips(x, layers, skips), x, layers)
    for save in (True, False):
        y, grads = gradients(whole_with_skips, x, layers, skips, save)
        no_worse(y, theirs, truth, torch.float32)
        for got, eager, want in zip(grads, their_grads, expected, strict=True):
            no_worse(got, eager, want, torch.float32)


def test_a_last_layer_with_a_skip_connection_and_one_pass():
    layers, _ = square("sine")
    layers, skips = layers[:-1], (True, False, True, True)
    x, target = (torch.randn(77, 21, dtype=torch.float64) for _ in range(2))
    criterion = Criterion("squared_error", (), 0.5)
    results = []
    for run in (
        lambda x, layers: (plain_with_skips(x, layers, skips) - target).square().sum() / 2,
        lambda x, layers: one_pass_of(x, target, None, layers, criterion, op.Decision(engine(), "ieee", ""), skips),
        lambda x, layers: one_pass_of(x, target, None, layers, criterion, op.Decision("reference", "ieee", ""), skips),
    ):
        results.append(gradients(run, x, layers))
    for value, grads in results[1:]:
        same(value, results[0][0])
        for got, want in zip(grads, results[0][1], strict=True):
            same(got, want, 10.0)


def test_second_derivatives_with_skip_connections():
    layers, skips = square("sine", columns=3, depth=2)
    skips = skips[:2] + (False,)
    _, layers, wanted = leaves(torch.randn(4, 3, dtype=torch.float64), layers)

    def run(*tensors):
        n = len(layers)
        again = [
            Layer(w, b, t.activation) for w, b, t in zip(tensors[1 : 1 + n], tensors[1 + n :], layers, strict=True)
        ]
        return run_whole(tensors[0], again, op.Decision(engine(), "ieee", ""), True, skips)

    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted)


def test_learnable_parameters_with_skip_connections():
    net = fi.SIREN(2, 20, 3, 3, learnable=True, residual=True, dtype=torch.float64)
    x, target = coordinates(), torch.randn(50, 3, dtype=torch.float64)
    results = []
    for fusion, save in (("layers", "nothing"), ("network", "preactivations"), ("network", "nothing")):
        net.fusion, net.save = fusion, save
        with backends.use(engine()):
            results.append(grads_of(net, (net(x) - target).square().mean()))
            results.append(grads_of(net, losses.mse(net, x, target)))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            same(a, b, 100.0)


def test_skip_connections_that_cannot_be_are_refused():
    layers, x = network("sine"), torch.randn(5, 2, dtype=torch.float64)
    assert "needs an activation" in op.why_not(x, joined(layers, (True, False, False, False)))[2]
    if engine() == "cpu":
        with pytest.raises(ValueError, match="as many columns"):
            run_whole(x, layers, op.Decision("cpu", "ieee", ""), True, (True, False, False, False))


# -- LayerNorm

#: which of weight and bias a norm has
AFFINE = {"weight and bias": (True, True), "weight": (True, False), "bias": (False, True), "neither": (False, False)}


def with_norms(layers, affine="weight and bias", where=None, eps=1e-5, kind="layer"):
    """A norm behind every layer but the last, or `where`; its weight and bias away from 1 and 0."""
    where = [True] * (len(layers) - 1) + [False] if where is None else where
    norms = []
    for layer, there in zip(layers, where, strict=True):
        dtype, n = layer[0].dtype, layer.columns
        weight, bias = (
            t.to(dtype) if present else None
            for t, present in zip((torch.rand(n) + 0.5, torch.randn(n)), AFFINE[affine], strict=True)
        )
        norms.append(Norm(kind, weight, bias, eps) if there else None)
    return norms


def by_hand(y, norm):
    kind, weight, bias, eps = norm
    centred = y - y.mean(-1, keepdim=True) if kind == "layer" else y
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def by_pytorch(y, norm):
    kind, weight, bias, eps = norm
    if kind == "layer":
        return nn.functional.layer_norm(y, y.shape[-1:], weight, bias, eps)
    y = nn.functional.rms_norm(y, y.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def plain_with_norms(x, layers, norms, skips, normalised=by_hand):
    for layer, norm, skip in zip(layers, norms, skips or [False] * len(layers), strict=True):
        y = plain(x, [layer])
        y = y if norm is None else normalised(y, norm)
        x = (y + x) / 2**0.5 if skip else y
    return x


def whole_with_norms(save=True, backend=None):
    def run(x, layers, norms, skips):
        return run_whole(x, layers, op.Decision(backend or engine(), "ieee", ""), save, skips, norms)

    return run


def one_pass_with_norms(target, row_weights=None, backend=None):
    def run(x, layers, norms, skips):
        criterion = Criterion("squared_error", (), 0.5)
        return one_pass_of(
            x, target, row_weights, layers, criterion, op.Decision(backend or engine(), "ieee", ""), skips, norms
        )

    return run


def plain_loss_with_norms(target, row_weights=None):
    def run(x, layers, norms, skips):
        error = (plain_with_norms(x, layers, norms, skips) - target).square().sum(-1)
        return (error if row_weights is None else error * row_weights).sum() / 2

    return run


def gradients_with_norms(run, x, layers, norms, skips=()):
    """run's value, and the gradients of x, the layers and the norms."""
    x, layers, wanted = leaves(x, layers)
    own = []
    for norm in norms:
        pair = () if norm is None else tuple(t if t is None else t.clone().requires_grad_() for t in norm[1:3])
        own.append(None if norm is None else Norm(norm.kind, *pair, norm.eps))
        wanted += [t for t in pair if t is not None]
    y = run(x, layers, own, skips)
    return y.detach(), torch.autograd.grad(y, wanted, torch.cos(y.detach()), allow_unused=True)


def agree_with_norms(x, layers, norms, skips=(), backend=None, scale=100.0):
    """Every way to train against float64 PyTorch by hand; what eps and a small deviation amplify: `scale`."""
    target = torch.randn(x.shape[0], layers[-1].columns, dtype=torch.float64)
    row_weights = torch.rand(x.shape[0], dtype=torch.float64)
    truths = [
        gradients_with_norms(run, x, layers, norms, skips)
        for run in (plain_with_norms, plain_loss_with_norms(target, row_weights))
    ]
    for run, (truth, expected) in (
        (whole_with_norms(True, backend), truths[0]),
        (whole_with_norms(False, backend), truths[0]),
        (one_pass_with_norms(target, row_weights, backend), truths[1]),
    ):
        y, grads = gradients_with_norms(run, x, layers, norms, skips)
        same(y, truth, scale)
        for got, want in zip(grads, expected, strict=True):
            same(got, want, scale)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("backend", ["engine", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_layer_norm_in_float64(name, backend, kind):
    layers, x = network(name), torch.randn(129, 2, dtype=torch.float64)
    agree_with_norms(
        x, layers, with_norms(layers, eps=1e-2, kind=kind), backend=None if backend == "engine" else backend
    )


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["sine", "split", "complex_gabor"])
def test_layer_norm_with_skip_connections_and_without_weight_or_bias(name, skip, affine, kind):
    layers, skips = square(name)
    x = torch.randn(200, layers[0][0].shape[1], dtype=torch.float64)
    norms = with_norms(layers, affine, eps=1e-3, kind=kind)
    for backend in (None, "reference"):
        agree_with_norms(x, layers, norms, skips if skip else (), backend)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("where", [(True, False, False), (False, True, True), (False, False, True)])
@pytest.mark.parametrize("skip", [False, True])
def test_layer_norm_behind_some_layers_and_the_last(where, skip, kind):
    layers, _ = square("sine", depth=3)
    layers = layers[:-1]
    x = torch.randn(77, 21, dtype=torch.float64)
    for backend in (None, "reference"):
        agree_with_norms(
            x, layers, with_norms(layers, where=where, kind=kind), (True, False, True) if skip else (), backend
        )


@pytest.mark.parametrize("last", [False, True])
def test_layer_norm_of_linear_layers(last):
    layers, x = network("identity", widths=(20, 33)), torch.randn(70, 2, dtype=torch.float64)
    agree_with_norms(x, layers, with_norms(layers, where=(True, True, last)))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("name", ["sine", "split", "complex_gabor"])
@pytest.mark.parametrize("widths", [(1, 2), (5,), (16,), (17, 129), (256, 3), (64, 64, 64, 64)])
@pytest.mark.parametrize("rows", [0, 1, 5, 301])
def test_layer_norm_of_every_width_and_number_of_rows(name, widths, rows, kind):
    layers, x = network(name, widths=widths, out_features=5), torch.randn(rows, 2, dtype=torch.float64)
    # of one or two columns, eps alone keeps the deviation from 0
    agree_with_norms(x, layers, with_norms(layers, eps=1e-1, kind=kind))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("name", ["sine", "gaussian", "split", "complex_gabor", "relu"])
@pytest.mark.parametrize("rows", [64, 1001])
def test_layer_norm_in_float32_is_no_worse_than_twice_eager(name, rows, kind):
    """Medians over 9 draws: the largest error of one is that of the row which the layers amplify most, and there it is
    chance which of two roundings lies further from the truth (medians of the ratio: 0.88 to 1.10)."""
    if engine() != "cpu":
        pytest.skip("needs the native engine")

    def eager(x, layers, norms, skips):
        return plain_with_norms(x, layers, norms, skips, by_pytorch)

    def flat(result):
        return [result[0], *result[1]]

    errors = {run: [] for run in (eager, whole_with_norms(True), whole_with_norms(False))}
    sizes = []
    for _ in range(9):
        layers, x = network(name, torch.float32, widths=(33, 50, 33)), torch.randn(rows, 2)
        norms = with_norms(layers, kind=kind)
        exact = [None if n is None else Norm(n.kind, n.weight.double(), n.bias.double(), n.eps) for n in norms]
        truth = flat(gradients_with_norms(plain_with_norms, x.double(), convert(layers, torch.float64), exact))
        sizes.append([t.abs().max() for t in truth])
        for run, found in errors.items():
            got = flat(gradients_with_norms(run, x, layers, norms))
            found.append([(a.double() - b).abs().max() for a, b in zip(got, truth, strict=True)])
    theirs, *ours = (torch.tensor(found).median(0).values for found in errors.values())
    floor = tolerance("eager floor") * 2 * UNIT[torch.float32] * torch.tensor(sizes).median(0).values
    for error in ours:
        assert (error <= tolerance("eager") * theirs + floor).all()


def test_the_statistics_of_rows_far_from_zero():
    """A deviation of 1 around 1,000, of whose squares float32 has no more than 1/16."""
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    identity = activations.get("identity")
    x = torch.randn(70, 40) + 1000
    layers = [Layer(torch.eye(40), torch.zeros(40), identity)]
    norms = with_norms(layers, "neither", (True,))
    truth = by_hand(x.double(), norms[0])
    y = whole_with_norms()(x, layers, norms, ())
    # the mean of 40 numbers rounds once a step at most, by 2^-24 of 1,000
    assert (y.double() - truth).abs().max() <= 40 * UNIT[torch.float32] * 1000
    no_worse(y, by_pytorch(x, norms[0]), truth, torch.float32)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_norms", ["half", "float32"])
def test_layer_norm_of_half_types_keeps_float32_between_the_layers(dtype, of_norms, kind):
    layers, x = network("sine", dtype), torch.randn(77, 2).to(dtype)
    norms = with_norms(layers, kind=kind)
    if of_norms == "float32":
        norms = [None if n is None else Norm(n.kind, n.weight.float(), n.bias.float(), n.eps) for n in norms]
    exact = [None if n is None else Norm(n.kind, n.weight.double(), n.bias.double(), n.eps) for n in norms]
    truth, expected = gradients_with_norms(plain_with_norms, x.double(), convert(layers, torch.float64), exact)
    assert not op.why_not(x, joined(layers, (), norms))[2]
    for save in (True, False):
        y, grads = gradients_with_norms(whole_with_norms(save), x, layers, norms)
        assert y.dtype == dtype
        if engine() != "cpu":
            continue  # the reference rounds between the layers
        # where the processor multiplies bfloat16, what a layer reads is rounded to it as well: four layers, and weights
        # that amplify by up to the root of their columns
        rounded = dtype == torch.bfloat16 and torch.ops.fused_inr_native.multiplies_bfloat16()
        loss = 4 * x.shape[1] ** 0.5 if rounded else 1.01
        assert (y.double() - truth).abs().max() <= loss * UNIT[dtype] * truth.abs().max()
        types = [dtype] * 9 + [t.dtype for n in norms if n is not None for t in n[1:3]]
        for got, want, expected_type in zip(grads, expected, types, strict=True):
            assert got.dtype == expected_type
            # the cotangent is cos of the output: it differs by as much as that does
            steps = 2 + loss * truth.abs().max()
            assert (got.double() - want).abs().max() <= steps * UNIT[dtype] * want.abs().max() * y.shape[1] ** 0.5


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("scaler", [1.0, 2.0**16])
def test_a_loss_scaler_finds_the_gradients_of_float16(normed, scaler):
    """Those of a mean over 2e7 numbers are of order 1e-8, float16's smallest number: its zeros cannot be scaled."""
    layers, x = network("sine", torch.float16), torch.randn(500, 2).half()
    norms = with_norms(layers) if normed else []
    exact = [None if n is None else Norm(n.kind, n.weight.double(), n.bias.double(), n.eps) for n in norms]
    target, criterion = torch.zeros(500, 3).half(), Criterion("squared_error", (), 5e-8)

    def plainly(x, layers, norms, skips):
        y = plain_with_norms(x, layers, norms, skips) if norms else plain(x, layers)
        return y.square().sum() * (criterion.scale * scaler)

    _, expected = gradients_with_norms(plainly, x.double(), convert(layers, torch.float64), exact)
    for backend in (engine(), "reference"):

        def one_pass(x, layers, norms, skips, backend=backend):
            decision = op.Decision(backend, "fp16", "")
            return one_pass_of(x, target, None, layers, criterion, decision, (), norms) * scaler

        _, grads = gradients_with_norms(one_pass, x, layers, norms)
        for got, want in zip(grads, expected, strict=True):
            # half a unit of the smallest number: what a gradient that is not scaled up is rounded to
            assert (got.double() - want).abs().max() <= 0.02 * want.abs().max() + 2.0**-25


@pytest.mark.parametrize("skip", [False, True])
def test_what_lies_beyond_the_last_column_is_not_in_the_statistics(skip, monkeypatch):
    """A panel's columns beyond the layer's last are maps of 0, and here infinite."""
    monkeypatch.setitem(BY_HAND, "reciprocal", lambda z, shift: 1 / (z + shift))
    reciprocal = activations.define("reciprocal", lambda z, shift: 1 / (z + shift), shift=0.0)
    layers = [
        Layer(torch.rand(n, k, dtype=torch.float64) / k + 0.1, torch.ones(n, dtype=torch.float64), reciprocal)
        for n, k in ((19, 3), (19, 19), (33, 19))
    ]
    norms = with_norms(layers, where=(True, True, True), eps=1e-3)
    # positive pre-activations everywhere
    norms = [n._replace(bias=n.bias.abs() + 6) for n in norms]
    agree_with_norms(torch.rand(40, 3, dtype=torch.float64), layers, norms, (False, True, False) if skip else ())


def test_sums_with_layer_norm_are_the_same_bits_for_any_number_of_threads():
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    layers, x = network("sine", torch.float32, widths=(64, 64)), torch.randn(40000, 2)
    norms, skips = with_norms(layers), (False, True, False)
    runs = (whole_with_norms(True), whole_with_norms(False), one_pass_with_norms(torch.zeros(40000, 3)))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (2, 2, 3):
            torch.set_num_threads(count)
            results.append([gradients_with_norms(run, x, layers, norms, skips) for run in runs])
    finally:
        torch.set_num_threads(threads)
    for ways in zip(*results, strict=True):
        for _, grads in ways[1:]:
            assert all(torch.equal(p, q) for p, q in zip(ways[0][1], grads, strict=True))
        assert all(torch.equal(y, ways[0][0]) for y, _ in ways[1:])


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("affine", ["weight and bias", "neither"])
@pytest.mark.parametrize("name", ["sine", "split"])
def test_second_derivatives_with_layer_norm(name, affine, kind):
    layers, skips = square(name, columns=3, depth=2)
    skips, norms = skips[:2] + (False,), with_norms(layers, affine, eps=1e-1, kind=kind)
    _, layers, wanted = leaves(torch.randn(4, layers[0][0].shape[1], dtype=torch.float64), layers)
    own = [t.clone().requires_grad_() for n in norms if n is not None for t in n[1:3] if t is not None]

    def run(*tensors):
        n = len(layers)
        again = [
            Layer(w, b, t.activation) for w, b, t in zip(tensors[1 : 1 + n], tensors[1 + n :], layers, strict=False)
        ]
        rest = list(tensors[1 + 2 * n :]) or [None] * 4
        given = [Norm(kind, rest[2 * i], rest[2 * i + 1], 1e-1) for i in range(2)]
        return run_whole(tensors[0], again, op.Decision(engine(), "ieee", ""), True, skips, [*given, None])

    assert torch.autograd.gradcheck(run, [*wanted, *own])
    assert torch.autograd.gradgradcheck(run, [*wanted, *own])


def test_second_derivatives_of_a_loss_and_batches_of_cotangents_with_layer_norm():
    net, x = siren(norm="layer", residual=True, fusion="network"), coordinates(20)
    target = torch.zeros(20, 3, dtype=torch.float64)
    wanted = [p for p in net.parameters() if p.dim() == 2 or p.shape == (32,)]
    results = []
    for loss in (losses.mse(net, x, target), (net.net(x) - target).square().mean()):
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted))
    for a, b in zip(*results, strict=True):
        same(a, b, 1e4)
    with backends.use(engine()):
        y = net(x)
    basis = torch.eye(60, dtype=torch.float64).view(60, 20, 3)
    batched = torch.autograd.grad(y, wanted, basis, is_grads_batched=True, retain_graph=True)
    for i in (0, 31):
        for a, b in zip(batched, torch.autograd.grad(y, wanted, basis[i], retain_graph=True), strict=True):
            same(a[i], b, 100.0)


NORMED = {
    "SIREN": lambda **k: fi.SIREN(2, 32, 2, 3, **k),
    "skips, learnable omegas": lambda **k: fi.SIREN(2, 32, 2, 3, residual=True, learnable=True, **k),
    "no linear layer": lambda **k: fi.SIREN(2, 20, 2, 3, outermost_linear=False, residual=True, **k),
    "split": lambda **k: fi.SplitNet(2, 20, 2, 3, **k),
    "two outputs": lambda **k: fi.MLP(2, 20, 2, 4, "complex_gabor", bias=False, output_activation="sigmoid", **k),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("affine", ["weight and bias", "no bias", "neither"])
@pytest.mark.parametrize("make", NORMED.values(), ids=NORMED)
def test_layer_norm_and_fusion_change_no_result(make, affine, kind):
    net = make(norm=kind, dtype=torch.float64)
    for i, n in enumerate(net.norms):
        if affine == "no bias" and kind == "layer":  # the other kind has none
            net.norms[i] = nn.LayerNorm(n.normalized_shape, bias=False, dtype=torch.float64)
        if affine == "neither":
            net.norms[i] = type(n)(n.normalized_shape, eps=1e-3, elementwise_affine=False)
        for p in net.norms[i].parameters():
            nn.init.uniform_(p, 0.5, 1.5)
    check_ways(net)


def test_layer_norms_that_are_frozen_or_trained_alone():
    net, x, target = siren(norm="layer", fusion="network"), coordinates(), torch.zeros(50, 3, dtype=torch.float64)
    whole = dict(zip(dict(net.named_parameters()), grads_of(net, losses.mse(net, x, target)), strict=True))
    for frozen in ("norms", "net"):
        for name, p in net.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        with backends.use(engine()):
            for loss in (losses.mse(net, x, target), (net(x) - target).square().mean()):
                net.zero_grad()
                loss.backward()
                for name, p in net.named_parameters():
                    assert (p.grad is None) == name.startswith(frozen)
                    if p.grad is not None:
                        same(p.grad, whole[name], 100.0)


def test_layer_norm_under_transforms_compile_and_autocast():
    net, x = siren(norm="layer", residual=True), coordinates(4)
    expected = net(x)
    net.fusion = "auto"
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    same(compiled(x), expected, 100.0)
    for a, b in zip(grads_of(net, compiled(x).sum()), grads_of(net, expected.sum()), strict=True):
        same(a, b, 100.0)
    jacobian = torch.func.vmap(torch.func.jacrev(net))(x)
    y = net(x.requires_grad_())
    rows = torch.stack([torch.autograd.grad(y[:, c].sum(), x, retain_graph=True)[0] for c in range(3)], 1)
    same(jacobian, rows, 100.0)
    (tangent,) = torch.func.jvp(net, (x.detach(),), (torch.ones_like(x),))[1:]
    same(tangent, rows.sum(-1), 100.0)
    net = fi.SIREN(2, 32, 2, 3, omega=3.0, first_omega=3.0, norm="layer")
    x = torch.rand(50, 2)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 16 * UNIT[torch.bfloat16] * exact.abs().max()


def test_layer_norm_runs_whole_and_says_why_not():
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    x = torch.rand(64, 2)

    def net():
        return fi.SIREN(2, 32, 2, 3, norm="layer")

    assert "whole network [64, 2] -> 32 -> 32 -> 32 -> 3 torch.float32 (sine, identity, LayerNorm)" in (
        backends.explain(net(), x)
    )

    def hooked(n):
        n.norms[1].register_forward_hook(lambda *_: None)

    def replaced(n):
        n.norms[0] = nn.Sequential(nn.LayerNorm(32))

    def of_rows(n):
        n.norms[0] = nn.LayerNorm((64, 32))

    def subclass(n):
        n.norms[2] = type("Ours", (nn.LayerNorm,), {})(32)

    def of_another_type(n):
        n.norms[1].double()

    def of_another_device(n):
        n.norms[1].to("meta")

    def of_a_negative_eps(n):
        n.norms[0].eps = -1e-5

    def of_the_inputs_eps(n):
        n.norms[0] = nn.RMSNorm(32)

    for change, reason in (
        (hooked, "layer 1: its LayerNorm has hooks"),
        (of_the_inputs_eps, "layer 0: its RMSNorm has eps=None"),
        (replaced, "layer 0: Sequential behind it is no nn.LayerNorm or nn.RMSNorm"),
        (of_rows, r"layer 0: its LayerNorm is over \(64, 32\), its output has 32 columns"),
        (subclass, "layer 2: Ours behind it is no nn.LayerNorm or nn.RMSNorm"),
        (of_another_type, r"layer 1: its LayerNorm has torch\.float64, the input torch\.float32"),
        (of_another_device, "layer 1: its LayerNorm is not on the input's device, cpu"),
        (of_a_negative_eps, "layer 0: its LayerNorm has eps=-1e-05"),
    ):
        changed = net()
        change(changed)
        changed.fusion = "network"
        with pytest.raises(RuntimeError, match=f"fusion='network': {reason}"):
            changed(x)
        with pytest.raises(RuntimeError, match=reason):
            losses.mse(changed, x, torch.zeros(64, 3))
        changed.fusion = "auto"
        if change not in (of_another_type, of_another_device):  # which PyTorch refuses, too
            assert backends.explain(changed, x).startswith(f"layer by layer: {reason}".replace("\\", ""))
    seen = []
    changed = net()
    changed.norms[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    changed(x)
    assert seen == [(64, 32)]


def test_norms_of_wrong_sizes_are_refused_by_the_operation():
    layers, x = network("sine"), torch.randn(5, 2, dtype=torch.float64)
    norms = with_norms(layers)
    norms[1] = Norm("layer", torch.ones(3, dtype=torch.float64), None, 1e-5)
    reason = op.why_not(x, joined(layers, (), norms))[2]
    assert reason == "layer 1: its LayerNorm has [3] elements, its output 16 columns"
    if engine() == "cpu":
        with pytest.raises(ValueError, match=r"norm's weight of layer 1: expected \[16\]"):
            run_whole(x, layers, op.Decision("cpu", "ieee", ""), True, (), norms)
        o = op.Operands(layers)
        mlp = torch.ops.fused_inr_native.mlp
        with pytest.raises(ValueError, match="tensors: expected those of every layer, got 10"):
            mlp(x, [*o.tensors[:-1]], o.spec.words, o.spec.numbers, False)
        with pytest.raises(ValueError, match="tensors, numbers: expected 11 and 3 for these words, got 12 and 3"):
            mlp(x, [*o.tensors, None], o.spec.words, o.spec.numbers, False)
        with pytest.raises(ValueError, match="expected skip, layernorm or rmsnorm behind 'sine', got 'batchnorm'"):
            mlp(x, o.tensors, ["sine batchnorm", *o.spec.words[1:]], o.spec.numbers, False)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_fake_tensors_of_networks_with_norms(dtype, precision, kind):
    layers, x = network("sine", dtype), torch.randn(20, 2).to(dtype)
    norms = with_norms(layers, "weight", kind=kind)
    o = op.Operands(joined(layers, (), norms))
    operands = (o.tensors, o.spec.words, o.spec.numbers)
    g = torch.randn(20, 3).to(dtype)
    checked = ("test_schema", "test_faketensor")
    torch.library.opcheck(raw.mlp, (x, *operands, engine(), precision, False), test_utils=checked)
    for needs in ([True] * 5, [False, True, False, False, True], [True, False, True, True, False]):
        torch.library.opcheck(raw.mlp_backward, (g, x, *operands, None, engine(), precision, needs), test_utils=checked)
        arguments = (x, g, None, *operands, "squared_error", [], 0.5, engine(), precision, needs)
        torch.library.opcheck(raw.mlp_loss, arguments, test_utils=checked)
