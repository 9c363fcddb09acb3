"""`fused-inr bench pictures`: reading a large picture at the size of a fit, against decoding all of it first.

Each way runs in fresh processes, in turn: seconds of the call, and how much the process's largest size grew by it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cli import children
from ..cli.arguments import Parser, integer
from ..cli.memory import PeakMemory
from ..cli.pictures import read_picture
from . import report

#: what a 48-megapixel JPEG may take to become 256 pixels
SECONDS, MIB = 0.5, 300.0


def whole(path: str, size: int) -> None:
    """The usual way: all of the picture decoded and converted to float, then shrunk."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image).astype(np.float64) / 255
    shape = tuple(max(1, round(n * size / max(image.size))) for n in image.size)
    planes = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(pixels.shape[2])]
    np.stack([np.asarray(plane.resize(shape, Image.Resampling.LANCZOS)) for plane in planes], -1)


WAYS = {"fused-inr": read_picture, "all of it first": whole}


def draw(folder: Path, width: int, height: int, ending: str) -> Path:
    """A picture of smooth colours under noise, as a camera would store it: JPEG of quality 90, or PNG."""
    from PIL import Image

    path = folder / f"picture.{ending}"
    if not path.exists():
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        noise = np.random.default_rng(0).integers(-8, 9, (height, width), np.int16)
        planes = [128 + 100 * np.sin(x * 0.01 * k + y * 0.007) for k in (1, 2, 3)]
        pixels = np.stack([np.clip(plane + noise, 0, 255).astype(np.uint8) for plane in planes], -1)
        Image.fromarray(pixels).save(path, quality=90) if ending == "jpg" else Image.fromarray(pixels).save(path)
    return path


def _measure(way: str, path: Path, size: int) -> dict[str, float]:
    answer = children.ask_once(("-m", __name__), {"way": way, "path": str(path), "size": size})
    if "error" in answer:
        raise RuntimeError(f"{way}: {answer['error']}")
    return answer


def _answer(request: dict[str, Any], tell: children.Tell) -> dict[str, float]:
    import PIL.Image

    PIL.Image.MAX_IMAGE_PIXELS = None
    PIL.Image.init()
    memory, start = PeakMemory(torch.device("cpu")), time.perf_counter()
    WAYS[request["way"]](request["path"], request["size"])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "mib": memory.peak()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="fused-inr bench pictures", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=integer(1, 1 << 16), default=8000, metavar="N", help="pixels (%(default)d)")
    parser.add_argument("--height", type=integer(1, 1 << 16), default=6000, metavar="N", help="pixels (%(default)d)")
    parser.add_argument("--size", type=integer(1), default=256, metavar="N", help="longer side asked for (%(default)d)")
    parser.add_argument("--rounds", type=integer(1), default=5, metavar="N", help="of every way (%(default)d)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go, too")
    options = parser.parse_args(argv)
    results = report.Results(Path(options.json) if options.json else None, report.environment(torch.device("cpu")))
    rows = []
    with tempfile.TemporaryDirectory(prefix="fused-inr-") as folder:
        for ending in ("jpg", "png"):
            path = draw(Path(folder), options.width, options.height, ending)
            found = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way in WAYS:
                    found[way].append(_measure(way, path, options.size))
            medians = {
                way: {key: statistics.median(m[key] for m in all_of) for key in ("seconds", "mib")}
                for way, all_of in found.items()
            }
            results.append({"name": ending, "bytes": path.stat().st_size, **medians})
            for way, m in medians.items():
                asked = f"{SECONDS:g} s, {MIB:g} MiB" if ending == "jpg" and way == "fused-inr" else ""
                rows.append((f"{ending}, {way}", f"{m['seconds']:.2f} s", f"{m['mib']:.0f} MiB", asked))
    results.finish(width=options.width, height=options.height, size=options.size)
    print(report.table((f"{options.width} x {options.height} to {options.size}", "time", "memory", "asked"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(children.serve(_answer))
