"""Small kernels written by hand, and their launch on the executor."""

from __future__ import annotations

import itertools
import re

import numpy as np
from fused_inr.bench.ptx import engine, reader

#: type -> NumPy type; bf16 travels as its bits
TYPES = {
    "b8": np.uint8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "bf16": np.uint16,
    "f16": np.float16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "f32": np.float32,
    "tf32": np.float32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f64": np.float64,
}


def kernel(body: str, params: int, threads: int = 32, head: str = "") -> str:
    """PTX of a kernel with pointers in %a0, %a1 .., its thread in %t (of all threads: %g), and plenty of registers."""
    names = ", ".join(f".param .u64 kernel_param_{i}" for i in range(params))
    loads = "\n".join(f"ld.param.u64 %a{i}, [kernel_param_{i}];" for i in range(params))
    registers = ".reg .pred %p<40>; .reg .b16 %h<40>; .reg .b32 %r<200>; .reg .f32 %f<300>; .reg .b64 %d<60>; "
    registers += ".reg .f64 %e<10>; .reg .b64 %a<9>; .reg .b64 %w<20>; .reg .b32 %t; .reg .b32 %g; .reg .b32 %n;"
    return f"""
.version 8.7
.target sm_90a
.address_size 64
{head}
.visible .entry kernel({names})
.reqntid {threads}
{{
{registers}
{loads}
mov.u32 %t, %tid.x;
mov.u32 %g, %ctaid.x;
mov.u32 %n, %ntid.x;
mad.lo.s32 %g, %g, %n, %t;
{body}
ret;
}}
"""


def run(
    body: str, *arrays: np.ndarray, grid: int = 1, threads: int = 32, shared: int = 0, head: str = "", **options
) -> engine.Launch:
    """Run a kernel's body on arrays, which it may change."""
    text = kernel(body, len(arrays), threads, head)
    arguments = [("*", array) for array in arrays]
    return engine.execute(reader.read(text), arguments, (grid,), threads, shared, engine.ExecutionOptions(**options))


def clean(launch: engine.Launch) -> engine.Launch:
    assert not launch.faults, "\n".join(map(str, launch.faults))
    return launch


def kinds(launch: engine.Launch) -> set[str]:
    return {fault.kind for fault in launch.faults}


_REGISTER = {1: "%r", 2: "%h", 4: "%r", 8: "%d"}


def elementwise(instruction: str, result: str, operands: tuple[str, ...], *arrays: np.ndarray, **options) -> np.ndarray:
    """The result of an instruction for each element of the arrays; `instruction` names its operands d, a, b, c."""
    n = len(arrays[0])
    padded = -(-n // 64) * 64
    memory = [np.zeros(padded, TYPES[t]) for t in (result, *operands)]
    for array, values in zip(memory[1:], arrays):
        array[:n] = values
    lines, names = [], {}
    for i, (letter, kind) in enumerate(zip("dabc", (result, *operands))):
        size = np.dtype(TYPES[kind]).itemsize
        names[letter] = f"{_REGISTER[size]}{10 + i}"
        lines.append(f"mul.wide.u32 %w{i}, %g, {size}; add.s64 %w{i}, %w{i}, %a{i};")
        if i:
            lines.append(f"ld.global.b{8 * size} {names[letter]}, [%w{i}];")
    head, _, tail = instruction.partition(" ")
    lines.append(head + " " + re.sub(r"\b[dabc]\b", lambda m: names[m[0]], tail) + ";")
    lines.append(f"st.global.b{8 * np.dtype(TYPES[result]).itemsize} [%w0], {names['d']};")
    clean(run("\n".join(lines), *memory, grid=padded // 64, threads=64, **options))
    return memory[0][:n]


def pairs(*grids: np.ndarray) -> list[np.ndarray]:
    """Every combination of values."""
    found = list(itertools.product(*(grid.tolist() for grid in grids)))
    return [np.array(column, grid.dtype) for column, grid in zip(zip(*found), grids)]
