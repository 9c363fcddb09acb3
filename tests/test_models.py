"""MLP, SIREN, SplitNet and FourierFeatures."""

import copy
import functools
import gc
import math
import pickle
import weakref

import layer_oracle
import pytest
import torch
from torch import nn

import fused_inr as fi
from fused_inr import backends
from fused_inr.encodings import FourierFeatures
from fused_inr.layers import FusedLinear
from fused_inr.network import Layer, Norm


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def follow(net, formulas, x):
    """The network in float64 and the bound of its error, through `layer_oracle.oracle` layer by layer."""
    error = 0.0
    for layer, (formula, slope) in zip(net.net, formulas):
        x, error = layer_oracle.oracle(layer, formula, slope, x, error)
    return x, error


# -- structure


def test_hidden_layers_counts_the_hidden_to_hidden_layers():
    for net in (fi.SIREN(2, 8, 3, 3), fi.SplitNet(2, 8, 3, 3), fi.MLP(2, 8, 3, 3)):
        assert [layer.in_features for layer in net.net] == [2, 8, 8, 8, 8]
        assert [layer.out_features for layer in net.net] == [8, 8, 8, 8, 3]
        assert net(torch.zeros(4, 5, 2)).shape == (4, 5, 3)
    assert len(fi.MLP(2, 8, 0, 3).net) == 2


def test_parameter_counts_of_the_radiance_field_decoders():
    # thesis, table 6.2: decoder input 150, output 3
    assert parameters(fi.MLP(150, 128, 1, 3, activation="relu")) == 36_227
    assert parameters(fi.SplitNet(150, 45, 1, 3)) == 35_598
    assert parameters(fi.SplitNet(150, 42, 1, 3)) == 32_721


def test_state_dict_keys():
    assert list(fi.SIREN(2, 8, 1, 3).state_dict()) == [
        "net.0.linear.weight",
        "net.0.linear.bias",
        "net.1.linear.weight",
        "net.1.linear.bias",
        "net.2.weight",
        "net.2.bias",
    ]
    assert fi.SplitNet(2, 8, 1, 3).state_dict()["net.1.linear.weight"].shape == (32, 8)
    assert list(fi.MLP(2, 8, 0, 3).state_dict()) == ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"]
    assert "net.2.linear.weight" in fi.SIREN(2, 8, 1, 3, outermost_linear=False).state_dict()


def test_several_outputs_widen_the_next_layer():
    net = fi.MLP(2, 8, 1, 3, activation="fourier")
    assert [layer.in_features for layer in net.net] == [2, 16, 16]
    assert net(torch.zeros(4, 2)).shape == (4, 3)
    net = fi.MLP(2, 8, 1, 6, activation="fourier", outermost_linear=False)
    assert net.net[-1].out_features == 3
    assert net(torch.zeros(4, 2)).shape == (4, 6)
    with pytest.raises(ValueError, match="multiple of the activation's 2 outputs"):
        fi.MLP(2, 8, 1, 3, activation="fourier", outermost_linear=False)


# -- SIREN and the notebook's


@pytest.mark.parametrize("outermost_linear", [True, False])
def test_siren_and_the_notebook_agree(outermost_linear):
    arguments = {"outermost_linear": outermost_linear, "first_omega_0": 20.0, "hidden_omega_0": 15.0}
    torch.manual_seed(0)
    notebook = layer_oracle.NotebookSiren(2, 16, 2, 3, **arguments)
    torch.manual_seed(0)
    net = fi.SIREN(2, 16, 2, 3, **arguments)
    # the same seed gives the same initial network, bit for bit
    assert list(net.state_dict()) == list(notebook.state_dict())
    for key, value in notebook.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key
    # checkpoints load both ways
    other = layer_oracle.NotebookSiren(2, 16, 2, 3, **arguments)
    net.load_state_dict(other.state_dict())
    notebook.load_state_dict(net.state_dict())
    hidden = (lambda z: torch.sin(15 * z), 15.0)
    last = (lambda z: z, 1.0) if outermost_linear else hidden
    formulas = [(lambda z: torch.sin(20 * z), 20.0), hidden, hidden, last]
    x = torch.rand(50, 2) * 2 - 1
    expected, bound = follow(net, formulas, x)
    assert ((net(x) - expected).abs() <= bound).all()
    assert ((notebook(x) - expected).abs() <= bound).all()
    # in float64 the bound is far below anything a wrong formula could hide under
    net, x = net.double(), x.double()
    expected, bound = follow(net, formulas, x)
    assert bound.max() < 1e-9
    assert ((net(x) - expected).abs() <= bound).all()


def test_siren_init_constants():
    net = fi.SIREN(2, 512, 1, 64, omega=20.0, first_omega=50.0, flic=2.0, initc=40.0)
    bounds = [2 / 2, math.sqrt(40 / 512) / 20, math.sqrt(40 / 512) / 20]
    for layer, bound in zip(net.net, bounds):
        assert 0.99 * bound < layer.weight.abs().max().item() <= bound
    assert (net.net[0].omega, net.net[1].omega) == (50, 20)


def test_siren_preactivations_have_the_published_spread():
    # thesis, table 3.3: std of omega z 14.14 in the first layer, 1.46 to 1.51 in the others, activations 0.71 to 0.72
    torch.manual_seed(1)
    net = fi.SIREN(2, 256, 3, 3)
    x = torch.rand(4096, 2) * 2 - 1
    with torch.no_grad():
        for i, layer in enumerate(list(net.net)[:-1]):
            z = 30 * layer.linear(x)
            x = layer(x)
            if i == 0:
                # 256 units: the std over units has a standard error near 4 %
                assert z.std().item() == pytest.approx(14.14, rel=0.12)
            else:
                # the weights give variance 1, the default bias 30^2 / (3 256)
                assert z.std().item() == pytest.approx(math.sqrt(1 + 900 / 768), rel=0.08)
            assert x.std().item() == pytest.approx(0.71, abs=0.03)


def test_mlp_with_siren_init_is_a_siren():
    torch.manual_seed(2)
    siren = fi.SIREN(2, 64, 2, 3, omega=25.0, first_omega=25.0)
    mlp = fi.MLP(2, 64, 2, 3, activation=fi.activations.sine(omega=25.0), init="siren")
    for ours, theirs in zip(mlp.net, siren.net):
        bound = theirs.weight.abs().max()
        assert ours.weight.abs().max().item() == pytest.approx(bound.item(), rel=0.1)


def test_siren_accepts_the_older_names():
    net = fi.SIREN(2, 8, 1, 3, first_omega_0=7.0, hidden_omega_0=9.0)
    assert (net.net[0].omega_0, net.net[1].omega_0) == (7, 9)
    assert fi.SIREN(2, 8, 1, 3, omega_0=9.0).net[1].omega == 9


# -- other networks


@pytest.mark.parametrize("name", layer_oracle.CASES)
def test_mlp_is_the_composition_of_its_layers(name):
    make, formula, slope = layer_oracle.CASES[name]
    torch.manual_seed(3)
    net = fi.MLP(2, 6, 1, 3, activation=make(), dtype=torch.float64)
    x = torch.rand(20, 2, dtype=torch.float64)
    expected, bound = follow(net, [(formula, slope)] * 2 + [(lambda z: z, 1.0)], x)
    assert ((net(x) - expected).abs() <= bound).all()


def test_splitnet_as_published():
    encoding = FourierFeatures(2, 128, std=10.0)
    net = fi.SplitNet(2, 16, 1, 3, outermost_linear=False, encoding=encoding)
    assert net.net[0].in_features == 256
    assert net.net[-1].activation.name == "split"
    assert net(torch.rand(9, 2)).shape == (9, 3)
    assert "encoding.frequencies" in net.state_dict()


def test_splitnet_starts_with_unit_preactivations_in_every_branch():
    torch.manual_seed(4)
    net = fi.SplitNet(2, 256, 3, 1, encoding=FourierFeatures(2, 128, std=10.0))
    x = net.encoding(torch.rand(4096, 2) * 2 - 1)
    with torch.no_grad():
        for layer in list(net.net)[:-1]:
            for z in layer.linear(x).chunk(4, -1):
                # products of four branches have heavy tails, so widths of 256 leave a spread of some percent a layer
                assert 0.75 < z.std().item() < 1.3
            x = layer(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: fi.SIREN(2, 8, 1, 3, **kw),
        lambda **kw: fi.SIREN(2, 8, 1, 3, init="vi3nr", learnable=True, per_feature=True, **kw),
        lambda **kw: fi.SplitNet(2, 8, 1, 3, learnable="m", encoding=FourierFeatures(2, 4), **kw),
        lambda **kw: fi.MLP(2, 8, 1, 3, activation=fi.activations.sinc(omega=1.0), init="vi3nr", **kw),
    ],
    ids=["siren", "siren vi3nr learnable", "splitnet", "mlp"],
)
class TestModule:
    def test_copy_pickle_and_state_dict(self, make):
        net, x = make(), torch.rand(5, 2)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(x), net(x))
            assert repr(twin) == repr(net)
        other = make()
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x), net(x))

    def test_reset_is_construction(self, make):
        torch.manual_seed(5)
        net = make()
        state = {k: v.clone() for k, v in net.state_dict().items()}
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1)
        torch.manual_seed(5)
        net.reset_parameters()
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())

    def test_meta_device(self, make):
        with torch.device("meta"):
            net = make()
        assert all(p.is_meta for p in net.parameters())
        torch.manual_seed(6)
        net.to_empty(device="cpu").reset_parameters()
        torch.manual_seed(6)
        twin = make()
        assert all(torch.equal(v, twin.state_dict()[k]) for k, v in net.state_dict().items())

    def test_dtype(self, make):
        net = make(dtype=torch.float64)
        assert all(p.dtype == torch.float64 for p in net.parameters())
        assert net(torch.rand(3, 2, dtype=torch.float64)).dtype == torch.float64

    def test_compiles_without_graph_breaks(self, make):
        net, x = make(), torch.rand(5, 2)
        torch._dynamo.reset()
        y = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(y, net(x))

    def test_trains(self, make):
        torch.manual_seed(7)
        net = make()
        x = torch.rand(128, 2) * 2 - 1
        target = torch.stack((x[:, 0], x[:, 1], x[:, 0] * x[:, 1]), -1)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        losses = []
        for _ in range(40):
            loss = (net(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(p.grad is not None for p in net.parameters())
        assert losses[-1] < 0.5 * losses[0]


def test_on_a_device_as_on_the_cpu(device):
    torch.manual_seed(8)
    net = fi.SIREN(2, 32, 2, 3)
    x = torch.rand(70, 2) * 2 - 1
    formulas = [(lambda z: torch.sin(30 * z), 30.0)] * 3 + [(lambda z: z, 1.0)]
    expected, bound = follow(net, formulas, x)
    y = net.to(device)(x.to(device))
    assert y.device.type == device.type
    assert ((y.cpu() - expected).abs() <= bound).all()
    net = fi.SplitNet(2, 8, 1, 3, learnable="m", encoding=FourierFeatures(2, 16, device=device), device=device)
    assert {p.device.type for p in net.parameters()} == {device.type}
    assert torch.equal(net.encoding.frequencies.cpu(), FourierFeatures(2, 16).frequencies)
    net(x.to(device)).sum().backward()
    assert net.net[0].m.grad.device.type == device.type


def test_layers_do_not_share_learnable_parameters():
    net = fi.MLP(2, 8, 2, 3, activation=fi.activations.sine(omega=3.0, learnable=True))
    assert len({id(net.net[i].omega) for i in range(3)}) == 3


# -- encodings


def test_fourier_features_are_their_formula():
    encoding = FourierFeatures(3, 16, std=2.0, seed=5)
    assert encoding.frequencies.std().item() == pytest.approx(2, rel=5 / math.sqrt(2 * 48))
    assert torch.equal(encoding.frequencies, FourierFeatures(3, 16, std=2.0, seed=5).frequencies)
    assert not torch.equal(encoding.frequencies, FourierFeatures(3, 16, std=2.0, seed=6).frequencies)
    x = torch.rand(4, 7, 3)
    angle = 2 * math.pi * (x.double() @ encoding.frequencies.double().T)
    expected = torch.cat((angle.cos(), angle.sin()), -1)
    # three products and sums, then a factor: at most 6 roundings of an angle of this magnitude
    magnitude = 2 * math.pi * (x.double().abs() @ encoding.frequencies.double().abs().T)
    bound = 6 * 2.0**-24 * torch.cat((magnitude, magnitude), -1) + 2.0**-23
    assert ((encoding(x).double() - expected).abs() <= bound).all()


def test_fourier_features_stay_float32():
    encoding = FourierFeatures(2, 16)
    x = torch.rand(9, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoding(x), FourierFeatures(2, 16)(x))
    for cast in (encoding.half(), encoding.bfloat16()):
        assert torch.equal(cast.frequencies, FourierFeatures(2, 16).frequencies)
    assert encoding(x.half()).dtype == torch.float16
    assert encoding.double().frequencies.dtype == torch.float64
    assert encoding(x.double()).dtype == torch.float64
    net = fi.MLP(2, 8, 1, 3, encoding=FourierFeatures(2, 16)).bfloat16()
    assert net.encoding.frequencies.dtype == torch.float32
    assert net(x.bfloat16()).dtype == torch.bfloat16


def test_fourier_features_have_gradients():
    encoding = FourierFeatures(2, 4, std=1.0).double()
    x = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(encoding, x)
    assert torch.autograd.gradgradcheck(encoding, x)


# -- bad arguments


class NoWidth(nn.Module):
    def forward(self, x):
        return x


BAD = [
    (lambda: fi.MLP(0, 8, 1, 3), ValueError, "in_features"),
    (lambda: fi.MLP(2, 8.0, 1, 3), TypeError, "hidden_features"),
    (lambda: fi.MLP(2, 8, -1, 3), ValueError, "hidden_layers"),
    (lambda: fi.MLP(2, 8, 1, None), TypeError, "out_features"),
    (lambda: fi.MLP(2, 8, 1, 3, activation="nope"), ValueError, "nope"),
    (lambda: fi.MLP(2, 8, 1, 3, init="nope"), ValueError, "init must be one of 'default', 'siren', 'vi3nr'"),
    (lambda: fi.MLP(2, 8, 1, 3, init=None), ValueError, "init"),
    (lambda: fi.MLP(2, 8, 1, 3, init="siren"), ValueError, "omega"),
    (lambda: fi.MLP(2, 8, 1, 3, outermost_linear=30.0), TypeError, "outermost_linear"),
    (lambda: fi.MLP(2, 8, 1, 3, encoding=torch.sin), TypeError, "encoding"),
    (lambda: fi.MLP(2, 8, 1, 3, encoding=NoWidth()), ValueError, "out_features"),
    (lambda: fi.MLP(2, 8, 1, 3, encoding=FourierFeatures(3)), ValueError, "encoding takes 3 coordinates"),
    (lambda: fi.MLP(2, 8, 1, 3, init="vi3nr", sigma_p=-1.0), ValueError, "sigma_p"),
    (lambda: fi.MLP(2, 8, 1, 3, init="vi3nr", first_sigma_p=math.nan), ValueError, "first_sigma_p"),
    (lambda: fi.SIREN(2, 8, 1, 3, True), TypeError, "omega"),
    (lambda: fi.SIREN(2, 8, 1, 3, omega=math.inf), ValueError, "omega"),
    (lambda: fi.SIREN(2, 8, 1, 3, omega=3.0, omega_0=3.0), TypeError, "omega_0"),
    (lambda: fi.SIREN(2, 8, 1, 3, omega_0=3.0, hidden_omega_0=3.0), TypeError, "omega_0"),
    (lambda: fi.SIREN(2, 8, 1, 3, first_omega="30"), TypeError, "first_omega"),
    (lambda: fi.SIREN(2, 8, 1, 3, flic=0), ValueError, "flic"),
    (lambda: fi.SIREN(2, 8, 1, 3, init="lsuv"), ValueError, "init"),
    (lambda: fi.SplitNet(2, 8, 1, 3, omegas=(1, 2, 3)), ValueError, "omegas"),
    (lambda: fi.SplitNet(2, 8, 1, 3, m=math.nan), ValueError, "m"),
    (lambda: fi.SplitNet(2, 8, 1, 3, init="siren"), ValueError, "init"),
    (lambda: FourierFeatures(2, 0), ValueError, "num_frequencies"),
    (lambda: FourierFeatures(2, 4, std=0.0), ValueError, "std"),
    (lambda: FourierFeatures(2, 4, seed=-1), ValueError, "seed"),
    (lambda: FourierFeatures(2, 4)(torch.zeros(3)), ValueError, "x must have shape"),
    (lambda: FourierFeatures(2, 4)(torch.zeros(3, 2, dtype=torch.int64)), TypeError, "x must be a floating-point"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_arguments_are_explained(i):
    make, error, words = BAD[i]
    with pytest.raises(error, match=words):
        make()


def test_init_may_be_a_function_of_the_network():
    x = torch.rand(100, 2) * 5
    net = fi.MLP(2, 8, 1, 3, activation="relu", init=functools.partial(fi.init.vi3nr_init_, sample_input=x))
    assert all(not layer.bias.any() for layer in net.net)
    assert isinstance(net.net[0], FusedLinear)


# -- output activation, skip connections, LayerNorm


def written_by_hand(net, x):
    """A SIREN with the options of this section, in plain PyTorch."""
    h = x
    for i, layer in enumerate(net.net):
        z = torch.nn.functional.linear(h, layer.weight, layer.bias)
        if i == len(net.net) - 1:
            return torch.sigmoid(z)
        y = torch.sin(30.0 * z)
        if net.norm:
            mean, variance = y.mean(-1, keepdim=True), y.var(-1, unbiased=False, keepdim=True)
            y = (y - mean) / (variance + 1e-5).sqrt() * net.norms[i].weight + net.norms[i].bias
        h = (y + h) / 2**0.5 if net.residual and i > 0 else y


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("fusion", ["auto", "layers"])
def test_residual_norm_and_output_activation(residual, norm, fusion):
    torch.manual_seed(0)
    net = fi.SIREN(
        2, 20, 3, 3, residual=residual, norm=norm, output_activation="sigmoid", fusion=fusion, dtype=torch.float64
    )
    if norm:
        for n in net.norms:
            torch.nn.init.uniform_(n.weight, 0.5, 1.5)
            torch.nn.init.normal_(n.bias)
    x = (torch.rand(40, 2, dtype=torch.float64) * 2 - 1).requires_grad_(fusion == "layers")
    parameters = [*net.parameters()] + ([x] if fusion == "layers" else [])
    results = []
    for run in (lambda x: net(x), lambda x: written_by_hand(net, x)):
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), parameters)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


def test_residual_and_norm_differentiate_twice():
    torch.manual_seed(0)
    net = fi.SIREN(2, 6, 2, 1, residual=True, norm="layer", omega=3.0, first_omega=3.0, dtype=torch.float64)
    x = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (x,))
    assert torch.autograd.gradgradcheck(net, (x,))


@pytest.mark.parametrize(
    "variant", [{"residual": True}, {"norm": "layer"}, {"norm": "rms"}, {"residual": True, "norm": "layer"}]
)
def test_residual_and_norm_run_whole_where_the_engine_is(variant):
    net, x = fi.SIREN(2, 32, 2, 3, **variant), torch.rand(64, 2)
    if backends.available()["cpu"][0]:
        said = backends.explain(net, x)
        found = [name for name in ("LayerNorm", "RMSNorm") if name in said]
        expected = {"layer": ["LayerNorm"], "rms": ["RMSNorm"], None: []}[variant.get("norm")]
        assert "whole network" in said and found == expected


def test_triton_and_cuda_take_skip_connections_and_norms_layer_by_layer():
    sine, x = fi.activations.get("sine"), torch.rand(4, 2)
    first, second = Layer(torch.rand(32, 2), None, sine), Layer(torch.rand(32, 32), None, sine)
    triton, cuda = backends.implementation("triton"), backends.implementation("cuda")
    with_skip = [first, second._replace(skip=True)]
    assert "skip connections" in triton.serves_network(x, with_skip, "ieee", "forward")
    for kind, name in (("layer", "LayerNorm"), ("rms", "RMSNorm")):
        normed = [first._replace(norm=Norm(kind, None, None, 1e-5)), second]
        assert name in triton.serves_network(x, normed, "ieee", "forward")
        assert "layer by layer" in cuda.serves_network(x, normed, "ieee", "forward")


def test_state_dict_with_norms_and_copies():
    net = fi.MLP(2, 8, 1, 3, "gaussian", residual=True, norm="layer")
    keys = list(net.state_dict())
    assert keys[:2] == ["net.0.weight", "net.0.bias"]
    assert keys[-4:] == ["norms.0.weight", "norms.0.bias", "norms.1.weight", "norms.1.bias"]
    other = copy.deepcopy(net)
    x = torch.rand(5, 2)
    with torch.no_grad():
        before = net(x)
        other.norms[0].weight.fill_(3.0)
        assert torch.equal(net(x), before) and not torch.equal(other(x), before)
        other.reset_parameters()
        assert torch.equal(other.norms[0].weight, torch.ones(8))
    assert "residual=True, norm='layer'" in repr(net)
    assert len(net.net[:2]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "batch"}, "norm"),
        ({"residual": 1}, "residual"),
        ({"output_activation": "sigmoid", "outermost_linear": False}, "outermost_linear"),
        ({"output_activation": "complex_gabor"}, "single output"),
    ],
)
def test_variants_that_cannot_be_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fi.MLP(2, 8, 1, 2, "sine", **arguments)


# -- networks that people change


class Shifted(fi.SIREN):
    def forward(self, coordinates):
        return super().forward(coordinates) + 4


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_loss_takes_the_forward_that_a_call_takes():
    x, target = torch.rand(20, 2), torch.rand(20, 3)

    def hooked():
        net = fi.SIREN(2, 32, 2, 3)
        net.net.register_forward_hook(lambda module, args, y: y + 1)
        return net

    def replaced():
        net = fi.SIREN(2, 32, 2, 3)
        net.net = Doubled(*net.net)
        return net

    def of_an_instance():
        net = fi.SIREN(2, 32, 2, 3)
        net.forward = lambda x: x.sum(-1, keepdim=True) * torch.ones(3)
        return net

    for make in (lambda: Shifted(2, 32, 2, 3), hooked, replaced, of_an_instance):
        net = make()
        expected = nn.functional.mse_loss(net(x), target)
        torch.testing.assert_close(fi.losses.mse(net, x, target), expected)
        if any(p.requires_grad for p in net.parameters()) and expected.requires_grad:
            for fused, plain in zip(
                torch.autograd.grad(fi.losses.mse(net, x, target), list(net.parameters())),
                torch.autograd.grad(expected, list(net.parameters())),
                strict=True,
            ):
                torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_a_container_with_a_forward_of_its_own_is_called():
    net, x = fi.SIREN(2, 32, 2, 3), torch.rand(20, 2)
    before = net(x)
    net.net = Doubled(*net.net)
    torch.testing.assert_close(net(x), 2 * before)
    assert "Doubled, with a forward of its own" in backends.explain(net, x)
    net.fusion = "network"
    with pytest.raises(RuntimeError, match="a forward of its own"):
        net(x)


@pytest.mark.parametrize("fusion", ["auto", "layers"])
def test_norms_that_were_replaced_compute(fusion):
    options = {"norm": "layer", "residual": True, "output_activation": "sigmoid"}
    net, x = fi.SIREN(2, 32, 2, 3, fusion=fusion, **options), torch.rand(20, 2)
    norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
    for norm in norms:
        nn.init.normal_(norm.weight)
    net.norms = norms
    torch.testing.assert_close(net(x), written_by_hand(net, x), rtol=1e-4, atol=1e-5)
    assert {f"norms.{i}.weight" for i in range(3)} < set(net.state_dict())
    copied = copy.deepcopy(net)
    copied.norms = nn.ModuleList(nn.Identity() for _ in range(3))
    assert not torch.allclose(copied(x), net(x))


@pytest.mark.parametrize("fusion", ["auto", "layers"])
def test_a_layer_taken_out_takes_its_skip_and_its_norm_along(fusion):
    options = {"norm": "layer", "residual": True, "output_activation": "sigmoid"}
    net, x = fi.SIREN(2, 32, 3, 3, fusion=fusion, **options), torch.rand(20, 2)
    for norm in net.norms:
        nn.init.normal_(norm.weight)
    kept = [net.norms[i].weight.detach().clone() for i in (0, 2, 3)]
    del net.net[1]
    assert net(x).shape == (20, 3) and net.net.skips == (False, True, True, False)
    for norm, weight in zip(net.norms, kept, strict=True):
        assert torch.equal(norm.weight, weight)
    torch.testing.assert_close(net(x), written_by_hand(net, x), rtol=1e-4, atol=1e-5)
    last = net.net.pop(-1)
    assert net(x).shape == (20, 32)
    net.net.append(last)
    with pytest.raises(RuntimeError, match=r"4 layers, but skips tells of 3: set net\.net\.skips"):
        net(x)
    net.net.skips = (False, True, True, False)
    assert net(x).shape == (20, 3)


def test_a_scalar_is_refused_at_the_door():
    for call in (fi.SIREN(2, 8, 1, 1), fi.SineLayer(2, 8), fi.FusedLinear(2, 8)):
        with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., K\], got a scalar"):
            call(torch.tensor(1.0))
    with pytest.raises(ValueError, match="scalar"):
        fi.losses.mse(fi.SIREN(2, 8, 1, 1), torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.parametrize("loss", fi.activations.registered_losses(), ids=lambda m: m.name)
def test_a_loss_of_nothing_is_pytorchs(loss):
    def theirs(y, target, reduction):
        each = loss.facts.eager(y, target, *loss.defaults.values())
        return {"mean": each.mean, "sum": each.sum, "none": lambda: each}[reduction]()

    net, x, target = fi.SIREN(2, 8, 1, 3), torch.zeros(0, 2), torch.zeros(0, 3)
    for reduction in ("mean", "sum", "none"):
        ours = getattr(fi.losses, loss.facts.public)(net, x, target, reduction=reduction)
        expected = theirs(net(x), target, reduction=reduction)
        torch.testing.assert_close(ours, expected, equal_nan=True)
        wanted = torch.autograd.grad(expected.sum(), list(net.parameters()), allow_unused=True)
        for a, b in zip(torch.autograd.grad(ours.sum(), list(net.parameters())), wanted, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("fusion", ["auto", "layers"])
def test_norms_that_were_deleted_compute_nothing(fusion):
    options = {"residual": True, "output_activation": "sigmoid"}
    net, x = fi.SIREN(2, 32, 2, 3, norm="layer", fusion=fusion, **options), torch.rand(20, 2)
    del net.norms
    net.norm = None
    torch.testing.assert_close(net(x), written_by_hand(net, x), rtol=1e-4, atol=1e-5)


def test_a_slice_of_a_chain_is_what_it_does():
    net, x = fi.SIREN(2, 32, 3, 3, norm="layer", residual=True), torch.rand(20, 2)
    for norm in net.norms:
        nn.init.normal_(norm.weight)
    torch.testing.assert_close(net.net[3:](net.net[:3](x)), net.net(x))
    for arithmetic in (lambda: net.net + net.net, lambda: net.net * 2, lambda: 2 * net.net):
        with pytest.raises(TypeError, match="insert, append or delete"):
            arithmetic()


@pytest.mark.parametrize("fusion", ["auto", "layers"])
def test_an_inserted_layer_has_no_skip_and_no_norm(fusion):
    net, x = fi.SIREN(2, 32, 2, 3, norm="layer", residual=True, fusion=fusion), torch.rand(20, 2)
    for norm in net.norms:
        nn.init.normal_(norm.weight)
    hidden, rest = net.net[:2], net.net[2:]
    extra = fi.SineLayer(32, 32, omega=3.0)
    expected = rest(extra(hidden(x)))
    net.net.insert(2, extra)
    assert net.net.skips == (False, True, False, True, False)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_skip_connection_between_widths_is_refused():
    net = fi.SIREN(2, 16, 2, 3, residual=True)
    net.net[1] = fi.FusedLinear(16, 1, activation="sine")
    with pytest.raises(ValueError, match=r"net\.1: a skip connection adds its input of shape \[4, 16\]"):
        net(torch.rand(4, 2))


def test_a_demanded_network_does_not_pass_a_forward_by():
    x, target = torch.rand(20, 2), torch.rand(20, 3)
    net = Shifted(2, 32, 2, 3, fusion="network")
    with pytest.raises(RuntimeError, match="Shifted has a forward of its own"):
        fi.losses.mse(net, x, target)
    assert bool(torch.isnan(fi.losses.mse(fi.SIREN(2, 8, 1, 3, fusion="network"), x[:0], target[:0])))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        fi.losses.mse(fi.SIREN(2, 32, 2, 3), x, target)
    finally:
        handle.remove()
    assert fi.SIREN in seen


# -- what is kept between calls


def changed(net: fi.SIREN, how: str) -> None:
    layer = net.net[1]
    with torch.no_grad():
        if how == "in place":
            layer.linear.weight.mul_(2)
        elif how == "data":
            layer.linear.weight.data = layer.linear.weight.data * 2
        elif how == "another parameter":
            layer.linear.weight = nn.Parameter(layer.linear.weight * 2)
        elif how == "another matrix":
            linear = nn.Linear(16, 16)
            layer.linear = linear
        elif how == "another layer":
            net.net[1] = FusedLinear(16, 16, activation="relu")
        elif how == "another activation":
            layer.activation = fi.activations.sine(omega=3.0)
        elif how == "no bias":
            layer.linear.bias = None
        elif how == "a hook":
            layer.register_forward_hook(lambda module, args, y: y + 1)
        elif how == "a hook on its matrix":
            layer.linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        elif how == "a hook everywhere":
            pass
        elif how == "a forward of its own":
            layer.forward = lambda x: x * 2
        elif how == "a parametrisation":
            nn.utils.parametrize.register_parametrization(layer.linear, "weight", TimesTwo())
        elif how == "a state":
            net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True)
        elif how == "a layer less":
            del net.net[1]
        elif how == "another container":
            net.net = nn.Sequential(*list(net.net)[:2], net.net[-1])


class TimesTwo(nn.Module):
    def forward(self, x):
        return 2 * x


CHANGES = (
    "in place", "data", "another parameter", "another matrix", "another layer",
    "a hook", "a hook on its matrix", "a forward of its own", "a parametrisation", "a state", "a layer less",
    "another container",
)  # fmt: skip


@pytest.mark.parametrize("how", CHANGES)
def test_a_network_that_was_changed_between_calls_computes_what_it_is_now(how):
    torch.manual_seed(0)
    net, x = fi.SIREN(2, 16, 2, 3), torch.rand(40, 2)
    before = net(x), fi.losses.mse(net, x, torch.zeros(40, 3))
    changed(net, how)
    y = net(x)
    with torch.no_grad():
        expected = x
        for layer in net.net:
            expected = layer(expected)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(y, before[0], atol=1e-3)
    torch.testing.assert_close(fi.losses.mse(net, x, torch.zeros(40, 3)), y.square().mean(), rtol=1e-4, atol=1e-5)


def test_a_network_is_read_once_and_forgotten_with_it():
    net, x = fi.SIREN(2, 16, 2, 3), torch.rand(40, 2)
    net(x)
    structure = net._structure()
    assert net._structure() is structure
    handle = net.net[0].register_forward_hook(lambda *_: None)
    assert net._structure() is not structure
    handle.remove()
    assert net._structure().operands is not None
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin._structure().operands.tensors[0] is twin.net[0].linear.weight
    assert net._structure().operands.tensors[0] is net.net[0].linear.weight
    # tensors that stand in for parameters do not outlive their call
    values = {name: p.detach() * 2 for name, p in net.named_parameters()}
    seen = weakref.ref(values["net.0.linear.weight"])
    torch.func.functional_call(net, values, (x,))
    del values
    gc.collect()
    assert seen() is None
    alive = weakref.ref(net)
    del net, twin, structure, handle
    gc.collect()
    assert alive() is None


def test_what_does_not_fit_is_said_under_vmap_too():
    net = fi.SIREN(2, 16, 1, 3)
    with pytest.raises(ValueError, match="takes 2 input features"):
        torch.func.vmap(net)(torch.rand(4, 3))
    with pytest.raises(TypeError, match="differs from x's"):
        torch.func.vmap(net)(torch.rand(4, 2).double())


def test_float64_goes_by_tiles_of_rows_in_plain_pytorch(monkeypatch):
    from fused_inr.ops import mlp

    if not backends.available()["cpu"][0]:
        pytest.skip("needs the native engine")
    monkeypatch.setattr(mlp, "_PLAIN_TILE", 16)
    monkeypatch.setattr(mlp, "_PLAIN_TILE_OF_A_THREAD", 16)
    for make in (
        functools.partial(fi.SIREN, 2, 16, 2, 3),
        functools.partial(fi.SplitNet, 2, 16, 2, 3, residual=True, norm="layer", learnable=True),
    ):
        net = make(dtype=torch.float64)
        x = torch.rand(3, 71, 2, dtype=torch.float64)
        assert "plain PyTorch" in backends.explain(net, x)
        results = []
        for way in ("auto", "layers"):
            net.fusion = way
            leaf = x.clone().requires_grad_()
            y = net(leaf)
            (gx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            second = torch.autograd.grad(gx.square().sum(), [leaf, *net.parameters()], allow_unused=True)
            results.append([y, gx, *second])
        for ours, theirs in zip(*results, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_that_were_differentiated_are_expected_again():
    from fused_inr.ops import mlp

    if not backends.available()["cpu"][0]:
        pytest.skip("needs the native engine")
    net, x = fi.SIREN(2, 16, 2, 3, omega=7.5), torch.rand(40, 2)

    def way():
        with torch.enable_grad():
            return net.whole_call(x)[1].way

    assert way() == "network"
    grads = torch.autograd.grad(net(x).square().mean(), list(net.parameters()), create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    whole = [p.grad.clone() for p in net.parameters()]
    ways = [way() for _ in range(mlp.History.LASTS + 1)]
    assert ways[0] == "plain" and ways[-1] == "network"
    grads = torch.autograd.grad(net(x).square().mean(), list(net.parameters()), create_graph=True)
    assert way() == "plain"
    net.zero_grad()
    again = torch.autograd.grad(net(x).square().mean(), list(net.parameters()), create_graph=True)
    sum(g.square().sum() for g in again).backward()
    for p, expected in zip(net.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)
    # many rows: layers, which are fused
    with torch.enable_grad():
        assert net.whole_call(torch.rand(20_000, 2))[1].way == "layers"
    with torch.no_grad():
        assert net.whole_call(x)[1].way == "network"
