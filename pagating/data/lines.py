"""Rows of one line of text each, cut or padded to `n_ctx` tokens, as in the published study.

A corpus of lines (`rows: lines`) is the packed corpus, tokenized line by line, with an index file `{split}.rows`: the
start and end of each line among the tokens. A blank line is a row of padding only, as in WikiText.

Axes: R rows of a split, B rows of a batch, T position, N token in a split.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagating.data.corpus import ROW_DTYPE, open_split, read_meta, rows_file, step_generator
from pagating.data.errors import CorpusError
from pagating.data.tokenizer import encode_batch, token_ids, vocabulary_size

AT_A_TIME = 1 << 13  # lines per call of the tokenizer
IGNORE = -100  # a target that is not counted, as in torch


@dataclass(frozen=True)
class Lines:
    """A split: its tokens (N,), start and end of each row (R, 2), and the id of the padding."""

    tokens_N: np.ndarray
    spans_R2: np.ndarray
    pad: int

    def worded(self) -> Lines:
        """Return the rows with at least two tokens, so with a target. Raise CorpusError if there are none."""
        lengths_R = self.spans_R2[:, 1] - self.spans_R2[:, 0]
        kept = self.spans_R2[lengths_R >= 2]
        if not len(kept):
            raise CorpusError(f"none of the {len(lengths_R)} lines has two tokens: without padding, no row is left")
        return Lines(self.tokens_N, kept, self.pad)


def encode_lines(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize each line of a text separately, its line end included.

    A blank line keeps its tokens, so that the text can be restored. Its row is empty.

    Returns:
        Token ids (N,), and start and end of each line's row (R, 2).
    """
    size = vocabulary_size(tokenizer)
    parts: list[np.ndarray] = []
    spans: list[tuple[int, int]] = []
    position = 0
    lines = io.StringIO(text, newline="\n")  # only \n ends a line
    while some := list(itertools.islice(lines, AT_A_TIME)):
        for line, ids in zip(some, encode_batch(tokenizer, some), strict=True):
            parts.append(token_ids(ids, size))
            spans.append((position, position + len(ids) if line.strip() else position))
            position += len(ids)
    return np.concatenate(parts), np.asarray(spans, dtype=ROW_DTYPE)


def open_lines(folder: str | Path, split: str) -> Lines:
    """Open a split of a corpus of lines, memory-mapped. Raise CorpusError if the corpus is packed."""
    meta, path = read_meta(folder), Path(folder) / rows_file(split)
    if "rows" not in meta["splits"][split]:
        raise CorpusError(f"{folder}: is packed, not a corpus of lines; give the study corpus: {{rows: lines, ...}}")
    spans = np.memmap(path, dtype=ROW_DTYPE, mode="r").reshape(-1, 2)
    return Lines(open_split(folder, split), spans, meta["pad"])


def padded_rows(lines: Lines, chosen: np.ndarray, n_ctx: int) -> tuple[Tensor, Tensor]:
    """Cut or pad rows on the right to `n_ctx` tokens.

    Args:
        lines: The split.
        chosen: Indices of the rows (B,).
        n_ctx: Tokens per row.

    Returns:
        The rows (B, n_ctx), int64, and their lengths (B,) in tokens, without padding.
    """
    rows_BT = np.full((len(chosen), n_ctx), lines.pad, dtype=np.int64)
    lengths_B = np.zeros(len(chosen), dtype=np.int64)
    for i, (start, end) in enumerate(lines.spans_R2[chosen]):
        length = lengths_B[i] = min(end - start, n_ctx)
        rows_BT[i, :length] = lines.tokens_N[start : start + length]
    return torch.from_numpy(rows_BT), torch.from_numpy(lengths_B)


def line_batch(lines: Lines, seed: int, step: int, batch: int, n_ctx: int) -> tuple[Tensor, Tensor]:
    """Draw `batch` rows with replacement, a pure function of (seed, step).

    Returns:
        The rows (B, n_ctx), int64, and their lengths (B,) in tokens.
    """
    chosen_B = step_generator(seed, step).integers(0, len(lines.spans_R2), size=batch)
    return padded_rows(lines, chosen_B, n_ctx)


def spread_rows(lines: Lines, n_ctx: int, count: int) -> Tensor:
    """Return at most `count` rows of a split, spread evenly, (R, n_ctx). They include blank rows.

    The rows are the same for every trial.
    """
    held = len(lines.spans_R2)
    chosen = np.unique(np.linspace(0, held - 1, min(count, held)).round().astype(np.int64))
    return padded_rows(lines, chosen, n_ctx)[0]


def targets_of(rows_BT: Tensor, lengths_B: Tensor, padding: str) -> Tensor:
    """Return the target of each position except the last, (B, n_ctx - 1).

    A target in the padding is the padding's id if `padding` is `counted`, else IGNORE.
    """
    targets_BT = rows_BT[:, 1:]
    if padding == "counted":
        return targets_BT
    return targets_BT.masked_fill(torch.arange(1, rows_BT.shape[1]) >= lengths_B[:, None], IGNORE)
