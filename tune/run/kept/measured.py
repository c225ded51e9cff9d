"""Tables of what a study's kept models do, for its report: statistics of their layers, and texts that they write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.io.write import replacing
from pagating.data.errors import CorpusError
from pagating.data.saved_tokenizer import load_tokenizer
from tune.run.kept.models import best_cells, kept_models, models_folder
from tune.study.cell import Record
from tune.study.study import Study

LAYERS, SAMPLES = "layers.json", "samples.json"  # the same as in `pagating.layers`, which loads torch
TABLE, TEXTS = "layers.parquet", "samples.parquet"
TOKENIZER = "tokenizer.json"
BROKEN = "\ufffd"  # stands for bytes that are not text, such as half a character
NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]+")


def write_measured(study: Study, folder: Path, records: Iterable[Record]) -> None:
    """Write `layers.parquet` and `samples.parquet` into the study's folder, or remove one that has no rows.

    The first has one row per arm and layer of the kept models, the second one per arm and prompt. An arm without a kept
    model, or whose model's folder lacks the file, has none.
    """
    best, models = best_cells(study, records), models_folder(study, folder)
    tables: dict[str, list[dict[str, Any]]] = {TABLE: [], TEXTS: []}
    for arm in kept_models(models, best):
        cell = best[arm].cell
        known = {"study": study.name, "arm": arm, "seed": cell.seed, "config_key": cell.config_key}
        tables[TABLE] += [{**known, **row} for row in _read(models / arm / LAYERS)]
        tables[TEXTS] += [{**known, **row} for row in _samples(models / arm)]
    for name, rows in tables.items():
        if not rows:
            (folder / name).unlink(missing_ok=True)
            continue
        with replacing(folder / name) as scratch:
            pd.DataFrame(rows).to_parquet(scratch, index=False)


def _samples(model: Path) -> list[dict[str, Any]]:
    """Return the rows of a model's samples as texts; none if it has none or its tokenizer cannot be read."""
    if not (rows := _read(model / SAMPLES)):
        return []
    try:
        tokenizer = load_tokenizer(model / TOKENIZER)
        return [{"prompt": place, **_texts(tokenizer, **row)} for place, row in enumerate(rows)]
    except (CorpusError, TypeError, OverflowError):  # the last two: a changed file, without token ids
        return []


def _texts(tokenizer: Any, prompt: list[int], text: list[int], greedy: list[int], sampled: list[int]) -> dict[str, str]:
    """Decode a prompt and what follows it. A character that the prompt cuts in two belongs to what follows."""
    beginning = _text(tokenizer, prompt).rstrip(BROKEN)
    found = {"beginning": beginning}
    for name, ids in {"text": text, "greedy": greedy, "sampled": sampled}.items():
        whole = _text(tokenizer, [*prompt, *ids])
        found[name] = whole[len(beginning) :] if whole.startswith(beginning) else _text(tokenizer, ids)
    return found


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Decode tokens. A run of bytes that are not text, or of control characters, becomes one U+FFFD."""
    return NO_TEXT.sub(BROKEN, tokenizer.decode(ids, skip_special_tokens=False))


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) and all(isinstance(row, dict) for row in found) else []
