"""Tests of layers, `tests/suite/linear_act.py`, on this process's backends and device."""

from suite.linear_act import *  # noqa: F403
