"""Train the cells of a study of the user's own code on a machine that has the user's packages only.

    python FOLDER/run.py [--workers N] [--part I/N] [--only FILE] [--time-limit SECONDS]

Trains every cell of a folder that `pagating cells` wrote and that has no result there, and writes each result whole.
After an interruption or a kill, the same command goes on. Several of these processes may share a folder. This file and
what it imports are copied into the folder, and need Python's own library only.

A trial that is infeasible has a result, which says so. A failed one is no result: it is one line, the others go on, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pagating.cells.command import checkpoints_of, claimed, command, parser, versions
from pagating.cells.folder import OWN_RUNNER, CellFile, Result, json_digest, write_file, write_result
from tune.subject import command as commands
from tune.subject import function as functions
from tune.subject.function import OwnJob
from tune.subject.own_worker import Infeasible
from tune.subject.process import TrialFailed

ROOT = Path(__file__).parents[2]
CODE, RUNNER = "code", "runner"  # folders beside the cells: the user's files, and ours
MODULES = (
    *("pagating/__init__.py", "pagating/lazy.py"),
    *(f"pagating/cells/{name}.py" for name in ("__init__", "command", "folder")),
    "tune/__init__.py",
    *(f"tune/subject/{name}.py" for name in ("__init__", "command", "function", "own_cells", "own_worker", "process")),
)
RUN = f'''"""Train the cells of this folder: python {OWN_RUNNER} [--workers N] [--part I/N] [--only FILE]."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "{RUNNER}"))

from tune.subject.own_cells import main  # noqa: E402

sys.exit(main([str(HERE), *sys.argv[1:]], "python {OWN_RUNNER}"))
'''
PLACES = ("file", "folder", "cpus", "timeout", "reuse")  # fields of a trial that its result does not depend on


def digest(trial: OwnJob) -> str:
    """Return the SHA-256 of a trial's content, with the digests of its files."""
    fields = {name: value for name, value in asdict(trial).items() if name not in PLACES}
    return json_digest({**fields, "main": Path(trial.file).name if trial.command is None else ""})


def write_runner(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the user's files, and what trains them, into a folder of cells. Raises OSError."""
    ours = {f"{RUNNER}/{name}": (ROOT / name).read_bytes() for name in MODULES}
    theirs = {f"{CODE}/{name}": content for name, content in files.items()}
    for name, content in {**ours, **theirs, OWN_RUNNER: RUN.encode()}.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            write_file(folder / name, content)


def carried(trial: OwnJob) -> OwnJob:
    """Return a trial whose files are those of a folder of cells, named from `trials/`."""
    main = "" if trial.command else f"/{Path(trial.file).name}"
    return replace(trial, file=f"../{CODE}{main}", folder=f"../{CODE}")


def read_trial(fields: dict[str, Any], beside: Path) -> OwnJob:
    """Return the trial of a JSON object whose relative paths start at `beside`.

    Raises ValueError or TypeError if it is not one, or if one of the user's files is another one.
    """
    trial = OwnJob(**{**fields, "to_read": tuple(fields.get("to_read", ()))})
    trial = replace(trial, file=str((beside / trial.file).resolve()), folder=str((beside / trial.folder).resolve()))
    code = Path(trial.folder if trial.command else trial.file)
    for name, sha256 in trial.files.items():
        path = (code if trial.command else code.parent) / name
        if not name.startswith("..") and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path} is not the file that the study was begun with")
    return trial


# --- train -----------------------------------------------------------------------------------------------------------


@dataclass
class End:
    """The end of a trial, as a result has it."""

    outcome: str = ""
    reason: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] = field(default_factory=dict)


def train(trial: OwnJob, folder: Path, stop: Callable[[], bool], told: Callable[[dict[str, Any]], None]) -> End | None:
    """Train a trial to its end; return None if `stop` returned True before.

    Args:
        trial: The trial.
        folder: Folder of the trial.
        stop: Called often; if it returns True, training ends.
        told: Called with each evaluation.

    Raises:
        TrialFailed: The trial failed.
    """
    end = End()
    folder.mkdir(parents=True, exist_ok=True)
    trained = commands.trained if trial.command else functions.trained
    try:
        for found in trained(trial, str(folder), stop):
            if found is None or found[1] is None:
                continue
            row = dict(found[1])
            end.final = row.pop("final", {})
            end.rows.append(row)
            told(row)
    except Infeasible as error:
        end.outcome, end.reason = "infeasible", str(error)
        return end
    end.outcome = "completed"
    return end if end.final else None


def run(
    cells: Sequence[CellFile], given: argparse.Namespace, stop: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Train the cells that have no result. If one fails, say so and go on. Raises CellsError if one cannot be read."""
    left = [cell for cell in cells if not cell.result.exists()]
    trials = [cell.checked(partial(read_trial, beside=cell.path.parent), digest) for cell in left]
    for cell, trial in zip(left, trials, strict=True):
        if stop():
            break
        with claimed([cell]) as mine:
            if not mine:
                continue
            began, place = time.monotonic(), checkpoints_of(cell)
            try:
                end = train(trial, place, stop, lambda row: None)
            except TrialFailed as error:
                say(f"{cell.path}: {error}; it has no result")
                continue
            if end:
                write_result(cell.result, Result(cell.cell, cell.sha256, **vars(end), versions=versions()))
                shutil.rmtree(place, ignore_errors=True)
                say(f"{cell.cell}: {end.outcome} in {time.monotonic() - began:.1f} s")


def main(arguments: list[str] | None = None, prog: str = f"python {OWN_RUNNER}") -> int:
    """Train the cells of a folder. Return the exit code; see `pagating.cells.command`."""
    words = sys.argv[1:] if arguments is None else arguments
    again = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tune.subject.own_cells as own; sys.exit(own.main())",
    ]
    return command(words, parser(prog), run, again)


# --- results ---------------------------------------------------------------------------------------------------------


def fault(result: Result, trial: OwnJob) -> str | None:
    """Return what keeps a result from being that of a trial, in a few words; None if it is one."""
    if result.sha256 != digest(trial):
        return f"is of another trial than that of {result.cell}: its settings or its code differ"
    if result.outcome not in ("completed", "infeasible"):
        return f"outcome '{result.outcome}' is neither completed nor infeasible"
    steps = [row.get("step") for row in result.rows]
    if steps != sorted({step for step in steps if isinstance(step, int) and 0 < step <= trial.budget}):
        return f"its reports are not at growing steps up to {trial.budget} {trial.unit}"
    for row in result.rows:
        if row.get("tokens") != row["step"] or not _finite(row.get("val_nll")):
            return f"the report at step {row['step']} has no finite {trial.metric}"
    if result.outcome == "infeasible":
        return None if result.reason else "is infeasible without a reason"
    final = result.final
    if steps[-1:] != [trial.budget] or (final.get("steps"), final.get("tokens")) != (trial.budget, trial.budget):
        return f"its last report is not at the end of its {trial.budget} {trial.unit}"
    if final.get("val_nll") != result.rows[-1]["val_nll"]:
        return f"its final {trial.metric} is not that of its last report"
    if ("test_nll" in final) != trial.test:
        return f"it has {'no' if trial.test else 'a'} {trial.test_metric}, which the last stage alone reads"
    if bad := [name for name, value in final.items() if name in ("test_nll", "seconds") and not _finite(value)]:
        return f"{bad[0]} is not a finite number"
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
