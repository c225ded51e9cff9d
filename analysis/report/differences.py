"""Draw the paired differences of every arm, with bars that agree with the decision."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.io.assemble import Study
from analysis.report.palette import INK
from analysis.report.plots import DRAWN, WIDTH, arm_style
from analysis.verdict.family import decision_bars
from analysis.verdict.kinds import Comparison
from analysis.verdict.words import in_unit

CAPTION = (
    "One dot is one seed (at most 100 are drawn): {difference}, in percent of the baseline's "
    "mean. Right of zero the arm is better. The tick is the mean. The thin line with ends decides if the arm differs: "
    "it is clear of zero exactly if the arm is better or worse. The broad bar decides if the arm is equivalent: it "
    "lies inside the grey band, the margin of {margin}, exactly if a larger difference is excluded. Both have the "
    "level that the correction for the number of arms gives them; the table's intervals hold for one arm alone. An arm "
    "with a diverged run has no bars, because ranks decide it. Runs that are not pairs have no dots. With looks, the "
    "bars are those of the last look, and a decision of an earlier look stays. A contrast is {contrast}. "
    "If the floor does not lose, no bar decides anything."
)
SHORT = (
    "One dot is one seed: the baseline's loss minus the arm's, in percent. The thin line is clear of zero exactly if "
    "the arm is better or worse; the broad bar lies inside the band exactly if a difference larger than the margin is "
    "excluded."
)


def differences(study: Study, rows: Sequence[Comparison]) -> Figure:
    """Draw paired differences in percent of the baseline's mean: one dot per seed, with the mean and its bars."""
    rows = shown(rows, study)
    fig = Figure(figsize=(WIDTH, 1.1 + 0.55 * max(1, len(rows))))
    draw_differences(fig.subplots(), study, rows)
    return fig


def shown(rows: Sequence[Comparison], study: Study) -> list[Comparison]:
    """Return the comparisons that have an improvement in percent; if none of a user's metric has, all differences."""
    found = [row for row in rows if row.improvement_percent is not None]
    return found or [row for row in rows if study.own and row.mean_difference is not None]


def _relative(rows: Sequence[Comparison]) -> bool:
    return not rows or rows[0].improvement_percent is not None


def draw_differences(ax: Axes, study: Study, rows: Sequence[Comparison]) -> None:
    """Draw `differences` on given axes; every row must have an improvement, or none and a difference."""
    ax.axvline(0, color=INK, lw=1)
    unit = _unit(rows)
    if rows:
        margin = rows[0].margin * unit
        ax.axvspan(-margin, margin, color=INK, alpha=0.08, lw=0)
    for y, row in enumerate(rows):
        colour, marker = arm_style(study, row.arm)
        percent = [d * unit for d in row.differences if d is not None][:DRAWN]
        ax.plot(percent, np.full(len(percent), y + 0.17), marker, color=colour, ms=4.5, alpha=0.65, mew=0)
        differs, equivalent = decision_bars(row, study)
        if equivalent:
            ends = [end * unit for end in equivalent]
            ax.plot(ends, [y - 0.17] * 2, color=colour, lw=5, alpha=0.4, solid_capstyle="butt")
        if differs:
            ax.plot([end * unit for end in differs], [y - 0.17] * 2, color=colour, lw=1.5, marker="|", ms=8, mew=1.5)
        ax.plot([(row.mean_difference or 0.0) * unit], [y - 0.17], "|", color=INK, ms=13, mew=2)
    _zoom(ax, study, rows)
    ax.set_yticks(range(len(rows)), [row.label for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    what = "better" if study.own else "lower loss"
    of = f"% of its mean {study.metric}" if _relative(rows) else f"{study.metric}{in_unit(study)}"
    ax.set_xlabel(f"improvement over {study.baseline}\n({of}; right of 0 = {what})")


def _unit(rows: Sequence[Comparison]) -> float:
    """Return percent of the baseline's mean per unit of the metric, or 1, so that all rows share the margin."""
    return 100 / (rows[0].baseline_mean or np.nan) if rows and _relative(rows) else 1.0


def _zoom(ax: Axes, study: Study, rows: Sequence[Comparison]) -> None:
    # a floor far behind would squeeze the other arms, so its number is written at the edge
    near, unit = [row for row in rows if row.arm != study.floor], _unit(rows)
    if not near or len(near) == len(rows):
        return
    reach = 1.15 * max(
        [abs(d * unit) for row in near for d in row.differences[:DRAWN] if d is not None]
        + [abs(end * unit) for row in near for bar in decision_bars(row, study) for end in bar or ()]
        + [rows[0].margin * unit]
    )
    for y, row in enumerate(rows):
        value = (row.improvement_percent if _relative(rows) else row.mean_difference) or 0.0
        text = f"{value:+.2f}%" if _relative(rows) else f"{value:+.4g}"
        if row.arm == study.floor and abs(value) > reach:
            side = "left" if value < 0 else "right"
            arrow = f"\u25c0 {text}" if value < 0 else f"{text} \u25b6"
            ax.text(-reach if value < 0 else reach, y, arrow, ha=side, va="center", color=arm_style(study, row.arm)[0])
            ax.set_xlim(-reach, reach)
