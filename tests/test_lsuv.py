"""LSUV: every branch at its target on real data, biases, and what is said where a target cannot be had."""

import pytest
import torch
from published import PublishedSplit
from torch import nn

import fused_inr as fi
from fused_inr.init import lsuv_init_
from fused_inr.init.walk import watch


def measured(net, x):
    """Standard deviation of each weight's pre-activation, branches apart where the layer is ours."""
    branches = {
        name: m.activation.branches for name, m in net.named_modules() if hasattr(m, "activation_with_parameters")
    }
    found = {}

    def visit(name, rows, weight, bias):
        z = nn.functional.linear(rows, weight, bias)
        found[name] = [p.double().std(correction=0).item() for p in z.chunk(branches.get(name, 1), -1)]
        return z

    with torch.no_grad(), watch(net, visit):
        net(x)
    return found


class Gated(nn.Module):
    """No chain: a skip, a norm and a gate."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate, self.c = nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(2, 32), nn.Linear(32, 3)
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = self.norm(h + torch.relu(self.b(h)))
        return self.c(h * torch.sigmoid(self.gate(x)))


@pytest.mark.parametrize("start", ["orthogonal", "keep"])
@pytest.mark.parametrize("bias", ["zero", "keep"])
def test_every_branch_reaches_its_target(start, bias):
    torch.manual_seed(0)
    x = torch.rand(1000, 2) * 2 - 1
    nets = [
        fi.SplitNet(2, 24, 2, 3, init="default", encoding=fi.encodings.FourierFeatures(2, 16), outermost_linear=False),
        fi.SIREN(2, 24, 1, 3),
        nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)),
        Gated(),
    ]
    for net in nets:
        biases = [p.clone() for n, p in net.named_parameters() if n.endswith("bias") and p.dim() == 1]
        assert lsuv_init_(net, x, 0.9, start=start, bias=bias) is net
        for name, stds in measured(net, x).items():
            assert stds == pytest.approx([0.9] * len(stds), rel=0.02), (name, start, bias)
        kept = [p for n, p in net.named_parameters() if n.endswith("bias") and p.dim() == 1]
        linear = [(a, b) for a, b in zip(biases, kept)]
        assert all(torch.equal(a, b) for a, b in linear) == (bias == "keep") or isinstance(net, Gated)


def test_targets_by_layer_and_by_branch():
    torch.manual_seed(1)
    x = torch.rand(500, 2) * 2 - 1
    net = fi.SplitNet(2, 32, 1, 2)
    last = net.net[2].weight.clone()
    lsuv_init_(net, x, [(1.0, 0.5, 2.0, 0.25), 0.7, None], tolerance=1e-4)
    found = list(measured(net, x).values())
    assert found[0] == pytest.approx([1.0, 0.5, 2.0, 0.25], rel=1e-3)
    assert found[1] == pytest.approx([0.7] * 4, rel=1e-3)
    assert torch.equal(last, net.net[2].weight)


def test_the_start_is_orthogonal_within_a_branch():
    net = fi.SplitNet(8, 8, 0, 2)
    lsuv_init_(net, torch.rand(200, 8), generator=torch.Generator().manual_seed(0))
    for block in net.net[0].weight.chunk(4):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.eye(8) * gram[0, 0], rtol=1e-4, atol=1e-4)
    again = lsuv_init_(fi.SplitNet(8, 8, 0, 2), torch.rand(200, 8), generator=torch.Generator().manual_seed(0))
    assert net.net[0].weight.shape == again.net[0].weight.shape


def test_a_published_split_layer_is_scaled_by_branch():
    net = nn.Sequential(PublishedSplit(2, 16), PublishedSplit(16, 1))
    x = torch.rand(300, 2)
    lsuv_init_(net, x, [(1.0, 2.0, 3.0, 4.0), 1.0])
    z = net[0].linear(x)
    assert [p.std().item() for p in z.chunk(4, -1)] == pytest.approx([1.0, 2.0, 3.0, 4.0], rel=0.02)


def test_a_layer_that_runs_twice_counts_once_and_modes_stay():
    class RunsTwice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(2, 16), nn.Linear(16, 16), nn.Dropout(0.5)

        def forward(self, x):
            return self.b(torch.tanh(self.b(self.drop(torch.tanh(self.a(x))))))

    net = RunsTwice().train()
    lsuv_init_(net, torch.rand(400, 2))
    assert net.training
    assert net.drop.training


WHOLE = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))


def plain():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("make", "x", "arguments", "words"),
    [
        (plain, WHOLE, {"target_std": 0.01, "bias": "keep"}, "0: its bias alone has standard deviation"),
        (plain, torch.zeros(9, 2), {}, "0: its input is constant 0"),
        (lambda: nn.Sequential(nn.Linear(2, 8), nn.Threshold(9.0, 0.0), nn.Linear(8, 2)), WHOLE, {}, "2: its input is"),
        (plain, WHOLE, {"iterations": 1}, r"0, branch 0: standard deviation .* after 1 iterations"),
    ],
    ids=["bias", "zeros", "dead", "iterations"],
)
def test_what_cannot_be_reached_names_the_layer_and_changes_nothing(make, x, arguments, words):
    net = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=words):
        lsuv_init_(net, x, **arguments)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


BAD = [
    (lambda: lsuv_init_(3, WHOLE), TypeError, "module must be"),
    (lambda: lsuv_init_(plain(), [1.0, 2.0]), TypeError, "sample_input"),
    (lambda: lsuv_init_(plain(), torch.zeros(0, 2)), ValueError, "sample_input"),
    (lambda: lsuv_init_(plain(), torch.full((3, 2), float("nan"))), ValueError, "sample_input"),
    (lambda: lsuv_init_(plain(), WHOLE, 0.0), ValueError, "target_std"),
    (lambda: lsuv_init_(plain(), WHOLE, [1.0]), ValueError, r"target_std must have one entry a layer, 2 \(0, 2\)"),
    (lambda: lsuv_init_(plain(), WHOLE, [1.0, (1.0, 2.0)]), ValueError, "2 has 1 branches"),
    (lambda: lsuv_init_(plain(), WHOLE, tolerance=0.0), ValueError, "tolerance"),
    (lambda: lsuv_init_(plain(), WHOLE, iterations=0), ValueError, "iterations"),
    (lambda: lsuv_init_(plain(), WHOLE, start="zeros"), ValueError, "start"),
    (lambda: lsuv_init_(plain(), WHOLE, bias="half"), ValueError, "bias"),
    (lambda: lsuv_init_(nn.ReLU(), WHOLE), ValueError, "computes no product"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_input_is_explained(i):
    call, error, words = BAD[i]
    with pytest.raises(error, match=words):
        call()


def test_a_sample_of_another_width_is_explained():
    net = fi.SIREN(2, 16, 1, 1)
    before = [p.clone() for p in net.parameters()]
    for call in (fi.init.lsuv_init_, fi.init.report):
        with pytest.raises(ValueError, match=r"sample_input: net\.0\S* takes 2 features, got \(5, 3\)"):
            call(net, torch.rand(5, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
