"""Display of a running study: a live table on a terminal, plain lines elsewhere. Output of libraries goes to a log."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.text import Text

from analysis.io.text import duration, one_line, redact
from tune.cli.status_table import View, as_object, pace
from tune.run.study_run import CellEnded, StudyRun
from tune.study.study import Study

REFRESH_SECONDS = 0.5  # shortest time between two drawings of the table after an event
CLOCK_SECONDS = 5.0  # the same without an event, to update the time left
SILENT_SECONDS = 600.0  # without a table, a line on the progress follows after this time without any line
CONTINUES = "Ctrl-C stops cleanly; the same command continues."


def plain(event: CellEnded) -> str:
    """Return one line on a cell that ended."""
    cell = event.cell
    left = event.seconds_left or 0.0
    left_text = f", about {duration(left)} left" if left > 60 else ""
    loss = f"{event.metric} {event.loss:.4f}" if event.loss < float("inf") else f"no {event.metric}"
    outcome = "" if event.outcome == "completed" else f", {event.outcome.replace('_', ' ')}"
    rung = f"rung {cell.rung} " if cell.rung else ""
    what = f"{rung}{cell.stage} {cell.arm}{event.setting} seed={cell.seed}"
    return f"[{event.ended}/{event.total}] {what}: {loss}{outcome}{left_text}"


def of_cell(event: CellEnded) -> dict[str, Any]:
    """Return a cell that ended as an object of JSON. Its loss is null if it has none."""
    cell = event.cell
    return {
        "cell": cell.key,
        **({"rung": cell.rung} if cell.rung else {}),
        **{name: getattr(cell, name) for name in ("stage", "arm", "seed", "config")},
        "outcome": event.outcome,
        event.metric: event.loss if math.isfinite(event.loss) else None,
        "ended": event.ended,
        "total": event.total,
        "seconds_left": event.seconds_left,
    }


class Screen:
    """Display of a run of a study.

    Args:
        browse: Command that shows the trials, empty if they are not logged.
        as_json: Print a JSON object per event instead of lines and tables, for a program that reads them.
    """

    def __init__(self, browse: str = "", as_json: bool = False) -> None:
        self._browse, self.as_json = browse, as_json
        self._out, self._err = sys.stdout, sys.stderr
        self._live: Live | None = None
        self._view: View | None = None
        self._drawing = self._again = False
        self._drawn = -math.inf
        self._last_line = -math.inf  # time of the last plain line
        self._events = 0  # number of events in the ledger at the last drawing

    # --- lines ---

    def ended(self, event: CellEnded) -> None:
        """Print a line on a cell that ended, unless a table is shown."""
        if self.as_json:
            self.event("cell", **of_cell(event))
        elif not self._live:
            self._line(plain(event))

    def begun(self, study: Study) -> None:
        """Print the name and the question of a study that begins or continues."""
        if self.as_json:
            self.event("begin", study=study.name, question=study.question)
        else:
            self._line(f"{study.name}: {study.question}")

    def event(self, event: str, **fields: Any) -> None:
        """Print an event as one line of JSON, if the display is for a program."""
        if self.as_json:
            moment = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._line(json.dumps({"event": event, "time": moment, **fields}, default=str))

    def _line(self, line: str) -> None:
        self._last_line = time.monotonic()
        print(line, file=self._out, flush=True)

    def warn(self, line: str) -> None:
        """Print a warning. It stays above the table."""
        line = one_line(redact(line))
        self.event("warning", text=line)
        if self._live and self._err.isatty():
            self._live.console.print(Text(f"Warning: {line}"), soft_wrap=True)
        else:
            print(f"Warning: {line}", file=self._err, flush=True)

    def say(self, line: str) -> None:
        """Print a line on what happens next, below the table. A signal handler may call this during a drawing."""
        if self._view and self._live:
            self._view.note = line
            self._draw()
        else:
            with suppress(OSError):  # the terminal may be closed, and the study still has to stop cleanly
                print(line, file=self._err, flush=True)

    def last(self, line: str) -> None:
        """Print the last line before the process ends without cleanup."""
        os.write(self._err.fileno(), f"{os.linesep if self._live else ''}{line}{os.linesep}".encode())

    def restore(self) -> None:
        """Give descriptors 1 and 2 back to the terminal, because another program replaces this one."""
        for number, stream in ((1, self._out), (2, self._err)):
            with suppress(OSError, ValueError):
                stream.flush()
                os.dup2(stream.fileno(), number)

    def _report_progress(self, run: StudyRun) -> None:
        if time.monotonic() - self._last_line >= SILENT_SECONDS:
            view = View(run.progress, time.time(), run.slots_now)
            if self.as_json:
                self.event("progress", **as_object(view))
            else:
                self._line(f"{view.progress.ended} cells have ended; {pace(view)}")

    # --- the table ---

    @contextmanager
    def watch(self, run: StudyRun) -> Iterator[None]:
        """Show a run inside the `with` block. Redirect output of libraries to the study's `logs/libraries.log`."""
        logs = run.folder / "logs"
        logs.mkdir(exist_ok=True)
        with libraries_to(logs / "libraries.log") as (self._out, self._err):
            try:
                if is_live_stream(self._out) and not self.as_json:
                    with self._table(run, logs):
                        yield
                else:
                    self._last_line, run.on_heartbeat = time.monotonic(), lambda: self._report_progress(run)
                    yield
            finally:
                run.on_heartbeat = None
                self._out, self._err = sys.stdout, sys.stderr

    @contextmanager
    def _table(self, run: StudyRun, logs: Path) -> Iterator[None]:
        lines = [f"Log:     {logs}"] + ([f"Browse:  {self._browse}"] if self._browse else [])
        note = f"Starting. {CONTINUES}"
        self._view = View(run.progress, time.time(), lines=lines, note=note, title=False, fit=True)
        console = Console(file=self._out, highlight=False)
        with Live(
            self._view, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            console.show_cursor(True)  # so that the cursor is visible however this process ends
            self._live, run.on_heartbeat = live, lambda: self._tick(run)
            try:
                yield
            finally:
                self._view.note = ""
                self._update(run)
                self._live = None

    def _tick(self, run: StudyRun) -> None:
        passed = time.monotonic() - self._drawn
        quiet = self._events == len(run.ledger.events)
        if self._view is None or passed < (CLOCK_SECONDS if quiet else REFRESH_SECONDS):
            return
        if not (quiet or run.stopping):  # a note on the start or a wait goes away
            self._view.note = CONTINUES
        self._update(run)

    def _update(self, run: StudyRun) -> None:
        if self._view:
            self._events = len(run.ledger.events)
            self._view.progress, self._view.now, self._view.slots = run.progress, time.time(), run.slots_now
            self._draw()

    def _draw(self) -> None:
        """Draw the table. A call during a drawing, from a signal handler, draws it once more afterwards."""
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
        except OSError:  # the terminal is closed; the study continues without it
            self._live.console.file, self._live = open(os.devnull, "w"), None  # noqa: SIM115 (until the process ends)
        finally:
            self._drawing = False

    @staticmethod
    def _fit(console: Console) -> None:
        """Set the terminal's current size. rich would ask the standard streams, which are redirected to the log."""
        columns, lines = os.get_terminal_size(console.file.fileno())
        if columns and lines and not {"COLUMNS", "LINES"} & set(os.environ):
            console.size = ConsoleDimensions(columns, lines)


def is_live_stream(stream: IO[str]) -> bool:
    """Return True if a stream is a terminal that can redraw its text."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


@contextmanager
def libraries_to(log: Path) -> Iterator[tuple[Any, Any]]:
    """Redirect file descriptors 1 and 2, including those of child processes, to `log`; yield copies of the originals.

    An empty log is removed at exit.
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
            with suppress(OSError):  # a closed terminal
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
    """Copy a descriptor, so that children do not inherit it. If it is closed, open the null device instead."""
    try:
        return os.dup(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
