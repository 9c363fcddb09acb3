"""The whole-network kernels compile without a GPU, spill little, fit the device, and keep their activations on chip.

As in test_kernels_static.py: compiled in worker processes of the report, the normal run what is most likely to break
first, --slow all of the table.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
static_report = pytest.importorskip("fused_inr.bench.static_report")



def failures(rows: list[dict]) -> list[str]:
    return static_report.failures(rows, triton.__version__)


#: (architecture, kernel, activation, dtype, precision, N, K, aligned): the widest that registers hold, the deepest in
#: spills when it was made, each kernel.
QUICK = [
    ("sm80", "mlp_forward", "sine", "bfloat16", "ieee", 128, 2, True),
    ("sm80", "mlp_one_pass", "sine", "bfloat16", "ieee", 32, 2, True),
    ("sm80", "mlp_backward", "sine", "float32", "tf32", 64, 2, True),
    ("sm80", "mlp_loss", "sine", "bfloat16", "ieee", 128, 2, True),
    ("sm86", "mlp_save", "complex_gabor", "bfloat16", "ieee", 128, 2, True),
    ("sm86", "mlp_loss", "complex_gabor", "bfloat16", "ieee", 64, 2, True),
    ("sm90", "mlp_forward", "sine", "bfloat16", "ieee", 128, 2, True),
    ("sm90", "mlp_forward", "sine", "float32", "tf32", 64, 2, True),
    ("sm90", "mlp_forward", "sine", "float32", "bf16x3", 64, 2, True),
    ("sm90", "mlp_save", "split", "float16", "ieee", 32, 35, False),
    ("sm90", "mlp_loss", "sine", "bfloat16", "ieee", 128, 2, True),
    ("sm100", "mlp_forward", "sine", "bfloat16", "ieee", 256, 2, True),
    ("sm100", "mlp_recompute", "sine", "bfloat16", "ieee", 64, 2, True),
]


def jobs(cases) -> list[dict]:
    import torch

    names = ("arch", "kernel", "activation", "dtype", "precision", "N", "K", "aligned")
    return [{**dict(zip(names, case, strict=True)), "dtype": getattr(torch, case[3])} for case in cases]


def test_representative_kernels():
    rows = static_report.compile_all(jobs(QUICK), processes=2)
    assert not failures(rows), "\n".join(failures(rows))
    by = {(r["arch"], r["kernel"], r["type"], r["N"]): r for r in rows}
    hopper = by["sm90", "mlp_forward", "bfloat16", 128]
    assert hopper["tensor_op"] == "HGMMA"
    for row in (hopper, by["sm90", "mlp_forward", "float32 tf32", 64], by["sm80", "mlp_forward", "bfloat16", 128]):
        # the stores of an output of 16 padded columns: what a thread holds of it, and nothing beside it
        assert row["stg"] == row["block_m"] * 16 // (32 * row["num_warps"])
    assert "HGMMA" in by["sm90", "mlp_forward", "float32 bf16x3", 64]["tensor_op"]
    assert "UTC" in by["sm100", "mlp_forward", "bfloat16", 256]["tensor_op"]
    assert by["sm90", "mlp_save", "float16", 32]["stg"] > hopper["stg"]  # the count does see activations


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100"])
def test_every_shipped_configuration(arch):
    kernels = ("mlp_forward", "mlp_stream", "mlp_save", "mlp_backward", "mlp_recompute", "mlp_loss", "mlp_one_pass")
    activations = ("sine", "gabor", "complex_gabor", "split")
    rows = static_report.run((arch,), activations, kernels=kernels, scope="full")
    assert len(rows) > 60
    assert not failures(rows), "\n".join(failures(rows))


def test_bf16x3_is_three_products_of_bfloat16():
    """The small pieces first; no product of float32 is left, and none of the two smaller pieces."""
    code = """
import re, torch
from fused_inr.bench import aot
for kernel, N in (("mlp_forward", 32), ("input_grad", 64)):
    job = aot.Job("sm90", kernel, torch.float32, "bf16x3", "identity" if N == 64 else "sine", N, 64 if N == 64 else 2)
    arguments, options = aot.build(job)
    asm = arguments.compile(90, options).asm
    asked = len(re.findall(r"tt.dot .*inputPrecision = bf16x3", asm["ttir"]))
    dots = re.findall(r"(?:warp_group_dot|tt.dot) (?:%.*?) : tensor<\\S*x(\\w+), .*", asm["ttgir"])
    print(kernel, asked, dots.count("bf16"), len(dots))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 2
    for line in result.stdout.splitlines():
        asked, of_bfloat16, of_any = map(int, line.split()[1:])
        assert asked > 0 and of_bfloat16 == of_any == 3 * asked, line


def test_row_offsets_are_64_bit():
    """Read in the TTIR: the index of a tile of rows is 64 bits wide, and nothing that counts rows or steps from row to
    row is multiplied in fewer."""
    code = """
import re, torch
from fused_inr.bench import aot
for kernel in ("mlp_forward", "mlp_save", "mlp_loss", "mlp_one_pass"):
    job = aot.Job("sm90", kernel, torch.bfloat16, "ieee", "sine", 32, 2)
    arguments, options = aot.build(job)
    ttir = arguments.compile(90, options).asm["ttir"]
    tile, wide = re.search(r"scf.for %(\\w+) = .*? : (i\\d+) {", ttir).groups()
    products = re.findall(rf"arith.muli %{tile}, .* : (i\\d+)", ttir)
    stride = r"(?:data|x|y)(?:_\\d+|\\.[.\\w]+)"  # of a group of arguments, by its place or, since 3.9, by its name
    rows = rf"%(?:{stride}|M|ROWS_\\w+|start|rows|program)\\b"
    narrow = re.findall(rf"arith.muli .*{rows}.* : (?:i32|tensor<.*xi32>)", ttir)
    narrow += re.findall(rf"tt.splat %(?:{stride}|M|ROWS_\\w+) : i32", ttir)
    widened = re.findall(rf"arith.extsi %{stride} : i32 to i64", ttir)
    print(kernel, wide, products.count("i64"), products.count("i32"), len(narrow), len(widened))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 4
    for line in result.stdout.splitlines():
        _, wide, products, *narrow, widened = line.split()
        assert wide == "i64" and int(products) > 0 and narrow == ["0", "0"] and int(widened) > 0, line
