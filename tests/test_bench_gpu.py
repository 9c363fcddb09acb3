"""`fused-inr bench gpu` without a GPU: what it measures, in which order, and what it does when something fails.

A rehearsal on the CPU runs the whole command. No test looks at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from fused_inr.bench import cases, report, roofline
from fused_inr.bench.cases import Case
from fused_inr.bench.gpu import cells as listed
from fused_inr.bench.gpu import checks, driver, measure, summary
from fused_inr.bench.gpu.workers import Pool, Worker

from fused_inr.cli import children

CPU = torch.device("cpu")
SMALL = {"width": 16, "rows": 60, "hidden_layers": 1}


def silent(name: str) -> None:
    """What a worker's functions tell of the variant that they are at, without a driver."""


def fused_inr(*arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fused_inr.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **more)


class OfCuda:
    """A device as the list of cells sees one."""

    type = "cuda"


@pytest.fixture
def properties(monkeypatch):
    """Those of a large GPU, for the list of cells."""
    found = SimpleNamespace(total_memory=int(80e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(checks, "importable", lambda name: True)
    return found


# -- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so():
    done = fused_inr("bench", "gpu")
    assert done.returncode == 2
    assert "--device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_rehearsal_on_a_cpu(tmp_path):
    """From a folder that knows nothing of the package but a path to its checkout."""
    out = tmp_path / "out"
    arguments = [
        "--device",
        "cpu",
        "--budget",
        "100000",
        "--jobs",
        "2",
        "--out",
        str(out),
        "--parts",
        "deciding,moments",
    ]
    command = [*children.python("-m", "fused_inr.bench.gpu"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, cwd=tmp_path, env=children.environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((out / "results.json").read_text())
    assert content["rehearsal"] and content["finished"] and not content["interrupted"]
    ahead, ceilings, *rest = content["results"]
    assert ahead["group"] == "ahead" and ahead["jobs"] == 12 and not ahead["not_compiled"]
    assert ceilings["ceilings"].keys() == {"copy", "ieee", "bf16"}
    measured = {r["cell"] for r in rest if r["group"] != "ahead"}
    expected = {cell["cell"] for _, found in listed.parts(CPU, ["deciding", "moments"]) for cell in found}
    assert measured | {"ceilings"} == expected and not content["not_reached"]
    assert any("one-pass" in r.get("variants", {}) for r in rest)
    assert all("error" not in result for result in content["results"])
    assert not any(result.get("failed") for result in content["results"])
    assert "REHEARSAL" in done.stdout
    log = (out / "log.txt").read_text()
    assert all(r["cell"] in log for r in rest) and "vs eager" in log
    pytest.importorskip("matplotlib")
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_rehearsal_writes_elsewhere_and_results_are_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tmp_path not in driver.default_folder("NVIDIA H200", True).parents
    (tmp_path / "bench" / "results").mkdir(parents=True)
    first = driver.default_folder("NVIDIA H200", False)
    assert first.parent.as_posix() == "bench/results"
    assert first.name.endswith("-nvidia-h200")
    first.mkdir()
    assert driver.default_folder("NVIDIA H200", False).name.endswith("-nvidia-h200-2")


# -- the driver


class ScriptedDriver:
    """A driver with cells of the test's choosing, and what a worker would answer."""

    def __init__(self, tmp_path, monkeypatch, answers, *arguments):
        options = driver.parser().parse_args(["--device", "cpu", "--no-tests", *arguments])
        self.results = report.Results(tmp_path / "results.json", {"device": "a CPU"})
        self.run = driver.Run(self.results, CPU, options, tmp_path)
        chosen = [{"cell": name, "group": "bench", "run": "ceilings"} for name in answers]
        monkeypatch.setattr(self.run, "parts", lambda: [("deciding", chosen)])
        monkeypatch.setattr(self.run, "measure", lambda cell: answers[cell["cell"]]())

    def everything(self):
        self.run.everything()
        return self.results.content["results"]


def test_a_failing_cell_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    found = ScriptedDriver(tmp_path, monkeypatch, {"a": fails, "b": lambda: {"passed": True}})
    found.everything()
    a, b = json.loads((tmp_path / "results.json").read_text())["results"]
    assert a["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert b["passed"]
    assert "FAILED a: RuntimeError" in summary.text(found.results.content)
    assert summary.failed(a) and not summary.failed(b)


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    def stops():
        raise KeyboardInterrupt

    found = ScriptedDriver(tmp_path, monkeypatch, {"a": lambda: {"passed": True}, "b": stops})
    with pytest.raises(KeyboardInterrupt):
        found.everything()
    assert [r["cell"] for r in json.loads((tmp_path / "results.json").read_text())["results"]] == ["a"]


def test_cells_beyond_the_budget_are_named(tmp_path, monkeypatch):
    found = ScriptedDriver(tmp_path, monkeypatch, {"a": lambda: {"passed": True}})
    found.run.options.budget = -1.0
    found.everything()
    assert found.run.not_reached == ["a"]


DIED = {"error": "its process ended with exit code -9", "lost": True}


class Scripted:
    """A worker that answers as the test says: by what the cell's variants are."""

    def __init__(self, answer):
        self._answer, self.now, self.asked = answer, None, []

    def ask(self, cell, limit):
        self.asked.append(cell["variants"])
        answer, self.now = self._answer(cell["variants"])
        return dict(answer)

    def close(self):
        pass


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """What the driver makes of a cell with these variants, and what it asked the workers for."""

    def run(variants, answer):
        options = driver.parser().parse_args(["--device", "cpu"])
        found = driver.Run(report.Results(None, {"device": "a CPU"}), CPU, options, tmp_path)
        worker = Scripted(answer)
        monkeypatch.setattr(found, "new_worker", lambda: worker)
        case = asdict(Case("network", "training", **SMALL))
        return found.measure({"cell": "c", "group": "bench", "case": case, "variants": variants}), worker.asked

    return run


def times(variants):
    each = {name: {"ms": 1.0, "ns_a_row": 2.0} for name in variants}
    return {"variants": each, "failed": {}, "passed": True, "operations": 1}


def test_a_variant_that_takes_the_context_costs_its_own_figure(measured):
    def answer(variants):
        if "one-pass" in variants:
            return {"error": "an illegal address", "lost": True}, "one-pass"
        return times(variants), None

    result, asked = measured(["one-pass", "fused", "eager"], answer)
    assert asked == [["one-pass", "fused", "eager"], ["fused", "eager"]]
    assert set(result["variants"]) == {"fused", "eager"}
    assert result["failed"] == {"one-pass": "an illegal address"}
    assert summary.failed(result)


def test_a_process_that_dies_while_all_are_timed_is_asked_for_the_rivals(measured):
    def answer(variants):
        return (times(variants), None) if variants == ["eager", "compile"] else (DIED, measure.TOGETHER)

    result, asked = measured(["one-pass", "layers graph", "eager", "compile"], answer)
    assert len(asked) == 2
    assert set(result["variants"]) == {"eager", "compile"}
    assert set(result["failed"]) == {"one-pass", "layers graph"}


def test_a_process_that_dies_before_any_variant_ends_the_cell(measured):
    result, asked = measured(["fused", "eager"], lambda variants: (DIED, "the reference in float64"))
    assert len(asked) == 1
    assert "the reference in float64" in result["error"]
    result, asked = measured(["fused"], lambda variants: (DIED, "fused"))  # nothing would be left to measure
    assert len(asked) == 1
    assert "error" in result


def test_a_second_loss_in_a_cell_is_survived_too(measured):
    def answer(variants):
        bad = [name for name in variants if name in ("one-pass", "fused")]
        return (DIED, bad[0]) if bad else (times(variants), None)

    result, asked = measured(["one-pass", "fused", "eager"], answer)
    assert [len(variants) for variants in asked] == [3, 2, 1]
    assert set(result["failed"]) == {"one-pass", "fused"}


def test_parts_that_were_asked_for(tmp_path):
    def names(*arguments):
        options = driver.parser().parse_args(["--device", "cpu", *arguments])
        run = driver.Run(report.Results(None, {}), CPU, options, tmp_path)
        return [name for name, _ in run.parts()]

    assert names()[0] == "deciding" and "tests" not in names() and "product" not in names()
    assert "tests" in names("--tests") and names("--parts", "moments", "--tests") == ["tests", "moments"]
    assert names("--parts", "moments,deciding") == ["moments", "deciding"]
    assert set(names()) < set(names("--full"))
    assert names("--only", "eikonal") == ["eikonal"]


class Answers:
    """Workers of a GPU that is not there: they answer what such a job is answered with."""

    asked: ClassVar[list[dict]] = []
    now = None

    def __init__(self, **environment):
        pass

    def ask(self, job, limit):
        self.asked.append(job)
        if job["run"] == "ahead":
            return {"error": "too slow"} if job["variant"] == "max-autotune" else {"compiled": True}
        if job["run"] == "ceilings":
            return {"ceilings": {"copy": 3000.0, "bf16": 800.0}}
        if job["run"] == "bench":
            return times(job["variants"]) | {"work": job["cell"], "checks": {}, "precision": "bf16"}
        if job["run"] == "accuracy":
            return {"orders": {}, "of_bound": 0.5, "passed": True}
        if job["run"] == "moments":
            return {"moments": {"triton": {"ms": 1.0, "ps_per_draw": 2.0}}, "passed": True}
        return {"worst": {"all": {"ulp": 1.5}}}

    def close(self):
        pass


def test_every_part_of_a_gpus_run(properties, tmp_path, monkeypatch):
    """The driver's own way through all parts but the product, with workers and tools that answer at once."""
    order = []
    monkeypatch.setattr(driver, "Worker", None)
    monkeypatch.setattr(driver.Run, "new_worker", lambda self, **environment: Answers(**environment))
    monkeypatch.setattr(Answers, "asked", [])

    def build(self):
        order.append("build")
        return subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)

    def tool(name, result):
        def run(*arguments):
            order.append(name)
            return result

        return run

    monkeypatch.setattr(driver.Run, "start_build", build)
    watched = {"watched": ["a"], "reports": 0, "passed": True}
    monkeypatch.setattr(checks, "run_tests", tool("tests", {"outcomes": {"passed": 3}, "passed": True}))
    monkeypatch.setattr(checks, "sanitize", tool("sanitizer", watched))
    monkeypatch.setattr(checks, "profile", tool("ncu", {"profile": [{}], "passed": True}))
    names = [name for name in listed.PARTS if name != "product"]
    options = driver.parser().parse_args(["--budget", "10000", "--parts", ",".join(names)])
    results = report.Results(tmp_path / "results.json", {"device": "NVIDIA H100 80GB HBM3"})
    run = driver.Run(results, OfCuda(), options, tmp_path)
    run.everything()
    run.close()
    found = results.content["results"]
    assert not run.not_reached and not any(summary.failed(r) for r in found if r["group"] != "ahead")
    assert [r["cell"] for r in found if r["group"] == "ahead"][:3] == [
        f"compiling ahead: {name}" for name in ("deciding", "autotune", "layers")
    ]
    assert order == ["build", "tests", *["sanitizer"] * 4, "ncu"]
    deciding = next(r for r in found if r.get("variants"))
    assert deciding["bound"] in ("products", "special") and 0 < deciding["variants"]["one-pass"]["of_floor"]
    skipped = [r for r in found if "skipped" in r]  # what is too slow to compile is not waited for again
    assert len(skipped) == 6 and all("max-autotune" in r["cell"] and "too slow" in r["skipped"] for r in skipped)
    measured = [job["cell"] for job in Answers.asked if job["run"] != "ahead"]
    assert len(measured) == len(set(measured)) > 150
    text = summary.text(results.content)
    assert "vs eager" in text and "3 passed" in text and "4 cases" not in text
    assert all(r["cell"] in (tmp_path / "log.txt").read_text() for r in found)


# -- workers


def test_a_worker_that_dies_is_an_answer_and_not_a_crash(tmp_path):
    log = tmp_path / "workers.txt"
    started = Worker(CPU, log)
    try:
        started._process.kill()
        answer = started.ask({"run": "ceilings", "precisions": [], "small": True}, limit=60)
        assert answer == {"error": "its process ended with exit code -9", "lost": True}
    finally:
        started.close()
    slow = Worker(CPU)
    try:
        answer = slow.ask({"run": "ceilings", "precisions": [], "small": True}, limit=0.01)
        assert answer["lost"] and answer["error"].startswith("not done within")
    finally:
        slow.close()


def test_a_worker_says_where_it_is_and_what_went_wrong(tmp_path):
    log = tmp_path / "workers.txt"
    worker = Worker(CPU, log)
    try:
        case = asdict(Case("network", "inference", **SMALL))
        job = {"run": "bench", "case": case, "variants": ["fused", "eager", "nonsense"], "seconds": 0.0}
        answer = worker.ask(job, limit=300)
        assert worker.now == measure.TOGETHER
        assert set(answer["variants"]) == {"fused", "eager"}
        assert set(answer["failed"]) == {"nonsense"} and answer["passed"]  # a rival's failure is not ours
        assert worker.ask({"run": "nothing"}, limit=60)["error"] == "KeyError: 'nothing'"
    finally:
        worker.close()
    assert "KeyError" in log.read_text()


def test_a_pool_does_every_job_and_outlives_one_that_dies():
    class Fake:
        def __init__(self):
            self.dead = False

        def ask(self, job, limit):
            assert not self.dead
            return {"error": "it last said: so long", "lost": True} if job["dies"] else {"done": job["name"]}

        def close(self):
            self.dead = True

    made = []

    def make():
        made.append(Fake())
        return made[-1]

    pool = Pool(make)
    jobs = [{"name": i, "dies": i == 2} for i in range(6)]
    answers = pool.run(jobs, 2, limit=60)
    assert [a.get("done") for a in answers] == [0, 1, None, 3, 4, 5]
    assert "so long" in answers[2]["error"]
    before = len(made)
    assert [a["done"] for a in pool.run(jobs[3:], 2, limit=60)] == [3, 4, 5]
    assert len(made) == before  # those that live are used again
    assert all("not done" in a["error"] for a in pool.run(jobs, 2, limit=0.0))
    pool.close()
    assert all(worker.dead for worker in made)


# -- what is measured


def test_the_cells_of_a_device_have_different_names(properties):
    for device in (CPU, OfCuda()):
        found = [cell["cell"] for _, cells in listed.parts(device, listed.PARTS) for cell in cells]
        assert len(set(found)) == len(found)
        assert found[0] == "ceilings"


def test_what_decides_comes_first(properties):
    """One pass, training, recomputed and inference at 64, 128 and 256 in bf16, each against its rivals."""
    ((_, (ceilings, *deciding)),) = listed.parts(OfCuda(), ["deciding"])
    assert ceilings["group"] == "ceilings"
    found = [Case(**cell["case"]) for cell in deciding]
    assert [(c.width, c.step) for c in found] == [(w, s) for w in (64, 128, 256) for s in ("training", "inference")]
    assert {c.precision for c in found} == {"bf16"} and {c.rows for c in found} == {1 << 20}
    for cell in deciding:
        assert {"fused", "layers", "eager", "compile"} <= set(cell["variants"])
        training = cell["case"]["step"] == "training"
        assert ({"one-pass", "recompute"} <= set(cell["variants"])) == training
    ((_, tuned),) = listed.parts(OfCuda(), ["autotune"])
    assert {(c["case"]["width"], c["case"]["step"]) for c in tuned} == {(c.width, c.step) for c in found}
    assert all("max-autotune" in cell["variants"] for cell in tuned)


def test_the_cells_of_a_gpu_cover_what_was_asked(properties):
    usual = [name for name in listed.PARTS if name not in listed.ON_REQUEST]
    few = [cell for _, cells in listed.parts(OfCuda(), usual) for cell in cells]
    every = [cell for _, cells in listed.parts(OfCuda(), listed.PARTS) for cell in cells]
    assert len(few) < 250 < 1000 < len(every)
    names = {v for cell in few if "variants" in cell for v in cell["variants"]}
    assert {"compile", "max-autotune", "layers", "one-pass", "recompute", "tcnn", "cuda", "fused bf16x3"} <= names
    assert {"fused graph", "one-pass graph", "eager graph", "compile graph", "layers graph"} <= names
    moments = {(cell["settings"], cell["samples"]) for cell in few if cell["group"] == "moments"}
    assert moments == {(1, 1_000_000), (10_000, 1_000_000)}
    cases_ = [Case(**cell["case"]) for cell in every if cell["group"] == "bench"]
    assert {c.width for c in cases_} >= {32, 64, 128, 256, 512, 1024}
    assert {c.rows for c in cases_} >= {1 << 14, 1 << 17, 1 << 20, 1 << 21}
    assert {c.activation for c in cases_} >= {"sine", "gaussian", "sinc", "split", "relu"}
    assert {c.precision for c in cases_} == {"ieee", "tf32", "bf16", "fp16"}
    assert {(c.kind, c.step) for c in cases_} == {(k, s) for k in ("layer", "network") for s in cases.STEPS}
    for cell in every:
        if cell["group"] == "bench" and cell["case"]["step"] == "eikonal":
            assert not any(v.startswith(("compile", "max-autotune", "tcnn")) for v in cell["variants"]), cell["cell"]
        if cell["group"] == "bench" and cell["case"]["kind"] == "layer":
            assert not {"layers", "one-pass", "tcnn"} & set(cell["variants"]), cell["cell"]
        if "cuda" in cell.get("variants", cell.get("backends", ())):
            assert cell["needs"] == "cuda", cell["cell"]  # so that its library is waited for
    assert [cell["tool"] for cell in every if cell["group"] == "sanitizer"] == list(checks.TOOLS)
    # what would not fit is left out
    properties.total_memory = int(24e9)
    assert len([cell for _, cells in listed.parts(OfCuda(), listed.PARTS) for cell in cells]) < len(every)


def test_what_is_compiled_ahead(properties):
    """Each variant that compiles, once; nothing that does not; moments with few draws."""
    ((_, deciding),) = listed.parts(OfCuda(), ["deciding"])
    jobs = measure.ahead_jobs(deciding)
    variants = [job["variant"] for job in jobs]
    assert len(jobs) == 3 * (5 + 3) and "eager" not in variants
    assert measure.ahead_jobs([*deciding, *deciding]) == jobs
    ((_, small),) = listed.parts(OfCuda(), ["small"])
    assert not any(job["variant"].endswith("graph") for job in measure.ahead_jobs(small))
    ((_, moments),) = listed.parts(OfCuda(), ["moments"])
    jobs = measure.ahead_jobs(moments)
    assert [job["of"]["activation"] for job in jobs] == ["gaussian", "sine", "split"]
    assert all(job["of"]["samples"] <= 1 << 13 for job in jobs)
    ((_, watched),) = listed.parts(OfCuda(), ["sanitizer"])
    jobs = measure.ahead_jobs(watched)
    assert [job["of"]["case"] for job in jobs] == [name for name in checks.small_cases(True) if " cuda " not in name]


def test_a_job_of_compiling_ahead_runs():
    for part in ("deciding", "accuracy", "moments", "eikonal"):
        ((_, cells),) = listed.parts(CPU, [part])
        for job in measure.ahead_jobs(cells)[:2]:
            assert measure.RUNS["ahead"](job, CPU, silent) == {"compiled": True}
    job = {"run": "ahead", "of": {"run": "small", "case": checks.small_cases(False)[0]}, "variant": ""}
    assert measure.RUNS["ahead"](job, CPU, silent) == {"compiled": True}


def test_compiling_ahead_takes_few_rows(monkeypatch):
    seen = []

    class RecordedSteps(measure.Steps):
        def __init__(self, case, device):
            seen.append(case.rows)
            super().__init__(case, device)

    monkeypatch.setattr(measure, "Steps", RecordedSteps)
    case = asdict(Case("network", "training", **(SMALL | {"rows": 5000})))
    cell = {"run": "bench", "cell": "c", "case": case, "variants": ["fused"]}
    (job,) = measure.ahead_jobs([cell])
    measure.RUNS["ahead"](job, CPU, silent)
    assert seen == [measure.AHEAD_ROWS["cpu"]]


# -- measuring a cell


def test_a_network_is_timed_in_every_way():
    case = asdict(Case("network", "training", **SMALL))
    told = []
    variants = ["fused", "eager", "layers", "one-pass", "recompute", "tcnn"]
    result = measure.RUNS["bench"]({"case": case, "variants": variants, "seconds": 0.1}, CPU, told.append)
    ours = {"fused", "layers", "one-pass", "recompute"}
    assert set(result["variants"]) == ours | {"eager"}
    assert all(v["ms"] > 0 and v["peak_mib"] >= 0 and v["ns_a_row"] > 0 for v in result["variants"].values())
    assert set(result["checks"]) == ours
    assert all(check["passed"] and check["of_bound"] <= 1 for check in result["checks"].values())
    assert "loss" not in result["checks"]["fused"]["tensors"] and "output" in result["checks"]["fused"]["tensors"]
    assert set(result["failed"]) == {"tcnn"}  # not installed, and no reason to fail
    assert result["passed"]
    assert told == ["the reference in float64", *variants, measure.TOGETHER]


def test_a_gate_that_fails_is_recorded_and_the_times_are_still_taken(monkeypatch):
    outcome = cases.Workload.outcome

    def wrong(self, variant):
        found = outcome(self, variant)
        if variant == "fused" and self.case.way == "one-pass":
            found["gradient of parameter 0"] *= 1.01
        return found

    monkeypatch.setattr(cases.Workload, "outcome", wrong)
    case = asdict(Case("network", "training", **SMALL))
    cell = {"case": case, "variants": ["one-pass", "fused", "eager"], "seconds": 0.0}
    result = measure.RUNS["bench"](cell, CPU, silent)
    assert set(result["variants"]) == {"one-pass", "fused", "eager"}
    gates = {name: check["passed"] for name, check in result["checks"].items()}
    assert gates == {"one-pass": False, "fused": True}
    assert not result["passed"] and summary.failed(result)
    assert "WRONG: one-pass" in summary.brief(result)
    content = {"results": [{"cell": "c", "group": "bench", **result}]}
    assert "1 beyond the bound" in summary.text(content) and "beyond: c: one-pass" in summary.text(content)


def test_a_variant_of_ours_that_raises_costs_its_own_figure(monkeypatch):
    call = measure.Steps.call

    def raises(self, variant):
        if variant == "fused":
            raise RuntimeError("no configuration")
        return call(self, variant)

    monkeypatch.setattr(measure.Steps, "call", raises)
    case = asdict(Case("network", "training", **SMALL))
    cell = {"case": case, "variants": ["fused", "one-pass", "eager"], "seconds": 0.0}
    result = measure.RUNS["bench"](cell, CPU, silent)
    assert set(result["variants"]) == {"one-pass", "eager"}
    assert result["failed"] == {"fused": "RuntimeError: no configuration"} and not result["passed"]


def test_products_of_split_factors_are_held_to_eager_in_tf32():
    """On a CPU products are float32 whatever is asked for, so that their gate passes; what it is held to is seen."""
    case = asdict(Case("network", "training", **SMALL))
    steps = measure.Steps(Case(**case), CPU)
    exact = steps.work.exact()
    seen = []
    outcome = cases.Workload.outcome

    def record(self, variant):
        seen.append((self.case.precision, variant))
        return outcome(self, variant)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases.Workload, "outcome", record)
        result = steps.errors("fused bf16x3", exact)
    assert result["passed"] and seen == [("tf32", "eager"), ("tf32", "fused")]


def test_training_in_fp16_has_no_gate():
    case = asdict(Case("network", "training", **SMALL, precision="fp16"))
    result = measure.RUNS["bench"]({"case": case, "variants": ["fused", "eager"], "seconds": 0.0}, CPU, silent)
    assert set(result["variants"]) == {"fused", "eager"} and not result["checks"]
    assert "loss scale" in result["unchecked"] and result["passed"]


def test_without_a_reference_there_are_times_and_no_gates(monkeypatch):
    def no_memory(self, rows_at_once):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(cases.Workload, "exact", no_memory)
    case = asdict(Case("layer", "training", **SMALL))
    result = measure.RUNS["bench"]({"case": case, "variants": ["fused", "eager"], "seconds": 0.0}, CPU, silent)
    assert set(result["variants"]) == {"fused", "eager"}
    assert not result["checks"] and "too much" in result["unchecked"]


def test_a_cell_of_moments():
    """Against the reference first, then timed; beside the expression at one sigma only."""
    for settings, names in ((1, {"cpu", "eager"}), (20, {"cpu"})):
        cell = {"cell": "m", "activation": "split", "settings": settings, "samples": 5000, "backends": ["cpu"]}
        result = measure.RUNS["moments"](cell, CPU, silent)
        assert not result["failed"] and set(result["moments"]) == names
        assert result["moments"]["cpu"]["error"] < 1e-4
        assert result["moments"]["cpu"]["ps_per_draw"] > 0
        assert "ps a draw" in summary.brief({"group": "moments", **result})


def test_an_error_of_moments_is_seen():
    expected = torch.rand(2, 3, 2, 3, dtype=torch.float64) * 4096
    assert checks.moments_error(expected, expected) == 0
    for k in range(3):
        wrong = expected.clone()
        wrong[1, 2, 1, k] += 100
        assert checks.moments_error(wrong, expected) > 1e-3
    assert not checks.moments_error(expected * float("nan"), expected) <= 1


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", "bf16x3", "bf16"])
def test_the_accuracy_of_a_layer_is_that_of_the_products_asked_for(precision, monkeypatch):
    from fused_inr import backends, functional

    seen, run = set(), functional.linear_act

    def record(*args):
        seen.add(backends.precision_of(OfCuda(), torch.float32))
        return run(*args)

    monkeypatch.setattr(functional, "linear_act", record)
    assert checks.layer_accuracy("sine", precision, CPU, 40, 17, 12)["passed"]
    assert seen == {"ieee" if precision == "bf16" else precision}
    assert backends.precision_of(OfCuda(), torch.float32) == "ieee"


# -- floors


def test_floors_of_a_network():
    """Against counts by hand: a network of 2-64-64-64-64-3 in bf16 on an H100."""
    case = Case("network", "training", width=64, rows=1000, precision="bf16")
    device = roofline.named("NVIDIA H100 80GB HBM3")
    floors = roofline.case_floors(case, device, {"copy": 3000.0, "bf16": 800.0})
    assert floors["memory"] == pytest.approx((2 + 3) * 2 / 3000.0)
    products = 2 * (2 * 2 * 64 + 3 * (3 * 64 * 64 + 64 * 3))
    assert floors["products"] == pytest.approx(products / 800e3)
    assert floors["special"] == pytest.approx(4 * 64 * 2 / (132 * 16 * 1.98))  # sine and cosine
    inference = roofline.case_floors(Case("network", "inference", width=64, precision="bf16"), device, {})
    assert inference["special"] == pytest.approx(floors["special"] / 2)
    assert inference["products"] == pytest.approx(2 * (2 * 64 + 3 * 64 * 64 + 64 * 3) / 989e3)
    layer = roofline.case_floors(Case("layer", "inference", width=64, rows=50, in_features=8), None, {"copy": 1000.0})
    assert layer == {"memory": pytest.approx((8 + 64 + (8 * 64 + 64) / 50) * 4 / 1000.0)}


def test_special_functions_of_a_map():
    counts = {name: roofline.special_functions(name, True) for name in ("sine", "relu", "gaussian", "incode", "split")}
    assert counts == {"sine": 2, "relu": 0, "gaussian": 1, "incode": 2, "split": 7}
    assert roofline.special_functions("sine", False) == 1
    assert roofline.named("some other device") is None


def test_every_variant_has_its_share_of_the_floor(tmp_path):
    options = driver.parser().parse_args(["--device", "cpu"])
    run = driver.Run(report.Results(None, {"device": "a CPU"}), CPU, options, tmp_path)
    run.ceilings = {"copy": 4000.0, "bf16": 750.0}
    case = Case("network", "training", width=64, rows=1 << 20, precision="bf16")
    answer = {"operations": case.operations(), "variants": {"fused": {"ms": 1.0, "ns_a_row": 1e6 / case.rows}}}
    run.compare({"case": asdict(case)}, answer)
    fused = answer["variants"]["fused"]
    assert answer["bound"] == "products" and set(answer["floors_ns"]) == {"memory", "products"}
    assert fused["tflops"] == pytest.approx(case.operations() * 1e-9)
    assert fused["of_floor"] == fused["of_rate"] == pytest.approx(fused["tflops"] / 750.0)


# -- sanitizer and profiles


def test_the_sanitized_cases_are_right(capsys):
    assert checks.run_small_cases(CPU) == 0
    printed = capsys.readouterr().out
    assert printed.count("case ") == len(checks.small_cases(False))
    cuda = checks.small_cases(True)
    for width in (32, 64, 128):
        assert {f"network {width} bf16 {way}" for way in ("one-pass", "default", "recompute")} <= set(cuda)
    assert {name.split()[1] for name in cuda if name.startswith("layer")} == {"triton", "cuda"}


RACE = "========= Error: Race reported between Write access at train_kernel+0x1c0 and Read access at .."
INVALID = "========= Invalid __global__ read of size 4 bytes"
CLEAN = ["========= COMPUTE-SANITIZER", "case a", "case b", "========= ERROR SUMMARY: 0 errors"]


@pytest.mark.parametrize(
    ("lines", "stopped", "code", "passed", "watched"),
    [
        (CLEAN, False, 0, True, ["a", "b"]),
        (CLEAN[:3], True, -9, True, ["a"]),  # the last case may not be through
        ([*CLEAN[:2], RACE], True, -9, False, []),
        ([*CLEAN[:3], INVALID], False, 9, False, ["a", "b"]),
        (["WRONG: a: 3 of its bound", *CLEAN], False, 1, False, ["a", "b"]),
        (["========= Error: Target application terminated"], False, 1, False, []),
        ([], False, 0, False, []),
    ],
)
def test_what_the_sanitizer_says(lines, stopped, code, passed, watched):
    found = checks.sanitizer_verdict(lines, stopped, code, 10.0)
    assert (found["passed"], found["watched"]) == (passed, watched)


def test_tools_that_are_not_installed_are_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert "not installed" in checks.sanitize("memcheck", CPU, 1.0)["skipped"]
    assert "not installed" in checks.profile(CPU, 1.0, tmp_path / "ncu.csv")["skipped"]


#: Tools that do what the real ones' command line says, as far as the program depends on it: they run what stands behind
#: their options, and say what such a tool says.
SANITIZER = """#!/bin/sh
while [ "$1" != "$PYTHON" ]; do [ "$1" = --tool ] && tool=$2; shift; done
"$@" || exit 1
[ "$tool" = racecheck ] && { echo "========= Error: Race reported"; exit 9; }
echo "========= ERROR SUMMARY: 0 errors"
"""
NCU = """#!/bin/sh
[ "$1" = --query-metrics ] && { echo "gpu__time_duration  Counter  ns"; exit; }
while [ "$1" != "$PYTHON" ]; do
    [ "$1" = --log-file ] && table=$2
    [ "$1" = --metrics ] && metrics=$2
    shift
done
"$@" || exit 1
head='"ID","Kernel Name"'; row='"0","train_kernel"'
for name in $(echo "$metrics" | tr , ' '); do head="$head,\\"$name\\""; row="$row,\\"1\\""; done
printf '%s\\n"",""\\n%s\\n' "$head" "$row" > "$table"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")
def test_a_rehearsal_of_the_tools(tmp_path, monkeypatch):
    """The command with sanitizer and ncu, from argument to verdict."""
    for name, script in (("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr(checks, "TOOLS", ("memcheck", "racecheck"))
    out = tmp_path / "out"
    assert driver.main(["--device", "cpu", "--jobs", "2", "--out", str(out), "--parts", "sanitizer,ncu"]) == 1
    content = json.loads((out / "results.json").read_text())
    found = {r["cell"]: r for r in content["results"]}
    assert {name for name, r in found.items() if r.get("passed") is False} == {"compute-sanitizer racecheck"}
    memcheck = found["compute-sanitizer memcheck"]
    assert len(memcheck["watched"]) == len(checks.small_cases(False)) and memcheck["reports"] == 0
    assert found["compute-sanitizer racecheck"]["reports"] == 1
    profile = found["ncu"]
    assert profile["metrics"][0] == "gpu__time_duration.sum" and len(profile["metrics"]) < len(checks.METRICS)
    assert profile["profile"] == [{"Kernel Name": "train_kernel", **dict.fromkeys(profile["metrics"], "1")}]
    assert "case network 64" in (out / "sanitizer.txt").read_text() and (out / "ncu.csv").is_file()


def test_metrics_that_ncu_does_not_know_are_left_out():
    listed_ = "Device NVIDIA H100 (GH100)\n---\ngpu__time_duration   Counter  ns  text\nsm__throughput  Throughput  %\n"
    known = checks.known_metrics(checks.METRICS, listed_)
    assert [m for m in known if not m.startswith("launch__")] == [
        "gpu__time_duration.sum",
        "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    ]
    assert checks.known_metrics(checks.METRICS, "") == list(checks.METRICS)


def test_the_table_that_ncu_writes():
    text = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","","ns","register/thread"
"0","7","train_kernel","1,234","255"
"1","7","forward_kernel","567","128"
"""
    found = checks.profiled_launches(text)
    assert [launch["Kernel Name"] for launch in found] == ["train_kernel", "forward_kernel"]
    assert found[0]["gpu__time_duration.sum"] == "1,234" and "Process ID" not in found[0]
    assert checks.profiled_launches("==ERROR== nothing") == []


def test_a_command_with_a_limit(tmp_path):
    log = tmp_path / "log.txt"
    lines, stopped, code = checks._run_with_limit(children.python("-c", "print('said')"), 60.0, log)
    assert (lines, stopped, code) == (["said"], False, 0) and "said" in log.read_text()
    endless = "import time; print('begun', flush=True); time.sleep(600)"
    for limit in (3.0, 30.0, 300.0):  # a busy machine may take longer to begin
        lines, stopped, code = checks._run_with_limit(children.python("-c", endless), limit, log)
        assert stopped and code != 0
        if begun := "begun" in log.read_text():
            break
    assert begun


# -- the figure


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.png"
    cell = {"work": "w", "group": "bench", "variants": {"fused": {"ms": 2.0}, "eager": {"ms": 5.0}}}
    alone = {"work": "rivals alone", "group": "bench", "variants": {"eager": {"ms": 5.0}}}
    content = {"results": [cell, alone, {"cell": "ceilings", "group": "ceilings"}], "device": "d"}
    assert summary.draw(path, content)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not summary.draw(tmp_path / "none.png", {"results": []})
