"""Schedules of the learning rate and of alpha: pure functions of the fraction of training done.

The loop converts a step to a fraction in [0, 1], so that a schedule fits a trial of any length. With `steps` updates,
`(step + 0.5) / steps` is the midpoint of an update, so that neither the first nor the last has a multiplier of zero.
"""

import math
from collections.abc import Callable

Schedule = Callable[[float, float, float], float]


def constant(fraction: float, start: float, end: float) -> float:
    """Return `start`; `fraction` and `end` have no effect."""
    return start


def linear(fraction: float, start: float, end: float) -> float:
    """Return `start + fraction * (end - start)`."""
    return (1.0 - fraction) * start + fraction * end


def cosine(fraction: float, start: float, end: float) -> float:
    """Return half a cosine from `start` to `end`, flat at both ends (SGDR without restarts, arXiv 1608.03983)."""
    return linear(0.5 * (1.0 - math.cos(math.pi * fraction)), start, end)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}


def value(kind: str, fraction: float, start: float, end: float) -> float:
    """Return the value of the schedule `kind` at `fraction` of training, from `start` to `end`.

    Raise ValueError if `kind` is not in `SCHEDULES` or `fraction` is outside [0, 1] or NaN.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: {kind!r} is not one of {', '.join(SCHEDULES)}")
    _require_fraction("fraction", fraction)
    return SCHEDULES[kind](fraction, start, end)


def warmup_then(kind: str, fraction: float, warmup: float = 0.05, final: float = 0.0) -> float:
    """Compute the learning-rate multiplier, in [0, 1]: a linear warm-up from 0 to 1, then `kind` from 1 to `final`.

    Args:
        kind: Key of `SCHEDULES`. `constant` stays at 1 after the warm-up for any `final`.
        fraction: Share of training done, in [0, 1].
        warmup: Share of training for the warm-up, in [0, 1]; 0 starts at 1.
        final: Last multiplier, in [0, 1]. Decay to zero, the default, did better at equal compute than decay to a tenth
            of the peak (arXiv 2502.15938).
    """
    _require_fraction("fraction", fraction)
    _require_fraction("warmup", warmup)
    _require_fraction("final", final)
    if fraction < warmup:
        return fraction / warmup
    if warmup == 1.0:
        return 1.0
    return value(kind, (fraction - warmup) / (1.0 - warmup), 1.0, final)


def _require_fraction(name: str, number: float) -> None:
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: {number} is outside [0, 1]")
