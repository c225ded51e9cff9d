"""Tests of paired differences d = baseline - arm; a positive d means that the arm's loss is lower.

The tests are two-sided unless stated otherwise. Each function raises ValueError for an input to which its library
would give a confident but wrong answer: scipy's `permutation_test` gives p = 0.0 for a NaN, and its t test gives
p = 2e-30 for constant differences.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray
EXACT_UP_TO = 20  # 2^20 sign patterns take one second and 8 MB
DRAWS = 200_000  # random sign patterns for more differences
SIGNS = 250_000_000  # upper bound on random signs; reduces the number of patterns, but never below 10,000


def _finite(d: Values, at_least: int = 1) -> np.ndarray:
    x = np.asarray(d, float)
    if len(x) < at_least:
        raise ValueError(f"{len(x)} differences, at least {at_least} needed")
    if not np.isfinite(x).all():
        raise ValueError(f"differences must be finite, got {x[~np.isfinite(x)][0]} (worst_rank takes diverged runs)")
    return x


def widened(n: int, overlap: float) -> float:
    """Return the factor of the standard error sd / sqrt(n) of a mean over splits of one data set; 1 without overlap.

    Splits share data, so that their results are correlated. The variance of the mean is then (1/n + overlap) sd^2.
    Source: Nadeau and Bengio, Mach. Learn. 52 (2003) 239-281.

    Args:
        n: Number of splits.
        overlap: Size of the test set of a split, divided by that of its training set.
    """
    return math.sqrt(1 + n * overlap)


def paired_t(d: Values, overlap: float = 0.0) -> tuple[float, int, float]:
    """Test that the mean of d is 0: t = mean(d) / (sd(d) / sqrt(n)) with n - 1 degrees of freedom.

    Args:
        d: At least 2 finite differences that are not all equal.
        overlap: As for `widened`.

    Returns:
        t, the degrees of freedom, and p.

    Raises:
        ValueError: If n < 2, a difference is not finite, or all differences are equal.
    """
    x = _finite(d, 2)
    if x.std(ddof=1) <= 1e-14 * np.abs(x).max():
        raise ValueError(f"zero variance: all {len(x)} differences equal {x[0]:g}; no t test")
    result = stats.ttest_1samp(x, 0.0)
    t, p = float(result.statistic) / widened(len(x), overlap), float(result.pvalue)
    return t, len(x) - 1, 2 * float(stats.t.sf(abs(t), len(x) - 1)) if overlap else p


def mean_interval(values: Values, level: float, overlap: float = 0.0) -> tuple[float, float]:
    """Return the t interval of the mean of at least 2 finite values.

    Args:
        values: The values.
        level: 1 - confidence of the interval.
        overlap: As for `widened`.
    """
    x = _finite(values, 2)
    interval = stats.ttest_1samp(x, 0.0).confidence_interval(1 - level)
    if not overlap:
        return float(interval.low), float(interval.high)
    half = float(interval.high - x.mean()) * widened(len(x), overlap)
    return float(x.mean()) - half, float(x.mean()) + half


def one_sample_t(values: Values, target: float, alternative: str = "two-sided") -> float:
    """Return p of the t test that the mean of `values` is `target`.

    Args:
        values: At least 2 finite values that are not all equal.
        target: Mean under the null hypothesis.
        alternative: "two-sided", "less" (the true mean is below the target) or "greater".
    """
    x = _finite(values, 2)
    if x.std(ddof=1) <= 1e-14 * np.abs(x).max():
        raise ValueError(f"zero variance: all {len(x)} values equal {x[0]:g}; no t test")
    return float(stats.ttest_1samp(x, target, alternative=alternative).pvalue)


def sign_flip(d: Values, seed: int = 0) -> tuple[float, float]:
    """Return p of the sign-flip permutation test on the mean, and the standard error of p.

    Under the null hypothesis each difference is as likely to be negative as positive. p is the share of the 2^n sign
    patterns whose |sum| is at least the observed one. Up to n = 20 all patterns are used, and the standard error is 0.
    Beyond that p = (hits + 1) / (draws + 1) over random patterns. The smallest p that n pairs can reach is 2 / 2^n.
    Source: Phipson and Smyth 2010, arXiv 1603.05766.
    """
    x = np.abs(_finite(d))
    seen = abs(math.fsum(_finite(d)))
    seen -= 1e-12 * x.sum()  # sums that are equal up to rounding must count as equal
    if len(x) <= EXACT_UP_TO:
        sums = x[:1].copy()  # the first sign is fixed, because patterns come in mirrored pairs
        for value in x[1:]:
            sums = np.concatenate((sums + value, sums - value))
        return float(np.mean(np.abs(sums) >= seen)), 0.0
    # One random byte holds eight signs. Looking up its 256 sums is 20 times faster than multiplying by signs.
    eights = np.pad(x, (0, -len(x) % 8)).reshape(-1, 8)
    patterns = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(float)
    table, column = (2 * patterns - 1) @ eights.T, np.arange(len(eights))
    generator = np.random.default_rng(seed)
    draws = max(10_000, min(DRAWS, SIGNS // len(x)))
    hits, done, batch = 0, 0, max(1, 1_000_000 // len(eights))
    while done < draws:
        size = min(batch, draws - done)
        chosen = np.frombuffer(generator.bytes(size * len(eights)), np.uint8).reshape(size, -1)
        hits += int(np.count_nonzero(np.abs(table[chosen, column].sum(1)) >= seen))
        done += size
    p = (hits + 1) / (draws + 1)
    return p, math.sqrt(p * (1 - p) / draws)


def worst_rank(d: Values) -> float:
    """Return p of the signed-rank test that gives diverged runs the worst rank.

    d is -inf if the arm diverged, +inf if the baseline diverged, and 0 if both did. The test is the sign-flip test on
    the mid-ranks of |d| without zeros, so it is exact with ties. Without ties it equals Wilcoxon's exact test.
    Source: Lachin, Control. Clin. Trials 20 (1999) 408-422.
    """
    x = np.asarray(d, float)
    if np.isnan(x).any():
        raise ValueError("a difference is NaN; a diverged run counts as -inf or +inf")
    x = x[x != 0]
    if not len(x):
        return 1.0
    return sign_flip(_signed_ranks(x))[0]


def rank_sum(d: Values) -> float:
    """Return the sum of the signed ranks of `worst_rank`; it is above 0 if the arm is better."""
    x = np.asarray(d, float)
    return float(_signed_ranks(x[x != 0]).sum())


def _signed_ranks(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * stats.rankdata(np.abs(x))


def sign_test(d: Values) -> float:
    """Return p of the sign test (binomial, one half) without zeros; infinite differences count by their sign."""
    x = np.asarray(d, float)
    if np.isnan(x).any():
        raise ValueError("a difference is NaN; a diverged run counts as -inf or +inf")
    x = x[x != 0]
    return float(stats.binomtest(int((x > 0).sum()), len(x)).pvalue) if len(x) else 1.0


def tost(d: Values, margin: float, overlap: float = 0.0) -> tuple[float, float, float]:
    """Test equivalence, |mean difference| < margin, by two one-sided t tests.

    p <= level shows equivalence at that level. Source: Schuirmann 1987, doi 10.1007/BF01068419.

    Args:
        d: At least 2 finite differences.
        margin: The margin, above 0.
        overlap: As for `widened`.

    Returns:
        p (the larger of the two), p_lower (of mean > -margin) and p_upper (of mean < margin).
    """
    x = _finite(d, 2)
    if not margin > 0:
        raise ValueError(f"margin {margin}; allowed: above 0")
    error = float(x.std(ddof=1)) / math.sqrt(len(x)) * widened(len(x), overlap)
    lower = float(stats.t.sf((x.mean() + margin) / error, len(x) - 1))
    upper = float(stats.t.cdf((x.mean() - margin) / error, len(x) - 1))
    return max(lower, upper), lower, upper


def tost_excludes(d: Values, level: float, overlap: float = 0.0) -> float:
    """Return the smallest margin at which `tost` concludes: |mean| + t(1 - level) * standard error.

    Args:
        d: At least 2 finite differences.
        level: Level of both tests.
        overlap: As for `widened`.
    """
    x = _finite(d, 2)
    error = float(x.std(ddof=1)) / math.sqrt(len(x)) * widened(len(x), overlap)
    return float(abs(x.mean()) + stats.t.ppf(1 - level, len(x) - 1) * error)
