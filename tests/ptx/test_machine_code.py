"""What the assembler makes of Hopper's kernels: each wgmma reads what the PTX says, and its registers stay untouched.

A device runs machine code, and the assembler between it and the PTX has had faults (`kernels/assembler.py`).
"""

import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
from fused_inr.bench import ptx
from fused_inr.bench.cases import Case, Workload, matmul_precision
from fused_inr.bench.ptx import machine_code
from fused_inr.kernels import assembler
from fused_inr.kernels.configurations import mlp as network_configs

import fused_inr as fi

hopper = pytest.mark.parametrize("gpu", [90], indirect=True)
#: ptxas 12.8 gets this one wrong: on an H200 its first bias gradient was off by 0.36 of the largest value
WRONG = {("sm90", "train", "half", 1, 1, 64): (64, 1, 4, 1, 0, True, False, 0)}


def products_of(gpu, run) -> list[ptx.Launch]:
    """The launches of `run()` with matrix products, one for each kernel."""
    gpu.options = replace(gpu.options, races=False, products=200_000)
    with ptx.few_programs(1):
        run()
    found = {launch.program.source: launch for launch in gpu.launches if len(launch.products)}
    if not found:
        pytest.skip("no wgmma: fewer rows in a tile than a warp group takes")
    return list(found.values())


def network(width: int, way: str, precision: str, activation: str = "sine"):
    step = "inference" if way == "inference" else "training"
    case = Case(
        "network", step, activation, width, rows=293, precision=precision, way="default" if step == way else way
    )
    return Workload(case).check


def verdicts(launches, tool: str) -> list[machine_code.Verdict]:
    return [machine_code.compare(x, machine_code.assemble(x.program.source, tool)) for x in launches]


def assert_as_written(gpu, run) -> None:
    for verdict in verdicts(products_of(gpu, run), assembler.for_hopper()):
        assert verdict and verdict.products, verdict


@hopper
@pytest.mark.parametrize(
    ("width", "way", "precision"),
    [(64, "inference", "bf16"), (64, "default", "bf16"), (128, "one-pass", "bf16"), (64, "one-pass", "tf32")],
)
def test_networks(gpu, width, way, precision):
    assert_as_written(gpu, network(width, way, precision))


@hopper
@pytest.mark.slow
@pytest.mark.parametrize("way", ["inference", "default", "recompute", "one-pass"])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("name", ["sine", "split", "gabor", "gaussian"])
def test_every_network(gpu, name, precision, width, way):
    launches = products_of(gpu, network(width, way, precision, name))
    assert all(verdicts(launches, assembler.for_hopper()))


@hopper
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("name", ["sine", "split"])
def test_layers(gpu, name, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def run():
        layer = fi.FusedLinear(96, 130, activation=name).to(dtype)
        y = layer(torch.rand(200, 96).to(dtype).requires_grad_())
        y.sum().backward()

    with matmul_precision(precision):
        assert_as_written(gpu, run)


# -- what is noticed


def entries(patch, table) -> None:
    for key, numbers in table.items():
        patch.setitem(network_configs.TUNED, key, numbers)
    network_configs.pick.cache_clear()


@hopper
def test_an_assembler_with_this_fault_is_found_out(gpu, monkeypatch):
    tool = triton.knobs.nvidia.ptxas
    if assembler.release(tool.version) >= assembler.SOUND:
        pytest.skip(f"Triton {triton.__version__} brings ptxas {tool.version}, which is right")
    entries(monkeypatch, WRONG)
    launches = [x for x in products_of(gpu, network(64, "recompute", "bf16")) if x.name == "train_kernel"]
    network_configs.pick.cache_clear()
    (theirs,) = verdicts(launches, tool.path)
    assert len(theirs.wrong) == 3 and not theirs.hazards
    assert all("the descriptor of B comes from elsewhere" in text for text in theirs.wrong)
    (ours,) = verdicts(launches, assembler.for_hopper())
    assert ours


@hopper
def test_a_changed_address_and_an_early_write_are_noticed(gpu):
    (launch,) = products_of(gpu, network(64, "inference", "bf16"))
    sass = machine_code.assemble(launch.program.source, assembler.for_hopper())
    assert machine_code.compare(launch, sass)
    lines = sass.splitlines()
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    at = products[1]
    (first,) = re.findall(r"gdesc\[UR(\d+)\]", lines[at])
    own = "|".join(f"UR{int(first) + k}" for k in range(4))
    # the sum that gives a descriptor of the second product
    changed = max(i for i in range(at) if re.search(rf"UIADD3\S* ({own}),.*, 0x", lines[i]))
    line = re.sub(r", 0x([0-9a-f]+)", lambda m: f", {int(m[1], 16) + 16:#x}", lines[changed], count=1)
    verdict = machine_code.compare(launch, "\n".join([*lines[:changed], line, *lines[changed + 1 :]]))
    assert verdict.wrong and not verdict.hazards
    # a register of A, overwritten behind the product that reads it
    fragments = [i for i, line in enumerate(lines) if re.search(r"HGMMA\S* R\d+, R\d+, gdesc", line)]
    register = re.search(r"HGMMA\S* R\d+, (R\d+), gdesc", lines[fragments[0]])[1]
    early = f"        /*fff0*/                   MOV {register}, RZ ;"
    verdict = machine_code.compare(launch, "\n".join([*lines[: fragments[0] + 1], early, *lines[fragments[0] + 1 :]]))
    assert verdict.hazards and not verdict.wrong and f"writes {register}" in verdict.hazards[0]
    # a product that is left out
    verdict = machine_code.compare(launch, "\n".join(lines[:at] + lines[at + 1 :]))
    assert "products in machine code" in verdict.wrong[0]


def test_which_assembler_is_taken():
    assert assembler.release("12.8") < assembler.SOUND <= assembler.release("13.1")
    assert assembler.release("unknown") == (0, 0)
    assert assembler.instead("/own", "12.9", "/other", "13.0") == ""
    assert assembler.instead("/own", "12.8", "/other", "12.9") == "/other"
    with pytest.raises(RuntimeError, match="TRITON_PTXAS_PATH"):
        assembler.instead("/own", "12.8", "/other", "12.8")


def test_what_was_set_is_set_again_and_others_hooks_are_asked():
    knobs = triton.knobs
    before = knobs.nvidia.ptxas.path
    seen = []

    def theirs(*args):
        seen.append(len(args))
        return ("key", "hash") if not args else None

    former = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = theirs
    try:
        with assembler.sound():
            key, digest = knobs.runtime.add_stages_inspection_hook()
            stages = {"cubin": lambda source, metadata: knobs.nvidia.ptxas.path}
            knobs.runtime.add_stages_inspection_hook(None, stages, None, None, 90)
            assembled = stages["cubin"]("", {})
        assert knobs.runtime.add_stages_inspection_hook is theirs
    finally:
        knobs.runtime.add_stages_inspection_hook = former
    assert "key" in key and "hash" in digest and seen == [0, 5]
    assert knobs.nvidia.ptxas.path == before
    if assembler.for_hopper() != before:  # else Triton's own choice is right, and nothing is changed
        assert assembled == assembler.for_hopper() and "fused_inr" in key


DIVISION = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry divide(.param .u64 a, .param .u64 b, .param .u64 c, .param .u32 x, .param .u32 y, .param .u32 z) {
  .reg .b64 %l<5>;
  .reg .b32 %r<5>;
  .reg .pred %p<3>;
  ld.param.u64 %l0, [a];
  ld.param.u64 %l1, [b];
  ld.param.u64 %l2, [c];
  ld.param.u32 %r0, [x];
  ld.param.u32 %r1, [y];
  ld.param.u32 %r2, [z];
  div.u64 %l3, %l0, %l1;
  div.s32 %r3, %r0, %r1;
  setp.ne.u64 %p0, %l3, %l2;
  setp.ne.or.s32 %p1, %r3, %r2, %p0;
  @%p1 bra WRONG;
  ret;
WRONG:
  bar.sync 0;
  bra WRONG;
}
"""


def test_divisions_and_calls_are_followed():
    """A kernel that ends where two quotients are what they should be, and never where they are not."""
    code = machine_code.read(machine_code.assemble(DIVISION, assembler.for_hopper()))
    assert any(i.op == "CALL.REL.NOINC" for i in code.instructions), "no subroutine divides"
    random = np.random.default_rng(0)
    for size in (8, 20, 33, 50, 63):
        a, b = (int(v) for v in random.integers(1, 1 << size, 2))
        a = a if size % 2 else a * b % (1 << 64)
        x, y = int(random.integers(-(1 << 31), 1 << 31)), int(random.choice([-77777, -3, 1, 9, 1 << 20]))
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        parameters = struct.pack("<QQQiii", a, b, a // b, x, y, quotient)
        assert not machine_code.trace(code, parameters, 0, 0, 1, limit=10_000).hazards
        for wrong in ((a, b, a // b + 1, x, y, quotient), (a, b, a // b, x, y, quotient - 1)):
            with pytest.raises(machine_code.Undecided, match="without an end"):
                machine_code.trace(code, struct.pack("<QQQiii", *wrong), 0, 0, 1, limit=10_000)
