"""The user's own gates and activations: arms with `gate` or `unit: FILE.py:NAME`. Loading a file runs it like a script.

A study keeps a copy of each file in `gates/` of its folder. Its trials run the copy, which stays readable. A changed
file is refused, because one arm must not mix trials of two different gates.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pagating.gating.catalog import OwnCode
from pagating.trial import Trial
from tune.errors import StudyError
from tune.study.sections import AUTO
from tune.study.study import Study

FOLDER = "gates"


def own_codes(study: Study) -> dict[OwnCode, list[str]]:
    """Return the arms of each own gate and each own activation, in the study's order."""
    found: dict[OwnCode, list[str]] = {}
    for name, arm in study.arms.items():
        if own := arm.own_code:
            found.setdefault(own, []).append(name)
    return found


def references(study: Study) -> list[str]:
    """Return each `FILE.py:NAME` of a study once, in its order."""
    return list(dict.fromkeys(own.reference for own in own_codes(study)))


def copy_of(reference: str, folder: Path) -> Path:
    """Return the path of the study's copy of a gate's file: its stem and a digest of its path in the study file."""
    given = reference.rpartition(":")[0]
    return folder / FOLDER / f"{Path(given).stem}-{hashlib.sha256(given.encode()).hexdigest()[:8]}.py"


def file_of(reference: str, base: Path, folder: Path) -> Path:
    """Return the file of a gate: the one that the study file names, or the study's copy if that one is gone."""
    file, copy = base / reference.rpartition(":")[0], copy_of(reference, folder)
    return copy if copy.is_file() and not file.exists() else file


def placed(reference: str, base: Path, folder: Path) -> str:
    """Return the reference of a gate with the path of its file."""
    return f"{file_of(reference, base, folder)}:{reference.rpartition(':')[2]}"


def check_gates(study: Study, base: Path, folder: Path) -> None:
    """Load all own code from the study file's folder `base`, and compare its files with the copies in `folder`.

    Raises StudyError, which names the arm, if `pagating.gating.own_gate` refuses it or if its file has changed.
    """
    for own, arms in own_codes(study).items():
        load(study, own, arms[0], base, folder)
        copy, file = copy_of(own.reference, folder), file_of(own.reference, base, folder)
        if copy.is_file() and copy.read_bytes() != file.read_bytes():
            raise StudyError(
                f"arms.{arms[0]}.{own.key}: {file} has changed since the study began (the trials ran {copy}); "
                "give the study another name, or bring the old file back"
            )


def load(study: Study, own: OwnCode, arm: str, base: Path, folder: Path) -> None:
    """Load the own code of an arm. Raises StudyError, which names the arm.

    Args:
        study: The study.
        own: The code.
        arm: The arm that it belongs to.
        base: Folder of the study file.
        folder: The study's folder.
    """
    from pagating.gating.own_gate import load_own  # torch takes seconds to load

    try:
        precision = "bfloat16" if study.fixed.precision == AUTO else study.fixed.precision  # it may become either
        load_own(own.key, placed(own.reference, base, folder), precision)
    except ValueError as error:
        raise StudyError(f"arms.{arm}.{error}") from error


def doubtful(study: Study, base: Path, folder: Path) -> list[str]:
    """Return a warning for each own gate that looks like an activation, or whose alpha has no effect.

    Raises StudyError as `check_gates`.
    """
    found = []
    for own, arms in own_codes(study).items():
        load(study, own, arms[0], base, folder)
        if own.key != "gate":
            continue
        from pagating.gating.gates import gate_row
        from pagating.gating.own_gate import grows
        from pagating.gating.units import idle_alpha

        for name in arms:
            form, base_of = study.arms[name].form, study.arms[name].base
            idle = idle_alpha(form, gate_row(placed(own.reference, base, folder)), base_of)
            if idle and study.arms[name].alpha != 0:
                found.append(f"arms.{name}: {idle}")
        if grows(placed(own.reference, base, folder)):
            found.append(
                f"arms.{arms[0]}.gate: {own.name}(x) grows with x, as an activation does; the arm trains "
                f"{study.arms[arms[0]].formula}: write `unit: {own.reference}` if {own.name}(x) is the whole activation"
            )
    return found


def keep_gates(study: Study, base: Path, folder: Path) -> None:
    """Copy the files of the study's own gates and activations into its folder."""
    for reference in references(study):
        copy = copy_of(reference, folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file_of(reference, base, folder).read_bytes())


def digests(study: Study, folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each copy in the study's folder, by reference."""
    return {
        reference: hashlib.sha256(copy_of(reference, folder).read_bytes()).hexdigest()
        for reference in references(study)
    }


def with_moved_gates(before: Study, folder: Path, now: Study, base: Path) -> Study:
    """Return `before` with the new reference of each gate or activation whose file has moved with its bytes.

    Args:
        before: The study of the folder.
        folder: The study's folder, with the copies of its gates.
        now: The study of the study file.
        base: Folder of the study file.
    """
    arms = dict(before.arms)
    for name in arms.keys() & now.arms.keys():
        old, new = arms[name].own_code, now.arms[name].own_code
        if old and new and old != new and (old.key, old.name) == (new.key, new.name):
            copy, file = copy_of(old.reference, folder), base / new.file
            if copy.is_file() and file.is_file() and copy.read_bytes() == file.read_bytes():
                arms[name] = arms[name].model_copy(update={new.key: new.reference})
    return before.model_copy(update={"arms": arms})


def with_placed_code(study: Study, base: Path, folder: Path) -> Study:
    """Return the study with the names under which `check_gates` has registered its own code in this process."""
    arms = {
        name: arm.model_copy(update={own.key: placed(own.reference, base, folder)}) if (own := arm.own_code) else arm
        for name, arm in study.arms.items()
    }
    return study.model_copy(update={"arms": arms})


def place_gate(trial: Trial, folder: Path) -> Trial:
    """Return the trial with its own code named by the absolute path of the study's copy, valid in any process."""
    own = trial.own_code
    return trial.with_own(copy_of(own.reference, folder.resolve())) if own else trial
