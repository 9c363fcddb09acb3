"""Runs `fused-inr`: reads the arguments, and turns whatever goes wrong into one line and an exit code.

Exit codes: 0 done; 1 results written, but no picture of them; 2 a bad argument or file, nothing overwritten; 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from . import CliError
from .arguments import Parser, integer, non_negative, positive
from .bench import BENCHES
from .options import BACKENDS, DEEPEST, INITS, METHODS, NORMS, PRECISIONS, WIDEST
from .reproduce import REPRODUCTIONS


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fused-inr", description="Fused layers for implicit neural representations.")
    parser.add_argument("--version", action="version", version=f"fused_inr {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="fit | fuse | gain | doctor | bench | reproduce", required=True
    )

    fit = commands.add_parser(
        "fit",
        help="fit a picture",
        description="Fit a picture as a function of its coordinates, and write the reconstruction, a figure, the "
        "weights and a report. Ctrl-C leaves a checkpoint; --resume goes on from it to the same result.",
    )
    fit.add_argument("picture", nargs="?", help="any picture that Pillow reads (default: a built-in one)")
    fit.add_argument("--out", default="fused-inr-fit", metavar="DIR", help="folder of the results (%(default)s)")
    fit.add_argument("--size", type=integer(0), metavar="N", help="shrink to N pixels on the longer side (256; 0: no)")
    network = fit.add_argument_group("network")
    network.add_argument(
        "--activation",
        metavar="NAME[:p=v,..]",
        help="registered name or formula in z: sine:omega=20, gaussian:sigma=0.05, 'sin(w*z**2):w=2' (default: sine)",
    )
    network.add_argument("--width", type=integer(1, WIDEST), metavar="N", help="features of a hidden layer (256)")
    network.add_argument("--depth", type=integer(0, DEEPEST), metavar="N", help="hidden-to-hidden layers (3)")
    network.add_argument(
        "--init", choices=INITS, help="paper: as the activation's paper says (default); siren-tuned: flic 2, initc 40"
    )
    network.add_argument(
        "--residual",
        action="store_true",
        default=None,
        help="skip connections: hidden layers x <- (activation(W x + b) + x) / sqrt(2)",
    )
    text = "LayerNorm or RMSNorm behind every activation, before a skip's sum (none)"
    network.add_argument("--norm", choices=NORMS, help=text)
    steps = fit.add_argument_group("training (Adam, mean squared error)")
    steps.add_argument("--steps", type=integer(1), metavar="N", help="number of steps (500)")
    steps.add_argument("--lr", type=positive, metavar="X", help="learning rate (1e-4)")
    steps.add_argument("--batch", type=integer(0), metavar="N", help="rows of a step, drawn at random (0: all)")
    steps.add_argument("--seed", type=integer(0), metavar="N", help="of weights and batches (0)")
    steps.add_argument("--resume", action="store_true", help="go on with the fit in --out; only --steps may change")
    where = fit.add_argument_group("where and how")
    where.add_argument("--precision", choices=PRECISIONS, help="of products; accumulation stays float32 (float32)")
    where.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, .. (cpu)")
    where.add_argument("--backend", choices=BACKENDS, help="auto: the fastest that serves (default)")
    where.add_argument("--compare", action="store_true", help="the same fit with eager layers and torch.compile")
    where.add_argument("--quiet", action="store_true", help="no progress bar")

    fuse = commands.add_parser(
        "fuse",
        help="make a model of your own run fused, and tell how",
        description="Make a model, fuse its layers on random inputs between -1 and 1, and print what was fused, how "
        "far it differs from the original and how fast it is, and what was left, and why.",
    )
    fuse.add_argument(
        "model", metavar="MODULE:CALLABLE", help="what makes the model: package.module:Class or file.py:make"
    )
    text = "shape of an input, in the order of the method's arguments: 65536x2"
    fuse.add_argument("--input", action="append", required=True, metavar="ROWSxCOLUMNS", help=text)
    text = "a method to fuse (forward); the first gets the inputs"
    fuse.add_argument("--method", action="append", metavar="NAME", help=text)
    text = "speed: leave what the model's own functions compute faster (default); always: fuse what can be"
    fuse.add_argument("--prefer", choices=("speed", "always"), default="speed", help=text)
    fuse.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, .. (cpu)")
    fuse.add_argument("--json", metavar="FILE", help="the report for programs")

    doctor = commands.add_parser(
        "doctor", help="what runs here, and why", description="Versions, devices, what would run a layer here, and why."
    )
    doctor.add_argument("--json", action="store_true", help="the same for programs")

    _gain_arguments(
        commands.add_parser(
            "gain",
            help="VI3NR's gain and sigma_p of an activation",
            description="VI3NR's gain, backward condition and sigma_p of an activation, with a figure over sigma_p.",
        )
    )

    bench = commands.add_parser("bench", help="measure", description="Measure on this machine.")
    kinds = bench.add_subparsers(dest="which", metavar=" | ".join(BENCHES), required=True)
    for name, (_, text) in BENCHES.items():
        kinds.add_parser(name, help=text)

    reproduce = commands.add_parser(
        "reproduce",
        help="compute published figures again",
        description="Compute published figures about initialisation again: a table beside what was published, a JSON "
        "and a figure. A run that was stopped goes on where it was.",
    )
    _reproduce_arguments(reproduce)
    return parser


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    names = "; ".join(f"{name}: {text}" for name, (_, text) in REPRODUCTIONS.items())
    parser.add_argument("name", choices=tuple(REPRODUCTIONS), metavar="NAME", help=names)
    parser.add_argument("--full", action="store_true", help="the published size (hours); else one of minutes")
    parser.add_argument("--out", default="fused-inr-reproduce", metavar="DIR", help="folder of results (%(default)s)")
    parser.add_argument("--seeds", type=integer(1, 10_000), metavar="N", help="how many seeds, from 0")
    parser.add_argument(
        "--widths", type=integer(1, 1 << 14), nargs="+", metavar="N", help="of networks, where it has several"
    )
    parser.add_argument("--batch", type=integer(0), metavar="N", help="pixels or samples a step of a fit; 0: all")
    parser.add_argument("--data", metavar="FILE", help="the picture or recording, where one is needed")
    parser.add_argument("--json", metavar="FILE", help="where the JSON goes (default: into DIR)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _gain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "activation",
        metavar="ACTIVATION",
        help="registered name or formula in z: gaussian:sigma=0.05, split, 'sin(w*z**2)*exp(-z**2):w=2'",
    )
    parser.add_argument("--sigma-p", type=positive, metavar="X", help="gain and condition there, too")
    parser.add_argument(
        "--fan-ratio", type=positive, default=1.0, metavar="X", help="features out over features in of a layer (1)"
    )
    parser.add_argument(
        "--bias-variance", type=non_negative, default=0.0, metavar="X", help="of biases that are not zero (0)"
    )
    parser.add_argument("--lower", type=positive, default=1e-4, metavar="X", help="smallest sigma_p tried (1e-4)")
    parser.add_argument("--upper", type=positive, default=1e4, metavar="X", help="largest sigma_p tried (1e4)")
    parser.add_argument("--method", choices=METHODS, default="auto", help="auto: quadrature where that converges")
    parser.add_argument("--samples", type=integer(2), default=1_000_000, metavar="N", help="of Monte Carlo (1000000)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of Monte Carlo (0)")
    parser.add_argument("--device", metavar="DEVICE", help="of Monte Carlo: cpu, cuda, .. (cpu)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--figure", metavar="FILE", default="fused-inr-gain.png", help="PNG to write (%(default)s)")
    output.add_argument("--no-figure", dest="figure", action="store_const", const="", help="write none")
    parser.add_argument("--json", action="store_true", help="the answer for programs")


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what was asked for, and what the bench that was asked for reads itself (its --help, too)."""
    if len(argv) > 1 and argv[0] == "bench" and argv[1] in BENCHES:
        return argparse.Namespace(command="bench", which=argv[1]), list(argv[2:])
    return _parser().parse_args(argv), []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may have bytes that are no text, and tell them anyway
            stream.reconfigure(errors="backslashreplace")
    arguments, rest = _arguments(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    try:
        if arguments.command == "fit":
            from . import fit

            return fit.run(arguments)
        if arguments.command == "doctor":
            from . import doctor

            return doctor.run(arguments.json)
        if arguments.command == "fuse":
            from . import fuse

            return fuse.run(arguments)
        if arguments.command == "gain":
            from . import gain

            return gain.run(arguments)
        if arguments.command == "reproduce":
            from .reproduce import record

            return record.run(arguments)
        from . import bench

        return bench.run(arguments.which, rest)
    except CliError as error:
        print(f"fused-inr: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fused-inr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read the output has closed it; Python would complain once more when it flushes at exit
        sys.stderr.close()
        return 141


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"fused-inr: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
