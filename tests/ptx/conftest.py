"""An emulated device for each test that asks for one; a fault in any of its launches fails the test.

These tests need a process of their own (`make test` starts one): they take the place of Triton's driver, which the
other tests ask for the device that is really there, and they compile what Triton's interpreter would interpret.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from fused_inr.bench import ptx

FOLDER = Path(__file__).parent
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

#: of the GPU's tests, which cases run without --slow; each compiles kernels of its own
SHORT = {
    "test_a_batch_of_weights_is_as_many_layers": lambda shared, precision: precision in ("tf32", "bf16"),
    "test_narrow_layers": lambda name, k, n, precision: (
        name == "complex_gabor" and precision == "bf16" and (k, n) in ((3, 33), (64, 1))
    ),
    "test_layouts": lambda layout, precision: precision == "bf16",
    "test_learnable_parameters": lambda name, dtype, per_feature: (
        name in ("sine", "split") and dtype == torch.float32 and per_feature == (name == "sine")
    ),
    "test_moments_agree_with_the_cpus_and_are_the_same_bits": lambda name, backend: (
        name in ("sine", "split", "gaussian", "complex_gabor")
    ),
}


@pytest.hookimpl(tryfirst=True)  # before those marked slow are skipped
def pytest_collection_modifyitems(config, items):
    here = [item for item in items if FOLDER in item.path.parents]
    for item in here:
        if item.path.stem == "test_gpu_suite" and item.originalname in SHORT:
            if not SHORT[item.originalname](**item.callspec.params):
                item.add_marker(pytest.mark.slow)
    reason = ptx.unavailable()
    if not reason and len(here) < len(items):
        reason = "needs a process of its own: pytest tests/ptx (make test starts one)"
    for item in here if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def gpu(request):
    """An emulated device, and fresh memory that holds NaN; the parameter, if any, is its compute capability (80)."""
    with ptx.emulated(getattr(request, "param", 80)) as device:
        yield device


@pytest.fixture
def device(gpu) -> torch.device:
    """Where its tensors lie."""
    return torch.device("cpu")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    gpu = pyfuncitem.funcargs.get("gpu")
    try:
        result = yield
    except Exception as error:
        if gpu is not None and gpu.faults():
            error.add_note("\n".join(gpu.faults()))
        raise
    if gpu is not None:
        gpu.check()
    return result
