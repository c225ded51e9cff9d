"""The rungs of a ladder, from the smallest to the largest: where each starts, and which arms it leaves out.

All stages of a rung end before the next one begins. Nothing here trains.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from tune.decide.stages import Stages
from tune.study.cell import Cell
from tune.study.sizes import scales
from tune.study.study import Study

LOST_RUNGS = 2  # after which `ladder.drop` leaves an arm out
MOST_STEPS = 1.0  # steps of a scale by which a prediction may differ from the rung below
Configs = Mapping[str, dict[str, float]]


class Ladder:
    """Stages of all rungs, with the interface of the stages of one study.

    Args:
        study: The ladder.
        stages: Function that returns the stages of a rung's study, from the configurations at which it starts. None
            means that the arms search.
        decided: Called with each decision between rungs, for the ledger.
    """

    def __init__(
        self, study: Study, stages: Callable[[Study, Configs | None], Stages], decided: Callable[..., Any]
    ) -> None:
        self.study, self._stages, self._decided = study, stages, decided
        self._below: list[tuple[Study, Configs]] = []  # the rungs that are done, and what their arms chose
        self._lost: Counter[str] = Counter()  # number of rungs on which an arm was worse
        self._now = stages(study.at(1), None)

    @property
    def rung(self) -> int:
        """Number of the rung whose stages run now, from 1."""
        return self._now.study.rung

    @property
    def stage(self) -> str:
        """Stage of the current rung, `done` after the last one."""
        return self._now.stage

    @property
    def finished(self) -> bool:
        """True if every cell of every rung has ended."""
        return self._now.finished

    @property
    def hopeless(self) -> bool:
        """True if no search trial of any arm gave a loss."""
        return self._now.hopeless

    @property
    def chosen(self) -> Configs:
        """Configurations that the arms of the current rung have chosen so far."""
        return self._now.chosen

    def next_cell(self) -> Cell | None:
        """Return a cell that may start now. Return None if it depends on cells that still run, or if none is left."""
        return self._now.next_cell()

    def should_stop(self, cell: Cell, fraction: float, loss: float) -> bool:
        """Return True if a search trial has to stop early; see `Stages.should_stop`."""
        return self._now.should_stop(cell, fraction, loss)

    def must_not_lose(self, cell: Cell) -> bool:
        """Return True if the study cannot go on without a cell; see `Stages.must_not_lose`."""
        return self._now.must_not_lose(cell)

    def remaining(self) -> int:
        """Return the number of cells that are left or may follow, on this rung and above it."""
        left = self._now.remaining()
        if self._now.hopeless:
            return left
        above = self.study.rungs[self.rung :]
        start: Configs = {arm: dict.fromkeys(self.study.space(arm), 1.0) for arm in self.study.arms}
        return left + sum(_most_cells(each, None if _searches(each) else start) for each in above)

    def complete(self, cell: Cell, outcome: str, loss: float, step: int) -> None:
        """Record a cell's result; see `Stages.complete`. After the last cell of a rung, go on to the next."""
        self._now.complete(cell, outcome, loss, step)
        if self._now.finished and not self._now.hopeless and self.rung < len(self.study.scales):
            self._climb()

    def _climb(self) -> None:
        done = self._now.study
        self._below.append((done, self._now.chosen))
        self._lost.update(lost(done, self._now.confirmation.losses) if self.study.ladder.drop else ())
        arms = self.study.arms
        gone = [arm for arm in arms if self._lost[arm] >= LOST_RUNGS and not arms[arm].floor]
        above = self.study.at(self.rung + 1, gone)
        if gone:
            self._decided("dropped", rung=above.rung, arms=gone)
        start = None if _searches(above) else predict(self._below, above)
        self._now = self._stages(above, start)


def predict(below: list[tuple[Study, Configs]], above: Study) -> dict[str, dict[str, float]]:
    """Predict the configuration of each arm on the next rung of a ladder from what the arms chose below.

    A hyperparameter that calibrate chooses moves along a line against the logarithm of the compute, on its own scale.
    The line has the slope of a least-squares fit through all arms, each with a level of its own, and starts at the
    arm's value on the last rung. With one rung below, nothing moves. A move is at most `MOST_STEPS` steps of the scale.

    Args:
        below: The study of each rung below, from the lowest, and its arms' chosen configurations.
        above: The study of the next rung.
    """
    last = below[-1][1]
    found = {arm: dict(last[arm]) for arm in above.arms}
    at = [math.log(study.compute) for study, _ in below]
    ahead = math.log(above.compute) - at[-1]
    for name, scale in scales(above).items():
        squares = products = 0.0
        for arm in above.arms:
            points = [(x, scale.to(chosen[arm][name])) for x, (_, chosen) in zip(at, below, strict=True)]
            mean_x, mean_y = (math.fsum(values) / len(points) for values in zip(*points, strict=True))
            squares += math.fsum((x - mean_x) ** 2 for x, _ in points)
            products += math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
        move = products / squares * ahead if squares else 0.0
        move = max(-MOST_STEPS * scale.step, min(MOST_STEPS * scale.step, move))
        for arm in found:
            found[arm][name] = scale.value(max(scale.low, min(scale.high, scale.to(found[arm][name]) + move)))
    return found


def lost(study: Study, losses: Mapping[tuple[str, int], float]) -> set[str]:
    """Return the arms whose verdict on a rung is `worse`.

    Args:
        study: The study of the rung.
        losses: Test losses of its confirm trials by arm and seed; infinite if infeasible, NaN if the machine failed.
    """
    import pandas as pd  # its libraries take seconds to load

    from analysis.io.assemble import TableFacts, assemble
    from analysis.verdict.decide import decide
    from analysis.verdict.kinds import Verdict

    rows = [
        {
            "stage": "confirm",
            "arm": arm,
            "seed": seed,
            "outcome": "failed" if math.isnan(loss) else "completed" if math.isfinite(loss) else "infeasible",
            "test_nll": study.sign * loss if math.isfinite(loss) else loss,
        }
        for (arm, seed), loss in losses.items()
    ]
    settings = study.model_dump(exclude_none=True)
    own = TableFacts(study.sign < 0) if study.shown else None
    table = assemble(study.name, study.name, pd.DataFrame(rows), pd.DataFrame(), settings, own=own)
    return {row.arm for row in decide(table).comparisons if row.kind is Verdict.WORSE}


def _searches(study: Study) -> bool:
    return any(map(study.searches, study.arms))


def _most_cells(study: Study, start: Configs | None) -> int:
    return Stages(study, lambda *_, **__: None, {}, start=start).remaining()
