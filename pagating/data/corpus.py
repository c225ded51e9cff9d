"""A packed corpus and its memory-mapped windows.

A corpus is three texts (train, validation, test), each packed without padding into one flat file of tokens. The name of
its folder depends on text, tokenizer and format. The folder is written once and mapped read-only, so that all trials on
a node share one copy.

Axes: B batch, T position in a window, N token in a split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagating.data.errors import CorpusError

if TYPE_CHECKING:
    from torch import Tensor  # torch takes seconds to load and is not needed to check a corpus

ROW_DTYPE = np.dtype("<i8")  # dtype of the index of a corpus of lines


# --- the cache -------------------------------------------------------------------------------------------------------


def rows_file(split: str) -> str:
    """Return the name of the index file of a split's lines."""
    return f"{split}.rows"


def pad_id(tokenizer: Any) -> int:
    """Return the id of the padding: `<|endoftext|>`, GPT-2's usual choice, or 0 if the vocabulary has no such token."""
    return tokenizer.token_to_id("<|endoftext|>") or 0


def digest_of(*parts: str | bytes) -> str:
    """Return the SHA-256 of the parts, each preceded by its length, so that it depends on the borders between parts."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def meta_digest(meta: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits of the digest of `corpus.json` without its key `digest`."""
    return digest_of(json.dumps({name: value for name, value in meta.items() if name != "digest"}, sort_keys=True))[:16]


def read_meta(folder: str | Path) -> dict[str, Any]:
    """Read `corpus.json` of a packed corpus: digest, dtype, vocab_size, and tokens and bytes of text per split.

    Raise CorpusError if it was changed, OSError if it cannot be read.
    """
    path = Path(folder) / "corpus.json"
    try:
        meta = json.loads(path.read_bytes())
        whole = isinstance(meta, dict) and meta.get("digest") == meta_digest(meta)
    except ValueError:  # truncated, or not UTF-8
        whole = False
    if not whole:
        raise CorpusError(f"{path} is damaged (its digest does not match)")
    return meta


def check_length(splits: Mapping[str, Mapping[str, Any]], n_ctx: int) -> None:
    """Raise CorpusError if a split is shorter than one window of n_ctx tokens and the token after it."""
    for split, counts in splits.items():
        if counts["tokens"] < n_ctx + 1:
            raise CorpusError(
                f"the {split} split has {counts['tokens']} tokens; one window needs n_ctx + 1 = {n_ctx + 1}: "
                "give more text or a smaller model.n_ctx"
            )


def check_corpus(folder: str | Path, n_ctx: int) -> None:
    """Raise CorpusError, one line, if a folder is not a packed corpus with a window of n_ctx tokens in each split.

    Only `prepare` checks every byte.
    """
    try:
        meta = read_meta(folder)
        check_length(meta["splits"], n_ctx)
        for split in meta["splits"]:
            open_split(folder, split)
        (Path(folder) / "tokenizer.json").stat()
    except OSError as error:
        raise CorpusError(
            f"{error.filename}: {error.strerror}; allowed: a folder that `pagating.data.prepare.prepare` wrote"
        ) from error


# --- windows ---------------------------------------------------------------------------------------------------------


def open_split(folder: str | Path, split: str) -> np.ndarray:
    """Open the token ids (N,) of a split, memory-mapped and read-only.

    Raise CorpusError if the file does not have the written size. Only `prepare` checks every byte.
    """
    meta, path = read_meta(folder), Path(folder) / f"{split}.bin"
    wanted, size = meta["splits"][split]["tokens"] * np.dtype(meta["dtype"]).itemsize, path.stat().st_size
    if size != wanted:
        raise CorpusError(f"{path}: has {size} bytes, not {wanted}: it is cut off or not the file that was packed")
    return np.memmap(path, dtype=meta["dtype"], mode="r")


def step_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """Return the random generator of a step. Generators of different streams, steps and seeds are independent."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, step]))


def train_batch(tokens_N: np.ndarray, seed: int, step: int, batch: int, n_ctx: int) -> Tensor:
    """Draw a batch of training windows, a pure function of (seed, step), the same for every arm.

    Starts are uniform over the split, drawn by a counter-based generator (Philox) with key `seed` and counter `step`.

    Args:
        tokens_N: Tokens of a split.
        seed: Seed of the trial.
        step: Update, counted from 0.
        batch: Windows in the batch.
        n_ctx: Tokens per window.

    Returns:
        Windows (B, T + 1), int64. Inputs are [:, :-1], targets [:, 1:].
    """
    from torch import from_numpy

    starts_B = step_generator(seed, step).integers(0, len(tokens_N) - n_ctx, size=batch)
    rows = np.stack([tokens_N[start : start + n_ctx + 1] for start in starts_B])
    return from_numpy(rows.astype(np.int64))


def eval_windows(tokens_N: np.ndarray, n_ctx: int, count: int) -> Tensor:
    """Return at most `count` windows (W, T + 1), int64, spread evenly over a split. They are the same for every trial.

    Window w predicts tokens w*T + 1 .. (w + 1)*T, so that no target is counted twice.
    """
    from torch import from_numpy

    available = (len(tokens_N) - 1) // n_ctx
    chosen = np.unique(np.linspace(0, available - 1, min(count, available)).round().astype(np.int64))
    return from_numpy(np.stack([tokens_N[w * n_ctx : (w + 1) * n_ctx + 1] for w in chosen]).astype(np.int64))
