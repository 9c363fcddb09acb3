"""The CUDA C++ backend without a GPU: nvcc compiles its sources without spills, the device's functions and the
operators around them run on the host against the reference, and every way of not being there gives its reason.

On a host build (`native_cuda.build(.., on_host=True)`) each thread of a block runs after the other: that proves
indices, formulas, types and sums. What needs a device is in test_gpu.py.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from linear_act_oracle import NAMES
from suite import linear_act as shared
from tolerances import UNIT, tolerance

import fused_inr as fi
from fused_inr import activations, backends, native, native_cuda
from fused_inr.activations import lookup, registered
from fused_inr.backends import choice
from fused_inr.backends.base import group_branches
from fused_inr.ops import moments, raw

MAPS = {m.name: m for m in registered()}
LEVELS = ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True))
CPU = torch.device("cpu")


def reason_without(find) -> str:
    try:
        find()
    except RuntimeError as error:
        return str(error)
    return ""


needs_nvcc = pytest.mark.skipif(bool(reason_without(native_cuda.nvcc)), reason=reason_without(native_cuda.nvcc))
needs_compiler = pytest.mark.skipif(bool(reason_without(native.compiler)), reason="no C++ compiler")


# -- nvcc: three architectures, no spills

# the usual one, and the one with most streams, which needs most registers
SAMPLE = {"float": ("sine", "split"), "double": ("split",)}


def resources(
    scalar: str, chosen: tuple[str, ...], folder: Path, source: str = "maps.cu"
) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers, and bytes of stack, spill stores and spill loads, as ptxas tells."""
    command, _ = native_cuda.nvcc()
    rows = " ".join(f"X({m.name}, {m.branches}, {m.outputs}, {m.n_params})" for m in (lookup(n) for n in chosen))
    header = folder / "chosen.h"
    header.write_text(f'#include "generated/activations.h"\n#define FUSED_INR_CHOSEN(X) {rows}\n')
    sources = native.sources()
    done = subprocess.run(
        [
            *native_cuda._nvcc_command(command, native_cuda.SHIPPED),
            *("-Xptxas", "-v", f"-DFUSED_INR_SCALAR={scalar}", f'-DFUSED_INR_MAPS_HEADER="{header}"', f"-I{sources}"),
            *("-c", str(sources / "cuda" / source), "-o", str(folder / "maps.o")),
        ],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[:4000]
    assert "warning" not in done.stderr, done.stderr[:4000]
    found = {}
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, arch, stack, stores, loads, registers in pattern.findall(done.stderr):
        figures = {"stack": stack, "stores": stores, "loads": loads, "registers": registers}
        found[arch, name] = {k: int(v) for k, v in figures.items()}
    return found


def check_resources(scalar: str, chosen: tuple[str, ...], folder: Path) -> None:
    found = resources(scalar, chosen, folder)
    for arch in native_cuda.SHIPPED:
        kernels = [name for a, name in found if a == f"sm_{arch}"]
        for name in chosen:
            # without parameters the learnable maps are the constant ones
            wanted = 6 if lookup(name).n_params else 4
            assert sum(f"Map_{name}_" in kernel for kernel in kernels) >= wanted, (arch, name)
    for kernel, figures in found.items():
        assert figures["stores"] == figures["loads"] == 0, (kernel, figures)
        # nothing of a thread lies in memory, except in the C library's reduction of large float64 angles (40 bytes)
        assert figures["stack"] <= (40 if scalar == "double" else 0), (kernel, figures)
        # two blocks of 256 threads on a multiprocessor, or more; float64 may have it to itself
        assert figures["registers"] <= (255 if scalar == "double" else 128), (kernel, figures)


@needs_nvcc
@pytest.mark.parametrize("scalar", SAMPLE)
def test_nvcc_compiles_a_sample_for_three_architectures_without_spills(scalar, tmp_path):
    check_resources(scalar, SAMPLE[scalar], tmp_path)


def check_moments_resources(chosen: tuple[str, ...], folder: Path) -> None:
    found = resources("float", chosen, folder, "moments.cu")
    assert len(found) == len(chosen) * len(native_cuda.SHIPPED)
    for kernel, figures in found.items():
        assert figures["stores"] == figures["loads"] == figures["stack"] == 0, (kernel, figures)
        assert figures["registers"] <= 128, (kernel, figures)  # two blocks on a multiprocessor


@needs_nvcc
def test_nvcc_compiles_moments_for_three_architectures_without_spills(tmp_path):
    check_moments_resources(SAMPLE["float"], tmp_path)


@pytest.mark.slow
@needs_nvcc
def test_nvcc_compiles_moments_of_the_whole_registry_without_spills(tmp_path):
    check_moments_resources(tuple(MAPS), tmp_path)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("scalar", SAMPLE)
def test_nvcc_compiles_the_whole_registry_without_spills(scalar, tmp_path):
    check_resources(scalar, tuple(MAPS), tmp_path)


@pytest.mark.slow
@needs_nvcc
def test_the_library_builds_and_its_symbols_are_its_own(tmp_path):
    """Everything but torch, the C library and the driver is inside; no symbol of PyTorch's CUDA parts is needed."""
    library = native_cuda.build(tmp_path / "cuda.so", archs=[90])
    assert native.stamp_of(library) == f"{native_cuda._stamp(native.sources())} for 90"
    ctypes.CDLL(str(library))  # here, without CUDA
    needed = subprocess.run(["nm", "-D", "--undefined-only", "-C", str(library)], capture_output=True, text=True).stdout
    assert "c10::cuda" not in needed
    assert "cudaLaunchKernel" not in needed


def test_the_sources_use_no_header_of_pytorchs_cuda_parts():
    folder = native.sources() / "cuda"
    for path in folder.iterdir():
        included = re.findall(r"#include [<\"](\S+)[>\"]", path.read_text())
        assert not [name for name in included if "cuda/" in name.lower() and "torch" in name], path
        if path.suffix in (".cu", ".cuh", ".h") and path.name != "operators.h":  # which no kernel includes
            assert "operators.h" not in included, path
            assert not [name for name in included if name.startswith(("ATen", "c10", "torch"))], path
        assert "ATen/cuda" not in path.read_text()
        assert "c10/cuda" not in path.read_text()


# -- the device's functions on the host


class OnHost(backends.Cuda):
    """The backend over its host build, for CPU tensors."""

    def available(self):
        return True, ""

    def serves(self, map, device, dtype):
        return "" if map.generated else self._compile(map)

    @staticmethod
    def _operators():
        return torch.ops.fused_inr_cuda_on_host

    def _compile(self, map):
        if map.key not in self._compiled:
            library = ctypes.CDLL(str(native_cuda.build_maps(self.folder / f"{map.key}.so", map.cpp_source(), [])))
            tables = (ctypes.c_int64 * 3)()
            library.fused_inr_cuda_user_maps(tables)
            self._operators().register_activation(map.key, *tables)
            self._compiled[map.key] = ""
        return ""


@pytest.fixture(scope="module")
def host_library():
    if reason := reason_without(native.compiler):
        pytest.skip(reason)
    stamp = native_cuda._stamp(native.sources())
    library = native.cache_folder() / f"cuda_on_host_{native.digest(stamp, native.compiler()[1])}.so"
    with native.one_at_a_time(library.with_suffix(".lock")):
        if not native.whole(library):
            native_cuda.build(library, on_host=True, checked=True)
    assert native.stamp_of(library) == f"{stamp} for 0"
    if not hasattr(torch.ops.fused_inr_cuda_on_host, "stamp"):
        torch.ops.load_library(str(library))
    return library


@pytest.fixture
def on_host(host_library, monkeypatch, tmp_path):
    """`backends.use("cuda")` runs the host build within the test."""
    backend = OnHost()
    backend.folder = tmp_path
    monkeypatch.setitem(backends.TABLE, "cuda", backend)
    return backend


def map_arguments(m, level, learnable, dtype, features, rows=70):
    """Inputs of `act_map` in varied layouts: plain, stride 0 on rows, transposed, one number or one a feature."""
    ins, _ = group_branches(m, level, learnable)
    generator = torch.Generator().manual_seed(level)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = []
    for i, k in enumerate(ins):
        if not k:
            inputs.append(draw(features) if i % 2 else torch.tensor(0.3, dtype=dtype))
        elif i == 1:
            inputs.append(draw(1, k * features).expand(rows, -1))
        elif i == 2:
            inputs.append(draw(k * features, rows).t())
        else:
            inputs.append(draw(rows, k * features))
    constants = [min(c, 3.0) for c in m.defaults.values()]
    params = [draw(features).abs() + 0.5 if learnable and j % 2 == 0 else None for j in range(m.n_params)]
    return inputs, params, constants


# 21 features: one by one; 24: in packs; 300: in tiles
SIZES = [(name, n) for name in MAPS for n in ((21, 24, 300) if name in ("sine", "split") else (21, 24))]


@pytest.mark.parametrize(("name", "features"), SIZES)
def test_every_level_of_every_activation(name, features, on_host):
    m = MAPS[name]
    for level, learnable in LEVELS if m.n_params else LEVELS[:4]:
        for dtype in (torch.float64, torch.float32):
            inputs, params, constants = map_arguments(m, level, learnable, dtype, features=features)
            found = raw.act_map(inputs, params, constants, m.key, "cuda", level, learnable)
            doubles = [t.double() for t in inputs], [None if p is None else p.double() for p in params]
            exact = backends.reference_map(m, *doubles, constants, level, learnable)
            eager = backends.reference_map(m, inputs, params, constants, level, learnable)
            for ours, theirs, truth in zip(found, eager, exact, strict=True):
                assert ours.dtype == dtype and ours.shape == truth.shape
                scale = truth.abs().max().item()
                error, eager_error = ((t.double() - truth).abs().max().item() for t in (ours, theirs))
                if dtype == torch.float64:
                    assert error <= tolerance("same arithmetic") * scale
                else:
                    floor = tolerance("evaluation") * 2 * UNIT[dtype] * scale
                    assert error <= tolerance("eager") * eager_error + floor, (level, learnable, error / scale)


def slow_unless(quick: bool, *values):
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [slow_unless(n == "sine" or (n, d) == ("gabor", torch.bfloat16), n, d) for n in NAMES for d in TYPES],
)
def test_rounding_stays_within_the_bound(name, dtype, on_host):
    shared.test_rounding_stays_within_the_bound(name, dtype, "cuda", CPU)


@pytest.mark.parametrize(
    ("name", "k"), [slow_unless((n, k) == ("sine", 3), n, k) for n in ("sine", "split") for k in (1, 3, 17)]
)
def test_every_shape(name, k, on_host):
    shared.test_every_shape(name, k, "cuda", CPU)


@pytest.mark.parametrize(
    ("name", "per_feature"),
    [slow_unless(n == "sine", n, p) for n in shared.SMOOTH if lookup(n).n_params for p in (False, True)],
)
def test_learnable_parameters(name, per_feature, on_host):
    shared.test_learnable_parameters(name, per_feature, "cuda")


def test_layouts_batches_and_large_arguments(on_host):
    for layout in shared.LAYOUTS:
        shared.test_first_and_second_derivatives("sine", layout, "cuda")
    for name, is_shared in (("sine", False), ("gabor", True)):
        shared.test_a_batch_of_weights(name, is_shared, "cuda")
        shared.test_a_batch_of_weights_is_the_stack_of_layers(name, "cuda")
    shared.test_large_arguments_of_the_sine("cuda", CPU)
    shared.test_no_features_and_no_inputs("sine", "cuda", CPU)
    shared.test_nothing_that_was_passed_is_overwritten("split", "cuda", CPU)
    shared.test_the_output_may_be_changed_in_place("identity", torch.float32, "cuda", CPU)


def test_sums_over_many_row_blocks_are_right_and_always_the_same(on_host):
    """Two stages: partial sums of blocks, then their sum; neither loses a row, whatever the layout of threads."""
    m, half = MAPS["sine"], torch.bfloat16
    for features in (1, 3, 40, 129):
        z, g = torch.randn(5003, features), torch.randn(5003, features).to(half)
        omega = torch.rand(features) + 0.5
        weight, bias = torch.eye(features), torch.zeros(features)
        ops = torch.ops.fused_inr_cuda_on_host
        arguments = (g, z, weight, bias, [omega], [1.0], z, m.key, [True, True, True, True])
        gx, gw, gb, gp = ops.linear_act_backward(*arguments)
        exact = g.double() * omega.double() * torch.cos(omega.double() * z.double())
        slope = g.double() * z.double() * torch.cos(omega.double() * z.double())
        for value, truth in ((gb, exact.sum(0)), (gp[0], slope.sum(0)), (gw, exact.t() @ z.double())):
            torch.testing.assert_close(value.double(), truth, rtol=0, atol=5003 * 2.0**-24 * 5)
        torch.testing.assert_close(gx.double(), exact, rtol=0, atol=1e-5)
        for again, first in zip(ops.linear_act_backward(*arguments), (gx, gw, gb, gp), strict=True):
            assert torch.equal(again, first)


def test_what_is_not_needed_comes_back_empty(on_host):
    ops = torch.ops.fused_inr_cuda_on_host
    g, x, weight, bias = torch.randn(6, 4), torch.randn(6, 3), torch.randn(4, 3), torch.randn(4, dtype=torch.float16)
    for mask in range(16):
        needs = [bool(mask >> i & 1) for i in range(4)]
        results = ops.linear_act_backward(g, x, weight, bias, [], [2.0], None, "sine", needs)
        assert [t.numel() > 0 for t in results] == needs
        assert [t.dtype for t in results] == [torch.float32, torch.float32, torch.float16, torch.float32]
    y, z = ops.linear_act(x, weight, bias, [], [2.0], "sine", False)
    assert z.numel() == 0
    _, saved = ops.linear_act(x, weight, bias, [], [2.0], "sine", True)
    torch.testing.assert_close(saved, x @ weight.t() + bias.float())
    torch.testing.assert_close(y, torch.sin(2 * saved))


def test_types_may_differ(on_host):
    ops = torch.ops.fused_inr_cuda_on_host
    x, weight, bias = torch.randn(5, 3).bfloat16(), torch.randn(4, 3), torch.randn(4, dtype=torch.float64)
    y, z = ops.linear_act(x, weight, bias, [], [1.0], "sine", True)
    assert y.dtype == torch.bfloat16 and z.dtype == torch.float32
    torch.testing.assert_close(z, x.float() @ weight.t() + bias.float(), rtol=1e-5, atol=1e-5)
    g = torch.randn(5, 4, dtype=torch.float64)
    results = ops.linear_act_backward(g, x, weight, bias, [], [1.0], z, "sine", [True, True, True, False])
    assert [t.dtype for t in results[:3]] == [torch.bfloat16, torch.float32, torch.float64]


def test_half_types_round_to_nearest_even_and_keep_what_is_special(on_host):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        halves = every.view(dtype).view(-1, 64)
        (wide,) = raw.act_map([halves.float()], [], [], "identity", "cuda", 0, False)
        assert torch.equal(wide.isnan(), halves.isnan())
        y, _ = torch.ops.fused_inr_cuda_on_host.linear_act(
            halves[:, :1].expand(-1, 1), torch.ones(1, 1, dtype=dtype), None, [], [], "identity", False
        )
        assert torch.equal(y.nan_to_num(7), halves[:, :1].nan_to_num(7))
    spread = torch.randn(4096) * 2.0 ** torch.randint(-30, 16, (4096,))
    values = torch.cat((spread, torch.tensor([65519.9, 65520.0, 3e38])))
    for dtype in (torch.bfloat16, torch.float16):
        z = values.view(-1, 1)
        gx, *_ = torch.ops.fused_inr_cuda_on_host.linear_act_backward(
            z, torch.zeros(len(z), 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), None, [], [], None, "identity",
            [True, False, False, False],
        )  # fmt: skip
        assert torch.equal(gx, z.to(dtype))


BAD = [
    (lambda ops: ops.linear_act(torch.ones(2, 3), torch.ones(4, 2), None, [], [1.0], "sine", False), "not weight's"),
    (lambda ops: ops.linear_act(torch.ones(2, 3), torch.ones(4, 3), None, [], [], "sine", False), "constants"),
    (lambda ops: ops.linear_act(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), [], [1.0], "sine", False), "bias"),
    (lambda ops: ops.linear_act(torch.ones(2, 3), torch.ones(3, 3), None, [], [1.0] * 5, "split", False), "multiple"),
    (lambda ops: ops.linear_act(torch.ones(2, 3), torch.ones(4, 3), None, [], [], "no_such", False), "knows no"),
    (lambda ops: ops.act_map([torch.ones(2, 3)], [], [1.0], "sine", 1, False), "expected 2 tensors"),
    (lambda ops: ops.act_map([torch.ones(2, 3)], [], [1.0], "sine", 4, False), "0 to 3"),
    (lambda ops: ops.act_map([torch.ones(2, 3)] * 2, [torch.ones(2)], [], "sine", 1, True), "one per feature"),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input_is_refused(index, host_library):
    call, message = BAD[index]
    with pytest.raises(ValueError, match=message):
        call(torch.ops.fused_inr_cuda_on_host)


def test_no_derivative_beyond_the_generated_ones(host_library):
    with pytest.raises(NotImplementedError, match="order 3 with learnable"):
        torch.ops.fused_inr_cuda_on_host.act_map([torch.ones(2, 3)] * 8, [], [1.0], "sine", 3, True)


def test_a_formula_at_run_time(on_host):
    import sympy

    formula = activations.define("test_cuda_chirp", lambda z, a: sympy.sin(a * z**2), a=1.5)
    z, g = torch.randn(33, 9, dtype=torch.float64), torch.randn(33, 9, dtype=torch.float64)
    with backends.use("cuda"):
        y = fi.functional.linear_act(z, torch.eye(9, dtype=torch.float64), None, formula)
    torch.testing.assert_close(y, torch.sin(1.5 * z**2))
    (dz,) = raw.act_map([z, g], [None], [1.5], formula.map.key, "cuda", 1, False)
    torch.testing.assert_close(dz, g * 3 * z * torch.cos(1.5 * z**2))


# -- moments

CHUNK = moments.CHUNK


def exact_moments(m, sigmas, params, start, samples, seed):
    """Sums per chunk of the jet in float64, and of the absolute values."""
    words = [moments.random_bits(start, -(-samples // 4) * 4, b, seed).view(-1, 2) for b in range(m.branches)]
    normals = []
    for w in words:
        u = (w[:, 0].float() * 2.0**-32 + 2.0**-33).double()
        t = ((w[:, 1] - ((w[:, 1] >> 31) << 32)).float() * (torch.pi * 2.0**-31)).double()
        r = (-2 * u.log()).clamp_min(0).sqrt()
        normals.append(torch.stack((r * t.cos(), r * t.sin()), -1).flatten()[:samples])
    z = [sigmas[:, b : b + 1].double() * n for b, n in enumerate(normals)]
    values = m.torch_jet()(*z, *(p[:, None] for p in params.double().unbind(1)))
    v = torch.stack([torch.as_tensor(value).expand_as(z[0]) for value in values], 1)  # [G, V, samples]
    powers = torch.stack((v, v**2, v**4), 2).split(CHUNK, -1)
    return torch.stack([p.sum(-1) for p in powers]), torch.stack([p.abs().sum(-1) for p in powers])


def check_moments(m, sigmas, params, start, samples, seed):
    out = torch.ops.fused_inr_cuda_on_host.moments(sigmas, params, start, samples, seed, m.key)
    exact, size = exact_moments(m, sigmas, params, start, samples, seed)
    assert out.dtype == torch.float64 and out.shape == exact.shape
    # a few units in the last place of the largest value; steep maps multiply the error of z
    assert ((out - exact).abs() <= 2e-5 * size + 1e-9).all(), ((out - exact).abs() / size).amax((0, 1))
    return out


def moment_parameters(m, G):
    return torch.tensor([[min(c, 3.0) for c in m.defaults.values()]] * G).reshape(G, m.n_params)


@pytest.mark.parametrize("name", MAPS)
def test_moments_of_every_activation(name, on_host):
    m = MAPS[name]
    sigmas = torch.linspace(0.4, 1.3, 2 * m.branches).view(2, m.branches)
    check_moments(m, sigmas, moment_parameters(m, 2), 0, CHUNK + 1001, 7)


@pytest.mark.parametrize(("start", "seed"), [(0, 0), (4 * (2**32 - 2), -1), (2**63 - 16, 2**62 + 5)])
def test_the_stream_of_random_numbers(start, seed, host_library):
    ops = torch.ops.fused_inr_cuda_on_host
    for branch in (0, 3):
        found = ops.random_bits(start, 16, branch, seed, CPU)
        assert torch.equal(found, moments.random_bits(start, 16, branch, seed))
    answer = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ops.random_bits(0, 4, 0, 0, CPU).tolist() == answer


def test_bits_of_moments_do_not_depend_on_the_call(on_host):
    m, ops = MAPS["gabor"], torch.ops.fused_inr_cuda_on_host
    sigmas, params = torch.rand(70, 2) + 0.2, moment_parameters(MAPS["gabor"], 70)
    params[:, 0] += torch.arange(70) / 70  # parameters of each setting
    samples = 5 * CHUNK + 6
    whole = ops.moments(sigmas, params, 8, samples, 1, m.key)
    assert torch.equal(ops.moments(sigmas, params, 8, samples, 1, m.key), whole)
    assert torch.equal(ops.moments(sigmas, params, 8 + 2 * CHUNK, 2 * CHUNK, 1, m.key), whole[2:4])
    assert torch.equal(ops.moments(sigmas, params, 8 + 5 * CHUNK, 6, 1, m.key), whole[5:])
    assert torch.equal(ops.moments(sigmas[69:], params[69:], 8, samples, 1, m.key), whole[:, 69:])
    # more settings than make one a block
    many = ops.moments(sigmas.repeat(20, 1), params.repeat(20, 1), 8, CHUNK, 1, m.key)
    assert torch.equal(many, whole[:1].repeat(1, 20, 1, 1))


def test_few_draws_and_none(on_host):
    m, ops = MAPS["tanh"], torch.ops.fused_inr_cuda_on_host
    for samples in (1, 3, CHUNK):
        check_moments(m, torch.ones(1, 1), torch.zeros(1, 0), 2**63 - CHUNK, samples, 3)
    assert ops.moments(torch.ones(0, 1), torch.ones(0, 0), 0, 5000, 0, "tanh").shape == (2, 0, 2, 3)
    assert ops.moments(torch.ones(2, 1), torch.ones(2, 0), 0, 0, 0, "tanh").shape == (0, 2, 2, 3)


def test_moments_of_a_formula_at_run_time(on_host):
    import sympy

    m = activations.define("test_cuda_moments", lambda z, w, a: (sympy.sin(a * z), z * w), a=1.5).map
    on_host._compile(m)
    check_moments(m, torch.tensor([[0.5, 1.0]]), torch.tensor([[2.0]]), 0, 1000, 3)


BAD_MOMENTS = [
    ((torch.ones(2, 2), torch.ones(2, 1), 0, 10, 0, "sine"), ValueError, r"sigmas: expected \[2, 1\]"),
    ((torch.ones(2, 1), torch.ones(1, 1), 0, 10, 0, "sine"), ValueError, r"params: expected \[2, 1\]"),
    ((torch.ones(2), torch.ones(1, 1), 0, 10, 0, "sine"), ValueError, "sigmas"),
    ((torch.ones(2, 1).double(), torch.ones(2, 1), 0, 10, 0, "sine"), TypeError, "float32"),
    ((torch.ones(2, 1), torch.ones(2, 1), 2, 10, 0, "sine"), ValueError, "multiple of 4"),
    ((torch.ones(2, 1), torch.ones(2, 1), -4, 10, 0, "sine"), ValueError, "multiple of 4"),
    ((torch.ones(2, 1), torch.ones(2, 1), 0, -1, 0, "sine"), ValueError, "samples"),
    ((torch.ones(2, 1), torch.ones(2, 1), 2**63 - 8, 9, 0, "sine"), ValueError, "samples"),
    ((torch.ones(2, 1), torch.ones(2, 1), 0, 10, 0, "no_such"), ValueError, "knows no"),
]


@pytest.mark.parametrize("index", range(len(BAD_MOMENTS)))
def test_bad_moments_are_refused(index, host_library):
    arguments, error, message = BAD_MOMENTS[index]
    with pytest.raises(error, match=message):
        torch.ops.fused_inr_cuda_on_host.moments(*arguments)


# -- why it is not there


def alone(code: str) -> str:
    head = "import torch\nfrom fused_inr import native_cuda, native\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_cuda_it_says_so():
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA")
    assert backends.TABLE["cuda"].available() == (False, "this PyTorch has no CUDA")
    assert native_cuda.status() == (None, "this PyTorch has no CUDA")
    with backends.use("cuda"), pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run .* serves CUDA tensors"):
        fi.functional.linear_act(torch.ones(2, 3), torch.ones(4, 3), None, activations.get("sine"))


def test_without_nvcc_it_says_what_to_install():
    code = """
        torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
        native_cuda.shutil.which = lambda *a, **k: None
        native_cuda._PACKAGED = native_cuda.Path("/nonexistent/_C_cuda.so")
        import os
        os.environ.pop("CUDACXX", None)
        assert native_cuda.load() is False and native_cuda.load() is False
        print(native_cuda.status()[1])
    """
    assert alone(code) == "no nvcc found: install the CUDA toolkit, or set CUDACXX or CUDA_HOME"


@pytest.mark.parametrize("command", ["/nonexistent/nvcc", "false"])
def test_an_nvcc_that_does_not_run_is_a_reason(command, monkeypatch):
    monkeypatch.setenv("CUDACXX", command)
    with pytest.raises(RuntimeError, match="does not run"):
        native_cuda.nvcc()


def test_a_library_has_to_have_code_for_every_device(tmp_path, monkeypatch):
    library, stamp = tmp_path / "x.so", "torch 1 cuda sources 0"
    library.write_bytes(f"FUSED_INR_STAMP={stamp} for 80 90;".encode())
    assert native_cuda._usable(library, stamp)
    assert not native_cuda._usable(library, "torch 2 cuda sources 0")
    assert not native_cuda._usable(tmp_path / "absent.so", stamp)
    for capability, usable in (((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, c=capability: c)
        assert native_cuda._usable(library, stamp) == usable, capability
    library.write_bytes(f"FUSED_INR_STAMP={stamp} for 80 100;".encode())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    assert not native_cuda._usable(library, stamp)


@pytest.mark.parametrize(
    ("devices", "known", "expected"),
    [
        ([], [75, 80, 86, 90, 100, 120], [80, 90, 100]),
        ([(9, 0)], [75, 80, 86, 90, 100], [90]),
        ([(8, 9), (8, 0)], [75, 80, 86], [80, 86]),
        ([(12, 0)], [75, 80, 90], [90]),
    ],
)
def test_what_is_compiled_for(devices, known, expected, monkeypatch):
    monkeypatch.setattr(native_cuda, "supported", lambda command: known)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: devices[i])
    assert native_cuda.architectures(["nvcc"]) == expected


def test_a_device_older_than_nvcc_is_a_reason(monkeypatch):
    monkeypatch.setattr(native_cuda, "supported", lambda command: [75, 80])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (6, 1))
    with pytest.raises(RuntimeError, match="none of the compute capabilities"):
        native_cuda.architectures(["nvcc"])


def test_importing_builds_nothing():
    assert alone("print(native_cuda._state)") == "None"


# -- the choice


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(choice, "_serving_cache", {})
    monkeypatch.setattr(choice, "_warned", set())


def test_it_stands_in_where_triton_does_not_serve(fresh, monkeypatch):
    key, device = activations.get("sine").map.key, torch.device("cuda", 0)
    assert list(backends.TABLE) == ["triton", "cuda", "cpu", "reference"]
    monkeypatch.setattr(backends.Triton, "serves", lambda self, *a: "" if a[2] == torch.float32 else "no float64")
    monkeypatch.setattr(backends.Cuda, "serves", lambda self, *a: "")
    assert choice.serving(None, key, device, torch.float32) == ("triton", ())
    assert choice.serving(None, key, device, torch.float64) == ("cuda", (("triton", "no float64"),))


def test_the_warning_names_both_backends_of_a_cuda_device(fresh, monkeypatch):
    monkeypatch.setattr(backends.Triton, "serves", lambda self, *a: "too old")
    monkeypatch.setattr(backends.Cuda, "serves", lambda self, *a: "no nvcc found")
    reasons = "'triton' cannot serve: too old; backend 'cuda' cannot serve: no nvcc found"
    with pytest.warns(RuntimeWarning, match=reasons):
        choice.serving(None, activations.get("sine").map.key, torch.device("cuda", 0), torch.float32)


def test_the_reason_of_a_device_is_told(monkeypatch):
    backend = backends.Cuda()
    monkeypatch.setattr(backends.Cuda, "available", lambda self: (True, ""))
    operators = type("operators", (), {"refusal": staticmethod(lambda i: f"no kernel image for device {i}")})
    monkeypatch.setattr(backends.Cuda, "_operators", staticmethod(lambda: operators))
    device = torch.device("cuda", 3)
    assert backend.serves(lookup("sine"), device, torch.float32) == "no kernel image for device 3"
    assert "serves CUDA tensors" in backend.serves(lookup("sine"), CPU, torch.float32)
    assert "dtype torch.int64" in backend.serves(lookup("sine"), device, torch.int64)


def test_explain_and_doctor_tell_why_not(fresh, capsys):
    from fused_inr.cli.main import main

    layer = fi.FusedLinear(4, 4, activation="sine")
    assert "not cuda: the tensors are on cpu" in backends.explain(layer, torch.ones(5000, 4))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.split()[:1] == ["nvcc"]]
    expected = reason_without(native_cuda.nvcc)
    assert ("none: " + expected in line) if expected else "release" in line
    if torch.version.cuda is None:
        assert any(line.split()[:1] == ["cuda"] and "this PyTorch has no CUDA" in line for line in lines)
