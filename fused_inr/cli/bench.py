"""Runs `fused-inr bench WHICH ...`: the benches that the package carries (`fused_inr.bench`)."""

from __future__ import annotations

import importlib

from . import CliError

#: name on the command line -> module of fused_inr.bench with a `main(argv) -> exit code`, and what it does
BENCHES = {
    "table": ("table", "layers and networks against eager PyTorch and torch.compile, on this machine"),
    "moments": ("moments", "moments and the search for sigma_p against the expressions of VI3NR's code"),
    "codebases": ("codebases.measure", "networks of public codebases, as they are and fused by fused_inr.fuse"),
    "calls": ("calls", "float64, torch.func transforms, MAML, one row: against eager PyTorch"),
    "pictures": ("pictures", "reading a large picture: seconds and memory against decoding all of it"),
    "static": ("static_report", "every Triton kernel compiled ahead of time: registers, spills, instructions"),
    "tune": ("tune", "configurations of the Triton kernels measured on this GPU, and their table rewritten"),
    "gpu": ("gpu", "a CUDA machine's tests and benches, most important first, under a time budget"),
}


def run(which: str, arguments: list[str]) -> int:
    """Hand `arguments` to the bench `which` and return its exit code."""
    name = f"fused_inr.bench.{BENCHES[which][0]}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise CliError(f"bench {which}: this installation has no {name}") from error
        extra = "triton" if error.name == "triton" else "test"
        raise CliError(f"bench {which} needs {error.name}: pip install 'fused_inr[{extra}]'") from error
    return module.main(arguments) or 0
