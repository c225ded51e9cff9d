"""The trend of an improvement over sizes, and what a lower loss is worth in training compute."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """Improvement on one rung: its value and standard error in percent, and the degrees of freedom of the error."""

    value: float
    error: float
    df: float


@dataclass(frozen=True)
class Slope:
    """Slope of the improvement, in percentage points per unit of x, with its t interval and two-sided p."""

    value: float
    error: float
    df: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Factor:
    """Factor of the baseline's training compute that gives an arm's loss, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Neighbours:
    """Baseline's losses on the rungs below and above, and their log compute. None: that end is the rung itself."""

    log_compute: tuple[float, float]
    below: np.ndarray | None
    above: np.ndarray | None


def improvement(baseline: np.ndarray, arm: np.ndarray, paired: bool = True, stopped: bool = False) -> Mean:
    """Return 100 * (1 - mean(arm) / mean(baseline)) in percent with the error of a ratio of means (delta method).

    Args:
        baseline: At least 2 finite losses, with a mean above 0.
        arm: Losses of the arm, at least 2; of the same seeds in the same order if `paired`.
        paired: False for independent runs.
        stopped: True if a look before the last one ended the pairs; see `widened`.
    """
    b, a = np.asarray(baseline, float), np.asarray(arm, float)
    ratio = a.mean() / b.mean()
    of_a, of_b = (a - a.mean()) / b.mean(), ratio * (b - b.mean()) / b.mean()
    if paired:
        error, df = _of_mean(of_a - of_b) * (widened(len(b)) if stopped else 1.0), len(b) - 1.0
    else:
        error, df = _together([(_of_mean(of_a), len(a) - 1.0), (_of_mean(of_b), len(b) - 1.0)])
    return Mean(100 * float(b.mean() - a.mean()) / float(b.mean()), 100 * error, df)


def widened(n: int) -> float:
    """Return the factor of the standard error of n pairs that a look ended: sqrt((n - 1) / (n - 2)).

    A look ends an arm more often if the spread of its pairs happens to be small. The factor makes up for it, as
    benchmarks/ladder_trend.py shows; it counts the stop as one estimated parameter more.
    """
    return math.sqrt((n - 1) / max(n - 2, 0.5))


def slope(x: Sequence[float], rungs: Sequence[Mean], level: float) -> Slope | None:
    """Return the least-squares slope of the improvements on x with equal weights.

    It is a fixed linear combination of the rungs' improvements, so its estimand is defined for any true law. Rungs have
    independent seeds. Hence its variance is the weighted sum of theirs. The degrees of freedom are those of
    Welch (1938) and Satterthwaite (1946).

    Args:
        x: Position of each rung, such as log2 of its compute.
        rungs: Improvement on each rung.
        level: 1 - confidence of the interval.

    Returns:
        The slope. None if there are fewer than 3 rungs, if all x are equal, or if no rung has any spread.
    """
    at = np.asarray(x, float) - float(np.mean(x))
    if len(rungs) < 3 or not (at**2).sum() > 0:
        return None
    weights = at / (at**2).sum()
    value = float(weights @ [rung.value for rung in rungs])
    error, df = _together([(abs(w) * rung.error, rung.df) for w, rung in zip(weights, rungs, strict=True)])
    if not error > 0:
        return None
    half = float(stats.t.isf(level / 2, df)) * error
    return Slope(value, error, df, value - half, value + half, 2 * float(stats.t.sf(abs(value) / error, df)))


def compute_factor(
    baseline: np.ndarray, arm: np.ndarray, near: Neighbours, level: float, stopped: bool = False
) -> Factor | None:
    """Return the factor by which the baseline's training compute would have to grow to reach the arm's loss.

    Its logarithm is log(mean(arm) / mean(baseline)) divided by the slope of the baseline's log loss on its log compute
    between the neighbouring rungs. The interval is Fieller's of that ratio, so it includes the error of the slope.

    Args:
        baseline: At least 2 finite losses above 0.
        arm: Losses of the arm, of the same seeds in the same order.
        near: The baseline's neighbouring rungs.
        level: 1 - confidence of the interval.
        stopped: As for `improvement`.

    Returns:
        The factor. None if the baseline's loss does not clearly fall between the neighbours, or if nothing varies.
    """
    width = near.log_compute[1] - near.log_compute[0]
    if not width > 0:
        return None
    b = baseline / baseline.mean()
    gap = arm / arm.mean() - b  # each seed's part of the log of the ratio of the means
    ends = [(-1 / width, baseline if near.below is None else near.below)]
    ends.append((1 / width, baseline if near.above is None else near.above))
    log_gap, fall = math.log(arm.mean() / baseline.mean()), sum(w * math.log(loss.mean()) for w, loss in ends)
    own = 1 / width if near.above is None else -1 / width if near.below is None else 0.0
    others = [(w, loss) for w, loss in ends if loss is not baseline]
    if not fall < 0:
        return None
    value = log_gap / fall
    wider = widened(len(b)) if stopped else 1.0
    parts = [(wider * _of_mean(gap - value * own * b), len(b) - 1.0)]
    parts += [(abs(value * w) * _of_mean(loss / loss.mean()), len(loss) - 1.0) for w, loss in others]
    error, df = _together(parts)
    if not error > 0:
        return None
    q = float(stats.t.isf(level / 2, df)) ** 2
    of_gap, of_own = (wider * _of_mean(gap)) ** 2, (own * wider * _of_mean(b)) ** 2
    both = wider**2 * own * float(np.cov(gap, b, ddof=1)[0, 1]) / len(b)
    of_fall = of_own + sum((w * _of_mean(loss / loss.mean())) ** 2 for w, loss in others)
    curvature, centre, constant = fall**2 - q * of_fall, log_gap * fall - q * both, log_gap**2 - q * of_gap
    if not curvature > 0:
        return None
    half = math.sqrt(max(centre**2 - curvature * constant, 0.0))
    logs = [value, (centre - half) / curvature, (centre + half) / curvature]
    return Factor(*map(math.exp, logs)) if max(map(abs, logs)) < MOST_LOG else None


def budget_factor(
    baseline: np.ndarray,
    arm: np.ndarray,
    short: np.ndarray,
    share: float,
    level: float,
    overlap: float = 0.0,
    logs: bool = True,
) -> Factor | None:
    """Return the factor by which the baseline's training would have to grow to reach the arm's loss.

    The loss, or with `logs` its logarithm, is taken as linear in the logarithm of the training. The baseline's loss at
    a shorter budget has the same seeds, so that all errors are of paired values. The interval is Fieller's.

    Args:
        baseline: At least 2 finite losses; with `logs`, of a mean above 0.
        arm: Losses of the arm, of the same seeds in the same order.
        short: Losses of the baseline with a share of its training, likewise.
        share: That share, in (0, 1).
        level: 1 - confidence of the interval.
        overlap: As for `analysis.stats.paired_tests.widened`.
        logs: False for losses that may lie below zero, such as a metric of which a higher value is better.

    Returns:
        The factor. None if the baseline's loss does not clearly fall with its training, or if nothing varies.
    """
    n, width = len(baseline), -math.log(share)
    b, a, s = (loss / loss.mean() if logs else loss for loss in (baseline, arm, short))
    gap, slope = a - b, (b - s) / width
    to_arm, to_short = float(gap.mean()), float(slope.mean())
    if logs:
        to_arm = math.log(arm.mean() / baseline.mean())
        to_short = math.log(baseline.mean() / short.mean()) / width
    (of_gap, both), (_, of_slope) = np.cov(gap, slope, ddof=1) / n * (1 + n * overlap)
    q = float(stats.t.isf(level / 2, n - 1)) ** 2
    curvature, centre, constant = to_short**2 - q * of_slope, to_arm * to_short - q * both, to_arm**2 - q * of_gap
    if not (to_short < 0 and curvature > 0 and of_gap > 0):
        return None
    half = math.sqrt(max(centre**2 - curvature * constant, 0.0))
    found = [to_arm / to_short, (centre - half) / curvature, (centre + half) / curvature]
    return Factor(*map(math.exp, found)) if max(map(abs, found)) < MOST_LOG else None


MOST_LOG = 100.0  # logarithm of a factor beyond which it has no meaning


def _of_mean(values: np.ndarray) -> float:
    # standard error of a mean
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _together(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    # error and degrees of freedom of a sum of independent parts, each with its own
    squares = [(error**2, df) for error, df in parts if error > 0]
    total = math.fsum(square for square, _ in squares)
    if not total > 0:
        return 0.0, float(parts[0][1])
    return math.sqrt(total), total**2 / math.fsum(square**2 / df for square, df in squares)
