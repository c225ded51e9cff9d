"""Worth of an arm in training: the share of its budget by which the baseline would have to train longer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.io.assemble import Study
from analysis.stats import trend
from analysis.verdict.kinds import Comparison, Verdict, Worth
from analysis.verdict.words import worth_percent


def shorter(study: Study) -> dict[str, float]:
    """Return the arms that are the baseline with a share of its budget, and the share."""
    arms: dict[str, Any] = study.settings.get("arms") or {}
    return {
        arm: float(given["budget"])
        for arm, given in arms.items()
        if study.own and given.get("of") == study.baseline and (given.get("budget") or 1) < 1
        if not given.get("set") and not given.get("search")
    }


def measure_worth(row: Comparison, study: Study, losses: pd.DataFrame) -> None:
    """Set what an arm is worth in training of the baseline, with its interval, and say so among its reasons.

    The loss of the baseline against its budget is known at two budgets: its own and that of the shorter arm. All three
    have the same seeds. A metric that grows, or that is not above zero, is taken as it is, and a loss by its logarithm.
    """
    known = shorter(study)
    if study.own:
        row.worth = Worth()
    if not known or row.arm in known or row.baseline != study.baseline or study.unpaired:
        return
    if row.kind in (Verdict.IDENTICAL, Verdict.NOT_TESTABLE):
        return
    short = study.floor if study.floor in known else next(iter(known))
    seeds = losses[[row.baseline, row.arm, short]].dropna()
    b, a, s = seeds.to_numpy(float).T
    if len(seeds) < 3 or not np.isfinite(seeds.to_numpy()).all():
        return
    logs = study.sign > 0 and min(b.mean(), a.mean(), s.mean()) > 0
    found = trend.budget_factor(b, a, s, known[short], study.level, study.overlap, logs)
    moves = ("falls", "fall") if study.sign > 0 else ("rises", "rise")
    what = study.metric if study.own else "loss"
    if found is None:
        said = f"its worth in training is not known: the {what} of {row.baseline} does not clearly {moves[1]} with its"
        row.why += f"; {said} budget"
        return
    row.worth = Worth(*(100 * (factor - 1) for factor in (found.value, found.low, found.high)))
    row.why += (
        f"; {in_words(row)}, by how the {what} of {row.baseline} {moves[0]} between {100 * known[short]:g}% and 100% "
        "of its budget"
    )


def in_words(row: Comparison) -> str:
    """State what an arm is worth in training, such as `worth 13.0% more training [8.1, 19.2]`; "" if not known."""
    found = row.worth
    if found is None or found.training_percent is None or found.training_low is None or found.training_high is None:
        return ""
    return worth_percent(found.training_low, found.training_percent, found.training_high, "training")
