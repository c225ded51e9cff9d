"""Train one job step by step. Only this module turns an error of a trial into an outcome."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from pagating.data.errors import CorpusError
from pagating.trial import Diverged, OutOfMemory
from tune.subject.subject import TRAINED, Job, Step

BEAT_SECONDS = 2.0  # after this time, the end of an update is reported as a heartbeat
WITHIN_SECONDS = 2.0  # the same within a long update or evaluation, after any of its batches
ENDS = {Diverged: "infeasible", OutOfMemory: "infeasible", CorpusError: "failed", OSError: "failed"}


class Training:
    """Training of one job.

    Args:
        job: The job.
        refused: Error that prevents the start of the job, for example a corpus that could not be fetched.
    """

    def __init__(self, job: Job, refused: Exception | None = None) -> None:
        from pagating.checkpoint import CheckpointFolder  # imports torch, which takes seconds: a refusal comes before

        self._job = job
        folder = Path(job.checkpoints) if job.checkpoints else None
        self._checkpoints = CheckpointFolder(folder, keep=job.keep_checkpoints) if folder else None
        model = folder / TRAINED if folder and job.keep_model else None
        self._steps = _raising(refused) if refused else job.train(job.trial, self._checkpoints, model)
        self._made = 0
        self.outcome: str | None = None

    def advance(self) -> dict[str, Any]:
        """Train until the next evaluation or heartbeat.

        Returns:
            A dict with `row` (the evaluation, or None), `fraction` (of the budget) and `step` (updates made). The
            last one also has `outcome`, `final` and `reason`. `warning` is present if the checkpoints had a problem.
        """
        result = self._advance()
        self.outcome = result.get("outcome")
        if self._checkpoints and self._checkpoints.notes:
            result["warning"] = "; ".join(self._checkpoints.notes)
            self._checkpoints.notes.clear()
        return result

    def _advance(self) -> dict[str, Any]:
        try:
            self._made, row = self._until_report()
        except tuple(ENDS) as error:
            outcome = next(outcome for kind, outcome in ENDS.items() if isinstance(error, kind))
            return {"outcome": outcome, "reason": str(error), "row": None, "final": {}, "fraction": 1.0}
        final = row.pop("final", None) if row else None
        result = {"row": row, "fraction": self._made / self._job.steps, "step": self._made}
        return {**result, "outcome": "completed", "reason": None, "final": final} if final else result

    def _until_report(self) -> Step:
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
        """Stop for good.

        An unfinished trial writes a checkpoint. A failed trial keeps its checkpoints. Any other trial removes them.
        """
        if self.outcome not in (None, "failed"):
            self.forget()
        elif self._checkpoints and self.outcome is None:
            self._checkpoints.request()
            with contextlib.suppress(*ENDS):  # the next attempt raises the same error and records it
                next(filter(None, self._steps), None)  # train to the end of an update
        self._close()

    def replaced(self) -> None:
        """End this job before the next one starts, and remove its checkpoints unless it failed."""
        self._close()
        if self.outcome != "failed":
            self.forget()

    def _close(self) -> None:
        """End the training at once, with any process that it started."""
        if isinstance(self._steps, Generator):
            self._steps.close()

    def forget(self) -> None:
        """Remove the checkpoints."""
        if self._checkpoints:
            self._checkpoints.remove()


def _raising(error: Exception) -> Iterator[Any]:
    """Raise `error` at the first step. This generator stands for a trial that cannot start."""
    raise error
    yield
