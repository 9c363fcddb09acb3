"""An emulated device for each test that asks for one; a fault in any of its launches fails the test."""

import contextlib

import pytest
import torch
from fused_inr.bench import ptx


@contextlib.contextmanager
def poisoned_memory():
    """Fresh memory holds NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu(request):
    """An emulated device; the parameter, if any, is its compute capability (80)."""
    with ptx.emulated(getattr(request, "param", 80)) as device, poisoned_memory():
        yield device


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    device = pyfuncitem.funcargs.get("gpu")
    try:
        result = yield
    except Exception as error:
        if device is not None and device.faults():
            error.add_note("\n".join(device.faults()))
        raise
    if device is not None:
        device.check()
    return result
