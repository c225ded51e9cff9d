"""Does the difference grow with training? Its slopes against tokens. `python -m analysis.growth --study STUDY`.

For each seed s the least-squares slope b_s of d_s(t) = 100 * (1 - arm_s(t) / baseline_s(t)) on log2(tokens), and on
millions of tokens, over the evaluations after a tenth of training. Estimand: the mean of b_s over seeds; its interval
and p are those of a one-sample t test over seeds, p adjusted over the arms as the study says.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis import beside, command, formats, multiplicity
from analysis.plots import DRAWN, INK, WIDTH, arm_style
from analysis.tables import Study

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
LIMIT = (
    "The learning rate decays within a run, so an earlier point of a run is no shorter run: at equal tokens a run "
    "planned that short has already decayed. A slope within runs describes these runs; whether the difference is "
    "larger at more tokens needs studies of different length."
)


def table(study: Study) -> list[dict[str, Any]]:
    """A row an arm and scale; `up` counts the seeds with a slope above zero, `values` has every seed's slope."""
    out = []
    for scale, (_, unit, key) in beside.SCALES.items():
        rows = beside.slopes(study, scale=scale)
        # an arm that cannot be tested enters the family with p = 1
        adjusted = multiplicity.adjust([1.0 if row["p"] is None else row["p"] for row in rows], study.correction)
        for row, p in zip(rows, adjusted, strict=True):
            tested = row["p"] is not None
            out.append(
                {name: row.get(name) for name in ("arm", "n", "low", "high", "p", "values")}
                | {"scale": unit, "slope": row[key], "p_adjusted": p if tested else None}
                | {"up": sum(value > 0 for value in row["values"].values())}
                | {"verdict": _words(row[key], p, study.level) if tested else row["why"]}
            )
    return out


def _words(slope: float, p: float, level: float) -> str:
    return "no trend shown" if p > level else "rises with tokens" if slope > 0 else "falls with tokens"


def figure(study: Study, rows: list[dict[str, Any]]) -> Figure:
    """The slope on log2(tokens) of every seed as a dot, with the mean and its interval, an arm a line."""
    rows = [row for row in rows if row["scale"] == beside.SCALES["log2"][1] and row["slope"] is not None]
    fig = Figure(figsize=(WIDTH, 1.1 + 0.5 * max(1, len(rows))))
    ax = fig.subplots()
    ax.axvline(0, color=INK, lw=1)
    for y, row in enumerate(rows):
        colour, marker = arm_style(study, row["arm"])
        values = np.array(list(row["values"].values())[:DRAWN])
        ax.plot(values, np.full(len(values), y + 0.17), marker, color=colour, ms=4.5, alpha=0.65, mew=0)
        if row["low"] is not None:
            ax.plot([row["low"], row["high"]], [y - 0.17] * 2, color=colour, lw=3)
        ax.plot([row["slope"]], [y - 0.17], "|", color=INK, ms=13, mew=2)
    ax.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(f"slope of the improvement over {study.baseline} (% a doubling of tokens; right of 0 = it rises)")
    return fig


def main(argv: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    options = command.parser("analysis.growth", __doc__).parse_args(argv)
    study = command.study(options)
    rows = table(study)
    if not rows:
        return command.could_not_conclude("this study has no curves of confirm runs")
    command.emit_rows(rows, COLUMNS, options.format, title=f"Improvement against tokens: {study.name}")
    if options.format == "terminal":
        formats.print_notes([LIMIT])
    return 0


if __name__ == "__main__":
    command.run(main)
