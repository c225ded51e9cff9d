"""Power of the paired t test and of TOST, what n seeds can detect, and how many seeds a question needs.

statsmodels' `TTestPower.solve_power` is wrong at n = 3-4, so the integral is done here: given the ratio s of
the sample sd to the true one, the t statistic is normal.
"""

import math
from functools import cache, lru_cache

import numpy as np
from scipy import optimize, stats


@cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(400)


@lru_cache(maxsize=512)
def sd_ratio_nodes(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature nodes and weights of s = sample sd / true sd with `df` degrees of freedom (chi / sqrt(df))."""
    if df < 1:
        raise ValueError(f"df = {df}; at least 1 needed")
    low, high = (float(f(1e-13, df)) / math.sqrt(df) for f in (stats.chi.ppf, stats.chi.isf))
    x, w = _legendre()
    s = low + (x + 1) / 2 * (high - low)
    weight = w / 2 * (high - low) * stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df)
    return s, weight / weight.sum()


def power(d_z: float, n: int, level: float = 0.05) -> float:
    """P(p <= level) of the two-sided paired t test, effect size d_z = mean(d) / sd(d), n >= 2 pairs."""
    s, weight = sd_ratio_nodes(n - 1)
    bound = stats.t.isf(level / 2, n - 1) * s
    shift = abs(d_z) * math.sqrt(n)
    return float(weight @ (stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift)))


@lru_cache(maxsize=512)
def detectable_d_z(n: int, level: float = 0.05, target: float = 0.8) -> float:
    """The d_z that n pairs detect with the power `target`."""
    return float(optimize.brentq(lambda d: power(d, n, level) - target, 0.0, 1e4 / math.sqrt(n), xtol=1e-10))


def tost_power(d_z: float, margin_z: float, n: int, level: float = 0.05) -> float:
    """P(TOST concludes) where the true mean is d_z and the margin is margin_z, both in units of sd(d)."""
    s, weight = sd_ratio_nodes(n - 1)
    room = margin_z * math.sqrt(n) - stats.t.isf(level, n - 1) * s
    shift = d_z * math.sqrt(n)
    inside = stats.norm.cdf(room - shift) - stats.norm.cdf(-room - shift)
    return float(weight @ np.where(room > 0, inside, 0.0))


def seeds_needed(
    d_z: float, margin_z: float, level: float, tost_level: float, target: float = 0.8, cap: int = 10_000
) -> int | None:
    """Smallest n at which the t test (`level`) or TOST (`tost_level`) concludes with the power `target`.

    It takes the effect seen for the true one, so it is a guide and no promise. None beyond `cap`.
    """

    def enough(n: int) -> bool:
        return max(power(d_z, n, level), tost_power(d_z, margin_z, n, tost_level)) >= target

    if not enough(cap):
        return None
    low, high = 1, cap  # low is never enough; power grows with n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def seeds_needed_worst_rank(d: np.ndarray, level: float, target: float = 0.8) -> int | None:
    """Noether's n of the signed-rank test, (z_level/2 + z_power)^2 / (3 (q - 1/2)^2), q = P(d + d' > 0).

    q is taken from the pairs seen; None where it is 1/2. Source: Noether, J. Am. Stat. Assoc. 82 (1987)
    645-647.
    """
    x = np.sign(d) * stats.rankdata(np.abs(d))  # ranks keep the order of the Walsh sums' signs when d is infinite
    i, j = np.triu_indices(len(x), k=1)
    sums = x[i] + x[j]
    q = float(np.mean((sums > 0) + 0.5 * (sums == 0))) if len(sums) else 0.5
    if q == 0.5:
        return None
    z = stats.norm.isf(level / 2) + stats.norm.isf(1 - target)
    return math.ceil(z**2 / (3 * (q - 0.5) ** 2))
