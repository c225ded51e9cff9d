"""Find, read and write study files."""

from __future__ import annotations

import os
import re
import stat
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from analysis.io import plain_yaml
from analysis.io.text import redact
from tune.errors import StudyError
from tune.study.explain import explain
from tune.study.own_study import OwnStudy
from tune.study.sections import NAME
from tune.study.study import Study

FILE, LEDGER = "study.yaml", "ledger.jsonl"  # of a study's folder
EXAMPLE = "keys such as question, arms and nuisance"
STREAM = Path("standard input")


@dataclass(frozen=True)
class Found:
    """A study with its surroundings.

    Attributes:
        study: The study.
        base: Folder at which its relative paths start.
        output: Folder of studies that it belongs to.
        own: True if the file is the one in the study's own folder, which is `base`.
    """

    study: Study
    base: Path
    output: Path
    own: bool = False


def find(given: Path, output: Path) -> Found:
    """Find and read a study.

    Relative paths start at the folder of the file; of a link, at the folder of the file that it names; of standard
    input and other streams, at the working directory.

    Args:
        given: A study file, `-` for standard input, a folder with a study.yaml, or the name of a study in `output`.
        output: Folder of studies.

    Raises:
        StudyError: There is no such file, or it is not a study.
    """
    if str(given) == "-":
        return Found(_unnamed(sys.stdin.buffer.read(plain_yaml.MOST_BYTES + 1), STREAM), Path.cwd(), output)
    path = _path(given, output)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe, such as <(command) of a shell
        with open(path, "rb") as stream:
            return Found(_unnamed(stream.read(plain_yaml.MOST_BYTES + 1), path), Path.cwd(), output)
    real = Path(os.path.realpath(path))
    if real.name != FILE or not (real.parent / LEDGER).exists():
        return Found(load(path), real.parent, output)
    folder = real.parent
    study = load(real)
    if folder.name != study.name and NAME.fullmatch(folder.name):  # it was renamed
        study = study.model_copy(update={"name": folder.name})
    return Found(study, folder, folder.parent, own=True)


def _path(given: Path, output: Path) -> Path:
    """Return the file that is meant. Raise StudyError, which says where it was looked for, if there is none."""
    for path in (given, given / FILE, output / given / FILE):
        try:
            if path.exists() and not path.is_dir():
                return path
        except OSError as error:  # too long
            raise StudyError(f"{given}: {error.strerror}") from error
    if given.is_dir():
        raise StudyError(f"{given}: is a folder without a {FILE}; name a study file")
    files = {path.stem: path for path in given.parent.glob("*.y*ml") if path.exists()}  # a broken link does not
    studies = [path.parent.name for path in sorted(output.glob(f"*/{FILE}"))]
    near = [str(files[stem]) for stem in get_close_matches(given.stem, files, 1)]
    near = near or get_close_matches(str(given), studies, 1)
    searched = f"; looked in {os.path.abspath(given.parent)}, and for a study of that name in {output}"
    hint = f"; did you mean {near[0]}?" if near else "" if given.is_absolute() else searched
    raise StudyError(f"{given}: No such file or directory{hint}")


def parse(text: str, path: str | Path) -> Study:
    """Return the study of a YAML text. `path` is named in errors; its stem names the study if the text does not."""
    path = Path(path)
    return _read(text, path, {"name": _name(path.stem)})


def load(path: str | Path) -> Study:
    """Read a study file. Raises StudyError, one line with file, key, value and what is allowed."""
    path = Path(path)
    try:
        return _study(plain_yaml.read(path), path, {"name": _name(path.stem)})
    except plain_yaml.PlainYamlError as error:
        raise StudyError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        near = get_close_matches(path.name, [each.name for each in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise StudyError(f"{path}: {error.strerror}{hint}") from error
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from error


def of_mapping(content: Mapping[str, Any], path: Path, name: str | None = None) -> Study:
    """Return the study of the keys of a study file. `path` is named in errors; `name` is used if no key names it."""
    return _study(dict(content), path, {"name": _name(name)} if name else {})


def _unnamed(raw: bytes, path: Path) -> Study:
    """Return the study of a stream, whose text has to name it."""
    if len(raw) > plain_yaml.MOST_BYTES:
        raise StudyError(f"{path}: has more than {plain_yaml.MOST_BYTES:,} bytes")
    try:
        return _read(plain_yaml.decoded(raw), path, {})
    except plain_yaml.PlainYamlError as error:
        raise StudyError(f"{path}: {error}") from error


def _read(text: str, path: Path, defaults: dict[str, Any]) -> Study:
    try:
        return _study(plain_yaml.parse(text), path, defaults)
    except plain_yaml.PlainYamlError as error:
        raise StudyError(f"{path}: {error}") from error


def _study(content: Any, path: Path, defaults: dict[str, Any]) -> Study:
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "text" if isinstance(content, str) else "a number"
        held = "is empty" if content is None else f"holds {kind}"
        raise StudyError(f"{path}: {held}, not a mapping of {EXAMPLE}")
    known = {key: value for key, value in content.items() if not key.startswith("x-")}  # values for anchors
    form = OwnStudy if "trial" in known else Study
    try:
        return form.model_validate({**defaults, **known})
    except ValidationError as error:
        raise StudyError(explain(error, path, form)) from error


def _name(stem: str) -> str:
    """Return the name of a study whose file has this stem: letters without accents, and - for what no name may have."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.") or stem


def dump(study: Study) -> str:
    """Return the resolved study as YAML without credentials in `tracking`. `parse` reads back the same study."""
    content = study.model_dump(exclude_none=True)
    if study.tracking:
        content["tracking"] = redact(study.tracking)
    return plain_yaml.dump(content)
