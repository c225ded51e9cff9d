"""Compute the numbers of one arm against the baseline, or the reason why it cannot be tested."""

import math

import numpy as np

from analysis.stats import estimates, paired_tests
from analysis.stats.pairs import Pairs
from analysis.verdict.kinds import Comparison, Refusal, Verdict


def measure(arm: str, baseline: str, pairs: Pairs, level: float, margin: float | None, sign: int = 1) -> Comparison:
    """Compute the numbers of one comparison; its kind is identical or not testable if no test can be made.

    `p_deciding` is the p of the paired t test if no run diverged. Otherwise it is the p of the worst-rank test over
    all pairs (intention to treat), and the mean-based numbers are those of the complete pairs.

    Args:
        arm: Name of the arm.
        baseline: Name of the baseline.
        pairs: Their losses by seed, in nats.
        level: Level of the tests, in (0, 1).
        margin: Margin of the equivalence test, in nats; None for no such test.
        sign: -1 if the losses are values of which a higher one is better, with their sign changed; else 1.
    """
    d, keep = pairs.differences, pairs.complete
    b, a = pairs.baseline[keep], pairs.arm[keep]
    row = Comparison(
        arm=arm,
        baseline=baseline,
        n=len(pairs.seeds),
        complete_pairs=int(keep.sum()),
        seeds=pairs.seeds,
        differences=[float(x) if np.isfinite(x) else None for x in np.where(keep, d, np.nan)],
        dropped_seeds_baseline=pairs.dropped_baseline,
        dropped_seeds_arm=pairs.dropped_arm,
        diverged_seeds_baseline=pairs.diverged_baseline,
        diverged_seeds_arm=pairs.diverged_arm,
        baseline_mean=sign * float(b.mean()) if len(b) else None,
        arm_mean=sign * float(a.mean()) if len(a) else None,
        improvement_percent=percent(b, a, level, sign, pairs.overlap),
        mean_difference=float((b - a).mean()) if len(b) else None,
        probability_of_improvement=estimates.probability_of_improvement(pairs.baseline, pairs.arm),
        margin=margin or 0.0,
    )
    if len(d) > 1 and keep.all() and not np.any(d):
        row.kind, row.p_sign_flip, row.d_z = Verdict.IDENTICAL, 1.0, 0.0
    elif refusal := _refusal(pairs, d, b, a):
        row.kind, row.refusal = Verdict.NOT_TESTABLE, refusal
    if row.refused:
        return row
    if not keep.all():
        row.p_deciding = row.p_worst_rank = paired_tests.worst_rank(d)
        row.p_sign_test = paired_tests.sign_test(d)
    if len(b) > 1 and not estimates.no_spread(b, a):
        _mean_based(row, b, a, level, sign, pairs.overlap)
        if keep.all():
            row.p_deciding = row.p_t
    return row


def _refusal(pairs: Pairs, d: np.ndarray, b: np.ndarray, a: np.ndarray) -> Refusal | None:
    if not pairs.seeds:
        if pairs.dropped_arm:
            return Refusal.NO_COMMON_SEED if pairs.dropped_baseline else Refusal.NO_BASELINE_RUNS
        return Refusal.NO_TREATMENT_RUNS
    if len(pairs.seeds) == 1:
        return Refusal.ONE_SEED
    if not pairs.complete.any() and not np.any(d):
        return Refusal.ALL_DIVERGED
    if pairs.overlap and not pairs.complete.all():
        return Refusal.DIVERGED_SPLIT
    return Refusal.ZERO_VARIANCE if pairs.complete.all() and estimates.no_spread(b, a) else None


def percent(b: np.ndarray, a: np.ndarray, level: float, sign: int, overlap: float = 0.0) -> float | None:
    """Return the improvement of losses in percent; None if the baseline's mean is not clearly above zero.

    Args:
        b: Losses of the baseline.
        a: Losses of the arm.
        level: Level of the test that the baseline's mean is above zero.
        sign: As for `measure`.
        overlap: As for `Pairs`.
    """
    if not estimates.clearly_positive(sign * b, level, overlap):
        return None
    value = estimates.improvement_percent(sign * b, sign * a)
    return None if value is None else sign * value


def bounds(interval: tuple[float, float] | None, sign: int) -> tuple[float | None, float | None]:
    """Return an interval in percent of the metric as one of the improvement; two times None if there is none."""
    if interval is None:
        return None, None
    return interval if sign > 0 else (-interval[1], -interval[0])


def _mean_based(row: Comparison, b: np.ndarray, a: np.ndarray, level: float, sign: int, overlap: float) -> None:
    d, n = b - a, len(b)
    sd = float(d.std(ddof=1))
    row.t, row.df, row.p_t = paired_tests.paired_t(d, overlap)
    # without all pairs, a sign flip of means is no intention-to-treat test; the signs of splits are not independent
    if row.p_worst_rank is None and not overlap:
        row.p_sign_flip, row.p_sign_flip_error = paired_tests.sign_flip(d)
    row.improvement_low, row.improvement_high = bounds(estimates.fieller(sign * b, sign * a, level, overlap), sign)
    row.d_z = float(d.mean()) / sd
    row.sd_difference, row.standard_error = sd, sd / math.sqrt(n) * paired_tests.widened(n, overlap)
    # gain of shared seeds: sd of the difference of unpaired runs divided by that of paired runs
    row.pairing_gain = float(np.sqrt(b.var(ddof=1) + a.var(ddof=1))) / sd
    row.p_tost = paired_tests.tost(d, row.margin, overlap)[0] if row.margin else None
    row.tost_excludes = paired_tests.tost_excludes(d, level, overlap)
    if row.improvement_percent is not None:
        row.tost_excludes_percent = 100 * row.tost_excludes / (sign * float(b.mean()))
