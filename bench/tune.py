"""`fused-inr bench tune`: measure configurations of the kernels on this GPU and rewrite their tables.

The tables are `kernels/tuned.py` (layers) and `kernels/mlp_tuned.py` (whole networks, `tune_networks.py`). For each
entry: from the configuration in use step by step to better neighbours (one number doubled or halved, a pipeline stage
more or less, a tile reshaped), all valid by the predicates of `kernels/tune.py` and `kernels/mlp_tune.py`. The results
of a candidate are held to the bounds of `bounds.py` before it is timed; the candidates of a step are timed interleaved,
as CUDA graphs, at each of the entry's shapes. One replaces the configuration in use where it is faster by more than
noise in a second measurement as well, and compiles without a spill.
"""

from __future__ import annotations

import datetime
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..cli import CliError
from ..cli.files import write_all
from . import report, tune_networks

#: What is a gain: below, differences between runs decide.
GAIN = 0.98
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


class Measurer(Protocol):
    """What the search asks of a machine."""

    def problem(self, key: Key, numbers: Numbers) -> str:
        """Why results of a configuration are wrong, or it does not run; "" if they are right."""

    def milliseconds(self, key: Key, candidates: Sequence[Numbers]) -> list[list[float]]:
        """For each candidate one time a shape, measured together."""

    def static_problems(self, key: Key, numbers: Numbers) -> list[str]:
        """What the compiler made of it that must not ship."""


# -- the table and its candidates


def keys(arch: str) -> Iterator[Key]:
    """The entries of an architecture's table, most used first."""
    for branches in ACTIVATIONS:
        for cls in ("half", "tf32", "ieee", "x3"):
            yield arch, "forward", "dot", cls, branches
            yield arch, "gz", "dot", cls, branches
            if branches == 1:
                yield arch, "weight_grad", "dot", cls, branches
        for cls in ("half", "tf32", "ieee", "x3"):
            for op, kind in (("forward", "narrow_k"), ("forward", "narrow_n"), ("gz", "narrow_k"), ("gz", "map")):
                yield arch, op, kind, cls, branches


#: Which of the five numbers an entry decides, and their ranges; the rest follows from the shape.
_FREE = {"dot": "mnkws", "narrow_k": "mnw", "narrow_n": "mkw", "map": "mnw"}
_RANGE = {"m": (4, 256), "n": (16, 256), "k": (16, 128), "w": (1, 16), "s": (1, 6)}
_MOVES = (
    {"m": 2}, {"m": 0.5}, {"n": 2}, {"n": 0.5}, {"k": 2}, {"k": 0.5}, {"w": 2}, {"w": 0.5}, {"s": 1}, {"s": -1},
    {"m": 2, "n": 0.5}, {"m": 0.5, "n": 2}, {"k": 2, "s": -1}, {"k": 0.5, "s": 1},
)  # fmt: skip


def is_valid(key: Key, numbers: Numbers) -> bool:
    """Within the ranges, and by the predicate of the kernels at every shape, as it is: no stage has to be dropped."""
    from ..kernels import tune

    arch, op, kind_name, cls, branches = key
    named = dict(zip("mnkws", numbers))
    for name in _FREE[kind_name]:
        low, high = _RANGE[name]
        if not low <= named[name] <= high or (name != "s" and named[name] & (named[name] - 1)):
            return False
    dtype, precision = _type(cls)
    kind = tune.KINDS.index(kind_name)
    with tune.using(key, numbers):
        configs = [tune.pick(arch, op, kind, dtype, precision, branches, N, K) for N, K in SHAPES[kind_name]]
    stages = 1 if kind_name != "dot" else numbers[4]
    itemsize = 2 if cls == "half" else 4
    return all(c.num_stages == stages and tune.valid(c, arch, op, kind, branches, itemsize) for c in configs)


def _type(cls: str) -> tuple[torch.dtype, str]:
    """As the kernels name it: half types have no precision."""
    dtype, precision = TYPES[cls]
    return dtype, precision if dtype == torch.float32 else "ieee"


def neighbours(key: Key, numbers: Numbers) -> list[Numbers]:
    """The valid configurations one step away."""
    found = []
    for move in _MOVES:
        if not set(move) <= set(_FREE[key[2]]):
            continue
        named = dict(zip("mnkws", numbers))
        for name, by in move.items():
            named[name] = named[name] + by if name == "s" else int(named[name] * by)
        m, n, k, w, s = named.values()
        if is_valid(key, (m, n, k, w, s)):
            found.append((m, n, k, w, s))
    return found


def candidates(key: Key, start: Numbers) -> list[Numbers]:
    """Every valid configuration of an entry, `start` first; numbers that the entry does not decide are those of it."""
    choices: list[Sequence[int]] = []
    for name, value in zip("mnkws", start):
        low, high = _RANGE[name]
        steps = range(low, high + 1) if name == "s" else [1 << i for i in range(9) if low <= 1 << i <= high]
        choices.append(steps if name in _FREE[key[2]] else [value])
    m_, n_, k_, w_, s_ = choices
    grid = [(m, n, k, w, s) for m in m_ for n in n_ for k in k_ for w in w_ for s in s_]
    return [start] + [c for c in grid if c != start and is_valid(key, c)]


# -- the search


@dataclass
class Result:
    """An entry: the configuration in use, the best one found, and the time of it relative to the one in use."""

    key: Key
    old: Numbers
    new: Numbers
    ratio: float
    measured: int
    rejected: dict[Numbers, str]

    @property
    def changed(self) -> bool:
        return self.new != self.old

    def line(self) -> str:
        name, _text = name_of(self.key), table_of(self.key).text
        what = f"{_text(self.old)} -> {_text(self.new)}, {self.ratio:.3f} of the time" if self.changed else (
            f"{_text(self.old)} stays"
        )  # fmt: skip
        wrong = f", {len(self.rejected)} rejected" if self.rejected else ""
        return f"{name}: {what} ({self.measured} measured{wrong})"


def _text(numbers: Numbers) -> str:
    m, n, k, w, s = numbers
    return f"{m}x{n}x{k} w{w} s{s}"


def _numbers(key: Key) -> Numbers:
    from ..kernels import tune

    return tune.numbers(key)


def _numbers_of_network(key: Key) -> Numbers:
    from ..kernels import mlp_tune

    return mlp_tune.numbers(key)


@dataclass(frozen=True)
class Table:
    """What the search needs of a table, and how its file reads."""

    module: str
    types: tuple[str, str]
    numbers: Callable[[Key], Numbers]
    neighbours: Callable[[Key, Numbers], list[Numbers]]
    candidates: Callable[[Key, Numbers], list[Numbers]]
    text: Callable[[Numbers], str]


LAYERS = Table(
    "tuned",
    ("tuple[str, str, str, str, int]", "tuple[int, int, int, int, int]"),
    _numbers,
    neighbours,
    candidates,
    _text,
)
NETWORKS = Table(
    "mlp_tuned", ("tuple[str, str, str, int, int, int]", "tuple[int, int, int, int, int, bool, bool]"),
    _numbers_of_network, tune_networks.neighbours, tune_networks.candidates, tune_networks.text,
)  # fmt: skip


def table_of(key: Key) -> Table:
    return LAYERS if len(key) == 5 else NETWORKS


def name_of(key: Key) -> str:
    return " ".join(map(str, key[1:] if table_of(key) is LAYERS else ("network", *key[1:])))


def search(
    key: Key, old: Numbers, measurer: Measurer, *, everything: bool = False, left: Callable[[], float] | None = None
) -> Result:
    """Downhill from `old`, or through all candidates in groups; stops where `left` (seconds) is used up.

    Raises:
        CliError: the configuration in use is wrong: no table can be made of measurements beside it.
    """
    left = left or (lambda: math.inf)
    result = Result(key, old, old, 1.0, 0, {})
    if problem := measurer.problem(key, old):
        raise CliError(f"{key[0]} {name_of(key)}: the configuration in use, {table_of(key).text(old)}: {problem}")
    seen = {old}
    relative = {old: 1.0}

    def measure(group: Sequence[Numbers], beside: Numbers) -> None:
        """Relative times, chained through `beside`, which is measured with the group."""
        right = []
        for numbers in group:
            seen.add(numbers)
            if left() <= 0:
                return
            if problem := measurer.problem(key, numbers):
                result.rejected[numbers] = problem
            else:
                right.append(numbers)
        if not right or left() <= 0:
            return
        base, *times = measurer.milliseconds(key, [beside, *right])
        result.measured += len(right)
        for numbers, each in zip(right, times):
            relative[numbers] = relative[beside] * _mean_ratio(each, base)

    if everything:
        rest = [c for c in table_of(key).candidates(key, old) if c != old]
        for i in range(0, len(rest), 8):
            measure(rest[i : i + 8], old)
    else:
        best = old
        while left() > 0:
            measure([c for c in table_of(key).neighbours(key, best) if c not in seen], best)
            step = min(relative, key=lambda c: relative[c])
            if relative[step] > GAIN * relative[best]:
                break
            best = step
    for numbers in sorted(relative, key=lambda c: relative[c])[:5]:
        if relative[numbers] > GAIN or left() <= 0:
            break
        if found := measurer.static_problems(key, numbers):
            result.rejected[numbers] = "; ".join(found)
            continue
        base, again = measurer.milliseconds(key, [old, numbers])  # against the one in use itself, a second time
        ratio = _mean_ratio(again, base)
        if ratio <= GAIN:
            result.new, result.ratio = numbers, ratio
            break
    return result


def _mean_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return math.exp(sum(math.log(a / b) for a, b in zip(times, base)) / len(base))


# -- the file


def render(tuned: dict[Key, Numbers], why: dict[Key, str], table: Table = LAYERS) -> str:
    """The text of the table's file."""
    key_type, numbers_type = table.types
    lines = [f'"""{(_module(table).__doc__ or "").strip()}', '"""', "", f"Key = {key_type}"]
    lines += [f"Numbers = {numbers_type}", "", "TUNED: dict[Key, Numbers] = {"]
    lines += [f"    {_literal(key)}: {tuned[key]}," for key in sorted(tuned)]
    reasons = [f'    {_literal(key)}: "{why[key]}",' for key in sorted(tuned) if key in why]
    lines += ["}", "", *(["WHY: dict[Key, str] = {", *reasons, "}"] if reasons else ["WHY: dict[Key, str] = {}"])]
    return "\n".join([*lines, ""])


def _module(table: Table) -> Any:
    return importlib.import_module(f"..kernels.{table.module}", __package__)


def _literal(key: Key) -> str:
    return "(" + ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key) + ")"


def rewrite(path: Path, results: Sequence[Result], device: str, table: Table = LAYERS) -> None:
    """Put what changed into the table: the whole file, atomically, after reading it back.

    Raises:
        CliError: the file cannot be written; the old one is as it was.
    """
    tuned, why = dict(_module(table).TUNED), dict(_module(table).WHY)
    today = datetime.date.today().isoformat()
    name = device.replace('"', "").replace("\\", "")
    for result in results:
        if result.changed:
            tuned[result.key] = result.new
            why[result.key] = f"{name}, {today}: {result.ratio:.3f} of the time of {table.text(result.old)}"
    text = render(tuned, why, table)
    read: dict[str, Any] = {}
    exec(compile(text, str(path), "exec"), read)
    if (read["TUNED"], read["WHY"]) != (tuned, {k: v for k, v in why.items() if k in tuned}):
        raise CliError(f"{path}: what would be written does not read as what was measured; nothing is changed")
    write_all({path: text.encode()})


# -- on a GPU


class Kernels:
    """The kernels themselves, on a device (in Triton's interpreter: the program, without meaning to its times)."""

    def __init__(self, device: torch.device, *, rows: int = ROWS, seconds: float = 1.0):
        self.device, self.rows, self.seconds = device, rows, seconds
        self.networks = tune_networks.Networks(device, rows=rows, seconds=seconds)

    def tensors(self, key: Key, rows: int, N: int, K: int) -> dict[str, Any]:
        """Random operands of a layer, the same each time."""
        from .. import activations

        *_, cls, branches = key
        dtype, precision = _type(cls)
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
        if table_of(key) is NETWORKS:
            return self.networks.problem(key, numbers)
        from ..kernels import linear_act, tune
        from . import bounds

        kind = key[2]
        N, K = {"dot": (72, 88), "narrow_k": (72, 3), "narrow_n": (3, 88), "map": (72, 40)}[kind]
        t = self.tensors(key, 1021 if self.device.type == "cuda" else 67, N, K)
        exact, bound = bounds.layer_bounds(t["x"], t["weight"], t["bias"], t["act"], t["g"], TYPES[key[3]][1])
        try:
            with tune.using(key, numbers):
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

    def launch(self, key: Key, N: int, K: int, t: dict[str, Any]) -> Callable[[], object]:
        """One launch of the operation with what the table says now (a weight gradient: with the sum of its parts).
        Operands and outputs are `t`'s; the outputs are put there."""
        import triton

        from ..kernels import linear_act, maps, tune

        _, op, kind, *_ = key
        act, precision, B, C = t["act"].map, t["precision"], t["act"].branches, t["act"].outputs
        x = t["x"]
        rows = len(x)
        acc = linear_act.accumulator(x.dtype)
        if op == "weight_grad":
            gz, weight = t["g"].view(1, rows, N), t["weight"]
            return lambda: linear_act._weight_gradient(gz, x, weight, precision)
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
        number = tune.MAP if kind == "map" else tune.kind(N, K)
        config = tune.pick(tune.arch(self.device), "gz", number, x.dtype, precision, B, N, K)
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
        if table_of(key) is NETWORKS:
            return self.networks.milliseconds(key, candidates)
        from ..kernels import tune
        from . import timing

        times: list[list[float]] = [[] for _ in candidates]
        for N, K in SHAPES[key[2]]:
            operands = self.tensors(key, max(1, self.rows * 256 // max(N, K)), N, K)
            steps: dict[str, Callable[[], object]] = {}
            for i, numbers in enumerate(candidates):
                with tune.using(key, numbers):
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
        if table_of(key) is NETWORKS:
            return self.networks.static_problems(key, numbers)
        from ..kernels import aot, tune

        arch, op, kind, cls, branches = key
        dtype, precision = _type(cls)
        N, K = SHAPES[kind][0]
        kernel = "gz_from_z" if kind == "map" else op
        name = "-" if op == "weight_grad" else ACTIVATIONS[branches]
        with tune.using(key, numbers):
            row = aot.compile_job(aot.Job(arch, kernel, dtype, precision, name, N, K))
        found = row["problems"]
        assert isinstance(found, list)
        return found


# -- the command


def parser() -> report.Parser:
    p = report.Parser(prog="fused-inr bench tune", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, .. (cuda)")
    p.add_argument("--budget", type=report.positive, default=1800.0, metavar="S", help="seconds for everything (1800)")
    p.add_argument(
        "--only",
        metavar="TEXT",
        help='only entries whose name ("forward dot half 1", "network train half 1 1 64") contains TEXT',
    )
    p.add_argument("--all", action="store_true", help="every valid configuration instead of steps to better ones")
    p.add_argument(
        "--rows",
        type=report.integer(1),
        default=ROWS,
        help=f"rows that are timed where a layer has 256 columns ({ROWS})",
    )
    p.add_argument("--dry-run", action="store_true", help="measure and print, change nothing")
    p.add_argument("--out", type=Path, metavar="FILE", help="the layers' table (kernels/tuned.py of this installation)")
    p.add_argument("--out-networks", type=Path, metavar="FILE", help="the networks' (kernels/mlp_tuned.py)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 no GPU or a bad argument, 130 stopped by Ctrl-C (what was found until then is written)."""
    p = parser()
    options = p.parse_args(argv)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        p.error(f"argument --device: {str(error).splitlines()[0]}")
    if device.type != "cuda" or not torch.cuda.is_available():
        p.exit(2, f"fused-inr bench tune: measures on an NVIDIA GPU, and {options.device!r} is none that works here\n")
    device = report.usable_device(p, options.device)
    torch.cuda.set_device(device)
    from ..kernels import tune

    arch = tune.arch(device)
    if torch.version.hip:
        p.exit(2, "fused-inr bench tune: the table is about NVIDIA architectures\n")
    print(f"{torch.cuda.get_device_name(device)}, {arch}, {options.rows} rows", flush=True)
    return run(arch, Kernels(device, rows=options.rows), options, torch.cuda.get_device_name(device))


def run(arch: str, measurer: Measurer, options, device: str, clock: Callable[[], float] = time.monotonic) -> int:
    """Search through the entries, networks of one branch first, print old and new, rewrite the tables."""
    paths = {table.module: path or Path(_module(table).__file__) for table, path in (
        (LAYERS, options.out), (NETWORKS, options.out_networks),
    )}  # fmt: skip
    for option, path in zip(("--out", "--out-networks"), paths.values()):
        if not path.parent.is_dir() or path.is_dir():
            raise CliError(f"{option} {path}: not a file in a folder that exists")
    networks = list(tune_networks.keys(arch))
    first = [key for key in networks if key[3] == 1]
    every = [*first, *keys(arch), *(key for key in networks if key not in first)]
    wanted = [key for key in every if not options.only or options.only in name_of(key)]
    if not wanted:
        raise CliError(f"--only {options.only!r}: no entry contains it; one is {name_of(next(keys(arch)))!r}")
    end = clock() + options.budget
    results: list[Result] = []
    interrupted, reached = False, 0
    try:
        for key in wanted:
            if clock() >= end:
                break
            try:
                old = table_of(key).numbers(key)
                result = search(key, old, measurer, everything=options.all, left=lambda: end - clock())
            except CliError as error:
                print(f"{error}", file=sys.stderr, flush=True)
                reached += 1
                continue
            reached += 1
            results.append(result)
            print(result.line(), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    if reached < len(wanted):
        print(f"{len(wanted) - reached} of {len(wanted)} entries not reached (a larger --budget, or --only)")
    changed = [result for result in results if result.changed]
    if not changed:
        print("nothing is faster by more than noise: the table stays as it is")
    for table in (LAYERS, NETWORKS):
        path, own = paths[table.module], [result for result in changed if table_of(result.key) is table]
        if own and options.dry_run:
            print(f"{len(own)} entries would change in {path} (--dry-run)")
        elif own:
            rewrite(path, own, device, table)
            print(f"{len(own)} entries changed in {path}; `fused-inr bench static` compiles them all")
    return 130 if interrupted else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CliError as error:
        print(f"fused-inr: error: {error}", file=sys.stderr)
        sys.exit(2)
