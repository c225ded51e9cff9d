"""Tests of paired differences d = baseline - arm (positive = the arm's loss is lower), two-sided unless said.

Every function refuses what its library would answer with a confident number: scipy gives p = 0.0 for a NaN in
`permutation_test`, and p = 2e-30 for constant differences.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray
EXACT_UP_TO = 20  # 2^20 sign patterns: a second and 8 MB
DRAWS = 200_000  # sign patterns beyond that,
SIGNS = 250_000_000  # fewer where they would need more random signs than this, but at least 10,000


def _finite(d: Values, at_least: int = 1) -> np.ndarray:
    x = np.asarray(d, float)
    if len(x) < at_least:
        raise ValueError(f"{len(x)} differences, at least {at_least} needed")
    if not np.isfinite(x).all():
        raise ValueError(f"differences must be finite, got {x[~np.isfinite(x)][0]} (worst_rank takes diverged runs)")
    return x


def paired_t(d: Values) -> tuple[float, int, float]:
    """t = mean(d) / (sd(d) / sqrt(n)), its degrees of freedom n - 1, and p. Needs n >= 2 and a spread."""
    x = _finite(d, 2)
    if x.std(ddof=1) <= 1e-14 * np.abs(x).max():
        raise ValueError(f"zero variance: all {len(x)} differences equal {x[0]:g}; no t test")
    result = stats.ttest_1samp(x, 0.0)
    return float(result.statistic), len(x) - 1, float(result.pvalue)


def one_sample_t(values: Values, target: float, alternative: str = "two-sided") -> float:
    """p of the t test that the mean of `values` is `target`; alternative "less" = the mean is below it."""
    x = _finite(values, 2)
    if x.std(ddof=1) <= 1e-14 * np.abs(x).max():
        raise ValueError(f"zero variance: all {len(x)} values equal {x[0]:g}; no t test")
    return float(stats.ttest_1samp(x, target, alternative=alternative).pvalue)


def sign_flip(d: Values, seed: int = 0) -> tuple[float, float]:
    """p of the sign-flip permutation test on the mean, and its standard error (0 where exact).

    Under the null each difference is as likely to be negative: p is the share of the 2^n sign patterns whose
    |sum| is at least the one seen. All patterns up to n = 20, beyond it draws with p = (hits + 1) / (draws +
    1) (Phipson and Smyth 2010, arXiv 1603.05766). The smallest p it can reach is 2 / 2^n.
    """
    x = np.abs(_finite(d))
    seen = abs(math.fsum(_finite(d)))
    seen -= 1e-12 * x.sum()  # equal sums added in another order must count as equal
    if len(x) <= EXACT_UP_TO:
        sums = x[:1].copy()  # the first sign is fixed: patterns come in mirrored pairs
        for value in x[1:]:
            sums = np.concatenate((sums + value, sums - value))
        return float(np.mean(np.abs(sums) >= seen)), 0.0
    # eight signs are one random byte: their 256 sums are looked up, which is 20 times faster than a product of signs
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
    """p of the signed-rank test with diverged runs in the worst rank (d = -inf the arm's, +inf the baseline's).

    The sign-flip test on the mid-ranks of |d|, zeros left out, so exact with ties; equal to Wilcoxon's exact
    test without them. A pair in which both runs diverged has d = 0. Source: Lachin, Control. Clin. Trials 20
    (1999) 408-422.
    """
    x = np.asarray(d, float)
    if np.isnan(x).any():
        raise ValueError("a difference is NaN; a diverged run counts as -inf or +inf")
    x = x[x != 0]
    if not len(x):
        return 1.0
    return sign_flip(np.sign(x) * stats.rankdata(np.abs(x)))[0]


def sign_test(d: Values) -> float:
    """p of the sign test (binomial, one half), zeros left out; infinite differences count by their sign."""
    x = np.asarray(d, float)
    if np.isnan(x).any():
        raise ValueError("a difference is NaN; a diverged run counts as -inf or +inf")
    x = x[x != 0]
    return float(stats.binomtest(int((x > 0).sum()), len(x)).pvalue) if len(x) else 1.0


def tost(d: Values, margin: float) -> tuple[float, float, float]:
    """Two one-sided t tests: p, p_lower (of mean > -margin), p_upper (of mean < margin); p is the larger.

    p <= level means |mean difference| < margin at that level. Source: Schuirmann 1987, doi
    10.1007/BF01068419.
    """
    x = _finite(d, 2)
    if not margin > 0:
        raise ValueError(f"margin {margin}; allowed: above 0")
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    lower = float(stats.t.sf((x.mean() + margin) / error, len(x) - 1))
    upper = float(stats.t.cdf((x.mean() - margin) / error, len(x) - 1))
    return max(lower, upper), lower, upper


def tost_excludes(d: Values, level: float) -> float:
    """The smallest margin at which `tost` would have concluded: |mean| + t(1 - level) * standard error."""
    x = _finite(d, 2)
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(abs(x.mean()) + stats.t.ppf(1 - level, len(x) - 1) * error)
