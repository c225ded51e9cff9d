"""Tokenizers: byte-level BPE trained on the training text, or a saved one; and what they make of a text.

Axes: N token in a text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pagating.data.errors import CorpusError, first_line, note
from pagating.data.saved_tokenizer import find_tokenizer, load_tokenizer

CHUNK = 1 << 20  # least characters of a piece of text that is tokenized separately
BATCH = 8  # pieces per call of the tokenizer
MANY = 0.05  # share of unknown tokens that is worth a line
LARGEST = 1 << 20  # most ids of a vocabulary, as of one that is trained


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
        tokenizer = load_tokenizer(place)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(chunks(train_text), vocab_size=spec["vocab_size"], show_progress=False)
    return tokenizers.Tokenizer.from_str(trained.to_str())


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
    except Exception as error:
        if type(error) is not Exception:  # the library raises Exception itself
            raise
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


def note_size(spec: Mapping[str, Any], held: int) -> None:
    """Note on standard error that a trained tokenizer has fewer tokens than are asked for. Args as `check_size`."""
    if not (spec.get("path") or spec.get("pretrained")) and held < spec["vocab_size"]:
        note(f"tokenizer.vocab_size={spec['vocab_size']}: the training text gives only {held} tokens")


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
