"""Every shipped kernel configuration compiles without a GPU, spills nothing, fits the device and uses its tensor cores.

The compilations run in worker processes of the report (`fused-inr bench static`), with Triton's cache in a folder of
theirs. The normal run compiles what is most likely to break first, one of each kind; --slow compiles all of it. No
spill is promised for the Triton that torch 2.13 requires (3.7); under another version only what would be wrong anywhere
counts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
static_report = pytest.importorskip("fused_inr.bench.static_report")

from fused_inr.activations import names  # noqa: E402


def failures(rows: list[dict]) -> list[str]:
    return static_report.failures(rows, triton.__version__)


#: (architecture, kernel, activation, dtype, precision, N, K, aligned, learnable, level): the most registers, the least
#: room, each product in each type somewhere, each kind of tile.
QUICK = [
    ("sm80", "forward", "split", "float32", "tf32x3", 256, 256, True, False, 0),
    ("sm80", "gz", "split", "float32", "tf32", 256, 256, False, False, 0),
    ("sm80", "forward", "sine", "bfloat16", "ieee", 256, 256, True, False, 0),
    ("sm80", "weight_grad", "-", "float16", "ieee", 256, 256, True, False, 0),
    ("sm86", "forward", "sine", "bfloat16", "ieee", 256, 256, True, False, 0),
    ("sm90", "forward", "sine", "float32", "tf32", 256, 256, True, False, 0),
    ("sm90", "gz", "split", "float32", "ieee", 256, 256, True, True, 0),
    ("sm90", "gz", "sine", "bfloat16", "ieee", 256, 2, False, False, 0),
    ("sm90", "forward", "split", "float32", "ieee", 3, 256, True, False, 0),
    ("sm90", "gz_from_z", "gabor", "float16", "ieee", 256, 256, True, False, 0),
    ("sm90", "weight_grad", "-", "float32", "tf32", 256, 256, True, False, 0),
    ("sm90", "input_grad", "identity", "float32", "bf16x3", 256, 256, True, False, 0),
    ("sm90", "act_map", "split", "float32", "ieee", 256, 256, True, False, 3),
    ("sm90", "sum", "-", "float32", "ieee", 256, 256, True, False, 0),
    ("sm100", "forward", "split", "bfloat16", "ieee", 256, 256, True, False, 0),
    ("sm100", "forward", "sine", "float32", "tf32", 256, 256, False, False, 0),
    ("sm100", "gz", "sine", "float32", "bf16x3", 256, 256, True, False, 0),
    ("sm100", "weight_grad", "-", "float32", "tf32", 256, 256, True, False, 0),
    ("sm80", "moments", "complex_gabor", "float32", "ieee", 64, 4096, True, False, 0),
    ("sm100", "moments", "split", "float32", "ieee", 64, 4096, True, False, 0),
]


def test_representative_kernels():
    import torch

    jobs = [
        {
            "arch": arch,
            "kernel": kernel,
            "dtype": getattr(torch, dtype),
            "precision": precision,
            "activation": activation,
            "N": N,
            "K": K,
            "aligned": aligned,
            "learnable": learnable,
            "level": level,
        }
        for arch, kernel, activation, dtype, precision, N, K, aligned, learnable, level in QUICK
    ]
    rows = static_report.compile_all(jobs, processes=2)
    assert len(rows) == len(QUICK)
    assert not failures(rows), "\n".join(failures(rows))
    by = {(r["arch"], r["kernel"], r["type"], r["activation"]): r for r in rows}
    # what the numbers must show, or the reading of them is broken
    assert "HMMA" in by["sm80", "forward", "bfloat16", "sine"]["tensor_op"]
    assert by["sm90", "forward", "float32 tf32", "sine"]["tensor_op"] == "HGMMA"
    assert "UTC" in by["sm100", "forward", "float32 tf32", "sine"]["tensor_op"]
    fast = by["sm90", "forward", "float32 tf32", "sine"]
    # sin.approx and four multiply-adds an element and thread, and no slow rounding
    assert fast["mufu"] >= 128 * 128 // (32 * fast["num_warps"]) and fast["frnd"] == 0
    assert by["sm90", "forward", "float32 ieee", "split"]["tensor"] == 0
    assert all(0 < r["registers"] <= 255 for r in rows)


#: Of the sample, what needs the most registers.
FULLEST = ["mlp_recompute", "mlp_loss", "mlp_backward"]


def test_the_fullest_kernels_of_the_sample():
    rows = static_report.run(("sm80",), kernels=FULLEST, scope="sample")
    assert {(row["kernel"], row["type"]) for row in rows} >= {(kernel, "float32 tf32") for kernel in FULLEST}
    assert not failures(rows), "\n".join(failures(rows))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100"])
def test_the_sample(arch):
    """What `fused-inr bench static --sample` compiles."""
    rows = static_report.run((arch,), scope="sample")
    assert len(rows) > 100
    assert not failures(rows), "\n".join(failures(rows))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100"])
def test_every_shipped_configuration(arch):
    rows = static_report.run((arch,), scope="full")
    assert len(rows) > 300
    assert not failures(rows), "\n".join(failures(rows))


@pytest.mark.slow
def test_every_activation():
    rows = static_report.run(("sm90",), ["all"], scope="quick")
    assert not failures(rows), "\n".join(failures(rows))


@pytest.mark.slow
def test_moments_of_every_activation():
    rows = static_report.run(activations=["all"], kernels=["moments"])
    assert len(rows) == 3 * len(names())
    assert not failures(rows), "\n".join(failures(rows))


def test_the_sample_has_each_kernel_in_each_type():
    """On every architecture, and each activation and width somewhere: what `make compat` compiles."""
    code = """
from fused_inr.bench import aot
sample, every = aot.jobs(scope="sample"), aot.jobs()
assert {(j.arch, j.kernel, j.dtype, j.precision, j.level) for j in sample} == {
    (j.arch, j.kernel, j.dtype, j.precision, j.level) for j in every}
assert {(j.kernel, j.activation) for j in sample if j.kernel == "forward"} == {
    ("forward", n) for n in aot.REPRESENTATIVES}
assert {j.N for j in sample} == {j.N for j in every}
assert set(sample) <= set(every) and 3 * len(sample) < len(every) + 100 and sample == aot.jobs(scope="sample")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0"])
def test_what_counts_under_another_version(version):
    """Spills bind the Triton that torch 2.13 requires; an empty kernel or too much memory counts everywhere."""
    row = {"arch": "sm90", "kernel": "sum", "type": "t", "activation": "-", "level": 0, "N": 1, "K": 1, "aligned": True}
    spills = row | {"broken": [], "problems": ["8 bytes of stack"]}
    empty = row | {"broken": ["the PTX traps"], "problems": ["the PTX traps", "8 bytes of stack"]}
    found = static_report.failures([spills, empty], version)
    expected = ["8 bytes of stack", "the PTX traps", "8 bytes of stack"] if version == "3.7.1" else ["the PTX traps"]
    assert [f.rpartition(": ")[2] for f in found] == expected


def test_row_offsets_are_64_bit():
    """Read in the TTIR: every row index is widened before it meets a stride."""
    code = """
import torch, triton
from fused_inr.bench import aot
cases = [("forward", 256, 256), ("forward", 256, 2), ("forward", 3, 256), ("gz", 256, 256), ("gz_from_z", 256, 256)]
cases += [("weight_grad", 256, 256), ("weight_grad", 256, 2), ("act_map", 256, 256)]
for kernel, n, k in cases:
    job = aot.Job("sm90", kernel, torch.float32, "ieee", "-" if kernel == "weight_grad" else "sine", n, k, level=1)
    arguments, options = aot.build(job)
    ttir = arguments.compile(90, options).asm["ttir"]
    lines = [line for line in ttir.splitlines() if "tt.addptr" in line and "tensor<" in line]
    offsets = [line.rsplit(",", 1)[-1] for line in lines]
    print(kernel, n, k, len(offsets), sum("i64" in o for o in offsets))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    for line in result.stdout.splitlines():
        *what, total, wide = line.split()
        assert int(total) > 0, what
        assert total == wide, f"{' '.join(what)}: {int(total) - int(wide)} of {total} offsets are 32 bits wide"


def test_command_line(tmp_path):
    """Bad arguments are one line and exit 2; a run writes its JSON."""
    command = [sys.executable, "-m", "fused_inr.bench.static_report"]
    for arguments in (["--arch", "sm70"], ["--every", "0"], ["--activation", "nonsense"]):
        result = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        assert arguments[-1] in result.stderr or arguments[0] in result.stderr
    file = tmp_path / "report.json"
    result = subprocess.run(
        [*command, "--quick", "--arch", "sm90", "--activation", "sine", "--kernel", "sum", "--json", str(file)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text())
    assert report["triton"] == triton.__version__ and len(report["rows"]) == 1
    assert re.search(r"^sm90: 1 compiled, 0 with a problem, 0 bytes spilled", result.stdout, re.M)
