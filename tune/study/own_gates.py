"""The user's own gates: arms with `gate: FILE.py:NAME`. Loading such a file runs it like a script.

A study keeps a copy of each file in `gates/` of its folder. Its trials run the copy, which stays readable. A changed
file is refused, because one arm must not mix trials of two different gates.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pagating.gating.catalog import OWN_GATE
from pagating.trial import Trial
from tune.errors import StudyError
from tune.study.study import Study

FOLDER = "gates"


def references(study: Study) -> dict[str, list[str]]:
    """Return the arms of each `FILE.py:NAME`, in the study's order."""
    found: dict[str, list[str]] = {}
    for name, arm in study.arms.items():
        if arm.gate and OWN_GATE.fullmatch(arm.gate):
            found.setdefault(arm.gate, []).append(name)
    return found


def copy_of(reference: str, folder: Path) -> Path:
    """Return the path of the study's copy of a gate's file: its stem and a digest of its path in the study file."""
    given = reference.rpartition(":")[0]
    return folder / FOLDER / f"{Path(given).stem}-{hashlib.sha256(given.encode()).hexdigest()[:8]}.py"


def check_gates(study: Study, base: Path, folder: Path) -> None:
    """Load every own gate from the study file's folder `base`, and compare its file with the copy in `folder`.

    Raises StudyError, which names the arm, if `pagating.gating.own_gate` refuses a gate or if its file has changed.
    """
    for reference, arms in references(study).items():
        from pagating.gating.own_gate import load_gate  # torch takes seconds to load

        where = f"arms.{arms[0]}"
        try:
            load_gate(str(base / reference))
        except ValueError as error:
            raise StudyError(f"{where}.{error}") from error
        copy, file = copy_of(reference, folder), base / reference.rpartition(":")[0]
        if copy.is_file() and copy.read_bytes() != file.read_bytes():
            raise StudyError(
                f"{where}.gate: {file} has changed since the study began (the trials ran {copy}); "
                "give the study another name, or bring the old file back"
            )


def keep_gates(study: Study, base: Path, folder: Path) -> None:
    """Copy the files of the study's own gates into its folder."""
    for reference in references(study):
        copy = copy_of(reference, folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((base / reference.rpartition(":")[0]).read_bytes())


def digests(study: Study, folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each copy in the study's folder, by reference."""
    return {
        reference: hashlib.sha256(copy_of(reference, folder).read_bytes()).hexdigest()
        for reference in references(study)
    }


def with_moved_gates(before: Study, folder: Path, now: Study, base: Path) -> Study:
    """Return `before` with the new reference of each gate whose file has moved: its copy has the same bytes.

    Args:
        before: The study of the folder.
        folder: The study's folder, with the copies of its gates.
        now: The study of the study file.
        base: Folder of the study file.
    """
    arms = dict(before.arms)
    for name in arms.keys() & now.arms.keys():
        old, new = arms[name].gate, now.arms[name].gate
        if old and new and old != new and OWN_GATE.fullmatch(old) and OWN_GATE.fullmatch(new):
            copy, file = copy_of(old, folder), base / new.rpartition(":")[0]
            same_name = old.rpartition(":")[2] == new.rpartition(":")[2]
            if same_name and copy.is_file() and file.is_file() and copy.read_bytes() == file.read_bytes():
                arms[name] = arms[name].model_copy(update={"gate": new})
    return before.model_copy(update={"arms": arms})


def place_gate(trial: Trial, folder: Path) -> Trial:
    """Return the trial with its own gate replaced by the absolute path of the study's copy, valid in any process."""
    own = trial.own_gate
    return trial.with_gate(f"{copy_of(own[0], folder.resolve())}:{own['name']}") if own else trial
