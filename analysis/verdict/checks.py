"""Check a study before its verdict holds: assay sensitivity, ends of the grid, missing cells."""

from collections.abc import Sequence

import numpy as np

from analysis.io.assemble import Study
from analysis.io.space import search_trials
from analysis.io.trials import confirm_rows
from analysis.verdict import looks
from analysis.verdict.kinds import Comparison, Sensitivity

STRONG_GAP = 3.0  # percent by which the floor must lose before the order of the arms can be trusted


def assay(rows: Sequence[Comparison], study: Study) -> Sensitivity:
    """Measure how much worse the floor is than the baseline, in percent; it is testable if the interval is above zero.

    The floor must lose. Otherwise the regime cannot tell arms apart, and no verdict on them holds.
    """
    out = Sensitivity(study.floor, study.baseline)
    row = next((row for row in rows if row.arm == study.floor), None)
    if row is None:
        return out
    values = (row.improvement_percent, row.improvement_high, row.improvement_low)
    gap, low, high = (None if value is None else -value for value in values)
    out.gap_percent, out.gap_low, out.gap_high, out.n, out.p = gap, low, high, row.n, row.p_t
    out.testable = low is not None and low > 0
    out.strong = bool(out.testable and gap is not None and gap >= STRONG_GAP)
    if row.of_table and gap is None and row.of_table.difference_high is not None:
        low, high = -row.of_table.difference_high, -(row.of_table.difference_low or 0.0)
        out.testable = low > 0
        out.why = f"{study.floor} is {-(row.mean_difference or 0.0):+.4g} [{low:+.4g}, {high:+.4g}] worse than "
        out.why += f"{study.baseline} (n = {row.n})" + ("" if out.testable else ", not clearly above zero")
        return out
    if gap is None or low is None:
        out.why = f"the gap between {study.floor} and {study.baseline} has no interval: {row.why}"
        return out
    out.why = f"{study.floor} is {gap:+.2f}% [{low:+.2f}, {high:+.2f}] worse than {study.baseline} (n = {row.n})"
    if not out.testable:
        out.why += ", not clearly above zero"
    elif not out.strong:
        out.why += f", below the {STRONG_GAP:g}% that ranking arms asks for"
    return out


def edge_hits(study: Study) -> list[str]:
    """Return the arms whose confirmed learning rate is an end of the calibration grid; a better one may lie outside."""
    if "lr" not in study.trials.columns:
        return []
    grid = study.trials[(study.trials["stage"] == "calibrate") & study.trials["lr"].notna()]
    confirm = confirm_rows(study.trials)
    hits = []
    for arm in study.arms:
        points = np.unique(grid.loc[grid["arm"] == arm, "lr"].to_numpy(float))
        chosen = confirm.loc[confirm["arm"] == arm, "lr"].dropna().unique()
        if len(points) and any(np.isclose(lr, e, rtol=1e-6) for lr in chosen for e in (points[0], points[-1])):
            hits.append(arm)
    return hits


def unfinished(study: Study) -> str:
    """Name the cells that the study file asks for and the tables lack; return "" if none, or without a study file."""
    arms, confirm = study.settings.get("arms"), study.settings.get("confirm") or {}
    if not arms:
        return ""
    search = study.trials[study.trials["stage"] == "search"]
    asked = {arm: search_trials(study, arm) or 0 for arm in arms}
    if any(asked.values()) and len(search) and (search["outcome"].isin(("infeasible", "failed"))).all():
        done = len(search) >= sum(asked.values())
        return "no search trial could be trained" if done else "search has not ended"
    if not study.confirms:
        counts = search["arm"].value_counts()
        short = [arm for arm in arms if counts.get(arm, 0) < asked[arm]]
        return f"search: {short[0]} has {counts.get(short[0], 0)} of {asked[short[0]]} trials" if short else ""
    seeds = confirm_rows(study.trials).groupby("arm")["seed"].nunique()
    ended, there = {arm: int(seeds.get(arm, 0)) for arm in arms}, looks.order(study)
    planned = study.looks or ((int(confirm["seeds"]),) if confirm.get("seeds") else ())
    if not planned:
        return ""
    every = tuple(sorted({*study.made, *planned}))
    going = looks.to_come(study, there, every)
    lacking = [arm for arm, n in there.reached.items() if ended[arm] < n or n < min(every) or arm in going]
    if study.looks:  # an arm that was stopped in the middle between two looks
        lacking += [arm for arm, n in there.reached.items() if n not in every and n < every[-1]]
    if not lacking:
        return ""
    fewest = min(lacking, key=lambda arm: ended[arm])
    return f"confirm: {fewest} has {ended[fewest]} of {planned[-1]} seeds"
