"""Every figure of a report and of a published page: a row of `FIGURES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import figure

from analysis.describe.alphas import arms_with_alphas
from analysis.report import cell_curves, frame, plots, takeaways
from analysis.report.findings import Findings


@dataclass(frozen=True)
class Figure:
    """One figure. It is shown if `table` has rows.

    `takeaway` is a sentence on what it shows, read from the tables; empty if they say nothing. `caption` says how to
    read it in the report, `short` on a published page; a figure without one is not shown there. `cut` marks a figure
    whose frame is chosen so that most of it can be read: its caption counts the points outside.
    """

    name: str
    draw: Callable[[Findings], figure.Figure]
    table: Callable[[Findings], Any]
    takeaway: Callable[[Findings], str]
    caption: str = ""
    short: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Drawn:
    """A figure of one study: the drawing, its sentence, and how many points lie outside its frame, in words."""

    row: Figure
    plot: figure.Figure
    takeaway: str
    outside: str


def _has(found: Findings, stage: str) -> bool:
    curves = found.study.curves
    return bool(len(curves)) and bool((curves["stage"] == stage).any())


def _rates(found: Findings) -> bool:
    trials = found.study.trials
    return {"lr", "val_nll"} <= set(trials.columns) and bool((trials["stage"] != "confirm").any())


FIGURES = (
    Figure(
        "differences",
        draw=lambda found: plots.differences(found.study, found.result.comparisons),
        table=lambda found: True,
        takeaway=lambda found: takeaways.differences(found.result.comparisons, found.study.margin),
        caption=(
            "Each dot is one seed (100 at most are drawn): the baseline's loss minus the arm's on that seed, "
            "in percent of the baseline's mean; right of zero the arm is better. The bar is the interval of "
            "the mean (tick). The grey band is the margin of {margin} within which differences count as none. "
            "A bar that crosses zero decides nothing."
        ),
        short=(
            "One dot a seed: the baseline's loss minus the arm's, in percent. The bar is the interval of the "
            "mean, the band the margin."
        ),
    ),
    Figure(
        "learning_rate",
        draw=lambda found: plots.learning_rate(found.study),
        table=_rates,
        takeaway=lambda found: takeaways.learning_rate(found.calibration),
        caption=(
            "Small marks are search trials (hollow: stopped early, at the loss they had); lines join the "
            "means of the calibration seeds on the shared grid, vertical strokes span them; crosses at the "
            "top are infeasible trials. Losses far above the rest are cut off. Every arm should have its "
            "lowest point inside the grid: the arms are then compared each at its own best."
        ),
        short="Validation loss against learning rate: search trials as dots, the shared grid as lines.",
        cut=True,
    ),
    Figure(
        "search_budget",
        draw=lambda found: plots.search_budget(found.study, found.search_budget),
        table=lambda found: {"lr", "val_nll"} <= set(found.study.trials.columns) and found.search_budget,
        takeaway=lambda found: takeaways.search_budget(found.search_budget),
        caption=(
            "The lowest validation loss to expect from n search trials of an arm, from the trials it had: "
            "solid is unbiased (drawn without replacement), dotted the estimate with replacement. A curve "
            "still falling at its end says that more search could help that arm; where a line is missing, the "
            "best of so few trials may be an infeasible one. Trials stopped early count with the loss they "
            "had."
        ),
    ),
    Figure(
        "loss_curves",
        draw=lambda found: plots.loss_curves(found.study),
        table=lambda found: _has(found, "confirm"),
        takeaway=lambda found: takeaways.loss_curves(found.study),
        caption=(
            "Validation loss of the confirm runs: the line is the mean over seeds, the band runs from the "
            "lowest to the highest seed. The first steps are cut off so that the end can be read."
        ),
        short="Validation loss of the confirm runs: mean over seeds, band from the lowest to the highest.",
        cut=True,
    ),
    Figure(
        "cell_curves",
        draw=lambda found: cell_curves.cell_curves(found.study, found.cell_curves),
        table=lambda found: found.cell_curves,
        takeaway=lambda found: takeaways.lowest_cell(found.cell_curves),
        caption=(
            "Validation loss of each arm's best configurations, a line a configuration and one seed each: "
            "lines of two arms differ by their seeds' luck as well."
        ),
    ),
    Figure(
        "over_training",
        draw=lambda found: plots.over_training(found.study, found.over_training),
        table=lambda found: found.over_training,
        takeaway=lambda found: takeaways.over_training(found.slopes),
        caption=(
            "Improvement over the baseline at each evaluation, with its interval at that step alone; above "
            "zero the arm is better. Points of one run depend on each other, so only the slope below, one "
            "number a seed, is tested."
        ),
        short="The improvement at each evaluation of the confirm runs, with its interval at that step alone.",
    ),
    Figure(
        "growth",
        draw=lambda found: plots.figure(found.study, found.growth),
        table=lambda found: found.growth,
        takeaway=lambda found: "",
        short=("The slope of the improvement on log2(tokens): one dot a seed, the bar is the interval of the mean."),
    ),
    Figure(
        "alphas",
        draw=lambda found: plots.learned_alphas(found.study),
        table=lambda found: arms_with_alphas(found.study),
        takeaway=lambda found: takeaways.by_layer(found.alphas),
        caption=(
            "Where the gate strength ended, learned or searched: a thin line is one seed (100 at most are "
            "drawn), the thick one their mean, by layer. Dotted lines mark 0 (gate off) and 1 (fully gated)."
        ),
        short="Learned alpha at the last step by layer: a thin line a seed, the thick one their mean.",
    ),
    Figure(
        "against_alpha",
        draw=lambda found: plots.against_alpha(found.study, found.against_alpha),
        table=lambda found: found.against_alpha,
        takeaway=lambda found: takeaways.against_alpha(found.against_alpha),
        caption=(
            "Loss against the searched alpha: dots are search trials trained to their end, at whatever "
            "learning rate they had; the line is a quadratic fit in alpha and log learning rate, at its best "
            "learning rate, with its interval. It describes the search and tests nothing."
        ),
        short="Search trials of the arm that searched alpha, with a quadratic through them and its band.",
        cut=True,
    ),
    Figure(
        "sequential",
        draw=lambda found: plots.sequential_path(found.study, found.result.comparisons),
        table=lambda found: found.sequential,
        takeaway=lambda found: takeaways.sequential(found.result.comparisons),
        caption=(
            "The rule was named before the study ran. A line is one arm: the smallest level at which this or "
            "an earlier look would have stopped for that arm alone. An arm is decided once that p, corrected "
            "for all arms, is at or below the level (dotted for one arm alone); seeds were added until every "
            "arm was decided or the last look was reached."
        ),
    ),
)


def drawn(found: Findings, published: bool = False) -> dict[str, Drawn]:
    """Name -> figure, for the figures of a report, or of a published page, that a study's tables allow."""
    out = {}
    for row in FIGURES:
        if (row.short if published else row.caption) and row.table(found):
            plot = plots.styled(row.draw, found)
            out[row.name] = Drawn(row, plot, row.takeaway(found), frame.note(plot) if row.cut else "")
    return out
