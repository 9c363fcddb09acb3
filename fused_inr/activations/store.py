"""Holds the maps that this process knows, for the registry, for unpickling and for the raw operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .spec import ActivationMap

#: The activations whose code is committed, by name.
REGISTERED: dict[str, ActivationMap] = {}
#: The losses whose code is committed, by name.
LOSSES: dict[str, ActivationMap] = {}
#: The activations and losses that users define at run time, by key, in the order of their definition.
DEFINED: dict[str, ActivationMap] = {}


def lookup(key: str) -> ActivationMap:
    """Return the map with this key (`ActivationMap.key`), which is what the raw operations receive.

    Raises:
        ValueError: this process has no such map.
    """
    found = REGISTERED.get(key) or DEFINED.get(key) or LOSSES.get(key)
    if found is None:
        raise ValueError(f"activation: no map has the key {key!r} in this process; define it again here")
    return found
