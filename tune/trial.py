"""The Ray adapter of a trial: `pagating.train` as a Tune trainable whose actor is used again for the next trial."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray import tune as ray_tune

from pagating.train import Diverged, Trial, train


class CellTrainable(ray_tune.Trainable):
    """One cell. config: {cell: key, trial: arguments of `pagating.train.Trial`}. A step is one evaluation interval.

    A result holds `row` (the evaluation, None where the trial diverged), `fraction` (of the budget), and with the last
    one `outcome`, `final` and `reason`. This is the one place where a failed trial becomes an infeasible one.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._trial = Trial(**config["trial"])
        self._rows: Iterator[dict[str, Any]] = train(self._trial)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            row = next(self._rows)
        except Diverged as error:
            return self._last(
                {"outcome": "infeasible", "reason": str(error), "row": None, "final": {}, "fraction": 1.0}
            )
        final = row.pop("final", None)
        result = {"row": row, "fraction": row["step"] / self._trial.steps}
        return self._last({**result, "outcome": "completed", "reason": None, "final": final}) if final else result

    def _last(self, result: dict[str, Any]) -> dict[str, Any]:
        return {**result, ray_tune.result.DONE: True}
