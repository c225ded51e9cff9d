"""The loss that decides: mean negative log-likelihood over fixed windows."""

from __future__ import annotations

import math
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

PRECISIONS = ("float32", "bfloat16")
ROWS_FROM = 1 << 20  # tokens of a split that are decoded for the sake of `padded_nll`
Evaluation = Generator[None, None, float]  # gives control back after each batch: a sign of life; its value is the loss


def value_of(evaluation: Evaluation) -> float:
    """Run an evaluation to its end; the loss."""
    while True:
        try:
            next(evaluation)
        except StopIteration as end:
            return float(end.value)


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """The context in which a model computes: float32 as it is, bfloat16 by autocast (weights stay float32)."""
    return nullcontext() if precision == "float32" else torch.autocast(device, dtype=torch.bfloat16)


def token_nll(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each predicted token, nats, float32, (B, T - 1): targets are tokens_BT[:, 1:].

    A `pagating.model.gpt2.GPT2` that needs no gradient is evaluated in chunks, so that its logits never exist whole;
    any other model is one of transformers'.
    """
    targets_BT = tokens_BT[:, 1:]
    if isinstance(model, GPT2) and not torch.is_grad_enabled():
        x_NC = model.hidden(tokens_BT[:, :-1]).flatten(0, 1)
        return linear_nll_each(x_NC, model.lm_head.weight, targets_BT.flatten()).view_as(targets_BT)
    logits_BTV = model(input_ids=tokens_BT[:, :-1]).logits.float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)


def mean_nll(model: nn.Module, windows_WT: torch.Tensor, batch: int, precision: str = "float32") -> float:
    """`val_nll` or `test_nll`: nats a token over all windows (W, T + 1), each token weighing the same, no padding.

    The windows are the same for every trial, so the figure does not depend on `batch` except by rounding.
    """
    return value_of(evaluation(model, windows_WT, batch, precision))


@torch.no_grad()  # of the generator: whoever takes a sign of life has the gradients as they were
def evaluation(model: nn.Module, windows_WT: torch.Tensor, batch: int, precision: str = "float32") -> Evaluation:
    """`mean_nll`, batch by batch."""
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
    """Rows of token ids as one tensor (R, length), int64: cut at `length`, filled up on the right with `pad`."""
    if not rows:
        raise ValueError("pad_rows: no rows")
    return torch.tensor([[*row[:length], *[pad] * (length - len(row))] for row in rows], dtype=torch.int64)


def text_rows(folder: str | Path, split: str, count: int) -> tuple[list[list[int]], int]:
    """At most `count` lines of a split of a packed corpus, spread evenly, as token ids; and the padding's id.

    Of a long split the first `ROWS_FROM` tokens are looked at. Empty lines are rows as well, as they are in WikiText.
    The padding is `<|endoftext|>`, GPT-2's usual choice, or id 0 where the vocabulary has none.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    text = tokenizer.decode(open_split(folder, split)[:ROWS_FROM].tolist(), skip_special_tokens=False)
    lines = text.removesuffix("\n").split("\n")
    chosen = np.unique(np.linspace(0, len(lines) - 1, min(count, len(lines))).round().astype(int))
    encoded = tokenizer.encode_batch([lines[i] for i in chosen], add_special_tokens=False)
    return [row.ids for row in encoded], pad_id(tokenizer)


def perplexity(nll: float) -> float:
    """`val_ppl` = exp(nll); infinite where the exponent overflows."""
    return math.exp(nll) if nll < 700 else math.inf


def bits_per_byte(nll: float, tokens: int, text_bytes: int) -> float:
    """`val_bpb` = nll / ln 2 * tokens / bytes of the split's raw text: comparable between tokenizers."""
    return nll / math.log(2) * tokens / text_bytes
