"""The second form of a study file: the arms train the user's own function or command."""

from __future__ import annotations

import math
import re
import shlex
import string
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from analysis.stats.scale import calibrated, is_whole
from pagating.gating.catalog import BASES, DEFAULTS
from tune.study.arm import STUDY_FORMS, AlphaSection, Arm
from tune.study.sections import (
    CorpusSection,
    Distribution,
    FixedSection,
    KeepSection,
    ModelSection,
    OneOf,
    Section,
    TokenizerSection,
)
from tune.study.study import MOST_LR, MOST_RUNGS, Study

FUNCTION = re.compile(r"(?P<file>[^:]+\.py):(?P<name>[A-Za-z_]\w*)")
VALUE_NAME = re.compile(r"[A-Za-z]\w{0,63}")
OF_BUILT_IN = ("model", "fixed", "corpus", "tokenizer", "task")
OF_ROW = ("budget", "compute")  # keys of a row of `scales` that are no values of a trial
OF_BUILT_IN_ARM = ("gate", "unit", "base", "form", "alpha")
# attributes of `trial`
OF_TRIAL = ("arm", "budget", "folder", "hf_callback", "report", "rng", "seed", "test", "Infeasible")
# columns of the tables, and names that the protocol gives a meaning of its own
COLUMNS = frozenset(
    (
        *("study", "stage", "config_key", "trial", "outcome", "reason", "chosen", "seconds", "peak_rss_mb", "added"),
        *("memory_growth_mb", "overlap"),
        *("look", "axis", "step", "steps", "tokens", "rung", "batch_tokens", "tokens_per_second", "final"),
        *("val_nll", "test_nll", "train_nll"),
    )
)
PLACEHOLDERS = ("arm", "budget", "folder", "seed", "test")  # of a command, beside the names of its values
Value = bool | int | float | str
MOST_BUDGET = 10**13


def _check_name(where: str, name: str, *taken: str) -> None:
    """Raise ValueError if a name cannot be a column of the tables, or has a meaning there or as `trial.NAME`.

    Args:
        where: Place in the study file, for the error.
        name: The name that the user gave.
        *taken: Further names that are not allowed here.
    """
    if not VALUE_NAME.fullmatch(name):
        raise ValueError(f"{where}: a name is up to 64 letters, digits and _, and starts with a letter")
    if name in (names := (*taken, *OF_TRIAL, *sorted(COLUMNS))):
        meaning = f"trial.{name} is set by the study" if name in OF_TRIAL else f"{name} is taken"
        raise ValueError(f"{where}: {meaning}; choose another name than {', '.join(names)}")


class MetricSection(Section):
    """The metric that the study compares."""

    name: str = Field(description="name of the validation metric, as `trial.report` gets it")
    test: str = Field(description="name of the same metric on the test data, which a confirm trial returns at its end")
    goal: Literal["minimize", "maximize"] = Field("minimize", description="whether a lower or a higher value is better")
    unit: str = Field("", max_length=40, description="unit of the metric, such as nats, % or USD")

    @model_validator(mode="after")
    def _names(self) -> MetricSection:
        for key in ("name", "test"):
            given = getattr(self, key)
            _check_name(f"{key} '{given}'", given, "lr")
        if self.name == self.test:
            raise ValueError(f"name and test are both '{self.name}'; the test metric needs a name of its own")
        return self


class ResamplingSection(Section):
    """Statement that a seed also draws the split of one fixed data set, so that seeds are not independent."""

    test_share: float = Field(gt=0, lt=1, description="share of the data in the test set of a split")
    train_share: float | None = Field(
        None, gt=0, lt=1, description="share of the data that trains; default all that is not in the test set"
    )

    @model_validator(mode="after")
    def _whole(self) -> ResamplingSection:
        if self.test_share + (self.train_share or 0.0) > 1 + 1e-9:
            raise ValueError(f"test_share {self.test_share:g} and train_share {self.train_share:g} are more than 1")
        return self

    @property
    def overlap(self) -> float:
        """Size of a test set, divided by that of its training set."""
        return self.test_share / (self.train_share or 1 - self.test_share)


class CommandSection(Section):
    """A command that trains one trial and prints lines such as METRIC val_loss=1.23 step=200."""

    command: str = Field(min_length=1, description="command line; {lr}, {seed}, {budget} and others are replaced")
    folder: str = Field(".", description="folder in which it runs; the path starts at the study file")

    @field_validator("command")
    @classmethod
    def _words(cls, given: str) -> str:
        try:
            words = shlex.split(given)
            fields = [field for word in words for field in string.Formatter().parse(word)]
        except ValueError as error:
            raise ValueError(f"command '{given}' cannot be read: {error}") from error
        if any(spec or conversion for _, _, spec, conversion in fields):
            raise ValueError(f"command '{given}': a name in braces has no format; write {{{{ and }}}} for braces")
        return given

    @property
    def names(self) -> list[str]:
        """The names in braces, each once."""
        found = [name for _, name, _, _ in string.Formatter().parse(self.command) if name is not None]
        return list(dict.fromkeys(found))


class OwnArm(Arm):
    """One alternative under comparison: values that the training reads as `trial.NAME`."""

    gate: str | None = Field(None, exclude=True)
    base: Annotated[str, OneOf(BASES)] = Field(DEFAULTS["base"], exclude=True)
    alpha: float | list[float] | AlphaSection | None = Field(None, exclude=True)
    form: Annotated[str, OneOf(STUDY_FORMS)] = Field(DEFAULTS["form"], exclude=True)
    unit: str | None = Field(None, exclude=True)
    set: dict[str, Value] = Field({}, description="values that make the arm what it is")
    search: dict[str, Distribution] = Field({}, description="hyperparameters that only this arm has, and tunes")
    of: str | None = Field(None, description="an arm whose `set` and `search` this one has too")
    budget: float | None = Field(None, gt=0, le=1, description="share of the study's budget; default all of it")

    @model_validator(mode="before")
    @classmethod
    def _not_built_in(cls, given: Any) -> Any:
        for key in OF_BUILT_IN_ARM if isinstance(given, dict) else ():
            if key in given:
                raise ValueError(f"{key} is of the built-in model; an arm of `trial:` has set, search, of and budget")
        return given

    @property
    def share(self) -> float:
        """Share of the study's budget that a trial of the arm has."""
        return 1.0 if self.budget is None else self.budget

    @property
    def formula(self) -> str:
        """The values that the arm sets, in words."""
        return ", ".join(f"{name}={value}" for name, value in self.set.items()) or "nothing set"

    def searched(self, mlps: int = 1) -> dict[str, Distribution]:
        """Return the hyperparameters that only this arm searches, by name."""
        return dict(self.search)


class OwnStudy(Study):
    """A study of the user's own training. `trial` names a function, as FILE.py:NAME, or has a command."""

    trial: str | CommandSection = Field(description="FILE.py:FUNCTION, or {command: ...}")
    metric: MetricSection = Field(description="the metric that is compared")
    budget: dict[str, int] = Field(description="length of a trial: a unit, such as steps, and a whole number")
    nuisance: dict[str, Distribution] = Field(
        description="hyperparameters that every arm tunes and calibrates so that the comparison is fair: `lr` first, "
        "then the others in their order; {} if there is nothing to tune. A choice of whole numbers stays whole"
    )
    arms: dict[str, OwnArm] = Field(  # type: ignore[assignment]
        description="alternatives under comparison: two or more, one of them the baseline"
    )
    corpus: CorpusSection = Field(CorpusSection(), exclude=True)
    tokenizer: TokenizerSection = Field(TokenizerSection(), exclude=True)
    task: str = Field("causal", exclude=True)
    model: ModelSection = Field(ModelSection(), exclude=True)
    fixed: FixedSection = Field(FixedSection(), exclude=True)
    scales: list[dict[str, Value]] = Field(  # type: ignore[assignment]
        [],
        max_length=MOST_RUNGS,
        description="sizes at which the question is asked, from small to large: values that every trial of that size "
        "reads as `trial.NAME`, its `budget`, and `compute`, the arithmetic of one trial in any unit",
    )
    keep: KeepSection = Field(KeepSection(models="none"), description="files that are kept")
    resampling: ResamplingSection | None = Field(
        None, description="if a seed also draws the split of one fixed data set: the shares, for a corrected variance"
    )
    reuse: bool = Field(
        False, description="train several trials one after the other in a process, for a function that keeps no state"
    )

    _row: dict[str, Any] = PrivateAttr(default_factory=dict)  # of `scales`, for the study of one rung

    @model_validator(mode="before")
    @classmethod
    def _not_built_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for key in OF_BUILT_IN:
            if key in given:
                raise ValueError(
                    f"{key} is of the built-in model; with `trial:` your own code decides it: leave it out"
                )
        keep = given.get("keep")
        if isinstance(keep, dict):
            if keep.get("models", "none") != "none":
                raise ValueError(f"keep.models={keep['models']} is of the built-in model; your own code saves its own")
            return {**given, "keep": {**keep, "models": "none"}}
        return given

    @field_validator("trial")
    @classmethod
    def _trial(cls, given: str | CommandSection) -> str | CommandSection:
        if isinstance(given, str) and not FUNCTION.fullmatch(given):
            raise ValueError(f"trial '{given}' is no FILE.py:FUNCTION, nor {{command: ...}}")
        return given

    @field_validator("budget", mode="before")
    @classmethod
    def _unit(cls, given: Any) -> Any:
        if given is not None and not isinstance(given, dict):
            amount = given if type(given) is int else 2000
            raise ValueError(f"budget {given} must be one unit and one number, such as {{steps: {amount}}}")
        return given

    @field_validator("budget")
    @classmethod
    def _budget(cls, given: dict[str, int]) -> dict[str, int]:
        if len(given) != 1:
            raise ValueError(f"budget {given} must be one unit and one number, such as {{steps: 2000}}")
        ((unit, amount),) = given.items()
        if not VALUE_NAME.fullmatch(unit) or not 1 <= amount <= MOST_BUDGET:
            raise ValueError(f"budget {given} must be a unit, such as steps, and a whole number from 1 to 10^13")
        if unit in OF_TRIAL or (unit in COLUMNS and unit not in ("steps", "tokens", "seconds")):
            _check_name(f"budget {given}", unit)
        return given

    @field_validator("stages")
    @classmethod
    def _stages(cls, given: list[str]) -> list[str]:
        return given if given == ["confirm"] else super()._stages(given)  # of a study that tunes nothing

    @model_validator(mode="after")
    def _together(self) -> OwnStudy:
        if len(self.arms) < 2 and self.runs("confirm"):
            raise ValueError("a study needs a baseline and at least one arm to compare with it")
        lr = self.nuisance.get("lr")
        if lr and (min(lr.values) <= 0 or max(lr.values) > MOST_LR):
            raise ValueError(f"nuisance.lr must be in (0, {MOST_LR:g}]; got {lr.values}")
        self._drop_stages()
        self.__dict__["fixed"] = _fixed(self.amount)
        if self.scales:
            self._check_scales()
        for name, arm in self.arms.items():
            self._check_arm(name, arm)
        if isinstance(self.trial, CommandSection):
            self._check_command(self.trial)
        if self.search.sampler == "grid":
            self._check_grid()
        if self.resampling and self.scales:
            raise ValueError("resampling: rungs of one data set are not independent; leave out scales")
        if self.resampling and (self.confirm.rule != "fixed" or self.confirm.reserve or self.confirm.test != "paired"):
            raise ValueError(
                "resampling: the corrected variance is known for the paired test and one look; leave out confirm.rule, "
                "confirm.reserve and confirm.test"
            )
        return self

    def _drop_stages(self) -> None:
        """Leave out the stages that have nothing to tune."""
        searched = any(map(self.space, self.arms))
        if self.stages[0] != "search" and searched:
            raise ValueError("stages [confirm] is for a study that tunes nothing; add search")
        tuned = {"search": searched, "calibrate": bool(calibrated(self.ranges))}
        self.__dict__["stages"] = [stage for stage in self.stages if tuned.get(stage, True)]
        if not self.stages:
            raise ValueError("nuisance: {} and no arm has search, so nothing is tuned: add confirm to stages")

    def _check_arm(self, name: str, arm: OwnArm) -> None:
        where = f"arms.{name}"
        if arm.of is not None:
            if arm.of == name or arm.of not in self.arms:
                near = get_close_matches(arm.of, self.arms, 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"{where}.of: there is no other arm '{arm.of}'{hint}")
            if self.arms[arm.of].of is not None:
                raise ValueError(f"{where}.of: {arm.of} has an `of` itself; name the arm that sets the values")
        if arm.baseline and arm.share != 1:
            raise ValueError(f"{where}.budget: the baseline has the whole budget; leave it out")
        taken: dict[str, str] = {}
        own = self.resolved(name)
        for key, names in (
            ("nuisance", self.nuisance),
            ("scales", self.sizes),
            (f"{where}.search", own.search),
            (f"{where}.set", own.set),
        ):
            for each in names:
                _check_name(f"{key}.{each}", each)
                if each in (self.metric.name, self.metric.test, *self.budget):
                    raise ValueError(f"{key}.{each}: this is the name of the metric or of the budget's unit")
                if each in taken:
                    raise ValueError(f"{key}.{each} is in {taken[each]} too; give it once")
                taken[each] = key
        for each, value in own.set.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where}.set.{each} is {value}; it must be finite")

    def _check_scales(self) -> None:
        """Raise ValueError if a rung of the ladder has other keys than the others, or is not larger than the last."""
        self._check_ladder_stages()
        names = {key: [key in row for row in self.scales] for row in self.scales for key in row}
        for key, there in names.items():
            if key != "budget" and not all(there):
                raise ValueError(
                    f"scales: {key} is missing on rung {there.index(False) + 1}; give it on all or on none"
                )
        if not set(names) - set(OF_ROW):
            raise ValueError("scales: its rungs have no size, such as {d_model: 64}, that a trial could read")
        below = 0.0
        for number, row in enumerate(self.scales, 1):
            where, budget, compute = f"scales: rung {number}", row.get("budget", 1), row.get("compute")
            if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= MOST_BUDGET:
                raise ValueError(f"{where}: budget {budget} must be a whole number of {self.unit} from 1 on")
            if compute is None:
                continue
            if isinstance(compute, bool | str) or not 0 < compute < math.inf:
                raise ValueError(f"{where}: compute {compute} must be a number above 0")
            if compute <= below:
                raise ValueError(
                    f"{where} has compute {compute:g}, the one below {below:g}; order them from small to large"
                )
            below = compute

    def _check_command(self, section: CommandSection) -> None:
        if self.reuse:
            raise ValueError("reuse: a command is a process of its own for each trial; leave reuse out")
        for arm in self.arms:
            known = self.values(arm, dict.fromkeys(self.space(arm), 0.0))
            allowed = (*PLACEHOLDERS, *known)
            for name in section.names:
                if name not in allowed:
                    near = get_close_matches(name, allowed, 1)
                    hint = f"did you mean {{{near[0]}}}? " if near else ""
                    raise ValueError(
                        f"trial.command: arm '{arm}' has no value for {{{name}}}; {hint}allowed: {', '.join(allowed)}"
                    )
            for name in self.to_read(arm):
                if name not in section.names:
                    raise ValueError(f"arms.{arm}: the command never uses {{{name}}}, so this arm trains as without it")
        if "seed" not in section.names:
            raise ValueError("trial.command: has no {seed}, so every seed would train alike")
        if "budget" not in section.names:
            raise ValueError("trial.command: has no {budget}, so its length would not be that of the study")

    @property
    def code(self) -> str:
        """What a trial runs, as the study file has it."""
        return self.trial if isinstance(self.trial, str) else self.trial.command

    @property
    def unit(self) -> str:
        """Unit of the budget."""
        return next(iter(self.budget))

    @property
    def amount(self) -> int:
        """Budget of a trial of a whole length, in its unit."""
        return next(iter(self.budget.values()))

    @property
    def sign(self) -> int:
        """Factor that makes a loss of the metric."""
        return -1 if self.metric.goal == "maximize" else 1

    @property
    def overlap(self) -> float:
        """Size of a test set divided by that of its training set, if a seed also splits one data set; else 0."""
        return self.resampling.overlap if self.resampling else 0.0

    @property
    def shown(self) -> Mapping[str, str]:
        """The user's names of the ledger's columns."""
        unit = {"tokens": self.unit, "tokens_per_second": f"{self.unit}_per_second"}
        return {"val_nll": self.metric.name, "test_nll": self.metric.test, **unit}

    def setting(self, config: Mapping[str, float]) -> str:
        """Return the values of a configuration, such as ` depth=3 rate=0.01`; "" if there are none."""
        values = {name: f"{value:.1e}" if name == "lr" else f"{value:.4g}" for name, value in config.items()}
        return "".join(f" {name}={value}" for name, value in values.items())

    def resolved(self, arm: str) -> OwnArm:
        """Return an arm with the values of the arm that its `of` names."""
        own = self.arms[arm]
        base = self.arms[own.of] if own.of else own
        both = {"set": {**base.set, **own.set}, "search": {**base.search, **own.search}}
        return own.model_copy(update=both)

    def space(self, arm: str) -> dict[str, Distribution]:
        """Return the hyperparameters that an arm's search tunes: the nuisance ones of all arms, then the arm's own."""
        return {**self.nuisance, **self.resolved(arm).search}

    def values(self, arm: str, config: Mapping[str, float]) -> dict[str, Value]:
        """Return what a trial reads as `trial.NAME`: tuned values, what the arm sets, and the sizes of its rung."""
        whole = [name for name, where in self.space(arm).items() if is_whole(where.model_dump())]
        tuned = {**config, **{name: int(config[name]) for name in whole if name in config}}
        return {**tuned, **self.resolved(arm).set, **self.sizes}

    def to_read(self, arm: str) -> list[str]:
        """Return the names without which the arm would not be what it is."""
        own = self.resolved(arm)
        return [*own.set, *own.search, *self.sizes]

    @property
    def sizes(self) -> dict[str, Value]:
        """What every trial of a rung reads as `trial.NAME`; of the ladder itself, that of its lowest rung."""
        row = self._row or (self.scales[0] if self.scales else {})
        return {name: value for name, value in row.items() if name not in OF_ROW}

    @property
    def compute(self) -> float:
        """Compute of a trial of the rung, in the user's unit. Without one, each rung counts as twice the last."""
        return float(self._row.get("compute", 2.0**self.rung))

    def at(self, rung: int, without: Collection[str] = ()) -> OwnStudy:
        """Return the study of a rung of the ladder; see `Study.at`."""
        if not rung:
            return self
        row = self.scales[rung - 1]
        amount = int(row.get("budget", self.amount))
        found = self.model_copy(
            update={
                "scales": [],
                "budget": {self.unit: amount},
                "fixed": _fixed(amount),
                "confirm": self.confirm.model_copy(update={"level": self.confirm.level / len(self.scales)}),
                "arms": {name: arm for name, arm in self.arms.items() if name not in without},
                "contrasts": [pair for pair in self.contrasts if not set(pair) & set(without)],
            }
        )
        found._rung, found._row = rung, row
        return found

    def length(self, arm: str, steps: int) -> int:
        """Return the budget of an arm's trials, of a whole one of `steps`."""
        return max(1, round(self.arms[arm].share * steps))


def _fixed(amount: int) -> FixedSection:
    """Return the fixed settings of trials of a budget, a step of which is one unit."""
    return FixedSection.model_construct(tokens=amount, batch_tokens=1)
