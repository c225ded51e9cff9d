"""Compute the power, the smallest visible effect and the needed seeds of a confirm stage from a known noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from tune.errors import StudyError
from tune.study.study import Study

SIMULATED = 200  # studies of a sequential rule
TARGET = 0.8  # power that is enough by convention


def percentage(text: str, option: str) -> float:
    """Return the share of a text such as 0.5%. Raises StudyError for any other text and for shares of 0 or less."""
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number) if text.strip().endswith("%") else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise StudyError(f"{option} {text}: allowed: a percentage of the baseline's loss above 0, such as 0.5%")
    return value / 100


def study_noise(folder: Path) -> tuple[float, dict[str, float]]:
    """Return the standard deviation of a study's paired confirm differences, as a share of the baseline's mean loss.

    Returns the pooled value and that of each arm. The pooled value is the root mean square over all arms except the
    floor, weighted by degrees of freedom. Seeds on which either trial diverged are left out. Raises StudyError if no
    arm has two pairs left.
    """
    from analysis.io.files import TableError
    from analysis.io.study import load
    from analysis.stats.pairs import pair

    try:
        study = load(folder)
    except TableError as error:
        raise StudyError(f"--noise {folder}: {error}") from error
    losses = study.losses()
    squares, freedom, each = 0.0, 0, {}
    for arm in study.arms:
        if arm == study.baseline:
            continue
        pairs = pair(losses, study.baseline, arm)
        differences = pairs.differences[pairs.complete]
        if len(differences) < 2:
            continue
        size = abs(pairs.baseline[pairs.complete].mean())  # the loss of a metric that grows is negative
        relative = differences / size
        each[arm] = float(relative.std(ddof=1))
        if study.unpaired:
            runs = (values[pairs.complete].std(ddof=1) for values in (pairs.baseline, pairs.arm))
            each[arm] = math.hypot(*map(float, runs)) / float(size)
        if arm != study.floor:
            squares, freedom = squares + each[arm] ** 2 * (len(differences) - 1), freedom + len(differences) - 1
    if not freedom or not squares > 0:
        raise StudyError(f"--noise {folder}: no arm but the floor has two confirm seeds that differ; give a percentage")
    return math.sqrt(squares / freedom), each


def first_level(study: Study) -> float:
    """Return the level of the correction's first step at the planned seeds, the strictest for an arm.

    The floor is in the family. A reserve for added seeds is not spent at the planned ones.
    """
    from analysis.stats.multiplicity import first_level as of_family

    confirm = study.confirm
    return of_family(len(study.comparisons), confirm.correction, confirm.level * (1 - confirm.reserve))


def confirm_power(study: Study, effect: float, noise: float) -> dict[str, Any]:
    """Return the power of a study's confirm stage at `first_level`, as one JSON object.

    The fixed rule is a t test (`analysis.stats.power`), paired or Welch's as the study says. A sequential rule is
    simulated on normal differences, but `smallest` and `needed` are always those of a fixed number of seeds.

    Args:
        study: The study.
        effect: Difference to detect, as a share of the baseline's loss.
        noise: Standard deviation of the paired differences, as a share of the baseline's loss. For Welch's test it is
            that of the difference of two runs.

    Returns:
        Among others: `power` to detect `effect`; `smallest`, the effect that all seeds detect with power 0.8; `needed`,
        the seeds that detect `effect` with power 0.8; `seeds`, the mean number until an arm with `effect` is decided;
        `study_seeds`, the mean number until all arms except the floor are decided, each with `effect`.
    """
    from analysis.stats.paired_tests import widened
    from analysis.stats.power import detectable_shift, power_of_t, seeds_needed

    level, cap = first_level(study), study.confirm.looks[-1]
    root = math.sqrt(cap) / widened(cap, study.overlap)
    df = (cap - 1) * (2 if study.confirm.test == "welch" else 1)
    found: dict[str, Any] = {
        "effect": effect,
        "noise": noise,
        "level": level,
        "level_is": "Holm's first step" if study.confirm.correction == "holm" else "no correction",
        "seeds": float(cap),
        "study_seeds": float(cap),
        "power": power_of_t(effect / noise * root, df, level),
        "smallest": detectable_shift(df, level, TARGET) / root * noise,
        "needed": seeds_needed(effect / noise, 0.0, level, level, TARGET, overlap=study.overlap),
    }
    if study.confirm.rule != "fixed":
        found |= _sequential(study, effect / noise, level)
    return found


def _sequential(study: Study, d_z: float, level: float) -> dict[str, float]:
    """Simulate a sequential rule; return `power`, `seeds` and `study_seeds` of `confirm_power`."""
    from analysis.stats.sequential import path

    confirm, draw = study.confirm, np.random.default_rng(0)
    arms = sum(not (arm.baseline or arm.floor) for arm in study.arms.values())
    cap = confirm.looks[-1]
    stops = np.full((SIMULATED, max(1, arms)), np.inf)
    for one in np.ndindex(*stops.shape):
        rows = path(draw.normal(d_z, 1.0, cap), confirm.rule, confirm.looks, confirm.level)
        stops[one] = min((row["n"] for row in rows if row["p_anytime"] <= level), default=np.inf)
    return {
        "power": float(np.isfinite(stops).mean()),
        "seeds": float(np.minimum(stops, cap).mean()),
        "study_seeds": float(np.minimum(stops.max(1), cap).mean()),
    }
