"""Gates of the user's own: arms with `gate: FILE.py:NAME`. Loading such a file runs it, as running a script does.

A study keeps a copy of each file in its folder (`gates/`), and its trials run the copy: what ran can be read later, and
a file that has changed is refused, since arms trained with two gates of one name are not one arm.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tune.errors import StudyError
from tune.study.arm import OWN_GATE
from tune.study.study import Study

FOLDER = "gates"


def references(study: Study) -> dict[str, list[str]]:
    """Arms by the `FILE.py:NAME` that they name, in the study's order."""
    found: dict[str, list[str]] = {}
    for name, arm in study.arms.items():
        if arm.gate and OWN_GATE.fullmatch(arm.gate):
            found.setdefault(arm.gate, []).append(name)
    return found


def copy_of(reference: str, folder: Path) -> Path:
    """Where the study's folder keeps the file of a reference: its stem and a digest of the path as it was given."""
    given = reference.rpartition(":")[0]
    return folder / FOLDER / f"{Path(given).stem}-{hashlib.sha256(given.encode()).hexdigest()[:8]}.py"


def check_gates(study: Study, base: Path, folder: Path) -> None:
    """Load every own gate from beside the study file (`base`), and compare its file with the copy in `folder`.

    Raises StudyError naming the arm where a gate is refused (`pagating.gating.own_gate`) or has changed; writes
    nothing.
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
                f"{where}.gate: {file} has changed since the study began ({copy} is what ran); "
                "give the study another name, or bring the old file back"
            )


def keep_gates(study: Study, base: Path, folder: Path) -> None:
    """Copy the files of the study's own gates into its folder."""
    for reference in references(study):
        copy = copy_of(reference, folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((base / reference.rpartition(":")[0]).read_bytes())


def digests(study: Study, folder: Path) -> dict[str, str]:
    """SHA-256 of the copy in the study's folder, by reference."""
    return {
        reference: hashlib.sha256(copy_of(reference, folder).read_bytes()).hexdigest()
        for reference in references(study)
    }


def place_gate(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A trial's arguments with an own gate named by its copy in the study's folder, so that any process finds it."""
    unit = spec["unit"]
    if not unit or not OWN_GATE.fullmatch(unit.get("gate") or ""):
        return spec
    copy, name = copy_of(unit["gate"], folder.resolve()), unit["gate"].rpartition(":")[2]
    return {**spec, "unit": {**unit, "gate": f"{copy}:{name}"}}
