"""Tests of values that are not finite, `tests/suite/special_values.py`, on this process's backends and device."""

from suite.special_values import *  # noqa: F403
