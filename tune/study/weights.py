"""The pretrained weights that a study starts from: found once, noted in its folder with their digest, never copied."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from analysis.io.write import write_whole
from tune.errors import StudyError
from tune.study.study import Study

NOTE = "pretrained.json"


def find_pretrained(study: Study, base: Path) -> Path | None:
    """The file of the study's weights; None for a study without. `base`: the study file's folder. Raises StudyError."""
    if study.model.pretrained is None:
        return None
    from pagating.model.pretrained import PretrainedError, find_weights  # torch takes seconds to load

    try:
        return find_weights(study.model.pretrained, base)
    except PretrainedError as error:
        raise StudyError(str(error)) from error


def check_pretrained(study: Study, base: Path, folder: Path, vocab_size: int) -> dict[str, str] | None:
    """Find the study's weights and compare them with every arm's model, and with those that the study was begun with.

    What was found, `path` and `sha256`; None for a study without. `base`: the study file's folder; `vocab_size`: of the
    packed corpus. Raises StudyError.
    """
    path = find_pretrained(study, base)
    if path is None:
        return None
    from pagating.model.pretrained import PretrainedError

    try:
        check_arms(study, path, vocab_size)
    except PretrainedError as error:
        raise StudyError(str(error)) from error
    with open(path, "rb") as file:
        found = {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    begun = noted(folder)
    if begun and begun["sha256"] != found["sha256"]:
        raise StudyError(
            f"model.pretrained: {path} is not the file that the study was begun with ({begun['path']}, then); "
            "give the study another name, or bring the old file back"
        )
    return found


def check_arms(study: Study, path: Path, vocab_size: int) -> None:
    """Compare the weights with each arm's model, which is built without memory. Raises PretrainedError."""
    import torch

    from pagating.model.gpt2 import GPT2, GPT2Size
    from pagating.model.pretrained import check_weights
    from tune.study.sizes import countable_unit

    size = GPT2Size(vocab_size=vocab_size, **study.model.sizes())
    for arm in study.arms:
        with torch.device("meta"):
            model = GPT2(size, countable_unit(study, arm))
        check_weights(model, path)


def note(found: dict[str, str] | None, folder: Path) -> None:
    """Write what `check_pretrained` found into the study's folder."""
    if found:
        write_whole(folder / NOTE, json.dumps(found, indent=1) + "\n")


def noted(folder: Path) -> dict[str, str] | None:
    """What was noted in a study's folder; None where nothing was."""
    path = folder / NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def place_weights(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A trial's arguments with the weights named by the file that the study found."""
    if spec.get("pretrained") is None:
        return spec
    found = noted(folder)
    if found is None:
        raise StudyError(f"{folder}: has no {NOTE}, which names the weights that the study was begun with")
    return {**spec, "pretrained": found["path"]}
