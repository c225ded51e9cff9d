"""The study file: one typed, sparse and strict YAML that defines a study."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from analysis.io.names import RUNGS_APART, SEEDS_APART, STAGES
from analysis.io.text import redact
from analysis.stats.scale import batch_limits, first_of
from pagating.trial import Trial
from tune.study.addresses import check_address, check_tracking
from tune.study.arm import Arm
from tune.study.ladder import rung_content, training_flops, with_tokens
from tune.study.sections import (
    MODEL_KEYS,
    NAME,
    TOKENS_PER_PARAMETER,
    TUNABLE,
    CalibrateSection,
    ConfirmSection,
    CorpusSection,
    Distribution,
    FixedSection,
    KeepSection,
    LadderSection,
    ModelSection,
    ResourcesSection,
    Rung,
    SearchSection,
    Section,
    Stage,
    Task,
    TokenizerSection,
    Tunable,
)

MOST_LR = 100.0
MOST_RUNGS = 8
_SIZE = "it is a size of the model, which the question is about and all arms share"
_BUDGET = "it sets the length of a trial, which is the same for every trial"
_NOT_TUNED = {
    **dict.fromkeys(("n_layer", "d_model", "n_head", "n_ctx", "vocab_size"), _SIZE),
    **dict.fromkeys(("tokens", "steps"), _BUDGET),
    "micro_batch_tokens": "it changes the speed and the memory of a trial, not its result",
    **dict.fromkeys(("eval_every", "eval_windows"), "losses of different evaluations cannot be compared"),
}


class Study(Section):
    """A study: everything that answers one question."""

    name: str = Field(description="name of the study's folder in `studies/` and of its MLflow experiment")
    question: str = Field(max_length=2000, description="the question that the study answers, in one sentence")
    corpus: CorpusSection = Field(CorpusSection(), description="the text")
    tokenizer: TokenizerSection = Field(TokenizerSection(), description="the tokenizer of the text")
    task: Task = Field(
        Trial.task,
        description="prediction target. causal: the next token (GPT-2). masked: hidden tokens (BERT). span: hidden "
        "spans (T5, n_layer blocks per side). The loss is in nats per predicted token",
    )
    model: ModelSection = Field(ModelSection(), description="sizes of the model that all arms share")
    fixed: FixedSection = Field(FixedSection(), description="settings that are the same for every trial")
    nuisance: dict[Tunable, Distribution] = Field(
        description="hyperparameters that every arm tunes and calibrates so that the comparison is fair; always `lr`"
    )
    arms: dict[str, Arm] = Field(description="alternatives under comparison: two or more, one of them the baseline")
    contrasts: list[list[str]] = Field(
        [],
        description="pairs of two arms other than the baseline, such as [[relu2, silu]], that are compared too. The "
        "second arm is measured against the first. They belong to the same family as the arms",
    )
    stages: list[Stage] = Field(
        list(STAGES),
        description="stages that run. Without confirm there are few seeds and no verdict. Without calibrate an arm "
        "has the values of its best search trial, and equal arms are called different more often",
    )
    replicate: int = Field(
        0,
        ge=0,
        le=1000,
        description="number of a repetition of the study. Each one has seeds of its own in every stage, "
        f"{SEEDS_APART:_} apart, and a name of its own: the spread over replicates is that of the whole procedure",
    )
    scales: list[Rung] = Field(
        [],
        max_length=MOST_RUNGS,
        description="sizes at which the question is asked, from small to large, each with any keys of `model` and "
        "`fixed` and with `tokens_per_parameter`; none: one size",
    )
    ladder: LadderSection = Field(LadderSection(), description="how the sizes of `scales` build on each other")
    search: SearchSection = Field(SearchSection(), description="the search stage")
    calibrate: CalibrateSection = Field(CalibrateSection(), description="the calibrate stage")
    confirm: ConfirmSection = Field(ConfirmSection(), description="the confirm stage and the decision")
    resources: ResourcesSection = Field(ResourcesSection(), description="resources of one trial")
    keep: KeepSection = Field(KeepSection(), description="models and checkpoints that are kept")
    tracking: str | None = Field(
        None,
        description="MLflow tracking URI; default MLFLOW_TRACKING_URI, or else mlflow.db beside the studies. The path "
        "of sqlite:///mlflow.db starts at the working directory, as MLflow reads it",
    )
    address: str | None = Field(
        None, description="Ray cluster: `auto`, `HOST:PORT` or `ray://HOST:PORT`; default: trials run on this machine"
    )
    storage: str | None = Field(
        None, description="absolute path of a folder that all nodes of the cluster see, for tokens and checkpoints"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, given: str) -> str:
        if not NAME.fullmatch(given):
            raise ValueError(
                f"name '{given}' must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit (without the "
                "key name, it is the file's name)"
            )
        return given

    @field_validator("tracking")
    @classmethod
    def _tracking(cls, given: str | None) -> str | None:
        return given if given is None else check_tracking(given, "tracking", whole=False)

    @field_validator("address")
    @classmethod
    def _address(cls, given: str | None) -> str | None:
        return given if given is None else check_address(given)

    @field_validator("storage")
    @classmethod
    def _storage(cls, given: str | None) -> str | None:
        if given is not None and "://" in given:
            raise ValueError(
                f"storage '{redact(given)}' is a URL, where tokens cannot be mapped nor a checkpoint replaced in one "
                "step: give a mounted folder that every node sees, or none, and the tokens travel with the study"
            )
        if given is not None and not Path(given).is_absolute():
            raise ValueError(
                f"storage '{given}' is not an absolute path; allowed: a folder that all nodes see, such as /mnt/shared"
            )
        return given

    @field_validator("nuisance", mode="before")
    @classmethod
    def _nuisance(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if why := _NOT_TUNED.get(key):
                raise ValueError(f"{key} cannot be tuned: {why}; allowed: {', '.join(TUNABLE)}")
        return given

    @field_validator("arms")
    @classmethod
    def _arms(cls, given: dict[str, Arm]) -> dict[str, Arm]:
        for name in given:
            if not NAME.fullmatch(name):
                raise ValueError(f"arm '{name}' must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit")
        for role in ("baseline", "floor"):
            holders = [name for name, arm in given.items() if getattr(arm, role)]
            if len(holders) > 1:
                raise ValueError(f"{len(holders)} arms are the {role} ({', '.join(holders)}); only one can be")
            if role == "baseline" and not holders:
                if not given:
                    raise ValueError("has no arm; name two or more, one of them with baseline: true")
                raise ValueError(f"no arm of {', '.join(given)} has baseline: true; exactly one must")
        return given

    @field_validator("stages")
    @classmethod
    def _stages(cls, given: list[str]) -> list[str]:
        if given[:1] != ["search"] or given != [stage for stage in STAGES if stage in given]:
            raise ValueError(f"stages {given} must be search, then calibrate or confirm or both, in this order")
        return given

    _rung: int = PrivateAttr(0)  # of the study of one rung, from 1

    @model_validator(mode="after")
    def _search_arms(self) -> Study:
        if self.search.arms == "own" and not self.runs("calibrate"):
            raise ValueError(
                "search.arms: own leaves the nuisance hyperparameters to calibrate; add calibrate to stages, or take "
                "arms: all"
            )
        return self

    @model_validator(mode="after")
    def _contrasts(self) -> Study:
        seen: list[set[str]] = []
        for pair in self.contrasts:
            shown = f"contrasts: [{', '.join(pair)}]"
            if len(pair) != 2:
                raise ValueError(f"{shown} is no pair; allowed: two arms, such as [[relu2, silu]]")
            for arm in pair:
                if arm not in self.arms:
                    near = get_close_matches(arm, self.arms, 1)
                    hint = f"; did you mean '{near[0]}'?" if near else ""
                    raise ValueError(f"{shown}: there is no arm '{arm}'; the arms are {', '.join(self.arms)}{hint}")
                if arm == self.baseline:
                    raise ValueError(f"{shown}: {arm} is the baseline, with which every arm is compared: leave it out")
            if pair[0] == pair[1]:
                raise ValueError(f"{shown}: an arm is not compared with itself; name two arms")
            if set(pair) in seen:
                raise ValueError(f"{shown} is there twice; name each pair once")
            seen.append(set(pair))
        if self.contrasts and not self.runs("confirm"):
            raise ValueError("contrasts are decided on confirm seeds; add confirm to stages, or leave contrasts out")
        return self

    @model_validator(mode="after")
    def _together(self) -> Study:
        if len(self.arms) < 2 and self.runs("confirm"):
            raise ValueError(
                "a study needs a baseline and at least one arm to compare with it (or stages: [search], which compares "
                "nothing)"
            )
        lr = self.nuisance.get("lr")
        if lr is None:
            raise ValueError("nuisance.lr is missing: the learning rate is always tuned")
        if min(lr.values) <= 0 or max(lr.values) > MOST_LR:
            raise ValueError(f"nuisance.lr must be in (0, {MOST_LR:g}]; got {lr.values}")
        for key, where in self.nuisance.items():
            for value in where.values if key != "lr" else []:
                given = int(value) if key == "batch_tokens" and value.is_integer() else value
                try:
                    (ModelSection if key in MODEL_KEYS else FixedSection).model_validate({key: given})
                except ValidationError as error:
                    problem = error.errors()[0]["msg"]
                    raise ValueError(f"nuisance.{key} has {value}: {problem[:1].lower() + problem[1:]}") from error
        if "initializer_range" in self.nuisance and (self.model.pretrained or self.task == "span"):
            why = "the initial weights are those of model.pretrained" if self.model.pretrained else "T5 has its own"
            raise ValueError(f"nuisance.initializer_range has no effect: {why}; leave it out")
        if "batch_tokens" in self.nuisance:
            self._check_batches(self.nuisance["batch_tokens"])
        if self.search.sampler == "grid":
            self._check_grid()
        fixed, n_ctx = self.fixed, self.model.n_ctx
        if fixed.batch_tokens % n_ctx:
            raise ValueError(f"fixed.batch_tokens={fixed.batch_tokens} is not a multiple of model.n_ctx={n_ctx}")
        if self.model.pretrained and not (self.tokenizer.pretrained or self.tokenizer.path):
            raise ValueError(
                f"model.pretrained={self.model.pretrained} needs the tokenizer that its weights were trained with: "
                "tokenizer: {pretrained: NAME} or {path: FOLDER}"
            )
        micro = fixed.micro_batch_tokens
        if micro is not None and (micro % n_ctx or fixed.batch_tokens % micro):
            raise ValueError(
                f"fixed.micro_batch_tokens={micro} is not a multiple of model.n_ctx={n_ctx} that divides "
                f"fixed.batch_tokens={fixed.batch_tokens}"
            )
        if fixed.padding and self.corpus.rows == "packed":
            raise ValueError(f"fixed.padding={fixed.padding} needs corpus.rows: lines; packed windows have no padding")
        if fixed.tokens < 2 * fixed.batch_tokens:
            raise ValueError(f"fixed.tokens={fixed.tokens} is less than two steps of batch_tokens={fixed.batch_tokens}")
        if self.task != "causal":
            self._check_task()
        if self.scales:
            self._check_scales()
            return self  # the arms are checked at each size
        for name, arm in self.arms.items():
            if isinstance(arm.alpha, list) and len(arm.alpha) != self.mlps:
                side = " per side" if self.task == "span" else ""
                raise ValueError(
                    f"arms.{name}.alpha lists {len(arm.alpha)} values; model.n_layer={self.model.n_layer}{side} needs "
                    f"{self.mlps}"
                )
        return self

    def _check_scales(self) -> None:
        """Give each rung of the ladder its tokens. Raise ValueError, which names the rung, for a bad one."""
        self._check_ladder_stages()
        if self.model.pretrained:
            raise ValueError("scales is not for model.pretrained: initial weights have a size of their own")
        named = self.fixed.tokens != FixedSection.model_fields["tokens"].default
        if named and not all({"tokens", "steps"} & set(rung.model_dump(exclude_none=True)) for rung in self.scales):
            raise ValueError(
                f"fixed.tokens={self.fixed.tokens} is for a study of one size: with scales, a trial has "
                f"{TOKENS_PER_PARAMETER:g} tokens per parameter, or the tokens of its rung; leave it out"
            )
        sizes, rungs = list(self.scales), []
        for number, rung in enumerate(sizes, 1):
            try:
                sizes[number - 1] = with_tokens(rung, self.model, self.fixed, self.tokenizer, self.task == "causal")
                self.__dict__["scales"] = sizes  # the fields of a section are frozen
                rungs.append(self.at(number))
            except ValueError as error:
                said = str(error)
                if isinstance(error, ValidationError):
                    problem = error.errors()[0]
                    where = ".".join(map(str, problem["loc"]))
                    said = (f"{where}: " if where else "") + problem["msg"].removeprefix("Value error, ")
                raise ValueError(f"scales: rung {number}: {said}") from error
        for number, (before, after) in enumerate(pairwise(rung.compute for rung in rungs), 2):
            if after <= before:
                raise ValueError(
                    f"scales: rung {number} has {after:.3g} FLOPs per trial and rung {number - 1} has {before:.3g}; "
                    "order them from small to large"
                )
        for arm in self.arms if self.ladder.search == "lowest" else ():
            if len({tuple(rung.space(arm)) for rung in rungs}) > 1:
                raise ValueError(
                    f"arms.{arm} searches other hyperparameters at other sizes (one alpha per layer); give all rungs "
                    "the same n_layer, or ladder: {search: every}"
                )

    def _check_ladder_stages(self) -> None:
        if not all(map(self.runs, ("calibrate", "confirm"))):
            raise ValueError("scales needs the stages search, calibrate and confirm, because every size is calibrated")

    def _check_task(self) -> None:
        model, sizes = self.model, ModelSection.model_fields
        own: dict[str, Any] = {
            "model.pretrained": model.pretrained,
            "model.activation": model.activation if model.activation != sizes["activation"].default else None,
            "corpus.rows": "lines" if self.corpus.rows == "lines" else None,
        }
        if self.task == "span":
            scale = model.initializer_range
            own["model.initializer_range"] = scale if scale != sizes["initializer_range"].default else None
        for key, value in own.items():
            if value is not None:
                raise ValueError(f"{key}={value} is not for task: {self.task}; leave it out")
        for name, arm in self.arms.items():
            if self.task == "span" and arm.base == "gelu":
                raise ValueError(
                    f"arms.{name}.base is gelu; with task: span the stock activation is ReLU: leave it out"
                )
            if self.task == "masked" and arm.is_glu:
                glu = f"unit {arm.unit}" if arm.unit else "form glu"
                raise ValueError(f"arms.{name} has {glu}, which does not fit BERT's MLP of two modules: leave it out")

    @property
    def batch_limits(self) -> tuple[int, int]:
        """The tokens of which a step has a multiple, and the most that a tuned batch may have."""
        return batch_limits(self.model.model_dump(), self.fixed.model_dump())

    def _check_batches(self, where: Distribution) -> None:
        unit, most = self.batch_limits
        what = "fixed.micro_batch_tokens" if self.fixed.micro_batch_tokens else "model.n_ctx"
        for value in where.values:
            if value % unit or value > most:
                raise ValueError(
                    f"nuisance.batch_tokens has {value:.15g}; allowed: multiples of {what}={unit} up to {most}, half "
                    f"of fixed.tokens={self.fixed.tokens}"
                )

    def _check_grid(self) -> None:
        for arm in filter(self.searches, self.arms):
            space = self.space(arm)
            ranges = [name for name, where in space.items() if where.choice is None]
            if ranges:
                raise ValueError(
                    f"search.sampler: grid takes choices only; arm '{arm}' searches a range of {ranges[0]}"
                )
            points = math.prod(len(where.values) for where in space.values())
            if self.search.trials_per_arm != points:
                raise ValueError(
                    f"search.trials_per_arm={self.search.trials_per_arm} is not the {points} combinations that arm "
                    f"'{arm}' has for sampler: grid"
                )

    @property
    def mlps(self) -> int:
        """Number of MLPs of the model, one per block. T5 has n_layer blocks per side."""
        return self.model.n_layer * (2 if self.task == "span" else 1)

    def runs(self, stage: str) -> bool:
        """Return True if the study has the stage."""
        return stage in self.stages

    @property
    def rung(self) -> int:
        """Number of the rung, from 1, of the study of a rung; 0 for any other study."""
        return self._rung

    def searches(self, arm: str) -> bool:
        """Return True if an arm searches, here if this is the study of a rung.

        Above the lowest rung of a ladder the arms do so only if `ladder.search` says.
        """
        if not self.runs("search") or (self._rung > 1 and self.ladder.search == "lowest"):
            return False
        return self.search.arms == "all" or bool(self.space(arm).keys() - self.nuisance.keys())

    @property
    def rungs(self) -> list[Study]:
        """The study of each rung, from the lowest; of a study of one size, itself."""
        return [self.at(rung) for rung in range(1, len(self.scales) + 1)] or [self]

    def at(self, rung: int, without: Collection[str] = ()) -> Study:
        """Return the study of a rung of the ladder, or this study for rung 0.

        It is a study of one size, with `confirm.level` divided by the number of rungs, which corrects the verdicts
        over rungs (Bonferroni), and with seeds of its own, which makes the rungs independent.

        Args:
            rung: Number of the rung, from 1.
            without: Arms that were dropped below the rung.
        """
        if not rung:
            return self
        found = Study.model_validate(rung_content(self.model_dump(exclude_none=True), self.scales[rung - 1], without))
        found._rung = rung
        return found

    @property
    def compute(self) -> float:
        """Training FLOPs of one trial of a stock GPT-2 of the study's sizes. It orders the rungs of a ladder."""
        return training_flops(self.model, self.fixed, self.tokenizer)

    def seed(self, seed: int) -> int:
        """Return the seed that this replicate and this rung have where replicate 0 of a plain study has `seed`."""
        return seed + SEEDS_APART * self.replicate + RUNGS_APART * max(0, self._rung - 1)

    def tests(self, stage: str) -> bool:
        """Return True if the trials of a stage also evaluate the test split, as in the study's last stage."""
        return stage == self.stages[-1]

    @property
    def baseline(self) -> str:
        """Name of the baseline arm."""
        return next(name for name, arm in self.arms.items() if arm.baseline)

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """The comparisons of the study, as reference and arm: every arm with the baseline, then the contrasts."""
        arms = [(self.baseline, arm) for arm in self.arms if arm != self.baseline]
        return arms + [(reference, arm) for reference, arm in self.contrasts]

    def space(self, arm: str) -> dict[str, Distribution]:
        """Return the hyperparameters that an arm's search tunes: the nuisance ones of all arms, then the arm's own."""
        return {**self.nuisance, **self.arms[arm].searched(self.mlps)}

    @property
    def first(self) -> str | None:
        """Name of the hyperparameter that is tuned first: `lr`, or another one if the study has none; None without."""
        return first_of(self.ranges)

    @property
    def ranges(self) -> dict[str, dict[str, list[float]]]:
        """The search range of each nuisance hyperparameter, with the one key that it has."""
        return {name: where.model_dump(exclude_none=True) for name, where in self.nuisance.items()}

    def setting(self, config: Mapping[str, float]) -> str:
        """Return values of hyperparameters that tell trials of an arm apart, such as ` lr=1.0e-03 alpha=0.50`."""
        alpha = f" alpha={config['alpha']:.2f}" if "alpha" in config else ""
        return f" lr={config['lr']:.1e}{alpha}"

    @property
    def shown(self) -> Mapping[str, str]:
        """Names in tables, MLflow and messages of the ledger's columns whose name is another one there."""
        return {}

    @property
    def sign(self) -> int:
        """Factor that makes a loss of the metric, or the metric of a loss: 1, or -1 if a higher value is better."""
        return 1

    @property
    def overlap(self) -> float:
        """Size of a test set divided by that of its training set, if a seed also splits one data set; else 0."""
        return 0.0

    def resolved(self, arm: str) -> Arm:
        """Return an arm with all that it has from other arms."""
        return self.arms[arm]

    def length(self, arm: str, steps: int) -> int:
        """Return the updates of an arm's trials, of a whole trial of `steps`."""
        return steps

    def with_precision(self, precision: str) -> Study:
        """Return the study with another precision."""
        return self.model_copy(update={"fixed": self.fixed.model_copy(update={"precision": precision})})

    def digest(self, *without: str) -> str:
        """Return the digest of the study's resolved content without the dotted keys in `without`."""
        content = self.model_dump()
        for dotted in without:
            *parents, leaf = dotted.split(".")
            section = content
            for parent in parents:
                section = section[parent]
            section.pop(leaf)
        return digest(content)


def digest(content: Any) -> str:
    """Return the first 12 hexadecimal digits of SHA-256 over canonical JSON."""
    raw = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(raw.encode()).hexdigest()[:12]
