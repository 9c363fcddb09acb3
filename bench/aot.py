"""Every kernel and shipped configuration, compiled ahead of time: no GPU and no driver needed, only Triton's own tools.

A compile that succeeds proves little: over 512 columns of tensor memory Triton emits a body of `trap`, shared memory
beyond the device's is not refused, and `tl.sin` alone "spills" a table. So each result is read back: ptxas' stack,
local loads and stores, shared and tensor memory, and which instructions the SASS holds.

Not for a process in which Triton interprets (TRITON_INTERPRET=1): the two do not go together.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..kernels import act_map, assembler, launch, linear_act, maps, mlp, moments, sums
from ..kernels.configurations import linear_act as layer_configs
from ..kernels.configurations import mlp as network_configs

ROWS = 65536
_POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Job:
    """One compilation: "forward", "forward_save" (that keeps what its backward takes), "input_grad", "gz", "gz_from_z"
    (from what was kept), "weight_grad", "act_map" or "sum", with shapes;
    "moments" of N settings a program (K: the draws of a chunk); or of a whole network with K inputs, four layers of N
    features and three outputs: "mlp_forward", "mlp_stream" (no weights stay on chip), "mlp_save" (that keeps the
    pre-activations), "mlp_backward" (from those), "mlp_recompute" (without), "mlp_loss", "mlp_one_pass" (in
    registers)."""

    arch: str
    kernel: str
    dtype: torch.dtype
    precision: str
    activation: str
    N: int
    K: int
    aligned: bool = True
    learnable: bool = False
    level: int = 0

    def describe(self) -> dict[str, object]:
        type_name = str(self.dtype).removeprefix("torch.")
        return {
            "arch": self.arch,
            "kernel": self.kernel + ("" if not self.learnable else "+params"),
            "type": type_name if self.dtype != torch.float32 else f"float32 {self.precision}",
            "activation": self.activation,
            "level": self.level,
            "N": self.N,
            "K": self.K,
            "aligned": self.aligned,
        }


class _Arguments:
    """A launch's arguments as Triton's JIT would specialise them: 1 becomes a constant, multiples of 16 are marked."""

    def __init__(self, kernel, aligned: bool):
        self.kernel, self.aligned = kernel, aligned
        self.names = kernel.arg_names
        self.fixed = {p.name for p in kernel.params if p.do_not_specialize}
        self.signature: dict[str, object] = {}
        self.constants: dict[tuple[int, ...], object] = {}
        self.attributes: dict[tuple[int, ...], list] = {}

    def constant(self, **values) -> None:
        for name, value in values.items():
            self.signature[name] = "constexpr"
            self.constants[self.names.index(name),] = value

    def give(self, **values) -> None:
        """What a launch gives: numbers, types for pointers to them, None, maps, and tuples of these."""
        for name, value in values.items():
            self.signature[name] = self._kind((self.names.index(name),), value, name in self.fixed)

    def _kind(self, path: tuple[int, ...], value, fixed: bool):
        if isinstance(value, tuple):
            entries = [self._kind((*path, i), v, fixed) for i, v in enumerate(value)]
            return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
        if isinstance(value, float):
            return "fp32"
        pointer = isinstance(value, torch.dtype)
        if pointer or (isinstance(value, int) and (fixed or value != 1)):
            if self.aligned if pointer else not fixed and value % 16 == 0:
                self.attributes[path] = [["tt.divisibility", 16]]
            return _POINTER[value] if pointer else "i32"
        self.constants[path] = value
        return "constexpr"

    def compile(self, capability: int, options: dict):
        signature = {n: self.signature[n] for n in self.names}
        source = ASTSource(self.kernel, signature, self.constants, self.attributes)
        lower = {k: v for k, v in options.items() if k.islower()}
        target = GPUTarget("cuda", capability, 32)
        with assembler.for_target(target):
            return triton.compile(source, target=target, options=lower)


def _params(job: Job, P: int) -> tuple[maps.Params, int]:
    """Parameters and POINTERS: each a tensor [N] if learnable, else a number."""
    if job.learnable:
        return maps.Params((torch.float32,) * P, (1,) * P), (1 << P) - 1
    return maps.Params((1.5,) * P, (0,) * P), 0


def _rows(job: Job, columns: int) -> tuple[int, int]:
    """Strides of layers and rows of a contiguous [G, ROWS, columns], a column longer when unaligned."""
    row = columns if job.aligned else columns + 1
    return ROWS * row + (0 if job.aligned else 1), row


def _matrices(job: Job, columns: int) -> linear_act.LayerMatrices:
    return linear_act.LayerMatrices(job.dtype, *_rows(job, columns), 1)


def _shape(name: str):
    from fused_inr.activations import generated

    return generated.SHAPES[name]


def build(job: Job) -> tuple[_Arguments, dict]:
    """The kernel's arguments and its launch options."""
    f32 = torch.float32
    if job.kernel == "sum":
        arguments = _Arguments(sums.sum_kernel, job.aligned)
        config = layer_configs.SUM
        arguments.give(in_ptr=f32, out_ptr=job.dtype, S=ROWS, L=job.N, chunk=config.chunk, CHUNKS=256)
        arguments.constant(ACC=tl.float32, BLOCK_S=config.block_s, BLOCK_L=config.block_l)
        return arguments, {"num_warps": config.num_warps, "enable_fp_fusion": True}
    B, C, P = (1, 1, 0) if job.kernel in ("input_grad", "weight_grad") else _shape(job.activation)
    N, K = job.N, job.K
    num = launch.arithmetic(job.dtype, job.precision)
    if job.kernel == "weight_grad":
        arguments = _Arguments(linear_act.weight_grad_kernel, job.aligned)
        kind = layer_configs.kind(N, K)
        config = layer_configs.pick(job.arch, "weight_grad", kind, job.dtype, job.precision, 1, N, K)
        gz = linear_act.LayerRows(job.dtype, ROWS * N, N)
        arguments.give(gz=gz, x=_matrices(job, K), out_ptr=f32, M=ROWS, N=N, K=K, rows=4096, SPLITS=16)
        arguments.constant(DOT_PRODUCT=config.dot, NUM=num, **_blocks(config))
        return arguments, config.options()
    if job.kernel == "act_map":
        return _build_act_map(job, B, C, P)
    if job.kernel == "moments":
        return _build_moments(job, B, C, P)
    if job.kernel in MLP:
        return _build_mlp(job, B, C, P)
    forward = job.kernel in ("forward", "forward_save", "input_grad")
    kernel = linear_act.forward_kernel if forward else linear_act.gz_kernel
    op = "forward" if forward else "gz"
    kind = layer_configs.MAP if job.kernel == "gz_from_z" else layer_configs.kind(N, K)
    config = layer_configs.pick(job.arch, op, kind, job.dtype, job.precision, B, N, K)
    arguments = _Arguments(kernel, job.aligned)
    weight = linear_act.LayerMatrices(job.dtype, B * N * K, K if job.aligned else K + 1, 1)
    if job.kernel == "input_grad":  # the weight [K, N] of the layer, transposed
        weight = linear_act.LayerMatrices(job.dtype, N * K, 1, N if job.aligned else N + 1)
    bias = None if job.kernel == "input_grad" else linear_act.LayerVectors(job.dtype, B * N, 1)
    params, pointers = _params(job, P)
    arguments.give(x=_matrices(job, K), weight=weight, bias=bias, map_params=params, M=ROWS, N=N, K=K)
    arguments.constant(B=B, C=C, POINTERS=pointers, KIND=kind, NUM=num, **_blocks(config))
    keeps = job.kernel in ("forward_save", "gz_from_z")
    half = job.dtype.itemsize == 2 and not job.learnable  # gradients of parameters need z
    kept = (2 if half else 1) if keeps else 0
    columns = {0: 0, 1: B * N, 2: C * B * N}[kept]
    z = linear_act.LayerRows(job.dtype if kept == 2 else f32, ROWS * columns, columns) if kept else None
    if forward:
        arguments.give(y=linear_act.LayerRows(job.dtype, ROWS * C * N, C * N), z=z)
        function = maps.identity if job.kernel == "input_grad" else maps.get(job.activation, 0)
        arguments.constant(MAP=maps.jet(job.activation) if kept == 2 else function, SAVE=kept)
    else:
        gp = f32 if job.learnable else None
        arguments.give(g=_matrices(job, C * N), z=z, gz_ptr=job.dtype, gb_ptr=f32, gp_ptr=gp)
        function = maps.get(job.activation, 1, job.learnable)
        arguments.constant(MAP=function, P=P if job.learnable else 0, KEPT=kept)
    return arguments, config.options()


def _blocks(config: layer_configs.LayerConfig) -> dict[str, int]:
    return {k: v for k, v in config.options().items() if k.startswith("BLOCK")}


#: Jobs of single layers that multiply matrices.
_PRODUCTS = ("forward", "forward_save", "input_grad", "gz", "weight_grad")
#: Jobs of the whole-network kernels; what `network_configs.pick` calls their operation.
MLP = {
    "mlp_forward": "forward",
    "mlp_stream": "forward",
    "mlp_save": "save",
    "mlp_backward": "backward",
    "mlp_recompute": "train",
    "mlp_loss": "train",
    "mlp_one_pass": "one_pass",
}
MLP_HIDDEN, MLP_OUTPUTS = 3, 3


def mlp_config(job: Job) -> network_configs.NetworkConfig:
    B, C, _ = _shape(job.activation)
    width = network_configs.width(job.N, job.arch)
    config = network_configs.pick(job.arch, MLP[job.kernel], job.dtype, job.precision, B, C, width)
    if config is None:
        raise ValueError(f"{job.kernel}: no configuration for width {job.N}, {job.activation}, {job.dtype}")
    return config


def _build_mlp(job: Job, B: int, C: int, P: int) -> tuple[_Arguments, dict]:
    f32, op = torch.float32, MLP[job.kernel]
    config = mlp_config(job)
    W = network_configs.width(job.N, job.arch)
    net = mlp.NetworkSizes(job.K, MLP_OUTPUTS, MLP_HIDDEN + 1, job.N, B, C, P, W)
    kernels = {"train": mlp.train_kernel, "backward": mlp.train_kernel, "one_pass": mlp.one_pass_kernel}
    arguments = _Arguments(kernels.get(op, mlp.forward_kernel), job.aligned)
    half, back = job.dtype.itemsize == 2, job.dtype == f32
    keeps = mlp.PREACTIVATIONS if job.learnable or not half else mlp.JETS
    loss, saves = job.kernel in ("mlp_loss", "mlp_one_pass"), job.kernel == "mlp_save"
    function, jet = maps.get(job.activation, 0), maps.jet(job.activation)
    x = mlp.Matrix(job.dtype, job.K if job.aligned else job.K + 1)
    output = mlp.Matrix(job.dtype, MLP_OUTPUTS)
    arguments.give(
        packed=mlp.Packed(job.dtype, f32), sizes=mlp.Sizes(job.K, net.inputs_pad, MLP_OUTPUTS), M=ROWS,
        numbers=mlp.Numbers(() if job.learnable else (1.5,) * (2 * P), ()),
    )  # fmt: skip
    major = back and (saves or op not in ("forward", "save"))
    compiled_for = mlp.compiled_for(net, config, major, 1 if job.learnable else 2, job.learnable)
    num = launch.arithmetic(job.dtype, job.precision)
    arguments.constant(NET=launch.constants_of(compiled_for), NUM=num)
    if op != "one_pass":
        arguments.give(L=MLP_HIDDEN + 1)
    if op in ("forward", "save"):
        saved = job.dtype if keeps == mlp.JETS else f32
        chosen = jet if saves and keeps == mlp.JETS else function
        arguments.give(x=x, y=output, saved_ptr=saved if saves else None, maps=mlp.Maps(chosen, maps.identity))
        resident = MLP_HIDDEN if config.resident >= MLP_HIDDEN and job.kernel != "mlp_stream" else 0
        arguments.constant(SAVE=keeps if saves else mlp.NOTHING, RESIDENT=resident, STAGES=config.stages)
        return arguments, config.options()
    settled = mlp.by_sums(net, config, layer_configs.MULTIPROCESSORS[job.arch] * config.resident_programs)
    squared = (Squared.triton_map(0), Squared.triton_map(1)) if loss else (None, None)
    rows = mlp.Rows(x, None, output, f32) if loss else mlp.Rows(x, output, None, None)
    arguments.give(
        data=rows, sums_ptr=f32, criterion=mlp.LossNumbers((), 1.0, 1.0), gx_ptr=job.dtype,
        at=mlp.pack.Segments(*(1024,) * len(mlp.pack.Segments._fields)),
    )  # fmt: skip
    last_grad = maps.get("identity", 1)
    if op == "one_pass":
        arguments.give(maps=mlp.Maps(jet, maps.identity, None, last_grad, *squared))
        one_pass = mlp.OnePass(True, True, True, MLP_HIDDEN, net.inputs_pad, config.reload and not back, GROUPS=1)
        arguments.constant(PASS=launch.constants_of(one_pass))
        return arguments, config.options()
    jets, saved = keeps == mlp.JETS, job.kernel == "mlp_backward"
    waits = settled.later or not settled.sums
    copied = not jets or (saved if settled.later else not saved)
    kept = job.dtype if jets else f32
    scratch = mlp.Scratch(kept, job.dtype if waits else None, job.dtype if waits and copied else None)
    grad = maps.get(job.activation, 1, job.learnable)
    arguments.give(
        scratch=scratch, START=0, ROWS_S=ROWS, ROWS_OUT=ROWS, ACCUMULATE=0,
        maps=mlp.Maps(jet if jets else function, maps.identity, grad, last_grad, *squared),
    )  # fmt: skip
    train_pass = mlp.TrainPass(
        True, True, True, GP=P if job.learnable else 0, JETS=jets, RECOMPUTE=not saved, SUMS=settled.sums,
        LATER=settled.later, RELOAD=config.reload, GROUPS=1, STAGES=config.stages,
    )  # fmt: skip
    arguments.constant(PASS=launch.constants_of(train_pass))
    return arguments, config.options()


class Squared:
    """(prediction - target)^2, for the report."""

    @staticmethod
    def triton_map(level: int):
        more, value = [("", "e * e"), (", g0", "2.0 * g0 * e")][level]
        result = f"({value},)" if level == 0 else f"({value}, -({value}))"
        head = f"@triton.jit\ndef report_loss_l{level}(z0, z1{more}, MODE: tl.constexpr):\n"
        return maps.from_source(f"report_loss_l{level}", f"{head}    e = z0 - z1\n    return {result}\n")


def _build_act_map(job: Job, B: int, C: int, P: int) -> tuple[_Arguments, dict]:
    sizes = act_map.groups(job.level, job.learnable, B, C, P)
    streams = sum(max(1, k) for k in sizes[0] + sizes[1])
    config = layer_configs.pick_map(job.arch, streams, job.N)
    arguments = _Arguments(act_map.act_map_kernel, job.aligned)
    f32 = torch.float32
    strides = tuple(k * job.N + (0 if job.aligned else 1) if k else 0 for k in sizes[0])
    streams = act_map.Streams((f32,) * len(sizes[0]), strides, (1,) * len(sizes[0]))
    params, pointers = _params(job, P)
    arguments.give(streams=streams, map_params=params, out_ptrs=(f32,) * len(sizes[1]), M=ROWS, N=job.N)
    arguments.constant(
        MAP=maps.get(job.activation, job.level, job.learnable), POINTERS=pointers, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, GROUPS=act_map.constant_groups(*sizes), NUM=launch.arithmetic(f32, "ieee"),
    )  # fmt: skip
    return arguments, config.options()


def _build_moments(job: Job, B: int, C: int, P: int) -> tuple[_Arguments, dict]:
    arguments = _Arguments(moments.moments_kernel, job.aligned)
    arguments.give(
        sigma_ptr=torch.float32, param_ptr=torch.float32, out_ptr=torch.float64, G=10000, settings=job.N, groups=157,
        last=moments.CHUNK, first_low=0, first_high=0, seed_low=0, seed_high=0,
    )  # fmt: skip
    config = moments.config(B, C)
    arguments.constant(
        MAP=maps.jet(job.activation), MODE=0 if job.precision == "ieee" else 1, B=B, VALUES=C * (1 + B), P=P,
        SLICES=config.slices, BLOCK_M=moments.CHUNK,
    )  # fmt: skip
    return arguments, {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True}


# ---------------------------------------------------------------- what came out

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", re.M)
_TENSOR = re.compile(r"HMMA|HGMMA|UTC\w*MMA|IMMA|QGMMA")


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([os.path.join(_TOOLS, name), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr.strip()[:400]}")
    return result.stdout


def disassembled(binary: str | Path) -> str:
    """The machine code of a cubin file, as text."""
    return _tool("nvdisasm", "-c", str(binary))


def compile_job(job: Job) -> dict[str, object]:
    """Compile one job; a row of the report: what it is, the configuration, resources, instruction counts, problems."""
    start = time.perf_counter()
    row = job.describe()
    try:
        arguments, options = build(job)
        row.update({k.lower(): v for k, v in options.items() if k != "enable_fp_fusion"})
        row.update({k.lower(): v for k, v in _block_constants(arguments).items()})
        if job.kernel in MLP:
            row["programs"] = layer_configs.MULTIPROCESSORS[job.arch] * mlp_config(job).resident_programs
        compiled = arguments.compile(layer_configs.CAPABILITY[job.arch], options)
        row.update(inspect(compiled))
    except Exception as error:  # a row of its own, not the end of the report
        first = next(iter(str(error).strip().splitlines()), "")
        what = f"{type(error).__name__}: {first[:300]}"
        row.update(broken=[what], problems=[what])
        return row
    row["seconds"] = round(time.perf_counter() - start, 2)
    row["broken"] = broken(job, row)
    row["problems"] = row["broken"] + slow(job, row)
    return row


def _block_constants(arguments: _Arguments) -> dict[str, int]:
    """BLOCK_M and its like, also those within a group."""
    found = {arguments.names[path[0]]: v for path, v in arguments.constants.items() if len(path) == 1}
    for value in list(found.values()):
        found.update(value._asdict() if hasattr(value, "_fields") else {})
    return {name: getattr(v, "value", v) for name, v in found.items() if name.startswith("BLOCK")}


_SPECIAL = {"MUFU": 1}
#: Pipes of a multiprocessor besides: special functions with conversions from and to 64 bits, integer multiplications,
#: integer and logical operations with comparisons and selections, float64.
_PIPES = {
    "xu": ("MUFU", "F2F", "I2F", "F2I", "FRND"),
    "imul": ("IMAD",),
    "alu": (
        "LOP3", "IADD3", "IADD", "VIADD", "VIADDMNMX", "SHF", "LEA", "ISETP", "SEL", "PRMT", "IABS", "IMNMX", "VIMNMX",
        "VIMNMX3", "FSETP", "FSEL", "FMNMX", "FMNMX3", "I2FP", "F2FP", "PLOP3", "POPC", "FLO",
    ),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP"),
}  # fmt: skip
#: FHFMA, of 10.0 under Triton 3.9, multiplies half types and adds in float32.
_FLOAT32 = {"FFMA": 1, "FHFMA": 1, "FADD": 1, "FMUL": 1, "FFMA2": 2, "FADD2": 2, "FMUL2": 2}


def by_depth(sass: str, weights: dict[str, int], usual: bool = False) -> list[int]:
    """Weighted instructions outside loops, in loops, in loops within loops, ...

    A loop is what lies between a label and the last jump back to it. Waiting code behind the end of the kernel jumps
    back as well, and makes no loop. `usual` leaves out what a jump ahead on a condition can skip, unless it holds a
    loop: the paths for large arguments and subnormal numbers.
    """
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    end = next((i for i, line in enumerate(lines) if re.search(r"\*/\s+EXIT\b", line)), len(lines))
    loops: dict[int, int] = {}
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        start = labels.get(jump[1], i) if jump else i
        if start < i and not start < end <= i:
            loops[start] = i
    skipped: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"@!?U?P\w+ BRA\b.*\((\.L_x_\d+)\)", line) if usual else None
        target = labels.get(jump[1], i) if jump else i
        if target > i and not any(i < start <= target or i < stop <= target for start, stop in loops.items()):
            skipped.update(range(i + 1, target))
    counts = [0]
    for i, line in enumerate(lines):
        found = None if i in skipped else _INSTRUCTION.match(line)
        weight = weights.get(found[1], 0) if found else 0
        if weight:
            depth = sum(start < i <= stop for start, stop in loops.items())
            counts += [0] * (depth + 1 - len(counts))
            counts[depth] += weight
    return counts


def inspect(compiled) -> dict[str, object]:
    """Registers, stack and local memory (bytes; what ptxas spilled), shared and tensor memory, instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", f.name)
        sass = disassembled(f.name)
    ops = Counter(_INSTRUCTION.findall(sass))
    resource = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    tensor = Counter({op: n for op, n in ops.items() if _TENSOR.fullmatch(op)})
    return {
        "registers": resource.get("REG", -1),
        "spilled": resource.get("STACK", 0) + resource.get("LOCAL", 0),
        "local": ops["LDL"] + ops["STL"],
        "shared": int(compiled.metadata.shared),
        "tmem": int(getattr(compiled.metadata, "tmem_size", 0) or 0),
        "trap": bool(re.search(r"^\s*trap;", compiled.asm["ptx"], re.M)),
        "tensor": sum(tensor.values()),
        "tensor_op": "+".join(sorted(tensor)) or "-",
        "ffma": ops["FFMA"] + ops["FHFMA"],
        "ffma2": ops["FFMA2"],
        "mufu": ops["MUFU"],
        "mufu_at": by_depth(sass, _SPECIAL),
        "fp32_at": by_depth(sass, _FLOAT32),
        "usual_at": {
            "fma": by_depth(sass, _FLOAT32, True),
            **{pipe: by_depth(sass, dict.fromkeys(names, 1), True) for pipe, names in _PIPES.items()},
        },
        "frnd": ops["FRND"],
        "stg": ops["STG"],
        "instructions": sum(ops.values()),
    }


def broken(job: Job, row: dict) -> list[str]:
    """What cannot run, or computes nothing: wrong under any version of the compiler."""
    found = []
    limit = layer_configs.SHARED_LIMIT[job.arch]
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, {job.arch} has {limit}")
    if row["tmem"] > 512:
        found.append(f"{row['tmem']} columns of tensor memory of 512")
    if row["trap"]:
        found.append("the PTX traps")
    arithmetic = row["tensor"] + row["ffma"] + row["ffma2"]
    product = job.kernel in _PRODUCTS or job.kernel in MLP
    if product and not arithmetic:
        found.append("no multiply-add")
    if not row["stg"]:
        found.append("no store")
    return found


def _granted_spill(job: Job) -> float:
    """The bytes of stack that the configuration may take.

    Whole networks: configurations are chosen for aligned operands, few inputs and constant parameters; with others the
    same tile may take any, which is reported and no failure. Entries of their own would have to be measured.
    """
    if job.kernel not in MLP:
        return 0
    if not job.aligned or job.learnable or job.K > 16:
        return math.inf
    B, C, _ = _shape(job.activation)
    width = network_configs.width(job.N, job.arch)
    key = network_configs.entry(job.arch, MLP[job.kernel], job.dtype, job.precision, B, C, width)
    own = key is not None and key[1] == MLP[job.kernel]
    return network_configs.granted_spill(key) if own else network_configs.SPILL


def slow(job: Job, row: dict) -> list[str]:
    """What runs, but must not ship: under the Triton that the configurations were chosen for."""
    found = []
    if max(row["spilled"], row["local"]) > _granted_spill(job):
        found.append(f"{row['spilled']} bytes of stack, {row['local']} local loads and stores")
    product = job.kernel in _PRODUCTS
    dot = (product and layer_configs.kind(job.N, job.K) == layer_configs.DOT) or job.kernel in MLP
    ieee = job.dtype == torch.float32 and job.precision == "ieee"
    if dot and not ieee and not row["tensor"]:
        found.append("no tensor-core instruction")
    if job.kernel in ("mlp_forward", "mlp_stream"):
        stores = row["block_m"] * 16 // (32 * row["num_warps"])  # of the output alone, one by one
        if row["stg"] > max(1, stores):
            found.append(f"{row['stg']} stores, where the output takes {max(1, stores)}: activations leave the chip")
    if job.kernel in MLP and job.arch == "sm90" and row["block_m"] >= 64 and "HGMMA" not in row["tensor_op"]:
        found.append(f"{row['tensor_op']} where sm_90 has HGMMA")
    return found


# ---------------------------------------------------------------- which jobs

#: One activation a branch count (1, 2, 4); the rest of the registry differs from them in the map alone.
REPRESENTATIVES = ("sine", "gabor", "split")


def jobs(
    archs: tuple[str, ...] = ("sm80", "sm90", "sm100"),
    activations: tuple[str, ...] = REPRESENTATIVES,
    *,
    scope: str = "default",
) -> list[Job]:
    """Every kernel x shipped configuration x type, for these activations (each brings its branch count).

    scope: "full" adds unaligned operands, maps with learnable parameters in every kernel and odd widths; "quick" keeps
    one width, and tf32 and bfloat16 of the types; "sample" keeps of the default each kernel, kind of product, type and
    level once an architecture, activations and widths in turns.
    """
    result: dict[object, Job] = {}

    def add(**what) -> None:
        """Once for each different compilation: shapes that lead to one configuration do so to one program."""
        job = Job(**what)
        op = {"input_grad": "forward", "forward_save": "forward", "gz_from_z": "gz"}.get(job.kernel, job.kernel)
        key: object = job
        if op in ("forward", "gz", "weight_grad"):
            kind = layer_configs.MAP if job.kernel == "gz_from_z" else layer_configs.kind(job.N, job.K)
            B = 1 if job.activation == "-" else _shape(job.activation)[0]
            config = layer_configs.pick(job.arch, op, kind, job.dtype, job.precision, B, job.N, job.K)
            multiples = (job.N % 16 == 0, job.K % 16 == 0, job.N == 1)
            key = (replace(job, N=0, K=0), kind, config, multiples)
        result.setdefault(key, job)

    quick, full = scope == "quick", scope == "full"
    widths = (256,) if quick else layer_configs.WIDTHS
    # the widest first: the rest repeats it where it is no different
    shapes = [(w, w) for w in reversed(widths)] + [(256, 2)]
    shapes += [] if quick else [(3, 256)]
    shapes += [(256, 3), (1, 256)] if full else []
    products = shapes + ([] if quick else [(256, 64), (64, 256)])
    types = ((torch.float32, "tf32"), (torch.bfloat16, "ieee")) if quick else layer_configs.TYPES
    for arch in archs:
        for dtype, precision in types:
            for aligned in (True, False) if full else (True,):
                base = {"arch": arch, "dtype": dtype, "precision": precision, "aligned": aligned}
                for name in activations:
                    for N, K in shapes:
                        for kernel in ("forward", "forward_save", "gz"):
                            add(kernel=kernel, activation=name, N=N, K=K, **base)
                    add(kernel="gz_from_z", activation=name, N=256, K=256, **base)
                    if _shape(name)[2] and full:
                        for kernel in ("gz", "gz_from_z"):
                            add(kernel=kernel, activation=name, N=256, K=256, learnable=True, **base)
                for N, K in products:
                    add(kernel="weight_grad", activation="-", N=N, K=K, **base)
                    add(kernel="input_grad", activation="identity", N=K, K=N, **base)
        for what in network_configs.shipped(arch, types, tuple(_shape(name)[:2] for name in activations)):
            name = next(n for n in activations if _shape(n)[:2] == what.kind)
            base = {"arch": arch, "dtype": what.dtype, "precision": what.precision, "activation": name}
            for kernel in (k for k, op in MLP.items() if op == what.op):
                for K in (2, 35) if full and what.op != "one_pass" else (2,):
                    for learnable in (False, True) if full and kernel == "mlp_backward" else (False,):
                        if not (learnable and not _shape(name)[2]):
                            add(kernel=kernel, N=what.width, K=K, learnable=learnable, **base)
            if full:
                add(
                    kernel=next(k for k, op in MLP.items() if op == what.op),
                    N=what.width - 1,
                    K=3,
                    aligned=False,
                    **base,
                )
        for aligned in (True, False) if full else (True,):
            base = {"arch": arch, "dtype": torch.float32, "precision": "ieee", "aligned": aligned, "N": 256, "K": 256}
            add(kernel="sum", activation="-", **base)
            for name in activations:
                for learnable, top in ((False, 3), (True, 2)):
                    if learnable and not _shape(name)[2]:
                        continue
                    for level in range(1 if learnable else 0, (1 if quick else top) + 1):
                        add(kernel="act_map", activation=name, level=level, learnable=learnable, **base)
                for precision in ("ieee", "tf32") if full and aligned else ("ieee",) if aligned else ():
                    moment = {"N": moments.MAX_SETTINGS, "K": moments.CHUNK, "precision": precision}
                    add(kernel="moments", activation=name, **base | moment)
    return _sample(result.values()) if scope == "sample" else list(result.values())


def _sample(wanted: Iterable[Job]) -> list[Job]:
    """One job of each group that differ in activation and width only; the n-th group gives its n-th, cyclically."""
    groups: dict[object, list[Job]] = {}
    for job in wanted:
        kind = layer_configs.kind(job.N, job.K) if job.kernel in _PRODUCTS else None
        key = (job.arch, job.kernel, kind, job.dtype, job.precision, job.aligned, job.learnable, job.level)
        groups.setdefault(key, []).append(job)
    return [group[i % len(group)] for i, group in enumerate(groups.values())]
