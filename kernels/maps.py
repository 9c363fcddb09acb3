"""The generated maps as `triton.jit` functions: the committed ones by name, a user's own from source."""

from __future__ import annotations

import hashlib
import importlib
import linecache
import re
from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from . import primitives

#: Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when Triton was imported).
INTERPRETED: bool = isinstance(primitives.fi_sin, InterpretedFunction)

_NAMES = {"triton": triton, "tl": tl, **{n: f for n, f in vars(primitives).items() if n.startswith("fi_")}}
_from_source: dict[tuple[str, str], object] = {}


def get(name: str, level: int, learnable: bool = False):
    """The committed map: `sine_l1`, or `sine_p1` if the parameters are inputs that have gradients.

    Level 0 has no gradients, and a map without parameters no learnable variant: both give the constant one.
    Raises KeyError, naming what exists, if nothing is committed under that name and level.
    """
    generated = importlib.import_module(f"{__package__}.generated.activations")
    function = None
    if learnable and level > 0:
        function = getattr(generated, f"{name}_p{level}", None)
    if function is None and (not learnable or level == 0 or not hasattr(generated, f"{name}_p1")):
        function = getattr(generated, f"{name}_l{level}", None)
    if function is None:
        known = sorted(n for n in vars(generated) if re.fullmatch(rf"{re.escape(name)}_[lp]\d", n))
        kind = "learnable" if learnable else "constant"
        raise KeyError(
            f"no generated Triton map {name!r} of level {level} with {kind} parameters; committed: "
            + (", ".join(known) if known else f"nothing named {name!r}")
        )
    return function


def jet(name: str):
    """The committed map of a value and its derivatives with respect to the pre-activations: `sine_j`."""
    generated = importlib.import_module(f"{__package__}.generated.activations")
    function = getattr(generated, f"{name}_j", None)
    if function is None:
        raise KeyError(f"no generated Triton jet {name!r}")
    return function


def from_source(key: str, source: str):
    """The map that `source` defines (one `@triton.jit` function that uses `tl` and the `fi_` primitives).

    Triton reads a function's text through `inspect`, so the source is registered under a file name of its own, which
    contains a hash of it: two formulas of one name stay apart. Raises ValueError if source does not define one
    function.
    """
    cached = _from_source.get((key, source))
    if cached is not None:
        return cached
    names = re.findall(r"^def (\w+)\(", source, re.M)
    if len(names) != 1 or "@triton.jit" not in source:
        raise ValueError(f"source of {key!r}: expected one @triton.jit function, found {names or 'none'}")
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    filename = f"<fused_inr triton map {key} {digest}>"
    # mtime None: linecache.checkcache leaves such entries alone
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace = {"__name__": f"{__package__}.generated.{key}", **_NAMES}
    exec(compile(source, filename, "exec"), namespace)
    function = _from_source[key, source] = namespace[names[0]]
    return function


# ---------------------------------------------------------------- what the kernels do with a map's arguments


class Params(NamedTuple):
    """A map's parameters, each a number or a tensor; the stride of the latter. (A field called `values` would be hidden
    by that of Triton's tuples.)"""

    entries: tuple
    strides: tuple[int, ...]


@triton.jit
def load_params(params, offs_n, mask_n, POINTERS: tl.constexpr, ACC: tl.constexpr):
    """Parameters as the map takes them: bit j of POINTERS says that parameter j is a tensor ([N], or 0-D with stride 0)
    and is read as [1, BLOCK_N]; else it is a number."""
    values = ()
    for j in tl.static_range(len(params.entries)):
        if (POINTERS >> j) & 1:
            p = tl.load(params.entries[j] + offs_n * params.strides[j], mask=mask_n, other=0.0).to(ACC)
            values = values + (p[None, :],)
        else:
            values = values + (params.entries[j],)
    return values


#: For kernels: the interpreter converts float32 to bfloat16 by cutting the bits off.
_CUTS = tl.constexpr(INTERPRETED)


@triton.jit
def narrow(v, DTYPE: tl.constexpr):
    """v in the type of an output, rounded to nearest even."""
    if _CUTS and DTYPE == tl.bfloat16:
        bits = v.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def _to_tf32(v):
    """float32 rounded to the 10 bits of TF32, to nearest, ties away from zero; NaN stays NaN."""
    bits = v.to(tl.uint32, bitcast=True)
    rounded = tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [bits], dtype=tl.uint32, is_pure=True, pack=1
    )  # fmt: skip
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def rounded(v, PRECISION: tl.constexpr):
    """v, rounded where the tensor cores would cut: in TF32 they ignore the 13 low bits, an error of one sign that does
    not average out."""
    if PRECISION == "tf32":
        v = _to_tf32(v)
    return v


@triton.jit
def factor(v, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """v as a factor of a product: in its type, and `rounded`."""
    return rounded(narrow(v, DTYPE), PRECISION)


@triton.jit
def identity(z0, MODE: tl.constexpr):
    return (z0,)


def param_arguments(params, constants, wide: bool, device) -> tuple[Params, int]:
    """Parameters and POINTERS for `load_params`.

    A number argument is float32 in a kernel, so with `wide` (float64) numbers go through memory.
    """
    import torch

    values: list = []
    strides: list[int] = []
    pointers = 0
    for j, (p, c) in enumerate(zip(params, constants, strict=True)):
        if p is None and wide:
            p = torch.tensor(c, dtype=torch.float64, device=device)
        if p is None:
            values.append(float(c))
            strides.append(0)
        else:
            values.append(p)
            strides.append(p.stride(0) if p.dim() else 0)
            pointers |= 1 << j
    return Params(tuple(values), tuple(strides)), pointers
