"""State a study's methods, and what would change its conclusion, from its own file and tables."""

from typing import Any

from analysis.describe.fairness import unfair
from analysis.io.assemble import RUNG, Study
from analysis.io.formats import Columns
from analysis.io.names import STAGES
from analysis.io.space import chosen_columns
from analysis.io.text import percent
from analysis.report.findings import Findings
from analysis.stats.optimum import LEAST_FREEDOM
from analysis.verdict import looks
from analysis.verdict.checks import STRONG_GAP, edge_hits
from analysis.verdict.grids import grids
from analysis.verdict.kinds import Refusal, Verdict
from analysis.verdict.words import CLAIM_SEEDS, called, open_sides, splits, were_searched, what_it_needs

_TESTS = {
    "holm": "Holm's correction",
    "bonferroni": "Bonferroni's correction",
    "benjamini-hochberg": "the Benjamini-Hochberg correction (false discovery rate)",
    "none": "no correction for several arms",
}


def methods(study: Study) -> list[str]:
    """Describe the methods, one sentence per item, with only what the study file says."""
    s = study.settings
    out = _ladder(study)
    for key, name in (
        ("trial", "Trains"),
        ("budget", "Budget of a trial"),
        ("resampling", "Each seed splits one data set"),
        ("corpus", "Corpus"),
        ("model", "Model"),
        ("fixed", "Held fixed"),
        ("nuisance", "Tuned in every arm"),
    ):
        if said := _said(study, key):
            out.append(f"{name}: {_flat(said)}.")
    arms = s.get("arms") or {}
    out.append("Arms: " + "; ".join(f"{a} ({_arm(o)})" for a, o in arms.items()) + "." if arms else "")
    out.append(_check(study))
    search, calibrate, confirm = (s.get(k) or {} for k in STAGES)
    if search.get("trials_per_arm") is not None:
        which = "arm with hyperparameters of its own" if search.get("arms") == "own" else "arm"
        out.append(
            f"Search: {_count(search['trials_per_arm'], 'trial')} per {which}, each arm on its own ({_flat(search)})."
        )
    stages = s.get("stages") or STAGES
    if calibrate.get("points") is not None and "calibrate" in stages:
        out.append(
            f"Calibration: all arms on {_grids(study)} of {calibrate['points']} or more points, "
            f"{_count(calibrate.get('seeds', 1), 'selection seed')} each; an arm takes "
            + ("the grid's best by mean." if calibrate.get("choice", "fit") == "grid" else "the fitted optimum.")
        )
    if not study.confirms:
        out.append("No confirm stage: each configuration was run with one seed, so nothing is tested or decided.")
        return [line for line in out if line]
    if confirm.get("seeds") is not None or study.rule != "fixed":
        same = "" if study.own else " (same initial bits and data order)"
        out.append(
            f"Confirmation: {_seeds(study)}, shared by all arms{same}{_stops(study)}. "
            f"Metric {study.metric} at the last step{_of_metric(study)}."
        )
    out.append(
        f"Decision: improvement is 100 * {_ratio(study)}, with Fieller's "
        f"{percent(1 - study.level)} interval. {_test(study)}, "
        f"{_TESTS[study.correction]} over all arms, level {study.level:.3g}; {_beside(study)} beside it. "
        f"Equivalence by two one-sided tests at a margin of {study.margin}, with the same correction. "
        f"{_diverged(study)} {_contrasts(study)}{_named(study)}"
    )
    return [line for line in out if line]


def arm_rows(found: Findings) -> list[dict[str, Any]]:
    """Return one row per arm: its role, its formula or what it sets, and the values that its search chose.

    A table from elsewhere has neither formulas nor settings, and so no row.
    """
    study = found.study
    given = study.settings.get("arms") or {}
    known = {} if study.own else (study.settings.get("provenance") or {}).get("formulas") or {}
    roles = {study.baseline: "baseline", study.floor: "floor"}
    return [
        {"arm": arm, "role": roles.get(arm), "is": known.get(arm) or _arm(_without_role(given[arm])) or "-"}
        | found.result.chosen.get(arm, {})
        for arm in study.arms
        if arm in given
    ]


def arm_columns(found: Findings) -> Columns:
    """Return the columns of `arm_rows`."""
    heading = "settings" if found.study.own else "activation"
    tuned = {key: column for key, column in chosen_columns(found.chosen).items() if key != "arm"}
    return {"arm": ("arm", ""), "role": ("role", ""), "is": (heading, ""), **tuned}


def _lucky(study: Study) -> list[str]:
    """Say so if one selection seed on few points cannot show the noise of a trial, which the fit needs."""
    calibrate = study.settings.get("calibrate") or {}
    rows = study.trials[study.trials["stage"] == "calibrate"]
    if calibrate.get("seeds") != 1 or calibrate.get("choice") != "fit" or rows.empty or study.first not in rows:
        return []
    points, arms = rows[study.first].nunique(), rows["arm"].nunique()
    if (arms - 1) * (points - 3) >= LEAST_FREEDOM:
        return []
    return [
        f"Two selection seeds, or more points: one seed on {points} points does not show the noise of a trial, so that "
        "a flat curve is chosen by luck."
    ]


def _without_role(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("baseline", "floor")}


GRADES = {
    "same bits": "a trial that is trained again gives the same bits",
    "same within noise": "a trial that is trained again differs by less than a tenth of what another seed changes",
    "unseeded": "a trial that is trained again differs about as much as one with another seed",
    "not checked": "`pagating check` was not run on these files, so nothing shows that seeds act as they should",
}


def _said(study: Study, key: str) -> Any:
    """Return a section of the study file as the methods state it: without what is tuned, and a text by its name."""
    section = study.settings.get(key)
    if key == "fixed" and section:
        return {name: value for name, value in section.items() if name not in (study.settings.get("nuisance") or {})}
    if key == "corpus" and section and not {"files", "hub"} & set(section):
        return {"the built-in text": None} | section
    return section


def _found_by_check(study: Study) -> dict[str, Any]:
    return (study.settings.get("provenance") or {}).get("check") or {}


def caveat(study: Study) -> str:
    """Return what `pagating check` found that weakens any verdict on the user's own training; else ""."""
    found = _found_by_check(study)
    if refused := found.get("refused"):
        return f"`pagating check` refused this training: {refused[0]}. So the p values may not hold."
    return _check(study) if found.get("grade") in ("unseeded", "not checked") else ""


def _check(study: Study) -> str:
    """State how far trials of the user's own training repeat themselves."""
    grade = _found_by_check(study).get("grade")
    return f"Check of the training: {grade}; {GRADES[grade]}." if grade in GRADES else ""


def _ratio(study: Study) -> str:
    ratio = f"mean(arm) / mean({study.baseline})"
    return f"(1 - {ratio})" if study.turn > 0 else f"({ratio} - 1)"


def _of_metric(study: Study) -> str:
    if study.own is None:
        return ", in nats per token"
    unit = f", in {study.unit}" if study.unit else ""
    return f" of {study.budget_unit}{unit}; a {study.better} value is better"


def _ladder(study: Study) -> list[str]:
    """Describe the rungs of a ladder, its level and its trends."""
    ladder = study.ladder
    if ladder is None:
        return []
    rows = "; ".join(f"rung {i}: {_flat(row)}" for i, row in enumerate(ladder.rows, 1))
    share = f"each with the level {ladder.level:g} / {ladder.planned}, which corrects the verdicts over the rungs"
    first, top = (rung.settings.get("stages") or STAGES for rung in (ladder.rungs[0], ladder.rungs[-1]))
    if "search" in first and "search" not in top:
        rows += (
            "; arms searched on rung 1 alone, and above it the calibration began at a prediction from the rungs below"
        )
    x = "the number of the rung" if ladder.axis == RUNG else f"log2({ladder.axis})"
    if ladder.joint:
        share = "with one correction over the arms of all rungs"
    return [
        f"Ladder of {ladder.planned} rungs, {share}, and with seeds of its own ({rows}).",
        f"Trend: the least-squares slope of the improvement on {x}, with equal weights, an interval at "
        f"{percent(1 - ladder.level)} with Welch's degrees of freedom, and p with {_TESTS[study.correction]} over "
        "the arms, apart from the verdicts on the rungs. An improvement grows or shrinks if that p is at most the "
        "level of the ladder. It turns if one rung says better and another worse. It holds if all rungs have the same "
        "verdict.",
    ]


def _contrasts(study: Study) -> str:
    """Name the contrasts, which belong to the family."""
    pairs = [f"{arm} against {reference}" for reference, arm in study.contrasts]
    return f"Contrasts of two arms, in the same family: {', '.join(pairs)}. " if pairs else ""


def _named(study: Study) -> str:
    """State what of the decision was named before the study ran."""
    later = [f"the arm{'s' if len(study.added) > 1 else ''} {', '.join(study.added)}"] if study.added else []
    if study.rule == "fixed" and len(study.made) > 1:
        later.append(f"the seeds after the first {study.made[0]}")
    if later:
        return f"It was named before the study ran, except {' and '.join(later)}."
    if study.rule == "e-process":
        return "All of it was named before the study ran; only the cap of the e-process may grow, at any time."
    return "All of it was named before the study ran."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _test(study: Study) -> str:
    if study.unpaired:
        return "Welch's two-sided t test of runs that are not pairs"
    if study.overlap:
        said = splits(study)
        return f"Two-sided paired t test over splits. {said[0].upper()}{said[1:]}"
    return f"Two-sided paired t test over seeds{_looks(study)}"


def _beside(study: Study) -> str:
    return "the paired test over seeds" if study.unpaired else "no other test" if study.overlap else "exact sign-flip p"


def _diverged(study: Study) -> str:
    return (
        "An arm with a run that diverged is not tested."
        if study.overlap
        else "A run that diverged keeps its place as the worst rank."
    )


def _looks(study: Study) -> str:
    if study.rule == "fixed" and study.reserve:
        parts = [f"{percent(share)} at {n} seeds" for n, share in zip(study.made, looks.shares(study), strict=True)]
        return (
            f" (p over the looks, each at its share of the level: {', '.join(parts)}; the intervals are at that level)"
        )
    if study.rule == "fixed":
        return ""
    return f" (p over all looks of the rule {study.rule}; the interval is that of the look's own level)"


def _stops(study: Study) -> str:
    return "; an arm that was decided at a look trained no further" if study.races else ""


def _seeds(study: Study) -> str:
    if study.rule == "fixed":
        return _count(study.settings["confirm"]["seeds"], "fresh seed")
    at = study.looks
    when = ", ".join(map(str, at)) if len(at) < 6 else f"every number from {at[0]} to {at[-1]}"
    return f"fresh seeds added by the rule {study.rule}, with looks at {when} seeds"


def _grids(study: Study) -> str:
    """Return the shared grids in words."""
    names = [called(name) for name in grids(study)]
    if names in ([], [called("lr")]):
        return "one shared learning-rate grid"
    return f"shared grids of {', '.join(names)}, each" if names[1:] else f"one shared grid of {names[0]}"


def would_change(found: Findings) -> list[str]:
    """List what could change the conclusion: sensitivity, seeds, grid ends, infeasible trials, unequal budgets."""
    study, result, ledger_rows = found.study, found.result, found.fairness
    out = []
    gap, check = result.sensitivity, _found_by_check(study)
    for refused in check.get("refused") or ():
        out.append(f"Another training: the check of it refused it ({refused}), so the p values may not hold.")
    if check.get("grade") == "not checked":
        out.append(f"A check of the training: {GRADES['not checked']}.")
    if gap.testable is False:
        what = "Another rule" if gap.evidence_ended else "More seeds" if gap.too_few_seeds else "Longer trials"
        out.append(f"{what}: {gap.why}.")
    elif gap.testable and not gap.strong:
        out.append(f"Longer trials: {gap.why}; below a gap of {STRONG_GAP:g}% the order of arms may still change.")
    elif gap.floor is None:
        what = "arms" if study.own else "activations"
        out.append(f"A floor arm: without one, nothing shows that this regime can tell {what} apart.")
    for row in result.every:
        if row.kind is Verdict.UNDECIDED:
            guide = "" if study.looks else " (if the effect seen is the true one)"
            out.append(f"{row.label}: {what_it_needs(row, study)}{guide}.")
        if study.rule == "fixed" and row.n < CLAIM_SEEDS and row.refusal is not Refusal.FLOOR_DOES_NOT_LOSE:
            out.append(f"{row.label}: {row.n} seeds; a claim asks for {CLAIM_SEEDS}.")
        if row.p_worst_rank is not None and not row.evidence_ended:
            out.append(f"{row.label}: diverged runs decide; if no run diverged, the t test would apply.")
    out += _lucky(study)
    hits = edge_hits(study)
    if hits:
        out.append(f"A wider grid: the learning rate of {', '.join(hits)} is an end of the calibration grid.")
    for arm, found_open in {a: f for row in result.comparisons for a, f in open_sides(row).items()}.items():
        each = ", ".join(f"{called(name)} ({why})" for name, why in found_open.items())
        out.append(f"More points: the best {each} of {arm} has no finite neighbour on each side.")
    if result.comparisons and (names := result.comparisons[0].uncalibrated):
        out.append(f"A calibrate stage for them: {were_searched(names)}, not calibrated.")
    for ledger_row in ledger_rows:
        total = sum(ledger_row[stage] for stage in STAGES)
        if ledger_row["infeasible"]:
            lost = ledger_row["infeasible"]
            out.append(f"{ledger_row['arm']}: {lost} of {total} trials infeasible ({100 * lost / total:.0f}%).")
    only_own = (study.settings.get("search") or {}).get("arms") == "own"
    out += [f"Equal budgets: {note}." for note in unfair(ledger_rows, only_own)]
    return out


def _arm(options: dict[str, Any]) -> str:
    # its roles, then its unit; an arm with neither gate nor unit is the stock model, whatever its base
    roles = [role for role in ("baseline", "floor") if options.get(role)]
    unit = {k: v for k, v in options.items() if k not in ("baseline", "floor")}
    if keys := {key: value for key, value in unit.items() if key in ("set", "search", "of", "budget") and value}:
        return ", ".join([*roles, _flat(keys)])  # of the user's own training
    stock = unit.get("gate") is None and unit.get("unit") is None
    if unit.get("unit") is not None:  # a unit sets the other options
        unit = {k: v for k, v in unit.items() if k in ("unit", "alpha")}
    return ", ".join([*roles, "stock activation" if stock else _flat(unit)])


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_nested(v)}" for k, v in value.items() if v is not None)
    return _nested(value)


def _nested(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + _flat(value) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_nested, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
