"""A folder of cells: the trials of a study that may start now, all that they need, and their results.

    cells.json              key and digest of each cell, by the name of its file
    trials/NAME.json        a trial, as `python -m pagating.train` takes it; its paths start at trials/
    corpus-*, code, *.safetensors   what the trials name
    results/NAME.json       a result
    run.py, runner/         what trains the user's own code, if the study has it, with Python's own library alone

The folder may be copied to another machine as a whole. A file is written whole or not at all. What is imported at the
start is Python's own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pagating.trial import Trial

Read = TypeVar("Read")
FORMAT = 1  # of results
INDEX, TRIALS, RESULTS = "cells.json", "trials", "results"
OWN_RUNNER = "run.py"  # of a folder whose trials run the user's own code
# fields of a trial that its result does not depend on, or whose files are compared by their bytes
PLACES = ("corpus", "pretrained", "unit", "device", "threads")


class CellsError(ValueError):
    """A folder of cells, or a result in it, that cannot be used. The message is one line that names the file."""

    exit_code = 2


@dataclass(frozen=True)
class CellFile:
    """A trial of a folder of cells.

    Attributes:
        path: File of the trial.
        cell: Key of the cell in its study.
        sha256: Digest of the trial that the study wants (`trial_digest`).
    """

    path: Path
    cell: str
    sha256: str

    @property
    def result(self) -> Path:
        """File of the cell's result."""
        return self.path.parent.parent / RESULTS / self.path.name

    def trial(self) -> Trial:
        """Read the trial; its relative paths start at its file. Raise CellsError if it is not one, or was changed."""
        from pagating.trial import Trial

        if (own := self.path.parent.parent / OWN_RUNNER).exists():
            raise CellsError(f"{self.path}: runs the study's own code: python {own}")
        return self.checked(lambda fields: Trial.from_dict(fields).beside(self.path.parent), trial_digest)

    def checked(self, made: Callable[[dict[str, Any]], Read], digest: Callable[[Read], str]) -> Read:
        """Return the trial that `made` makes of the file's fields.

        Raise CellsError if it makes none, or one with another digest than the study wants.
        """
        try:
            trial = made(json.loads(self.path.read_text(encoding="utf-8")))
            found = digest(trial)
        except (OSError, ValueError, TypeError) as error:
            raise CellsError(f"{self.path}: {error}") from error
        if found != self.sha256:
            raise CellsError(f"{self.path}: is not the trial of {self.cell}: it was changed, or a file that it names")
        return trial


@dataclass(frozen=True)
class Result:
    """The result of a cell.

    Attributes:
        cell: Key of the cell in its study.
        sha256: Digest of the trial that was trained (`trial_digest`).
        outcome: `completed`, or `infeasible` if it diverged or does not fit into memory.
        reason: Cause of an infeasible outcome.
        rows: Evaluations, as `pagating.train.train` yields them.
        final: Final metrics, `device` (name of the card or processor) and `packed` (trials trained together).
        versions: Versions of Python and of the packages that trained it.
    """

    cell: str
    sha256: str
    outcome: str
    reason: str | None
    rows: list[dict[str, Any]]
    final: dict[str, Any]
    versions: dict[str, str]


def trial_digest(trial: Trial) -> str:
    """Return the SHA-256 of a trial's content: its fields, and the bytes of the files that it names.

    Paths, the device and the number of threads do not count. Raise OSError or CorpusError if a file cannot be read.
    """
    from pagating.data.corpus import read_meta

    fields = {name: value for name, value in trial.as_dict().items() if name not in PLACES}
    unit, own = dict(trial.unit or {}), trial.own_code
    if own:
        unit[own.key] = [_sha256(own.file), own.name]
    fields |= {"unit": unit if trial.unit is not None else None, "corpus": read_meta(trial.corpus)["digest"]}
    fields["pretrained"] = _sha256(trial.pretrained) if trial.pretrained else None
    return json_digest(fields)


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step, after its bytes are on the disk. Raise OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_index(folder: Path, study: str, cells: Mapping[str, tuple[str, str]]) -> None:
    """Write `cells.json`: key and digest of each cell, by the name of its file."""
    index = {name: {"cell": cell, "sha256": sha256} for name, (cell, sha256) in cells.items()}
    write_file(folder / INDEX, json.dumps({"study": study, "cells": index}, indent=1).encode() + b"\n")


def study_of(folder: Path) -> str | None:
    """Return the study that wrote a folder of cells; None if it is empty or missing.

    Raise CellsError if it has other content.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        return str(json.loads((folder / INDEX).read_text(encoding="utf-8"))["study"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CellsError(f"{folder}: is not empty and no folder of cells; give another one with --into") from error


def cells_of(folder: Path) -> list[CellFile]:
    """Return the cells of a folder in the order of their study. Raise CellsError if it is not a folder of cells."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [
            CellFile(folder / TRIALS / name, str(entry["cell"]), str(entry["sha256"])) for name, entry in index.items()
        ]
    except OSError as error:
        raise CellsError(f"{path}: {error.strerror}; give a folder that `pagating cells` wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CellsError(f"{path}: is damaged; run `pagating cells` again and copy it anew") from error


def write_result(path: Path, result: Result) -> None:
    """Write a result in one step. Raise OSError."""
    body = _plain(asdict(result)) | {"format": FORMAT}
    write_file(path, json.dumps(body | {"digest": json_digest(body)}, indent=1, allow_nan=False).encode() + b"\n")


def read_result(path: Path) -> Result:
    """Read a result. Raise CellsError, one line, if it is not a whole result of this version."""
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise CellsError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CellsError(f"{path}: is not JSON; it is half-written, or no result") from error
    digest = body.pop("digest", None) if isinstance(body, dict) else None
    if not isinstance(body, dict) or digest != json_digest(body):
        raise CellsError(f"{path}: its digest does not match: it was changed, or it is no result of pagating.cells")
    if body.pop("format", None) != FORMAT:
        raise CellsError(f"{path}: was written by another version of pagating.cells")
    types = {"cell": str, "sha256": str, "outcome": str, "reason": str | None, "rows": list, "final": dict}
    whole = set(body) == {*types, "versions"} and all(isinstance(body[name], kind) for name, kind in types.items())
    if not whole or not all(isinstance(row, dict) for row in body["rows"]):
        raise CellsError(f"{path}: lacks a part of a result, or has one of another type")
    return Result(**body)


def json_digest(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: null for a number that is not finite."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def relative(trial: Trial, corpus: str, code: str | None, weights: str | None) -> Trial:
    """Return a trial whose files are those of a folder of cells, named from `trials/`.

    Args:
        trial: The trial.
        corpus: Name of the corpus's folder.
        code: Name of the file with the trial's own gate or activation, if it has one.
        weights: Name of the file with its initial weights, if it has some.
    """
    placed = replace(trial, corpus=f"../{corpus}", pretrained=f"../{weights}" if weights else None)
    return placed.with_own(f"../{code}") if code else placed
