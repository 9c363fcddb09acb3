"""Whole networks as one operation: against float64, against the layers, in every way to train, at every order."""

import pytest
import sympy
import torch
from linear_act_oracle import eager_act, spread
from tolerances import UNIT, tolerance
from torch import nn

import fused_inr as fi
from fused_inr import activations, backends, losses
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


def network(name: str, dtype=torch.float64, widths=WIDTHS, out_features: int = 3, **kwargs) -> list[op.Layer]:
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
        layers.append((weight.to(dtype), bias.to(dtype), activation))
        columns = n * activation.outputs
    return layers


def convert(layers, dtype):
    return [(w.to(dtype), None if b is None else b.to(dtype), a) for w, b, a in layers]


def plain(x, layers):
    """Eager PyTorch, by formulas written by hand."""
    for weight, bias, activation in layers:
        z = x @ weight.mT
        x = eager_act(activation, z if bias is None else z + bias)
    return x


def leaves(x, layers):
    """A copy whose tensors require gradients, and those tensors."""
    x = x.detach().clone().requires_grad_()
    layers = [
        (w.detach().clone().requires_grad_(), None if b is None else b.detach().clone().requires_grad_(), a)
        for w, b, a in layers
    ]
    return x, layers, [x, *(w for w, _, _ in layers), *(b for _, b, _ in layers if b is not None)]


def gradients(function, x, layers, *args):
    x, layers, wanted = leaves(x, layers)
    y = function(x, layers, *args)
    return y.detach(), torch.autograd.grad(y, wanted, torch.cos(y.detach()), allow_unused=True)


def whole(x, layers, save=True, backend=None):
    return op.network(x, layers, backend or engine(), "ieee", save)


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
def test_half_types_keep_float32_between_the_layers(dtype):
    layers, x = network("sine", dtype), torch.randn(77, 2).to(dtype)
    exact = convert(layers, torch.float64)
    truth, expected = gradients(plain, x.double(), exact)
    y, grads = gradients(whole, x, layers)
    assert y.dtype == dtype
    # rounded once, at the end: one ulp of the stored type, and what float32 makes of the rest
    assert (y.double() - truth).abs().max() <= 1.01 * UNIT[dtype] * truth.abs().max()
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
        layers.append((weight, None, activation))
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
    for weight, bias, activation in network(name):
        if activation.name != "identity":
            n = weight.shape[0] // activation.branches
            shape = (n,) if per_feature else ()
            values = {p: v * (1 + 0.1 * torch.rand(shape, dtype=torch.float64)) for p, v in activation.params.items()}
            activation = map(**{p: v.requires_grad_() for p, v in values.items()})
        layers.append((weight, bias, activation))
    params = [t for _, _, a in layers for t in a.tensors if t is not None]
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
    tensors, constants = op._operands(layers)
    keys = [a.map.key for _, _, a in layers]
    weights, biases, params = tensors[:4], tensors[4:8], tensors[8:]
    y, saved = raw.mlp(x, weights, biases, params, constants, keys, [], [], [], engine(), "ieee", False)
    assert saved.numel() == 0
    out = raw.mlp_backward(
        y, x, weights, biases, params, constants, keys, [], [], [], None, engine(), "ieee",
        [False, True, False, False, False],
    )  # fmt: skip
    assert [t.numel() > 0 for t in out] == [False, *[True] * 4, *[False] * 4, *[False] * 4]


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
        again = [(w, b, a) for w, b, (_, _, a) in zip(tensors[1 : 1 + n], tensors[1 + n :], layers, strict=True)]
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


def siren(**kwargs):
    return fi.SIREN(2, 32, 2, 3, dtype=torch.float64, **kwargs)


def coordinates(rows: int = 50):
    return torch.rand(rows, 2, dtype=torch.float64) * 2 - 1


def grads_of(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


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


def test_the_choice_can_be_asked():
    if engine() != "cpu":
        pytest.skip("needs the native engine")
    net, x = siren(), coordinates()
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
        assert "layer by layer: plain PyTorch" in backends.explain(siren(), x.detach())


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
    net, x = siren(), coordinates()
    seen = []
    net.net[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    net(x)
    assert seen == [(50, 32)]


def test_a_replaced_layer_runs():
    net, x = siren(), coordinates()
    before = net(x)
    net.net[1] = nn.Sequential(net.net[1], nn.Tanh())
    assert not torch.allclose(net(x), before)


def test_wrong_shapes_raise_as_the_layers_do():
    with pytest.raises(ValueError, match="x: its last dimension is 3"):
        siren()(torch.rand(5, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="dtype"):
        siren()(torch.rand(5, 2))


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

THEIRS = {
    "mse": (losses.mse, nn.functional.mse_loss),
    "l1": (losses.l1, nn.functional.l1_loss),
    "huber": (
        lambda *a, **k: losses.huber(*a, delta=0.3, **k),
        lambda *a, **k: nn.functional.huber_loss(*a, delta=0.3, **k),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("fusion", ["auto", "layers"])
def test_losses_are_those_of_pytorch(name, reduction, fusion):
    ours, theirs = THEIRS[name]
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
    net, x = siren(), coordinates()
    target = torch.randn(50, 3, dtype=torch.float64)

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
    for name in (*NAMES, "squared_error", "absolute_error", "huber_error"):
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
    return op.network(x, layers, engine(), "ieee", save, skips)


def square(name: str, dtype=torch.float64, columns: int = 21, depth: int = 4):
    """Layers from `columns` to `columns`, all but the last of one activation; skips around some."""
    outputs = activations.get(name).outputs
    layers = network(name, dtype, widths=(columns,) * depth)
    first = layers[0][0].shape[0]
    layers[0] = ((torch.randn(first, outputs * columns, dtype=torch.float64) * 0.2).to(dtype), *layers[0][1:])
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
    criterion = op.Criterion("squared_error", (), 0.5)
    results = []
    for run in (
        lambda x, layers: (plain_with_skips(x, layers, skips) - target).square().sum() / 2,
        lambda x, layers: op.network_loss(x, target, None, layers, criterion, engine(), "ieee", skips),
        lambda x, layers: op.network_loss(x, target, None, layers, criterion, "reference", "ieee", skips),
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
        again = [(w, b, a) for w, b, (_, _, a) in zip(tensors[1 : 1 + n], tensors[1 + n :], layers, strict=True)]
        return op.network(tensors[0], again, engine(), "ieee", True, skips)

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
    assert "needs an activation" in op.why_not(x, layers, (True, False, False, False))[2]
    if engine() == "cpu":
        with pytest.raises(ValueError, match="as many columns"):
            op.network(x, layers, "cpu", "ieee", True, (True, False, False, False))
