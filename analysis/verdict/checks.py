"""Check a study before its verdict holds: assay sensitivity, ends of the grid, missing cells."""

from collections.abc import Sequence

import numpy as np

from analysis.io.assemble import Ladder, Study
from analysis.io.space import search_trials
from analysis.io.trials import confirm_rows
from analysis.verdict import looks
from analysis.verdict.grids import grid_rows
from analysis.verdict.kinds import Comparison, Refusal, Sensitivity, Verdict

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
    gap, low, high = (None if value is None else 0.0 - value for value in values)
    out.gap_percent, out.gap_low, out.gap_high, out.n, out.p = gap, low, high, row.n, row.p_t
    if row.p_worst_rank is not None:  # a floor that diverges loses, whatever its other runs show
        out.testable, out.gap_low, out.gap_high = row.kind is Verdict.WORSE, None, None
        out.evidence_ended = row.kind is Verdict.UNDECIDED and row.evidence_ended
        out.too_few_seeds = row.kind is Verdict.UNDECIDED and not row.evidence_ended
        by = "by ranks, because a run diverged"
        if row.evidence_ended:
            by = "and a diverged run ended its evidence" if out.evidence_ended else "by the looks before a run diverged"
        said = row.kind if row.evidence_ended else row.verdict
        out.why = f"{study.floor} is {said} {by} (n = {row.n})"
        return out
    if row.kind is Verdict.WORSE and row.path and not (low is not None and low > 0):
        out.testable = True
        out.why = f"{study.floor} was worse than {study.baseline} at an earlier look, which decides (n = {row.n})"
        return out
    out.testable = low is not None and low > 0
    out.strong = bool(out.testable and gap is not None and gap >= STRONG_GAP)
    in_percent = row.margin / abs(row.baseline_mean) * 100 if row.baseline_mean else 0.0
    if row.of_table and gap is None and row.of_table.difference_high is not None:
        low, high = -row.of_table.difference_high, -(row.of_table.difference_low or 0.0)
        out.testable, out.too_few_seeds = low > 0, low <= 0 and high > row.margin
        said = _behind(-(row.mean_difference or 0.0), low, high, ("+.4g", ""))
        out.why = f"{study.floor} is {said} than {study.baseline} (n = {row.n})"
        out.why += "" if out.testable else ", not clearly worse"
        return out
    if gap is None or low is None or high is None:
        out.too_few_seeds = row.refusal is Refusal.ONE_SEED or (row.p_t is not None and low is None)
        out.why = f"the gap between {study.floor} and {study.baseline} has no interval: {row.why}"
        return out
    out.too_few_seeds = not out.testable and high > in_percent
    said = _behind(gap, low, high, ("+.2f", "%"))
    out.why = f"{study.floor} is {said} than {study.baseline} (n = {row.n})"
    if out.too_few_seeds:
        out.why += f", not clearly worse, and a gap above the margin of {study.margin} is not excluded"
    elif not out.testable:
        out.why += f", and a gap above the margin of {study.margin} is excluded"
    elif not out.strong:
        out.why += f", below the {STRONG_GAP:g}% that ranking arms asks for"
    return out


def _behind(gap: float, low: float, high: float, form: tuple[str, str]) -> str:
    """Return a gap with its interval in words: `+0.09% [-0.07, +0.26] worse`; a floor that is ahead is `better`."""
    (spec, unit), word = form, "worse" if gap >= 0 else "better"
    if gap < 0:
        gap, low, high = -gap, -high, -low
    return f"{gap:{spec}}{unit} [{low:{spec}}, {high:{spec}}] {word}"


def edge_hits(study: Study) -> list[str]:
    """Return the arms whose confirmed learning rate is an end of the calibration grid; a better one may lie outside.

    For other hyperparameters `unbracketed` says so, which knows their legal ends.
    """
    if "lr" not in study.trials.columns:
        return []
    grid, confirm = grid_rows(study, "lr"), confirm_rows(study.trials)
    hits = []
    for arm in study.arms:
        points = np.unique(grid.loc[grid["arm"] == arm, "lr"].to_numpy(float))
        chosen = confirm.loc[confirm["arm"] == arm, "lr"].dropna().unique()
        if len(points) and any(np.isclose(lr, e, rtol=1e-6) for lr in chosen for e in (points[0], points[-1])):
            hits.append(arm)
    return hits


def not_begun(ladder: Ladder) -> str:
    """State which rungs of a ladder have no trial yet."""
    first, last = len(ladder.rungs) + 1, ladder.planned
    if first == last:
        return f"rung {first} of {last} has not begun"
    return f"rungs {first} to {last} of {last} have not begun"


def unfinished(study: Study) -> str:
    """Count the trials that the study file asks for and the tables lack; return "" if none, or without a study file.

    Of a ladder, count the rungs that have not begun too.
    """
    if (ladder := study.ladder) and len(ladder.rungs) < ladder.planned:
        return not_begun(ladder)
    arms, confirm = study.settings.get("arms"), study.settings.get("confirm") or {}
    if not arms:
        return ""
    search = study.trials[study.trials["stage"] == "search"]
    asked = {arm: search_trials(study, arm) or 0 for arm in arms}
    if all(asked.values()) and len(search) and (search["outcome"].isin(("infeasible", "failed"))).all():
        whole = len(search) >= sum(asked.values())
        return "no search trial could be trained" if whole else _count(len(search), sum(asked.values()), "search")
    if not study.confirms:
        counts = search["arm"].value_counts()
        done = [min(int(counts.get(arm, 0)), asked[arm]) for arm in arms]
        return _count(sum(done), sum(asked.values()), "search")
    confirmed = confirm_rows(study.trials)
    for arm, rows in confirmed.groupby("arm", sort=False) if study.own else ():  # the user's own code is at fault
        if (rows["outcome"] == "failed").all():
            said = rows["reason"].dropna() if "reason" in rows.columns else rows["seed"].iloc[:0]
            return f"each confirm trial of {arm} failed" + (f", the first one: {said.iloc[0]}" if len(said) else "")
    seeds = confirmed.groupby("arm")["seed"].nunique()
    ended, there = {arm: int(seeds.get(arm, 0)) for arm in arms}, looks.order(study)
    planned = study.looks or ((int(confirm["seeds"]),) if confirm.get("seeds") else ())
    if not planned:
        return ""
    every = tuple(sorted({*study.made, *planned}))
    going = looks.to_come(study, there, every)
    goal = {arm: max(n, min(every), going.get(arm, 0)) for arm, n in there.reached.items()}
    for arm in goal if study.looks else ():  # an arm that was stopped in the middle between two looks
        goal[arm] = next((n for n in every if n >= goal[arm]), goal[arm])
    # an arm may have more seeds than its goal, of an earlier run
    missing = _count(sum(min(ended[arm], goal[arm]) for arm in goal), sum(goal.values()), "confirm")
    return f"{missing} to the next look" if missing and study.looks else missing


def _count(done: int, planned: int, stage: str) -> str:
    return f"{done} of {planned} {stage} trials" if done < planned else ""
