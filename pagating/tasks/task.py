"""The interface of a task: its model, its batches and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pagating.data.lines import IGNORE
from pagating.device import to_device
from pagating.evaluate import Evaluation
from pagating.trial import Trial

Batch = tuple[Tensor, ...]


Hidden = Callable[[Any, Tensor], Tensor]


Loss = Callable[[Any, Batch], Tensor]


def never(loss: Loss) -> bool:
    """False: whether a loss runs compiled code, of a task that compiles none."""
    return False


@dataclass(frozen=True)
class Task:
    """What the loop asks of a task.

    build: the model of a trial, from its seed. batches: what a step trains on, by step. loss: a callable (made once,
    with a batch to compile for) of a model and a batch, the mean over its targets, nats, differentiable. held: rows of
    a split to evaluate. evaluate: their mean loss, nats, by batches (model, rows, rows at a time, precision). flops: of
    training, a token. check: raises ValueError for sizes or a unit that no model can have. compiled: whether a loss
    runs compiled code.
    """

    build: Callable[[Trial], nn.Module]
    batches: Callable[[Trial], Callable[[int], Batch]]
    loss: Callable[[Trial, Any, Batch], Loss]
    held: Callable[[Trial, str], Any]
    evaluate: Callable[[Any, Any, int, str], Evaluation]
    flops: Callable[[Trial, Any], int]
    check: Callable[[Trial], Any]
    compiled: Callable[[Loss], bool] = never


def targets_in(batch: Batch, rows: int) -> list[int]:
    """How many targets are counted in each part of `rows` rows of a batch."""
    return [int((part != IGNORE).sum()) for part in batch[-1].split(rows)]


def in_parts(batch: Batch, device: torch.device, rows: int) -> list[Batch]:
    """A batch on a device, in parts of `rows` rows."""
    return list(zip(*(to_device(tensor, device).split(rows) for tensor in batch), strict=True))
