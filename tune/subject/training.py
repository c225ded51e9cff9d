"""Train one job step by step: the one place that turns an error of a trial into an outcome."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagating.checkpoint import CheckpointFolder
from pagating.data.texts import CorpusError
from pagating.trial import Diverged, OutOfMemory
from tune.subject.subject import TRAINED, Job, Step

BEAT_SECONDS = 2.0  # longest time without a result while a trial makes steps
WITHIN_SECONDS = 2.0  # the same within a long step, between its micro-batches and batches of an evaluation
ENDS = {Diverged: "infeasible", OutOfMemory: "infeasible", CorpusError: "failed", OSError: "failed"}


class Training:
    """The training of one job.

    Args:
        job: The job.
        refused: An error that keeps the job from starting, such as a corpus that could not be fetched.
    """

    def __init__(self, job: Job, refused: Exception | None = None) -> None:
        self._job = job
        folder = Path(job.checkpoints) if job.checkpoints else None
        self._checkpoints = CheckpointFolder(folder, keep=job.keep_checkpoints) if folder else None
        model = folder / TRAINED if folder and job.keep_model else None
        self._steps = _raising(refused) if refused else job.train(job.trial, self._checkpoints, model)
        self._made = 0
        self.outcome: str | None = None

    def advance(self) -> dict[str, Any]:
        """Train until the next evaluation or sign of life.

        Returns:
            `row` (the evaluation, or None), `fraction` of the budget, `step` (updates made); with the last one
            `outcome`, `final` and `reason`; `warning` if there is something to say.
        """
        result = self._advance()
        self.outcome = result.get("outcome")
        if self._checkpoints and self._checkpoints.notes:
            result["warning"] = "; ".join(self._checkpoints.notes)
            self._checkpoints.notes.clear()
        return result

    def _advance(self) -> dict[str, Any]:
        try:
            self._made, row = self._until_a_sign()
        except tuple(ENDS) as error:
            outcome = next(outcome for kind, outcome in ENDS.items() if isinstance(error, kind))
            return {"outcome": outcome, "reason": str(error), "row": None, "final": {}, "fraction": 1.0}
        final = row.pop("final", None) if row else None
        result = {"row": row, "fraction": self._made / self._job.steps, "step": self._made}
        return {**result, "outcome": "completed", "reason": None, "final": final} if final else result

    def _until_a_sign(self) -> Step:
        began, made = time.monotonic(), self._made
        for found in self._steps:
            spent = time.monotonic() - began
            if found is None:
                if spent >= WITHIN_SECONDS:
                    break
                continue
            made, row = found
            if row or spent >= BEAT_SECONDS:
                return found
        return made, None

    def cut_off(self) -> None:
        """Stop for good. A trial that was cut off leaves a checkpoint; one that failed leaves those that it has."""
        if self.outcome not in (None, "failed"):
            self.forget()
        elif self._checkpoints and self.outcome is None:
            self._checkpoints.request()
            with contextlib.suppress(*ENDS):  # the error comes again at the next attempt, and is recorded then
                next(filter(None, self._steps), None)  # to the end of an update

    def replaced(self) -> None:
        """Make room for the next job: this one was recorded, or stopped early, so its checkpoints have served."""
        if self.outcome != "failed":
            self.forget()

    def forget(self) -> None:
        """Remove the checkpoints."""
        if self._checkpoints:
            self._checkpoints.remove()


def _raising(error: Exception) -> Iterator[Any]:
    """Yield nothing and raise: the steps of a trial that cannot begin."""
    raise error
    yield
