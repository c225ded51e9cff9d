"""The scale of each nuisance hyperparameter: how far apart its values are, its legal range, and how it is rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

DIGITS = 4  # significant digits of a value that a fit chose: its last bits depend on the machine
LEGAL = {  # lowest and highest value that calibrate tries
    "lr": (0.0, 100.0),
    "weight_decay": (0.0, 10.0),
    "warmup": (0.0, 0.9),
    "final_lr": (0.0, 1.0),
    "beta1": (0.0, 0.9999),
    "beta2": (0.0, 0.999999),
    "clip": (0.0, math.inf),
    "dropout": (0.0, 0.9),
    "initializer_range": (0.0, 1.0),
    "batch_tokens": (1.0, math.inf),
}
DECAYS = ("beta1", "beta2")  # their natural scale is that of 1 - value, the share that each step forgets


@dataclass(frozen=True)
class Scale:
    """The scale of a nuisance hyperparameter. On it, values that matter alike are equally far apart.

    `step` is the distance of neighbouring points of calibrate, `low` and `high` are the legal ends, all on the scale.
    Values are multiples of `unit`, or any number if it is None. If they are `listed`, the scale is the place in a list.
    """

    name: str
    to: Callable[[float], float]
    back: Callable[[float], float]
    step: float
    low: float
    high: float
    unit: int | None = None
    listed: bool = False

    @property
    def logarithmic(self) -> bool:
        """True if the scale is the logarithm of the value."""
        return self.to is math.log

    def value(self, at: float) -> float:
        """Return the legal value of a position on the scale, rounded."""
        if self.unit:
            return float(self.unit * max(1, round(self.back(min(at, self.high)) / self.unit)))
        if self.listed:
            return self.back(max(self.low, min(at, self.high)))
        if at <= self.low + 1e-9 or at >= self.high - 1e-9:
            return self.back(self.low if at <= self.low + 1e-9 else self.high)
        found = self.back(at)
        if self.name in DECAYS:  # rounded as the share that is forgotten
            return round(1 - float(f"{1 - found:.{DIGITS}g}"), 12)
        return float(f"{found:.{DIGITS}g}")

    def beyond(self, value: float, side: int) -> float:
        """Return the value a step below (-1) or above (1) a value, another one than it."""
        found = self.value(self.to(value) + side * self.step)
        return value + side * self.unit if self.unit and found == value else found

    def mean(self, values: Iterable[float]) -> float:
        """Return the value in the middle of values, on the scale."""
        at = [self.to(value) for value in values]
        return self.value(math.fsum(at) / len(at))

    def is_end(self, value: float, side: int) -> bool:
        """Return True if no point fits between a value and the legal end on a side: -1 below, 1 above."""
        end = self.low if side < 0 else self.high
        return abs(end - self.to(value)) < self.step / 4


def batch_limits(model: Mapping[str, Any], fixed: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens of which a step has a multiple, and the most that it may have: half of a trial.

    Args:
        model: Section `model` of a study file.
        fixed: Its section `fixed`.
    """
    unit = int(fixed.get("micro_batch_tokens") or model["n_ctx"])
    return unit, max(1, int(fixed["tokens"]) // 2 // unit) * unit


def is_whole(where: Mapping[str, Any]) -> bool:
    """Return True if a search range is a choice of whole numbers."""
    choice = where.get("choice") or []
    return bool(choice) and all(float(value).is_integer() for value in choice)


def scale_of(
    name: str,
    where: Mapping[str, Sequence[float]],
    spacing: float,
    batch: tuple[int, int] | None = None,
    own: bool = False,
) -> Scale:
    """Return the scale of a nuisance hyperparameter.

    It is the logarithm for `loguniform`, `lr` and `batch_tokens`, and the value itself for `uniform`. For `beta1` and
    `beta2` it is log(1 - value). A `choice` has the logarithm if all its values are above 0 and the largest is four
    times the smallest or more. The step is a quarter of the searched range; that of the learning rate is log(spacing).

    Args:
        name: The hyperparameter.
        where: Its search range as in a study file: a key `uniform`, `loguniform` or `choice` with its values.
        spacing: Ratio of neighbouring learning rates.
        batch: The `batch_limits` of the study, for `batch_tokens`.
        own: The study trains the user's own code. There a `choice` has no values but those listed, with neighbours in
            the list one step apart.
    """
    kind, values = next((kind, values) for kind, values in where.items() if values)
    least, most = min(values), max(values)
    known = LEGAL.get(name, (math.inf, -math.inf))
    of_name = known[0] <= least and most <= known[1]  # a name of the user's own study may mean something else
    low, high = known if of_name else (0.0, math.inf) if kind == "loguniform" else (least, most)
    unit = None
    if own and kind == "choice" and name != "lr":
        listed = sorted(map(float, values))
        import numpy as np  # a tenth of a second

        place = partial(np.interp, xp=listed, fp=range(len(listed)))
        return Scale(
            name, lambda v: float(place(v)), lambda at: listed[round(at)], 1.0, 0.0, len(listed) - 1.0, None, True
        )
    if name == "batch_tokens" and batch:
        unit, (low, high) = batch[0], map(float, batch)
    if name in DECAYS and of_name:
        return _scale(name, lambda v: -math.log1p(-v), lambda u: -math.expm1(-u), (least, most), (low, high))
    logarithmic = kind == "loguniform" or (kind == "choice" and least > 0 and most >= 4 * least)
    if name in ("lr", "batch_tokens") or logarithmic:
        step = math.log(spacing) if name == "lr" else None
        return _scale(name, math.log, math.exp, (least, most), (low or math.ulp(0.0), high), step, unit)
    return _scale(name, float, float, (least, most), (low, high))


def _scale(
    name: str,
    to: Callable[[float], float],
    back: Callable[[float], float],
    searched: tuple[float, float],
    legal: tuple[float, float],
    step: float | None = None,
    unit: int | None = None,
) -> Scale:
    width = to(searched[1]) - to(searched[0])
    high = to(legal[1]) if math.isfinite(legal[1]) else math.inf
    return Scale(name, to, back, step or width / 4, to(legal[0]), high, unit)


def calibrated(nuisance: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Return the hyperparameters that calibrate chooses: `lr` if there is one, then those with more than one value."""
    several = [name for name, where in nuisance.items() if any(len(set(values or ())) > 1 for values in where.values())]
    return [*(["lr"] if "lr" in nuisance else []), *(name for name in several if name != "lr")]


def first_of(nuisance: Mapping[str, Mapping[str, Sequence[float]]]) -> str | None:
    """Return the hyperparameter that is tuned first: the first calibrated one, or else the first of all, if any."""
    return next(iter([*calibrated(nuisance), *nuisance]), None)
