"""PTX text of one kernel -> the engine's instructions."""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from . import library

INS = np.dtype(
    [("op", "i4"), ("pred", "i4"), ("pneg", "i4"), ("aux", "i4"), ("size", "i4"), ("width", "i4"), ("flags", "i4"),
     ("loc", "i4"), ("imm", "i8"), ("o", "i4", (20,))], align=True,
)  # fmt: skip
CONST = np.dtype([("offset", "i4"), ("width", "i4"), ("value", "u8")])
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
SHARED_BASE = 1024
SPECIAL = {
    "%tid.x": 0, "%ctaid.x": 128, "%ctaid.y": 256, "%ctaid.z": 384, "%nctaid.x": 512, "%nctaid.y": 640,
    "%nctaid.z": 768, "%ntid.x": 896, "%laneid": 1024,
}  # fmt: skip
DISCARD, FIRST_FREE = 1152, 1408


def op(name: str) -> int:
    i = library.load().op_id(name.encode())
    if i < 0:
        raise NotImplementedError(name)
    return i


@dataclass
class Program:
    name: str
    code: np.ndarray
    consts: np.ndarray
    rf_bytes: int
    params: list[tuple[int, int]]  # offset, size
    param_bytes: int
    threads: int
    text: list[str]
    locs: list[str]
    mnemonics: list[str]
    shared_static: int = 0
    unsupported: Counter = field(default_factory=Counter)
    extra: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))


def split_operands(s: str) -> list[str]:
    parts, depth, cur = [], 0, ""
    for ch in s:
        depth += (ch in "{[") - (ch in "}]")
        if ch == "," and not depth:
            parts.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        parts.append(cur.strip())
    return parts


class Decoder:
    def __init__(self, ptx: str, entry: str | None = None):
        if entry is not None:  # of a file with several, and with shared memory by name: nvcc's
            start = re.search(r"\.visible \.entry " + entry + r"\s*\(", ptx).start()
            outer = ptx[: ptx.index(".entry")]
            ptx = outer[: outer.rfind(".visible")] + ptx[start : ptx.index("\n}", start) + 3]
        self.slots: dict[str, tuple[int, int]] = {}
        self.next = FIRST_FREE
        self.consts: list[tuple[int, int, int]] = []
        self.const_slots: dict[tuple[int, int], int] = {}
        self.rows: list[dict] = []
        self.text: list[str] = []
        self.locs: list[str] = []
        self.mnemonics: list[str] = []
        self.labels: dict[str, int] = {}
        self.fixups: list[tuple[int, str]] = []
        self.symbols: dict[str, int] = {}
        self.unsupported: Counter = Counter()
        self.extra: list[int] = []
        self.tables: dict[str, list[str]] = {}  # of jumps by an index
        self.parse(ptx)

    # ------------------------------------------------------------ operands

    def allocate(self, width: int) -> int:
        at = self.next
        self.next += (32 * width + 63) // 64 * 64
        return at

    def register(self, name: str) -> int:
        return self.slots[name][0]

    def width(self, operand: str) -> int:
        return self.slots[operand][1] if operand in self.slots else 0

    def value(self, operand: str, width: int) -> int:
        """The slot of a source operand; constants get one of their own."""
        if operand in self.slots:
            return self.slots[operand][0]
        if operand in SPECIAL:
            return SPECIAL[operand]
        v = self.literal(operand) & ((1 << 8 * width) - 1)
        key = (v, width)
        if key not in self.const_slots:
            self.const_slots[key] = self.allocate(width)
            self.consts.append((self.const_slots[key], width, v))
        return self.const_slots[key]

    def literal(self, s: str) -> int:
        s = s.rstrip("U") if not s.startswith(("0f", "0F", "0d", "0D")) else s
        if s[:2] in ("0f", "0F", "0d", "0D"):
            return int(s[2:], 16)
        if s in self.symbols:
            return self.symbols[s]
        if s == "true":
            return -1
        if s == "false":
            return 0
        if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", s):
            return struct.unpack("<I", struct.pack("<f", float(s)))[0]
        return int(s, 0)

    def address(self, s: str) -> tuple[int, int]:
        """(slot or -1, displacement) of [a+b]."""
        inner = s.strip()[1:-1].strip()
        m = re.fullmatch(r"([%$\w.]+)\s*(?:\+\s*(-?\w+))?", inner)
        if not m:
            raise NotImplementedError(f"address {s}")
        base, d = m[1], int(m[2], 0) if m[2] else 0
        if base in self.slots:
            return self.slots[base][0], d
        return -1, self.literal(base) + d

    @staticmethod
    def vector(s: str) -> list[str]:
        s = s.strip()
        return [x.strip() for x in s[1:-1].split(",")] if s.startswith("{") else [s]

    def target(self, name: str) -> int:
        return DISCARD if name == "_" else self.slots[name][0]

    # ------------------------------------------------------------ text

    def parse(self, ptx: str) -> None:
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M))
        m = re.search(r"\.visible \.entry (\w+)\s*\((.*?)\)", ptx, re.S)
        self.name = m[1]
        self.params, at = [], 0
        self.param_at: dict[str, int] = {}
        for kind, pname in re.findall(r"\.param \.(\w+)[^,]*?(\w+_param_\d+)", m[2]):
            size = BYTES[re.sub(r"\D", "", kind)]
            at = (at + size - 1) // size * size
            self.params.append((at, size))
            self.param_at[pname] = at
            at += size
        self.param_bytes = at
        t = re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)
        self.threads = int(t[1])
        if ".local" in ptx.split(".entry")[1]:
            raise NotImplementedError("local memory")
        self.symbols["global_smem"] = SHARED_BASE
        self.static = 0
        for align, sname, size in re.findall(r"\n\s*\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", ptx):
            self.static = -(-self.static // int(align)) * int(align)
            self.symbols[sname] = SHARED_BASE + self.static
            self.static += int(size)
        for sname in re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\]", ptx):
            self.symbols[sname] = SHARED_BASE + -(-self.static // 1024) * 1024
        body = ptx[ptx.index("{", m.end()) + 1 :]
        body = re.sub(r"\.branchtargets[^;]*;", lambda table: " ".join(table[0].split()), body)  # on one line
        end = body.index("\n}")
        loc = ""
        depth_regs: dict[str, int] = {}
        for raw in body[:end].splitlines():
            comment = raw.split("//", 1)[1].strip() if "//" in raw else ""
            line = raw.split("//", 1)[0].strip()
            if line.startswith(".loc"):
                loc = comment
                continue
            for piece in line.split(";"):
                piece = piece.strip()
                while piece and piece[0] in "{}" and not re.match(r"^\{[^}]*\}\s*,", piece):
                    piece = piece[1:].strip()
                table = re.match(r"^(\$?\w+):\s*\.branchtargets\s+(.*)", piece, re.S)
                if table:
                    self.tables[table[1]] = [name.strip() for name in table[2].split(",")]
                    continue
                label = re.match(r"^(\$?\w+):", piece)
                if label:
                    self.labels[label[1]] = len(self.rows)
                    piece = piece[label.end() :].strip()
                if not piece:
                    continue
                if piece.startswith(".reg"):
                    r = re.match(r"\.reg\s+\.(\w+)\s+(.*)", piece)
                    width = {"pred": 4}.get(r[1]) or BYTES[re.sub(r"\D", "", r[1])]
                    for name in r[2].split(","):
                        n = re.match(r"\s*(%?\w+)(?:<(\d+)>)?", name)
                        names = [f"{n[1]}{i}" for i in range(int(n[2]))] if n[2] else [n[1]]
                        for x in names:
                            self.slots.setdefault(x, (self.allocate(width), width))
                    continue
                if piece.startswith((".", "//")):
                    if piece.startswith((".pragma", ".loc", ".shared")):
                        continue
                    raise NotImplementedError(piece)
                self.instruction(piece, loc)
        for row, label in self.fixups:
            self.rows[row]["imm"] = self.labels[label]
        del depth_regs

    def jump_by_index(self, index: str, labels: list[str], loc: str) -> None:
        """brx.idx, as one comparison and jump for each of its labels."""
        predicate = f"%jump{len(self.rows)}"
        self.slots[predicate] = (self.allocate(4), 4)
        for i, label in enumerate(labels[:-1]):
            self.instruction(f"setp.eq.u32 {predicate}, {index}, {i}", loc)
            self.instruction(f"@{predicate} bra {label}", loc)
        self.instruction(f"bra {labels[-1]}", loc)

    def instruction(self, text: str, loc: str) -> None:
        if text.startswith("brx.idx"):
            index, table = split_operands(text.split(None, 1)[1])
            self.jump_by_index(index, self.tables[table], loc)
            return
        m = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        neg, pred, mnemonic, rest = m[1], m[2], m[3], m[4].strip()
        row = {"pred": -1, "pneg": 0, "aux": 0, "size": 0, "width": 0, "flags": 0, "imm": 0, "o": []}
        if pred:
            row["pred"], row["pneg"] = self.slots[pred][0], int(bool(neg))
        self.rows.append(row)
        self.text.append(text)
        self.locs.append(loc)
        self.mnemonics.append(mnemonic)
        try:
            self.decode(mnemonic, split_operands(rest), row)
        except (NotImplementedError, KeyError, ValueError) as error:
            self.unsupported[f"{mnemonic}: {type(error).__name__} {error}"] += 1
            row["op"] = op("trap")

    # ------------------------------------------------------------ instructions

    def plain(self, row, name: str, a: list[str], width: int, out: int | None = None, widths=None) -> None:
        row["op"] = op(name)
        widths = widths or [width] * (len(a) - 1)
        row["o"] = [self.target(a[0])] + [self.value(x, w) for x, w in zip(a[1:], widths, strict=True)]

    def decode(self, mnemonic: str, a: list[str], row: dict) -> None:
        p = mnemonic.split(".")
        base, kind = p[0], p[-1]
        bits = re.sub(r"\D", "", kind) if re.fullmatch(r"[sufb]\d+", kind) else ""
        width = BYTES.get(bits, 0)
        ftz = "ftz" in p
        if kind == "pred":
            bits, width, kind = "32", 4, "b32"
        if base in ("add", "sub"):
            assert "cc" not in p and not any(x in p for x in ("rz", "rm", "rp", "sat"))
            self.plain(row, f"{base}_{kind if kind[0] == 'f' else 'u' + bits}" + ("_ftz" if ftz else ""), a, width)
        elif base == "mul":
            assert not any(x in p for x in ("rz", "rm", "rp", "sat"))
            if kind[0] == "f":
                self.plain(row, f"mul_{kind}" + ("_ftz" if ftz else ""), a, width)
            elif "wide" in p:
                self.plain(row, f"mul_wide_{kind}", a, width)
            elif "hi" in p:
                self.plain(row, f"mul_hi_{kind}", a, width)
            else:
                self.plain(row, f"mul_lo_u{bits}", a, width)
        elif base in ("fma", "mad"):
            if kind == "bf16x2":
                self.plain(row, "fma_bf16x2", a, 4)
            elif kind[0] == "f":
                assert "rn" in p or base == "mad"
                self.plain(row, "fma_ftz_f32" if ftz else f"fma_{kind}", a, width)
            elif "wide" in p:
                self.plain(row, f"mad_wide_{kind}", a, 0, widths=[width, width, 2 * width])
            elif "lo" in p:
                self.plain(row, f"mad_lo_u{bits}", a, width)
            else:
                raise NotImplementedError(mnemonic)
        elif base in ("and", "or", "xor", "not"):
            self.plain(row, f"{base}_{bits}", a, width)
        elif base == "mov":
            self.move(a, row, bits, width)
        elif base == "neg":
            self.plain(row, f"neg_{kind if kind[0] == 'f' else 'u' + bits}", a, width)
        elif base == "abs":
            self.plain(row, f"abs_{kind}", a, width)
        elif base in ("shl", "shr"):
            name = f"shl_{bits}" if base == "shl" else f"shr_{'s' if kind[0] == 's' else 'u'}{bits}"
            self.plain(row, name, a, 0, widths=[width, 4])
        elif base in ("min", "max"):
            self.plain(row, f"{base}_{'nan_' if 'NaN' in p else ''}{kind}", a, width)
        elif base == "div":
            name = "div_full_f32" if "full" in p or "approx" in p else f"div_{kind}"
            self.plain(row, name, a, width)
        elif base == "rem":
            self.plain(row, f"rem_{kind}", a, width)
        elif base in ("sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos"):
            approx = "_approx" if "approx" in p else ""
            self.plain(row, f"{base}{approx}{'_ftz' if ftz else ''}_{kind}", a, width)
        elif base in ("popc", "clz"):
            self.plain(row, f"{base}_{bits}", a, width)
        elif base == "selp":
            self.plain(row, f"selp_{bits}", a, 0, widths=[width, width, 4])
        elif base == "setp":
            if len(p) != 3 or "|" in a[0]:
                raise NotImplementedError(mnemonic)
            compare = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(p[1], p[1])
            k = kind
            if k[0] == "b" or (compare in ("eq", "ne") and k[0] in "su"):
                k = "u" + bits
            self.plain(row, f"setp_{compare}_{k}", a, width)
        elif base == "bfe":
            self.plain(row, f"bfe_{kind}", a, 4)
        elif base == "bfi":
            self.plain(row, "bfi_32", a, 4)
        elif base == "cvta":
            self.plain(row, f"mov_{bits}", a, width)
        elif base == "prmt":
            self.plain(row, "prmt_32", a, 4)
        elif base == "lop3":
            self.plain(row, "lop3_32", a[:4], 4)
            row["imm"] = self.literal(a[4])
        elif base == "shf":
            self.plain(row, f"shf_{p[1]}", a, 4)
            row["flags"] = int("wrap" in p)
        elif base == "cvt":
            self.convert(p, a, row)
        elif base in ("ld", "st"):
            self.memory(base, p, a, row)
        elif base == "cp":
            self.copy(mnemonic, a, row)
        elif base == "ldmatrix":
            slot, d = self.address(a[1])
            regs = [self.target(x) for x in self.vector(a[0])]
            assert slot >= 0
            row.update(op=op("ldmatrix"), aux=len(regs), flags=int("trans" in p), imm=d, o=[slot, *regs])
        elif base == "stmatrix":
            slot, d = self.address(a[0])
            regs = [self.value(x, 4) for x in self.vector(a[1])]
            assert slot >= 0 and "m8n8" in p
            row.update(op=op("stmatrix"), aux=len(regs), flags=int("trans" in p), imm=d, o=[slot, *regs])
        elif base == "mma":
            shape = re.search(r"m16n8k(\d+)", mnemonic)
            types = {"tf32": 2, "bf16": 1, "f16": 0}
            assert shape and "row.col" in mnemonic and p[-1] == "f32" and p[-4] == "f32"
            regs = [self.target(x) for x in self.vector(a[0])]
            for operand in a[1:]:
                regs += [self.value(x, 4) for x in self.vector(operand)]
            k, flags = int(shape[1]), types[p[-3]]
            na = k // 2 if flags == 2 else k // 4
            assert len(regs) == 8 + na + na // 2
            row.update(op=op("mma"), aux=k, flags=flags, o=regs)
        elif base == "shfl":
            d = a[0].split("|")
            kinds = {"idx": 0, "bfly": 1, "up": 2, "down": 3}
            o = [self.target(d[0])] + [self.value(x, 4) for x in a[1:5]]
            row.update(op=op("shfl"), flags=kinds[p[2]], o=[*o, self.target(d[1]) if len(d) > 1 else -1])
        elif base == "redux":
            kinds = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5}
            o = [self.target(a[0]), self.value(a[1], 4), self.value(a[2], 4)]
            row.update(op=op("redux"), flags=kinds[p[2]], aux=int(kind[0] == "s"), o=o)
        elif base == "vote":
            kinds = {"any": 0, "all": 1, "ballot": 2}
            source = a[1].lstrip("!")
            row.update(op=op("vote"), flags=kinds[p[2]], aux=int(a[1] != source), o=[self.target(a[0]), self.value(source, 4)])
        elif mnemonic in ("bar.sync", "barrier.sync"):
            if len(a) > 1 or a[0] != "0":
                raise NotImplementedError("bar.sync " + ", ".join(a))
            row["op"] = op("bar_sync")
        elif mnemonic == "bar.warp.sync":
            row["op"] = op("bar_warp")
        elif base == "bra":
            row["op"] = op("bra")
            self.fixups.append((len(self.rows) - 1, a[0]))
        elif base in ("ret", "exit"):
            row["op"] = op("ret")
        elif base == "trap":
            row["op"] = op("trap")
        elif base == "wgmma":
            self.warpgroup(p, a, row)
        elif mnemonic.startswith("fence.proxy.async"):
            row["op"] = op("fence_async")
        elif base in ("membar", "fence"):
            row["op"] = op("nop")
        else:
            raise NotImplementedError(mnemonic)

    def move(self, a, row, bits, width) -> None:
        if a[0].startswith("{"):
            regs = self.vector(a[0])
            part = width // len(regs)
            row.update(op=op("unpack"), aux=len(regs), width=part, size=width)
            row["o"] = [self.value(a[1], width)] + [self.target(x) for x in regs]
        elif a[1].startswith("{"):
            regs = self.vector(a[1])
            part = width // len(regs)
            row.update(op=op("pack"), aux=len(regs), width=part, size=width)
            row["o"] = [self.target(a[0])] + [self.value(x, part) for x in regs]
        else:
            self.plain(row, f"mov_{bits}", a, width)

    def convert(self, p, a, row) -> None:
        kinds = [x for x in p[1:] if re.fullmatch(r"[sufb]\d+|bf16|bf16x2|f16x2|tf32", x)]
        rounding = [x for x in p[1:] if x in ("rn", "rna", "rz", "rzi", "rni", "rmi", "rpi")]
        if "sat" in p or "relu" in p or "satfinite" in p:
            raise NotImplementedError(".".join(p))
        to, source = kinds
        integers = re.fullmatch(r"[sub]\d+", to) and re.fullmatch(r"[sub]\d+", source)
        if integers:
            sw = self.width(a[1]) or BYTES[source[1:]]
            row.update(
                op=op("cvt_int"), aux=int(source[1:]), size=int(to[1:]), width=self.width(a[0]),
                flags=(source[0] == "s") | (2 if to[0] == "s" else 0) | sw << 2,
                o=[self.target(a[0]), self.value(a[1], sw)],
            )  # fmt: skip
            return
        if to in ("bf16x2", "f16x2"):
            self.plain(row, f"cvt_rn_{to}_f32", a, 4)
            return
        size = {"bf16": 2}.get(source) or BYTES[re.sub(r"\D", "", source)]
        if rounding and rounding[0] in ("rzi", "rni", "rmi", "rpi") and to == source:
            name = f"cvt_{rounding[0]}_{to}"
        elif to in ("bf16", "f16", "tf32"):
            name = f"cvt_{rounding[0]}_{to}_{source}"
        elif rounding and rounding[0] == "rzi":
            name = f"cvt_rzi_{to}_{source}"
        else:
            name = f"cvt_{to}_{source}"
        self.plain(row, name, a, size)

    def memory(self, base, p, a, row) -> None:
        space = next((x for x in p[1:] if x in ("param", "global", "shared", "local")), None)
        if space is None or space == "local":
            raise NotImplementedError(".".join(p))
        kind = p[-1]
        size = BYTES[re.sub(r"\D", "", kind)]
        regs, mem = (a[0], a[1]) if base == "ld" else (a[1], a[0])
        regs = self.vector(regs)
        if space == "param":
            name, _, d = mem[1:-1].partition("+")
            row.update(op=op("ld_param"), size=size, width=self.width(regs[0]), flags=int(kind[0] == "s"))
            row.update(imm=self.param_at[name.strip()] + int(d or 0), o=[0, self.target(regs[0])])
            return
        slot, d = self.address(mem)
        widths = {self.width(r) for r in regs if r in self.slots} or {size}
        assert len(widths) == 1
        w = widths.pop()
        row.update(op=op(f"{base}_{space}"), aux=len(regs), size=size, width=w, flags=int(kind[0] == "s"), imm=d)
        row["o"] = [slot] + [self.target(r) if base == "ld" else self.value(r, w) for r in regs]

    def copy(self, mnemonic, a, row) -> None:
        if mnemonic == "cp.async.commit_group":
            row["op"] = op("cp_commit")
        elif mnemonic == "cp.async.wait_group":
            row.update(op=op("cp_wait"), imm=int(a[0], 0))
        elif mnemonic == "cp.async.wait_all":
            row.update(op=op("cp_wait"), imm=0, flags=1)
        elif mnemonic.startswith("cp.async.c"):
            to, d = self.address(a[0])
            source, d2 = self.address(a[1])
            row.update(op=op("cp_async"), imm=d, size=d2, aux=int(a[2], 0))
            row["o"] = [to, source, self.value(a[3], 4) if len(a) > 3 else -1]
        else:
            raise NotImplementedError(mnemonic)

    def warpgroup(self, p, a, row) -> None:
        if p[1] == "fence":
            row["op"] = op("nop")
        elif p[1] == "commit_group":
            row["op"] = op("wgmma_commit")
        elif p[1] == "wait_group":
            row.update(op=op("wgmma_wait"), imm=int(a[0], 0))
        elif p[1] == "mma_async":
            shape = re.fullmatch(r"m64n(\d+)k(\d+)", p[4])
            assert shape and p[5] == "f32" and p[6] == p[7]
            N, kind = int(shape[1]), {"f16": 0, "bf16": 1, "tf32": 2}[p[6]]
            d = self.vector(a[0])
            assert len(d) == N // 2
            in_registers = a[1].startswith("{")
            regs = [self.target(x) for x in d]
            regs += [self.value(x, 4) for x in self.vector(a[1])] if in_registers else [self.value(a[1], 8)]
            regs += [self.value(a[2], 8), self.value(a[3], 4)]
            rest = [int(x, 0) for x in a[4:]]
            flags = (4 if rest[0] == -1 else 0) | (8 if rest[1] == -1 else 0)
            trans = rest[2:]
            if trans:
                trans_a, trans_b = (0, trans[0]) if in_registers else trans
                flags |= trans_a | trans_b << 1
            row.update(op=op("wgmma"), aux=N, size=kind, width=int(in_registers), flags=flags, imm=len(self.extra))
            self.extra += regs
        else:
            raise NotImplementedError(".".join(p))

    def contract(self) -> int:
        """What ptxas may do with add.f32 and mul.f32 without a rounding: a product used by a sum of its block becomes
        part of a multiply-add there (the product itself is still computed). Returns how many."""
        made, count = {}, 0
        targets = set(self.labels.values())
        for i, (row, name) in enumerate(zip(self.rows, self.mnemonics, strict=True)):
            if i in targets:
                made.clear()
            if name in ("add.f32", "sub.f32") and row["pred"] < 0 and "op" in row:
                d, x, y = row["o"]
                if x in made or (y in made and name == "add.f32"):
                    product, other = (made[x], y) if x in made else (made[y], x)
                    if name == "add.f32":
                        row.update(op=op("fma_f32"), o=[d, *product, other])
                        count += 1
            written = row["o"][:1] if row["o"] else []
            if name.startswith(("ld", "mov", "mma", "shfl", "cvt", "bra")) or row["pred"] >= 0:
                written = row["o"]
            for w in written:
                made.pop(w, None)
                for k in [k for k, v in made.items() if w in v]:
                    del made[k]
            if name == "mul.f32" and row["pred"] < 0:
                d, x, y = row["o"]
                if d not in (x, y):
                    made[d] = (x, y)
            if name in ("bra", "bar.sync", "ret"):
                made.clear() if name != "bar.sync" else None
        return count

    def program(self) -> Program:
        code = np.zeros(len(self.rows), INS)
        for i, row in enumerate(self.rows):
            for key, v in row.items():
                if key == "o":
                    code[i]["o"][: len(v)] = v
                else:
                    code[i][key] = v
        return Program(
            self.name, code, np.array(self.consts, CONST) if self.consts else np.zeros(0, CONST), self.next, self.params,
            self.param_bytes, self.threads, self.text, self.locs, self.mnemonics, 0, self.unsupported,
            np.array(self.extra or [0], np.int32),
        )  # fmt: skip


def decode(ptx: str, contract: bool = False, entry: str | None = None) -> Program:
    d = Decoder(ptx, entry)
    if contract:
        d.contract()
    return d.program()


