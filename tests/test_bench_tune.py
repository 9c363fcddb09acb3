"""`fused-inr bench tune`: which configurations it considers, what it chooses, and how the table is rewritten.

Times come from functions made up here; the measuring itself runs in Triton's interpreter once, so that its calls are
known to work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
import torch

layer_configs = pytest.importorskip("fused_inr.kernels.configurations.linear_act")

from fused_inr.bench import tune as bench  # noqa: E402
from fused_inr.bench import tune_networks as networks  # noqa: E402
from fused_inr.kernels.configurations import linear_act_table, mlp_table  # noqa: E402
from fused_inr.kernels.configurations import mlp as network_configs  # noqa: E402

from fused_inr.cli import CliError  # noqa: E402

KEY = ("sm90", "forward", "dot", "half", 1)
OLD = (128, 128, 64, 8, 3)


NETWORK = ("sm90", "forward", "half", 1, 1, 64)
IN_USE = (128, 1, 4, 2, 3, True, False, 0)


@pytest.fixture(autouse=True)
def tables_that_do_not_change(request, monkeypatch):
    """What is searched below starts from these, whatever was measured meanwhile; "shipped" asks for what ships."""
    if "shipped" not in request.keywords:
        monkeypatch.delitem(linear_act_table.TUNED, KEY)
        monkeypatch.delitem(linear_act_table.WHY, KEY)
        monkeypatch.setitem(mlp_table.TUNED, NETWORK, IN_USE)
        monkeypatch.delitem(mlp_table.TUNED, ("sm90", "save", *NETWORK[2:]), raising=False)
        network_configs.pick.cache_clear()
    yield
    monkeypatch.undo()
    network_configs.pick.cache_clear()


class Machine:
    """A machine on which `time(numbers)` is the time at every shape."""

    def __init__(self, time, wrong=(), spills=()):
        self.time, self.wrong, self.spills = time, set(wrong), set(spills)
        self.checked, self.timed = [], []
        self.prepared = set()

    def prepare(self, wanted):
        self.prepared |= set(wanted)

    def problem(self, key, numbers):
        self.checked.append(numbers)
        return "y is 7 of its bound" if numbers in self.wrong else ""

    def milliseconds(self, key, candidates):
        assert set(candidates) <= set(self.checked), "timed before it was checked"
        self.timed += candidates
        return [[self.time(c) * (1 + i) for i in range(len(bench.SHAPES[key[2]]))] for c in candidates]

    def static_problems(self, key, numbers):
        return ["8 bytes of stack"] if numbers in self.spills else []


def distance(target):
    """Smooth, least at `target`."""
    return lambda c: 1 + sum(abs(math.log2(a / b)) for a, b in zip(c, target))


# -- candidates


@pytest.mark.shipped
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100"])
def test_every_entry_of_an_architecture_has_valid_neighbours(arch):
    keys = list(bench.keys(arch))
    assert len(set(keys)) == len(keys) > 50
    assert keys[0] == (arch, "forward", "dot", "half", 1)
    for key in keys:
        numbers = layer_configs.numbers(key)
        around = bench.neighbours(key, numbers)
        assert around, key
        assert numbers not in around
        assert all(bench.is_valid(key, c) for c in around)


def test_neighbours_differ_by_one_step():
    around = bench.neighbours(KEY, OLD)
    assert (64, 128, 64, 8, 3) in around
    assert (128, 128, 64, 8, 2) in around
    assert (64, 256, 64, 8, 3) in around
    assert (128, 128, 64, 8, 5) not in around
    # 256 x 256 in 8 warps is 256 accumulators a thread, and (256, 128) is still 128
    assert (256, 128, 64, 8, 3) in around
    assert not bench.is_valid(KEY, (256, 256, 64, 8, 3))


def test_all_candidates_are_valid_and_reach_beyond_the_neighbours():
    everything = bench.candidates(KEY, OLD)
    assert everything[0] == OLD
    assert len(set(everything)) == len(everything) > 200
    assert all(bench.is_valid(KEY, c) for c in everything)
    assert set(bench.neighbours(KEY, OLD)) < set(everything)
    narrow = ("sm90", "forward", "narrow_k", "half", 1)
    # what the shape decides stays as it is
    assert {(c[2], c[4]) for c in bench.candidates(narrow, layer_configs.numbers(narrow))} == {(0, 1)}


@pytest.mark.parametrize(
    "numbers",
    [
        (96, 128, 64, 8, 3),  # no power of two
        (8, 128, 64, 8, 3),  # below the tensor cores' tile
        (128, 128, 64, 2, 3),  # 256 accumulators a thread
        (128, 128, 128, 8, 4),  # 256 KB of operands: `pick` would drop a stage
        (128, 128, 64, 8, 0),
        (512, 16, 16, 8, 1),
    ],
)
def test_what_the_predicate_refuses_is_no_candidate(numbers):
    assert not bench.is_valid(KEY, numbers)


def test_less_shared_memory_leaves_fewer_candidates():
    counts = [len(bench.candidates((arch, *KEY[1:]), OLD)) for arch in ("sm86", "sm80", "sm90")]
    assert counts[0] < counts[1] < counts[2]


def test_looking_does_not_change_the_table():
    before = dict(linear_act_table.TUNED)
    found = layer_configs.pick("sm90", "forward", layer_configs.DOT, torch.bfloat16, "ieee", 1, 256, 256)
    bench.candidates(KEY, OLD)
    with layer_configs.using(KEY, (64, 64, 32, 4, 2)):
        inside = layer_configs.pick("sm90", "forward", layer_configs.DOT, torch.bfloat16, "ieee", 1, 256, 256)
    assert (inside.block_m, inside.num_warps) == (64, 4)
    assert linear_act_table.TUNED == before
    assert layer_configs.pick("sm90", "forward", layer_configs.DOT, torch.bfloat16, "ieee", 1, 256, 256) == found


# -- the choice


def test_it_walks_downhill_to_the_fastest():
    target = (64, 128, 32, 4, 5)
    machine = Machine(distance(target))
    result = bench.search(KEY, OLD, machine)
    assert result.new == target
    assert result.ratio == pytest.approx(machine.time(target) / machine.time(OLD))
    assert result.measured < len(bench.candidates(KEY, OLD)) / 2
    assert "64x128x32 w4 s5" in result.line()


def test_all_candidates_reach_what_no_step_leads_to():
    island = (32, 32, 16, 4, 1)

    def time(numbers):
        return 0.5 if numbers == island else 1 + 0.1 * (numbers != OLD)

    assert bench.search(KEY, OLD, Machine(time)).new == OLD
    assert bench.search(KEY, OLD, Machine(time), everything=True).new == island


def test_noise_changes_nothing():
    result = bench.search(KEY, OLD, Machine(lambda c: 1.0 if c == OLD else 0.985))
    assert not result.changed
    assert "stays" in result.line()


def test_a_gain_that_does_not_repeat_is_none():
    fast = (64, 128, 64, 8, 3)

    class Lucky(Machine):
        def milliseconds(self, key, candidates):
            self.time = (lambda c: 0.5 if c == fast else 1.0) if not self.timed else (lambda c: 1.0)
            return super().milliseconds(key, candidates)

    machine = Lucky(None)
    result = bench.search(KEY, OLD, machine)
    assert not result.changed
    assert machine.timed.count(fast) >= 2


def test_wrong_results_are_never_timed_and_spills_never_chosen():
    best, second = (64, 128, 64, 8, 3), (128, 64, 64, 8, 3)
    order = {best: 0.5, second: 0.6, (128, 128, 32, 8, 3): 0.7}

    def time(numbers):
        return order.get(numbers, 1.0)

    machine = Machine(time, wrong=[best], spills=[second])
    result = bench.search(KEY, OLD, machine)
    assert best not in machine.timed
    assert result.new == (128, 128, 32, 8, 3)
    assert set(result.rejected) == {best, second}


def test_a_wrong_configuration_in_use_is_said():
    with pytest.raises(CliError, match=r"forward dot half 1.*in use.*7 of its bound"):
        bench.search(KEY, OLD, Machine(distance(OLD), wrong=[OLD]))


def test_the_search_stops_where_the_time_is_used_up():
    clock = iter(range(100))
    machine = Machine(distance((64, 64, 16, 4, 5)))
    result = bench.search(KEY, OLD, machine, left=lambda: 20 - next(clock))
    assert result.measured <= 14


# -- the file


def result(key=KEY, new=(64, 128, 64, 4, 4), ratio=0.9):
    return bench.TunedEntry(key, layer_configs.numbers(key), new, ratio, 5, {})


def read(path):
    found: dict = {}
    exec(path.read_text(), found)
    return found["TUNED"], found["WHY"]


@pytest.mark.shipped
def test_the_table_is_as_the_command_writes_it():
    from pathlib import Path

    assert bench.render(linear_act_table.TUNED, linear_act_table.WHY) == Path(linear_act_table.__file__).read_text()
    assert set(linear_act_table.WHY) == set(linear_act_table.TUNED)


def test_rewriting_keeps_the_rest_and_says_why(tmp_path):
    path = tmp_path / "linear_act_table.py"
    kept = ("sm90", "gz", "dot", "half", 1)
    unchanged = bench.TunedEntry(kept, layer_configs.numbers(kept), layer_configs.numbers(kept), 1.0, 3, {})
    bench.rewrite(path, [result(), unchanged], 'NVIDIA "H200"')
    table, why = read(path)
    assert table == linear_act_table.TUNED | {KEY: (64, 128, 64, 4, 4)}
    assert why[KEY].startswith("NVIDIA H200, 20") and "0.900 of the time of 128x128x64 w8 s3" in why[KEY]
    assert all(why[key] == text for key, text in linear_act_table.WHY.items())
    assert [p.name for p in tmp_path.iterdir()] == ["linear_act_table.py"]


def test_half_a_file_never_replaces_a_table(tmp_path, monkeypatch):
    path = tmp_path / "linear_act_table.py"
    path.write_text("old")
    monkeypatch.setattr(bench, "render", lambda tuned, why, table: "TUNED = {}\nWHY = {}\n")
    with pytest.raises(CliError, match="nothing is changed"):
        bench.rewrite(path, [result()], "H200")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CliError, match="No space left"):
        bench.rewrite(path, [result()], "H200")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["linear_act_table.py"]


# -- the command


def options(tmp_path, **more):
    values = {"budget": 1e9, "only": "forward dot", "all": False, "dry_run": False, "out": tmp_path}
    return argparse.Namespace(**(values | more))


def tables(folder):
    """The names of the tables in a folder."""
    return sorted(p.name for p in folder.glob("*.py"))


def test_a_run_prints_old_and_new_and_writes(tmp_path, capsys):
    target = (64, 128, 64, 8, 3)
    assert bench.run("sm90", Machine(distance(target)), options(tmp_path, only="forward dot half 1"), "H200") == 0
    out = capsys.readouterr().out
    assert "forward dot half 1: 128x128x64 w8 s3 -> 64x128x64 w8 s3, 0.500 of the time" in out
    assert read(tmp_path / "linear_act_table.py")[0][KEY] == target
    content = json.loads((tmp_path / "results.json").read_text())
    (entry,) = content["results"]
    assert content["finished"] and content["not_reached"] == 0
    assert (entry["entry"], entry["new"]) == ("forward dot half 1", list(target))
    assert entry["relative"]["64x128x64 w8 s3"] == pytest.approx(0.5)
    assert out.strip() == (tmp_path / "log.txt").read_text().strip()


def test_what_several_searches_ask_is_prepared_together(tmp_path):
    """Nothing is checked that was not prepared, and what is prepared at once is of several entries."""

    rounds = []

    class RecordedMachine(Machine):
        def prepare(self, wanted):
            super().prepare(wanted)
            rounds.append({key for key, _ in wanted})

        def problem(self, key, numbers):
            assert (key, ("problem", numbers)) in self.prepared
            return super().problem(key, numbers)

        def static_problems(self, key, numbers):
            assert (key, ("static", numbers)) in self.prepared
            return super().static_problems(key, numbers)

    machine = RecordedMachine(distance((64, 128, 32, 4, 5)))
    assert bench.run("sm90", machine, options(tmp_path, only="forward dot"), "H200") == 0
    assert max(map(len, rounds)) == bench.TOGETHER
    assert read(tmp_path / "linear_act_table.py")[0][KEY] == (64, 128, 32, 4, 5)


def test_a_configuration_that_takes_the_process_is_rejected_and_the_rest_is_timed(tmp_path):
    deadly = (64, 128, 64, 8, 3)

    class Deadly(Machine):
        def milliseconds(self, key, candidates):
            if deadly in candidates:
                raise bench.Died("its process died")
            return super().milliseconds(key, candidates)

    result = bench.search(KEY, OLD, Deadly(distance((128, 64, 64, 8, 3))))
    assert result.new == (128, 64, 64, 8, 3)
    assert result.rejected == {deadly: "its process died"}


def test_entries_are_searched_in_the_order_of_their_names():
    names = [bench.name_of(key) for key in bench._wanted("sm90", "network train half 1 1 64,forward dot tf32")]
    assert names[0] == "network train half 1 1 64" and names[1] == "forward dot tf32 1"
    assert len(bench._wanted("sm90", None)) == len(set(bench._wanted("sm90", None))) > 60


def test_time_is_kept_for_making_sure(tmp_path):
    """The descent ends where only the reserve is left, and what it has found is confirmed and written."""
    now = [0.0]
    target = (16, 16, 16, 1, 6)

    class Slow(Machine):
        def milliseconds(self, key, candidates):
            now[0] += 9.0
            return super().milliseconds(key, candidates)

    machine = Slow(distance(target))
    bench.run("sm90", machine, options(tmp_path, budget=40.0, only="forward dot half 1"), "H200", clock=lambda: now[0])
    found = read(tmp_path / "linear_act_table.py")[0][KEY]
    assert found not in (OLD, target)
    assert now[0] == 45.0  # four groups of the descent, then the second measurement


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    machine = Machine(distance((64, 128, 64, 8, 3)))
    assert bench.run("sm90", machine, options(tmp_path, dry_run=True), "H200") == 0
    assert "would change" in capsys.readouterr().out
    assert not tables(tmp_path)


def test_nothing_faster_leaves_the_file_alone(tmp_path, capsys):
    assert bench.run("sm90", Machine(lambda c: 1.0), options(tmp_path), "H200") == 0
    assert "stays as it is" in capsys.readouterr().out
    assert not tables(tmp_path)


def test_entries_beyond_the_budget_are_counted_and_an_interrupt_keeps_results(tmp_path, capsys):
    clock = iter([0.0, 0.0, *([0.5] * 200), *([2.0] * 1000)])
    machine = Machine(distance((64, 128, 64, 8, 3)))
    bench.run("sm90", machine, options(tmp_path, budget=1.0), "H200", clock=lambda: next(clock))
    assert "entries not reached" in capsys.readouterr().out

    class Stopped(Machine):
        def problem(self, key, numbers):
            if key != KEY:
                raise KeyboardInterrupt
            return super().problem(key, numbers)

    assert bench.run("sm90", Stopped(distance((64, 128, 64, 8, 3))), options(tmp_path), "H200") == 130
    assert KEY in read(tmp_path / "linear_act_table.py")[0]


def test_one_entry_that_is_wrong_does_not_stop_the_others(tmp_path, capsys):
    machine = Machine(distance((64, 64, 64, 8, 3)), wrong=[OLD])
    assert bench.run("sm90", machine, options(tmp_path), "H200") == 0
    captured = capsys.readouterr()
    assert "in use" in captured.err
    assert "forward dot half 2" in captured.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "NVIDIA GPU"),
        (["--device", "cpu"], "'cpu'"),
        (["--device", "nowhere"], "--device"),
        (["--budget", "0"], "--budget"),
        (["--rows", "x"], "--rows"),
    ],
)
def test_without_a_gpu_it_says_so_in_one_line(arguments, words):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, "-m", "fused_inr.cli", "bench", "tune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_bad_choices_are_refused(tmp_path):
    with pytest.raises(CliError, match="--only 'nothing'"):
        bench.run("sm90", Machine(distance(OLD)), options(tmp_path, only="forward dot,nothing"), "H200")


def test_what_is_measured_runs():
    """In the interpreter: the checks hold every kind of entry to its bounds, see a wrong result, and the calls work."""
    code = """
import torch
from fused_inr.bench import tune_kernels, tune as bench
from fused_inr.kernels import linear_act
from fused_inr.kernels.configurations import linear_act as layer_configs
device = torch.device("cpu")
kernels = tune_kernels.Kernels(device, rows=3, seconds=0.0)
bench.SHAPES.update(dot=((20, 24),), narrow_k=((20, 2),), narrow_n=((3, 24),), map=((20, 24),))
for key in [("sm90", "forward", "dot", "half", 1), ("sm90", "gz", "dot", "x3", 2), ("sm90", "gz", "map", "ieee", 4),
            ("sm90", "forward", "narrow_n", "ieee", 1), ("sm90", "gz", "narrow_k", "tf32", 1),
            ("sm90", "weight_grad", "dot", "ieee", 1)]:
    print(key[1:], repr(kernels.problem(key, layer_configs.numbers(key))))
    N, K = bench.SHAPES[key[2]][0]
    kernels.launch(key, N, K, kernels.tensors(key, 33, N, K))()
times = kernels.milliseconds(key, [layer_configs.numbers(key), (16, 64, 64, 4, 2)])
assert [len(t) for t in times] == [1, 1] and min(min(t) for t in times) > 0
right = linear_act.launch_weight_grad
linear_act.launch_weight_grad = lambda gz, *rest: right(gz * 1.01, *rest)
print("wrong", kernels.problem(key, layer_configs.numbers(key)))
linear_act.launch_weight_grad = lambda *rest: 1 / 0
print("fails", kernels.problem(key, layer_configs.numbers(key)))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    *fine, wrong, fails = done.stdout.splitlines()
    assert len(fine) == 6 and all(line.endswith("''") for line in fine), done.stdout
    assert wrong.startswith("wrong gw is ") and wrong.endswith("of its bound")
    assert fails == "fails ZeroDivisionError: division by zero"


def test_processes_check_time_and_compile():
    """In the interpreter, but for what the compiler makes of a configuration; an answer is asked for once."""
    code = """
import torch
from fused_inr.bench import tune, tune_workers
from fused_inr.kernels.configurations import linear_act as table
if __name__ == "__main__":
    key, bad = ("sm90", "forward", "narrow_k", "half", 1), ("sm90", "forward", "narrow_k", "half", 3)
    numbers = table.numbers(key)
    processes = tune_workers.Processes(
        torch.device("cpu"), rows=16, seconds=0.0, jobs=2, log=None, left=lambda: 200.0)
    processes.prepare([(key, ("problem", numbers)), (bad, ("problem", numbers)), (key, ("static", numbers))])
    prepared = dict(processes._answers)
    static = processes.static_problems(key, numbers)
    print(repr(processes.problem(key, numbers)), processes.problem(bad, numbers), static)
    assert processes._answers == prepared
    times = processes.milliseconds(key, [numbers, (32, 64, 0, 4, 1)])
    assert [len(each) for each in times] == [2, 2] and min(map(min, times)) > 0
    try:
        processes.milliseconds(bad, [numbers])
    except tune.Died as error:
        print(error)
    assert len(processes.milliseconds(key, [numbers])) == 1  # by a fresh process
    processes.close()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["'' KeyError: 3 []", "KeyError: 3"]


# -- whole networks


def network_distance(target):
    """Smooth over what an entry decides, least at `target`."""

    def time(numbers):
        return 1 + sum(abs(math.log2((a + 1) / (b + 1))) for a, b in zip(numbers, target))

    return time


class NetworkMachine(Machine):
    def milliseconds(self, key, candidates):
        assert set(candidates) <= set(self.checked), "timed before it was checked"
        self.timed += candidates
        return [[self.time(c), 2 * self.time(c)] for c in candidates]


@pytest.mark.shipped
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100"])
def test_every_network_has_valid_neighbours(arch):
    keys = list(networks.keys(arch))
    assert len(set(keys)) == len(keys) > 30
    assert keys[0][1:] == ("forward", "half", 1, 1, 32)
    for key in keys:
        numbers = network_configs.numbers(key)
        assert networks.is_valid(key, numbers), key
        around = networks.neighbours(key, numbers)
        assert around and numbers not in around, key
        assert len(set(around)) == len(around) and all(networks.is_valid(key, c) for c in around)
        assert set(around) < set(networks.candidates(key, numbers))
        fixed = {"one_pass": (1, 3, 4, 5)}.get(key[1], (5, 6) if key[1] in ("forward", "save") else (4,))
        assert {tuple(c[i] for i in fixed) for c in around} == {tuple(numbers[i] for i in fixed)}


@pytest.mark.shipped
@pytest.mark.parametrize(("arch", "multiprocessors"), [("sm80", 108), ("sm86", 84), ("sm90", 132), ("sm100", 148)])
def test_no_training_entry_leaves_the_cache_for_its_programs(arch, multiprocessors):
    """Sums of the hidden weights' gradients: a chunk of rows at a time, with a launch for each and layer, only where
    those of one program a multiprocessor would be too many already."""
    for key in networks.keys(arch):
        _, op, _, B, C, width = key
        if op not in ("train", "backward"):
            continue
        programs = network_configs.NetworkConfig(*network_configs.numbers(key)).resident_programs
        one = multiprocessors * networks.HIDDEN * B * C * width * width * 4
        assert programs == 1 or programs * one <= network_configs.SUMS_BYTES, key


@pytest.mark.parametrize(
    "numbers",
    [
        (96, 1, 4, 2, 3, True, False, 0),  # no power of two
        (8, 1, 4, 2, 3, True, False, 0),  # below the tensor cores' tile
        (256, 1, 1, 2, 3, True, False, 0),  # 512 accumulators a thread
        (128, 1, 4, 2, 2, True, False, 0),  # some of the hidden weights on chip: all or none
        (128, 1, 4, 9, 3, True, False, 0),
    ],
)
def test_networks_that_the_predicate_refuses(numbers):
    assert not networks.is_valid(NETWORK, numbers)


def test_a_network_is_searched_and_written(tmp_path, capsys):
    target = (64, 1, 4, 1, 0, True, False, 0)
    machine = NetworkMachine(network_distance(target))
    assert bench.run("sm90", machine, options(tmp_path, only="network forward half 1 1 64"), "H200") == 0
    out = capsys.readouterr().out
    assert "network forward half 1 1 64: 128 rows, 1 tiles, w4 s2 r3 -> 64 rows, 1 tiles, w4 s1 r0, " in out
    assert tables(tmp_path) == ["mlp_table.py"]
    table, why = read(tmp_path / "mlp_table.py")
    assert table == mlp_table.TUNED | {NETWORK: target}
    assert "of the time of 128 rows, 1 tiles, w4 s2 r3" in why[NETWORK]


def test_both_tables_in_one_run(tmp_path, capsys):
    class Both(NetworkMachine):
        def milliseconds(self, key, candidates):
            shapes = 2 if len(key) == 6 else len(bench.SHAPES[key[2]])
            return [[1 / sum(map(float, c))] * shapes for c in candidates]

    assert bench.run("sm90", Both(None), options(tmp_path, only="forward"), "H200") == 0
    assert tables(tmp_path) == ["linear_act_table.py", "mlp_table.py"]
    out = capsys.readouterr().out
    assert out.index("network forward half 1 1 32") < out.index("forward dot half 1") < out.index("half 4 1 32")


@pytest.mark.shipped
def test_the_networks_table_is_as_the_command_writes_it():
    from pathlib import Path

    assert bench.render(mlp_table.TUNED, mlp_table.WHY, bench.NETWORKS) == Path(mlp_table.__file__).read_text()
    assert set(mlp_table.WHY) <= set(mlp_table.TUNED)


def test_looking_at_networks_does_not_change_the_table():
    import torch

    before = dict(mlp_table.TUNED)
    found = network_configs.pick("sm90", "forward", torch.bfloat16, "ieee", 1, 1, 64)
    networks.candidates(NETWORK, IN_USE)
    with network_configs.using(NETWORK, (32, 2, 8, 1, 0, True, False, 0)):
        inside = network_configs.pick("sm90", "forward", torch.bfloat16, "ieee", 1, 1, 64)
        # served by the same entry
        assert network_configs.pick("sm90", "save", torch.bfloat16, "ieee", 1, 1, 64) == inside
    assert (inside.block_m, inside.tiles, inside.num_warps, inside.resident_programs) == (32, 2, 8, 1)
    assert mlp_table.TUNED == before
    assert network_configs.pick("sm90", "forward", torch.bfloat16, "ieee", 1, 1, 64) == found


def test_what_is_measured_of_networks_runs():
    """In the interpreter: every operation is held to its bounds, a wrong result is seen, and the calls work."""
    code = """
import torch
from fused_inr.bench import tune_kernels, tune as bench
from fused_inr.kernels import mlp
from fused_inr.kernels.configurations import mlp as network_configs
kernels = tune_kernels.Kernels(torch.device("cpu"), rows=4, seconds=0.0)
for op in ("forward", "save", "train", "one_pass"):
    numbers = (16, 1, 1, 1, 2, True, False, 0)  # the interpreter has its own; 16 columns: one pass in registers
    print(op, repr(kernels.problem(("sm90", op, "half", 1, 1, 16), numbers)))
key = ("sm90", "forward", "half", 1, 1, 32)
times = kernels.milliseconds(key, [network_configs.numbers(key), (16, 1, 4, 1, 0, True, False, 0)])
assert [len(t) for t in times] == [2, 2] and min(min(t) for t in times) > 0
right = mlp.mlp
def wrong(*arguments):
    y, saved = right(*arguments)
    return y * 1.1, saved
mlp.mlp = wrong
print("wrong", kernels.problem(key, network_configs.numbers(key)))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    *fine, wrong = done.stdout.splitlines()
    assert len(fine) == 4 and all(line.endswith("''") for line in fine), done.stdout
    assert wrong.startswith("wrong ") and "output is off by" in wrong
