"""`fused-inr fuse`: what `fused_inr.fuse` makes of a model that is named on the command line."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import CliError

__all__ = ["run"]


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]+(x[0-9]+)*", text):
        raise CliError(f"--input: expected a shape such as 65536x2, got {text!r}")
    return tuple(int(n) for n in text.split("x"))


def _callable(named: str) -> Callable[[], Any]:
    module, colon, name = named.rpartition(":")
    if not colon or not module or not name:
        raise CliError(f"model: expected MODULE:CALLABLE (or FILE.py:CALLABLE), got {named!r}")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            assert spec is not None and spec.loader is not None
            found: Any = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = found
            spec.loader.exec_module(found)
        else:
            sys.path.insert(0, "")
            found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, OSError) as error:
        raise CliError(f"model: {module!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise CliError(f"model: {error}") from error
    if not callable(found):
        raise CliError(f"model: {named!r} is no function or class that makes a model")
    return found


def run(options: argparse.Namespace) -> int:
    """Makes the model, fuses it on random inputs in [-1, 1], and prints the report."""
    import torch

    from .. import fusion

    make = _callable(options.model)
    torch.manual_seed(0)
    made = make() if not isinstance(make, torch.nn.Module) else make
    if not isinstance(made, torch.nn.Module):
        raise CliError(f"model: {options.model!r} made a {type(made).__name__}, not an nn.Module")
    device = torch.device(options.device or "cpu")
    inputs = tuple(torch.rand(_shape(text), device=device) * 2 - 1 for text in options.input)
    try:
        report = fusion.fuse(made.to(device), inputs, tuple(options.method or ("forward",)), prefer=options.prefer)
    except ValueError as error:
        raise CliError(str(error)) from error
    if options.json:
        report.to_json(options.json)
    print(report)
    return 0
