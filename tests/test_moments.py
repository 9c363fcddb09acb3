"""Tests of moments, `tests/suite/moments.py`, on this process's backends and device."""

from suite.moments import *  # noqa: F403
