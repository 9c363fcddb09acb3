"""`fused-inr reproduce` at tiny sizes: figures, files, going on where a run stopped, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

import fused_inr as fi  # noqa: E402
from fused_inr.cli import CliError  # noqa: E402
from fused_inr.cli.main import main  # noqa: E402
from fused_inr.cli.reproduce import REPRODUCTIONS, audio, fitting, image, record, siren, split, toy  # noqa: E402
from fused_inr.cli.reproduce.fitting import cameraman, fit, recording  # noqa: E402
from fused_inr.init import tune_sigma_p  # noqa: E402


@pytest.fixture
def picture(tmp_path):
    y, x = np.mgrid[0:20, 0:24]
    pixels = np.stack([8 * x % 256, 10 * y, 255 * ((x // 8 + y // 8) % 2)], -1).astype(np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def sound(tmp_path):
    wavfile = pytest.importorskip("scipy.io.wavfile")
    t = np.arange(2000) / 8000
    path = tmp_path / "sound.wav"
    wavfile.write(path, 8000, (0.3 * np.sin(2 * np.pi * 440 * t)).astype(np.float32))
    return str(path)


def computed(experiment):
    cells = {name: record.plain(cell()) for name, cell in experiment.cells.items()}
    json.dumps(cells, allow_nan=False)
    for rows in experiment.tables(cells).values():
        assert len({len(row) for row in rows}) == 1
        assert all(isinstance(c, str) for row in rows for c in row)
    assert record._figure(experiment, cells)[:8] == b"\x89PNG\r\n\x1a\n"
    return cells


# -- the toy


def test_errors_are_the_definition():
    """E_f and E_b of two layers against autograd and the formula in MATH.md's words."""
    activation, sigma, gain, width, batch = fi.activations.tanh(), 0.5, 1.2, 40, 30
    weights = toy.matrices("uniform", width, 2, 3)
    e_f, e_b = toy.errors(activation, sigma, gain, weights, batch, 7)
    rng = torch.Generator().manual_seed(7)
    z = (torch.randn(batch, width, generator=rng) * sigma).requires_grad_()
    last = z
    for w in weights:
        last = torch.tanh(last) @ (gain * w).T
    (slope,) = torch.autograd.grad((last * torch.randn(batch, width, generator=rng)).sum(), z)
    for got, values, wanted in ((e_f, last.detach(), sigma**2), (e_b, slope, 1.0)):
        v = values.var(1)
        assert got == pytest.approx(100 * ((v - wanted).abs() / (v + wanted)).mean().item(), rel=1e-5)


def test_rows_pass_in_blocks(monkeypatch):
    weights = toy.matrices("normal", 16, 3, 0)
    relu = fi.activations.relu()
    monkeypatch.setattr(toy, "_BLOCK", 7)
    parts = toy.errors(relu, 1.0, 2**0.5, weights, 14, 0)
    assert all(0 < e < 100 for e in parts)
    # what overflows counts as 100
    assert toy.errors(relu, 1.0, 1e30, weights, 14, 0) == (100.0, 100.0)


def test_toy_of_moderate_size():
    """At the solved sigma_p, 12 layers of 256: variance survives; without a gain, tanh's dies."""
    experiment = toy.experiment(toy.ToyOptions(width=256, depth=12, batch=32, samples=50_000), [0])
    cells = computed(experiment)
    assert set(cells) == {"uniform 0", "normal 0", "orthogonal 0"}
    published = cells["uniform 0"]
    assert published["tanh, Xavier"]["E_f"] > 80
    assert published["sigmoid, VI3NR"]["E_b"] > 99
    gaussian = next(row.label for row in toy.solved_rows() if row.activation.startswith("gaussian"))
    # The gaussian has a mean, so that all rows share one draw of v, of relative standard deviation
    # sqrt((2 + var(f^2) / E[f^2]^2) / n) = 0.104 (E[f^4] = (1 + 4r)^(-1/2), r = 1 + sqrt 2); E_f is half of that.
    for distribution in toy.DISTRIBUTIONS:
        assert cells[f"{distribution} 0"][gaussian]["E_f"] < 5 * 100 * 0.104 / 2
        assert cells[f"{distribution} 0"][gaussian]["gain2"] == pytest.approx(0.01457, rel=0.02)


# -- the fits


def test_sine_spreads_are_those_of_the_thesis():
    """Table 3.3: 14.14 and 18.99 in the first layer, 1.46 to 1.51 and 2.79 to 2.81 after it."""
    x = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for pair, first, low, high in (("published (1, 6)", 14.14, 1.46, 1.51), ("tuned (2, 40)", 18.99, 2.79, 2.81)):
        layers = siren.sine_spreads(pair, x, 256, 3, 0)
        assert len(layers) == 4
        assert layers[0]["z"] == pytest.approx(first, rel=0.08)  # the width leaves some percent
        for layer in layers[1:]:
            assert 0.96 * low < layer["z"] < 1.04 * high
            assert layer["sine"] == pytest.approx(math.sqrt(0.5), abs=0.02)


def test_siren_cells(picture):
    options = siren.SirenOptions(size=16, steps=20, widths=(16, 32), spread_width=16, lr=1e-3)
    cells = computed(siren.experiment(options, [0], picture))
    assert len(cells) == 2 + 4
    fits = [c for name, c in cells.items() if name.startswith("width")]
    assert all(c["mse"][-1][0] == 20 and c["mse"][-1][1] < c["mse"][0][1] for c in fits)


def test_split_cells(picture):
    options = split.SplitOptions(size=16, steps=12, widths=(8, 16), lr=1e-3, batch=100)
    experiment = split.experiment(options, [0], picture)
    cells = computed(experiment)
    assert set(cells) == {f"{way}, width {w}, seed 0" for way in split.WAYS for w in (8, 16)}
    # the spread that each way promises
    found = cameraman(picture, 16)
    assert found.pixels.shape[2] == 1
    x = found.coordinates()
    for way in ("LSUV, m 10", "VI3NR, m 5.935"):
        net = split.network(way, x, 1, 256, split.SplitOptions(), 0)
        spread = [row.measured for row in fi.init.report(net, x, samples=10_000).rows[:-4]]
        assert spread == pytest.approx([1.0] * len(spread), rel=0.03 if "LSUV" in way else 0.25)


def test_fit_in_batches(monkeypatch):
    """Each step sees other rows, in time all of them; the last error is that of all rows; a repetition is the same."""
    x, target = torch.eye(12), torch.ones(12, 1)
    seen, mse = [], fi.losses.mse

    def watched(model, rows, wanted):
        seen.append(rows)
        return mse(model, rows, wanted)

    monkeypatch.setattr(fitting.losses, "mse", watched)

    def fitted(batch: int) -> list[float]:
        seen.clear()
        torch.manual_seed(0)
        net = fi.MLP(12, 8, 1, 1, activation=fi.activations.sine(omega=1.0))
        curve = fit(net, x, target, 9, 0.01, batch)
        assert len(curve) == 10
        assert curve[-1] == pytest.approx(torch.nn.functional.mse_loss(net(x), target).item(), rel=1e-6)
        return curve

    curve = fitted(4)
    assert len(seen) == 9 and all(len(rows) == 4 and rows.sum(0).max() == 1 for rows in seen)
    assert torch.stack([rows.sum(0) for rows in seen]).sum(0).min() > 0
    assert fitted(4) == curve
    assert fitted(0) == fitted(12) != curve
    assert all(len(rows) == 12 for rows in seen)


def test_audio_cells(sound):
    cells = computed(audio.experiment(audio.AudioOptions(duration=0.2, steps=10, width=16), [0], sound))
    assert len(cells) == 3
    assert all(math.isfinite(c["psnr"]) and c["psnr"] > c["snr"] for c in cells.values())
    name, rate, values = recording(sound, 0.1)
    assert (name, rate, len(values)) == ("sound.wav", 8000, 800)
    assert np.abs(values).max() == 1


def test_widths_can_be_chosen(picture):
    request = record.Request(data=picture, seeds=1, widths=(8,))
    for module in (image, siren, split):
        cells = module.prepare(request).cells
        assert any("width 8," in name for name in cells) and not any("width 64," in name for name in cells)


def test_batches_can_be_chosen(picture, sound):
    for module, data in ((image, picture), (siren, picture), (split, picture), (audio, sound)):
        batches = [module.prepare(record.Request(data=data, batch=n)).options["batch"] for n in (0, 64)]
        assert batches == [0, 64]


def test_image_cells(picture):
    options = image.ImageOptions(size=12, steps=4, widths=(8,), multiples=(1.0, 2.5))
    cells = computed(image.experiment(options, [0, 1], picture))
    assert len(cells) == 4
    for cell in cells.values():
        assert set(cell) == {"default", "1 solved", "2.5 solved"}
        assert cell["2.5 solved"]["frequency"] > cell["1 solved"]["frequency"]


def test_frequency_of_a_wave():
    class Wave(torch.nn.Module):
        def forward(self, x):
            return torch.sin(2 * math.pi * 3 * x[:, :1])

    assert image.frequency(Wave(), torch.rand(5000, 2)) == pytest.approx(3, rel=0.05)


# -- the command


def tiny(monkeypatch, calls=None):
    """`audio` replaced by something that takes no time."""

    def prepare(request):
        def cell(name):
            if calls is not None:
                calls.append(name)
            return {"value": float(len(name)), "nothing": math.nan}

        names = [f"seed {s}" for s in record.seeds(request, 2)]
        return record.Experiment(
            {"steps": 3, "seeds": names, "file": request.data},
            {n: lambda n=n: cell(n) for n in names},
            lambda cells: {"A table": [["cell", "value"], *([n, str(cells[n]["value"])] for n in names)]},
            lambda figure, cells: figure.subplots().plot([c["value"] for c in cells.values()]),
        )

    monkeypatch.setattr(audio, "prepare", prepare)


def run(*arguments):
    return main(["reproduce", "audio", "--quiet", *map(str, arguments)])


def test_files_and_going_on(tmp_path, monkeypatch, capsys):
    calls: list[str] = []
    tiny(monkeypatch, calls)
    out = tmp_path / "out"
    assert run("--out", out, "--seeds", 2) == 0
    assert "A table" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["audio-quick.json", "audio-quick.png"]
    found = json.loads((out / "audio-quick.json").read_text())
    assert found["finished"]
    assert found["cells"] == {f"seed {s}": {"value": 6.0, "nothing": None} for s in (0, 1)}
    assert found["tables"]["A table"][1] == ["seed 0", "6.0"]
    assert calls == ["seed 0", "seed 1"]
    # nothing is computed twice; one more seed is one more cell; other options begin anew
    assert run("--out", out, "--seeds", 2) == 0
    assert run("--out", out, "--seeds", 3) == 0
    assert calls == ["seed 0", "seed 1", "seed 2"]
    assert run("--out", out, "--seeds", 1, "--data", "other") == 0
    assert calls == ["seed 0", "seed 1", "seed 2", "seed 0"]
    assert list(json.loads((out / "audio-quick.json").read_text())["cells"]) == ["seed 0"]
    assert run("--out", out, "--json", tmp_path / "mine.json", "--full") == 0
    assert (tmp_path / "mine.json").exists()
    assert (out / "audio-full.png").exists()


def test_a_stopped_run_keeps_its_cells(tmp_path, monkeypatch):
    tiny(monkeypatch)
    prepare, calls = audio.prepare, []

    def stopping(request):
        experiment = prepare(request)
        second = experiment.cells["seed 1"]

        def once():
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return second()

        experiment.cells["seed 1"] = once
        return experiment

    monkeypatch.setattr(audio, "prepare", stopping)
    assert run("--out", tmp_path) == 130
    stopped = json.loads((tmp_path / "audio-quick.json").read_text())
    assert not stopped["finished"]
    assert list(stopped["cells"]) == ["seed 0"]
    assert not (tmp_path / "audio-quick.png").exists()
    assert run("--out", tmp_path) == 0
    assert json.loads((tmp_path / "audio-quick.json").read_text())["finished"]


def refused(capsys, *arguments):
    try:
        code = main(["reproduce", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_arguments_are_one_line(tmp_path, picture, capsys, monkeypatch):
    silent = tmp_path / "silent.wav"
    pytest.importorskip("scipy.io.wavfile").write(silent, 8000, np.zeros(8000, np.float32))
    (tmp_path / "text.wav").write_text("no sound")
    assert "siren-init" in refused(capsys, "siren")
    assert "--seeds" in refused(capsys, "vi3nr-toy", "--seeds", 0)
    assert "one network size" in refused(capsys, "vi3nr-toy", "--widths", 64)
    assert "--widths" in refused(capsys, "siren-init", "--widths", 0)
    assert "no fit" in refused(capsys, "vi3nr-toy", "--batch", 0)
    assert "--batch" in refused(capsys, "audio", "--batch", -1)
    assert "tokyo512.png" in refused(capsys, "siren-init", "--out", tmp_path / "o")
    assert "no such picture" in refused(capsys, "siren-init", "--data", tmp_path / "none.png")
    assert "gt_bach.wav" in refused(capsys, "audio")
    assert "no such recording" in refused(capsys, "audio", "--data", tmp_path / "none.wav")
    assert "cannot be read as a WAV" in refused(capsys, "audio", "--data", tmp_path / "text.wav")
    assert "holds no sound" in refused(capsys, "audio", "--data", silent)
    assert not (tmp_path / "o").exists()
    tiny(monkeypatch)
    missing = tmp_path / "a" / "b"
    assert "does not exist" in refused(capsys, "audio", "--quiet", "--out", missing)
    assert "does not exist" in refused(capsys, "audio", "--quiet", "--out", tmp_path, "--json", missing / "x.json")
    (tmp_path / "audio-quick.json").write_text("[1, 2")
    assert "is no result of fused-inr reproduce" in refused(capsys, "audio", "--quiet", "--out", tmp_path)
    assert (tmp_path / "audio-quick.json").read_text() == "[1, 2"


@pytest.mark.parametrize(
    "cells", [[], {"seed 0": 3}, {"seed 0": {}}, {"seed 0": {"value": 1}, "seed 1": []}, "all"], ids=repr
)
def test_cells_that_were_tampered_with_are_refused(tmp_path, monkeypatch, capsys, cells):
    tiny(monkeypatch)
    assert run("--out", tmp_path, "--seeds", 1) == 0
    path = tmp_path / "audio-quick.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "cells": cells}))
    capsys.readouterr()
    if cells == []:  # nothing is done yet: nothing to believe
        assert run("--out", tmp_path, "--seeds", 1) == 0
        return
    said = refused(capsys, "audio", "--quiet", "--out", tmp_path, "--seeds", 1)
    assert "audio-quick.json" in said and "--out" in said


def test_the_cameraman_needs_scikit_image_or_a_file(monkeypatch, picture):
    import builtins

    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("skimage"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CliError, match=r"--data: .*pip install scikit-image"):
        cameraman(None, 64)
    assert cameraman(picture, 0).pixels.shape == (20, 24, 1)


def test_every_reproduction_has_a_module():
    import importlib

    for module, text in REPRODUCTIONS.values():
        assert callable(importlib.import_module(f"fused_inr.cli.reproduce.{module}").prepare)
        assert text


# -- the tuner


def test_tuner_finds_the_bandwidth_of_the_signal():
    torch.manual_seed(0)
    x = torch.rand(400, 1) * 2 - 1
    target = torch.sin(12 * x)
    net = fi.MLP(1, 32, 1, 1, activation=fi.activations.gaussian(sigma=0.05))
    before = [p.clone() for p in net.parameters()]
    found = tune_sigma_p(net, x, target, [0.002, 0.1], [None], steps=30, lr=1e-2, seeds=2, apply=False)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert {t.sigma_p for t in found.trials} == {None, 0.002, 0.1}
    losses = {t.sigma_p: t.loss for t in found.trials}
    assert losses[0.1] < losses[0.002]
    assert found.best.loss == min(losses.values())
    assert 0 <= found.wins() <= 2
    assert str(found).count("\n") == 3
    # the same again, and with the winner in the network
    again = tune_sigma_p(net, x, target, [0.1], [None, 0.3], steps=5, lr=1e-2)
    moved = not all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert moved == (again.best.sigma_p is not None)


def test_tuner_leaves_the_global_generator_alone():
    net = fi.MLP(1, 8, 0, 1, activation="tanh")
    x = torch.rand(9, 1)
    state = torch.get_rng_state()
    tune_sigma_p(net, x, x, [0.5], steps=1, seeds=2, apply=False)
    assert torch.equal(state, torch.get_rng_state())


NET = fi.MLP(1, 4, 0, 1)
X = torch.zeros(3, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, X, X, [1.0]), TypeError, "model"),
        ((NET, [1.0], X, [1.0]), TypeError, "x must be"),
        ((NET, X, None, [1.0]), TypeError, "target must be"),
        ((NET, X, X, 1.0), ValueError, "sigma_p must be a sequence"),
        ((NET, X, X, []), ValueError, "sigma_p must be a sequence"),
        ((NET, X, X, [-1.0]), ValueError, "sigma_p"),
        ((NET, X, X, [1.0], []), ValueError, "first_sigma_p"),
    ],
)
def test_tuner_explains_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        tune_sigma_p(*arguments)


def test_fit_offers_the_tuned_pair():
    from fused_inr.cli.options import FitOptions
    from fused_inr.cli.training import build_model

    net = build_model(FitOptions(width=64, depth=1, init="siren-tuned"), 3)
    assert 0.97 < net.net[0].weight.abs().max().item() <= 1  # U(-2/2, 2/2)
    bound = math.sqrt(40 / 64) / 30
    assert 0.97 * bound < net.net[1].weight.abs().max().item() <= bound
    finer = build_model(FitOptions(activation="finer:omega=10", width=64, depth=1, init="siren-tuned"), 3)
    assert 0.97 < finer.net[0].weight.abs().max().item() <= 1
    with pytest.raises(CliError, match=r"siren-tuned.*omega"):
        build_model(FitOptions(activation="split", init="siren-tuned"), 3)
