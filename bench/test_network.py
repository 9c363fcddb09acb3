"""Whole networks, against eager PyTorch and torch.compile: `pytest bench/test_network.py` (see `suite.py`)."""

import pytest
from fused_inr.bench import suite
from fused_inr.bench.cases import STEPS, Case


def network(step, activation="sine", width=128, rows=8192, precision="ieee") -> Case:
    return Case("network", step, activation, width, rows, precision)


CASES = [
    *((network(step, "sine"), True) for step in STEPS),
    *((network(step, "split", rows=2048), False) for step in STEPS),
    *((network("training", activation), False) for activation in ("gaussian", "sinc", "relu")),
    *((network("training", width=width), False) for width in (32, 256)),
    (network("training", width=64, rows=1024), False),
    *((network(step, precision="bf16"), False) for step in STEPS[:2]),
]


@pytest.fixture(scope="module")
def bench():
    return suite.Workbench()


@pytest.mark.parametrize(("case", "variants", "variant"), suite.parameters(CASES))
def test_network(benchmark, bench, case, variants, variant):
    suite.run(benchmark, bench, case, variants, variant)
