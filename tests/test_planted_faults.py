"""The tests tested: faults are planted one by one, and each must be caught by a check that is named here.

The quick ones replace a function of the reference backend, a generated map or a step of autograd within the process.
The slow ones change a line in a copy of the package and run a test of the copy. For int32 row offsets see
test_kernels_static.py.
"""

import inspect
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from suite import linear_act, mlp, moments, special_values, torch_integration

from fused_inr import activations, backends, functional
from fused_inr.activations import generated, primitives
from fused_inr.backends import reference
from fused_inr.network import Norm
from fused_inr.ops import linear_act as op
from fused_inr.ops import moments as raw

CPU = torch.device("cpu")
REFERENCE = backends.TABLE["reference"]
F32 = torch.float32


def map_with(patch, name: str, level: int, old: str, new: str) -> None:
    """One map of the generated file with another text."""
    function = f"{name}_l{level}"
    source = inspect.getsource(getattr(generated, function))
    assert old in source, f"{function} reads otherwise now: {source}"
    namespace = {"p": primitives, "torch": torch}
    exec(source.replace(old, new), namespace)
    patch.setitem(activations.lookup(name)._torch, (level, False), namespace[function])


def wrapped(patch, owner, name: str, around) -> None:
    """`owner.name` with something done around it; `around` gets the original and the named arguments."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def faulty(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        return around(lambda **changed: original(**{**bound.arguments, **changed}), bound.arguments)

    patch.setattr(owner, name, faulty)


# -- faults


def omega_dropped_in_backward(patch):
    map_with(patch, "sine", 1, "omega * g0", "g0")


def omega_for_its_square_in_double_backward(patch):
    map_with(patch, "sine", 2, "omega * p.sin", "p.sin")


def sign_of_cos(patch):
    map_with(patch, "sine", 2, "p.cos", "-p.cos")


def sinc_without_its_series(patch):
    def quotient(x):
        x = torch.where(x == 0, 1e-30, x)
        return (torch.cos(x) - torch.sin(x) / x) / x

    patch.setattr(primitives, "sinc1", quotient)


def infinity_times_zero(patch):
    patch.setattr(primitives, "saturate", lambda x: x)


def transposed_weight(patch):
    def around(run, a):
        weight = a["weight"]
        square = weight.shape[-1] == weight.shape[-2]
        return run(weight=weight.transpose(-1, -2) if square else weight)

    wrapped(patch, reference, "_preactivation", around)


def tail_of_k_ignored(patch):
    def around(run, a):
        k = a["x"].shape[-1]
        k = k // 16 * 16 or k
        return run(x=a["x"][..., :k], weight=a["weight"][..., :k])

    wrapped(patch, reference, "_preactivation", around)


def tail_of_m_not_written(patch):
    def around(run, a):
        z = run().clone()
        z[..., z.shape[-2] // 16 * 16 :, :] = 0.5
        return z

    wrapped(patch, reference, "_preactivation", around)


def tail_of_m_missing_from_the_sums(patch):
    def around(run, a):
        g = a["g"].clone()
        g[..., g.shape[-2] // 16 * 16 :, :] = 0
        gw = run(g=g)[1]
        gx, _, *rest = run()
        return gx, gw, *rest

    wrapped(patch, REFERENCE, "linear_act_backward", around)


def lost_cross_term_of_x_and_weight(patch):
    wrapped(patch, op, "_linear_backward", lambda run, a: run(x=a["x"].detach(), weight=a["weight"].detach()))


def saved_tensor_overwritten(patch):
    def around(run, a):
        result = run()
        if a["z"] is not None:
            a["z"].mul_(0.5)
        return result

    wrapped(patch, REFERENCE, "linear_act_backward", around)


def output_is_what_was_saved(patch):
    def around(run, a):
        y, z = run()
        return (y, z) if a["map"].name != "relu" or not a["keep"] else (y, y)

    wrapped(patch, REFERENCE, "linear_act", around)


def gradient_for_a_frozen_input(patch):
    patch.setattr(op, "wanted", lambda ctx, is_tensor: list(is_tensor))


def gradient_for_what_was_not_asked(patch):
    patch.setattr(op, "wanted", lambda ctx, is_tensor: list(ctx.needs_input_grad))


def strides_that_the_fake_does_not_have(patch):
    def around(run, a):
        y, z = run()
        return y.transpose(-1, -2).contiguous().transpose(-1, -2), z

    wrapped(patch, REFERENCE, "linear_act", around)


def autocast_ignored(patch):
    patch.setattr(functional, "_autocast", lambda x, weight, bias: (x, weight, bias))


def autocast_inside_the_operation(patch):
    """Our own float32 products rounded to the autocast type."""
    patch.setattr(op, "exactly", lambda device, function, *args: function(*args))


def one_layer_of_a_batch_for_all(patch):
    def around(run, a):
        weight = a["weight"]
        return run(weight=weight[:1].expand(weight.shape) if weight.dim() == 3 else weight)

    wrapped(patch, reference, "_preactivation", around)


def bits_that_change(patch):
    wrapped(patch, REFERENCE, "linear_act", lambda run, a: tuple(t + 1e-7 * torch.rand_like(t) for t in run()))


def second_order_bias_forgotten(patch):
    """The sum over rows that only a double backward takes."""

    def around(run, a):
        out = list(run())
        return out if a["level"] < 2 else [out[0] * 0.5, *out[1:]]

    wrapped(patch, REFERENCE, "act_map", around)


def half_precision_inside(patch):
    """bf16 pre-activations where float32 is promised."""
    wrapped(patch, reference, "_preactivation", lambda run, a: run().bfloat16().to(run().dtype))


def draws_reused_by_every_call(patch):
    wrapped(patch, raw, "normals", lambda run, a: run(start=0))


def draws_shared_by_the_branches(patch):
    wrapped(patch, raw, "normals", lambda run, a: run(branch=0))


def eps_of_a_norm_ignored(patch):
    wrapped(patch, Norm, "__call__", lambda run, a: run(self=a["self"]._replace(eps=0.0)))


def bias_of_a_norm_ignored(patch):
    wrapped(patch, Norm, "__call__", lambda run, a: run(self=a["self"]._replace(bias=None)))


def weight_of_a_norm_dropped_in_backward(patch):
    def around(run, a):
        gy, *_ = run(self=a["self"]._replace(weight=None))
        return gy, *run()[1:]

    wrapped(patch, Norm, "backward", around)


def statistics_of_a_norm_held_constant_in_backward(patch):
    """gy = rstd g gamma, without the derivatives of mean and deviation."""

    def around(run, a):
        (_, weight, _, eps), y = a["self"], a["y"]
        rstd = (y.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
        return a["g"] * weight * rstd, *run()[1:]

    wrapped(patch, Norm, "backward", around)


def norms_weight_from_what_is_not_normalised(patch):
    def around(run, a):
        gy, _, gb = run()
        return gy, (a["g"] * a["y"]).sum(0), gb

    wrapped(patch, Norm, "backward", around)


# -- the checks that catch them


def finite_differences():
    linear_act.test_first_and_second_derivatives("sine", "contiguous", "reference")


def rounding_bound(name="sine", dtype=F32):
    linear_act.test_rounding_stays_within_the_bound(name, dtype, "reference", CPU)


def layer_norm():
    mlp.test_layer_norm_in_float64("sine", "reference", "layer")


def every_shape(k):
    linear_act.test_every_shape("sine", k, "reference", CPU)


QUICK = {
    omega_dropped_in_backward: finite_differences,
    omega_for_its_square_in_double_backward: finite_differences,
    sign_of_cos: finite_differences,
    second_order_bias_forgotten: finite_differences,
    lost_cross_term_of_x_and_weight: finite_differences,
    sinc_without_its_series: lambda: rounding_bound("sinc"),
    infinity_times_zero: lambda: special_values.test_special_values("gaussian", F32, "reference", CPU),
    transposed_weight: lambda: every_shape(17),
    tail_of_k_ignored: lambda: every_shape(17),
    tail_of_m_not_written: lambda: every_shape(3),
    tail_of_m_missing_from_the_sums: lambda: every_shape(3),
    half_precision_inside: lambda: every_shape(3),
    saved_tensor_overwritten: lambda: linear_act.test_nothing_that_was_passed_is_overwritten(
        "sine", "reference", CPU
    ),
    output_is_what_was_saved: lambda: linear_act.test_the_output_may_be_changed_in_place(
        "relu", F32, "reference", CPU
    ),
    strides_that_the_fake_does_not_have: lambda: (
        torch_integration.test_fake_tensors_have_the_shapes_types_and_strides_of_the_real_ones("reference")
    ),
    autocast_ignored: lambda: torch_integration.test_autocast("sine", torch.bfloat16, "reference", CPU),
    autocast_inside_the_operation: lambda: torch_integration.test_autocast(
        "sine", torch.bfloat16, "reference", CPU
    ),
    one_layer_of_a_batch_for_all: lambda: linear_act.test_a_batch_of_weights_is_the_stack_of_layers(
        "sine", "reference"
    ),
    eps_of_a_norm_ignored: layer_norm,
    bias_of_a_norm_ignored: layer_norm,
    weight_of_a_norm_dropped_in_backward: layer_norm,
    statistics_of_a_norm_held_constant_in_backward: layer_norm,
    norms_weight_from_what_is_not_normalised: layer_norm,
    draws_reused_by_every_call: moments.test_normals_are_normal,
    draws_shared_by_the_branches: moments.test_normals_are_normal,
    bits_that_change: lambda: linear_act.test_the_same_bits_twice("sine", "reference", CPU),
}


@pytest.mark.parametrize("fault", QUICK, ids=lambda f: f.__name__)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    check = QUICK[fault]
    check()  # passes as it is, so that what fails below is the fault
    fault(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


@pytest.mark.parametrize("fault", [gradient_for_a_frozen_input, gradient_for_what_was_not_asked])
def test_a_needless_gradient_is_caught(fault, monkeypatch):
    """The recorder of these checks is itself a monkeypatch."""

    def check(patch):
        if fault is gradient_for_a_frozen_input:
            linear_act.test_a_frozen_input_costs_nothing((True, False, True), "reference", CPU, patch)
        else:
            linear_act.test_a_backward_is_asked_for_no_more_than_wanted("reference", CPU, patch)

    with monkeypatch.context() as patch:
        check(patch)
    fault(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)), monkeypatch.context() as patch:
        check(patch)


# -- faults in the kernels' sources


@dataclass(frozen=True)
class SourceFault:
    file: str
    old: str
    new: str
    test: str  # file::test, run in the copy
    interpreted: bool = True


INTERPRETER = "tests/test_kernels_interpreter.py::"
KERNEL, NETWORKS = "fused_inr/kernels/linear_act.py", "fused_inr/kernels/mlp/train.py"
SLOW = {
    "k-tail mask": SourceFault(KERNEL, "mask_k = offs_k < K", "mask_k = offs_k < K - 1", INTERPRETER + "test_shapes"),
    "m-tail mask": SourceFault(
        KERNEL,
        "mask = (offs_m < M)[:, None] & mask_n[None, :]",
        "mask = (offs_m < M - 1)[:, None] & mask_n[None, :]",
        INTERPRETER + "test_shapes",
    ),
    "n-tail mask": SourceFault(
        KERNEL, "mask_n = offs_n < N\n", "mask_n = offs_n < N - 1\n", INTERPRETER + "test_shapes"
    ),
    "sign of cos": SourceFault(
        "fused_inr/kernels/generated/activations.py",
        "def sine_l1(z0, omega, g0, MODE: tl.constexpr):\n    return (omega",
        "def sine_l1(z0, omega, g0, MODE: tl.constexpr):\n    return (-omega",
        INTERPRETER + "test_every_activation",
    ),
    "rows that the sums do not mask": SourceFault(
        KERNEL,
        "gz = tl.where(mask, out[b], 0.0)",
        "gz = out[b]",
        INTERPRETER + "test_rows_outside_do_not_reach_the_sums",
    ),
    "factors that wait when a program's last tile is done": SourceFault(
        NETWORKS,
        "(place == LATER - 1) | (tile + tl.num_programs(0) >= tl.cdiv(M, BLOCK_M))",
        "place == LATER - 1",
        INTERPRETER.replace("kernels_", "kernels_mlp_") + "test_factors_that_wait_take_one_launch",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_fault_in_a_kernel_is_caught(name, tmp_path):
    fault = SLOW[name]
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[1]
    # laid out as installed: kernels/ is fused_inr.kernels, so that no other copy of it is found first
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for part, place in (("fused_inr", "fused_inr"), ("kernels", "fused_inr/kernels"), ("tests", "tests")):
        shutil.copytree(root / part, tmp_path / place, ignore=ignore)
    shutil.copy(root / "pyproject.toml", tmp_path)
    path = tmp_path / fault.file
    source = path.read_text()
    assert fault.old in source, f"{fault.file} reads otherwise now: plant this fault again"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1" if fault.interpreted else "0"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        fault.test,
    ]

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    as_it_is = run()
    assert as_it_is.returncode == 0, as_it_is.stdout[-3000:]
    path.write_text(source.replace(fault.old, fault.new))
    planted = run()
    assert planted.returncode == 1, planted.stdout[-3000:]
