"""What is installed: names, what importing them costs, what the wheel carries, and life without a compiler."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fused_inr

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code, folder, **environment):
    """Run `code` in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# -- names


def test_every_public_name_imports():
    for name in fused_inr.__all__:
        assert getattr(fused_inr, name) is not None
        assert name in dir(fused_inr)
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = fused_inr.NoSuchLayer


@pytest.mark.parametrize(
    "module",
    [
        "activations",
        "backends",
        "encodings",
        "functional",
        "init",
        "layers",
        "losses",
        "models",
        "native",
        "native_cuda",
    ],
)
def test_every_name_of_a_module_imports(module):
    found = importlib.import_module(f"fused_inr.{module}")
    for name in getattr(found, "__all__", ()):
        assert getattr(found, name) is not None, name


def test_one_version():
    from importlib.metadata import version

    assert fused_inr.__version__ == version("fused_inr")
    written = [p for p in ROOT.glob("*.toml") if f'"{fused_inr.__version__}"' in p.read_text()]
    assert not written, "the version stands in fused_inr/__init__.py only"


def test_importing_imports_little(tmp_path):
    code = f"""
import sys, fused_inr
assert "torch" not in sys.modules
import torch
for name in {fused_inr.__all__!r}:
    getattr(fused_inr, name)
heavy = ("sympy", "triton", "matplotlib", "PIL", "scipy", "torch._dynamo", "torch._inductor")
print(*(m for m in heavy if m in sys.modules))
"""
    loaded, _ = python(code, tmp_path)
    assert loaded.split() == []


# -- a checkout that nobody installed


def test_a_plain_checkout_is_a_package(tmp_path):
    """With nothing but its folder on the path, and though another checkout may be installed; children find it, too."""
    for name in ("fused_inr", "kernels", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    code = f"""
import subprocess, sys
import fused_inr, fused_inr.kernels, fused_inr.cli.children as children
import fused_inr.kernels.configurations.linear_act_table, fused_inr.bench.gpu.cells
for module in (fused_inr, fused_inr.kernels.configurations.linear_act_table, fused_inr.bench.gpu.cells):
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
try:
    import fused_inr.tests
except ModuleNotFoundError:
    print("kernels and bench, no more")
child = children.python("-c", "import fused_inr.bench; print(fused_inr.bench.__file__)")
print(subprocess.run(child, env=children.environment(), cwd="/", capture_output=True, text=True).stdout)
"""
    printed, _ = python(code, "/", PYTHONPATH=str(tmp_path))
    assert printed.splitlines()[:2] == ["kernels and bench, no more", str(tmp_path / "bench" / "__init__.py")]


def test_the_native_engine_can_be_left_out(tmp_path):
    code = "from fused_inr import native; print(native.load(), native.status()[1])"
    printed, _ = python(code, tmp_path, FUSED_INR_NATIVE="0")
    assert printed.startswith("False FUSED_INR_NATIVE=0")


# -- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built where torch is not importable, so without the native library: what an isolated build makes."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("fused_inr", "kernels", "csrc", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    code = "import sys; sys.modules['torch'] = None; from setuptools import build_meta; build_meta.build_wheel('dist')"
    python(code, tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds nothing but the wheel's contents."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_everything_in_one_package(installed):
    top = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"fused_inr"}
    package = installed / "fused_inr"

    def files(folder, *patterns):
        found = {p.relative_to(folder) for pattern in patterns for p in folder.rglob(pattern)}
        return {p for p in found if "__pycache__" not in p.parts and "results" not in p.parts}

    sources = ("*.h", "*.cpp", "*.cu", "*.cuh")
    assert files(ROOT / "csrc", *sources) == files(package / "_csrc", *sources)
    assert files(ROOT / "kernels", "*.py") == files(package / "kernels", "*.py")
    assert files(ROOT / "bench", "*.py") == files(package / "bench", "*.py")
    executor = files(ROOT / "bench" / "ptx", "*.cpp", "*.h", "*.inc")
    assert executor and executor == files(package / "bench" / "ptx", "*.cpp", "*.h", "*.inc")
    own = {p for p in files(package, "*.py") if p.parts[0] not in ("kernels", "bench", "_csrc")}
    assert own == files(ROOT / "fused_inr", "*.py")
    assert (package / "py.typed").is_file()


def test_every_package_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {
        "fused_inr": ROOT / "fused_inr",
        "fused_inr.kernels": ROOT / "kernels",
        "fused_inr.bench": ROOT / "bench",
    }
    found = {
        ".".join((name, *init.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for init in folder.rglob("__init__.py")
    }
    assert found <= listed
    assert listed <= found | {"fused_inr._csrc", "fused_inr.kernels.generated"}


def test_wheel_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = archive.read(name).decode()
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Python: >=3.11" in metadata
    needed = [line.split(":", 1)[1].strip() for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [n for n in needed if "extra ==" not in n] == ["torch>=2.10", "numpy", "sympy"]
    assert "fused-inr = fused_inr.cli.main:main" in entry_points
    assert "fused_inr = fused_inr.fusion.dynamo:backend" in entry_points


def test_works_from_the_wheel_without_compiler(installed, tmp_path):
    code = f"""
import os, shutil, warnings
assert shutil.which("g++") is None
import torch, fused_inr as fi
assert fi.__file__.startswith({str(installed)!r}), fi.__file__
import fused_inr.bench, fused_inr.cli.main
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    net = fi.SIREN(2, 16, 1, 3)
    x = torch.rand(3000, 2)
    y = net(x)
    y.sum().backward()
    net(x)
print([str(w.message) for w in caught if "fused_inr" in str(w.message)])
print(fi.backends.explain(net, x))
"""
    environment = {"PATH": "", "CXX": "", "HOME": str(tmp_path), "XDG_CACHE_HOME": "", "PYTHONPATH": str(installed)}
    printed, _ = python(code, tmp_path, **environment)
    warned, *explained = printed.splitlines()
    assert warned.count("fused_inr runs on the PyTorch reference") == 1  # said once
    assert "compiler" in warned  # what is missing
    assert "install" in warned  # and how to get it
    assert explained[0].startswith("layer by layer: plain PyTorch") and "reference" in explained[1]


# -- the two commands


def test_constraints_fit_every_build_of_torch():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert pins["torch"] == "2.13.0"  # no +cpu: the same file serves CUDA machines
    assert pins["triton"] == "3.7.1"  # what that torch's CUDA builds require
    for extra in PROJECT["project"]["optional-dependencies"].values():
        for requirement in extra:
            name = requirement.split(";")[0].split(">")[0].strip()
            assert name in pins or name == "pre-commit", name


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("variables", "says"),
    [(["PYTHON=/bin/false"], "Python 3.11"), (["PYTHON="], "Python 3.11"), (["CXX_FOUND="], "compiler")],
    ids=["old Python", "no Python", "no compiler"],
)
def test_make_says_what_is_missing(tmp_path, variables, says):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(["make", "test", *variables], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert says in done.stderr
    assert not (tmp_path / ".venv").exists()
