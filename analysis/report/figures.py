"""List every figure of a report and of a published page, one row of `FIGURES` each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import figure

from analysis.describe.alphas import arms_with_alphas
from analysis.io.assemble import Study
from analysis.report import cell_curves, differences, frame, layers, plots, takeaways
from analysis.report.findings import Findings
from analysis.verdict.looks import not_of_slopes


@dataclass(frozen=True)
class Figure:
    """Figure that is shown if `table` has rows.

    `takeaway` states what the figure shows, and is empty if the tables say nothing. `caption` explains how to read it
    in the report, and `short` on a published page; a figure without that text is left out there. `cut` marks a figure
    whose frame leaves points out; its caption counts them.
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
    """Figure drawn for one study: its takeaway, the sentence on points outside its frame, and its caption in words."""

    row: Figure
    plot: figure.Figure
    takeaway: str
    outside: str
    caption: str = ""


def _has(found: Findings, stage: str) -> bool:
    curves = found.study.curves
    return bool(len(curves)) and bool((curves["stage"] == stage).any())


def _rates(found: Findings) -> bool:
    trials = found.study.trials
    return {found.study.first, "val_nll"} <= set(trials.columns) and bool((trials["stage"] != "confirm").any())


def worded(text: str, study: Study) -> str:
    """Return a caption with the study's words: its metric, and the side on which a better value lies."""
    own, grows = study.own.name if study.own else "", study.turn < 0
    better, other = ("arm", "baseline") if grows else ("baseline", "arm")
    after, before = ("before", "after") if grows else ("after", "before")
    words = {
        "margin": str(study.margin),
        "Metric": own or "Validation loss",
        "metric": own or "validation loss",
        "loss": own or "loss",
        "Losses": "Values" if own else "Losses",
        "lowest": "highest" if grows else "lowest",
        "highest": "lowest" if grows else "highest",
        "falls": "rises" if grows else "falls",
        "top": "bottom" if grows else "top",
        "above": "below" if grows else "above",
        "difference": f"the {better}'s {own or 'loss'} minus the {other}'s",
        "contrast": f"the {own or 'loss'} of the arm {after} `against` minus that of the arm {before} it",
    }
    for key, word in words.items():
        text = text.replace(f"{{{key}}}", word)
    return text


FIGURES = (
    Figure(
        "ladder",
        draw=lambda found: plots.ladder(found.study, found.result),
        table=lambda found: (
            found.result.trends and (found.study.own is not None or all(rung.compute for rung in found.result.rungs))
        ),
        takeaway=lambda found: takeaways.ladder(found.result.trends),
        caption=(
            "Improvement over the baseline against the baseline's training compute, one panel per arm and one mark per "
            "rung, with the rung's interval for that arm alone. Above zero the arm is better. A hollow mark has no "
            "verdict that counts. The dashed line is the least-squares line through the marks, each with the same "
            "weight; its slope decides if the improvement grows or shrinks. The floor is left out."
        ),
        short="The improvement against the baseline's training compute: a mark with its interval per rung.",
    ),
    Figure(
        "differences",
        draw=lambda found: differences.differences(found.study, found.result.every),
        table=lambda found: not found.result.unfinished,
        takeaway=lambda found: takeaways.differences(found.result.every, found.study),
        caption=differences.CAPTION,
        short=differences.SHORT,
    ),
    Figure(
        "learning_rate",
        draw=lambda found: plots.learning_rate(found.study),
        table=_rates,
        takeaway=lambda found: takeaways.learning_rate(found.calibration),
        caption=(
            "Small marks are search trials; a hollow one was stopped early and has the {loss} it had then. Lines join "
            "the means of the calibration seeds on the shared grid, and vertical strokes span those seeds. Crosses at "
            "the {top} are infeasible trials. {Losses} far {above} the rest are cut off. Every arm should have its "
            "{lowest} point inside the grid, so that each arm is compared at its own best."
        ),
        short="Validation loss against learning rate: search trials as dots, the shared grid as lines.",
        cut=True,
    ),
    Figure(
        "search_budget",
        draw=lambda found: plots.search_budget(found.study, found.search_budget),
        table=lambda found: {found.study.first, "val_nll"} <= set(found.study.trials.columns) and found.search_budget,
        takeaway=lambda found: takeaways.search_budget(found.search_budget, found.study),
        caption=(
            "Expected {lowest} {metric} of n search trials of an arm, from the trials it had. The solid line is "
            "drawn without replacement (unbiased), the dotted one with replacement. A curve that still {falls} at its "
            "end means that more search could help that arm. A line is missing if the best of so few trials may be an "
            "infeasible one. Trials stopped early count with the {loss} they had."
        ),
    ),
    Figure(
        "loss_curves",
        draw=lambda found: plots.loss_curves(found.study),
        table=lambda found: _has(found, "confirm"),
        takeaway=lambda found: takeaways.loss_curves(found.study),
        caption=(
            "{Metric} of the confirm runs: the line is the mean over seeds, the band runs from the lowest to "
            "the highest seed. The first steps are cut off so that the end can be read."
        ),
        short="Validation loss of the confirm runs: mean over seeds, band from the lowest to the highest.",
        cut=True,
    ),
    Figure(
        "cell_curves",
        draw=lambda found: cell_curves.cell_curves(found.study, found.cell_curves),
        table=lambda found: found.cell_curves,
        takeaway=lambda found: takeaways.lowest_cell(found.cell_curves, found.study),
        caption=(
            "{Metric} of each arm's best configurations: one line per configuration, each with one seed. Lines "
            "of two arms also differ by the luck of their seeds."
        ),
    ),
    Figure(
        "over_training",
        draw=lambda found: plots.over_training(found.study, found.over_training),
        table=lambda found: found.over_training,
        takeaway=lambda found: takeaways.over_training(found.slopes, not_of_slopes(found.study)),
        caption=(
            "Improvement over the baseline at each evaluation, with its interval at that step alone. Above zero the "
            "arm is better. Points of one run depend on each other, so only the slope below is tested, one number per "
            "seed."
        ),
        short="The improvement at each evaluation of the confirm runs, with its interval at that step alone.",
    ),
    Figure(
        "growth",
        draw=lambda found: plots.figure(found.study, found.growth),
        table=lambda found: found.growth,
        takeaway=lambda found: "",
        short=(
            "The slope of the improvement on log2(tokens): one dot per seed. The bar of the mean is clear of zero "
            "exactly if a trend is shown."
        ),
    ),
    Figure(
        "alphas",
        draw=lambda found: plots.learned_alphas(found.study),
        table=lambda found: arms_with_alphas(found.study),
        takeaway=lambda found: takeaways.by_layer(found.alphas),
        caption=(
            "Gate strength at the last step by layer, learned or searched: a thin line is one seed (at most 100 are "
            "drawn), the thick line their mean. Dotted lines mark 0 (gate off) and 1 (fully gated)."
        ),
        short="Learned alpha at the last step by layer: a thin line per seed, a thick line for their mean.",
    ),
    Figure(
        "layers",
        draw=lambda found: layers.layers(found.study, found.layers),
        table=lambda found: found.layers,
        takeaway=lambda found: layers.takeaway(found.why, found.study.baseline),
        caption=layers.CAPTION,
        short=layers.SHORT,
    ),
    Figure(
        "against_alpha",
        draw=lambda found: plots.against_alpha(found.study, found.against_alpha),
        table=lambda found: found.against_alpha,
        takeaway=lambda found: takeaways.against_alpha(found.against_alpha),
        caption=(
            "Loss against the searched alpha. Dots are search trials trained to their end, each at its own learning "
            "rate. The line is a quadratic fit in alpha and log learning rate, at its best learning rate, with its "
            "interval. It describes the search and tests nothing."
        ),
        short="Search trials of the arm that searched alpha, with a quadratic through them and its band.",
        cut=True,
    ),
    Figure(
        "sequential",
        draw=lambda found: plots.sequential_path(found.study, found.result.every),
        table=lambda found: found.sequential,
        takeaway=lambda found: takeaways.sequential(found.result.every),
        caption=(
            "The rule was named before the study ran. A line is one arm, or if it is dashed one contrast. Its p is the "
            "smallest level at which this or an earlier look would have stopped for that arm alone. An arm is decided "
            "once its p, corrected for all arms, is at most the level; the dotted line is the level for one arm alone. "
            "Seeds were added until every arm was decided or the last look was reached."
        ),
    ),
)


def drawn(found: Findings, published: bool = False) -> dict[str, Drawn]:
    """Draw the figures of a report, or of a published page, for which the study has rows; return them by name."""
    out = {}
    for row in FIGURES:
        if (row.short if published else row.caption) and row.table(found):
            plot = plots.styled(row.draw, found)
            outside, caption = frame.note(plot) if row.cut else "", worded(row.caption, found.study)
            out[row.name] = Drawn(row, plot, row.takeaway(found), outside, caption)
    return out
