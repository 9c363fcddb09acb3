"""What launches cost the units of a multiprocessor: kernels whose costs can be written down."""

import numpy as np
import pytest
from fused_inr.bench import ptx, static_report
from fused_inr.bench.cases import Case, Workload
from fused_inr.bench.ptx import clocks, count

from .assemble import clean, run

PLACES = ".shared .align 16 .b8 space[8192]; mul.lo.s32 %r1, %t, {}; mov.u32 %r2, space; add.s32 %r1, %r1, %r2;"


def cost(body: str, *arrays: np.ndarray, arch: str = "sm80", **more) -> clocks.Cost:
    return clocks.cost(clean(run(body, *arrays, statistics=True, **more)), arch)


def test_arithmetic_at_the_rate_of_its_unit():
    """Beside the handful of instructions that every kernel of these tests begins with."""
    base = cost("").clocks
    for body, unit, instructions, rates in (
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", "fma", 1, {"sm80": 2, "sm90": 4, "sm100": 4}),
        ("ex2.approx.ftz.f32 %f1, %f2;", "special", 1, {"sm80": 0.5, "sm90": 0.5}),
        ("lop3.b32 %r1, %r2, %r3, %r4, 0x96;", "alu", 1, {"sm80": 2, "sm90": 2}),
        ("add.f64 %e1, %e2, %e3;", "fp64", 1, {"sm80": 1, "sm90": 2}),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", "shared", 1, {"sm80": 1, "sm90": 1}),
        ("add.s64 %d1, %d2, %d3;", "alu", 2, {"sm80": 2}),
    ):
        for arch, rate in rates.items():
            found = cost(100 * body, arch=arch).clocks
            assert found[unit] - cost("", arch=arch).clocks[unit] == pytest.approx(100 * instructions / rate), body
            assert found["issue"] - base["issue"] == pytest.approx(100 * instructions / 4), body


def test_matrix_products():
    zero = np.zeros(1, np.float32)
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, {%r9,%r10}, "
    product += "{%r1,%r2,%r3,%r4};"
    for arch, clocks_each in (("sm80", 2), ("sm90", 1), ("sm100", 0.5)):
        assert cost(50 * product, zero, arch=arch).clocks["tensor"] == 50 * clocks_each
    slow = product.replace("k16", "k8").replace("bf16", "tf32")
    assert cost(50 * slow, zero).clocks["tensor"] == 50 * 2  # half as deep, half as fast


def test_wavefronts_conflicts_and_sectors():
    found = cost(PLACES.format(4) + "st.shared.b32 [%r1], 1;")
    assert (found.wavefronts, found.conflicts) == (1, 1)
    found = cost(PLACES.format(64) + 3 * "st.shared.b32 [%r1], 1;")
    assert (found.wavefronts, found.conflicts) == (3 * 16, 16)
    assert found.clocks["shared"] == 48
    found = cost(PLACES.format(16) + "st.shared.v4.b32 [%r1], {%t, %t, %t, %t};")
    assert (found.wavefronts, found.conflicts) == (4, 1)
    array = np.zeros(1024 + 8, np.uint32)
    array = array[-(array.ctypes.data // 4) % 8 :][:1024]  # from the beginning of a sector
    address = "mul.wide.u32 %w1, %t, {}; add.s64 %w1, %w1, %a0; ld.global.b32 %r1, [%w1];"
    assert cost(address.format(4), array).sectors == 4
    found = cost(address.format(32), array)
    assert found.sectors == 32 and found.clocks["global"] == 8
    copy = PLACES.format(16) + "mul.wide.u32 %w1, %t, 16; add.s64 %w1, %w1, %a0;"
    found = cost(copy + "cp.async.cg.shared.global [%r1], [%w1], 16; cp.async.wait_all;", array)
    assert (found.wavefronts, found.sectors) == (4, 16)


def test_what_a_row_costs_is_a_difference():
    a, b = cost(10 * "fma.rn.f32 %f1, %f2, %f3, %f4;"), cost(30 * "fma.rn.f32 %f1, %f2, %f3, %f4;")
    row = b.minus(a, 4)
    assert row.clocks["fma"] == pytest.approx(20 / 2 / 4) and row.instructions == 5 and row.bound == "fma"


def test_every_instruction_of_the_network_kernels_has_a_unit():
    """Nothing is a guess: the first word of each is known."""
    words = (
        "add sub mul mad fma neg abs min max and or xor not shl shr shf lop3 prmt bfe bfi selp setp cvt cvta mov popc"
    )
    words += (
        " clz sin cos ex2 lg2 rcp sqrt rsqrt tanh div rem copysign ld st cp ldmatrix stmatrix shfl redux vote elect"
    )
    known = {
        *words.split(),
        "mma",
        "wgmma",
        "tcgen05",
        "mbarrier",
        "bra",
        "brx",
        "ret",
        "bar",
        "barrier",
        "fence",
        "trap",
    }
    for capability in (80, 90, 100):
        with ptx.emulated(capability) as device, ptx.few_programs(1):
            Workload(Case("network", "training", width=32, rows=100, precision="bf16", way="one-pass")).outcome("fused")
        for launch in device.launches:
            assert {name.split(".")[0] for name in launch.program.mnemonics} <= known


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_a_network_is_counted(arch):
    rows = count.count(arch, "sine", 64, "bf16", "inference", "default")
    (row,) = rows
    assert row["kernel"] == "forward_kernel" and row["bound"] in clocks.UNITS
    # 3 hidden products of 64 x 64 and one of 64 x 16 (three outputs, padded), multiply-adds a row
    assert row["clocks"]["tensor"] == pytest.approx((3 * 64 * 64 + 64 * 16) / clocks.TENSOR[arch])
    # one sine a feature and layer: 4 x 64 a row, 16 a clock
    assert row["clocks"]["special"] == pytest.approx(4 * 64 / 16)
    assert row["conflicts"] >= 0.9 and row["once"] >= 0
    text = count.table(rows)
    assert "forward" in text and f"{row['clocks']['special']:.1f}" in text


def test_what_cannot_be_counted(capsys):
    with pytest.raises(ValueError, match="sm70"):
        count.count("sm70", "sine", 64, "bf16", "inference", "default")
    with pytest.raises(ValueError, match="wavefronts"):
        clocks.cost(run(""), "sm80")
    assert static_report.main(["--count", "--arch", "sm86"]) == 2
    assert "sm86" in capsys.readouterr().err
