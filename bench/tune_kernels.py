"""The kernels as `fused-inr bench tune` measures them: what is asked of a configuration, and who answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from . import tune_networks

#: Seconds that are kept for making sure of what a search found.
RESERVE_S = 30.0
ROWS = 1 << 18
#: (N, K) of one branch that a kind is timed at; a faster configuration is one whose mean over them is.
SHAPES = {
    "dot": ((256, 256), (64, 64), (1024, 1024)),
    "narrow_k": ((256, 2), (64, 3)),
    "narrow_n": ((3, 256), (1, 64)),
    "map": ((256, 256), (64, 64)),
}
#: A type of each class, an activation of each number of branches.
TYPES = {
    "half": (torch.bfloat16, "bf16"),
    "tf32": (torch.float32, "tf32"),
    "x3": (torch.float32, "bf16x3"),
    "ieee": (torch.float32, "ieee"),
}
ACTIVATIONS = {1: "sine", 2: "gabor", 4: "split"}

Key = tuple  # of a layer's entry five parts, of a network's six, as the tables have them
Numbers = tuple


#: What a search wants to know before it goes on: whether a configuration's results are right, or what the compiler
#: makes of it; ("problem" or "static", numbers).
Wanted = tuple[str, Numbers]


class Died(Exception):
    """The process that timed configurations did not come back."""


class Measurer(Protocol):
    """What the search asks of a machine."""

    def prepare(self, wanted: Sequence[tuple[Key, Wanted]]) -> None:
        """Find out all of this side by side; the answers are asked for afterwards. It may do nothing."""

    def problem(self, key: Key, numbers: Numbers) -> str:
        """Why results of a configuration are wrong, or it does not run; "" if they are right."""

    def milliseconds(self, key: Key, candidates: Sequence[Numbers]) -> list[list[float]]:
        """For each candidate one time a shape, measured together.

        Raises:
            Died: one of them took the process with it.
        """

    def static_problems(self, key: Key, numbers: Numbers) -> list[str]:
        """What the compiler made of it that must not ship."""


def type_of(cls: str) -> tuple[torch.dtype, str]:
    """As the kernels name it: half types have no precision."""
    dtype, precision = TYPES[cls]
    return dtype, precision if dtype == torch.float32 else "ieee"


def is_network(key: Key) -> bool:
    """Whether an entry is a whole network's, and not a layer's."""
    return len(key) != 5


class Kernels:
    """The kernels themselves, on a device (in Triton's interpreter: the program, without meaning to its times)."""

    def __init__(self, device: torch.device, *, rows: int = ROWS, seconds: float = 1.0):
        self.device, self.rows, self.seconds = device, rows, seconds
        self.networks = tune_networks.Networks(device, rows=rows, seconds=seconds)

    def tensors(self, key: Key, rows: int, N: int, K: int) -> dict[str, Any]:
        """Random operands of a layer, the same each time."""
        from .. import activations

        *_, cls, branches = key
        dtype, precision = type_of(cls)
        act = activations.get(ACTIVATIONS[branches])
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(dtype)

        return {
            "act": act,
            "precision": precision,
            "x": normal(rows, K),
            "weight": normal(act.branches * N, K) * (0.3 / K**0.5),
            "bias": normal(act.branches * N) * 0.1,
            "g": normal(rows, act.outputs * N),
            "params": [None] * len(act.params),
            "constants": [float(v) for v in act.params.values()],
        }

    def problem(self, key: Key, numbers: Numbers) -> str:
        """Output and gradients of a layer with tails in every direction, element by element."""
        if is_network(key):
            return self.networks.problem(key, numbers)
        from ..kernels import linear_act
        from ..kernels.configurations import linear_act as layer_configs
        from . import bounds

        kind = key[2]
        N, K = {"dot": (72, 88), "narrow_k": (72, 3), "narrow_n": (3, 88), "map": (72, 40)}[kind]
        t = self.tensors(key, 1021 if self.device.type == "cuda" else 67, N, K)
        exact, bound = bounds.layer_bounds(t["x"], t["weight"], t["bias"], t["act"], t["g"], TYPES[key[3]][1])
        try:
            with layer_configs.using(key, numbers):
                args = (t["params"], t["constants"])
                y, z = linear_act.linear_act(
                    t["x"], t["weight"], t["bias"], *args, t["act"].map, t["precision"], kind == "map"
                )
                gx, gw, gb, _ = linear_act.linear_act_backward(
                    t["g"], t["x"], t["weight"], t["bias"], *args, z if kind == "map" else None, t["act"].map,
                    t["precision"], (True, True, True, False),
                )  # fmt: skip
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            return f"{type(error).__name__}: {first[:200]}"
        for name, value in {"y": y, "gx": gx, "gw": gw, "gb": gb}.items():
            share = bounds.of_bound(value, exact[name], bound[name])["of_bound"]
            if not share <= 1:
                return f"{name} is {share:.3g} of its bound"
        return ""

    def compiled(self, key: Key, numbers: Numbers) -> None:
        """Compile what is timed: launched once at each shape, with few rows."""
        from ..kernels.configurations import linear_act as layer_configs

        if is_network(key):
            return  # what is checked is what is timed
        with layer_configs.using(key, numbers):
            for N, K in SHAPES[key[2]]:
                self.launch(key, N, K, self.tensors(key, min(self.rows, 1 << 14), N, K))()

    def launch(self, key: Key, N: int, K: int, t: dict[str, Any]) -> Callable[[], object]:
        """One launch of the operation with what the table says now (a weight gradient: with the sum of its parts).
        Operands and outputs are `t`'s; the outputs are put there."""
        import triton

        from ..kernels import linear_act, maps
        from ..kernels.configurations import linear_act as layer_configs

        _, op, kind, *_ = key
        act, precision, B, C = t["act"].map, t["precision"], t["act"].branches, t["act"].outputs
        x = t["x"]
        rows = len(x)
        acc = linear_act.accumulator(x.dtype)
        if op == "weight_grad":
            gz, weight = t["g"].view(1, rows, N), t["weight"]
            return lambda: linear_act.weight_gradient(gz, x, weight, precision)
        params = maps.param_arguments(t["params"], t["constants"], False, self.device)
        if op == "forward":
            y = t.setdefault("y", torch.empty_like(t["g"]))
            function = act.triton_map(0, False)
            return lambda: linear_act.launch_forward(
                x, t["weight"], t["bias"], params, y, None, function, B, C, precision
            )
        z = None
        if kind == "map":
            if "z" not in t:
                t["z"] = torch.randn((rows, B * N), device=self.device, dtype=acc)
            z = t["z"]
        number = layer_configs.MAP if kind == "map" else layer_configs.kind(N, K)
        config = layer_configs.pick(layer_configs.arch(self.device), "gz", number, x.dtype, precision, B, N, K)
        if "gz" not in t:
            t["gz"] = x.new_empty((1, rows, B * N))
        gz = t["gz"]
        gb = x.new_empty((1, triton.cdiv(rows, config.block_m), B * N), dtype=acc)
        function = act.triton_map(1, False)
        return lambda: linear_act.launch_gz(
            t["g"], x, t["weight"], t["bias"], params, z, gz, gb, None, function, B, C, precision
        )

    def milliseconds(self, key: Key, candidates: Sequence[Numbers]) -> list[list[float]]:
        """Operands are shared, and of about the same size at each shape: larger than a cache."""
        if is_network(key):
            return self.networks.milliseconds(key, candidates)
        from ..kernels.configurations import linear_act as layer_configs
        from . import timing

        times: list[list[float]] = [[] for _ in candidates]
        for N, K in SHAPES[key[2]]:
            operands = self.tensors(key, max(1, self.rows * 256 // max(N, K)), N, K)
            steps: dict[str, Callable[[], object]] = {}
            for i, numbers in enumerate(candidates):
                with layer_configs.using(key, numbers):
                    call = self.launch(key, N, K, operands)
                    call()
                    # a graph keeps the launch as it is now; without one the launch itself looks the numbers up
                    steps[str(i)] = timing.captured(call) if self.device.type == "cuda" else call
            timed = timing.interleaved(steps, self.device, seconds=self.seconds, rounds=(5, 50), block_ms=2.0)
            for i, each in enumerate(times):
                each.append(timed[str(i)].ms)
        return times

    def static_problems(self, key: Key, numbers: Numbers) -> list[str]:
        """As `fused-inr bench static` has it, at the widest of the entry's table of 256 columns."""
        if is_network(key):
            return self.networks.static_problems(key, numbers)
        from ..kernels.configurations import linear_act as layer_configs
        from . import aot

        arch, op, kind, cls, branches = key
        dtype, precision = type_of(cls)
        N, K = SHAPES[kind][0]
        kernel = "gz_from_z" if kind == "map" else op
        name = "-" if op == "weight_grad" else ACTIVATIONS[branches]
        with layer_configs.using(key, numbers):
            row = aot.compile_job(aot.Job(arch, kernel, dtype, precision, name, N, K))
        found = row["problems"]
        assert isinstance(found, list)
        return found
