"""One arm against the baseline: the numbers that a verdict rests on, and the refusals before them."""

from typing import Any

import numpy as np

from analysis.stats import estimates, paired_tests, power, sequential
from analysis.stats.pairs import Pairs

KEYS = [
    "arm",
    "baseline",
    "n",
    "improvement_percent",
    "improvement_low",
    "improvement_high",
    "mean_difference",
    "t",
    "df",
    "p_t",
    "p_sign_flip",
    "p_adjusted",
    "d_z",
    "mde_percent",
    "probability_of_improvement",
    "verdict",
    "why",
]


def measure(arm: str, baseline: str, pairs: Pairs, level: float, margin: float) -> dict[str, Any]:
    """The numbers of one comparison (margin in nats); `verdict` is set where no test can be made, else None.

    With a diverged run the mean-based numbers are those of the complete pairs, and `p_deciding` is the
    worst-rank test over all pairs (intention to treat); without one, `p_deciding` is the paired t test's p.
    """
    row: dict[str, Any] = dict.fromkeys(KEYS)
    d, keep = pairs.differences, pairs.complete
    b, a = pairs.baseline[keep], pairs.arm[keep]
    finite = b - a
    row |= {"arm": arm, "baseline": baseline, "n": len(pairs.seeds), "why": ""}
    row |= {
        "complete_pairs": int(keep.sum()),
        "seeds": pairs.seeds,
        "differences": [float(x) if np.isfinite(x) else None for x in np.where(keep, d, np.nan)],
        "dropped_seeds_baseline": pairs.dropped_baseline,
        "dropped_seeds_arm": pairs.dropped_arm,
        "diverged_seeds_baseline": pairs.diverged_baseline,
        "diverged_seeds_arm": pairs.diverged_arm,
        "baseline_mean": float(b.mean()) if len(b) else None,
        "arm_mean": float(a.mean()) if len(a) else None,
        "improvement_percent": estimates.improvement_percent(b, a),
        "mean_difference": float(finite.mean()) if len(b) else None,
        "probability_of_improvement": estimates.probability_of_improvement(pairs.baseline, pairs.arm),
        "margin": margin,
    }
    row |= dict.fromkeys(
        [
            "sd_difference",
            "pairing_gain",
            "p_tost",
            "tost_excludes",
            "tost_excludes_percent",
            "p_deciding",
            "p_worst_rank",
            "p_sign_test",
            "power_at_effect_seen",
            "e_value",
            "p_anytime",
            "at_edge",
            "seeds_needed",  # in all, where undecided, if the effect seen is the true one
        ]
    )
    row["path"] = []
    row["verdict"] = _refusal(pairs, d, b, a)
    if row["verdict"] == "identical":
        row |= {"p_sign_flip": 1.0, "d_z": 0.0}
    if not all(keep) and len(d) > 1 and row["verdict"] is None:
        row |= {"p_worst_rank": paired_tests.worst_rank(d), "p_sign_test": paired_tests.sign_test(d)}
        row["p_deciding"] = row["p_worst_rank"]
    if row["verdict"] is None and len(b) > 1 and not estimates.no_spread(b, a):
        _mean_based(row, b, a, level, margin)
        if all(keep):
            row["p_deciding"] = row["p_t"]
    return row


def _refusal(pairs: Pairs, d: np.ndarray, b: np.ndarray, a: np.ndarray) -> str | None:
    if not len(pairs.seeds):
        ran = pairs.dropped_arm or pairs.dropped_baseline
        if pairs.dropped_arm and pairs.dropped_baseline:
            return "not testable (no seed in common)"
        if ran and not pairs.dropped_baseline:
            return "not testable (no baseline runs)"
        return "not testable (no treatment runs)"
    if len(pairs.seeds) == 1:
        return "not testable (n=1)"
    if not pairs.complete.any() and not np.any(d):
        return "not testable (both arms diverged on every seed)"
    if not pairs.complete.all():
        return None
    if not np.any(d):
        return "identical"
    if estimates.no_spread(b, a):
        return "not testable (zero variance: check seeds were really different)"
    return None


def _mean_based(row: dict[str, Any], b: np.ndarray, a: np.ndarray, level: float, margin: float) -> None:
    d, n = b - a, len(b)
    sd = float(d.std(ddof=1))
    row["t"], row["df"], row["p_t"] = paired_tests.paired_t(d)
    if row["p_worst_rank"] is None:  # a mean of complete pairs only has no intention-to-treat sign-flip test
        row["p_sign_flip"], row["p_sign_flip_error"] = paired_tests.sign_flip(d)
    interval = estimates.fieller(b, a, level)
    row["improvement_low"], row["improvement_high"] = interval if interval else (None, None)
    row["d_z"] = float(d.mean()) / sd
    row["sd_difference"] = sd
    # what sharing seeds bought: sd of a difference of unpaired runs over that of the paired ones
    row["pairing_gain"] = float(np.sqrt(b.var(ddof=1) + a.var(ddof=1))) / sd
    row["e_value"] = sequential.e_value(row["t"], n)
    row["p_tost"] = paired_tests.tost(d, margin)[0]
    row["tost_excludes"] = paired_tests.tost_excludes(d, level)
    row["power_at_effect_seen"] = power.power(row["d_z"], n, level)
    if b.mean() > 0:
        row["mde_percent"] = 100 * power.detectable_d_z(n, level) * sd / float(b.mean())
        row["tost_excludes_percent"] = 100 * row["tost_excludes"] / float(b.mean())
