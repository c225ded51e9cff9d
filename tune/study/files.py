"""Read and write study files."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from analysis.io import plain_yaml
from analysis.io.text import redact
from tune.errors import StudyError
from tune.study.explain import explain
from tune.study.study import Study


def parse(text: str, path: str | Path) -> Study:
    """Return the study of a YAML text. `path` is named in errors; its stem is the study's name if the text has none."""
    try:
        return _study(plain_yaml.parse(text), Path(path))
    except plain_yaml.PlainYamlError as error:
        raise StudyError(f"{path}: {error}") from error


def load(path: str | Path) -> Study:
    """Read a study file. Raises StudyError, one line with file, key, value and what is allowed."""
    path = Path(path)
    try:
        return _study(plain_yaml.read(path), path)
    except plain_yaml.PlainYamlError as error:
        raise StudyError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        near = get_close_matches(path.name, [each.name for each in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise StudyError(f"{path}: {error.strerror}{hint}") from error
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from error


def _study(content: Any, path: Path) -> Study:
    if not isinstance(content, dict):
        raise StudyError(f"{path}: is not a mapping of keys such as question, arms and nuisance")
    try:
        return Study.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise StudyError(explain(error, path, Study)) from error


def dump(study: Study) -> str:
    """Return the resolved study as YAML without credentials in `tracking`. `parse` reads back the same study."""
    content = study.model_dump(exclude_none=True)
    if study.tracking:
        content["tracking"] = redact(study.tracking)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
