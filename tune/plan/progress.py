"""Progress of work that is no study, and its time left, on standard error."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeVar

from analysis.io.text import duration

T = TypeVar("T")
TICK_SECONDS = 1.0  # between two drawings of a line on a terminal
SILENT_SECONDS = 30.0  # elsewhere a line follows after this time without any
ERASE = "\r\x1b[K"


class Progress:
    """Line that is written again on a terminal; elsewhere a new line now and then. A context manager.

    Args:
        stream: Where it is shown, such as standard error. None shows nothing.
        ticks: Keep the time up to date from a thread of its own. False for a process that forks: then the line changes
            after each part only.
    """

    def __init__(self, stream: IO[str] | None = None, ticks: bool = True) -> None:
        self._stream, self._ticks = stream, ticks
        self._live = bool(stream and stream.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown"))
        self._lock, self._over = threading.RLock(), threading.Event()
        self._expected: float | None = None
        self._what, self._parts, self._done, self._began, self._ended, self._shown = "", 0.0, 0.0, 0.0, 0.0, 0.0

    def __enter__(self) -> Progress:
        if self._stream and self._ticks:
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._lock:
            self._erase()
            self._what = ""
            self._over.set()
            if self._stream and kind is KeyboardInterrupt:
                print("Interrupted.", file=self._stream, flush=True)

    def begin(self, what: str, parts: float, seconds: float | None = None) -> None:
        """Begin work.

        Args:
            what: Its name.
            parts: Number of its parts.
            seconds: Expected duration until a part has ended, which tells it better.
        """
        with self._lock:
            self._what, self._parts, self._expected, self._done = what, parts, seconds, 0.0
            self._began = self._ended = self._shown = time.monotonic()
            self._draw()

    def done(self, parts: float = 1) -> None:
        """Count parts that have ended. Any thread may call this."""
        with self._lock:
            self._done, self._ended = self._done + parts, time.monotonic()
            self._draw()

    def each(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """Yield items, each of which is a part of the work."""
        every = list(items)
        self.begin(what, len(every))
        for item in every:
            yield item
            self.done()

    def say(self, line: str, stream: IO[str] | None = None) -> None:
        """Print a line that stays, on the given stream or on that of the progress."""
        with self._lock:
            self._erase()
            if to := stream or self._stream:
                print(line, file=to, flush=True)
            self._shown = time.monotonic()
            self._draw()

    def line(self) -> str:
        """Return the line: the work, its parts that have ended, the time so far and the time left, if it is known."""
        now = time.monotonic()
        whole = (self._ended - self._began) * self._parts / self._done if self._done else self._expected
        left = None if whole is None else whole - (now - self._began)
        rest = f", about {duration(left)} left" if left is not None and left > 0 else ""
        return f"{self._what}: {self._done:.0f} of {self._parts:.0f}, {duration(now - self._began)} so far{rest}"

    def _draw(self) -> None:
        if not self._stream or not self._what:
            return
        if self._live:
            self._stream.write(ERASE + self.line()[: _columns(self._stream) - 1])
            self._stream.flush()
        elif time.monotonic() - self._shown >= SILENT_SECONDS:
            self._shown = time.monotonic()
            print(self.line(), file=self._stream, flush=True)

    def _erase(self) -> None:
        if self._stream and self._live and self._what:
            self._stream.write(ERASE)
            self._stream.flush()

    def _tick(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self._lock:
                self._draw()


def on_stderr(ticks: bool = True) -> Progress:
    """Return the progress of a command."""
    return Progress(sys.stderr, ticks)


def _columns(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
