"""Tokenizers: byte-level BPE trained on the training text, or a pretrained one, whose files are read but never run.

Axes: N token in a text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pagating.data.errors import CorpusError, NotDownloaded, first_line, note

CHUNK = 1 << 20  # least characters of a piece of text that is tokenized separately
BATCH = 8  # pieces per call of the tokenizer
MANY = 0.05  # share of unknown tokens that is worth a line
LARGEST = 1 << 20  # most ids of a vocabulary, as of one that is trained
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
        spec: {vocab_size: int} | {pretrained: hub name} | {path: folder with tokenizer.json or vocab.json and
            merges.txt, or a tokenizer.json}.
        train_text: Text for the training.
        base: Folder that a relative `path` starts from.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        CorpusError: The tokenizer does not exist, is damaged, or needs Python code of its own.
    """
    import tokenizers

    place = find_tokenizer(spec, base)
    if place is not None:
        tokenizer = _load_folder(place) if place.is_dir() else _load_file(place)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(chunks(train_text), vocab_size=spec["vocab_size"], show_progress=False)
    if (made := trained.get_vocab_size()) < spec["vocab_size"]:
        note(f"tokenizer.vocab_size={spec['vocab_size']}: the training text gives only {made} tokens")
    return tokenizers.Tokenizer.from_str(trained.to_str())


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


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Return the token ids of a text (N,), uint16 if the vocabulary allows it, else uint32.

    No special tokens and no padding are added.
    """
    size = vocabulary_size(tokenizer)
    parts: list[np.ndarray] = []
    pieces = chunks(text)
    while batch := list(itertools.islice(pieces, BATCH)):  # the tokenizer's output takes many times the text's memory
        parts += [token_ids(ids, size) for ids in encode_batch(tokenizer, batch)]
    return np.concatenate(parts)


def encode_batch(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text. Raise CorpusError if the tokenizer has no token for a part of them."""
    try:
        return [piece.ids for piece in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises Exception itself
        said = first_line(error).removeprefix("Exception: ")
        raise CorpusError(
            f"the tokenizer cannot encode the text: {said}; it needs an unknown token, or a token for every "
            "character of the text"
        ) from error


def vocabulary_size(tokenizer: Any) -> int:
    """Return the number of embeddings that a tokenizer needs: its largest id + 1, added tokens and gaps included.

    Raise CorpusError for an id of LARGEST or above.
    """
    top = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if top >= LARGEST:
        raise CorpusError(f"the tokenizer has the id {top}; a model has at most {LARGEST:,} embeddings: number it anew")
    return top + 1


def check_size(spec: Mapping[str, Any], held: int) -> None:
    """Raise CorpusError if a pretrained tokenizer has not the size that is asked for.

    Args:
        spec: As for `make_tokenizer`; a pretrained one perhaps with a `vocab_size`.
        held: Number of embeddings that the tokenizer needs.
    """
    name, asked = spec.get("path") or spec.get("pretrained"), spec.get("vocab_size", held)
    if name and asked != held:
        raise CorpusError(
            f"tokenizer.vocab_size={asked}: '{name}' has {held} (its largest id + 1); leave vocab_size out, which is "
            "for a tokenizer that is trained"
        )


def check_alphabet(tokenizer: Any, texts: Iterable[str]) -> None:
    """Raise CorpusError for a character that a BPE tokenizer without an unknown token would drop without a word.

    One line on standard error names visible characters that the tokenizer's normalizer or pre-tokenizer removes.
    """
    from tokenizers.models import BPE

    model, vocabulary = tokenizer.model, tokenizer.get_vocab()
    strict = isinstance(model, BPE) and model.unk_token is None
    prefix, suffix = (model.continuing_subword_prefix or "", model.end_of_word_suffix or "") if strict else ("", "")
    removed = []
    for character in sorted(set().union(*texts)):
        if character in vocabulary:  # an added token is taken out of the text first
            continue
        normal = tokenizer.normalizer.normalize_str(character) if tokenizer.normalizer else character
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normal) if tokenizer.pre_tokenizer else [(normal, None)]
        symbols = "".join(piece for piece, _ in pieces)
        if not symbols and character.isprintable() and not character.isspace():
            removed.append(ascii(character))
        for symbol in symbols if strict else "":
            bytewise = model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in symbol.encode())
            if not bytewise and not {symbol, prefix + symbol, symbol + suffix} & vocabulary.keys():
                raise CorpusError(
                    f"the tokenizer has no token for {character!a}, which the text has, and no unknown token: the "
                    "character would be lost; give a byte-level tokenizer, or one with an unknown token"
                )
    if removed:
        more = f" and {len(removed) - 3} more" if len(removed) > 3 else ""
        note(f"the tokenizer removes characters of the text: {', '.join(removed[:3])}{more}")


def check_unknown(tokenizer: Any, tokens_N: np.ndarray) -> None:
    """Raise CorpusError if all tokens of a text are one; note on standard error that many of them are unknown."""
    counts = np.bincount(tokens_N)
    if 1 < len(tokens_N) == counts.max():
        token = tokenizer.id_to_token(int(tokens_N[0]))
        raise CorpusError(f"the tokenizer makes every token of the training text {token!a}: nothing could be learned")
    unknown = getattr(tokenizer.model, "unk_token", None)
    which = tokenizer.token_to_id(unknown) if unknown is not None else _unknown_id(tokenizer)
    share = counts[which] / len(tokens_N) if which is not None and which < len(counts) else 0
    if share >= MANY:
        note(
            f"the tokenizer has no token for parts of the training text: {share:.0%} of its tokens are "
            f"{tokenizer.id_to_token(which)!a}"
        )


def _unknown_id(tokenizer: Any) -> int | None:
    found: int | None = json.loads(tokenizer.to_str())["model"].get(
        "unk_id"
    )  # of Unigram, which has no attribute for it
    return found


def token_ids(ids: list[int], vocab_size: int) -> np.ndarray:
    """Return ids (N,) as uint16 if `vocab_size` allows it, else uint32."""
    return np.asarray(ids, dtype=np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def digest_of(*parts: str | bytes) -> str:
    """Return the SHA-256 of the parts, each preceded by its length, so that it depends on the borders between parts."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


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
    except Exception as error:  # the library raises Exception itself
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
