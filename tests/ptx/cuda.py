"""The CUDA C++ kernels as nvcc's PTX, and their launches on the executor."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fused_inr.bench.ptx import engine, reader

from fused_inr import native, native_cuda

#: what the launcher of csrc/cuda/rows.cuh does before it launches, with the class of a map taken out
SHIM = """
#include "rows.cuh"
using namespace fused_inr;
struct Given { void* data; int64_t batch, row, column; double value; int64_t storage; };
static Stream stream(const Given& g, int width, int64_t features) {
  Stream s;
  s.data = g.data, s.batch_stride = g.batch, s.row_stride = g.row, s.column_stride = g.column, s.value = g.value;
  s.storage = static_cast<Storage>(g.storage);
  s.wide = is_wide(s, width, features);
  return s;
}
// the groups of inputs, those of outputs, bias, z; then one sum each
extern "C" int64_t map_rows_of(MapRows* a, const int64_t* sizes, int width, int sums, int ins, int outs, const Given* g,
                               const Given* sum, void* partial, int64_t* plan_of) {
  *a = MapRows();
  a->batch = sizes[0], a->rows = sizes[1], a->features = sizes[2], a->partial = partial;
  for (int i = 0; i < ins; ++i) a->in[i] = stream(g[i], width, a->features);
  for (int i = 0; i < outs; ++i) a->out[i] = stream(g[ins + i], width, a->features);
  a->bias = stream(g[ins + outs], width, a->features);
  a->z = stream(g[ins + outs + 1], width, a->features);
  for (int i = 0; i < sums; ++i) a->sum[i] = {sum[i].data, sum[i].batch, static_cast<Storage>(sum[i].storage)};
  const Plan p = plan(a->batch, a->rows, a->features, width, sums);
  a->lane_bits = p.lane_bits, a->tiles = static_cast<uint32_t>(p.tiles);
  a->row_blocks = static_cast<uint32_t>(p.row_blocks);
  plan_of[0] = a->batch * p.row_blocks * p.tiles, plan_of[1] = p.partials, plan_of[2] = p.row_blocks;
  return sizeof(MapRows);
}
"""
SHIM_HEADERS = ("cuda/rows.h", "cuda/rows.cuh", "streams.h", "generated/levels.h")
STORAGE = {np.dtype(np.float32): 0, np.dtype(np.uint16): 2, np.dtype(np.float16): 3}
MAPS = {"sine": (1, 1, 1), "gaussian": (1, 1, 1), "split": (4, 1, 5)}


class Given(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64), ("column", ctypes.c_int64),
        ("value", ctypes.c_double), ("storage", ctypes.c_int64),
    )  # fmt: skip


def unavailable() -> str:
    try:
        native_cuda.nvcc()
    except RuntimeError as error:
        return str(error)
    return ""


def _cached(name: str, make) -> Path:
    """A file made once, for all processes."""
    path = native.cache_folder() / name
    if not native.whole(path):
        with native.one_at_a_time(path.with_suffix(".lock"), patience=300.0):
            if not native.whole(path):
                with native.Build(path) as build:
                    build.publish(make(build))
    return path


@functools.cache
def compiled(source: str, capability: int = 80) -> str:
    """The PTX of a file of csrc/cuda, for the maps of this module."""
    command, version = native_cuda.nvcc()
    folder = native.sources()
    chosen = " ".join(f"X({name}, {B}, {C}, {P})" for name, (B, C, P) in MAPS.items())
    text = f'#define FUSED_INR_CHOSEN(X) {chosen}\n#include "{folder / "cuda" / source}"\n'
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DFUSED_INR_SCALAR=float", f"-arch=sm_{capability}"]
    headers = sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cu"))
    name = native.digest(version, *flags, text, *(p.read_text() for p in headers))

    def make(build: native.Build) -> Path:
        written, target = build.folder / "chosen.cu", build.folder / "kernels.ptx"
        written.write_text(text)
        build.run([[*command, *flags, "-ptx", str(written), "-o", str(target)]])
        return target

    return _cached(f"test_{name}.ptx", make).read_text()


@functools.cache
def program(source: str, *words: str, capability: int = 80) -> reader.PtxProgram:
    """The one kernel of a file whose mangled name holds all these words."""
    text = compiled(source, capability)
    (entry,) = (n for n in re.findall(r"\.entry\s+(\w+)\s*\(", text) if all(word in n for word in words))
    return reader.read(text, entry)


@functools.cache
def _shim() -> ctypes.CDLL:
    command, version = native.compiler()
    folder = native.sources()
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DFI_ONE_LANE=1", f"-I{folder / 'cuda'}", "-mf16c", "-mfma"]
    name = native.digest(version, SHIM, *flags, *((folder / f).read_text() for f in SHIM_HEADERS))

    def make(build: native.Build) -> Path:
        written, target = build.folder / "shim.cpp", build.folder / "shim.so"
        written.write_text(SHIM)
        build.run([[*command, *flags, str(written), "-o", str(target)]])
        return target

    found = ctypes.CDLL(str(_cached(f"test_{name}.so", make)))
    found.map_rows_of.restype = ctypes.c_int64
    return found


def apart(array: np.ndarray) -> np.ndarray:
    """The same numbers in memory of their own, with nothing near: no access beyond it lands in another array."""
    space = np.full(array.nbytes + 8192, 0xFF, np.uint8)
    start = 4096 - space.ctypes.data % 64
    inside = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    inside[...] = array
    return inside


class MapCall:
    """One launch of a generated map over rows, as csrc/cuda/rows.cuh makes it.

    streams: [rows, branches * features] of each group that is not a parameter; params: a number or [features] each.
    Results: `outputs`, one array a group; `sums` [B (+ P), features] of level 1, of the bias and of learnable
    parameters; `z`, with the bias.
    """

    def __init__(
        self,
        name: str,
        level: int,
        streams: Sequence[np.ndarray],
        params: Sequence[float | np.ndarray],
        *,
        learnable: bool = False,
        bias: np.ndarray | None = None,
        capability: int = 80,
    ):
        B, C, P = MAPS[name]
        rows, columns = streams[0].shape
        features, storage = columns // B, streams[0].dtype
        widths = [C] if level == 0 else [B]
        of_in, of_out = sum(s.shape[1] // features for s in streams) + P, sum(widths) + (P if learnable else 0)
        width = 1 if of_in + of_out > 12 else 2 if of_in + of_out > 6 else 4
        self.outputs = [
            apart(np.full((rows, w * features), 0xFFFF if storage == np.uint16 else np.nan, storage)) for w in widths
        ]
        count = (B if level == 1 else 0) + (P if learnable else 0)
        self.sums = apart(np.full((max(1, count), features), np.nan, np.float32))
        self.z = apart(np.full((rows, B * features), np.nan, np.float32)) if level == 0 else None
        self.memory = [*self.outputs, self.sums] + ([] if self.z is None else [self.z])

        def given(array=None, value=0.0, column=1) -> Given:
            if array is None:
                return Given(None, 0, 0, column, value, 0)
            kept = array if any(array is m for m in self.memory) else apart(array)
            if kept is not array:
                self.memory.append(kept)
            row = kept.strides[0] // kept.itemsize if kept.ndim == 2 else 0
            return Given(kept.ctypes.data, 0, row, column, 0.0, STORAGE[kept.dtype])

        numbers = [given(p) if isinstance(p, np.ndarray) else given(value=p) for p in params]
        ins = [given(streams[0]), *numbers, *(given(s) for s in streams[1:])]
        outs = [given(o) for o in self.outputs] + [given()] * (P if learnable else 0)
        rest = [given(bias), given(self.z)]
        everything = (Given * (len(ins) + len(outs) + 2))(*ins, *outs, *rest)
        sums = (Given * max(1, count))(*(given(self.sums[i : i + 1]) for i in range(count)))
        for i in range(count):  # given() copied the row: it is the array's that is meant
            sums[i].data = self.sums[i].ctypes.data
        buffer, plan = ctypes.create_string_buffer(1 << 16), (ctypes.c_int64 * 3)()
        sizes = (ctypes.c_int64 * 3)(1, rows, features)

        def fill(partial: int | None) -> bytes:
            size = _shim().map_rows_of(
                buffer, sizes, width, count, len(ins), len(outs), everything, sums, ctypes.c_void_p(partial), plan
            )
            return buffer.raw[:size]

        fill(None)
        partial = apart(np.full(max(1, plan[1]), np.nan, np.float32))
        self.memory.append(partial)
        argument = fill(partial.ctypes.data)
        kernel = f"Map_{name}_{'p' if learnable else 'l'}{level}E"
        found = program("maps.cu", "map_rows", kernel, capability=capability)
        self.launches = [engine.execute(found, [("struct", argument)], (plan[0],), 256, memory=self.memory)]
        if count and plan[2] > 1:
            finish = program("maps.cu", "finish_sums", capability=capability)
            blocks = count * -(-features // 32)
            arguments = [("struct", argument), ("i32", count)]
            self.launches.append(engine.execute(finish, arguments, (blocks,), 256, memory=self.memory))
        self.faults = [fault for launch in self.launches for fault in launch.faults]
