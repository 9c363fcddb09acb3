"""The command line as its users meet it: mostly as a process of its own, with good and bad arguments."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch

from fused_inr import activations, backends

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
safetensors = pytest.importorskip("safetensors.torch")
from safetensors import safe_open  # noqa: E402

from fused_inr.cli import CliError  # noqa: E402
from fused_inr.cli.activation import parse_activation  # noqa: E402
from fused_inr.cli.compare import FitResult, table  # noqa: E402
from fused_inr.cli.eager import eager_twin  # noqa: E402
from fused_inr.cli.files import prepare_folder, write_all  # noqa: E402
from fused_inr.cli.main import main  # noqa: E402
from fused_inr.cli.options import FitOptions  # noqa: E402
from fused_inr.cli.pictures import Picture, psnr, read_picture, to_png  # noqa: E402
from fused_inr.cli.training import build_model  # noqa: E402

# One thread: fits this small gain nothing from more, and lose much where other processes want the cores.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "fused_inr.cli"]
RESULTS = ("checkpoint.safetensors", "figure.png", "reconstruction.png", "report.json", "weights.safetensors")
TINY = ("--size", "16", "--width", "16", "--depth", "1", "--lr", "1e-3", "--quiet")


def cli(*arguments, folder, **keywords):
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=ONE_THREAD, capture_output=True, text=True, timeout=300, **keywords
    )


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def one_error_line(stderr):
    """The message, if it is one line and no traceback."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("fused-inr")
    assert "error: " in lines[0]
    return lines[0]


def fails(capsys, *arguments):
    """The one-line error of a fit in this process."""
    try:
        code = main(["fit", *map(str, arguments)])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    return one_error_line(captured.err)


@pytest.fixture
def picture(tmp_path):
    """A small colour picture with edges and ramps."""
    y, x = np.mgrid[0:24, 0:32]
    pixels = np.stack([8 * x % 256, 10 * y, 255 * ((x // 8 + y // 8) % 2)], -1).astype(np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def old_results(tmp_path):
    """A folder with the results of an earlier fit."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in RESULTS:
        (folder / name).write_bytes(b"old " + name.encode())
    return folder


def untouched(folder):
    return sorted(p.name for p in folder.iterdir()) == sorted(RESULTS) and all(
        (folder / name).read_bytes() == b"old " + name.encode() for name in RESULTS
    )


# -- a fit


def test_fit_of_the_built_in_picture_reaches_its_psnr(tmp_path):
    steps = ("--size", "48", "--width", "64", "--depth", "2", "--steps", "150", "--lr", "1e-3")
    done = cli("fit", *steps, "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "PSNR" in done.stderr  # the progress bar
    assert "step" in done.stderr
    folder = tmp_path / "out"
    assert sorted(p.name for p in folder.iterdir()) == sorted(RESULTS)

    report = json.loads((folder / "report.json").read_text())
    assert report["psnr_db"] > 30  # 33 when written; eager SIREN comes as far
    assert report["steps"] == len(report["psnr_curve_db"]) == 150
    assert report["ms_per_step"] > 0
    assert report["options"]["activation"] == "sine"

    # the picture that was written has the PSNR that was reported, up to rounding to 8 bits
    target = read_picture(None, 48)
    written = np.asarray(Image.open(folder / "reconstruction.png")).astype(np.float32) / 255
    assert psnr(written, target.pixels) == pytest.approx(report["psnr_db"], abs=0.1)
    assert Image.open(folder / "figure.png").size[0] > 600
    # and the weights make that picture
    options = FitOptions(**report["options"])
    model = build_model(options, 3)
    model.load_state_dict(safetensors.load_file(folder / "weights.safetensors"))
    with torch.no_grad():
        pixels = target.reconstruction(model(target.coordinates()))
    assert psnr(pixels, target.pixels) == pytest.approx(report["psnr_db"], abs=0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, picture, number):
    fit = ["fit", str(picture), *TINY, "--batch", "100", "--seed", "3"]
    command = [*COMMAND, *fit, "--steps", str(10**8), "--out", str(tmp_path / "a")]
    process = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # said before the first step
    time.sleep(0.3)  # some steps, or none where others keep the processor
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert f"fused-inr fit --resume --out {tmp_path / 'a'}" in stderr
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["checkpoint.safetensors"]
    stopped = len(safetensors.load_file(tmp_path / "a" / "checkpoint.safetensors")["mse"])
    steps = ["--steps", str(stopped + 200)]

    assert main(["fit", "--resume", *steps, "--quiet", "--out", str(tmp_path / "a")]) == 0
    assert main([*fit, *steps, "--out", str(tmp_path / "b")]) == 0
    resumed, whole = (safetensors.load_file(tmp_path / n / "checkpoint.safetensors") for n in "ab")
    assert resumed.keys() == whole.keys()
    for key in whole:
        assert torch.equal(resumed[key], whole[key]), key
    for name in ("reconstruction.png", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_resume_goes_on_beyond_the_end_but_not_with_another_fit(tmp_path, picture, capsys):
    out = tmp_path / "out"
    assert main(["fit", str(picture), *TINY, "--steps", "5", "--out", str(out)]) == 0
    assert main(["fit", "--resume", "--steps", "8", "--quiet", "--out", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["steps"] == 8
    before = {name: (out / name).read_bytes() for name in RESULTS}
    capsys.readouterr()
    assert "--width 16, not 32" in fails(capsys, "--resume", "--width", 32, "--out", out)
    assert "--compare" in fails(capsys, "--resume", "--compare", "--out", out)
    other = tmp_path / "other.png"
    Image.new("RGB", (32, 24)).save(other)
    assert "not the picture" in fails(capsys, other, "--resume", "--out", out)
    assert {name: (out / name).read_bytes() for name in RESULTS} == before
    checkpoint = out / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert "damaged" in fails(capsys, "--resume", "--out", out)
    checkpoint.unlink()
    assert "no checkpoint" in fails(capsys, "--resume", "--out", out)


def _option(key, value):
    return lambda header, tensors: header["options"].__setitem__(key, value)


def _tensor(key, change):
    return lambda header, tensors: tensors.__setitem__(key, change(tensors[key]))


_WEIGHT, _MOMENT, _SQUARE, _STEP = (
    f"{kind}net.0.linear.weight" for kind in ("model.", "adam.exp_avg.", "adam.exp_avg_sq.", "adam.step.")
)
#: What can be wrong with a checkpoint of three steps, and the change to its header and tensors that makes it so.
_TAMPERED = {
    "weights lost": lambda header, tensors: tensors.pop(_WEIGHT),
    "weights of another width": _tensor(_WEIGHT, lambda t: t[:-1].clone()),
    "weights of another type": _tensor(_WEIGHT, lambda t: t.double()),
    "weights that are no numbers": _tensor(_WEIGHT, lambda t: t * float("nan")),
    "moments lost": lambda header, tensors: tensors.pop(_MOMENT),
    "moments of another shape": _tensor(_MOMENT, lambda t: t.flatten()),
    "negative squares": _tensor(_SQUARE, lambda t: t - 1),
    "other steps of Adam": _tensor(_STEP, lambda t: t - 1),
    "a strange tensor": lambda header, tensors: tensors.update({"model.more": torch.zeros(1)}),
    "moments of a strange parameter": lambda header, tensors: tensors.update({"adam.step.x": torch.zeros(())}),
    "no generator": lambda header, tensors: tensors.pop("generator"),
    "a short generator": _tensor("generator", lambda t: t[:-8].clone()),
    "a false generator": _tensor("generator", lambda t: torch.zeros_like(t)),
    "no losses": lambda header, tensors: tensors.pop("mse"),
    "losses of another type": _tensor("mse", lambda t: t.float()),
    "losses in a table": _tensor("mse", lambda t: t[None].clone()),
    "losses that are no numbers": _tensor("mse", lambda t: t * float("nan")),
    "more steps than were asked for": _option("steps", 2),
    "an unknown precision": _option("precision", "int4"),
    "an unknown backend": _option("backend", "opencl"),
    "an unknown initialisation": _option("init", "zeros"),
    "an unknown norm": _option("norm", "batch"),
    "another width": _option("width", 32),
    "a width in words": _option("width", "16"),
    "a width of nothing": _option("width", 0),
    "a width beyond all": _option("width", 10**7),
    "a truth as a number": _option("depth", True),
    "a seed beyond all": _option("seed", 2**70),
    "a learning rate that is none": _option("lr", float("nan")),
    "an option of the future": _option("momentum", 0.9),
    "an unknown activation": _option("activation", "sinus"),
    "options in a list": lambda header, tensors: header.__setitem__("options", []),
    "a state of a scaler": lambda header, tensors: header.__setitem__("scaler", {"scale": 2.0}),
    "a scaler in a list": lambda header, tensors: header.__setitem__("scaler", []),
    "another format": lambda header, tensors: header.__setitem__("format", 0),
    "a picture by number": lambda header, tensors: header.__setitem__("picture", 3),
    "no picture": lambda header, tensors: header.pop("picture"),
}


@pytest.fixture(scope="module")
def stopped_fit(tmp_path_factory):
    """A picture, and the checkpoint of a fit of three steps to it."""
    folder = tmp_path_factory.mktemp("stopped")
    path = folder / "picture.png"
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(path)
    assert main(["fit", str(path), *TINY, "--steps", "3", "--backend", "reference", "--out", str(folder / "out")]) == 0
    return path, folder / "out" / "checkpoint.safetensors"


@pytest.mark.parametrize("wrong", _TAMPERED)
def test_a_checkpoint_that_was_tampered_with_is_refused(stopped_fit, tmp_path, capsys, wrong):
    with safe_open(stopped_fit[1], "pt") as file:
        header = json.loads(file.metadata()["fused_inr"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    _TAMPERED[wrong](header, tensors)
    path = tmp_path / "checkpoint.safetensors"
    safetensors.save_file(tensors, path, {"fused_inr": json.dumps(header)})
    before = path.read_bytes()
    option = "--activation" if wrong == "an unknown activation" else "--resume"
    steps = [] if wrong == "more steps than were asked for" else ["--steps", 5]
    assert option in fails(capsys, "--resume", *steps, "--quiet", "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_a_checkpoint_is_resumed_where_it_is_whole(stopped_fit, tmp_path, capsys):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(stopped_fit[1].read_bytes())
    assert "has taken 3 steps already" in fails(capsys, "--resume", "--steps", 2, "--out", tmp_path)
    assert main(["fit", "--resume", "--steps", "5", "--quiet", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 5


@pytest.mark.parametrize("activation", [m.name for m in activations.registered()])
def test_every_activation_and_precision_resumes(stopped_fit, tmp_path, activation):
    precisions = ("float32", "bf16", "fp16", "float64") if activation == "sine" else ("float32",)
    for precision in precisions:
        fit = [str(stopped_fit[0]), *TINY, "--steps", "2", "--activation", activation, "--precision", precision]
        out = tmp_path / precision
        assert main(["fit", *fit, "--backend", "reference", "--out", str(out)]) == 0
        assert main(["fit", "--resume", "--steps", "3", "--quiet", "--out", str(out)]) == 0


def test_skip_connections_and_norms_are_recorded_resumed_and_checked(tmp_path, picture, capsys):
    out, plain = tmp_path / "out", tmp_path / "plain"
    fit = ["fit", str(picture), *TINY, "--residual", "--norm", "layer"]
    assert main([*fit, "--steps", "4", "--out", str(out)]) == 0
    assert "sine 2-16-16-3, skip connections, LayerNorm, " in capsys.readouterr().out
    assert main(["fit", "--resume", "--steps", "6", "--quiet", "--out", str(out)]) == 0
    assert main(["fit", "--resume", "--residual", "--norm", "layer", "--steps", "8", "--quiet", "--out", str(out)]) == 0
    assert main([*fit, "--steps", "8", "--out", str(tmp_path / "whole")]) == 0
    weights = "weights.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    with safe_open(out / weights, "pt") as file:
        options = json.loads(file.metadata()["fused_inr"])["options"]
    assert options["residual"] is True and options["norm"] == "layer"
    model = build_model(FitOptions(**options), 3)
    assert model.residual and model.norm == "layer"
    model.load_state_dict(safetensors.load_file(out / weights))
    assert not torch.equal(model.norms[0].weight, torch.ones(16))  # it was trained

    assert main(["fit", str(picture), *TINY, "--steps", "4", "--out", str(plain)]) == 0
    capsys.readouterr()
    assert "--residual False, not True" in fails(capsys, "--resume", "--residual", "--out", plain)
    assert "--norm None, not layer" in fails(capsys, "--resume", "--norm", "layer", "--out", plain)


def test_compare_prints_three_variants_of_one_fit(tmp_path, picture):
    done = cli("fit", str(picture), *TINY, "--steps", "14", "--compare", "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    head = next(line for line in lines if "ms/step" in line and "PSNR dB" in line)
    assert "peak MiB" in head
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    names = [r["name"] for r in report["results"]]
    assert names[0].startswith("fused (")
    assert names[1:] == ["eager", "torch.compile"]
    for result in report["results"]:
        assert any(line.startswith(result["name"]) for line in lines)
        if result["name"] == "torch.compile" and result["error"] is not None:
            continue  # a machine without a working compiler: said in the table, and the fit went on
        assert result["error"] is None
        assert result["ms_per_step"] > 0
        # the same weights and batches: 14 steps part by rounding only
        assert result["psnr"] == pytest.approx(report["psnr_db"], abs=0.01)
        assert result["peak_mib"] >= 0
    # the reconstruction is the fused fit's
    written = np.asarray(Image.open(tmp_path / "out" / "reconstruction.png")).astype(np.float32) / 255
    assert psnr(written, read_picture(str(picture), 16).pixels) == pytest.approx(report["psnr_db"], abs=0.1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--activation", "gaussian:sigma=0.1", "--init", "vi3nr"),
        ("--activation", "split:m=5"),
        ("--activation", "sin(w*z**2):w=2,learnable"),
        ("--precision", "bf16"),
        ("--precision", "float64", "--batch", "50"),
        ("--residual", "--norm", "layer"),
        ("--norm", "layer", "--precision", "bf16", "--activation", "split:m=5"),
        ("--residual", "--activation", "gaussian:sigma=0.1", "--init", "vi3nr"),
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_fit_with(tmp_path, picture, arguments):
    out = tmp_path / "out"
    fit = ["fit", str(picture), *TINY, "--steps", "3", "--backend", "reference", "--out", str(out), *arguments]
    assert main(fit) == 0
    assert json.loads((out / "report.json").read_text())["psnr_db"] > 0


# -- bad arguments: one line, exit code 2, nothing overwritten


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", "--width", "0"], "--width"),
        (["fit", "--width", "many"], "'many'"),
        (["fit", "--steps", "0"], "--steps"),
        (["fit", "--depth", "-1"], "--depth"),
        (["fit", "--lr", "nan"], "--lr"),
        (["fit", "--lr", "-1"], "--lr"),
        (["fit", "--precision", "float8"], "float32"),
        (["fit", "--backend", "opencl"], "reference"),
        (["fit", "--norm", "batch"], "layer"),
        (["fit", "--backend", "cuda"], "serves CUDA tensors"),
        (["fit", "--unheard-of"], "--unheard-of"),
        (["fit", "--width", "10000000"], "at most"),
        (["fit", "--width", "60000", "--depth", "900"], "GiB"),
        (["fit", "--seed", str(2**70)], "at most"),
        (["fit", "--size", "1" + "0" * 400], "at most"),
        (["gain", "sine", "--seed", str(2**70)], "at most"),
        (["reproduce", "siren-init", "--widths", "10000000"], "at most"),
        (["reproduce", "siren-init", "--seeds", "10000000"], "at most"),
        (["fit", "a.png", "b.png"], "b.png"),
        (["bench", "nothing"], "static"),
        (["doctor", "--verbose"], "--verbose"),
        (["train"], "fit"),
        ([], "fit"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_bad_option(tmp_path, arguments, says):
    done = cli(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert says in one_error_line(done.stderr)
    assert not list(tmp_path.iterdir())


def test_truncated_picture(tmp_path, picture, old_results):
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:-60])
    done = cli("fit", str(cut), *TINY, "--out", str(old_results), folder=tmp_path)
    assert done.returncode == 2
    assert "cannot be read as a picture" in one_error_line(done.stderr)
    assert untouched(old_results)


def test_full_disk(tmp_path, picture, old_results):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    fit = ("fit", str(picture), *TINY, "--steps", "3", "--backend", "reference", "--out", str(old_results))
    done = cli(*fit, folder=tmp_path, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in one_error_line(done.stderr)
    assert untouched(old_results)


@pytest.mark.parametrize("kind", ["text", "empty", "cut.jpg", "folder", "missing", "nan.tiff"])
def test_unreadable_picture(tmp_path, picture, old_results, capsys, kind):
    path = tmp_path / kind
    if kind == "text":
        path.write_text("This is no picture.\n" * 20)
    elif kind == "empty":
        path.touch()
    elif kind == "cut.jpg":
        Image.open(picture).resize((200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "folder":
        path.mkdir()
    elif kind == "nan.tiff":
        Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path)
    assert str(path) in fails(capsys, path, "--out", old_results)
    assert untouched(old_results)


def test_bad_folder(tmp_path, picture, capsys):
    missing = tmp_path / "missing" / "out"
    assert str(missing.parent) in fails(capsys, picture, "--out", missing)
    assert not missing.parent.exists()
    assert "is a file" in fails(capsys, picture, "--out", picture)
    assert Image.open(picture).size == (32, 24)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--activation", "sinus"], "sine"),
        (["--activation", "sine:omege=3"], "omega"),
        (["--activation", "sine:omega=fast"], "'fast'"),
        (["--activation", "sin(w*z)"], ":w=1"),
        (["--activation", "__import__('os').abort() + z"], "__import__"),
        (["--activation", "sin(z"], "was never closed"),
        (["--activation", "sin(2*z)+foo(z)"], "'foo'"),
        (["--activation", "9**9**9*z"], "beyond the numbers"),
        (["--activation", "z**99999"], "exponent"),
        (["--activation", "relu", "--init", "siren"], "relu"),
        (["--device", "gpu7"], "gpu7"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--backend", "triton"], "triton"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_impossible_choice(picture, old_results, capsys, arguments, says):
    assert says in fails(capsys, picture, *TINY, "--out", old_results, *arguments)
    assert untouched(old_results)


@pytest.mark.parametrize("name", RESULTS)
def test_a_folder_in_the_place_of_a_result_is_said_before_the_fit(picture, tmp_path, capsys, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    assert "is a folder" in fails(capsys, picture, *TINY, "--out", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("command", ["gain", "reproduce json", "reproduce picture"])
def test_a_folder_in_the_place_of_another_result(tmp_path, capsys, command):
    names = {"gain": "a.png", "reproduce json": "vi3nr-toy-quick.json", "reproduce picture": "vi3nr-toy-quick.png"}
    path = tmp_path / names[command]
    path.mkdir()
    arguments = ["gain", "sine", "--figure", str(path)] if command == "gain" else ["reproduce", "vi3nr-toy"]
    assert main([*arguments, *([] if command == "gain" else ["--out", str(tmp_path)])]) == 2
    assert "is a folder" in one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", [b"from_$5_to_$9.png", b"\xff\xfe$x.png", "a\nb\u30d5.png".encode()], ids=str)
def test_a_picture_of_any_name_is_fitted_and_drawn(picture, tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    try:
        with open(path, "wb") as file:
            file.write(picture.read_bytes())
    except OSError:
        pytest.skip("this file system takes no such name")
    fit = ["fit", path, *TINY, "--steps", "2", "--backend", "reference", "--out", "out"]
    done = subprocess.run([*COMMAND, *fit], cwd=tmp_path, env=ONE_THREAD, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(RESULTS)
    again = ["fit", "--resume", "--steps", "3", "--quiet", "--out", "out"]
    done = subprocess.run([*COMMAND, *again], cwd=tmp_path, env=ONE_THREAD, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(picture, old_results, capsys, monkeypatch):
    from fused_inr.cli import fit, gain

    def broken(*arguments):
        raise ValueError("no such\nglyph")

    monkeypatch.setattr(fit, "draw", broken)
    assert main(["fit", str(picture), *TINY, "--steps", "2", "--backend", "reference", "--out", str(old_results)]) == 1
    said = capsys.readouterr()
    assert "no such glyph" in said.err
    assert "figure.png" not in said.out.splitlines()[-1]
    assert json.loads((old_results / "report.json").read_text())["steps"] == 2
    assert not (old_results / "figure.png").exists()  # the old one showed another fit
    monkeypatch.setattr(gain, "draw", broken)
    assert main(["gain", "sine", "--figure", str(old_results / "gain.png")]) == 1
    assert "sigma_p" in capsys.readouterr().out


@pytest.mark.parametrize("formula", ["sqrt(z)", "log(z)", "1/(z-z*1.0)", "exp(exp(100*z**2))"])
def test_a_formula_that_is_no_number_from_the_start_is_not_called_divergence(picture, old_results, capsys, formula):
    fit = (picture, *TINY, "--activation", formula, "--steps", "50", "--backend", "reference")
    said = fails(capsys, *fit, "--out", old_results)
    assert "diverged" not in said
    assert "--activation" in said
    assert untouched(old_results)


def test_divergence_is_said(picture, old_results, capsys):
    fit = (picture, *TINY, "--activation", "exp(z**2):", "--lr", "1e9", "--steps", "50", "--backend", "reference")
    assert "diverged" in fails(capsys, *fit, "--out", old_results)
    assert untouched(old_results)


# -- doctor and bench


def test_doctor(tmp_path):
    done = cli("doctor", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(backends.TABLE)
    for backend in found["backends"].values():
        assert backend["available"] or backend["reason"]
    assert {layer["dtype"] for layer in found["layers"]} >= {"float32", "bfloat16"}


def test_doctor_in_words(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "native engine", "compiler", *backends.TABLE, "float32"):
        assert word in text


def test_bench_that_this_installation_lacks(monkeypatch, capsys):
    from fused_inr.cli import bench

    monkeypatch.setitem(bench.BENCHES, "lost", ("no_such_bench", ""))
    assert main(["bench", "lost"]) == 2
    assert "no_such_bench" in one_error_line(capsys.readouterr().err)


def test_bench_gets_its_own_arguments(monkeypatch):
    import types

    received = []
    fake = types.ModuleType("fused_inr.bench.table")
    fake.main = lambda argv: received.append(argv)
    monkeypatch.setitem(sys.modules, "fused_inr.bench.table", fake)
    assert main(["bench", "table", "--json", "f", "--help", "x", "--rows=3"]) == 0
    assert received == [["--json", "f", "--help", "x", "--rows=3"]]


# -- the parts


@pytest.mark.parametrize("map", activations.registered(), ids=lambda m: m.name)
def test_eager_twin_is_the_same_network(map):
    options = FitOptions(activation=map.name, width=8, depth=2, precision="float64", init="default")
    model = build_model(options, 3)
    twin = eager_twin(model)
    x = torch.rand(50, 2, dtype=torch.float64) * 2 - 1
    with backends.use("reference"):
        torch.testing.assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("activation", ["sine", "split", "complex_gabor"])
def test_eager_twin_has_skip_connections_and_norms(activation):
    options = FitOptions(
        activation=activation, width=8, depth=2, precision="float64", init="default", residual=True, norm="layer"
    )
    model = build_model(options, 3)
    twin = eager_twin(model)
    x = torch.rand(50, 2, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())


def test_eager_twin_learns_what_the_model_learns():
    options = FitOptions(activation="sine:omega=20,learnable", width=8, depth=1)
    model = build_model(options, 1)
    twin = eager_twin(model)
    assert sum(p.requires_grad for p in twin.parameters()) == sum(p.requires_grad for p in model.parameters()) == 8


@pytest.mark.parametrize(
    ("mode", "shape", "depth"),
    [
        ("1", (12, 16, 1), 255),
        ("L", (12, 16, 1), 255),
        ("LA", (12, 16, 2), 255),
        ("P", (12, 16, 3), 255),
        ("RGB", (12, 16, 3), 255),
        ("RGBA", (12, 16, 4), 255),
        ("CMYK", (12, 16, 3), 255),
        ("I;16", (12, 16, 1), 65535),
    ],
)
def test_every_mode_of_pictures(tmp_path, picture, mode, shape, depth):
    image = Image.open(picture).resize((16, 12))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 7)
    else:
        image = image.convert(mode)
    path = tmp_path / ("p.tiff" if mode == "CMYK" else "p.png")
    image.save(path)
    read = read_picture(str(path), 0)
    assert (read.pixels.shape, read.depth) == (shape, depth)
    assert read.pixels.dtype == np.float32
    assert 0 <= read.pixels.min() < read.pixels.max() <= 1
    # a perfect fit writes the file's own values
    pixels = read.reconstruction(read.target())
    out = tmp_path / "out.png"
    out.write_bytes(to_png(pixels, read.depth))
    again = read_picture(str(out), 0)
    assert again.depth == depth
    np.testing.assert_allclose(again.pixels, read.pixels, atol=1e-6)


def _png_of_16_bits(path, channels):
    """What Pillow does not write: a PNG of 16 bits a channel, 4 x 3 pixels."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + bytes(range(8 * channels)) for _ in range(3))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    parts = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_bits_that_are_lost_are_said(tmp_path, recwarn, channels):
    path = tmp_path / "p.png"
    _png_of_16_bits(path, channels)
    read = read_picture(str(path), 0)
    said = [str(w.message) for w in recwarn if "16 bits" in str(w.message)]
    assert (read.depth, len(said)) == ((65535, 0) if channels == 1 else (255, 1))


@pytest.mark.parametrize("turned", [False, True])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, turned):
    from fused_inr.cli import pictures

    y, x = np.mgrid[0:1500, 0:2000]
    stored = [np.sin(x / 200), np.cos(y / 150), np.sin((x + y) / 300)]
    stored = (np.stack(stored, -1) * 127 + 128).astype(np.uint8)
    path = tmp_path / "p.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: to be turned by a quarter
    Image.fromarray(stored).save(path, quality=95, **({"exif": exif} if turned else {}))
    with Image.open(path) as image:
        pictures._decode_smaller(image, 64)
        assert image.size == (250, 188)
        pictures._decode_smaller(image, 0)
    read = read_picture(str(path), 64)
    assert read.pixels.shape == ((64, 48, 3) if turned else (48, 64, 3))
    whole = pictures.picture_of("whole", np.ascontiguousarray(np.rot90(stored, -1)) if turned else stored, 64)
    assert np.abs(read.pixels - whole.pixels).max() < 0.02
    assert read_picture(str(path), 1000).pixels.shape[:2] in ((1000, 750), (750, 1000))


def test_shrinking_and_coordinates(picture):
    read = read_picture(str(picture), 16)
    assert read.pixels.shape == (12, 16, 3)
    x = read.coordinates()
    assert x.shape == (192, 2)
    assert x[0].tolist() == [-1, -1]
    assert x[1, 0] == -1  # along a row, y stays
    assert x[-1].tolist() == [1, 1]
    assert Picture("", np.zeros((1, 3, 1), np.float32), 255).coordinates()[:, 0].tolist() == [0, 0, 0]
    assert read_picture(str(picture), 100).pixels.shape == (24, 32, 3)


def test_formula_means_what_it_says():
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    chirp = parse_activation("sin(omega*z**2) + max(z, 0)/pi:omega=3")
    expected = torch.sin(3 * z**2) + z.clamp(min=0) / torch.pi
    torch.testing.assert_close(chirp(z), expected)
    assert parse_activation("gaussian:scale=3").params == {"scale": 3.0}
    assert parse_activation("finer:omega=3,learnable").learnable == {"omega"}


def test_all_files_or_none(tmp_path):
    old = tmp_path / "old"
    old.write_bytes(b"old")
    with pytest.raises(CliError, match="nowhere"):
        write_all({old: b"new", tmp_path / "nowhere" / "file": b"x"})
    assert old.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    write_all({old: b"new"})
    assert old.read_bytes() == b"new"
    prepare_folder(tmp_path / "fresh")
    assert (tmp_path / "fresh").is_dir()


def test_table_without_a_failed_variant():
    results = [
        FitResult("fused (cpu)", 10.0, 0.5, 31.25, 100.0, 1.0),
        FitResult("eager", 25.0, 0.5, 31.25, 300.0, 1.0),
        FitResult("torch.compile", error="no compiler"),
    ]
    text = table(results)
    assert "2.50x" in text
    assert "torch.compile: failed: no compiler" in text
    assert len({line.find("ms/step") for line in text.splitlines()[:1]}) == 1
