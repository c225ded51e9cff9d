"""The calibrate stage: the shared grid of learning rates, its extension, and the rate that each arm takes from it.

Nothing here trains. The stages ask for cells, record their losses, and ask again until no cell is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from analysis.stats.optimum import Optimum, optima
from tune.study.cell import Cell
from tune.study.study import Study, digest

FIRST_SELECTION_SEED = 11  # the selection seeds are 11, 12, ...


class Calibration:
    """The calibrate stage of a study.

    Arms that are added later run on the grid of the first ones. The configurations of the first ones stay.

    Args:
        study: The study.
        decided: Called with each decision, for the ledger.
    """

    def __init__(self, study: Study, decided: Callable[..., Any]) -> None:
        self.study, self._decided = study, decided
        self.grid: list[float] = []
        self.capped = False  # True if `max_points` ended the extension
        self._arms: list[str] = []  # the arms whose configurations are sought now
        self._best: dict[str, dict[str, float]] = {}  # each arm's best configuration of the search
        self._losses: dict[tuple[str, float, int], float] = {}

    @property
    def points(self) -> int:
        """Number of points of the grid, or of the first grid before there is one."""
        return len(self.grid) or self.study.calibrate.points

    def begin(self, best: dict[str, dict[str, float]]) -> list[Cell]:
        """Return the first cells of arms whose searches found the configurations `best`."""
        settings = self.study.calibrate
        self._arms = list(best)
        self._best |= best
        if not self.grid:
            centre = geometric_mean([config["lr"] for config in best.values()])
            self.grid = geometric_grid(centre, settings.points, settings.spacing)
        self._decided("grid", grid=self.grid, best=self._best)
        return self._cells(self.grid, self._arms)

    def record(self, cell: Cell, loss: float) -> None:
        """Record the validation loss of a cell in nats per token, infinite if it was infeasible."""
        self._losses[cell.arm, cell.config["lr"], cell.seed] = loss

    def extend(self) -> list[Cell]:
        """Extend the grid, for all arms, at each end that is an arm's optimum; return the new cells, if any."""
        points = {self._best_point(arm) for arm in self._arms}
        spacing, room = self.study.calibrate.spacing, self.study.calibrate.max_points - len(self.grid)
        new = [self.grid[0] / spacing] if 0 in points else []
        new += [self.grid[-1] * spacing] if len(self.grid) - 1 in points else []
        self.capped = bool(new) and room <= 0
        if not new or self.capped:
            return []
        new = new[:room]
        self.grid = sorted(self.grid + new)
        self._decided("grid", grid=self.grid, best=self._best)
        return self._cells(new, self._best)

    def choose(self) -> dict[str, dict[str, float]]:
        """Return the configuration of each arm that was sought."""
        found, chosen = self._optima(), {}
        for arm in self._arms:
            point = self._best_point(arm)
            rate = self.grid[point]
            if self.study.calibrate.choice == "fit" and arm in found:
                rate = float(f"{found[arm].rate:.4g}")  # the last bits of a fit depend on the machine
            chosen[arm] = {**self._best[arm], "lr": rate}
            self._decided(
                "chosen",
                arm=arm,
                config=chosen[arm],
                config_key=digest(chosen[arm]),
                grid_best=self.grid[point],
                at_edge=point in (0, len(self.grid) - 1),
            )
        return chosen

    def grid_mean(self, arm: str, rate: float) -> float:
        """Return an arm's mean validation loss at a learning rate of the grid, infinite if a seed was infeasible."""
        losses = [loss for (a, r, _), loss in self._losses.items() if a == arm and r == rate]
        return math.fsum(losses) / len(losses) if losses else math.inf  # fsum: independent of the order

    @property
    def _seeds(self) -> range:
        first = self.study.seed(FIRST_SELECTION_SEED)
        return range(first, first + self.study.calibrate.seeds)

    def _cells(self, rates: list[float], arms: Iterable[str]) -> list[Cell]:
        """Return the cells of arms at learning rates of the grid, seed by seed, the arms side by side."""
        out = []
        for seed in self._seeds:
            for rate in rates:
                for arm in arms:
                    config = {**self._best[arm], "lr": rate}
                    out.append(Cell("calibrate", arm, self.grid.index(rate), seed, config, digest(config)))
        return out

    def _best_point(self, arm: str) -> int:
        return min(range(len(self.grid)), key=lambda point: self.grid_mean(arm, self.grid[point]))

    def _optima(self) -> dict[str, Optimum]:
        """Return the optimum of every arm that has a finite loss for all selection seeds at a learning rate or more."""
        tables = {arm: [[self._losses[arm, rate, s] for s in self._seeds] for rate in self.grid] for arm in self._best}
        return optima(
            self.grid,
            {arm: np.array(rows) for arm, rows in tables.items() if np.isfinite(rows).all(axis=1).any()},
        )


def geometric_grid(centre: float, points: int, spacing: float) -> list[float]:
    """Return an ascending geometric grid of learning rates.

    Args:
        centre: Geometric mean of the grid.
        points: Number of learning rates.
        spacing: Ratio of neighbouring learning rates.
    """
    return [centre * spacing ** (i - (points - 1) / 2) for i in range(points)]


def geometric_mean(values: list[float]) -> float:
    """Return exp(mean(log(values)))."""
    return math.exp(sum(map(math.log, values)) / len(values))
