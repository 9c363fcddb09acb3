"""What is measured: layers and networks, the steps people run on them, and the same written in plain PyTorch.

The eager twin of a network is `nn.Linear` and an activation as published codes write them (`torch.sin(30 * linear(x))`,
SplitNet's four chunks), with the same weights. Before a clock starts, `Workload.check` holds the fused step to its
bound.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, backends, layers, losses, models
from ..cli.eager import EagerLayer, eager_twin
from . import bounds

STEPS = ("inference", "training", "eikonal")
#: how the fused network trains: as its defaults say, pre-activations recomputed, one pass with the loss, layer by layer
WAYS = ("default", "recompute", "one-pass", "layers")
#: name -> dtype of tensors, and how float32 products are computed
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: name -> mode of torch.compile
COMPILED = {"compile": "default", "max-autotune": "max-autotune"}
#: "floor": the case's products alone, by the CPU engine's micro-kernel on numbers in the cache
VARIANTS = ("fused", "eager", *COMPILED, "floor")


class Wrong(Exception):
    """The fused step is further from float64 than its bound allows."""


@dataclass(frozen=True)
class Exact:
    """What the fused step of a case is held to: float64's outcome, the same with the rounding of float32 sums
    simulated, some with that of TF32's factors (where the products are TF32's), and eager PyTorch's."""

    reference: dict[str, Tensor]
    moved: dict[str, Tensor]
    rounded: list[dict[str, Tensor]]
    eager: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One piece of work, the same numbers on every machine.

    A network has `in_features` coordinates (uniform on [-1, 1]), a first layer, `hidden_layers` hidden ones of
    `width` and a last linear one. A layer goes from `in_features` to `width`, and its input has a gradient, as inside
    a network.

    Steps: "inference" without gradients; "training": mean squared error and its backward (a layer: forward, and
    backward of a given cotangent); "eikonal": the gradient g of the outputs' sum with respect to the input, kept
    differentiable, and the backward of the mean of (|g| - 1)^2.
    """

    kind: str
    step: str
    activation: str = "sine"
    width: int = 256
    rows: int = 65536
    precision: str = "ieee"
    in_features: int = 2
    hidden_layers: int = 3
    out_features: int = 3
    seed: int = 0
    way: str = "default"

    def __post_init__(self) -> None:
        accepted = {
            "kind": ("layer", "network"),
            "step": STEPS,
            "precision": tuple(PRECISIONS),
            "activation": activations.names(),
            "way": WAYS,
        }
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(values)}")
        for name in ("width", "rows", "in_features", "out_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def __str__(self) -> str:
        widths = [self.in_features, self.width]
        if self.kind == "network":
            widths += [self.width] * self.hidden_layers + [self.out_features]
        shape = "-".join(map(str, widths))
        way = "" if self.way == "default" else f", {self.way}"
        return f"{self.activation} {self.kind} {shape}, {self.rows:,} rows, {self.step}{way}, {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def compiles(self) -> bool:
        """Whether torch.compile can do the step: it differentiates once."""
        return self.step != "eikonal"

    # -- what the step costs at least

    def shapes(self) -> list[tuple[int, int, int]]:
        """(K, columns of z, columns of y) of each layer."""
        map = activations.lookup(self.activation)
        layer = [(self.in_features, map.branches * self.width, map.outputs * self.width)]
        if self.kind == "layer":
            return layer
        inner = map.outputs * self.width
        hidden = [(inner, map.branches * self.width, inner)] * self.hidden_layers
        return [*layer, *hidden, (inner, self.out_features, self.out_features)]

    def operations(self) -> int:
        """Floating-point operations of the matrix products (a multiply-add is two), nothing recomputed."""
        total = 0
        for i, (k, z, _) in enumerate(self.shapes()):
            product = 2 * self.rows * k * z
            input_gradient = self.kind == "layer" or i > 0
            # forward; + dx, dW; Eikonal: forward, dx, then two products for each of those two
            total += (
                product * {"inference": 1, "training": 2 + input_gradient, "eikonal": 5 + input_gradient}[self.step]
            )
        return total

    def bytes(self) -> int | None:
        """The fewest bytes of device memory, layer by layer: each input read once, each output written once."""
        if self.step == "eikonal":
            return None
        total = 0
        for i, (k, z, y) in enumerate(self.shapes()):
            x_size, y_size, w_size = self.rows * k, self.rows * y, k * z + z
            total += x_size + w_size + y_size
            if self.step == "training":
                input_gradient = self.kind == "layer" or i > 0
                total += x_size * (1 + input_gradient) + 2 * w_size + y_size
        return total * self.dtype.itemsize


def build(case: Case, device: torch.device) -> nn.Module:
    """The fused module of a case, seeded."""
    torch.manual_seed(case.seed)
    facts = activations.lookup(case.activation).facts
    if case.kind == "layer":
        make: Any = getattr(layers, facts.layer)
        own = {"activation": case.activation} if make is layers.FusedLinear else {}
        module: Any = make(case.in_features, case.width, **own)
    else:
        shape = (case.in_features, case.width, case.hidden_layers, case.out_features)
        make = getattr(models, facts.model)
        own = {"activation": case.activation, "init": facts.bench_init} if make is models.MLP else {}
        module = make(*shape, **own)
        module.fusion = "layers" if case.way == "layers" else "auto"
        module.save = "nothing" if case.way == "recompute" else "preactivations"
    return module.to(device, case.dtype)


def twin(module: nn.Module) -> nn.Module:
    """The same in plain PyTorch, with the same weights."""
    return EagerLayer(module) if isinstance(module, layers.FusedLayer) else eager_twin(module)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """float32 products on CUDA in ieee precision or tf32 within the block, for every variant."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def within(
    context: Callable[[], contextlib.AbstractContextManager], call: Callable[[], object]
) -> Callable[[], object]:
    """A step that runs within a fresh context each time: another backend, other products."""

    def step() -> object:
        with context():
            return call()

    return step


def mse(net: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(net(x), target)


def eikonal(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return ((gradient.norm(dim=-1) - 1) ** 2).mean()


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """None counts as zero: an Eikonal step does not reach the last bias."""
    found = enumerate(module.parameters())
    return {f"gradient of parameter {i}": torch.zeros_like(p) if p.grad is None else p.grad.clone() for i, p in found}


class Workload:
    """A case in memory: modules, inputs, and each variant's step as a function without arguments.

    `call(variant)` runs a step, leaving gradients in the parameters as a user's step does, and drops the previous ones
    first; `outcome(variant)` returns what the step computed.
    """

    def __init__(self, case: Case, device: torch.device | str = "cpu"):
        self.case = case
        self.device = torch.device(device)
        self.fused = build(case, self.device)
        self.eager = twin(self.fused)
        generator = torch.Generator().manual_seed(case.seed + 1)
        x = torch.rand(case.rows, case.in_features, generator=generator) * 2 - 1
        columns = case.shapes()[-1][2]
        target = torch.rand(case.rows, columns, generator=generator) * 2 - 1
        self.x, self.target = (t.to(self.device, case.dtype) for t in (x, target))
        self.x.requires_grad_(case.step == "eikonal" or (case.kind == "layer" and case.step == "training"))
        self._compiled: dict[str, Callable] = {}

    def _module(self, variant: str) -> nn.Module:
        return self.fused if variant == "fused" else self.eager

    def _objective(self, variant: str) -> Callable[..., Tensor]:
        """What a step calls on (x,) or (x, target); torch.compile sees the loss too."""
        module, case = self._module(variant), self.case
        if case.step == "eikonal":
            return lambda x: eikonal(module, x)
        if case.step == "inference" or case.kind == "layer":
            function: Callable = module
        elif variant == "fused" and case.way == "one-pass":
            function = lambda x, target: losses.mse(module, x, target)  # noqa: E731
        else:
            function = lambda x, target: mse(module, x, target)  # noqa: E731
        if variant in COMPILED:
            if variant not in self._compiled:
                torch._dynamo.reset()  # else the shapes of an earlier case would make this one's dynamic
                self._compiled[variant] = torch.compile(function, mode=COMPILED[variant], dynamic=False)
            return self._compiled[variant]
        return function

    def release(self) -> None:
        """Drop all gradients."""
        self.x.grad = None
        for module in (self.fused, self.eager):
            for parameter in module.parameters():
                parameter.grad = None

    def call(self, variant: str) -> Callable[[], Tensor]:
        """A step of a variant.

        Raises:
            ValueError: the step cannot be compiled.
        """
        case, x, target = self.case, self.x, self.target
        if variant == "floor":
            if self.device.type != "cpu" or not backends.available()["cpu"][0]:
                raise ValueError("the floor is that of the CPU engine")
            floor = torch.ops.fused_inr_native.product_floor
            return lambda: floor(float(case.operations()), case.width, case.dtype == torch.float64)
        if variant in COMPILED and not case.compiles:
            raise ValueError(f"torch.compile cannot differentiate twice: no variant {variant!r} of {case}")
        objective = self._objective(variant)
        tensors = [x, *self._module(variant).parameters()]
        graphs = variant == "max-autotune" and self.device.type == "cuda"

        def inference() -> Tensor:
            with torch.no_grad():
                return objective(x)

        def training() -> Tensor:
            for tensor in tensors:
                tensor.grad = None
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            if case.kind == "layer":
                y = objective(x)
                y.backward(target)
                return y.detach()
            loss = objective(x, target)
            loss.backward()
            return loss.detach()

        def second_order() -> Tensor:
            for tensor in tensors:
                tensor.grad = None
            loss = objective(x)
            loss.backward()
            return loss.detach()

        return {"inference": inference, "training": training, "eikonal": second_order}[case.step]

    def outcome(self, variant: str) -> dict[str, Tensor]:
        """Everything that a step computes: output or loss, and every gradient."""
        self.release()
        with matmul_precision(self.case.precision):
            result = {"output": self.call(variant)().clone()}
        if self.case.step != "inference":
            if self.x.grad is not None:
                result["gradient of x"] = self.x.grad.clone()
            result |= _gradients(self._module(variant))
        self.release()
        return result

    def reference(
        self, rows_at_once: int = 8192, simulate: Callable[[nn.Module], nn.Module] | None = None
    ) -> dict[str, Tensor]:
        """The outcome in float64, plain PyTorch, in pieces so that it fits into memory; with `simulate` as rounding may
        move it (`bounds.simulate_rounding`, `bounds.simulate_factors`)."""
        module = copy.deepcopy(self.eager).double()
        if simulate is not None:
            module = simulate(module)
        case, total = self.case, len(self.x)
        outputs, input_gradients, loss = [], [], 0.0
        for x, target in zip(self.x.detach().split(rows_at_once), self.target.split(rows_at_once)):
            x = x.double().requires_grad_(self.x.requires_grad)
            if case.step == "inference":
                with torch.no_grad():
                    outputs.append(module(x))
                continue
            if case.kind == "layer" and case.step == "training":
                y = module(x)
                y.backward(target.double())
                outputs.append(y.detach())
            else:
                part = eikonal(module, x) if case.step == "eikonal" else mse(module, x, target.double())
                part = part * (len(x) / total)
                part.backward()
                loss = loss + part.detach()
            if x.grad is not None:
                input_gradients.append(x.grad)
        result = {"output": torch.cat(outputs) if outputs else torch.as_tensor(loss)}
        if input_gradients:
            result["gradient of x"] = torch.cat(input_gradients)
        return result | (_gradients(module) if case.step != "inference" else {})

    def exact(self, rows_at_once: int = 8192) -> Exact:
        """What all ways to compute this case are held to; it depends on neither backend nor way."""
        reference, moved = self.reference(rows_at_once), self.reference(rows_at_once, bounds.simulate_rounding)
        draws = bounds.DRAWS if self.case.precision == "tf32" else 0
        rounded = [self.reference(rows_at_once, partial(bounds.simulate_factors, seed=i)) for i in range(draws)]
        return Exact(reference, moved, rounded, self.outcome("eager"))

    def errors(self, exact: Exact) -> dict[str, dict[str, float]]:
        """`bounds.against_eager` of every tensor that the fused step computes, by its name.

        Raises:
            Wrong: it computes other tensors.
        """
        fused = self.outcome("fused")
        if exact.reference.keys() != fused.keys():
            raise Wrong(f"{self.case}: the fused step computed {sorted(fused)}, expected {sorted(exact.reference)}")
        found = {}
        for name, reference in exact.reference.items():
            rows = 1 if name == "gradient of x" or (name == "output" and reference.dim()) else self.case.rows
            tensors = (fused[name], exact.eager[name], reference)
            rounded = [outcome[name] for outcome in exact.rounded]
            found[name] = bounds.against_eager(*tensors, self.case.dtype, rows, exact.moved[name], rounded)
        return found

    def check(self, rows_at_once: int = 8192) -> dict[str, Any]:
        """Hold the fused step to `bounds.against_eager`: largest errors relative to the largest value, fused and eager.

        Raises:
            Wrong: it is further from float64 than its bound.
        """
        worst: dict[str, Any] = {"error": 0.0, "eager_error": 0.0, "of_bound": 0.0}
        for name, result in self.errors(self.exact(rows_at_once)).items():
            if not result["of_bound"] <= 1:
                raise Wrong(
                    f"{self.case}: {name} is off by {result['error']:.3g} of its largest value, eager PyTorch by "
                    f"{result['eager_error']:.3g}; the bound is {result['bound']:.3g}"
                )
            worst = {key: max(worst[key], result[key]) for key in worst}
        return worst

    def backends(self) -> list[str]:
        """What runs the fused module here, each once."""
        with matmul_precision(self.case.precision):
            lines = backends.explain(self.fused, self.x).splitlines()
        found = [line.rsplit(": ", 1)[-1] for line in lines if line.startswith(("linear_act", "whole network"))]
        return list(dict.fromkeys(found))
