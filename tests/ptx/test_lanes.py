"""What passes between the lanes of a warp, and which lanes run: shuffles, votes, reductions, branches, loops."""

import numpy as np
import pytest

from .assemble import clean, kinds, run

LANES = np.arange(32)
rng = np.random.default_rng(0)


def out(name: str = "%r9", at: str = "%w1") -> str:
    """Stores a 32-bit register of each thread to the first array."""
    return f"mul.wide.u32 {at}, %g, 4; add.s64 {at}, {at}, %a0; st.global.b32 [{at}], {name};"


def into(name: str, array: int) -> str:
    return f"mul.wide.u32 %w2, %g, 4; add.s64 %w2, %w2, %a{array}; ld.global.b32 {name}, [%w2];"


def shuffled(mode: str, a: int, lane: int, by: int, c: int) -> tuple[int, bool]:
    """The PTX manual's description: the lane that a value comes from, and whether that is in range."""
    limit, segment = c & 31, c >> 8 & 31
    highest = (lane & segment) | (limit & ~segment)
    lowest = lane & segment
    if mode == "up":
        j = lane - by
        ok = j >= highest
    elif mode == "down":
        j = lane + by
        ok = j <= highest
    elif mode == "bfly":
        j = lane ^ by
        ok = j <= highest
    else:
        j = lowest | (by & ~segment)
        ok = j <= highest
    return (j if ok else lane), ok


@pytest.mark.parametrize("by", [0, 1, 2, 7, 16, 31])
@pytest.mark.parametrize(("mode", "c"), [(m, 0 if m == "up" else 31) for m in ("idx", "bfly", "up", "down")]
                         + [("bfly", 0x181F), ("idx", 0x181F), ("up", 0x1800), ("down", 0x1C1F)])  # fmt: skip
def test_shuffles(mode, c, by):
    values, found, ranges = rng.integers(0, 1 << 32, 32, np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    body = into("%r1", 1) + f"shfl.sync.{mode}.b32 %r9|%p1, %r1, {by}, {c}, -1; selp.b32 %r8, 1, 0, %p1;" + out()
    body += "mul.wide.u32 %w3, %g, 4; add.s64 %w3, %w3, %a2; st.global.b32 [%w3], %r8;"
    clean(run(body, found, values, ranges))
    expected = [shuffled(mode, 0, lane, by, c) for lane in range(32)]
    assert found.tolist() == [values[j] for j, _ in expected]
    assert ranges.tolist() == [ok for _, ok in expected]


def test_a_value_of_a_lane_that_does_not_take_part():
    body = "setp.lt.u32 %p2, %t, 8; mov.u32 %r9, 0; @%p2 shfl.sync.bfly.b32 %r9, %t, 16, 31, 255;" + out()
    assert kinds(run(body, np.zeros(32, np.uint32))) == {"value of a lane that does not take part"}


def test_all_named_lanes_must_come():
    body = "setp.lt.u32 %p2, %t, 16; mov.u32 %r9, 0; @%p2 shfl.sync.bfly.b32 %r9, %t, 1, 31, -1;" + out()
    assert kinds(run(body, np.zeros(32, np.uint32))) == {"lanes of a warp are missing where all must take part"}


@pytest.mark.parametrize("pattern", [0, 0xFFFFFFFF, 0x80000001, 0x0000FF00])
def test_votes(pattern):
    values = np.array([pattern >> i & 1 for i in range(32)], np.uint32)
    for mode, value in (
        ("any", pattern != 0), ("all", pattern == 0xFFFFFFFF), ("uni", pattern in (0, 0xFFFFFFFF)),
    ):  # fmt: skip
        found = np.zeros(32, np.uint32)
        body = into("%r1", 1) + f"setp.ne.u32 %p1, %r1, 0; vote.sync.{mode}.pred %p3, %p1, -1; selp.b32 %r9, 1, 0, %p3;"
        clean(run(body + out(), found, values))
        assert set(found.tolist()) == {int(value)}
    found = np.zeros(32, np.uint32)
    clean(run(into("%r1", 1) + "setp.ne.u32 %p1, %r1, 0; vote.sync.ballot.b32 %r9, !%p1, -1;" + out(), found, values))
    assert set(found.tolist()) == {pattern ^ 0xFFFFFFFF}


@pytest.mark.parametrize("kind", ["u32", "s32", "b32"])
def test_reductions(kind):
    values = rng.integers(0, 1 << 32, 32, np.uint32)
    signed = values.view(np.int32).tolist()
    results = {
        "add": sum(values.tolist()) & 0xFFFFFFFF,
        "min": min(signed) if kind == "s32" else min(values.tolist()),
        "max": max(signed) if kind == "s32" else max(values.tolist()),
    }
    if kind == "b32":
        results = {f.__name__[8:]: int(f.reduce(values)) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)}
    for name, value in results.items():
        found = np.zeros(32, np.uint32)
        clean(run(into("%r1", 1) + f"redux.sync.{name}.{kind} %r9, %r1, -1;" + out(), found, values))
        assert set(found.tolist()) == {value & 0xFFFFFFFF}, name


def test_one_lane_is_elected():
    found = np.zeros(32, np.uint32)
    clean(run("mov.u32 %r9, 99; elect.sync %r8|%p1, -1; @%p1 mov.u32 %r9, %r8;" + out(), found))
    assert sorted(found.tolist()) == [0] + [99] * 31


# -- branches


def test_lanes_take_both_ways_and_meet_again():
    """Each lane its own way; behind, all of them shuffle together."""
    body = """
    and.b32 %r1, %t, 1; setp.ne.u32 %p1, %r1, 0;
    @%p1 bra ODD;
    mul.lo.s32 %r9, %t, 10; bra.uni JOIN;
    ODD: add.s32 %r9, %t, 1000;
    JOIN: shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
    """
    found = np.zeros(32, np.uint32)
    clean(run(body + out(), found))
    assert found.tolist() == [(lane ^ 1) * 10 if lane & 1 else (lane ^ 1) + 1000 for lane in range(32)]


def test_they_meet_though_one_way_lies_behind():
    """As compilers place rare paths: behind the end of the others."""
    body = """
    setp.eq.u32 %p1, %t, 5; mov.u32 %r9, %t;
    @%p1 bra RARE;
    JOIN: shfl.sync.idx.b32 %r9, %r9, 5, 31, -1;
    """
    behind = "ret; RARE: mov.u32 %r9, 77; bra.uni JOIN;"
    found = np.zeros(32, np.uint32)
    clean(run(body + out() + behind, found))
    assert found.tolist() == [77] * 32


def test_each_lane_leaves_a_loop_when_it_is_done():
    body = """
    mov.u32 %r9, 0; mov.u32 %r1, 0;
    LOOP: add.s32 %r1, %r1, 1; add.s32 %r9, %r9, %r1;
    setp.le.u32 %p1, %r1, %t;
    @%p1 bra LOOP;
    redux.sync.add.u32 %r2, %r1, -1; add.s32 %r9, %r9, %r2;
    """
    found = np.zeros(32, np.uint32)
    launch = clean(run(body + out(), found))
    steps = sum(range(1, 33))
    assert found.tolist() == [(n + 1) * (n + 2) // 2 + steps for n in range(32)]
    assert launch.by_mnemonic()["bra"] == 32  # as often as its slowest lane


def test_branches_within_branches():
    body = """
    mov.u32 %r9, 0;
    setp.lt.u32 %p1, %t, 16; @%p1 bra LOW;
    setp.lt.u32 %p2, %t, 24; @%p2 bra MIDDLE;
    add.s32 %r9, %r9, 1; bra.uni INNER;
    MIDDLE: add.s32 %r9, %r9, 2;
    INNER: add.s32 %r9, %r9, 10; bra.uni OUTER;
    LOW: add.s32 %r9, %r9, 3;
    OUTER: add.s32 %r9, %r9, 100;
    """
    found = np.zeros(32, np.uint32)
    launch = clean(run(body + out(), found))
    assert found.tolist() == [103] * 16 + [112] * 8 + [111] * 8
    last = launch.program.text.index("add.s32 %r9, %r9, 100")
    assert launch.counts[last] == 1  # all together


def test_lanes_that_end_are_not_waited_for():
    body = "setp.lt.u32 %p1, %t, 30; mov.u32 %r9, 7; @%p1 bra ON; ret; ON: bar.warp.sync -1;" + out()
    found = np.zeros(32, np.uint32)
    clean(run(body, found))
    assert found.tolist() == [7] * 30 + [0] * 2


def test_jumps_by_an_index():
    body = """
    and.b32 %r1, %t, 3; mov.u32 %r9, 0;
    @%p9 bra JOIN;
    brx.idx %r1, TABLE;
    TABLE: .branchtargets
        ZERO,
        ONE, TWO, ONE;
    ZERO: add.s32 %r9, %r9, 5; bra.uni JOIN;
    ONE: add.s32 %r9, %r9, 6; bra.uni JOIN;
    TWO: add.s32 %r9, %r9, 7;
    JOIN: add.s32 %r9, %r9, 100;
    """
    found = np.zeros(32, np.uint32)
    launch = clean(run("setp.ne.u32 %p9, %t, %t;" + body + out(), found))
    assert found.tolist() == [105, 106, 107, 106] * 8
    assert launch.counts[launch.program.text.index("add.s32 %r9, %r9, 100")] == 1
    assert kinds(run("setp.ne.u32 %p9, %t, %t;" + body.replace("%t, 3", "%t, 7") + out(), found)) == {
        "read out of bounds"
    }


def test_labels_of_inner_scopes():
    body = (
        "mov.u32 %r9, 0;"
        + 2
        * """
    {
        .reg .pred done; .reg .b32 count; mov.u32 count, 0;
        again: add.s32 count, count, 1; add.s32 %r9, %r9, 1;
        setp.ge.u32 done, count, 3; @!done bra.uni again;
    }
    """
    )
    found = np.zeros(32, np.uint32)
    clean(run(body + out(), found))
    assert found.tolist() == [6] * 32


def test_only_lanes_that_a_guard_names_are_written():
    found = np.zeros(32, np.uint32)
    clean(
        run("mov.u32 %r9, 1; setp.gt.u32 %p1, %t, 9; @%p1 add.s32 %r9, %t, 1; @!%p1 neg.s32 %r9, %r9;" + out(), found)
    )
    assert found.view(np.int32).tolist() == [-1] * 10 + list(range(11, 33))


def test_special_registers():
    found = np.zeros((3, 64, 4), np.uint32)
    names = ("%ctaid.x", "%laneid", "%warpid", "%nctaid.x")
    body = "mul.wide.u32 %w1, %g, 16; add.s64 %w1, %w1, %a0;"
    body += "".join(f"mov.u32 %r{i}, {name}; st.global.b32 [%w1+{4 * i}], %r{i};" for i, name in enumerate(names))
    clean(run(body, found, grid=3, threads=64))
    for block in range(3):
        for thread in range(64):
            assert found[block, thread].tolist() == [block, thread % 32, thread // 32, 3]


def test_an_endless_loop_and_a_trap():
    assert kinds(run("ON: bra.uni ON;", limit=1000)) == {"endless"}
    assert kinds(run("setp.eq.u32 %p1, %t, 3; @%p1 trap;")) == {"trap"}
