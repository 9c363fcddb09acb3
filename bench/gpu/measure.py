"""What a worker does for a cell: `RUNS` by the cell's `run`, each a function of (cell, device, tell).

`tell(name)` says which variant comes now, so that the driver knows what to leave out if the process does not come back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...cli.children import Tell, one_line
from .. import cases, timing
from ..cases import Case, Workload
from . import checks
from .workers import settle

#: Ways of ours to do a step, as variants of a cell; the rest are rivals.
OURS = ("fused", "one-pass", "recompute", "layers", "cuda")
#: Rows that are compiled with ahead of time: no kernel depends on their number, and sums still take several programs.
AHEAD_ROWS = {"cuda": 1 << 16, "cpu": 64}
#: What the driver is told when the variants are timed together.
TOGETHER = "all variants together"


def is_ours(variant: str) -> bool:
    return variant.partition(" ")[0] in OURS


def _ceilings(cell: dict[str, Any], device: torch.device, tell: Tell) -> dict[str, Any]:
    """Copy bandwidth in GB/s, bytes read and written; rate of a large matrix product of each type in TFLOP/s."""
    count, size = (1 << 20, 256) if cell["small"] else (1 << 30, 8192)
    seconds, rounds = cell.get("seconds", 0.5), (5, 30)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    ceilings = {}
    timed = timing.interleaved({"copy": lambda: target.copy_(source)}, device, seconds=seconds, rounds=rounds)
    ceilings["copy"] = 2 * source.nbytes / timed["copy"].ms * 1e-6
    source = target = None
    for precision in cell["precisions"]:
        a, b = (torch.randn(size, size, device=device).to(cases.PRECISIONS[precision]) for _ in range(2))
        with cases.matmul_precision(precision):
            timed = timing.interleaved({"matmul": lambda a=a, b=b: a @ b}, device, seconds=seconds, rounds=rounds)
        ceilings[precision] = 2 * size**3 / timed["matmul"].ms * 1e-9
    return {"ceilings": ceilings, "units": {"copy": "GB/s", "other": "TFLOP/s"}, "matmul_size": size}


def _accuracy(cell: dict[str, Any], device: torch.device, tell: Tell) -> dict[str, Any]:
    return checks.layer_accuracy(cell["activation"], cell["precision"], device, cell["m"], cell["k"], cell["n"])


class Steps:
    """The variants of a case: each one's step, ready to be called, and the `Workload` that owns its memory."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.work = Workload(case, device)
        self._ways: dict[str, Workload] = {}

    def owner(self, variant: str) -> Workload:
        """The work whose module a variant runs: ways to train have one of their own."""
        way = variant.partition(" ")[0]
        if way not in ("layers", "one-pass", "recompute"):
            return self.work
        if way not in self._ways:
            self._ways[way] = Workload(dataclasses.replace(self.case, way=way), self.device)
        return self._ways[way]

    def call(self, variant: str) -> Callable[[], object]:
        """The step of a variant: "fused", "layers bf16x3", "eager graph", ..

        Raises:
            ValueError: there is no such variant of the case.
        """
        from ... import backends

        name, _, how = variant.partition(" ")
        if name == "tcnn":
            return tiny_cuda_nn(self.case, self.device)
        if not is_ours(name) and name not in ("eager", *cases.COMPILED):
            raise ValueError(f"{variant!r} is no variant of a case")
        call: Callable[[], object] = self.owner(variant).call("fused" if is_ours(name) else name)
        if name == "cuda":
            call = cases.within(lambda: backends.use("cuda"), call)
        if how in backends.PRODUCTS:
            call = cases.within(lambda: backends.float32_products(how), call)
        return timing.captured(call) if how == "graph" else call

    def errors(self, variant: str, exact: cases.Exact) -> dict[str, Any]:
        """What runs a variant of ours, the largest share of its bound that a tensor takes, and each tensor's errors.

        Eager has no products of split factors: those must be no worse than its TF32.
        """
        from ... import backends

        name, _, how = variant.partition(" ")
        work = self.owner(variant)
        if how:
            work = Workload(dataclasses.replace(work.case, precision="tf32"), self.device)
            exact = dataclasses.replace(exact, eager=work.outcome("eager"))
        with backends.use("cuda") if name == "cuda" else backends.float32_products(how or None):
            found, runs = work.errors(exact), work.backends()
        shares = [figures["of_bound"] for figures in found.values()]
        worst = max(shares, key=lambda share: float("inf") if share != share else share)
        return {"of_bound": worst, "passed": bool(worst <= 1), "backends": runs, "tensors": found}


def _unchecked(case: Case) -> str:
    """Why nobody can hold the case to a bound; empty where there is one."""
    if case.precision == "fp16" and case.step != "inference":
        return "gradients of a mean over so many rows are below float16's range without a loss scale"
    return ""


def _bench(cell: dict[str, Any], device: torch.device, tell: Tell) -> dict[str, Any]:
    """Milliseconds of each variant, interleaved, and each one's peak memory; beside them how far each way of ours is
    from float64. One beyond its bound, or one that raises, is recorded, and the others are timed all the same.

    Raises:
        Lost: a variant took the device's context with it; which one, the driver knows.
    """
    case = Case(**cell["case"])
    steps = Steps(case, device)
    result: dict[str, Any] = {
        "work": str(case), "precision": case.precision, "operations": case.operations(), "bytes": case.bytes(),
        "checks": {}, "variants": {}, "failed": {},
    }  # fmt: skip
    calls: dict[str, Callable[[], object]] = {}
    with cases.matmul_precision(case.precision):
        tell("the reference in float64")
        exact: cases.Exact | None = None
        if reason := _unchecked(case):
            result["unchecked"] = reason
        else:
            try:
                exact = steps.work.exact(1 << 16 if device.type == "cuda" else 8192)
            except Exception as error:  # out of memory, say: no gate, but times all the same
                settle(device)
                result["unchecked"] = one_line(error)
        for name in cell["variants"]:
            tell(name)
            try:
                if exact is not None and is_ours(name) and not name.endswith(" graph"):
                    result["checks"][name] = steps.errors(name, exact)
                calls[name] = steps.call(name)
                calls[name]()
            except Exception as error:
                calls.pop(name, None)
                result["failed"][name] = one_line(error)
            settle(device)
        tell(TOGETHER)
        seconds, rounds = cell.get("seconds", 2.0), (5 if device.type == "cuda" else 2, 100)
        timings = timing.interleaved(calls, device, seconds=seconds, rounds=rounds)
        for name, timed in timings.items():
            result["variants"][name] = {**timed.summary(), "ns_a_row": timed.ms / case.rows * 1e6}
        for name in calls:
            if name.endswith(" graph"):  # a graph's memory is its own pool, held between replays
                continue
            owner = steps.owner(name)
            owner.release()
            try:
                result["variants"][name]["peak_mib"] = timing.peak_memory(calls[name], owner.release, device)
            except Exception as error:
                result["failed"][f"memory of {name}"] = one_line(error)
    result["passed"] = not any(is_ours(name) for name in result["failed"])
    result["passed"] &= all(check["passed"] for check in result["checks"].values())
    return result


def _ahead(job: dict[str, Any], device: torch.device, tell: Tell) -> dict[str, Any]:
    """Compile what a variant of a cell launches, by doing it once: with few rows, since their number is in no kernel's
    key; torch.compile's graphs are of one shape, and are compiled at the case's own."""
    cell, variant = job["of"], job["variant"]
    if cell["run"] != "bench":
        return {"compiled": bool(RUNS[cell["run"]](cell, device, tell))}
    case = Case(**cell["case"])
    name = variant.partition(" ")[0]
    if name not in cases.COMPILED:
        case = dataclasses.replace(case, rows=min(case.rows, AHEAD_ROWS[device.type]))
    with cases.matmul_precision(case.precision):
        steps = Steps(case, device)
        call = steps.call(variant)
        for _ in range(2 if name in cases.COMPILED else 1):  # a second call may have other strides of gradients
            call()
    return {"compiled": True}


def ahead_jobs(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to compile before these cells are measured, one job a variant, each once."""
    jobs: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell.get("run") == "bench":
            for name in cell["variants"]:
                plain = name.removesuffix(" graph")
                if plain not in ("eager", "tcnn", "cuda"):
                    jobs.setdefault(f"{cell['case']} {plain}", {"of": cell, "variant": plain})
        elif cell.get("run") == "accuracy":
            jobs[cell["cell"]] = {"of": cell, "variant": ""}
        elif cell.get("run") == "moments":
            few = {**cell, "samples": min(cell["samples"], 1 << 13), "ahead": True}
            jobs.setdefault(f"moments {cell['activation']}", {"of": few, "variant": ""})
        for small in cell.get("small_cases", ()):
            if " cuda " in small:
                continue  # its library is built elsewhere
            jobs[f"small {small}"] = {"of": {"run": "small", "case": small}, "variant": ""}
    return [{"run": "ahead", **job} for job in jobs.values()]


def tiny_cuda_nn(case: Case, device: torch.device) -> Callable[[], object]:
    """The step by tiny-cuda-nn's own network of that shape, in fp16: without bias, its sine without omega. A time to
    compare with, not a result.

    Raises:
        ValueError: it has nothing of the kind.
    """
    import tinycudann

    names = {"relu": "ReLU", "sine": "Sine"}
    if case.kind != "network" or case.activation not in names or case.step == "eikonal":
        raise ValueError(f"tiny-cuda-nn has no {case.step} of a {case.activation} {case.kind}")
    fully_fused = case.activation == "relu" and case.width in (16, 32, 64, 128)
    settings = {
        "otype": "FullyFusedMLP" if fully_fused else "CutlassMLP",
        "activation": names[case.activation],
        "output_activation": "None",
        "n_neurons": case.width,
        "n_hidden_layers": case.hidden_layers + 1,
    }
    net = tinycudann.Network(case.in_features, case.out_features, settings).to(device)
    x = torch.rand(case.rows, case.in_features, device=device) * 2 - 1
    target = torch.rand(case.rows, case.out_features, device=device)

    def inference() -> object:
        with torch.no_grad():
            return net(x)

    def training() -> object:
        for parameter in net.parameters():
            parameter.grad = None
        loss = torch.nn.functional.mse_loss(net(x).float(), target)
        loss.backward()
        return loss.detach()

    return inference if case.step == "inference" else training


def _moments(cell: dict[str, Any], device: torch.device, tell: Tell) -> dict[str, Any]:
    """Sums of a map over draws for a grid of sigma: each backend's words and sums against the reference's, then
    milliseconds, beside the expression in PyTorch (fresh draws, autograd) at one sigma."""
    from ... import activations, backends
    from ...ops import moments

    act = activations.get(cell["activation"])
    map, samples, settings = act.map, cell["samples"], cell["settings"]
    sigmas = torch.logspace(-2, 1, settings, device=device).unsqueeze(1).repeat(1, map.branches)
    numbers = torch.tensor([float(v) for v in act.params.values()], device=device)
    params = numbers.expand(settings, -1).contiguous()
    some = torch.linspace(0, settings - 1, min(settings, 5), device=device).long()
    expected = moments.reference(sigmas[some], params[some], 0, min(samples, 20_000), 1, map)
    result: dict[str, Any] = {"work": cell.get("cell"), "moments": {}, "failed": {}}
    calls: dict[str, Callable[[], object]] = {}
    for name in cell["backends"]:
        tell(name)
        backend = backends.implementation(name)
        try:
            found = backend.moments(sigmas[some], params[some], 0, min(samples, 20_000), 1, map)
            worst = checks.moments_error(found, expected)
            calls[name] = partial(backend.moments, sigmas, params, 0, samples, 1, map)
            first = calls[name]()
            result["moments"][name] = {"error": worst, "same_bits": torch.equal(first, calls[name]())}
            if not worst <= 1e-3:
                result["failed"][name] = f"sums differ from the reference's by {worst:.2g} of their size"
            elif not result["moments"][name]["same_bits"]:
                result["failed"][name] = "the bits differ from call to call"
        except Exception as error:
            calls.pop(name, None)
            result["moments"].pop(name, None)
            result["failed"][name] = one_line(error)
        settle(device)
    if cell.get("ahead"):
        return result
    if settings == 1:

        def expression() -> torch.Tensor:
            z = (torch.randn(samples, map.branches, device=device) * sigmas[0]).requires_grad_()
            y = act(z)
            (dz,) = torch.autograd.grad(y.sum(), z)
            return torch.stack((y.detach().square().mean(), dz.square().mean()))

        calls["eager"] = expression
    timed = timing.interleaved(calls, device, seconds=1.0 if device.type == "cuda" else 0.2, rounds=(3, 50))
    for name, each in timed.items():
        figures = result["moments"].setdefault(name, {})
        figures |= {**each.summary(), "ps_per_draw": each.ms * 1e9 / (samples * settings)}
    result["passed"] = not result["failed"]
    return result


def _sweep(cell: dict[str, Any], device: torch.device, tell: Tell) -> dict[str, Any]:
    return checks.every_float32_sine(cell["backend"], device)


def _small(cell: dict[str, Any], device: torch.device, tell: Tell) -> dict[str, Any]:
    return checks.small_case(cell["case"], device)


def _tune(job: dict[str, Any], device: torch.device, tell: Tell) -> dict[str, Any]:
    from .. import tune_workers

    return tune_workers.answer(job, device)


#: A job's `run` -> what does it.
RUNS: dict[str, Callable[[dict[str, Any], torch.device, Tell], dict[str, Any]]] = {
    "ceilings": _ceilings,
    "accuracy": _accuracy,
    "bench": _bench,
    "ahead": _ahead,
    "moments": _moments,
    "small": _small,
    "sweep": _sweep,
    "tune": _tune,
}
