"""Bounded reading of tables, settings and JSON of unknown origin; bad input is refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow.lib import ArrowException
from pyarrow.parquet import ParquetFile

from analysis.io import plain_yaml
from analysis.io.exits import Exit
from analysis.io.text import one_line

MOST_ROWS = 20_000_000
_SECTIONS = (
    "corpus",
    "tokenizer",
    "model",
    "fixed",
    "nuisance",
    "search",
    "calibrate",
    "confirm",
    "resources",
    "ladder",
)


class TableError(ValueError):
    """Input that cannot be analysed; the message is one line with the file, column, value and what is allowed."""

    exit_code = Exit.BAD_INPUT


class NoTrialYet(TableError):
    """Study without any trial that has ended: its input is good, and there is nothing to analyse yet."""

    exit_code = Exit.COULD_NOT


def shown(value: object) -> str:
    """Return a value as an error shows it, without the type that numpy's own repr would name."""
    return one_line(repr(value.item() if isinstance(value, np.generic) else value), 100)


def read_table(file: Path) -> pd.DataFrame:
    """Return the rows of a study's Parquet file. Raises TableError if it cannot be read, has no rows or is too long."""
    try:
        # Drop pandas' metadata: the columns are complete without it, and damaged metadata raises errors of any kind.
        with ParquetFile(file) as opened:
            arrow = opened.read().replace_schema_metadata(None)
        arrow.validate(full=True)  # otherwise text that is not UTF-8 would fail later, at its first use
        table = arrow.to_pandas()
    except (ValueError, OSError, ArrowException) as error:
        raise TableError(f"{file}: cannot be read as a table: {one_line(str(error), 300)}") from None
    if len(table) > MOST_ROWS:
        raise TableError(f"{file}: has {len(table):,} rows; allowed: {MOST_ROWS:,}")
    if table.empty and file.name == "trials.parquet":
        raise NoTrialYet(f"unfinished: no trial of {file.parent} has ended yet")
    if table.empty and file.name != "curves.parquet":
        raise TableError(f"{file}: has no rows")
    return table


def read_settings(file: Path) -> dict[str, Any]:
    """Return the content of a study folder's study.yaml. Raises TableError if it is not a valid study file."""
    try:
        return checked_settings(str(file), plain_yaml.read(file))
    except (plain_yaml.PlainYamlError, OSError) as error:
        raise TableError(f"{file}: {error}") from None


def checked_settings(source: str, settings: Any) -> dict[str, Any]:
    """Return a study file's content, each arm as a mapping. Raises TableError if arms or sections are not mappings."""
    if not isinstance(settings, dict) or not isinstance(settings.get("arms"), dict) or not settings["arms"]:
        raise TableError(f"{source}: key arms is missing or empty; allowed: a mapping of arm names")
    arms = {str(name): options or {} for name, options in settings["arms"].items()}
    sections = {name: settings.get(name) or {} for name in _SECTIONS}
    for key, value in {**sections, **{f"arms.{name}": options for name, options in arms.items()}}.items():
        if not isinstance(value, dict):
            raise TableError(f"{source}: key {key} has {shown(value)}; allowed: a mapping")
    return {**settings, **{name: value for name, value in sections.items() if name in settings}, "arms": arms}


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no file. Raises TableError if it is not an object."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise TableError(f"{file}: cannot be read as JSON: {one_line(str(error), 300)}") from None
    if not isinstance(found, dict):
        raise TableError(f"{file}: has {shown(found)}; allowed: a JSON object")
    return found
