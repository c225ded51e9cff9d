"""Schedules: pure functions of the fraction of training done, for the learning rate and for alpha.

A step has no meaning of its own here: the loop turns it into a fraction in [0, 1], so that the same schedule
serves a run of any length. With `steps` updates, `(step + 0.5) / steps` gives every update its midpoint, and
neither the first nor the last one a multiplier of zero.
"""

import math
from collections.abc import Callable

Schedule = Callable[[float, float, float], float]


def constant(fraction: float, start: float, end: float) -> float:
    """`start` throughout; `end` is not looked at."""
    return start


def linear(fraction: float, start: float, end: float) -> float:
    """`start + fraction * (end - start)`."""
    return (1.0 - fraction) * start + fraction * end


def cosine(fraction: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`, flat at both ends (SGDR without restarts, arXiv 1608.03983)."""
    return linear(0.5 * (1.0 - math.cos(math.pi * fraction)), start, end)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}


def value(kind: str, fraction: float, start: float, end: float) -> float:
    """Value of the schedule `kind` at `fraction` of training, from `start` to `end`.

    Raises ValueError for a kind not in `SCHEDULES` and for a fraction outside [0, 1] (NaN included).
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: {kind!r} is not one of {', '.join(SCHEDULES)}")
    _require_fraction("fraction", fraction)
    return SCHEDULES[kind](fraction, start, end)


def warmup_then(kind: str, fraction: float, warmup: float = 0.05, final: float = 0.0) -> float:
    """Learning-rate multiplier in [0, 1]: linear from 0 to 1 over the first `warmup`, then `kind` to `final`.

    `fraction`, `warmup` and `final` are in [0, 1]. `warmup = 0` starts at 1. The default `final = 0` decays
    to zero, which at equal compute did better than a tenth of the peak (arXiv 2502.15938). With `constant` it
    stays at 1 after the warm-up, whatever `final` is.
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
