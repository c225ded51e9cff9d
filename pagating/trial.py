"""A trial and the two errors that make it infeasible. Imports neither torch nor numpy."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pagating.gating.catalog import OwnCode, own_code, settings
from pagating.gating.schedules import SCHEDULES
from pagating.hardware import DEVICES
from pagating.limits import Limits, check_keys, check_number
from pagating.model.size import GPT2Size

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
LIMITS: dict[str, Limits] = {  # by field that is a number
    "lr": {"gt": 0},
    "tokens": {"ge": 1, "le": 10**13},
    "batch_tokens": {"ge": 2, "le": 10**9},
    "seed": {"ge": 0, "le": 10**18},
    "warmup": {"ge": 0, "lt": 1},
    "final_lr": {"ge": 0, "le": 1},
    "weight_decay": {"ge": 0, "le": 10},
    "beta1": {"ge": 0, "lt": 1},
    "beta2": {"ge": 0, "lt": 1},
    "clip": {"gt": 0},
    "eval_every": {"ge": 1, "le": 10**12},
    "eval_windows": {"ge": 1, "le": 10**9},
    "threads": {"ge": 1, "le": 1024},
    "micro_batch_tokens": {"ge": 2, "le": 10**9},
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
        eval_windows: windows of n_ctx tokens per evaluation; all of them if the split has fewer.
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
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        sizes = dataclasses.fields(GPT2Size)[1:]  # without the vocabulary, which is the corpus's
        check_keys("model:", self.model, [size.name for size in sizes], _required(sizes))
        GPT2Size(1, **self.model)
        n_ctx = self.model["n_ctx"]
        if self.batch_tokens % n_ctx:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of n_ctx={n_ctx}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens={self.tokens} is less than one step of batch_tokens={self.batch_tokens}")
        micro = self.micro_batch_tokens
        if micro is not None and (micro % n_ctx or self.batch_tokens % micro):
            raise ValueError(
                f"micro_batch_tokens={micro} is not a multiple of n_ctx={n_ctx} that divides "
                f"batch_tokens={self.batch_tokens}"
            )
        if self.task != "causal" and (self.padding or self.pretrained or self.compile == "always"):
            raise ValueError(f"task='{self.task}' takes packed windows, initial weights and code that is not compiled")
        if self.unit is not None:
            settings(self.unit)

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

    def beside(self, folder: Path) -> Trial:
        """Return the trial with each relative path that does not exist here taken from `folder` instead."""

        def found(path: str) -> str:
            return path if os.path.exists(path) or not (folder / path).exists() else os.path.normpath(folder / path)

        own, weights = self.own_code, self.pretrained
        placed = dataclasses.replace(self, corpus=found(self.corpus), pretrained=weights and found(weights))
        return placed.with_own(found(own.file)) if own else placed

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; `from_dict` makes the same trial of them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Trial:
        """Return the trial with these fields; those that are left out have their defaults.

        Raises ValueError for an unknown or a missing field, and for a value that no trial can have.
        """
        fields_of = dataclasses.fields(cls)
        check_keys("", fields, [field.name for field in fields_of], _required(fields_of))
        return cls(**fields)


def require_trial(trial: Any) -> None:
    """Raise ValueError if `trial` is not a `Trial`."""
    if not isinstance(trial, Trial):
        raise ValueError(f"trial: {type(trial).__name__} is not a pagating.trial.Trial")


def _required(fields: Iterable[dataclasses.Field[Any]]) -> list[str]:
    """Return the names of the fields that have no default."""
    return [field.name for field in fields if field.default is dataclasses.MISSING]


def _check_field(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError if a field of a trial has a value of another type, or one outside of its limits."""
    name = field.name
    kind, _, optional = str(field.type).partition(" | ")
    if value is None and optional:
        return
    if name in LIMITS:
        check_number(name, value, LIMITS[name], whole=kind == "int")
    elif name in CHOICES:
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(CHOICES[name])}")
    elif kind == "str" and not (isinstance(value, str) and value):
        raise ValueError(f"{name}={value!r} is not a text with at least one letter")
    elif kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not true or false")
