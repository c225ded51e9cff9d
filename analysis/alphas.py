"""Where the learned gate strengths ended, by arm and layer, over seeds. `python -m analysis.alphas STUDY`."""

from typing import Any

import numpy as np
from scipy import stats

from analysis import command, formats
from analysis.plots import alpha_columns
from analysis.tables import Study, confirm_rows

COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "layer": ("layer", "d"),
    "n": ("n", "d"),
    "start": ("start", ".3f"),
    "mean": ("mean", ".3f"),
    "low": ("low", ".3f"),
    "high": ("high", ".3f"),
    "sd": ("sd", ".3f"),
    "smallest": ("min", ".3f"),
    "largest": ("max", ".3f"),
    "up": ("seeds up", "d"),
    "down": ("seeds down", "d"),
}


def summarise(study: Study) -> list[dict[str, Any]]:
    """A row an arm and layer over the completed confirm runs: final alpha, t interval of its mean, seeds up and down.

    `start` is the mean at the first evaluation of the curves (None without curves); `up` and `down` count the seeds
    that ended above and below their own start. Layers of one run depend on each other: nothing is tested across them.
    """
    rows = confirm_rows(study.trials)
    rows = rows[rows["outcome"] == "completed"]
    out: list[dict[str, Any]] = []
    for arm in study.arms:
        runs = rows[rows["arm"] == arm].set_index("seed")
        starts = _starts(study, arm)
        for column in alpha_columns(rows):
            final = runs[column].dropna().astype(float)
            if final.empty:
                continue
            row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"arm": arm, "layer": int(column.rsplit("_", 1)[1])}
            row |= {"n": len(final), "mean": float(final.mean())}
            row |= {"smallest": float(final.min()), "largest": float(final.max())}
            row["values"] = {str(seed): float(x) for seed, x in final.items()}
            if len(final) > 1:
                sd = float(final.std(ddof=1))
                half = float(stats.t.isf(study.level / 2, len(final) - 1)) * sd / np.sqrt(len(final))
                row |= {"sd": sd, "low": row["mean"] - half, "high": row["mean"] + half}
            if column in starts:
                first = starts[column].reindex(final.index).dropna()
                moved = final[first.index] - first
                row |= {"start": float(first.mean()) if len(first) else None}
                row |= {"up": int((moved > 0).sum()), "down": int((moved < 0).sum())}
            out.append(row)
    return out


def _starts(study: Study, arm: str) -> dict[str, Any]:
    # column -> alpha of each seed at its first evaluation
    curves = study.curves
    if not len(curves):
        return {}
    mine = curves[(curves["stage"] == "confirm") & (curves["arm"] == arm)].sort_values("step")
    first = mine.drop_duplicates("seed").set_index("seed")
    return {c: first[c].astype(float) for c in alpha_columns(first)}


def main(argv: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    options = command.parser("analysis.alphas", __doc__).parse_args(argv)
    study = command.study(options)
    rows = summarise(study)
    if not rows:
        return command.could_not_conclude("no confirm run of this study learned alpha (no alpha_layer_ columns)")
    command.emit_rows(rows, COLUMNS, options.format, title=f"Learned alpha at the last step: {study.name}")
    return 0


if __name__ == "__main__":
    command.run(main)
