"""Adding seeds by a rule named in advance: O'Brien-Fleming looks, or the anytime-valid t e-value."""

import math
from functools import lru_cache

import numpy as np
from scipy import stats

from analysis.paired_tests import Values

NOMINAL = {3: 0.00035, 5: 0.0054, 8: 0.0245, 10: 0.0352}  # seeds at each look -> p at which it stops, level 0.05
PRIOR_VARIANCE = 4.0  # g of the e-value
CAP = 20  # seeds at most


def e_value(t: float, n: int, g: float = PRIOR_VARIANCE) -> float:
    """Evidence against a zero mean from a one-sample t over n pairs; reject when it ever reaches 1 / level.

    e = (1 + n g)^(-1/2) * [(1 + t^2 / v) / (1 + t^2 / (v (1 + n g)))]^((v + 1) / 2), v = n - 1: the Bayes factor with a
    N(0, g) prior on the effect size and the right-Haar prior on the standard deviation. At most exp(690).
    Source: Hendriksen, de Heide and Grunwald 2021, arXiv 1807.01077; Wang and Ramdas 2023, arXiv 2310.03722.
    """
    if n < 2 or not g > 0 or not math.isfinite(t):
        raise ValueError(f"n = {n}, g = {g}, t = {t}; allowed: n >= 2, g > 0, a finite t")
    v, spread = n - 1, 1 + n * g
    ratio = math.log1p(t * t / v) - math.log1p(t * t / (v * spread))
    return math.exp(min(690.0, -0.5 * math.log(spread) + (v + 1) / 2 * ratio))  # beyond it a float overflows


def e_process(d: Values, g: float = PRIOR_VARIANCE) -> list[float]:
    """The e-value after each seed, in the order the seeds were run; 1 (no evidence) before there is a spread."""
    x = np.asarray(d, float)
    if not np.isfinite(x).all():
        raise ValueError("a difference is not finite; the e-value takes complete pairs")
    out = []
    for n in range(1, len(x) + 1):
        sd = float(x[:n].std(ddof=1)) if n > 1 else 0.0
        flat = sd <= 1e-14 * float(np.abs(x[:n]).max())
        out.append(1.0 if flat else e_value(float(x[:n].mean()) / sd * math.sqrt(n), n, g))
    return out


def spent(fraction: float, level: float = 0.05) -> float:
    """Level spent by the information fraction: 2 - 2 Phi(z(level / 2) / sqrt(fraction)), O'Brien-Fleming's shape.

    Source: Lan and DeMets, Biometrika 70 (1983) 659-663.
    """
    return float(2 * stats.norm.sf(stats.norm.isf(level / 2) / math.sqrt(fraction)))


@lru_cache(maxsize=16)
def nominal_levels(looks: tuple[int, ...] = tuple(NOMINAL), level: float = 0.05) -> tuple[float, ...]:
    """Two-sided p of the paired t test at which each look stops, such that all looks together spend `level`.

    Looks are numbers of seeds, rising; the last is the cap. The default looks have their published values; others are
    calibrated on 500,000 simulated null studies (fixed seed, about 2% of each value), because levels from normal theory
    let the t test err in 5.4% of studies instead of 5%.
    """
    if not looks or list(looks) != sorted(set(looks)) or looks[0] < 2 or looks[-1] > 200:
        raise ValueError(f"looks {list(looks)}; allowed: rising numbers of seeds from 2 to 200")
    if looks == tuple(NOMINAL) and level == 0.05:
        return tuple(NOMINAL.values())
    x = np.random.default_rng(0).standard_normal((500_000, looks[-1]), dtype=np.float32)
    alive, already, out = np.ones(len(x), bool), 0, []
    for n in looks:
        t = np.abs(x[:, :n].mean(1)) / x[:, :n].std(1, ddof=1) * math.sqrt(n)
        p = np.where(alive, 2 * stats.t.sf(t, n - 1), 1.0)
        stops = int(spent(n / looks[-1], level) * len(x)) - already
        out.append(float(np.partition(p, stops)[stops]))
        alive &= p >= out[-1]
        already += stops
    return tuple(out)
