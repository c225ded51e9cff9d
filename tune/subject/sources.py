"""The files of the user's own training: copied into the study's folder, hashed, and the same on every day.

A function's file and the modules of its folder that it imports are copied to `code/` of the study's folder, and trials
run the copies. A changed file is refused, because one arm must not mix trials of two different codes.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.io.write import write_whole
from tune.errors import StudyError
from tune.study.own_study import FUNCTION, CommandSection, OwnStudy
from tune.study.study import digest

FOLDER = "code"


@dataclass(frozen=True)
class Sources:
    """The user's files of a study that has begun.

    Attributes:
        folder: The study's folder.
        files: SHA-256 of each file, by its path in `code/`, or for a command in its folder.
        main: The copy of the file with the function; the working folder for a command.
        runs: Name of the function, or the command.
        working_folder: Folder of the user's file or of the command, or the study's folder if that one is gone.
        command: The section of a command; None for a function.
    """

    folder: Path
    files: Mapping[str, str]
    main: Path
    runs: str
    working_folder: Path
    command: CommandSection | None = None

    @property
    def meta(self) -> dict[str, Any]:
        """What the tracker shows of a study's input."""
        return {"digest": digest(dict(self.files)), "splits": {}}

    def identity(self) -> dict[str, Any]:
        """Return the digests that the ledger's first event records."""
        return {"corpus": self.meta["digest"], "code": dict(self.files), "runs": self.runs}

    def contents(self) -> dict[str, bytes]:
        """Return the files for another machine, by their path in the folder there.

        Files that a command names by their whole path are not among them: they have to be there too. Raises StudyError
        if another file of a command is not below its folder, or if one has changed.
        """
        self.check_unchanged()
        place = self.working_folder if self.command else self.main.parent
        whole = (
            [os.path.dirname(word) for word in shlex.split(self.runs) if os.path.isabs(word)] if self.command else []
        )
        found = {}
        for name in self.files:
            path = os.path.normpath(place / name)
            if not name.startswith(os.pardir + os.sep):
                found[name] = (place / name).read_bytes()
            elif not any(path.startswith(folder + os.sep) for folder in whole):
                raise StudyError(
                    f"trial.command: {name} is not below {place}, so it cannot travel to another machine: name it by "
                    "its whole path if it is there too, or set trial.folder to a folder that has all files"
                )
        return found

    def check_unchanged(self) -> None:
        """Raise StudyError if a file that a command names has changed. The files of a function were copied."""
        if self.command is None:
            return
        now = digests(of_command(self.command, self.working_folder))
        if changed := sorted(set(self.files.items()) ^ set(now.items())):
            raise StudyError(
                f"{self.working_folder / changed[0][0]} has changed since the study began: bring the old file back"
            )

    def check_begun(self, begun: Mapping[str, Any]) -> None:
        """Raise StudyError if the study was begun with another function, another command or other files."""
        if begun.get("runs") != self.runs:
            raise StudyError(
                f"{self.folder}: trial was '{begun.get('runs')}' and is now '{self.runs}': undo the change, or give "
                "the study another name"
            )
        if changed := sorted(set(begun.get("code", {}).items()) ^ set(self.files.items())):
            raise StudyError(
                f"{self.folder}: {changed[0][0]} is not the file that the study was begun with: give the study another "
                "name, or bring the old file back"
            )


@dataclass(frozen=True)
class DraftSources:
    """The user's files, found and checked. Only `write` writes anything."""

    study: OwnStudy
    folder: Path
    found: Mapping[str, bytes]
    working_folder: Path
    vocab_size: int = 0

    def write(self) -> Sources:
        """Copy the files of a function into the study's folder. Those of a command are only hashed."""
        files = digests(self.found)
        if isinstance(self.study.trial, CommandSection):
            place, section = self.working_folder, self.study.trial
            return Sources(self.folder, files, place, section.command, place, section)
        code = self.folder / FOLDER
        for name, content in self.found.items():
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(code / name, content)
        file, function = _named(self.study)
        main = (code / Path(file).name).resolve()
        return Sources(self.folder, files, main, function, self.working_folder)


def draft(study: OwnStudy, base: Path, folder: Path) -> DraftSources:
    """Find and check the user's files; write nothing.

    Args:
        study: The study.
        base: Folder of the study file, at which the path of the user's file starts.
        folder: The study's folder, which may not exist yet.

    Raises:
        StudyError: There is no such file, it is no Python, or it has changed since the study began.
    """
    if isinstance(study.trial, CommandSection):
        place = (base / study.trial.folder).resolve()
        return DraftSources(study, folder, of_command(study.trial, place), place)
    given, function = _named(study)
    file, copies = base / given, folder / FOLDER
    if not file.is_file() and (copies / file.name).is_file():  # the study has its copy
        kept = {str(path.relative_to(copies)): path.read_bytes() for path in sorted(copies.rglob("*.py"))}
        return DraftSources(study, folder, kept, folder.resolve())
    found = {str(path.relative_to(file.parent)): path.read_bytes() for path in _imported(file, given)}
    tree = ast.parse(found[file.name])
    names = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    names |= {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
    names |= {
        alias.asname or alias.name
        for each in ast.walk(tree)
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    if function not in names:
        raise StudyError(f"trial: {file} has no function {function}")
    for name, content in found.items() if copies.is_dir() else ():
        if not (copies / name).is_file() or (copies / name).read_bytes() != content:
            raise StudyError(
                f"trial: {file.parent / name} has changed since the study began (its trials ran {copies / name}); give "
                "the study another name, or bring the old file back"
            )
    return DraftSources(study, folder, found, file.parent.resolve())


def of_command(section: CommandSection, place: Path) -> dict[str, bytes]:
    """Return the files that a command names, and the modules that those in Python import, by their path in its folder.

    Raises StudyError if the folder does not exist.
    """
    if not place.is_dir():
        raise StudyError(f"trial.folder: {place}: no such folder")
    named = [place / word for word in shlex.split(section.command) if (place / word).is_file()]
    every = dict.fromkeys(
        path for file in named for path in (_imported(file, file.name) if file.suffix == ".py" else [file])
    )
    return {os.path.relpath(path, place): path.read_bytes() for path in every}


def digests(found: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of files by their names."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def _named(study: OwnStudy) -> tuple[str, str]:
    """Return the file and the name of the function of a study."""
    match = FUNCTION.fullmatch(study.trial) if isinstance(study.trial, str) else None
    assert match is not None
    return match["file"], match["name"]


def _imported(file: Path, given: str) -> list[Path]:
    """Return a file and the files of its folder that it imports, and those that they import."""
    if not file.is_file():
        raise StudyError(f"trial: {given}: no such file in {os.path.abspath(file.parent)}")
    found, ahead = [file], [file]
    while ahead:
        for name in _imports(ahead.pop()):
            for path in _modules(file.parent, name):
                if path not in found:
                    found.append(path)
                    ahead.append(path)
    return found


def _imports(file: Path) -> Iterator[str]:
    """Yield the dotted names of the modules that a file may import. Raises StudyError if it is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise StudyError(f"trial: {file}, line {error.lineno}: {error.msg}") from error
    for each in ast.walk(tree):
        if isinstance(each, ast.Import):
            yield from (alias.name for alias in each.names)
        elif isinstance(each, ast.ImportFrom) and each.module and not each.level:
            yield each.module
            yield from (f"{each.module}.{alias.name}" for alias in each.names)


def _modules(folder: Path, dotted: str) -> Iterator[Path]:
    """Yield the files of a module of the user's folder: its own, or all of its package."""
    first = dotted.split(".")[0]
    if (folder / f"{first}.py").is_file():
        yield folder / f"{first}.py"
    elif (folder / first / "__init__.py").is_file():
        yield from sorted((folder / first).rglob("*.py"))
