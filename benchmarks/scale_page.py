"""Write the page and the plot of `scale.py`, and compute from the measured growth which resource runs out first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

WEEK = 7 * 24 * 3600
COLUMNS = {
    "seconds_a_cell": "driver, s per cell",
    "growth": "last tenth over first",
    "suggest_ms": "a suggestion at the end, ms",
    "peak_mb": "driver, MB",
    "mlflow_seconds": "MLflow, s",
    "report_seconds": "tables and report, s",
    "again_seconds": "same command again, s",
    "ledger_mb": "ledger, MB",
}
SLOT_COLUMNS = {
    "workers": "trial processes",
    "processes": "processes in all",
    "threads": "their threads",
    "tree_mb": "all of them, MB",
    "most_files": "open files of one, most",
    "seconds_a_cell": "s per cell",
}
CELL_LIMITS = {
    "peak_mb": ("the driver's memory", "memory_mb", "the driver holds every event of the ledger, and Ray every trial"),
    "wall_seconds": ("time", "week_seconds", "a week of the driver's own work, trials that train nothing"),
    "ledger_mb": ("the disk", "disk_mb", "the ledger alone"),
}
SLOT_LIMITS = {
    "tree_mb": ("memory", "memory_mb"),
    "threads": ("threads", "threads"),
    "most_files": ("open files of one process", "files"),
}


def reach(cells: list[float], values: list[float], limit: float) -> float:
    """Return the number of cells at which a quantity reaches `limit`; infinite if it does not grow.

    The last two points are extrapolated by a straight line and by a power law. The smaller of the two results counts,
    because a line ignores faster growth, and a power law ignores the part that exists without any cell.
    """
    (n0, n1), (v0, v1) = cells[-2:], values[-2:]
    if not (v1 > v0 > 0 and n1 > n0 > 0):
        return math.inf
    line = n1 + (limit - v1) * (n1 - n0) / (v1 - v0)
    power = n1 * (limit / v1) ** (math.log(n1 / n0) / math.log(v1 / v0))
    return max(n1, min(line, power))


def breaks_first(rows: list[dict[str, float]], machine: dict[str, float]) -> list[tuple[str, float]]:
    """Return (quantity of `CELL_LIMITS`, cells at which the machine's limit is reached), the first one first."""
    limits = {**machine, "week_seconds": WEEK}
    cells = [row["cells"] for row in rows]
    found = [(name, reach(cells, [row[name] for row in rows], limits[CELL_LIMITS[name][1]])) for name in CELL_LIMITS]
    return sorted(found, key=lambda pair: pair[1])


def slots_end(rows: list[dict[str, float]], machine: dict[str, float]) -> list[tuple[str, float, float]]:
    """Return (quantity of `SLOT_LIMITS`, growth per slot, slots at which the limit is reached), the first one first.

    The growth is a straight line through the first and the last row, because each trial is its own process.
    """
    first, last = rows[0], rows[-1]
    found = []
    for name, (_, limit) in SLOT_LIMITS.items():
        each = (last[name] - first[name]) / (last["slots"] - first["slots"])
        slots = first["slots"] + (machine[limit] - first[name]) / each if each > 0 else math.inf
        found.append((name, each, slots))
    return sorted(found, key=lambda row: row[2])


def rounded(number: float) -> str:
    """Format a whole number to two significant digits, with separators."""
    return f"{float(f'{number:.2g}'):,.0f}"


def number(value: float) -> str:
    """Format to three significant digits, and as whole numbers from 1,000 on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _table(columns: dict[str, str], rows: list[dict[str, Any]], heads: dict[str, str]) -> list[str]:
    names = [*heads.values(), *columns.values()]
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join(["---:"] * len(names)) + " |"]
    for row in rows:
        own = [f"{row[name]:,}" if isinstance(row[name], int) else row[name] for name in heads]
        lines.append("| " + " | ".join(own + [number(row[name]) for name in columns]) + " |")
    return lines


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    machine, rows = found["machine"], found["sizes"]
    lines = [
        "# How far one driver goes",
        "",
        "Written by `python benchmarks/scale.py`. The trials are simulated: they report a known loss "
        f"{found['reports']} times and train nothing, {found['slots']} side by side.",
        "Everything else is real. Machine: "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_mb'] / 1e3:.0f} GB, {machine['date']}.",
        "",
        "## Cells",
        "",
        *_table(COLUMNS, rows, {"cells": "cells", "sampler": "sampler"}),
        "",
        "![Seconds per cell and memory over the number of cells](img/scale.svg)",
        "",
        "For each suggestion, `tpe` (the default) reads all earlier trials of its arm and `random` reads none. The "
        "difference between their rows",
        "is Optuna's. To stop a trial and to keep an arm's best model, the driver reads no earlier cell again.",
        "",
    ]
    grown = by_sampler(rows, found["sampler"])
    if len(grown) > 1:
        order = breaks_first(grown, machine)
        (first, cells), rest = order[0], order[1:]
        what, _, why = CELL_LIMITS[first]
        lines += [
            f"Extrapolated from the two largest sizes (sampler {found['sampler']}) on this machine, {what} runs out "
            f"first, at about {rounded(cells)} cells ({why});",
            "then "
            + ", ".join(f"{CELL_LIMITS[name][0]} at {_at(cells)} ({CELL_LIMITS[name][2]})" for name, cells in rest)
            + ".",
            "",
        ]
    return "\n".join(lines + (_slots(found) if len(found["side_by_side"]) > 1 else []))


def _at(number: float) -> str:
    return "no number" if math.isinf(number) else rounded(number)


def _slots(found: dict[str, Any]) -> list[str]:
    rows, machine = found["side_by_side"], found["machine"]
    order = slots_end(rows, machine)
    each = {name: value for name, value, _ in order}
    fast = by_sampler(found["sizes"], found["sampler"])[-1]["seconds_a_cell"]
    (first, _, most), most_rows = order[0], rows[-1]
    memory = {name: slots for name, _, slots in order}["tree_mb"]
    return [
        "## Slots",
        "",
        "All slots are on this one machine, which has far fewer cores. Every trial is a process.",
        "",
        *_table(SLOT_COLUMNS, rows, {"slots": "slots"}),
        "",
        f"A slot adds {each['tree_mb']:.0f} MB (shared pages counted once), {each['threads']:.3g} threads and "
        f"{each['most_files']:.2g} open files. So on this machine {SLOT_LIMITS[first][0]} runs out first,",
        f"at about {rounded(most)} slots; {most_rows['slots']} were run. 1,000 slots would take "
        f"{(most_rows['tree_mb'] + each['tree_mb'] * (1000 - most_rows['slots'])) / 1e3:.0f} GB on one machine; "
        f"the memory of this one holds about {rounded(memory)}.",
        "On a cluster the nodes have that memory, because a real trial takes more. More logical nodes on one machine "
        "(`ray.cluster_utils`) do not help:",
        "each adds processes of its own and saves none. So the figure for 1,000 slots is extrapolated, not measured.",
        "",
        "The driver's seconds per cell limit the number of slots that it can serve: with trials of ten minutes, 600 / "
        f"{fast:.2g} = about {rounded(600 / fast)} slots.",
        "",
    ]


def by_sampler(rows: list[dict[str, Any]], sampler: str) -> list[dict[str, Any]]:
    """Return the rows of one sampler, ascending by cells."""
    return sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["cells"])


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the seconds per cell of driver, MLflow and report, and the driver's memory, over the number of cells."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scale"
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    rows = by_sampler(found["sizes"], found["sampler"])
    cells = [row["cells"] for row in rows]
    lines = (("driver and Ray", "seconds_a_cell"), ("MLflow", "mlflow_seconds"), ("tables, report", "report_seconds"))
    for (label, name), marker in zip(lines, "os^", strict=True):
        each = [row[name] if name == "seconds_a_cell" else row[name] / row["cells"] for row in rows]
        left.loglog(cells, each, marker=marker, label=f"{label} ({found['sampler']})")
    right.semilogx(cells, [row["peak_mb"] for row in rows], marker="o", label=found["sampler"])
    for row in found["sizes"]:
        if row["sampler"] != found["sampler"]:
            left.loglog(row["cells"], row["seconds_a_cell"], "kx", label=f"driver and Ray ({row['sampler']})")
            right.semilogx(row["cells"], row["peak_mb"], "kx", label=row["sampler"])
    left.set(xlabel="cells", ylabel="seconds per cell")
    right.set(xlabel="cells", ylabel="memory of the driver, MB", ylim=(0, None))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
