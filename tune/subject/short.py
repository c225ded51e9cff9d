"""Short trials of the user's own training, for its check and for the cost of a study."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tune.study.cell import Cell
from tune.study.own_study import OwnStudy
from tune.study.sizes import example
from tune.subject.command import Command
from tune.subject.function import Function
from tune.subject.sources import Sources
from tune.subject.subject import Job
from tune.subject.training import Training


@dataclass(frozen=True)
class ShortTrial:
    """A trial that has ended.

    Attributes:
        outcome: Its outcome, or `stopped`.
        reason: Why it is failed or infeasible, else "".
        rows: Its evaluations, as the ledger has them.
        final: Its result; empty if it was not completed.
        budget: Its length in the study's unit.
        seconds: Time from its start to its end, with that of its process.
    """

    outcome: str
    reason: str
    rows: list[dict[str, Any]]
    final: dict[str, Any]
    budget: int
    seconds: float

    @property
    def losses(self) -> list[float]:
        """The losses of its evaluations."""
        return [row["val_nll"] for row in self.rows]


def subject_of(study: OwnStudy, sources: Sources) -> Function:
    """Return the subject of a study that trains the user's own function or command."""
    return Function(study, sources) if isinstance(study.trial, str) else Command(study, sources)


@dataclass(frozen=True)
class ShortTrials:
    """Short trials of a study, with folders of their own inside `folder`. `ended` is called after each trial."""

    subject: Function
    folder: Path
    ended: Callable[[], None] | None = None

    @property
    def study(self) -> OwnStudy:
        """The study; of a ladder, that of its lowest rung."""
        study = self.subject.study
        return study.at(1) if study.scales else study

    @cached_property
    def every(self) -> int:
        """Step of the baseline's first report; 1 if there is none before the end."""
        arm = self.study.baseline
        done = self.run("search", arm, 1, self.study.amount, enough=lambda reports, seconds: reports > 0)
        return int(done.rows[0]["step"]) if done.outcome == "stopped" else 1

    def budget(self, arm: str, share: float) -> int:
        """Return a share of the budget of an arm's trials, in the study's unit.

        It is a multiple of the step of the first report, because code that reports every so many steps could not
        report the end of any other budget.
        """
        whole = self.study.length(arm, self.study.amount)
        return whole if share == 1 else min(whole, math.ceil(max(1, round(share * whole)) / self.every) * self.every)

    def _tell(self) -> None:
        if self.ended:
            self.ended()

    def place(self) -> Path:
        """Return a new folder for a trial."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.folder))

    def run(
        self,
        stage: str,
        arm: str,
        seed: int,
        budget: int,
        place: Path | None = None,
        enough: Callable[[int, float], bool] = lambda reports, seconds: False,
        reuse: bool = False,
    ) -> ShortTrial:
        """Train an arm at the middle of its search ranges.

        Args:
            stage: Stage of the trial. The test metric is given in the last one.
            arm: Name of the arm.
            seed: Seed of the trial.
            budget: Length of the trial in the study's unit.
            place: Folder of the trial. None makes a new one.
            enough: Called with the number of evaluations and the seconds since the start. True stops the trial, with
                the outcome `stopped`, and leaves its folder.
            reuse: Train in the process of the trial before that had it too, if that one ended well.
        """
        cell = Cell(stage, arm, 0, seed, example(self.study, arm), "short", rung=self.study.rung)
        trial = replace(self.subject.trial(cell), budget=budget, reuse=reuse)
        training = Training(Job(cell.key, trial, self.subject.train, str(place or self.place()), budget))
        rows: list[dict[str, Any]] = []
        began, result = time.monotonic(), dict[str, Any]()
        while training.outcome is None:
            result = training.advance()
            rows += [result["row"]] if result["row"] else []
            if training.outcome is None and enough(len(rows), time.monotonic() - began):
                training.cut_off()
                self._tell()
                return ShortTrial("stopped", "", rows, {}, budget, time.monotonic() - began)
        seconds = time.monotonic() - began
        training.replaced()
        self._tell()
        return ShortTrial(training.outcome, result["reason"] or "", rows, result["final"] or {}, budget, seconds)
