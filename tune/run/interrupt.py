"""Signals: asked once, a study stops in good order; asked twice, at once. Either way the same command continues it."""

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
PATIENCE = 8.5  # seconds for an orderly stop: whoever asks twice, or has Ray's processes killed too, waits no longer


class Interruption:
    """Takes SIGINT (Ctrl-C), SIGTERM and SIGHUP while it is entered; a signal that was ignored before stays ignored.

    Inside `orderly` the first signal is only noted in `caught`, for whoever looks; elsewhere it raises
    KeyboardInterrupt. A second signal, or an orderly stop that takes longer than `PATIENCE`, ends the process without
    any cleaning up, which the ledger withstands; Ray's processes end with it.
    """

    def __init__(self, say: Callable[[str], None], last: Callable[[str], None] | None = None) -> None:
        """`say` shows a line to the user, `last` the one after which nothing is shown any more (`say` when None)."""
        self.caught: int | None = None
        self._say, self._last, self._orderly = say, last or say, False
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.caught or signal.SIGINT)

    def __enter__(self) -> Interruption:
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer:
            self._timer.cancel()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """While it lasts, the first signal is a wish that the caller looks after."""
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
        self._say("Stopping: running trials save a checkpoint, a matter of seconds. A second signal stops at once.")

    def _leave(self, signum: int) -> None:
        """End without cleaning up: the ledger is whole after every line, and Ray's processes end with this one."""
        self._last("Stopped at once. What has ended is kept; the same command continues from there.")
        sys.stdout.flush()
        os._exit(128 + signum)
