"""Kernels where the hardware does as badly as it may: approximations off by all that is documented, sums of tensor
cores cut instead of rounded, products and sums contracted, warps in another order."""

import pytest
import torch
from fused_inr.bench import bounds, ptx
from fused_inr.bench.cases import Case, Workload, matmul_precision
from fused_inr.bench.ptx import ExecutionOptions

import fused_inr as fi
from fused_inr.activations import registered
from fused_inr.functional import linear_act

from .layers import NARROW_K, TAILS, assert_within_bounds

WORST = [
    ExecutionOptions(errors="up"),
    ExecutionOptions(errors="down"),
    ExecutionOptions(errors="either"),
    ExecutionOptions(cut_sums=True),
    ExecutionOptions(errors="either", cut_sums=True),
    ExecutionOptions(contract=True),
]


def name_of(options: ExecutionOptions) -> str:
    default = ExecutionOptions()
    changed = {k: v for k, v in vars(options).items() if v != getattr(default, k)}
    return " ".join(f"{k}={v}" for k, v in changed.items())


#: pre-activations at which approximations of the special-function unit tell: tiny, small, of order 1, large
ARGUMENTS = torch.cat([t * s for s in (1, -1) for t in (10.0 ** torch.arange(-12, 2), torch.linspace(0, 4, 41))])
EVERY = [m.name for m in registered() if m.name != "identity"]
QUICK = ("sinc", "sine", "gaussian", "sigmoid")


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_values_of_every_activation_in_the_fast_mode(name, way):
    """z = x: one input, weights of 1 (in the branches' order 1, 1/2, ..), no bias."""
    act = fi.activations.get(name)
    x = ARGUMENTS[:, None].clone().requires_grad_()
    weight = (1.0 / torch.arange(1, act.branches + 1)).repeat_interleave(16)[:, None].requires_grad_()
    g = torch.ones(len(x), 16 * act.outputs)
    with ptx.emulated(80, ExecutionOptions(errors=way)) as device, matmul_precision("tf32"):
        y = linear_act(x, weight, None, act)
        gx, gw = torch.autograd.grad(y, (x, weight), g)
    device.check()
    exact, bound = bounds.layer_bounds(x, weight, None, act, g, "tf32")
    for tensor, value in (("y", y.detach()), ("gx", gx), ("gw", gw)):
        assert bounds.of_bound(value, exact[tensor], bound[tensor])["of_bound"] <= 1, tensor


@pytest.mark.slow
@pytest.mark.parametrize("options", WORST, ids=name_of)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["sine", "split", "gaussian", "complex_gabor"])
def test_layers_stay_within_their_bounds(name, precision, options):
    for capability in (80, 90):
        with ptx.emulated(capability, options) as device:
            assert_within_bounds(name, precision, TAILS, NARROW_K)
        device.check()


@pytest.mark.slow
@pytest.mark.parametrize("options", WORST, ids=name_of)
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("way", ["default", "one-pass"])
def test_networks_stay_as_close_as_eager(way, precision, options):
    for capability, width in ((80, 32), (80, 64), (90, 64), (90, 128)):
        with ptx.emulated(capability, options) as device, ptx.few_programs(1):
            Workload(Case("network", "training", width=width, rows=293, precision=precision, way=way)).check()
        device.check()


def outcome(capability: int, case: Case, order: str):
    with ptx.emulated(capability, ExecutionOptions(order=order)) as device, ptx.few_programs(2):
        return Workload(case).outcome("fused"), device.launches


@pytest.mark.slow
@pytest.mark.parametrize("order", ["descending", "shuffled"])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("way", ["default", "recompute", "one-pass"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_order_of_warps_changes_nothing(capability, way, precision, order):
    for width in (32, 64, 128):
        case = Case("network", "training", width=width, rows=420, precision=precision, way=way)
        expected, ascending = outcome(capability, case, "ascending")
        found, launches = outcome(capability, case, order)
        for name, value in expected.items():
            assert torch.equal(value, found[name]), (width, name)
        for before, launch in zip(ascending, launches):
            # a read that races without effect comes before the write now
            harmless = {(race.other, race.instruction) for race in before.harmless}
            assert not [str(f) for f in launch.faults if (f.instruction, f.other) not in harmless], width
