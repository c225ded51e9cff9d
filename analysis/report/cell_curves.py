"""Draw the loss curves of a study without a confirm stage: one line per configuration, as each has one seed."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.io.assemble import Study
from analysis.report.plots import WIDTH, arm_style, legend, metric_axis, tokens_text

Line = tuple[str, int, str, pd.DataFrame]  # arm, rank of the configuration in its arm, label, (tokens, val_nll)
MOST = 4  # configurations drawn per arm: the best
LINES = ("-", "--", ":", "-.")


def lines(study: Study) -> list[Line]:
    """Return one line for each of the `MOST` configurations per arm with the lowest last validation loss.

    Ranks count from 0 within the arm. A configuration that diverged has no last loss and no line.
    """
    curves, trials = study.curves, study.trials
    if not len(curves) or "config_key" not in trials.columns:
        return []
    first = trials.drop_duplicates(["arm", "config_key"]).set_index(["arm", "config_key"])
    found = []
    for arm in study.arms:
        mine = curves[(curves["arm"] == arm) & np.isfinite(curves["val_nll"].astype(float))].sort_values("tokens")
        last = mine.groupby("config_key", sort=False)["val_nll"].last().sort_values(kind="stable")
        for rank, key in enumerate(last.index[:MOST]):
            rows = mine.loc[mine["config_key"] == key, ["tokens", "val_nll"]]
            found.append((arm, rank, f"{arm}{_setting(study, first.loc[(arm, key)])}", rows))
    return found


def _setting(study: Study, row: pd.Series) -> str:
    """Return the value of the first hyperparameter in words; "" if a study tunes none."""
    if study.first is None:
        return ""
    return f", {study.first} " + (f"{row['lr']:.1e}" if study.first == "lr" else f"{row[study.first]:.4g}")


def cell_curves(study: Study, found: Sequence[Line]) -> Figure:
    """Draw the validation loss of every arm's best configurations against tokens."""
    fig = Figure(figsize=(WIDTH, 3.7))
    ax = fig.subplots()
    entries = []
    for arm, rank, label, rows in found:
        colour, marker = arm_style(study, arm)
        (line,) = ax.plot(rows["tokens"], rows["val_nll"], LINES[rank], color=colour, marker=marker, lw=1.4, ms=3.5)
        entries.append((line, label))
    ax.set_xlabel(f"training {study.budget_unit}")
    ax.xaxis.set_major_formatter(FuncFormatter(tokens_text))
    metric_axis(ax, study)
    legend(ax, entries)
    return fig
