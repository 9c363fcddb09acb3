"""Blocks of code in the documentation and in docstrings run; what the documents name exists; the API reference shows
every public name.

A block whose first line is a comment `# needs ..` runs only where there is what it names: "a GPU", "Triton" (on an
emulated device), "a file" (never here).
"""

import ast
import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fused_inr
from fused_inr.cli.bench import BENCHES

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"\s*# needs (a GPU|Triton|a file)\b")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
#: in which each block goes on where the one before it ended; everywhere else a block stands for itself
ONE_AFTER_ANOTHER = ["README.md", "docs/guide.md", "docs/fuse.md"]
#: what a block that stands for itself may take for granted
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


def missing(block: str) -> str:
    """What a block needs that is not here; empty if it can run."""
    found = NEEDS.match(block)
    if found is None:
        return ""
    if found[1] == "a GPU":
        import torch

        return "" if torch.cuda.is_available() else "no GPU"
    if found[1] == "Triton":
        pytest.importorskip("triton")
        from fused_inr.bench import ptx

        return ptx.unavailable()
    return "a file"


@pytest.mark.parametrize("document", ONE_AFTER_ANOTHER)
def test_examples_follow_one_another(document, tmp_path):
    found = blocks((ROOT / document).read_text())
    assert len(found) >= 2
    run("\n".join(block for block in found if not missing(block)), tmp_path)


def separate():
    """The blocks that stand for themselves: of the other documents, and of docstrings."""
    for path in DOCUMENTS:
        name = str(path.relative_to(ROOT))
        for i, block in enumerate(blocks(path.read_text()) if name not in ONE_AFTER_ANOTHER else []):
            yield pytest.param(block, id=f"{name} {i}")
    for path in sorted((ROOT / "fused_inr").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for i, block in enumerate(blocks(ast.get_docstring(node, clean=False) or "")):
                    name = getattr(node, "name", "")
                    yield pytest.param(block, id=f"{path.relative_to(ROOT)} {name} {i}")


@pytest.mark.parametrize("block", list(separate()))
def test_examples_that_stand_for_themselves(block, tmp_path):
    if why := missing(block):
        pytest.skip(why)
    run(BEFORE + block, tmp_path)


def named(pattern: str) -> list[tuple[str, str]]:
    """(document, what the pattern's group found) in all documents but the one that tells of what was."""
    texts = {path.name: path.read_text() for path in DOCUMENTS if path.name != "CHANGELOG.md"}
    return [(document, found) for document, text in texts.items() for found in re.findall(pattern, text)]


def test_documents_name_files_that_exist():
    """Files of this repository in backticks, with a folder."""
    names = named(r"`((?:fused_inr|kernels|csrc|tests|bench|docs)/[\w./]+\.\w+)`")
    lost = [found for found in names if "NAME" not in found[1] and not (ROOT / found[1]).exists()]
    assert names and not lost


def test_documents_name_tests_and_commands_that_exist():
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    tests = set(re.findall(r"^ *def (test_\w+)", code, re.MULTILINE)) | {p.stem for p in ROOT.glob("tests/**/*.py")}
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for pattern, known in (
        (r"`(test_\w+)`", tests),
        (r"`make ([a-z][\w-]*)", targets),
        (r"^make (\w+)", targets),
        (r"fused-inr bench ([a-z]+)", set(BENCHES)),
    ):
        names = named("(?m)" + pattern)
        lost = [found for found in names if found[1] not in known]
        assert names and not lost, pattern


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_reference_shows_every_public_name(tmp_path):
    """The pages of `make docs`, from the command in the Makefile."""
    pytest.importorskip("pdoc")
    shown = re.search(r"^DOCUMENTED := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    options = ["--docformat", "google", "--template-directory", str(ROOT / "docs" / "reference"), "-o", str(tmp_path)]
    command = [sys.executable, "-m", "pdoc", *options, *shown[1].replace("'", "").split()]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    public = [n for n in fused_inr.__all__ if isinstance(getattr(fused_inr, n), types.ModuleType)]
    modules = ["fused_inr", *(f"fused_inr.{n}" for n in public)]
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")} - {"index.html", "search.js"}
    assert pages == {f"{module.replace('.', '/')}.html" for module in modules}
    for module in modules:
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text()
        names = getattr(importlib.import_module(module), "__all__", ())
        lost = [n for n in names if f'id="{n}"' not in page and f'href="{module.split(".")[-1]}/{n}.html"' not in page]
        assert not lost, module
        # an asterisk between two names is a product, and stays one
        assert "<em>" not in page, module


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(path):
    """Each example, for a few steps of few rows."""
    options = {"fuse_siren": ["--size", "24"], "fuse_sdf": ["--rows", "128"], "compile_laplacian": ["--rows", "128"]}
    command = [sys.executable, str(path), "--steps", "2", *options[path.stem]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "after 2 steps" in result.stdout
