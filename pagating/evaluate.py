"""The loss that decides: mean negative log-likelihood over fixed windows."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

PRECISIONS = ("float32", "bfloat16")


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """The context in which a model computes: float32 as it is, bfloat16 by autocast (weights stay float32)."""
    return nullcontext() if precision == "float32" else torch.autocast(device, dtype=torch.bfloat16)


def token_nll(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each predicted token, nats, float32, (B, T - 1): targets are tokens_BT[:, 1:]."""
    logits_BTV = model(input_ids=tokens_BT[:, :-1]).logits.float()
    targets_BT = tokens_BT[:, 1:]
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)


@torch.no_grad()
def mean_nll(model: nn.Module, windows_WT: torch.Tensor, batch: int, precision: str = "float32") -> float:
    """`val_nll` or `test_nll`: nats a token over all windows (W, T + 1), each token weighing the same, no padding.

    The windows are the same for every trial, so the figure does not depend on `batch` except by rounding.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    for rows_BT in windows_WT.split(batch):
        with autocast(precision):
            nll_BT = token_nll(model, rows_BT)
        total += nll_BT.double().sum().item()
    model.train(was_training)
    return total / (windows_WT.shape[0] * (windows_WT.shape[1] - 1))


def perplexity(nll: float) -> float:
    """`val_ppl` = exp(nll); infinite where the exponent overflows."""
    return math.exp(nll) if nll < 700 else math.inf


def bits_per_byte(nll: float, tokens: int, text_bytes: int) -> float:
    """`val_bpb` = nll / ln 2 * tokens / bytes of the split's raw text: comparable between tokenizers."""
    return nll / math.log(2) * tokens / text_bytes
