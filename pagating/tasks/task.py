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


def _never_compiled(loss: Loss) -> bool:
    """Return False, for a task that compiles no loss."""
    return False


@dataclass(frozen=True)
class Task:
    """The functions that the training loop calls for a task.

    Attributes:
        build: Make the model of a trial from its seed.
        batches: Return a function of the step that gives its batch.
        loss: Return a function of model and batch: the mean over the targets, nats, differentiable. It is called once,
            with a batch to compile for.
        held: Return the rows of a split to evaluate.
        evaluate: Compute the mean loss of these rows, nats, by batches (model, rows, rows per batch, precision).
        mean: Compute the mean loss of the first rows of `held`, nats, differentiable (model, rows, their number).
        flops: Return the FLOPs of training per token.
        check: Raise ValueError if no model can have the trial's sizes or unit.
        compiled: Return True if a loss runs compiled code.
    """

    build: Callable[[Trial], nn.Module]
    batches: Callable[[Trial], Callable[[int], Batch]]
    loss: Callable[[Trial, Any, Batch], Loss]
    held: Callable[[Trial, str], Any]
    evaluate: Callable[[Any, Any, int, str], Evaluation]
    mean: Callable[[Any, Any, int], Tensor]
    flops: Callable[[Trial, Any], int]
    check: Callable[[Trial], Any]
    compiled: Callable[[Loss], bool] = _never_compiled


def targets_in(batch: Batch, rows: int) -> list[int]:
    """Return the number of targets in each part of `rows` rows of a batch."""
    return [int((part != IGNORE).sum()) for part in batch[-1].split(rows)]


def in_parts(batch: Batch, device: torch.device, rows: int) -> list[Batch]:
    """Move a batch to a device and split it into parts of `rows` rows."""
    return list(zip(*(to_device(tensor, device).split(rows) for tensor in batch), strict=True))
