"""Tests of two independent samples of runs: Welch's t, its equivalence test, and the rank test with diverged runs."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.stats.estimates import constant

DRAWS = 100_000  # permutations of the rank test if there are too many to try all


@dataclass(frozen=True)
class Welch:
    """Welch's test of mean(baseline) - mean(arm) = 0, with the interval of the difference."""

    difference: float
    error: float
    t: float
    df: float
    p: float
    low: float
    high: float


def welch(baseline: np.ndarray, arm: np.ndarray, level: float) -> Welch:
    """Test two samples with unequal variances. Source: Welch, Biometrika 34 (1947) 28-35.

    Args:
        baseline: At least 2 finite losses of the baseline.
        arm: At least 2 finite losses of the arm.
        level: 1 - confidence of the interval.

    Raises:
        ValueError: If a sample has fewer than 2 values, or neither has any spread.
    """
    if min(len(baseline), len(arm)) < 2:
        raise ValueError(f"{len(baseline)} and {len(arm)} runs, at least 2 each needed")
    if constant(baseline, arm):
        raise ValueError("zero variance: all runs of an arm are equal; no t test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of one constant sample, which Welch's test allows
        found = stats.ttest_ind(baseline, arm, equal_var=False)
    interval = found.confidence_interval(1 - level)
    return Welch(
        difference=float(baseline.mean() - arm.mean()),
        error=math.sqrt(baseline.var(ddof=1) / len(baseline) + arm.var(ddof=1) / len(arm)),
        t=float(found.statistic),
        df=float(found.df),
        p=float(found.pvalue),
        low=float(interval.low),
        high=float(interval.high),
    )


def tost(found: Welch, margin: float) -> float:
    """Return p of the test that |difference| < margin: the larger one of two one-sided tests."""
    lower = stats.t.sf((found.difference + margin) / found.error, found.df)
    upper = stats.t.cdf((found.difference - margin) / found.error, found.df)
    return float(max(lower, upper))


def tost_excludes(found: Welch, level: float) -> float:
    """Return the smallest margin at which `tost` concludes at this level."""
    return float(abs(found.difference) + stats.t.ppf(1 - level, found.df) * found.error)


def rank_sum(baseline: np.ndarray, arm: np.ndarray, seed: int = 0) -> float:
    """Return p of the Mann-Whitney test, with +inf for diverged runs, by permutation and therefore valid with ties."""
    ranks = stats.rankdata(np.concatenate([baseline, arm]))
    of_b, of_a = ranks[: len(baseline)], ranks[len(baseline) :]
    found = stats.permutation_test(
        (of_b, of_a),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        vectorized=True,
        n_resamples=DRAWS,
        batch=1000,
        random_state=np.random.default_rng(seed),
    )
    return float(found.pvalue)
