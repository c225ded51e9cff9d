"""Word a verdict: its sentence, the reason of each row and its caveats."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.io.study import Study
from analysis.verdict.kinds import Comparison, Refusal, Verdict, in_question

CLAIM_SEEDS = 8  # seeds that a claim needs
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
    return headline(row, study.margin) + needs


def headline(row: Comparison, margin: float | str) -> str:
    """Return the verdict of one arm without its detail; `margin` is a number of nats or a percentage as text."""
    if row.kind is Verdict.NO_DIFFERENCE:
        return f"no difference larger than {margin.strip() if isinstance(margin, str) else f'{margin:g} nats'}"
    return _CANNOT_TELL if row.refusal is Refusal.FLOOR_DOES_NOT_LOSE else row.kind.replace("_", " ")


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
        return f"{_CANNOT_TELL[0].upper()}{_CANNOT_TELL[1:]} ({study.floor} against {study.baseline}).", [], ""
    parts = []
    for row in rows:
        value = row.improvement_percent
        number = "" if value is None else f" ({value:+.2f}%{_interval(row)}, n = {row.n})"
        parts.append(f"{row.arm}: {row.verdict}{number}")
    edges = dict.fromkeys(arm for row in rows for arm in row.at_edge)
    warnings = [f"Warning: the learning rate of {', '.join(edges)} is an end of the grid."] if edges else []
    if study.added:
        said = _added(study)
        warnings.append(f"{said[0].upper()}{said[1:]}.")
    return f"Against {study.baseline}, on {study.metric}:", parts, " ".join(warnings)


def _added(study: Study) -> str:
    """State which arms joined late, and what this does to the correction and the level."""
    others = len(study.arms) - 1
    how = "is corrected" if study.correction != "none" else "is not corrected"
    return (
        f"added after the configurations of the other arms had been chosen: {', '.join(study.added)}; p {how} for all "
        f"{others} arms, and the level of {study.level:g} holds only if no result led to the addition"
    )


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
    if row.p_worst_rank is not None:
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
    if 1 < row.n < CLAIM_SEEDS and study.rule == "fixed":
        notes.append(f"n = {row.n}: fewer than {CLAIM_SEEDS} seeds are no claim")
    if row.p_t is not None and row.improvement_low is None:
        notes.append("Fieller's interval has no bounds: the baseline's mean is not clearly above zero")
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
