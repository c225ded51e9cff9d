"""Subject that runs the user's command, in any language, and reads its lines.

A line such as `METRIC val_loss=1.23 step=200` is a report. The test metric may be in a line of its own, without a step.
All other lines are output.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.subject.function import OUTPUT, Function, OwnJob, in_folder
from tune.subject.own_worker import OwnTrial, Refused, returned
from tune.subject.process import Process, TrialFailed

if TYPE_CHECKING:
    from pagating.checkpoint import CheckpointFolder
    from tune.study.cell import Cell
    from tune.subject.subject import Step

ERRORS = "errors.txt"  # file in a trial's folder with its standard error
METRIC = re.compile(r"METRIC(?:\s+[A-Za-z]\w*=\S+)+\s*")


class Command(Function):
    """Subject that trains with a user's command."""

    def trial(self, cell: Cell) -> OwnJob:
        """Return the trial of a cell. Raises StudyError if a file that the command names has changed."""
        self.sources.check_unchanged()
        return replace(super().trial(cell), command=self.study.code)

    @staticmethod
    def train(trial: OwnJob, checkpoints: CheckpointFolder | None, model: Path | None) -> Iterator[Step | None]:
        """Run the command and yield its reports."""
        yield from in_folder(trained, trial, checkpoints)


def words(command: str, values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command with the values of the names in braces. True and false are so written."""
    shown = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}
    return [word.format_map(shown) for word in shlex.split(command)]


def parsed(line: str) -> dict[str, str] | None:
    """Return the names and values of a line that reports metrics, or None for any other line. Raises Refused."""
    if line.split()[:1] != ["METRIC"]:
        return None
    if not METRIC.fullmatch(line):
        raise Refused(f"the line '{line.strip()[:200]}' is not of the form METRIC NAME=NUMBER step=NUMBER")
    return dict(pair.split("=", 1) for pair in line.split()[1:])


def trained(trial: OwnJob, folder: str, stopping: Callable[[], bool]) -> Iterator[Step | None]:
    """Run the command of a trial; yield its reports. Raises Infeasible or TrialFailed.

    Args:
        trial: The trial.
        folder: Folder of the trial.
        stopping: Function that returns True if the study stops.
    """
    assert trial.command is not None
    own = {"arm": trial.arm, "budget": trial.budget, "folder": folder, "seed": trial.seed, "test": int(trial.test)}
    order = {**own, "test": trial.test, "values": {}, "metric": trial.metric, "test_metric": trial.test_metric}
    told: list[dict[str, Any]] = []
    checked = OwnTrial({**order, "unit": trial.unit}, lambda **message: told.append(message), lambda: None)
    began, output = time.monotonic(), Path(folder) / OUTPUT
    row: dict[str, Any] | None = None
    found: dict[str, float] = {}
    with Process(
        words(trial.command, {**trial.values, **own}),
        folder=Path(trial.folder),
        output=Path(folder) / ERRORS,
        cpus=trial.cpus,
        timeout=trial.timeout,
        own_channel=False,
        environment={"PAGATING_TEST": str(int(trial.test)), "PAGATING_FOLDER": folder},
    ) as process:
        try:
            for line in process.lines():
                if stopping():
                    return
                if line is None:
                    yield None
                    continue
                values = parsed(line)
                if values is None:
                    with open(output, "a", encoding="utf-8") as log:
                        log.write(line + "\n")
                    continue
                numbers = {name: _number(name, value, line) for name, value in values.items()}
                if trial.test_metric in numbers:
                    if not trial.test:
                        raise Refused(
                            f"the command printed {trial.test_metric} although {{test}} is 0: it is read once"
                        )
                    found[trial.test_metric] = numbers.pop(trial.test_metric)
                if not numbers or numbers.keys() == {"step"}:
                    continue
                if "step" not in numbers:
                    raise Refused(f"the line '{line.strip()[:200]}' has no step")
                checked.report(numbers.pop("step"), **numbers)  # type: ignore[arg-type]
                row = trial.row(told[-1]["step"], told[-1]["metrics"], time.monotonic() - began)
                if row["step"] < trial.budget:
                    yield row["step"], row
            if process.exit_code():
                raise process.why_ended(output)
            if row is None and not found:
                raise Refused("no METRIC line was printed")
            if trial.test and row and row["step"] == trial.budget and trial.test_metric not in found:
                raise Refused(f"the command did not print METRIC {trial.test_metric}=... although {{test}} is 1")
            values_found = returned(checked, found, trial.test_metric)
        except Refused as error:
            raise TrialFailed(str(error)) from error
    assert row is not None
    yield row["step"], {**row, "final": trial.final(row, values_found, time.monotonic() - began)}


def _number(name: str, value: str, line: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise Refused(f"{name} is no number in the line '{line.strip()[:200]}'") from error
