"""Interface of a backend, which runs the cells of a study."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tune.run.study_run import StudyRun
from tune.study.study import Study


class Backend(Protocol):
    """Runner of the cells of a study. One object serves one sweep."""

    @property
    def slots(self) -> int:
        """Number of trials that run in parallel, as far as it is known before the start."""
        ...

    def check(self, study: Study) -> None:
        """Check that this machine can run the study. Nothing is started or written.

        Raises:
            StudyError: A trial asks for more than this machine has.
            StudyStopped: A limit of this machine keeps the backend from starting.
        """
        ...

    def start(self, study: Study, beside: Callable[[], None]) -> None:
        """Start the processes that trials need. A second call does nothing.

        Args:
            study: The study.
            beside: Called while those processes start. If it raises, they are stopped again.

        Raises:
            StudyStopped: The processes did not start.
        """
        ...

    def train(self, run: StudyRun) -> None:
        """Train every missing cell. Return if none is left or if the run has to stop.

        Raises:
            StudyStopped: The study cannot continue.
        """
        ...

    def stop(self) -> None:
        """Stop the processes that `start` started. Do nothing if there are none."""
        ...
