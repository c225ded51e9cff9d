"""Test if the difference grows with training, by its slope against tokens. `pagating growth --study STUDY`.

Each seed s has a least-squares slope b_s of d_s(t) = 100 * (1 - arm_s(t) / baseline_s(t)) on log2(tokens), and one on
millions of tokens, over the evaluations after a tenth of training. The estimand is the mean of b_s over seeds. Its
interval and p are those of a one-sample t test over seeds, and p is adjusted over the arms as the study says. This was
named before the studies ran. The slope over the second half of training was not; it is exploratory and decides nothing.
"""

from collections.abc import Mapping
from typing import Any

from analysis.describe import curves
from analysis.io import command, formats
from analysis.io.assemble import Study
from analysis.verdict import looks
from analysis.verdict.checks import unfinished
from analysis.verdict.exits import could_not

COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "scale": ("slope in", ""),
    "n": ("n", "d"),
    "slope": ("slope", "+.3f"),
    "low": ("low", "+.3f"),
    "high": ("high", "+.3f"),
    "up": ("seeds up", "d"),
    "p": ("p", ".3g"),
    "p_adjusted": ("p adjusted", ".3g"),
    "verdict": ("the improvement", ""),
}
LATE_COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "scale": ("slope in", ""),
    "late": ("slope, second half", "+.3f"),
    "late_low": ("low", "+.3f"),
    "late_high": ("high", "+.3f"),
    "late_p": ("p, not adjusted", ".3g"),
}
DECIDING = ("decision_low", "decision_high")
LATE = 0.5  # share of training left out of the exploratory slope
EXPLORATORY = (
    "Exploratory: the same slope over the evaluations in the second half of training alone. It was not named before "
    "the studies ran, its p is not adjusted for the number of arms, and it decides nothing."
)
LIMIT = (
    "The learning rate decays within a run, so an earlier point of a run is not a shorter run: at equal tokens, a "
    "run planned that short has already decayed. A slope within runs describes these runs. Only studies of different "
    "length can show that the difference is larger at more tokens."
)

OWN_LIMIT = (
    "An earlier point of a run is not a shorter run, which may have another schedule. Only studies of different length "
    "can show that the difference is larger after more training."
)


def table(study: Study, pairs: Mapping[str, curves.Pair] | None = None) -> list[dict[str, Any]]:
    """Return one row per arm and scale; `up` counts the seeds with a slope above zero, `values` has each seed's slope.

    `late`, `late_low`, `late_high` and `late_p` describe the second half of training alone; they are exploratory, and
    their p is not adjusted. `pairs` are the `paired_curves` of the study, if already computed.
    """
    out = []
    pairs = curves.paired_curves(study) if pairs is None else pairs
    for scale, (_, unit, key) in curves.SCALES.items():
        if study.own and scale != "log2":  # a million of what the user counts may be far away
            continue
        rows = curves.slopes(study, scale=scale, pairs=pairs)
        late = curves.slopes(study, LATE, scale, pairs)
        for row, half in zip(rows, late, strict=True):
            out.append(
                {name: row.get(name) for name in ("arm", "n", "low", "high", "p", "values", *DECIDING)}
                | {
                    "scale": unit.replace("tokens", study.budget_unit),
                    "slope": row[key],
                    "p_adjusted": row["p_adjusted"],
                }
                | {"up": sum(value > 0 for value in row["values"].values())}
                | {"late": half[key]}
                | {f"late_{name}": half[name] for name in ("low", "high", "p")}
                | {"trend": row["trend"], "verdict": row["why"]}
            )
    return out


def turned(rows: list[dict[str, Any]]) -> str:
    """Name the arms whose slope has the other sign in the second half of training, in a sentence; exploratory."""
    said = []
    for row in rows:
        falls, rises = ((row[name] or 0) * sign > 0 for name, sign in (("late_high", -1), ("late_low", 1)))
        if not row["scale"].startswith("% per doubling") or row["p"] is None or not (falls or rises):
            continue
        if (row["slope"] > 0) == falls:
            span = f"{row['late']:+.3f} [{row['late_low']:+.3f}, {row['late_high']:+.3f}]{row['scale']}"
            named = f"{row['arm']} in {row['study']}" if "study" in row else row["arm"]
            said.append(f"{named} ({span}, p = {row['late_p']:.3g}; over all of training: {row['trend']})")
    return f"In the second half of training the slope has the other sign: {', '.join(said)}." if said else ""


def main(argv: list[str] | None = None, prog: str = "python -m analysis.growth") -> int:
    """Run the script; return the exit code."""
    options = command.parser(prog, __doc__).parse_args(argv)
    study = command.study(options)
    rows = table(study)
    if missing := unfinished(study):
        return could_not(missing)
    if not rows:
        return command.nothing_to_show("this study has no curves of confirm runs")
    on_terminal = options.format == "terminal"
    columns = COLUMNS if on_terminal else COLUMNS | LATE_COLUMNS
    command.emit_rows(rows, columns, options.format, title=f"Improvement against {study.budget_unit}: {study.name}")
    left_out = looks.not_of_slopes(study)
    if on_terminal:
        formats.print_table(formats.table(rows, LATE_COLUMNS, "In the second half of training"))
        formats.print_notes(
            [line for line in (*left_out, EXPLORATORY, turned(rows), OWN_LIMIT if study.own else LIMIT) if line]
        )
    else:
        command.say(left_out)
    return 0
