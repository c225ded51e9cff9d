"""The confirm stage: its looks, and the seeds that each arm runs until it is decided.

Nothing here trains. The stages ask for cells, record their losses, and ask again until no cell is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from tune.study.cell import Cell
from tune.study.study import Study, digest


class Confirmation:
    """The confirm stage of a study.

    Args:
        study: The study.
        decided: Called with each plan and each look, for the ledger.
        looked: Numbers of seeds at which the fixed rule had a look before `confirm.seeds` grew (`looks_made`).
        recorded: Arm and seed of each confirm cell of the ledger. These are run, whatever is decided now.
    """

    def __init__(
        self,
        study: Study,
        decided: Callable[..., Any],
        looked: Iterable[int] = (),
        recorded: Collection[tuple[str, int]] = (),
    ) -> None:
        self.study, self._decided = study, decided
        confirm = study.confirm
        self.looks = confirm.looks
        if confirm.rule == "fixed":
            self.looks = tuple(sorted({n for n in looked if n < confirm.seeds} | {confirm.seeds}))
        self._recorded: dict[str, int] = {}  # most seeds by arm
        self._first = study.seed(confirm.first_seed)  # this seed and the following ones are not used in earlier stages
        for arm, seed in recorded:
            self._recorded[arm] = max(self._recorded.get(arm, 0), seed - self._first + 1)
        self._chosen: dict[str, dict[str, float]] = {}
        self._planned: dict[str, int] = {}  # seeds by arm
        self._going: set[str] = set()  # arms that may run more seeds than are planned
        self._losses: dict[tuple[str, int], float] = {}  # by arm and seed; NaN if the machine failed

    def begin(self, chosen: dict[str, dict[str, float]]) -> list[Cell]:
        """Return the first cells of arms that were given these configurations."""
        self._chosen |= chosen
        self._planned |= dict.fromkeys(chosen, 0)
        self._going |= set(chosen)
        return self._plan(dict.fromkeys(chosen, self.looks[0]))

    def record(self, cell: Cell, loss: float) -> None:
        """Record the test loss of a cell in nats per token: infinite if infeasible, NaN if the machine failed."""
        self._losses[cell.arm, cell.seed] = loss

    def loses_all(self, cell: Cell) -> bool:
        """Return True if the planned trials of a cell's arm have all failed, once this one has."""
        seeds = {self._first + number for number in range(self._planned[cell.arm])} - {cell.seed}
        return all(math.isnan(self._losses.get((cell.arm, seed), 0.0)) for seed in seeds)

    def extend(self) -> list[Cell]:
        """Return the cells up to the next look of each arm that goes on. Without any, the stage is over."""
        from analysis.io.assemble import margin_or_zero
        from analysis.stats import sequential  # its libraries take seconds to load

        confirm = self.study.confirm
        further = sequential.further(
            {
                arm: np.array([self._losses.get((arm, self._first + seed), math.nan) for seed in range(n)])
                for arm, n in self._planned.items()
            },
            self.study.baseline,
            self.study.comparisons,
            self.looks,
            lambda mean: margin_or_zero(confirm.margin, self.study.sign * mean),
            rule=confirm.rule,
            level=confirm.level,
            correction=confirm.correction,
            reserve=confirm.reserve,
            racing=confirm.racing and confirm.test == "paired",
        )
        for arm, n in self._planned.items():  # what an earlier run began is not lost
            if self._recorded.get(arm, 0) > max(n, further.get(arm, 0)):
                further[arm] = next((look for look in self.looks if look > n), n)
        further = {arm: n for arm, n in further.items() if n > self._planned[arm]}
        self._going = set(further)
        return self._plan(further)

    @property
    def losses(self) -> dict[tuple[str, int], float]:
        """Test losses by arm and seed, as `record` takes them."""
        return self._losses

    def left(self) -> int:
        """Return the number of cells that may follow those that are planned, of arms that have a configuration."""
        return sum(self.looks[-1] - self._planned[arm] for arm in self._going)

    def _plan(self, seeds: dict[str, int]) -> list[Cell]:
        """Return the cells of arms up to these numbers of seeds: seed by seed, the arms side by side."""
        self._decided("look", seeds=dict(self._planned), next=seeds)
        out = []
        for seed in range(max(seeds.values(), default=0)):
            for arm, n in seeds.items():
                if self._planned[arm] <= seed < n:
                    config = self._chosen[arm]
                    out.append(
                        Cell("confirm", arm, 0, self._first + seed, config, digest(config), rung=self.study.rung)
                    )
        self._planned |= seeds
        return out


def looks_made(events: Iterable[dict[str, Any]], first_seed: int) -> list[int]:
    """Return the numbers of seeds at which a study had a look, or must have one because a trial for it has ended.

    A look is made when the planned seeds have ended, whether or not anybody asked for the verdict. A plan without an
    ended trial may still be replaced, because no result can have led to the change.

    Args:
        events: Events of the ledger.
        first_seed: First confirm seed.
    """
    made: set[int] = set()
    plan, ran, seed_of = 0, 0, {}
    for event in events:
        if event["event"] == "suggested" and event["stage"] == "confirm":
            seed_of[event["cell"]] = event["seed"] - first_seed + 1
        elif event["event"] == "ended" and event["cell"] in seed_of:
            ran = max(ran, seed_of[event["cell"]])
        elif event["event"] == "look":
            made |= {n for n in event["seeds"].values() if n}
            plan = max(event["next"].values(), default=plan)
    return sorted(made | ({plan} if ran > max(made, default=0) else set()))
