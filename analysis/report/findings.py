"""Everything that one study's tables say: each is computed once, when it is first asked for."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.describe import alphas, budget, calibration, curves, fairness, growth, hyperparameters
from analysis.io import formats
from analysis.io.study import Study
from analysis.report.cell_curves import Line, lines
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Result, as_rows

Rows = list[dict[str, Any]]
PATH_COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "n": ("seeds", "d"),
    "pairs": ("pairs", "d"),
    "t": ("t", "+.2f"),
    "p": ("p at this look", ".3g"),
    "e": ("e", ".3g"),
    "stops_at": ("stops one arm at p", ".3g"),
    "p_anytime": ("p over all looks", ".3g"),
}


@dataclass(frozen=True, eq=False)
class Findings:
    """The verdict of a study and the tables beside it, for its figures, pages and files."""

    study: Study

    @cached_property
    def result(self) -> Result:
        """The verdict."""
        return decide(self.study)

    @cached_property
    def verdict(self) -> Rows:
        """The comparisons as rows."""
        return as_rows(self.result.comparisons)

    @cached_property
    def sequential(self) -> Rows:
        """A row for each arm and look of a sequential rule."""
        return [{"arm": row.arm, **look} for row in self.result.comparisons for look in row.path]

    @cached_property
    def fairness(self) -> Rows:
        """`fairness.ledger`: what each arm was given."""
        return fairness.ledger(self.study)

    @cached_property
    def calibration(self) -> Rows:
        """`calibration.optimum_rows`: the learning-rate grid."""
        return calibration.optimum_rows(self.study)

    @cached_property
    def equal_learning_rate(self) -> Rows:
        """`calibration.at_grid`: the arms at equal learning rate."""
        return calibration.at_grid(self.study)

    @cached_property
    def pairs(self) -> dict[str, curves.Pair]:
        """`curves.paired_curves`: the curves that the next three tables are made of."""
        return curves.paired_curves(self.study)

    @cached_property
    def over_training(self) -> dict[str, pd.DataFrame]:
        """`curves.over_training`: the improvement at every evaluation."""
        return curves.over_training(self.study, self.pairs)

    @cached_property
    def slopes(self) -> Rows:
        """`curves.slopes`: the slope of the improvement over training."""
        return curves.slopes(self.study, pairs=self.pairs)

    @cached_property
    def growth(self) -> Rows:
        """`growth.table`: the slopes on both scales, adjusted for all arms."""
        return growth.table(self.study, self.pairs)

    @cached_property
    def search_budget(self) -> Rows:
        """`budget.curves`: the expected best of so many search trials."""
        return budget.curves(self.study)

    @cached_property
    def importance(self) -> Rows:
        """`hyperparameters.importance`."""
        return hyperparameters.importance(self.study)

    @cached_property
    def against_alpha(self) -> Rows:
        """`hyperparameters.against_alpha`: the loss against the searched alpha."""
        return hyperparameters.against_alpha(self.study)

    @cached_property
    def alphas(self) -> Rows:
        """`alphas.summarise`: the learned alphas by layer."""
        return alphas.summarise(self.study)

    @cached_property
    def cell_curves(self) -> list[Line]:
        """`cell_curves.lines`: the best configurations of a study without a confirm stage."""
        return [] if self.study.confirms else lines(self.study)

    @property
    def tables(self) -> dict[str, tuple[Rows, formats.Columns]]:
        """File name -> rows and columns of every table that has rows."""
        every: dict[str, tuple[Rows, formats.Columns]] = {
            "verdict": (self.verdict, formats.VERDICT_COLUMNS),
            "fairness": (self.fairness, fairness.COLUMNS),
            "sequential": (self.sequential, PATH_COLUMNS),
            "calibration": (self.calibration, calibration.COLUMNS),
            "equal_learning_rate": (self.equal_learning_rate, calibration.GRID_COLUMNS),
            "over_training": (self.slopes, curves.SLOPE_COLUMNS),
            "search_budget": (self.search_budget, budget.COLUMNS),
            "importance": (self.importance, hyperparameters.COLUMNS),
            "against_alpha": (self.against_alpha, hyperparameters.ALPHA_COLUMNS),
            "alphas": (self.alphas, alphas.columns(self.alphas)),
        }
        return {name: table for name, table in every.items() if table[0]}
