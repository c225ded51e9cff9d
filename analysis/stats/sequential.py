"""Rules for adding seeds that are fixed in advance: O'Brien-Fleming looks, or the anytime-valid t e-value."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special, stats

from analysis.stats.multiplicity import adjust
from analysis.stats.paired_tests import Values, worst_rank

RULES = ("fixed", "obrien-fleming", "e-process")
NOMINAL = {3: 0.00035, 5: 0.0054, 8: 0.0245, 10: 0.0352}  # seeds at each look -> p at which it stops, level 0.05
PRIOR_VARIANCE = 4.0  # g of the e-value
CAP = 20  # largest number of seeds by default


def e_value(t: float, n: int, g: float = PRIOR_VARIANCE) -> float:
    """Return the evidence against a zero mean from a one-sample t; reject if it ever reaches 1 / level.

    e = (1 + n g)^(-1/2) * [(1 + t^2 / v) / (1 + t^2 / (v (1 + n g)))]^((v + 1) / 2), v = n - 1. It is the Bayes factor
    with a N(0, g) prior on the effect size and the right-Haar prior on the standard deviation. Sources: Hendriksen,
    de Heide and Grunwald 2021, arXiv 1807.01077; Wang and Ramdas 2023, arXiv 2310.03722.

    Args:
        t: The t statistic, finite.
        n: Number of pairs, at least 2.
        g: Variance of the prior, above 0.

    Returns:
        The e-value, at most exp(690).
    """
    if n < 2 or not g > 0 or not math.isfinite(t):
        raise ValueError(f"n = {n}, g = {g}, t = {t}; allowed: n >= 2, g > 0, a finite t")
    v, spread = n - 1, 1 + n * g
    ratio = math.log1p(t * t / v) - math.log1p(t * t / (v * spread))
    return math.exp(min(690.0, -0.5 * math.log(spread) + (v + 1) / 2 * ratio))  # a larger exponent overflows a float


def e_process(d: Values, g: float = PRIOR_VARIANCE) -> list[float]:
    """Return the e-value after each seed, in the order of the seeds; 1 (no evidence) as long as there is no spread."""
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
    """Return the level spent at an information fraction, in O'Brien-Fleming's shape.

    It is 2 - 2 Phi(z(level / 2) / sqrt(fraction)). Source: Lan and DeMets, Biometrika 70 (1983) 659-663.
    """
    return float(2 * stats.norm.sf(stats.norm.isf(level / 2) / math.sqrt(fraction)))


@lru_cache(maxsize=16)
def nominal_levels(looks: tuple[int, ...] = tuple(NOMINAL), level: float = 0.05) -> tuple[float, ...]:
    """Return the two-sided p of the paired t test at which each look stops; all looks together spend `level`.

    Looks are rising numbers of seeds; the last one is the cap. The default looks have their published values. Others
    are calibrated on 500,000 simulated null studies (fixed seed, about 2% of each value), because levels from normal
    theory give the t test an error rate of 5.4% instead of 5%.
    """
    if not looks or list(looks) != sorted(set(looks)) or looks[0] < 2 or looks[-1] > 200:
        raise ValueError(f"looks {list(looks)}; allowed: rising numbers of seeds from 2 to 200")
    if looks == tuple(NOMINAL) and level == 0.05:
        return tuple(NOMINAL.values())
    seen = _null_p(looks)
    alive, already, out = np.ones(len(seen[0]), bool), 0, []
    for n, p_at_look in zip(looks, seen, strict=True):
        p = np.where(alive, p_at_look, 1.0)
        stops = int(spent(n / looks[-1], level) * len(p)) - already
        out.append(float(np.partition(p, stops)[stops]))
        alive &= p >= out[-1]
        already += stops
    return tuple(out)


@lru_cache(maxsize=2)
def _null_p(looks: tuple[int, ...]) -> list[np.ndarray]:
    # p of the t test at each look, in simulated null studies
    x = np.random.default_rng(0).standard_normal((500_000, looks[-1]), dtype=np.float32)
    t = {n: np.abs(x[:, :n].mean(1)) / x[:, :n].std(1, ddof=1) * math.sqrt(n) for n in looks}
    return [2 * special.stdtr(n - 1, -t[n].astype(float)) for n in looks]


@lru_cache(maxsize=4)
def _boundaries(looks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    # Levels, and the log of each look's nominal p at those levels (looks down).
    levels = np.unique(np.append(np.geomspace(1e-4, 0.5, 40), 0.05))
    table = np.log(np.maximum([nominal_levels(looks, float(level)) for level in levels], 1e-12)).T
    return levels, np.maximum.accumulate(table, axis=1)


# --- a rule as the study names it ---


def plan(rule: str, cap: int | None = None) -> tuple[int, ...]:
    """Return the numbers of seeds at which a sequential rule has its looks; the last is its cap.

    O'Brien-Fleming has looks at 3, 5, 8 and 10 seeds, or at the same shares of another cap. The e-process has one at
    every seed from the third on, up to 20 by default.
    """
    if rule not in RULES[1:]:
        raise ValueError(f"rule {rule!r}; allowed: {', '.join(RULES[1:])}")
    if cap is not None and not 3 <= cap <= 100:
        raise ValueError(f"cap of {cap} seeds; allowed: 3 to 100")
    if rule == "e-process":
        return tuple(range(3, (cap or CAP) + 1))
    last = max(NOMINAL)
    return tuple(sorted({max(2, round(n / last * (cap or last))) for n in NOMINAL}))


def nominal(rule: str, looks: tuple[int, ...], n: int, level: float) -> float:
    """Return the p of the paired t test at which a rule stops, for one arm alone.

    Args:
        rule: "obrien-fleming" or "e-process".
        looks: Numbers of seeds at the looks.
        n: Number of seeds at this look.
        level: Level of the rule.
    """
    if rule == "obrien-fleming":
        return nominal_levels(looks, level)[looks.index(n)]
    v, spread = n - 1, 1 + n * PRIOR_VARIANCE
    ratio = (spread**0.5 / level) ** (2 / (v + 1))  # e_value solved for t
    if ratio >= spread:
        return 0.0
    return float(2 * special.stdtr(v, -math.sqrt(v * (ratio - 1) / (1 - ratio / spread))))


def path(d: Values, rule: str, looks: tuple[int, ...], level: float) -> list[dict[str, Any]]:
    """Return one row per look of one arm: n, pairs, t, p, e, `stops_at` (nominal p at `level`), and `p_anytime`.

    `p_anytime` is the smallest level at which this look or an earlier one would have stopped. It may be read, and
    corrected for several arms, at any look. For O'Brien-Fleming it is the repeated p, never below 1e-4, and a diverged
    run makes p that of the worst-rank test. For the e-process it is 1 / the largest e so far; a diverged run stops the
    evidence, because the e-value needs complete pairs. Source: Jennison and Turnbull, Control. Clin. Trials 5 (1984)
    33-45.

    Args:
        d: Differences in the planned order of seeds; NaN if there is no pair, infinite if a run diverged.
        rule: "obrien-fleming" or "e-process".
        looks: Numbers of seeds at the looks.
        level: Level of the rule.
    """
    out: list[dict[str, Any]] = []
    best = 1.0
    for j, n in enumerate(looks):
        if n > len(d):
            break
        x = np.asarray(d[:n], float)
        x = x[~np.isnan(x)]
        row: dict[str, Any] = {"n": n, "pairs": len(x), "t": None, "p": None, "e": None}
        complete = len(x) > 1 and bool(np.isfinite(x).all())
        sd = float(x.std(ddof=1)) if complete else 0.0
        if complete and sd > 1e-14 * float(np.abs(x).max()):
            row["t"] = float(x.mean()) / sd * math.sqrt(len(x))
            row["p"] = float(2 * special.stdtr(len(x) - 1, -abs(row["t"])))
        elif len(x) > 1 and not complete and rule == "obrien-fleming":
            row["p"] = worst_rank(x)
        if rule == "e-process":
            row["e"] = e_value(row["t"], len(x)) if row["t"] is not None else None
            best = min(best, 1 / row["e"]) if row["e"] else best
        elif row["p"] is not None:
            levels, bounds = _boundaries(looks)
            p = max(math.log(max(row["p"], 1e-300)), float(bounds[j, 0]))
            best = min(best, float(np.exp(np.interp(p, bounds[j], np.log(levels), right=0.0))))
        out.append(row | {"stops_at": nominal(rule, looks, n, level), "p_anytime": best})
    return out


def undecided(
    differences: Mapping[str, Values], rule: str, looks: tuple[int, ...], level: float, correction: str
) -> list[str]:
    """Return the arms that have not stopped yet: their adjusted `p_anytime` is above the level.

    Args:
        differences: Differences of each arm, as `path` takes them.
        rule: "obrien-fleming" or "e-process".
        looks: Numbers of seeds at the looks.
        level: Level of the rule.
        correction: Correction of p for several arms, as `adjust` takes it.
    """
    seen = [path(d, rule, looks, level) for d in differences.values()]
    p = [rows[-1]["p_anytime"] if rows else 1.0 for rows in seen]
    return [arm for arm, q in zip(differences, adjust(p, correction), strict=True) if q > level]
