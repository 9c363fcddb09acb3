"""Reads arguments of the commands: one line and exit code 2 for a bad one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that says one line and exits with 2 for a bad argument."""

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def integer(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Return an argument type: an integer from `least` to `most`, by default the largest that PyTorch knows."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
        if value > most:
            raise argparse.ArgumentTypeError(f"expected an integer of at most {most}, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    """Read an argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def non_negative(text: str) -> float:
    """Read an argument that is a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value
