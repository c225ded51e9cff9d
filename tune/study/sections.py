"""The sections of a study file: every key with its type, range and meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema

from analysis.io.names import STAGES
from pagating.gating.schedules import SCHEDULES
from pagating.model.size import ACTIVATIONS, PRESETS, GPT2Size
from pagating.trial import PADDINGS, PRECISIONS, TASKS, Trial

NAME = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TUNABLE = ("lr", "weight_decay", "warmup", "final_lr", "beta1", "beta2", "clip")  # fields of `Trial`


class OneOf:
    """Make an annotated text one of these names, as `Literal` does for names that are written out."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


Stage = Annotated[str, OneOf(STAGES)]
Task = Annotated[str, OneOf(TASKS)]
Tunable = Annotated[str, OneOf(TUNABLE)]


class Section(BaseModel):
    """A mapping of the study file: unknown keys are errors, text is never read as a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Distribution(Section):
    """Where a hyperparameter is searched: exactly one of the three."""

    uniform: list[float] | None = Field(None, description="[low, high]")
    loguniform: list[float] | None = Field(None, description="[low, high], both above 0, uniform in the logarithm")
    choice: list[float] | None = Field(None, description="the values to choose from")

    @property
    def values(self) -> list[float]:
        """The ends of the range, or the values to choose from."""
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
        elif len(values) != 2:
            raise ValueError(f"{given[0]} needs two numbers, [low, high]; got {values}")
        elif not values[0] < values[1]:
            raise ValueError(f"{given[0]} {values} is upside down: low must be below high")
        elif given[0] == "loguniform" and values[0] <= 0:
            raise ValueError(f"loguniform {values} must lie above 0")
        return self


class Files(Section):
    """Text files or globs, relative to the study file. Splits that are not given are cut from the end of `train`."""

    train: str | list[str] = Field(description="training text: a path, a glob, or a list of them")
    validation: str | list[str] | None = Field(None, description="validation text")
    test: str | list[str] | None = Field(None, description="test text")
    fractions: dict[Literal["validation", "test"], float] | None = Field(
        None,
        description="share of the training text for a split that is not given, each in (0, 0.5); default 0.05",
    )

    @field_validator("fractions")
    @classmethod
    def _share(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        for split, share in (given or {}).items():
            if not 0 < share < 0.5:
                raise ValueError(f"the share of {split} is {share}; it must lie in (0, 0.5)")
        return {"validation": 0.05, "test": 0.05, **given} if given else given


class Hub(Section):
    """A dataset of the Hugging Face hub, or a local folder in its layout."""

    name: str = Field(description="such as Salesforce/wikitext")
    config: str | None = Field(None, description="such as wikitext-103-raw-v1")
    column: str = Field("text", description="the column with the text")
    revision: str | None = Field(None, description="a commit or tag of the dataset, for a study that can be repeated")


class CorpusSection(Section):
    """Where the text comes from: the built-in corpus, the hub, or files."""

    source: Literal["builtin", "hub", "files"] | None = Field(None, description="builtin: the King James Bible")
    hub: Hub | None = Field(None, description="a dataset of the Hugging Face hub")
    files: Files | None = Field(None, description="your own text files")
    rows: Literal["packed", "lines"] = Field(
        "packed",
        description="what is trained on: windows of the whole text, or single lines, each cut or padded to n_ctx "
        "tokens as in the published study (a blank line is all padding); the loss that decides is that of windows",
    )

    @model_validator(mode="after")
    def _one(self) -> CorpusSection:
        if self.hub and self.files:
            raise ValueError("give one of hub and files, not both")
        for kind in ("hub", "files"):
            if self.source == kind and getattr(self, kind) is None:
                raise ValueError(f"source: {kind} needs the section {kind}: {{...}}")
        if self.source == "builtin" and (self.hub or self.files):
            raise ValueError("source: builtin takes no hub or files section")
        return self

    @property
    def called(self) -> str:
        """The name of the text for a reader: its name on the hub, the first training file, or the book."""
        if self.hub:
            return f"{self.hub.name} {self.hub.config or ''}".strip()
        if self.files:
            train = self.files.train
            return Path(train if isinstance(train, str) else train[0]).name
        return "King James Bible"


class TokenizerSection(Section):
    """Byte-level BPE trained on the training split, or a pretrained tokenizer."""

    vocab_size: int = Field(1024, ge=257, le=1 << 20, description="size of the vocabulary that is trained")
    pretrained: str | None = Field(None, description="name on the hub, such as gpt2; vocab_size is then its own")
    path: str | None = Field(None, description="folder with tokenizer.json or vocab.json and merges.txt")

    @model_validator(mode="after")
    def _one(self) -> TokenizerSection:
        if self.pretrained and self.path:
            raise ValueError("give one of pretrained and path, not both")
        return self


class ModelSection(Section):
    """GPT-2 by its sizes, or a preset with single sizes overridden."""

    preset: Annotated[str, OneOf(PRESETS)] | None = Field(None, description="sizes of a published GPT-2")
    pretrained: str | None = Field(
        None,
        description="weights to start from: a folder with model.safetensors, or a name on the hub, such as gpt2; sizes "
        "and tokenizer are then theirs, n_ctx at most. An arm of form glu or projected keeps its MLPs new",
    )
    n_layer: int = Field(4, ge=1, le=200, description="blocks")
    d_model: int = Field(128, ge=2, le=65536, description="width; a multiple of n_head")
    n_head: int = Field(4, ge=1, le=1024, description="attention heads")
    n_ctx: int = Field(128, ge=2, le=1 << 17, description="window, tokens")
    dropout: float = Field(
        GPT2Size.dropout, ge=0, lt=1, description="share dropped from embeddings, attention and residuals"
    )
    initializer_range: float = Field(
        GPT2Size.initializer_range,
        gt=0,
        le=1,
        description="standard deviation of the initial weights; 0.02 is meant for d_model 768 and more",
    )
    activation: Annotated[str, OneOf(ACTIVATIONS)] = Field(
        "gelu_pytorch_tanh",
        description="the stock activation: GPT-2's tanh GELU, fused, or composed of single operations as published",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("preset"), str) and given["preset"] in PRESETS:
            return {**PRESETS[given["preset"]], **given}
        return given

    def sizes(self) -> dict[str, Any]:
        """Return the arguments of `GPT2Size`, but for the vocabulary."""
        return self.model_dump(exclude={"preset", "pretrained"})

    @model_validator(mode="after")
    def _heads(self) -> ModelSection:
        GPT2Size(vocab_size=1, **self.sizes())  # raises ValueError
        return self


class FixedSection(Section):
    """What is held the same for every trial."""

    tokens: int = Field(400_000, ge=1, le=10**13, description="training tokens a trial")
    steps: int | None = Field(
        None, ge=1, le=10**12, description="in the place of tokens: steps x batch_tokens, which is what the study keeps"
    )
    batch_tokens: int = Field(2048, ge=2, le=10**9, description="tokens a step, a multiple of model.n_ctx")
    micro_batch_tokens: int | None = Field(
        Trial.micro_batch_tokens,
        ge=2,
        le=10**9,
        description="tokens whose gradient is taken at a time, where a step does not fit into memory at once: a "
        "multiple of model.n_ctx that divides batch_tokens",
    )
    schedule: Annotated[str, OneOf(SCHEDULES)] = Field(Trial.schedule, description="decay of the learning rate")
    warmup: float = Field(Trial.warmup, ge=0, lt=1, description="share of the steps with a rising learning rate")
    final_lr: float = Field(Trial.final_lr, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    weight_decay: float = Field(Trial.weight_decay, ge=0, le=10, description="on matrices only; never on an alpha")
    beta1: float = Field(Trial.beta1, ge=0, lt=1, description="AdamW's decay of the mean of the gradients")
    beta2: float = Field(Trial.beta2, ge=0, lt=1, description="AdamW's decay of the mean of their squares")
    clip: float = Field(Trial.clip, gt=0, description="largest norm of the gradient")
    precision: Annotated[str, OneOf(PRECISIONS)] = Field(
        Trial.precision, description="of the matrix products; weights are float32"
    )
    eval_every: int | None = Field(
        Trial.eval_every, ge=1, le=10**12, description="steps between evaluations; a tenth of the trial when not given"
    )
    eval_windows: int = Field(
        Trial.eval_windows, ge=1, le=10**9, description="windows of each evaluation, the same for every trial"
    )
    padding: Annotated[str, OneOf(PADDINGS)] | None = Field(
        None,
        description="with corpus.rows: lines, where it is `counted` unless given: whether padding is in the training "
        "loss, as published, or left out of it",
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens(cls, given: Any) -> Any:
        """Replace `steps` by their tokens, so that two files with the same meaning resolve to the same study."""
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


class SearchSection(Section):
    """The search stage: the same number of trials and tokens for every arm."""

    trials_per_arm: int = Field(6, ge=1, le=100_000, description="trials of every arm, the baseline included")
    sampler: Literal["tpe", "random", "qmc", "grid"] = Field(
        "tpe",
        description="of Optuna: tpe learns from earlier trials; random and qmc do not; grid: every combination of the "
        "choices, in order, once",
    )
    pruner: Literal["asha", "none"] = Field("asha", description="early stopping, within an arm only")
    spare: float = Field(0.5, gt=0, lt=1, description="share of its budget before which no trial is stopped")
    keep: float = Field(0.5, gt=0, lt=1, description="share of an arm's trials that goes on beyond that point")
    parallel: int = Field(
        1,
        ge=1,
        le=100_000,
        description="trials of one arm side by side: a suggestion sees all but the last `parallel - 1` before it",
    )


class CalibrateSection(Section):
    """The shared learning-rate grid."""

    points: int = Field(3, ge=3, le=99, description="points of the grid before it is extended")
    spacing: float = Field(2.0, gt=1, le=100, description="ratio of neighbouring learning rates")
    seeds: int = Field(2, ge=1, le=10, description="selection seeds of each point")
    max_points: int = Field(9, ge=3, le=99, description="the grid is not extended beyond this many points")
    choice: Literal["fit", "grid"] = Field(
        "fit", description="an arm's learning rate: the bottom of a local quadratic fit, or the grid's best by mean"
    )

    @model_validator(mode="after")
    def _cap(self) -> CalibrateSection:
        if self.max_points < self.points:
            raise ValueError(f"max_points={self.max_points} is below points={self.points}")
        return self


class ConfirmSection(Section):
    """The confirm stage and the test on it, named before anything runs."""

    seeds: int = Field(10, ge=2, le=100, description="fresh seeds of the fixed rule; at least 8 for a claim")
    rule: Literal["fixed", "obrien-fleming", "e-process"] = Field(
        "fixed", description="when to stop adding seeds: at `seeds`, or as soon as every arm is decided"
    )
    max_seeds: int | None = Field(
        None, ge=3, le=100, description="cap of a sequential rule (default: 10 obrien-fleming, 20 e-process)"
    )
    first_seed: int = Field(
        101,
        ge=101,
        le=10**6,
        description="the first of the fresh seeds; a study that takes up what another one's confirm trials gave starts "
        "beyond theirs",
    )
    level: float = Field(0.05, gt=0, lt=0.5, description="type I error of the family of comparisons")
    correction: Literal["holm", "none"] = Field(
        "holm", description="of the p values for the number of arms; none: each arm at `level` by itself"
    )
    margin: str | float = Field(
        "0.5%", description="differences below it do not matter: a percentage of the baseline's loss, or nats"
    )

    @model_validator(mode="after")
    def _cap(self) -> ConfirmSection:
        if self.rule == "fixed" and self.max_seeds is not None:
            raise ValueError(f"max_seeds={self.max_seeds} goes with a sequential rule; the fixed rule takes seeds")
        if self.rule != "fixed" and self.seeds != type(self).model_fields["seeds"].default:
            raise ValueError(f"seeds={self.seeds} goes with the fixed rule; {self.rule} takes max_seeds")
        return self

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of confirm seeds after which the arms are compared; the last is the most that can run."""
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
            raise ValueError(f"margin {given} does not lie above 0 and up to 100")
        return given


class KeepSection(Section):
    """What a study keeps of its trials beside their results."""

    models: Literal["best", "none"] = Field(
        "best",
        description="best: of each arm the trial of the last stage with the lowest val_nll, in `models/ARM/` and in "
        "MLflow, loaded by `pagating.load_model`; on a cluster where `storage` is given. none: no model",
    )
    checkpoints: bool = Field(
        False,
        description="the last two checkpoints of each trial that lived long enough to make some stay in "
        "`checkpoints/CELL/`; else they are removed when it is done",
    )


class ResourcesSection(Section):
    """What one trial takes of the machine."""

    cpus: int = Field(1, ge=1, le=1024, description="cores, and threads, of a trial")
    gpus: float = Field(
        0.0, ge=0, le=64, description="GPUs of a trial, which then trains on one: a share such as 0.25, or 1 and more"
    )
    stall_timeout: float = Field(
        600.0, ge=1, le=1e7, description="seconds without a sign of life before a trial is ended and tried again"
    )

    @field_validator("gpus")
    @classmethod
    def _gpus(cls, given: float) -> float:
        if given > 1 and given != int(given):
            raise ValueError(f"gpus={given}: a trial takes a share of one GPU, up to 1, or a whole number of them")
        return given
