"""The sections of a study file: every key with its type, range and meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema

from analysis.io.names import STAGES
from pagating.gating.schedules import SCHEDULES
from pagating.model.size import ACTIVATIONS, PRESETS, SIZE_LIMITS, GPT2Size
from pagating.trial import LIMITS, PADDINGS, PRECISIONS, TASKS, Trial

NAME = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TRIAL_KEYS = ("lr", "weight_decay", "warmup", "final_lr", "beta1", "beta2", "clip", "batch_tokens")  # fields of `Trial`
MODEL_KEYS = ("dropout", "initializer_range")  # of the section `model`
TUNABLE = (*TRIAL_KEYS, *MODEL_KEYS)
AUTO = "auto"  # a precision that is decided when the study starts
TOKENS_PER_PARAMETER = 20.0  # of a rung (Hoffmann et al. 2022, arXiv 2203.15556)


class OneOf:
    """Restrict an annotated text to `names`, as `Literal` does for names that are written out."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


Stage = Annotated[str, OneOf(STAGES)]
Task = Annotated[str, OneOf(TASKS)]
Tunable = Annotated[str, OneOf(TUNABLE)]


class Section(BaseModel):
    """A mapping of the study file. Unknown keys are errors, and text is never read as a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Distribution(Section):
    """The range in which a hyperparameter is searched: exactly one of the three keys."""

    uniform: list[float] | None = Field(None, description="[low, high]")
    loguniform: list[float] | None = Field(None, description="[low, high], both above 0, uniform in the logarithm")
    choice: list[float] | None = Field(None, description="list of the values that a search tries")

    @property
    def values(self) -> list[float]:
        """The ends of the range, or the list of allowed values."""
        return self.uniform or self.loguniform or self.choice or []

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = [name for name in ("uniform", "loguniform", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of uniform, loguniform, choice (given: {', '.join(given) or 'none'})")
        values = getattr(self, given[0])
        if given[0] == "choice":
            if not values:
                raise ValueError("choice needs at least one value")
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"choice has {twice[0]:g} twice; name each value once")
        elif len(values) != 2:
            raise ValueError(f"{given[0]} needs two numbers, [low, high]; got {values}")
        elif not values[0] < values[1]:
            raise ValueError(f"{given[0]} {values} is upside down: low must be below high")
        elif given[0] == "loguniform" and values[0] <= 0:
            raise ValueError(f"loguniform {values} must lie above 0")
        return self


class Files(Section):
    """Text files or globs, relative to the study file. Missing splits are cut from the end of `train`."""

    train: str | list[str] = Field(description="training text: a path, a glob, or a list of them")
    validation: str | list[str] | None = Field(None, description="validation text")
    test: str | list[str] | None = Field(None, description="test text")
    fractions: dict[Literal["validation", "test"], float] | None = Field(
        None, description="share of the training text that each missing split gets, in (0, 0.5); default 0.05"
    )

    @field_validator("fractions")
    @classmethod
    def _share(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        for split, share in (given or {}).items():
            if not 0 < share < 0.5:
                raise ValueError(f"the share of {split} is {share}; it must lie in (0, 0.5)")
        return {"validation": 0.05, "test": 0.05, **given} if given else given


class Hub(Section):
    """A dataset of the Hugging Face hub, or a local folder in any layout that `datasets` reads."""

    name: str = Field(
        min_length=1,
        description="folder, relative to the study file, with txt, csv, json, jsonl, parquet or arrow files or what "
        "`save_to_disk` wrote; else a name on the hub, such as Salesforce/wikitext",
    )
    config: str | None = Field(None, description="configuration, such as wikitext-103-raw-v1")
    column: str | None = Field(None, description="column with the text; default `text`, or else the only one of text")
    revision: str | None = Field(None, description="commit or tag of the dataset; makes the study repeatable")


class CorpusSection(Section):
    """The source of the text: the built-in corpus, the hub, or files."""

    source: Literal["builtin", "hub", "files"] | None = Field(None, description="builtin: the King James Bible")
    hub: Hub | None = Field(None, description="a dataset of the Hugging Face hub")
    files: Files | None = Field(None, description="your own text files")
    rows: Literal["packed", "lines"] = Field(
        "packed",
        description="training rows. packed: windows of the whole text. lines: single lines, each cut or padded to "
        "n_ctx tokens as in the published study; a blank line is all padding. The deciding loss is that of windows",
    )

    @model_validator(mode="after")
    def _one(self) -> CorpusSection:
        if self.hub and self.files:
            raise ValueError("give one of hub and files, not both")
        for kind in ("hub", "files"):
            if self.source == kind and getattr(self, kind) is None:
                raise ValueError(f"source: {kind} needs the section {kind}: {{...}}")
        if self.source == "builtin" and (self.hub or self.files):
            raise ValueError("source: builtin allows no hub or files section")
        return self

    @property
    def called(self) -> str:
        """Name of the text for a reader: its name on the hub, the first training file, or the built-in book."""
        if self.hub:
            return f"{self.hub.name} {self.hub.config or ''}".strip()
        if self.files:
            train = self.files.train
            return Path(train if isinstance(train, str) else train[0]).name
        return "King James Bible"


class TokenizerSection(Section):
    """A byte-level BPE that is trained on the training split, or a pretrained tokenizer."""

    vocab_size: int = Field(
        1024, ge=257, le=1 << 20, description="size of the vocabulary that is trained; a given tokenizer has its own"
    )
    pretrained: str | None = Field(
        None, min_length=1, description="name on the hub, such as gpt2; it defines vocab_size"
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="folder with tokenizer.json or vocab.json and merges.txt, or a tokenizer.json, relative to the "
        "study file",
    )

    @model_validator(mode="after")
    def _one(self) -> TokenizerSection:
        if self.pretrained and self.path:
            raise ValueError("give one of pretrained and path, not both")
        return self


class ModelSection(Section):
    """GPT-2 by its sizes, or by a preset, of which single sizes can be overridden."""

    preset: Annotated[str, OneOf(PRESETS)] | None = Field(None, description="sizes of a published GPT-2")
    pretrained: str | None = Field(
        None,
        min_length=1,
        description="initial weights: a folder with model.safetensors, or a name on the hub, such as gpt2. Sizes and "
        "tokenizer must be theirs; n_ctx may be smaller. The MLPs of an arm with form glu or projected start untrained",
    )
    n_layer: int = Field(4, **SIZE_LIMITS["n_layer"], description="number of blocks")
    d_model: int = Field(128, **SIZE_LIMITS["d_model"], description="width; a multiple of n_head")
    n_head: int = Field(4, **SIZE_LIMITS["n_head"], description="number of attention heads")
    n_ctx: int = Field(128, **SIZE_LIMITS["n_ctx"], description="length of a window in tokens")
    dropout: float = Field(
        GPT2Size.dropout, **SIZE_LIMITS["dropout"], description="dropout rate of embeddings, attention and residuals"
    )
    initializer_range: float = Field(
        GPT2Size.initializer_range,
        **SIZE_LIMITS["initializer_range"],
        description="standard deviation of the initial weights; 0.02 is meant for d_model 768 and more",
    )
    activation: Annotated[str, OneOf(ACTIVATIONS)] = Field(
        "gelu_pytorch_tanh",
        description="the stock activation: GPT-2's tanh GELU, fused, or made of single operations as published",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("preset"), str) and given["preset"] in PRESETS:
            return {**PRESETS[given["preset"]], **given}
        return given

    def sizes(self) -> dict[str, Any]:
        """Return the arguments of `GPT2Size` except the vocabulary."""
        return self.model_dump(exclude={"preset", "pretrained"})

    @model_validator(mode="after")
    def _heads(self) -> ModelSection:
        GPT2Size(vocab_size=1, **self.sizes())  # raises ValueError
        return self


class FixedSection(Section):
    """The settings that are the same for every trial."""

    tokens: int = Field(400_000, **LIMITS["tokens"], description="training tokens per trial")
    steps: int | None = Field(
        None, ge=1, le=10**12, description="instead of tokens; the study keeps tokens = steps x batch_tokens"
    )
    batch_tokens: int = Field(2048, **LIMITS["batch_tokens"], description="tokens per step, a multiple of model.n_ctx")
    micro_batch_tokens: int | None = Field(
        Trial.micro_batch_tokens,
        **LIMITS["micro_batch_tokens"],
        description="tokens whose gradient is computed at once, if a whole step does not fit into memory: a multiple "
        "of model.n_ctx that divides batch_tokens",
    )
    schedule: Annotated[str, OneOf(SCHEDULES)] = Field(Trial.schedule, description="decay of the learning rate")
    warmup: float = Field(
        Trial.warmup, **LIMITS["warmup"], description="share of the steps in which the learning rate rises"
    )
    final_lr: float = Field(
        Trial.final_lr, **LIMITS["final_lr"], description="last learning rate as a share of the peak"
    )
    weight_decay: float = Field(
        Trial.weight_decay, **LIMITS["weight_decay"], description="of matrices only, never of an alpha"
    )
    beta1: float = Field(Trial.beta1, **LIMITS["beta1"], description="AdamW's decay rate of the mean gradient")
    beta2: float = Field(Trial.beta2, **LIMITS["beta2"], description="AdamW's decay rate of the mean squared gradient")
    clip: float = Field(Trial.clip, **LIMITS["clip"], description="largest norm of the gradient")
    precision: Annotated[str, OneOf((*PRECISIONS, AUTO))] = Field(
        Trial.precision,
        description="of matrix products; weights are float32. auto: the machine that starts the study decides it once: "
        "bfloat16 if there are units for it and ten seconds of training find it 1.1 times as fast, else float32",
    )
    eval_every: int | None = Field(
        Trial.eval_every,
        **LIMITS["eval_every"],
        description="steps between two evaluations; default a tenth of the trial",
    )
    eval_windows: int = Field(
        Trial.eval_windows, **LIMITS["eval_windows"], description="windows per evaluation, the same for every trial"
    )
    padding: Annotated[str, OneOf(PADDINGS)] | None = Field(
        None,
        description="only with corpus.rows: lines. counted (the default there): padding is part of the training loss, "
        "as published. masked: it is not",
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens(cls, given: Any) -> Any:
        """Replace `steps` by `tokens`, so that two files with the same meaning resolve to the same study."""
        if not isinstance(given, dict) or type(given.get("steps")) is not int or given["steps"] < 1:
            return given
        batch = given.get("batch_tokens", cls.model_fields["batch_tokens"].default)
        if "tokens" in given:
            raise ValueError(
                f"give one of tokens and steps, not both (tokens={given['tokens']}, steps={given['steps']})"
            )
        if not isinstance(batch, int):
            return given
        return {**{key: value for key, value in given.items() if key != "steps"}, "tokens": given["steps"] * batch}


class RungSection(Section):
    """One size of a ladder: any keys of `model` and `fixed`, which replace the study's, and its tokens."""

    tokens_per_parameter: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description=f"training tokens per trial as a multiple of the stock model's parameters; default "
        f"{TOKENS_PER_PARAMETER:g}, unless the rung has `tokens` or `steps`",
    )


def _rung_field(name: str) -> tuple[Any, Any]:
    found = copy(_RUNG_FIELDS[name])
    found.default, kind = None, found.annotation
    return (kind if name in _OPTIONAL else kind | None), found  # type: ignore[operator]


_RUNG_FIELDS = {**ModelSection.model_fields, **FixedSection.model_fields}
_OPTIONAL = [name for name, field in _RUNG_FIELDS.items() if field.default is None]
RUNG_KEYS = tuple(_RUNG_FIELDS)
if TYPE_CHECKING:
    Rung = RungSection
else:
    Rung = create_model(
        "Rung", __base__=RungSection, __doc__=RungSection.__doc__, **{name: _rung_field(name) for name in RUNG_KEYS}
    )


class LadderSection(Section):
    """How the rungs of `scales` build on each other."""

    search: Literal["lowest", "every"] = Field(
        "lowest",
        description="lowest: arms search on the smallest rung only; above it, calibrate starts at the prediction from "
        "the rungs below. every: each rung has a search of its own",
    )
    drop: bool = Field(
        False, description="true: an arm that was worse than the baseline on two rungs does not run above them"
    )


class SearchSection(Section):
    """The search stage: every arm that searches gets the same number of trials and tokens."""

    trials_per_arm: int = Field(6, ge=1, le=100_000, description="trials per arm, including the baseline")
    arms: Literal["all", "own"] = Field(
        "all",
        description="own: only arms with a hyperparameter of their own search; calibrate tunes the nuisance "
        "hyperparameters of all arms, from the middle of their ranges",
    )
    sampler: Literal["tpe", "random", "qmc", "grid"] = Field(
        "tpe",
        description="tpe learns from earlier trials; random and qmc do not (all three are Optuna's); grid takes every "
        "combination of the choices once, in order",
    )
    pruner: Literal["asha", "none"] = Field("asha", description="early stopping, within an arm only")
    spare: float = Field(0.5, gt=0, lt=1, description="share of the budget before which no trial is stopped")
    keep: float = Field(0.5, gt=0, lt=1, description="share of an arm's trials that continue beyond that point")
    parallel: int = Field(
        1,
        ge=1,
        le=100_000,
        description="trials of one arm at the same time; a suggestion uses all earlier trials except the last "
        "`parallel - 1`",
    )


class CalibrateSection(Section):
    """The calibrate stage: shared points of every nuisance hyperparameter."""

    points: int = Field(3, ge=3, le=99, description="points of each grid before it is extended")
    spacing: float = Field(2.0, gt=1, le=100, description="ratio of neighbouring learning rates")
    seeds: int = Field(2, ge=1, le=10, description="selection seeds per point")
    max_points: int = Field(9, ge=3, le=99, description="largest number of points of each extended grid")
    choice: Literal["fit", "grid"] = Field(
        "fit",
        description="an arm's values: the minimum of a quadratic fit, or the grid point of best mean",
    )

    @model_validator(mode="after")
    def _cap(self) -> CalibrateSection:
        if self.max_points < self.points:
            raise ValueError(f"max_points={self.max_points} is below points={self.points}")
        return self


class ConfirmSection(Section):
    """The confirm stage and its test, both fixed before anything runs."""

    seeds: int = Field(10, ge=2, le=100, description="fresh seeds of the fixed rule; at least 8 for a claim")
    rule: Literal["fixed", "obrien-fleming", "e-process"] = Field(
        "fixed", description="fixed: stop at `seeds`; the sequential rules: stop as soon as every arm is decided"
    )
    reserve: float = Field(
        0.0,
        ge=0,
        le=0.25,
        description="share of `level` that the fixed rule keeps for seeds that are added after a verdict, such as 0.2. "
        "With 0, a verdict on added seeds says that the level no longer holds",
    )
    racing: bool = Field(
        True,
        description="true: an arm that is decided at a look trains no further; with added seeds of the fixed rule, if "
        "it has 8 or more. false: all arms go on",
    )
    test: Literal["paired", "welch"] = Field(
        "paired",
        description="paired: t test of differences by seed; welch: Welch's test of runs, if a seed does not make them "
        "alike; only with the fixed rule, without reserve",
    )
    max_seeds: int | None = Field(
        None, ge=3, le=100, description="cap of a sequential rule; default 10 for obrien-fleming, 20 for e-process"
    )
    first_seed: int = Field(
        101,
        ge=101,
        le=10**6,
        description="first of the fresh seeds; a study that builds on another's confirm trials starts beyond theirs",
    )
    level: float = Field(0.05, gt=0, lt=0.5, description="type I error rate of the family of comparisons")
    correction: Literal["holm", "none"] = Field(
        "holm", description="holm: p values corrected for the number of arms; none: each arm is tested at `level`"
    )
    margin: str | float = Field(
        "0.5%", description="smallest difference that matters: a percentage of the baseline's loss, or nats"
    )

    @model_validator(mode="after")
    def _cap(self) -> ConfirmSection:
        if self.rule == "fixed" and self.max_seeds is not None:
            raise ValueError(f"max_seeds={self.max_seeds} is for a sequential rule; the fixed rule takes seeds")
        if self.rule != "fixed" and self.seeds != type(self).model_fields["seeds"].default:
            raise ValueError(f"seeds={self.seeds} is for the fixed rule; {self.rule} takes max_seeds")
        if self.rule != "fixed" and self.reserve:
            raise ValueError(f"reserve={self.reserve:g} is for the fixed rule; {self.rule} needs none: leave it out")
        if self.test != "paired" and (self.rule != "fixed" or self.reserve):
            looks = self.rule if self.rule != "fixed" else f"reserve={self.reserve:g}"
            raise ValueError(f"test={self.test} has no looks; {looks} takes the paired test")
        return self

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of confirm seeds after which the arms are compared. The last is the largest possible number."""
        if self.rule == "fixed":
            return (self.seeds,)
        from analysis.stats.sequential import plan  # its libraries take seconds to load

        return plan(self.rule, self.max_seeds)

    @field_validator("margin")
    @classmethod
    def _margin(cls, given: str | float) -> str | float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", given) if isinstance(given, str) else None
        if isinstance(given, str) and not match:
            raise ValueError(f"margin '{given}' is neither a percentage such as 0.5% nor a number of nats")
        if not 0 < (float(match[1]) if match else float(given)) <= 100:
            raise ValueError(f"margin {given} is not in (0, 100]")
        return given


class KeepSection(Section):
    """The files that a study keeps of its trials beside their results."""

    models: Literal["best", "none"] = Field(
        "best",
        description="best: keep each arm's model with the lowest val_nll of the last stage, in `models/ARM/` and in "
        "MLflow, for `pagating.load_model`; on a cluster only if `storage` is given. none: keep no model",
    )
    checkpoints: bool = Field(
        False,
        description="true: the last two checkpoints of each trial that ran long enough to write some stay in "
        "`checkpoints/CELL/`; false: they are removed when the trial ends",
    )


class ResourcesSection(Section):
    """The resources of one trial."""

    cpus: int = Field(Trial.threads, **LIMITS["threads"], description="cores, and threads, per trial")
    gpus: float = Field(
        0.0,
        ge=0,
        le=64,
        description="GPUs per trial: a share such as 0.25, or a whole number; it trains on one of them",
    )
    stall_timeout: float = Field(
        600.0, ge=1, le=1e7, description="seconds without a heartbeat after which a trial is ended and retried"
    )

    @field_validator("gpus")
    @classmethod
    def _gpus(cls, given: float) -> float:
        if given > 1 and given != int(given):
            raise ValueError(f"gpus={given}: a trial takes a share of one GPU, up to 1, or a whole number of GPUs")
        if 0 < given < 1e-4:  # Ray counts them in ten-thousandths, and would give a trial none
            raise ValueError(f"gpus={given}: the smallest share of a GPU is 0.0001")
        return given
