"""Builds the native CPU engine into the package where PyTorch is there to build against, see fused_inr/native.py, and
the CUDA backend where that PyTorch has CUDA and there is an nvcc, see fused_inr/native_cuda.py.

Metadata stands in pyproject.toml. Without PyTorch (an isolated build), without a compiler, or where the compiler fails,
the package installs all the same and compiles on first use; FUSED_INR_REQUIRE_NATIVE=1 makes a failure an error.
"""

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
#: extension -> (the module that builds it, what it is)
BUILDS = {
    "fused_inr._C": ("native", "the native CPU engine"),
    "fused_inr._C_cuda": ("native_cuda", "the CUDA backend"),
}


def _module(name):
    """fused_inr/NAME.py, native.py or what imports nothing else of the package, without the package around it."""
    package = types.ModuleType("_fused_inr_build")
    package.__path__ = [str(HERE / "fused_inr")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no interpreter in it, so no interpreter's tag

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        module, what = BUILDS[ext.name]
        try:
            _module(module).build(target, verbose=self.verbose > 1)
            print(f"fused_inr: built {what}, {target.name}", file=sys.stderr)
        except Exception as error:
            if os.environ.get("FUSED_INR_REQUIRE_NATIVE") == "1":
                raise
            print(f"fused_inr: WARNING: this installation is without {what}: {error}", file=sys.stderr)
            print("fused_inr: it is compiled on first use, once what is missing is there", file=sys.stderr)


def _extensions():
    if importlib.util.find_spec("torch") is None:
        if os.environ.get("FUSED_INR_REQUIRE_NATIVE") == "1":
            raise SystemExit("FUSED_INR_REQUIRE_NATIVE=1: no PyTorch in this build (--no-build-isolation?)")
        print(
            "fused_inr: no PyTorch in this build: no native engine in this wheel; first use compiles it",
            file=sys.stderr,
        )
        return []
    built = ["fused_inr._C"]
    try:
        import torch

        if torch.version.cuda is None:
            raise RuntimeError("this PyTorch has no CUDA")
        _module("native_cuda").nvcc()
        built.append("fused_inr._C_cuda")
    except Exception as reason:
        print(f"fused_inr: no CUDA backend in this installation: {reason}", file=sys.stderr)
    return [Extension(name, sources=[], optional=True) for name in built]


setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildNative})
