"""Advise on the steps after a verdict: what to read, to browse and, if it is open or weak, to change."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.verdict.kinds import Comparison, Refusal, Result, Verdict
from analysis.verdict.words import CLAIM_SEEDS
from tune.study.sections import ConfirmSection
from tune.study.study import Study

MOST_SEEDS: int = next(item.le for item in ConfirmSection.model_fields["seeds"].metadata if hasattr(item, "le"))
LONGER = 4  # factor for the tokens of a study that is too short to tell a linear MLP from the baseline
ANOTHER = "under another name"
SAME = "then the same command: only the new seeds are trained"


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
    """Return a change of the study file for each reason that weakens the verdict; else a line for further questions."""
    rows = [row for row in result.comparisons if row.arm != result.floor]
    if not study.runs("confirm"):
        return [f"To decide: stages: {_list(study.stages)} -> [search, calibrate, confirm], {ANOTHER}"]
    tokens = study.fixed.tokens
    longer = f"fixed.tokens: {tokens} -> {LONGER * tokens}, {ANOTHER}"
    if rows and all(row.refusal is Refusal.FLOOR_DOES_NOT_LOSE for row in rows):
        return [f"To make arms differ by more than the noise: {longer}"]
    found = []
    if edges := list(dict.fromkeys(arm for row in rows for arm in row.at_edge)):
        points = study.calibrate.max_points
        found.append(
            f"To find the learning rate of {', '.join(edges)}, which is an end of the grid: "
            f"calibrate.max_points: {points} -> {points + 2}, {ANOTHER}"
        )
    undecided = [row for row in rows if row.kind is Verdict.UNDECIDED]
    within = [row for row in undecided if (row.seeds_needed or MOST_SEEDS + 1) <= MOST_SEEDS]
    if within:
        found.append(f"To decide {_arms(within)}: {_more(within, study)}")
    if beyond := [row for row in undecided if row not in within]:
        found.append(f"{_arms(beyond)}: needs more than {MOST_SEEDS} seeds; {longer}; or a larger confirm.margin")
    refused = [row for row in rows if row.kind is Verdict.NOT_TESTABLE]
    if refused:
        found.append(
            f"Not testable: {_arms(refused)}. The report gives the reason under what would change the conclusion"
        )
    seeds = study.confirm.seeds
    if not undecided and not refused and study.confirm.rule == "fixed" and seeds < CLAIM_SEEDS:
        found.append(f"For a claim: confirm.seeds: {seeds} -> {CLAIM_SEEDS}, {SAME}")
    if not found:
        found.append(f"The verdict holds for this text, model and tokens; for others: corpus or model, {ANOTHER}")
    return found


def _more(rows: Sequence[Comparison], study: Study) -> str:
    """Return the change to the number of seeds that decides all rows if the observed effects are the true ones."""
    confirm, needed = study.confirm, max(row.seeds_needed or 0 for row in rows)
    if confirm.rule == "fixed":
        return f"confirm.seeds: {confirm.seeds} -> {max(needed, confirm.seeds + 1)}, {SAME}"
    cap = confirm.looks[-1]
    more = min(MOST_SEEDS, max(needed, 2 * cap))
    how = SAME if confirm.rule == "e-process" else ANOTHER
    return f"confirm.max_seeds: {cap} -> {more}, {how}"


def _arms(rows: Sequence[Comparison]) -> str:
    return ", ".join(row.arm for row in rows)


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"
