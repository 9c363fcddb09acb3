"""What every launcher needs: the device, types inside a kernel, how products and elementary functions are computed."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from . import assembler
from .maps import INTERPRETED

#: A tensor's type as kernels name it.
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def on_device(tensor: torch.Tensor):
    """Triton launches on the current device and its current stream: make them the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of pre-activations, sums and maps: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mode(dtype: torch.dtype, precision: str) -> int:
    """Primitives: accurate where the product is as good as float32's, fast where it is not, pure in the interpreter."""
    if INTERPRETED:
        return 2
    return 0 if dtype == torch.float32 and precision in ("ieee", "tf32x3", "bf16x3") else 1


def dot_precision(dtype: torch.dtype, precision: str) -> str:
    """What `tl.dot` is asked for. The interpreter ignores it; 16-bit types have one precision only."""
    return precision if dtype == torch.float32 and not INTERPRETED else "ieee"


class Arithmetic(NamedTuple):
    """How a kernel computes: elementary functions (MODE), products (PRECISION; UPCAST: of wider factors), in which type
    it sums, and the type of its operands."""

    MODE: int
    PRECISION: str
    UPCAST: bool
    ACC: tl.dtype
    DTYPE: tl.dtype


@functools.lru_cache(maxsize=64)
def arithmetic(dtype: torch.dtype, precision: str) -> Arithmetic:
    """What products of this type and precision are computed with, as a constant of a kernel."""
    group = Arithmetic(
        mode(dtype, precision), dot_precision(dtype, precision), INTERPRETED, TYPES[accumulator(dtype)], TYPES[dtype]
    )  # fmt: skip
    return constants_of(group)


_Group = TypeVar("_Group", bound=tuple)


def constants_of(group: _Group) -> _Group:
    """A NamedTuple that a kernel takes as one constexpr. Triton reads a field of it as it lies there, and wants a
    constexpr; its interpreter wants the value. Functions do not belong there: the compiled kernel would be found again
    by their names, not by what they are."""
    return group if INTERPRETED else type(group)(*map(tl.constexpr, group))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv`, which kernels may call as well, takes the host a microsecond or two.)"""
    return -(-a // b)


def contiguous_rows(t: torch.Tensor) -> torch.Tensor:
    """Any stride between rows, none but 1 within."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


# ---------------------------------------------------------------- launches that were made before


def _kind(argument) -> object:
    """What Triton's binder tells arguments apart by."""
    kind = type(argument)
    if kind is int:  # 1; of 32 bits or more, each a multiple of 16 or not
        if -(2**31) <= argument < 2**31:
            return 1 if argument == 1 else 2 if argument & 15 else 16
        return 3 if argument & 15 else 17
    if kind is float or argument is None:
        return kind
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    address = argument.data_ptr()
    if not address and argument.numel():
        raise RuntimeError(
            f"a tensor of shape {list(argument.shape)} whose storage was freed (untyped_storage().resize_); gather it "
            "before it is used"
        )
    return argument.dtype, address & 15 == 0


class Launcher:
    """A kernel, launched without Triton's binder where a launch of this kind was made before.

    The binder looks at every argument and every constant of a launch, which takes 20 to 40 us for kernels with as many
    constants as ours. What tells launches apart here are the kinds of the arguments, and constants that are one object
    from call to call: these may hold arguments, too, that never change while that object serves.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self._names = kernel.arg_names
        self._compiled: dict[tuple, tuple[Any, tuple, dict[str, object]]] = {}

    def __call__(self, grid: int, arguments: tuple, constants: dict[str, object]) -> None:
        """`kernel[grid,](*arguments, **constants)`; `constants`, options among them, is never changed, and has every
        parameter of the kernel that follows those of `arguments`."""
        if INTERPRETED:
            self.kernel[(grid,)](*arguments, **constants)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (id(constants), device, driver, *map(_kind, arguments))
        found = self._compiled.get(key)
        if found is None:
            with assembler.for_target(driver.get_current_target()):
                compiled = self.kernel[(grid,)](*arguments, **constants)
            values = tuple([constants[name] for name in self._names[len(arguments) :]])
            self._compiled[key] = compiled, values, constants  # kept, so that its id stays its own
            return
        found[0][grid, 1, 1](*arguments, *found[1], stream=driver.get_current_stream(device))
