"""Tests of whole networks, `tests/suite/mlp.py`, on this process's backends and device."""

from suite.mlp import *  # noqa: F403
