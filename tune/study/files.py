"""Read and write study files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from analysis.io import plain_yaml
from analysis.io.text import redact
from tune.errors import StudyError
from tune.study.explain import explain
from tune.study.study import Study


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
