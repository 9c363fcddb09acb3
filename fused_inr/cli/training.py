"""Runs one fit step by step, from coordinates over model and loss to Adam, and keeps its state as one file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import losses, models
from ..init.siren import TUNED, siren_init_
from . import CliError
from .activation import parse_activation
from .options import FitOptions
from .pictures import Picture, to_decibel

WARM_UP = 3  # steps left out of ms/step: they pay for compilation and first-touched memory
_FORMAT = 1
_CHUNK = 1 << 16  # rows evaluated at once
_MODEL, _ADAM = "model.", ("step", "exp_avg", "exp_avg_sq")  # names of a checkpoint's tensors


def _adam(field: str, name: str) -> str:
    """Return what a checkpoint calls a part of Adam's state of the parameter `name`."""
    return f"adam.{field}.{name}"


def check_memory(options: FitOptions, height: int, width: int, channels: int) -> None:
    """Make sure, before anything is allocated, that the network and Adam's state fit into the device's memory.

    Raises:
        CliError: weights, gradients and two moments alone are larger than all of it.
    """
    branches, n = parse_activation(options.activation).branches, options.width
    parameters = branches * n * (2 + 1) + options.depth * branches * n * (n + 1) + channels * (n + 1)
    needed = 4 * parameters * (8 if options.precision == "float64" else 4) + 4 * height * width * (2 + channels)
    if torch.device(options.device).type == "cuda":
        present = torch.cuda.mem_get_info(options.device)[1]
    else:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise CliError(
            f"--width {n}, --depth {options.depth}: {parameters:,} parameters with gradients and Adam's moments take "
            f"{needed / 2**30:,.0f} GiB, and {options.device} has {present / 2**30:,.0f}"
        )


def build_model(options: FitOptions, channels: int) -> nn.Module:
    """Make the network of a fit: 2 coordinates, one first and `depth` hidden layers of `width`, `channels` outputs.

    `init="paper"`: SIREN's for sine and its relatives with an omega, VI3NR's for split, PyTorch's for the rest.
    `init="siren-tuned"`: SIREN's with flic 2 and initc 40. `residual` and `norm` as of `MLP`.
    """
    torch.manual_seed(options.seed)
    activation = parse_activation(options.activation)
    shape = (2, options.width, options.depth, channels)
    params: dict[str, Any] = activation.params
    facts = activation.map.facts
    make: Any = getattr(models, facts.model)
    own: dict[str, Any] = {"activation": activation}
    if facts.model_arguments is not None:
        own = {**facts.model_arguments(**params), "learnable": tuple(activation.learnable)}
    init: dict[str, Any] = {} if options.init == "paper" else {"init": options.init}
    if options.init == "siren-tuned":
        tuned = partial(siren_init_, flic=TUNED["flic"], initc=TUNED["initc"])
        init = TUNED if make is models.SIREN else {"init": tuned}
    elif options.init == "paper" and make is models.MLP and facts.init != "default":
        init = {"init": facts.init}
    try:
        model: nn.Module = make(*shape, **own, residual=options.residual, norm=options.norm, **init)
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
        """The number of steps taken."""
        return len(self.mse)

    @property
    def rows(self) -> int:
        """The number of rows of one step."""
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
            if self.forward is self.model and isinstance(self.model, (models.MLP, models.SIREN, models.SplitNet)):
                return losses.mse(self.model, x, y)  # in one pass with the network and all gradients
            output = self.forward(x)
        return nn.functional.mse_loss(output.to(y.dtype), y)

    def evaluate(self) -> torch.Tensor:
        """Compute the model's output for the whole picture, [height * width, channels]."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            parts = [self.model(x).to(self.target.dtype) for x in self.coordinates.split(_CHUNK)]
        return torch.cat(parts).cpu()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model runs: autocast for half precisions."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()

    # -- what is reported

    def ms_per_step(self) -> float | None:
        """Return the median over the steps of this process without the first ones."""
        timed = self.seconds[WARM_UP:]
        return 1000 * statistics.median(timed) if timed else None

    def warm_up_seconds(self) -> float:
        """Return how long the first steps of this process took."""
        return sum(self.seconds[:WARM_UP])

    def psnr_curve(self) -> list[float]:
        """Return PSNR of each step's loss in dB of data in [0, 1], whose errors are a quarter of those in [-1, 1]."""
        return [to_decibel(mse / 4) for mse in self.mse]

    def psnr_curve_last(self) -> float:
        """Return the last value of `psnr_curve`."""
        return to_decibel(self.mse[-1] / 4)

    # -- the state, and back

    def checkpoint(self, picture: Picture) -> bytes:
        """Return everything that the next step depends on, as one safetensors file."""
        from safetensors.torch import save

        tensors = {_MODEL + k: v for k, v in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {_adam(key, self.names[index]): torch.as_tensor(v) for key, v in values.items()}
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
        """Go on where `checkpoint` was taken.

        Raises:
            CliError: its tensors or its scaler are not those of a fit with its options; nothing is taken over then.
        """
        try:
            self._check(checkpoint)
        except ValueError as error:
            raise CliError(f"--resume: the checkpoint does not belong to a fit with its options: {error}") from error
        tensors = checkpoint.tensors
        self.model.load_state_dict({k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)})
        state = {
            index: {field: tensors[_adam(field, name)] for field in _ADAM}
            for index, name in enumerate(self.names)
            if _adam("step", name) in tensors
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.mse = tensors["mse"].tolist()
        if checkpoint.scaler:
            self.scaler.load_state_dict(checkpoint.scaler)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Make sure that every tensor that the next step depends on is there, and none beside it.

        Raises:
            ValueError: what is missing, too much, or not as it was written.
        """
        scaled = self.scaler.is_enabled()  # steps whose gradients overflowed were not taken: Adam has seen fewer
        like = {_MODEL + name: value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            fields = [_adam(field, name) for field in _ADAM]
            if scaled and not any(key in checkpoint.tensors for key in fields):
                continue
            if checkpoint.step:
                like |= dict(zip(fields, (torch.tensor(0.0), parameter, parameter)))
        like |= {"generator": self.generator.get_state(), "mse": torch.empty(checkpoint.step, dtype=torch.float64)}
        if like.keys() != checkpoint.tensors.keys():
            lost, strange = like.keys() - checkpoint.tensors.keys(), checkpoint.tensors.keys() - like.keys()
            raise ValueError(f"it lacks {min(lost)}" if lost else f"{min(strange)} is no part of it")
        for name, value in checkpoint.tensors.items():
            wanted = like[name]
            if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{name} is {value.dtype} {list(value.shape)}, not {wanted.dtype} {list(wanted.shape)}"
                )
            if value.is_floating_point() and name != "mse" and not value.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
            if name.startswith(_adam("exp_avg_sq", "")) and (value < 0).any():
                raise ValueError(f"{name} has negative values")
            if name.startswith(_adam("step", "")):
                taken = value.item()
                if not 0 < taken <= checkpoint.step or taken % 1 or (not scaled and taken != checkpoint.step):
                    raise ValueError(f"{name} is {taken:g}, after {checkpoint.step} steps")
        try:
            torch.Generator().set_state(checkpoint.tensors["generator"])
        except RuntimeError as error:
            raise ValueError("generator is no state of a generator") from error
        if checkpoint.scaler.keys() != self.scaler.state_dict().keys():
            raise ValueError("the state of its GradScaler does not go with its precision")
        for name, value in checkpoint.scaler.items():
            if type(value) not in (int, float) or not 0 <= value < math.inf or (value == 0 and name == "scale"):
                raise ValueError(f"{name} of its GradScaler is {value!r}")


@dataclass(frozen=True)
class Checkpoint:
    """A file written by `Trainer.checkpoint`, read and checked."""

    options: FitOptions
    picture: str
    scaler: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def step(self) -> int:
        """The number of steps that had been taken."""
        return len(self.tensors["mse"])

    @staticmethod
    def read(path) -> Checkpoint:
        """Read a checkpoint and check what can be checked without its network; `Trainer.restore` does the rest.

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
            checkpoint = Checkpoint(FitOptions.checked(header["options"]), header["picture"], header["scaler"], tensors)
            checkpoint._check()
            return checkpoint
        except CliError:
            raise
        except Exception as error:  # safetensors raises its own type, json and the header's keys theirs
            raise CliError(f"--resume: {path} is no checkpoint of fused-inr fit, or damaged: {error}") from error

    def _check(self) -> None:
        """Make sure that the header and the losses are as `Trainer.checkpoint` writes them.

        Raises:
            ValueError: the header or the losses are not as `Trainer.checkpoint` writes them.
        """
        if not isinstance(self.picture, str) or not isinstance(self.scaler, dict):
            raise ValueError("its header does not tell the picture or the GradScaler")
        losses = self.tensors["mse"]
        if losses.dtype != torch.float64 or losses.ndim != 1 or losses.isnan().any() or (losses < 0).any():
            raise ValueError("its losses are no list of errors")
        if self.step > self.options.steps:
            raise ValueError(f"it has taken {self.step} steps of {self.options.steps}")


def finite(value: float | None) -> float | None:
    """Return a number for JSON, which has no infinities: they become None."""
    return value if value is None or math.isfinite(value) else None


def final_psnr(picture: Picture, output: torch.Tensor) -> tuple[np.ndarray, float]:
    """Return the reconstruction, and its PSNR as it would be shown: clamped to [0, 1], before rounding to 8 bits."""
    from .pictures import psnr

    pixels = picture.reconstruction(output)
    return pixels, psnr(pixels, picture.pixels)
