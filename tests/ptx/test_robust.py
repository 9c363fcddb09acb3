"""Kernels where the hardware does as badly as it may: approximations off by all that is documented, sums of tensor
cores cut instead of rounded, products and sums contracted, warps in another order."""

import pytest
import torch
from fused_inr.bench import ptx
from fused_inr.bench.cases import Case, Work
from fused_inr.bench.ptx import Options

from .test_layers import NARROW_K, TAILS, assert_within_bounds

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

WORST = [
    Options(errors="up"),
    Options(errors="down"),
    Options(errors="either"),
    Options(cut_sums=True),
    Options(errors="either", cut_sums=True),
    Options(contract=True),
]


def name_of(options: Options) -> str:
    default = Options()
    changed = {k: v for k, v in vars(options).items() if v != getattr(default, k)}
    return " ".join(f"{k}={v}" for k, v in changed.items())


@pytest.mark.parametrize("options", WORST, ids=name_of)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["sine", "split", "gaussian", "complex_gabor"])
def test_layers_stay_within_their_bounds(name, precision, options):
    for capability in (80, 90):
        with ptx.emulated(capability, options) as device:
            assert_within_bounds(name, precision, TAILS, NARROW_K)
        device.check()


@pytest.mark.parametrize("options", WORST, ids=name_of)
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("way", ["default", "one-pass"])
def test_networks_stay_as_close_as_eager(way, precision, options):
    for capability, width in ((80, 32), (80, 64), (90, 64), (90, 128)):
        with ptx.emulated(capability, options) as device, ptx.few_programs(1):
            Work(Case("network", "training", width=width, rows=293, precision=precision, way=way)).check()
        device.check()


def outcome(capability: int, case: Case, order: str):
    with ptx.emulated(capability, Options(order=order)) as device, ptx.few_programs(2):
        return Work(case).outcome("fused"), device.launches


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
