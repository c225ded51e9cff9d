"""Effect sizes: percent (ratio of means) with Fieller's interval, nats, and perplexity."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def improvement_percent(baseline: Sequence[float] | np.ndarray, arm: Sequence[float] | np.ndarray) -> float | None:
    """Return 100 * (1 - mean(arm) / mean(baseline)) in percent; positive means that the arm's loss is lower.

    It is the ratio of means, not the mean of ratios, so a seed with a small loss has no larger weight.
    Returns None if the baseline's mean is not above 0 or a value is not finite.
    """
    b, a = np.asarray(baseline, float), np.asarray(arm, float)
    if not len(b) or not len(a) or not (np.isfinite(b).all() and np.isfinite(a).all()) or b.mean() <= 0:
        return None
    return 100.0 * float(b.mean() - a.mean()) / float(b.mean())


def fieller(
    baseline: Sequence[float] | np.ndarray,
    arm: Sequence[float] | np.ndarray,
    level: float = 0.05,
    overlap: float = 0.0,
) -> tuple[float, float] | None:
    """Return Fieller's interval for the improvement in percent, from losses paired by position.

    It is the set of r for which a paired t test does not reject mean(arm) = (1 - r) * mean(baseline). It excludes 0
    exactly if the paired t test rejects. Source: Fieller, J. R. Stat. Soc. B 16 (1954) 175-185.

    Args:
        baseline: Losses of the baseline.
        arm: Losses of the arm, in the same order.
        level: 1 - confidence of the interval.
        overlap: As for `analysis.stats.paired_tests.widened`.

    Returns:
        The two bounds. None if they do not exist: n < 2, zero variance, or a baseline mean not clearly above zero.
    """
    b, a = np.asarray(baseline, float), np.asarray(arm, float)
    n = len(b)
    if n < 2 or not (np.isfinite(b).all() and np.isfinite(a).all()) or b.mean() <= 0:
        return None
    d = b - a  # solving for 1 - r through d avoids cancellation if mean(arm) is close to mean(baseline)
    if no_spread(b, a):
        return None
    q = stats.t.ppf(1 - level / 2, n - 1) ** 2 / n * (1 + n * overlap)
    return _fieller(b.mean(), d.mean(), q, np.cov(b, d, ddof=1))


def fieller_unpaired(baseline: np.ndarray, arm: np.ndarray, level: float, df: float) -> tuple[float, float] | None:
    """Return Fieller's interval for the improvement in percent, from two independent samples of losses.

    It excludes 0 exactly if Welch's test rejects.

    Args:
        baseline: At least 2 losses of the baseline.
        arm: At least 2 losses of the arm.
        level: 1 - confidence of the interval.
        df: Welch's degrees of freedom.

    Returns:
        The two bounds. None if the baseline's mean is not clearly above zero.
    """
    if baseline.mean() <= 0:
        return None
    of_b, of_a = baseline.var(ddof=1) / len(baseline), arm.var(ddof=1) / len(arm)
    q = float(stats.t.ppf(1 - level / 2, df)) ** 2
    covariance = np.array([[of_b, of_b], [of_b, of_b + of_a]])
    return _fieller(baseline.mean(), baseline.mean() - arm.mean(), q, covariance)


def _fieller(b: float, d: float, q: float, covariance: np.ndarray) -> tuple[float, float] | None:
    # b is the baseline's mean, d the mean difference; q scales their covariance
    (s_bb, s_bd), (_, s_dd) = covariance
    curvature = b**2 - q * s_bb
    if curvature <= 0:
        return None
    centre = b * d - q * s_bd
    constant = d**2 - q * s_dd
    half = math.sqrt(max(centre**2 - curvature * constant, 0.0))
    return float(100 * (centre - half) / curvature), float(100 * (centre + half) / curvature)


def clearly_positive(values: np.ndarray, level: float, overlap: float = 0.0) -> bool:
    """Check if the t interval of the mean lies above zero; a single value only has to be above zero itself.

    Otherwise a percentage of the mean has no bounds (`fieller`, which has the same arguments).
    """
    n, mean = len(values), float(np.mean(values)) if len(values) else 0.0
    if n < 2 or mean <= 0:
        return mean > 0
    return bool(mean**2 > stats.t.ppf(1 - level / 2, n - 1) ** 2 / n * (1 + n * overlap) * np.var(values, ddof=1))


def no_spread(baseline: np.ndarray, arm: np.ndarray) -> bool:
    """Check if the differences vary by float rounding only: sd <= 1e-12 * the largest loss."""
    d = np.asarray(baseline, float) - np.asarray(arm, float)
    largest = float(max(np.abs(baseline).max(), np.abs(arm).max()))
    return len(d) > 1 and float(d.std(ddof=1)) <= 1e-12 * largest


def constant(baseline: np.ndarray, arm: np.ndarray) -> bool:
    """Check if neither sample varies by more than float rounding: sd <= 1e-12 * the largest loss."""
    largest = float(max(np.abs(baseline).max(), np.abs(arm).max()))
    return float(max(baseline.std(ddof=1), arm.std(ddof=1))) <= 1e-12 * largest


def perplexity_reduction_percent(baseline_nll: float, arm_nll: float) -> float:
    """Return 100 * (1 - ppl(arm) / ppl(baseline)) with ppl = exp(nll in nats per token)."""
    return 100.0 * -math.expm1(arm_nll - baseline_nll)


def log_ratio_interval(
    baseline: Sequence[float] | np.ndarray, arm: Sequence[float] | np.ndarray, level: float = 0.05
) -> tuple[float, float]:
    """Return the t interval of x = mean(log baseline - log arm), as percent 100 * (1 - exp(-x)).

    Args:
        baseline: At least 2 losses above 0.
        arm: Losses of the arm, in the same order.
        level: 1 - confidence of the interval.
    """
    logs = np.log(np.asarray(baseline, float)) - np.log(np.asarray(arm, float))
    low, high = stats.ttest_1samp(logs, 0.0).confidence_interval(1 - level)
    return 100 * -math.expm1(-low), 100 * -math.expm1(-high)


def probability_of_improvement(
    baseline: Sequence[float] | np.ndarray, arm: Sequence[float] | np.ndarray
) -> float | None:
    """Return P(a run of the arm has a lower loss than a run of the baseline) over all cross pairs.

    A tie counts one half. +inf stands for a diverged run. Source: Agarwal et al. 2021, arXiv 2108.13264.
    """
    b, a = np.asarray(baseline, float), np.sort(np.asarray(arm, float))
    if not b.size or not a.size:
        return None
    # Counting in sorted order saves memory: a table of all pairs of 25,000 runs would take 5 GB.
    below, up_to = np.searchsorted(a, b, side="left"), np.searchsorted(a, b, side="right")
    return float((below.sum() + 0.5 * (up_to - below).sum()) / (b.size * a.size))
