"""Occupancy and roofline of the static report: numbers computed by hand, the reading of loops, and one real sample."""

from __future__ import annotations

import pytest
from fused_inr.bench import roofline, static_report
from fused_inr.bench.roofline import RowCost, estimate, occupancy

DEVICE = {d.name: d for d in roofline.DEVICES}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # 116 registers: 3,712 a warp, in units of 256 3,840; 16,384 / 3,840 = 4 warps a scheduler, 16 in all
        (("sm90", 116, 8, 98304), (16, 2, 64, "registers")),
        # 98,304 + 1,024 bytes of 233,472: two blocks; three of 40 registers would fit otherwise
        (("sm90", 40, 8, 98304), (16, 2, 64, "shared")),
        # the same on an A100: 167,936 bytes, one block
        (("sm80", 40, 8, 98304), (8, 1, 64, "shared")),
        # 32 registers: 16 warps a scheduler, 64 in all
        (("sm90", 32, 4, 0), (64, 16, 64, "registers")),
        (("sm86", 32, 4, 0), (48, 12, 48, "warps")),
        (("sm90", 16, 1, 0), (32, 32, 64, "blocks")),
        # 512 columns of tensor memory, 256 a block
        (("sm100", 64, 4, 4096, 256), (8, 2, 64, "tmem")),
        # 132 programs: one on each of 132 multiprocessors, two on some of 108
        (("sm90", 64, 4, 4096, 0, 132), (4, 1, 64, "programs")),
        (("sm80", 64, 4, 4096, 0, 132), (8, 2, 64, "programs")),
        (("sm90", 255, 16, 0), (0, 0, 64, "registers")),
    ],
)
def test_occupancy(arguments, expected):
    found = occupancy(*arguments)
    assert (found.warps, found.blocks, found.of, found.by) == expected


def test_peak_rates_are_those_of_the_data_sheets():
    for name, tflops in {"A100": 19.5, "H100": 67, "H200": 67, "B200": 75}.items():
        assert 2e-12 * DEVICE[name].fma == pytest.approx(tflops, rel=0.01)
        assert DEVICE[name].arch in roofline.LIMITS
    assert DEVICE["H200"].sfu == 132 * 16 * 1.98e9
    for name, tflops in {"A100": 9.7, "H100": 34, "H200": 34, "B200": 37}.items():
        assert 2e-12 * DEVICE[name].fp64 == pytest.approx(tflops, rel=0.02)
    assert DEVICE["A100"].imul == 108 * 64 * 1.41e9 == DEVICE["A100"].alu


def test_each_unit_can_bind():
    device = DEVICE["H200"]
    for unit, work in {
        "memory": RowCost(4800, 0, "half", 0, 0),
        "tensor": RowCost(0, 989_000, "half", 0, 0),
        "sfu": RowCost(0, 0, "half", 132 * 16 * 1.98, 0),
        "fma": RowCost(0, 0, "half", 0, 132 * 128 * 1.98),
        "imul": RowCost(0, 0, "half", 0, 0, imul=132 * 64 * 1.98),
        "alu": RowCost(0, 0, "half", 0, 0, alu=132 * 64 * 1.98),
        "fp64": RowCost(0, 0, "half", 0, 0, fp64=132 * 64 * 1.98),
    }.items():
        found = estimate(work, device)
        assert found["bound"] == unit
        assert found["floor"] == found[unit] == pytest.approx(1000)  # picoseconds
        assert sum(found[u] for u in roofline.UNITS) == found["floor"]


ROW = {
    "arch": "sm90", "kernel": "forward", "type": "bfloat16", "activation": "sine", "level": 0, "N": 256, "K": 256,
    "block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "mufu_at": [64], "fp32_at": [512],
}  # fmt: skip


def test_a_row_of_a_layer():
    """The roofline of a SIREN layer as in a table of the data sheet's numbers: 213, 133 and 65 ps a row."""
    found = roofline.row_cost(ROW)
    assert found.bytes == 2 * (256 + 256)
    assert found.tensor == 2 * 256 * 256
    # 64 in each of 256 threads, for 128 rows and half of the columns: one sine an element
    assert found.sfu == 64 * 256 / 128 * 2 == 256
    assert found.fma == 512 * 256 / 128 * 2
    time = estimate(found, DEVICE["H200"])
    assert (round(time["memory"]), round(time["tensor"]), round(time["sfu"])) == (213, 133, 61)
    assert time["bound"] == "memory"
    assert estimate(found, DEVICE["H100"])["memory"] > time["memory"]


@pytest.mark.parametrize(
    ("change", "bytes_", "tensor", "fma"),
    [
        # three products of half type; the loop of 4 steps splits operands in 36 instructions a thread
        ({"type": "float32 bf16x3", "fp32_at": [512, 36]}, 4 * 512, 3 * 2 * 256 * 256, (512 + 4 * 36) * 4),
        # no tensor cores: a multiply-add for each of 256 x 256, and the map outside the loop
        ({"type": "float32 ieee", "fp32_at": [512, 999]}, 4 * 512, 0, 256 * 256 + 512 * 4),
        # 4 branches share one read of x; all of K = 2 outside loops
        (
            {"type": "float32 tf32", "activation": "split", "K": 2, "block_k": 2},
            4 * (2 + 256), 0, 512 * 4,
        ),
        # from x: g and x in, gz out; from what the forward kept: derivatives, or z in float32
        ({"kernel": "gz", "activation": "split"}, 2 * (256 + 256 + 4 * 256), 4 * 2 * 256 * 256, 512 * 4),
        ({"kernel": "gz_from_z", "activation": "split"}, 2 * (256 + 4 * 256) + 2 * 4 * 256, 0, 512 * 4),
        ({"kernel": "gz_from_z", "type": "float32 tf32"}, 4 * 3 * 256, 0, 512 * 4),
        ({"kernel": "forward_save"}, 2 * 3 * 256, 2 * 256 * 256, 512 * 4),
        ({"kernel": "weight_grad", "activation": "-", "mufu_at": [0], "fp32_at": [0]}, 2 * 512, 2 * 256 * 256, 0),
        ({"kernel": "sum", "activation": "-"}, 4 * 256, 0, 256),
        # 3 columns are computed as 4, K of 40 as 64
        ({"N": 4, "K": 40, "block_n": 4, "type": "float32 ieee", "fp32_at": [10, 7]}, 4 * 44, 0, 4 * 64 + 20),
    ],
)  # fmt: skip
def test_work_of_each_kernel(change, bytes_, tensor, fma):
    found = roofline.row_cost(ROW | change)
    assert (found.bytes, found.tensor, found.fma) == (bytes_, tensor, fma)


@pytest.mark.parametrize(
    ("kernel", "bytes_", "forward", "backward"),
    [
        ("mlp_forward", 2 * (2 + 3), 1, 0),
        ("mlp_save", 2 * (2 + 3) + 2 * 2 * 4 * 64, 1, 0),
        ("mlp_backward", 2 * (2 + 3 + 2) + 2 * 2 * 4 * 64, 0, 2),
        ("mlp_recompute", 2 * (2 + 3 + 2), 1, 2),
        ("mlp_loss", 2 * (2 + 3 + 2) + 4, 1, 2),
    ],
)
def test_work_of_a_network(kernel, bytes_, forward, backward):
    row = ROW | {"kernel": kernel, "N": 64, "K": 2, "num_warps": 4, "mufu_at": [9, 64, 64], "fp32_at": [9, 0, 1]}
    found = roofline.row_cost(row)
    assert found.bytes == bytes_
    # three hidden layers and 16 padded outputs; backwards 16 padded inputs as well, which are multiply-adds before
    assert found.tensor == forward * 2 * 64 * (3 * 64 + 16) + backward * 2 * 64 * (16 + 3 * 64 + 16)
    # of 128 threads and 128 rows: 64 once and three times, the 9 outside the loop over rows never
    assert (found.sfu, found.fma) == (64 + 3 * 64, 3)


def test_work_of_a_map():
    pytest.importorskip("triton")
    row = ROW | {"kernel": "act_map", "type": "float32 ieee", "level": 1, "block_m": 16, "block_n": 64, "num_warps": 4}
    del row["block_k"]
    found = roofline.row_cost(row | {"mufu_at": [8], "fp32_at": [100]})
    assert found.bytes == 4 * 256 * 3  # z and g in, dz out
    # 8 elements a thread
    assert (found.sfu, found.fma, found.tensor) == (256, 100 * 128 * 4 / 16, 0)


def test_work_of_moments():
    """A program of 256 threads: 16 draws a thread for each of 64 settings, which share what it takes to make them."""
    at = {"fma": [640, 320], "xu": [64, 32], "imul": [256, 16], "alu": [128, 256, 16], "fp64": [0, 128]}
    row = ROW | {"kernel": "moments", "type": "float32 ieee", "N": 64, "K": 4096, "usual_at": at}
    found = roofline.row_cost(row)
    assert (found.fma, found.sfu, found.imul, found.alu, found.fp64) == (20.625, 2.0625, 1.25, 17.125, 8)
    assert found.bytes == 2 * 3 * 8 / 4096  # three sums of a value and its derivative
    time = estimate(found, DEVICE["H200"])
    assert time["bound"] == "alu" and time["floor"] == pytest.approx(17.125 / (132 * 64 * 1.98e9) * 1e12)


def test_what_did_not_compile_has_no_estimate():
    row = {"arch": "sm90", "problems": ["CompilationError: .."]}
    roofline.annotate(row)
    assert "occupancy" not in row
    assert roofline.of_table(row) is None


SASS = """
forward_kernel:
        /*0000*/                   MUFU.RCP R1, R2 ;
.L_x_0:
        /*0010*/                   FFMA R1, R2, R3, R4 ;
.L_x_1:
        /*0020*/              @!P0 FADD R1, R2, R3 ;
        /*0030*/                   MUFU.SIN R1, R2 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   FFMA2 R2, R4, R6, R8 ;
        /*0060*/               @P2 BRA `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   FMUL R1, R2, R3 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/               @P3 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_2) ;
"""


def test_loops_are_found_in_the_sass():
    aot = pytest.importorskip("fused_inr.bench.aot")
    assert aot.by_depth(SASS, aot._SPECIAL) == [1, 0, 1]
    assert aot.by_depth(SASS, aot._FLOAT32) == [1, 3, 1]
    assert aot.by_depth("", aot._FLOAT32) == [0]
    assert aot.by_depth("        /*0090*/                   FHFMA R1, R2.H0_H0, R3.H0_H0, R4 ;", aot._FLOAT32) == [1]


SKIPPING = """
kernel:
        /*0000*/              @!P1 BRA `(.L_x_9) ;
.L_x_0:
        /*0010*/                   FFMA R1, R2, R3, R4 ;
        /*0020*/              @!P2 BRA `(.L_x_1) ;
        /*0030*/                   FADD R1, R2, R3 ;
        /*0040*/                   FADD R1, R2, R3 ;
.L_x_1:
        /*0050*/                   FFMA R1, R2, R3, R4 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
.L_x_9:
        /*0070*/                   FMUL R1, R2, R3 ;
        /*0080*/                   EXIT ;
"""


def test_what_a_jump_skips_is_told_from_what_is_usual():
    """A path for rare arguments is left out; a loop that may run no time is not."""
    aot = pytest.importorskip("fused_inr.bench.aot")
    assert aot.by_depth(SKIPPING, aot._FLOAT32) == [1, 4]
    assert aot.by_depth(SKIPPING, aot._FLOAT32, usual=True) == [1, 2]


def test_a_compiled_sample():
    """Compiled in the report's worker: what the SASS holds agrees with what the map is known to do."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    job = {"arch": "sm90", "dtype": torch.bfloat16, "precision": "ieee", "activation": "sine"}
    moment = {"kernel": "moments", "N": 64, "K": 4096, "dtype": torch.float32}
    layer, network, moments = static_report.compile_all(
        [
            job | {"kernel": "forward", "N": 256, "K": 256},
            job | {"kernel": "mlp_forward", "N": 32, "K": 2},
            job | moment,
        ],
        processes=1,
    )
    for row in (layer, network, moments):
        assert not row["problems"]
        assert set(row["roofline"]) == {"H200", "H100"}
        assert 0 < row["occupancy"]["warps"] <= 64
    # one special function an element, and a few for divisions of indices
    sfu = DEVICE["H200"].sfu * 1e-12
    assert 256 <= layer["roofline"]["H200"]["sfu"] * sfu < 1.1 * 256
    assert 4 * 32 <= network["roofline"]["H200"]["sfu"] * sfu < 1.1 * 4 * 32
    assert layer["roofline"]["H200"]["bound"] == "memory"
    # the activations of a network never reach memory
    assert network["roofline"]["H200"]["bound"] != "memory"
    # two values a draw, each widened, and of each two sums and a product and a multiply-add twice, in float64
    pipes = {
        unit: moments["roofline"]["H200"][unit] * getattr(DEVICE["H200"], unit) * 1e-12 for unit in ("sfu", "fp64")
    }
    assert 2 <= pipes["sfu"] < 2.5
    assert 8 <= pipes["fp64"] < 14
    assert moments["roofline"]["H200"]["bound"] in ("alu", "fma", "fp64")
    text = static_report.table([layer, network])
    assert "what binds, H200: 1" in text
    assert layer["occupancy"]["by"] in text
