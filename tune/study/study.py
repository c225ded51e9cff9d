"""The study file: typed, sparse, strict. Everything that a study is, in one YAML."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from analysis.io import plain_yaml
from analysis.io.text import redact
from tune.study.arm import GLU_UNITS, Arm
from tune.study.explain import explain
from tune.study.sections import (
    NAME,
    CalibrateSection,
    ConfirmSection,
    CorpusSection,
    Distribution,
    FixedSection,
    KeepSection,
    ModelSection,
    ResourcesSection,
    SearchSection,
    Section,
    TokenizerSection,
)

MOST_LR = 100.0
STAGES = ("search", "calibrate", "confirm")
ADDRESS = re.compile(r"auto|(?P<client>ray://)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")
TRACKING = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks", "file")
TUNABLE = ("lr", "weight_decay", "warmup", "final_lr", "beta1", "beta2", "clip")


class StudyError(ValueError):
    """Bad input of a study: one line that names the file, the key, the value and what is allowed."""


def check_tracking(uri: str, source: str, whole: bool = True) -> str:
    """`uri` where MLflow can make something of it. Raises StudyError, in a line without its credentials.

    `whole`: refuse one whose credentials were left out, as they are in a resolved study.
    """
    allowed = "none, sqlite:///FILE, http(s)://HOST:PORT, or a database's or Databricks' URI"
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise StudyError(f"{source} '{redact(uri)}': {error}; allowed: {allowed}") from None
    known = uri in ("none", "databricks") or parts.scheme.split("+")[0] in TRACKING
    if not known or any(c.isspace() for c in uri) or (parts.scheme in ("http", "https") and not parts.hostname):
        raise StudyError(f"{source} '{redact(uri)}' is no tracking URI; allowed: {allowed}")
    if whole and "***" in uri:
        raise StudyError(f"{source} '{uri}' is without its credentials; give it whole: --tracking, MLFLOW_TRACKING_URI")
    return uri


def check_address(address: str) -> str:
    """`address` where it has the form of a Ray cluster's. Raises StudyError."""
    match = ADDRESS.fullmatch(address)
    if not match or (match["port"] and not 0 < int(match["port"]) < 1 << 16):
        raise StudyError(f"address '{address}' is none of a Ray cluster; allowed: auto, HOST:PORT, ray://HOST:PORT")
    return address


class Study(Section):
    """Everything that answers one question."""

    name: str = Field(description="name of its folder in `studies/` and of its MLflow experiment")
    question: str = Field(max_length=2000, description="what the study is to answer, in a sentence")
    corpus: CorpusSection = Field(CorpusSection(), description="the text")
    tokenizer: TokenizerSection = Field(TokenizerSection(), description="text to tokens")
    task: Literal["causal", "masked", "span"] = Field(
        "causal",
        description="what is learned: the next token (GPT-2), hidden tokens (BERT), or hidden spans (T5, n_layer "
        "blocks a side); the loss is nats a predicted token",
    )
    model: ModelSection = Field(ModelSection(), description="sizes of the model that all arms share")
    fixed: FixedSection = Field(FixedSection(), description="what is held the same for every trial")
    nuisance: dict[Literal["lr", "weight_decay", "warmup", "final_lr", "beta1", "beta2", "clip"], Distribution] = Field(
        description="what every arm tunes so that the comparison is fair; `lr` always"
    )
    arms: dict[str, Arm] = Field(description="what is compared, by name: two or more, one of them the baseline")
    stages: list[Literal["search", "calibrate", "confirm"]] = Field(
        ["search", "calibrate", "confirm"],
        description="what is run: all three; without confirm there are one or few seeds a cell and no verdict, "
        "without calibrate an arm's learning rate is that of its best search trial",
    )
    search: SearchSection = Field(SearchSection(), description="the search stage")
    calibrate: CalibrateSection = Field(CalibrateSection(), description="the calibrate stage")
    confirm: ConfirmSection = Field(ConfirmSection(), description="the confirm stage and the decision")
    resources: ResourcesSection = Field(ResourcesSection(), description="what one trial takes of the machine")
    keep: KeepSection = Field(KeepSection(), description="what is kept of models and checkpoints")
    tracking: str | None = Field(None, description="MLflow tracking URI; else MLFLOW_TRACKING_URI, else mlflow.db")
    address: str | None = Field(
        None,
        description="of a Ray cluster: `auto`, `HOST:PORT`, `ray://HOST:PORT`; without it trials run on this machine",
    )
    storage: str | None = Field(
        None, description="absolute path of a folder that all nodes of the cluster see, for the tokens and checkpoints"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, given: str) -> str:
        if not NAME.fullmatch(given):
            raise ValueError(f"name '{given}' must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit")
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
                f"storage '{redact(given)}' is a URL; tokens cannot be mapped there, nor a checkpoint replaced in one "
                "step: give a mounted folder that every node sees, or none, and the tokens travel with the study"
            )
        if given is not None and not Path(given).is_absolute():
            raise ValueError(
                f"storage '{given}' is no absolute path; allowed: a folder that every node sees, such as /mnt/shared"
            )
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
                raise ValueError(f"no arm of {', '.join(given) or 'none given'} has baseline: true; exactly one must")
        return given

    @field_validator("stages")
    @classmethod
    def _stages(cls, given: list[str]) -> list[str]:
        if given[:1] != ["search"] or given != [stage for stage in STAGES if stage in given]:
            raise ValueError(f"stages {given} must be search, then calibrate or confirm or both, in this order")
        return given

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
            raise ValueError(f"nuisance.lr must lie above 0 and up to {MOST_LR:g}; got {lr.values}")
        for key, where in self.nuisance.items():
            for value in where.values if key != "lr" else []:
                try:
                    FixedSection.model_validate({key: value})
                except ValidationError as error:
                    problem = error.errors()[0]["msg"]
                    raise ValueError(f"nuisance.{key} has {value}: {problem[:1].lower() + problem[1:]}") from error
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
            raise ValueError(f"fixed.padding={fixed.padding} goes with corpus.rows: lines; packed windows have none")
        if fixed.tokens < 2 * fixed.batch_tokens:
            raise ValueError(f"fixed.tokens={fixed.tokens} is less than two steps of batch_tokens={fixed.batch_tokens}")
        if self.task != "causal":
            self._check_task()
        for name, arm in self.arms.items():
            if isinstance(arm.alpha, list) and len(arm.alpha) != self.mlps:
                side = " a side" if self.task == "span" else ""
                raise ValueError(
                    f"arms.{name}.alpha lists {len(arm.alpha)} values; model.n_layer={self.model.n_layer}{side} needs "
                    f"{self.mlps}"
                )
        return self

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
            glu = "form glu" if arm.form == "glu" else f"unit {arm.unit}" if arm.unit in GLU_UNITS else None
            if self.task == "masked" and glu:
                raise ValueError(f"arms.{name} has {glu}, which BERT's MLP, of two modules, cannot take: leave it out")

    def _check_grid(self) -> None:
        for arm in self.arms:
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
        """MLPs of the model, each with an activation: one a block; T5 has n_layer blocks a side."""
        return self.model.n_layer * (2 if self.task == "span" else 1)

    def runs(self, stage: str) -> bool:
        """Whether the study has a stage."""
        return stage in self.stages

    def tests(self, stage: str) -> bool:
        """Whether the trials of a stage also evaluate the test split, at their end: those of the study's last stage."""
        return stage == self.stages[-1]

    @property
    def baseline(self) -> str:
        """Name of the baseline arm."""
        return next(name for name, arm in self.arms.items() if arm.baseline)

    def space(self, arm: str) -> dict[str, Distribution]:
        """What an arm's search tunes: the nuisance hyperparameters of every arm, then the arm's own."""
        return {**{str(name): where for name, where in self.nuisance.items()}, **self.arms[arm].searched(self.mlps)}

    def digest(self, *without: str) -> str:
        """Identity of the study: 12 hexadecimal digits of its resolved content, leaving out dotted keys."""
        content = self.model_dump()
        for dotted in without:
            *parents, leaf = dotted.split(".")
            section = content
            for parent in parents:
                section = section[parent]
            section.pop(leaf)
        return digest(content)


def digest(content: Any) -> str:
    """12 hexadecimal digits of SHA-256 over canonical JSON."""
    raw = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(raw.encode()).hexdigest()[:12]


def trial_spec(study: Study, arm: str, config: dict[str, float], seed: int, corpus: Path, test: bool) -> dict[str, Any]:
    """Arguments of `pagating.train.Trial` for one cell of a study."""
    fixed = study.fixed.model_dump(exclude={"steps", "padding"})
    if study.corpus.rows == "lines":
        fixed["padding"] = study.fixed.padding or "counted"
    fixed.update({name: config[name] for name in TUNABLE if name in config and name != "lr"})
    return {
        **fixed,
        "corpus": str(corpus),
        "model": study.model.sizes(),
        "unit": study.arms[arm].arguments(config),
        "lr": config["lr"],
        "seed": seed,
        "test": test,
        "threads": study.resources.cpus,
        **({"pretrained": study.model.pretrained} if study.model.pretrained else {}),
        **({"task": study.task} if study.task != "causal" else {}),
        "device": "cuda" if study.resources.gpus else "cpu",
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def parse(text: str, path: Path) -> Study:
    """A study from YAML text; `path` names it in errors and gives the study's name when the text does not."""
    try:
        return _study(plain_yaml.parse(text), path)
    except plain_yaml.PlainYamlError as error:
        raise StudyError(f"{path}: {error}") from error


def load(path: Path) -> Study:
    """Read a study file. Raises StudyError: one line naming file, key, value and what is allowed."""
    try:
        return _study(plain_yaml.read(path), path)
    except plain_yaml.PlainYamlError as error:
        raise StudyError(f"{path}: {error}") from error
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from error


def _study(content: Any, path: Path) -> Study:
    if not isinstance(content, dict):
        raise StudyError(f"{path}: is not a mapping of keys such as question, arms, nuisance")
    try:
        return Study.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise StudyError(explain(error, path, Study)) from error


def dump(study: Study) -> str:
    """The resolved study as YAML that `parse` reads back to the same study; credentials in `tracking` are left out."""
    content = study.model_dump(exclude_none=True)
    if study.tracking:
        content["tracking"] = redact(study.tracking)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
