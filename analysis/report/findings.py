"""Compute each table of a study once, when it is first read."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.describe import alphas, budget, calibration, curves, fairness, growth, hyperparameters, ladder, layers
from analysis.describe.samples import Sample, by_prompt
from analysis.io import formats
from analysis.io.assemble import COMPUTE, Study
from analysis.io.space import chosen_columns, chosen_rows
from analysis.report.cell_curves import Line, lines
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Result, shown_rows
from analysis.verdict.ladder.words import size

Rows = list[dict[str, Any]]
TABLES = (  # file names of the tables
    *("ladder", "verdict", "chosen", "fairness", "sequential", "calibration", "equal_learning_rate", "over_training"),
    *("search_budget", "importance", "against_alpha", "alphas", "why", "layers"),
)
PATH_COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "n": ("seeds", "d"),
    "pairs": ("pairs", "d"),
    "t": ("t", "+.2f"),
    "p": ("p at this look", ".3g"),
    "e": ("e", ".3g"),
    "stops_at": ("stops one arm at p", ".3g"),
    "p_anytime": ("p over all looks", ".3g"),
    "p_no_difference": ("p of no difference, over all looks", ".3g"),
}


@dataclass(frozen=True, eq=False)
class Findings:
    """Verdict and tables of one study, for its figures, pages and files."""

    study: Study

    @cached_property
    def result(self) -> Result:
        """Verdict on every arm."""
        return decide(self.study)

    @cached_property
    def verdict(self) -> Rows:
        """Comparisons of the verdict, one row per arm; none before the study has ended."""
        return [] if self.result.unfinished else shown_rows(self.result.every)

    @cached_property
    def ladder(self) -> Rows:
        """Arms and rungs of a ladder (`ladder.rows`)."""
        return ladder.rows(self.result)

    @cached_property
    def other_rungs(self) -> dict[str, Rows]:
        """Comparisons of the finished rungs but the last of a finished ladder, by a name of the rung."""
        rungs = [rung for rung in self.result.rungs if not rung.result.unfinished]
        below = rungs if self.result.unfinished else rungs[:-1]
        axis = self.study.ladder.axis if self.study.ladder else COMPUTE
        return {f"rung {rung.rung} ({size(rung, axis)})": shown_rows(rung.result.every) for rung in below}

    @cached_property
    def chosen(self) -> Rows:
        """Chosen values of each arm's searched hyperparameters (`space.chosen_values`)."""
        return chosen_rows(self.result.chosen)

    @cached_property
    def sequential(self) -> Rows:
        """Looks of a sequential rule, one row per arm and look."""
        if self.study.rule == "fixed" and len(self.study.made) < 2:
            return []
        return [{"arm": row.label, **look} for row in self.result.every for look in row.path]

    @cached_property
    def fairness(self) -> Rows:
        """Trials, tokens and compute of each arm (`fairness.ledger`)."""
        return fairness.ledger(self.study)

    @cached_property
    def calibration(self) -> Rows:
        """Optimal learning rates of the arms (`calibration.optimum_rows`)."""
        return calibration.optimum_rows(self.study)

    @cached_property
    def equal_learning_rate(self) -> Rows:
        """Improvements at equal learning rate (`calibration.at_grid`)."""
        return calibration.at_grid(self.study)

    @cached_property
    def pairs(self) -> dict[str, curves.Pair]:
        """Paired loss curves, of which the next three tables are made (`curves.paired_curves`)."""
        return curves.paired_curves(self.study)

    @cached_property
    def over_training(self) -> dict[str, pd.DataFrame]:
        """Improvement at every evaluation, by arm (`curves.over_training`)."""
        return curves.over_training(self.study, self.pairs)

    @cached_property
    def slopes(self) -> Rows:
        """Slope of the improvement over training (`curves.slopes`)."""
        return curves.slopes(self.study, pairs=self.pairs)

    @cached_property
    def growth(self) -> Rows:
        """Slopes on both scales, with p adjusted for all arms (`growth.table`)."""
        return growth.table(self.study, self.pairs)

    @cached_property
    def search_budget(self) -> Rows:
        """Expected best loss by number of search trials (`budget.curves`)."""
        return budget.curves(self.study)

    @cached_property
    def importance(self) -> Rows:
        """Importance of the hyperparameters (`hyperparameters.importance`)."""
        return hyperparameters.importance(self.study)

    @cached_property
    def against_alpha(self) -> Rows:
        """Loss against the searched alpha (`hyperparameters.against_alpha`)."""
        return hyperparameters.against_alpha(self.study)

    @cached_property
    def alphas(self) -> Rows:
        """Learned alphas by layer (`alphas.summarise`)."""
        return alphas.summarise(self.study)

    @cached_property
    def layers(self) -> Rows:
        """Statistics of the kept models by layer (`layers.by_layer`); none before the study has ended."""
        return [] if self.result.unfinished else layers.by_layer(self.study)

    @cached_property
    def why(self) -> Rows:
        """The same by arm, with ratios to the baseline (`layers.by_arm`)."""
        return layers.by_arm(self.layers, self.study.baseline)

    @cached_property
    def samples(self) -> list[Sample]:
        """Texts that the kept models write (`samples.by_prompt`); none before the study has ended."""
        return [] if self.result.unfinished else by_prompt(self.study)

    @cached_property
    def cell_curves(self) -> list[Line]:
        """Curves of the best configurations, if there is no confirm stage (`cell_curves.lines`)."""
        return [] if self.study.confirms else lines(self.study)

    @property
    def tables(self) -> dict[str, tuple[Rows, formats.Columns]]:
        """Rows and columns of every table that has rows, by file name."""
        every: dict[str, tuple[Rows, formats.Columns]] = {
            "ladder": (self.ladder, ladder.columns(self.ladder)),
            "verdict": (self.verdict, formats.with_runs(self.verdict, formats.VERDICT_COLUMNS)),
            "chosen": (self.chosen, chosen_columns(self.chosen)),
            "fairness": (self.fairness, fairness.COLUMNS),
            "sequential": (self.sequential, PATH_COLUMNS),
            "calibration": (self.calibration, calibration.columns(self.calibration)),
            "equal_learning_rate": (self.equal_learning_rate, calibration.grid_columns(self.study)),
            "over_training": (self.slopes, curves.SLOPE_COLUMNS),
            "search_budget": (self.search_budget, budget.COLUMNS),
            "importance": (self.importance, hyperparameters.COLUMNS),
            "against_alpha": (self.against_alpha, hyperparameters.ALPHA_COLUMNS),
            "alphas": (self.alphas, alphas.columns(self.alphas)),
            "why": (self.why, layers.ARM_COLUMNS),
            "layers": (self.layers, layers.COLUMNS),
        }
        if self.study.facts:
            every["fairness"] = (self.fairness, formats.with_values(self.fairness, fairness.COLUMNS))
            shown = formats.of_table(self.verdict, self.study.unit) if self.verdict else {}
            every["verdict"] = (self.verdict, formats.with_training(self.verdict, shown))
        return {name: (rows, self.in_words(columns)) for name, (rows, columns) in every.items() if rows}

    def in_words(self, columns: formats.Columns) -> formats.Columns:
        """Return columns with the study's own words for the unit of the budget and of the metric in their headings."""
        return formats.with_words(columns, self.study.words)
