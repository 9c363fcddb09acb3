"""Builds the native CPU engine into the package where PyTorch is there to build against; see fused_inr/native.py.

Metadata stands in pyproject.toml. Without PyTorch (an isolated build), without a compiler, or where the compiler fails,
the package installs all the same and compiles the engine on first use; FUSED_INR_REQUIRE_NATIVE=1 makes a failure an
error.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


def _native():
    """fused_inr/native.py alone, without the package around it."""
    spec = importlib.util.spec_from_file_location("_fused_inr_native_build", HERE / "fused_inr" / "native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no interpreter in it, so no interpreter's tag

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            _native().build(target, verbose=self.verbose > 1)
            print(f"fused_inr: built the native CPU engine, {target.name}", file=sys.stderr)
        except Exception as error:
            if os.environ.get("FUSED_INR_REQUIRE_NATIVE") == "1":
                raise
            print(f"fused_inr: WARNING: no native CPU engine in this installation: {error}", file=sys.stderr)
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
    return [Extension("fused_inr._C", sources=[], optional=True)]


setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildNative})
