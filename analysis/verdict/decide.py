"""Decide every arm against the baseline, with p adjusted for the number of arms.

`pagating significance STUDY|TABLE`.

The primary test is the two-sided paired t test over seeds; if a run diverged, it is the worst-rank test over all pairs.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from analysis.io import command, formats
from analysis.io.assemble import Ladder, Study, margin_in_nats
from analysis.io.files import TableError
from analysis.io.space import chosen_values
from analysis.stats import estimates, multiplicity, paired_tests, power
from analysis.stats.pairs import Pairs
from analysis.verdict import elsewhere, family, looks, odd_runs, words
from analysis.verdict.checks import assay, edge_hits, unfinished
from analysis.verdict.comparison import measure
from analysis.verdict.exits import add_require_verdict, end
from analysis.verdict.family import Part
from analysis.verdict.grids import unbracketed, uncalibrated
from analysis.verdict.kinds import Comparison, Refusal, Result, Sensitivity, Verdict, as_object, rows_of_rungs
from analysis.verdict.ladder.decide import missing as lacking
from analysis.verdict.ladder.decide import rungs_of, trends
from analysis.verdict.ladder.words import summarise as of_ladder
from analysis.verdict.summary import summarise
from analysis.verdict.worth import measure_worth

SCHEMA = 1


def verdict(study: Study) -> dict[str, Any]:
    """Decide a study; return the object of verdict.json, whose numbers are finite or null."""
    return as_object(decide(study))


def decide(study: Study) -> Result:
    """Compare every arm of a study with its baseline and decide; tasks of a table are decided as one family more.

    The verdict of a ladder is that of its highest rung, with the verdicts of all rungs and the trends.
    """
    if study.ladder:
        return _decide_ladder(study, study.ladder)
    (result,) = _decide_family([study])
    if study.table and study.table.tasks:
        result.tasks = _decide_family(study.table.tasks)
    return result


def _decide_ladder(study: Study, ladder: Ladder) -> Result:
    results = _decide_family(ladder.rungs) if ladder.joint else [decide(rung) for rung in ladder.rungs]
    rungs = rungs_of(ladder, results)
    missing, top = lacking(ladder, rungs), results[-1]
    found = replace(top, rungs=rungs, unfinished=missing, trends=[] if missing else trends(study, rungs))
    if missing:
        found.comparisons, found.contrasts = (
            [_untold(row, missing) for row in rows] for rows in (top.comparisons, top.contrasts)
        )
        found.sensitivity = Sensitivity(study.floor, study.baseline, why=f"unfinished: {missing}")
    return replace(found, summary=str(of_ladder(study, found)))


def _decide_family(studies: Sequence[Study]) -> list[Result]:
    # the studies differ in their losses only; p is adjusted over all their arms
    parts = [_measured(study) for study in studies]
    rows = [row for part in parts for row in part.rows]
    family.correct(rows, studies[0])
    return [_result(part, len(rows)) for part in parts]


def _measured(study: Study) -> Part:
    losses = study.losses()
    paired = {(reference, arm): looks.paired(study, losses, reference, arm) for reference, arm in study.comparisons}
    baseline_losses = losses[study.baseline].to_numpy(float)
    margin = _margin(study, study.sign * baseline_losses[np.isfinite(baseline_losses)])
    rows = [
        measure(arm, reference, pairs, study.level, margin, study.sign) for (reference, arm), pairs in paired.items()
    ]
    for row in rows:
        row.contrast = row.baseline != study.baseline
    if study.facts or study.unpaired:
        rows = [elsewhere.describe(row, paired[row.baseline, row.arm], losses, study) for row in rows]
    hits, open_sides, searched_only = edge_hits(study), unbracketed(study), uncalibrated(study)
    for row in rows if not study.confirms else []:
        row.kind, row.refusal = Verdict.NOT_TESTABLE, Refusal.NO_CONFIRM_STAGE
    looks.look(rows, paired, losses, study)
    for row in rows:
        row.at_edge = [arm for arm in (row.baseline, row.arm) if arm in hits]
        row.unbracketed = {arm: open_sides[arm] for arm in (row.baseline, row.arm) if arm in open_sides}
        row.uncalibrated = searched_only
    return Part(study, losses, paired, margin, rows)


def _margin(study: Study, baseline: np.ndarray) -> float | None:
    # a percentage of a table's baseline has a meaning only if its mean is clearly above zero
    of_mean = study.facts and len(baseline) and str(study.margin).strip().endswith("%")
    if of_mean and not estimates.clearly_positive(baseline, study.level, study.overlap):
        if study.own or "margin" not in (study.settings.get("confirm") or {}):
            return None
        raise TableError(
            f"{study.name}: --margin {study.margin} of a mean of {baseline.mean():g}, which is not clearly above zero; "
            f"allowed: a number{words.in_unit(study)}: --margin NUMBER"
        )
    mean = float(baseline.mean()) if len(baseline) else 1.0
    return margin_in_nats(study.margin, mean, str(study.folder or study.name), study.unit)


def _result(part: Part, size: int) -> Result:
    study, losses, rows, missing = part.study, part.losses, part.rows, unfinished(part.study)
    if missing:
        rows = [_untold(row, missing) for row in rows]
        sensitivity = Sensitivity(study.floor, study.baseline, why=f"unfinished: {missing}")
    else:
        sensitivity = _judge(part, size)
    return Result(
        schema=SCHEMA,
        study=study.table.task if study.table and study.table.task else study.name,
        question=study.question,
        metric=study.metric,
        level=study.level,
        correction=study.correction,
        comparisons=[row for row in rows if not row.contrast],
        contrasts=[row for row in rows if row.contrast],
        overlap=study.overlap,
        sensitivity=sensitivity,
        margin=study.margin,
        margin_nats=part.margin,
        baseline=study.baseline,
        floor=study.floor,
        rule=study.rule,
        looks=list(study.looks),
        summary=str(summarise(rows, study, sensitivity, missing)),
        seeds={arm: [int(s) for s in losses[arm].dropna().index] for arm in study.arms},
        losses_sha256=hashlib.sha256(losses.to_csv().encode()).hexdigest(),
        data_digest=_find(study.settings, "digest"),
        commit=_find(study.settings, "commit"),
        versions=dict(_versions()),
        unfinished=missing,
        chosen=chosen_values(study),
        facts=None if study.facts is None else words.facts(study.facts),
    )


def _judge(part: Part, size: int) -> Sensitivity:
    # decide every row; if the floor does not lose, no other verdict holds
    study, rows = part.study, part.rows
    odd_runs.mark(part, size)
    for row in rows:
        _decide(row, part, size)
    sensitivity = assay(rows, study)
    refusal = Refusal.TOO_FEW_SEEDS if sensitivity.too_few_seeds else Refusal.FLOOR_DOES_NOT_LOSE
    refusal = Refusal.EVIDENCE_ENDED if sensitivity.evidence_ended else refusal
    for row in rows if sensitivity.testable is False else []:
        if row.contrast or row.arm != study.floor:
            row.why = f"{sensitivity.why}; alone it would read: {row.verdict}; {row.why}"
            row.kind, row.refusal = Verdict.NOT_TESTABLE, refusal
            row.verdict = words.sentence(row, study)
    for row in rows:
        measure_worth(row, study, part.losses)
    _secondary(rows, part.paired, study)
    return sensitivity


def _untold(row: Comparison, missing: str) -> Comparison:
    # before the last trial has ended, no number of a comparison is shown: to see one is a look
    why = f"unfinished: {missing}"
    kind = Verdict.UNFINISHED
    return Comparison(row.arm, row.baseline, row.n, verdict="unfinished", why=why, kind=kind, contrast=row.contrast)


@cache
def _versions() -> dict[str, str]:
    names = ("numpy", "pandas", "scipy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _decide(row: Comparison, part: Part, size: int) -> None:
    study = part.study
    notes: list[str] = []
    p = row.p_adjusted
    equivalent = row.p_tost_adjusted is not None and row.p_tost_adjusted <= study.level
    if row.refused:
        notes.append(words.why_refused(row))
    elif p is not None and p <= study.level:
        direction = _direction(row)
        row.kind = Verdict.BETTER if direction > 0 else Verdict.WORSE
        family.after_selection(row, part, size)
        notes.append(
            f"adjusted p = {p:.3g} ({study.correction}) <= {study.level:g} over n = {row.n} {words.samples(study)}"
        )
        if equivalent:
            notes.append(f"yet the difference is smaller than the margin of {study.margin}")
    elif equivalent:
        row.kind = Verdict.NO_DIFFERENCE
        notes.append(
            f"adjusted TOST p = {row.p_tost_adjusted:.3g} ({study.correction}) <= {study.level:g} at that margin over "
            f"n = {row.n} {words.samples(study)}"
        )
    else:
        row.kind, row.seeds_needed = Verdict.UNDECIDED, _total_seeds(row, study)
        notes.append(
            f"adjusted p = {p:.3g} ({study.correction}) > {study.level:g}"
            + (
                ""
                if row.p_tost_adjusted is None
                else f", adjusted TOST p = {row.p_tost_adjusted:.3g} > {study.level:g}"
            )
        )
    row.verdict = words.sentence(row, study)
    row.why = "; ".join([*notes, *words.caveats(row, study)])


def _direction(row: Comparison) -> float:
    # the sign is that of the test that decided, at the look at which it did
    if row.path:
        return float(row.path[-1]["direction"])
    if row.p_worst_rank is None:
        return row.mean_difference or 0.0
    if row.of_table and not row.seeds:
        return (row.probability_of_improvement or 0.0) - 0.5
    return paired_tests.rank_sum(_with_divergence(row))


def _with_divergence(row: Comparison) -> np.ndarray:
    arm, base = set(row.diverged_seeds_arm), set(row.diverged_seeds_baseline)
    values = []
    for seed, d in zip(row.seeds, row.differences, strict=True):
        both = seed in arm and seed in base
        values.append(0.0 if both else -np.inf if seed in arm else np.inf if seed in base else d or 0.0)
    return np.asarray(values)


def _total_seeds(row: Comparison, study: Study) -> int | None:
    step = row.level_of_first_step * looks.next_share(study)
    if row.evidence_ended or (row.p_worst_rank is not None and not row.seeds):
        return None
    if row.p_worst_rank is not None:
        return power.seeds_needed_worst_rank(_with_divergence(row), step)
    if row.d_z is None or row.sd_difference is None:
        return None
    return power.seeds_needed(row.d_z, row.margin / row.sd_difference, step, step, overlap=study.overlap)


def _secondary(rows: Sequence[Comparison], paired: Mapping[tuple[str, str], Pairs], study: Study) -> None:
    sizes = study.trials[study.trials["stage"] == "confirm"].groupby("arm")
    for column in ("parameters", "flops_per_token"):
        if column in study.trials.columns:
            first = sizes[column].first()
            for row in rows:
                for prefix, arm in (("", row.arm), ("baseline_", row.baseline)):
                    value = first.get(arm, np.nan)
                    setattr(row, prefix + column, float(value) if np.isfinite(value) else None)
    if study.unpaired or study.overlap:
        return
    rows = [row for row in rows if not row.contrast]
    each = [paired[row.baseline, row.arm] for row in rows]
    balanced = len({tuple(pairs.seeds) for pairs in each}) == 1 and study.rule == "fixed"
    tested = [row for row in rows if row.p_t is not None]
    if balanced and len(tested) == len(rows) and all(row.p_worst_rank is None for row in rows):
        result = multiplicity.dunnett_blocked(each[0].baseline, [pairs.arm for pairs in each])
        for row, p in zip(rows, result["p_adjusted"], strict=True):
            row.p_dunnett = p


def _find(settings: dict[str, Any], word: str) -> str | None:
    for key, value in settings.items():
        if word in str(key) and isinstance(value, str):
            return value
        if isinstance(value, dict) and (found := _find(value, word)):
            return found
    return None


def main(argv: list[str] | None = None, prog: str = "python -m analysis.significance") -> int:
    """Print the verdict of a table or a study; return the exit code."""
    parser = command.parser(prog, __doc__)
    add_require_verdict(parser)
    options = parser.parse_args(argv)
    study = command.study(options, every_rung=True)
    result = decide(study)
    if options.format == "json":
        print(formats.to_json(as_object(result)))
    else:
        show(result, study, options.format)
    return end(result, options.require_verdict)


def show(result: Result, study: Study, kind: str) -> None:
    """Print a verdict in a format that is not JSON, with its tasks below it.

    Args:
        result: The verdict.
        study: Its study.
        kind: One of `formats.FORMATS`.
    """
    rows = rows_of_rungs(result)
    columns = formats.of_table(rows, study.unit) if study.facts else formats.VERDICT_COLUMNS
    command.emit_rows(rows, formats.with_rung(rows, columns), kind, title=result.summary)
    notes = list(result.facts.notes) if result.facts else []
    if kind == "terminal" and result.rungs:
        formats.print_notes([f"{row.label}: {row.said}; {row.why}" for row in result.trends])
    elif kind == "terminal":
        formats.print_notes([f"{row.label}: {row.why}" for row in result.every])
        formats.print_notes([f"sensitivity: {result.sensitivity.why}", *(f"note: {note}" for note in notes)])
    else:
        command.say(notes)
    for task, part in zip(result.tasks, study.table.tasks if study.table else (), strict=True):
        print()
        show(task, part, kind)
