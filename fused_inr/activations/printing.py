"""Prints maps as source: PyTorch (the reference), Triton, C++; and runs printed Python."""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .tape import ARITHMETIC, MAX_LEARNABLE_LEVEL, MAX_LEVEL, PRIMITIVES, Program

if TYPE_CHECKING:
    from .spec import ActivationMap

_INLINE = 72  # a single-use expression longer than this gets a name
_SYMBOL = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_PRECEDENCE = {"add": 1, "sub": 1, "mul": 2, "div": 2, "neg": 3}


class Printer:
    """How one language spells constants, calls and assignments."""

    def constant(self, value: float) -> str:
        """Print a number."""
        return repr(value)

    def call(self, op: str, args: list[str]) -> str:
        """Print the call of a primitive."""
        raise NotImplementedError

    def assign(self, name: str, expression: str) -> str:
        """Print the line that gives an expression a name."""
        return f"    {name} = {expression}"

    def sincos(self, s: str, c: str, argument: str) -> str:
        """Print the line that names the sine and the cosine of one argument."""
        raise NotImplementedError

    fuses_sincos = True


class TorchPrinter(Printer):
    """Prints Python that calls `primitives`."""

    fuses_sincos = False

    def call(self, op, args):
        return f"p.{op}({', '.join(args)})"


class TritonPrinter(Printer):
    """Prints Python for Triton, whose primitives take a mode."""

    def call(self, op, args):
        if op == "detach":
            return f"({args[0]})"
        mode = ", MODE" if PRIMITIVES[op] == 1 or op == "pow" else ""
        return f"fi_{op}({', '.join(args)}{mode})"

    def sincos(self, s, c, argument):
        return f"    {s}, {c} = fi_sincos({argument}, MODE)"


class CppPrinter(Printer):
    """Prints C++ for a vector type V."""

    def constant(self, value):
        return f"fi_const<V>({value!r})"

    def call(self, op, args):
        return f"({args[0]})" if op == "detach" else f"fi_{op}({', '.join(args)})"

    def assign(self, name, expression):
        return f"  const V {name} = {expression};"

    def sincos(self, s, c, argument):
        return f"  V {s}, {c};\n  fi_sincos({argument}, {s}, {c});"


def body(program: Program, target: Printer) -> tuple[list[str], list[str]]:
    """Print a program: the assignments, one a line, and one expression an output."""
    nodes = program.tape.nodes
    live = program.live()
    uses = Counter(a for i in live for a in nodes[i].args)
    uses.update(program.output_nodes)
    lines: list[str] = []
    text: dict[int, tuple[str, int]] = {}  # expression, precedence (9: atom)
    pairs: dict[int, dict[str, int]] = {}
    if target.fuses_sincos:
        for i in live:
            if nodes[i].op in ("sin", "cos"):
                pairs.setdefault(nodes[i].args[0], {})[nodes[i].op] = i
        pairs = {a: p for a, p in pairs.items() if len(p) == 2}
    named = 0

    def operand(i: int, level: int, right: bool = False) -> str:
        expression, precedence = text[i]
        return f"({expression})" if precedence < level or (right and precedence == level) else expression

    def new_name() -> str:
        nonlocal named
        named += 1
        return f"t{named}"

    for i in live:
        node = nodes[i]
        if i in text:  # the second of a sin/cos pair
            continue
        if node.op == "input":
            text[i] = (str(node.value), 9)
            continue
        if (value := program.tape.constant(i)) is not None:
            text[i] = (target.constant(value), 9 if value >= 0 else 3)
            continue
        if node.op in ("sin", "cos") and node.args[0] in pairs:
            pair = pairs[node.args[0]]
            s, c = new_name(), new_name()
            lines.append(target.sincos(s, c, text[node.args[0]][0]))
            text[pair["sin"]], text[pair["cos"]] = (s, 9), (c, 9)
            continue
        if node.op in ARITHMETIC:
            precedence = _PRECEDENCE[node.op]
            if node.op == "neg":
                expression = "-" + operand(node.args[0], precedence)
            else:
                a, b = node.args
                strict = node.op in ("sub", "div")
                expression = f"{operand(a, precedence)} {_SYMBOL[node.op]} {operand(b, precedence, strict)}"
        else:
            precedence = 9
            expression = target.call(node.op, [text[a][0] for a in node.args])
        if uses[i] > 1 or len(expression) > _INLINE:
            name = new_name()
            lines.append(target.assign(name, expression))
            text[i] = (name, 9)
        else:
            text[i] = (expression, precedence)
    return lines, [text[i][0] for i in program.output_nodes]


def _is_constant(program: Program, position: int) -> bool:
    """Tell whether no row input reaches an output, which then has no shape of its own."""
    rows = set()
    row_names = {name for group, names in program.inputs if program.is_row(group) for name in names}
    for i, node in enumerate(program.tape.nodes):
        if (node.op == "input" and node.value in row_names) or any(a in rows for a in node.args):
            rows.add(i)
    return program.output_nodes[position] not in rows


def torch_function(name: str, program: Program) -> str:
    """Print a program as a PyTorch function of its streams that returns a tuple."""
    lines, outputs = body(program, TorchPrinter())
    first = program.input_names[0]
    outputs = [f"torch.zeros_like({first}) + {o}" if _is_constant(program, i) else o for i, o in enumerate(outputs)]
    return _python_function(name, program.input_names, lines, outputs)


def triton_function(name: str, program: Program) -> str:
    """Print a program as a `triton.jit` function of its streams that returns a tuple."""
    lines, outputs = body(program, TritonPrinter())
    first = program.input_names[0]
    outputs = [f"tl.zeros_like({first}) + {o}" if _is_constant(program, i) else o for i, o in enumerate(outputs)]
    arguments = [*program.input_names, "MODE: tl.constexpr"]
    return "@triton.jit\n" + _python_function(name, arguments, lines, outputs)


def _python_function(name: str, arguments: list[str], lines: list[str], outputs: list[str]) -> str:
    head = f"def {name}({', '.join(arguments)}):"
    if len(head) > 118:
        head = f"def {name}(\n" + "".join(f"    {a},\n" for a in arguments) + "):"
    tail = f"    return ({', '.join(outputs)}{',' if len(outputs) == 1 else ''})"
    if len(outputs) == 1:
        tail = f"    return ({outputs[0]},)"
    elif len(tail) > 118:
        tail = "    return (\n" + "".join(f"        {o},\n" for o in outputs) + "    )"
    else:
        tail = f"    return {', '.join(outputs)}"
    return "\n".join([head, *lines, tail]) + "\n"


def cpp_function(name: str, program: Program) -> str:
    """Print a program as a C++ template over the vector type."""
    lines, outputs = body(program, CppPrinter())
    live_inputs = {program.tape.nodes[i].value for i in program.live() if program.tape.nodes[i].op == "input"}
    loads = [f"  const V {n} = in[{i}];" for i, n in enumerate(program.input_names) if n in live_inputs]
    stores = [f"  out[{i}] = {o};" for i, o in enumerate(outputs)]
    unused = [] if live_inputs else ["  (void)in;"]
    head = f"template <class V>\nFI_INLINE void {name}(const V* in, V* out) {{"
    return "\n".join([head, *loads, *unused, *lines, *stores, "}"]) + "\n"


def levels(learnable: bool) -> range:
    """Return the levels for which code is generated, with constant or with learnable parameters."""
    return range(1, MAX_LEARNABLE_LEVEL + 1) if learnable else range(MAX_LEVEL + 1)


def _functions(maps: Iterable[ActivationMap], emit) -> Iterable[str]:
    for map in maps:
        for learnable in (False, True):
            for level in levels(learnable):
                if learnable and not map.n_params:
                    continue
                yield emit(map.function_name(level, learnable), map.program(level, learnable))
            if map.n_params or not learnable:
                yield emit(map.jet_name(learnable), map.jet(learnable))


_HEADER = "Generated by `python -m fused_inr.activations.emit` from the formulas; do not edit."


def outputs(map: ActivationMap) -> int:
    """Count the outputs in the formula, not in the committed file that is about to be rewritten."""
    return len(map.program(0).output_nodes)


def torch_source(maps: list[ActivationMap]) -> str:
    """Print all levels and jets of these maps as one Python module."""
    shapes = "".join(f'    "{m.name}": ({m.branches}, {outputs(m)}, {m.n_params}),\n' for m in maps)
    head = (
        f'"""{_HEADER}"""\n\n# ruff: noqa\n'
        "import torch\n\nfrom . import primitives as p\n\n"
        f"#: name: (branches, outputs, parameters)\nSHAPES = {{\n{shapes}}}\n"
    )
    return head + "".join("\n\n" + f for f in _functions(maps, torch_function))


def triton_source(maps: list[ActivationMap]) -> str:
    """Print all levels and jets of these maps as one module of Triton functions."""
    names = ["fi_sincos", *(f"fi_{n}" for n in PRIMITIVES)]
    imports = "".join(f"    {n},\n" for n in sorted(names))
    head = (
        f'"""{_HEADER}"""\n\n# ruff: noqa\nimport triton\nimport triton.language as tl\n\n'
        f"from ..primitives import (\n{imports})\n"
    )
    return head + "".join("\n\n" + f for f in _functions(maps, triton_function))


def cpp_source(maps: list[ActivationMap]) -> str:
    """Print all levels and jets of these maps as one C++ header, with the table macro at its end."""
    table = " \\\n  ".join(f"X({m.key}, {m.branches}, {outputs(m)}, {m.n_params})" for m in maps)
    functions = list(_functions(maps, cpp_function))
    # parameterless maps have no learnable variant: the table still names one
    for m in maps:
        if not m.n_params:
            names = [(m.function_name(level, True), m.function_name(level, False)) for level in levels(True)]
            for learnable, constant in [*names, (m.jet_name(True), m.jet_name(False))]:
                functions.append(
                    f"template <class V>\nFI_INLINE void {learnable}(const V* in, V* out) {{\n"
                    f"  {constant}(in, out);\n}}\n"
                )
    return (
        f"// {_HEADER}\n#pragma once\n\n"
        "namespace fused_inr {\n\n"
        + "\n".join(functions)
        + "\n}  // namespace fused_inr\n\n// name, branches, outputs, parameters\n"
        f"#define FUSED_INR_ACTIVATIONS(X) \\\n  {table}\n"
    )


def cpp_levels(probe: ActivationMap) -> str:
    """Print what every table of maps has a slot for, and the groups of streams of each slot's map, as a C++ header.

    `probe` is a map of 2 branches, 3 outputs and 1 parameter: the width of a group then tells what it is.
    """
    kind = {2: "z", 3: "y", 1: "p"}
    slots = [(level, learnable) for learnable in (False, True) for level in levels(learnable)]
    programs = [probe.program(*slot) for slot in slots]
    inputs = ["".join(kind[len(names)] for _, names in program.inputs) for program in programs]
    results = ["".join(kind[len(nodes)] for _, nodes in program.outputs) for program in programs]
    names = [probe.function_name(*slot).rpartition("_")[2] for slot in slots]
    constant = [probe.function_name(level, False).rpartition("_")[2] for level, _ in slots]
    rows = [
        f"  X(name, B, C, P, {own}, {other}, {level}, {str(learnable).lower()})"
        for own, other, (level, learnable) in zip(names, constant, slots, strict=True)
    ]
    quoted = [", ".join(f'"{groups}"' for groups in kinds) for kinds in (inputs, results)]
    return (
        f"// {_HEADER}\n#pragma once\n\n"
        "namespace fused_inr {\n\n"
        f"constexpr int kMaxLevel = {MAX_LEVEL};\nconstexpr int kMaxLearnableLevel = {MAX_LEARNABLE_LEVEL};\n\n"
        f"// Slots of a table of maps: {', '.join(names)}; then, where a table has them, the jets.\n"
        f"constexpr int kLevelSlots = {len(slots)};\nconstexpr int kJetSlot = {len(slots)};\n"
        f"constexpr int kLearnableJetSlot = {len(slots) + 1};\nconstexpr int kSlots = {len(slots) + 2};\n\n"
        "// The groups of streams of each slot's map, in order: z and y have a stream for every branch and for every\n"
        "// output, p stands for a group of one stream for every parameter.\n"
        f"constexpr const char* kInputs[] = {{{quoted[0]}}};\n"
        f"constexpr const char* kResults[] = {{{quoted[1]}}};\n"
        f"constexpr int kMostOfAKind = {max(max(Counter(groups).values()) for groups in inputs + results)};\n\n"
        "}  // namespace fused_inr\n\n"
        "// each slot's name, that of a map without parameters, level, learnable\n"
        "#define FUSED_INR_LEVELS(X, name, B, C, P) \\\n" + " \\\n".join(rows) + "\n"
    )


def execute(source: str, filename: str, names: dict) -> dict:
    """Run generated Python under a file name of its own, so that tracebacks and `inspect` see the source."""
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace = {"__name__": filename, **names}
    exec(compile(source, filename, "exec"), namespace)
    return namespace
