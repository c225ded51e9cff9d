"""Backends that train nothing: one writes the cells that may start now as files, the other one takes their results.

The files are those of `pagating.cells.folder`, for batch arrays and machines without Ray. The stages decide as in a
sweep, and results reach the ledger as from any other backend. Only early stopping has no place here: a search cell
trains to its end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pagating.cells.folder import (
    RESULTS,
    TRIALS,
    CellsError,
    Result,
    read_result,
    relative,
    study_of,
    trial_digest,
    write_file,
    write_index,
)
from pagating.trial import Trial
from tune.errors import StudyError
from tune.run.study_run import StudyRun
from tune.study.cell import COST, FINAL, ON_GPU, Cell, folder_name
from tune.study.study import Study
from tune.subject import own_cells
from tune.subject.function import Function, OwnJob
from tune.subject.subject import Job

CURVE = ("val_nll", "train_nll", "lr", "grad_norm", "tokens_per_second", "alpha")
ROW = ("step", "tokens", *CURVE, "padded_nll")  # columns that an evaluation may have
NOT_NUMBERS = ("device", "val_ppl")  # a perplexity overflows before its loss does
NUMBERS = (*FINAL, *COST, *ON_GPU, "test_nll", "alpha", "packed")  # final metrics that a result may have


class Still:
    """The part of a backend that starts nothing."""

    slots = 1

    def check(self, study: Study) -> None:
        """Do nothing. Nothing trains here."""

    def start(self, study: Study, beside: Callable[[], None] = lambda: None) -> None:
        """Call `beside`. Nothing else has to start."""
        beside()

    def stop(self) -> None:
        """Do nothing."""


def waiting(run: StudyRun, most: float = math.inf) -> Iterator[Cell]:
    """Yield at most `most` cells that may start now, each once."""
    count = 0
    while count < most and not run.stopping and (cell := run.next_cell()) is not None:
        count += 1
        yield cell


class CellWriter(Still):
    """Backend that writes the cells that may start now into a folder.

    A cell is written again by each call until its result is taken, with the same bytes. The files of cells that have
    ended are removed.

    Args:
        folder: The folder of cells.
        most: Cells to write at most.

    Attributes:
        cells: Keys of the cells in the folder.
        new: Number of those that were not there before.
        done: Number of those whose result lies in the folder.
    """

    def __init__(self, folder: Path, most: float = math.inf) -> None:
        self.folder, self.most = folder, most
        self.cells: list[str] = []
        self.new = self.done = 0

    def check(self, study: Study) -> None:
        """Raise StudyError if the folder has something else than cells of this study."""
        try:
            other = study_of(self.folder)
        except CellsError as error:
            raise StudyError(str(error)) from error
        if other not in (None, study.name):
            raise StudyError(f"{self.folder}: has the cells of the study {other}; give another folder with --into")

    def train(self, run: StudyRun) -> None:
        """Write the cells. Raise OSError if the folder cannot be written."""
        run.begin(slots=self.slots, sees_models=False)
        index, wanted = {}, set[str]()
        own = isinstance(run.subject, Function)
        files = run.subject.sources.contents() if isinstance(run.subject, Function) else {}
        for cell in waiting(run, self.most):
            trial = run.subject.trial(cell)
            name = f"{folder_name(cell.key)}.json"
            path = self.folder / TRIALS / name
            fields = asdict(own_cells.carried(trial)) if own else self._carried(trial).as_dict()
            content = json.dumps(fields, indent=1).encode() + b"\n"
            self.new += not path.exists()
            if not path.exists() or path.read_bytes() != content:
                write_file(path, content)
            index[name] = (cell.key, own_cells.digest(trial) if own else trial_digest(trial))
            wanted.add(name)
            self.cells.append(cell.key)
            self.done += (self.folder / RESULTS / name).exists()
        if not index and not self.folder.exists():
            return
        if own:
            own_cells.write_runner(self.folder, files)
        write_index(self.folder, run.study.name, index)
        for path in (self.folder / TRIALS).glob("*.json"):
            if path.name not in wanted:
                path.unlink()

    def _carried(self, trial: Trial) -> Trial:
        """Return the trial with paths inside the folder, after everything that it names was copied there once."""
        from pagating.data.prepare import file_names

        corpus = Path(trial.corpus)
        for name in file_names(corpus):
            _copy(corpus / name, self.folder / corpus.name / name)
        if trial.task == "causal" and not trial.padding:
            from pagating.evaluate import keep_text_rows

            keep_text_rows(self.folder / corpus.name, "validation", trial.eval_windows)
        own = trial.own_code
        code = f"code/{Path(own.file).name}" if own else None
        weights = f"weights/{Path(trial.pretrained).name}" if trial.pretrained else None
        if own and code:
            _copy(Path(own.file), self.folder / code)
        if weights and trial.pretrained:
            _copy(Path(trial.pretrained), self.folder / weights)
        return relative(trial, corpus.name, code, weights)


def _copy(source: Path, target: Path) -> None:
    """Copy a file in one step, unless it is there with the same size. Its bytes are checked before a trial starts."""
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, scratch)
    os.replace(scratch, target)


@dataclass
class Taken:
    """What became of the results.

    Attributes:
        taken: Cells whose result was recorded now.
        known: Results of cells that had ended before.
        refused: One line for each result that was refused.
        left: Cells that may start now and have no result.
    """

    taken: int = 0
    known: int = 0
    refused: list[str] = field(default_factory=list)
    left: int = 0


class CellTaker(Still):
    """Backend that records results, each once. A result that is not one of its cell's trial is refused.

    Args:
        files: Files of results.

    Attributes:
        found: What became of them.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.found = Taken()
        self._results: dict[str, tuple[Path, Result]] = {}
        for path in files:
            try:
                result = read_result(path)
                if result.cell in self._results:
                    raise CellsError(f"{path}: is a second result of {result.cell}; the first one counts")
                self._results[result.cell] = path, result
            except CellsError as error:
                self.found.refused.append(str(error))

    def train(self, run: StudyRun) -> None:
        """Record the results, and what depends on them until a cell has none.

        Raises:
            StudyStopped: The study cannot continue.
        """
        run.begin(slots=self.slots, sees_models=True)  # a result brings no model, and the run says so at its end
        for cell in waiting(run):
            path, result = self._results.pop(cell.key, (None, None))
            problem = result and _fault(result, run.subject.trial(cell))
            if result is None or problem:
                self.found.left += 1
                if problem:
                    self.found.refused.append(f"{path}: {problem}")
                continue
            record(run, cell, run.start(cell), result)
            self.found.taken += 1
        run.raise_if_fatal()

    def judge_rest(self, run: StudyRun) -> None:
        """Sort the results that no waiting cell wanted into those of cells that have ended and others."""
        for key, (path, _) in self._results.items():
            if key in run.records and run.records[key].outcome not in (None, "failed"):
                self.found.known += 1
            else:
                self.found.refused.append(f"{path}: {run.study.name} has no cell {key} that may start now")
        self._results = {}


class Ended(Protocol):
    """What a trial that has ended left: a result, or what `pagating.packed.plan` returns."""

    @property
    def outcome(self) -> str: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def rows(self) -> list[dict[str, Any]]: ...
    @property
    def final(self) -> dict[str, Any]: ...


def record(run: StudyRun, cell: Cell, job: Job, end: Ended) -> None:
    """Record the rows and the end of a started cell, as a backend does that saw it train to its end."""
    for row in end.rows:
        run.report(cell, row)
        run.should_stop(cell, row["step"] / job.steps, row["val_nll"])  # its loss counts for later trials of the arm
    run.end(cell, end.outcome, end.final, end.reason)


def _fault(result: Result, trial: Any) -> str | None:
    """Return what keeps a result from being that of a trial; None if it is one."""
    return own_cells.fault(result, trial) if isinstance(trial, OwnJob) else fault(result, trial)


def fault(result: Result, trial: Trial) -> str | None:
    """Return what keeps a result from being that of a trial, in a few words; None if it is one."""
    if result.sha256 != trial_digest(trial):
        return f"is of another trial than that of {result.cell}: its settings, corpus or code differ"
    if result.outcome not in ("completed", "infeasible"):
        return f"outcome '{result.outcome}' is neither completed nor infeasible"
    every, last = trial.evaluation_interval, trial.steps
    whole = [*range(every, last, every), last]
    steps = [row.get("step") for row in result.rows]
    if result.outcome == "infeasible":
        if not result.reason:
            return "is infeasible without a reason"
        whole = whole[: len(steps)]
    if steps != whole:
        return f"its curve is not complete: it has the steps {_few(steps)}, not {_few(whole)}"
    for row in result.rows:
        if unknown := [name for name in row if name not in ROW]:
            return f"'{unknown[0]}' at step {row['step']} is not known"
        if row.get("tokens") != row["step"] * trial.batch_tokens:
            return f"step {row['step']} has {row.get('tokens')} tokens, not {row['step'] * trial.batch_tokens}"
        if name := _not_finite(row, CURVE):
            return f"{name} at step {row['step']} is not a finite number"
    final = result.final
    if not isinstance(final.get("device"), str):
        return "it does not name its device"
    if result.outcome == "infeasible":
        return None
    if unknown := [name for name in final if name not in (*NUMBERS, *NOT_NUMBERS)]:
        return f"final metric '{unknown[0]}' is not known"
    wanted = ("val_nll", "train_nll", "tokens", "steps", "seconds", *(["test_nll"] if trial.test else []))
    if name := _not_finite(final, dict.fromkeys([*wanted, *(name for name in final if name not in NOT_NUMBERS)])):
        return f"final metric {name} is not a finite number"
    if "test_nll" in final and not trial.test:
        return "it read the test split, which this stage does not"
    if (final["steps"], final["tokens"]) != (last, last * trial.batch_tokens):
        return f"it made {final['steps']} steps of {final['tokens']} tokens, not {last} of {last * trial.batch_tokens}"
    if final["val_nll"] != result.rows[-1]["val_nll"]:
        return "its final loss is not that of its last evaluation"
    return None


def _not_finite(found: dict[str, Any], names: Iterable[str]) -> str | None:
    """Return the first of the names whose value is neither a finite number nor a list of them; None without any."""
    for name in names:
        value = found.get(name)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in values):
            return name
    return None


def _few(steps: list[Any]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 4 else f"{steps[0]}, {steps[1]}, ... {steps[-1]}"
