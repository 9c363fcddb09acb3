"""Configurations of whole networks for `fused-inr bench tune`: their candidates, and how one is checked and timed.

As `tune.py` has it for layers: the entries of `kernels/configurations/mlp_table.py`, candidates by `mlp.py`'s
predicate, results held to the bounds of `bounds.py`, times of CUDA graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

Key = tuple[str, str, str, int, int, int]
Numbers = tuple[int, int, int, int, int, bool, bool, int]

#: An activation of each kind (branches, outputs); a type of each class, as `cases.py` names it (where ours split their
#: factors, eager PyTorch has TF32 at best), and what `backends.float32_products` takes.
ACTIVATIONS = {(1, 1): "sine", (2, 1): "gabor", (2, 2): "complex_gabor", (4, 1): "split"}
PRECISIONS = {"half": "bf16", "tf32": "tf32", "x3": "tf32"}
PRODUCTS = {"half": None, "tf32": None, "x3": "bf16x3"}
#: Steps that an entry decides, as (step, way) of `cases.Case`; the first one is timed.
STEPS = {
    "forward": (("inference", "default"),),
    "save": (("training", "default"),),
    "train": (("training", "recompute"), ("training", "one-pass")),
    "backward": (("training", "default"),),
    "one_pass": (("training", "one-pass"),),
}
#: Hidden products of the networks that are measured: the weights of all may stay on chip, or none.
HIDDEN = 3
#: Rows that are timed, relative to `--rows` and for a width of 64.
SHARES = (1.0, 1 / 16)

#: block_m, tiles, warps, stages, resident, sums, reload, programs a multiprocessor: which an operation decides.
_NAMES = ("m", "t", "w", "s", "r", "sums", "reload", "p")
_FREE = {
    "forward": ("m", "t", "w", "s", "r", "p"),
    "save": ("m", "t", "w", "s", "r", "p"),
    "train": ("m", "t", "w", "s", "sums", "reload", "p"),
    "backward": ("m", "t", "w", "s", "sums", "reload", "p"),
    "one_pass": ("m", "w", "reload", "p"),
}
_RANGES: dict[str, tuple] = {
    "m": (16, 32, 64, 128, 256),
    "t": (1, 2, 4),
    "w": (1, 2, 4, 8, 16),
    "s": (1, 2, 3),
    "r": (0, HIDDEN),
    "sums": (False, True),
    "reload": (False, True),
    "p": (0, 1, 2, 3, 4),
}


def keys(arch: str) -> Iterator[Key]:
    """The entries of an architecture, those of one branch first."""
    from ..kernels.configurations import mlp_table

    operations = list(STEPS)
    entries = [key for key in mlp_table.TUNED if key[0] == arch]
    yield from sorted(entries, key=lambda k: (k[3] * k[4], k[2], k[5], operations.index(k[1])))


def is_valid(key: Key, numbers: Numbers) -> bool:
    """Within the ranges, and by the predicate of the kernels."""
    from ..kernels.configurations import mlp as network_configs

    arch, op, cls, B, C, width = key
    named = dict(zip(_NAMES, numbers))
    if any(named[name] not in _RANGES[name] for name in _FREE[op]):
        return False
    config, itemsize = network_configs.NetworkConfig(*numbers), 2 if cls == "half" else 4
    return network_configs.valid(config, arch, op, B, C, width, itemsize)


def neighbours(key: Key, numbers: Numbers) -> list[Numbers]:
    """The valid configurations one step away: a number to its next, or rows of a tile and warps together."""
    found = []
    named = dict(zip(_NAMES, numbers))
    moves = [{name: step} for name in _FREE[key[1]] for step in (1, -1)] + [{"m": 1, "w": 1}, {"m": -1, "w": -1}]
    for move in moves:
        places = {name: _RANGES[name].index(named[name]) + step for name, step in move.items()}
        if all(0 <= place < len(_RANGES[name]) for name, place in places.items()):
            other = tuple({**named, **{name: _RANGES[name][place] for name, place in places.items()}}.values())
            if is_valid(key, other):
                found.append(other)
    return found


def candidates(key: Key, start: Numbers) -> list[Numbers]:
    """Every valid configuration of an entry, `start` first."""
    grid: list[tuple] = [()]
    for name, value in zip(_NAMES, start):
        choices = _RANGES[name] if name in _FREE[key[1]] else (value,)
        grid = [(*head, choice) for head in grid for choice in choices]
    return [start] + [c for c in grid if c != start and is_valid(key, c)]


def text(numbers: Numbers) -> str:
    m, t, w, s, r, sums, reload, p = numbers
    more = ("" if sums else " later") + (" reload" if reload else "") + (f" p{p}" if p else "")
    return f"{m} rows, {t} tiles, w{w} s{s} r{r}{more}"


class Networks:
    """Networks on a device (in Triton's interpreter: the program, without meaning to its times)."""

    def __init__(self, device: torch.device, *, rows: int, seconds: float):
        self.device, self.rows, self.seconds = device, rows, seconds

    def work(self, key: Key, step: str, way: str, rows: int):
        """A network of the entry's width that runs as one operation, whatever would be chosen."""
        from . import cases

        _, _, cls, B, C, width = key
        case = cases.Case(
            "network", step, ACTIVATIONS[B, C], width, rows, PRECISIONS[cls], hidden_layers=HIDDEN, way=way
        )
        work = cases.Workload(case, self.device)
        work.fused.fusion = "network"
        return work

    def problem(self, key: Key, numbers: Numbers) -> str:
        """Output, loss and gradients of a network whose rows end within a tile, against float64."""
        from ..kernels.configurations import mlp as network_configs
        from .cases import Wrong

        try:
            for step, way in STEPS[key[1]]:
                # made on the CPU and then moved: moments of its initialisation are no matter for the kernels
                work = self.work(key, step, way, 5001 if self.device.type == "cuda" else 37)
                with network_configs.using(key, numbers), self._ours(key):
                    work.check()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Wrong as error:
            return str(error)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            return f"{type(error).__name__}: {first[:200]}"
        return ""

    @contextlib.contextmanager
    def _ours(self, key: Key) -> Iterator[None]:
        """The kernels, and the products of the entry."""
        from .. import backends

        with backends.use("triton"), backends.float32_products(PRODUCTS[key[2]]):
            yield

    def milliseconds(self, key: Key, candidates: Sequence[Numbers]) -> list[list[float]]:
        """One time for each number of rows."""
        from ..kernels.configurations import mlp as network_configs
        from . import cases, timing

        times: list[list[float]] = [[] for _ in candidates]
        step, way = STEPS[key[1]][0]
        for share in SHARES:
            work = self.work(key, step, way, max(1, int(self.rows * share * 64 / key[5])))
            call = cases.within(lambda: self._ours(key), work.call("fused"))
            steps: dict[str, Callable[[], object]] = {}
            with cases.matmul_precision(work.case.precision):
                for i, numbers in enumerate(candidates):
                    if self.device.type == "cuda":
                        with network_configs.using(key, numbers):
                            call()
                            steps[str(i)] = timing.captured(call)  # keeps the launch as it is now
                    else:
                        steps[str(i)] = cases.within(lambda numbers=numbers: network_configs.using(key, numbers), call)
                timed = timing.interleaved(steps, self.device, seconds=self.seconds, rounds=(5, 50), block_ms=2.0)
            for i, each in enumerate(times):
                each.append(timed[str(i)].ms)
        return times

    def static_problems(self, key: Key, numbers: Numbers) -> list[str]:
        """As `fused-inr bench static` has it: every kernel and type that the entry serves."""
        from ..kernels.configurations import linear_act as layer_configs
        from ..kernels.configurations import mlp as network_configs
        from ..kernels.configurations import mlp_table
        from . import aot

        arch, op, cls, B, C, width = key
        types = [(dtype, p) for dtype, p in layer_configs.TYPES if layer_configs.type_class(dtype, p) == cls]
        besides = {"forward": "save", "train": "backward"}.get(op, op)
        serves = {op} if (arch, besides, *key[2:]) in mlp_table.TUNED else {op, besides}
        found: list[str] = []
        with network_configs.using(key, numbers):
            for dtype, precision in types:
                for kernel, operation in aot.MLP.items():
                    if operation in serves:
                        job = aot.Job(arch, kernel, dtype, precision, ACTIVATIONS[B, C], width, 2)
                        row = aot.compile_job(job)
                        assert isinstance(row["problems"], list)
                        found += row["problems"]
        return found
