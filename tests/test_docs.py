"""Blocks of code in the documentation and in docstrings run; links between the documents lead somewhere."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
#: what a block in a docstring may take for granted
BEFORE = """
import sympy
import torch
import fused_inr
import fused_inr as fi
net = fi.SIREN(2, 16, 1, 1)
x, target = torch.rand(50, 2), torch.rand(50, 1)
"""


def blocks(text: str) -> list[str]:
    """The Python blocks of a text, without its indentation."""
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in BLOCK.findall(text)]


def run(code: str, folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code], cwd=folder, text=True, capture_output=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, f"{code}\n{ran.stderr}"


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md"])
def test_examples_follow_one_another(document, tmp_path):
    found = blocks((ROOT / document).read_text())
    assert len(found) >= 2
    # the one about a fit's results needs a fit; tests/test_cli.py loads its weights
    run("\n".join(block for block in found if "results/" not in block), tmp_path)


def docstrings():
    for path in sorted((ROOT / "fused_inr").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for i, block in enumerate(blocks(ast.get_docstring(node, clean=False) or "")):
                    name = getattr(node, "name", "")
                    yield pytest.param(block, id=f"{path.relative_to(ROOT)} {name} {i}")


@pytest.mark.parametrize("block", docstrings())
def test_examples_in_docstrings_run(block, tmp_path):
    run(BEFORE + block, tmp_path)


def test_other_documents_have_no_blocks_that_nobody_runs():
    # kernels.md: what to run on an emulated device, which tests/ptx do
    run_here = {"README.md", "docs/guide.md", "docs/kernels.md"}
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        name = str(path.relative_to(ROOT))
        assert name in run_here or not blocks(path.read_text()), name


def test_documents_name_files_that_exist():
    """Files of this repository in backticks, with a folder: in documents of their own and in the code's docstrings."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    texts = [path for path in texts if path.name != "CHANGELOG.md"]  # tells of what was
    missing = set()
    for path in texts:
        for name in re.findall(r"`((?:fused_inr|kernels|csrc|tests|bench|docs)/[\w./]+\.\w+)`", path.read_text()):
            if "NAME" not in name and not (ROOT / name).exists():
                missing.add(f"{path.name}: {name}")
    assert not missing, sorted(missing)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
