"""The user's own training in a simulated study: a function with known losses, through the code of its subject."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulation.world import World

from pagating.trial import Diverged
from tune.study.own_study import OwnStudy
from tune.subject.function import Function, OwnJob
from tune.subject.own_worker import Infeasible, OwnTrial, returned
from tune.subject.process import TrialFailed
from tune.subject.sources import Sources
from tune.subject.subject import Step

REPORTS = 4  # of a trial
BEST_SCORE = 10.0  # a score is this less the loss


class InProcess(Function):
    """Subject that calls a user's function in this process. All else is that of a function in a fresh process."""

    def __init__(self, study: OwnStudy, function: Callable[[OwnTrial], Any]) -> None:
        super().__init__(study, Sources(Path(), {}, Path("function.py"), "train", Path()))
        self._function = function

    def train(self, trial: OwnJob, checkpoints: Any, model: Path | None) -> Iterator[Step | None]:  # type: ignore[override]
        """Yield the reports of the function, which runs to its end first."""
        told: list[dict[str, Any]] = []
        own = OwnTrial({**asdict(trial), "folder": "."}, lambda **message: told.append(message), lambda: None)
        found: dict[str, float] = {}
        infeasible = None
        try:
            found = returned(own, self._function(own), trial.test_metric)
        except Infeasible as error:
            infeasible = error
        rows = [trial.row(message["step"], message["metrics"], 1.0) for message in told]
        for row in rows if infeasible else rows[:-1]:
            yield row["step"], row
        if infeasible:
            raise Diverged(str(infeasible))
        if unread := set(trial.to_read) - own._read:
            raise TrialFailed(f"arms.{trial.arm}: the function never reads {', '.join(unread)}")
        yield rows[-1]["step"], {**rows[-1], "final": trial.final(rows[-1], found, 1.0)}


def function_of(world: World, metric: str, test: str) -> Callable[[OwnTrial], dict[str, float]]:
    """Return a user's function whose trials are those of a world, as losses, or as scores if the metric is one."""

    def shown(loss: float) -> float:
        return BEST_SCORE - loss if metric == "score" else loss

    def train(trial: OwnTrial) -> dict[str, float]:
        end = world.trial(trial.kind, trial.lr, trial.seed)
        if trial.kind == "searched":
            assert 0 <= trial.beta <= 2
        for step in range(trial.budget // REPORTS, trial.budget + 1, trial.budget // REPORTS):
            share = step / trial.budget
            trial.report(step, **{metric: shown(end if share == 1 else world.curve(trial.kind, end, share))})
        return {test: shown(world.test_loss(trial.kind, end))} if trial.test else {}

    return train
