"""State the verdict of a study in its first lines: how firm it is, each arm, the gap of the floor, warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.io.assemble import Study
from analysis.io.names import PRELIMINARY
from analysis.io.space import chosen_values
from analysis.io.text import one_line, redact, values_line
from analysis.io.trials import confirm_rows
from analysis.verdict import looks, words
from analysis.verdict.checks import STRONG_GAP
from analysis.verdict.kinds import Comparison, Sensitivity, Verdict, in_question
from analysis.verdict.worth import in_words


@dataclass(frozen=True)
class Summary:
    """Verdict of a study in words: its beginning, one part per arm, and sentences after the arms.

    `rungs` has the whole verdict on each rung of a ladder, which `str` leaves out.
    """

    head: str
    parts: list[str]
    after: str
    rungs: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = self.head + (f" {'; '.join(self.parts)}." if self.parts else "")
        return f"{said} {self.after}".rstrip()


def summarise(rows: Sequence[Comparison], study: Study, floor: Sensitivity, unfinished: str) -> Summary:
    """Return the verdict of a study in words.

    Args:
        rows: Its comparisons, decided.
        study: The study.
        floor: Its assay sensitivity.
        unfinished: What the study still lacks; "" if it is complete.
    """
    asked, chosen = in_question(rows, study.floor), chosen_values(study)
    if unfinished:
        return Summary(f"Unfinished: {unfinished}. No arm is compared before the last trial has ended.", [], "")
    if not asked:
        return Summary("No treatment runs: there is nothing to compare with the baseline.", [], "")
    warnings, lost = _warnings(rows, study), looks.level_lost(study)
    lost = " ".join([*_infeasible(study), *([lost] if lost else []), ""])
    if all(row.refusal and row.refusal.of_floor for row in asked):
        said = words.headline(asked[0], study.margin)
        each = "; ".join(f"{arm}: {line}" for arm, values in chosen.items() if (line := values_line(values)))
        tuned = f"Chosen: {each}." if each else ""
        head = f"{lost}{said[0].upper()}{said[1:]}: {floor.why}."
        return Summary(head, [], " ".join(part for part in (tuned, *warnings) if part))
    base = values_line(chosen.get(study.baseline, {}))
    against = study.baseline + (f" ({base})" if base else "")
    head = f"{lost}{_seeds(asked, study)}, against {against}, on {study.metric}{_of_metric(study)}:"
    parts = [f"{row.label}: {_word(row, study)}{_numbers(row, study, chosen)}" for row in asked]
    capped = any(row.kind is Verdict.UNDECIDED and words.at_cap(row, study) for row in asked)
    cap = f"Undecided arms have had the last look, at {study.looks[-1]} seeds." if capped else ""
    return Summary(head, parts, " ".join(part for part in (_gap(floor, study), cap, *warnings) if part))


def _seeds(rows: Sequence[Comparison], study: Study) -> str:
    # how firm the verdict is, by the fewest seeds of an arm
    each, unit = sorted({_n(row, study) for row in rows}), words.samples(study)
    n = each[0]
    if study.rule != "fixed":
        return f"With {n}{f' to {each[-1]}' if each[1:] else ''} {unit} by the rule {study.rule}"
    if n < words.CLAIM_SEEDS:
        return f"{PRELIMINARY}, with {n} of the {words.CLAIM_SEEDS} {unit} that a claim needs"
    return f"With {n} {unit} (a claim needs {words.CLAIM_SEEDS})"


def _infeasible(study: Study) -> list[str]:
    # arms without a finite test metric: no number can be shown of them, and more seeds may not help
    said, trials = [], confirm_rows(study.trials)
    for arm, losses in study.losses().items():
        runs = losses.dropna()
        if len(runs) and np.isinf(runs).all():
            reasons = (
                [] if "reason" not in trials.columns else list(trials.loc[trials["arm"] == arm, "reason"].dropna())
            )
            why = f": {one_line(redact(str(reasons[0])))}" if reasons else ""
            text = f"{words.all_infeasible(str(arm), len(runs))}{why}."
            said.append(f"{text[0].upper()}{text[1:]}")
    return said


def _n(row: Comparison, study: Study) -> int:
    return min(row.of_table.n_baseline, row.of_table.n_arm) if study.unpaired and row.of_table else row.n


def _word(row: Comparison, study: Study) -> str:
    # the verdict; what an undecided arm needs follows its numbers
    if row.kind is Verdict.UNDECIDED:
        return words.headline(row, study.margin, study.unit)
    return row.verdict + _size(row, study)


def _size(row: Comparison, study: Study) -> str:
    # whether a difference that was found matters
    if row.kind not in (Verdict.BETTER, Verdict.WORSE) or row.mean_difference is None:
        return ""
    better = row.kind is Verdict.BETTER
    if (look := words.decided_early(row)) and row.mean_difference and (row.mean_difference > 0) != better:
        return f" by its look at {look} seeds, though the mean over all of them points the other way"
    if row.p_worst_rank is not None or not row.margin:
        return ""
    margin = f"the margin of {words.margin_text(study.margin, study.unit)}"
    if row.p_tost_adjusted is not None and row.p_tost_adjusted <= study.level:
        return f", but inside {margin}"
    least = _least(row, better)
    return f", beyond {margin}" if least is not None and least > row.margin else f", open whether beyond {margin}"


def _least(row: Comparison, better: bool) -> float | None:
    # the bound nearer to 0, in the metric's unit, of the interval that holds after selection, else of the plain one
    low, high = row.selected_low, row.selected_high
    if low is None or high is None:
        low, high = row.improvement_low, row.improvement_high
    if low is not None and high is not None and row.baseline_mean:
        scale = abs(row.baseline_mean) / 100
        return scale * (low if better else -high)
    table = row.of_table
    if table is None:
        return None
    low, high = table.difference_selected_low, table.difference_selected_high
    if low is None or high is None:
        low, high = table.difference_low, table.difference_high
    return None if low is None or high is None else low if better else -high


def _gap(floor: Sensitivity, study: Study) -> str:
    if floor.floor is None:
        return "" if study.table else "No floor was run, so nothing shows that this regime can tell arms apart."
    if not floor.testable or floor.gap_percent is None or floor.gap_low is None or floor.gap_low <= 0:
        return f"Floor: {floor.why}."
    than = "more" if floor.strong else "less"
    gap = f"The floor {floor.floor} loses by {floor.gap_percent:.2f}% [{floor.gap_low:.2f}, {floor.gap_high:.2f}]"
    return f"{gap}, {than} than the {STRONG_GAP:g}% that ranking arms needs."


def _warnings(rows: Sequence[Comparison], study: Study) -> list[str]:
    # of all rows: a floor that is tuned badly gates the other arms too
    edges = dict.fromkeys(arm for row in rows for arm in row.at_edge)
    warnings = [f"Warning: the learning rate of {', '.join(edges)} is an end of the grid."] if edges else []
    open_sides: dict[str, dict[str, str]] = {}
    for row in rows:
        open_sides |= words.open_sides(row)
    for arm, found in open_sides.items():
        each = [f"{words.called(name)} ({why})" for name, why in found.items()]
        warnings.append(f"Warning: no bracket around the best {' and the best '.join(each)} of {arm}.")
    if rows and rows[0].uncalibrated:
        warnings.append(f"Warning: {words.were_searched(rows[0].uncalibrated)}, not calibrated.")
    if odd := [f"{row.label} ({', '.join(row.odd_runs)})" for row in rows if row.odd_runs]:
        warnings.append(f"Warning: runs far from the rest: {'; '.join(odd)}; {words.IF_ODD}.")
    if beyond := looks.beyond_bound(study):
        warnings.append(beyond)
    if study.added:
        said = words.added(study)
        warnings.append(f"{said[0].upper()}{said[1:]}.")
    return warnings


def _of_metric(study: Study) -> str:
    # what a table from elsewhere leaves open: direction and task
    if study.facts is None:
        return ""
    way = f" ({'higher' if study.facts.higher_is_better else 'lower'} is better)"
    if study.facts.tasks:
        return f"{way}, mean over {len(study.facts.tasks)} tasks of the relative difference"
    return f"{way}, task {study.facts.task}" if study.facts.task else way


def _numbers(row: Comparison, study: Study, chosen: Mapping[str, Mapping[str, float]]) -> str:
    # the improvement with its interval, the number of pairs that they are made of, and what was tuned
    value = row.improvement_percent
    n = f"n = {row.n}" if row.complete_pairs in (0, row.n) else f"n = {row.complete_pairs} of {row.n}"
    tuned = values_line(chosen.get(row.arm, {}))
    open_ = row.kind is Verdict.UNDECIDED and not words.at_cap(row, study)  # what all of them need is said once
    needs = words.what_it_needs(row, study) if open_ else ""
    percent = "" if value is None else f"{value:+.2f}%{_interval(row)}"
    if row.of_table is None:
        return _brackets(percent, n if percent else "", tuned, needs)
    if row.mean_difference is None:
        return _brackets(needs)
    if study.unpaired:
        n = f"n = {row.of_table.n_baseline} + {row.of_table.n_arm}"
    low, high = row.of_table.difference_low, row.of_table.difference_high
    own = f"{row.mean_difference:+.4g}" + ("" if low is None else f" [{low:+.4g}, {high:+.4g}]")
    relative = bool(study.facts is None or study.facts.tasks)  # then its own unit is a percentage, or in the table
    difference = "" if relative and percent else own + words.in_unit(study)
    return _brackets(difference, percent, in_words(row), n, tuned, needs)


def _brackets(*parts: str) -> str:
    said = ", ".join(part for part in parts if part)
    return f" ({said})" if said else ""


def _interval(row: Comparison) -> str:
    return "" if row.interval is None else " [{:+.2f}, {:+.2f}]".format(*row.interval)
