"""What people read of the results: a line a cell, tables at the end, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...cli import CliError
from ...cli.files import write_all
from .. import report
from ..report import number, ratio

#: Variants in the order of the tables' columns; "NAME graph" follows NAME.
ORDER = (
    "one-pass", "fused", "recompute", "layers", "cuda", "fused bf16x3", "fused tf32x3", "eager", "compile",
    "max-autotune", "tcnn",
)  # fmt: skip
RIVALS = ("eager", "compile", "max-autotune", "tcnn")


def failed(result: Mapping[str, Any]) -> bool:
    return "error" in result or result.get("passed") is False


def brief(result: Mapping[str, Any]) -> str:
    """One line about a cell."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    if "outcomes" in result:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in result["outcomes"].items()) or "no tests ran"
        return counts + (f"; stopped {result['stopped']}" if "stopped" in result else "")
    if "processes" in result:
        words = f"{result['jobs']} jobs in {result['processes']} processes"
        return words + (f", {len(result['not_compiled'])} of them not compiled" if result["not_compiled"] else "")
    if "ceilings" in result:
        rates = ", ".join(
            f"{name} {number(rate)} TFLOP/s" for name, rate in result["ceilings"].items() if name != "copy"
        )
        return f"copy {number(result['ceilings']['copy'])} GB/s, {rates}"
    if "orders" in result:
        return f"{number(result['of_bound'])} of its bound" + ("" if result["passed"] else ": WRONG")
    if "variants" in result:
        times = [f"{name} {number(v['ms'])}" for name, v in result["variants"].items()]
        wrong = [name for name, check in result.get("checks", {}).items() if not check["passed"]]
        words = [f"{', '.join(times)} ms"] if times else ["no times"]
        words += [f"WRONG: {', '.join(wrong)}"] if wrong else []
        words += [f"no figure for {', '.join(result['failed'])}"] if result.get("failed") else []
        return "; ".join(words)
    if "moments" in result:
        return ", ".join(
            f"{name} {number(m['ms'])} ms ({number(m['ps_per_draw'])} ps a draw)"
            for name, m in result["moments"].items()
        )
    if "worst" in result:
        return "; ".join(f"{where}: {number(w['ulp'])} ulp" for where, w in result["worst"].items())
    if "watched" in result:
        words = f"{len(result['watched'])} cases watched, {result['reports']} reports"
        return words + (f"; stopped {result['stopped']}" if "stopped" in result else "")
    if "profile" in result:
        return f"{len(result['profile'])} launches"
    return "passed" if result.get("passed") else "FAILED"


def text(content: Mapping[str, Any]) -> str:
    """The tables at the end."""
    results = content["results"]
    parts = [_times(results), _ways(results), _gates(results)]
    for result in results:
        if result["group"] not in ("bench", "accuracy", "ahead") and "error" not in result:
            parts.append(f"{result['cell']}: {brief(result)}")
        for name in result.get("failed_tests", [])[:20]:
            parts.append(f"  failed: {name}")
        for line in result.get("wrong", []):
            parts.append(f"  {line}")
    for result in results:
        if "error" in result:
            parts.append(f"FAILED {result['cell']}: {result['error']}")
        for variant, reason in result.get("failed", {}).items():
            parts.append(f"no figure for {variant} in {result['cell']}: {reason}")
    if content.get("interrupted"):
        parts.append("interrupted: what was measured until then is in the file")
    return "\n".join(part for part in parts if part) or "nothing was measured"


def _benches(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [result for result in results if result.get("variants")]


def _best_of_ours(result: Mapping[str, Any]) -> str:
    """The fastest of our ways; of rivals, where none of ours has a time."""
    from .measure import is_ours

    variants = result["variants"]
    plain = [name for name in variants if not name.endswith(" graph")] or list(variants)
    ours = [name for name in plain if is_ours(name)] or plain
    return min(ours, key=lambda name: variants[name]["ms"])


def _times(results: Sequence[Mapping[str, Any]]) -> str:
    """The fastest of ours a cell, against each rival, and its share of the floor."""
    benches = _benches(results)
    rivals = [name for name in RIVALS if any(name in result["variants"] for result in benches)]
    rows = []
    for result in benches:
        variants, best = result["variants"], _best_of_ours(result)
        ours = variants[best]
        rows.append(
            (
                result["work"],
                best,
                number(ours["ms"]),
                number(ours.get("ns_a_row")),
                *(ratio(variants[name]["ms"] / ours["ms"] if name in variants else None) for name in rivals),
                f"{ours['of_floor']:.0%}" if "of_floor" in ours else "-",
                str(result.get("bound", "-")),
                number(ours.get("launch_ms")),
                number(ours.get("peak_mib")),
                number(variants.get("eager", {}).get("peak_mib")),
            )
        )
    head = ["work", "ours", "ms", "ns a row", *(f"vs {name}" for name in rivals), "of floor", "bound", "launch ms"]
    return report.table([*head, "MiB", "eager's"], rows, left=2) + "\n" if rows else ""


def _ways(results: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of every variant."""
    benches = _benches(results)
    present = {name for result in benches for name in result["variants"]}
    names = [each for name in ORDER for each in (name, f"{name} graph") if each in present]
    names += sorted(present - set(names))
    rows = [
        (result["work"], *(number(result["variants"].get(name, {}).get("ms")) for name in names)) for result in benches
    ]
    return report.table(["ms", *names], rows) + "\n" if rows else ""


def _gates(results: Sequence[Mapping[str, Any]]) -> str:
    """How many accuracy gates passed, which did not, and the closest."""
    shares = {r["cell"]: (r["of_bound"], r["passed"]) for r in results if "orders" in r}
    for result in results:
        for name, check in result.get("checks", {}).items():
            shares[f"{result['cell']}: {name}"] = check["of_bound"], check["passed"]
    if not shares:
        return ""
    wrong = [f"  beyond: {name}, {number(share)} of its bound" for name, (share, right) in shares.items() if not right]
    right = {name: share for name, (share, passed) in shares.items() if passed}
    words = f"accuracy: {len(shares)} gates, {len(wrong)} beyond the bound"
    if right:
        closest = max(right, key=lambda name: right[name])
        words += f"; closest: {closest}, {number(right[closest])} of its bound"
    return "\n".join([words, *wrong])


def draw(path: Path, content: Mapping[str, Any]) -> bool:
    """One line a cell: the time of each variant relative to the fastest of ours, on a logarithmic axis; right of 1 is
    slower. False where no cell has a time.

    Raises:
        CliError: matplotlib is missing, or the file cannot be written.
    """
    cells = _benches(content["results"])
    if not cells:
        return False
    try:
        import io

        from matplotlib.figure import Figure
    except ImportError as error:
        raise CliError("drawing needs matplotlib: pip install 'fused_inr[fit]'") from error
    best = [cell["variants"][_best_of_ours(cell)]["ms"] for cell in cells]
    names = list(dict.fromkeys(name for cell in cells for name in cell["variants"]))
    figure = Figure(figsize=(9, 1.6 + 0.22 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        points = [
            (cell["variants"][name]["ms"] / best[y], y) for y, cell in enumerate(cells) if name in cell["variants"]
        ]
        marker = "o^sDvP*X<>hd"[i % 12]
        axes.plot(*zip(*points), marker, color=f"C{i % 10}", markersize=5, label=name)
    axes.axvline(1.0, color="0.7", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cells)), [f"{c['work']}: {number(ms)} ms" for c, ms in zip(cells, best)])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to the fastest of ours")
    words = "REHEARSAL, " if content.get("rehearsal") else ""
    axes.set_title(f"{words}{content.get('device', '')}, {content.get('time', '')}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_all({path: buffer.getvalue()})
    return True
