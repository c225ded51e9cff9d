"""The interface of a subject: what the arms of a study train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tune.study.cell import Cell

if TYPE_CHECKING:
    from pagating.checkpoint import CheckpointFolder

TRAINED = "trained"  # folder of a trained model, in the folder of its cell's checkpoints
# A step is (updates made, the evaluation or None); None alone is a sign of life within an update. The last evaluation
# holds the trial's result under `final`.
Step = tuple[int, dict[str, Any] | None]
Train = Callable[[Any, "CheckpointFolder | None", Path | None], Iterator[Step | None]]


class Subject(Protocol):
    """What the arms of a study train. Its trials and its `train` are sent to workers, so both can be pickled."""

    def identity(self) -> dict[str, Any]:
        """Return the fields of the ledger's first event: digests of everything that a result depends on."""
        ...

    def check_begun(self, begun: Mapping[str, Any]) -> None:
        """Raise StudyError if a study was begun on another subject; `begun` is the ledger's first event."""
        ...

    def trial(self, cell: Cell) -> Any:
        """Return the description of a cell's training that `train` takes."""
        ...

    def train(self, trial: Any, checkpoints: CheckpointFolder | None, model: Path | None) -> Iterator[Step | None]:
        """Train a trial; runs in a worker.

        Args:
            trial: What `trial` returned.
            checkpoints: The folder of its checkpoints, to go on from and to write to; None keeps none.
            model: The folder for the trained model; None leaves none.

        Yields:
            Steps and signs of life.

        Raises:
            Diverged, OutOfMemory: The trial is infeasible.
            CorpusError, OSError: Its machine failed.
        """
        ...


@dataclass(frozen=True)
class Job:
    """One attempt at a cell, as a worker gets it.

    Attributes:
        cell: Key of the cell.
        trial: What `train` trains.
        train: The subject's training function.
        checkpoints: Absolute path of the cell's folder of checkpoints; None keeps none.
        steps: Updates of the whole trial.
        keep_checkpoints: Keep the last checkpoints after the trial has ended.
        keep_model: Leave the trained model in the folder of checkpoints.
    """

    cell: str
    trial: Any
    train: Train
    checkpoints: str | None
    steps: int
    keep_checkpoints: bool = False
    keep_model: bool = False
