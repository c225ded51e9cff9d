"""Ends of a sweep's process that it did not choose: a last line if it dies, and a new start if its Ray is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def restart(screen: Screen, last_line: LastLine) -> Callable[[str, StudyRun], None]:
    """Return a function that replaces this process by the same command, which continues the study with a new Ray.

    After `MOST_RESTARTS` restarts without a new evaluation it ends this process with exit code 1. A new Ray in the same
    process is not possible: calls to the lost one may block for ever, and its library ends the process after a minute.
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
        screen.warn(f"{reason}; Ray is started again, and the trials go on from their checkpoints")
        screen.restore()
        last_line.dismiss()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    return again
