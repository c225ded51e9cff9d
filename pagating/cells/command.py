"""The command that trains the cells of a folder, whatever their trials are. Imports Python's own library only."""

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
from pagating.cells.folder import CellFile, CellsError, cells_of

Train = Callable[[Sequence[CellFile], argparse.Namespace, Callable[[], bool], Callable[[str], None]], None]
CHECKPOINTS, LOCKS = "checkpoints", ".locks"


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that it computes with."""
    found = {"python": platform.python_version(), "pagating-study": pagating.__version__}
    for name in ("torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def checkpoints_of(cell: CellFile) -> Path:
    """Return the folder of a cell's checkpoints."""
    return cell.result.parent.parent / CHECKPOINTS / cell.path.stem


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _part(given: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", given)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{given!r} is not I/N with 1 <= I <= N, such as 3/16")
    return int(match[1]), int(match[2])


def count(given: str) -> int:
    """Return a number of an argument in [1, 4096]."""
    if not given.isdecimal() or not 1 <= int(given) <= 4096:
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number in [1, 4096]")
    return int(given)


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the arguments that every such command has."""
    made = _Parser(prog=prog, description="Train the cells of a folder that `pagating cells` wrote.")
    made.add_argument("folder", type=Path, help="folder of cells")
    made.add_argument("--workers", type=count, default=1, metavar="N", help="processes that train side by side")
    made.add_argument("--part", type=_part, metavar="I/N", help="only every N-th cell, from the I-th: for batch arrays")
    made.add_argument("--only", type=Path, metavar="FILE", help="only the cell of this trial file, or of this name")
    made.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop in good order after this time")
    return made


def command(words: Sequence[str], made: argparse.ArgumentParser, train: Train, again: Sequence[str]) -> int:
    """Train the cells of a folder. Return the exit code.

    Exit codes: 0 every cell has a result, 1 some have none (another process trains them, the time is up, or the
    machine failed), 2 bad input, 128 + n after signal n.

    Args:
        words: Arguments of the command line.
        made: Their parser.
        train: Function that trains cells. It gets the arguments, a function that returns True if training has to end,
            and one for each line for the user.
        again: Command line of this command without its arguments, for `--workers`.
    """
    given = made.parse_args(words)
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
            _in_processes([*again, *_alone(words)], given.workers, caught)
        else:
            train(cells, given, stop, say)
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


def _chosen(given: argparse.Namespace) -> list[CellFile]:
    cells = cells_of(given.folder)
    if given.only:
        cells = [cell for cell in cells if cell.path.stem == given.only.stem or cell.cell == str(given.only)]
        if not cells:
            raise CellsError(f"--only {given.only}: {given.folder} has no such cell")
    if given.part:
        cells = cells[given.part[0] - 1 :: given.part[1]]
    return cells


def _alone(words: Sequence[str]) -> list[str]:
    """Return the arguments without `--workers`."""
    at = next(i for i, word in enumerate(words) if word.startswith("--workers"))
    return [*words[:at], *words[at + (1 if "=" in words[at] else 2) :]]


def _in_processes(one: Sequence[str], workers: int, caught: Sequence[int]) -> None:
    """Run a command in several processes, which share the folder; pass on a signal that was caught."""
    running = [subprocess.Popen(one) for _ in range(workers)]
    told = False
    while any(process.poll() is None for process in running):
        time.sleep(0.1)
        if caught and not told:
            told = True
            for process in running:
                process.send_signal(caught[0])
