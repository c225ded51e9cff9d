"""Stages of a study (search, calibrate, confirm): the next cell to train and the decisions between stages.

Nothing here trains or waits. `next_cell` returns a cell that may start now. `complete` receives its result. Both depend
only on the study and the results, so replaying a ledger leads to the same cells.

Arms that are added after a decision follow the stages on their own, on the same grid and seeds. The configurations
that were chosen for the other arms stay.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tune.decide.calibrate import FORM, Calibration
from tune.decide.confirm import Confirmation
from tune.decide.search import ArmSearch
from tune.study.cell import Cell
from tune.study.sizes import middle
from tune.study.study import Study, digest

SEARCH_SEED = 1


class Stages:
    """State of a study.

    Args:
        study: The study.
        decided: Called with each decision between stages, for the ledger.
        suggested: Configurations that an earlier run of the study recorded, by arm and number.
        added: Groups of arms that were added after a decision, in the order of their addition.
        looked: Numbers of confirm seeds at earlier looks of the fixed rule.
        confirmed: Arm and seed of each confirm cell that an earlier run of the study recorded.
        form: Version of the calibrate stage with which the ledger began (`Calibration`).
        start: Configurations at which calibrate starts, by arm; then no arm searches. None: an arm that does not
            search starts in the middle of its ranges.
        grid: First grid of learning rates that an earlier run recorded.
    """

    def __init__(
        self,
        study: Study,
        decided: Callable[..., Any],
        suggested: dict[tuple[str, int], dict[str, float]],
        added: Sequence[Sequence[str]] = (),
        looked: Sequence[int] = (),
        confirmed: Collection[tuple[str, int]] = (),
        form: int = FORM,
        start: Mapping[str, dict[str, float]] | None = None,
        grid: Sequence[float] | None = None,
    ) -> None:
        if start is None:
            middles = {name: middle(where) for name, where in study.nuisance.items()}
            start = {arm: middles for arm in study.arms if not study.searches(arm)}
        self.study, self._decided, self._suggested, self._start = study, decided, suggested, start
        later = {arm for group in added for arm in group}
        self._arms = [arm for arm in study.arms if arm not in later]  # the group whose stages run now
        self._later = deque(list(group) for group in added)
        recorded = Counter(arm for arm, _ in suggested)
        self.search = {
            arm: ArmSearch(arm, study.space(arm), study.search, recorded[arm], study.replicate, study.batch_limits[0])
            for arm in study.arms
            if arm not in start
        }
        self.calibration = Calibration(study, decided, form, grid)
        self.confirmation = Confirmation(study, decided, looked, confirmed)
        self.chosen: dict[str, dict[str, float]] = {}
        self.hopeless = False  # True if no search trial of any arm gave a loss: then there is nothing to compare
        self._pending: deque[Cell] = deque()
        self._open: set[str] = set()
        self._begin_search()

    # --- what to train next ---

    def next_cell(self) -> Cell | None:
        """Return a cell that may start now. Return None if it depends on cells that still run, or if none is left."""
        cell = self._next_search() if self.stage == "search" else self._pending.popleft() if self._pending else None
        if cell:
            self._open.add(cell.key)
        return cell

    @property
    def finished(self) -> bool:
        """True if every cell of the study has ended."""
        return self.stage == "done"

    @property
    def grid_capped(self) -> bool:
        """True if `calibrate.max_points` ended the extension of a grid."""
        return self.calibration.capped

    def remaining(self) -> int:
        """Return the number of cells that are left or may follow. A sequential rule may stop before all of them."""
        if self.stage == "done":
            return 0
        confirm = self.confirmation.looks[-1] if self.study.runs("confirm") else 0
        grid = self.calibration.points() * self.study.calibrate.seeds if self.study.runs("calibrate") else 0
        later = [arm for group in self._later for arm in group]
        trials = {arm: search.trials - search.ended for arm, search in self.search.items()}
        left = sum(trials.get(arm, 0) + grid + confirm for arm in later)
        left += self.confirmation.left()
        if self.stage == "search":
            return left + sum(trials.get(arm, 0) + grid + confirm for arm in self._arms)
        if self.stage == "calibrate":
            ahead = self.calibration.points(ahead=True) * self.study.calibrate.seeds
            left += len(self._arms) * (ahead + confirm)
        return left + len(self._pending) + len(self._open)

    def _next_search(self) -> Cell | None:
        ready = [search for search in self._searches if search.may_suggest()]
        if not ready:
            return None
        search = min(ready, key=lambda search: search.asked)  # arms take turns
        index, config = search.suggest(self._suggested.get((search.arm, search.asked)))
        seed, rung = self.study.seed(SEARCH_SEED), self.study.rung
        return Cell("search", search.arm, index, seed, config, digest(config), rung=rung)

    # --- results ---

    def should_stop(self, cell: Cell, fraction: float, loss: float) -> bool:
        """Return True if a search trial has to stop early. Calibrate and confirm trials never do.

        Args:
            cell: The cell.
            fraction: Fraction of its budget that it has reached.
            loss: Its validation loss there, in nats per token.
        """
        return cell.stage == "search" and self.search[cell.arm].should_stop(cell.index, fraction, loss)

    def must_not_lose(self, cell: Cell) -> bool:
        """Return True if the study cannot go on without a cell.

        A choice needs each cell before the confirm stage. There, an arm of the user's own code must not lose all its
        trials, because the code is then at fault; `analysis.verdict.checks.unfinished` says the same.
        """
        return cell.stage != "confirm" or (bool(self.study.shown) and self.confirmation.loses_all(cell))

    def complete(self, cell: Cell, outcome: str, loss: float, step: int) -> None:
        """Record a cell's result and go on to the next stage if this one has ended.

        Args:
            cell: The cell.
            outcome: Its outcome.
            loss: Its last loss in nats per token, infinite if infeasible. In the confirm stage it is the test loss,
                from which the verdict is computed. In the other stages it is the validation loss.
            step: Its last step.
        """
        self._open.discard(cell.key)
        if cell.stage == "search":
            self.search[cell.arm].finish(cell.index, outcome, loss, step)
            if all(search.done for search in self._searches):
                self.hopeless = not (self._start or any(search.feasible for search in self.search.values()))
                self._after_search()
        elif cell.stage == "calibrate":
            self.calibration.record(cell, loss if outcome == "completed" else math.inf)
            if not self._pending and not self._open:
                self._pending.extend(self.calibration.more())
                if not self._pending:
                    self._choose()
        else:
            lost = math.nan if outcome == "failed" else math.inf
            self.confirmation.record(cell, loss if outcome == "completed" else lost)
            if not self._pending and not self._open:
                self._pending.extend(self.confirmation.extend())
                if not self._pending:
                    self._next_group()

    @property
    def _searches(self) -> list[ArmSearch]:
        """The searches of the arms whose stages run now."""
        return [self.search[arm] for arm in self._arms if arm in self.search]

    def _begin_search(self) -> None:
        self.stage = "search"
        if not self._searches:
            self._after_search()

    def _after_search(self) -> None:
        if self.hopeless:
            self.stage = "done"
        elif self.study.runs("calibrate"):
            self._calibrate()
        else:
            self._choose()

    def _calibrate(self) -> None:
        self.stage = "calibrate"
        self._pending.extend(self.calibration.begin({arm: self._best(arm) for arm in self._arms}))

    def _best(self, arm: str) -> dict[str, float]:
        return self.search[arm].best() if arm in self.search else self._start[arm]

    # --- confirm ---

    def _choose(self) -> None:
        """Choose the configuration of each arm that has none and go on to the confirm stage, if the study has one."""
        if self.stage == "calibrate":
            self.chosen |= self.calibration.choose()
        else:
            for arm in self._arms:
                self.chosen[arm] = best = self._best(arm)
                self._decided("chosen", arm=arm, config=best, config_key=digest(best), grid_best=None, at_edge=False)
        if not self.study.runs("confirm"):
            self._next_group()
            return
        self.stage = "confirm"
        self._pending.extend(self.confirmation.begin({arm: self.chosen[arm] for arm in self._arms}))

    def _next_group(self) -> None:
        """Begin the stages of the arms that were added next, or finish the study."""
        if self._later:
            self._arms = self._later.popleft()
            self._begin_search()
        else:
            self.stage = "done"
