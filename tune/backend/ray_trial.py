"""Ray adapter of a trial: a Tune trainable whose actor is reused for the next trial."""

from __future__ import annotations

from typing import Any

from ray import tune as ray_tune

from pagating.data.errors import CorpusError
from tune.backend.delivery import OwnParcel, Parcel, unpack
from tune.subject.training import Training


class CellTrainable(ray_tune.Trainable):
    """Trainable that trains the `job` (`tune.subject.subject.Job`) of its config.

    A step ends at the next evaluation or heartbeat. Its result is that of `tune.subject.training.Training.advance`.
    A `parcel` holds the files that a node may lack.
    """

    def setup(self, config: dict[str, Any], parcel: Parcel | OwnParcel | None = None) -> None:
        job, refused = config["job"], None
        if parcel:
            try:
                job = unpack(parcel, job)
            except (CorpusError, OSError) as error:
                refused = error
        self._training = Training(job, refused)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._training.replaced()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._training.cut_off()

    def step(self) -> dict[str, Any]:
        result = self._training.advance()
        return {**result, ray_tune.result.DONE: True} if self._training.outcome else result
