"""How float32 products on a GPU are computed, and in which precision an operation runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..pytorch import constant_to_dynamo
from .settings import Setting

#: What `float32_products` asks for.
PRODUCTS_SETTING: Setting = Setting("float32_products")

#: What `float32_products` accepts besides None.
PRODUCTS = ("ieee", "tf32", "tf32x3", "bf16x3")


def _check_products(precision: object) -> str | None:
    if precision is not None and precision not in PRODUCTS:
        accepted = ", ".join(map(repr, PRODUCTS))
        raise ValueError(f"precision: {precision!r} is not one of {accepted}, or None (PyTorch's settings)")
    return precision


def set_float32_products(precision: str | None) -> str | None:
    """How float32 products on a GPU are computed from now on, in every thread; returns the former setting.

    Args:
        precision: one of the table, or None: as PyTorch's settings say (`torch.set_float32_matmul_precision`: "highest"
            is ieee, "high" and "medium" are tf32).

    | | a factor is | relative error of a product of two | tensor cores |
    | --- | --- | --- | --- |
    | "ieee" | float32 | 2^-24 | none |
    | "tf32" | 10 bits of it | 2^-9 | TF32, once |
    | "tf32x3" | the sum of two of TF32; the product of the smaller ones is dropped | 2^-19 | TF32, three times |
    | "bf16x3" | the sum of two of bfloat16; likewise | 2^-14 | bfloat16, three times |

    Sums are float32 in all of them. With "tf32" activations are computed by the hardware's approximations (2^-19 of the
    largest value), else to a few ulp.

    Backend `triton` obeys: layers, whole networks, losses and all their derivatives. A network whose kernels have no
    configuration for the precision runs layer by layer. Every other backend leaves products to PyTorch and its
    settings, and products on a CPU are float32; `explain` says so. The choice is made when a forward runs, and its
    derivatives follow it, wherever they run.

    Raises:
        ValueError: another precision.
    """
    return PRODUCTS_SETTING.set(_check_products(precision))


@contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """`set_float32_products` for what this thread (or asyncio task) runs within the block; blocks nest.

    A function under torch.compile cannot tell threads apart: it follows the block that was entered last in any of them.
    A forward that a backward runs again (`torch.utils.checkpoint` on a GPU) is in a thread of PyTorch's, outside the
    block: `set_float32_products` reaches it.

    Raises:
        ValueError: another precision.
    """
    with PRODUCTS_SETTING.block(_check_products(precision)):
        yield


@constant_to_dynamo  # it cannot trace the getter, and guards PyTorch's setting by itself
def pytorch_products() -> str:
    """How PyTorch's own settings have float32 products on a GPU computed: "tf32" or "ieee"."""
    # 'highest', PyTorch's default, is 'ieee': no tensor cores
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def precision_for(device: torch.device, dtype: torch.dtype, chooses: bool) -> str:
    """The precision of products: 'bf16' or 'fp16' for half types, with float32 accumulation; for float32 on
    a CUDA device what was asked for (`float32_products`), where the backend `chooses`, or else PyTorch's
    `torch.backends.cuda.matmul.fp32_precision`; 'ieee' for everything else.
    """
    if dtype != torch.float32:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "ieee")
    if device.type != "cuda":
        return "ieee"
    asked = PRODUCTS_SETTING.get() if chooses else None
    return pytorch_products() if asked is None else asked


def products_of(precision: str, dtype: torch.dtype) -> str:
    """The precision of products of `dtype` in a derivative of an operation that ran in `precision`.

    Derivatives of higher order of half types multiply float32 numbers (gradients of pre-activations): in TF32, whose 10
    bits are as many as float16 and more than bfloat16 has.
    """
    return "tf32" if dtype == torch.float32 and precision in ("bf16", "fp16") else precision


def not_obeyed(backend: str, precision: str, x: torch.Tensor) -> tuple[tuple[str, str], ...]:
    """Tells `explain` why products are not what was asked for."""
    asked = PRODUCTS_SETTING.get()
    if asked in (None, precision) or x.dtype != torch.float32:
        return ()
    reason = f"float32 products on {x.device} are float32"
    if x.device.type == "cuda":
        reason = f"backend {backend!r} leaves float32 products to PyTorch's settings"
    return ((f"{asked} products", reason),)
