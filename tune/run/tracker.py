"""Interface of a tracker, which shows the cells of a run elsewhere, for example in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tune.study.cell import Record


class Tracker(Protocol):
    """Display of cells outside this program.

    No method except `close` and `finish` waits, and none raises, so that a dead tracking server costs the trials
    nothing.
    """

    def started(self, record: Record) -> None:
        """Show that a cell starts or restarts."""
        ...

    def reported(self, record: Record, row: dict[str, Any]) -> None:
        """Show a new evaluation of a cell."""
        ...

    def ended(self, record: Record) -> None:
        """Show the outcome of a cell."""
        ...

    def close(self, records: Iterable[Record], *, finished: bool, patience: float, warn: Callable[[str], None]) -> None:
        """Write everything that is not written yet.

        Args:
            records: All cells of the study, including those of earlier runs.
            finished: The study is finished. Then wait for a slow store as long as it makes progress.
            patience: Seconds to wait for a store that makes no progress.
            warn: Called with one line if this method waits for the store.
        """
        ...

    def finish(self, verdict: dict[str, Any]) -> str | None:
        """Write the verdict of a finished study; return a line on everything that could not be written, or None."""
        ...


class NoTracker:
    """Tracker that shows nothing."""

    def started(self, record: Record) -> None:
        """Do nothing."""

    def reported(self, record: Record, row: dict[str, Any]) -> None:
        """Do nothing."""

    def ended(self, record: Record) -> None:
        """Do nothing."""

    def close(self, records: Iterable[Record], *, finished: bool, patience: float, warn: Callable[[str], None]) -> None:
        """Do nothing."""

    def finish(self, verdict: dict[str, Any]) -> str | None:
        """Return None, because nothing has to be written."""
        return None
