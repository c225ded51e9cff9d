"""Count the work of a study: cells, tokens and FLOPs by stage and arm, each as [least, expected, most].

Nothing runs here. Some counts are unknown before a study runs: the trials that are stopped early, the extension of the
learning-rate grid, the look at which a sequential rule stops. These are ranges, and their expectation follows from a
stated model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from analysis.io.names import STAGES
from pagating.gating.catalog import OWN_UNITS
from tune.study.sizes import (
    Span,
    arm_trials,
    countable_unit,
    evaluation_tokens,
    evaluations,
    grid_points,
    steps,
    stopping_step,
    validation_tokens,
)
from tune.study.study import Study

FLOPS_PER_PARAMETER = 6  # of training on a token: two in the forward pass, four in the backward pass


@dataclass(frozen=True)
class Model:
    """Size and cost of one arm's model. `parameters` include `alpha_parameters`; the FLOPs are those of training."""

    parameters: int
    alpha_parameters: int
    flops_per_token: int


@dataclass(frozen=True)
class Work:
    """The work of one stage of one arm: cells, training tokens, and FLOPs including evaluation."""

    stage: str
    arm: str
    cells: Span
    tokens: Span
    flops: Span


def arm_model(study: Study, arm: str, vocab_size: int) -> Model:
    """Return parameters and FLOPs of an arm's model, which is built on torch's `meta` device without memory.

    Parameters of the user's own activation are counted if it is registered in this process, each like one of a matrix.
    """
    unit = json.dumps(countable_unit(study, arm))
    model = _model(study.task, vocab_size, json.dumps(study.model.sizes()), unit)
    own = study.arms[arm].own_code
    if own is None or own.reference not in OWN_UNITS:
        return model
    more = study.mlps * _own_parameters(own.reference, 4 * study.model.d_model)
    return replace(
        model, parameters=model.parameters + more, flops_per_token=model.flops_per_token + FLOPS_PER_PARAMETER * more
    )


def _own_parameters(reference: str, width: int) -> int:
    """Return the parameters of one layer's own activation of `width` features."""
    from torch import nn

    from pagating.gating.own_check import plain_torch
    from pagating.gating.own_gate import make_unit

    with plain_torch():
        made = make_unit(reference, width)
    return sum(parameter.numel() for parameter in made.parameters()) if isinstance(made, nn.Module) else 0


@cache  # a plan asks for the same model several times
def _model(task: str, vocab_size: int, sizes_json: str, unit_json: str) -> Model:
    import torch

    from pagating.gating.alpha import alpha_parameters

    sizes, unit = json.loads(sizes_json), json.loads(unit_json)
    model: torch.nn.Module
    if task == "causal":
        from pagating.model import gpt2, size

        with torch.device("meta"):
            model = plain = gpt2.GPT2(size.GPT2Size(vocab_size=vocab_size, **sizes), unit)
        flops = gpt2.training_flops_per_token(plain)
    else:
        from pagating.tasks import denoising  # loads transformers, which takes seconds

        with torch.device("meta"):
            model = denoising.make_model(task, vocab_size, sizes, unit)
        flops = denoising.training_flops_per_token(task, vocab_size, sizes, unit)
    return Model(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(alpha.parameter.numel() for alpha in alpha_parameters(model)),
        flops,
    )


# --- search ----------------------------------------------------------------------------------------------------------


def stop_chance(study: Study, index: int) -> float:
    """Return the chance that search trial `index` of an arm is stopped early if all its trials are equally good.

    The rule (`tune.decide.search.ArmSearch.should_stop`) stops a trial if at least max(1, keep (m + 1)) of the m
    earlier trials that it sees were better. The number of better ones is uniform on 0 .. m. A sampler that improves
    makes later trials better, so that fewer are stopped.
    """
    seen = max(0, index - study.search.parallel + 1)
    if stopping_step(study) == steps(study) or seen < 2:
        return 0.0
    least = math.ceil(max(1.0, study.search.keep * (seen + 1)) - 1e-9)
    return max(0, seen + 1 - least) / (seen + 1)


def stopped(study: Study, arm: str) -> Span:
    """Return the number of search trials of an arm that are stopped early."""
    chances = [stop_chance(study, index) for index in range(arm_trials(study, arm))]
    return 0.0, sum(chances), float(sum(chance > 0 for chance in chances))


# --- all stages ------------------------------------------------------------------------------------------------------


def work(study: Study, models: dict[str, Model], seeds: Span, windows: dict[str, int] | None = None) -> list[Work]:
    """Return cells, tokens and FLOPs of every stage and arm.

    `models` are by arm, `seeds` those of the confirm stage, `windows` the number of evaluation windows by split.
    """
    held = windows or {}
    evaluation = validation_tokens(study, held.get("validation"))
    last = evaluation_tokens(study, held.get("test"))
    if study.corpus.rows == "packed":
        last += evaluation_tokens(study)  # padded lines
    batch = study.fixed.batch_tokens
    found = []
    for arm, model in models.items():
        (least, likely, most), trials = stopped(study, arm), arm_trials(study, arm)
        whole, cut = (study.length(arm, length) for length in (steps(study), stopping_step(study)))

        def flops(tokens: float, evaluated: float, rate: int = model.flops_per_token) -> float:
            return rate * (tokens + evaluated / 3)  # an evaluation is a forward pass, a third of a training step

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
    """Return the sum over rows of `what`: `cells`, `tokens` or `flops`."""
    return _span(sum(getattr(row, what)[i] for row in rows) for i in range(3))
