"""What all tests share: --device, --slow, the two processes of `make test`, and a fixed seed."""

import os

import pytest
import torch

pytest.register_assert_rewrite("suite", "linear_act_oracle", "layer_oracle", "ptx.layers")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tests that take the fixture `device` (cpu, cuda)")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config):
    device = config.getoption("--device")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch sees no CUDA device")


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def pytest_collection_modifyitems(config, items):
    skip_slow = pytest.mark.skip(reason="slow; --slow runs it")
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    # Triton's interpreter and its compiler do not share a process
    skip_interpreter = pytest.mark.skip(reason="needs a process with TRITON_INTERPRET=1 (make test starts one)")
    cuda = torch.cuda.is_available()
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not cuda:
            item.add_marker(skip_gpu)
        if "interpreter" in item.path.name and not interpreting():
            item.add_marker(skip_interpreter)


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device named on the command line."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory (`torch.empty`, in C++ too) holds NaN, so that an element that nothing writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
