"""The interface of a tracker: where a run shows its cells while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tune.study.cell import Record


class Tracker(Protocol):
    """Shows cells elsewhere. No method waits or raises: a dead tracking server must cost the trials nothing."""

    def started(self, record: Record) -> None:
        """Show that a cell starts, perhaps again."""
        ...

    def reported(self, record: Record, row: dict[str, Any]) -> None:
        """Show a new evaluation of a cell."""
        ...

    def ended(self, record: Record) -> None:
        """Show how a cell ended."""
        ...

    def close(self, records: Iterable[Record], *, finished: bool, patience: float, warn: Callable[[str], None]) -> None:
        """Write what is left.

        Args:
            records: All cells of the study, those of earlier runs too.
            finished: Whether the study is finished: then a store that lags behind is waited for while it gets on.
            patience: Seconds to wait for a store that does not.
            warn: Called with a line if the store is waited for.
        """
        ...

    def finish(self, verdict: dict[str, Any]) -> str | None:
        """Write the verdict of a finished study; return a line on what could not be written, or None."""
        ...


class NoTracker:
    """Shows nothing."""

    def started(self, record: Record) -> None:
        """Do nothing."""

    def reported(self, record: Record, row: dict[str, Any]) -> None:
        """Do nothing."""

    def ended(self, record: Record) -> None:
        """Do nothing."""

    def close(self, records: Iterable[Record], *, finished: bool, patience: float, warn: Callable[[str], None]) -> None:
        """Do nothing."""

    def finish(self, verdict: dict[str, Any]) -> str | None:
        """Return None: nothing is owed to anyone."""
        return None
