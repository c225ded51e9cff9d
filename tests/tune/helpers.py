"""Shared functions: runs of a small study, its known losses, rows and ledgers, and its events told by hand."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagating.trial import Trial
from tune.backend.inline import Inline
from tune.cli import main
from tune.plan import work
from tune.run.ledger import Ledger, records
from tune.run.study_run import CellEnded, StudyRun
from tune.study import sizes
from tune.study.cell import COST, FINAL, Cell, Record
from tune.study.study import Study
from tune.subject.gpt2 import Gpt2
from tune.subject.known import Known, Loss
from tune.subject.subject import Job, Step
from tune.subject.training import Training

ROW = {"step": 4, "tokens": 40, "val_nll": 3.5, "train_nll": 3.4, "lr": 1e-3, "grad_norm": 1.0, "alpha": [0.25]}


def run_of(study: Study, folder: Path, corpus: Path, **options: Any) -> StudyRun:
    """Return a run of the built-in subject in a study folder, on a packed corpus."""
    return StudyRun(study, folder, Gpt2.at(study, folder, corpus), **options)


def job_of(trial: Trial, cell: str = "a", checkpoints: Path | None = None, **options: Any) -> Job:
    """Return the job of a cell of the built-in subject."""
    folder = str(checkpoints) if checkpoints else None
    return Job(cell, trial, Gpt2.train, folder, trial.steps, **options)


def trained_to_the_end(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train a job; return the last result of `Training.advance`, and the rows of all."""
    training, rows = Training(job), []
    while training.outcome is None:
        result = training.advance()
        rows += [result["row"]] if result["row"] else []
    training.replaced()
    return result, rows


def meta_of(corpus: Path) -> dict[str, Any]:
    """Return the content of a corpus's `corpus.json`, which need not be whole."""
    return dict(json.loads((corpus / "corpus.json").read_text(encoding="utf-8")))


def models_of(study: Study) -> dict[str, work.Model]:
    """Return the parameters and FLOPs of the model of each arm, at a vocabulary of 300."""
    return {arm: work.arm_model(study, arm, 300) for arm in study.arms}


def rows_of(study: Study) -> list[work.Work]:
    """Return the planned work of each stage and arm of a study."""
    return work.work(study, models_of(study), sizes.confirm_seeds(study))


class Whole(Known):
    """Known losses, with rows and results as large as those of trained cells."""

    def train(self, trial: Cell, checkpoints: Any, model: Path | None) -> Iterator[Step | None]:
        """Yield the rows of a cell. Every number has as many digits as a trained one."""
        arm, layers = self._study.arms[trial.arm], self._study.model.n_layer
        alpha = [0.1234567890123456] * layers if getattr(arm.alpha, "learnable", None) else []
        for done, row in super().train(trial, checkpoints, model):
            noise = np.random.default_rng(done).uniform(0.1, 1.0, 4).tolist()
            row |= dict(zip(("train_nll", "lr", "grad_norm", "tokens_per_second"), noise, strict=True))
            if "final" in row:
                every = dict.fromkeys((*FINAL, *COST, "alpha", "compiled", "test_nll"), 1.2345678901234567)
                row["final"] = {**every, **row["final"]}
            yield done, {**row, "alpha": alpha}


def played(study: Study, loss: Loss, folder: Path | None = None) -> tuple[Counter, Counter]:
    """Play a whole study of known losses. Return the number of its cells and of their tokens by stage and arm.

    Args:
        study: The study.
        loss: Function that returns the loss of a cell at a fraction of its budget, in nats per token.
        folder: The folder that gets the ledger. None means that nothing is written.
    """
    run = StudyRun(study, folder, Whole(study, loss))
    Inline().train(run)
    run.close()
    assert run.stages.finished
    tokens: Counter = Counter()
    for record in run.records.values():
        tokens[record.cell.stage, record.cell.arm] += record.final["tokens"]
    return Counter((record.cell.stage, record.cell.arm) for record in run.records.values()), tokens


def inside(cell: Cell, share: float) -> float:
    """Return a loss that improves with each trial and is best at the middle of the grid.

    No trial is stopped early, and the grid is not extended.
    """
    if cell.stage == "search":
        return 3.0 - 0.001 * cell.index - share
    return 3.0 + 0.1 * abs(cell.index - 1)


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Call `pagating` in this process. Return its exit code, its output and its error output."""
    monkeypatch.setattr(sys, "argv", ["pagating", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


class Caught:
    """Interruption that is caught after a number of cells. The listener of the run is `ended`."""

    def __init__(self, after: float) -> None:
        self.after = after
        self.caught: int | None = None

    @property
    def stopping(self) -> bool:
        """True after that number of cells."""
        return self.caught is not None

    def orderly(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def ended(self, ended: CellEnded) -> None:
        """Count a cell that ended."""
        self.after -= 1
        self.caught = 2 if self.after <= 0 else None


def row_at(step: int) -> dict[str, Any]:
    """Return an evaluation of a cell as the ledger has it."""
    return {**ROW, "step": step, "tokens_per_second": 10.0}


def write_ledger(folder: Path, cells: int = 3) -> dict[str, Record]:
    """Add completed cells of two evaluations to the ledger of a study folder. Return its records."""
    ledger = Ledger(folder / "ledger.jsonl")
    if not ledger.events:
        ledger.append("study", schema=1, study="smoke", corpus="abc")
    for seed in range(101, 101 + cells):
        cell = Cell("confirm", "gelu", 0, seed, {"lr": 1e-3}, "key")
        fields = {"stage": "confirm", "arm": "gelu", "index": 0, "seed": seed, "config": cell.config}
        ledger.append("suggested", cell=cell.key, **fields, config_key="key")
        ledger.append("started", cell=cell.key)
        for step in (4, 8):
            ledger.append("report", cell=cell.key, row=row_at(step))
        ledger.append("ended", cell=cell.key, outcome="completed", final={"val_nll": 3.5}, reason=None)
    ledger.close()
    return records(ledger.events)


class Told:
    """Events of a ledger, written as a run writes them, at moments that the test names."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.now = 1000.0

    def add(self, event: str, **fields: Any) -> None:
        """Add an event now."""
        self.events.append({"event": event, "time": self.now, **fields})

    def start(self, stage: str, arm: str, index: int = 0, seed: int = 1, lr: float = 1e-3) -> str:
        """Suggest and start a cell. Return its key."""
        key = f"{stage}/{arm}/{index}/{seed}" if stage == "search" else f"{stage}/{arm}/{lr}/{seed}"
        fields = {"stage": stage, "arm": arm, "index": index, "seed": seed, "config": {"lr": lr}}
        self.add("suggested", cell=key, **fields, config_key=str(lr))
        self.add("started", cell=key)
        return key

    def report(self, key: str, speed: float) -> None:
        """Report an evaluation of a cell, with its speed in tokens per second."""
        self.add("report", cell=key, row={"step": 1, "val_nll": 5.0, "tokens_per_second": speed})

    def end(self, key: str, loss: float | None = None, outcome: str = "completed") -> None:
        """End a cell with a loss in nats per token, or without one."""
        self.add("ended", cell=key, outcome=outcome, final={} if loss is None else {"val_nll": loss}, reason=None)

    def cell(
        self, stage: str, arm: str, loss: float | None, seconds: float = 10.0, outcome: str = "completed", **where: Any
    ) -> None:
        """Start a cell, and end it after so many seconds."""
        key = self.start(stage, arm, **where)
        self.now += seconds
        self.end(key, loss, outcome)
