"""Tokenizers: byte-level BPE trained on the training text, or a pretrained one, whose files are read but never run.

Axes: N token in a text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pagating.data.texts import CorpusError, first_line

CHUNK = 1 << 20  # least characters of a piece of text that is tokenized separately
BATCH = 8  # pieces per call of the tokenizer
HINT = "download tokenizer.json (or vocab.json and merges.txt) into a folder and name it as tokenizer: {path: FOLDER}"
# files that transformers reads, each a JSON object, and the types of values that it assumes without a check
OBJECTS: dict[str, dict[str, tuple[type, ...]]] = {
    "tokenizer.json": {"model": (dict,), "added_tokens": (list,)},
    "tokenizer_config.json": {"tokenizer_class": (str,), "auto_map": (dict, list), "added_tokens_decoder": (dict,)},
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "config.json": {"auto_map": (dict,)},
}


def chunks(text: str) -> Iterator[str]:
    """Yield the text in pieces of CHUNK to 2 CHUNK characters. Joined, they are the text again.

    A piece ends at a line end. In a longer line it ends before a space, and without a space at 2 CHUNK.
    """
    start = 0
    while start < len(text):
        least, most = start + CHUNK, start + 2 * CHUNK
        end = text.find("\n", least, most) + 1
        if not end and most < len(text):
            space = text.rfind(" ", least, most)
            end = space if space > 0 else most
        yield text[start : end or len(text)]
        start = end or len(text)


def make_tokenizer(spec: Mapping[str, Any], train_text: str, base: Path | None = None) -> Any:
    """Train a byte-level BPE tokenizer on the training text, or load a pretrained one.

    Args:
        spec: {vocab_size: int} | {pretrained: hub name} | {path: folder with tokenizer.json or vocab.json +
            merges.txt}.
        train_text: Text for the training.
        base: Folder that a relative `path` starts from.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        CorpusError: The tokenizer does not exist, is damaged, or needs Python code of its own.
    """
    import tokenizers

    if spec.get("path"):
        return _load(str(_folder(spec, base)), local=True)
    if spec.get("pretrained"):
        return _load(spec["pretrained"], local=False)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(chunks(train_text), vocab_size=spec["vocab_size"], show_progress=False)
    return tokenizers.Tokenizer.from_str(tokenizer.to_str())


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Return the token ids of a text (N,), uint16 if the vocabulary allows it, else uint32.

    No special tokens and no padding are added.
    """
    size = tokenizer.get_vocab_size()
    parts: list[np.ndarray] = []
    pieces = chunks(text)
    while batch := list(itertools.islice(pieces, BATCH)):  # the tokenizer's output takes many times the text's memory
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        parts += [token_ids(piece.ids, size) for piece in encoded]
    return np.concatenate(parts)


def token_ids(ids: list[int], vocab_size: int) -> np.ndarray:
    """Return ids (N,) as uint16 if `vocab_size` allows it, else uint32.

    Raise CorpusError for an id of `vocab_size` or above, because a model has `vocab_size` embeddings.
    """
    if max(ids, default=0) >= vocab_size:
        raise CorpusError(f"the tokenizer gives id {max(ids)}, and its vocabulary has {vocab_size}: its ids have gaps")
    return np.asarray(ids, dtype=np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def digest_of(*parts: str | bytes) -> str:
    """Return the SHA-256 of the parts, each preceded by its length, so that it depends on the borders between parts."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def tokenizer_key(spec: Mapping[str, Any], base: Path | None) -> str:
    """Return a key that identifies a tokenizer: its study keys, a digest of its folder, and the library's version.

    Raise CorpusError if the folder cannot be read.
    """
    import tokenizers

    key = {name: value for name, value in spec.items() if value}
    if spec.get("path"):
        names = sorted(path for path in _folder(spec, base).glob("*") if path.suffix in {".json", ".model", ".txt"})
        key["path"] = digest_of(*[_bytes_of(path) for path in names])
    return json.dumps({**key, "tokenizers": tokenizers.__version__}, sort_keys=True)


def _folder(spec: Mapping[str, Any], base: Path | None) -> Path:
    return Path(os.path.join(base or "", os.path.expanduser(spec["path"])))


def _bytes_of(path: Path) -> bytes:
    if not path.is_file():  # reading a pipe would block
        raise CorpusError(f"tokenizer file {path}: is a folder, pipe or device, or a link to nothing")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"tokenizer file {path}: cannot be read: {error.strerror or error}") from error


def _load(name: str, local: bool) -> Any:
    """Load the fast tokenizer of a folder, or of a name on the hub."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if Path(name).is_dir():
        for file in OBJECTS:
            if os.path.lexists(path := Path(name) / file):
                _check_object(path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        fast = getattr(loaded, "backend_tokenizer", None)
    except MemoryError:
        raise
    except Exception as error:  # unexpected content of a file may raise any error in transformers
        raise CorpusError(_why(name, local, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    if fast is None:
        raise CorpusError(f"tokenizer '{name}' has no fast form (tokenizer.json)")
    fast.no_padding()
    fast.no_truncation()
    return fast


def _check_object(path: Path) -> None:
    """Raise CorpusError if a tokenizer file is not a JSON object, or a value in it has the wrong type."""
    try:
        held = json.loads(_bytes_of(path))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"tokenizer file {path}: is damaged: no JSON ({first_line(error)})") from error
    if not isinstance(held, dict):
        raise CorpusError(f"tokenizer file {path}: is damaged: holds {_kind(held)}, not an object")
    for key, kinds in OBJECTS[path.name].items():
        if path.name == "tokenizer.json" and key not in held:
            raise CorpusError(f"tokenizer file {path}: is damaged: has no '{key}'")
        if held.get(key) is not None and not isinstance(held[key], kinds):
            raise CorpusError(f"tokenizer file {path}: is damaged: its '{key}' is {_kind(held[key])}")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _why(name: str, local: bool, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"tokenizer '{name}' needs Python code of its own (auto_map), and that is never run; {HINT}"
    if not Path(name).is_dir():
        if local:
            return f"tokenizer '{name}' cannot be loaded: no such folder; {HINT}"
        if isinstance(error, OSError):
            return f"tokenizer '{name}' cannot be loaded: no such folder and no copy on the hub; {HINT}"
    return f"tokenizer '{name}' cannot be loaded: a file is missing or damaged: {first_line(error)}; {HINT}"
