"""What every launch calls first: Triton's binder of a kernel's arguments. Ahead-of-time compiling does not use it, and
the interpreter has another."""

import ast
import importlib
import inspect
import pkgutil

import fused_inr.kernels
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
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


def bind(kernel: JITFunction) -> dict:
    """Arguments as some launch gives them, as the binder returns them."""
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 80, 32)))
    given = {}
    for name in kernel.arg_names:
        if name.endswith("ptr"):
            given[name] = torch.zeros(4)
        elif name.endswith("ptrs"):
            given[name] = (torch.zeros(4), torch.zeros(8))
        elif "param" in name or "strides" in name:
            given[name] = (1.5, 2.5)
        else:
            given[name] = 48
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


@triton.jit
def shadowed_kernel(x_ptr, params):
    pass


def test_an_argument_that_is_shadowed_is_noticed():
    with pytest.raises((AssertionError, TypeError)):
        bind(shadowed_kernel)
