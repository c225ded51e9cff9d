"""What a person sees while a study runs: one live table on a terminal, plain lines elsewhere, and no library's talk."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.text import Text

from analysis.io.text import duration, one_line, redact
from tune.cli.status_table import View, pace
from tune.run.study_run import Progress, StudyRun

REFRESH_SECONDS = 0.5  # between two looks of the table, when something has happened
CLOCK_SECONDS = 5.0  # the same when nothing has: the time left goes on
SILENT_SECONDS = 600.0  # without a line of its own, where there is no table, and it says that it goes on
CONTINUES = "Ctrl-C stops in good order; the same command continues."


def plain(progress: Progress) -> str:
    """One line on a cell that ended."""
    cell = progress.cell
    alpha = f" alpha={cell.config['alpha']:.2f}" if "alpha" in cell.config else ""
    left = progress.seconds_left or 0.0
    left_text = f", about {duration(left)} left" if left > 60 else ""
    loss = f"val_nll {progress.loss:.4f}" if progress.loss < float("inf") else "no loss"
    outcome = "" if progress.outcome == "completed" else f", {progress.outcome.replace('_', ' ')}"
    what = f"{cell.stage} {cell.arm} lr={cell.config['lr']:.1e}{alpha} seed={cell.seed}"
    return f"[{progress.ended}/{progress.total}] {what}: {loss}{outcome}{left_text}"


class Screen:
    """Shows a run of a study. `browse`: what a user types to see the trials, empty where they are not logged."""

    def __init__(self, browse: str = "") -> None:
        self._browse = browse
        self._out, self._err = sys.stdout, sys.stderr
        self._live: Live | None = None
        self._view: View | None = None
        self._drawing = self._again = False
        self._drawn = -math.inf
        self._said = -math.inf  # when the last plain line was
        self._events = 0  # of the ledger, when the table was drawn last

    # --- what is said ---

    def ended(self, progress: Progress) -> None:
        """A cell has ended: a line of its own where there is no table."""
        if not self._live:
            self._line(plain(progress))

    def _line(self, line: str) -> None:
        self._said = time.monotonic()
        print(line, file=self._out, flush=True)

    def warn(self, line: str) -> None:
        """Something that the user should know; it stays above the table."""
        line = one_line(redact(line))
        if self._live and self._err.isatty():
            self._live.console.print(Text(f"Warning: {line}"), soft_wrap=True)
        else:
            print(f"Warning: {line}", file=self._err, flush=True)

    def say(self, line: str) -> None:
        """What happens next, under the table: also from a signal's handler, in the midst of a drawing."""
        if self._view and self._live:
            self._view.note = line
            self._draw()
        else:
            with suppress(OSError):  # the terminal may be what is gone, and the study has to stop in good order
                print(line, file=self._err, flush=True)

    def last(self, line: str) -> None:
        """The last line before the process ends without any cleaning up."""
        os.write(self._err.fileno(), f"{os.linesep if self._live else ''}{line}{os.linesep}".encode())

    def _goes_on(self, run: StudyRun) -> None:
        if time.monotonic() - self._said >= SILENT_SECONDS:
            view = View(run.standing, time.time(), run.room)
            self._line(f"{view.standing.ended} cells have ended; {pace(view)}")

    # --- the table ---

    @contextmanager
    def watch(self, run: StudyRun) -> Iterator[None]:
        """While it lasts the run is shown, and what libraries write goes to `logs/libraries.log` of the study."""
        logs = run.folder / "logs"
        logs.mkdir(exist_ok=True)
        with libraries_to(logs / "libraries.log") as (self._out, self._err):
            try:
                if is_live_stream(self._out):
                    with self._table(run, logs):
                        yield
                else:
                    self._said, run.on_pulse = time.monotonic(), lambda: self._goes_on(run)
                    yield
            finally:
                run.on_pulse = None
                self._out, self._err = sys.stdout, sys.stderr

    @contextmanager
    def _table(self, run: StudyRun, logs: Path) -> Iterator[None]:
        lines = [f"Log:     {logs}"] + ([f"Browse:  {self._browse}"] if self._browse else [])
        note = f"Starting. {CONTINUES}"
        self._view = View(run.standing, time.time(), lines=lines, note=note, title=False, fit=True)
        console = Console(file=self._out, highlight=False)
        with Live(
            self._view, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            console.show_cursor(True)  # whatever ends this process leaves a terminal that can be typed in
            self._live, run.on_pulse = live, lambda: self._tick(run)
            try:
                yield
            finally:
                self._view.note = ""
                self._look(run)
                self._live = None

    def _tick(self, run: StudyRun) -> None:
        passed = time.monotonic() - self._drawn
        quiet = self._events == len(run.ledger.events)
        if self._view is None or passed < (CLOCK_SECONDS if quiet else REFRESH_SECONDS):
            return
        if self._view.note.startswith("Starting"):
            self._view.note = CONTINUES
        self._look(run)

    def _look(self, run: StudyRun) -> None:
        if self._view:
            self._events = len(run.ledger.events)
            self._view.standing, self._view.now, self._view.slots = run.standing, time.time(), run.room
            self._draw()

    def _draw(self) -> None:
        """Draw the table; asked for by a signal in the midst of it, once more after it."""
        self._again = True
        if self._drawing or self._live is None:
            return
        self._drawing = True
        try:
            while self._again:
                self._again = False
                self._drawn = time.monotonic()
                self._fit(self._live.console)
                self._live.refresh()
        except OSError:  # the terminal is gone; the study goes on without it
            self._live.console.file, self._live = open(os.devnull, "w"), None  # noqa: SIM115 (until the process ends)
        finally:
            self._drawing = False

    @staticmethod
    def _fit(console: Console) -> None:
        """Take the terminal's size anew: rich asks the standard streams, and those are the log now."""
        columns, lines = os.get_terminal_size(console.file.fileno())
        if columns and lines and not {"COLUMNS", "LINES"} & set(os.environ):
            console.size = ConsoleDimensions(columns, lines)


def is_live_stream(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that can redraw what it shows."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


@contextmanager
def libraries_to(log: Path) -> Iterator[tuple[Any, Any]]:
    """Copies of standard output and error; whoever else writes to either, a child process too, writes to `log`.

    An empty log is removed in the end.
    """
    standard = [stream for stream in (sys.stdout, sys.stderr) if stream]
    for stream in standard:
        stream.flush()
    copies = [_copy(1), _copy(2)]
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    encodings = [getattr(stream, "encoding", None) or "utf-8" for stream in (sys.stdout, sys.stderr)]
    own = [
        open(os.dup(copy), "w", encoding=encoding, errors="backslashreplace", buffering=1)  # noqa: SIM115 (closed below)
        for copy, encoding in zip(copies, encodings, strict=True)
    ]
    try:
        yield own[0], own[1]
    finally:
        for stream in (*standard, *own):
            with suppress(OSError):  # a terminal that is gone takes nothing more
                stream.flush()
        for number, copy in zip((1, 2), copies, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        for stream in own:
            with suppress(OSError):
                stream.close()
        if log.exists() and not log.stat().st_size:
            log.unlink()


def _copy(descriptor: int) -> int:
    """A copy of a descriptor that children do not inherit; of the null device where it is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
