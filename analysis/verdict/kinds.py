"""Types of a verdict: the decision on each arm, the numbers behind it, and their JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from analysis.verdict.ladder.kinds import ArmTrend, ComputeGain


class Verdict(StrEnum):
    """Decision on one arm. `analysis.verdict.words` has the sentences."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no_difference"
    UNDECIDED = "undecided"
    IDENTICAL = "identical"
    NOT_TESTABLE = "not_testable"
    UNFINISHED = "unfinished"

    @property
    def settled(self) -> bool:
        """True for better, worse, no difference and identical."""
        return self not in (Verdict.UNDECIDED, Verdict.NOT_TESTABLE, Verdict.UNFINISHED)


class Refusal(StrEnum):
    """Reason why an arm is not testable."""

    NO_CONFIRM_STAGE = "no_confirm_stage"
    NO_COMMON_SEED = "no_common_seed"
    NO_BASELINE_RUNS = "no_baseline_runs"
    NO_TREATMENT_RUNS = "no_treatment_runs"
    ONE_SEED = "one_seed"
    ALL_DIVERGED = "all_diverged"
    ZERO_VARIANCE = "zero_variance"
    DIVERGED_SPLIT = "diverged_split"
    FLOOR_DOES_NOT_LOSE = "floor_does_not_lose"
    TOO_FEW_SEEDS = "too_few_seeds"
    EVIDENCE_ENDED = "evidence_ended"

    @property
    def of_floor(self) -> bool:
        """True if the floor refuses the verdict on the other arms."""
        return self in (Refusal.FLOOR_DOES_NOT_LOSE, Refusal.TOO_FEW_SEEDS, Refusal.EVIDENCE_ENDED)


PAIRED = "paired t"


@dataclass
class OfTable:
    """Numbers of a comparison that only a table from elsewhere has.

    `difference_low` and `difference_high` are the t interval of the mean difference in the metric's own unit;
    `difference_selected_*` is that of an arm that was declared different, as `selected_*` of `Comparison`.
    `n_baseline` and `n_arm` are the runs of an unpaired test; `p_paired` is the paired test's p over the `n_paired`
    seeds that both have. `not_made_seeds_*` are those with empty cells. `p_welch` is the unpaired test's p over
    all runs if pairing leaves out runs without a clear gain.
    """

    difference_low: float | None = None
    difference_high: float | None = None
    difference_selected_low: float | None = None
    difference_selected_high: float | None = None
    test: str = PAIRED
    n_baseline: int = 0
    n_arm: int = 0
    p_paired: float | None = None
    n_paired: int = 0
    p_welch: float | None = None
    not_made_seeds_baseline: list[int] = field(default_factory=list)
    not_made_seeds_arm: list[int] = field(default_factory=list)


@dataclass
class Worth:
    """Percent more training that the baseline would need to reach an arm's metric, with its interval.

    It is negative if less training would do. All are None if it is not known. Only a study of the user's own training
    has it.
    """

    training_percent: float | None = None
    training_low: float | None = None
    training_high: float | None = None


@dataclass
class Comparison:
    """Comparison of one arm with the baseline. Losses and differences are in nats; a missing number is None.

    A table from elsewhere has its own unit, and `of_table`. There a difference is positive if the arm is better.

    `verdict` states `kind` as a sentence, and `why` gives its reasons. `differences` holds the baseline's loss minus
    the arm's for each of `seeds`. `seeds_needed` is the total number of seeds that would decide an undecided arm if the
    effect seen is the true one. `path` has one entry per look, if there may be several. `p_no_difference` is the p of
    TOST over all looks.

    `mde_percent`, `power_at_effect_seen` and `seeds_needed` are of `level_of_first_step`, at which the arm is found
    whatever the other arms show. p is at or below `level_of_decision` exactly if the arm is better or worse.
    `p_tost_adjusted` is `p_no_difference` after the correction, and decides; the latter is at or below
    `level_of_equivalence` exactly if the former is at or below the level. `selected_low` and `selected_high` are the
    interval in percent of an arm that was declared different, at 1 - `selected_level`; such intervals hold for all arms
    together. `exaggeration` is the average ratio of detected to true effect if the effect seen is the true one.
    `odd_runs` names runs that lie far from the rest.
    """

    arm: str
    baseline: str
    n: int
    improvement_percent: float | None = None
    improvement_low: float | None = None
    improvement_high: float | None = None
    mean_difference: float | None = None
    t: float | None = None
    df: float | None = None
    p_t: float | None = None
    p_sign_flip: float | None = None
    p_adjusted: float | None = None
    d_z: float | None = None
    mde_percent: float | None = None
    probability_of_improvement: float | None = None
    verdict: str = ""
    why: str = ""
    kind: Verdict = Verdict.UNDECIDED
    refusal: Refusal | None = None
    complete_pairs: int = 0
    seeds: list[int] = field(default_factory=list)
    differences: list[float | None] = field(default_factory=list)
    dropped_seeds_baseline: list[int] = field(default_factory=list)
    dropped_seeds_arm: list[int] = field(default_factory=list)
    diverged_seeds_baseline: list[int] = field(default_factory=list)
    diverged_seeds_arm: list[int] = field(default_factory=list)
    baseline_mean: float | None = None
    arm_mean: float | None = None
    margin: float = 0.0
    sd_difference: float | None = None
    pairing_gain: float | None = None
    p_tost: float | None = None
    tost_excludes: float | None = None
    tost_excludes_percent: float | None = None
    p_deciding: float | None = None
    p_worst_rank: float | None = None
    p_sign_test: float | None = None
    power_at_effect_seen: float | None = None
    p_anytime: float | None = None
    p_no_difference: float | None = None
    at_edge: list[str] = field(default_factory=list)
    # by arm and hyperparameter: why a grid's best point, or the value chosen, is not between finite points
    unbracketed: dict[str, dict[str, str]] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)  # hyperparameters that were searched only
    seeds_needed: int | None = None
    path: list[dict[str, Any]] = field(default_factory=list)
    p_sign_flip_error: float | None = None
    parameters: float | None = None
    baseline_parameters: float | None = None
    flops_per_token: float | None = None
    baseline_flops_per_token: float | None = None
    p_dunnett: float | None = None
    standard_error: float | None = None
    level_of_first_step: float = 0.0
    level_of_decision: float = 0.0
    level_of_equivalence: float = 0.0
    p_tost_adjusted: float | None = None
    selected_level: float | None = None
    selected_low: float | None = None
    selected_high: float | None = None
    exaggeration: float | None = None
    odd_runs: list[str] = field(default_factory=list)
    of_table: OfTable | None = None
    worth: Worth | None = None
    contrast: bool = False

    @property
    def label(self) -> str:
        """Name of the comparison: that of its arm, with its reference if it is a contrast."""
        return f"{self.arm} against {self.baseline}" if self.contrast else self.arm

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the improvement in percent; None if it has no bounds."""
        low, high = self.improvement_low, self.improvement_high
        return None if low is None or high is None else (low, high)

    @property
    def evidence_ended(self) -> bool:
        """True if a diverged run has ended the evidence of an e-process, so that no later seed can decide."""
        return bool(self.path) and bool(self.path[-1]["ended"])

    @property
    def refused(self) -> bool:
        """True if no test of this arm can be made, or if every difference is exactly 0."""
        return self.kind in (Verdict.IDENTICAL, Verdict.NOT_TESTABLE)


@dataclass
class Sensitivity:
    """Assay sensitivity: the gap of the floor to the baseline in percent. `testable` is None without a floor.

    `too_few_seeds` is true if the gap is not clearly above zero, but may be as large as the margin. `evidence_ended` is
    true if a diverged run has ended the e-process of the floor before it was decided.
    """

    floor: str | None
    baseline: str
    gap_percent: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    n: int | None = None
    p: float | None = None
    testable: bool | None = None
    why: str = "no floor arm is declared, so assay sensitivity is unknown"
    strong: bool = False
    too_few_seeds: bool = False
    evidence_ended: bool = False


@dataclass
class MetricFacts:
    """Facts on the metric of a table from elsewhere, and the notes on its reading."""

    higher_is_better: bool
    unit: str
    unpaired: bool
    notes: list[str]


@dataclass
class Result:
    """Decision on a whole study.

    `unfinished` names what the study still lacks, and is empty if it is complete. `chosen` has the values of the
    searched hyperparameters that each arm was given. `contrasts` compares two arms other than the baseline; there
    `baseline` is the first of them. The verdict of a ladder is that of its highest rung, with all `rungs` and `trends`.
    `overlap` is above 0 if the seeds split one data set.
    """

    schema: int
    study: str
    question: str
    metric: str
    level: float
    correction: str
    comparisons: list[Comparison]
    sensitivity: Sensitivity
    margin: float | str
    margin_nats: float | None
    baseline: str
    floor: str | None
    rule: str
    looks: list[int]
    summary: str
    seeds: dict[str, list[int]]
    losses_sha256: str
    data_digest: str | None
    commit: str | None
    versions: dict[str, str]
    unfinished: str
    chosen: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: MetricFacts | None = None
    contrasts: list[Comparison] = field(default_factory=list)
    tasks: list[Result] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)
    trends: list[ArmTrend] = field(default_factory=list)
    overlap: float = 0.0

    @property
    def every(self) -> list[Comparison]:
        """Comparisons with the baseline, then the contrasts."""
        return [*self.comparisons, *self.contrasts]

    @property
    def in_question(self) -> list[Comparison]:
        """Comparisons that the study asks about; see the function `in_question`."""
        return in_question(self.every, self.floor)


@dataclass
class Rung:
    """One size of a ladder: its settings, its compute, its verdict and the compute-equivalent gains of its arms.

    `sizes` are the keys of the study file's row. `compute` is the baseline's training compute in FLOPs, or the value of
    the column of sizes of a table; None if it is not known. `dropped` has the arms that lost below and did not run.
    """

    rung: int
    name: str
    sizes: dict[str, Any]
    parameters: float | None
    tokens: float | None
    compute: float | None
    result: Result
    gains: list[ComputeGain] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def in_question(rows: Iterable[Comparison], floor: str | None) -> list[Comparison]:
    """Return all comparisons but the floor's with the baseline; return the floor's if there is no other."""
    rows = list(rows)
    return [row for row in rows if row.contrast or row.arm != floor] or rows


def as_rows(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Return the comparisons as objects of JSON."""
    rows = [_joined(_joined(vars(row), "of_table", row.of_table), "worth", row.worth) for row in comparisons]
    return [{key: value for key, value in row.items() if key != "contrast"} for row in rows]


def shown_rows(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Return the comparisons as rows of a table for a reader, each with its label in the column of the arm."""
    comparisons = list(comparisons)
    return [row | {"arm": each.label} for row, each in zip(as_rows(comparisons), comparisons, strict=True)]


def rows_of_rungs(result: Result) -> list[dict[str, Any]]:
    """Return `shown_rows` of every rung that has finished, each with its number; of a plain study, those alone.

    A verdict of a rung is one word here. Its reasons are in the summary.
    """
    if not result.rungs:
        return shown_rows(result.every)
    done = [rung for rung in result.rungs if not rung.result.unfinished]
    rows = [{"rung": rung.rung, **row} for rung in done for row in shown_rows(rung.result.every)]
    return [{**row, "verdict": str(row["kind"]).replace("_", " ")} for row in rows]


def as_object(result: Result) -> dict[str, Any]:
    """Return the object of verdict.json; a table has more keys and an object per task, a ladder one per rung."""
    nested: dict[str, Any] = {
        "comparisons": as_rows(result.comparisons),
        "contrasts": as_rows(result.contrasts),
        "sensitivity": dict(vars(result.sensitivity)),
    }
    if result.tasks:
        nested["tasks"] = {task.study: as_object(task) for task in result.tasks}
    else:
        nested["tasks"] = None
    nested["rungs"] = [_rung(rung) for rung in result.rungs]
    nested["trends"] = [dict(vars(row)) for row in result.trends]
    found = _joined({**vars(result), **nested}, "facts", result.facts)
    left_out = {key for key in ("tasks", "chosen", "contrasts", "rungs", "trends", "overlap") if not found[key]}
    return {key: value for key, value in found.items() if key not in left_out}


def _rung(rung: Rung) -> dict[str, Any]:
    # the facts of a rung, then the object that its verdict alone would be
    facts = {key: value for key, value in vars(rung).items() if key not in ("result", "gains")}
    return facts | {"compute_gains": [dict(vars(gain)) for gain in rung.gains]} | as_object(rung.result)


def _joined(values: dict[str, Any], key: str, more: object | None) -> dict[str, Any]:
    # the keys of a nested object stand beside the others
    rest = {name: value for name, value in values.items() if name != key}
    return rest if more is None else rest | vars(more)
