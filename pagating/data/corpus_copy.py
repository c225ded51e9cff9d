"""A packed corpus brought to another machine: which files it has, and a checked copy of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pagating.data.cache_lock import alone
from pagating.data.corpus import read_meta, rows_file
from pagating.data.prepare import fault, place
from pagating.data.texts import SPLITS, CorpusError


def file_names(folder: Path) -> list[str]:
    """The files of a corpus, `corpus.json` the last."""
    splits = read_meta(folder)["splits"]
    indexes = [rows_file(split) for split in SPLITS if "rows" in splits[split]]
    return [*[f"{split}.bin" for split in SPLITS], *indexes, "tokenizer.json", "corpus.json"]


def receive(folder: Path, digest: str, files: Callable[[], Mapping[str, Iterable[bytes]]]) -> None:
    """Have the corpus of `digest`, packed on another machine, in `folder`: written unless a whole copy is there.

    `files` gives the files by name, in pieces; it is called by the first process that needs them, others wait for
    it. Every byte is checked, in each process once. Raises CorpusError where they are not those of `digest`, or cannot
    be written.
    """
    if (str(folder), digest) in _received and (folder / "corpus.json").is_file():
        return
    try:
        if _fault_of(folder, digest):
            with alone(folder.parent):
                if _fault_of(folder, digest):  # while this process waited, another may have written it
                    place(folder, files())
    except OSError as error:
        raise CorpusError(f"{folder}: the corpus cannot be brought here: {error.strerror or error}") from error
    if damage := _fault_of(folder, digest):
        raise CorpusError(f"{folder}: {damage}")
    _received.add((str(folder), digest))


_received: set[tuple[str, str]] = set()  # folders that this process has looked through


def _fault_of(folder: Path, digest: str) -> str | None:
    """`fault`, and being another corpus than that of `digest`."""
    found = fault(folder)
    if found is None and read_meta(folder)["digest"] != digest:
        return f"is corpus {read_meta(folder)['digest']}, not {digest}"
    return found
