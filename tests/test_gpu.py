"""Tests on a CUDA device, `tests/suite/gpu.py`, on this process's backends and device."""

from suite.gpu import *  # noqa: F403
