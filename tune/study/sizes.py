"""Step counts, stages and cell counts of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from analysis.stats.scale import Scale, calibrated, scale_of
from pagating.gating.catalog import DEFAULTS, own_code
from pagating.trial import evaluation_interval, step_count
from tune.study.sections import Distribution, SearchSection
from tune.study.study import Study

Span = tuple[float, float, float]  # least, expected, most
APART = 1.5  # factor by which the arms' best learning rates may differ, as in the simulations of docs/protocol.md
DRAWS = 4_000
MOST_ROUNDS = 5  # of corner points
CORNER_UNITS = (1.0, 2.0, 2.0 * MOST_ROUNDS - 1)  # least, expected, most points in units of a first round


def middle(where: Distribution) -> float:
    """Return a value of a search range: the lowest of a choice, else the middle (geometric for loguniform)."""
    if where.choice is not None:
        return min(where.choice)
    low, high = where.loguniform or where.uniform or [0.0, 0.0]
    return math.sqrt(low * high) if where.loguniform else (low + high) / 2


def example(study: Study, arm: str) -> dict[str, float]:
    """Return one configuration of an arm, for its cost, which depends on no value but the largest batch."""
    found = {name: middle(where) for name, where in study.space(arm).items()}
    return found | ({"batch_tokens": float(largest_batch(study))} if "batch_tokens" in found else {})


def countable_unit(study: Study, arm: str) -> dict[str, Any] | None:
    """Return an arm's arguments of `pagating.patch`. Known code replaces the user's, so that its file is not run."""
    unit = study.arms[arm].arguments(example(study, arm))
    own = own_code(unit)
    return {**(unit or {}), own.key: DEFAULTS["gate"] if own.key == "gate" else "silu"} if own else unit


def search_trials(space: Mapping[str, Distribution], settings: SearchSection) -> int:
    """Return the search trials of an arm: `trials_per_arm`, or the combinations of its choices if they are fewer."""
    if not all(where.choice for where in space.values()):
        return settings.trials_per_arm
    return min(settings.trials_per_arm, math.prod(len(set(where.values)) for where in space.values()))


def arm_trials(study: Study, arm: str) -> int:
    """Return the search trials of an arm of a study; 0 if it does not search."""
    return search_trials(study.space(arm), study.search) if study.searches(arm) else 0


def all_trials(study: Study) -> int:
    """Return the search trials of all arms of a study."""
    return sum(arm_trials(study, arm) for arm in study.arms)


def design_notes(study: Study) -> list[str]:
    """Return notes on stages that do less than their numbers suggest; an empty list if there is none."""
    return short_searches(study) + few_selection_runs(study)


def few_selection_runs(study: Study) -> list[str]:
    """Return a note if one selection seed cannot show the noise of a run, which the fit needs; else an empty list."""
    from analysis.stats.optimum import LEAST_FREEDOM  # loads numpy

    settings, shown = study.calibrate, (len(study.arms) - 1) * (study.calibrate.points - 3)
    fits = study.runs("calibrate") and settings.choice == "fit" and calibrated(study.ranges)
    if not fits or settings.seeds > 1 or shown >= LEAST_FREEDOM:
        return []
    return [
        f"calibrate: one selection seed on {settings.points} points and {len(study.arms)} arms does not show the noise "
        "of a trial, so that a flat curve is chosen by luck (docs/protocol.md); take seeds: 2, or points: "
        f"{3 + math.ceil(LEAST_FREEDOM / (len(study.arms) - 1))}"
    ]


def short_searches(study: Study) -> list[str]:
    """Return a note for the arms whose search ends before `trials_per_arm`; else an empty list."""
    short: dict[int, list[str]] = {}
    for arm in filter(study.searches, study.arms):
        if study.space(arm) and (trials := arm_trials(study, arm)) < study.search.trials_per_arm:
            short.setdefault(trials, []).append(arm)
    return [
        f"search: {', '.join(arms)} can have {trials} different configuration{'s' if trials > 1 else ''}, fewer than "
        f"search.trials_per_arm={study.search.trials_per_arm}; the search of each ends after {trials}"
        for trials, arms in short.items()
    ]


def batch(study: Study, config: Mapping[str, float]) -> int:
    """Return the tokens of a step of a configuration."""
    return int(config.get("batch_tokens", study.fixed.batch_tokens))


def largest_batch(study: Study) -> int:
    """Return the most tokens of a step in the study file, `fixed` or searched."""
    where = study.nuisance.get("batch_tokens")
    return int(max(where.values)) if where else study.fixed.batch_tokens


def steps(study: Study, config: Mapping[str, float] | None = None) -> int:
    """Return the optimiser updates of a trial that is not stopped early; `config` matters if it has a batch."""
    return step_count(study.fixed.tokens, batch(study, config or {}))


def interval(study: Study, config: Mapping[str, float] | None = None) -> int:
    """Return the number of steps between two evaluations.

    `eval_every` is that of `fixed.batch_tokens`. At another batch about as many tokens lie between evaluations.
    """
    every, tokens = study.fixed.eval_every, batch(study, config or {})
    if every and tokens != study.fixed.batch_tokens:
        every = max(1, round(every * study.fixed.batch_tokens / tokens))
    return evaluation_interval(steps(study, config), every)


def evaluations(study: Study, until: int | None = None) -> int:
    """Return the number of evaluations of the validation split in a trial's first `until` steps; None: all steps."""
    return math.ceil((steps(study) if until is None else until) / interval(study))


def stopping_step(study: Study) -> int:
    """Return the step at which a search trial may be stopped: its first evaluation at `spare` of the budget or later.

    Returns the last step, at which no trial is stopped, if there is no earlier such evaluation or no pruner.
    """
    total, every = steps(study), interval(study)
    at = every * math.ceil(study.search.spare * total / every - 1e-9)
    return at if study.search.pruner == "asha" and at < total else total


def evaluation_tokens(study: Study, windows: int | None = None) -> int:
    """Return the tokens of one evaluation. `windows` is the number of windows of the split, None if unknown."""
    count = study.fixed.eval_windows if windows is None else min(windows, study.fixed.eval_windows)
    return count * study.model.n_ctx


def validation_tokens(study: Study, windows: int | None = None) -> int:
    """Return the tokens of one evaluation of the validation split, including padded lines if lines are trained on."""
    lines = study.fixed.eval_windows * study.model.n_ctx if study.corpus.rows == "lines" else 0
    return evaluation_tokens(study, windows) + lines


def scales(study: Study) -> dict[str, Scale]:
    """Return the scale of each hyperparameter that calibrate chooses, `study.first` first."""
    ranges, own = study.ranges, bool(study.shown)
    spacing, limits = study.calibrate.spacing, study.batch_limits
    return {name: scale_of(name, ranges[name], spacing, limits, own) for name in calibrated(ranges)}


def grid_chances(study: Study) -> dict[str, dict[int, float]]:
    """Return, per calibrated hyperparameter, the probability of each number of points of its final grid.

    It is simulated. The arms share a best value, uniform over the searched range on its scale. Each arm's best value
    differs from it, as a learning rate does by a factor of up to sqrt(APART). The grid is centred on the search trial
    nearest to the best value, and search trials are uniform too. An arm that does not search has the middle of the
    range instead, and the centre is the mean over arms. An arm's best point is the nearest one. A best value outside
    the range would extend the grid further.
    """
    if not study.runs("calibrate"):
        return {}
    settings, found = study.calibrate, {}
    for name, scale in scales(study).items():
        ends = [scale.to(value) for value in study.nuisance[name].values]
        apart = math.log(APART) * (1.0 if name == "lr" else scale.step / math.log(settings.spacing))
        found[name] = _grid_chances(
            max(ends) - min(ends),
            study.search.trials_per_arm,
            sum(map(study.searches, study.arms)) / len(study.arms),
            len(study.arms),
            settings.points,
            settings.max_points,
            scale.step,
            apart,
        )
    return found


def corner_points(study: Study) -> int:
    """Return the points per arm of the first round of corners, which show how calibrated hyperparameters interact."""
    axes = len(scales(study))
    return 2 ** (axes - 1) if axes > 1 and study.runs("calibrate") and study.calibrate.choice == "fit" else 0


@lru_cache(maxsize=64)
def _grid_chances(
    width: float, trials: int, searching: float, arms: int, points: int, most: int, spacing: float, apart: float
) -> dict[int, float]:
    import numpy as np  # takes a tenth of a second, which `status` of a finished study does without

    draw = np.random.default_rng(0)
    best = draw.uniform(0, width, DRAWS)
    tried = draw.uniform(0, width, (DRAWS, min(trials, 1_000)))
    nearest = np.take_along_axis(tried, np.abs(tried - best[:, None]).argmin(1)[:, None], 1)[:, 0]
    centre = searching * nearest + (1 - searching) * width / 2
    off = best[:, None] + draw.uniform(-0.5, 0.5, (DRAWS, arms)) * apart - centre[:, None]
    inside = (points - 2) / 2  # spacings from the centre within which the best point has a neighbour on either side
    below = np.ceil(np.maximum(0.0, -off.min(1) / spacing - inside)).astype(int)
    above = np.ceil(np.maximum(0.0, off.max(1) / spacing - inside)).astype(int)
    sizes, counts = np.unique(np.minimum(points + below + above, most), return_counts=True)
    return {int(size): float(count) / DRAWS for size, count in zip(sizes, counts, strict=True)}


def grid_points(study: Study) -> Span:
    """Return the number of points per arm of the calibrate stage: of all grids and of the rounds of corners."""
    chances, corners = grid_chances(study), corner_points(study)
    expected = sum(points * chance for each in chances.values() for points, chance in each.items())
    least, most = len(chances) * study.calibrate.points, len(chances) * study.calibrate.max_points
    units = CORNER_UNITS
    return float(least + units[0] * corners), expected + units[1] * corners, float(most + units[2] * corners)


def confirm_seeds(study: Study, expected: float | None = None) -> Span:
    """Return the number of confirm seeds: at the first look, `expected` (None: the last look), at the last look."""
    if not study.runs("confirm"):
        return 0.0, 0.0, 0.0
    looks = study.confirm.looks
    return float(looks[0]), float(looks[-1] if expected is None else expected), float(looks[-1])


def side_by_side(study: Study, stage: str) -> int:
    """Return the number of trials of a stage that could run at the same time with enough machines."""
    arms = len(study.arms)
    if stage == "search":
        return sum(map(study.searches, study.arms)) * min(study.search.parallel, study.search.trials_per_arm)
    if stage == "calibrate":
        return arms * study.calibrate.points * study.calibrate.seeds
    return arms * study.confirm.looks[0] if stage == "confirm" else 0
