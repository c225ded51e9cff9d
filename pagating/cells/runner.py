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
import contextlib
import fcntl
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import pagating
from pagating.cells.folder import CellFile, CellsError, Result, cells_of, write_result
from pagating.checkpoint import CheckpointFolder
from pagating.data.errors import first_line
from pagating.hardware import DEVICES
from pagating.packed.plan import Ended, on_device, packs, train_together
from pagating.train import check
from pagating.trial import OutOfMemory, Trial

MOST = 32  # trials of a pack, unless the command says otherwise
CHECKPOINTS, LOCKS = "checkpoints", ".locks"


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that it computes with."""
    found = {"python": platform.python_version(), "pagating-study": pagating.__version__}
    for name in ("torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def result_of(cell: CellFile, end: Ended) -> Result:
    """Return the result of a cell whose trial has ended."""
    return Result(cell.cell, cell.sha256, end.outcome, end.reason, end.rows, end.final, versions())


@contextlib.contextmanager
def claimed(cells: Sequence[CellFile]) -> Iterator[list[CellFile]]:
    """Yield those cells that no other process trains and that have no result. The claim ends with the process."""
    with contextlib.ExitStack() as held:
        mine = []
        for cell in cells:
            path = cell.result.parent.parent / LOCKS / cell.path.name
            path.parent.mkdir(exist_ok=True)
            file = held.enter_context(open(path, "w", encoding="utf-8"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not cell.result.exists():
                    mine.append(cell)
        yield mine


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
    return CheckpointFolder(cells[0].result.parent.parent / CHECKPOINTS / cells[0].path.stem)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _part(given: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", given)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{given!r} is not I/N with 1 <= I <= N, such as 3/16")
    return int(match[1]), int(match[2])


def _count(given: str) -> int:
    if not given.isdecimal() or not 1 <= int(given) <= 4096:
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number in [1, 4096]")
    return int(given)


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    made = _Parser(prog=prog, description="Train the cells of a folder that `pagating cells` wrote.")
    made.add_argument("folder", type=Path, help="folder of cells")
    made.add_argument("--packed", action="store_true", help="train cells of one shape together, as one batched model")
    made.add_argument(
        "--most", type=_count, default=MOST, metavar="K", help="cells per pack at most; default: %(default)s"
    )
    made.add_argument("--device", choices=DEVICES, help="default: the one that each trial names")
    made.add_argument("--workers", type=_count, default=1, metavar="N", help="processes that train side by side")
    made.add_argument("--part", type=_part, metavar="I/N", help="only every N-th cell, from the I-th: for batch arrays")
    made.add_argument("--only", type=Path, metavar="FILE", help="only the cell of this trial file, or of this name")
    made.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop in good order after this time")
    return made


def _chosen(given: argparse.Namespace) -> list[CellFile]:
    cells = cells_of(given.folder)
    if given.only:
        cells = [cell for cell in cells if cell.path.stem == given.only.stem or cell.cell == str(given.only)]
        if not cells:
            raise CellsError(f"--only {given.only}: {given.folder} has no such cell")
    if given.part:
        cells = cells[given.part[0] - 1 :: given.part[1]]
    return cells


def main(arguments: list[str] | None = None, prog: str = "python -m pagating.cells") -> int:
    """Train the cells of a folder. Return the exit code.

    Exit codes: 0 every cell has a result, 1 some have none (another process trains them, the time is up, or the
    machine failed), 2 bad input, 128 + n after signal n.
    """
    words = sys.argv[1:] if arguments is None else arguments
    given = parser(prog).parse_args(words)
    until = None if given.time_limit is None else time.monotonic() + given.time_limit
    caught: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    def stop() -> bool:
        return bool(caught) or (until is not None and time.monotonic() > until)

    def say(line: str) -> None:
        print(line, flush=True)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cells = _chosen(given)
        if given.workers > 1:
            _in_processes(words, given.workers, caught)
        else:
            run(cells, given.most if given.packed else 1, given.device, stop, say)
        left = sum(not cell.result.exists() for cell in cells)
    except CellsError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or given.folder}: {error.strerror or error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    say(f"{given.folder}: {len(cells) - left} of {len(cells)} cells have a result")
    return 128 + caught[0] if caught else int(left > 0)


def _in_processes(words: Sequence[str], workers: int, caught: Sequence[int]) -> None:
    """Run this command in several processes, which share the folder; pass on a signal that was caught."""
    at = next(i for i, word in enumerate(words) if word.startswith("--workers"))
    one = [*words[:at], *words[at + (1 if "=" in words[at] else 2) :]]
    running = [subprocess.Popen([sys.executable, "-m", "pagating.cells", *one]) for _ in range(workers)]
    told = False
    while any(process.poll() is None for process in running):
        time.sleep(0.1)
        if caught and not told:
            told = True
            for process in running:
                process.send_signal(caught[0])
