"""The calibrate stage: shared points of every nuisance hyperparameter, and the value that each arm takes from them.

Nothing here trains. The stages ask for cells, record their losses, and ask again until no cell is left.

1. The first one, `study.first`, has a shared grid. The other nuisance hyperparameters stay at a shared centre.
2. Each further one has a grid of shared values around that centre. Each arm runs it at the optima found so far.
3. If there are two or more, corner points around each arm's optimum show how they interact. A joint fit through all
   points of an arm moves its optimum. New corners follow until no arm gains more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from analysis.stats.optimum import Bracket, bracket, enclosed, optima
from analysis.stats.scale import Scale
from analysis.stats.surface import JointOptimum, joint_optima
from tune.study.cell import Cell
from tune.study.sizes import MOST_ROUNDS, corner_points, scales
from tune.study.study import Study, digest

FIRST_SELECTION_SEED = 11  # the selection seeds are 11, 12, ...
CORNER = 0.7  # distance of a corner from the optimum on each axis, in steps
GAIN = 0.25  # gain of a joint fit over the optimum before, in standard errors of a point, that asks for a new round
SAME = 1e-9  # relative difference of learning rates that differ by rounding only
FORM = 3  # of the calibrate stage: ledgers that began with another one go on with it (`form_of`)
NARROWEST = 1 / 8  # distance to an infeasible neighbour, in steps, up to which no point is inserted


@dataclass
class Axis:
    """The grid of one nuisance hyperparameter: ascending values, and the configuration of each arm beside it."""

    scale: Scale
    values: list[float]
    beside: dict[str, dict[str, float]]

    @property
    def name(self) -> str:
        """Name of the hyperparameter."""
        return self.scale.name

    def config(self, arm: str, value: float) -> dict[str, float]:
        """Return an arm's configuration at a value of the grid."""
        return {**self.beside[arm], self.name: value}

    def ends(self) -> tuple[bool, bool]:
        """Return if no legal value lies beyond the lowest and the highest point of the grid."""
        return self.scale.is_end(self.values[0], -1), self.scale.is_end(self.values[-1], 1)

    def beyond(self, side: int) -> float:
        """Return the next value outside the grid, below it (-1) or above it (1)."""
        if self.name == "lr":
            spacing = math.exp(self.scale.step)
            return self.values[0] / spacing if side < 0 else self.values[-1] * spacing
        return self.scale.beyond(self.values[0 if side < 0 else -1], side)

    def between(self, low: float, high: float) -> float | None:
        """Return the value in the middle of two neighbours, or None if they are too close."""
        at = [self.scale.to(low), self.scale.to(high)]
        return self.scale.value(sum(at) / 2) if at[1] - at[0] > NARROWEST * self.scale.step else None


def form_of(grids: Iterable[Mapping[str, Any]], seeds: int) -> int:
    """Return the version of the calibrate stage with which a ledger began, from its grid events; `FORM` without any.

    Args:
        grids: Events of the ledger, each with the decision on a grid.
        seeds: Selection seeds of the study. With two or more, versions 2 and 3 are the same.
    """
    for event in grids:
        return 1 if "nuisance" not in event else int(event.get("form", 2 if seeds == 1 else FORM))
    return FORM


class Calibration:
    """The calibrate stage of a study.

    Arms that are added later run on the points of the first ones. The configurations of the first ones stay.

    Args:
        study: The study.
        decided: Called with each decision, for the ledger.
        form: Version of the stage: 3, or that with which a ledger began. 2: one selection seed shows no noise. 1: also,
            only the learning rate is calibrated, and no point is inserted next to a divergence.
        recorded: First grid of learning rates in the ledger. It is taken instead of one that is equal up to rounding,
            because the last bits of a power depend on the machine, and a study may go on on another one.
    """

    def __init__(
        self,
        study: Study,
        decided: Callable[..., Any],
        form: int = FORM,
        recorded: Sequence[float] | None = None,
    ) -> None:
        self.study, self._decided, self._form, self._first_form = study, decided, form, form == 1
        self._recorded = list(recorded or ())
        self._scales = {name: scale for name, scale in scales(study).items() if name == "lr" or form > 1}
        self.names = list(self._scales)
        self.capped = False  # True if `max_points` ended the extension of a grid
        self._axes: list[Axis] = []
        self._arms: list[str] = []  # the arms whose configurations are sought now
        self._centre: dict[str, float] = {}
        self._now: dict[str, dict[str, float]] = {}  # each arm's best configuration so far
        self._axis = 0  # number of the axis whose cells run; that of no axis in the rounds of corners
        self._round = 0
        self._rounds = 0  # of the first arms; later ones have as many
        self._configs: dict[str, dict[str, dict[str, float]]] = {}  # those that were planned, by arm and digest
        self._losses: dict[tuple[str, str, int], float] = {}  # by arm, digest of the configuration, and seed

    @property
    def grid(self) -> list[float]:
        """The grid of the first hyperparameter, empty before it is known."""
        return self._axes[0].values if self._axes else []

    # --- cells ---

    def begin(self, best: Mapping[str, Mapping[str, float]]) -> list[Cell]:
        """Return the first cells of arms whose searches found the configurations `best`."""
        self._arms, self._axis, self._round = list(best), 0, 0
        if not self._centre:
            self._centre = {
                name: self._scales[name].mean(config[name] for config in best.values())
                for name in self.names
                if name != "lr"  # the centre of its grid is not rounded
            }
        beside = {name: value for name, value in self._centre.items() if name != self.names[0]}
        self._now |= {arm: {**config, **beside} for arm, config in best.items()}
        return self._begin_axis([config[self.names[0]] for config in best.values()])

    def _begin_axis(self, found: Iterable[float] = ()) -> list[Cell]:
        """Return the cells of the current axis for the arms. `found` are the best values of their searches."""
        name, settings = self.names[self._axis], self.study.calibrate
        if self._axis == len(self._axes):
            scale = self._scales[name]
            if name == "lr":
                values = geometric_grid(geometric_mean(list(found)), settings.points, settings.spacing)
                if len(values) == len(self._recorded) and np.allclose(values, self._recorded, rtol=SAME, atol=0):
                    values = self._recorded
            else:
                values = _grid(scale, self._centre[name], settings.points)
            self._axes.append(Axis(scale, values, {}))
        axis = self._axes[self._axis]
        axis.beside |= {arm: self._now[arm] for arm in self._arms}
        self._decide_grid(axis)
        return self._axis_cells(axis, axis.values, self._arms)

    def _decide_grid(self, axis: Axis) -> None:
        named: dict[str, Any] = {} if self._first_form else {"nuisance": axis.name}
        if self._form > 2 and self.study.calibrate.seeds == 1:
            named["form"] = self._form
        self._decided("grid", **named, grid=list(axis.values), best=dict(axis.beside))

    def record(self, cell: Cell, loss: float) -> None:
        """Record the validation loss of a cell in nats per token, infinite if it was infeasible."""
        self._losses[cell.arm, cell.config_key, cell.seed] = loss

    def more(self) -> list[Cell]:
        """Return the cells that follow after all cells so far have ended; none if every arm can choose."""
        while self._axis < len(self.names):
            axis = self._axes[self._axis]
            if cells := self._extend(axis):
                return cells
            for arm, value in self._optima(axis).items():
                self._now[arm] = {**self._now[arm], axis.name: value}
            self._axis += 1
            if self._axis < len(self.names) and (cells := self._begin_axis()):
                return cells
        return self._corners() if len(self.names) > 1 and self.study.calibrate.choice == "fit" else []

    def _extend(self, axis: Axis) -> list[Cell]:
        """Extend the grid, for all arms, at each end that is an arm's optimum; return the new cells, if any.

        If no end is one, insert points between an arm's best one and an infeasible neighbour.
        """
        best = {self._best_point(axis, arm) for arm in self._arms}
        legal = axis.ends()
        new = [axis.beyond(-1)] if 0 in best and not legal[0] else []
        new += [axis.beyond(1)] if len(axis.values) - 1 in best and not legal[1] else []
        if not new and not self._first_form:
            new = self._inserted(axis)
        room = self.study.calibrate.max_points - len(axis.values)
        self.capped |= bool(new) and room <= 0
        if not new or room <= 0:
            return []
        new = new[:room]
        axis.values = sorted(axis.values + new)
        self._decide_grid(axis)
        return self._axis_cells(axis, new, axis.beside)

    def _inserted(self, axis: Axis) -> list[float]:
        """Return the values halfway between an arm's best point and an infeasible neighbour."""
        found = set()
        for arm in self._arms:
            means, best = self._means(axis, arm), self._best_point(axis, arm)
            for low, high in ((best - 1, best), (best, best + 1)):
                pair = means[low : high + 1] if low >= 0 else []
                if len(pair) == 2 and math.isfinite(min(pair)) and math.isinf(max(pair)):
                    found.add(axis.between(axis.values[low], axis.values[high]))
        return sorted(value for value in found if value is not None and value not in axis.values)

    def _axis_cells(self, axis: Axis, values: list[float], arms: Iterable[str]) -> list[Cell]:
        """Return the cells of arms at values of a grid, seed by seed, the arms side by side."""
        return self._cells(
            [(arm, axis.values.index(v), axis.config(arm, v)) for v in values for arm in arms], axis.name
        )

    def _cells(self, wanted: Iterable[tuple[str, int, dict[str, float]]], axis: str) -> list[Cell]:
        """Return the cells of arms, numbers and configurations, without those that were planned before."""
        new = []
        for arm, index, config in wanted:
            key = digest(config)
            if key not in self._configs.setdefault(arm, {}):
                self._configs[arm][key] = config
                new.append((arm, index, config, key))
        axis = axis if len(self.names) > 1 else ""
        return [
            Cell("calibrate", arm, index, seed, config, key, axis, self.study.rung)
            for seed in self._seeds
            for arm, index, config, key in new
        ]

    @property
    def _seeds(self) -> range:
        first = self.study.seed(FIRST_SELECTION_SEED)
        return range(first, first + self.study.calibrate.seeds)

    def points(self, ahead: bool = False) -> int:
        """Return the number of points of an arm: those that are known, and the fewest of what is not.

        Args:
            ahead: Count only those of grids and corners that have not begun.
        """
        begun = 0 if ahead else sum(len(axis.values) for axis in self._axes)
        left = len(self.names) - (self._axis + 1 if ahead else len(self._axes))
        corners = 0 if self._first_form else corner_points(self.study)
        rounds = int(self._round == 0) if ahead else 2 * max(1, self._rounds) - 1  # the first is half a round
        return begun + max(0, left) * self.study.calibrate.points + rounds * corners

    # --- the grid of one hyperparameter ---

    def mean(self, arm: str, config: Mapping[str, float]) -> float:
        """Return an arm's mean validation loss at a configuration, infinite if a seed was infeasible or is missing."""
        losses = [self._losses.get((arm, digest(config), seed), math.inf) for seed in self._seeds]
        return math.fsum(losses) / len(losses)  # fsum: independent of the order

    def _means(self, axis: Axis, arm: str) -> list[float]:
        return [self.mean(arm, axis.config(arm, value)) for value in axis.values]

    def _best_point(self, axis: Axis, arm: str) -> int:
        means = self._means(axis, arm)
        return means.index(min(means))

    def _table(self, arm: str, configs: Iterable[Mapping[str, float]]) -> np.ndarray:
        """Return an arm's losses at configurations: configurations x seeds."""
        return np.array([[self._losses[arm, digest(config), seed] for seed in self._seeds] for config in configs])

    def _optima(self, axis: Axis) -> dict[str, float]:
        """Return the value that each arm takes from a grid."""
        chosen = {arm: axis.values[self._best_point(axis, arm)] for arm in self._arms}
        if self.study.calibrate.choice == "grid":
            return chosen
        tables = {arm: self._table(arm, [axis.config(arm, v) for v in axis.values]) for arm in axis.beside}
        tables = {arm: table for arm, table in tables.items() if np.isfinite(table).all(axis=1).any()}
        if axis.name == "lr":
            found = optima(axis.values, tables, self._form > 2)
            fitted = {arm: float(f"{found[arm].rate:.4g}") for arm in found}  # the last bits depend on the machine
        else:  # on a scale whose step is 1
            scale, centre = axis.scale, axis.scale.to(self._centre[axis.name])
            at = [math.exp((scale.to(value) - centre) / scale.step) for value in axis.values]
            found = optima(at, tables, self._form > 2)
            fitted = {arm: scale.value(centre + scale.step * math.log(found[arm].rate)) for arm in found}
        return chosen | {arm: fitted[arm] for arm in self._arms if arm in fitted}

    # --- corners ---

    def _corners(self) -> list[Cell]:
        """Fit jointly, and return the cells of the next round of corners, if any."""
        scales = list(self._scales.values())
        if self._round:
            before = {arm: self._position(self._now[arm]) for arm in self._arms}
            found = self._joint()
            gains = [one.gain(before[arm]) / one.standard_error for arm, one in found.items() if arm in before]
            for arm in self._arms:
                if arm in found:
                    at = found[arm].at.tolist()
                    values = {s.name: s.value(s.step * x) for s, x in zip(scales, at, strict=True)}
                    self._now[arm] = {**self._now[arm], **values}
            if self._round == MOST_ROUNDS or max(gains, default=0.0) < GAIN:
                return []
        self._round += 1
        self._rounds = max(self._rounds, self._round)
        centres = {arm: self._now[arm] for arm in self._arms}
        # The first corners alone may lie along a valley. Those of later rounds enclose an optimum that moved.
        ways = [way for way in product((1, -1), repeat=len(scales)) if self._round > 1 or math.prod(way) < 0]
        self._decided("corners", nuisances=self.names, round=self._round, points=len(ways), best=centres)
        wanted = []
        for number, way in enumerate(ways):
            for arm, centre in centres.items():
                moved = zip(scales, self._position(centre), way, strict=True)
                corner = {scale.name: scale.value(scale.step * (x + CORNER * sign)) for scale, x, sign in moved}
                wanted.append((arm, number, {**centre, **corner}))
        return self._cells(wanted, "corners")

    def _position(self, config: Mapping[str, float]) -> list[float]:
        """Return a configuration's place in steps of each axis."""
        return [scale.to(config[name]) / scale.step for name, scale in self._scales.items()]

    def _joint(self) -> dict[str, JointOptimum]:
        """Return the joint optima of all arms through all their points."""
        points = {arm: [self._position(config) for config in self._configs[arm].values()] for arm in self._now}
        return joint_optima(points, {arm: self._table(arm, self._configs[arm].values()) for arm in self._now})

    # --- the choice ---

    def _bracket(self, axis: Axis, arm: str) -> Bracket:
        """Return whether the arm's best point of a grid, and the value that it takes, lie between finite points."""
        found = bracket(self._means(axis, arm), axis.ends())
        if found is Bracket.CLOSED and self._round:
            tried = [
                config[axis.name] for config in self._configs[arm].values() if math.isfinite(self.mean(arm, config))
            ]
            return enclosed(self._now[arm][axis.name], tried, axis.scale)
        return found

    def choose(self) -> dict[str, dict[str, float]]:
        """Return the configuration of each arm that was sought."""
        chosen = {}
        for arm in self._arms:
            chosen[arm] = self._now[arm]
            point, ends = self._best_point(self._axes[0], arm), self._axes[0].ends()
            open_sides = {axis.name: self._bracket(axis, arm) for axis in self._axes}
            self._decided(
                "chosen",
                arm=arm,
                config=chosen[arm],
                config_key=digest(chosen[arm]),
                grid_best=self.grid[point],
                at_edge=(point == 0 and not ends[0]) or (point == len(self.grid) - 1 and not ends[1]),
                **({} if self._first_form else {"unbracketed": _named(open_sides)}),
            )
        return chosen


def _named(found: Mapping[str, Bracket]) -> dict[str, str]:
    return {name: str(why) for name, why in found.items() if why is not Bracket.CLOSED}


def _grid(scale: Scale, centre: float, points: int) -> list[float]:
    """Return ascending values around a centre, a step of the scale apart, moved into the legal range."""
    lowest = scale.to(centre) - scale.step * (points - 1) / 2
    lowest = max(scale.low, min(lowest, scale.high - scale.step * (points - 1)))
    return sorted({scale.value(lowest + scale.step * i) for i in range(points)})


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
