"""What every launch calls first: Triton's binder of a kernel's arguments. Ahead-of-time compiling does not use it, and
the interpreter has another."""

import ast
import importlib
import inspect
import pkgutil
from typing import NamedTuple

import fused_inr.kernels
import pytest
import torch
import triton
from fused_inr.kernels.maps import from_source, get
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

#: names that the binder's generated function, or `kernel[grid](..)` itself, uses for values of its own
TAKEN = {
    "params",
    "specialization",
    "options",
    "backend",
    "specialize_impl",
    "JITCallable",
    "debug",
    "grid",
    "warmup",
}


def modules() -> list:
    found = pkgutil.walk_packages(fused_inr.kernels.__path__, "fused_inr.kernels.")
    return [importlib.import_module(module.name) for module in found]


def kernels() -> dict[str, JITFunction]:
    """Everything of the package that is launched: by convention, and nothing else is, `.._kernel`."""
    return {
        name: value
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


KERNELS = list(kernels().values())
#: arguments that are one number, not named as a constant is
NUMBERS = set(
    "rows programs scale chunk count settings groups last first_low first_high branch seed_low seed_high".split()
)
#: names that Triton gives to what is its own of a tuple within a kernel, or of a constexpr
HIDDEN = {"values", "value", "type"}


class Group(NamedTuple):
    """As the kernels' own: pointers, strides, numbers, nothing, within each other."""

    ptr: object
    stride: int
    numbers: tuple
    none: None = None


def value_of(name: str) -> object:
    if name.endswith("ptr"):
        return torch.zeros(4)
    if name.endswith("ptrs"):
        return (torch.zeros(4), torch.zeros(8))
    return 48 if name in NUMBERS or name.isupper() else Group(torch.zeros(4), 48, (1.5, Group(torch.zeros(4), 1, ())))


def bind(kernel: JITFunction) -> dict:
    """Arguments as some launch gives them, as the binder returns them."""
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 80, 32)))
    given = {name: value_of(name) for name in kernel.arg_names}
    bound, specialization, _ = binder(*given.values())
    assert len(specialization) == len(given)
    for name, value in given.items():
        assert bound[name] is value, f"{name} is not what was given"
    return bound


def test_every_launch_is_of_a_kernel_that_is_found():
    names, launches = set(kernels()), 0
    assert {"forward_kernel", "train_kernel", "act_map_kernel", "moments_kernel", "random_bits_kernel"} <= names
    for module in modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):  # name[grid](..)
                name = getattr(node.func.value, "id", "")
                launches += name in names
                assert not isinstance(getattr(module, name, None), JITFunction) or name in names, name
    assert launches


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_every_argument_arrives(kernel):
    bind(kernel)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_no_argument_has_a_name_of_the_binder(kernel):
    assert not TAKEN & set(kernel.arg_names)


def test_no_field_of_a_group_is_hidden_by_tritons_own():
    found = {
        value
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields")
    }
    assert {"Rows", "Net", "Segments", "Params", "Arithmetic"} <= {group.__name__ for group in found}
    for group in found:
        assert not HIDDEN & set(group._fields), group


@triton.jit(do_not_specialize=["alone", "within"])
def grouped_kernel(alone, within, group, maps):
    pass


def test_entries_of_a_group_are_specialised_as_arguments_are():
    """But for `do_not_specialize`, which does not reach within."""
    backend = make_backend(GPUTarget("cuda", 80, 32))
    binder = create_function_from_signature(grouped_kernel.signature, grouped_kernel.params, backend)
    entries = (torch.zeros(8), torch.zeros(8)[1:], 16, 3, 1, None, 1.5, (32,))

    def kinds(*values):
        _, found, _ = binder(*values)
        return [tuple(each) for each in found]

    alone, within, (types, keys), _ = kinds(1, (1,), entries, ())
    assert alone[0] == "i32" and within[0] == ("constexpr",)
    assert types == ("*fp32", "*fp32", "i32", "i32", "constexpr", "constexpr", "fp32", ("i32",))
    for i, value in enumerate(entries):
        assert (types[i], keys[i]) == kinds(0, 0, value, ())[2]
    maps = [kinds(0, 0, 0, (function,))[3] for function in (get("sine", 0), get("sine", 1))]
    assert maps[0] != maps[1] and maps[0][0] == ("constexpr",)


def test_a_function_within_a_constexpr_is_known_by_its_name_alone():
    """To the cache on disk; as an entry of an argument by its source."""
    source = "@triton.jit\ndef of_one_name(z0, MODE: tl.constexpr):\n    return (z0{},)\n"
    functions = [from_source("of_one_name", source.format(more)) for more in ("", " * 2")]
    as_constexpr, as_entry = set(), set()
    for function in functions:
        as_constexpr.add(ASTSource(grouped_kernel, {"maps": "constexpr"}, {(3,): (function,)}).hash())
        as_entry.add(ASTSource(grouped_kernel, {"maps": ("constexpr",)}, {(3, 0): function}).hash())
    assert len(as_constexpr) == 1 and len(as_entry) == 2


@triton.jit
def shadowed_kernel(x_ptr, params):
    pass


def test_an_argument_that_is_shadowed_is_noticed():
    with pytest.raises((AssertionError, TypeError)):
        bind(shadowed_kernel)
