"""Word a verdict: its sentence, the reason of each row and its caveats."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.io.assemble import Study, TableFacts
from analysis.stats.sequential import CLAIM_SEEDS
from analysis.verdict.kinds import PAIRED, Comparison, MetricFacts, Refusal, Verdict

IF_ODD = "if an arm has rare runs that end far off, better and worse are said too often: look at them, add seeds"
SAID_FROM = 1.005  # ratio of detected to true effect from which it is said
_REFUSALS = {
    Refusal.NO_CONFIRM_STAGE: "no confirm stage: one seed a configuration",
    Refusal.NO_COMMON_SEED: "no seed in common",
    Refusal.NO_BASELINE_RUNS: "no baseline runs",
    Refusal.NO_TREATMENT_RUNS: "no treatment runs",
    Refusal.ONE_SEED: "n=1",
    Refusal.ALL_DIVERGED: "both arms diverged on every seed",
    Refusal.ZERO_VARIANCE: "zero variance: check seeds were really different",
    Refusal.DIVERGED_SPLIT: "a run diverged, and a test by ranks needs seeds that do not split one data set",
}
_CANNOT_TELL = "not testable: this regime cannot tell a linear MLP from GELU"


def sentence(row: Comparison, study: Study) -> str:
    """Return the verdict of one arm, with its detail in brackets."""
    if row.refusal in _REFUSALS:
        return not_testable(row.refusal)
    needs = f" ({'; '.join([*lost_arms(row), what_it_needs(row, study)])})" if row.kind is Verdict.UNDECIDED else ""
    return headline(row, study.margin, study.unit) + needs


def headline(row: Comparison, margin: float | str, unit: str = "nats") -> str:
    """Return the verdict of one arm without its detail.

    Args:
        row: The comparison.
        margin: A number in `unit`, or a percentage as text.
        unit: Unit of the metric.
    """
    if row.kind is Verdict.NO_DIFFERENCE:
        return f"no difference larger than {margin_text(margin, unit)}"
    if row.refusal is Refusal.FLOOR_DOES_NOT_LOSE:
        return _CANNOT_TELL if row.of_table is None else f"not testable: the floor does not lose to {row.baseline}"
    if row.refusal is Refusal.TOO_FEW_SEEDS:
        return f"not testable: too few seeds to tell the floor from {row.baseline}"
    if row.refusal is Refusal.EVIDENCE_ENDED:
        return f"not testable: a diverged run ended the evidence that the floor loses to {row.baseline}"
    return row.kind.replace("_", " ")


def margin_text(margin: float | str, unit: str) -> str:
    """Return the margin with its unit."""
    return margin.strip() if isinstance(margin, str) else f"{margin:g} {unit}".strip()


def not_testable(refusal: Refusal) -> str:
    """Return the verdict of an arm that is not testable, with the reason in brackets."""
    return f"not testable ({_REFUSALS[refusal]})"


def what_it_needs(row: Comparison, study: Study) -> str:
    """State what an undecided arm needs: the next look of a sequential rule, or a number of seeds."""
    if not study.looks:
        return f"needs {_more_seeds(row, study)}"
    if row.evidence_ended:
        return "a diverged run ended its evidence"
    if at_cap(row, study):
        return f"the cap of {study.looks[-1]} seeds is reached"
    seen = row.path[-1]["n"] if row.path else 0
    return f"its next look is at {next(n for n in study.looks if n > seen)} seeds"


def at_cap(row: Comparison, study: Study) -> bool:
    """Return True if an arm has had the last look of a sequential rule."""
    return bool(study.looks and row.path) and not row.evidence_ended and row.path[-1]["n"] >= study.looks[-1]


def all_infeasible(arm: str, runs: int) -> str:
    """State that an arm has infeasible runs only."""
    return f"all {runs} runs of {arm} are infeasible" if runs > 1 else f"the run of {arm} is infeasible"


def lost_arms(row: Comparison) -> list[str]:
    """State which arms of a comparison have infeasible runs only."""
    each = ((row.baseline, row.diverged_seeds_baseline), (row.arm, row.diverged_seeds_arm))
    return [all_infeasible(arm, row.n) for arm, seeds in each if row.seeds and set(seeds) >= set(row.seeds)]


def worth_percent(low: float, value: float, high: float, of: str) -> str:
    """State what an arm is worth, in percent: `worth 13.0% more compute [8.1, 19.2]`.

    With an interval on both sides of zero, it is `worth between 3.6% less and 3.3% more compute (estimate -0.3%)`.
    """
    if low < 0 < high:
        return f"worth between {-low:.1f}% less and {high:.1f}% more {of} (estimate {value:+.1f}%)"
    if value < 0:
        return f"worth {-value:.1f}% less {of} [{-high:.1f}, {-low:.1f}]"
    return f"worth {value:.1f}% more {of} [{low:.1f}, {high:.1f}]"


def called(name: str) -> str:
    """Return what a reader calls a hyperparameter."""
    return "learning rate" if name == "lr" else name


def open_sides(row: Comparison) -> dict[str, dict[str, str]]:
    """Return `unbracketed` of a row without the learning rates whose end of the grid is said elsewhere."""
    out = {
        arm: {name: why for name, why in found.items() if name != "lr" or arm not in row.at_edge}
        for arm, found in row.unbracketed.items()
    }
    return {arm: found for arm, found in out.items() if found}


def were_searched(names: Sequence[str]) -> str:
    """Return the beginning of a sentence about hyperparameters that were searched only."""
    *first, last = map(called, names)
    return f"{', '.join(first)} and {last} were searched" if first else f"{last} was searched"


def added(study: Study) -> str:
    """State which arms joined late, and what this does to the correction and the level."""
    family = f"{len(study.arms) - 1} arms" if not study.contrasts else f"{len(study.comparisons)} comparisons"
    how = "is corrected" if study.correction != "none" else "is not corrected"
    return (
        f"added after the configurations of the other arms had been chosen: {', '.join(study.added)}; p {how} for all "
        f"{family}, and the level of {study.level:g} holds only if no result led to the addition"
    )


def in_unit(study: Study) -> str:
    """Return the unit as it follows a number of a table's metric; "" if it is not known."""
    return {"%": " points", "": ""}.get(study.unit, f" {study.unit}")


def facts(table: TableFacts) -> MetricFacts:
    """Return what a verdict says of a table's metric and of its reading."""
    return MetricFacts(table.higher_is_better, table.unit, table.unpaired, list(table.notes))


def why_refused(row: Comparison) -> str:
    """State why no test of an arm can be made."""
    if row.refusal is None:
        return "every difference is exactly 0, so there is no interval, no t and no p of the t test"
    return f"{_REFUSALS[row.refusal]}: no interval and no p"


def _more_seeds(row: Comparison, study: Study) -> str:
    total = row.seeds_needed
    if total is None:
        return "more data: no number of splits is enough" if study.overlap else "more than 10000 more seeds"
    if row.of_table and row.of_table.test != PAIRED:
        more = max(1, total - min(row.of_table.n_baseline, row.of_table.n_arm))
        return f"about {more} more run{'s' if more > 1 else ''} of each arm"
    more = max(1, total - row.n)
    return f"about {more} more {'split' if study.overlap else 'seed'}{'s' if more > 1 else ''}"


def caveats(row: Comparison, study: Study) -> list[str]:
    """Return the caveats of one arm's verdict, as one phrase each."""
    notes = [_rule_note(row, study)] if row.path else []
    notes += selection(row, study)
    if study.overlap:
        notes.append(splits(study))
    if row.arm in study.added:
        notes.append(added(study))
    if row.at_edge:
        arms = " and ".join(row.at_edge)
        notes.append(f"the learning rate of {arms} is an end of the calibration grid: a better one may lie outside")
    if row.odd_runs:
        notes.append(f"runs far from the rest: {', '.join(row.odd_runs)}; {IF_ODD}")
    for arm, found in open_sides(row).items():
        for name, why in found.items():
            notes.append(
                f"the best {called(name)} of {arm} has no finite neighbour on each side ({why}), so its optimum is "
                "uncertain and equal arms may differ more often than the level allows"
            )
    if names := row.uncalibrated:
        notes.append(
            f"{were_searched(names)}, not calibrated: each arm has what its best trial "
            "had, so equal arms may differ more often than the level allows"
        )
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
        by = (
            f"intention to treat decides: worst-rank p = {row.p_worst_rank:.3g}, "
            f"sign test p = {row.p_sign_test:.3g} over all {row.n} pairs"
        )
        if row.evidence_ended:
            by = "the e-process needs complete pairs, so a diverged run ends its evidence"
        notes.append(
            f"{by}{complete or '; the mean-based numbers'} are of the {row.complete_pairs} complete pairs only"
        )
        if row.n < 6 and not row.evidence_ended:
            notes.append(f"the worst-rank test cannot reach 0.05 with n = {row.n}")
    failed = _failed(study, row.arm, row.baseline)
    if failed:
        notes.append(f"failed for reasons outside the arm and left out: {', '.join(failed[:10])}")
    n = min(row.of_table.n_baseline, row.of_table.n_arm) if study.unpaired and row.of_table else row.n
    if 1 < n < CLAIM_SEEDS and study.rule == "fixed":
        notes.append(f"n = {n}: fewer than {CLAIM_SEEDS} seeds are no claim")
    if row.p_t is not None and row.improvement_low is None:
        own = "; no percentage, and the difference stands in the metric's own unit" if study.facts else ""
        notes.append(f"Fieller's interval has no bounds: the baseline's mean is not clearly above zero{own}")
    if study.own and not row.margin and not row.refused:
        notes.append(
            f"the margin of {study.margin} of a mean that is not clearly above zero says nothing, so no difference is "
            "called small: give confirm.margin as a number"
        )
    return notes


def selection(row: Comparison, study: Study) -> list[str]:
    """Return phrases on the interval of an arm that was declared different, and on the size of such effects."""
    notes = []
    if row.selected_level is not None and row.selected_level < study.level:
        confidence = f"at {100 * (1 - row.selected_level):.3g}%, which holds for all arms together and so for the arms"
        if row.selected_low is not None and row.selected_high is not None:
            interval = f"[{row.selected_low:+.2f}, {row.selected_high:+.2f}]%"
        elif row.of_table and row.of_table.difference_selected_low is not None:
            low, high = row.of_table.difference_selected_low, row.of_table.difference_selected_high
            interval = f"[{low:+.4g}, {high:+.4g}]{in_unit(study)}"
        else:
            interval = ""
        if interval:
            notes.append(f"the interval {confidence} that were declared different, is {interval}")
    if row.exaggeration is not None and row.power_at_effect_seen is not None and row.exaggeration >= SAID_FROM:
        notes.append(
            f"if the true effect is the one seen, {row.power_at_effect_seen:.0%} of such studies find it, and an "
            f"effect that is declared different at this power is on average {row.exaggeration:.2f} times too large"
        )
    return notes


def decided_early(row: Comparison) -> int:
    """Return the number of seeds at the earlier look that decided an arm; 0 if its last look did, or none."""
    if row.kind not in (Verdict.BETTER, Verdict.WORSE) or not row.path:
        return 0
    first = next(look["n"] for look in row.path if look["p_anytime"] == row.path[-1]["p_anytime"])
    return 0 if first == row.path[-1]["n"] else int(first)


def samples(study: Study) -> str:
    """Return what n counts: seeds of pairs, splits of one data set, or runs that are not pairs."""
    return "runs" if study.unpaired else "splits" if study.overlap else "seeds"


def splits(study: Study) -> str:
    """State how the variance of splits of one data set is corrected."""
    return (
        f"splits of one data set are not independent: the variance of a mean is (1/n + {study.overlap:.3g}) s^2, not "
        "s^2 / n (Nadeau and Bengio 2003)"
    )


def _of_table(row: Comparison, study: Study) -> list[str]:
    more, notes = row.of_table, []
    assert more is not None
    for arm, seeds in ((row.baseline, more.not_made_seeds_baseline), (row.arm, more.not_made_seeds_arm)):
        if seeds:
            runs, s = ("one run was", "") if len(seeds) == 1 else (f"{len(seeds)} runs were", "s")
            notes.append(f"{arm}: {runs} not made (empty cell{s}, seed{s} {_listed(seeds)}), and left out")
    unmatched = row.dropped_seeds_baseline and row.dropped_seeds_arm and not study.unpaired
    if row.refusal is Refusal.NO_COMMON_SEED or (row.refusal is Refusal.ONE_SEED and unmatched):
        notes.append("runs that are not pairs are compared by Welch's test: --unpaired")
    if more.p_welch is not None:
        out = len(row.dropped_seeds_baseline) + len(row.dropped_seeds_arm)
        notes.append(
            f"pairing shows no clear gain ({row.pairing_gain:.2f}x) and leaves out {out} run{'s' if out > 1 else ''}; "
            f"if seeds are only run numbers, --unpaired compares all runs (Welch's p = {more.p_welch:.3g})"
        )
    if study.unpaired and row.p_t is not None:
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
    of = f" of {len(study.looks)}" if study.looks else ""
    which = "of this look alone" if study.rule == "fixed" and not study.reserve else "over all looks"
    if by := decided_early(row):
        seen += f", decided at its look at {by} seeds"
    return (
        f"{study.rule}: look {len(row.path)}{of}, at {last['n']} seeds, stops this arm alone at "
        f"p <= {last['stops_at']:.3g}{seen}; p {which} = {last['p_anytime']:.3g} before {study.correction}"
    )


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds[:20])) + (f" and {len(seeds) - 20} more" if len(seeds) > 20 else "")


def _failed(study: Study, *arms: str) -> list[str]:
    failed = study.trials["outcome"] == "failed"
    if not failed.any():
        return []
    rows = study.trials[failed & (study.trials["stage"] == "confirm")]
    return [f"{arm} seed {s}" for arm in arms for s in rows.loc[rows["arm"] == arm, "seed"]]
