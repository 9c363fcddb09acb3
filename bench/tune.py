"""`fused-inr bench tune`: measure configurations of the kernels on this GPU and rewrite their tables.

The tables are those of `kernels/configurations/`: `linear_act_table.py` (layers) and `mlp_table.py` (whole networks,
`tune_networks.py`). For each entry: from the configuration in use step by step to better neighbours (one number doubled
or halved, a pipeline stage more or less, a tile reshaped), all valid by the predicates there. The results of a
candidate are held to the bounds of `bounds.py` before it is timed; the candidates of a step are timed interleaved, as
CUDA graphs, at each of the entry's shapes. One replaces the configuration in use where it is faster by more than noise
in a second measurement as well, and compiles without spills (networks: without more than `SPILL` there).

Compiling is most of the work. The candidates of several entries are compiled and checked side by side, each in a
process of its own (`tune_workers.py`), then timed one entry after the other while nothing is compiled.
"""

from __future__ import annotations

import datetime
import importlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from ..cli import CliError
from ..cli.files import prepare_folder, write_all
from . import report, timing, tune_networks, tune_workers
from .tune_kernels import (
    ACTIVATIONS,
    RESERVE_S,
    ROWS,
    SHAPES,
    Died,
    Key,
    Measurer,
    Numbers,
    Wanted,
    is_network,
    type_of,
)

#: What is a gain: below, differences between runs decide.
GAIN = 0.98


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
    from ..kernels.configurations import linear_act as layer_configs

    arch, op, kind_name, cls, branches = key
    named = dict(zip("mnkws", numbers))
    for name in _FREE[kind_name]:
        low, high = _RANGE[name]
        if not low <= named[name] <= high or (name != "s" and named[name] & (named[name] - 1)):
            return False
    dtype, precision = type_of(cls)
    kind = layer_configs.KINDS.index(kind_name)
    with layer_configs.using(key, numbers):
        configs = [layer_configs.pick(arch, op, kind, dtype, precision, branches, N, K) for N, K in SHAPES[kind_name]]
    stages = 1 if kind_name != "dot" else numbers[4]
    itemsize = 2 if cls == "half" else 4
    valid = layer_configs.valid
    return all(c.num_stages == stages and valid(c, arch, op, kind, branches, itemsize, cls) for c in configs)


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
class TunedEntry:
    """An entry: the configuration in use, the best one found, and the time of it relative to the one in use."""

    key: Key
    old: Numbers
    new: Numbers
    ratio: float
    measured: int
    rejected: dict[Numbers, str]
    relative: dict[Numbers, float] = field(default_factory=dict)  # times of all that were timed

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

    def entry(self) -> dict[str, Any]:
        """The same for programs."""
        text = table_of(self.key).text
        return {
            "entry": name_of(self.key), "key": list(self.key), "old": list(self.old), "new": list(self.new),
            "ratio": self.ratio, "relative": {text(numbers): time for numbers, time in self.relative.items()},
            "rejected": {text(numbers): reason for numbers, reason in self.rejected.items()},
        }  # fmt: skip


def _text(numbers: Numbers) -> str:
    m, n, k, w, s = numbers
    return f"{m}x{n}x{k} w{w} s{s}"


def _numbers(key: Key) -> Numbers:
    from ..kernels.configurations import linear_act as layer_configs

    return layer_configs.numbers(key)


def _numbers_of_network(key: Key) -> Numbers:
    from ..kernels.configurations import mlp as network_configs

    return network_configs.numbers(key)


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
    "linear_act_table",
    ("tuple[str, str, str, str, int]", "tuple[int, int, int, int, int]"),
    _numbers,
    neighbours,
    candidates,
    _text,
)
NETWORKS = Table(
    "mlp_table", ("tuple[str, str, str, int, int, int]", "tuple[int, int, int, int, int, bool, bool, int]"),
    _numbers_of_network, tune_networks.neighbours, tune_networks.candidates, tune_networks.text,
)  # fmt: skip


def table_of(key: Key) -> Table:
    return NETWORKS if is_network(key) else LAYERS


def name_of(key: Key) -> str:
    return " ".join(map(str, key[1:] if table_of(key) is LAYERS else ("network", *key[1:])))


def search(
    key: Key, old: Numbers, measurer: Measurer, *, everything: bool = False, left: Callable[[], float] | None = None
) -> TunedEntry:
    """`steps` from begin to end, one thing after the other."""
    found = steps(key, old, measurer, everything=everything, left=left)
    while True:
        try:
            next(found)
        except StopIteration as done:
            return done.value


def steps(
    key: Key,
    old: Numbers,
    measurer: Measurer,
    *,
    everything: bool = False,
    left: Callable[[], float] | None = None,
    reserve: float = 0.0,
) -> Generator[list[Wanted], None, TunedEntry]:
    """Downhill from `old`, or through all candidates in groups; stops where `left` (seconds) is used up, and keeps the
    last `reserve` of them for making sure of what was found.

    It yields what it will ask `measurer` next, so that whoever runs several searches can have all of it prepared.

    Raises:
        CliError: the configuration in use is wrong: no table can be made of measurements beside it.
    """
    left = left or (lambda: math.inf)
    result = TunedEntry(key, old, old, 1.0, 0, {})
    seen = {old}
    relative = {old: 1.0}

    def measure(group: Sequence[Numbers], beside: Numbers) -> None:
        """Relative times, chained through `beside`, which is measured with the group."""
        right = []
        for numbers in group:
            seen.add(numbers)
            if left() <= reserve:
                return
            if problem := measurer.problem(key, numbers):
                result.rejected[numbers] = problem
            else:
                right.append(numbers)
        if not right or left() <= reserve:
            return
        try:
            base, *times = measurer.milliseconds(key, [beside, *right])
        except Died as error:
            if len(right) == 1:
                result.rejected[right[0]] = str(error)
            else:  # which one it was shows when each is timed alone
                for numbers in right:
                    measure([numbers], beside)
            return
        result.measured += len(right)
        for numbers, each in zip(right, times):
            relative[numbers] = relative[beside] * _mean_ratio(each, base)

    if everything:
        rest = [c for c in table_of(key).candidates(key, old) if c != old]
        groups = [rest[i : i + 8] for i in range(0, len(rest), 8)]
    else:
        groups = [table_of(key).neighbours(key, old)]
    yield [("problem", old), *(("problem", c) for c in (groups or [[]])[0])]
    if problem := measurer.problem(key, old):
        raise CliError(f"{key[0]} {name_of(key)}: the configuration in use, {table_of(key).text(old)}: {problem}")
    best = old
    for i, group in enumerate(groups):
        if i:
            yield [("problem", c) for c in group]
        measure(group, old)
    while not everything and left() > reserve:
        step = min(relative, key=lambda c: relative[c])
        if relative[step] > GAIN * relative[best] or step == best:
            break
        best = step
        around = [c for c in table_of(key).neighbours(key, best) if c not in seen]
        if around:
            yield [("problem", c) for c in around]
            measure(around, best)
    result.relative = relative
    faster = [c for c in sorted(relative, key=lambda c: relative[c])[:5] if relative[c] <= GAIN]
    if faster:
        yield [("static", c) for c in faster]
    for numbers in faster:
        if left() <= 0:
            break
        if found := measurer.static_problems(key, numbers):
            result.rejected[numbers] = "; ".join(found)
            continue
        try:
            base, again = measurer.milliseconds(key, [old, numbers])  # against the one in use itself, a second time
        except Died as error:
            result.rejected[numbers] = str(error)
            continue
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
    return importlib.import_module(f"..kernels.configurations.{table.module}", __package__)


def _literal(key: Key) -> str:
    return "(" + ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key) + ")"


def rewrite(path: Path, results: Sequence[TunedEntry], device: str, table: Table = LAYERS) -> None:
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


# -- the command


def parser() -> report.Parser:
    p = report.Parser(prog="fused-inr bench tune", description=(__doc__ or "").splitlines()[0])
    p.add_argument(
        "--device", default="cuda", help="cuda, cuda:1, ..; cpu under TRITON_INTERPRET=1 is a rehearsal (cuda)"
    )
    p.add_argument("--budget", type=report.positive, default=1800.0, metavar="S", help="seconds for everything (1800)")
    p.add_argument(
        "--only",
        metavar="TEXT",
        help='only entries whose name ("forward dot half 1", "network train half 1 1 64") contains one of these, '
        "separated by commas, in their order",
    )
    p.add_argument("--all", action="store_true", help="every valid configuration instead of steps to better ones")
    p.add_argument(
        "--rows",
        type=report.integer(1),
        default=ROWS,
        help=f"rows that are timed where a layer has 256 columns ({ROWS})",
    )
    p.add_argument(
        "--jobs", type=report.integer(1), default=min(16, os.cpu_count() or 2), metavar="N",
        help="processes that compile side by side (the CPUs, at most 16)",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="measure and print, change no table")
    p.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for results.json, log.txt and the tables (without it those of this installation are rewritten)",
    )  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 no GPU or a bad argument, 130 stopped by a signal (what was found until then is written)."""
    start = time.monotonic() - timing.age()
    p = parser()
    options = p.parse_args(argv)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        p.error(f"argument --device: {str(error).splitlines()[0]}")
    rehearsal = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not rehearsal and (device.type != "cuda" or not torch.cuda.is_available()):
        p.exit(2, f"fused-inr bench tune: measures on an NVIDIA GPU, and {options.device!r} is none that works here\n")
    if torch.version.hip:
        p.exit(2, "fused-inr bench tune: the table is about NVIDIA architectures\n")
    device = report.usable_device(p, options.device)
    os.environ.setdefault("FUSED_INR_NATIVE", "0")  # nothing here runs on the CPU engine: it is not built
    if options.out is not None:
        prepare_folder(options.out)
    from ..kernels.configurations import linear_act as layer_configs

    arch = "sm90" if rehearsal else layer_configs.arch(device)
    about = {"rehearsal": rehearsal, **report.environment(device, unasked=("cuda",)), "arch": arch}
    name = about["device"]
    if rehearsal:
        print("REHEARSAL in Triton's interpreter: configurations change nothing there, and times mean nothing.")
    print(f"{name}, {arch}, {options.rows} rows", flush=True)
    seconds = 1.0 if device.type == "cuda" else 0.0
    measurer = tune_workers.Processes(
        device, rows=options.rows, seconds=seconds, jobs=options.jobs, log=options.out and options.out / "workers.txt",
        left=lambda: options.budget - _reserve(options.budget) - (time.monotonic() - start),
    )  # fmt: skip
    handler = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # stopped is stopped
    try:
        return run(arch, measurer, options, name, about=about, start=start)
    finally:
        signal.signal(signal.SIGTERM, handler)
        measurer.close()


#: Entries that are searched at the same time; the share of a budget that is kept for making sure of what was found.
TOGETHER, RESERVE_SHARE = 4, 0.1


def _reserve(budget: float) -> float:
    return min(RESERVE_S, RESERVE_SHARE * budget)


def run(
    arch: str,
    measurer: Measurer,
    options,
    device: str,
    clock: Callable[[], float] = time.monotonic,
    about: dict[str, Any] | None = None,
    start: float | None = None,
) -> int:
    """Search through the entries, networks of one branch first, print old and new, rewrite the tables.

    `start` is when the budget began, on `clock`: now, unless it is given.
    """
    wanted = _wanted(arch, options.only)
    end = (clock() if start is None else start) + options.budget
    reserve = _reserve(options.budget)
    said = report.Results(options.out and options.out / "results.json", about or {})
    log = options.out and options.out / "log.txt"

    def say(text: str, file: TextIO = sys.stdout) -> None:
        print(text, file=file, flush=True)
        if log:
            with log.open("a") as kept:
                kept.write(text + "\n")

    results: list[TunedEntry] = []
    waiting, reached = list(reversed(wanted)), 0
    active: dict[Key, Generator[list[Wanted], None, TunedEntry]] = {}
    asked: dict[Key, list[Wanted]] = {}

    def advance(key: Key) -> None:
        """Let one search go on to its next question, or to its end."""
        nonlocal reached
        try:
            asked[key] = next(active[key])
            return
        except StopIteration as done:
            results.append(done.value)
            say(done.value.line())
            said.append(done.value.entry())
        except CliError as error:
            say(f"{error}", sys.stderr)
            said.append({"entry": name_of(key), "error": f"{error}"})
        reached += 1
        del active[key]
        asked.pop(key, None)

    interrupted = False
    try:
        while active or (waiting and clock() < end - reserve):
            while waiting and len(active) < TOGETHER and clock() < end - reserve:
                key = waiting.pop()
                active[key] = steps(
                    key, table_of(key).numbers(key), measurer, everything=options.all, left=lambda: end - clock(),
                    reserve=reserve,
                )  # fmt: skip
                advance(key)
            measurer.prepare([(key, each) for key, questions in asked.items() for each in questions])
            for key in list(active):
                advance(key)
    except KeyboardInterrupt:
        interrupted = True
    if reached < len(wanted):
        say(f"{len(wanted) - reached} of {len(wanted)} entries not reached (a larger --budget, or --only)")
    changed = [result for result in results if result.changed]
    if not changed:
        say("nothing is faster by more than noise: the table stays as it is")
    for table in (LAYERS, NETWORKS):
        own = [result for result in changed if table_of(result.key) is table]
        path = options.out / f"{table.module}.py" if options.out else Path(_module(table).__file__)
        if own and options.dry_run:
            say(f"{len(own)} entries would change in {path} (--dry-run)")
        elif own:
            rewrite(path, own, device, table)
            say(f"{len(own)} entries changed in {path}; `fused-inr bench static` compiles them all")
    said.finish(interrupted=interrupted, not_reached=len(wanted) - reached)
    return 130 if interrupted else 0


def _wanted(arch: str, only: str | None) -> list[Key]:
    """The entries to search: all of them in the order of use, or those that `only` names, in its order.

    Raises:
        CliError: no entry has such a name.
    """
    networks = list(tune_networks.keys(arch))
    first = [key for key in networks if key[3] == 1]
    every = [*first, *keys(arch), *(key for key in networks if key not in first)]
    if not only:
        return every
    texts = [text.strip() for text in only.split(",") if text.strip()]
    chosen = {key: None for text in texts for key in every if text in name_of(key)}
    for text in texts or [only]:
        if not any(text in name_of(key) for key in every):
            raise CliError(f"--only {text!r}: no entry contains it; one is {name_of(next(keys(arch)))!r}")
    return list(chosen)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CliError as error:
        print(f"fused-inr: error: {error}", file=sys.stderr)
        sys.exit(2)
