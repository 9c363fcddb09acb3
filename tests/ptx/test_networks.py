"""Whole networks on an emulated device, each way to train, as close to float64 as eager PyTorch; no fault."""

import pytest
from fused_inr.bench import ptx
from fused_inr.bench.cases import Case, Work

STEPS = (("inference", "default"), ("training", "default"), ("training", "recompute"), ("training", "one-pass"))


@pytest.mark.parametrize("gpu", [80, 90], indirect=True)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize(("step", "way"), STEPS)
def test_a_network_is_as_close_to_float64_as_eager(gpu, step, way, precision, width):
    with ptx.few_programs(2):
        work = Work(Case("network", step, width=width, rows=300, precision=precision, way=way))
        work.check()
