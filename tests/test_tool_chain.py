"""PyTorch's tool chain around our models: what converts, counts, traces, exports, quantises and adapts them."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused_inr as fi


def rows(n=40, columns=2):
    return torch.rand(n, columns, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Host(nn.Module):
    """A model that is not ours, with parts of ours in it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.field = fi.SIREN(8, 12, 1, 3, omega=5.0)
        self.head = nn.ModuleDict({"a": fi.FusedLinear(3, 4, activation="gaussian"), "b": nn.Tanh()})

    def forward(self, x):
        return self.head["b"](self.head["a"](self.field(self.first(x))))


MODELS = {
    "siren": lambda: fi.SIREN(2, 12, 2, 3, omega=5.0),
    "split": lambda: fi.SplitNet(2, 8, 2, 1, m=2.0),
    "norms": lambda: fi.MLP(2, 12, 2, 3, activation="silu", norm="layer", residual=True),
    "rms": lambda: fi.MLP(2, 12, 2, 3, activation="tanh", norm="rms", output_activation="sigmoid"),
    "encoded": lambda: fi.SIREN(2, 12, 1, 3, encoding=fi.FourierFeatures(2, 6)),
    "learnable": lambda: fi.MLP(
        2, 12, 1, 3, activation=fi.activations.gaussian(sigma=0.7, learnable=True, per_feature=True)
    ),
    "layer": lambda: fi.SplitLayer(2, 8),
    "linear": lambda: fi.FusedLinear(2, 8, activation=fi.activations.sinc(omega=2.0)),
    "inside": Host,
}


@pytest.mark.parametrize("name", MODELS)
def test_to_pytorch(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    plain = fi.to_pytorch(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not any(type(m).__module__.startswith(("fused_inr.layers", "fused_inr.models")) for m in plain.modules())
    x = rows().requires_grad_()
    found = []
    for m in (plain, model):
        y = m(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append([y, g, *torch.autograd.grad(g.square().sum(), list(m.parameters()), allow_unused=True)])
    for a, b in zip(*found):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))
    assert all(a is not b and torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))
    plain.load_state_dict(model.state_dict())


def test_to_pytorch_refuses():
    class Own(fi.SIREN):
        def forward(self, x):
            return super().forward(x) * 2

    class OwnLayer(fi.SineLayer):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(TypeError, match=r"nn\.Module"):
        fi.to_pytorch("model")
    for model in (Own(2, 8, 1, 1), nn.Sequential(OwnLayer(2, 8))):
        with pytest.raises(TypeError, match="forward of its own"):
            fi.to_pytorch(model)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh())
    fi.fuse(model)
    with pytest.raises(TypeError, match="unfuse it"):
        fi.to_pytorch(model)


@pytest.mark.parametrize("name", ["siren", "split", "norms", "inside"])
def test_torchscript(name):
    """A traced copy gives what the model gives, for other rows too, and after it was saved."""
    model = MODELS[name]().eval()
    traced = torch.jit.trace(fi.to_pytorch(model), rows())
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(rows(7)), model(rows(7)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["siren", "split", "norms", "inside"])
def test_onnx(name):
    """The program that the ONNX exporter makes has the model's values."""
    pytest.importorskip("onnxscript", reason="the ONNX exporter needs onnxscript, which is not installed")
    model = MODELS[name]().eval()
    program = torch.onnx.export(fi.to_pytorch(model), (rows(),), dynamo=True, verbose=False)
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(program.model_proto)
    (y,) = evaluator.run(None, {evaluator.input_names[0]: rows().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(rows()).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["siren", "split", "norms", "layer"])
def test_export(name):
    """torch.export keeps our operations; a plain copy has PyTorch's own only, whatever the number of rows."""
    model = MODELS[name]().eval()
    program = torch.export.export(
        fi.to_pytorch(model), (rows(),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},)
    )
    assert not [n for n in program.graph.nodes if "fused_inr" in str(n.target)]
    torch.testing.assert_close(program.module()(rows(11)), model(rows(11)), rtol=1e-4, atol=1e-5)
    kept = torch.export.export(model, (rows(300),))
    assert [n for n in kept.graph.nodes if "fused_inr" in str(n.target)]
    torch.testing.assert_close(kept.module()(rows(300)), model(rows(300)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siren", "split"])
def test_aot_inductor(name, tmp_path):
    """A plain copy compiles ahead of time, and runs without Python's part of it."""
    model = MODELS[name]().eval()
    program = torch.export.export(fi.to_pytorch(model), (rows(64),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(
        torch._inductor.aoti_load_package(package)(rows(64)), model(rows(64)), rtol=1e-3, atol=1e-4
    )


# -- counting


def eager_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("branches", [1, 4])
def test_flops_of_a_layer(gradient, branches):
    activation = fi.activations.get("gelu" if branches == 1 else "split")
    x, w, b = (
        rows(500, 8).requires_grad_(gradient),
        torch.randn(16 * branches, 8).requires_grad_(),
        torch.zeros(16 * branches),
    )
    fused = eager_flops(lambda: fi.functional.linear_act(x, w, b, activation).sum().backward())
    plain = eager_flops(lambda: activation(torch.nn.functional.linear(x, w, b)).sum().backward())
    assert fused == plain == 2 * 500 * 8 * 16 * branches * (3 if gradient else 2)


@pytest.mark.parametrize("gradient", [False, True])
def test_flops_of_a_network(gradient):
    """Forward, backward and the loss of one pass: those of the eager network. (A counter follows modules by hooks, with
    which a network runs layer by layer: the counts are the same.)"""
    net = fi.SIREN(2, 64, 2, 3)
    plain = fi.to_pytorch(net)
    x, target = rows(4000).requires_grad_(gradient), rows(4000, 3)
    assert eager_flops(lambda: net(x).sum().backward()) == eager_flops(lambda: plain(x).sum().backward())
    from fused_inr.ops import raw

    operands, decision = net.whole_call(x, "loss")
    tensors, spec = list(operands.tensors), operands.spec
    loss = fi.activations.registered_losses()[0].key
    needs = [gradient, True, True, False, False]
    with torch.no_grad():
        fused = eager_flops(
            lambda: raw.mlp_loss(
                x,
                target,
                None,
                tensors,
                spec.words,
                spec.numbers,
                loss,
                [],
                1.0,
                decision.backend,
                decision.precision,
                needs,
            )
        )
    assert fused == eager_flops(lambda: plain(x).sum().backward())


def test_flops_are_known_whenever_the_counter_is_imported():
    import subprocess
    import sys

    for order in ("import fused_inr, fused_inr.ops.raw, torch.utils.flop_counter as f",
                  "import torch.utils.flop_counter as f, fused_inr, fused_inr.ops.raw"):  # fmt: skip
        code = f"import torch; {order}; assert torch.ops.fused_inr.mlp in f.flop_registry"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    code = "import sys, fused_inr, fused_inr.ops.raw; assert 'torch.utils.flop_counter' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_profiler_names_operations():
    net, x = fi.SIREN(2, 64, 1, 3), rows(600)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        net(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fused_inr::mlp", "fused_inr::mlp_backward"} <= names or {"fused_inr::linear_act"} <= names, names


# -- adapters and quantisation


def test_lora():
    """PEFT's LoRA on the linear of a layer is part of what the layer computes."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    net = fi.SIREN(2, 16, 1, 3, omega=5.0)
    before = net(rows())
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    assert not torch.allclose(adapted(rows()), before, atol=1e-3)


def test_an_adapter_by_hand():
    class Adapter(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.base, self.a, self.b = (
                linear,
                nn.Linear(linear.in_features, 2, bias=False),
                nn.Linear(2, linear.out_features),
            )
            self.in_features, self.out_features = linear.in_features, linear.out_features

        @property
        def weight(self):
            return self.base.weight

        @property
        def bias(self):
            return self.base.bias

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    torch.manual_seed(0)
    net = fi.SIREN(2, 16, 1, 3, omega=5.0)
    for layer in list(net.net)[:2]:
        layer.linear = Adapter(layer.linear)
    x, y = rows(), rows()
    for layer in net.net:
        z = layer.linear(y) if hasattr(layer, "linear") else nn.functional.linear(y, layer.weight, layer.bias)
        y = layer.activation(z)
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)
    net(x).sum().backward()
    assert net.net[0].linear.a.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation():
    """Where nn.Linear is quantised, the layer calls it: values stay near the model's, and nothing is dropped."""
    torch.manual_seed(0)
    net = fi.SIREN(2, 32, 1, 3, omega=3.0)
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(m).__module__ for m in quantised.modules())
    with torch.no_grad():
        error = (quantised(rows()) - net(rows())).abs().max()
    assert 0 < error < 0.1


# -- saving


def test_states_without_pickles():
    net, other = fi.SIREN(2, 16, 1, 3), fi.SIREN(2, 16, 1, 3)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(net(rows()), other(rows()))


def test_the_meta_device():
    with torch.device("meta"):
        net = fi.SIREN(2, 16, 1, 3)
    assert net(torch.empty(5, 2, device="meta")).shape == (5, 3)
    net.to_empty(device="cpu").reset_parameters()
    assert net(rows()).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_cuda_graphs():
    net = fi.SIREN(2, 64, 2, 3).cuda()
    x, target = rows(4096).cuda(), rows(4096, 3).cuda()
    graphed = torch.cuda.make_graphed_callables(net, (x,))
    torch.testing.assert_close(graphed(x), net(x), rtol=1e-4, atol=1e-5)
    nn.functional.mse_loss(graphed(x), target).backward()


# -- several processes

_DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist
from torch import nn
import fused_inr as fi
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)

def make():
    torch.manual_seed(0)
    return fi.SIREN(2, 32, 2, 3, omega=5.0)

def data(r):
    g = torch.Generator().manual_seed(r)
    return torch.rand(600, 2, generator=g) * 2 - 1, torch.rand(600, 3, generator=g)

def train(net, step):
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    for i in range(3):
        optimizer.zero_grad()
        step(net, i)
        optimizer.step()

def whole(net, i):
    loss = sum(nn.functional.mse_loss(net(x), t) for x, t in (data(10 * i + r) for r in range(world))) / world
    loss.backward()

def own(net, i):
    x, t = data(10 * i + rank)
    nn.functional.mse_loss(net(x), t).backward()

expected = make()
train(expected, whole)

def full(net):
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in net.state_dict().items()}

def check(what, net):
    for (n, a), b in zip(full(net).items(), expected.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m: f"{what} {n}: {m}")
    if rank == 0:
        print(what, "ok", flush=True)

net = DistributedDataParallel(make())
train(net, own)
check("ddp", net.module)

fused = fi.to_pytorch(make())
fi.fuse(fused, prefer="always")
net = DistributedDataParallel(fused)
train(net, own)
check("ddp of a fused model", net.module)

for what, parts in (("root", []), ("layers", ["net"]), ("linears", ["linear"])):
    net = make()
    for layer in net.net if parts else ():
        fully_shard(layer.linear if parts == ["linear"] and hasattr(layer, "linear") else layer)
    fully_shard(net)
    train(net, own)
    check(f"fsdp2 {what}", net)
dist.destroy_process_group()
"""


def test_several_processes(tmp_path):
    """DDP, and FSDP2 of the root, of each layer and of each layer's linear, train as one process does."""
    import subprocess
    import sys

    script = tmp_path / "train.py"
    script.write_text(_DISTRIBUTED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        str(script),
    ]
    command[5:7] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if False else command[5:7]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for what in ("ddp ok", "ddp of a fused model ok", "fsdp2 root ok", "fsdp2 layers ok", "fsdp2 linears ok"):
        assert what in result.stdout, result.stdout
