"""Advise on the steps after a verdict: what to read, to browse and, if it is open or weak, to change."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.verdict.kinds import Comparison, Refusal, Result, Verdict
from analysis.verdict.ladder.kinds import Trend
from analysis.verdict.ladder.words import rungs_named
from analysis.verdict.words import CLAIM_SEEDS
from tune.study.own_study import OwnStudy
from tune.study.sections import ConfirmSection
from tune.study.study import Study

MOST_SEEDS: int = next(item.le for item in ConfirmSection.model_fields["seeds"].metadata if hasattr(item, "le"))
ROUNDING = 1e-12  # largest difference of equal losses, as a share of the loss
LONGER = 4  # factor for the tokens of a study that is too short to tell a linear MLP from the baseline
MOST_POINTS = 99  # of `calibrate.max_points`
ANOTHER = "under another name"
SAME = "then the same command: only the new seeds are trained"
SPENT = "has spent its level: a look at added seeds would err more often"
INSTEAD = "Named before a study runs, confirm.reserve: 0.2 or confirm.rule: e-process lets it add seeds"
INSTEAD_OF_WELCH = "confirm.test: welch has one look, so give the number of seeds before a study runs"


def next_steps(result: Result, study: Study, report: str, browse: str) -> list[str]:
    """Return the steps after a verdict, one line each.

    Args:
        result: The verdict.
        study: The study.
        report: Path of the report.
        browse: Command that shows the trials; empty if they were not logged.
    """
    steps = [f"Report:  {report}"]
    steps.append(f"Browse the trials: {browse}" if browse else "The trials were not sent to MLflow.")
    return [*steps, *to_change(result, study)]


def to_change(result: Result, study: Study) -> list[str]:
    """Return a change of the study file for each reason that weakens the verdict; else a line for further questions.

    Of a ladder, each begins with the rungs that it is about.
    """
    if not result.rungs or result.unfinished:
        return _of_verdict(result, study) or [_for_others(study)]
    about: dict[str, list[int]] = {}
    for rung in result.rungs:
        for step in _of_verdict(rung.result, study):
            about.setdefault(step, []).append(rung.rung)
    found = [f"{rungs_named(numbers).capitalize()}: {step}" for step, numbers in about.items()]
    if unsure := [row.label for row in result.trends if row.trend is Trend.UNDECIDED and not row.dropped_after]:
        found.append(f"Trend of {', '.join(unsure)}: a larger rung under scales, or more seeds per rung, {ANOTHER}")
    return found or [_for_others(study)]


def _for_others(study: Study) -> str:
    return (
        f"The verdict holds for this code, data and budget; for others: another study, {ANOTHER}"
        if study.shown
        else f"The verdict holds for this text, model and tokens; for others: corpus or model, {ANOTHER}"
    )


def _of_verdict(result: Result, study: Study) -> list[str]:
    """Return a change for each reason that weakens the verdict of a plain study or of one rung."""
    rows = [row for row in result.every if row.contrast or row.arm != result.floor]
    if not study.runs("confirm"):
        return [f"To decide: stages: {_list(study.stages)} -> [search, calibrate, confirm], {ANOTHER}"]
    if result.unfinished:
        return [f"To finish it: pagating sweep {study.name}, or the command that began it"]
    if isinstance(study, OwnStudy) and _seeds_are_alike(result.comparisons):
        return [_to_use_the_seed(result, study)]
    longer = _longer(study)
    found = _to_bracket(result.every, study)
    if rows and all(row.refusal is Refusal.FLOOR_DOES_NOT_LOSE for row in rows):
        return [*found, f"To make arms differ by more than the noise: {longer}"]
    if result.sensitivity.evidence_ended:
        floor = [row for row in result.comparisons if row.arm == result.floor]
        return [*found, *_to_count_diverged_runs(floor, study)]
    if result.sensitivity.too_few_seeds:
        return [*found, *_to_tell_the_floor(result, study, longer)]
    found += _to_calibrate(rows, study)
    undecided = [row for row in rows if row.kind is Verdict.UNDECIDED]
    if ended := [row for row in undecided if row.evidence_ended]:
        found += _to_count_diverged_runs(ended, study)
    if more := [row for row in undecided if not row.evidence_ended]:
        found += _to_decide(more, study)
    refused = [row for row in rows if row.kind is Verdict.NOT_TESTABLE]
    if refused:
        found.append(
            f"Not testable: {_arms(refused)}. The report gives the reason under what would change the conclusion"
        )
    seeds, reserve = study.confirm.seeds, study.confirm.reserve
    if not undecided and not refused and study.confirm.rule == "fixed" and seeds < CLAIM_SEEDS:
        found.append(
            f"For a claim: confirm.seeds: {seeds} -> {CLAIM_SEEDS}, {SAME}"
            if reserve
            else f"{seeds} seeds are preliminary. A claim needs {CLAIM_SEEDS}, and this study {_spent(study)}"
        )
    return found


def _seeds_are_alike(rows: Sequence[Comparison]) -> bool:
    """Return True if no difference from the baseline varies by more than rounding, and one is not 0."""
    each = [[d for d in row.differences if d is not None] for row in rows]
    most = max((abs(mean) for row in rows for mean in (row.baseline_mean, row.arm_mean) if mean is not None), default=0)
    alike = all(len(d) > 1 and max(d) - min(d) <= ROUNDING * most for d in each)
    return alike and any(d != 0 for differences in each for d in differences)


def _to_use_the_seed(result: Result, study: OwnStudy) -> str:
    """Return how the seeds of the user's own training may come to differ."""
    if isinstance(study.trial, str):
        how = f"use trial.seed or trial.rng(NAME) in {study.trial.partition(':')[0]}"
    else:
        how = "use the {seed} that the command is given"
    return (
        f"To make seeds differ: {how} for the first weights and the order of the data, {ANOTHER}; all seeds gave the "
        f"same {result.metric}, and pagating check tells if a seed is used"
    )


def _longer(study: Study) -> str:
    """Return how the trials of a study, or of the rungs of a ladder, become longer."""
    if not study.scales:
        tokens = study.fixed.tokens
        key = f"budget.{study.shown['tokens']}" if study.shown else "fixed.tokens"
        again = "" if study.shown else " (pagating plan says if a trial then reads its text more than once)"
        return f"{key}: {tokens} -> {LONGER * tokens}, {ANOTHER}{again}"
    if study.shown:
        return f"budget of each rung, times {LONGER}, {ANOTHER}"
    each = study.scales[-1].tokens_per_parameter
    if each is None:
        return f"tokens of each rung, times {LONGER}, {ANOTHER}"
    return f"tokens_per_parameter of each rung: {each:g} -> {LONGER * each:g}, {ANOTHER}"


def _to_tell_the_floor(result: Result, study: Study, longer: str) -> list[str]:
    """Return how the floor may be told from the baseline: with more seeds, or by trials that are `longer`.

    A study without a look left is run anew.
    """
    by_length = f"Or longer trials, in which the floor loses by more: {longer}"
    confirm, floor = study.confirm, [row for row in result.comparisons if row.arm == result.floor]
    if confirm.rule == "e-process" or confirm.reserve:
        return [*_to_decide(floor, study), by_length]
    if study.overlap and any(row.seeds_needed is None for row in floor):
        more = f"To tell the floor from {result.baseline}: a larger data set, because no number of splits is enough"
        return [more, by_length]
    seeds = confirm.looks[-1]
    if any((row.seeds_needed or 0) > MOST_SEEDS for row in floor):
        few = f"{MOST_SEEDS} seeds, the most of a study, are too few to tell the floor from {result.baseline}"
        return [f"{few}; longer trials, in which it loses by more: {longer}"]
    key = "seeds" if confirm.rule == "fixed" else "max_seeds"
    to = min(MOST_SEEDS, max(seeds + 1, *(row.seeds_needed or 2 * seeds for row in floor)))
    first = confirm.first_seed
    return [
        f"To tell the floor from {result.baseline}: confirm.first_seed: {first} -> {first + seeds} and confirm.{key}: "
        f"{seeds} -> {to}, {ANOTHER}",
        by_length,
    ]


def _to_count_diverged_runs(rows: Sequence[Comparison], study: Study) -> list[str]:
    """Return how arms may be decided whose evidence a diverged run has ended, which added seeds cannot."""
    first = study.confirm.first_seed
    return [
        f"{_arms(rows)}: a diverged run ended the evidence, so added seeds cannot decide. obrien-fleming counts such a "
        f"run as the worst: confirm.rule: {study.confirm.rule} -> obrien-fleming and confirm.first_seed: {first} -> "
        f"{first + study.confirm.looks[-1]}, {ANOTHER}"
    ]


def _spent(study: Study) -> str:
    """Return why a study cannot add seeds, and what a study has to name before it runs if it may want to."""
    if study.overlap:
        return "has made its one look. More splits help up to a limit only; a larger data set helps beyond it"
    return f"{SPENT}. {INSTEAD_OF_WELCH if study.confirm.test == 'welch' else INSTEAD}"


def _to_bracket(rows: Sequence[Comparison], study: Study) -> list[str]:
    """Return how the optima of all arms, the floor's too, may come to lie between finite points of the grids."""
    first, points = study.confirm.first_seed, study.calibrate.max_points
    fresh, found = first + study.confirm.looks[-1], []
    if edges := list(dict.fromkeys(arm for row in rows for arm in row.at_edge)):
        found.append(
            f"To find the learning rate of {', '.join(edges)}, which is an end of the grid: confirm.first_seed: "
            f"{first} -> {fresh} and calibrate.max_points: {points} -> {points + 2}, {ANOTHER}"
        )
    wanting: dict[str, dict[str, str]] = {}
    for row in rows:
        wanting |= {arm: sides for arm, sides in row.unbracketed.items() if arm not in row.at_edge}
    if wanting:
        found.append(
            f"To bracket the optimum of {', '.join(wanting)}: confirm.first_seed: {first} -> {fresh} and "
            f"calibrate.max_points: {points} -> {min(points + 4, MOST_POINTS)}, {ANOTHER}"
        )
    return found


def _to_calibrate(rows: Sequence[Comparison], study: Study) -> list[str]:
    """Return how the hyperparameters may be calibrated that the search alone chose."""
    if not rows or not rows[0].uncalibrated:
        return []
    instead = (
        f"{ANOTHER} and with confirm.first_seed: {study.confirm.first_seed + study.confirm.looks[-1]}"
        if study.runs("calibrate")
        else f"stages: {_list(study.stages)} -> [search, calibrate, confirm], {ANOTHER}"
    )
    return [f"To calibrate {', '.join(rows[0].uncalibrated)}, which the search alone chose: {instead}"]


def _to_decide(rows: Sequence[Comparison], study: Study) -> list[str]:
    """Return how undecided arms may be decided without an error rate above the level.

    The number of seeds is the one that decides with a power of 80% at the level of the next look, if the effects seen
    are the true ones. A study that has spent its level gets no such advice, however often it is asked.
    """
    confirm, cap = study.confirm, study.confirm.looks[-1]
    if confirm.rule == "obrien-fleming":
        return [f"{_arms(rows)}: undecided at the last look of {cap} seeds, and this study {_spent(study)}"]
    if confirm.rule == "fixed" and not confirm.reserve:
        return [f"{_arms(rows)}: undecided, and this study {_spent(study)}"]
    found = []
    within = [row for row in rows if (row.seeds_needed or MOST_SEEDS + 1) <= MOST_SEEDS and cap < MOST_SEEDS]
    if within:
        needed = max(row.seeds_needed or 0 for row in within)
        key, more = ("seeds", cap + 1) if confirm.rule == "fixed" else ("max_seeds", 2 * cap)
        to = min(MOST_SEEDS, max(needed, more))
        found.append(f"To decide {_arms(within)}: confirm.{key}: {cap} -> {to}, {SAME}")
    if beyond := [row for row in rows if row not in within]:
        found.append(
            f"{_arms(beyond)}: needs more than {MOST_SEEDS} seeds. Longer trials (fixed.tokens) may make arms differ "
            "more: another study, with a level of its own"
        )
    return found


def _arms(rows: Sequence[Comparison]) -> str:
    return ", ".join(row.label for row in rows)


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"
