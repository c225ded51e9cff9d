"""Pack texts into a folder of tokens, once, in a cache that processes share; bring that folder to other machines."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from pagating.data.corpus import check_length, digest_of, meta_digest, pad_id, read_meta, rows_file
from pagating.data.errors import CorpusError
from pagating.data.saved_tokenizer import tokenizer_key
from pagating.data.texts import SPLITS, load_texts
from pagating.data.tokenizer import (
    check_alphabet,
    check_size,
    check_unknown,
    encode,
    make_tokenizer,
    note_size,
    vocabulary_size,
)

FORMAT = 2  # increase it if the packing of the same text changes


@dataclass(frozen=True)
class Draft:
    """A packed corpus that may not be in the cache yet.

    Attributes:
        folder: Folder of the corpus in the cache.
        meta: Content of its `corpus.json`: digest, dtype, vocabulary, tokens and bytes of text per split.
        files: Content of the files to write, by name. Empty if the cache already holds the corpus.
    """

    folder: Path
    meta: Mapping[str, Any]
    files: Mapping[str, bytes]

    def write(self) -> Path:
        """Write the corpus into the cache if it is not there; return its folder. Raises CorpusError."""
        if self.files:
            with _writing(self.folder.parent):
                place(self.folder, {name: [raw] for name, raw in self.files.items()})
        return self.folder


def prepare(
    source: Mapping[str, Any], tokenizer: Mapping[str, Any], n_ctx: int, cache: Path, base: Path | None = None
) -> Path:
    """Return the folder with the packed corpus; make it if the cache lacks it or holds a damaged one.

    See `drafted`, which takes the same arguments and writes nothing by itself.
    """
    with drafted(source, tokenizer, n_ctx, cache, base) as draft:
        return draft.write()


@contextmanager
def drafted(
    source: Mapping[str, Any], tokenizer: Mapping[str, Any], n_ctx: int, cache: Path, base: Path | None = None
) -> Iterator[Draft]:
    """Pack a corpus in memory, so that a caller can refuse it before `Draft.write` writes it.

    The cache's lock is held inside the block: of several processes that need the same corpus, one makes it. Another
    process sees the whole folder or nothing, and a trial that reads a folder while it is made again keeps its files.
    The folder holds `train.bin`, `validation.bin`, `test.bin` (flat token ids), `tokenizer.json` and `corpus.json`;
    with `rows: lines` in `source` also the index that `pagating.data.lines` reads. If the block raises, nothing is
    left in the cache. One line on standard error says if a damaged corpus is packed again.

    Args:
        source: The `corpus` section of a study.
        tokenizer: The `tokenizer` section of a study.
        n_ctx: Tokens per window.
        cache: Folder of the cache; made if needed.
        base: Folder at which relative paths of `source` and `tokenizer` start.

    Raises:
        CorpusError: The text or the tokenizer cannot be used, a split is shorter than one window, or the cache cannot
            be written.
    """
    texts = load_texts(source, base)
    lines = source.get("rows") == "lines"
    kind = ["lines"] if lines else []
    key = digest_of(str(FORMAT), *kind, tokenizer_key(tokenizer, base), *[texts[split] for split in SPLITS])[:16]
    folder = cache / f"corpus-{key}"
    with ExitStack() as held:
        damage = fault(folder)
        if damage:
            with _writing(cache):
                held.enter_context(alone(cache))
            damage = fault(folder)  # while this process waited for the lock, another may have made the corpus
        if damage and folder.exists():
            print(f"pagating: {folder}: {damage}; it is packed again", file=sys.stderr)
        if damage:
            draft = Draft(folder, *_packed(make_tokenizer(tokenizer, texts["train"], base), texts, lines))
        else:
            draft = Draft(folder, read_meta(folder), {})
        check_size(tokenizer, draft.meta["vocab_size"])
        check_length(draft.meta["splits"], n_ctx)
        if damage:  # after the checks, because a refusal is one line
            note_size(tokenizer, draft.meta["vocab_size"])
        yield draft


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a CorpusError that names the cache."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"{cache}: the packed corpus cannot be written: {error.strerror or error}") from error


def _packed(tokenizer: Any, texts: Mapping[str, str], lines: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Tokenize the texts; return the content of `corpus.json` and of all files, by name."""
    check_alphabet(tokenizer, texts.values())
    rows: dict[str, np.ndarray] = {}
    if lines:
        from pagating.data.lines import encode_lines

        both = {split: encode_lines(tokenizer, texts[split]) for split in SPLITS}
        tokens, rows = ({split: pair[i] for split, pair in both.items()} for i in range(2))
    else:
        tokens = {split: encode(tokenizer, texts[split]) for split in SPLITS}
    check_unknown(tokenizer, tokens["train"])
    words = tokenizer.to_str().encode("utf-8")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "dtype": str(tokens["train"].dtype),
        "vocab_size": vocabulary_size(tokenizer),
        "tokenizer": hashlib.sha256(words).hexdigest(),
        "splits": {
            split: {
                "tokens": len(tokens[split]),
                "bytes": len(texts[split].encode("utf-8")),
                "sha256": hashlib.sha256(tokens[split].tobytes()).hexdigest(),
            }
            for split in SPLITS
        },
    }
    files = {f"{split}.bin": tokens[split].tobytes() for split in SPLITS}
    for split, spans in rows.items():
        raw = files[rows_file(split)] = spans.tobytes()
        meta["splits"][split] |= {"rows": len(spans), "rows_sha256": hashlib.sha256(raw).hexdigest()}
    if rows:
        meta["pad"] = pad_id(tokenizer)
    meta["digest"] = meta_digest(meta)
    return meta, {**files, "tokenizer.json": words, "corpus.json": json.dumps(meta, indent=1).encode("utf-8")}


def place(folder: Path, files: Mapping[str, Iterable[bytes]]) -> None:
    """Write a folder in one step: all bytes are on disk before its name appears.

    The caller holds the cache's lock, so no other process uses the scratch folder.
    """
    scratch = folder.parent / f".{folder.name}"
    try:
        scratch.mkdir()
        for name, pieces in files.items():
            with open(scratch / name, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():  # damaged: move it away in one step, then remove it
            os.replace(folder, scratch / "damaged")
        os.replace(scratch, folder)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """Return the fault of a cached corpus after reading every byte, or None if it is intact."""
    try:
        meta = read_meta(folder)
        if meta["format"] != FORMAT:
            return f"format {meta['format']} is not {FORMAT}"
        wanted = {f"{split}.bin": meta["splits"][split]["sha256"] for split in SPLITS}
        indexed = {split: counts for split, counts in meta["splits"].items() if "rows" in counts}
        wanted |= {rows_file(split): counts["rows_sha256"] for split, counts in indexed.items()}
        for name, digest in {**wanted, "tokenizer.json": meta["tokenizer"]}.items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is damaged (its checksum does not match)"
    except (CorpusError, KeyError) as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


# --- the cache's lock -------------------------------------------------------------------------------------------------


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Hold the cache's lock, which ends with the process; remove what a killed process left half-written.

    If the work inside fails, the lock file and the folders made for it are removed: a failure leaves no trace.
    Raises OSError if the cache cannot be written.
    """
    path = cache / ".lock"
    lock = FileLock(path)
    while not lock.is_locked:
        made = list(itertools.takewhile(lambda one: not one.exists(), (path, *path.parents)))  # the deepest first
        with suppress(FileNotFoundError):  # the process that held it failed, and removed the folder
            lock.acquire()
    try:
        for scratch in cache.glob(".corpus-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield
    except BaseException:
        with suppress(OSError):  # a folder that another process uses by now is not empty, and stays
            for one in made:
                one.rmdir() if one.is_dir() else one.unlink()
        raise
    finally:
        lock.release()


# --- a corpus of another machine --------------------------------------------------------------------------------------


def file_names(folder: Path) -> list[str]:
    """Return the names of a corpus's files, `corpus.json` last."""
    splits = read_meta(folder)["splits"]
    indexes = [rows_file(split) for split in SPLITS if "rows" in splits[split]]
    return [*[f"{split}.bin" for split in SPLITS], *indexes, "tokenizer.json", "corpus.json"]


def receive(folder: Path, digest: str, files: Callable[[], Mapping[str, Iterable[bytes]]]) -> None:
    """Write a corpus that was packed on another machine, unless an intact copy is there.

    One process writes it, and others wait. Each process checks every byte once.

    Args:
        folder: Folder of the corpus on this machine.
        digest: Digest of the corpus.
        files: Called if the corpus is missing; returns the pieces of each file, by name.

    Raises:
        CorpusError: The bytes are not those of `digest`, or cannot be written.
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


_received: set[tuple[str, str]] = set()  # folders that this process has checked


def _fault_of(folder: Path, digest: str) -> str | None:
    """Return the fault of a corpus, which may be another digest; None if it is intact."""
    found = fault(folder)
    if found is None and read_meta(folder)["digest"] != digest:
        return f"is corpus {read_meta(folder)['digest']}, not {digest}"
    return found
