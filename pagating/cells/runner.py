"""Train the cells of a folder on this machine.

    python -m pagating.cells FOLDER [--packed] [--most K] [--device cuda] [--workers N] [--part I/N] [--only FILE]

Trains every cell of a folder that `pagating cells` wrote and that has no result in FOLDER/results, and writes each
result whole. After an interruption or a kill, the same command goes on: a trial alone continues from its checkpoint, a
pack begins again. Several of these processes may share a folder; each takes cells that no other one trains.

A trial that diverges, or does not fit into memory alone, has a result, which says so. An error of the machine is no
result: it is one line, the others go on, and the exit code is 1. Needs torch, numpy and safetensors only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from pagating.cells.command import checkpoints_of, claimed, command, count, parser, versions
from pagating.cells.folder import CellFile, CellsError, Result, write_result
from pagating.checkpoint import CheckpointFolder
from pagating.data.errors import first_line
from pagating.hardware import DEVICES
from pagating.packed.plan import Ended, on_device, packs, train_together
from pagating.train import check
from pagating.trial import OutOfMemory, Trial

MOST = 32  # trials of a pack, unless the command says otherwise


def result_of(cell: CellFile, end: Ended) -> Result:
    """Return the result of a cell whose trial has ended."""
    return Result(cell.cell, cell.sha256, end.outcome, end.reason, end.rows, end.final, versions())


def run(
    cells: Sequence[CellFile],
    most: int,
    device: str | None,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Train the cells that have no result. If the machine fails one, say so and go on.

    Args:
        cells: The cells.
        most: Trials that train together at most; 1 trains one after the other.
        device: Device of all trials, or None for the one that each names.
        stop: Called often; if it returns True, training ends.
        say: Called with each line for the user.

    Raises:
        CellsError: A trial cannot be read, or cannot start on this machine.
    """
    left = [cell for cell in cells if not cell.result.exists()]
    trials = [_startable(cell, device) for cell in left]
    for places in packs(trials, most):
        if stop():
            break
        with claimed([left[place] for place in places]) as mine:
            if not mine:
                continue
            mine_trials = [trials[place] for place in places if left[place] in mine]
            began = time.monotonic()
            try:
                ends = train_together(mine_trials, stop, _checkpoints(mine), say)
            except Exception as error:  # noqa: BLE001 (own code may raise any error, and only its trials fail)
                say(f"{mine[0].path}: {first_line(error)}; it has no result")
                continue
            for cell, end in zip(mine, ends or [], strict=False):
                write_result(cell.result, result_of(cell, end))
            if ends:
                done = f"{len(mine)} cells" if len(mine) > 1 else mine[0].cell
                say(f"{done}: {ends[0].outcome} in {time.monotonic() - began:.1f} s on {ends[0].final['device']}")


def _startable(cell: CellFile, device: str | None) -> Trial:
    """Return the trial of a cell. Raise CellsError if this machine cannot train it."""
    trial = on_device(cell.trial(), device)
    try:
        check(trial)
    except (ValueError, OutOfMemory) as error:
        raise CellsError(f"{cell.path}: {error}") from error
    return trial


def _checkpoints(cells: Sequence[CellFile]) -> CheckpointFolder | None:
    """Return the folder of checkpoints of a trial alone; None for a pack."""
    if len(cells) > 1:
        return None
    return CheckpointFolder(checkpoints_of(cells[0]))


def main(arguments: list[str] | None = None, prog: str = "python -m pagating.cells") -> int:
    """Train the cells of a folder. Return the exit code; see `pagating.cells.command`."""
    made = parser(prog)
    made.add_argument("--packed", action="store_true", help="train cells of one shape together, as one batched model")
    made.add_argument(
        "--most", type=count, default=MOST, metavar="K", help="cells per pack at most; default: %(default)s"
    )
    made.add_argument("--device", choices=DEVICES, help="default: the one that each trial names")

    def train(
        cells: Sequence[CellFile], given: argparse.Namespace, stop: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        run(cells, given.most if given.packed else 1, given.device, stop, say)

    words = sys.argv[1:] if arguments is None else arguments
    return command(words, made, train, [sys.executable, "-m", "pagating.cells"])
