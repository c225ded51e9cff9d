"""Decide every arm against the baseline, with p adjusted for the number of arms.

`pagating significance STUDY|TABLE`.

The primary test is the two-sided paired t test over seeds; if a run diverged, it is the worst-rank test over all pairs.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from analysis.io import command, formats
from analysis.io.assemble import Study, margin_in_nats
from analysis.io.files import TableError
from analysis.io.space import chosen_values
from analysis.io.text import chosen_line
from analysis.stats import estimates, multiplicity, power
from analysis.stats.pairs import Pairs
from analysis.verdict import elsewhere, looks, words
from analysis.verdict.checks import assay, edge_hits, unfinished
from analysis.verdict.comparison import measure
from analysis.verdict.exits import add_require_verdict, end
from analysis.verdict.kinds import Comparison, Refusal, Result, Verdict, as_object, as_rows

SCHEMA = 1


def verdict(study: Study) -> dict[str, Any]:
    """Decide a study; return the object of verdict.json, whose numbers are finite or null."""
    return as_object(decide(study))


def decide(study: Study) -> Result:
    """Compare every arm of a study with its baseline and decide; tasks of a table are decided as one family more."""
    (result,) = _decide_family([study])
    if study.table and study.table.tasks:
        result.tasks = _decide_family(study.table.tasks)
    return result


@dataclass
class _Part:
    # one study with its comparisons on the way to a result
    study: Study
    losses: pd.DataFrame
    paired: dict[str, Pairs]
    margin: float | None
    rows: list[Comparison]


def _decide_family(studies: Sequence[Study]) -> list[Result]:
    # the studies differ in their losses only; p is adjusted over all their arms
    parts = [_measured(study) for study in studies]
    _adjust([row for part in parts for row in part.rows], studies[0])
    return [_result(part) for part in parts]


def _measured(study: Study) -> _Part:
    losses = study.losses()
    treatments = [arm for arm in study.arms if arm != study.baseline]
    paired = {arm: looks.paired(study, losses, study.baseline, arm) for arm in treatments}
    baseline_losses = losses[study.baseline].to_numpy(float)
    margin = _margin(study, study.sign * baseline_losses[np.isfinite(baseline_losses)])
    rows = [measure(arm, study.baseline, paired[arm], study.level, margin, study.sign) for arm in treatments]
    if study.table:
        rows = [elsewhere.describe(row, paired[row.arm], losses, study) for row in rows]
    hits = edge_hits(study)
    for row in rows if not study.confirms else []:
        row.kind, row.refusal = Verdict.NOT_TESTABLE, Refusal.NO_CONFIRM_STAGE
    looks.look(rows, paired, losses, study)
    for row in rows:
        row.at_edge = [arm for arm in (study.baseline, row.arm) if arm in hits]
    return _Part(study, losses, paired, margin, rows)


def _margin(study: Study, baseline: np.ndarray) -> float | None:
    # a percentage of a table's baseline has a meaning only if its mean is clearly above zero
    of_mean = study.table and len(baseline) and str(study.margin).strip().endswith("%")
    if of_mean and not estimates.clearly_positive(baseline, study.level):
        if "margin" not in (study.settings.get("confirm") or {}):
            return None
        raise TableError(
            f"{study.name}: --margin {study.margin} of a mean of {baseline.mean():g}, which is not clearly above zero; "
            f"allowed: a number{words.in_unit(study)}: --margin NUMBER"
        )
    mean = float(baseline.mean()) if len(baseline) else 1.0
    return margin_in_nats(study.margin, mean, str(study.folder or study.name), study.unit)


def _result(part: _Part) -> Result:
    study, losses, rows = part.study, part.losses, part.rows
    for row in rows:
        _decide(row, study)
    sensitivity = assay(rows, study)
    for row in rows if sensitivity.testable is False else []:
        if row.arm != study.floor:
            row.why = f"{sensitivity.why}; alone it would read: {row.verdict}; {row.why}"
            row.kind, row.refusal = Verdict.NOT_TESTABLE, Refusal.FLOOR_DOES_NOT_LOSE
            row.verdict = words.sentence(row, study)
    _secondary(rows, part.paired, study)
    return Result(
        schema=SCHEMA,
        study=study.table.task if study.table and study.table.task else study.name,
        question=study.question,
        metric=study.metric,
        level=study.level,
        correction=study.correction,
        comparisons=rows,
        sensitivity=sensitivity,
        margin=study.margin,
        margin_nats=part.margin,
        baseline=study.baseline,
        floor=study.floor,
        rule=study.rule,
        looks=list(study.looks),
        summary=words.summary(rows, study),
        seeds={arm: [int(s) for s in losses[arm].dropna().index] for arm in study.arms},
        losses_sha256=hashlib.sha256(losses.to_csv().encode()).hexdigest(),
        data_digest=_find(study.settings, "digest"),
        commit=_find(study.settings, "commit"),
        versions=dict(_versions()),
        unfinished=unfinished(study),
        chosen=chosen_values(study),
        facts=None if study.table is None else words.facts(study.table),
    )


@cache
def _versions() -> dict[str, str]:
    names = ("numpy", "pandas", "scipy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _adjust(rows: Sequence[Comparison], study: Study) -> None:
    # the family is every arm of the study; an arm that cannot be tested enters with p = 1
    p = [1.0 if row.p_deciding is None else row.p_deciding for row in rows]
    order = np.argsort(p, kind="stable")
    for row, value in zip(rows, multiplicity.adjust(p, study.correction), strict=True):
        row.p_adjusted = None if row.p_deciding is None else value
    for rank, i in enumerate(order):
        shares = {"holm": len(p) - rank, "bonferroni": len(p), "benjamini-hochberg": len(p) / (rank + 1), "none": 1}
        rows[i].level_of_this_step = study.level / shares[study.correction]


def _decide(row: Comparison, study: Study) -> None:
    notes: list[str] = []
    p, worst = row.p_adjusted, row.p_worst_rank is not None
    equivalent = row.p_no_difference is not None and row.p_no_difference <= study.level
    if row.refused:
        notes.append(words.why_refused(row))
    elif p is not None and p <= study.level:
        direction = _direction(row) if worst else row.mean_difference or 0.0
        row.kind = Verdict.BETTER if direction > 0 else Verdict.WORSE
        notes.append(
            f"adjusted p = {p:.3g} ({study.correction}) <= {study.level:g} over n = {row.n} {words.samples(study)}"
        )
        if equivalent:
            notes.append(f"yet the difference is smaller than the margin of {study.margin}")
    elif equivalent:
        row.kind = Verdict.NO_DIFFERENCE
        notes.append(
            f"TOST p = {row.p_no_difference:.3g} <= {study.level:g} at that margin over n = {row.n} "
            f"{words.samples(study)}"
        )
    else:
        row.kind, row.seeds_needed = Verdict.UNDECIDED, _total_seeds(row, study)
        notes.append(
            f"adjusted p = {p:.3g} ({study.correction}) > {study.level:g}"
            + ("" if row.p_no_difference is None else f", TOST p = {row.p_no_difference:.3g} > {study.level:g}")
        )
    row.verdict = words.sentence(row, study)
    row.why = "; ".join([*notes, *words.caveats(row, study)])


def _direction(row: Comparison) -> float:
    # the sign is that of the rank sum of `worst_rank`
    if row.of_table and not row.seeds:
        return (row.probability_of_improvement or 0.0) - 0.5
    d = _with_divergence(row)
    d = d[d != 0]
    return float(np.sum(np.sign(d) * rankdata(np.abs(d))))


def _with_divergence(row: Comparison) -> np.ndarray:
    arm, base = set(row.diverged_seeds_arm), set(row.diverged_seeds_baseline)
    values = []
    for seed, d in zip(row.seeds, row.differences, strict=True):
        both = seed in arm and seed in base
        values.append(0.0 if both else -np.inf if seed in arm else np.inf if seed in base else d or 0.0)
    return np.asarray(values)


def _total_seeds(row: Comparison, study: Study) -> int | None:
    share = looks.next_share(study)
    step = row.level_of_this_step * share
    if row.p_worst_rank is not None and not row.seeds:
        return None
    if row.p_worst_rank is not None:
        return power.seeds_needed_worst_rank(_with_divergence(row), step)
    if row.d_z is None or row.sd_difference is None:
        return None
    return power.seeds_needed(row.d_z, row.margin / row.sd_difference, step, study.level * share)


def _secondary(rows: Sequence[Comparison], paired: Mapping[str, Pairs], study: Study) -> None:
    sizes = study.trials[study.trials["stage"] == "confirm"].groupby("arm")
    for column in ("parameters", "flops_per_token"):
        if column in study.trials.columns:
            first = sizes[column].first()
            for row in rows:
                for prefix, arm in (("", row.arm), ("baseline_", row.baseline)):
                    value = first.get(arm, np.nan)
                    setattr(row, prefix + column, float(value) if np.isfinite(value) else None)
    if study.table and study.table.unpaired:
        return
    names = [arm for arm in paired if len(paired[arm].seeds)]
    balanced = names and len({tuple(paired[arm].seeds) for arm in names}) == 1 and study.rule == "fixed"
    tested = [row for row in rows if row.p_t is not None]
    if balanced and len(tested) == len(rows) and all(row.p_worst_rank is None for row in rows):
        result = multiplicity.dunnett_blocked(paired[names[0]].baseline, [paired[arm].arm for arm in names])
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
    study = command.study(options)
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
    rows = as_rows(result.comparisons)
    columns = formats.of_table(rows, study.unit) if study.table else formats.VERDICT_COLUMNS
    command.emit_rows(rows, columns, kind, title=result.summary)
    notes = list(result.facts.notes) if result.facts else []
    if kind == "terminal":
        formats.print_notes([line] if (line := chosen_line(result.chosen)) else [])
        formats.print_notes([f"{row.arm}: {row.why}" for row in result.comparisons])
        formats.print_notes([f"sensitivity: {result.sensitivity.why}", *(f"note: {note}" for note in notes)])
    else:
        command.say(notes)
    for task, part in zip(result.tasks, study.table.tasks if study.table else (), strict=True):
        print()
        show(task, part, kind)
