"""Pack texts into a folder of tokens, once, in a cache that processes share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pagating.data.cache_lock import alone
from pagating.data.corpus import meta_digest, pad_id, read_meta, rows_file
from pagating.data.texts import SPLITS, CorpusError, load_texts
from pagating.data.tokenizer import digest_of, encode, make_tokenizer, tokenizer_key

FORMAT = 2  # increase it if the packing of the same text changes


def prepare(
    source: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    n_ctx: int,
    cache: Path,
    base: Path | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Path:
    """Pack a corpus unless the cache has an intact copy, and return its folder. A damaged copy is reported in one line.

    The folder holds `train.bin`, `validation.bin`, `test.bin` (flat token ids), `tokenizer.json` and `corpus.json`
    (digest, dtype, vocabulary, tokens and bytes of text per split). With `rows: lines` in `source`, it also holds the
    index that `pagating.data.lines` reads. It appears in one step, and only one of several processes that need it makes
    it. A trial that reads a folder while it is made again keeps its open files. After an error nothing is written.

    Args:
        source: Corpus section of a study.
        tokenizer: Tokenizer section of a study.
        n_ctx: Tokens per window.
        cache: Folder of all packed corpora.
        base: Folder that relative paths start from.
        check: Called with the content of `corpus.json` before it is written; it may raise an error.

    Raises:
        CorpusError: Text or tokenizer cannot be used, a split is shorter than one window, or the cache is not writable.
    """

    def fits(meta: Mapping[str, Any]) -> None:
        check_length(meta["splits"], n_ctx)
        if check:
            check(meta)

    texts = load_texts(source, base)
    lines = source.get("rows") == "lines"
    kind = ["lines"] if lines else []
    key = digest_of(str(FORMAT), *kind, tokenizer_key(tokenizer, base), *[texts[split] for split in SPLITS])[:16]
    folder = cache / f"corpus-{key}"
    if fault(folder):
        try:
            with alone(cache):
                damage = fault(folder)  # another process may have made it while this one waited
                if damage:
                    if folder.exists():
                        print(f"pagating: {folder}: {damage}; it is packed again", file=sys.stderr)
                    fast = make_tokenizer(tokenizer, texts["train"], base)
                    _pack(folder, fast, texts, lines, fits)
                    return folder
        except OSError as error:
            raise CorpusError(f"{cache}: the packed corpus cannot be written: {error.strerror or error}") from error
    fits(read_meta(folder))
    return folder


def _pack(
    folder: Path,
    tokenizer: Any,
    texts: Mapping[str, str],
    lines: bool,
    fits: Callable[[Mapping[str, Any]], None],
) -> None:
    """Tokenize texts and write the folder, unless `fits` raises an error for the content of `corpus.json`."""
    rows: dict[str, np.ndarray] = {}
    if lines:
        from pagating.data.lines import encode_lines

        both = {split: encode_lines(tokenizer, texts[split]) for split in SPLITS}
        tokens, rows = ({split: pair[i] for split, pair in both.items()} for i in range(2))
    else:
        tokens = {split: encode(tokenizer, texts[split]) for split in SPLITS}
    words = tokenizer.to_str().encode("utf-8")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "dtype": str(tokens["train"].dtype),
        "vocab_size": tokenizer.get_vocab_size(),
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
    fits(meta)
    files |= {"tokenizer.json": words, "corpus.json": json.dumps(meta, indent=1).encode("utf-8")}
    place(folder, {name: [raw] for name, raw in files.items()})


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


def check_length(splits: Mapping[str, Mapping[str, Any]], n_ctx: int) -> None:
    """Raise CorpusError if a split is shorter than one window of n_ctx tokens and the token after it."""
    for split, counts in splits.items():
        if counts["tokens"] < n_ctx + 1:
            raise CorpusError(
                f"the {split} split has {counts['tokens']} tokens; one window needs n_ctx + 1 = {n_ctx + 1}: "
                "give more text or a smaller model.n_ctx"
            )
