"""The benches: what they compute about a case, and each command in quick form. No test looks at a time."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from fused_inr.bench import bounds, cases, report, table, timing, worker
from fused_inr.bench.cases import Case, Workload
from fused_inr.bench.gpu import checks, driver

from fused_inr.cli import CliError, children

CPU = torch.device("cpu")
SMALL = {"width": 16, "rows": 60, "hidden_layers": 1}


def fused_inr(*arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fused_inr.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **more)


# -- cases


@pytest.mark.parametrize("step", cases.STEPS)
@pytest.mark.parametrize("activation", ["sine", "split", "relu"])
@pytest.mark.parametrize("kind", ["layer", "network"])
def test_the_eager_twin_computes_the_same(kind, activation, step):
    case = Case(kind, step, activation, **SMALL)
    result = Workload(case).check(rows_at_once=32)
    assert result["of_bound"] <= 1
    assert result["error"] < 1e-3


def test_a_wrong_result_is_found():
    work = Workload(Case("network", "training", **SMALL))
    with torch.no_grad():
        next(work.fused.parameters()).mul_(1.001)
    with pytest.raises(cases.Wrong, match="eager PyTorch by"):
        work.check()


def test_a_result_that_is_not_a_number_is_found():
    work = Workload(Case("network", "inference", **SMALL))
    with torch.no_grad():
        next(work.fused.parameters())[0, 0] = math.nan
    with pytest.raises(cases.Wrong):
        work.check()


def test_operations_and_bytes_of_a_layer():
    m, k, n = 10, 3, 4
    forward = Case("layer", "inference", width=n, rows=m, in_features=k)
    training = Case("layer", "training", "split", width=n, rows=m, in_features=k, precision="bf16")
    assert forward.operations() == 2 * m * k * n
    assert forward.bytes() == 4 * (m * k + n * k + n + m * n)
    assert training.operations() == 3 * 2 * m * k * 4 * n
    weights = 4 * n * (k + 1)
    assert training.bytes() == 2 * ((m * k + weights + m * n) + (m * k + weights + m * n + m * k + weights))


def test_the_first_layer_of_a_network_needs_no_input_gradient():
    case = Case("network", "training", width=8, rows=5, hidden_layers=0, out_features=2)
    assert case.operations() == 2 * 5 * (2 * (2 * 8) + 3 * (8 * 2))


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "net"}, {"step": "forward"}, {"activation": "sin"}, {"precision": "float32"}, {"rows": 0}, {"width": -1}],
)
def test_a_case_says_what_it_accepts(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        Case(**({"kind": "layer", "step": "inference"} | wrong))


def test_torch_compile_has_no_eikonal_step():
    with pytest.raises(ValueError, match="differentiate twice"):
        Workload(Case("network", "eikonal", **SMALL)).call("compile")


# -- bounds


def test_the_bound_of_a_layer_holds_and_is_no_blanket():
    for activation in ("sine", "split", "fourier"):
        result = checks.layer_accuracy(activation, "ieee", CPU, 40, 17, 12)
        assert 1e-4 < result["of_bound"] <= 1


@pytest.mark.parametrize("name", ["y", "gx", "gw", "gb"])
def test_one_wrong_element_exceeds_its_bound(name):
    import fused_inr as fi

    act = fi.activations.sine(omega=30.0)
    x, weight, bias, g = torch.rand(50, 9), torch.rand(7, 9) / 9, torch.rand(7), torch.randn(50, 7)
    exact, bound = bounds.layer_bounds(x, weight, bias, act, g, "ieee")
    value = exact[name].float()
    assert bounds.of_bound(value, exact[name], bound[name])["of_bound"] <= 1
    value.view(-1)[3] += 4 * bound[name].view(-1)[3].float()
    assert bounds.of_bound(value, exact[name], bound[name])["of_bound"] > 1
    value.view(-1)[3] = math.nan
    assert not bounds.of_bound(value, exact[name], bound[name])["of_bound"] <= 1


def test_what_eager_hits_by_luck_is_measured_by_the_roundings_of_the_precision():
    exact, off = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0 + 1e-4, dtype=torch.float64)
    value = torch.tensor(1.0 + 1.5e-4)
    assert bounds.against_eager(value, exact, exact, torch.float32)["of_bound"] > 1
    assert bounds.against_eager(value, exact, exact, torch.float32, rounded=[exact, off])["of_bound"] < 1
    assert bounds.against_eager(value + 1e-4, exact, exact, torch.float32, rounded=[off])["of_bound"] > 1
    # eager's own error is doubled where it is the larger one, and nothing is added to it
    assert bounds.against_eager(value + 1e-4, off, exact, torch.float32, rounded=[off])["of_bound"] > 1


def test_simulated_factors_are_off_by_half_a_unit_of_tf32():
    module = torch.nn.Sequential(torch.nn.Linear(400, 300)).double()
    x = torch.randn(200, 400, dtype=torch.float64).requires_grad_()
    first, again, other = (bounds.simulate_factors(module, seed) for seed in (0, 0, 1))
    difference = first(x) - module(x)
    assert torch.equal(first(x), again(x)) is False  # each call draws x's roundings anew, and weights keep theirs
    terms = (x.square() @ module[0].weight.square().mT).sqrt()
    # two factors, each off by an even distribution up to 2^-11
    ratio = (difference / terms).square().mean().sqrt() / (2.0**-11 * (2 / 3) ** 0.5)
    assert 0.95 < ratio < 1.05
    assert not torch.equal(first(x), other(x))
    (g,) = torch.autograd.grad(first(x).sum(), x)
    assert torch.allclose(g, module[0].weight.sum(0).expand_as(g))


def test_against_eager_claims_nothing_beyond_the_range_of_the_type():
    exact = torch.tensor([1.0, 1e6], dtype=torch.float64)
    half = exact.half()
    assert bounds.against_eager(half, half, exact, torch.float16)["of_bound"] <= 1
    assert not bounds.against_eager(torch.tensor([math.nan, 1.0]), half, exact, torch.float16)["of_bound"] <= 1
    assert not bounds.against_eager(half[:1], half, exact, torch.float16)["of_bound"] <= 1


# -- timing


def test_variants_are_interleaved_and_each_is_called_alike():
    order = []
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = timing.interleaved(variants, CPU, seconds=0.0, rounds=(4, 4), block_ms=0.0)
    measured = order[9:]  # three calls of each come first
    assert measured == list("abcbcacababc")
    assert all(len(t.samples) == 4 and t.ms >= 0 for t in timings.values())


def test_peak_memory_sees_what_a_call_allocates():
    job = "import torch; from fused_inr.bench import timing; call = lambda: torch.ones(1 << 24).sum(); "
    job += "print(timing.peak_memory(call, lambda: None, torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True, check=True)
    assert 60 <= float(done.stdout) < 100


# -- reports


def test_results_are_whole_after_each_one(tmp_path):
    path = tmp_path / "r.json"
    results = report.Results(path, {"device": "x"})
    assert json.loads(path.read_text())["results"] == []
    results.append({"ms": float("nan")})
    content = json.loads(path.read_text())
    assert (content["results"], content["finished"]) == ([{"ms": "nan"}], False)
    results.finish()
    assert json.loads(path.read_text())["finished"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_results_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "r.json"):
        with pytest.raises(CliError, match=str(path)):
            report.Results(path, {})


def test_verdicts():
    row = table.Benchmark("r", Case("layer", "training"), {"eager": 2.0, "compile": 1.0}, {"eager": 1.5}, memory=0.5)
    result = {"ratios": {"eager": 1.9, "compile": 1.2}, "peak_mib": {"fused": 10.0, "eager": 21.0}}
    assert [v["met"] for v in table.verdicts(row, result, warmed=False)] == [False, True, True]
    assert [v["met"] for v in table.verdicts(row, result, warmed=True)] == [True, True]
    assert table.verdicts(row, {"ratios": {}}, warmed=False) == []


def test_torch_compile_is_judged_by_the_better_of_its_modes():
    assert table.compiled({"compile": 1.5, "max-autotune": 1.2, "eager": 1.0}) == 1.2
    assert table.compiled({"eager": 1.0}) is None
    assert "pixels" in table.NAMES and "pixels" not in table.DEFAULT
    row = table.Benchmark("r", Case("network", "training"), {"compile": 1.4})
    result = {"ratios": {"compile": 1.5, "max-autotune": 1.2}}
    assert [v["met"] for v in table.verdicts(row, result, warmed=False)] == [False]


def test_numbers_for_people():
    shown = [report.number(v) for v in (None, 0.0, 1.2345, 123.456, 1234.5, 0.01234, 1e-7, math.inf)]
    assert shown == ["-", "0", "1.23", "123", "1234", "0.0123", "1.00e-07", "inf"]


def test_a_bar_chart_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    groups = {"training": {"fused": 1.0, "eager": 2.0}, "eikonal": {"fused": 3.0}}
    report.bar_chart(tmp_path / "bars.png", "title", groups, "ms")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CliError, match=r"--figure .*bars\.xyz"):
        report.bar_chart(tmp_path / "bars.xyz", "title", groups, "ms")


# -- the commands


def test_a_worker_that_fails_gives_one_line():
    job = {"job": "time", "device": "cpu", "case": asdict(Case("layer", "inference")) | {"kind": "net"}, "variants": []}
    assert worker.run(job)["error"].startswith("ValueError: kind: 'net'")


def test_the_table_in_quick_form(tmp_path):
    path, figure = tmp_path / "t.json", tmp_path / "t.svg"
    pytest.importorskip("matplotlib")
    done = fused_inr(
        "bench",
        "table",
        "--quick",
        "--json",
        str(path),
        "--figure",
        str(figure),
        "--only",
        "training,split,import,psnr,pixels",
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert content["finished"]
    assert [r["name"] for r in content["results"]] == ["training", "split", "import", "psnr", "pixels"]
    training, split, imported, fit, picture = content["results"]
    for result in (training, split):
        assert {"fused", "eager"} <= set(result["timings"]) <= {"fused", "eager", "floor"}
        assert set(result["peak_mib"]) == {"fused", "eager"}
        assert "verdicts" not in result  # sizes differ from those that demands are about
        assert result["check"]["of_bound"] <= 1
    assert set(imported["seconds"]) == {"import fused_inr", "with all that it names"}
    assert len(fit["fused_less_eager"]["each"]) == 2 and abs(fit["fused_less_eager"]["mean"]) < 0.1
    assert fit["moved_less_eager"]["each"] != fit["fused_less_eager"]["each"]
    assert picture["pixels"] == 64 * 64 and len(picture["s_a_step"]) == 2
    assert picture["loss"][1] < picture["loss"][0]
    assert content["versions"]["torch"] == torch.__version__
    assert {"device", "threads", "command", "time", "backends"} <= set(content)
    for word in ("training", "split", "vs eager", "torch"):
        assert word in done.stdout
    assert figure.read_text().lstrip().startswith("<?xml")


_ALLOCATE = """
import ctypes
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
glibc = ctypes.CDLL(None)
glibc.malloc.restype, glibc.malloc.argtypes, glibc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
glibc.mallinfo2.restype = Info
before = glibc.mallinfo2()
block = glibc.malloc(64 << 20)
during = glibc.mallinfo2()
glibc.free(block)
after = glibc.mallinfo2()
print(during.hblks - before.hblks, after.arena - before.arena >= 64 << 20)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="a setting of glibc")
@pytest.mark.parametrize(("warmed", "says"), [(False, "1 False"), (True, "0 True")])
def test_the_warmed_allocator_keeps_large_blocks(warmed, says):
    """As started, glibc maps a large block for itself and gives it back; warmed, it is of the heap and stays there."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("this glibc does not tell (2.33 and later do)")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    environment |= timing.WARMED_ALLOCATOR if warmed else {}
    done = subprocess.run(
        [sys.executable, "-c", _ALLOCATE], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == says


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_rows_are_measured_with_both_allocators(tmp_path, monkeypatch):
    seen = []
    real = children.subprocess.Popen

    def noted(command, **keywords):
        if "fused_inr.bench.worker" in command:
            seen.append({name: keywords["env"].get(name) for name in timing.WARMED_ALLOCATOR})
        return real(command, **keywords)

    monkeypatch.setattr(children.subprocess, "Popen", noted)
    path = tmp_path / "t.json"
    arguments = [
        "--quick",
        "--only",
        "inference",
        "--warmed",
        "--no-memory",
        "--no-compile",
        "--rows",
        "256",
        "--width",
        "16",
    ]
    assert not table.main([*arguments, "--json", str(path)])
    plain, warmed = json.loads(path.read_text())["results"]
    assert (plain["warmed"], warmed["warmed"]) == (False, True)
    assert all(r["timings"]["eager"]["page_faults"] >= 0 for r in (plain, warmed))
    assert seen[-1] == timing.WARMED_ALLOCATOR and seen[0] != timing.WARMED_ALLOCATOR


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table", "--only", "nothing"], "--only"),
        (["table", "--rows", "0"], "--rows"),
        (["table", "--seconds", "-1"], "--seconds"),
        (["table", "--device", "nowhere"], "--device"),
        (["table", "--warmed", "--device", "meta"], "--warmed"),
        (["table", "--json", "/missing/folder/t.json"], "/missing/folder"),
        (["gpu", "--device", "nowhere"], "--device"),
        (["gpu", "--device", "meta"], "--device"),
        (["gpu", "--device", "cpu", "--budget", "0"], "--budget"),
        (["gpu", "--device", "cpu", "--out", "/missing/folder/results"], "/missing/folder"),
        (["gpu", "--device", "cpu", "--parts", "deciding,nothing"], "--parts"),
        (["gpu", "--device", "cpu", "--parts", "autotune"], "nothing to measure"),
    ],
)
def test_bad_arguments_get_one_line_and_exit_code_2(arguments, words, capsys):
    module = {"table": table, "gpu": driver}[arguments[0]]
    with contextlib.suppress(CliError):  # the command line turns it into that line
        with pytest.raises(SystemExit) as stopped:
            module.main(arguments[1:])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        return
    with pytest.raises(CliError, match=words):
        module.main(arguments[1:])
