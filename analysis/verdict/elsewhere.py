"""Compute intervals in the unit of a table from elsewhere, and the tests of runs that are not pairs."""

import numpy as np
import pandas as pd
from scipy import stats

from analysis.io.assemble import Study, TableFacts
from analysis.stats import estimates, paired_tests, unpaired_tests
from analysis.stats.pairs import Pairs
from analysis.verdict.comparison import bounds, percent
from analysis.verdict.kinds import Comparison, OfTable, Refusal, Verdict

RELATED = 0.05  # level at which the correlation of shared seeds counts as above zero


def describe(row: Comparison, pairs: Pairs, losses: pd.DataFrame, study: Study) -> Comparison:
    """Return the comparison with `of_table`; of runs that are not pairs, a new one with the unpaired numbers.

    Args:
        row: The comparison with its paired numbers.
        pairs: Losses of the seeds that both have.
        losses: All losses, seeds down and arms across.
        study: The study, which says if runs are pairs.
    """
    table, more = study.table or TableFacts(), OfTable()
    for seeds, arm in ((more.not_made_seeds_baseline, row.baseline), (more.not_made_seeds_arm, row.arm)):
        seeds += table.not_made.get(arm, [])
    b, a = (losses[arm].dropna() for arm in (row.baseline, row.arm))
    if study.unpaired:
        if table.has_seeds:
            more.p_paired, more.n_paired = row.p_deciding, row.n
        return _unpaired(row, b, a, study, more)
    if row.p_t is not None:
        more.difference_low, more.difference_high = paired_tests.mean_interval(
            pairs.differences[pairs.complete], study.level, study.overlap
        )
    more.n_baseline = more.n_arm = row.complete_pairs
    dropped = (row.dropped_seeds_baseline or row.dropped_seeds_arm) and not study.overlap
    if dropped and row.pairing_gain is not None and not _related(pairs) and np.isfinite([*b, *a]).all():
        more.p_welch = unpaired_tests.welch(b.to_numpy(), a.to_numpy(), study.level).p
    row.of_table = more
    return row


def _related(pairs: Pairs) -> bool:
    # pairing gains only if runs of one seed resemble each other
    if len(pairs.seeds) < 3 or estimates.constant(pairs.baseline, pairs.baseline):
        return False
    if estimates.constant(pairs.arm, pairs.arm):
        return False
    return bool(stats.pearsonr(pairs.baseline, pairs.arm, alternative="greater").pvalue <= RELATED)


def _unpaired(paired: Comparison, all_b: pd.Series, all_a: pd.Series, study: Study, more: OfTable) -> Comparison:
    whole_b, whole_a = all_b.to_numpy(float), all_a.to_numpy(float)
    b, a = whole_b[np.isfinite(whole_b)], whole_a[np.isfinite(whole_a)]
    more.test, more.n_baseline, more.n_arm = "Welch's t", len(b), len(a)
    row = Comparison(
        arm=paired.arm,
        baseline=paired.baseline,
        contrast=paired.contrast,
        n=len(whole_b) + len(whole_a),
        complete_pairs=paired.complete_pairs,
        diverged_seeds_baseline=[int(s) for s in all_b.index[~np.isfinite(whole_b)]],
        diverged_seeds_arm=[int(s) for s in all_a.index[~np.isfinite(whole_a)]],
        baseline_mean=study.sign * float(b.mean()) if len(b) else None,
        arm_mean=study.sign * float(a.mean()) if len(a) else None,
        improvement_percent=percent(b, a, study.level, study.sign),
        mean_difference=float(b.mean() - a.mean()) if len(b) and len(a) else None,
        probability_of_improvement=estimates.probability_of_improvement(whole_b, whole_a),
        pairing_gain=paired.pairing_gain,
        margin=paired.margin,
        of_table=more,
    )
    if refusal := _refusal(whole_b, whole_a, b, a):
        row.kind, row.refusal = Verdict.NOT_TESTABLE, refusal
        return row
    if len(b) < len(whole_b) or len(a) < len(whole_a):
        row.p_deciding = row.p_worst_rank = unpaired_tests.rank_sum(whole_b, whole_a)
        more.test = "rank sum"
    if min(len(b), len(a)) < 2 or estimates.constant(b, a):
        return row
    found = unpaired_tests.welch(b, a, study.level)
    row.t, row.df, row.p_t, row.standard_error = found.t, found.df, found.p, found.error
    more.difference_low, more.difference_high = found.low, found.high
    interval = estimates.fieller_unpaired(study.sign * b, study.sign * a, study.level, found.df)
    row.improvement_low, row.improvement_high = bounds(interval, study.sign)
    row.sd_difference = float(np.sqrt(b.var(ddof=1) + a.var(ddof=1)))  # of two runs with different seeds
    row.d_z = found.difference / row.sd_difference
    row.p_tost = unpaired_tests.tost(found, row.margin) if row.margin else None
    row.tost_excludes = unpaired_tests.tost_excludes(found, study.level)
    if row.improvement_percent is not None:
        row.tost_excludes_percent = 100 * row.tost_excludes / (study.sign * float(b.mean()))
    if row.p_deciding is None:
        row.p_deciding = row.p_t
    return row


def _refusal(whole_b: np.ndarray, whole_a: np.ndarray, b: np.ndarray, a: np.ndarray) -> Refusal | None:
    if not len(whole_b) or not len(whole_a):
        return Refusal.NO_TREATMENT_RUNS if len(whole_b) else Refusal.NO_BASELINE_RUNS
    if min(len(whole_b), len(whole_a)) == 1:
        return Refusal.ONE_SEED
    if not len(b) and not len(a):
        return Refusal.ALL_DIVERGED
    all_ended = len(b) == len(whole_b) and len(a) == len(whole_a)
    return Refusal.ZERO_VARIANCE if all_ended and estimates.constant(b, a) else None
