"""One layer, against eager PyTorch and torch.compile: `pytest bench/test_layer.py` (see `suite.py`)."""

import pytest
from fused_inr.bench import suite
from fused_inr.bench.cases import STEPS, Case


def layer(step, activation="sine", width=128, rows=8192, precision="ieee", in_features=None) -> Case:
    return Case("layer", step, activation, width, rows, precision, in_features=in_features or width)


CASES = [
    *((layer(step, "sine"), True) for step in STEPS),
    *((layer(step, "split"), step == "training") for step in STEPS),
    *((layer("training", activation), False) for activation in ("gaussian", "sinc", "relu")),
    *((layer("training", width=width), False) for width in (32, 256)),
    *((layer("training", rows=rows), False) for rows in (256, 65536)),
    *((layer(step, precision="bf16"), False) for step in STEPS[:2]),
    (layer("training", in_features=2), False),
    (layer("training", width=3, in_features=128), False),
]


@pytest.fixture(scope="module")
def bench():
    return suite.Workbench()


@pytest.mark.parametrize(("case", "variants", "variant"), suite.parameters(CASES))
def test_layer(benchmark, bench, case, variants, variant):
    suite.run(benchmark, bench, case, variants, variant)
