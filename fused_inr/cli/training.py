"""One fit: coordinates -> model -> loss -> Adam, step by step, and its state as one file."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import losses
from ..init.siren import TUNED, siren_init_
from ..models import MLP, SIREN, SplitNet
from . import CliError
from .activation import parse_activation
from .options import FitOptions
from .pictures import Picture, to_decibel

WARM_UP = 3  # steps left out of ms/step: they pay for compilation and first-touched memory
_FORMAT = 1
_CHUNK = 1 << 16  # rows evaluated at once


def build_model(options: FitOptions, channels: int) -> nn.Module:
    """The fused network of a fit: 2 coordinates, one first and `depth` hidden layers of `width`, `channels` outputs.

    `init="paper"`: SIREN's for sine and its relatives with an omega, VI3NR's for split, PyTorch's for the rest.
    `init="siren-tuned"`: SIREN's with flic 2 and initc 40. `residual` and `norm` as of `MLP`.
    """
    torch.manual_seed(options.seed)
    activation = parse_activation(options.activation)
    shape = (2, options.width, options.depth, channels)
    params: dict[str, Any] = activation.params
    learnable = tuple(activation.learnable)
    init: dict[str, Any] = {} if options.init == "paper" else {"init": options.init}
    residual, norm = options.residual, options.norm
    if options.init == "siren-tuned":
        own = partial(siren_init_, flic=TUNED["flic"], initc=TUNED["initc"])
        init = TUNED if activation.name == "sine" else {"init": own}
    try:
        model: nn.Module
        if activation.name == "sine":
            omega = params["omega"]
            model = SIREN(
                *shape, omega=omega, first_omega=omega, learnable=learnable, residual=residual, norm=norm, **init
            )
        elif activation.name == "split":
            omegas = params["w1"], params["w2"], params["w3"], params["w4"]
            model = SplitNet(
                *shape, m=params["m"], omegas=omegas, learnable=learnable, residual=residual, norm=norm, **init
            )
        else:
            if options.init == "paper" and activation.name in ("finer", "finer_detached", "incode"):
                init = {"init": "siren"}
            model = MLP(*shape, activation=activation, residual=residual, norm=norm, **init)
    except (TypeError, ValueError) as error:
        raise CliError(f"--activation {options.activation}, --init {options.init}: {error}") from error
    return model.double() if options.precision == "float64" else model


class Trainer:
    """A model, its data and its optimiser, and how far they have come.

    The same options, initial weights and data give the same steps, whether the model is fused, eager or compiled:
    batches come from a generator of their own. `mse[i]` is the loss before step i, of data in [-1, 1].
    """

    def __init__(self, model: nn.Module, picture: Picture, options: FitOptions):
        self.options = options
        self.device = torch.device(options.device)
        dtype = torch.float64 if options.precision == "float64" else torch.float32
        self.model = model.to(self.device)
        self.forward: Any = self.model  # what a step calls; the compiled variant replaces it
        self.coordinates = picture.coordinates().to(self.device, dtype)
        self.target = picture.target().to(self.device, dtype)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self.generator = torch.Generator().manual_seed(options.seed)
        self.mse: list[float] = []
        self.seconds: list[float] = []
        torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")

    @property
    def step(self) -> int:
        return len(self.mse)

    @property
    def rows(self) -> int:
        """Rows of one step."""
        return self.options.batch or len(self.coordinates)

    def train(self, steps: int) -> None:
        """Take `steps` steps; returns when the device has finished them."""
        self.model.train()
        start = time.perf_counter()
        values = [self._train_one() for _ in range(steps)]
        self.mse += torch.stack(values).tolist()  # waits for the device
        self.seconds += [(time.perf_counter() - start) / steps] * steps

    def _train_one(self) -> torch.Tensor:
        x, y = self.coordinates, self.target
        if self.rows < len(x):
            index = torch.randint(len(x), (self.rows,), generator=self.generator).to(self.device)
            x, y = x[index], y[index]
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(x, y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            if self.forward is self.model and isinstance(self.model, (MLP, SIREN, SplitNet)):
                return losses.mse(self.model, x, y)  # in one pass with the network and all gradients
            output = self.forward(x)
        return nn.functional.mse_loss(output.to(y.dtype), y)

    def evaluate(self) -> torch.Tensor:
        """The model's output for the whole picture, [height * width, channels]."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            parts = [self.model(x).to(self.target.dtype) for x in self.coordinates.split(_CHUNK)]
        return torch.cat(parts).cpu()

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()

    # -- what is reported

    def ms_per_step(self) -> float | None:
        """Median over the steps of this process without the first ones."""
        timed = self.seconds[WARM_UP:]
        return 1000 * statistics.median(timed) if timed else None

    def warm_up_seconds(self) -> float:
        return sum(self.seconds[:WARM_UP])

    def psnr_curve(self) -> list[float]:
        """PSNR of each step's loss, in dB of data in [0, 1]: an error of data in [-1, 1] is four times as large."""
        return [to_decibel(mse / 4) for mse in self.mse]

    def psnr_curve_last(self) -> float:
        return to_decibel(self.mse[-1] / 4)

    # -- the state, and back

    def checkpoint(self, picture: Picture) -> bytes:
        """Everything that the next step depends on, as one safetensors file."""
        from safetensors.torch import save

        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{key}.{self.names[index]}": torch.as_tensor(v) for key, v in values.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["mse"] = torch.tensor(self.mse, dtype=torch.float64)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        header = {
            "format": _FORMAT,
            "options": asdict(self.options),
            "picture": picture.digest,
            "scaler": self.scaler.state_dict(),
        }
        return save(tensors, {"fused_inr": json.dumps(header)})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken."""
        tensors = checkpoint.tensors
        prefix = "model."
        self.model.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, field, name = key.split(".", 2)
                state.setdefault(self.names.index(name), {})[field] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.mse = tensors["mse"].tolist()
        if checkpoint.scaler:
            self.scaler.load_state_dict(checkpoint.scaler)


@dataclass(frozen=True)
class Checkpoint:
    """A file written by `Trainer.checkpoint`, read and checked."""

    options: FitOptions
    picture: str
    scaler: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @staticmethod
    def read(path) -> Checkpoint:
        """
        Raises:
            CliError: no file, not one of ours, damaged.
        """
        from safetensors import safe_open

        if not path.is_file():
            raise CliError(f"--resume: no checkpoint at {path}; --out names the folder of the fit to go on with")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["fused_inr"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            if header["format"] != _FORMAT:
                raise CliError(f"--resume: {path} has format {header['format']}, this version reads {_FORMAT}")
            known = {f.name for f in fields(FitOptions)}
            options = FitOptions(**{k: v for k, v in header["options"].items() if k in known})
            return Checkpoint(options, header["picture"], header["scaler"], tensors)
        except CliError:
            raise
        except Exception as error:  # safetensors raises its own type, json and the header's keys theirs
            raise CliError(f"--resume: {path} is no checkpoint of fused-inr fit, or damaged: {error}") from error


def finite(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is None or math.isfinite(value) else None


def final_psnr(picture: Picture, output: torch.Tensor) -> tuple[np.ndarray, float]:
    """The reconstruction, and its PSNR as the picture would be shown: clamped to [0, 1], before rounding to 8 bits."""
    from .pictures import psnr

    pixels = picture.reconstruction(output)
    return pixels, psnr(pixels, picture.pixels)
