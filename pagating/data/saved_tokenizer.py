"""Saved tokenizers: find, identify and load their files, which are read but never run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pagating.data.corpus import digest_of
from pagating.data.errors import CorpusError, NotDownloaded, first_line

SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".codes")  # of a tokenizer's files
SPACES = ("\u0120".encode(), rb"\u0120")  # the byte-level form of a space, as it is written in JSON
HINT = "download tokenizer.json (or vocab.json and merges.txt) into a folder and name it as tokenizer: {path: FOLDER}"
# files that transformers reads, each a JSON object, and the types of values that it assumes without a check
OBJECTS: dict[str, dict[str, tuple[type, ...]]] = {
    "tokenizer.json": {"model": (dict,), "added_tokens": (list,)},
    "tokenizer_config.json": {"tokenizer_class": (str,), "auto_map": (dict, list), "added_tokens_decoder": (dict,)},
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "config.json": {"auto_map": (dict,)},
}


def find_tokenizer(spec: Mapping[str, Any], base: Path | None) -> Path | None:
    """Return the folder or file of a pretrained tokenizer, downloaded if needed; None if it is to be trained.

    A name is a folder beside the study file, or else a tokenizer of the hub. Raise NotDownloaded if it is neither.
    """
    name = spec.get("path") or spec.get("pretrained")
    if not name:
        return None
    place = Path(os.path.abspath(os.path.join(base or "", os.path.expanduser(name))))
    if os.path.exists(place):
        return place
    missing = f"tokenizer '{name}' cannot be loaded: {place} does not exist"
    if spec.get("path"):
        raise CorpusError(f"{missing}; {HINT}")
    try:
        return _from_hub(name)
    except (OSError, ValueError) as error:
        raise NotDownloaded(f"{missing}, and there is no copy on the hub or it cannot be reached; {HINT}") from error


def _from_hub(name: str) -> Path:
    """Return the folder of a tokenizer's files in the hub's cache, downloaded if the cache has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = [f"*{suffix}" for suffix in SUFFIXES]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        folder = None
    if folder is None or not _has_vocabulary(folder):
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    return folder


def _has_vocabulary(folder: Path) -> bool:
    return any(path for one in ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken") for path in folder.glob(one))


def tokenizer_key(spec: Mapping[str, Any], base: Path | None) -> str:
    """Return a key that identifies a tokenizer: what it is trained for, or its files, and the libraries' versions.

    Raise CorpusError if the tokenizer does not exist or a file of it cannot be read.
    """
    import tokenizers

    place = find_tokenizer(spec, base)
    key = {"tokenizers": tokenizers.__version__}
    if place is None:
        return json.dumps({**key, "vocab_size": spec["vocab_size"]}, sort_keys=True)
    if place.is_dir():  # transformers makes a tokenizer of the folder
        paths = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES)
        key["transformers"] = version("transformers")
    else:
        paths = [place]
    named = [part for path in paths for part in (path.name if place.is_dir() else "", _bytes_of(path))]
    return json.dumps({**key, "files": digest_of(*named)}, sort_keys=True)


def load_tokenizer(place: Path) -> Any:
    """Return the tokenizer of a folder or file. Raise CorpusError if it is damaged or needs Python code of its own."""
    return _load_folder(place) if place.is_dir() else _load_file(place)


def _bytes_of(path: Path) -> bytes:
    if not path.is_file():  # reading a pipe would block
        raise CorpusError(f"tokenizer file {path}: is a folder, pipe or device, or a link to nothing")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"tokenizer file {path}: cannot be read: {error.strerror or error}") from error


def _load_file(path: Path) -> Any:
    """Load a file that the tokenizers library has written."""
    import tokenizers

    raw = _bytes_of(path)
    try:
        return tokenizers.Tokenizer.from_buffer(raw)
    except ValueError as error:
        raise CorpusError(
            f"tokenizer {path} cannot be loaded: it is no tokenizer.json: {first_line(error)}; {HINT}"
        ) from error


def _load_folder(folder: Path) -> Any:
    """Load the fast tokenizer of a folder."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    for file in OBJECTS:
        if os.path.lexists(path := folder / file):
            _check_object(path)
    options = {"tokenizer_type": "gpt2"} if _is_bare_gpt2(folder) else {}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
        fast = getattr(loaded, "backend_tokenizer", None)
    except MemoryError:
        raise
    except Exception as error:  # unexpected content of a file may raise any error in transformers
        raise CorpusError(_why(folder, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    if not _has_vocabulary(folder):  # transformers then makes an empty one
        raise CorpusError(_why(folder, ValueError("no file has a vocabulary")))
    if fast is None:
        raise CorpusError(f"tokenizer '{folder}' has no fast form (tokenizer.json)")
    return fast


def _is_bare_gpt2(folder: Path) -> bool:
    """Return True for a folder that holds only the vocabulary and the merges of a byte-level BPE."""
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "config.json")):
        return False
    if not (folder / "merges.txt").is_file() or not (folder / "vocab.json").is_file():
        return False
    raw = _bytes_of(folder / "vocab.json")
    return any(space in raw for space in SPACES)


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


def _why(folder: Path, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"tokenizer '{folder}' needs Python code of its own (auto_map), and that is never run; {HINT}"
    names = sorted(path.name for path in folder.iterdir())
    if "tokenizer.json" not in names:
        other = [name for name in names if name.endswith(".json") and _is_tokenizer(folder / name)]
        if other:
            return f"tokenizer '{folder}' has no tokenizer.json; name its file as tokenizer: {{path: .../{other[0]}}}"
        if "vocab.txt" in names:
            return (
                f"tokenizer '{folder}' has a vocab.txt, and no file says of which kind: add a tokenizer_config.json "
                'such as {"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
            )
    held = ", ".join(names[:9]) or "nothing"
    return (
        f"tokenizer '{folder}' cannot be loaded: a file is missing or damaged: {first_line(error)}; "
        f"the folder has {held}; {HINT}"
    )


def _is_tokenizer(path: Path) -> bool:
    try:
        _load_file(path)
    except CorpusError:
        return False
    return True
