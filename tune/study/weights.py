"""Find a study's pretrained weights once and note their path and digest in its folder. They are never copied."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from analysis.io.write import write_whole
from pagating.trial import Trial
from tune.errors import StudyError
from tune.study.study import Study

NOTE = "pretrained.json"


def find_pretrained(study: Study, base: Path) -> Path | None:
    """Return the file of the study's weights; None if it has none. `base` is the folder of the study file."""
    if study.model.pretrained is None:
        return None
    from pagating.model.pretrained import PretrainedError, find_weights  # torch takes seconds to load

    try:
        return find_weights(study.model.pretrained, base)
    except PretrainedError as error:
        raise StudyError(str(error)) from error


def check_pretrained(study: Study, base: Path, folder: Path, vocab_size: int) -> dict[str, str] | None:
    """Check that the study's weights fit every arm's model and have not changed since the study began.

    Args:
        study: the study.
        base: folder of the study file.
        folder: folder of the study.
        vocab_size: vocabulary of the packed corpus.

    Returns: `path` and `sha256` of the weights; None if the study has none.
    Raises: StudyError if the weights are missing, do not fit or have changed.
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
            f"model.pretrained: {path} is not the file that the study was begun with (then {begun['path']}); "
            "give the study another name, or bring the old file back"
        )
    return found


def local_weights(study: Study, base: Path, vocab_size: int | None) -> tuple[str | None, str | None]:
    """Return the file of the study's initial weights, or else a line that says why it is not on this machine.

    Args:
        study: the study.
        base: folder of the study file.
        vocab_size: vocabulary of the packed corpus; None if it is unknown, so that no size is checked.

    Raises: StudyError if the weights cannot exist on any machine or do not have the study's sizes.
    """
    if study.model.pretrained is None:
        return None, None
    from pagating.model.pretrained import PretrainedError, WeightsNotDownloaded, find_weights

    try:
        path = find_weights(study.model.pretrained, base)
        if vocab_size is not None:
            check_arms(study, path, vocab_size)
    except WeightsNotDownloaded as error:
        return None, str(error)
    except PretrainedError as error:
        raise StudyError(str(error)) from error
    return str(path), None


def check_arms(study: Study, path: Path, vocab_size: int) -> None:
    """Raise PretrainedError if the weights do not fit an arm's model, which is built on torch's `meta` device."""
    import torch

    from pagating.model.gpt2 import GPT2
    from pagating.model.pretrained import check_weights
    from pagating.model.size import GPT2Size
    from tune.study.sizes import countable_unit

    size = GPT2Size(vocab_size=vocab_size, **study.model.sizes())
    for arm in study.arms:
        with torch.device("meta"):
            model = GPT2(size, countable_unit(study, arm))
        check_weights(model, path)


def note(found: dict[str, str] | None, folder: Path) -> None:
    """Write the result of `check_pretrained` into the study's folder."""
    if found:
        write_whole(folder / NOTE, json.dumps(found, indent=1) + "\n")


def noted(folder: Path) -> dict[str, str] | None:
    """Return the content that `note` wrote into a study's folder; None if it wrote nothing."""
    path = folder / NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def place_weights(trial: Trial, folder: Path) -> Trial:
    """Return the trial with the path of the weights that the study found. Raises StudyError if none is noted."""
    if trial.pretrained is None:
        return trial
    found = noted(folder)
    if found is None:
        raise StudyError(f"{folder} has no {NOTE}, which names the weights that the study was begun with")
    return replace(trial, pretrained=found["path"])
