"""Ends of a sweep's process: a last line if it dies, a new start if its Ray is lost, and the user's command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.io.exits import Exit

if TYPE_CHECKING:
    from tune.cli.screen import Screen
    from tune.run.study_run import StudyRun

DIED = (
    "pagating: the sweep's process ended without a word: it was killed, or a library ended it. "
    "What has ended is kept; the same command continues from there."
)
# It prints its first argument if its standard input ends without a line, that is, if the process that started it died
WATCHER = "trap '' INT TERM HUP QUIT; read -r word || printf '%s\\n' \"$0\" >&2"
LOST = "PAGATING_RAY_LOST"  # number of restarts without a new evaluation, and the number of evaluations at the last one
ENDS = "PAGATING_ENDS"  # end of the time budget of a sweep that was started again, in seconds since 1970
MOST_RESTARTS = 3


class LastLine:
    """Watcher process that prints a line if this process dies without a word. It is a shell, of 1 MB."""

    def __init__(self) -> None:
        self._watcher: subprocess.Popen[bytes] | None = None

    @contextmanager
    def watching(self) -> Iterator[LastLine]:
        """Watch this process inside the block."""
        with suppress(OSError):  # no shell, or no process more is allowed: then nothing is watched
            self._watcher = subprocess.Popen(["sh", "-c", WATCHER, DIED], stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield self
        finally:
            self.dismiss()

    def dismiss(self) -> None:
        """End the watcher, because this process ends as it chose to."""
        if self._watcher and self._watcher.stdin:
            with suppress(OSError):  # somebody killed it
                self._watcher.stdin.write(b"end\n")
                self._watcher.stdin.close()
            self._watcher.wait()
            self._watcher = None


class State(StrEnum):
    """How a sweep ended."""

    FINISHED = "finished"
    UNFINISHED = "unfinished"  # its time budget is over
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # by a signal; the user's command does not run


def run_then(command: str, folder: Path, state: State, code: int) -> str:
    """Run a shell command after a sweep has ended; return a line if it fails, else "".

    Args:
        command: The command. It reads the rest as PAGATING_STUDY, PAGATING_FOLDER, PAGATING_STATE and PAGATING_EXIT.
        folder: Folder of the study.
        state: How it ended.
        code: Exit code of the sweep.
    """
    told = {"STUDY": folder.name, "FOLDER": str(folder.resolve()), "STATE": state, "EXIT": str(int(code))}
    env = {**os.environ, **{f"PAGATING_{name}": value for name, value in told.items()}}
    ended = subprocess.run(["sh", "-c", command], env=env, check=False)
    return f"--then: the command ended with exit code {ended.returncode}" if ended.returncode else ""


def seconds_left(budget: float) -> float:
    """Return what is left of a time budget in seconds, at the start of a sweep or after it was started again."""
    ends = os.environ.pop(ENDS, None)
    return max(1e-3, float(ends) - time.time()) if ends else budget


def restart(screen: Screen, last_line: LastLine, ends: float | None = None) -> Callable[[str, StudyRun], None]:
    """Return a function that replaces this process by the same command, which continues the study with a new Ray.

    After `MOST_RESTARTS` restarts without a new evaluation it ends this process with exit code 1. A new Ray in the same
    process is not possible: calls to the lost one may block for ever, and its library ends the process after a minute.
    `ends` is the end of the time budget in seconds since 1970, which the new process keeps.
    """

    def again(reason: str, run: StudyRun) -> None:
        evaluations = sum(event["event"] == "report" for event in run.ledger.events)
        count, _, before = os.environ.get(LOST, "0:-1").partition(":")
        restarts = int(count) if evaluations <= int(before) else 0
        if restarts >= MOST_RESTARTS:
            screen.last(f"pagating: {reason}, {MOST_RESTARTS + 1} times without progress; the same command continues")
            last_line.dismiss()
            os._exit(Exit.COULD_NOT)
        os.environ[LOST] = f"{restarts + 1}:{evaluations}"
        if ends:
            os.environ[ENDS] = f"{ends:f}"
        screen.warn(f"{reason}; Ray is started again, and the trials go on from their checkpoints")
        screen.restore()
        last_line.dismiss()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    return again
