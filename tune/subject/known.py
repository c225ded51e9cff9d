"""Subject with known losses. A study of it takes milliseconds, for simulations and for tests of the other parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagating.model.size import GPT2Size, stock_flops_per_token
from pagating.trial import Diverged
from tune.study.cell import Cell
from tune.study.ladder import parameters
from tune.study.sizes import batch, interval, steps
from tune.study.study import Study
from tune.subject.subject import Step

if TYPE_CHECKING:
    from pagating.checkpoint import CheckpointFolder

Loss = Callable[[Cell, float], float]  # (cell, fraction of its budget) -> loss in nats per token


class Known:
    """Subject that takes the losses of a cell from a function instead of training it.

    A loss that is not finite counts as a divergence.

    Args:
        study: The study.
        loss: Function that returns the validation loss, in nats per token, of a cell at a fraction in (0, 1] of its
            budget.
        test: Function that returns the test loss of a cell, in nats per token. None means the last validation loss.
    """

    def __init__(self, study: Study, loss: Loss, test: Callable[[Cell], float] | None = None) -> None:
        self._study, self._loss, self._test = study, loss, test

    def identity(self) -> dict[str, Any]:
        """Return the fields of the ledger's first event. No corpus exists, so its name is `known`."""
        return {"corpus": "known"}

    def check_begun(self, begun: Mapping[str, Any]) -> None:
        """Accept every ledger, because no input can differ."""

    def trial(self, cell: Cell) -> Cell:
        """Return the cell itself."""
        return cell

    def train(self, trial: Cell, checkpoints: CheckpointFolder | None, model: Path | None) -> Iterator[Step | None]:
        """Yield the evaluations of a cell at the study's interval. The last one holds the result."""
        study = self._study.at(trial.rung)
        whole, every = steps(study, trial.config), interval(study, trial.config)
        done = 0
        while done < whole:
            done = min(whole, done + every)
            loss = self._loss(trial, done / whole)
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {done}")
            tokens = done * batch(study, trial.config)
            row: dict[str, Any] = {
                "step": done,
                "tokens": tokens,
                "val_nll": loss,
                "train_nll": loss,
                "lr": trial.config["lr"],
                "grad_norm": 1.0,
                "tokens_per_second": 1.0,
                "alpha": [],
            }

            if done == whole:
                final: dict[str, Any] = {"val_nll": loss, "train_nll": loss, "tokens": tokens, "steps": done}
                if trial.rung:  # the analysis of a ladder needs the compute of each size
                    size = GPT2Size(study.tokenizer.vocab_size, **study.model.sizes())
                    final |= {"parameters": parameters(size), "flops_per_token": stock_flops_per_token(size)}
                if self._study.tests(trial.stage):
                    final["test_nll"] = self._test(trial) if self._test else loss
                row["final"] = final
            yield done, row
