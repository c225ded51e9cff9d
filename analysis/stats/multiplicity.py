"""Comparisons of several arms with one baseline: adjusted p values, and the seed-blocked Dunnett test."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from analysis.stats.paired_tests import Values
from analysis.stats.power import sd_ratio_nodes


def adjust(p: Sequence[float], correction: str) -> list[float]:
    """Adjust p values for multiple tests, in the given order, by holm, bonferroni, benjamini-hochberg or none."""
    if np.isnan(np.asarray(p, float)).any():
        raise ValueError("a p value is NaN; a comparison without a test enters its family with p = 1")
    if correction == "none" or not len(p):
        return [float(x) for x in p]
    values, n = np.asarray(p, float), len(p)
    order, adjusted = np.argsort(values), np.empty(n)
    ordered, rank = values[order], np.arange(1, n + 1)
    if correction == "holm":
        adjusted[order] = np.maximum.accumulate(ordered * rank[::-1])
    elif correction == "bonferroni":
        adjusted = values * n
    elif correction == "benjamini-hochberg":  # scipy's false_discovery_control differs in the last bit
        adjusted[order] = np.minimum.accumulate((ordered / (rank / n))[::-1])[::-1]
    else:
        raise ValueError(f"correction {correction!r}; allowed: holm, bonferroni, benjamini-hochberg, none")
    return adjusted.clip(max=1.0).tolist()


def decision_levels(p: Sequence[float], correction: str, level: float) -> list[float]:
    """Return for each p the unadjusted level that decides it: p is at or below it exactly if `adjust` rejects.

    An interval of that confidence leaves out the null value exactly if the test is rejected. A rejected test has the
    level of its own step, and every other test that of the first step that fails.

    Args:
        p: The p values of a family.
        correction: As for `adjust`.
        level: Level of the family.
    """
    m = len(p)
    rank = np.argsort(np.argsort(np.asarray(p, float), kind="stable"))
    rejected = np.asarray(adjust(p, correction)) <= level
    done = int(rejected.sum())
    if correction == "holm":
        return [level / (m - min(int(i), done)) for i in rank]
    if correction == "benjamini-hochberg":
        return [level * (done if out else done + 1) / m for out in rejected]
    return [first_level(m, correction, level)] * m


def first_level(tests: int, correction: str, level: float) -> float:
    """Return the level at which one test alone is rejected, whatever the others say: that of the first step."""
    return level if correction == "none" else level / max(1, tests)


def dunnett_blocked(baseline: Values, arms: Sequence[Values]) -> dict[str, list[float]]:
    """Test k arms against the baseline with Dunnett's two-sided test in the model loss ~ arm + seed.

    The test assumes equal noise in every arm. If one arm is 3-5 times noisier, the error rate rises to 0.08-0.12.
    Therefore it is reported beside Holm over paired t tests and never replaces them.
    Source: Dunnett, J. Am. Stat. Assoc. 50 (1955) 1096-1121.

    Returns:
        Per arm: effect = mean(baseline) - mean(arm) in nats, se = sqrt(2 MSE / n), t, df = k (n - 1), p, and p_adjusted
        from the multivariate t with correlation 1/2.
    """
    table = np.column_stack([np.asarray(baseline, float), *(np.asarray(a, float) for a in arms)])
    if not np.isfinite(table).all():
        raise ValueError("a loss is not finite; Dunnett needs every arm on every seed")
    n, k = len(table), table.shape[1] - 1
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    df = k * (n - 1)
    if n < 2 or not (residual**2).sum() > (1e-12 * np.abs(table).max()) ** 2:
        raise ValueError(f"n = {n} and residual spread {math.sqrt((residual**2).sum()):g}: no error to test against")
    se = math.sqrt(2 * float((residual**2).sum()) / df / n)
    effect = table[:, 0].mean() - table[:, 1:].mean(0)
    t = effect / se
    return {
        "effect": effect.tolist(),
        "se": [se] * k,
        "t": t.tolist(),
        "df": [df] * k,
        "p": (2 * stats.t.sf(np.abs(t), df)).tolist(),
        "p_adjusted": [_exceedance(abs(float(x)), k, df) for x in t],
    }


def _exceedance(c: float, k: int, df: int) -> float:
    # P(max |T_j| > c): given the common normal z and the common sd ratio s, the k statistics are independent
    s, w_s = sd_ratio_nodes(df)
    x, w_z = np.polynomial.hermite_e.hermegauss(80)
    w_z = w_z / math.sqrt(2 * math.pi)
    bound, shift = math.sqrt(2) * c * s[:, None], x[None, :]
    inside = special.ndtr(bound + shift) - special.ndtr(-bound + shift)
    return float(np.clip(1 - w_s @ (inside**k) @ w_z, 0.0, 1.0))
