"""FusedLinear and the named layers: parameters, initial values, output, learning, what nn.Module promises."""

import copy
import functools
import math
import pickle

import layer_oracle
import pytest
import torch
from tolerances import tolerance
from torch import nn
from torch.nn.utils import prune

import fused_inr as fi
from fused_inr.layers import FusedLayer

K, N = 5, 7


def named_layers() -> dict[str, tuple]:
    """name -> (layer, plain formula, sup abs f')."""
    return {
        "SineLayer": (fi.SineLayer(K, N, omega=20.0), lambda z: torch.sin(20 * z), 20.0),
        "GaussianLayer": (fi.GaussianLayer(K, N, sigma=0.3), lambda z: torch.exp(-(z**2) / (2 * 0.09)), 2.03),
        "GaussianLayer scale": (fi.GaussianLayer(K, N, scale=2.0), lambda z: torch.exp(-((2 * z) ** 2)), 1.72),
        "SincLayer": (fi.SincLayer(K, N, omega=3.0), lambda z: torch.sinc(3 * z / math.pi), 3 * 0.4363),
        "SplitLayer": (
            fi.SplitLayer(K, N, m=4.0, omegas=(1.0, 2.0, 3.0, 4.0)),
            lambda z: layer_oracle.split_formula(z, 4.0, (1.0, 2.0, 3.0, 4.0)),
            16.0,
        ),
    }


def every_layer() -> list[FusedLayer]:
    activation = fi.activations.sine(omega=3.0, learnable=True, per_feature=True)
    return [
        *(layer for layer, _, _ in named_layers().values()),
        fi.FusedLinear(K, N),
        fi.FusedLinear(K, N, bias=False, activation="relu"),
        fi.FusedLinear(K, N, activation=activation, init="siren"),
        fi.SplitLayer(K, N, learnable=("m", "w3")),
    ]


# -- value and gradient


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", layer_oracle.CASES)
def test_fused_linear_is_linear_and_activation(name, bias):
    make, formula, slope = layer_oracle.CASES[name]
    torch.manual_seed(0)
    layer = fi.FusedLinear(K, N, bias=bias, activation=make())
    x = torch.randn(3, 11, K)
    y = layer(x)
    assert y.shape == (3, 11, layer.output_features)
    expected, bound = layer_oracle.oracle(layer, formula, slope, x)
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", named_layers())
def test_named_layer_is_its_formula(name):
    torch.manual_seed(1)
    layer, formula, slope = named_layers()[name]
    x = torch.randn(13, K)
    expected, bound = layer_oracle.oracle(layer, formula, slope, x)
    assert ((layer(x).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", layer_oracle.CASES)
def test_gradients_are_those_of_linear_and_activation(name):
    make, formula, _ = layer_oracle.CASES[name]
    torch.manual_seed(2)
    layer = fi.FusedLinear(K, N, activation=make(), dtype=torch.float64)
    x = torch.randn(11, K, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(11, layer.output_features, dtype=torch.float64)
    inputs = (x, layer.weight, layer.bias)
    ours = torch.autograd.grad((layer(x) * cotangent).sum(), inputs)
    plain = torch.autograd.grad((formula(nn.functional.linear(*inputs)) * cotangent).sum(), inputs)
    for a, b in zip(ours, plain):
        near = tolerance("same arithmetic")
        torch.testing.assert_close(a, b, rtol=near, atol=near * b.abs().max().item())


def test_an_activation_with_two_outputs_widens_the_output():
    layer = fi.FusedLinear(K, N, activation="fourier")
    assert (layer.out_features, layer.output_features) == (N, 2 * N)
    assert layer.weight.shape == (N, K)
    assert layer(torch.zeros(2, K)).shape == (2, 2 * N)


# -- parameters and state dict


def test_fused_linear_has_the_state_dict_of_linear():
    ours, linear = fi.FusedLinear(K, N, activation="tanh"), nn.Linear(K, N)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in linear.state_dict().items()}
    linear.load_state_dict(ours.state_dict())
    assert torch.equal(linear.weight, ours.weight)
    ours.load_state_dict(nn.Linear(K, N).state_dict())
    assert [k for k, _ in fi.FusedLinear(K, N, bias=False).named_parameters()] == ["weight"]


@pytest.mark.parametrize("name", named_layers())
def test_named_layers_keep_their_matrix_in_linear(name):
    layer, _, _ = named_layers()[name]
    rows = layer.activation.branches * N
    shapes = {k: tuple(v.shape) for k, v in layer.state_dict().items()}
    assert shapes == {"linear.weight": (rows, K), "linear.bias": (rows,)}
    assert layer.weight is layer.linear.weight
    assert layer.bias is layer.linear.bias


def test_split_layer_has_the_order_of_the_thesis():
    layer = fi.SplitLayer(1, 1, bias=False, m=1.0)
    z = torch.tensor([0.3, -0.4, 0.5, 0.6])
    with torch.no_grad():
        layer.linear.weight.copy_(z[:, None])
    expected = math.tanh(0.3) / (1 + math.exp(0.4)) * math.sin(0.5) * math.cos(0.6)
    assert layer(torch.ones(1, 1)).item() == pytest.approx(expected, rel=1e-6)


def test_sine_layer_and_the_notebook_exchange_checkpoints():
    torch.manual_seed(3)
    notebook = layer_oracle.NotebookSineLayer(K, N, omega_0=12.0)
    layer = fi.SineLayer(K, N, omega_0=12.0)
    layer.load_state_dict(notebook.state_dict())
    x = torch.randn(9, K)
    _, bound = layer_oracle.oracle(layer, lambda z: torch.sin(12 * z), 12.0, x)
    assert ((layer(x) - notebook(x)).abs() <= 2 * bound).all()
    notebook.load_state_dict(fi.SineLayer(K, N).state_dict())


# -- initial values


def test_default_init_draws_what_linear_draws():
    torch.manual_seed(4)
    linear = nn.Linear(K, 4 * N)
    for make in (fi.FusedLinear, fi.SplitLayer):
        torch.manual_seed(4)
        layer = make(K, N, activation="split") if make is fi.FusedLinear else make(K, N)
        assert torch.equal(layer.weight, linear.weight)
        assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("is_first", [True, False])
def test_sine_layer_draws_what_the_notebook_draws(is_first):
    torch.manual_seed(5)
    notebook = layer_oracle.NotebookSineLayer(K, N, is_first=is_first, omega_0=25.0)
    torch.manual_seed(5)
    layer = fi.SineLayer(K, N, is_first=is_first, omega=25.0)
    assert torch.equal(layer.linear.weight, notebook.linear.weight)
    assert torch.equal(layer.linear.bias, notebook.linear.bias)


def test_siren_init_of_a_fused_linear_uses_its_omega():
    layer = fi.FusedLinear(600, 400, activation=fi.activations.sine(omega=15.0), init="siren")
    bound = math.sqrt(6 / 600) / 15
    assert 0.99 * bound < layer.weight.abs().max().item() <= bound
    with pytest.raises(ValueError, match="no parameter omega"):
        fi.FusedLinear(K, N, activation="relu", init="siren")


def test_flic_and_initc():
    layer = fi.SineLayer(400, 300, is_first=True, flic=2.0)
    assert 0.99 * 2 / 400 < layer.weight.abs().max().item() <= 2 / 400
    layer = fi.SineLayer(400, 300, omega=10.0, initc=40.0)
    bound = math.sqrt(40 / 400) / 10
    assert 0.99 * bound < layer.weight.abs().max().item() <= bound


def test_init_may_be_a_function_of_the_layer():
    seen = []
    layer = fi.FusedLinear(K, N, activation="relu", init=seen.append)
    assert seen == [layer]
    init = functools.partial(fi.init.vi3nr_init_, sigma_p=2.0, is_first=True, samples=1000)
    layer = fi.FusedLinear(K, 4000, activation="relu", init=init)
    assert not layer.bias.any()
    # W ~ U with Var(W) = 2^2 / (K / 3): 20,000 draws, standard error of the variance sqrt(0.8 / 20000) = 0.63 %
    assert layer.weight.var().item() == pytest.approx(12 / K, rel=5 * 0.0063)


def test_reset_parameters_returns_to_the_start():
    layer = fi.SineLayer(K, N, omega=11.0, learnable=True)
    torch.manual_seed(6)
    layer.reset_parameters()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(0.5)
    torch.manual_seed(6)
    layer.reset_parameters()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer.omega.item() == 11


# -- learnable parameters


def test_learnable_parameters_are_parameters_under_their_name():
    layer = fi.SineLayer(K, N, learnable=True)
    assert layer.omega.shape == ()
    assert isinstance(layer.omega, nn.Parameter)
    assert layer.omega_0 is layer.omega
    assert "omega" in layer.state_dict()
    layer = fi.SineLayer(K, N, learnable="omega", per_feature=True)
    assert layer.omega.shape == (N,)
    layer = fi.SplitLayer(K, N, learnable=("m", "w2"))
    assert sorted(k for k, _ in layer.named_parameters()) == ["linear.bias", "linear.weight", "m", "w2"]
    layer = fi.GaussianLayer(K, N, scale=3.0, learnable=True)
    assert layer.scale.item() == 3


def test_constants_can_be_read_and_not_set():
    layer = fi.SineLayer(K, N, omega=8.0)
    assert layer.omega == layer.omega_0 == 8
    with pytest.raises(AttributeError):
        layer.omega = 3.0


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("name", ["sine", "gaussian", "sinc", "split", "hosc", "softplus"])
def test_learnable_parameters_get_the_gradients_of_plain_pytorch(name, per_feature):
    torch.manual_seed(7)
    layer = fi.FusedLinear(
        K, N, activation=getattr(fi.activations, name)(learnable=True, per_feature=per_feature), dtype=torch.float64
    )
    x = torch.randn(9, K, dtype=torch.float64)
    cotangent = torch.randn(9, N, dtype=torch.float64)
    names = layer.activation.param_names
    ours = torch.autograd.grad((layer(x) * cotangent).sum(), [getattr(layer, n) for n in names])
    # the same values as independent leaves, through PyTorch's autograd alone
    leaves = {n: getattr(layer, n).detach().clone().requires_grad_() for n in names}
    z = nn.functional.linear(x, layer.weight, layer.bias).detach()
    plain = torch.autograd.grad((layer.activation.with_params(**leaves)(z) * cotangent).sum(), list(leaves.values()))
    for a, b in zip(ours, plain):
        assert a.shape == ((N,) if per_feature else ())
        near = tolerance("same arithmetic")
        torch.testing.assert_close(a, b, rtol=near, atol=near * b.abs().max().item())


def test_learnable_parameters_train_and_come_back_from_a_state_dict():
    torch.manual_seed(8)
    layer = fi.SineLayer(2, 16, is_first=True, omega=5.0, learnable=True, per_feature=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.rand(64, 2), torch.rand(64, 16)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (layer.omega != 5).any()
    other = fi.SineLayer(2, 16, learnable=True, per_feature=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_a_constant_tensor_moves_with_the_layer_and_stays_out_of_the_state_dict():
    omega = torch.linspace(1, 2, N)
    layer = fi.SineLayer(K, N, omega=omega).double()
    assert layer.omega.dtype == torch.float64
    assert "omega" not in layer.state_dict()
    assert torch.equal(layer.omega, omega.double())
    x = torch.randn(4, K, dtype=torch.float64)
    expected = torch.sin(omega.double() * layer.linear(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


def test_a_formula_of_the_user_in_a_layer():
    import sympy

    chirp = fi.activations.define("chirp_layer", lambda z, omega: sympy.sin(omega * z**2), omega=2.0)
    layer = fi.FusedLinear(K, N, activation=chirp.map(learnable=True), init="vi3nr", dtype=torch.float64)
    x = torch.randn(4, K, dtype=torch.float64)
    expected = torch.sin(2 * nn.functional.linear(x, layer.weight, layer.bias) ** 2)
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=tolerance("same arithmetic"))
    assert "chirp_layer(omega=2" in repr(layer)


def test_a_parameter_that_hides_an_attribute_is_refused():
    activation = fi.activations.define("hides", lambda z, weight: weight * z, weight=2.0)
    learnable = activation.map(learnable=True)
    with pytest.raises(ValueError, match="'weight' has the name of an attribute"):
        fi.FusedLinear(K, N, activation=learnable)
    assert fi.FusedLinear(K, N, activation=activation).weight.shape == (N, K)


# -- what nn.Module promises


@pytest.mark.parametrize("i", range(len(every_layer())))
def test_copy_and_pickle(i):
    layer = every_layer()[i]
    x = torch.randn(3, K)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        with torch.no_grad():
            next(iter(twin.parameters())).zero_()
        assert next(iter(layer.parameters())).any()
        twin.reset_parameters()


@pytest.mark.parametrize("i", range(len(every_layer())))
def test_moving_and_casting(i):
    layer = every_layer()[i]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        layer = layer.to(dtype)
        assert all(p.dtype == dtype for p in layer.parameters())
        assert layer(torch.randn(3, K, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("i", range(len(every_layer())))
def test_meta_device_then_empty_then_reset(i):
    with torch.device("meta"):
        layer = every_layer()[i]
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(9)
    layer.reset_parameters()
    twin = every_layer()[i]
    torch.manual_seed(9)
    twin.reset_parameters()
    for key, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


def test_device_and_dtype_arguments():
    layer = fi.SineLayer(K, N, learnable=True, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())


def test_extra_repr_tells_what_it_is():
    shown = repr(fi.FusedLinear(K, N, bias=False, activation=fi.activations.gaussian(sigma=0.05), init="vi3nr"))
    assert "in_features=5, out_features=7, bias=False, activation=gaussian(sigma=0.05), init='vi3nr'" in shown
    shown = repr(fi.SineLayer(K, N, omega=30.0, is_first=True, flic=2.0))
    assert all(part in shown for part in ("sine(omega=30", "is_first=True", "flic=2"))
    assert "output_features=14" in repr(fi.FusedLinear(K, N, activation="fourier"))
    assert "learnable='m'" in repr(fi.SplitLayer(K, N, learnable="m"))


def test_functional_call_and_parametrisation():
    layer = fi.SineLayer(K, N, learnable=True)
    x = torch.randn(3, K)
    replaced = {"omega": torch.tensor(0.0), "linear.weight": layer.weight.detach(), "linear.bias": layer.bias.detach()}
    assert not torch.func.functional_call(layer, replaced, (x,)).any()
    plain = fi.FusedLinear(K, N)
    normed = nn.utils.parametrizations.weight_norm(plain)
    torch.testing.assert_close(normed(x), nn.functional.linear(x, normed.weight, normed.bias))


@pytest.mark.parametrize("learnable", [False, True])
def test_compiles_without_graph_breaks(learnable):
    layer = fi.SineLayer(K, N, learnable=learnable)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, K, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# -- bad arguments

BAD = [
    (lambda: fi.FusedLinear(0, 4), ValueError, "in_features"),
    (lambda: fi.FusedLinear(2.5, 4), TypeError, "in_features"),
    (lambda: fi.FusedLinear(True, 4), TypeError, "in_features"),
    (lambda: fi.FusedLinear(2, -1), ValueError, "out_features"),
    (lambda: fi.FusedLinear(2, "4"), TypeError, "out_features"),
    (lambda: fi.FusedLinear(2, 4, bias=1), TypeError, "bias"),
    (lambda: fi.FusedLinear(2, 4, True, "sinus"), ValueError, "sinus"),
    (lambda: fi.FusedLinear(2, 4, True, torch.sin), TypeError, "activation"),
    (lambda: fi.FusedLinear(2, 4, init="xavier"), ValueError, "init must be one of 'default', 'siren', 'vi3nr'"),
    (lambda: fi.FusedLinear(2, 4, init=3), ValueError, "init"),
    (lambda: fi.FusedLinear(2, 4, dtype=torch.int32), TypeError, "dtype"),
    (lambda: fi.SineLayer(2, 4, omega=30.0, omega_0=30.0), TypeError, "omega_0"),
    (lambda: fi.SineLayer(2, 4, omega=math.nan), ValueError, "omega"),
    (lambda: fi.SineLayer(2, 4, omega=0.0), ValueError, "omega"),
    (lambda: fi.SineLayer(2, 4, omega="30"), (TypeError, ValueError), "omega"),
    (lambda: fi.SineLayer(2, 4, is_first=30.0), TypeError, "is_first"),
    (lambda: fi.SineLayer(2, 4, flic=0.0), ValueError, "flic"),
    (lambda: fi.SineLayer(2, 4, initc=-6.0), ValueError, "initc"),
    (lambda: fi.SineLayer(2, 4, learnable="omegas"), ValueError, "learnable"),
    (lambda: fi.SineLayer(2, 4, omega=torch.ones(3)), ValueError, "out_features"),
    (lambda: fi.GaussianLayer(2, 4, sigma=1.0, scale=1.0), ValueError, "not both"),
    (lambda: fi.SplitLayer(2, 4, omegas=(1.0, 2.0)), ValueError, "omegas"),
    (lambda: fi.SincLayer(2, 4, omega=1.0, omega_0=2.0), TypeError, "omega_0"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_arguments_are_explained(i):
    make, error, words = BAD[i]
    with pytest.raises(error, match=words):
        make()


# -- what stands in the place of `linear`, or on it


class LowRank(nn.Linear):
    """An adapter: the frozen matrix and a product of two small ones."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.a, self.b = nn.Parameter(torch.randn(3, K)), nn.Parameter(torch.randn(base.out_features, 3))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


def replaced(layer):
    layer.linear = LowRank(layer.linear)


def pruned(layer):
    prune.l1_unstructured(layer.linear, "weight", amount=0.5)


def hooked(layer):
    layer.linear.register_forward_hook(lambda module, args, z: z + 0.25)


CHANGES = {
    "adapter": replaced,
    "weight_norm": lambda layer: nn.utils.weight_norm(layer.linear),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer.linear, n_power_iterations=10),
    "prune": pruned,
    "forward hook": hooked,
    "forward pre-hook": lambda layer: layer.linear.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "forward of the instance": lambda layer: setattr(layer.linear, "forward", lambda x: x @ torch.ones(K, N)),
    "quantize_dynamic": lambda layer: torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, inplace=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_the_linear_counts(change):
    layer, x = fi.SineLayer(K, N, omega=3.0), torch.randn(11, K)
    plain = layer(x)
    CHANGES[change](layer)
    if change == "weight_norm":
        with torch.no_grad():
            layer.linear.weight_g.mul_(0.5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.sin(3 * layer.linear(x)))
    assert not torch.allclose(layer(x), plain)
    assert "SineLayer in plain PyTorch: its linear" in fi.backends.explain(layer, x)
    net = fi.SIREN(K, N, 1, 2)
    CHANGES[change](net.net[0])
    assert fi.backends.explain(net, x).startswith("layer by layer: SineLayer: its linear")
    with torch.no_grad():
        h = torch.sin(30 * net.net[0].linear(x))
        torch.testing.assert_close(net(x), nn.Sequential(*net.net[1:])(h))


def test_hooks_that_come_and_go():
    layer, x = fi.SineLayer(K, N), torch.randn(11, K)
    before, seen = layer(x), []
    handle = layer.linear.register_forward_hook(lambda module, args, z: seen.append(z.shape))
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    assert seen == [(11, N)]
    handle.remove()
    assert torch.equal(layer(x), before) and len(seen) == 1


def test_weight_norm_trains_through_a_layer_and_a_loss():
    net, x, target = fi.SIREN(K, N, 1, 2, omega=3.0, first_omega=3.0), torch.randn(11, K), torch.randn(11, 2)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net.net[0].linear)
    fi.losses.mse(net, x, target).backward()
    found = net.net[0].linear.weight_g.grad.clone()
    net.zero_grad()
    nn.functional.mse_loss(net(x), target).backward()
    torch.testing.assert_close(found, net.net[0].linear.weight_g.grad)
    assert found.abs().max() > 0


def test_parametrised_weights_stay_operands():
    layer, x = fi.SineLayer(K, N, omega=3.0), torch.randn((1 << 14) // N + 1, K)  # not so few that PyTorch is faster
    nn.utils.parametrizations.weight_norm(layer.linear)
    assert "plain PyTorch" not in fi.backends.explain(layer, x)
    torch.testing.assert_close(layer(x), torch.sin(3 * layer.linear(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_fused_linear_is_no_nn_linear():
    """What replaces an nn.Linear by another one (quantisation, adapters) would drop the activation."""
    layer, x = fi.FusedLinear(K, N, activation="tanh"), torch.randn(11, K)
    assert not isinstance(layer, nn.Linear)
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})
    assert torch.equal(quantised(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_called_linear_is_followed_by_a_map_in_float32(dtype):
    layer, x = fi.SineLayer(K, N).to(dtype), torch.randn(11, K, dtype=dtype)
    hooked(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.sin(30 * layer.linear(x).float()).to(dtype))


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def test_an_adapter_without_a_weight_says_what_it_lacks():
    layer = fi.SineLayer(K, N)
    layer.linear = Wrapped(layer.linear)
    assert layer(torch.randn(3, K)).shape == (3, N)
    for call, error in (
        (layer.reset_parameters, TypeError),
        (lambda: fi.init.siren_init_(layer), ValueError),
        (lambda: fi.init.vi3nr_init_(layer), ValueError),
    ):
        with pytest.raises(error, match=r"its linear is Wrapped|linear of SineLayer is Wrapped"):
            call()
    fi.init.lsuv_init_(layer, torch.randn(500, K), 0.3)
    with torch.no_grad():
        assert layer.linear(torch.randn(5000, K)).std().item() == pytest.approx(0.3, rel=0.15)


def test_a_scalar_is_no_row_of_preactivations():
    with pytest.raises(ValueError, match="got a scalar"):
        fi.activations.sine()(torch.tensor(1.0))
    for call in (fi.init.lsuv_init_, fi.init.report):
        with pytest.raises(ValueError, match="got a scalar"):
            call(fi.SIREN(1, 8, 1, 1), torch.tensor(1.0))
