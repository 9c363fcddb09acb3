"""`fused-inr bench calls`: calls that are no training step of many float32 rows, beside eager PyTorch's.

float64, `torch.func` transforms (Jacobians and Hessians of points, gradients of single samples, several networks), a
MAML inner loop, one row at a time. Every result is compared with eager's before it is timed; rounds are interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

from ..cli.arguments import Parser, integer
from . import report
from .cases import Case, build, twin
from .timing import interleaved

#: times as fast as eager: what is asked for
DEMAND = 1.0
INNER_RATE = 1e-2

#: A step of a network on (x, target), which returns what it computed.
Step = Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]]


def _inference(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        return [net(x)]


def _training(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    for parameter in net.parameters():
        parameter.grad = None
    loss = F.mse_loss(net(x), target)
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def _layer(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    """The first hidden layer of a network by itself, from as many columns as it has."""
    layer = getattr(net, "net", net)[1]
    columns = next(m for m in layer.modules() if isinstance(m, nn.Linear)).in_features
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x.repeat(1, columns // x.shape[1]))
    y.backward(y.detach())
    return [y.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]


def _jacobians(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    return [vmap(jacrev(net))(x)]


def _hessians(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    return [vmap(hessian(net))(x)]


def _loss(net: nn.Module, parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(functional_call(net, parameters, (x,)), target)


def _per_sample(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return list(vmap(grad(_loss, argnums=1), in_dims=(None, None, 0, 0))(net, parameters, x, target).values())


def _networks(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    """Gradients of eight networks that share their inputs."""
    parameters = {name: torch.stack([p.detach()] * 8) for name, p in net.named_parameters()}
    return list(vmap(grad(_loss, argnums=1), in_dims=(None, 0, None, None))(net, parameters, x, target).values())


def _adapted(net: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Two inner steps of MAML, differentiable."""
    parameters = dict(net.named_parameters())
    for _ in range(2):
        loss = _loss(net, parameters, x, target)
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters = {name: p - INNER_RATE * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    return parameters


def _maml(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    """The outer gradient over four tasks, one after the other."""
    total = torch.zeros((), dtype=x.dtype)
    for task in range(4):
        y = target.roll(task, -1)
        total = total + _loss(net, _adapted(net, x, y), x, y)
    return torch.autograd.grad(total, list(net.parameters()))


def _maml_vmap(net: nn.Module, x: Tensor, target: Tensor) -> Sequence[Tensor]:
    """The same with vmap over the tasks."""

    def outer(parameters: dict[str, Tensor], y: Tensor) -> Tensor:
        inner = parameters
        for _ in range(2):
            grads = grad(_loss, argnums=1)(net, inner, x, y)
            inner = {name: p - INNER_RATE * grads[name] for name, p in inner.items()}
        return _loss(net, inner, x, y)

    def mean(parameters: dict[str, Tensor]) -> Tensor:
        tasks = torch.stack([target.roll(task, -1) for task in range(4)])
        return vmap(outer, in_dims=(None, 0))(parameters, tasks).sum()

    return list(grad(mean)({name: p.detach() for name, p in net.named_parameters()}).values())


#: name -> (what it is, step, width, rows, type)
ROWS: dict[str, tuple[str, Step, int, int, torch.dtype]] = {
    **{
        f"float64-{kind}-{width}": (f"float64 {kind}, width {width}", step, width, 4000, torch.float64)
        for kind, step in (("training", _training), ("inference", _inference))
        for width in (64, 128, 256)
    },
    **{
        f"jacrev-{n}": (f"vmap(jacrev) of {n} points", _jacobians, 64, n, torch.float32) for n in (100, 500, 2000)
    },
    "hessian-500": ("vmap(hessian) of 500 points", _hessians, 64, 500, torch.float32),
    "per-sample": ("gradients of 1,000 single points", _per_sample, 64, 1000, torch.float32),
    "networks": ("vmap(grad) over 8 networks, 1,000 points", _networks, 64, 1000, torch.float32),
    "maml": ("MAML, 4 tasks of 2 inner steps, autograd.grad", _maml, 64, 1000, torch.float32),
    "maml-vmap": ("MAML, the same by vmap over tasks", _maml_vmap, 64, 1000, torch.float32),
    "one-row": ("one row, inference", _inference, 64, 1, torch.float32),
    **{
        f"one-layer-{n}": (f"one sine layer of {n} rows, forward and backward", _layer, 64, n, torch.float32)
        for n in (16, 64, 256)
    },
    "one-row-training": ("one row, training step", _training, 64, 1, torch.float32),
}  # fmt: skip


def measure(name: str, seconds: float, width: int | None = None) -> dict[str, Any]:
    """Milliseconds of ours and eager's, and how far the results are apart."""
    what, step, own_width, rows, dtype = ROWS[name]
    net = build(Case("network", "training", width=width or own_width), torch.device("cpu")).to(dtype)
    eager = twin(net)
    x = torch.rand(rows, 2, dtype=dtype) * 2 - 1
    target = torch.rand(rows, 3, dtype=dtype) * 2 - 1
    error = 0.0
    for ours, theirs in zip(step(net, x, target), step(eager, x, target), strict=True):
        error = max(error, float((ours - theirs).abs().max() / theirs.abs().max()))
    limit = 1e-9 if dtype == torch.float64 else 1e-2  # of frequencies up to 30^2, and sums of a thousand rows
    if not error <= limit:
        raise RuntimeError(f"{what}: off by {error:.3g} of the largest value from eager PyTorch's")
    variants = {"fused": lambda: step(net, x, target), "eager": lambda: step(eager, x, target)}
    timings = interleaved(variants, torch.device("cpu"), seconds=seconds)
    ms = {variant: t.ms for variant, t in timings.items()}
    return {"work": what, "ms": ms, "ratio": ms["eager"] / ms["fused"], "error": error}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="fused-inr bench calls", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", type=report.one_or_more(ROWS), metavar="NAME,..", help=f"rows: {', '.join(ROWS)}")
    parser.add_argument("--width", type=integer(1), metavar="N", help="features of a hidden layer (64)")
    parser.add_argument("--seconds", type=report.positive, default=4.0, metavar="S", help="timing of a row (4)")
    parser.add_argument("--threads", type=integer(1), metavar="N", help="PyTorch's threads (its own default)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go, too")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = report.Results(Path(options.json) if options.json else None, report.environment(torch.device("cpu")))
    print("\n".join(report.about_lines(report.environment(torch.device("cpu")))))
    rows, failed = [], 0
    for name in options.only or ROWS:
        torch.manual_seed(0)
        try:
            result = measure(name, options.seconds, options.width)
        except RuntimeError as error:
            results.append({"name": name, "error": str(error)})
            rows.append((name, str(error), "-", "-", "-", "FAILED"))
            failed += 1
            continue
        verdict = "met" if result["ratio"] >= DEMAND else "MISSED"
        results.append({"name": name, "asked": DEMAND, **result})
        ms = result["ms"]
        rows.append(
            (name, result["work"], f"{ms['fused']:.3f}", f"{ms['eager']:.3f}", f"{result['ratio']:.2f}x", verdict)
        )
    results.finish()
    print(report.table(("name", "work", "fused, ms", "eager", "vs eager", f"asked {DEMAND:g}x"), rows, left=2))
    return 1 if failed else 0
