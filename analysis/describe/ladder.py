"""Test if an improvement lasts as models grow: the verdict on each size, and the trend over them.

`pagating ladder STUDY|TABLE`, or a folder for each size. A study file with `scales` makes such a study.

The slope of the improvement on log2 of training compute is the least-squares slope through the means of the rungs. It
has equal weights, so it is defined for any true law. Its p is adjusted over the arms, as a family of their own.
"""

from typing import Any

from analysis.io import command, formats
from analysis.io.assemble import RUNG
from analysis.io.exits import Exit
from analysis.verdict.decide import decide
from analysis.verdict.exits import add_require_verdict, end
from analysis.verdict.kinds import Result, Rung, as_object
from analysis.verdict.ladder.kinds import ArmTrend
from analysis.verdict.ladder.words import FAMILY, in_compute, rows_of

NUMBERS: formats.Columns = {
    "trend": ("trend", ""),
    "slope": ("points per doubling", "+.3f"),
    "slope_low": ("low", "+.3f"),
    "slope_high": ("high", "+.3f"),
    "p": ("p", ".3g"),
    "p_adjusted": ("p adjusted", ".3g"),
}
WHAT = ("improvement", "verdict", "compute")


def rows(result: Result) -> list[dict[str, Any]]:
    """Return one row per comparison: for each rung its improvement, verdict and gain in compute, then the trend.

    The floor has a row without a trend.
    """
    of_arm = {(row.baseline, row.arm): row for row in result.trends}
    done = [rung for rung in result.rungs if not rung.result.unfinished]
    every = {(row.baseline, row.arm): row.label for rung in done for row in rung.result.every}
    out = []
    for (reference, arm), label in every.items():
        trend = of_arm.get((reference, arm)) or ArmTrend(arm, reference)
        row: dict[str, Any] = {"arm": label}
        for rung in done:
            row |= _cells(rung, trend)
        numbers = {key: getattr(trend, key) for key in NUMBERS}
        known = trend.trend if (reference, arm) in of_arm else None
        out.append(row | numbers | {"trend": known, "axis": trend.axis, "said": trend.said})
    return out


def _cells(rung: Rung, trend: ArmTrend) -> dict[str, Any]:
    # the cells of one arm and one rung
    keys = {what: f"{what}_{rung.rung}" for what in WHAT}
    found = next(iter(rows_of(trend, [rung], counted=False)), None)
    if found is None:
        return dict.fromkeys(keys.values()) | {keys["verdict"]: "dropped" if trend.arm in rung.dropped else None}
    gain = next((each for each in rung.gains if (each.baseline, each.arm) == (found.baseline, found.arm)), None)
    percent = None if found.improvement_percent is None else f"{found.improvement_percent:+.2f}"
    if percent and found.interval:
        percent += " [{:+.2f}, {:+.2f}]".format(*found.interval)
    said = (in_compute(gain) if gain else "") or None
    return {keys["improvement"]: percent, keys["verdict"]: found.kind.replace("_", " "), keys["compute"]: said}


def columns(table: list[dict[str, Any]]) -> formats.Columns:
    """Return the columns of `rows` that have a value."""
    numbers = sorted({int(key.rpartition("_")[2]) for row in table for key in row if key.startswith("verdict_")})
    headings = {"improvement": "rung {}, %", "verdict": "verdict", "compute": "worth in compute"}
    out: formats.Columns = {"arm": ("arm", "")}
    out |= {f"{what}_{n}": (headings[what].format(n), "") for n in numbers for what in WHAT}
    out |= NUMBERS
    if any(row["axis"] == RUNG for row in table):
        out["slope"] = ("points per rung", NUMBERS["slope"][1])
    return {key: column for key, column in out.items() if any(row[key] is not None for row in table)}


def short(table: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], formats.Columns]:
    """Return the rows for a terminal or a page: all that a rung says of an arm in one cell, of three lines."""
    wide = columns(table)
    numbers = [key.rpartition("_")[2] for key in wide if key.startswith("verdict_")]
    out = []
    for row in table:
        cells = {n: [row[f"{what}_{n}"] for what in WHAT] for n in numbers}
        joined = {f"rung_{n}": "\n".join(map(str, filter(None, said))) or None for n, said in cells.items()}
        steep = row["slope"] is not None
        slope = "{slope:+.3f}\n[{slope_low:+.3f}, {slope_high:+.3f}]".format_map(row) if steep else None
        out.append(
            {"arm": row["arm"], **joined, "trend": row["trend"], "slope": slope, "p_adjusted": row["p_adjusted"]}
        )
    heads: formats.Columns = {f"rung_{n}": (f"rung {n}, %\nverdict\nworth in compute", "") for n in numbers}
    numeric = {"slope": (wide.get("slope", NUMBERS["slope"])[0], ""), "p_adjusted": NUMBERS["p_adjusted"]}
    shown = {"arm": wide["arm"], "trend": NUMBERS["trend"], **heads, **numeric} if table else {}
    return out, {key: column for key, column in shown.items() if key not in NUMBERS or key in wide}


def main(argv: list[str] | None = None, prog: str = "python -m analysis.ladder") -> int:
    """Run the script; return the exit code."""
    p = command.parser(prog, __doc__, sources=True)
    add_require_verdict(p)
    options = p.parse_args(argv)
    study = command.ladder(options)
    result = decide(study)
    if options.format == "json":
        print(formats.to_json(as_object(result)))
        return end(result, options.require_verdict)
    table = rows(result)
    if table:
        shown = short(table) if options.format == "terminal" else (table, columns(table))
        command.emit_rows(*shown, options.format, title=result.summary)
    if options.format == "terminal":
        said = [f"{row.label}: {row.said}; {row.why}" for row in result.trends]
        formats.print_notes([*said, FAMILY] if said else [])
    return end(result, options.require_verdict) if table or result.unfinished else Exit.DONE
