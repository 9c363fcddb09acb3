"""What the assembler made of a kernel: steps through its machine code (sm_90) and compares its wgmma with the PTX's.

The executor runs PTX; between it and the device stands the assembler. Releases of it up to CUDA 13.0 sometimes compute
the matrix descriptor of a wgmma from a uniform register that holds something else (a kernel's argument, say): the
product then reads other shared memory, or none that exists. Releases before 13.3 sometimes write to a register that a
wgmma has not read yet. Both are seen here: `trace` follows one warp, computes what integer instructions compute from
constants, parameters and thread numbers, leaves everything else unknown, and gives the descriptors of each HGMMA in
the order in which they run; `compare` holds them against those that the executor saw (`ExecutionOptions.products`).
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .engine import Launch

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
#: where a kernel's parameters begin in bank 0 of constant memory
PARAMETERS = {90: 0x210}
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:\d|T))\s+)?([A-Z][A-Zx0-9_.]*[A-Z0-9])\s*(.*?)\s*;\s*(?:/\*.*)?$"
)
_LABEL = re.compile(r"^(\.L_x?_?\w+|\$[\w$]+):")
_CONSTANT = re.compile(r"c\[(0x[0-9a-f]+)\]\[(?:(U?R\w+)\+?)?(0x[0-9a-f]+)?\]$")
_GROUP = re.compile(r"\[(U?R\w+)\]")

Value = int | None


class Undecided(Exception):
    """What a branch depends on is not among the numbers that are followed."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str
    op: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address:#06x} {'@' + self.guard + ' ' if self.guard else ''}{self.op} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Hgmma:
    """An HGMMA that ran: descriptors of A (None where A lies in registers) and B; None: not known."""

    instruction: Instruction
    registers: bool
    a: Value
    b: Value


@dataclass
class Code:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    #: address -> index
    at: dict[int | None, int] = field(default_factory=dict)


def read(sass: str) -> Code:
    """The instructions of the first kernel of what `nvdisasm -c` prints."""
    code = Code()
    for line in sass.splitlines():
        if m := _LABEL.match(line.strip()):
            code.labels[m[1]] = len(code.instructions)
        elif m := _LINE.match(line):
            operands = tuple(x.strip() for x in m[4].split(",")) if m[4] else ()
            code.at[int(m[1], 16)] = len(code.instructions)
            code.instructions.append(Instruction(int(m[1], 16), m[2] or "", m[3], operands))
    return code


def assemble(ptx: str, assembler: str, target: str = "sm_90a") -> str:
    """The machine code that an assembler (a path) makes of a PTX text, with Triton's options, as text."""
    from .. import aot

    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [assembler, "-lineinfo", f"--gpu-name={target}", str(source), "-o", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{assembler} failed: {done.stderr.strip()[:400]}")
        return aot.disassembled(binary)


def _signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


class Warp:
    """The first thread of a warp as it runs: its registers, as far as they are known."""

    def __init__(self, code: Code, constants: bytes, first_parameter: int, warp: int, block: int, grid: int):
        self.code, self.constants, self.first = code, constants, first_parameter
        self.special = {
            "SR_TID.X": 32 * warp, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.X": block, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0,
            "SR_CgaCtaId": 0, "SR_LANEID": 0, "SRZ": 0,
        }  # fmt: skip
        self.grid = grid
        self.r: dict[str, Value] = {}
        self.p: dict[str, bool | None] = {"PT": True, "UPT": True}
        self.local: dict[int, Value] = {}
        self.products: list[Hgmma] = []
        self.hazards: list[str] = []
        #: registers that products in flight read or write: register to the HGMMA, whether it is written, its group
        self.flying: dict[int, tuple[Instruction, bool, int]] = {}
        self.groups = 0

    # -- operands

    def register(self, name: str) -> Value:
        return 0 if name in ("RZ", "URZ") else self.r.get(name)

    def bank(self, offset: int, width: int = 4) -> Value:
        at = offset - self.first
        if at >= 0:
            return int.from_bytes(self.constants[at : at + width], "little") if at < len(self.constants) else None
        return {0xC: self.grid, 0x28: 0x100000}.get(offset)  # blocks of the grid; where the stack ends

    def value(self, text: str, width: int = 4) -> Value:
        text = text.removesuffix(".reuse")
        if text.startswith("-") and text[1:2].isalpha():
            v = self.value(text[1:], width)
            return None if v is None else -v & (M64 if width == 8 else M32)
        if text.startswith("~"):
            v = self.value(text[1:], width)
            return None if v is None else ~v & M32
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", text):
            return int(text, 0) & (M64 if width == 8 else M32)
        if m := _CONSTANT.match(text):
            if m[1] != "0x0":
                return None
            base = self.register(m[2]) if m[2] else 0
            return None if base is None else self.bank(base + int(m[3] or "0", 16), width)
        if re.fullmatch(r"U?R(Z|\d+)", text):
            if width == 4 or text in ("RZ", "URZ"):
                return self.register(text)
            kind, n = text.rstrip("0123456789"), int(text.lstrip("UR"))
            low, high = self.register(text), self.register(f"{kind}{n + 1}")
            return None if low is None or high is None else high << 32 | low
        return None

    def predicate(self, text: str) -> bool | None:
        if text.startswith("!"):
            v = self.predicate(text[1:])
            return None if v is None else not v
        return self.p.get(text)

    def put(self, name: str, value: Value, width: int = 4) -> None:
        if name in ("RZ", "URZ"):
            return
        kind, n = name.rstrip("0123456789"), int(name.lstrip("UR"))
        for k in range(width // 4):
            self.r[f"{kind}{n + k}"] = None if value is None else value >> (32 * k) & M32

    # -- instructions

    def run(self, limit: int) -> None:
        at, steps = 0, 0
        while at < len(self.code.instructions):
            i = self.code.instructions[at]
            steps += 1
            if steps > limit:
                raise Undecided(f"{limit} instructions without an end, at {i}")
            taken = self.predicate(i.guard) if i.guard else True
            base = i.op.split(".")[0]
            if base in ("BRA", "EXIT", "BRX", "CALL", "RET", "JMP", "BREAK"):
                target = self.branch(i, base, taken)
                if target == -1:
                    return
                at = at + 1 if target is None else target
                continue
            if taken is not False:
                self.step(i, base, taken)
            at += 1

    def branch(self, i: Instruction, base: str, taken: bool | None) -> int | None:
        conditions = [x for x in i.operands if re.fullmatch(r"!?U?P(\d|T)", x)]
        for c in conditions:
            v = self.predicate(c)
            taken = False if taken is False or v is False else None if v is None or taken is None else True
        if base == "EXIT" and taken is None:
            taken = False  # products that run too long are noticed
        if taken is None:
            raise Undecided(str(i))
        if not taken:
            return None
        if base == "EXIT":
            return -1
        if base == "RET" and i.op == "RET.REL.NODEC":
            address = self.value(i.operands[0].split()[0], 8)
            if address not in self.code.at:
                raise Undecided(str(i))
            return self.code.at[address]
        label = re.search(r"\.L\w+|\$[\w$]+", i.operands[-1])
        # a call keeps its return address in a register, as an ordinary number
        if not (base == "BRA" or i.op == "CALL.REL.NOINC") or not label or label[0] not in self.code.labels:
            raise Undecided(str(i))
        return self.code.labels[label[0]]

    def step(self, i: Instruction, base: str, certain: bool | None) -> None:
        self.watch(i, base)
        if base == "HGMMA":
            self.product(i)
            return
        if base == "WARPGROUP":
            return
        targets, predicates = _targets(i, base)
        compute = _COMPUTE.get(base)
        results: list[tuple[str, Value | bool, int]] = []
        if compute is not None:
            found = compute(self, i)
            if found is not None:
                results = found
        if not results:
            results = [(t, None, 4) for t in targets] + [(p, None, 0) for p in predicates]
        for name, value, width in results:
            if width == 0:
                if name not in ("PT", "UPT"):
                    self.p[name] = None if certain is None or value is None else bool(value)
            else:
                self.put(name, None if certain is None else value, width)

    def product(self, i: Instruction) -> None:
        gdesc = next(k for k, x in enumerate(i.operands) if x.startswith("gdesc"))
        group = _GROUP.search(i.operands[gdesc])
        assert group
        n = int(group[1].removeprefix("UR"))
        registers = gdesc == 2
        a = None if registers else self.value(f"UR{n}", 8)
        self.products.append(Hgmma(i, registers, a, self.value(f"UR{n + 2}", 8)))
        columns = int(re.match(r"HGMMA\.(?:SP\.)?64x(\d+)x", i.op)[1])  # type: ignore[index]
        for r in _span(i.operands[0], columns // 2):
            self.flying[r] = (i, True, self.groups)
            self.put(f"R{r}", None)
        if registers:
            for r in _span(i.operands[1], 4):
                self.flying.setdefault(r, (i, False, self.groups))
        if any(x.startswith("gsb") for x in i.operands):
            self.groups += 1

    def watch(self, i: Instruction, base: str) -> None:
        """Registers of products in flight stay untouched until they are waited for."""
        if i.op.startswith("WARPGROUP.DEPBAR"):
            left = int(i.operands[-1], 0)
            self.flying = {r: f for r, f in self.flying.items() if f[2] >= self.groups - left}
            return
        if not self.flying or base == "HGMMA":
            return
        targets, _ = _targets(i, base)
        written = {int(t[1:]) for t in targets if re.fullmatch(r"R\d+", t)}
        read = {int(x) for o in i.operands[bool(targets) :] for x in re.findall(r"\bR(\d+)", o)}
        for r in sorted(written | read):
            if r in self.flying:
                by, sums, _group = self.flying[r]
                if r in written or sums:
                    verb = "writes" if r in written else "reads"
                    self.hazards.append(f"`{i}` {verb} R{r} before `{by}` has been waited for")


def _span(name: str, count: int) -> range:
    name = name.removesuffix(".reuse")
    return range(0) if name == "RZ" else range(int(name[1:]), int(name[1:]) + count)


#: instructions that write no register
_NOTHING = frozenset(
    "ACQBULK BAR BPT BSSY BSYNC CCTL DEPBAR ERRBAR FENCE LDGDEPBAR LDGSTS MEMBAR NANOSLEEP NOP PREEXIT RED REDG ST STG "
    "STL STS STSM SYNCS UCGABAR_ARV UCGABAR_WAIT UTMACMDFLUSH UTMALDG UTMASTG WARPGROUP WARPSYNC YIELD".split()
)
#: instructions that write predicates alone
_PREDICATES = frozenset("DSETP FSETP HSETP2 ISETP PLOP3 R2P UISETP UPLOP3".split())
#: instructions that write a register first, and then carries
_CARRIES = frozenset("IADD3 IMAD LEA LOP3 UIADD3 UIMAD ULEA ULOP3 VIADD".split())
_WIDE = re.compile(r"\.(64|128)(?:\.|$)")


def _targets(i: Instruction, base: str) -> tuple[list[str], list[str]]:
    """Registers and predicates that an instruction writes."""
    registers: list[str] = []
    predicates: list[str] = []
    for x in () if base in _NOTHING else i.operands[:3]:
        name = x.removesuffix(".reuse")
        if re.fullmatch(r"U?P(\d|T)", name) and (not registers or base in _CARRIES):
            predicates.append(name)
        elif re.fullmatch(r"U?R(Z|\d+)", name) and not registers and base not in _PREDICATES:
            registers = _consecutive(name, _width(i, base))
        else:
            break
    return registers, predicates


def _consecutive(name: str, count: int) -> list[str]:
    """Registers from one on."""
    if name in ("RZ", "URZ"):
        return [name]
    kind, n = name.rstrip("0123456789"), int(name.lstrip("UR"))
    return [f"{kind}{n + k}" for k in range(count)]


def _width(i: Instruction, base: str) -> int:
    if base in ("LDSM",):
        return int(i.op.rsplit(".", 1)[1]) if i.op[-1] in "24" and i.op[-2] == "." else 1
    if base == "CS2R":
        return 1 if i.op.endswith(".32") else 2
    if base in ("DADD", "DMUL", "DFMA", "DSETP") or ".WIDE" in i.op or base in ("IMMA", "HMMA"):
        return 4 if base in ("IMMA", "HMMA") else 2
    if base in ("F2F", "I2F", "F2I") and ".F64" in i.op.split(base)[1][:5]:
        return 2
    if m := _WIDE.search(i.op):
        return 1 if base in ("SHF", "USHF", "LEA", "ISETP") else int(m[1]) // 32
    return 1


# -- what integer instructions compute: (name, value, width in bytes; 0: a predicate) each

_Result = list[tuple[str, "Value | bool", int]] | None


def _known(*values: Value) -> bool:
    return all(v is not None for v in values)


def _split(i: Instruction) -> tuple[str, list[str], list[str]]:
    """The register written, carries written, and what is read."""
    ops = [x.removesuffix(".reuse") for x in i.operands]
    carries = []
    k = 1
    while k < len(ops) and re.fullmatch(r"U?P(\d|T)", ops[k]):
        carries.append(ops[k])
        k += 1
    return ops[0], carries, ops[k:]


def _mov(w: Warp, i: Instruction) -> _Result:
    return [(i.operands[0], w.value(i.operands[1]), 4)]


def _imad(w: Warp, i: Instruction) -> _Result:
    d, carries, s = _split(i)
    wide = ".WIDE" in i.op
    high = ".HI" in i.op
    unsigned = ".U32" in i.op
    a, b = w.value(s[0]), w.value(s[1])
    c = w.value(s[2], 8 if wide or high else 4)
    extra = w.predicate(s[3]) if ".X" in i.op and len(s) > 3 else False
    zero = (a == 0 or b == 0) and c is not None
    width = 8 if wide else 4
    if extra is None or not (zero or _known(a, b, c)):
        return [(d, None, width), *((p, None, 0) for p in carries)]
    product = 0 if zero else (a * b if unsigned else _signed(a) * _signed(b))  # type: ignore[operator,arg-type]
    total = product + c + bool(extra)  # type: ignore[operator]
    if high:
        total = (total >> 32) & M32
    limit = 64 if wide else 32
    return [(d, total & ((1 << limit) - 1), width), *((p, bool((total >> limit) & 1), 0) for p in carries)]


def _iadd3(w: Warp, i: Instruction) -> _Result:
    d, carries, s = _split(i)
    width = 8 if i.op.endswith(".64") else 4
    values = [w.value(x, width) for x in s[:3]]
    # a negative operand is its complement and 1: -0 carries
    values = [1 << 8 * width if x[0] == "-" and v == 0 else v for x, v in zip(s[:3], values)]
    extra: list[bool | None] = [w.predicate(x) for x in s[3:]] if ".X" in i.op else []
    if not _known(*values) or None in extra:
        return [(d, None, width), *((p, None, 0) for p in carries)]
    total = sum(values) + sum(map(bool, extra))  # type: ignore[arg-type]
    bits = 8 * width
    out: list[tuple[str, Value | bool, int]] = [(d, total & ((1 << bits) - 1), width)]
    for k, p in enumerate(carries):
        out.append((p, (total >> bits) > k, 0))
    return out


def _added(w: Warp, i: Instruction) -> _Result:
    a, b = w.value(i.operands[1]), w.value(i.operands[2])
    return [(i.operands[0], None if a is None or b is None else (a + b) & M32, 4)]


def _absolute(w: Warp, i: Instruction) -> _Result:
    v = w.value(i.operands[1])
    return [(i.operands[0], None if v is None else abs(_signed(v)), 4)]


def _lea(w: Warp, i: Instruction) -> _Result:
    d, carries, s = _split(i)
    last = (
        w.predicate(s.pop()) if i.op.split(".")[-1] in ("X", "SX32") and re.fullmatch(r"!?U?P(\d|T)", s[-1]) else False
    )
    if ".HI" in i.op:
        a, b = w.value(s[0]), w.value(s[1])
        if ".SX32" in i.op:
            shift = w.value(s[2])
            wide = None if a is None else _signed(a)
        else:
            c, shift = w.value(s[2]), w.value(s[3])
            wide = None if a is None or c is None else c << 32 | a
        if wide is None or b is None or shift is None or last is None:
            return [(d, None, 4), *((p, None, 0) for p in carries)]
        total = (((wide << shift) >> 32) & M32) + b + bool(last)
    else:
        a, b, shift = w.value(s[0]), w.value(s[1]), w.value(s[2])
        if a is None or b is None or shift is None or last is None:
            return [(d, None, 4), *((p, None, 0) for p in carries)]
        total = ((a << shift) & M32) + b + bool(last)
    return [(d, total & M32, 4), *((p, total > M32, 0) for p in carries)]


def _lop3(w: Warp, i: Instruction) -> _Result:
    ops = [x.removesuffix(".reuse") for x in i.operands]
    predicates = []
    while re.fullmatch(r"U?P(\d|T)", ops[0]):
        predicates.append(ops.pop(0))
    d = ops.pop(0)
    if ".PAND" in i.op or len(ops) < 4:
        return [(d, None, 4), *((p, None, 0) for p in predicates)]
    lut = int(ops[3], 0)
    values = [w.value(x) for x in ops[:3]]
    # an operand on which the table does not depend may be unknown
    for k, bit in enumerate((4, 2, 1)):
        if values[k] is None and all((lut >> n & 1) == (lut >> (n | bit) & 1) for n in range(8) if not n & bit):
            values[k] = 0
    if None in values:
        zero = _lop3_unknown(values, lut)
        return [(d, zero, 4), *((p, None if zero is None else zero != 0, 0) for p in predicates)]
    a, b, c = values
    out = 0
    for n in range(8):
        if lut >> n & 1:
            out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)  # type: ignore[operator]
    out &= M32
    return [(d, out, 4), *((p, out != 0, 0) for p in predicates)]


def _lop3_unknown(values: list[Value], lut: int) -> Value:
    """The result where it is the same whatever the unknown operands hold."""
    results = set()
    unknown = [k for k, v in enumerate(values) if v is None]
    for choice in range(1 << len(unknown)):
        full = [
            M32 if v is None and choice >> unknown.index(k) & 1 else 0 if v is None else v for k, v in enumerate(values)
        ]
        a, b, c = full
        out = 0
        for n in range(8):
            if lut >> n & 1:
                out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        results.add(out & M32)
    return results.pop() if len(results) == 1 else None


def _shf(w: Warp, i: Instruction) -> _Result:
    d, a, s, c = (i.operands[0], *(w.value(x) for x in i.operands[1:4]))
    parts = i.op.split(".")
    left, high, kind = "L" in parts, "HI" in parts, next((p for p in parts if p in ("U32", "S32", "U64", "S64")), "U32")
    if s is None:
        return [(d, None, 4)]
    if kind.endswith("64"):
        if a is None or c is None:
            return [(d, None, 4)]
        s = min(s, 63)
        x = c << 32 | a
        if left:
            x = (x << s) & M64
        else:
            x = (_signed(x, 64) if kind == "S64" else x) >> s
        return [(d, (x >> 32 if high else x) & M32, 4)]
    s = min(s, 32)
    if left:
        if high:
            if a is None or c is None:
                return [(d, None, 4)]
            return [(d, ((c << 32 | a) << s >> 32) & M32, 4)]
        return [(d, None if a is None else (a << s) & M32, 4)]
    if high:
        return [(d, None if c is None else ((_signed(c) if kind == "S32" else c) >> s) & M32, 4)]
    if a is None or c is None:
        return [(d, None, 4)]
    return [(d, ((c << 32 | a) >> s) & M32, 4)]


def _sgxt(w: Warp, i: Instruction) -> _Result:
    a, bits = w.value(i.operands[1]), w.value(i.operands[2])
    if a is None or bits is None:
        return [(i.operands[0], None, 4)]
    x = a & ((1 << bits) - 1)
    return [(i.operands[0], (x if ".U32" in i.op else _signed(x, bits)) & M32, 4)]


def _sel(w: Warp, i: Instruction) -> _Result:
    p = w.predicate(i.operands[3])
    a, b = w.value(i.operands[1]), w.value(i.operands[2])
    return [(i.operands[0], (a if a == b else None) if p is None else a if p else b, 4)]


def _isetp(w: Warp, i: Instruction) -> _Result:
    parts = i.op.split(".")
    pd, pq, a, b, *rest = [x.removesuffix(".reuse") for x in i.operands]
    x, y = w.value(a), w.value(b)
    low = w.predicate(rest[1]) if "EX" in parts else None
    joined = w.predicate(rest[0])
    compare = parts[1]
    result: bool | None = None
    if compare in ("F", "T"):
        result = compare == "T"
    elif x is not None and y is not None:
        u, v = (x, y) if "U32" in parts else (_signed(x), _signed(y))
        if "EX" in parts and (low is None and (u == v)):
            result = None
        else:
            tie = bool(low) if "EX" in parts else compare in ("EQ", "LE", "GE")
            result = {
                "EQ": u == v and tie, "NE": u != v or (bool(low) if "EX" in parts else False),
                "LT": u < v or (u == v and tie), "LE": u < v or (u == v and tie),
                "GT": u > v or (u == v and tie), "GE": u > v or (u == v and tie),
            }[compare]  # fmt: skip
    how = next(p for p in parts if p in ("AND", "OR", "XOR"))

    def join(r: bool | None) -> bool | None:
        if how == "AND":
            return False if r is False or joined is False else None if r is None or joined is None else True
        if how == "OR":
            return True if r is True or joined is True else None if r is None or joined is None else False
        return None if r is None or joined is None else r != joined

    return [(pd, join(result), 0), (pq, join(None if result is None else not result), 0)]


def _minmax(w: Warp, i: Instruction) -> _Result:
    a, b, p = w.value(i.operands[1]), w.value(i.operands[2]), w.predicate(i.operands[3])
    if a is None or b is None or p is None:
        return [(i.operands[0], None, 4)]
    pick = min if p else max
    u, v = (a, b) if ".U32" in i.op else (_signed(a), _signed(b))
    return [(i.operands[0], pick(u, v) & M32, 4)]


def _prmt(w: Warp, i: Instruction) -> _Result:
    a, how, b = (w.value(x) for x in i.operands[1:4])
    if a is None or b is None or how is None or i.op != "PRMT":
        return [(i.operands[0], None, 4)]
    source, out = b << 32 | a, 0
    for k in range(4):
        nibble = how >> (4 * k) & 15
        byte = source >> (8 * (nibble & 7)) & 255
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << (8 * k)
    return [(i.operands[0], out, 4)]


def _special(w: Warp, i: Instruction) -> _Result:
    width = 4 * _width(i, i.op.split(".")[0])
    return [(i.operands[0], w.special.get(i.operands[1]), width)]


def _load_constant(w: Warp, i: Instruction) -> _Result:
    width = 4 * _width(i, i.op.split(".")[0])
    if any(x in i.op for x in (".U8", ".S8", ".U16", ".S16")):
        return [(i.operands[0], None, 4)]
    return [(i.operands[0], w.value(i.operands[1], width), width)]


def _spill(w: Warp, i: Instruction) -> _Result:
    """STL and LDL: registers that wait in local memory."""
    base = i.op.split(".")[0]
    place = i.operands[0 if base == "STL" else 1]
    m = re.fullmatch(r"\[(R\w+)(?:\.\w+)?(?:\+(-?0x[0-9a-f]+))?\]", place)
    start = w.register(m[1]) if m else None
    words = _width(i, base)
    if start is None:
        if base == "STL":
            w.local.clear()
        return None
    start += int(m[2] or "0", 16)  # type: ignore[index]
    whole = not any(x in i.op for x in (".U8", ".S8", ".U16", ".S16"))
    name = i.operands[1 if base == "STL" else 0].removesuffix(".reuse")
    names = [name if name == "RZ" else f"R{int(name[1:]) + k}" for k in range(words)]
    if base == "STL":
        for k, n in enumerate(names):
            w.local[start + 4 * k] = w.register(n) if whole else None
        return []
    return [(n, w.local.get(start + 4 * k) if whole else None, 4) for k, n in enumerate(names)]


def _r2ur(w: Warp, i: Instruction) -> _Result:
    d, carries, s = _split(i)
    if re.fullmatch(r"U?P(\d|T)", d):
        return None
    return [(d, w.value(s[0]), 4), *((p, None, 0) for p in carries)]


def _shfl(w: Warp, i: Instruction) -> _Result:
    p, d, a, lane, *_ = i.operands
    same = i.op == "SHFL.IDX" and w.value(lane) == 0
    return [(p, None, 0), (d, w.value(a) if same else None, 4)]


def _p2r(w: Warp, i: Instruction) -> _Result:
    mask, base = w.value(i.operands[3]), w.value(i.operands[2])
    if i.operands[1] != "PR" or i.op != "P2R" or mask is None or base is None:
        return [(i.operands[0], None, 4)]
    out = base & ~mask
    for k in range(7):
        if mask >> k & 1:
            v = w.p.get(f"P{k}")
            if v is None:
                return [(i.operands[0], None, 4)]
            out |= v << k
    return [(i.operands[0], out & M32, 4)]


def _r2p(w: Warp, i: Instruction) -> _Result:
    value, mask = w.value(i.operands[1]), w.value(i.operands[2])
    shift = {"R2P": 0, "R2P.B1": 8, "R2P.B2": 16, "R2P.B3": 24}.get(i.op)
    return [
        (f"P{k}", None if value is None or shift is None else bool(value >> (shift + k) & 1), 0)
        for k in range(7)
        if mask is None or mask >> k & 1
    ]


def _plop3(w: Warp, i: Instruction) -> _Result:
    pd, pq, *s = i.operands
    values = [w.predicate(x) for x in s[:3]]
    out: list[tuple[str, Value | bool, int]] = []
    for p, text in ((pd, s[3]), (pq, s[4] if len(s) > 4 else "0x0")):
        lut = int(text, 0)
        fits = {
            bool(lut >> n & 1)
            for n in range(8)
            if all(v is None or v == bool(n & bit) for v, bit in zip(values, (4, 2, 1), strict=True))
        }
        out.append((p, fits.pop() if len(fits) == 1 else None, 0))
    return out


# -- divisions of integers: an estimate in float32, which integer instructions then correct


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def _i2f(w: Warp, i: Instruction) -> _Result:
    """An integer as float32, to the nearest or (.RP) upwards."""
    parts = i.op.split(".")
    if not {"F64", "F16"}.isdisjoint(parts):
        return None
    wide, unsigned = not {"U64", "S64"}.isdisjoint(parts), not {"U64", "U32"}.isdisjoint(parts)
    v = w.value(i.operands[1], 8 if wide else 4)
    if v is None:
        return [(i.operands[0], None, 4)]
    v = v if unsigned else _signed(v, 64 if wide else 32)
    bits = _bits(float(v))
    if "RP" in parts and _float(bits) < v:
        bits += 1 if v > 0 else -1
    return [(i.operands[0], bits, 4)]


def _halves(w: Warp, i: Instruction) -> _Result:
    """The assembler's other way to write a constant: two halves, added to 0 times 0."""
    d, a, b, *c = i.operands
    if i.op != "HFMA2.MMA" or (a, b) != ("-RZ", "RZ") or len(c) != 2 or any(re.match("-?[UR]", x) for x in c):
        return [(d, None, 4)]
    high, low = (struct.unpack("<H", struct.pack("<e", float(x)))[0] for x in c)
    return [(d, high << 16 | low, 4)]


def _mufu(w: Warp, i: Instruction) -> _Result:
    """The reciprocal, to the nearest; the hardware's may differ in the last bit, which is corrected afterwards."""
    v = w.value(i.operands[1]) if i.op == "MUFU.RCP" else None
    return [(i.operands[0], None if v is None or not _float(v) else _bits(1.0 / _float(v)), 4)]


def _f2i(w: Warp, i: Instruction) -> _Result:
    """Towards zero, within the range of the type; NaN gives 0, with .NTZ too."""
    parts = i.op.split(".")
    kind = next((p for p in parts if p in ("U32", "U64", "S64")), "S32")
    width = 8 if kind.endswith("64") else 4
    v = w.value(i.operands[1])
    if "TRUNC" not in parts or not {"F64", "F16"}.isdisjoint(parts) or v is None:
        return [(i.operands[0], None, width)]
    x, bits = _float(v), 8 * width
    low, high = (0, (1 << bits) - 1) if kind[0] == "U" else (-(1 << bits - 1), (1 << bits - 1) - 1)
    whole = 0 if x != x else low if x <= low else high if x >= high else int(x)
    return [(i.operands[0], whole & ((1 << bits) - 1), width)]


_COMPUTE: dict[str, Callable[[Warp, Instruction], _Result]] = {
    "MOV": _mov, "UMOV": _mov, "IMAD": _imad, "UIMAD": _imad, "IADD3": _iadd3, "UIADD3": _iadd3, "LEA": _lea,
    "ULEA": _lea, "LOP3": _lop3, "ULOP3": _lop3, "SHF": _shf, "USHF": _shf, "SGXT": _sgxt, "USGXT": _sgxt, "SEL": _sel,
    "USEL": _sel, "ISETP": _isetp, "UISETP": _isetp, "VIMNMX": _minmax, "IMNMX": _minmax, "PRMT": _prmt,
    "UPRMT": _prmt, "S2R": _special, "S2UR": _special, "CS2R": _special, "LDC": _load_constant, "ULDC": _load_constant,
    "R2UR": _r2ur, "STL": _spill, "LDL": _spill, "SHFL": _shfl, "P2R": _p2r, "R2P": _r2p, "PLOP3": _plop3,
    "UPLOP3": _plop3, "VIADD": _added, "IABS": _absolute, "I2F": _i2f, "MUFU": _mufu, "F2I": _f2i, "HFMA2": _halves,
}  # fmt: skip


def trace(
    code: Code, parameters: bytes, warp: int, block: int, grid: int, capability: int = 90, limit: int = 2_000_000
) -> Warp:
    """Follow one warp to its end."""
    w = Warp(code, parameters, PARAMETERS[capability], warp, block, grid)
    w.run(limit)
    return w


# -- against the PTX


@dataclass(frozen=True)
class Verdict:
    """What differs between a launch's PTX and the machine code made of it; empty lists: nothing."""

    name: str
    products: int
    wrong: list[str]
    hazards: list[str]
    undecided: str = ""

    def __bool__(self) -> bool:
        return not (self.wrong or self.hazards or self.undecided)


def compare(launch: Launch, sass: str, blocks: Iterable[int] = (0,), capability: int = 90) -> Verdict:
    """Follow the warps of a launch through its machine code, and hold each HGMMA against the wgmma that the executor
    ran in its place (`ExecutionOptions.products` of the device, at least as many as there were)."""
    code = read(sass)
    wrong: list[str] = []
    hazards: list[str] = []
    count = 0
    for block in blocks:
        for warp in range(launch.warps):
            rows = launch.products[(launch.products["block"] == block) & (launch.products["warp"] == warp)]
            try:
                found = trace(code, launch.parameters, warp, block, launch.grid[0], capability)
            except Undecided as e:
                return Verdict(launch.name, count, wrong, hazards, f"block {block}, warp {warp}: {e}")
            count += len(rows)
            hazards += [h for h in found.hazards if h not in hazards]
            for line in _differences(launch, rows, found.products):
                if line not in wrong:
                    wrong.append(line)
    return Verdict(launch.name, count, wrong, hazards)


def _differences(launch: Launch, rows, products: list[Hgmma]) -> Iterator[str]:
    if len(rows) != len(products):
        yield f"{len(products)} products in machine code, {len(rows)} in PTX"
        return
    for row, product in zip(rows, products, strict=True):
        where = f"`{product.instruction}`, from `{launch.program.text[int(row['instruction'])][:80]}`"
        if bool(row["registers"]) != product.registers:
            yield f"{where}: A lies in {'registers' if product.registers else 'shared memory'}"
            continue
        for name, is_, should in (("A", product.a, int(row["a"])), ("B", product.b, int(row["b"]))):
            if name == "A" and product.registers:
                continue
            if is_ is None:
                yield f"{where}: the descriptor of {name} comes from elsewhere, and should be {should:#x}"
            elif is_ != should:
                yield f"{where}: the descriptor of {name} is {is_:#x}, and should be {should:#x}"
