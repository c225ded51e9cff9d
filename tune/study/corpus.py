"""The packed corpus of a study, in its cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tune.run import ledger
from tune.study.study import Study


def packed_corpus(
    study: Study, output: Path, base: Path, check: Callable[[Mapping[str, Any]], None] | None = None
) -> Path:
    """The study's packed corpus, from the cache `PAGATING_CACHE` (default: .cache in the folder of studies).

    `check`: raises where the study cannot use it, before it is written.
    """
    from pagating.data.prepare import prepare

    source = study.corpus.model_dump(exclude_none=True)
    return prepare(source, study.tokenizer.model_dump(), study.model.n_ctx, _cache(output), base, check)


def _cache(output: Path) -> Path:
    return Path(os.environ.get("PAGATING_CACHE") or output / ".cache").resolve()


def begun_corpus(study: Study, folder: Path) -> Path:
    """The packed corpus that a study was begun on, found in the cache by its digest: its text may lie anywhere.

    Packed again, from paths that start at the study's folder, where the cache lacks it.
    """
    from pagating.data.corpus import CorpusError, read_meta

    begun = next(event["corpus"] for event in ledger.read(folder / "ledger.jsonl") if event["event"] == "study")
    for path in sorted(_cache(folder.parent).glob("corpus-*")):
        try:
            if read_meta(path)["digest"] == begun:
                return path
        except (CorpusError, OSError):
            continue  # a damaged one is another study's trouble
    return packed_corpus(study, folder.parent, folder)
