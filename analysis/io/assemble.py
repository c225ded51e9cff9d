"""A checked study: its tables and its decision rule; input that would invalidate a test is refused here."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.io.files import TableError
from analysis.io.names import STAGES
from analysis.io.trials import confirm_rows, last_step, normalise, numeric_columns, to_numbers
from analysis.stats.scale import first_of
from analysis.stats.sequential import MOST_RESERVE, RULES, plan

CORRECTIONS = ("holm", "bonferroni", "benjamini-hochberg", "none")
TESTS = ("paired", "welch")
METRICS = ("test_nll", "val_nll")  # the default is the first one that the table has
DEFAULTS = {"level": 0.05, "correction": "holm", "margin": "0.5%"}  # for a table without a study file
MOST_LEVEL = 0.5
COMPUTE = "compute"  # what a ladder's sizes are, unless a table says otherwise
RUNG = "rung"  # the same for a ladder whose rungs have no compute: each counts as twice the one below
MOST_LOSS = 1e100  # squares of larger losses overflow
_DESCRIPTIVE = ("study", "stage", "arm", "seed", "step", "config_key", "outcome", "reason", "chosen")


@dataclass(frozen=True, eq=False)
class TableFacts:
    """Meaning of a table from elsewhere, or of the metric of a study that trains the user's own code.

    `unit` is the metric's unit, "" if it is not known. `has_seeds` is false if the rows have no seeds and are numbered.
    `arms` includes arms without any run. `not_made` has the seeds of each arm whose cells were empty. `tasks` has one
    study per task if the rows are means over tasks, and `task` is the name of the task otherwise. `looks` has the
    numbers of seeds at the looks, and `added` the arms that joined late, if the table is one of our studies. Of a study
    that trains the user's own code, `name` is its validation metric and `budget` the unit of its budget.
    """

    higher_is_better: bool = False
    unit: str = "nats"
    unpaired: bool = False
    has_seeds: bool = True
    arms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    not_made: dict[str, list[int]] = field(default_factory=dict)
    task: str = ""
    tasks: tuple["Study", ...] = ()
    looks: tuple[int, ...] = ()
    added: tuple[str, ...] = ()
    name: str = ""
    budget: str = ""

    @property
    def sign(self) -> int:
        """Factor that makes a loss of the metric: 1, or -1 if a higher value is better."""
        return -1 if self.higher_is_better else 1


@dataclass(frozen=True, eq=False)
class Ladder:
    """The same question at several sizes: one study for each rung that has begun, from small to large.

    `sizes` has the baseline's training compute in FLOPs on each rung, or the values of the column `axis` of a table;
    NaN if it is not known. Of a study that trains the user's own code, they are in the user's unit, or 2 to the power
    of the rung's number if the axis is `RUNG`. `rows` has the keys that make the size of each rung. `planned` counts
    the rungs of the study file. `level` is that of the whole ladder. Each rung has its share of it, or if the rungs are
    `joint`, one correction counts the arms of all of them. `absent` has the arms without any trial on a rung, if the
    study file lets arms drop.
    """

    rungs: tuple["Study", ...]
    sizes: tuple[float, ...]
    rows: tuple[dict[str, Any], ...]
    planned: int
    level: float
    axis: str = COMPUTE
    joint: bool = False
    absent: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Study:
    """Tables of one study, and the decision rule that was fixed before it ran.

    `trials` has one row per cell (stage, arm, configuration, seed). `curves` has one row per cell and evaluation step.
    `layers` has one row per arm and layer of its kept model, and `samples` one row per arm and prompt that it
    continued; they are empty if none was kept. Losses are in nats per token. `margin` is in nats, or a text such as
    "0.5%" of the baseline's mean loss. `table` describes a table from elsewhere, whose metric may have another unit and
    direction. A study of one rung of a ladder has its number in `rung`; that of the highest rung which has begun also
    has the `ladder`. `own` describes the metric of a study that trains the user's own code; its column `val_nll` is
    that metric as a loss.
    """

    name: str
    question: str
    baseline: str
    floor: str | None
    arms: list[str]
    level: float
    correction: str
    margin: float | str
    metric: str
    trials: pd.DataFrame
    curves: pd.DataFrame
    folder: Path | None
    settings: dict[str, Any]
    table: TableFacts | None = None
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    samples: pd.DataFrame = field(default_factory=pd.DataFrame)
    rung: int | None = None
    ladder: Ladder | None = None
    own: TableFacts | None = None

    @property
    def facts(self) -> TableFacts | None:
        """Meaning of a metric that is not the built-in loss; else None."""
        return self.table or self.own

    @property
    def sign(self) -> int:
        """Factor that makes a loss of the metric: 1, or -1 if a higher value is better."""
        return self.facts.sign if self.facts else 1

    @property
    def unit(self) -> str:
        """Unit of the metric; "" if it is not known."""
        return self.facts.unit if self.facts else "nats"

    @property
    def budget_unit(self) -> str:
        """Unit of the training that a trial gets."""
        return self.own.budget if self.own else "tokens"

    @property
    def first(self) -> str | None:
        """Name of the hyperparameter that is tuned first: `lr`, or that of the user's study; None without any."""
        return first_of(self.settings.get("nuisance") or {}) if self.own else "lr"

    @property
    def better(self) -> str:
        """Which value of the metric is better: the lower or the higher one."""
        return "lower" if self.sign > 0 else "higher"

    @property
    def validation(self) -> str:
        """Name of the validation metric with its unit, for an axis."""
        if self.own is None:
            return "validation loss (nats per token)"
        return self.own.name + (f" ({self.unit})" if self.unit else "")

    @property
    def words(self) -> dict[str, str]:
        """Words of the built-in model in the headings of tables, each with the study's own word for it."""
        if self.own is None:
            return {}
        unit = f" ({self.unit})" if self.unit else ""
        return {"tokens": self.own.budget, " (nats)": unit, "val_nll": self.own.name}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the budget of each arm that has only a part of it."""
        given = {arm: (options or {}).get("budget") for arm, options in (self.settings.get("arms") or {}).items()}
        return {arm: float(share) for arm, share in given.items() if self.own and share}

    @property
    def turn(self) -> int:
        """Factor that makes the user's metric of the loss in `val_nll`: -1 if a higher value is better, else 1."""
        return self.own.sign if self.own else 1

    @property
    def rule(self) -> str:
        """Rule for adding seeds: fixed, obrien-fleming or e-process."""
        return str((self.settings.get("confirm") or {}).get("rule") or "fixed")

    @property
    def unpaired(self) -> bool:
        """True if runs of one seed are not pairs, so that Welch's test decides."""
        return self.table.unpaired if self.table else (self.settings.get("confirm") or {}).get("test") == "welch"

    @property
    def overlap(self) -> float:
        """Size of a test set divided by that of its training set, if seeds split one data set; else 0."""
        shares = self.settings.get("resampling")
        if not shares:
            return 0.0
        test = float(shares["test_share"])
        return test / float(shares.get("train_share") or 1 - test)

    @property
    def confirms(self) -> bool:
        """True if the study has a confirm stage, the only one whose runs a test may use."""
        return "confirm" in (self.settings.get("stages") or STAGES)

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of seeds at the looks of a sequential rule; empty for the fixed rule."""
        cap = (self.settings.get("confirm") or {}).get("max_seeds")
        return () if self.rule == "fixed" else plan(self.rule, cap)

    @property
    def reserve(self) -> float:
        """Share of the level that the fixed rule keeps for seeds that are added later."""
        return float((self.settings.get("confirm") or {}).get("reserve") or 0.0)

    @property
    def made(self) -> tuple[int, ...]:
        """Numbers of seeds at the looks of any rule. The fixed rule looks at its planned seeds, then at each extension.

        A table from elsewhere has none, because nobody knows how its seeds came about.
        """
        if self.table is not None or self.rule != "fixed":
            return self.looks
        if "look" in self.trials.columns:
            return tuple(sorted({int(n) for n in self.trials["look"].dropna()}))
        planned = (self.settings.get("confirm") or {}).get("seeds")
        return (int(planned or confirm_rows(self.trials)["seed"].nunique()),)

    @property
    def races(self) -> bool:
        """True if an arm that is decided at a look trains no further, so that arms may have different seeds."""
        several = self.table is None and (self.rule != "fixed" or len(self.made) > 1)
        paired = not self.unpaired
        return several and paired and (self.settings.get("confirm") or {}).get("racing") is not False

    @property
    def contrasts(self) -> list[tuple[str, str]]:
        """Comparisons of two arms other than the baseline, as reference and arm."""
        return [(str(first), str(second)) for first, second in self.settings.get("contrasts") or []]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """All comparisons, as reference and arm: every arm with the baseline, then the contrasts."""
        return [(self.baseline, arm) for arm in self.arms if arm != self.baseline] + self.contrasts

    @property
    def added(self) -> list[str]:
        """Arms that joined the study after the configurations of the other arms had been chosen."""
        if self.table is not None or "added" not in self.trials.columns:
            return []
        later = set(self.trials.loc[self.trials["added"] == True, "arm"])  # noqa: E712 (the column may hold null)
        return [arm for arm in self.arms if arm in later]

    def losses(self, metric: str | None = None) -> pd.DataFrame:
        """Return the confirm losses, seeds down and arms across: +inf = infeasible (diverged), NaN = no such run.

        A `failed` trial counts as no run, because the machine failed and not the arm. A diverged run keeps its place.
        A metric of which a higher value is better has its sign changed, so that lower is better here.
        """
        rows = confirm_rows(self.trials)
        rows = rows[rows["outcome"] != "failed"]
        already = self.own is not None and metric == "val_nll"
        loss = (1 if already else self.sign) * rows[metric or self.metric].astype(float)
        loss = loss.where((rows["outcome"] == "completed") & np.isfinite(loss), np.inf)
        table = rows.assign(_loss=loss).pivot(index="seed", columns="arm", values="_loss")
        return table.sort_index().reindex(columns=self.arms)


def assemble(
    source: str,
    name: str,
    trials: pd.DataFrame,
    curves: pd.DataFrame,
    settings: dict[str, Any],
    *,
    baseline: str | None = None,
    floor: str | None = None,
    metric: str | None = None,
    folder: Path | None = None,
    facts: TableFacts | None = None,
    own: TableFacts | None = None,
) -> Study:
    """Check two tables and a study's settings, and make a `Study` of them.

    Args:
        source: Name of the input in error messages.
        name: Name of the study if the settings give none.
        trials: One row per cell.
        curves: One row per cell and evaluation step; may be empty.
        settings: Content of the study file; may be empty.
        baseline, floor, metric: As for `load`.
        folder: Folder of the study, if it has one.
        facts: What a table from elsewhere means, if it is one.
        own: What the metric of a study means that trains the user's own code.

    Raises:
        TableError: If the input would invalidate a test.
    """
    trials = normalise(source, trials)
    declared = settings.get("arms") or {}
    arms = list(declared) if declared else list(dict.fromkeys(facts.arms if facts else trials["arm"]))
    if unknown := sorted(set(trials["arm"]) - set(arms)):
        raise TableError(f"{source}: column arm has {unknown[0]!r}; allowed: {', '.join(arms)}")
    confirm = {**DEFAULTS, **(settings.get("confirm") or {})}
    study = Study(
        name=str(settings.get("name") or name),
        question=str(settings.get("question") or ""),
        baseline=_one_arm(source, "baseline", baseline, declared, arms),
        floor=_one_arm(source, "floor", floor, declared, arms) if floor or _marked_arms(declared, "floor") else None,
        arms=arms,
        level=_level(source, confirm["level"]),
        correction=_choice(source, "correction", confirm["correction"], CORRECTIONS),
        margin=confirm["margin"],
        metric=_metric(source, trials, metric),
        trials=trials,
        curves=numeric_columns(f"{source} (curves)", curves),
        folder=folder,
        settings=settings,
        table=facts,
        own=own,
    )
    if study.floor == study.baseline:
        raise TableError(f"{source}: {study.floor!r} is both baseline and floor; allowed: two different arms")
    margin_in_nats(study.margin, 1.0, source, study.unit)
    _choice(source, "rule", study.rule, RULES)
    if not 0 <= study.reserve <= MOST_RESERVE:
        raise TableError(f"{source}: reserve {study.reserve:g}; allowed: 0 to {MOST_RESERVE}")
    _check_contrasts(source, study)
    _choice(source, "test", confirm.get("test", TESTS[0]), TESTS)
    if study.unpaired and study.rule != "fixed":
        raise TableError(f"{source}: rule {study.rule} with test welch; allowed: the rule fixed, which has no looks")
    if study.overlap and (
        study.unpaired or study.rule != "fixed" or study.reserve or len(study.looks or study.made) > 1
    ):
        raise TableError(
            f"{source}: seeds that split one data set; allowed: pairs, the rule fixed and seeds that were all planned, "
            "because the corrected variance is known for one look"
        )
    study = replace(study, trials=last_step(source, study.trials, study.metric))
    _check_confirm(source, study)
    return study


def margin_in_nats(margin: float | str, baseline_mean: float, source: str = "study", unit: str = "nats") -> float:
    """Return the margin in nats, or in the unit of a table's metric.

    Args:
        margin: A number in nats, or a text "m%" for m percent of the baseline's mean loss.
        baseline_mean: Mean loss of the baseline in nats.
        source: Name of the input in error messages.
        unit: Unit of the metric in error messages.

    Raises:
        TableError: If the margin is not above 0, or is a percentage of a mean that is not above 0.
    """
    text, in_unit = str(margin).strip(), f" in {unit}" if unit else ""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = float("nan")
    if isinstance(margin, bool) or not (np.isfinite(value) and value > 0):
        raise TableError(
            f"{source}: margin {margin!r}; allowed: {unit or 'a number'} above 0, or a percentage such as 0.5%"
        )
    if not text.endswith("%"):
        return value
    if baseline_mean <= 0:
        raise TableError(f"{source}: margin {margin!r} of a mean of {baseline_mean:g}; allowed: a number{in_unit}")
    return value / 100 * baseline_mean


def margin_or_zero(margin: float | str, baseline_mean: float, source: str = "study") -> float:
    """Return `margin_in_nats`, or 0 if it is a percentage of a mean that is not above zero: no difference is small."""
    of_nothing = baseline_mean <= 0 and str(margin).strip().endswith("%")
    return 0.0 if of_nothing else margin_in_nats(margin, baseline_mean, source)


def _marked_arms(declared: dict[str, Any], key: str) -> list[str]:
    return [arm for arm, options in declared.items() if isinstance(options, dict) and options.get(key) is True]


def _one_arm(source: str, key: str, given: str | None, declared: dict[str, Any], arms: list[str]) -> str:
    names = [given] if given is not None else _marked_arms(declared, key)
    if len(names) != 1:
        found = f"{len(names)} arms are marked {key}: {', '.join(names)}" if names else f"no arm is marked {key}"
        raise TableError(f"{source}: {found}; allowed: exactly one (--{key} NAME) of {', '.join(arms)}")
    if names[0] not in arms:
        raise TableError(f"{source}: {key} {names[0]!r} is not an arm; allowed: {', '.join(arms)}")
    return names[0]


def _choice(source: str, key: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise TableError(f"{source}: {key} {value!r}; allowed: {', '.join(allowed)}")
    return str(value)


def _level(source: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_LEVEL:
        raise TableError(f"{source}: level {value!r}; allowed: a number above 0 and below {MOST_LEVEL:g}")
    return float(value)


def _metric(source: str, trials: pd.DataFrame, metric: str | None) -> str:
    candidates = [c for c in trials.columns if c not in _DESCRIPTIVE]
    if metric is not None and metric not in candidates:
        raise TableError(f"{source}: no column {metric!r} for the metric; allowed: {', '.join(map(str, candidates))}")
    rows = confirm_rows(trials)
    found = [metric] if metric else [m for m in METRICS if m in candidates and rows[m].notna().any()]
    found = found or [m for m in METRICS if m in candidates] or candidates
    if not found or (len(found) > 1 and found[0] not in METRICS):
        raise TableError(f"{source}: which column is the metric? Name it with --metric: {', '.join(map(str, found))}")
    values = to_numbers(source, trials, found[0])
    if np.isneginf(values).any():
        raise TableError(f"{source}: column {found[0]} has -inf; allowed: a loss, or NaN or inf for a diverged run")
    if (large := np.isfinite(values) & (values.abs() > MOST_LOSS)).any():
        raise TableError(f"{source}: column {found[0]} has {values[large].iloc[0]:g}; allowed: up to {MOST_LOSS:g}")
    return str(found[0])


def _check_contrasts(source: str, study: Study) -> None:
    given = study.settings.get("contrasts") or []
    others = [arm for arm in study.arms if arm != study.baseline]
    for pair in given if isinstance(given, list) else [given]:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(others):
            raise TableError(f"{source}: contrasts has {pair!r}; allowed: pairs of two of {', '.join(others)}")
    if twice := [pair for i, pair in enumerate(given) if set(pair) in [set(each) for each in given[:i]]]:
        raise TableError(f"{source}: contrasts has {twice[0]!r} twice; allowed: each pair once")


def _check_confirm(source: str, study: Study) -> None:
    rows = confirm_rows(study.trials)
    early = rows[rows["outcome"] == "stopped_early"]
    if len(early):
        cells = ", ".join(f"{r.arm} seed {r.seed}" for r in early.head(5).itertuples())
        raise TableError(
            f"{source}: column outcome is stopped_early in the confirm stage ({cells}); "
            "allowed: completed, infeasible, failed"
        )
    if (twice := rows.duplicated(["arm", "seed"], keep=False)).any():
        cells = ", ".join(f"{a} seed {s}" for a, s in rows.loc[twice, ["arm", "seed"]].drop_duplicates().head(5).values)
        raise TableError(
            f"{source}: duplicated confirm rows ({cells}); allowed: one row per arm and seed "
            "(checkpoints of one run need a step column; they are not samples)"
        )
    selection = set(study.trials.loc[study.trials["stage"] != "confirm", "seed"])
    if shared := sorted(selection & set(rows["seed"])):
        raise TableError(
            f"{source}: confirm seeds {', '.join(map(str, shared[:10]))} were used in search or calibrate; "
            "allowed: fresh seeds, because a seed that chose a configuration cannot test it"
        )
