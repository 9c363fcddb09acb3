"""Turns a picture file into a target, a target into coordinates, and a reconstruction into a picture file."""

import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import CliError
from .files import printable

BUILT_IN = "grace_hopper"
_SPARE = 3  # pixels a side that a JPEG keeps while it is decoded, for each that is asked for


@dataclass(frozen=True)
class Picture:
    """A picture as data: `pixels` [height, width, channels], float32 in [0, 1].

    Channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha (not premultiplied). `depth` is the largest stored value,
    255 or 65535, and `digest` names the pixels, so that a resumed fit can tell whether it goes on with the same ones.
    """

    name: str
    pixels: np.ndarray
    depth: int

    @property
    def digest(self) -> str:
        """What names the pixels: their shape and a hash."""
        shape = "x".join(map(str, self.pixels.shape))
        return f"{shape}-{hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes()).hexdigest()[:16]}"

    def coordinates(self) -> torch.Tensor:
        """Return rows of (y, x), [height * width, 2], float32, each axis from -1 to 1 (0 if it has one pixel only)."""
        axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in self.pixels.shape[:2]]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)

    def target(self) -> torch.Tensor:
        """Return what the model learns, [height * width, channels], float32 in [-1, 1]."""
        return torch.from_numpy(self.pixels).reshape(-1, self.pixels.shape[2]) * 2 - 1

    def reconstruction(self, output: torch.Tensor) -> np.ndarray:
        """Return the model's output, [height * width, channels] around [-1, 1], as pixels in [0, 1] of this shape."""
        pixels = (output.detach().cpu().float().reshape(self.pixels.shape) + 1) / 2
        return pixels.clamp(0, 1).numpy()


def read_picture(path: str | None, size: int) -> Picture:
    """Read `path`, or the built-in picture; shrink it until no side exceeds `size` (0: as it is).

    Raises:
        CliError: the file is missing, is no picture, or ends too early.
    """
    Image, ImageOps = _pillow()
    file = Path(path) if path is not None else _built_in()
    if not file.exists():
        raise CliError(f"{file}: no such picture")
    if file.is_dir():
        raise CliError(f"{file}: is a folder, and a picture is needed")
    try:
        with Image.open(file) as opened:
            _decode_smaller(opened, size)
            if _loses_bits(opened):
                warnings.warn(
                    f"{printable(file)}: has 16 bits a channel, of which Pillow reads 8 (of grey pictures all)",
                    stacklevel=2,
                )
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            pixels, depth = _pixels(opened, size)
    except CliError as error:
        raise CliError(f"{file}: {error}") from error
    # Decoders meet a damaged file with whatever the damage leads to: OSError, SyntaxError, struct.error, IndexError.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if type(error).__name__ == "UnidentifiedImageError":
            reason = "not a picture in a format that Pillow reads"
        raise CliError(f"{file}: cannot be read as a picture: {reason}") from error
    return Picture(file.stem if path is not None else BUILT_IN, np.ascontiguousarray(pixels, np.float32), depth)


def picture_of(name: str, pixels: np.ndarray, size: int) -> Picture:
    """Make a picture, shrunk as by `read_picture`, of stored uint8 values [height, width] or [height, width, 3]."""
    Image, _ = _pillow()
    values, depth = _pixels(Image.fromarray(pixels), size)
    return Picture(name, values, depth)


def to_png(pixels: np.ndarray, depth: int = 255) -> bytes:
    """Return `pixels` [height, width, channels] in [0, 1] as a PNG; 16 bit only for grey, as Pillow stores no other."""
    Image, _ = _pillow()
    if depth > 255 and pixels.shape[2] == 1:
        stored = np.rint(pixels[..., 0] * 65535).astype(np.uint16)
    else:
        stored = np.rint(pixels * 255).astype(np.uint8)
        stored = stored[..., 0] if pixels.shape[2] == 1 else stored
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "PNG")
    return buffer.getvalue()


def psnr(pixels: np.ndarray, target: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of data in [0, 1] in dB: -10 log10 of the mean of (a - b)^2 over all."""
    return to_decibel(float(np.mean((pixels.astype(np.float64) - target.astype(np.float64)) ** 2)))


def to_decibel(mean_squared_error: float) -> float:
    """Return -10 log10 of an error of data in [0, 1]; infinite where it is 0."""
    if math.isnan(mean_squared_error):
        return math.nan
    return -10 * math.log10(mean_squared_error) if mean_squared_error > 0 else math.inf


def _decode_smaller(image, size: int) -> None:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size where `_SPARE` times the pixels asked for are left.

    Its blocks of 8 x 8 cosines give a smaller picture directly, in a fraction of the time and the memory. Pictures of
    other formats stay as they are.
    """
    longest = max(image.size)
    if size and longest > size:
        image.draft(None, tuple(math.ceil(_SPARE * size * n / longest) for n in image.size))


def _loses_bits(image) -> bool:
    """Tell whether an opened picture's file has 16 bits a channel where the mode that Pillow reads it in has 8."""
    if image.mode.startswith(("I", "F")):
        return False
    stored = (str(word) for tile in image.tile for word in np.atleast_1d(np.asarray(tile[3], dtype=object)))
    return any(";16" in word for word in stored)


def _pixels(image, size: int) -> tuple[np.ndarray, int]:
    """Return float32 pixels in [0, 1], [height, width, channels], and the largest value that the file could store.

    The picture is shrunk until no side exceeds `size` (0: as it is), one channel after the other in float32, so that 16
    bits stay 16 bits and the picture as it was is never there in float as a whole.
    """
    Image, _ = _pillow()
    factor = size / max(image.size) if size else 1.0
    shape = tuple(max(1, round(n * factor)) for n in image.size) if factor < 1 else image.size

    def shrunk(plane: np.ndarray) -> np.ndarray:
        if not np.isfinite(plane).all():
            raise CliError("holds values that are not finite")
        if shape == image.size:
            return plane
        return np.clip(np.asarray(Image.fromarray(plane).resize(shape, Image.Resampling.LANCZOS)), 0, 1)

    mode = image.mode
    if mode.startswith("I"):  # 16-bit grey; older Pillow calls it I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise CliError("a 32-bit grey picture with values outside 0 .. 65535; save it with 16 bits")
        return shrunk((values / 65535).astype(np.float32))[..., None], 65535
    if mode == "F":
        values = np.asarray(image)
        if np.isfinite(values).all() and (values.min() < 0 or values.max() > 1):
            low, high = float(values.min()), float(values.max())
            values = ((values.astype(np.float64) - low) / ((high - low) or 1.0)).astype(np.float32)
        return shrunk(values)[..., None], 65535
    if mode in ("P", "PA"):
        image = image.convert("RGBA" if mode == "PA" or "transparency" in image.info else "RGB")
    elif mode == "1":
        image = image.convert("L")
    elif mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if mode in ("La", "RGBa") else "RGB")  # CMYK, YCbCr, LAB, HSV, ...
    planes = (np.asarray(image.getchannel(c)) for c in range(len(image.getbands())))
    return np.stack([shrunk(np.divide(plane, 255, dtype=np.float32)) for plane in planes], -1), 255


def _pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise CliError("reading pictures needs Pillow: pip install 'fused_inr[fit]'") from error
    return Image, ImageOps


def _built_in() -> Path:
    """Return the picture that comes with matplotlib: Rear Admiral Grace Hopper, 1984, US Navy, public domain."""
    try:
        from matplotlib import cbook

        return Path(cbook.get_sample_data(f"{BUILT_IN}.jpg", asfileobj=False))
    except ImportError as error:
        raise CliError("the built-in picture comes with matplotlib: pip install 'fused_inr[fit]'") from error
    except OSError as error:
        raise CliError("this matplotlib came without its sample data, hence no built-in picture: name one") from error
