"""The evaluation loss: mean negative log-likelihood over fixed windows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pagating.data.corpus import open_split, pad_id
from pagating.model.fused_loss import linear_nll_each
from pagating.model.gpt2 import GPT2

ROWS_FROM = 1 << 20  # tokens of a split that are decoded for the sake of `padded_nll`
Evaluation = Generator[None, None, float]  # yields after each batch, as a heartbeat; its return value is the loss


def value_of(evaluation: Evaluation) -> float:
    """Run an evaluation to its end and return the loss."""
    while True:
        try:
            next(evaluation)
        except StopIteration as end:
            return float(end.value)


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """Return the context for a precision: none for float32, autocast for bfloat16 (weights stay float32)."""
    return nullcontext() if precision == "float32" else torch.autocast(device, dtype=torch.bfloat16)


def token_nll(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Compute the negative log-likelihood of each predicted token, nats, float32, (B, T - 1).

    Targets are tokens_BT[:, 1:]. A `pagating.model.gpt2.GPT2` without gradients is evaluated in chunks, so that its
    full logits never exist. Any other model is one of transformers.
    """
    targets_BT = tokens_BT[:, 1:]
    if isinstance(model, GPT2) and not torch.is_grad_enabled():
        x_NC = model.hidden(tokens_BT[:, :-1]).flatten(0, 1)
        return linear_nll_each(x_NC, model.lm_head.weight, targets_BT.flatten()).view_as(targets_BT)
    logits_BTV = model(input_ids=tokens_BT[:, :-1]).logits.float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)


def mean_nll(model: nn.Module, windows_WT: torch.Tensor, batch: int, precision: str = "float32") -> float:
    """Compute `val_nll` or `test_nll`: the mean over all predicted tokens of windows without padding.

    Args:
        model: The model.
        windows_WT: Token ids (W, T + 1).
        batch: Windows evaluated at once. The result depends on it only by rounding.
        precision: An entry of `PRECISIONS`.

    Returns:
        Nats per token.
    """
    return value_of(evaluation(model, windows_WT, batch, precision))


@torch.no_grad()  # on a generator: the caller's gradient mode returns at each yield
def evaluation(model: nn.Module, windows_WT: torch.Tensor, batch: int, precision: str = "float32") -> Evaluation:
    """Compute `mean_nll`, with the same arguments, and yield after each batch."""
    was_training = model.training
    device = next(model.parameters(), windows_WT).device
    model.eval()
    total = 0.0
    for rows_BT in windows_WT.split(batch):
        with autocast(precision, device.type):
            nll_BT = token_nll(model, rows_BT.to(device))
        total += nll_BT.double().sum().item()
        yield
    model.train(was_training)
    return total / (windows_WT.shape[0] * (windows_WT.shape[1] - 1))


def pad_rows(rows: Sequence[Sequence[int]], length: int, pad: int) -> torch.Tensor:
    """Return rows of token ids as one tensor (R, length), int64, cut or padded on the right with `pad`."""
    if not rows:
        raise ValueError("pad_rows: no rows")
    return torch.tensor([[*row[:length], *[pad] * (length - len(row))] for row in rows], dtype=torch.int64)


def text_rows(folder: str | Path, split: str, count: int) -> tuple[list[list[int]], int]:
    """Return at most `count` lines of a split of a packed corpus, spread evenly, as token ids, and the padding's id.

    Only the first `ROWS_FROM` tokens of a split are used. Empty lines are rows, as in WikiText. For the padding see
    `pagating.data.corpus.pad_id`. A corpus that `keep_text_rows` prepared needs no tokenizer.
    """
    kept = _rows_file(folder, split, count)
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        return found["rows"], found["pad"]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    text = tokenizer.decode(open_split(folder, split)[:ROWS_FROM].tolist(), skip_special_tokens=False)
    lines = text.removesuffix("\n").split("\n")
    chosen = np.unique(np.linspace(0, len(lines) - 1, min(count, len(lines))).round().astype(int))
    encoded = tokenizer.encode_batch([lines[i] for i in chosen], add_special_tokens=False)
    return [row.ids for row in encoded], pad_id(tokenizer)


def keep_text_rows(folder: str | Path, split: str, count: int) -> None:
    """Write the result of `text_rows` into the corpus, for machines without tokenizers. Raise OSError."""
    path = _rows_file(folder, split, count)
    if not path.is_file():
        rows, pad = text_rows(folder, split, count)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps({"rows": rows, "pad": pad}), encoding="utf-8")
        os.replace(scratch, path)


def _rows_file(folder: str | Path, split: str, count: int) -> Path:
    return Path(folder) / f"rows-{split}-{count}.json"


def perplexity(nll: float) -> float:
    """Return the perplexity exp(nll), infinite if it overflows."""
    return math.exp(nll) if nll < 700 else math.inf


def bits_per_byte(nll: float, tokens: int, text_bytes: int) -> float:
    """Return bits per byte, nll / ln 2 * tokens / bytes, which is comparable between tokenizers.

    Args:
        nll: Nats per token.
        tokens: Tokens of the split.
        text_bytes: Bytes of the split's raw text.
    """
    return nll / math.log(2) * tokens / text_bytes
