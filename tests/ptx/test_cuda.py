"""The CUDA C++ backend's kernels, compiled by nvcc, executed: maps over rows with sums, moments, random numbers."""

import struct

import numpy as np
import pytest
import torch
from fused_inr.bench import bounds
from fused_inr.bench.gpu.checks import moments_error
from fused_inr.bench.ptx import engine

from fused_inr import activations
from fused_inr.ops import moments

from . import cuda

pytestmark = pytest.mark.skipif(bool(cuda.unavailable()), reason=cuda.unavailable() or "nvcc is there")

rng = np.random.default_rng(0)
PARAMS = {"sine": [3.0], "gaussian": [0.8], "split": [1.5, 0.7, 0.9, 1.1, 1.3]}


def exact(name: str, level: int, params, *streams: np.ndarray, learnable: bool = False) -> list[np.ndarray]:
    """In float64, stream by stream."""
    function = activations.lookup(name).torch_map(level, learnable)
    z, rest = streams[: cuda.MAPS[name][0]], streams[cuda.MAPS[name][0] :]
    values = [torch.as_tensor(np.asarray(v, np.float64)) for v in (*z, *params, *rest)]
    like = values[0]
    return [torch.broadcast_to(v, like.shape).numpy() for v in function(*values)]


def within(found: np.ndarray, expected: np.ndarray, summed: float = 1.0) -> None:
    """A few float32 roundings of each step, and the accuracy of the elementary functions."""
    largest = np.abs(expected).max()
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= summed * (bounds.APPROXIMATE["ieee"] + 8 * 2.0**-24) * 4 * largest


def branches(z: np.ndarray, count: int) -> list[np.ndarray]:
    return np.split(z.astype(np.float64), count, 1)


@pytest.mark.parametrize("features", [48, 33])
@pytest.mark.parametrize("name", cuda.MAPS)
def test_values(name, features):
    B = cuda.MAPS[name][0]
    z = rng.standard_normal((70, B * features)).astype(np.float32)
    bias = rng.standard_normal(B * features).astype(np.float32)
    call = cuda.MapCall(name, 0, [z], PARAMS[name], bias=bias)
    assert not call.faults, call.faults[0]
    assert (call.z == z + bias).all()
    within(call.outputs[0], np.concatenate(exact(name, 0, PARAMS[name], *branches(z + bias, B)), 1))


@pytest.mark.parametrize("features", [48, 33])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("name", cuda.MAPS)
def test_gradients_and_sums(name, learnable, features):
    """Several blocks of rows, whose sums a second kernel adds."""
    B, C, _ = cuda.MAPS[name]
    rows = 300
    z = rng.standard_normal((rows, B * features)).astype(np.float32)
    g = rng.standard_normal((rows, C * features)).astype(np.float32)
    params = [np.full(features, p, np.float32) for p in PARAMS[name]] if learnable else PARAMS[name]
    call = cuda.MapCall(name, 1, [z, g], params, learnable=learnable)
    assert not call.faults, call.faults[0]
    assert [launch.name.count("finish_sums") for launch in call.launches] == [0, 1]
    found = exact(name, 1, params, *branches(z, B), *branches(g, C), learnable=learnable)
    within(call.outputs[0], np.concatenate(found[:B], 1))
    for i, gradient in enumerate(found):
        within(call.sums[i], gradient.sum(0), summed=rows**0.5)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_types_in_memory(half):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
    z = torch.randn(70, 48).to(dtype)
    raw = z.view(torch.uint16).numpy() if half == "bf16" else z.numpy()
    call = cuda.MapCall("sine", 0, [raw], [3.0])
    assert not call.faults, call.faults[0]
    found = torch.from_numpy(call.outputs[0].copy())
    found = found.view(torch.bfloat16) if half == "bf16" else found
    expected = torch.sin(3 * z.double())
    assert (found.double() - expected).abs().max() <= bounds.UNIT[dtype] + 2.0**-20


def test_random_numbers():
    program = cuda.program("moments.cu", "random_bits")
    for start, count, branch, seed in ((0, 12, 0, 0), (4 * (2**32 - 100), 4096, 3, 2**62 + 7), (2**63 - 8192, 8, 1, 1)):
        found = cuda.apart(np.full(count, -1, np.int64))
        arguments = [("*", found), ("i64", start), ("i64", count // 4), ("u32", branch), ("u64", seed)]
        launch = engine.execute(program, arguments, (-(-count // 4 // 256),), 256)
        assert not launch.faults, launch.faults[0]
        assert (found == moments.random_bits(start, count, branch, seed).numpy()).all()


@pytest.mark.parametrize("name", cuda.MAPS)
def test_moments(name):
    """`MomentsCall` of csrc/cuda/moments.h, two settings of two chunks, one of them short."""
    B, C, _ = cuda.MAPS[name]
    settings, samples, chunks = 2, 4096 + 77, 2
    sigmas = torch.linspace(0.3, 0.9, settings * B).view(settings, B)
    params = torch.tensor([PARAMS[name]] * settings)
    out = cuda.apart(np.full((chunks, settings, C * (1 + B), 3), np.nan))
    arrays = [cuda.apart(t.numpy()) for t in (sigmas, params)] + [out]
    call = struct.pack("<3Q4qQ2q", *(a.ctypes.data for a in arrays), settings, chunks, 0, samples, 5, 1, settings)
    program = cuda.program("moments.cu", "moments_of", f"Jet_{name}")
    launch = engine.execute(program, [("struct", call)], (chunks * settings,), 256, 4096 * B * 4, memory=arrays)
    assert not launch.faults, launch.faults[0]
    expected = moments.reference(sigmas, params, 0, samples, 5, activations.lookup(name))
    assert moments_error(torch.from_numpy(out.copy()), expected) <= 1e-3
