"""Runs `fused-inr doctor`: versions, devices, and what would run a layer here, and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import warnings
from typing import Any

import torch

from .. import FusedLinear, __version__, activations, backends, native, native_cuda

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(as_json: bool) -> int:
    """Print what `examine` finds; the exit code is 0 whatever that is."""
    found = examine()
    print(json.dumps(found, indent=1) if as_json else _text(found))
    return 0


def examine() -> dict[str, Any]:
    """Find out everything about this installation that decides which code runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table below says the same, for each backend
        return {
            "versions": {
                "fused_inr": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                **{name: _version(name) for name in ("triton", "numpy", "sympy")},
            },
            "extras": {name: _version(name) for name in ("pillow", "matplotlib", "tqdm", "safetensors", "pytest")},
            "cpu": {
                "name": _processor(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
            "devices": _devices(),
            "backends": {
                name: {"available": usable, "reason": reason} for name, (usable, reason) in backends.available().items()
            },
            "native": _native(),
            "layers": _layers(),
            "environment": {
                k: os.environ[k] for k in ("TRITON_INTERPRET", "CXX", "CUDACXX", "OMP_NUM_THREADS") if k in os.environ
            },
        }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, platform.processor())
    except OSError:
        return platform.processor() or platform.machine()


def _devices() -> list[dict[str, Any]]:
    """List CUDA devices as torch sees them."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "cuda": torch.version.cuda,
            }
        )
    return found


def _native() -> dict[str, Any]:
    """Tell where the native engine and the CUDA backend come from, and what would build them, or a formula."""
    native.load()
    path, reason = native.status()
    found: dict[str, Any] = {"library": None if path is None else str(path), "reason": reason}
    if path is not None:
        found["capability"] = torch.ops.fused_inr_native.capability()
        found["bfloat16_products"] = torch.ops.fused_inr_native.multiplies_bfloat16()
    try:
        command, version = native.compiler()
        found["compiler"] = f"{' '.join(command)}: {version}"
    except RuntimeError as error:
        found["compiler"] = f"none: {error}"
    try:
        command, version = native_cuda.nvcc()
        found["nvcc"] = f"{' '.join(command)}: {version}"
    except RuntimeError as error:
        found["nvcc"] = f"none: {error}"
    library, _ = native_cuda.status()
    found["cuda_library"] = None if library is None else str(library)
    return found


def _layers() -> list[dict[str, str]]:
    """Tell what `backends.explain` says about a hidden layer of the usual size, for each device and type."""
    found = []
    devices = ["cpu", *(d["device"] for d in _devices())]
    for device in devices:
        for dtype in _TYPES:
            layer = FusedLinear(256, 256, activation=activations.sine(), device=device, dtype=dtype)
            x = torch.zeros(1024, 256, device=device, dtype=dtype)
            try:
                text = backends.explain(layer, x)
            except RuntimeError as error:
                text = f"fails: {' '.join(str(error).split())}"
            found.append({"device": device, "dtype": str(dtype).removeprefix("torch."), "runs": text})
    return found


def _text(found: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [f"  {name:<12} {version or 'not installed'}" for name, version in found["versions"].items()]
    missing = [name for name, version in found["extras"].items() if version is None]
    if missing:
        lines.append(f"  without {', '.join(missing)} (extras fit and test)")
    cpu, engine = found["cpu"], found["native"]
    lines += ["devices", f"  cpu          {cpu['name']}, {cpu['capability']}, {cpu['threads']} threads"]
    for d in found["devices"]:
        about = f"capability {d['capability']}, {d['memory_gib']} GiB, CUDA {d['cuda']}"
        lines.append(f"  {d['device']:<12} {d['name']}, {about}")
    if not found["devices"]:
        lines.append("  cuda         none that torch sees")
    lines.append("native engine")
    if engine["library"] is None:
        lines.append(f"  library      none: {engine['reason']}")
    else:
        lines.append(f"  library      {engine['library']}, {engine['capability']}")
        how = "the processor's own" if engine["bfloat16_products"] else "in float32"
        lines.append(f"  bfloat16     products {how}")
    lines.append(f"  compiler     {engine['compiler']}")
    if engine["cuda_library"] is not None:
        lines.append(f"  cuda library {engine['cuda_library']}")
    lines.append(f"  nvcc         {engine['nvcc']}")
    lines.append("backends")
    for name, backend in found["backends"].items():
        lines.append(f"  {name:<12} {'available' if backend['available'] else 'not here: ' + backend['reason']}")
    lines.append("a hidden layer, sine, 256 -> 256, 1024 rows")
    for layer in found["layers"]:
        ran, *why = layer["runs"].splitlines()
        lines.append(f"  {layer['device']:<7} {layer['dtype']:<9} {ran.rpartition(': ')[2]}")
        lines += [f"    {reason.strip()}" for reason in why]
    for name, value in found["environment"].items():
        lines.append(f"{name}={value} is set")
    return "\n".join(lines)
