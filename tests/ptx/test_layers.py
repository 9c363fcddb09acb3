"""Layers on an emulated device, forward and backward, within the bounds of `fused_inr.bench.bounds`; no fault."""

import pytest
from fused_inr.bench.gpu import layer_accuracy

MAPS = ("sine", "split", "gaussian", "complex_gabor")
TYPES = ("ieee", "tf32", "bf16", "fp16")


@pytest.mark.parametrize("gpu", [80, 90], indirect=True)
@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", MAPS)
def test_value_and_gradients_within_the_bound(gpu, name, precision):
    for m, k, n in ((131, 33, 49), (70, 9, 80), (131, 2, 49), (131, 49, 3), (1, 16, 16)):
        result = layer_accuracy(name, precision, "cpu", m, k, n)
        beyond = {
            (order, tensor): figures
            for order, tensors in result["orders"].items()
            for tensor, figures in tensors.items()
            if not figures["of_bound"] <= 1
        }
        assert not beyond, (m, k, n)
