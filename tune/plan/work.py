"""What a study will train: cells, tokens and FLOPs by stage and arm, each as [least, expected, most].

Nothing runs here. What is not known before a study runs (which trials are stopped early, how far the learning-rate grid
is extended, at which look a sequential rule stops) is given as a range, and its expectation by a stated model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from tune.study.arm import GATES, OWN_GATE
from tune.study.sections import Distribution
from tune.study.study import Study

Span = tuple[float, float, float]  # least, expected, most
APART = 1.5  # factor by which the arms' best learning rates may differ, as in the simulations of docs/protocol.md
DRAWS = 4_000
STAGES = ("search", "calibrate", "confirm")


@dataclass(frozen=True)
class Model:
    """Size and cost of one arm's model: parameters (those of the alphas in them), training FLOPs a token."""

    parameters: int
    alpha_parameters: int
    flops_per_token: int


@dataclass(frozen=True)
class Work:
    """One stage of one arm: cells, tokens trained, FLOPs (evaluation in them)."""

    stage: str
    arm: str
    cells: Span
    tokens: Span
    flops: Span


def middle(where: Distribution) -> float:
    """A value inside a search range: the lowest of a choice, else the middle (geometric for loguniform)."""
    if where.choice is not None:
        return min(where.choice)
    low, high = where.loguniform or where.uniform or [0.0, 0.0]
    return math.sqrt(low * high) if where.loguniform else (low + high) / 2


def example(study: Study, arm: str) -> dict[str, float]:
    """A configuration of an arm that stands for all: its cost does not depend on the values."""
    return {name: middle(where) for name, where in study.space(arm).items()}


def countable_unit(study: Study, arm: str) -> dict[str, Any] | None:
    """An arm's arguments of `pagating.patch` for counting: every gate costs the same, so no file of an own is run."""
    unit = study.arms[arm].arguments(example(study, arm))
    own = unit is not None and OWN_GATE.fullmatch(unit.get("gate") or "")
    return {**unit, "gate": GATES[0]} if unit and own else unit


def arm_model(study: Study, arm: str, vocab_size: int) -> Model:
    """Parameters and FLOPs of an arm's model, which is built without memory (torch's `meta` device)."""
    unit = json.dumps(countable_unit(study, arm))
    return _model(study.task, vocab_size, json.dumps(study.model.sizes()), unit)


@cache  # a plan asks for the same model several times
def _model(task: str, vocab_size: int, sizes_json: str, unit_json: str) -> Model:
    import torch

    sizes, unit = json.loads(sizes_json), json.loads(unit_json)
    if task != "causal":
        return _denoising_model(task, vocab_size, sizes, unit)
    from pagating.gating.alpha import alpha_parameters
    from pagating.model.gpt2 import GPT2, GPT2Size, training_flops_per_token

    size = GPT2Size(vocab_size=vocab_size, **sizes)
    with torch.device("meta"):
        model = GPT2(size, unit)
    return Model(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(alpha.parameter.numel() for alpha in alpha_parameters(model)),
        training_flops_per_token(model),
    )


def _denoising_model(task: str, vocab_size: int, sizes: dict[str, Any], unit: dict[str, Any] | None) -> Model:
    import torch

    from pagating.gating.alpha import alpha_parameters
    from pagating.tasks.denoising import make_model, training_flops_per_token

    with torch.device("meta"):
        model = make_model(task, vocab_size, sizes, unit)
    return Model(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(alpha.parameter.numel() for alpha in alpha_parameters(model)),
        training_flops_per_token(task, vocab_size, sizes, unit),
    )


# --- one trial -------------------------------------------------------------------------------------------------------


def steps(study: Study) -> int:
    """Optimiser updates of a trial that is not stopped."""
    return study.fixed.tokens // study.fixed.batch_tokens


def interval(study: Study) -> int:
    """Steps between two evaluations, as `pagating.train.Trial` has it."""
    return study.fixed.eval_every or max(1, math.ceil(steps(study) / 10))


def evaluations(study: Study, until: int | None = None) -> int:
    """Evaluations of the validation split in a trial's first `until` steps (all of them when None)."""
    return math.ceil((steps(study) if until is None else until) / interval(study))


def rung(study: Study) -> int:
    """The step at which a search trial may be stopped: its first evaluation at `spare` of the budget or later.

    The last step where no evaluation before it qualifies (or there is no pruner): then no trial is stopped.
    """
    total, every = steps(study), interval(study)
    at = every * math.ceil(study.search.spare * total / every - 1e-9)
    return at if study.search.pruner == "asha" and at < total else total


def evaluation_tokens(study: Study, windows: int | None = None) -> int:
    """Tokens of one evaluation. `windows`: how many the split has, where that is known."""
    count = study.fixed.eval_windows if windows is None else min(windows, study.fixed.eval_windows)
    return count * study.model.n_ctx


def validation_tokens(study: Study, windows: int | None = None) -> int:
    """Tokens of one look at the validation split: its windows, and as many padded lines where lines are trained on."""
    lines = study.fixed.eval_windows * study.model.n_ctx if study.corpus.rows == "lines" else 0
    return evaluation_tokens(study, windows) + lines


# --- search ----------------------------------------------------------------------------------------------------------


def stop_chance(study: Study, index: int) -> float:
    """Chance that an arm's search trial number `index` is stopped at the rung, were all its trials equally good.

    The rung rule (`tune.decide.search.ArmSearch.should_stop`) stops a trial when at least max(1, keep (m + 1)) of the m
    trials that it sees were better; the number of better ones is then uniform on 0 .. m. A sampler that improves makes
    later trials better than earlier ones, so fewer are stopped.
    """
    seen = max(0, index - study.search.parallel + 1)
    if rung(study) == steps(study) or seen < 2:
        return 0.0
    least = math.ceil(max(1.0, study.search.keep * (seen + 1)) - 1e-9)
    return max(0, seen + 1 - least) / (seen + 1)


def stopped(study: Study) -> Span:
    """Search trials of one arm that are stopped early."""
    chances = [stop_chance(study, index) for index in range(study.search.trials_per_arm)]
    return 0.0, sum(chances), float(sum(chance > 0 for chance in chances))


# --- calibrate -------------------------------------------------------------------------------------------------------


def _log_range(where: Distribution) -> tuple[float, float]:
    values = where.choice or where.loguniform or where.uniform or [1.0]
    return math.log(min(values)), math.log(max(values))


def grid_chances(study: Study) -> dict[int, float]:
    """Number of points of the final learning-rate grid, and its chance.

    The model: the arms share a best rate that lies anywhere in the searched range (uniform in the logarithm), each up
    to a factor sqrt(APART) off it; the grid is centred on the trial nearest to the best, of trials that fall anywhere
    in the range; an arm's best point is the nearest one. A best rate outside the range extends the grid further.
    """
    if not study.runs("calibrate"):
        return {0: 1.0}
    settings = study.calibrate
    low, high = _log_range(study.nuisance["lr"])
    return _grid_chances(
        high - low,
        study.search.trials_per_arm,
        len(study.arms),
        settings.points,
        settings.max_points,
        math.log(settings.spacing),
    )


@lru_cache(maxsize=64)
def _grid_chances(width: float, trials: int, arms: int, points: int, most: int, spacing: float) -> dict[int, float]:
    draw = np.random.default_rng(0)
    best = draw.uniform(0, width, DRAWS)
    tried = draw.uniform(0, width, (DRAWS, min(trials, 1_000)))
    centre = np.take_along_axis(tried, np.abs(tried - best[:, None]).argmin(1)[:, None], 1)[:, 0]
    off = best[:, None] + draw.uniform(-0.5, 0.5, (DRAWS, arms)) * math.log(APART) - centre[:, None]
    inside = (points - 2) / 2  # in spacings from the centre, where the best point has a neighbour on either side
    below = np.ceil(np.maximum(0.0, -off.min(1) / spacing - inside)).astype(int)
    above = np.ceil(np.maximum(0.0, off.max(1) / spacing - inside)).astype(int)
    sizes, counts = np.unique(np.minimum(points + below + above, most), return_counts=True)
    return {int(size): float(count) / DRAWS for size, count in zip(sizes, counts, strict=True)}


def grid_points(study: Study) -> Span:
    """Points of the final learning-rate grid."""
    if not study.runs("calibrate"):
        return 0.0, 0.0, 0.0
    expected = sum(points * chance for points, chance in grid_chances(study).items())
    return float(study.calibrate.points), expected, float(study.calibrate.max_points)


# --- all stages ------------------------------------------------------------------------------------------------------


def confirm_seeds(study: Study, expected: float | None = None) -> Span:
    """Confirm seeds: the first look, `expected` (the last look when None), the last look."""
    if not study.runs("confirm"):
        return 0.0, 0.0, 0.0
    looks = study.confirm.looks
    return float(looks[0]), float(looks[-1] if expected is None else expected), float(looks[-1])


def work(study: Study, models: dict[str, Model], seeds: Span, windows: dict[str, int] | None = None) -> list[Work]:
    """Cells, tokens and FLOPs of every stage and arm.

    `models`: by arm; `seeds`: of the confirm stage; `windows`: evaluation windows that the splits hold, by split.
    """
    held = windows or {}
    whole, cut = steps(study), rung(study)
    evaluation = validation_tokens(study, held.get("validation"))
    last = evaluation_tokens(study, held.get("test"))
    if study.corpus.rows == "packed":
        last += evaluation_tokens(study)  # padded lines
    batch = study.fixed.batch_tokens
    least, likely, most = stopped(study)
    trials = study.search.trials_per_arm
    found = []
    for arm, model in models.items():

        def flops(tokens: float, evaluated: float, rate: int = model.flops_per_token) -> float:
            return rate * (tokens + evaluated / 3)  # an evaluation is the forward third of a training step

        spans: list[tuple[str, Span, Span, Span]] = []
        search = [(trials - n) * whole + n * cut for n in (most, likely, least)]
        looked = [(trials - n) * evaluations(study) + n * evaluations(study, cut) for n in (most, likely, least)]
        spans.append(
            (
                "search",
                (trials, trials, trials),
                _span(n * batch for n in search),
                _span(flops(n * batch, k * evaluation) for n, k in zip(search, looked, strict=True)),
            )
        )
        for stage, cells in (
            ("calibrate", _span(points * study.calibrate.seeds for points in grid_points(study))),
            ("confirm", seeds),
        ):
            each = evaluations(study) * evaluation + (last if stage == "confirm" else 0)
            spans.append(
                (
                    stage,
                    cells,
                    _span(n * whole * batch for n in cells),
                    _span(n * flops(whole * batch, each) for n in cells),
                )
            )
        found += [Work(stage, arm, cells, tokens, operations) for stage, cells, tokens, operations in spans]
    return sorted(found, key=lambda row: STAGES.index(row.stage))


def _span(values: Any) -> Span:
    least, expected, most = values
    return float(least), float(expected), float(most)


def total(rows: list[Work], what: str) -> Span:
    """Sum of `cells`, `tokens` or `flops` over rows."""
    return _span(sum(getattr(row, what)[i] for row in rows) for i in range(3))
