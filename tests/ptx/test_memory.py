"""Memory and what orders it: each fault that the executor knows, planted in a kernel of a few lines, and the same
kernel without it."""

import numpy as np
import pytest

from .assemble import clean, kinds, run

rng = np.random.default_rng(0)
RAW, WAR, WAW = (f"race: {a} after {b}" for a, b in (("read", "write"), ("write", "read"), ("write", "write")))

#: the thread's words in global memory (%w1 of the first array, %w2 of the second) and in shared memory (%r1)
PLACES = """
.shared .align 16 .b8 space[4096];
mul.wide.u32 %w1, %g, 4; add.s64 %w2, %w1, %a1; add.s64 %w1, %w1, %a0;
shl.b32 %r1, %t, 2; mov.u32 %r2, space; add.s32 %r1, %r1, %r2;
"""
#: the same word of the thread 32 further on, around 64
BESIDE = "xor.b32 %r3, %t, 32; shl.b32 %r3, %r3, 2; add.s32 %r3, %r3, %r2;"


def two_arrays(n: int = 64) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(n, np.uint32), rng.integers(0, 1 << 32, n, np.uint32)


# -- loads and stores


@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
@pytest.mark.parametrize("shape", ["b8", "b16", "b32", "b64", "v2.b16", "v4.b16", "v2.b32", "v4.b32", "v2.b64"])
def test_what_is_stored_is_loaded(space, shape):
    lanes = int(shape[1]) if shape[0] == "v" else 1
    size = int(shape.split("b")[-1]) // 8
    data = rng.integers(0, 256, 32 * lanes * size, np.uint8)
    found, register = np.zeros_like(data), {1: "%r", 2: "%h", 4: "%r", 8: "%d"}[size]
    names = ", ".join(f"{register}{20 + i}" for i in range(lanes))
    vector, scale = f"{{{names}}}" if lanes > 1 else names, lanes * size
    body = f".shared .align 16 .b8 space[1024]; .local .align 16 .b8 depot[64]; mul.wide.u32 %w1, %t, {scale};"
    body += f"add.s64 %w2, %w1, %a1; add.s64 %w1, %w1, %a0; ld.global.{shape} {vector}, [%w2];"
    if space == "shared":
        body += f"mul.lo.s32 %r1, %t, {scale}; mov.u32 %r2, space; add.s32 %r1, %r1, %r2;"
        body += f"st.shared.{shape} [%r1], {vector}; ld.shared.{shape} {vector}, [%r1];"
    elif space == "local":
        body += f"mov.u64 %w5, depot; st.local.{shape} [%w5+16], {vector}; ld.local.{shape} {vector}, [%w5+16];"
    elif space == "generic":  # shared memory for even lanes, local for odd ones
        body += f"mov.u64 %w5, depot; cvta.local.u64 %w5, %w5; mul.wide.u32 %w6, %t, {scale}; mov.u64 %w7, space;"
        body += "add.s64 %w6, %w6, %w7; cvta.shared.u64 %w6, %w6; and.b32 %r9, %t, 1; setp.eq.u32 %p1, %r9, 0;"
        body += f"selp.b64 %w6, %w6, %w5, %p1; st.{shape} [%w6], {vector}; ld.{shape} {vector}, [%w6];"
    body += f"st.global.{shape} [%w1], {vector};"
    clean(run(body, found, data))
    assert (found == data).all()


@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16"])
def test_small_numbers_are_extended(kind):
    data = rng.integers(0, 256, 64, np.uint8)
    found = np.zeros(32, np.int32)
    body = f"mul.wide.u32 %w1, %t, {int(kind[1:]) // 8}; add.s64 %w1, %w1, %a1; ld.global.{kind} %r9, [%w1];"
    clean(run(body + "mul.wide.u32 %w2, %t, 4; add.s64 %w2, %w2, %a0; st.global.b32 [%w2], %r9;", found, data))
    assert (found == data.view({"s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16}[kind])[:32]).all()


def test_variables_of_the_module():
    head = ".global .align 4 .b32 table[4] = {5, 6, 0x7fffffff, 8};\n.const .align 2 .u16 small[2] = {9, 10};"
    body = "and.b32 %r1, %t, 3; mul.wide.u32 %w1, %r1, 4; mov.u64 %w2, table; add.s64 %w1, %w1, %w2;"
    body += "ld.global.b32 %r9, [%w1]; ld.const.u16 %h1, [small+2]; cvt.u32.u16 %r8, %h1; add.s32 %r9, %r9, %r8;"
    found = np.zeros(32, np.uint32)
    clean(run(body + "mul.wide.u32 %w3, %t, 4; add.s64 %w3, %w3, %a0; st.global.b32 [%w3], %r9;", found, head=head))
    assert found.tolist() == [15, 16, 0x7FFFFFFF + 10, 18] * 8


@pytest.mark.parametrize(
    ("place", "kind"),
    [("[%w1+{}]", "out of bounds"), ("[%w1+-4]", "out of bounds"), ("[%w1+2]", "misaligned")],
)
@pytest.mark.parametrize("direction", ["read", "write"])
def test_bounds_and_alignment_of_global_memory(direction, place, kind):
    access = place.format(4 if kind != "misaligned" else 2)
    body = PLACES + ("ld.global.b32 %r9, {};" if direction == "read" else "st.global.b32 {}, %t;").format(access)
    found = kinds(run(body, *two_arrays(), threads=64))
    expected = {kind if kind == "misaligned" else f"{direction} {kind}"}
    assert expected <= found  # the last thread's, misaligned, is beyond the end too
    clean(run(body.replace(access, "[%w1]"), *two_arrays(), threads=64))


def test_an_access_beyond_one_tensor_never_lands_in_the_next():
    body = "mov.u32 %r9, 1; st.global.b32 [%a0+1048576], %r9;"
    assert kinds(run(body, np.zeros(8, np.uint32), np.zeros(1 << 20, np.uint32))) == {"write out of bounds"}


def test_bounds_of_shared_and_local_memory():
    body = ".shared .align 4 .b8 space[64]; .local .align 4 .b8 depot[8]; mov.u32 %r1, space; mov.u64 %w1, depot;"
    clean(run(body + "st.shared.b32 [%r1+60], 1; st.local.b32 [%w1+4], 1;"))
    assert kinds(run(body + "st.shared.b32 [%r1+64], 1;")) == {"write out of bounds"}
    assert kinds(run(body + "mov.u32 %r2, 0; st.shared.b32 [%r2], 1;")) == {"write out of bounds"}
    assert kinds(run(body + "st.local.b32 [%w1+8], 1;")) == {"write out of bounds"}


def test_shared_memory_is_not_what_an_earlier_block_left():
    body = ".shared .align 4 .b8 space[64]; mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, space;"
    body += "setp.eq.u32 %p2, %t, 0; and.pred %p1, %p1, %p2; @%p1 st.shared.b32 [%r2], 5; bar.warp.sync -1;"
    assert kinds(run(body + "@%p1 ld.shared.b32 %r3, [%r2];", grid=2)) == set()
    assert kinds(run(body + "ld.shared.b32 %r3, [%r2];", grid=2)) == {"read before it was written"}


# -- races within a block

EXCHANGE = PLACES + BESIDE + "ld.global.b32 %r9, [%w2]; st.shared.b32 [%r1], %r9; {} ld.shared.b32 %r8, [%r3];"


def test_a_barrier_between_write_and_read():
    found, data = two_arrays()
    clean(run(EXCHANGE.format("bar.sync 0;") + "st.global.b32 [%w1], %r8;", found, data, threads=64))
    assert (found == np.roll(data, 32)).all()
    for missing in ("", "bar.warp.sync -1;"):
        launch = run(EXCHANGE.format(missing) + "st.global.b32 [%w1], %r8;", *two_arrays(), threads=64)
        assert RAW in kinds(launch)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_a_barrier_between_read_and_write(order):
    body = EXCHANGE.format("bar.sync 0;") + "st.global.b32 [%w1], %r8; {} st.shared.b32 [%r1], %t;"
    clean(run(body.format("bar.sync 0;"), *two_arrays(), threads=64, order=order))
    found = kinds(run(body.format(""), *two_arrays(), threads=64, order=order))
    assert WAR in found or RAW in found


def test_two_warps_write_one_place():
    body = PLACES + "st.shared.b32 [%r2], {};"
    assert kinds(run(body.format("%t"), *two_arrays(), threads=64)) == {WAW}
    # equal values are harmless: lanes that hold copies of one element
    launch = clean(run(body.format("7"), *two_arrays(), threads=64))
    assert {found.kind for found in launch.harmless} == {"write after write of the same value"}


def test_races_through_global_memory():
    body = "xor.b32 %r3, %t, 32; mul.wide.u32 %w3, %r3, 4; add.s64 %w3, %w3, %a0; st.global.b32 [%w1], %t; {} "
    body = PLACES + body + "ld.global.b32 %r9, [%w3]; st.global.b32 [%w2], %r9;"
    found, copy = two_arrays()
    clean(run(body.format("bar.sync 0;"), found, copy, threads=64))
    assert (copy == np.roll(np.arange(64), 32)).all()
    assert kinds(run(body.format(""), *two_arrays(), threads=64)) == {RAW, WAR}


def test_blocks_are_in_no_order():
    write = "mov.u32 %r9, %ctaid.x; setp.eq.u32 %p1, %r9, {0}; @%p1 st.global.b32 [%a0], {1};"
    read = "setp.eq.u32 %p2, %r9, {0}; @%p2 ld.global.b32 %r8, [%a0]; @%p2 st.global.b32 [%a1], %r8;"
    assert kinds(run(write.format(0, 5) + read.format(1), *two_arrays(), grid=2)) == {
        "race between blocks: read after write"
    }
    assert kinds(run(write.format(1, 5) + read.format(0), *two_arrays(), grid=2)) == {
        "race between blocks: write after read"
    }
    assert kinds(run(write.format(0, 5) + write.format(1, 6), *two_arrays(), grid=2)) == {
        "race between blocks: write after write"
    }
    clean(run(write.format(0, 5) + read.format(0), *two_arrays(), grid=2))


def test_neighbours_in_a_word_do_not_race():
    body = PLACES + "mov.u32 %r5, space; add.s32 %r5, %r5, %t; cvt.u16.u32 %h1, %t; st.shared.b8 [%r5], %t;"
    clean(run(body.replace("st.shared.b8 [%r5], %t", "st.shared.b8 [%r5], %h1"), *two_arrays(), threads=64))


# -- values that a race leaves uncertain


def uncertain(then: str) -> str:
    """The second warp reads what the first one has just written: %r8 is uncertain there."""
    body = "setp.lt.u32 %p1, %t, 32; setp.ge.u32 %p2, %t, 32; ld.global.b32 %r9, [%w2];"
    return PLACES + BESIDE + body + "mov.u32 %r8, 0; @%p1 st.shared.b32 [%r1], 3; @%p2 ld.shared.b32 %r8, [%r3];" + then


@pytest.mark.parametrize(
    "then",
    [
        "",
        "add.s32 %r8, %r8, %r9; add.s32 %r8, %r8, 1;",
        "@%p1 st.global.b32 [%w1], %r8;",
        "selp.b32 %r7, %r8, %r9, %p1; @%p2 st.global.b32 [%w1], %r7;",
        "mov.u32 %r8, 4; st.global.b32 [%w1], %r8;",
    ],
    ids=["not used", "computed with", "stored by others", "not selected", "overwritten"],
)
def test_an_uncertain_value_without_effect_is_harmless(then):
    launch = clean(run(uncertain(then), *two_arrays(), threads=64))
    assert "race whose value is not used" in {found.kind for found in launch.harmless}


@pytest.mark.parametrize(
    "then",
    [
        "st.global.b32 [%w1], %r8;",
        "add.s32 %r7, %r8, %r9; xor.b32 %r7, %r7, 5; st.global.b32 [%w1], %r7;",
        "selp.b32 %r7, %r8, %r9, %p2; st.global.b32 [%w1], %r7;",
        "setp.eq.u32 %p3, %r8, 5; @%p3 bra ON; add.s32 %r9, %r9, 1; ON: st.global.b32 [%w1], %r9;",
        "shfl.sync.bfly.b32 %r7, %r8, 1, 31, -1; st.global.b32 [%w1], %r7;",
        "and.b32 %r8, %r8, 0; add.s32 %r7, %r1, %r8; st.shared.b32 [%r7+512], %r9;",
    ],
    ids=["stored", "computed with", "selected", "decides", "shuffled", "an address"],
)
def test_an_uncertain_value_with_an_effect_is_a_fault(then):
    assert kinds(run(uncertain(then), *two_arrays(), threads=64)) == {RAW}


# -- barriers


def test_a_barrier_that_only_some_lanes_reach():
    body = "setp.lt.u32 %p1, %t, 16; @%p1 bra ON; bar.sync 0; ON: bar.sync 0;"
    assert "lanes of a warp are missing where all must take part" in kinds(run(body, threads=64))


def test_a_barrier_that_a_warp_has_left():
    assert kinds(run("setp.ge.u32 %p1, %t, 32; @%p1 ret; bar.sync 0;", threads=64)) == {
        "a barrier that a warp has left for good"
    }


PRODUCER = """
setp.ge.u32 %p1, %t, 64; @%p1 bra CONSUMER;
st.shared.b32 [%r1], %t; {arrive} bra.uni END;
CONSUMER: add.s32 %r3, %t, -64; shl.b32 %r3, %r3, 2; add.s32 %r3, %r3, %r2;
{wait} ld.shared.b32 %r8, [%r3]; st.global.b32 [%w1], %r8;
END:
"""


def test_named_barriers_order_those_who_take_part():
    """Two warps produce, two consume; what the producers do after they have arrived is not ordered."""
    found, data = two_arrays(128)
    body = PLACES + PRODUCER
    clean(run(body.format(arrive="bar.arrive 3, 128;", wait="bar.sync 3, 128;"), found, data, threads=128))
    assert found[64:].tolist() == list(range(64))
    clean(run(body.format(arrive="bar.sync 3, 128;", wait="bar.sync 3, 128;"), found, data, threads=128))
    late = "bar.arrive 3, 128; st.shared.b32 [%r1], 9;"
    launch = run(body.format(arrive=late, wait="bar.sync 3, 128;"), *two_arrays(128), threads=128)
    assert RAW in kinds(launch)
    apart = run(body.format(arrive="bar.sync 1, 64;", wait="bar.sync 2, 64;"), *two_arrays(128), threads=128)
    assert kinds(apart) == {RAW}


def test_a_barrier_of_some_warps_leaves_others_alone():
    body = PLACES + BESIDE + "st.shared.b32 [%r1], %t; setp.ge.u32 %p1, %t, 64; @%p1 bra END;"
    body += "bar.sync 1, 64; ld.shared.b32 %r8, [%r3]; {} END:"
    clean(run(body.format("bar.sync 1, 64; st.shared.b32 [%r1], %r8;"), *two_arrays(128), threads=128))
    assert WAR in kinds(run(body.format("st.shared.b32 [%r1], %r8;"), *two_arrays(128), threads=128))


def test_warps_that_wait_for_each_other():
    body = "setp.ge.u32 %p1, %t, 32; @%p1 bra OTHER; bar.sync 1, 64; bra.uni END; OTHER: bar.sync 2, 64; END:"
    assert kinds(run(body, threads=64)) == {"every warp waits"}


# -- asynchronous copies

COPY = PLACES + "cp.async.ca.shared.global [%r1], [%w2], 4; {} ld.shared.b32 %r8, [%r1]; st.global.b32 [%w1], %r8;"
PENDING = "touched before the copy to it was waited for"


def test_copies_are_there_once_waited_for():
    for wait in ("cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"):
        found, data = two_arrays()
        clean(run(COPY.format(wait), found, data, threads=64))
        assert (found == data).all()
    for wait in ("", "cp.async.commit_group;", "cp.async.commit_group; cp.async.wait_group 1;", "bar.sync 0;"):
        assert PENDING in kinds(run(COPY.format(wait), *two_arrays(), threads=64)), wait


def test_the_oldest_groups_are_done_first():
    body = "cp.async.ca.shared.global [%r1], [%w2], 4; cp.async.commit_group;"
    body += "cp.async.ca.shared.global [%r1+512], [%w2], 4; cp.async.commit_group; cp.async.wait_group 1;"
    body = PLACES + body + "ld.shared.b32 %r8, [%r1{}]; st.global.b32 [%w1], %r8;"
    clean(run(body.format(""), *two_arrays(), threads=64))
    assert PENDING in kinds(run(body.format("+512"), *two_arrays(), threads=64))


def test_others_need_a_barrier_after_the_wait():
    body = (
        PLACES + BESIDE + "cp.async.ca.shared.global [%r1], [%w2], 4; cp.async.wait_all; {} ld.shared.b32 %r8, [%r3];"
    )
    body += "st.global.b32 [%w1], %r8;"
    clean(run(body.format("bar.sync 0;"), *two_arrays(), threads=64))
    assert {RAW, PENDING} & kinds(run(body.format(""), *two_arrays(), threads=64))


def test_a_copy_of_nothing_is_zeros_and_reads_nothing():
    found, data = two_arrays()
    body = COPY.format("cp.async.wait_all;").replace("[%w2], 4;", "[%w2+4096], 4, %r15;")
    clean(run("mov.u32 %r15, 0;" + body, found, data, threads=64))
    assert not found.any()
    assert "read out of bounds" in kinds(run("mov.u32 %r15, 4;" + body, *two_arrays(), threads=64))


# -- statistics


@pytest.mark.parametrize(("stride", "wavefronts"), [(0, 1), (1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1)])
def test_wavefronts_of_shared_memory(stride, wavefronts):
    body = f".shared .align 16 .b8 space[8192]; mul.lo.s32 %r1, %t, {4 * stride}; mov.u32 %r2, space;"
    body += "add.s32 %r1, %r1, %r2; st.shared.b32 [%r1], 1;"
    launch = clean(run(body, statistics=True))
    assert launch.waves[launch.program.mnemonics.index("st.shared.b32")] == wavefronts


def test_wide_accesses_are_served_in_parts():
    body = ".shared .align 16 .b8 space[8192]; shl.b32 %r1, %t, 4; mov.u32 %r2, space; add.s32 %r1, %r1, %r2;"
    launch = clean(
        run(body + "st.shared.v4.b32 [%r1], {%t, %t, %t, %t}; ld.shared.v2.b32 {%r5, %r6}, [%r1];", statistics=True)
    )
    assert launch.waves[launch.program.mnemonics.index("st.shared.v4.b32")] == 4
    assert launch.waves[launch.program.mnemonics.index("ld.shared.v2.b32")] == 4  # every other word: two conflicts


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (4, 4), (8, 8), (32, 32), (64, 32)])
def test_sectors_of_global_memory(stride, sectors):
    array = np.zeros(4096, np.uint32)
    launch = clean(run(f"mul.wide.u32 %w1, %t, {stride}; add.s64 %w1, %w1, %a0; ld.global.b32 %r1, [%w1];", array,
                       statistics=True))  # fmt: skip
    first = array.ctypes.data % 32 // 4 * 4  # an array may begin within a sector
    expected = len({(first + stride * lane) // 32 for lane in range(32)})
    assert launch.waves[launch.program.mnemonics.index("ld.global.b32")] == expected
    assert abs(expected - sectors) <= 1
