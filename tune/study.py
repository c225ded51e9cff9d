"""The study file: typed, sparse, strict. Everything that a study is, in one YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from tune.schema import (
    NAME,
    Arm,
    CalibrateSection,
    ConfirmSection,
    CorpusSection,
    Distribution,
    FixedSection,
    ModelSection,
    ResourcesSection,
    SearchSection,
    Section,
    TokenizerSection,
)

TUNABLE = ("lr", "weight_decay", "warmup", "final_lr", "beta1", "beta2", "clip")


class StudyError(ValueError):
    """Bad input of a study: one line that names the file, the key, the value and what is allowed."""


class Study(Section):
    """Everything that answers one question."""

    name: str = Field(description="folder and experiment name; the file's name when not given")
    question: str
    corpus: CorpusSection = CorpusSection()
    tokenizer: TokenizerSection = TokenizerSection()
    model: ModelSection = ModelSection()
    fixed: FixedSection = FixedSection()
    nuisance: dict[Literal["lr", "weight_decay", "warmup", "final_lr", "beta1", "beta2", "clip"], Distribution]
    arms: dict[str, Arm]
    search: SearchSection = SearchSection()
    calibrate: CalibrateSection = CalibrateSection()
    confirm: ConfirmSection = ConfirmSection()
    resources: ResourcesSection = ResourcesSection()
    tracking: str | None = Field(None, description="MLflow tracking URI; else MLFLOW_TRACKING_URI, else mlflow.db")

    @field_validator("name")
    @classmethod
    def _name(cls, given: str) -> str:
        if not NAME.fullmatch(given):
            raise ValueError(f"name '{given}' must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit")
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
        if len(given) < 2:
            raise ValueError("a study needs a baseline and at least one arm to compare with it")
        return given

    @model_validator(mode="after")
    def _together(self) -> Study:
        lr = self.nuisance.get("lr")
        if lr is None:
            raise ValueError("nuisance.lr is missing: the learning rate is always tuned")
        if min(lr.uniform or lr.loguniform or lr.choice or [0.0]) <= 0:
            raise ValueError("nuisance.lr must lie above 0")
        fixed, n_ctx = self.fixed, self.model.n_ctx
        if fixed.batch_tokens % n_ctx:
            raise ValueError(f"fixed.batch_tokens={fixed.batch_tokens} is not a multiple of model.n_ctx={n_ctx}")
        if fixed.tokens < 2 * fixed.batch_tokens:
            raise ValueError(f"fixed.tokens={fixed.tokens} is less than two steps of batch_tokens={fixed.batch_tokens}")
        for name, arm in self.arms.items():
            if isinstance(arm.alpha, list) and len(arm.alpha) != self.model.n_layer:
                raise ValueError(
                    f"arms.{name}.alpha lists {len(arm.alpha)} values; model.n_layer={self.model.n_layer} needs as many"
                )
        return self

    @property
    def baseline(self) -> str:
        """Name of the baseline arm."""
        return next(name for name, arm in self.arms.items() if arm.baseline)

    def space(self, arm: str) -> dict[str, Distribution]:
        """What an arm's search tunes: the nuisance hyperparameters of every arm, then the arm's own."""
        return {**{str(name): where for name, where in self.nuisance.items()}, **self.arms[arm].searched()}

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
    fixed = study.fixed.model_dump()
    fixed.update({name: config[name] for name in TUNABLE if name in config and name != "lr"})
    return {
        **fixed,
        "corpus": str(corpus),
        "model": study.model.model_dump(exclude={"preset"}),
        "unit": study.arms[arm].unit(config),
        "lr": config["lr"],
        "seed": seed,
        "test": test,
        "threads": study.resources.cpus,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def _branches(annotation: Any) -> list[Any]:
    """The alternatives of a union, or the annotation alone."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def _inside(annotation: Any, key: Any) -> Any:
    """The annotation of what stands under `key`; unchanged where `key` only names a branch of a union."""
    for branch in _branches(annotation):
        if isinstance(branch, type) and issubclass(branch, BaseModel) and key in branch.model_fields:
            return branch.model_fields[key].annotation
        if get_origin(branch) is dict:
            return get_args(branch)[1]
    return annotation


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed beside the last element of a pydantic error location."""
    node: Any = Study
    for part in location[:-1]:
        node = _inside(node, part)
    for branch in _branches(node):
        if isinstance(branch, type) and issubclass(branch, BaseModel):
            return list(branch.model_fields)
    return []


def _explain(error: ValidationError, path: Path) -> str:
    """The first error as one line: file, key, value, what is allowed."""
    # of a union, the branch that the input's type fits is the one to speak of: the others only say "not a number"
    other = ("float_type", "int_type", "string_type", "list_type", "model_type")
    problem = min(
        error.errors(),
        key=lambda item: (
            item["type"] != "extra_forbidden",
            item["type"] in other and isinstance(item["input"], dict | list),
        ),
    )
    location = tuple(part for part in problem["loc"] if not (isinstance(part, str) and part[:1].isupper()))
    location = tuple(part for part in location if part not in ("float", "list[float]", "str", "int", "[key]"))
    key = ".".join(str(part) for part in location) or "the file"
    value = problem["input"]
    shown = repr(value) if isinstance(value, str | int | float | bool | type(None)) else None
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = _known_keys(tuple(problem["loc"]))
        close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        return f"{path}: unknown key '{key}'; {hint}allowed: {', '.join(known)}"
    if kind == "missing":
        return f"{path}: key '{key}' is missing"
    message = re.sub(r"dictionary( or instance of \w+)?", "mapping", problem["msg"].removeprefix("Value error, "))
    if isinstance(value, str) and kind in ("float_type", "int_type"):
        message += (
            " (text; YAML reads 1e-3 as text: write 1.0e-3)" if re.fullmatch(r"[\d.]+e[+-]?\d+", value, re.I) else ""
        )
    if kind == "value_error" or shown is None:
        return f"{path}: {key}: {message}"
    return f"{path}: {key}: {shown} is not allowed: {message[:1].lower() + message[1:]}"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which plain YAML would silently drop."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str | int | float | bool) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
        seen.add(key if isinstance(key, str | int | float | bool) else str(key))
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str, path: Path) -> Study:
    """A study from YAML text; `path` names it in errors and gives the study's name when the text does not."""
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise StudyError(f"{path}:{where} is not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path}: is not a mapping of keys such as question, arms, nuisance")
    content.setdefault("name", path.stem)
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise StudyError(_explain(error, path)) from error


def load(path: Path) -> Study:
    """Read a study file. Raises StudyError: one line naming file, key, value and what is allowed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise StudyError(f"{path}: {reason}") from error
    return parse(text, path)


def dump(study: Study) -> str:
    """The resolved study as YAML that `parse` reads back to the same study."""
    return yaml.safe_dump(study.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)
