"""Facts of docs/facts.md that need none of our code: what PyTorch and Triton do, in the versions for which it is told.

One that fails under these versions is a wrong row. Under others nothing is asked: whoever raises a version in
constraints.txt raises it here, and sees which rows are to be written anew.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import func

torch_213 = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason=f"this is torch {torch.__version__}")


class Cube(torch.autograd.Function):
    """x^3, as PyTorch's documentation has functions written; notes what forward mode is when its `jvp` runs."""

    generate_vmap_rule = True
    seen = None

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * x * g

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        Cube.seen = torch.autograd.forward_ad._current_level, torch._C._is_fwd_grad_enabled()
        return 3 * x * x * t


@torch_213
def test_forward_mode_over_forward_mode_is_wrong():
    x = torch.tensor(2.0)
    assert func.jacfwd(func.jacrev(Cube.apply))(x) == 12
    assert func.jacfwd(func.jacfwd(Cube.apply))(x) != 12


@torch_213
def test_forward_mode_is_off_while_a_jvp_runs():
    with torch.autograd.forward_ad.dual_level():
        Cube.apply(torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2)))
    assert Cube.seen == (0, False)


@torch_213
def test_dynamo_refuses_a_function_with_a_jvp():
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="jvp"):
        torch.compile(Cube.apply, fullgraph=True, backend="eager")(torch.ones(2, requires_grad=True))


@torch_213
def test_what_requires_a_gradient_need_not_be_wanted():
    seen = []

    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            asked = [torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions]
            seen.append((ctx.needs_input_grad, asked))
            return g * b, g * a

    leaves = [torch.ones(2, requires_grad=True) for _ in range(2)]
    a, b = (leaf.clone() for leaf in leaves)
    Multiply.apply(a, b).sum().backward(inputs=[leaves[0]])
    assert seen == [((True, True), [True, False])]

    with pytest.raises(RuntimeError):  # a leaf of autograd.grad
        torch.autograd.grad(Multiply.apply(*leaves).sum(), leaves[0])


@torch_213
def test_inside_vmap_a_tensor_shows_no_storage():
    def f(x):
        with pytest.raises(NotImplementedError):
            x.untyped_storage()
        return x

    func.vmap(f)(torch.ones(2, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")
@torch_213
def test_freed_storage_is_refused_by_products_only(tmp_path):
    def outcome(expression):
        code = f"import torch; x = torch.ones(2, 2); x.untyped_storage().resize_(0); {expression}"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert "RuntimeError" in outcome("x @ torch.ones(2, 2)").stderr
    assert outcome("x + 1").returncode == -11  # read at address 0


@torch_213
def test_losses_and_activations_whose_parameters_are_numbers_only():
    one, x = torch.tensor(1.0), torch.ones(3)
    with pytest.raises(TypeError):
        F.huber_loss(x, x, delta=one.requires_grad_())
    with pytest.raises(TypeError):
        F.softplus(x, beta=one)


@torch_213
def test_a_device_is_set_by_its_index():
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_device(torch.device("cuda"))


@torch_213
def test_a_second_registration_ends_the_process(tmp_path):
    library = Path(__file__).resolve().parents[1] / "fused_inr" / "_C.so"
    if not library.exists():
        pytest.skip("no library was built beside the package")
    shutil.copy(library, tmp_path / "again.so")
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
try:
    torch.ops.load_library({str(tmp_path / "again.so")!r})
except BaseException:
    print("caught")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode < 0 and "register an operator" in done.stderr and not done.stdout


def test_sympify_evaluates_a_string():
    import sympy

    assert sympy.sympify("__import__('math').floor(2.5)") == 2


# -- Triton, compiled ahead of time

KERNELS = r"""
import json, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, types, constants, capability, **options):
    signature = dict(zip(kernel.arg_names, types))
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, places), GPUTarget("cuda", capability, 32), options)

@triton.jit
def negative(p, q):
    tl.store(q, -tl.load(p))

@triton.jit
def sum_of_product(p, q):
    x = tl.load(p)
    tl.store(q, x * tl.load(p + 1) + 1.5)

@triton.jit
def sine(p, q):
    i = tl.arange(0, 128)
    tl.store(q + i, tl.sin(tl.load(p + i)))

@triton.jit
def products(p, q, N: tl.constexpr):
    m, n, k = tl.arange(0, 128), tl.arange(0, N), tl.arange(0, 64)
    first, second = tl.zeros((128, N), tl.float32), tl.zeros((128, N), tl.float32)
    for j in range(8):
        a = tl.load(p + m[:, None] * 1024 + k[None, :] + j * 64)
        b = tl.load(p + (k[:, None] + j * 64) * 1024 + n[None, :])
        first, second = tl.dot(a, b, first), tl.dot(a + 1.0, b, second)
    tl.store(q + m[:, None] * 1024 + n[None, :], first * second)

floats, found = ("*fp32", "*fp32"), {}
found["subtractions"] = len(re.findall(r"\bsub\.f32", compiled(negative, floats, {}, 80).asm["ptx"]))
for fusion in (True, False):
    ptx = compiled(sum_of_product, floats, {}, 80, enable_fp_fusion=fusion).asm["ptx"]
    found[f"multiply-adds, {fusion}"] = len(re.findall(r"\bfma\.rn\.f32", ptx))
with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
    file.write(compiled(sine, floats, {}, 90).asm["ptx"])
    file.flush()
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
found["stack"] = int(re.search(r"(\d+) bytes stack frame", said)[1])
for N in (64, 512):
    made = compiled(products, ("*bf16", "*fp32"), {"N": N}, 100, num_warps=8, num_stages=3)
    trap = bool(re.search(r"^\s*trap;", made.asm["ptx"], re.MULTILINE))
    found[f"product {N}"] = made.metadata.shared, made.metadata.tmem_size, trap
print(json.dumps(found))
"""


def test_what_triton_compiles(tmp_path):
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.7."):
        pytest.skip(f"this is Triton {triton.__version__}")
    import json

    path = tmp_path / "kernels.py"  # Triton reads the source of its kernels
    path.write_text(KERNELS)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)[0])
    assert found["subtractions"] == 1  # -x is 0 - x ..
    interpreted = """
import torch, triton, triton.language as tl
@triton.jit
def negative(p, q):
    tl.store(q, -tl.load(p))
y = torch.ones(1)
negative[(1,)](torch.zeros(1), y)
print(bool(torch.signbit(y)))
"""
    path.write_text(interpreted)
    environment["TRITON_INTERPRET"] = "1"
    signs = subprocess.check_output([sys.executable, str(path)], env=environment, text=True, timeout=300)
    assert signs.split() == ["False"]  # .. there, too
    assert (found["multiply-adds, True"], found["multiply-adds, False"]) == (1, 0)
    assert found["stack"] > 0  # libdevice's table
    shared, columns, trap = found["product 64"]
    assert columns <= 512 and not trap
    shared, columns, trap = found["product 512"]
    assert columns > 512 and trap
    assert shared > 232448  # bytes that an sm_100 multiprocessor gives a block
