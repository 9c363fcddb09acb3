"""What a compiled kernel can reach: resident warps of a multiprocessor, and a roofline of its units.

Time for one row of the problem (all columns; a network: all layers; moments: one draw of one setting), as if each unit
worked alone at its peak rate: device memory, tensor cores, special functions, and the pipe of float32 arithmetic; for
moments integer multiplications, the other integer operations and float64 as well. The largest is the floor, and names
what binds. Operations and bytes of the products come from the shapes as the kernel pads them; special functions and
multiply-adds of the maps are counted in the SASS, by the loop that they stand in.

Left out: weights and their gradients (read and written once for all rows), partial sums, whatever stays in the L2
cache, integer arithmetic (except in moments), and latency. Code behind a branch that few arguments take counts as taken
(except in moments, where a tile of draws seldom has such an argument).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor of an architecture holds."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536
    tmem: int = 0


#: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; tensor memory: PTX ISA, tcgen05.
LIMITS = {
    "sm80": Limits(warps=64, blocks=32, shared=164 * 1024),
    "sm86": Limits(warps=48, blocks=16, shared=100 * 1024),
    "sm90": Limits(warps=64, blocks=32, shared=228 * 1024),
    "sm100": Limits(warps=64, blocks=32, shared=228 * 1024, tmem=512),
}
#: Granularities, from the same table and the occupancy calculator: registers of a warp in multiples of 256, a quarter
#: of the register file to each of four schedulers; shared memory in multiples of 128 bytes, and 1 KB of each block is
#: the system's.
REGISTER_UNIT, SCHEDULERS, SHARED_UNIT, SHARED_SYSTEM = 256, 4, 128, 1024


@dataclass(frozen=True)
class PeakRates:
    """Peak rates: bytes/s; FLOP/s of the dense product of half types and of TF32; multiprocessors; the clock that the
    data sheet's float32 rate implies; and of a multiprocessor a clock: float32 and float64 lanes, special functions
    (and conversions to float64), integer multiplications, other integer operations."""

    name: str
    arch: str
    bandwidth: float
    half: float
    tf32: float
    multiprocessors: int
    clock: float
    lanes: int
    double: int
    # CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", 8.0 and 9.0 (GA100 and Hopper white
    # papers: 64 INT32 lanes); 10.0 is taken to be as 9.0
    special: int = 16
    integer_multiply: int = 64
    integer: int = 64

    @property
    def fma(self) -> float:
        """Multiply-adds a second."""
        return self.multiprocessors * self.lanes * self.clock

    @property
    def sfu(self) -> float:
        return self.multiprocessors * self.special * self.clock

    @property
    def imul(self) -> float:
        return self.multiprocessors * self.integer_multiply * self.clock

    @property
    def alu(self) -> float:
        return self.multiprocessors * self.integer * self.clock

    @property
    def fp64(self) -> float:
        return self.multiprocessors * self.double * self.clock


#: The first of an architecture is the one in the table.
DEVICES = (
    # NVIDIA A100 data sheet, 80 GB SXM: 2,039 GB/s, 312 and 156 TFLOP/s dense, 19.5 TFLOP/s float32, 9.7
    # float64; GA100 white paper: 108 multiprocessors of 64 lanes, 1.41 GHz
    PeakRates("A100", "sm80", 2.039e12, 312e12, 156e12, 108, 1.41e9, 64, 32),
    # NVIDIA H200 data sheet, SXM: 4.8 TB/s, otherwise as the H100; a copy was seen to reach 4.3 TB/s, bf16 products 790
    # TFLOP/s on random data
    PeakRates("H200", "sm90", 4.8e12, 989e12, 494e12, 132, 1.98e9, 128, 64),
    # NVIDIA H100 data sheet, SXM: 3.35 TB/s, 989 and 494 TFLOP/s dense (half of those with sparsity), 67 TFLOP/s
    # float32, 34 float64; Hopper white paper: 132 multiprocessors of 128 lanes
    PeakRates("H100", "sm90", 3.35e12, 989e12, 494e12, 132, 1.98e9, 128, 64),
    # NVIDIA HGX B200 data sheet, of 8 GPUs, a GPU each: 8 TB/s (7.7 in some tables), 2.25 and 1.12 PFLOP/s dense,
    # 75 TFLOP/s float32, 37 float64; 148 multiprocessors of 128 lanes give the clock
    PeakRates("B200", "sm100", 8.0e12, 2250e12, 1125e12, 148, 1.98e9, 128, 64),
)
UNITS = ("memory", "tensor", "sfu", "fma", "imul", "alu", "fp64")


@dataclass(frozen=True)
class Occupancy:
    """Resident warps and blocks of a multiprocessor, and what keeps them from being more."""

    warps: int
    blocks: int
    of: int
    by: str


def occupancy(
    arch: str, registers: int, num_warps: int, shared: int, tmem: int = 0, programs: int | None = None
) -> Occupancy:
    """From registers a thread, warps a block, bytes of shared memory and columns of tensor memory a block; and of
    persistent kernels the number of programs, spread over the multiprocessors of the architecture's device."""
    limits = LIMITS[arch]
    of_warp = _multiple(32 * max(1, registers), REGISTER_UNIT)
    warps = SCHEDULERS * (limits.registers // SCHEDULERS // of_warp)
    blocks = {
        "registers": warps // num_warps,
        "shared": limits.shared // (_multiple(shared, SHARED_UNIT) + SHARED_SYSTEM),
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
    }
    if tmem:
        blocks["tmem"] = limits.tmem // tmem
    device = next((d for d in DEVICES if d.arch == arch), None)
    if programs and device:
        blocks["programs"] = math.ceil(programs / device.multiprocessors)
    by = min(blocks, key=lambda k: blocks[k])
    return Occupancy(blocks[by] * num_warps, blocks[by], limits.warps, by)


def _multiple(n: int, unit: int) -> int:
    return math.ceil(n / unit) * unit


@dataclass(frozen=True)
class RowCost:
    """One row: bytes of device memory, operations of tensor cores and their type ("half" or "tf32"), special functions,
    instructions of the float32 pipe (a multiply-add, a product or a sum are one each); integer multiplications, other
    integer operations and float64 where they are counted."""

    bytes: float
    tensor: float
    rate: str
    sfu: float
    fma: float
    imul: float = 0.0
    alu: float = 0.0
    fp64: float = 0.0


def estimate(cost: RowCost, device: PeakRates) -> dict[str, float | str]:
    """Picoseconds a row of each unit, the largest of them ("floor") and its name ("bound")."""
    seconds = {
        "memory": cost.bytes / device.bandwidth,
        "tensor": cost.tensor / getattr(device, cost.rate),
        "sfu": cost.sfu / device.sfu,
        "fma": cost.fma / device.fma,
        "imul": cost.imul / device.imul,
        "alu": cost.alu / device.alu,
        "fp64": cost.fp64 / device.fp64,
    }
    bound = max(UNITS, key=lambda unit: seconds[unit])
    return {**{unit: seconds[unit] * 1e12 for unit in UNITS}, "floor": seconds[bound] * 1e12, "bound": bound}


# -- what a step of a network or layer takes at least

#: Special functions of the hardware that a primitive of a map takes, where it takes any.
SPECIAL = {
    **dict.fromkeys(("sin", "cos", "exp", "log", "log1p", "expm1", "tanh", "sinh", "cosh", "erf", "sqrt", "atan"), 1),
    **dict.fromkeys(("sincos", "tan", "sigmoid", "softplus", *(f"sinc{i}" for i in range(7))), 2),
}


def named(name: str) -> PeakRates | None:
    """The device that a driver calls by a name such as "NVIDIA H100 80GB HBM3"."""
    return next((d for d in DEVICES if d.name in name), None)


def special_functions(activation: str, derivatives: bool) -> int:
    """Of one element of a map, all branches together; with its derivatives, in one evaluation."""
    from ..activations import lookup

    map = lookup(activation)
    program = map.jet() if derivatives else map.program(0)
    nodes, of_row = program.tape.nodes, set()
    names = {f"z{i}" for i in range(map.branches)}
    for i, node in enumerate(nodes):  # what depends on parameters alone is computed once
        if node.value in names or any(arg in of_row for arg in node.args):
            of_row.add(i)
    return sum(SPECIAL.get(nodes[i].op, 0) for i in program.live() if i in of_row)


def case_floors(case, device: PeakRates | None, ceilings: dict[str, float]) -> dict[str, float]:
    """Nanoseconds a row that a case (`cases.Case`) takes at least, by what takes them: "memory", "products", "special".

    Memory: a network reads coordinates and targets and writes outputs once, a layer as `Case.bytes` has it, an Eikonal
    step its coordinates. Products: `Case.operations`, nothing recomputed. Special functions: each element's map once,
    with its derivatives where the step has gradients. Rates are those that were measured (`ceilings`: "copy" in GB/s, a
    precision's products in TFLOP/s), else the data sheet's; without either there is no such floor.
    """
    found = {}
    bandwidth = ceilings["copy"] * 1e9 if "copy" in ceilings else device.bandwidth if device else 0.0
    if case.kind == "layer" and case.step != "eikonal":
        moved = case.bytes() / case.rows
    else:
        numbers = case.in_features + (case.out_features if case.step != "eikonal" else 0)
        moved = numbers * case.dtype.itemsize
    if bandwidth:
        found["memory"] = moved / bandwidth * 1e9
    rate = ceilings.get(case.precision, 0.0) * 1e12
    if not rate and device:
        sheet = {"bf16": device.half, "fp16": device.half, "tf32": device.tf32, "ieee": 2 * device.fma}
        rate = sheet[case.precision]
    if rate:
        found["products"] = case.operations() / case.rows / rate * 1e9
    if device:
        layers = case.shapes() if case.kind == "layer" else case.shapes()[:-1]
        elements = case.width * len(layers)
        found["special"] = elements * special_functions(case.activation, case.step != "inference") / device.sfu * 1e9
    return found


# -- what a kernel does for a row

#: Layers with the map and outputs of the networks that are compiled (`kernels/aot.py`: three hidden products).
MLP_LAYERS, MLP_OUTPUTS = 4, 3


def row_cost(row: dict) -> RowCost:
    """Of a row of the report: `kernel`, `type`, `activation`, `level`, `N`, `K`, blocks, `num_warps`, and instructions
    by depth of loop (`mufu_at`, `fp32_at`)."""
    kernel = row["kernel"].removesuffix("+params")
    if kernel.startswith("mlp_"):
        return _network(row, kernel)
    if kernel == "act_map":
        return _map(row)
    if kernel == "moments":
        return _moments(row)
    if kernel == "sum":
        return RowCost(bytes=4 * row["N"], tensor=0, rate="half", sfu=0, fma=row["N"])
    return _layer(row, kernel)


def _shape(row: dict) -> tuple[int, int, int]:
    """Branches, outputs and parameters of the map; products alone have none."""
    from ..activations import generated

    return generated.SHAPES[row["activation"]] if row["activation"] != "-" else (1, 1, 0)


def _type(row: dict) -> tuple[int, str, int]:
    """Bytes of a stored number, the tensor cores' rate, products for one (0: not on tensor cores)."""
    name, _, precision = row["type"].partition(" ")
    if name != "float32":
        return 2, "half", 1
    return {"tf32": (4, "tf32", 1), "tf32x3": (4, "tf32", 3), "bf16x3": (4, "half", 3)}.get(precision, (4, "half", 0))


def _per_row(counts: list[int], trips: float, row: dict, tiles: int) -> float:
    """Instructions of all threads a row: those outside loops once a tile, those within `trips` times."""
    return (sum(counts[:1]) + trips * sum(counts[1:])) * 32 * row["num_warps"] * tiles / row["block_m"]


def _layer(row: dict, kernel: str) -> RowCost:
    from ..kernels.configurations import linear_act as layer_configs

    B, C, _ = _shape(row)
    size, rate, products = _type(row)
    N, K = row["N"], row["K"]
    if kernel == "weight_grad":
        columns, inner = _multiple(N, row["block_n"]), _multiple(K, row["block_k"])
        dot = layer_configs.kind(N, K) == layer_configs.DOT and products > 0
        flops = 2 * columns * inner
        return RowCost(size * (N + K), flops * products if dot else 0, rate, 0, 0 if dot else flops / 2)
    from_z = kernel == "gz_from_z"
    kind = layer_configs.MAP if from_z else layer_configs.kind(N, K)
    tiles = math.ceil(N / row["block_n"])
    inner = K if kind == layer_configs.NARROW_K else _multiple(K, row["block_k"])
    flops = 0 if from_z else 2 * B * tiles * row["block_n"] * inner
    dot = kind == layer_configs.DOT and products > 0
    trips = math.ceil(K / row["block_k"])
    # a product by multiply-adds in a loop is counted from its shape, and so are those of no loop by the SASS
    in_loop = kind == layer_configs.NARROW_N or (kind == layer_configs.DOT and not dot)
    fma = _per_row(row["fp32_at"], 0 if in_loop else trips, row, tiles) + (flops / 2 if in_loop else 0)
    kept = size * C * B * N if size == 2 else 4 * B * N  # derivatives, or pre-activations
    if kernel in ("forward", "forward_save", "input_grad"):
        moved = size * (K + C * N) + (kept if kernel == "forward_save" else 0)
    else:
        moved = size * (C * N + B * N) + (kept if from_z else size * K)
    return RowCost(moved, flops * products if dot else 0, rate, _per_row(row["mufu_at"], trips, row, tiles), fma)


def _map(row: dict) -> RowCost:
    from ..kernels import act_map

    B, C, P = _shape(row)
    sizes = act_map.groups(row["level"], row["kernel"].endswith("+params"), B, C, P)
    tiles = math.ceil(row["N"] / row["block_n"])
    moved = 4 * row["N"] * sum(sum(group) for group in sizes)
    return RowCost(moved, 0, "half", _per_row(row["mufu_at"], 1, row, tiles), _per_row(row["fp32_at"], 1, row, tiles))


def _network(row: dict, kernel: str) -> RowCost:
    from ..kernels.configurations import linear_act as layer_configs
    from ..kernels.configurations import mlp as network_configs

    B, C, _ = _shape(row)
    size, rate, products = _type(row)
    K, width = row["K"], network_configs.width(row["N"], row["arch"])
    inputs, outputs = max(16, 1 << (K - 1).bit_length()), max(16, MLP_OUTPUTS)
    narrow = K <= layer_configs.NARROW_K_LIMIT
    first = 2 * inputs * B * width
    hidden = (MLP_LAYERS - 1) * 2 * B * width * C * width
    last = 2 * C * width * outputs
    # activations and derivatives, or pre-activations
    z = (2 * C * (1 + B) if size == 2 else 4 * B) * MLP_LAYERS * width
    forward, pass_back = (0 if narrow else first) + hidden + last, 2 * (first + hidden + last)
    moved = size * (K + MLP_OUTPUTS)
    flops = forward
    if kernel == "mlp_save":
        moved += z
    elif kernel not in ("mlp_forward", "mlp_stream"):
        moved += size * K + (z if kernel == "mlp_backward" else 0)  # the gradient of x; z as saved
        moved += 4 if kernel in ("mlp_loss", "mlp_one_pass") else 0  # a weight a row
        flops = pass_back + (0 if kernel == "mlp_backward" else forward)
    # the loop over tiles of rows is the outermost, those within it go over the hidden layers
    sfu, fma = (
        (sum(row[name][1:2]) + (MLP_LAYERS - 1) * sum(row[name][2:])) * 32 * row["num_warps"] / row["block_m"]
        for name in ("mufu_at", "fp32_at")
    )
    return RowCost(moved, flops * products, rate, sfu, fma)


def _moments(row: dict) -> RowCost:
    """One draw of one setting; a program has N settings for each chunk of K draws that it makes."""
    B, C, _ = _shape(row)
    a_draw = 32 * row["num_warps"] / row["K"]
    counts = {unit: (sum(at[:1]) / row["N"] + sum(at[1:])) * a_draw for unit, at in row["usual_at"].items()}
    moved = 8 * 3 * C * (1 + B) / row["K"]
    return RowCost(moved, 0, "half", counts["xu"], counts["fma"], counts["imul"], counts["alu"], counts["fp64"])


def annotate(row: dict) -> None:
    """Add `occupancy` and `roofline` ({device: picoseconds a row by unit, "floor", "bound"}) to a row of the report."""
    if "registers" not in row:
        return
    resources = (row["registers"], row["num_warps"], row["shared"], row.get("tmem", 0), row.get("programs"))
    row["occupancy"] = asdict(occupancy(row["arch"], *resources))
    if "mufu_at" in row:
        what = row_cost(row)
        row["roofline"] = {d.name: estimate(what, d) for d in DEVICES if d.arch == row["arch"]}


def of_table(row: dict) -> dict[str, float | str] | None:
    """The estimate for the device that stands for the architecture in the table."""
    return next(iter(row.get("roofline", {}).values()), None)
