"""Progress of a study or a ladder, computed from its ledger's events, for the run itself and for `pagating status`.

The cost of an event does not depend on the length of the study. Nothing here reads a file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from analysis.io.names import OUTCOMES, STAGES
from tune.run.ledger import cell_of
from tune.study.cell import Cell
from tune.study.sizes import Span, all_trials, arm_trials, grid_points
from tune.study.study import Study

STATES = ("running", "waiting", *OUTCOMES)


@dataclass(frozen=True)
class Best:
    """Best result of an arm in a stage: mean validation loss (nats per token) over `n` seeds, and its setting.

    `setting` has the value of `study.first`; it is empty if the study tunes nothing.
    """

    loss: float
    setting: dict[str, float]
    n: int


class Progress:
    """Counts, best losses and speeds of a study after a sequence of events."""

    def __init__(self, study: Study, events: Iterable[dict[str, Any]] = ()) -> None:
        self.study = study
        self.last: float | None = None  # when the last event was written, seconds since 1970
        self._cells: dict[str, Cell] = {}
        self._states: dict[str, str] = {}
        self._counts: Counter[tuple[str, str, str]] = Counter()  # by stage, arm and state
        self._losses: dict[tuple[str, str], dict[tuple[float, str], list[float]]] = {}
        # by stage and arm, then value of `study.first` and configuration
        self._started: dict[str, float] = {}  # start times of the running cells
        self._took: dict[tuple[str, str], tuple[float, int]] = {}  # (seconds, number) of ended cells, by stage and arm
        self._whole: dict[str, tuple[float, int]] = {}  # the same for completed cells, by arm
        self._speeds: dict[str, float] = {}  # tokens per second of the running cells
        self._arm_speeds: dict[str, float] = {}  # last reported speed of each arm
        self._look: dict[str, dict[str, int]] = {}  # seeds that each arm has and gets next, after the last look
        self._grids: dict[str, int] = {}  # points of each grid and of each round of corners
        self.chosen: dict[str, dict[str, float]] = {}  # configuration of each arm after the calibrate stage
        self.failures: dict[str, str] = {}  # reason by cell that failed last, in the order of the ends
        self.assumed: float | None = None  # seconds of a cell as long as no cell has reported
        self._warm = False  # True after the first report: cells that start earlier wait for imports of their workers
        self._cold: set[str] = set()  # the cells that started earlier
        for event in events:
            self.take(event)

    # --- events ---

    def take(self, event: dict[str, Any]) -> None:
        """Add an event of the ledger."""
        if (kind := event["event"]) == "verdict":  # it changes nothing that is planned, and may be written any time
            return
        self.last = event["time"]
        if kind == "suggested":
            cell = cell_of(event)
            if cell.key not in self._cells:
                self._cells[cell.key] = cell
                self._move(cell, "waiting")
        elif kind == "started":
            self._started[event["cell"]] = event["time"]
            (self._cold.discard if self._warm else self._cold.add)(event["cell"])
            self._move(self._cells[event["cell"]], "running")
        elif kind == "report":
            self._warm = True
            cell, speed = self._cells[event["cell"]], event["row"].get("tokens_per_second")
            if speed:
                self._speeds[cell.key] = self._arm_speeds[cell.arm] = speed
        elif kind == "ended":
            self._end(self._cells[event["cell"]], event)
        elif kind == "grid":
            self._grids[event.get("nuisance", "lr")] = len(event["grid"])
        elif kind == "corners":
            self._grids[f"corners {event['round']}"] = event["points"]
        elif kind == "look":
            self._look = {"has": event["seeds"], "gets": event["next"]}
        elif kind == "chosen":
            self.chosen[event["arm"]] = event["config"]

    def _end(self, cell: Cell, event: dict[str, Any]) -> None:
        self._move(cell, event["outcome"])
        self.failures.pop(cell.key, None)
        if event["outcome"] == "failed":
            self.failures[cell.key] = event.get("reason") or "unknown"
        self._speeds.pop(cell.key, None)
        began = self._started.pop(cell.key, None)
        if event["outcome"] != "failed" and began is not None:
            took = max(0.0, event["time"] - began)  # the clock may have been set back
            if cell.key in self._cold:
                took = min(took, event["final"].get("seconds", took))
            self._took[cell.stage, cell.arm] = _sum([self._took.get((cell.stage, cell.arm), (0.0, 0)), (took, 1)])
            if event["outcome"] == "completed":
                self._whole[cell.arm] = _sum([self._whole.get(cell.arm, (0.0, 0)), (took, 1)])
        loss = event["final"].get("val_nll")
        if event["outcome"] == "completed" and loss is not None:
            losses = self._losses.setdefault((cell.stage, cell.arm), {})
            losses.setdefault((cell.config.get(self.study.first or "", 0.0), cell.config_key), []).append(loss)

    def _move(self, cell: Cell, state: str) -> None:
        if before := self._states.get(cell.key):
            self._counts[cell.stage, cell.arm, before] -= 1
        self._states[cell.key] = state
        self._counts[cell.stage, cell.arm, state] += 1

    def set_running(self, running: Collection[str]) -> None:
        """Set the running cells. Cells that an earlier run left unfinished wait again."""
        self._warm = bool(running)
        for key in [key for key in self._started if key not in running]:
            self._started.pop(key)
            self._speeds.pop(key, None)
            self._move(self._cells[key], "waiting")

    # --- counts and best losses ---

    def count(self, stage: str, *states: str, arm: str | None = None) -> int:
        """Return the number of cells of a stage in one of these states; of one arm only if `arm` is given."""
        arms = self.study.arms if arm is None else (arm,)
        return sum(self._counts[stage, name, state] for name in arms for state in states)

    @property
    def running(self) -> int:
        """Number of cells that run now."""
        return len(self._started)

    @property
    def ended(self) -> int:
        """Number of cells of all stages that have ended, with any outcome."""
        return sum(self.count(stage, *OUTCOMES) for stage in STAGES)

    @property
    def stage(self) -> str:
        """Latest stage that has cells."""
        return next((stage for stage in reversed(STAGES) if self.count(stage, *STATES)), STAGES[0])

    @property
    def seconds_per_cell(self) -> float | None:
        """Mean seconds of a cell that trains to its end, or None if unknown."""
        known = [seconds for arm in self.study.arms if (seconds := self._mean_seconds("confirm", arm)) is not None]
        return sum(known) / len(known) if known else None

    def best(self, stage: str, arm: str) -> Best | None:
        """Return the best result of an arm in a stage, or None before one of its cells is completed.

        It is the lowest loss in the search stage and the mean over the seeds in the confirm stage. In the calibrate
        stage it is the lowest mean among the configurations with the most seeds.
        """
        found = self._losses.get((stage, arm))
        if not found:
            return None
        most = 1 if stage == "search" else max(map(len, found.values()))
        if stage == "search":
            loss, value = min((min(losses), value) for (value, _), losses in found.items())
        else:
            loss, value = min(
                (sum(losses) / most, value) for (value, _), losses in found.items() if len(losses) == most
            )
        return Best(loss, {self.study.first: value} if self.study.first else {}, most)

    @property
    def tokens_per_second(self) -> float | None:
        """Sum of the last reported speeds of all running cells. A cell without a report counts with its arm's speed."""
        speeds = [self._speeds.get(key) or self._arm_speeds.get(self._cells[key].arm) for key in self._started]
        known = [speed for speed in speeds if speed]
        return sum(known) * len(speeds) / len(known) if known else None

    # --- cells and time left ---

    def planned(self, stage: str) -> Span:
        """Return the least, expected and largest number of cells of a stage. They are equal once it is decided."""
        study, arms = self.study, len(self.study.arms)
        if not study.runs(stage) or (self._hopeless and stage != "search"):
            return 0.0, 0.0, 0.0
        if stage == "search":
            return (float(all_trials(study)),) * 3
        if stage == "calibrate":
            seeds, grid = study.calibrate.seeds, float(sum(self._grids.values()))
            least, likely, most = (grid,) * 3 if self.chosen else grid_points(study)
            points = max(grid, least) * seeds, max(grid, likely) * seeds, most * seeds
        else:
            each = [self._confirm_seeds(arm) for arm in study.arms]
            return tuple(float(sum(span)) for span in zip(*each, strict=True))  # type: ignore[return-value]
        return tuple(arms * float(number) for number in points)  # type: ignore[return-value]

    def _confirm_seeds(self, arm: str) -> Span:
        """Return the least, expected and largest number of confirm seeds of an arm."""
        looks = self.study.confirm.looks
        if not self._look:  # nothing is planned yet, or the ledger was written before looks were recorded
            asked = math.ceil(self.count("confirm", *STATES) / len(self.study.arms))
            return next((look for look in looks if look >= asked), looks[-1]), looks[-1], looks[-1]
        has, gets = self._look["has"].get(arm, 0), self._look["gets"].get(arm)
        planned = gets or has or looks[0]
        most = planned if has and not gets else max(planned, looks[-1])
        return planned, most, most

    @property
    def _hopeless(self) -> bool:
        """True if no search trial gave a loss, so that nothing follows."""
        each = all(map(self.study.searches, self.study.arms))
        return each and self.count("search", "infeasible", "failed") >= all_trials(self.study)

    def seconds_left(self, slots: int, now: float) -> tuple[float, float] | None:
        """Return the expected and the largest number of seconds until the study ends, or None if unknown.

        The time of a cell is the mean over the ended cells of its arm and stage. Without any, it is the mean over the
        completed cells of its arm, then of all arms, then over all ended cells. Before any cell has ended, it follows
        from the cell's tokens and the reported speed.

        Args:
            slots: Number of cells that run in parallel.
            now: Current time, seconds since 1970.
        """
        seconds = {(stage, arm): self._mean_seconds(stage, arm) for stage in STAGES for arm in self.study.arms}
        if not slots or None in seconds.values():
            return None
        found = []
        for which in (1, 2):
            work = 0.0
            for stage in STAGES:
                mean = self.planned(stage)[which] / len(self.study.arms)
                for arm in self.study.arms:
                    each = arm_trials(self.study, arm) if stage == "search" else mean
                    if stage == "confirm" and mean:
                        each = self._confirm_seeds(arm)[which]
                    left = each - self.count(stage, *OUTCOMES, arm=arm)
                    work += max(0.0, left) * (seconds[stage, arm] or 0.0)
            longest = 0.0
            for key, began in self._started.items():
                takes = seconds[self._cells[key].stage, self._cells[key].arm] or 0.0
                done = min(takes, max(0.0, now - began))
                work, longest = work - done, max(longest, takes - done)
            found.append(max(work / slots, longest))
        return found[0], found[1]

    def _mean_seconds(self, stage: str, arm: str) -> float | None:
        for took in (
            self._took.get((stage, arm)),
            self._whole.get(arm),
            _sum(self._whole.values()),
            _sum(self._took.values()),
        ):
            if took and took[1]:
                return took[0] / took[1]
        speed = self._arm_speeds.get(arm) or next(iter(self._arm_speeds.values()), None)
        return self.study.fixed.tokens / speed if speed else self.assumed

    @property
    def finished(self) -> bool:
        """True if the largest number of cells has ended. A sequential rule may finish a study earlier.

        A study of the user's own code that lost all confirm trials of an arm has stopped (`Stages.must_not_lose`), and
        is not finished.
        """
        own = self.study.arms if self.study.shown else ()
        failed = {arm: self.count("confirm", "failed", arm=arm) for arm in own}
        if any(n and n == self.count("confirm", *STATES, arm=arm) for arm, n in failed.items()):
            return False
        return all(self.count(stage, *OUTCOMES) >= self.planned(stage)[2] for stage in STAGES)


def _sum(took: Iterable[tuple[float, int]]) -> tuple[float, int]:
    pairs = list(took)
    return sum(seconds for seconds, _ in pairs), sum(number for _, number in pairs)


class LadderProgress(Progress):
    """Progress of all rungs after a sequence of events, with the interface of `Progress`.

    Counts are sums over the rungs. The best losses and the stage are those of the rung that runs now.
    """

    def __init__(self, study: Study, events: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(study)
        self.rung = 1  # the highest one that has begun
        self._rungs = [Progress(rung) for rung in study.rungs]
        self._of: dict[str, int] = {}  # rung of each cell
        self._dropped: list[str] = []
        for event in events:
            self.take(event)

    def take(self, event: dict[str, Any]) -> None:
        """Add an event of the ledger."""
        if event["event"] == "verdict":
            return
        self.last = event["time"]
        if event["event"] == "dropped":
            self._dropped = list(event["arms"])
            for rung in range(event["rung"], len(self._rungs) + 1):
                self._rungs[rung - 1] = Progress(self.study.at(rung, self._dropped))
            return
        rung = event.get("rung", self._of.get(event.get("cell", ""), 0))
        if not rung:
            return
        if event["event"] == "suggested":
            self._of[event["cell"]] = rung
        self.rung = max(self.rung, rung)
        self._rungs[rung - 1].take(event)
        self.failures = self._rungs[rung - 1].failures
        self.chosen = self.now.chosen

    def set_running(self, running: Collection[str]) -> None:
        """Set the running cells. Cells that an earlier run left unfinished wait again."""
        for progress in self._rungs:
            progress.set_running(running)

    @property
    def now(self) -> Progress:
        """Progress of the rung that runs now."""
        return self._rungs[self.rung - 1]

    @property
    def stage(self) -> str:
        """Stage of the rung that runs now."""
        return self.now.stage

    @property
    def running(self) -> int:
        """Number of cells that run now."""
        return sum(progress.running for progress in self._rungs)

    @property
    def ended(self) -> int:
        """Number of cells that have ended, with any outcome."""
        return sum(progress.ended for progress in self._rungs)

    @property
    def tokens_per_second(self) -> float | None:
        """Sum of the speeds of all running cells."""
        return self.now.tokens_per_second

    @property
    def finished(self) -> bool:
        """True if the largest number of cells of every rung has ended."""
        return all(progress.finished for progress in self._rungs)

    def count(self, stage: str, *states: str, arm: str | None = None) -> int:
        """Return the number of cells of a stage in one of these states, over all rungs."""
        return sum(progress.count(stage, *states, arm=arm) for progress in self._rungs)

    def best(self, stage: str, arm: str) -> Best | None:
        """Return the best result of an arm in a stage on the rung that runs now."""
        return self.now.best(stage, arm)

    def planned(self, stage: str) -> Span:
        """Return the least, expected and largest number of cells of a stage, over all rungs."""
        least, likely, most = zip(*(progress.planned(stage) for progress in self._rungs), strict=True)
        return sum(least), sum(likely), sum(most)

    def seconds_left(self, slots: int, now: float) -> tuple[float, float] | None:
        """Return the expected and the largest number of seconds until the ladder ends, or None if unknown.

        A rung that has not begun is assumed to run at the speed, in FLOPs per second, of the last one that has.
        """
        likely = most = 0.0
        rate = None
        for progress in self._rungs:
            work = progress.study.compute
            progress.assumed = work / rate if rate else None
            found = progress.seconds_left(slots, now)
            if found is None:
                return None
            likely, most = likely + found[0], most + found[1]
            if seconds := progress.seconds_per_cell:
                rate = work / seconds
        return likely, most


def progress_of(study: Study, events: Iterable[dict[str, Any]] = ()) -> Progress:
    """Return the progress of a study or of a ladder after a sequence of events."""
    return LadderProgress(study, events) if study.scales else Progress(study, events)
