"""What a trial is, and the two ways in which it can turn out not to be feasible."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from pagating.device import DEVICES
from pagating.evaluate import PRECISIONS
from pagating.gating.schedules import SCHEDULES
from pagating.model.compile import CHOICES

TASKS = ("causal", "masked", "span")
PADDINGS = ("counted", "masked")


class Diverged(ArithmeticError):
    """The loss or the gradient norm stopped being finite: the configuration is infeasible."""


class OutOfMemory(MemoryError):
    """The trial does not fit into the memory that there is: infeasible here. The message says what to lower."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration and one seed. Units: tokens, steps of the optimiser, nats.

    corpus: folder made by `pagating.data.corpus.prepare`. model: n_layer, d_model, n_head, n_ctx, and where they differ
    from GPT-2 activation, dropout, initializer_range. unit: arguments of `pagating.patch`, or None for the stock model.
    batch_tokens: tokens a step, a multiple of n_ctx. warmup: share of the steps with a linearly rising learning rate,
    [0, 1). weight_decay: on matrices; never on alphas. eval_every: steps between evaluations, None for a tenth of the
    trial; the last step is evaluated always. eval_windows: windows of n_ctx tokens of each evaluation. test: evaluate
    the test split too, once, at the last step, and `padded_nll` on as many lines of the validation split. compile: auto
    (where the trial is long enough to earn it), always, never; see `pagating.model.compile`. pretrained: file of
    weights to start from (`pagating.model.pretrained`), None to start from the seed alone. device: cpu, cuda, auto
    (cuda where there is one). micro_batch_tokens: tokens whose gradient is taken at a time, None for all of a step; the
    step stays one of `batch_tokens`, up to rounding. task: a row of `pagating.tasks.causal`. padding: None trains on
    packed windows; else the corpus is one of lines, a row of n_ctx tokens each, and its padding is `counted` in the
    training loss or `masked` out of it.
    """

    corpus: str
    model: Mapping[str, Any]
    lr: float
    tokens: int
    batch_tokens: int
    seed: int
    unit: Mapping[str, Any] | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    final_lr: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: str = "float32"
    eval_every: int | None = None
    eval_windows: int = 64
    test: bool = False
    threads: int = 1
    compile: str = "auto"
    device: str = "cpu"
    pretrained: str | None = None
    micro_batch_tokens: int | None = None
    task: str = "causal"
    padding: str | None = None

    def __post_init__(self) -> None:
        n_ctx = self.model["n_ctx"]
        if self.batch_tokens % n_ctx or self.batch_tokens < n_ctx:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a positive multiple of n_ctx={n_ctx}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens={self.tokens} is less than one step of batch_tokens={self.batch_tokens}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule='{self.schedule}' is not one of {', '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision='{self.precision}' is not one of {', '.join(PRECISIONS)}")
        if self.compile not in CHOICES:
            raise ValueError(f"compile='{self.compile}' is not one of {', '.join(CHOICES)}")
        if self.device not in DEVICES:
            raise ValueError(f"device='{self.device}' is not one of {', '.join(DEVICES)}")
        micro = self.micro_batch_tokens
        if micro is not None and (micro < n_ctx or micro % n_ctx or self.batch_tokens % micro):
            raise ValueError(
                f"micro_batch_tokens={micro} is not a multiple of n_ctx={n_ctx} that divides "
                f"batch_tokens={self.batch_tokens}"
            )
        if self.task not in TASKS:
            raise ValueError(f"task='{self.task}' is not one of {', '.join(TASKS)}")
        if self.padding not in (None, *PADDINGS):
            raise ValueError(f"padding='{self.padding}' is not one of {', '.join(PADDINGS)}")
        if self.task != "causal" and (self.padding or self.pretrained or self.compile == "always"):
            raise ValueError(f"task='{self.task}' takes packed windows, initial weights and code that is not compiled")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} is not positive")

    @property
    def steps(self) -> int:
        """Optimiser updates of the whole trial."""
        return self.tokens // self.batch_tokens

    @property
    def evaluation_interval(self) -> int:
        """Steps between two evaluations."""
        return self.eval_every or max(1, math.ceil(self.steps / 10))


def out_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """One line on what was asked for and what to lower, where the error says that memory ended; else None."""
    text = str(error)
    if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text):
        return None
    found = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", text)
    size = found and (found[2] or f"{int(found[1]) / (1 << 30):.2f} GiB")
    asked = f"{size} more could not be had" if size else "no size is known"
    return (
        f"out of memory: {asked}; lower the batch (batch_tokens), the model (d_model, n_layer, n_ctx), the vocabulary, "
        "or the number of trials side by side"
    )
