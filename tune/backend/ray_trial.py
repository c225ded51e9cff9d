"""The Ray adapter of a trial: `pagating.train` as a Tune trainable whose actor is used again for the next trial."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray import tune as ray_tune

from pagating.checkpoint import CheckpointFolder
from pagating.data.corpus import CorpusError
from pagating.train import Step, heartbeats
from pagating.trial import Diverged, OutOfMemory, Trial
from tune.backend.delivery import Parcel, unpack
from tune.run.models import TRAINED

BEAT_SECONDS = 2.0  # a trial says that it is alive at least so often, while it makes steps
WITHIN_SECONDS = 2.0  # the same, of a step that takes longer, between its micro-batches and batches of an evaluation
ENDS = {Diverged: "infeasible", OutOfMemory: "infeasible", CorpusError: "failed", OSError: "failed"}


class CellTrainable(ray_tune.Trainable):
    """One cell. A step is an evaluation interval, or `BEAT_SECONDS` of one, or a part of an update that takes longer.

    config: {cell: key, trial: arguments of `pagating.train.Trial`, checkpoints: folder of the cell, None for none,
    keep_checkpoints: whether its last ones stay, keep_model: whether the trained model is left there}, as they are
    where the driver runs; `parcel` brings the node what it lacks.
    A result holds `row` (the evaluation; None where none was made), `fraction` (of the budget), `step` (updates made),
    with the last one `outcome`, `final` and `reason`, and `warning` where there is something to say. This is the one
    place where a failed trial becomes an infeasible one (diverged, out of memory), or one to be tried again (`failed`:
    the files of its machine were at fault).
    """

    def setup(self, config: dict[str, Any], parcel: Parcel | None = None) -> None:
        trial, folder, lacking = config["trial"], config.get("checkpoints"), None
        if parcel:
            try:
                trial, folder = unpack(parcel, trial, folder)
            except (CorpusError, OSError) as error:
                lacking = error
        self._trial = Trial(**trial)
        self._checkpoints = CheckpointFolder(folder, keep=config.get("keep_checkpoints", False)) if folder else None
        model = Path(folder) / TRAINED if folder and config.get("keep_model") else None
        self._steps = _refused(lacking) if lacking else heartbeats(self._trial, self._checkpoints, model)
        self._made = 0
        self._outcome: str | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next cell. The one before was recorded, or stopped early: its checkpoints have served."""
        if self._outcome != "failed":
            self._forget()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Stop for good. A cell that is cut off leaves a checkpoint of where it stands, one that ended leaves none.

        One that failed leaves those it has: it is tried again from them.
        """
        if self._outcome not in (None, "failed"):
            self._forget()
        elif self._checkpoints and self._outcome is None:
            self._checkpoints.request()
            with contextlib.suppress(*ENDS):  # what went wrong will go wrong again, and be recorded then
                next(filter(None, self._steps), None)  # to the end of an update

    def _forget(self) -> None:
        if self._checkpoints:
            self._checkpoints.remove()

    def step(self) -> dict[str, Any]:
        result = self._step()
        if self._checkpoints and self._checkpoints.notes:
            result["warning"] = "; ".join(self._checkpoints.notes)
            self._checkpoints.notes.clear()
        return result

    def _step(self) -> dict[str, Any]:
        try:
            self._made, row = self._until_a_sign()
        except tuple(ENDS) as error:
            outcome = next(outcome for kind, outcome in ENDS.items() if isinstance(error, kind))
            return self._last({"outcome": outcome, "reason": str(error), "row": None, "final": {}, "fraction": 1.0})
        final = row.pop("final", None) if row else None
        result = {"row": row, "fraction": self._made / self._trial.steps, "step": self._made}
        return self._last({**result, "outcome": "completed", "reason": None, "final": final}) if final else result

    def _until_a_sign(self) -> Step:
        """Go on to the next evaluation, or until it is time for a sign of life."""
        began = time.monotonic()
        made = self._made
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

    def _last(self, result: dict[str, Any]) -> dict[str, Any]:
        self._outcome = result["outcome"]
        return {**result, ray_tune.result.DONE: True}


def _refused(error: Exception) -> Iterator[Any]:
    """The steps of a trial that cannot begin."""
    raise error
    yield
