"""Tests of the operations inside PyTorch, `tests/suite/torch_integration.py`, on this process's backends and device."""

from suite.torch_integration import *  # noqa: F403
