"""`fused-inr bench static`: what the compiler makes of every Triton kernel and shipped configuration, without a GPU.

Per architecture: registers, spilled bytes, shared memory, tensor-core, multiply-add and special-function instructions,
the warps that a multiprocessor holds, and a roofline (`roofline.py`).
Compiled from the sources each time, in folders of its own, so that no cache answers for code that has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ARCHS = ("sm80", "sm86", "sm90", "sm100")
COLUMNS = (
    ("kernel", "kernel", 16),
    ("type", "type", 15),
    ("activation", "activation", 10),
    ("level", "lv", 2),
    ("shape", "N x K", 9),
    ("aligned", "al", 2),
    ("tile", "tile", 13),
    ("warps", "w/s", 4),
    ("registers", "reg", 4),
    ("spilled", "spill", 5),
    ("shared", "shared", 7),
    ("tmem", "tmem", 4),
    ("tensor", "tensor", 12),
    ("ffma", "ffma", 6),
    ("mufu", "mufu", 5),
    ("frnd", "frnd", 4),
    ("stg", "stg", 4),
    ("occupancy", "warps", 13),
    ("memory", "mem", 5),
    ("tensor_ps", "tens", 5),
    ("sfu", "sfu", 5),
    ("fma", "fma", 5),
    ("imul", "imul", 5),
    ("alu", "alu", 5),
    ("fp64", "fp64", 5),
    ("bound", "bound", 6),
)
LEGEND = """columns:
  lv     level of derivative of the map            al     alignment of operands that the kernel may assume
  tile   block_m x block_n x block_k               w/s    warps and pipeline stages of a block
  spill  bytes of stack and local memory           tmem   columns of tensor memory
  tensor, ffma, mufu, frnd, stg                    instructions in the SASS: tensor cores, multiply-adds (of two lanes
         for FFMA2: one), special functions, slow roundings, stores
  warps  resident on a multiprocessor, and what keeps them from being more
  mem, tens, sfu, fma, imul, alu, fp64             roofline: picoseconds a row (all columns; a network: all layers;
         moments: one draw of one setting) that device memory, tensor cores, special functions, float32 arithmetic and,
         of moments, integer multiplications, other integer operations and float64 would take at the peak rates of an
         A100 (sm80), H200 (sm90), B200 (sm100), each working alone
  bound  the largest of these, which is the floor
With --count nothing is compiled for the machine: whole networks (3 hidden layers of 32, 64, 128 features, 2 inputs, 3
outputs; bf16 and TF32) run on the executor of PTX, on the programs of one multiprocessor, for 512 and 1,536 rows; the
difference, a row:
  issue, fma, alu, special, fp64, tensor, shared, global
         clocks that each unit of a multiprocessor takes at its peak rate: instructions issued; multiplications and
         float32 additions; other integer operations, comparisons, conversions; special functions; float64; matrix
         products; wavefronts of shared memory; sectors of global memory through the first-level cache
  bound  the largest of these; latencies and waiting come on top
  instr, wave, confl, sect                         instructions of a warp; wavefronts of loads from and stores to shared
         memory, and how many for each that their bytes need (bank conflicts); sectors of 32 bytes of global memory
  once   clocks of that unit that a launch costs whatever the rows
  Special functions, matrix products, wavefronts and sectors are exact, and so lower bounds. PTX is not what the machine
  runs, though: the assembler shares and removes address arithmetic, so that issue and alu are estimates, rather high.
In the JSON: "occupancy" {warps, blocks, of, by}; "roofline" {A100 | H200 | H100 | B200: {memory, tensor, sfu, fma,
imul, alu, fp64, floor in ps a row, bound}}; "mufu_at", "fp32_at": instructions outside loops, in loops, in loops within
loops; "usual_at": of each pipe, without what a jump ahead can skip."""


def _initialise(cache: str) -> None:
    # a process in which Triton interprets cannot compile; and no cache but this run's
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = os.path.join(cache, str(os.getpid()))


def _compile(job: dict) -> dict:
    from fused_inr.bench import aot

    from . import roofline

    row = aot.compile_job(aot.Job(**job))
    roofline.annotate(row)
    shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
    return row


def _count(job: dict) -> list[dict]:
    from .ptx import count

    return count.count(**job)


def count_networks(
    archs: tuple[str, ...] | list[str] = ("sm80", "sm90"),
    activations: tuple[str, ...] | list[str] = ("sine",),
    *,
    processes: int = 2,
    progress: bool = False,
) -> list[dict]:
    """What a row of whole networks costs each unit of a multiprocessor: the rows of `ptx.count.count`, which runs the
    compiled kernels on the CPU.

    Raises:
        RuntimeError: PTX cannot be executed here; the reason.
    """
    with _workers(processes) as pool:
        jobs = pool.submit(_count_jobs, list(archs), list(activations)).result()
        found: list[list[dict]] = [[] for _ in jobs]
        futures = {pool.submit(_count, job): i for i, job in enumerate(jobs)}
        for done, future in enumerate(as_completed(futures), 1):
            found[futures[future]] = future.result()
            if progress:
                print(f"[{done}/{len(jobs)}]", *jobs[futures[future]].values(), file=sys.stderr, flush=True)
    return [row for rows in found for row in rows]


def _count_jobs(archs: list[str], activations: list[str]) -> list[dict]:
    from .ptx import count, unavailable

    if reason := unavailable():
        raise RuntimeError(reason)
    return count.jobs(archs, activations)


def _list_jobs(options: dict) -> list[dict]:
    """In a worker: listing the jobs imports the kernels, which the caller's process may interpret."""
    from dataclasses import asdict

    from fused_inr.bench import aot

    from fused_inr.activations import names

    options = dict(options)
    activations = options.pop("activations")
    if activations == ["all"]:
        activations = list(names())
    unknown = sorted(set(activations) - set(names()))
    if unknown:
        raise ValueError(f"activations: no generated map {unknown[0]!r}; there are: {', '.join(names())}")
    wanted = aot.jobs(tuple(options["archs"]), tuple(activations), scope=options["scope"])
    kernels = options["kernels"]
    return [asdict(j) for j in wanted if not kernels or j.kernel in kernels]


def _version() -> str:
    import triton

    return triton.__version__


def run(
    archs: tuple[str, ...] | list[str] = ("sm80", "sm90", "sm100"),
    activations: tuple[str, ...] | list[str] = ("sine", "gabor", "split"),
    *,
    kernels: tuple[str, ...] | list[str] = (),
    scope: str = "default",
    every: int = 1,
    processes: int = 2,
    progress: bool = False,
) -> list[dict]:
    """Compile and read back; one dict a compilation, `problems` among its keys (empty if it may ship).

    Args:
        archs: of "sm80", "sm86" (99 KB of shared memory; also 8.9 and 12.x), "sm90", "sm100".
        activations: names of generated maps, or ["all"].
        kernels: of "forward", "input_grad", "gz", "gz_from_z", "weight_grad", "act_map", "moments", "sum" and, of whole
            networks, "mlp_forward", "mlp_stream", "mlp_save", "mlp_backward", "mlp_recompute", "mlp_loss",
            "mlp_one_pass"; empty: all.
        scope: "default": every configuration and type; "quick": one width, two types; "sample": each kernel, kind of
            product, type and level once an architecture, activations and widths in turns; "full": unaligned operands,
            odd widths and learnable parameters as well.
        every: compile every n-th job only (a sample that is the same each time).
        processes: worker processes.
        progress: one line a compilation on stderr.
    Raises:
        ValueError: an unknown architecture, activation or scope.
    """
    if scope not in ("quick", "sample", "default", "full"):
        raise ValueError(f"scope: {scope!r} is not one of quick, sample, default, full")
    unknown = sorted(set(archs) - set(ARCHS))
    if unknown:
        raise ValueError(f"archs: {unknown[0]!r} is not one of {', '.join(ARCHS)}")
    options = {"archs": list(archs), "activations": list(activations), "kernels": list(kernels), "scope": scope}
    with _workers(processes) as pool:
        jobs = pool.submit(_list_jobs, options).result()[::every]
        return _gather(pool, jobs, progress)


def compile_all(jobs: list[dict], *, processes: int = 2) -> list[dict]:
    """Rows for jobs given one by one: the fields of `fused_inr.kernels.aot.Job`."""
    with _workers(processes) as pool:
        return _gather(pool, jobs, progress=False)


@contextlib.contextmanager
def _workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    with tempfile.TemporaryDirectory(prefix="fused_inr_static_") as cache:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _initialise, (cache,)) as pool:
            yield pool


def _gather(pool: ProcessPoolExecutor, jobs: list[dict], progress: bool) -> list[dict]:
    futures = {pool.submit(_compile, job): i for i, job in enumerate(jobs)}
    done: dict[int, dict] = {}
    for count, future in enumerate(as_completed(futures), 1):
        row = done[futures[future]] = future.result()
        if progress:
            mark = "; ".join(row["problems"]) or "ok"
            name = f"{row['arch']} {row['kernel']} {row['activation']} {row['type']}"
            print(f"[{count}/{len(jobs)}] {name}: {mark}", file=sys.stderr, flush=True)
    return [done[i] for i in range(len(jobs))]


def _cell(row: dict, key: str) -> str:
    if key == "shape":
        return f"{row['N']}x{row['K']}"
    if key == "tile":
        return "x".join(str(row[k]) for k in ("block_m", "block_n", "block_k") if k in row)
    if key == "warps":
        return f"{row.get('num_warps', '?')}/{row.get('num_stages', '-')}"
    if key == "aligned":
        return "16" if row["aligned"] else "1"
    if key == "tensor":
        return f"{row['tensor']} {row['tensor_op']}" if row.get("tensor") else "-"
    if key == "ffma":
        return str(row["ffma"] + row["ffma2"]) if "ffma" in row else "-"
    if key == "occupancy":
        found = row.get("occupancy")
        return f"{found['warps']} {found['by']}" if found else "-"
    if key in ("memory", "tensor_ps", "sfu", "fma", "imul", "alu", "fp64", "bound"):
        return _roofline_cell(row, key.removesuffix("_ps"))
    return str(row.get(key, "-"))


def _roofline_cell(row: dict, key: str) -> str:
    from . import roofline

    found = roofline.of_table(row)
    if found is None:
        return "-"
    value = found[key]
    return value if isinstance(value, str) else f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def failures(rows: list[dict], version: str) -> list[str]:
    """What must not be under this version of Triton; that nothing spills binds the one that torch 2.13 requires."""
    name = ("arch", "kernel", "type", "activation", "level", "N", "K", "aligned")
    which = "problems" if version.startswith("3.7.") else "broken"
    return [f"{' '.join(str(row[k]) for k in name)}: {problem}" for row in rows for problem in row[which]]


def _bounds(rows: list[dict]) -> str:
    """How often each unit binds, a device."""
    devices: dict[str, Counter[str]] = {name: Counter() for row in rows for name in row.get("roofline", {})}
    for row in rows:
        for name, found in row.get("roofline", {}).items():
            devices[name][found["bound"]] += 1
    parts = [
        f"{name}: {', '.join(f'{n} {unit}' for unit, n in counts.most_common())}" for name, counts in devices.items()
    ]
    return "; ".join(parts)


def table(rows: list[dict]) -> str:
    """The report as text, one table an architecture, problems under their row."""
    lines = []
    for arch, group in itertools.groupby(sorted(rows, key=lambda r: ARCHS.index(r["arch"])), key=lambda r: r["arch"]):
        of_arch = list(group)
        lines += ["", arch, "  ".join(title.ljust(width) for _, title, width in COLUMNS)]
        for row in of_arch:
            lines.append("  ".join(_cell(row, key).ljust(width) for key, _, width in COLUMNS).rstrip())
            lines += [f"    ! {p}" for p in row["problems"]]
        bad = sum(bool(r["problems"]) for r in of_arch)
        most = max((r.get("registers", 0) for r in of_arch), default=0)
        lines.append(
            f"{arch}: {len(of_arch)} compiled, {bad} with a problem, {sum(r.get('spilled', 0) for r in of_arch)} bytes "
            f"spilled, at most {most} registers and {max(r.get('shared', 0) for r in of_arch)} bytes of shared memory"
        )
        if bounds := _bounds(of_arch):
            lines.append(f"{arch}: what binds, {bounds}")
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if a shipped configuration has a problem; under another Triton than 3.7 only what cannot run or
    computes nothing counts (a row's "broken"), and the rest, spills among them, is reported."""
    parser = argparse.ArgumentParser(
        prog="fused-inr bench static",
        description=__doc__.splitlines()[0],
        epilog=LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, help="architectures (sm80 sm90 sm100; --count: sm80 sm90)")
    parser.add_argument("--activation", nargs="+", help='or "all" (sine gabor split; --count: sine)')
    kernels = "forward input_grad gz gz_from_z weight_grad act_map moments sum"
    kernels += " mlp_forward mlp_stream mlp_save mlp_backward mlp_recompute mlp_loss mlp_one_pass"
    parser.add_argument("--kernel", nargs="+", default=[], choices=kernels.split(), help="only these kernels")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_const", dest="scope", const="quick", help="one width, two types")
    scope.add_argument(
        "--sample",
        action="store_const",
        dest="scope",
        const="sample",
        help="every kernel, kind of product and type once an architecture, activations and widths in turns (minutes)",
    )
    scope.add_argument(
        "--full",
        action="store_const",
        dest="scope",
        const="full",
        help="unaligned operands, odd widths, learnable parameters as well (an hour on two cores)",
    )
    scope.add_argument(
        "--count",
        action="store_true",
        help="run whole networks on the executor of PTX instead, and count what a row costs each unit (minutes)",
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th compilation only")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    try:
        version = _version()
    except ImportError:
        print("fused-inr bench static: Triton is not installed (pip install 'triton>=3.6'; Linux)", file=sys.stderr)
        return 2
    if arguments.every < 1 or arguments.processes < 1:
        parser.error("--every and --processes take a number of 1 or more")
    try:
        if arguments.count:
            return _main_count(arguments, version)
        rows = run(
            arguments.arch or ["sm80", "sm90", "sm100"],
            arguments.activation or ["sine", "gabor", "split"],
            kernels=arguments.kernel,
            scope=arguments.scope or "default",
            every=arguments.every,
            processes=arguments.processes,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, RuntimeError) as error:
        print(f"fused-inr bench static: {error}", file=sys.stderr)
        return 2
    print(f"Triton {version}")
    print(table(rows))
    _write(arguments.json, version, rows)
    return 1 if failures(rows, version) else 0


def _main_count(arguments: argparse.Namespace, version: str) -> int:
    archs = arguments.arch or ["sm80", "sm90"]
    if "sm86" in archs:
        raise ValueError("--count: the rates of sm86's devices differ; sm80, sm90 and sm100 are known")
    rows = count_networks(
        archs,
        arguments.activation or ["sine"],
        processes=arguments.processes,
        progress=sys.stderr.isatty(),
    )
    from .ptx import count

    print(f"Triton {version}")
    print(count.table(rows))
    _write(arguments.json, version, rows)
    return 0


def _write(path: Path | None, version: str, rows: list[dict]) -> None:
    if path:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps({"triton": version, "rows": rows}, indent=1, default=str) + "\n")
        os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
