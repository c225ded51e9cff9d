"""Find values far from the rest: those that a t test takes for noise, and that normal noise rarely has."""

import math

import numpy as np
from scipy import stats

MOST = 50  # values beyond which a few far ones hardly matter to a t test


def far_off(values: np.ndarray, level: float) -> list[int]:
    """Return the places of one or two values that lie far from the rest; none if normal noise may have put them there.

    The statistic is (mean of the k values - mean of the rest) / (sd of the rest * sqrt(1 / k + 1 / (n - k))), a t with
    n - k - 1 degrees of freedom. p is multiplied by the number of ways to choose k of n values (Bonferroni), k = 1, 2.

    Args:
        values: Finite values.
        level: Share of normal samples of which a value is returned, at most, for each k.
    """
    x, n = np.asarray(values, float), len(values)
    order = np.argsort(x)
    for k in (1, 2) if n <= MOST else ():
        for places in (order[:k], order[n - k :]) if n - k >= 3 else ():
            rest = np.delete(x, places)
            sd = float(rest.std(ddof=1))
            if sd > 1e-12 * float(np.abs(x).max()):
                t = abs(float(x[places].mean() - rest.mean())) / (sd * math.sqrt(1 / k + 1 / (n - k)))
                if 2 * float(stats.t.sf(t, n - k - 1)) * math.comb(n, k) <= level:
                    return sorted(int(i) for i in places)
    return []


def far_residuals(residuals: np.ndarray, sd: float, df: int, level: float) -> list[int]:
    """Return the places of residuals that are far too large for noise of standard deviation `sd`.

    Args:
        residuals: Residuals, in the unit of `sd`.
        sd: Estimate of their standard deviation from other values.
        df: Degrees of freedom of that estimate.
        level: Share of normal samples of which a place is returned, at most (Bonferroni).
    """
    if not len(residuals) or not sd > 0:
        return []
    bound = float(stats.t.isf(level / (2 * len(residuals)), df)) * sd
    return [int(i) for i in np.flatnonzero(np.abs(residuals) > bound)]
