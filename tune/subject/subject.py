"""Interface of a subject, which is what the arms of a study train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tune.study.cell import Cell

if TYPE_CHECKING:
    from pagating.checkpoint import CheckpointFolder

TRAINED = "trained"  # folder of a trained model, inside its cell's folder of checkpoints
# A step is (updates made, the evaluation or None). None instead of a step is a heartbeat within an update.
# The last evaluation holds the trial's result under `final`.
Step = tuple[int, dict[str, Any] | None]
Train = Callable[[Any, "CheckpointFolder | None", Path | None], Iterator[Step | None]]


class Subject(Protocol):
    """The thing that the arms of a study train. Workers receive its trials and its `train` pickled."""

    def identity(self) -> dict[str, Any]:
        """Return the fields of the ledger's first event. They are the digests of all inputs of a result."""
        ...

    def check_begun(self, begun: Mapping[str, Any]) -> None:
        """Raise StudyError if the study was started with another subject. `begun` is the ledger's first event."""
        ...

    def trial(self, cell: Cell) -> Any:
        """Return the trial of a cell, the first argument of `train`."""
        ...

    def train(self, trial: Any, checkpoints: CheckpointFolder | None, model: Path | None) -> Iterator[Step | None]:
        """Train a trial in a worker.

        Args:
            trial: Return value of the method `trial`.
            checkpoints: Folder of checkpoints, to continue from and to write to. None keeps no checkpoints.
            model: Folder for the trained model. None keeps no model.

        Yields:
            Steps and heartbeats.

        Raises:
            Diverged, OutOfMemory: The trial is infeasible.
            CorpusError, OSError: The machine failed.
        """
        ...


@dataclass(frozen=True)
class Job:
    """One attempt at a cell, sent to a worker.

    Attributes:
        cell: Key of the cell.
        trial: First argument of `train`.
        train: The subject's training function.
        checkpoints: Absolute path of the cell's folder of checkpoints. None keeps no checkpoints.
        steps: Number of updates of the whole trial.
        keep_checkpoints: Keep the last checkpoints after the trial has ended.
        keep_model: Save the trained model in the folder of checkpoints.
    """

    cell: str
    trial: Any
    train: Train
    checkpoints: str | None
    steps: int
    keep_checkpoints: bool = False
    keep_model: bool = False
