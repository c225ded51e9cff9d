"""Subject that trains the user's own function in a fresh process, or with `reuse` in that of the trial before.

What trains is imported with Python's own library only, because it travels in a folder of cells (`own_cells`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.subject.own_worker import Infeasible
from tune.subject.process import Process, TrialFailed

if TYPE_CHECKING:
    from pagating.checkpoint import CheckpointFolder
    from tune.study.cell import Cell
    from tune.study.own_study import OwnStudy
    from tune.subject.sources import Sources
    from tune.subject.subject import Step

WORKER = Path(__file__).with_name("own_worker.py")
OUTPUT = "output.txt"  # file in a trial's folder with what it printed


@dataclass(frozen=True)
class OwnJob:
    """A trial of the user's own code.

    Attributes:
        arm: Name of the arm.
        seed: Seed of the trial.
        budget: Length of the trial in `unit`.
        unit: Unit of the budget.
        test: The trial has to give the test metric.
        values: What the code reads as `trial.NAME`.
        to_read: Names of the values without which the arm would not be what it is.
        metric: Name of the validation metric.
        test_metric: Name of the test metric.
        sign: Factor that makes a loss of both.
        file: The study's copy of the user's file; the folder of a command.
        name: Name of the function.
        files: SHA-256 of each of the user's files.
        folder: Working directory: that of the user's file.
        cpus: Threads of numerical libraries.
        timeout: Seconds without a report after which the trial has failed.
        reuse: Train in the process of the trial before, if that one ended well.
        command: The command of a study that runs one, with names in braces.
    """

    arm: str
    seed: int
    budget: int
    unit: str
    test: bool
    values: Mapping[str, Any]
    to_read: tuple[str, ...]
    metric: str
    test_metric: str
    sign: int
    file: str
    name: str
    files: Mapping[str, str]
    folder: str
    cpus: int
    timeout: float
    reuse: bool = False
    command: str | None = None

    def row(self, step: int, metrics: Mapping[str, float], seconds: float) -> dict[str, Any]:
        """Return an evaluation as the ledger has it. The metric's place is that of the built-in loss."""
        others = {name: value for name, value in metrics.items() if name != self.metric}
        loss, speed = self.sign * metrics[self.metric], step / max(seconds, 1e-9)
        return {"step": step, "tokens": step, "val_nll": loss, "tokens_per_second": speed, "alpha": [], **others}

    def final(self, row: Mapping[str, Any], returned: Mapping[str, float], seconds: float) -> dict[str, Any]:
        """Return the result of the trial, of its last evaluation and what its code returned."""
        others = {name: value for name, value in returned.items() if name not in (self.metric, self.test_metric)}
        test = {"test_nll": self.sign * returned[self.test_metric]} if self.test else {}
        kept = {name: row[name] for name in ("val_nll", "tokens", "tokens_per_second")}
        return {**others, **kept, **test, "steps": row["step"], "seconds": seconds}


class Function:
    """Subject that trains a user's function `FILE.py:NAME`."""

    def __init__(self, study: OwnStudy, sources: Sources) -> None:
        self.study, self.sources = study, sources

    def identity(self) -> dict[str, Any]:
        """Return the digests of the user's files."""
        return self.sources.identity()

    def check_begun(self, begun: Mapping[str, Any]) -> None:
        """Raise StudyError if the study was started with other files."""
        self.sources.check_begun(begun)

    def trial(self, cell: Cell) -> OwnJob:
        """Return the trial of a cell."""
        study = self.study if cell.rung == self.study.rung else self.study.at(cell.rung)
        metric = study.metric
        return OwnJob(
            arm=cell.arm,
            seed=cell.seed,
            budget=study.length(cell.arm, study.amount),
            unit=study.unit,
            test=study.tests(cell.stage),
            values=study.values(cell.arm, cell.config),
            to_read=tuple(study.to_read(cell.arm)),
            metric=metric.name,
            test_metric=metric.test,
            sign=study.sign,
            file=str(self.sources.main),
            name=self.sources.runs,
            files=self.sources.files,
            folder=str(self.sources.working_folder),
            cpus=study.resources.cpus,
            timeout=study.resources.stall_timeout,
            reuse=study.reuse,
        )

    @staticmethod
    def train(trial: OwnJob, checkpoints: CheckpointFolder | None, model: Path | None) -> Iterator[Step | None]:
        """Run the function in another process, which waits after each report until the next one is asked for."""
        yield from in_folder(trained, trial, checkpoints)


Trained = Callable[[OwnJob, str, Callable[[], bool]], "Iterator[Step | None]"]


def in_folder(train: Trained, trial: OwnJob, checkpoints: CheckpointFolder | None) -> Iterator[Step | None]:
    """Train a trial in its folder: that of its checkpoints, else one that is removed. Raises Diverged as a worker does.

    Args:
        train: Function that trains in a folder, until a function tells it that the study stops.
        trial: The trial.
        checkpoints: Folder of the trial's checkpoints, or None.
    """
    from pagating.trial import Diverged

    place: Any = tempfile.TemporaryDirectory(prefix="pagating-trial-")
    if checkpoints:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        place = nullcontext(str(checkpoints.folder))
    with place as folder:
        try:
            yield from train(trial, folder, lambda: bool(checkpoints and checkpoints.requested))
        except Infeasible as error:
            raise Diverged(str(error)) from error


def trained(trial: OwnJob, folder: str, stopping: Callable[[], bool]) -> Iterator[Step | None]:
    """Run the function of a trial in a process of its own; yield its reports. Raises Infeasible or TrialFailed.

    Args:
        trial: The trial.
        folder: Folder of the trial.
        stopping: Function that returns True if the study stops.
    """
    order = {
        name: getattr(trial, name)
        for name in ("arm", "seed", "budget", "unit", "test", "metric", "test_metric", "file", "name", "reuse")
    }
    output = Path(folder) / OUTPUT
    began, waited = time.monotonic(), 0.0
    row: dict[str, Any] | None = None
    with _leased(trial, output) as process:
        process.send(json.dumps({**order, "values": dict(trial.values), "folder": folder, "output": str(output)}))
        for line in process.lines():
            if stopping():
                return
            if line is None:
                yield None
                continue
            message = json.loads(line)
            spent = time.monotonic() - began - waited
            if "step" in message:
                row = trial.row(message["step"], message["metrics"], spent)
                if row["step"] < trial.budget:  # the last one is held back until its result is known
                    asked = time.monotonic()
                    yield row["step"], row
                    waited += time.monotonic() - asked
                process.send("on")
                continue
            if "infeasible" in message:
                raise Infeasible(message["infeasible"])
            if "failed" in message:
                raise TrialFailed(message["failed"])
            if unread := [name for name in trial.to_read if name not in message["read"]]:
                raise TrialFailed(
                    f"arms.{trial.arm}: the function never reads trial.{unread[0]}, so this arm trains as without it"
                )
            process.again = message["again"]
            break
        else:
            raise process.why_ended()
    assert row is not None
    final = trial.final(row, message["returned"], spent)
    yield row["step"], {**row, "final": {**final, "peak_rss_mb": message["peak"], "memory_growth_mb": message["grown"]}}


_idle: list[tuple[Any, Process]] = []  # of this process, which trains one trial at a time


@contextmanager
def _leased(trial: OwnJob, output: Path) -> Iterator[Process]:
    """Return a context with a process for a trial: the idle one if the trial may use it, or else a fresh one.

    The process ends at exit, unless it has set `again`.
    """
    key = (trial.file, trial.name, trial.folder, trial.cpus, trial.timeout)
    process = _taken(key) if trial.reuse else None
    if process is None:
        process = Process(
            [sys.executable, "-P", str(WORKER), "{channel}"],
            folder=Path(trial.folder),
            output=output,
            cpus=trial.cpus,
            timeout=trial.timeout,
            own_channel=True,
        )
    process.again, process.output = False, output
    try:
        yield process
    finally:
        if process.again:
            _idle.append((key, process))
        else:
            process.close()


def _taken(key: Any) -> Process | None:
    """Return the idle process of the same function; end any other."""
    while _idle:
        known, process = _idle.pop()
        if known == key and process.is_alive:
            return process
        process.close()
    return None


def waits() -> bool:
    """Return True if a process waits for another trial."""
    return bool(_idle)


def release() -> None:
    """End the process that waits for another trial."""
    _taken(None)
