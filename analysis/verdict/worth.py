"""Worth of an arm in training: the share of its budget by which the baseline would have to train longer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.io.assemble import Study
from analysis.stats import trend
from analysis.verdict.kinds import Comparison, Verdict


def shorter(study: Study) -> dict[str, float]:
    """Return the arms that are the baseline with a share of its budget, and the share."""
    arms: dict[str, Any] = study.settings.get("arms") or {}
    return {
        arm: float(given["budget"])
        for arm, given in arms.items()
        if study.own and given.get("of") == study.baseline and (given.get("budget") or 1) < 1
        if not given.get("set") and not given.get("search")
    }


def worth(row: Comparison, study: Study, losses: pd.DataFrame) -> str:
    """State what an arm is worth in training of the baseline, with its interval; "" if nothing can be said.

    The loss of the baseline against its budget is known at two budgets: its own and that of the shorter arm. All three
    have the same seeds.
    """
    known = shorter(study)
    if not known or row.arm in known or row.baseline != study.baseline or study.unpaired or study.sign < 0:
        return ""
    if row.kind in (Verdict.IDENTICAL, Verdict.NOT_TESTABLE):
        return ""
    short, share = next(iter(known.items()))
    seeds = losses[[row.baseline, row.arm, short]].dropna()
    b, a, s = seeds.to_numpy(float).T
    if len(seeds) < 3 or not (np.isfinite(seeds.to_numpy()).all() and min(b.mean(), a.mean(), s.mean()) > 0):
        return ""
    found = trend.budget_factor(b, a, s, share, study.level, study.overlap)
    if found is None:
        return f"its worth in training is not known: the loss of {row.baseline} does not clearly fall with its budget"
    value, low, high = (100 * (factor - 1) for factor in (found.value, found.low, found.high))
    less = value < 0
    ends = f"[{-high:.1f}, {-low:.1f}]" if less else f"[{low:.1f}, {high:.1f}]"
    return (
        f"worth {abs(value):.1f}% {'less' if less else 'more'} training {ends}, by the fall of the loss of "
        f"{row.baseline} between {100 * share:g}% and 100% of its budget"
    )
