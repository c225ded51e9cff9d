"""Rules for adding seeds: O'Brien-Fleming looks, the anytime-valid t e-value, and the reserve of a fixed number.

A reserve is the share of the level that a study with a fixed number of seeds keeps for seeds that are added later. A
rule gives each arm one p over all its looks, of a difference and of no difference. Both are valid p at any look.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from scipy import special, stats

from analysis.stats.multiplicity import adjust
from analysis.stats.paired_tests import Values, rank_sum, worst_rank
from analysis.stats.pairs import differences

Pair = TypeVar("Pair")  # how the caller names a comparison
RULES = ("fixed", "obrien-fleming", "e-process")
NOMINAL = {3: 0.00035, 5: 0.0054, 8: 0.0245, 10: 0.0352}  # seeds at each look -> p at which it stops, level 0.05
PRIOR_VARIANCE = 4.0  # g of the e-value
CLAIM_SEEDS = 8  # seeds that a claim needs
CAP = 20  # largest number of seeds by default
# The largest reserve with which numbers of seeds chosen to the best effect err in 5.1% of studies at most, if the first
# look has a claim's seeds, no look more than 100, and the family MOST_ARMS at a level of 5%; see benchmarks/reserve.py
MOST_RESERVE = 0.25
MOST_ARMS = 16


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


@lru_cache(maxsize=16)
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


def shares(reserve: float, looks: int) -> list[float]:
    """Return the share of the level that each look of the fixed rule has.

    The planned seeds have 1 - reserve, and each later look has half of what is left. The p over the looks is the
    smallest p / share. It keeps the level of fixed looks however they depend on each other (Bonferroni's inequality).
    It also keeps it if the number of added seeds is chosen after the results: see `MOST_RESERVE`.

    Args:
        reserve: Share that is kept for added seeds, in [0, MOST_RESERVE]. With 0, no look has a price.
        looks: Number of looks.
    """
    if not 0 <= reserve <= MOST_RESERVE:
        raise ValueError(f"reserve {reserve}; allowed: 0 to {MOST_RESERVE}")
    if not reserve:
        return [1.0] * looks
    return [1 - reserve, *(reserve / 2**j for j in range(1, looks))][:looks]


def nominal(rule: str, looks: tuple[int, ...], n: int, level: float, reserve: float = 0.0) -> float:
    """Return the p of the paired t test at which a rule stops, for one arm alone.

    Args:
        rule: One of `RULES`.
        looks: Numbers of seeds at the looks.
        n: Number of seeds at this look.
        level: Level of the rule.
        reserve: Reserve of the fixed rule.
    """
    if rule == "fixed":
        return level * shares(reserve, len(looks))[looks.index(n)]
    if rule == "obrien-fleming":
        return nominal_levels(looks, level)[looks.index(n)]
    v, spread = n - 1, 1 + n * PRIOR_VARIANCE
    ratio = (spread**0.5 / level) ** (2 / (v + 1))  # e_value solved for t
    if ratio >= spread:
        return 0.0
    return float(2 * special.stdtr(v, -math.sqrt(v * (ratio - 1) / (1 - ratio / spread))))


def path(
    d: Values, rule: str, looks: tuple[int, ...], level: float, reserve: float = 0.0, margins: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Return one row per look of one arm: n, pairs, t, p, e, `stops_at`, `p_anytime`, `p_tost`, `p_no_difference`.

    `direction` is the sign of the effect at the look at which `p_anytime` was reached: above 0 if the arm is better.
    `ended` is true from a diverged run on that no later seed of an e-process can decide.
    `stops_at` is the nominal p at `level`. `p_anytime` is the smallest level at which this look or an earlier one would
    have stopped. It may be read, and corrected for several arms, at any look. For O'Brien-Fleming it is the repeated p,
    never below 1e-4, and a diverged run makes p that of the worst-rank test. For the e-process it is 1 / the largest e
    so far; a diverged run stops the evidence, because the e-value needs complete pairs. For the fixed rule it is the
    smallest p / share so far; without a reserve it is the p of this look alone, and only the first look has a level.
    Source: Jennison and Turnbull, Control. Clin. Trials 5 (1984) 33-45.

    `p_tost` is that of this look, and `p_no_difference` the one over all looks: the larger of the two one-sided p over
    all looks. A one-sided p is half of the two-sided one at the same boundaries, and a whole one for the e-process. The
    t statistic falls with the true mean, seed by seed, so it is valid for every mean beyond the margin. Without a
    margin, or after a diverged run, both are None.

    Args:
        d: Differences in the planned order of seeds; NaN if there is no pair, infinite if a run diverged.
        rule: One of `RULES`.
        looks: Numbers of seeds at the looks.
        level: Level of the rule.
        reserve: Reserve of the fixed rule.
        margins: Margin of no difference at each look, in the unit of `d`; empty for no such test.
    """
    out: list[dict[str, Any]] = []
    best, inside, direction = 1.0, [1.0, 1.0], 0.0
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
            row["e"] = e_value(row["t"], len(x)) if rule == "e-process" else None
        elif len(x) > 1 and not complete and rule != "e-process":
            row["p"] = worst_rank(x)
        if rule == "fixed" and not reserve:
            best, inside, direction = 1.0, [1.0, 1.0], 0.0  # a look without a level of its own forgets the earlier ones
        if row["p"] is not None:
            level_now = _level_of(row["p"], row["e"], rule, looks, j, reserve)
            if level_now < best or not direction:
                direction = float(np.sign(rank_sum(x) if row["t"] is None else row["t"]))
            best = min(best, level_now)
        tost = same = None
        if row["t"] is not None and margins:
            away = margins[j] / sd * math.sqrt(len(x))  # the margin in standard errors of the mean
            sides = (away + row["t"], away - row["t"])
            tost = float(special.stdtr(len(x) - 1, -min(sides)))
            inside = [
                min(p, _one_sided(t, len(x), rule, looks, j, reserve)) for p, t in zip(inside, sides, strict=True)
            ]
            same = max(inside)
        stops_at = nominal(rule, looks, n, level, reserve)
        row |= {"stops_at": stops_at, "p_anytime": best, "p_tost": tost, "p_no_difference": same}
        out.append(row | {"direction": direction, "ended": rule == "e-process" and bool(np.isinf(x).any())})
    return out


def _level_of(p: float, e: float | None, rule: str, looks: tuple[int, ...], j: int, reserve: float) -> float:
    # the smallest level at which look j stops, from the two-sided p of its test or from its e-value
    if rule == "e-process":
        return min(1.0, 1 / e) if e else 1.0
    if rule == "fixed":
        return min(1.0, p / shares(reserve, j + 1)[j])
    levels, bounds = _boundaries(looks)
    at = max(math.log(max(p, 1e-300)), float(bounds[j, 0]))
    return float(np.exp(np.interp(at, bounds[j], np.log(levels), right=0.0)))


def _one_sided(t: float, n: int, rule: str, looks: tuple[int, ...], j: int, reserve: float) -> float:
    # the smallest level at which look j stops one side of TOST, from the t statistic against that side's bound
    if rule == "e-process":
        return _level_of(1.0, e_value(t, n), rule, looks, j, reserve) if t > 0 else 1.0
    p = float(special.stdtr(n - 1, -t))
    if rule == "fixed":
        return _level_of(p, None, rule, looks, j, reserve)
    return _level_of(2 * p, None, rule, looks, j, reserve) / 2 if p < 0.25 else 1.0


def undecided(
    differences: Mapping[Pair, Values],
    rule: str,
    looks: tuple[int, ...],
    level: float,
    correction: str,
    reserve: float = 0.0,
    margins: Sequence[float] = (),
) -> list[Pair]:
    """Return the comparisons that have not stopped yet: neither p over the looks, adjusted, is at or below the level.

    Two more kinds stop at their first look. Differences that are all 0 are identical. An e-process whose evidence a
    diverged run has ended stays undecided, whatever follows.

    Args:
        differences: Differences of each comparison, as `path` takes them. One that stopped early has fewer.
        rule: One of `RULES`.
        looks: Numbers of seeds at the looks.
        level: Level of the rule.
        correction: Correction of p for several arms, as `adjust` takes it.
        reserve: Reserve of the fixed rule.
        margins: Margins as for `path`; empty if no difference stops no arm.
    """
    seen = [path(d, rule, looks, level, reserve, margins) for d in differences.values()]
    differ, same = (
        adjust([1.0 if not rows or rows[-1][key] is None else rows[-1][key] for rows in seen], correction)
        for key in ("p_anytime", "p_no_difference")
    )
    stopped = [
        bool(rows) and (rows[-1]["ended"] or not np.any(d)) for rows, d in zip(seen, differences.values(), strict=True)
    ]
    return [
        pair
        for pair, p, q, over in zip(differences, differ, same, stopped, strict=True)
        if min(p, q) > level and not over
    ]


def next_seeds(
    reached: Mapping[str, int],
    undecided: Sequence[tuple[str, str]],
    looks: tuple[int, ...],
    baseline: str,
    rule: str,
    racing: bool,
) -> dict[str, int]:
    """Return the number of seeds up to which each arm runs next; empty if the confirm stage is over.

    An arm goes on to its next look if one of its comparisons is undecided. Under the fixed rule it also does if it has
    too few seeds for a claim. The baseline goes on as far as any arm.

    Args:
        reached: Number of seeds that each arm ran.
        undecided: The comparisons that are undecided, as reference and arm.
        looks: Numbers of seeds at the looks, with those to come.
        baseline: Name of the baseline.
        rule: One of `RULES`.
        racing: False if all arms go on as long as any comparison is undecided, or under the fixed rule to its end.
    """
    going = {arm for pair in undecided for arm in pair}
    if rule == "fixed":
        going |= {arm for arm, n in reached.items() if n < CLAIM_SEEDS}
    if not racing and (going or rule == "fixed"):
        going = set(reached)
    found = {}
    for arm, n in reached.items():
        later = [look for look in looks if look > n]
        if arm in going and arm != baseline and later:
            found[arm] = later[0]
    if found and max(found.values()) > reached[baseline]:
        found[baseline] = max(found.values())
    return found


def further(
    losses: Mapping[str, np.ndarray],
    baseline: str,
    comparisons: Sequence[tuple[str, str]],
    looks: tuple[int, ...],
    of_mean: Callable[[float], float],
    *,
    rule: str,
    level: float,
    correction: str,
    reserve: float,
    racing: bool,
) -> dict[str, int]:
    """Return the number of seeds up to which each arm runs next, by the losses so far; empty if none does.

    Args:
        losses: Losses of each arm in the planned order of seeds; NaN for a failed machine, infinite if diverged.
        baseline: Name of the baseline.
        comparisons: The study's comparisons, as reference and arm.
        looks: Numbers of seeds at the looks, with those to come.
        of_mean: As for `margins`.
        rule, level, correction, reserve: As for `undecided`.
        racing: As for `next_seeds`.
    """
    reached = {arm: len(values) for arm, values in losses.items()}
    if min(reached.values()) >= looks[-1]:
        return {}
    d = {}
    for first, second in comparisons:
        if {first, second} <= set(losses):
            n = min(reached[first], reached[second])
            d[first, second] = differences(losses[first][:n], losses[second][:n])
    bands = margins(of_mean, losses[baseline], looks)
    return next_seeds(
        reached, undecided(d, rule, looks, level, correction, reserve, bands), looks, baseline, rule, racing
    )


def margins(of_mean: Callable[[float], float], baseline: np.ndarray, looks: tuple[int, ...]) -> list[float]:
    """Return the margin of no difference at each look.

    Args:
        of_mean: Returns the margin for a mean loss of the baseline.
        baseline: Losses of the baseline in the planned order of seeds; NaN for a failed machine, infinite if diverged.
        looks: Numbers of seeds at the looks.
    """
    finite = [baseline[:n][np.isfinite(baseline[:n])] for n in looks]
    return [of_mean(float(x.mean()) if len(x) else 1.0) for x in finite]
