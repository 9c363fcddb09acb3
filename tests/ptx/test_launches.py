"""How often what is launched: products of a layer that the library computes, launches of a network, their memory."""

import contextlib

import pytest
import torch
from fused_inr.bench import ptx
from fused_inr.kernels import launch

import fused_inr as fi
from fused_inr import backends
from fused_inr.functional import linear_act

#: operations of PyTorch that launch nothing on a device
NO_KERNEL = set(
    "alias as_strided detach empty empty_like empty_strided expand new_empty new_empty_strided permute reshape "
    "result_type select slice split split_with_sizes t to transpose unsqueeze view".split()
)


@contextlib.contextmanager
def operations():
    """A list that has, after the block, PyTorch's operations within it that launch a kernel on a device."""
    found = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield found
    for event in profile.events():
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent
        name = event.name.removeprefix("aten::")
        if parent is None and name != event.name and name not in NO_KERNEL:
            found.append(name)


@pytest.mark.parametrize("name", ["sine", "split"])
def test_three_products_of_a_layer_in_full_precision(name):
    """z is kept: the backward does not compute it again. PyTorch's library computes all three, ours the map."""
    act = fi.activations.get(name)
    layer = fi.FusedLinear(49, 33, activation=act)
    x = torch.randn(131, 49, requires_grad=True)
    with ptx.emulated(80, by_library=True) as device:
        g = torch.ones(131, layer.output_features)
        with operations() as found:
            linear_act(x, layer.weight, layer.bias, act).backward(g)
        device.check()
    assert sum(name in ("mm", "addmm", "bmm", "baddbmm", "matmul") for name in found) == 3
    # the map, its derivative times the cotangent, and the sums of the bias
    assert sorted(run.name for run in device.launches) == ["act_map_kernel", "gz_kernel", "sum_kernel"]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_kept_derivatives_save_the_second_product(precision):
    """One product forward and two backward, all ours here, and gz from what was kept."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = fi.SineLayer(49, 33).to(dtype)
    x = torch.randn(131, 49).to(dtype).requires_grad_()
    with ptx.emulated(80) as device, backends.float32_products(None if precision == "bf16" else "tf32"):
        layer(x).sum().backward()
    products = [run.name for run in device.launches if any("mma" in name for name in run.by_mnemonic())]
    assert sorted(products) == ["forward_kernel", "forward_kernel", "weight_grad_kernel"]  # the input's gradient: W^T
    assert any(run.name == "gz_kernel" for run in device.launches)


def test_inference_of_a_wide_network_needs_no_configuration_for_training():
    net = fi.MLP(2, 256, 2, 3).bfloat16()
    x = torch.randn(70, 2).bfloat16()
    with ptx.emulated(90) as device, ptx.few_programs(1):
        with torch.no_grad():
            y = net(x)
        forward = [run.name for run in device.launches]
        device.forget()
        z = net(x)
        layers = {run.name for run in device.launches}
    assert forward == ["pack_kernel", "forward_kernel"] and len(layers) > 0
    assert (y - z).abs().max() <= 2.0**-5 * z.abs().max()


def test_launches_of_a_training_step():
    """Packing, the pass, the last sums; of PyTorch's: the cotangent, and the gradients times it."""
    net, x, target = fi.MLP(2, 64, 3, 3).bfloat16(), torch.randn(200, 2).bfloat16(), torch.randn(200, 3).bfloat16()
    with ptx.emulated(80) as device, ptx.few_programs(1):
        fi.losses.mse(net, x, target).backward()  # what is decided and compiled once
        net.zero_grad()
        device.forget()
        with operations() as found:
            fi.losses.mse(net, x, target).backward()
    assert [run.name for run in device.launches] == ["pack_kernel", "train_kernel", "finish_kernel"]
    assert sorted(found) == ["_foreach_mul", "ones_like"]


def test_a_remembered_launch_is_of_its_own_kind():
    """Rows at another alignment, another stride, a number that Triton compiles in: each finds its own program, and none
    the one before it (the executor reports an access that is misaligned)."""
    layer = fi.SineLayer(32, 32)
    wide = torch.randn(64, 40)
    with ptx.emulated(80) as device, backends.float32_products("tf32"), torch.no_grad():
        for x in (wide[:, :32], wide[:, 1:33], wide[:, :32].contiguous(), wide[:1, :32], wide[:, :32]):
            for _ in range(2):
                y = layer(x)
                expected = torch.sin(
                    layer.omega * torch.nn.functional.linear(x.double(), *(p.double() for p in layer.parameters()))
                )
                assert (y - expected).abs().max() <= 0.1
        device.check()


def test_kinds_of_arguments():
    aligned = torch.zeros(64)
    kinds = [launch._kind(v) for v in (1, 2, 16, 32, -16, 2**31, 1.0, 2.0, None, aligned, aligned[1:], (aligned, 3))]
    assert kinds[1] != kinds[0] != kinds[2] and kinds[2] == kinds[3] == kinds[4] != kinds[5]
    assert kinds[6] == kinds[7] and kinds[9] != kinds[10]
    assert launch._kind(aligned[4:]) == kinds[9] != launch._kind(aligned.double())
    assert launch._kind((aligned, 5)) == kinds[11] != launch._kind((aligned, 16))
