"""Correct the comparisons of a family for their number: p, equivalence, power, and intervals after selection."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.io.assemble import Study
from analysis.stats import estimates, multiplicity, power, sequential
from analysis.stats.pairs import Pairs
from analysis.verdict import looks
from analysis.verdict.comparison import bounds
from analysis.verdict.kinds import PAIRED, Comparison


@dataclass
class Part:
    """One study, or one task of a table, with its comparisons on the way to a result."""

    study: Study
    losses: pd.DataFrame
    paired: dict[tuple[str, str], Pairs]  # by reference and arm
    margin: float | None
    rows: list[Comparison]


def correct(rows: Sequence[Comparison], study: Study) -> None:
    """Adjust p and the p of TOST for all rows, and set levels, power and smallest visible effect of each row.

    A comparison that cannot be tested enters with p = 1. The smallest effect and the power belong to the first step of
    the correction, at which an arm is found whatever the others show.
    """
    p = [1.0 if row.p_deciding is None else row.p_deciding for row in rows]
    tost = [1.0 if row.p_no_difference is None else row.p_no_difference for row in rows]
    first = multiplicity.first_level(len(rows), study.correction, study.level)
    decided = multiplicity.decision_levels(p, study.correction, study.level)
    equivalent = multiplicity.decision_levels(tost, study.correction, study.level)
    adjusted, both = (multiplicity.adjust(each, study.correction) for each in (p, tost))
    for i, row in enumerate(rows):
        row.p_adjusted = None if row.p_deciding is None else adjusted[i]
        row.p_tost_adjusted = None if row.p_no_difference is None else both[i]
        row.level_of_first_step, row.level_of_decision, row.level_of_equivalence = first, decided[i], equivalent[i]
        if row.t is None or row.df is None or row.standard_error is None:
            continue
        level = level_at_look(row, study, first) or first
        row.power_at_effect_seen = power.power_of_t(row.t, row.df, level)
        if row.improvement_percent is not None and row.baseline_mean is not None:
            visible = power.detectable_shift(row.df, level) * row.standard_error
            row.mde_percent = 100 * visible / row.baseline_mean


def after_selection(row: Comparison, part: Part, size: int) -> None:
    """Set the interval of an arm that was declared different, and how much too large such effects look on average.

    The intervals at `level / size` hold for all comparisons of the family together. So those that are looked at because
    their arm was declared different err together in at most `level` of studies. One comparison alone has its own only.

    Args:
        row: The comparison.
        part: Its study.
        size: Number of comparisons in the family.
    """
    if row.t is None or row.df is None or row.standard_error is None or row.p_worst_rank is not None:
        return
    study = part.study
    if row.t and len(row.path) <= (study.rule == "fixed"):  # several looks choose the size that is seen once more
        row.exaggeration = power.exaggeration(row.t, row.df, level_at_look(row, study, row.level_of_first_step))
    if size < 2 or looks.level_lost(study):  # without a level, nothing holds for all comparisons together
        return
    row.selected_level = study.level / size
    level = level_at_look(row, study, row.selected_level)
    if not level > 0:
        return
    row.selected_low, row.selected_high = improvement_interval(row, part, level)
    if row.of_table and row.of_table.difference_low is not None:
        low, high = difference_interval(row, level)
        row.of_table.difference_selected_low, row.of_table.difference_selected_high = low, high


def level_at_look(row: Comparison, study: Study, level: float) -> float:
    """Return the level of the t test at a row's last look, if `level` is kept over all looks; 0 if none stops there."""
    if not row.path:
        return level
    return sequential.nominal(study.rule, study.made, row.path[-1]["n"], level, study.reserve)


def _equivalence_at_look(row: Comparison, study: Study, level: float) -> float:
    # the level of a two-sided interval whose ends are the bounds of the two one-sided tests at the last look
    one_sided = 1 if study.rule == "e-process" else 2  # an e-value has no side, see `sequential.path`
    return level_at_look(row, study, one_sided * level)


def difference_interval(row: Comparison, level: float) -> tuple[float, float]:
    """Return the t interval of a tested row's mean difference at 1 - `level`, in the metric's unit."""
    assert row.mean_difference is not None
    assert row.standard_error is not None
    half = float(stats.t.isf(level / 2, row.df)) * row.standard_error
    return row.mean_difference - half, row.mean_difference + half


Interval = tuple[float, float] | None


def decision_bars(row: Comparison, study: Study) -> tuple[Interval, Interval]:
    """Return the interval that decides if an arm differs, and the one that decides if it is equivalent.

    They are t intervals of the mean difference in the metric's unit. The first excludes 0 exactly if the adjusted p is
    at or below the level. The second lies between -margin and margin exactly if the adjusted p of TOST is. Either is
    None if another test decides (diverged runs), or if there is no test.
    """
    if row.p_t is None or row.p_worst_rank is not None:
        return None, None
    level = level_at_look(row, study, row.level_of_decision)
    same = _equivalence_at_look(row, study, row.level_of_equivalence)
    differs, equivalent = (difference_interval(row, each) if each > 0 else None for each in (level, same))
    return differs, equivalent


def improvement_interval(row: Comparison, part: Part, level: float) -> tuple[float | None, float | None]:
    """Return Fieller's interval of a tested row's improvement in percent at 1 - `level`; None twice if it has none."""
    sign = part.study.sign
    if row.of_table and row.of_table.test != PAIRED:
        b, a = (values[np.isfinite(values)] for values in (part.losses[arm] for arm in (row.baseline, row.arm)))
        interval = estimates.fieller_unpaired(sign * b.to_numpy(), sign * a.to_numpy(), level, row.df or 1.0)
    else:
        pairs = part.paired[row.baseline, row.arm]
        b, a = pairs.baseline[pairs.complete], pairs.arm[pairs.complete]
        interval = estimates.fieller(sign * b, sign * a, level, pairs.overlap)
    return bounds(interval, sign)
