"""PTX text to a program of the engine: registers become places, instructions operations of `operations.inc`.

What the engine does not have is an error with the instruction's name; nothing is skipped.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from . import library

INSTRUCTION = np.dtype(
    [(name, "i4") for name in ("op", "guard", "guard_negated", "first", "targets", "operands")]
    + [(name, "i4") for name in ("count", "size", "width", "flags")]
    + [("value", "i8")]
)
CONSTANT = np.dtype([("offset", "i4"), ("width", "i4"), ("value", "u8")])

#: places of the special registers; the engine fills them in this order
SPECIAL = {
    name: 128 * i
    for i, name in enumerate(
        ("%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
        + ("%ntid.x", "%ntid.y", "%ntid.z", "%laneid", "%warpid")
    )
}
#: where what nobody reads is written, and the first place of a register
_DISCARD, _FIRST = 128 * len(SPECIAL), 128 * len(SPECIAL) + 256
SHARED_BASE, SHARED_WINDOW, LOCAL_WINDOW = 1024, 1 << 60, 1 << 61
#: address of the first variable of a module; arguments have lower ones
_VARIABLES = 1 << 52
_SIGNED, _WIDE_ADDRESS, _TRANSPOSED = 1, 2, 4
_FACTORS = {"f16": 0, "bf16": 1, "tf32": 2}


class UnknownInstruction(NotImplementedError):
    """PTX that the engine does not have."""


@functools.cache
def operation(name: str) -> int:
    """The engine's number of an operation. Raises UnknownInstruction with the name."""
    found = library.load().fused_inr_ptx_operation(name.encode())
    if found < 0:
        raise UnknownInstruction(name)
    return found


def operations() -> tuple[str, ...]:
    """The names of all operations of the engine."""
    name = library.load().fused_inr_ptx_name
    name.restype = ctypes.c_char_p
    return tuple(found.decode() for found in iter(map(name, itertools.count()).__next__, None))


@dataclass
class PtxProgram:
    """A kernel as the engine takes it, and the text that each instruction comes from."""

    name: str
    code: np.ndarray
    operands: np.ndarray
    constants: np.ndarray
    register_bytes: int
    params: list[tuple[int, int]]  # offset, size
    param_bytes: int
    threads: int  # of a block, as the kernel requires; 0: it does not say
    static_shared: int  # bytes; dynamic shared memory lies behind them
    local_bytes: int
    shared_granule: int
    global_granule: int
    watches_registers: bool
    has_partial_barriers: bool
    variables: list[tuple[int, np.ndarray]]  # of the module, initialised: address, bytes
    text: list[str]
    locations: list[str]
    mnemonics: list[str]
    source: str = ""  # the PTX

    def without(self, *instructions: int) -> PtxProgram:
        """The same with these instructions taken out."""
        code = self.code.copy()
        code["op"][list(instructions)] = operation("nop")
        code["targets"][list(instructions)] = code["operands"][list(instructions)] = 0
        return dataclasses.replace(self, code=code)


@dataclass
class _Row:
    """One instruction on its way."""

    text: str
    location: str
    mnemonic: str
    guard: int = -1
    negated: bool = False
    op: int = -1
    targets: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    count: int = 0
    size: int = 0
    width: int = 0
    flags: int = 0
    value: int = 0
    labels: list[int] = field(default_factory=list)  # instructions that it may jump to


def _bytes_of(kind: str) -> int:
    """Of a type: b32, f64, bf16, s8, pred, bf16x2 .."""
    if kind == "pred":
        return 4
    bits = re.fullmatch(r"b?[bsuf](\d+)(?:x(\d))?|tf32", kind)
    if not bits:
        raise UnknownInstruction(f"type .{kind}")
    return 4 if kind == "tf32" else int(bits[1]) * int(bits[2] or 1) // 8


def _split(operands: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for ch in operands:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += ch
    return [*parts, current.strip()] if current.strip() else parts


def _elements(operand: str) -> list[str]:
    """Of a vector {a, b}, or the one register."""
    operand = operand.strip()
    return [x.strip() for x in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """(statement, source location) of a function's body: instructions and declarations without their semicolon, labels
    with their colon, braces of scopes."""
    location, text = "", ""
    for raw in body.splitlines():
        line, _, comment = raw.partition("//")
        if line.lstrip().startswith(".loc"):
            location = comment.strip()
            continue
        text = f"{text} {line}".strip()
        while text:
            if text[0] in "{}":
                end = 1
            elif label := re.match(r"[$\w]+:(?!:)", text):
                end = label.end()
            elif ";" in text:
                end = text.index(";")
            else:
                break  # it goes on in the next line
            yield text[:end].strip(), location
            text = text[end:].lstrip("; \t")


def _block(text: str, opening: int) -> str:
    """What the brace at `opening` encloses; braces of comments do not count."""
    depth = 0
    for found in re.compile(r"//[^\n]*|[{}]").finditer(text, opening):
        depth += (found[0] == "{") - (found[0] == "}")
        if not depth and found[0] == "}":
            return text[opening + 1 : found.start()]
    raise ValueError("a kernel without an end")


class _Reader:
    def __init__(self, ptx: str, entry: str | None):
        self.rows: list[_Row] = []
        self.constants: list[tuple[int, int, int]] = []
        self.places: dict[tuple[int, int], int] = {}  # of constants
        self.next = _FIRST
        self.scopes: list[dict[str, tuple[int, int]]] = [{}]  # register -> place, width
        self.labels: dict[tuple[int, str], int] = {}  # (scope, name) -> instruction
        self.jumps: list[tuple[_Row, str, tuple[int, ...]]] = []
        self.symbols: dict[str, int] = {}
        self.variables: list[tuple[int, np.ndarray]] = []
        self.wide_symbols: set[str] = set()
        self.has_partial_barriers = self.watches_registers = False
        self.local_bytes = self.static = 0
        self.unknown: dict[str, str] = {}
        self.read(ptx, entry)

    # -- operands

    def allocate(self, width: int) -> int:
        at = self.next
        self.next += (32 * width + 63) // 64 * 64
        return at

    def find(self, name: str) -> tuple[int, int] | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def width(self, name: str) -> int:
        found = self.find(name)
        return found[1] if found else 0

    def target(self, name: str) -> int:
        if name == "_":
            return _DISCARD
        found = self.find(name)
        if found is None:
            raise UnknownInstruction(f"the target {name}")
        return found[0]

    def source(self, operand: str, width: int) -> int:
        """The place of a register; a constant gets one of its own."""
        found = self.find(operand)
        if found is not None:
            return found[0]
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand.startswith("%"):
            raise UnknownInstruction(f"the register {operand}")
        return self.constant(self.literal(operand), width)

    def constant(self, value: int, width: int) -> int:
        key = (value & ((1 << 8 * width) - 1), width)
        if key not in self.places:
            self.places[key] = self.allocate(width)
            self.constants.append((self.places[key], width, key[0]))
        return self.places[key]

    def literal(self, s: str) -> int:
        if s[:2] in ("0f", "0F", "0d", "0D"):
            return int(s[2:], 16)
        if s in self.symbols:
            return self.symbols[s]
        if s in ("true", "false"):
            return -1 if s == "true" else 0
        if re.fullmatch(r"-?\d+\.\d*(?:e[+-]?\d+)?", s):
            return struct.unpack("<I", struct.pack("<f", float(s)))[0]
        try:
            return int(s.rstrip("U"), 0)
        except ValueError:
            raise UnknownInstruction(f"the operand {s}") from None

    def address(self, s: str, width: int = 8) -> tuple[int, int, bool]:
        """(place, displacement, whether it has 64 bits) of [a+b]; `width` of one that is a constant."""
        inner = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", s.strip())
        if not inner:
            raise UnknownInstruction(f"the address {s}")
        displacement = int(inner[2], 0) if inner[2] else 0
        if self.find(inner[1]) is not None:
            place, width = self.find(inner[1])  # type: ignore[misc]
            return place, displacement, width == 8
        return self.constant(self.literal(inner[1]) + displacement, width), 0, width == 8

    def narrow_address(self, s: str) -> tuple[int, int]:
        """Of an instruction that takes 32 bits only."""
        place, displacement, wide = self.address(s, 4)
        if wide:
            raise UnknownInstruction(f"the address {s}")
        return place, displacement

    # -- the text

    def read(self, ptx: str, entry: str | None) -> None:
        wanted = re.escape(entry) if entry else r"\w+"
        head = re.search(rf"\.entry\s+({wanted})\s*\(", ptx)
        if not head:
            raise ValueError(f"no kernel {entry} in this PTX" if entry else "no kernel in this PTX")
        self.name = head[1]
        opening = ptx.index("{", head.end())
        self.parameters(ptx[head.end() : opening])
        body = _block(ptx, opening)
        statements = list(_statements(body))
        self.memory(ptx, [statement for statement, _ in statements])
        open_scopes = [0]  # numbers of the scopes around, the innermost last
        made, label = 0, ""
        tables: dict[str, list[str]] = {}
        for statement, location in statements:
            if statement == "{":
                made += 1
                open_scopes.append(made)
                self.scopes.append({})
            elif statement == "}":
                open_scopes.pop()
                self.scopes.pop()
            elif statement.endswith(":"):
                label = statement[:-1]
                self.labels[open_scopes[-1], label] = len(self.rows)
            elif statement.startswith(".branchtargets"):
                tables[label] = _split(statement.removeprefix(".branchtargets"))
            elif statement.startswith(".reg"):
                self.registers(statement)
            elif statement.startswith("."):
                if not statement.startswith((".pragma", ".shared", ".local", ".loc")):
                    raise UnknownInstruction(statement)
            else:
                self.instruction(statement, location, tuple(open_scopes))
        for row, name, around in self.jumps:
            names = tables[name] if row.mnemonic.startswith("brx") else [name]
            row.labels = [
                next(self.labels[n, label] for n in reversed(around) if (n, label) in self.labels) for label in names
            ]
        _settle_jumps(self.rows)
        if self.unknown:
            raise UnknownInstruction(f"{self.name}: " + "; ".join(f"{why} ({t})" for why, t in self.unknown.items()))

    def parameters(self, text: str) -> None:
        self.params, at = [], 0
        for align, kind, name, count in re.findall(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?(\w+)(?:\[(\d+)\])?",
            text,
        ):
            size = _bytes_of(kind)
            alignment = int(align) if align else size
            at = -(-at // alignment) * alignment
            size *= int(count) if count else 1
            self.params.append((at, size))
            self.symbols[name] = at
            at += size
        self.param_bytes = at
        threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", text)
        self.threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1) if threads else 0

    def memory(self, ptx: str, statements: list[str]) -> None:
        """Addresses of shared, local and module variables."""
        for statement in statements:
            declared = re.match(r"\.(shared|local)\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", statement)
            if not declared:
                continue
            align, name, size = int(declared[2]), declared[3], int(declared[4])
            if declared[1] == "shared":
                self.static = -(-self.static // align) * align
                self.symbols[name] = SHARED_BASE + self.static
                self.static += size
            else:
                self.local_bytes = -(-self.local_bytes // align) * align
                self.symbols[name] = self.local_bytes
                self.local_bytes += size
        for name in re.findall(r"^\s*\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", ptx, re.M):
            self.symbols[name] = SHARED_BASE + -(-self.static // 1024) * 1024
        variable = r"^(?:\.visible\s+)?\.(?:global|const)\s+\.align\s+(\d+)\s+\.(\w+)\s+(\w+)"
        variable += r"(?:\[(\d+)\])?(?:\s*=\s*\{([^}]*)\})?;"
        at = _VARIABLES
        for _, kind, name, count, values in re.findall(variable, ptx, re.M):
            if not any(name in statement for statement in statements):
                continue
            size = _bytes_of(kind)
            data = bytearray(size * int(count or 1))
            for i, value in enumerate(filter(None, (v.strip() for v in values.split(",")))):
                data[i * size : (i + 1) * size] = (int(value, 0) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            self.variables.append((at, np.frombuffer(bytes(data), np.uint8)))
            self.symbols[name] = at
            at += 1 << 40

    def registers(self, statement: str) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
        width = _bytes_of(found[1])  # type: ignore[index]
        for name in found[2].split(","):  # type: ignore[index]
            many = re.match(r"\s*(%?[\w$]+)(?:<(\d+)>)?", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many[2] else [many[1]]  # type: ignore[index]
            for register in names:
                self.scopes[-1][register] = (self.allocate(width), width)

    def instruction(self, text: str, location: str, around: tuple[int, ...]) -> None:
        found = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if not found:
            raise UnknownInstruction(text)
        row = _Row(text, location, found[3])
        if found[2]:
            row.guard, row.negated = self.target(found[2]), bool(found[1])
        self.rows.append(row)
        a = _split(found[4])
        try:
            if row.mnemonic.startswith(("bra", "brx.idx")):
                row.op = operation(row.mnemonic[:3])
                row.sources = [self.source(x, 4) for x in a[:-1]]
                self.jumps.append((row, a[-1], around))
            else:
                self.decode(row, row.mnemonic.split("."), a)
        except UnknownInstruction as error:
            self.unknown.setdefault(f"{row.mnemonic}: {error}", text[:120])

    # -- instructions

    def plain(self, row: _Row, name: str, a: list[str], *widths: int) -> None:
        """One target, sources of these widths (the last one serves all that follow)."""
        row.op = operation(name)
        row.targets = [self.target(a[0])]
        row.sources = [self.source(x, widths[min(i, len(widths) - 1)]) for i, x in enumerate(a[1:])]

    def decode(self, row: _Row, p: list[str], a: list[str]) -> None:
        base, kind = p[0], p[-1]
        method = getattr(self, f"read_{base}", None)
        if method is not None:
            method(row, p, a)
            return
        if kind == "pred":
            kind = "b32"
        if not re.fullmatch(r"[bsuf]\d+(x2)?|bf16(x2)?", kind):
            raise UnknownInstruction(row.mnemonic)
        bits, width = re.sub(r"\D.*", "", kind[1:]), _bytes_of(kind)
        refused = {"rz", "rm", "rp", "sat", "cc", "relu", "noftz"} & set(p)
        if refused:
            raise UnknownInstruction(row.mnemonic)
        ftz = "_ftz" if "ftz" in p and kind == "f32" else ""
        unsigned = kind if kind[0] == "f" or "x2" in kind else f"u{bits}"
        if base in ("add", "sub", "mul", "fma") and len(p) == 4 and p[1] == "rn" and p[2] == "f32":
            # add.rn.f32.bf16: mixed types, the last operand float32
            self.plain(row, f"{base}_f32_{p[3]}", a, *([2] * (len(a) - 2)), 4)
        elif base in ("add", "sub", "mul", "neg") and kind == "bf16":
            self.plain(row, f"{base}_bf16", a, width)
        elif base in ("add", "sub", "neg"):
            self.plain(row, f"{base}{ftz}_{unsigned}", a, width)
        elif base == "mul" and "wide" in p:
            self.plain(row, f"mul_wide_{kind}", a, width)
        elif base == "mul" and "hi" in p:
            self.plain(row, f"mul_hi_{kind}", a, width)
        elif base == "mul":
            self.plain(row, f"mul{ftz}_{kind}" if kind[0] == "f" else f"mul_lo_u{bits}", a, width)
        elif base in ("fma", "mad") and (kind[0] == "f" or kind == "bf16x2"):
            self.plain(row, f"fma{ftz}_{kind}", a, width)
        elif base == "mad" and "wide" in p:
            self.plain(row, f"mad_wide_{kind}", a, width, width, 2 * width)
        elif base == "mad" and "lo" in p:
            self.plain(row, f"mad_lo_u{bits}", a, width)
        elif base in ("and", "or", "xor", "not", "popc", "clz", "brev"):
            self.plain(row, f"{base}_{bits}", a, width)
        elif base in ("shl", "shr"):
            self.plain(row, f"{base}_{'' if base == 'shl' else 's' if kind[0] == 's' else 'u'}{bits}", a, width, 4)
        elif base in ("min", "max"):
            kind = f"u{bits}" if kind[0] == "b" else kind
            self.plain(row, f"{base}_{'nan_' if 'NaN' in p else ''}{kind}", a, width)
        elif base == "div":
            self.plain(row, f"div_full_{kind}" if "full" in p or "approx" in p else f"div_{kind}", a, width)
        elif base in ("abs", "rem", "copysign", "bfe"):
            self.plain(row, f"{base}_{kind}", a, *((width, 4) if base == "bfe" else (width,)))
        elif base in ("sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh"):
            self.plain(row, f"{base}{'_approx' if 'approx' in p else ''}{ftz}_{kind}", a, width)
        elif base == "bfi":
            self.plain(row, f"bfi_{bits}", a, width, width, 4)
        elif base == "prmt" and len(p) == 2:
            self.plain(row, "prmt_32", a, 4)
        else:
            raise UnknownInstruction(row.mnemonic)

    def read_setp(self, row: _Row, p: list[str], a: list[str]) -> None:
        if len(p) != 3 + ("ftz" in p) or "|" in a[0] or "ftz" in p:
            raise UnknownInstruction(row.mnemonic)
        kind = "b32" if p[-1] == "pred" else p[-1]
        bits = re.sub(r"\D", "", kind)
        compare = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(p[1], p[1])
        if kind[0] == "b":
            kind = f"u{bits}"
        self.plain(row, f"setp_{compare}_{kind}", a, _bytes_of(kind))

    def read_selp(self, row: _Row, p: list[str], a: list[str]) -> None:
        width = _bytes_of(p[-1])
        self.plain(row, f"selp_{8 * width}", a, width, width, 4)

    def read_lop3(self, row: _Row, p: list[str], a: list[str]) -> None:
        self.plain(row, "lop3_32", a[:4], 4)
        row.value = self.literal(a[4])

    def read_shf(self, row: _Row, p: list[str], a: list[str]) -> None:
        self.plain(row, f"shf_{p[1]}", a, 4)
        row.flags = int("wrap" in p)

    def read_mov(self, row: _Row, p: list[str], a: list[str]) -> None:
        width = _bytes_of(p[-1])
        if a[0].startswith("{"):
            parts = _elements(a[0])
            row.op, row.width, row.size = operation("unpack"), width // len(parts), width
            row.targets, row.sources = [self.target(x) for x in parts], [self.source(a[1], width)]
        elif a[1].startswith("{"):
            parts = _elements(a[1])
            row.op, row.width, row.size = operation("pack"), width // len(parts), width
            row.targets, row.sources = [self.target(a[0])], [self.source(x, row.width) for x in parts]
        else:
            self.plain(row, f"mov_{8 * width}", a, width)
            row.flags = int(self.find(a[1]) is not None)  # a copy of a register

    def read_cvta(self, row: _Row, p: list[str], a: list[str]) -> None:
        """Between the addresses of a space and generic ones."""
        space = next((x for x in p if x in ("shared", "local", "global", "const", "param")), "")
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "const": 0}.get(space)
        if window is None or p[-1] != "u64":
            raise UnknownInstruction(row.mnemonic)
        if not window:
            self.plain(row, "mov_64", a, 8)
            return
        self.plain(row, "add_u64", a, 8)
        row.sources.append(self.constant(-window if "to" in p else window, 8))

    def read_cvt(self, row: _Row, p: list[str], a: list[str]) -> None:
        kinds = [x for x in p[1:] if re.fullmatch(r"[suf]\d+|bf16|bf16x2|f16x2|tf32", x)]
        rounding = next((x for x in p[1:] if x in ("rn", "rna", "rz", "rzi", "rni", "rmi", "rpi")), "")
        if {"sat", "relu", "satfinite", "rz", "ftz"} & set(p) or len(kinds) != 2:
            raise UnknownInstruction(row.mnemonic)
        to, source = kinds
        if to[0] in "su" and source[0] in "su":
            width = self.width(a[1]) or _bytes_of(source)
            row.op, row.targets, row.sources = operation("cvt_int"), [self.target(a[0])], [self.source(a[1], width)]
            row.count, row.size, row.width, row.value = int(source[1:]), int(to[1:]), self.width(a[0]), width
            row.flags = (source[0] == "s") | 2 * (to[0] == "s")
        elif to in ("bf16x2", "f16x2"):
            self.plain(row, f"cvt_{rounding}_{to}_{source}", a, 4)
        elif to == source:
            self.plain(row, f"cvt_{rounding}_{to}", a, _bytes_of(source))
        elif to in ("bf16", "f16", "tf32") or rounding.endswith("i"):
            self.plain(row, f"cvt_{rounding}_{to}_{source}", a, _bytes_of(source))
        else:
            self.plain(row, f"cvt_{to}_{source}", a, _bytes_of(source))

    # -- memory

    def read_ld(self, row: _Row, p: list[str], a: list[str]) -> None:
        row.targets = [self.target(x) for x in _elements(a[0])]
        self.access(row, p, a[1], _elements(a[0]))

    def read_st(self, row: _Row, p: list[str], a: list[str]) -> None:
        self.access(row, p, a[0], _elements(a[1]))
        row.sources += [self.source(x, row.width) for x in _elements(a[1])]

    def access(self, row: _Row, p: list[str], address: str, values: list[str]) -> None:
        space = next((x.split("::")[0] for x in p[1:] if re.match(r"param|global|shared|local|const", x)), "generic")
        row.size, row.count, row.flags = _bytes_of(p[-1]), len(values), _SIGNED * (p[-1][0] == "s")
        widths = {self.width(x) for x in values if self.find(x) is not None} or {row.size}
        if len(widths) != 1 or (p[0] == "st" and space in ("param", "const")) or "volatile" in p:
            raise UnknownInstruction(row.mnemonic)
        row.width = widths.pop()
        place, row.value, wide = self.address(address)
        if space in ("param", "global", "const", "generic") and not wide:
            raise UnknownInstruction(f"the address {address}")
        row.flags |= _WIDE_ADDRESS * wide
        row.op = operation(f"{p[0]}_{'global' if space == 'const' else space}")
        row.sources = [place]

    def read_cp(self, row: _Row, p: list[str], a: list[str]) -> None:
        if row.mnemonic == "cp.async.commit_group":
            row.op = operation("cp_commit")
        elif row.mnemonic == "cp.async.wait_group":
            row.op, row.value = operation("cp_wait"), int(a[0], 0)
        elif row.mnemonic == "cp.async.wait_all":
            row.op, row.flags = operation("cp_wait"), 1
        elif re.fullmatch(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::\d+B)?", row.mnemonic):
            to, row.value = self.narrow_address(a[0])
            source, row.size, _ = self.address(a[1])
            row.op, row.count = operation("cp_async"), int(a[2], 0)
            row.sources = [to, source] + ([self.source(a[3], 4)] if len(a) > 3 else [])
        else:
            raise UnknownInstruction(row.mnemonic)

    def read_ldmatrix(self, row: _Row, p: list[str], a: list[str]) -> None:
        place, row.value = self.narrow_address(a[1])
        row.targets = [self.target(x) for x in _elements(a[0])]
        self.matrix(row, p, place, len(row.targets))

    def read_stmatrix(self, row: _Row, p: list[str], a: list[str]) -> None:
        place, row.value = self.narrow_address(a[0])
        values = _elements(a[1])
        self.matrix(row, p, place, len(values))
        row.sources += [self.source(x, 4) for x in values]

    def matrix(self, row: _Row, p: list[str], place: int, count: int) -> None:
        if "m8n8" not in p or p[-1] != "b16":
            raise UnknownInstruction(row.mnemonic)
        row.op, row.count, row.flags, row.sources = operation(p[0]), count, _TRANSPOSED * ("trans" in p), [place]

    # -- lanes and warps

    def read_mma(self, row: _Row, p: list[str], a: list[str]) -> None:
        shape = re.search(r"m16n8k(\d+)\.row\.col\.f32\.(f16|bf16|tf32)\.(f16|bf16|tf32)\.f32$", row.mnemonic)
        if not shape or shape[2] != shape[3]:
            raise UnknownInstruction(row.mnemonic)
        row.op, row.count, row.flags = operation("mma"), int(shape[1]), _FACTORS[shape[2]]
        row.targets = [self.target(x) for x in _elements(a[0])]
        row.sources = [self.source(x, 4) for operand in a[1:] for x in _elements(operand)]
        of_a = row.count // (2 if shape[2] == "tf32" else 4)
        if len(row.targets) != 4 or len(row.sources) != of_a + of_a // 2 + 4:
            raise UnknownInstruction(row.text)

    def read_shfl(self, row: _Row, p: list[str], a: list[str]) -> None:
        row.op, row.flags = operation("shfl"), {"idx": 0, "bfly": 1, "up": 2, "down": 3}[p[2]]
        row.targets = [self.target(x) for x in a[0].split("|")]
        row.sources = [self.source(x, 4) for x in a[1:5]]

    def read_redux(self, row: _Row, p: list[str], a: list[str]) -> None:
        self.plain(row, "redux", a, 4)
        row.flags = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5}[p[2]]
        row.width = int(p[-1][0] == "s")

    def read_vote(self, row: _Row, p: list[str], a: list[str]) -> None:
        negated = a[1].startswith("!")
        self.plain(row, "vote", [a[0], a[1].lstrip("!"), a[2]], 4)
        row.flags, row.width = {"any": 0, "all": 1, "ballot": 2, "uni": 3}[p[2]], int(negated)

    def read_elect(self, row: _Row, p: list[str], a: list[str]) -> None:
        row.op = operation("elect")
        row.targets, row.sources = [self.target(x) for x in a[0].split("|")], [self.source(a[1], 4)]

    def read_bar(self, row: _Row, p: list[str], a: list[str]) -> None:
        if p[1:3] == ["warp", "sync"]:
            row.op = operation("bar_warp")
            if self.literal(a[0]) & 0xFFFFFFFF != 0xFFFFFFFF:
                raise UnknownInstruction(row.text)
        elif p[1] in ("sync", "arrive") and set(p[2:]) <= {"aligned"}:
            row.op, row.value = operation(f"bar_{p[1]}"), int(a[0], 0)
            row.count = int(a[1], 0) if len(a) > 1 else 0
            if not 0 <= row.value < 16 or row.count % 32:
                raise UnknownInstruction(row.text)
            self.has_partial_barriers |= bool(row.count)
        else:
            raise UnknownInstruction(row.mnemonic)

    read_barrier = read_bar

    def read_ret(self, row: _Row, p: list[str], a: list[str]) -> None:
        row.op = operation("ret")

    read_exit = read_ret

    def read_trap(self, row: _Row, p: list[str], a: list[str]) -> None:
        row.op = operation("trap")

    def read_fence(self, row: _Row, p: list[str], a: list[str]) -> None:
        # fences of the generic proxy change nothing where blocks and warps run one after the other
        row.op = operation("fence_async" if row.mnemonic.startswith("fence.proxy.async") else "nop")

    read_membar = read_fence

    # -- sm_90

    def read_wgmma(self, row: _Row, p: list[str], a: list[str]) -> None:
        self.watches_registers = True
        if p[1] in ("fence", "commit_group", "wait_group"):
            row.op = operation("wgmma_" + p[1].removesuffix("_group"))
            row.value = int(a[0], 0) if a else 0
            return
        shape = re.search(r"m64n(\d+)k(\d+)\.f32\.(f16|bf16|tf32)\.(f16|bf16|tf32)$", row.mnemonic)
        if p[1] != "mma_async" or not shape or shape[3] != shape[4] or "sp" in p:
            raise UnknownInstruction(row.mnemonic)
        row.op, row.count, row.width = operation("wgmma"), int(shape[1]), int(a[1].startswith("{"))
        row.targets = [self.target(x) for x in _elements(a[0])]
        row.sources = [self.source(x, 4 if row.width else 8) for x in _elements(a[1])]
        row.sources += [self.source(a[2], 8), self.source(a[3], 4)]
        signs = [int(x, 0) for x in a[4:6]]
        transposed = [int(x, 0) for x in a[6:]]
        transposed = [0] * (2 - len(transposed)) + transposed  # A's is not given where A lies in registers
        row.flags = _FACTORS[shape[3]] | 4 * transposed[0] | 8 * transposed[1] | 16 * (signs[0] != signs[1])
        if len(row.targets) != row.count // 2 or len(row.sources) != (6 if row.width else 3):
            raise UnknownInstruction(row.text)

    # -- sm_100

    def barrier_address(self, row: _Row, s: str) -> int:
        """Of shared memory; generic where it has 64 bits."""
        place, row.value, wide = self.address(s, 4)
        row.flags |= _WIDE_ADDRESS * wide
        return place

    def read_mbarrier(self, row: _Row, p: list[str], a: list[str]) -> None:
        if p[1] == "init" or p[1] == "inval":
            row.op = operation(f"mbarrier_{p[1]}")
            row.sources = [self.barrier_address(row, a[0])] + [self.source(x, 4) for x in a[1:]]
        elif p[1:3] == ["try_wait", "parity"]:
            row.op = operation("mbarrier_try_wait")
            row.targets, row.sources = [self.target(a[0])], [self.barrier_address(row, a[1]), self.source(a[2], 4)]
        else:
            raise UnknownInstruction(row.mnemonic)

    def read_tcgen05(self, row: _Row, p: list[str], a: list[str]) -> None:
        kind = p[1].split("::")[0]
        if kind in ("relinquish_alloc_permit", "fence"):
            row.op = operation("nop")
        elif kind == "wait":
            row.op, row.flags = operation("tcgen05_wait"), int(p[1] == "wait::ld")
        elif kind in ("alloc", "commit"):
            row.op = operation(f"tcgen05_{kind}")
            row.sources = [self.barrier_address(row, a[0])] + [self.source(x, 4) for x in a[1:]]
        elif kind == "dealloc":
            row.op, row.sources = operation("tcgen05_dealloc"), [self.source(x, 4) for x in a]
        elif kind in ("ld", "st"):
            self.tensor_access(row, p, a)
        elif kind == "mma" and p[-1] in ("kind::f16", "kind::tf32") and "cta_group::1" in p and len(a) == 5:
            row.op, row.width, row.flags = operation("tcgen05_mma"), int(a[1].startswith("[")), _FACTORS[p[-1][6:]]
            place, row.value = self.narrow_address(a[0])
            row.sources = [place]
            if row.width:
                place, row.size = self.narrow_address(a[1])
                row.sources.append(place)
            else:
                row.sources.append(self.source(a[1], 8))
            row.sources += [self.source(a[2], 8), self.source(a[3], 4), self.source(a[4], 4)]
        else:
            raise UnknownInstruction(row.mnemonic)

    def tensor_access(self, row: _Row, p: list[str], a: list[str]) -> None:
        shape = next((x for x in p if x in ("32x32b", "16x32bx2")), "")
        if not shape or p[-1] != "b32" or "pack::16b" in p or "unpack::16b" in p:
            raise UnknownInstruction(row.mnemonic)
        self.watches_registers = True
        row.op, row.flags = operation(f"tcgen05_{p[1]}"), int(shape == "16x32bx2")
        place, row.value = self.narrow_address(a[1] if p[1] == "ld" else a[0])
        values = _elements(a[0] if p[1] == "ld" else a[-1])
        row.size = int(a[2] if p[1] == "ld" else a[1], 0) if row.flags else 0
        row.sources = [place]
        if p[1] == "ld":
            row.targets = [self.target(x) for x in values]
        else:
            row.sources += [self.source(x, 4) for x in values]

    # -- what comes out

    def program(self) -> PtxProgram:
        code = np.zeros(len(self.rows), INSTRUCTION)
        pool: list[int] = []
        smallest = {"shared": 16, "global": 16}  # accesses, in bytes
        for i, row in enumerate(self.rows):
            operands = [*row.targets, *row.sources]
            code[i] = (
                row.op, row.guard, row.negated, len(pool), len(row.targets), len(operands),
                len(row.labels) or row.count, row.size, row.width, row.flags, row.value,
            )  # fmt: skip
            pool += operands + row.labels
            for space, size in self.accesses(row):
                smallest[space] = min(smallest[space], size)
        return PtxProgram(
            self.name, code, np.array(pool or [0], np.int32), np.array(self.constants, CONSTANT), self.next,
            self.params,
            self.param_bytes, self.threads, self.static, self.local_bytes, smallest["shared"], smallest["global"],
            self.watches_registers, self.has_partial_barriers, self.variables, [row.text for row in self.rows],
            [row.location for row in self.rows], [row.mnemonic for row in self.rows],
        )  # fmt: skip

    def accesses(self, row: _Row) -> Iterator[tuple[str, int]]:
        """The spaces of memory that an instruction may touch, and the bytes at a time."""
        name = row.mnemonic
        if row.op == operation("cp_async"):
            yield from (("shared", row.count), ("global", row.count if len(row.sources) < 3 else 1))
        elif name.startswith("mbarrier"):
            yield "shared", 8
        elif name.startswith("tcgen05.alloc"):
            yield "shared", 4
        elif name.startswith(("ld.", "st.")):
            generic = row.op in (operation("ld_generic"), operation("st_generic"))
            for space in ("shared", "global"):
                if generic or row.op in (operation(f"ld_{space}"), operation(f"st_{space}")):
                    yield space, row.size * row.count


def _settle_jumps(rows: list[_Row]) -> None:
    """Where a warp that has diverged runs together again: the first instruction that all ways from a jump come to (its
    immediate post-dominator; the number of instructions where there is none). Where they never meet, those that stay go
    first if their way ends sooner."""
    end, ends = len(rows), (operation("ret"), operation("trap"))
    starts = sorted(
        {0, end} | {t for row in rows for t in row.labels} | {i + 1 for i, r in enumerate(rows) if r.labels}
    )
    number = {start: n for n, start in enumerate(starts)}
    last = [behind - 1 for behind in starts[1:]]
    after: list[set[int]] = []
    for i in last:
        leaves = rows[i].guard < 0 and (bool(rows[i].labels) or rows[i].op in ends)
        ways = {number[t] for t in rows[i].labels} | (set() if leaves else {number[i + 1]})
        after.append(ways or {len(last)})
    # post-dominators of each block and the end, as sets of bits; instructions on the shortest way to the end
    everything = (1 << (len(last) + 1)) - 1
    dominators, distance = [everything] * len(last) + [1 << len(last)], [2 * end] * len(last) + [0]
    changed = True
    while changed:
        changed = False
        for n in reversed(range(len(last))):
            common = functools.reduce(int.__and__, (dominators[way] for way in after[n])) | 1 << n
            nearest = min(distance[way] for way in after[n]) + starts[n + 1] - starts[n]
            changed |= common != dominators[n] or nearest < distance[n]
            dominators[n], distance[n] = common, min(nearest, distance[n])
    for n, i in enumerate(last):
        if rows[i].labels:
            strict = dominators[n] & ~(1 << n)
            # the nearest of them is the one that all others dominate
            meeting = next((d for d in range(len(last)) if strict >> d & 1 and dominators[d] == strict), len(last))
            rows[i].value = starts[meeting] if meeting < len(last) else end
            if meeting == len(last) and i + 1 < end:
                rows[i].flags = int(distance[number[i + 1]] < distance[number[rows[i].labels[0]]])


def read(ptx: str, entry: str | None = None, *, contract: bool = False) -> PtxProgram:
    """The kernel `entry` of a PTX file (None: its first).

    contract: products that sums of their block use become multiply-adds there, as the assembler may have it.

    Raises:
        UnknownInstruction: with the names of all that the engine does not have.
    """
    reader = _Reader(ptx, entry)
    if contract:
        _contract(reader)
    return reader.program()


def _contract(reader: _Reader) -> None:
    made: dict[int, tuple[int, int]] = {}
    jumped_to = set(reader.labels.values())
    for i, row in enumerate(reader.rows):
        if i in jumped_to or row.mnemonic.startswith("bra"):
            made.clear()
        if row.mnemonic == "add.f32" and row.guard < 0:
            x, y = row.sources
            if x in made or y in made:
                product, other = (made[x], y) if x in made else (made[y], x)
                row.op, row.sources = operation("fma_f32"), [*product, other]
        for written in row.targets:
            made.pop(written, None)
            for product in [key for key, factors in made.items() if written in factors]:
                del made[product]
        if row.mnemonic == "mul.f32" and row.guard < 0 and row.targets[0] not in row.sources:
            made[row.targets[0]] = (row.sources[0], row.sources[1])
