"""Rows as text for the terminal, CSV, JSON, Markdown and LaTeX (booktabs), all with the same number format."""

import csv
import io
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.io.text import markdown

FORMATS = ("terminal", "csv", "json", "markdown", "latex")
Columns = dict[str, tuple[str, str]]  # key -> (heading, number format)

VERDICT_COLUMNS: Columns = {
    "arm": ("arm", ""),
    "n": ("n", "d"),
    "improvement_percent": ("improvement %", "+.3f"),
    "improvement_low": ("low", "+.3f"),
    "improvement_high": ("high", "+.3f"),
    "selected_low": ("low, all arms", "+.3f"),
    "selected_high": ("high, all arms", "+.3f"),
    "mean_difference": ("nats", "+.4f"),
    "p_t": ("p (t)", ".3g"),
    "p_sign_flip": ("p (flip)", ".3g"),
    "p_adjusted": ("p adjusted", ".3g"),
    "d_z": ("d_z", "+.2f"),
    "mde_percent": ("MDE %", ".3f"),
    "probability_of_improvement": ("P(better)", ".2f"),
    "verdict": ("verdict", ""),
}
# A phone shows only the left part of a wide table, so the verdict is near the start.
REPORT_COLUMNS: Columns = {
    key: VERDICT_COLUMNS[key]
    for key in [
        "arm",
        "verdict",
        "n",
        "improvement_percent",
        "improvement_low",
        "improvement_high",
        "selected_low",
        "selected_high",
        "p_adjusted",
        "p_t",
        "p_sign_flip",
        "mean_difference",
        "d_z",
        "mde_percent",
        "probability_of_improvement",
    ]
}


def with_own_unit(columns: Columns, unit: str) -> Columns:
    """Return columns with the difference in the unit of a table's metric, and its interval beside it."""
    heading = {"%": "points", "": "difference"}.get(unit, unit)
    own = {"mean_difference": (heading, "+.5g"), "difference_low": ("low", "+.5g"), "difference_high": ("high", "+.5g")}
    for end in ("low", "high") if "selected_low" in columns else ():
        own[f"difference_selected_{end}"] = (f"{end}, all arms", "+.5g")
    out: Columns = {}
    for key, column in columns.items():
        out |= own if key == "mean_difference" else {key: column}
    return out


TRAINING: Columns = {
    "training_percent": ("worth in training, %", "+.1f"),
    "training_low": ("low", "+.1f"),
    "training_high": ("high", "+.1f"),
}


def with_training(rows: list[dict[str, Any]], columns: Columns) -> Columns:
    """Return the columns with what an arm is worth in training in front of its d_z, if it is known of any row."""
    if all(row.get("training_percent") is None for row in rows):
        return columns
    out: Columns = {}
    for key, column in columns.items():
        out |= (TRAINING if key == "d_z" else {}) | {key: column}
    return out


def with_words(columns: Columns, words: Mapping[str, str]) -> Columns:
    """Return columns in whose headings each word of the built-in model, such as tokens, is replaced by another."""
    out = {}
    for key, (heading, spec) in columns.items():
        for word, other in words.items():
            heading = heading.replace(word, other)
        out[key] = (heading, spec)
    return out


def with_runs(rows: list[dict[str, Any]], columns: Columns) -> Columns:
    """Return the columns with the runs of baseline and arm instead of n, if any row tests runs that are not pairs."""
    if all(row.get("test", "paired t") == "paired t" for row in rows):
        return columns
    runs: Columns = {"n_baseline": ("n baseline", "d"), "n_arm": ("n arm", "d")}
    out: Columns = {}
    for key, column in columns.items():
        out |= runs if key == "n" else {key: column}
    return out


RUNG = ("rung", "d")


def with_rung(rows: list[dict[str, Any]], columns: Columns) -> Columns:
    """Return the columns with the number of the rung in front, if the rows have it."""
    return {"rung": RUNG, **columns} if rows and "rung" in rows[0] else columns


def of_table(rows: list[dict[str, Any]], unit: str) -> Columns:
    """Return the verdict's columns for rows of a table from elsewhere; columns without any value are left out."""
    counts = with_runs(rows, {"n": VERDICT_COLUMNS["n"]})
    if "n" not in counts:
        counts["test"] = ("test", "")
    elif any(row["complete_pairs"] not in (0, row["n"]) for row in rows):
        counts["complete_pairs"] = ("in the interval", "d")
    ordered = {"arm": VERDICT_COLUMNS["arm"], **counts, "mean_difference": VERDICT_COLUMNS["mean_difference"]}
    columns = with_own_unit(ordered | {k: c for k, c in VERDICT_COLUMNS.items() if k not in (*ordered, "n")}, unit)
    return {k: c for k, c in columns.items() if k == "mean_difference" or any(row.get(k) is not None for row in rows)}


def cell(value: Any, spec: str) -> str:
    """Return one value as text; null is a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if spec and not isinstance(value, str):
        return format(int(value) if spec == "d" else value, spec)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def with_values(rows: list[dict[str, Any]], columns: Columns) -> Columns:
    """Return the columns in which at least one row has a value."""
    return {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}


def verdict_table(rows: list[dict[str, Any]], title: str, width: int, unit: str | None = None) -> Table:
    """Return the verdict table for a terminal; below 140 characters it has only the columns that decide.

    Args:
        rows: Rows of the verdict.
        title: Title above the table.
        width: Width of the terminal in characters.
        unit: Unit of the metric if it is not the built-in loss.
    """
    if width >= 140:
        columns = VERDICT_COLUMNS if unit is None else of_table(rows, unit)
        wide = with_rung(rows, with_runs(rows, columns))
        return table(rows, {k: column for k, column in wide.items() if not k.startswith("selected")}, title=title)
    ends = [("improvement_percent", "{}"), ("improvement_low", " [{}"), ("improvement_high", ", {}]")]
    short = [{**row, "improvement": "".join(form.format(cell(row[key], "+.2f")) for key, form in ends)} for row in rows]
    for row in short:
        if row["improvement_percent"] is None:
            row["improvement"] = "-"
    for row in short if "n" not in with_runs(rows, VERDICT_COLUMNS) else ():
        row["n"] = f"{row['n_baseline']} + {row['n_arm']}"
    columns = {key: VERDICT_COLUMNS[key] for key in ("arm", "n", "p_adjusted", "verdict")}
    columns["improvement"] = ("improvement %", "s")
    p = () if any("rung" in row for row in rows) else ("p_adjusted",)  # a ladder has a column more
    order = ("arm", "n", "improvement", *p, "verdict")
    out = table(short, with_rung(rows, {key: columns[key] for key in order}), title=title)
    arm, *middle, verdict = out.columns[-len(order) :]
    for column in middle:
        column.no_wrap = True
    for column, key in ((arm, "arm"), (verdict, "verdict")) if width >= 80 else ():
        column.min_width = max((len(word) for row in rows for word in str(row[key]).split()), default=1)  # of a word
    return out


def table(rows: list[dict[str, Any]], columns: Columns, title: str = "") -> Table:
    """Return a rich table; names are plain text, so no markup is read from them."""
    out = Table(title=Text(title, justify="left") if title else None, title_justify="left")
    for heading, spec in columns.values():
        out.add_column(Text(heading), justify="right" if spec else "left", overflow="fold")
    for row in rows:
        out.add_row(*(Text(cell(row.get(key), spec)) for key, (_, spec) in columns.items()))
    return out


def print_table(out: Table) -> None:
    """Print a table; if the output is not a terminal, make it wide enough for all columns."""
    Console(width=None if sys.stdout.isatty() else 200).print(out)


def print_notes(notes: list[str]) -> None:
    """Print lines of text below a table."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    for note in notes:
        console.print(Text(note))


def to_json(value: Any) -> str:
    """Return strict JSON; a number that is not finite raises ValueError and never reaches a file."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)


def to_csv(rows: list[dict[str, Any]], columns: Columns) -> str:
    """Return comma-separated rows in full precision with the keys as header; null is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if row.get(key) is None else row.get(key) for key in columns])
    return out.getvalue().rstrip("\n")


def to_markdown(rows: list[dict[str, Any]], columns: Columns) -> str:
    """Return a Markdown pipe table."""
    lines = ["| " + " | ".join(h for h, _ in columns.values()) + " |"]
    lines.append("| " + " | ".join("---:" if spec else "---" for _, spec in columns.values()) + " |")
    for row in rows:
        lines.append("| " + " | ".join(markdown(cell(row.get(k), s)) for k, (_, s) in columns.items()) + " |")
    return "\n".join(lines)


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
}
_TEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def to_latex(rows: list[dict[str, Any]], columns: Columns) -> str:
    """Return a LaTeX booktabs tabular."""

    def escape(text: str) -> str:
        return "".join(_TEX.get(c, c) for c in text)

    out = [
        r"\begin{tabular}{" + "".join("r" if spec else "l" for _, spec in columns.values()) + "}",
        r"\toprule",
    ]
    out.append(" & ".join(escape(h) for h, _ in columns.values()) + r" \\")
    out.append(r"\midrule")
    for row in rows:
        out.append(" & ".join(escape(cell(row.get(k), s)) for k, (_, s) in columns.items()) + r" \\")
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}"])
