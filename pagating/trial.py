"""A trial and the two errors that make it infeasible. Imports neither torch nor numpy."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagating.gating.catalog import OwnCode, own_code
from pagating.gating.schedules import SCHEDULES
from pagating.hardware import DEVICES

TASKS = ("causal", "masked", "span")
PRECISIONS = ("float32", "bfloat16")
PADDINGS = ("counted", "masked")
COMPILE = ("auto", "always", "never")
CHOICES = {  # by field
    "schedule": tuple(SCHEDULES),
    "precision": PRECISIONS,
    "compile": COMPILE,
    "device": DEVICES,
    "task": TASKS,
    "padding": PADDINGS,
}


class Diverged(ArithmeticError):
    """The loss or the gradient norm stopped being finite: the configuration is infeasible."""


class OutOfMemory(MemoryError):
    """The trial does not fit into memory: it is infeasible on this machine. The message says what to lower."""


def step_count(tokens: int, batch_tokens: int) -> int:
    """Return the optimiser updates of a trial of `tokens`, each of `batch_tokens`."""
    return tokens // batch_tokens


def evaluation_interval(steps: int, eval_every: int | None) -> int:
    """Return the steps between two evaluations: `eval_every`, or a tenth of the trial if it is None."""
    return eval_every or max(1, math.ceil(steps / 10))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration and one seed. Units: tokens, steps of the optimiser, nats. Raises ValueError for a bad value.

    Args:
        corpus: folder made by `pagating.data.corpus.prepare`.
        model: n_layer, d_model, n_head, n_ctx; activation, dropout, initializer_range if they differ from `GPT2Size`.
        lr: peak learning rate, above 0.
        tokens: training tokens.
        batch_tokens: tokens per step, a multiple of n_ctx.
        seed: of the initial weights, the batches and dropout.
        unit: arguments of `pagating.patch`; None is the stock model.
        schedule: decay of the learning rate, a key of `pagating.gating.schedules.SCHEDULES`.
        warmup: share of the steps with a linearly rising learning rate, [0, 1).
        final_lr: learning rate at the end, as a share of the peak, [0, 1].
        weight_decay: of matrices; alphas have none.
        beta1, beta2: AdamW's decays of the mean of the gradients and of their squares, [0, 1).
        clip: largest norm of the gradient.
        precision: of the matrix products; weights are float32.
        eval_every: steps between evaluations; None is a tenth of the trial. The last step is always evaluated.
        eval_windows: windows of n_ctx tokens per evaluation.
        test: evaluate the test split at the last step, and `padded_nll` on as many lines of the validation split.
        threads: of torch.
        compile: auto (if the trial is long enough to repay it), always, never; see `pagating.model.compile`.
        device: cpu, cuda, auto (cuda if there is one).
        pretrained: file of weights to start from (`pagating.model.pretrained`); None starts from the seed alone.
        micro_batch_tokens: tokens whose gradient is taken at once; None is all of a step. The step stays one of
            `batch_tokens`, up to rounding.
        task: a task of `pagating.tasks`.
        padding: None trains on packed windows. Otherwise the corpus is one of lines, a row of n_ctx tokens each; the
            padding is `counted` in the training loss or `masked` out of it.
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
        for key, allowed in CHOICES.items():
            if (value := getattr(self, key)) not in allowed and (key, value) != ("padding", None):
                raise ValueError(f"{key}='{value}' is not one of {', '.join(allowed)}")
        micro = self.micro_batch_tokens
        if micro is not None and (micro < n_ctx or micro % n_ctx or self.batch_tokens % micro):
            raise ValueError(
                f"micro_batch_tokens={micro} is not a multiple of n_ctx={n_ctx} that divides "
                f"batch_tokens={self.batch_tokens}"
            )
        if self.task != "causal" and (self.padding or self.pretrained or self.compile == "always"):
            raise ValueError(f"task='{self.task}' takes packed windows, initial weights and code that is not compiled")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} is not positive")

    @property
    def steps(self) -> int:
        """Optimiser updates of the whole trial."""
        return step_count(self.tokens, self.batch_tokens)

    @property
    def evaluation_interval(self) -> int:
        """Steps between two evaluations."""
        return evaluation_interval(self.steps, self.eval_every)

    @property
    def own_code(self) -> OwnCode | None:
        """The user's gate or activation that the unit names as `FILE.py:NAME`; else None."""
        return own_code(self.unit)

    def with_own(self, file: str | Path) -> Trial:
        """Return the trial with its user's gate or activation read from another file."""
        own = self.own_code
        return dataclasses.replace(self, unit={**(self.unit or {}), own.key: f"{file}:{own.name}"}) if own else self

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; `from_dict` makes the same trial of them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Trial:
        """Return the trial with these fields; those that are left out have their defaults.

        Raises ValueError for an unknown or a missing field, and for a value that no trial can have.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, Mapping):
            raise ValueError("is not a mapping of keys such as corpus and seed")
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise ValueError(f"unknown key {name!r}; did you mean {near[0]!r}?")
        none = (dataclasses.MISSING, dataclasses.MISSING)
        required = [f.name for f in dataclasses.fields(cls) if (f.default, f.default_factory) == none]
        if missing := [name for name in required if name not in fields]:
            raise ValueError(f"missing: {', '.join(missing)}")
        return cls(**fields)
