"""Table of the layers of a study's kept models, for the section "Why" of its report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.io.write import replacing
from tune.run.kept.models import best_cells, kept_models, models_folder
from tune.study.cell import Record
from tune.study.study import Study

LAYERS = "layers.json"  # the same as in `pagating.layers`, which loads torch
TABLE = "layers.parquet"


def layer_rows(study: Study, folder: Path, records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return one row per arm and layer of the kept models; none for an arm without one, or without `layers.json`."""
    best, models = best_cells(study, records), models_folder(study, folder)
    rows = []
    for arm in kept_models(models, best):
        cell = best[arm].cell
        known = {"study": study.name, "arm": arm, "seed": cell.seed, "config_key": cell.config_key}
        rows += [{**known, **row} for row in _read(models / arm / LAYERS)]
    return rows


def write_layers(study: Study, folder: Path, records: Iterable[Record]) -> None:
    """Write `layers.parquet` into the study's folder in one step, or remove it if there are no rows."""
    rows = layer_rows(study, folder, records)
    if not rows:
        (folder / TABLE).unlink(missing_ok=True)
        return
    with replacing(folder / TABLE) as scratch:
        pd.DataFrame(rows).to_parquet(scratch, index=False)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) and all(isinstance(row, dict) for row in found) else []
