"""Ends of a run before its study has finished: by a signal, or by a time budget. The same command continues it.

The first signal stops a study cleanly, the second at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 8.5  # seconds that a clean stop may take, then the process ends at once


class Interruption:
    """Handler of SIGINT (Ctrl-C), SIGTERM and SIGHUP, used as a context manager.

    A signal that was ignored before stays ignored. Inside `orderly` the first signal is only stored in `caught`.
    Outside it raises KeyboardInterrupt. A second signal ends the process without cleanup, and so does a stop that takes
    longer than `PATIENCE`. The ledger stays valid, and Ray's processes end too.

    Args:
        say: Called with a line for the user.
        last: Called with the last line before the process ends. None means `say`.
    """

    def __init__(self, say: Callable[[str], None], last: Callable[[str], None] | None = None) -> None:
        self.caught: int | None = None
        self.expired = False
        self._limit: threading.Timer | None = None
        self._say, self._last, self._orderly = say, last or say, False
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    @property
    def exit_code(self) -> int:
        """Exit code of an interrupted command, 128 + the signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.caught or signal.SIGINT)

    @property
    def stopping(self) -> bool:
        """True if a signal was caught or the time is over: no cell may start, and the running ones have to stop."""
        return self.caught is not None or self.expired

    def end_after(self, seconds: float) -> None:
        """Set `expired` after a time in seconds. The stop that follows may take as long as it needs."""
        self._limit = threading.Timer(seconds, self._expire)
        self._limit.daemon = True
        self._limit.start()

    def _expire(self) -> None:
        self.expired = True

    def __enter__(self) -> Interruption:
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for timer in filter(None, (self._timer, self._limit)):
            timer.cancel()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Store the first signal in `caught` instead of raising. The caller has to check it and stop."""
        for signum in self._before:
            signal.signal(signum, self._take)  # Ray sets its own handlers when it starts
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            self._leave(signum)
        self.caught = signum
        if not self._orderly:
            raise KeyboardInterrupt
        self._timer = threading.Timer(PATIENCE, self._leave, [signum])
        self._timer.daemon = True
        self._timer.start()
        self._say("Stopping: running trials save a checkpoint, which takes seconds. A second signal stops at once.")

    def _leave(self, signum: int) -> None:
        """End the process without cleanup. The ledger is valid after every line, and Ray's processes end too."""
        self._last("Stopped at once. What has ended is kept; the same command continues from there.")
        sys.stdout.flush()
        os._exit(128 + signum)


class CallersInterruption(Interruption):
    """Handler of SIGINT for a call inside a process that goes on, such as a notebook's.

    A second signal raises KeyboardInterrupt instead of ending the process. Outside the main thread nothing is handled.
    """

    def __enter__(self) -> CallersInterruption:
        mine = threading.current_thread() is threading.main_thread()
        if mine and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._take)
        return self

    def _take(self, signum: int, frame: FrameType | None) -> None:
        again, self.caught = self.caught is not None, signum
        if again or not self._orderly:
            raise KeyboardInterrupt
        self._say("Stopping: what has ended is kept, and the same call continues. A second interrupt stops at once.")
