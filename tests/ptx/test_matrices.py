"""Matrix instructions against matrix products: fragments, layouts in shared memory, what has to be waited for.

Layouts are written here once more, from the figures of the PTX manual, element by element.
"""

import numpy as np
import pytest

from .assemble import clean, kinds, run

rng = np.random.default_rng(0)
#: small whole numbers: every product and sum is exact
HALVES = {"f16": np.float16, "bf16": np.uint16, "tf32": np.float32}


def whole(*shape: int) -> np.ndarray:
    return rng.integers(-8, 9, shape).astype(np.float32)


def narrow(values: np.ndarray, kind: str) -> np.ndarray:
    """In memory: bf16 as its bits."""
    if kind == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(HALVES[kind])


def load_words(first: int, count: int, array: int, each: int) -> str:
    """Registers %r{first} .. of each lane from consecutive words of an array, `each` words a lane."""
    text = f"mul.wide.u32 %w9, %t, {4 * each}; add.s64 %w9, %w9, %a{array};"
    return text + "".join(f"ld.global.b32 %r{first + i}, [%w9+{4 * i}];" for i in range(count))


def store_words(first: int, count: int, array: int = 0, name: str = "r") -> str:
    text = f"mul.wide.u32 %w9, %t, {4 * count}; add.s64 %w9, %w9, %a{array};"
    return text + "".join(f"st.global.b32 [%w9+{4 * i}], %{name}{first + i};" for i in range(count))


def registers(first: int, count: int, name: str = "r") -> str:
    return "{" + ", ".join(f"%{name}{first + i}" for i in range(count)) + "}"


# -- mma


def fragment_places(K: int, kind: str) -> tuple[list, list]:
    """(row, k) of each element of A and (k, column) of B, by lane and register (halves: two a register)."""
    a, b = [], []
    for lane in range(32):
        g, t = lane // 4, lane % 4
        if kind == "tf32":
            a.append([(g + 8 * (i % 2), t + 4 * (i // 2)) for i in range(K // 2)])
            b.append([(t + 4 * i, g) for i in range(K // 4)])
        else:
            a.append([(g + 8 * (i % 2), 2 * t + h + 8 * (i // 2)) for i in range(K // 4) for h in (0, 1)])
            b.append([(2 * t + h + 8 * i, g) for i in range(K // 8) for h in (0, 1)])
    return a, b


@pytest.mark.parametrize(("kind", "K"), [("f16", 8), ("f16", 16), ("bf16", 8), ("bf16", 16), ("tf32", 4), ("tf32", 8)])
def test_products_of_fragments(kind, K):
    A, B, C = whole(16, K), whole(K, 8), whole(16, 8)
    places_a, places_b = fragment_places(K, kind)
    fragments = [
        np.array([[M[i, j] for i, j in lane] for lane in places]) for M, places in ((A, places_a), (B, places_b))
    ]
    words_a, words_b = (np.ascontiguousarray(narrow(f, kind)).view(np.uint32) for f in fragments)
    c = np.array([[C[g // 4 + 8 * (i // 2), 2 * (g % 4) + i % 2] for i in range(4)] for g in range(32)], np.float32)
    found = np.zeros((32, 4), np.float32)
    of_a, of_b = words_a.shape[1], words_b.shape[1]
    body = load_words(10, of_a, 1, of_a) + load_words(30, of_b, 2, of_b) + load_words(40, 4, 3, 4)
    body += f"mma.sync.aligned.m16n8k{K}.row.col.f32.{kind}.{kind}.f32 {registers(50, 4)}, {registers(10, of_a)}, "
    body += f"{registers(30, of_b)}, {registers(40, 4)};" + store_words(50, 4)
    clean(run(body, found, words_a, words_b, c))
    product = A @ B + C
    assert (found == [[product[g // 4 + 8 * (i // 2), 2 * (g % 4) + i % 2] for i in range(4)] for g in range(32)]).all()


def single(kind: str, factors: list[float], start: float, **options) -> float:
    """start + the sum of x * 1 over the factors, by one mma: element (0, 0)."""
    a, b, c = np.zeros((32, 4), np.float32), np.ones((32, 2), np.float32), np.zeros((32, 4), np.float32)
    a[:4, 0], c[0, 0] = factors, start
    found = np.zeros((32, 4), np.float32)
    body = load_words(10, 4, 1, 4) + load_words(30, 2, 2, 2) + load_words(40, 4, 3, 4)
    body += f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {registers(50, 4)}, {registers(10, 4)}, "
    body += f"{registers(30, 2)}, {registers(40, 4)};" + store_words(50, 4)
    clean(run(body, found, a, b, c, **options))
    return float(found[0, 0])


def test_tf32_factors_are_cut():
    assert single("tf32", [1 + 2.0**-10, 0, 0, 0], 0) == 1 + 2.0**-10
    assert single("tf32", [1 + 2.0**-10 + 2.0**-11 + 2.0**-20, 0, 0, 0], 0) == 1 + 2.0**-10


def test_sums_are_rounded_once_or_cut():
    almost = [2.0**-24, 2.0**-25, 0, 0]
    assert single("tf32", almost, 1) == 1 + 2.0**-23
    assert single("tf32", almost, 1, cut_sums=True) == 1
    assert single("tf32", [-f for f in almost], -1, cut_sums=True) == -1
    assert single("tf32", [2.0**127] * 4, 3e38, cut_sums=True) == np.finfo(np.float32).max
    assert single("tf32", [2.0**127] * 4, 3e38) == np.inf


def test_all_lanes_take_part():
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    body = f"setp.lt.u32 %p1, %t, 31; @%p1 {product} {registers(50, 4)}, {registers(10, 4)}, {registers(30, 2)}, "
    assert kinds(run(body + f"{registers(40, 4)};")) == {"lanes of a warp are missing where all must take part"}


# -- ldmatrix, stmatrix


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_to_and_from_registers(count, trans):
    matrices = rng.integers(0, 1 << 16, (count, 8, 8), np.uint16)
    rows = np.zeros((32, 8), np.uint16)
    rows[: 8 * count] = matrices.reshape(-1, 8)
    suffix = f"x{count}{'.trans' if trans else ''}.shared.b16"
    fill = ".shared .align 16 .b8 space[1024]; shl.b32 %r1, %t, 4; mov.u32 %r2, space; add.s32 %r1, %r1, %r2;"
    fill += load_words(10, 4, 1, 4) + "st.shared.v4.b32 [%r1], {%r10, %r11, %r12, %r13}; bar.warp.sync -1;"
    found = np.zeros((32, count), np.uint32)
    body = fill + f"ldmatrix.sync.aligned.m8n8.{suffix} {registers(20, count)}, [%r1];" + store_words(20, count)
    clean(run(body, found, rows))
    for j in range(count):
        matrix = matrices[j].T if trans else matrices[j]
        expected = [
            int(matrix[lane // 4, 2 * (lane % 4)]) | int(matrix[lane // 4, 2 * (lane % 4) + 1]) << 16
            for lane in range(32)
        ]
        assert found[:, j].tolist() == expected
    # and back
    again = np.zeros((32, 8), np.uint16)
    body = ".shared .align 16 .b8 space[1024]; shl.b32 %r1, %t, 4; mov.u32 %r2, space; add.s32 %r1, %r1, %r2;"
    body += load_words(20, count, 1, count) + f"stmatrix.sync.aligned.m8n8.{suffix} [%r1], {registers(20, count)};"
    body += f"bar.warp.sync -1; setp.lt.u32 %p1, %t, {8 * count}; @!%p1 ret;"
    clean(run(body + "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r1];" + store_words(10, 4), again, found))
    assert (again[: 8 * count] == rows[: 8 * count]).all()


# -- operands in shared memory (wgmma, tcgen05)


class Operand:
    """A matrix [MN, K] in shared memory, in one of the canonical layouts: its bytes, the upper part of its descriptor.

    The smallest piece is 16 bytes, of neighbours along K or, `mn_major`, along MN. Eight rows of `swizzle` bytes (16
    without one) are an atom, in which the pieces of a row are exchanged by the row's number.
    """

    def __init__(self, values: np.ndarray, kind: str, swizzle: int, mn_major: bool, blackwell: bool = False):
        self.mn_major = mn_major
        size = 4 if kind == "tf32" else 2
        raw = np.ascontiguousarray(narrow(values, kind)).view(np.uint32 if size == 4 else np.uint16)
        MN, K = values.shape
        row_bytes = swizzle or 16
        width, atom = row_bytes // size, 8 * row_bytes
        across, along = (MN, K) if mn_major else (K, MN)  # the direction of an atom's rows, and the other one
        atoms_across, atoms_along = -(-across // width), -(-along // 8)
        # atoms lie one after the other, those of the other direction first
        step_across, step_along = atom * atoms_along, atom
        self.image = np.zeros(32768, np.uint8)
        for mn in range(MN):
            for k in range(K):
                inner, row = (mn, k) if mn_major else (k, mn)
                base = inner // width * step_across + row // 8 * step_along
                piece = inner % width * size // 16 ^ {128: row % 8, 64: row % 8 // 2, 32: row % 8 // 4, 0: 0}[swizzle]
                at = base + row % 8 * row_bytes + 16 * piece + inner * size % 16
                self.image[at : at + size] = raw[mn, k : k + 1].view(np.uint8)
        self.bytes = -(-step_across * atoms_across // 1024) * 1024
        # the leading distance is that across, the other one that along; exchanged for MN-major without a swizzle
        leading, stride = (step_along, step_across) if mn_major and not swizzle else (step_across, step_along)
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62
        self.descriptor = leading >> 4 << 16 | stride >> 4 << 32 | mode | (1 << 46 if blackwell else 0)


def fill(array: int, offset: int, count: int, threads: int) -> str:
    """Copies bytes of an array to shared memory, a word at a time."""
    text = "shl.b32 %r1, %t, 2; mov.u32 %r2, space; add.s32 %r1, %r1, %r2;"
    text += f"cvt.u64.u32 %w1, %t; shl.b64 %w1, %w1, 2; add.s64 %w1, %w1, %a{array};"
    for at in range(0, count, 4 * threads):
        text += f"ld.global.b32 %r3, [%w1+{at}]; st.shared.b32 [%r1+{offset + at}], %r3;"
    return text


def descriptor(register: str, operand: Operand, offset: int) -> str:
    """Into a 64-bit register; shared memory begins on a multiple of 1,024 bytes."""
    text = f"mov.u32 %r5, space; add.s32 %r5, %r5, {offset}; shr.u32 %r5, %r5, 4; cvt.u64.u32 {register}, %r5;"
    return text + f"or.b64 {register}, {register}, {operand.descriptor};"


SPACE = ".shared .align 1024 .b8 space[65536];"
FENCED = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def wgmma_body(A, B, kind, N, K, in_registers=False, before=FENCED, after=DONE, add=0, signs=(1, 1)) -> str:
    body = SPACE + fill(1, 0, A.bytes, 128) + fill(2, 32768, B.bytes, 128)
    body += descriptor("%d10", A, 0) + descriptor("%d11", B, 32768)
    body += "".join(f"mov.f32 %f{i}, 0f40000000;" for i in range(N // 2))  # 2
    body += f"setp.ne.u32 %p1, {add}, 0;"
    if in_registers:
        body += load_words(60, 4, 3, 4)
    operand = registers(60, 4) if in_registers else "%d10"
    trans = "" if kind == "tf32" else ", {}, {}" if not in_registers else ", {1}"
    trans = trans.format(*(int(m) for m in (A.mn_major, B.mn_major)))
    body += (
        before + f"wgmma.mma_async.sync.aligned.m64n{N}k{K}.f32.{kind}.{kind} {registers(0, N // 2, 'f')}, {operand}, "
    )
    return body + f"%d11, %p1, {signs[0]}, {signs[1]}{trans};" + after


def result_of(found: np.ndarray, N: int) -> np.ndarray:
    """[64, N] of the accumulators of four warps."""
    D = np.zeros((64, N), np.float32)
    for thread in range(128):
        warp, lane = thread // 32, thread % 32
        for i in range(N // 2):
            D[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = found[thread, i]
    return D


@pytest.mark.parametrize(
    ("kind", "N", "swizzles", "majors"),
    [
        ("f16", 8, (0, 0), (0, 0)),
        ("bf16", 64, (32, 32), (0, 0)),
        ("bf16", 64, (0, 0), (1, 1)),
        ("f16", 64, (128, 128), (1, 1)),
        ("bf16", 128, (128, 64), (1, 1)),
        ("f16", 32, (64, 32), (1, 0)),
        ("bf16", 256, (32, 128), (0, 1)),
        ("tf32", 16, (32, 32), (0, 0)),
        ("tf32", 128, (0, 0), (0, 0)),
    ],
)
def test_products_of_warp_groups(kind, N, swizzles, majors):
    K = 8 if kind == "tf32" else 16
    a, b = whole(64, K), whole(N, K)
    A, B = (Operand(v, kind, s, bool(m)) for v, s, m in zip((a, b), swizzles, majors))
    for add, signs in ((0, (1, 1)), (1, (1, 1)), (1, (-1, 1))):
        found = np.zeros((128, N // 2), np.float32)
        body = wgmma_body(A, B, kind, N, K, add=add, signs=signs) + store_words(0, N // 2, name="f")
        clean(run(body, found, A.image, B.image, threads=128))
        assert (result_of(found, N) == signs[0] * (a @ b.T) + 2 * add).all()


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_the_left_factor_in_registers(kind):
    K, N = 8 if kind == "tf32" else 16, 32
    a, b = whole(64, K), whole(N, K)
    B = Operand(b, kind, 32, False)
    places, _ = fragment_places(K, kind)
    fragment = np.array([[a[16 * warp + i, k] for i, k in lane] for warp in range(4) for lane in places])
    words = np.ascontiguousarray(narrow(fragment, kind)).view(np.uint32)
    found = np.zeros((128, N // 2), np.float32)
    body = wgmma_body(Operand(a, kind, 32, False), B, kind, N, K, in_registers=True) + store_words(0, N // 2, name="f")
    clean(run(body, found, B.image, B.image, words, threads=128))
    assert (result_of(found, N) == a @ b.T).all()


def wgmma_launch(before=FENCED, after=DONE + "{store}", **more):
    a, b = whole(64, 16), whole(32, 16)
    A, B = Operand(a, "f16", 32, False), Operand(b, "f16", 32, False)
    after = after.replace("{store}", store_words(0, 16, name="f"))
    words = np.zeros((128, 4), np.uint32)
    body = wgmma_body(A, B, "f16", 32, 16, before=before, after=after, **more)
    return run(body, np.zeros((128, 16), np.float32), A.image, B.image, words, threads=128)


def wgmma_faults(*args, **more) -> set[str]:
    return kinds(wgmma_launch(*args, **more))


def test_what_products_of_warp_groups_need():
    assert wgmma_faults() == set()
    # what others write must be behind a barrier, and behind a fence
    assert "race: read after write" in wgmma_faults("fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;")
    assert wgmma_faults("bar.sync 0; wgmma.fence.sync.aligned;") == {
        "no proxy fence between a write and an asynchronous product"
    }
    # a fence on the other side of the barrier does as well
    assert wgmma_faults("bar.sync 0; fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;") == set()
    # registers that were written come behind wgmma.fence
    assert wgmma_faults("fence.proxy.async.shared::cta; bar.sync 0;") == {
        "wgmma without wgmma.fence after its registers were written"
    }
    late = "fence.proxy.async.shared::cta; wgmma.fence.sync.aligned; bar.sync 0; add.f32 %f3, %f3, %f3;"
    assert wgmma_faults(late) == {"wgmma without wgmma.fence after its registers were written"}
    # a left factor in registers: the assembler knows who writes it
    launch = wgmma_launch(FENCED + "add.u32 %r62, %r62, 0;", in_registers=True)
    assert kinds(launch) == set()
    assert {found.kind for found in launch.harmless} == {"left factor of wgmma written after wgmma.fence"}
    # the compiler's copies of registers do not count
    assert wgmma_faults(late.replace("add.f32 %f3, %f3, %f3", "mov.f32 %f3, %f4")) == set()


def test_what_has_to_be_waited_for():
    register = "register touched before the product was waited for"
    operand_used = "written while products read it, or touched before they were done"
    commit, wait = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned {};"
    assert wgmma_faults(after=commit + "{store}") == {register}
    assert wgmma_faults(after=commit + wait.format(1) + "{store}") == {register}
    assert wgmma_faults(after=wait.format(0) + "{store}") == {register}  # nothing was committed
    assert wgmma_faults(after=commit + "mov.b32 %f3, 0;" + wait.format(0)) == {register}
    write = "st.shared.b32 [%r1], %t;"
    assert operand_used in wgmma_faults(after=commit + "bar.sync 0;" + write + wait.format(0))
    # after the wait of one warp the others may still be reading
    assert wgmma_faults(after=commit + wait.format(0) + write) == {"race: write after read"}
    assert wgmma_faults(after=commit + wait.format(0) + "bar.sync 0;" + write + "{store}") == set()


def test_a_fragment_may_be_read_but_not_written_meanwhile():
    commit, wait = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
    kept = "add.s32 %r70, %r60, %r61;"
    changed = "add.s32 %r60, %r60, %r61;"
    assert wgmma_faults(after=commit + kept + wait, in_registers=True) == set()
    assert wgmma_faults(after=commit + changed + wait, in_registers=True) == {
        "register touched before the product was waited for"
    }
    assert wgmma_faults(after=commit + wait + changed, in_registers=True) == set()


# -- tensor memory of sm_100

ALLOCATED = """
setp.lt.u32 %p2, %t, 32; setp.eq.u32 %p3, %t, 0;
mov.u32 %r2, space; add.s32 %r6, %r2, 65024; add.s32 %r7, %r2, 65032;
@%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r6], {columns};
@%p2 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
@%p3 mbarrier.init.shared::cta.b64 [%r7], 1;
{fence} bar.sync 0;
ld.shared.b32 %r8, [%r6];
"""
COMMIT = "@%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r7];"
WAIT = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r7], 0; @!done bra.uni again; }"
FREED = "bar.sync 0; @%p3 mbarrier.inval.shared::cta.b64 [%r7];"
FREED += "@%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r8, {columns};"
FENCE = "fence.proxy.async.shared::cta;"


def instruction_word(kind: str, M: int, N: int, a_mn: bool, b_mn: bool) -> int:
    number = {"f16": 0, "bf16": 1, "tf32": 2}[kind]
    return 1 << 4 | number << 7 | number << 10 | a_mn << 15 | b_mn << 16 | N >> 3 << 17 | M >> 4 << 24


def tensor_body(
    A, B, kind, M, N, commit=COMMIT, wait=WAIT, fence=FENCE, freed=FREED, load_wait=True, store=True
) -> str:
    columns = max(32, 1 << (N - 1).bit_length())
    body = SPACE + fill(1, 0, A.bytes, 128) + fill(2, 32768, B.bytes, 128)
    body += ALLOCATED.format(columns=columns, fence=fence) + descriptor("%d10", A, 0) + descriptor("%d11", B, 32768)
    word = instruction_word(kind, M, N, A.mn_major, B.mn_major)
    kind = "tf32" if kind == "tf32" else "f16"
    body += f"setp.ne.u32 %p4, 1, 1; @%p3 tcgen05.mma.cta_group::1.kind::{kind} [%r8], %d10, %d11, {word}, %p4;"
    body += commit + wait
    body += "shr.u32 %r9, %t, 5; shl.b32 %r9, %r9, 21; add.s32 %r9, %r9, %r8;"  # the warp's lanes
    if M == 128:
        body += f"tcgen05.ld.sync.aligned.32x32b.x{N}.b32 {registers(0, N, 'f')}, [%r9+0];"
    else:
        body += f"tcgen05.ld.sync.aligned.16x32bx2.x{N // 2}.b32 {registers(0, N // 2, 'f')}, [%r9+0], {N // 2};"
    body += "tcgen05.wait::ld.sync.aligned;" if load_wait else ""
    body += store_words(0, N if M == 128 else N // 2, name="f") if store else ""
    return body + freed.format(columns=columns)


@pytest.mark.parametrize(
    ("kind", "M", "N", "swizzles", "majors"),
    [
        ("f16", 128, 64, (128, 128), (1, 1)),
        ("bf16", 128, 32, (32, 32), (0, 0)),
        ("bf16", 64, 64, (0, 64), (0, 1)),
        ("f16", 64, 16, (32, 0), (0, 0)),
        ("tf32", 128, 128, (32, 32), (0, 0)),
        ("tf32", 64, 32, (0, 32), (0, 0)),
    ],
)
def test_products_into_tensor_memory(kind, M, N, swizzles, majors):
    K = 8 if kind == "tf32" else 16
    a, b = whole(M, K), whole(N, K)
    A, B = (Operand(v, kind, s, bool(m), True) for v, s, m in zip((a, b), swizzles, majors))
    found = np.zeros((128, N if M == 128 else N // 2), np.float32)
    clean(run(tensor_body(A, B, kind, M, N), found, A.image, B.image, threads=128))
    if M == 64:  # lane l < 16 of a warp: the first half of a row; l + 16: the second
        found = found.reshape(4, 2, 16, N // 2).transpose(0, 2, 1, 3).reshape(64, N)
    assert (found == a @ b.T).all()


def tensor_faults(**changed) -> set[str]:
    A, B = Operand(whole(128, 16), "f16", 32, False, True), Operand(whole(32, 16), "f16", 32, False, True)
    found = np.zeros((128, 32), np.float32)
    return kinds(run(tensor_body(A, B, "f16", 128, 32, **changed), found, A.image, B.image, threads=128))


def test_what_products_into_tensor_memory_need():
    assert tensor_faults() == set()
    assert tensor_faults(fence="") == {"no proxy fence between a write and an asynchronous product"}
    assert tensor_faults(wait="") == {"written while products read it, or touched before they were done"}
    assert tensor_faults(load_wait=False) == {"register touched before the product was waited for"}
    assert tensor_faults(commit="", store=False) == {"every warp waits", "tensor memory misused"}
    assert tensor_faults(freed="") == {"tensor memory misused"}
    half = "bar.sync 0; @%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r8, 64;"
    assert tensor_faults(freed=half) == {"tensor memory misused"}


def test_a_barrier_by_its_generic_address():
    generic = "cvt.u64.u32 %w5, %r7; cvta.shared.u64 %w5, %w5;"
    assert tensor_faults(commit=generic + COMMIT.replace("%r7", "%w5").replace(".shared::cluster", "")) == set()


def test_operands_are_kept_until_the_product_is_done():
    write = "st.shared.b32 [%r1], %t;"
    fault = "written while products read it, or touched before they were done"
    assert fault in tensor_faults(commit=COMMIT + write)
    assert tensor_faults(wait=WAIT + write) == set()


@pytest.mark.parametrize("kind", ["f16", "tf32"])
@pytest.mark.parametrize("M", [64, 128])
def test_the_left_factor_in_tensor_memory(kind, M):
    """Stored there by the warps, which wait for their stores and for each other."""
    K, N, words = 8 if kind == "tf32" else 16, 32, 8
    a, b = whole(M, K), whole(N, K)
    B = Operand(b, kind, 32, False, True)
    rows = np.ascontiguousarray(narrow(a, kind)).view(np.uint32)  # [M, 8]
    image = np.zeros((128, words), np.uint32)
    if M == 128:
        image[:] = rows
    else:
        image.reshape(4, 32, words)[:, :16, :4] = rows.reshape(4, 16, words)[:, :, :4]
        image.reshape(4, 32, words)[:, 16:, :4] = rows.reshape(4, 16, words)[:, :, 4:]
    word = instruction_word(kind, M, N, False, False)

    def body(stored="tcgen05.wait::st.sync.aligned;", barrier="bar.sync 0;"):
        text = SPACE + fill(2, 32768, B.bytes, 128) + ALLOCATED.format(columns=64, fence=FENCE)
        text += descriptor("%d11", B, 32768) + load_words(60, words, 1, words)
        text += "shr.u32 %r9, %t, 5; shl.b32 %r9, %r9, 21; add.s32 %r9, %r9, %r8;"
        if M == 128:
            text += f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r9+32], {registers(60, 8)};"
        else:
            text += f"tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r9+32], 4, {registers(60, 4)};"
        text += stored + barrier + "setp.ne.u32 %p4, 1, 1;"
        text += f"@%p3 tcgen05.mma.cta_group::1.kind::{kind} [%r8], [%r8+32], %d11, {word}, %p4;" + COMMIT + WAIT
        shape = f"32x32b.x{N}.b32" if M == 128 else f"16x32bx2.x{N // 2}.b32"
        count, offset = (N, "") if M == 128 else (N // 2, f", {N // 2}")
        text += f"tcgen05.ld.sync.aligned.{shape} {registers(0, count, 'f')}, [%r9+0]{offset};"
        return text + "tcgen05.wait::ld.sync.aligned;" + store_words(0, count, name="f") + FREED.format(columns=64)

    found = np.zeros((128, N if M == 128 else N // 2), np.float32)
    clean(run(body(), found, image, B.image, threads=128))
    if M == 64:
        found = found.reshape(4, 2, 16, N // 2).transpose(0, 2, 1, 3).reshape(64, N)
    assert (found == a @ b.T).all()
    again = np.zeros_like(found)
    assert "touched before the copy to it was waited for" in kinds(
        run(body(stored=""), again, image, B.image, threads=128)
    )
    # warps that come later have stored nothing yet
    assert {"race: read after write", "read before it was written"} & kinds(
        run(body(barrier=""), again, image, B.image, threads=128)
    )
