"""Checks of plain arguments, shared by the modules that users construct: each returns the value, or explains itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch


def positive_int(name: str, value: object, *, minimum: int = 1) -> int:
    """`value` as an int of at least `minimum`."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return number


def finite_float(name: str, value: object, *, above: float | None = None, least: float | None = None) -> float:
    """`value` (a number, or a tensor with one element) as a finite float, `> above` or `>= least` if given."""
    accepted = "a finite number"
    if above is not None:
        accepted += f" greater than {above:g}"
    if least is not None:
        accepted += f" of at least {least:g}"
    if isinstance(value, bool | str | bytes) or (isinstance(value, torch.Tensor) and value.numel() != 1):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {accepted}, got {value!r}") from None
    if not math.isfinite(number) or (above is not None and number <= above) or (least is not None and number < least):
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return number


def boolean(name: str, value: object) -> bool:
    """`value`, which must be True or False: a number here is most often an argument in the wrong place."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def one_of(name: str, value: object, accepted: Sequence[str]) -> str:
    """`value`, which must be one of the strings `accepted`."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    return value


def described(value: object) -> str:
    """What a message says of an argument: type and shape of a tensor, else its repr."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
