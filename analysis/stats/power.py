"""Power of the paired t test and of TOST, the effect that n seeds can detect, and the seeds that a question needs.

statsmodels' `TTestPower.solve_power` is wrong at n = 3-4. Therefore the integral is computed here: given the ratio s
of the sample sd to the true sd, the t statistic is normal.
"""

import math
from functools import cache, lru_cache

import numpy as np
from scipy import optimize, stats

from analysis.stats.paired_tests import widened


@cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(400)


@lru_cache(maxsize=512)
def sd_ratio_nodes(df: float) -> tuple[np.ndarray, np.ndarray]:
    """Return quadrature nodes and weights of s = sample sd / true sd with `df` degrees of freedom (chi / sqrt(df))."""
    if df < 1:
        raise ValueError(f"df = {df}; at least 1 needed")
    low, high = (float(f(1e-13, df)) / math.sqrt(df) for f in (stats.chi.ppf, stats.chi.isf))
    x, w = _legendre()
    s = low + (x + 1) / 2 * (high - low)
    weight = w / 2 * (high - low) * stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df)
    return s, weight / weight.sum()


def power(d_z: float, n: int, level: float = 0.05, overlap: float = 0.0) -> float:
    """Return P(p <= level) of the two-sided paired t test.

    Args:
        d_z: Effect size mean(d) / sd(d).
        n: Number of pairs, at least 2.
        level: Significance level.
        overlap: As for `analysis.stats.paired_tests.widened`.
    """
    return power_of_t(d_z * math.sqrt(n) / widened(n, overlap), n - 1, level)


def power_of_t(shift: float, df: float, level: float) -> float:
    """Return P(p <= level) of a two-sided t test, also of Welch's.

    Args:
        shift: True difference, in units of its standard error.
        df: Degrees of freedom, at least 1.
        level: Significance level.
    """
    s, weight = sd_ratio_nodes(df)
    bound, shift = stats.t.isf(level / 2, df) * s, abs(shift)
    return float(weight @ (stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift)))


def exaggeration(shift: float, df: float, level: float) -> float:
    """Return E(|estimate| given p <= level) / |true difference|: how many times too large a detected effect looks.

    It is 1 for a certain detection and grows without limit as the power falls. Source: Gelman and Carlin, Perspect.
    Psychol. Sci. 9 (2014) 641-651.

    Args:
        shift: True difference, in units of its standard error; not 0.
        df: Degrees of freedom, at least 1.
        level: Significance level.
    """
    s, weight = sd_ratio_nodes(df)
    bound, shift = stats.t.isf(level / 2, df) * s, abs(shift)
    above, below = bound - shift, -bound - shift  # E|z| over both tails of a normal z with mean `shift`
    size = shift * (stats.norm.sf(above) - stats.norm.cdf(below)) + stats.norm.pdf(above) + stats.norm.pdf(below)
    return float(weight @ size) / (power_of_t(shift, df, level) * shift)


@lru_cache(maxsize=512)
def detectable_shift(df: float, level: float = 0.05, target: float = 0.8) -> float:
    """Return the difference, in units of its standard error, that a t test detects with the power `target`."""
    return float(optimize.brentq(lambda shift: power_of_t(shift, df, level) - target, 0.0, 1e5, xtol=1e-10))


def detectable_d_z(n: int, level: float = 0.05, target: float = 0.8) -> float:
    """Return the effect size d_z that n pairs detect at this level with the power `target`."""
    return detectable_shift(n - 1, level, target) / math.sqrt(n)


def tost_power(d_z: float, margin_z: float, n: int, level: float = 0.05, overlap: float = 0.0) -> float:
    """Return P(TOST concludes).

    Args:
        d_z: True mean, in units of sd(d).
        margin_z: Equivalence margin, in units of sd(d).
        n: Number of pairs, at least 2.
        level: Significance level.
        overlap: As for `analysis.stats.paired_tests.widened`.
    """
    s, weight = sd_ratio_nodes(n - 1)
    root = math.sqrt(n) / widened(n, overlap)
    room = margin_z * root - stats.t.isf(level, n - 1) * s
    shift = d_z * root
    inside = stats.norm.cdf(room - shift) - stats.norm.cdf(-room - shift)
    return float(weight @ np.where(room > 0, inside, 0.0))


def seeds_needed(
    d_z: float,
    margin_z: float,
    level: float,
    tost_level: float,
    target: float = 0.8,
    cap: int = 10_000,
    overlap: float = 0.0,
) -> int | None:
    """Return the smallest n at which the t test or TOST concludes with the power `target`.

    The observed effect is taken as the true one, so the result is a guide and no promise.

    Args:
        d_z: Effect size mean(d) / sd(d).
        margin_z: Equivalence margin, in units of sd(d).
        level: Significance level of the t test.
        tost_level: Significance level of TOST.
        target: Power to reach.
        cap: Largest n that is tried; the result is None if it is not enough.
        overlap: As for `analysis.stats.paired_tests.widened`. The power then has a limit below 1.
    """

    def enough(n: int) -> bool:
        return max(power(d_z, n, level, overlap), tost_power(d_z, margin_z, n, tost_level, overlap)) >= target

    if not enough(cap):
        return None
    low, high = 1, cap  # low is never enough; power grows with n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def seeds_needed_worst_rank(d: np.ndarray, level: float, target: float = 0.8) -> int | None:
    """Return Noether's n for the signed-rank test: (z_level/2 + z_power)^2 / (3 (q - 1/2)^2), q = P(d + d' > 0).

    q is estimated from the observed pairs. Source: Noether, J. Am. Stat. Assoc. 82 (1987) 645-647.

    Args:
        d: Differences, infinite if a run diverged.
        level: Significance level.
        target: Power to reach.

    Returns:
        The number of pairs; None if q is 1/2.
    """
    x = np.sign(d) * stats.rankdata(np.abs(d))  # ranks keep the order of the Walsh sums' signs if d is infinite
    i, j = np.triu_indices(len(x), k=1)
    sums = x[i] + x[j]
    q = float(np.mean((sums > 0) + 0.5 * (sums == 0))) if len(sums) else 0.5
    if q == 0.5:
        return None
    z = stats.norm.isf(level / 2) + stats.norm.isf(1 - target)
    return math.ceil(z**2 / (3 * (q - 0.5) ** 2))
