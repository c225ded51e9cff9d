"""Types of a ladder's trends: the trend of each arm, its numbers, and what an arm is worth in compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Trend(StrEnum):
    """Trend of an arm's improvement over the rungs. `analysis.verdict.ladder.words` has the sentences."""

    HOLDS = "holds"
    GROWS = "grows"
    SHRINKS = "shrinks"
    TURNS = "turns"
    UNDECIDED = "undecided"


@dataclass
class ComputeGain:
    """Factor by which the baseline's training compute would have to grow to reach an arm's loss, with its interval.

    A missing number is None, and `why` gives the reason.
    """

    arm: str
    baseline: str
    factor: float | None = None
    factor_low: float | None = None
    factor_high: float | None = None
    why: str = ""


@dataclass
class ArmTrend:
    """Trend of one arm over the rungs, and the numbers behind it; a missing number is None.

    `said` states `trend` as a sentence, and `why` gives its reasons. `rungs` are those whose verdict counts, and
    `slope_rungs` those of the slope, if there is one. `slope` is in
    percentage points of improvement per doubling of `axis`, with its interval at 1 - `level` for this arm alone.
    `p_adjusted` is corrected for the arms, which are a family of their own. `dropped_after` is the last rung that an
    arm ran before it was dropped.
    """

    arm: str
    baseline: str
    trend: Trend = Trend.UNDECIDED
    said: str = ""
    why: str = ""
    rungs: list[int] = field(default_factory=list)
    slope_rungs: list[int] = field(default_factory=list)
    slope: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None
    standard_error: float | None = None
    df: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    level: float = 0.0
    axis: str = "compute"
    dropped_after: int | None = None
    label: str = ""
