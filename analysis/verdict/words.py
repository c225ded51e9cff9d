"""Word a verdict: its sentence, the reason of each row and its caveats."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.io.assemble import Study, TableFacts
from analysis.stats.sequential import CLAIM_SEEDS
from analysis.verdict.checks import STRONG_GAP
from analysis.verdict.kinds import PAIRED, Comparison, MetricFacts, Refusal, Result, Verdict, in_question

_REFUSALS = {
    Refusal.NO_CONFIRM_STAGE: "no confirm stage: one seed a configuration",
    Refusal.NO_COMMON_SEED: "no seed in common",
    Refusal.NO_BASELINE_RUNS: "no baseline runs",
    Refusal.NO_TREATMENT_RUNS: "no treatment runs",
    Refusal.ONE_SEED: "n=1",
    Refusal.ALL_DIVERGED: "both arms diverged on every seed",
    Refusal.ZERO_VARIANCE: "zero variance: check seeds were really different",
}
_CANNOT_TELL = "not testable: this regime cannot tell a linear MLP from GELU"


def sentence(row: Comparison, study: Study) -> str:
    """Return the verdict of one arm, with its detail in brackets."""
    if row.refusal in _REFUSALS:
        return not_testable(row.refusal)
    needs = f" ({what_it_needs(row, study)})" if row.kind is Verdict.UNDECIDED else ""
    return headline(row, study.margin, study.unit) + needs


def headline(row: Comparison, margin: float | str, unit: str = "nats") -> str:
    """Return the verdict of one arm without its detail.

    Args:
        row: The comparison.
        margin: A number in `unit`, or a percentage as text.
        unit: Unit of the metric.
    """
    if row.kind is Verdict.NO_DIFFERENCE:
        return (
            f"no difference larger than {margin.strip() if isinstance(margin, str) else f'{margin:g} {unit}'}".strip()
        )
    if row.refusal is Refusal.FLOOR_DOES_NOT_LOSE:
        return _CANNOT_TELL if row.of_table is None else f"not testable: the floor does not lose to {row.baseline}"
    return row.kind.replace("_", " ")


def not_testable(refusal: Refusal) -> str:
    """Return the verdict of an arm that is not testable, with the reason in brackets."""
    return f"not testable ({_REFUSALS[refusal]})"


def what_it_needs(row: Comparison, study: Study) -> str:
    """State what an undecided arm needs: the next look of a sequential rule, or a number of seeds."""
    if not study.looks:
        return f"needs {_more_seeds(row)}"
    seen = row.path[-1]["n"] if row.path else 0
    later = [n for n in study.looks if n > seen]
    return f"its next look is at {later[0]} seeds" if later else f"the cap of {study.looks[-1]} seeds is reached"


def summary(rows: Sequence[Comparison], study: Study) -> str:
    """Return the verdict of a study in one sentence."""
    head, parts, warning = summary_parts(rows, study)
    return head + (" " + "; ".join(parts) + "." if parts else "") + (f" {warning}" if warning else "")


def summary_parts(rows: Sequence[Comparison], study: Study) -> tuple[str, list[str], str]:
    """Return the parts of `summary`: its beginning (all of it if no arm follows), one part per arm, and a warning."""
    rows = in_question(rows, study.floor)
    if not rows:
        return "No treatment runs: there is nothing to compare with the baseline.", [], ""
    if all(row.refusal is Refusal.FLOOR_DOES_NOT_LOSE for row in rows):
        said = headline(rows[0], study.margin)
        return f"{said[0].upper()}{said[1:]} ({study.floor} against {study.baseline}).", [], ""
    parts = [f"{row.arm}: {row.verdict}{_numbers(row, study)}" for row in rows]
    edges = dict.fromkeys(arm for row in rows for arm in row.at_edge)
    warnings = [f"Warning: the learning rate of {', '.join(edges)} is an end of the grid."] if edges else []
    if study.added:
        said = _added(study)
        warnings.append(f"{said[0].upper()}{said[1:]}.")
    return f"Against {study.baseline}, on {study.metric}{_of_metric(study)}:", parts, " ".join(warnings)


def doubts(result: Result) -> str:
    """Return sentences on what weakens a `better` or `worse`: few seeds, a small difference, a small gap of the floor.

    They follow the summary where a person reads it. Returns "" if there is nothing to say.
    """
    rows = [row for row in result.in_question if row.kind in (Verdict.BETTER, Verdict.WORSE)]
    said = []
    fewest = min((row.n for row in rows), default=CLAIM_SEEDS)
    if result.rule == "fixed" and fewest < CLAIM_SEEDS:
        said.append(f"Preliminary: {fewest} seeds, and a claim needs {CLAIM_SEEDS}.")
    small = [row.arm for row in rows if row.mean_difference is not None and abs(row.mean_difference) < row.margin]
    if small:
        unit = "" if isinstance(result.margin, str) else " nats"
        said.append(f"Smaller than the margin of {result.margin}{unit}: {', '.join(small)}.")
    floor = result.sensitivity
    if rows and floor.testable and not floor.strong:
        said.append(f"{floor.floor} loses by {floor.gap_percent:.2f}%, and ranking arms needs {STRONG_GAP:g}%.")
    return " ".join(said)


def _added(study: Study) -> str:
    """State which arms joined late, and what this does to the correction and the level."""
    others = len(study.arms) - 1
    how = "is corrected" if study.correction != "none" else "is not corrected"
    return (
        f"added after the configurations of the other arms had been chosen: {', '.join(study.added)}; p {how} for all "
        f"{others} arms, and the level of {study.level:g} holds only if no result led to the addition"
    )


def _of_metric(study: Study) -> str:
    # what a table from elsewhere leaves open: direction and task
    if study.table is None:
        return ""
    way = f" ({'higher' if study.table.higher_is_better else 'lower'} is better)"
    if study.table.tasks:
        return f"{way}, mean over {len(study.table.tasks)} tasks of the relative difference"
    return f"{way}, task {study.table.task}" if study.table.task else way


def _numbers(row: Comparison, study: Study) -> str:
    # the improvement with its interval, and the number of pairs that they are made of
    value = row.improvement_percent
    n = f"n = {row.n}" if row.complete_pairs in (0, row.n) else f"n = {row.complete_pairs} of {row.n}"
    if row.of_table is None:
        return "" if value is None else f" ({value:+.2f}%{_interval(row)}, {n})"
    if row.mean_difference is None:
        return ""
    if study.table and study.table.unpaired:
        n = f"n = {row.of_table.n_baseline} + {row.of_table.n_arm}"
    low, high = row.of_table.difference_low, row.of_table.difference_high
    own = f"{row.mean_difference:+.4g}" + ("" if low is None else f" [{low:+.4g}, {high:+.4g}]")
    percent = "" if value is None else f"{value:+.2f}%{_interval(row)}"
    if study.table and study.table.tasks and percent:  # its own unit is a percentage
        return f" ({percent}, {n})"
    return f" ({', '.join(part for part in (own + in_unit(study), percent, n) if part)})"


def in_unit(study: Study) -> str:
    """Return the unit as it follows a number of a table's metric; "" if it is not known."""
    return {"%": " points", "": ""}.get(study.unit, f" {study.unit}")


def facts(table: TableFacts) -> MetricFacts:
    """Return what a verdict says of a table's metric and of its reading."""
    return MetricFacts(table.higher_is_better, table.unit, table.unpaired, list(table.notes))


def _interval(row: Comparison) -> str:
    return "" if row.interval is None else " [{:+.2f}, {:+.2f}]".format(*row.interval)


def why_refused(row: Comparison) -> str:
    """State why no test of an arm can be made."""
    if row.refusal is None:
        return "every difference is exactly 0, so there is no interval, no t and no p of the t test"
    return f"{_REFUSALS[row.refusal]}: no interval and no p"


def _more_seeds(row: Comparison) -> str:
    total = row.seeds_needed
    if total is None:
        return "more than 10000 more seeds"
    if row.of_table and row.of_table.test != PAIRED:
        more = max(1, total - min(row.of_table.n_baseline, row.of_table.n_arm))
        return f"about {more} more run{'s' if more > 1 else ''} of each arm"
    more = max(1, total - row.n)
    return f"about {more} more seed{'s' if more > 1 else ''}"


def caveats(row: Comparison, study: Study) -> list[str]:
    """Return the caveats of one arm's verdict, as one phrase each."""
    notes = [_rule_note(row, study)] if row.path else []
    if row.arm in study.added:
        notes.append(_added(study))
    if row.at_edge:
        arms = " and ".join(row.at_edge)
        notes.append(f"the learning rate of {arms} is an end of the calibration grid: a better one may lie outside")
    for arm, seeds in ((row.baseline, row.dropped_seeds_baseline), (row.arm, row.dropped_seeds_arm)):
        if seeds and row.n:
            notes.append(f"seeds {_listed(seeds)} of {arm} have no partner and are left out")
    for arm, seeds in ((row.baseline, row.diverged_seeds_baseline), (row.arm, row.diverged_seeds_arm)):
        if seeds:
            notes.append(f"{arm} diverged on seed{'s' if len(seeds) > 1 else ''} {_listed(seeds)}")
    if row.of_table:
        notes += _of_table(row, study)
    if row.p_worst_rank is not None and row.p_sign_test is not None:
        complete = "" if row.p_t is None else f"; t, p_t, d_z and interval (p_t = {row.p_t:.3g})"
        notes.append(
            f"intention to treat decides: worst-rank p = {row.p_worst_rank:.3g}, "
            f"sign test p = {row.p_sign_test:.3g} over all {row.n} pairs"
            f"{complete or '; the mean-based numbers'} are of the {row.complete_pairs} complete pairs only"
        )
        if row.n < 6:
            notes.append(f"the worst-rank test cannot reach 0.05 with n = {row.n}")
    failed = _failed(study, row.arm, row.baseline)
    if failed:
        notes.append(f"failed for reasons outside the arm and left out: {', '.join(failed[:10])}")
    n = min(row.of_table.n_baseline, row.of_table.n_arm) if _unpaired(study) and row.of_table else row.n
    if 1 < n < CLAIM_SEEDS and study.rule == "fixed":
        notes.append(f"n = {n}: fewer than {CLAIM_SEEDS} seeds are no claim")
    if row.p_t is not None and row.improvement_low is None:
        own = "; no percentage, and the difference stands in the metric's own unit" if study.table else ""
        notes.append(f"Fieller's interval has no bounds: the baseline's mean is not clearly above zero{own}")
    return notes


def samples(study: Study) -> str:
    """Return what n counts: seeds of pairs, or runs that are not pairs."""
    return "runs" if _unpaired(study) else "seeds"


def _unpaired(study: Study) -> bool:
    return bool(study.table and study.table.unpaired)


def _of_table(row: Comparison, study: Study) -> list[str]:
    more, notes = row.of_table, []
    assert more is not None
    for arm, seeds in ((row.baseline, more.not_made_seeds_baseline), (row.arm, more.not_made_seeds_arm)):
        if seeds:
            runs, s = ("one run was", "") if len(seeds) == 1 else (f"{len(seeds)} runs were", "s")
            notes.append(f"{arm}: {runs} not made (empty cell{s}, seed{s} {_listed(seeds)}), and left out")
    unmatched = row.dropped_seeds_baseline and row.dropped_seeds_arm and not _unpaired(study)
    if row.refusal is Refusal.NO_COMMON_SEED or (row.refusal is Refusal.ONE_SEED and unmatched):
        notes.append("runs that are not pairs are compared by Welch's test: --unpaired")
    if more.p_welch is not None:
        out = len(row.dropped_seeds_baseline) + len(row.dropped_seeds_arm)
        notes.append(
            f"pairing shows no clear gain ({row.pairing_gain:.2f}x) and leaves out {out} run{'s' if out > 1 else ''}; "
            f"if seeds are only run numbers, --unpaired compares all runs (Welch's p = {more.p_welch:.3g})"
        )
    if _unpaired(study) and row.p_t is not None:
        notes.append(f"{more.test} of {more.n_baseline} and {more.n_arm} runs that are not pairs")
        if row.p_worst_rank is not None:
            notes.append(f"a diverged run counts as the worst: rank-sum p = {row.p_worst_rank:.3g} decides")
        if more.p_paired is not None:
            both = (more.p_paired, row.p_deciding or 1.0)
            worse = "the larger of the two" if both[0] > both[1] else "the smaller of the two"
            notes.append(f"the paired test over {more.n_paired} common seeds gives p = {more.p_paired:.3g}, {worse}")
    return notes


def _rule_note(row: Comparison, study: Study) -> str:
    last, e = row.path[-1], row.path[-1]["e"]
    seen = "" if last["p"] is None else f", seen {last['p']:.3g}"
    seen += "" if e is None else f", e = {e:.3g}"
    lost = " (a diverged run: no evidence from it on)" if study.rule == "e-process" and last["t"] is None else ""
    return (
        f"{study.rule}: look {len(row.path)} of {len(study.looks)}, at {last['n']} seeds, stops this arm alone at "
        f"p <= {last['stops_at']:.3g}{seen}{lost}; p over all looks = {last['p_anytime']:.3g} before {study.correction}"
    )


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds[:20])) + (f" and {len(seeds) - 20} more" if len(seeds) > 20 else "")


def _failed(study: Study, *arms: str) -> list[str]:
    failed = study.trials["outcome"] == "failed"
    if not failed.any():
        return []
    rows = study.trials[failed & (study.trials["stage"] == "confirm")]
    return [f"{arm} seed {s}" for arm in arms for s in rows.loc[rows["arm"] == arm, "seed"]]
