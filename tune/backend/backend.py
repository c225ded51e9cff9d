"""The interface of a backend: who runs the cells of a study."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tune.run.study_run import StudyRun
from tune.study.study import Study


class Backend(Protocol):
    """Runs the cells of a study. One object serves one sweep."""

    @property
    def slots(self) -> int:
        """Trials side by side, as far as that is known before the start."""
        ...

    def start(self, study: Study, beside: Callable[[], None]) -> None:
        """Start what trials need, once; a second call does nothing.

        Args:
            study: The study.
            beside: Called while the start waits for others. If it raises, nothing stays started.

        Raises:
            StudyStopped: It did not start.
        """
        ...

    def train(self, run: StudyRun) -> None:
        """Train every missing cell; return if none is left, or if the run is to stop.

        Raises:
            StudyStopped: The study cannot go on.
        """
        ...

    def stop(self) -> None:
        """End what `start` started; do nothing if that is nothing."""
        ...
