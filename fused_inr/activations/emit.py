"""Writes the committed files of generated code: what `printing` prints of every registered map.

`python -m fused_inr.activations.emit` rewrites them; `--check` compares them and exits 1 on a difference.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .printing import cpp_levels, cpp_source, torch_source, triton_source
from .registry import registered, registered_losses
from .spec import ActivationMap

ROOT = Path(__file__).resolve().parents[2]
#: A map in which branches, outputs and parameters can be told apart by their number.
PROBE = ActivationMap("probe", lambda z0, z1, p: (p * z0, p * z1, z0 * z1), {"p": 1.0}, generated=False)


def committed_files() -> dict[Path, str]:
    """Return what each committed file should hold, by its path."""
    maps = [*registered(), *registered_losses()]
    return {
        ROOT / "fused_inr/activations/generated.py": torch_source(maps),
        ROOT / "kernels/generated/activations.py": triton_source(maps),
        ROOT / "csrc/generated/activations.h": cpp_source(maps),
        ROOT / "csrc/generated/levels.h": cpp_levels(PROBE),
    }


def main(argv: list[str] | None = None) -> int:
    """Write the committed files, or compare them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_inr.activations.emit", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when a file is out of date")
    check = parser.parse_args(argv).check
    stale = 0
    for path, source in committed_files().items():
        if path.exists() and path.read_text() == source:
            continue
        stale += 1
        print(f"{'out of date' if check else 'writing'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            try:
                part.write_text(source)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
