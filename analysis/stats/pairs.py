"""Pairing of an arm with the baseline by seed, never by position, with a list of the seeds left out."""

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True, eq=False)
class Pairs:
    """Losses of one arm and the baseline on the seeds that both ran, in seed order; +inf means diverged.

    `overlap` is above 0 if the seeds only split one data set (`analysis.stats.paired_tests.widened`).
    """

    seeds: list[int]
    baseline: np.ndarray
    arm: np.ndarray
    dropped_baseline: list[int]  # seeds that only the baseline ran
    dropped_arm: list[int]  # seeds that only the arm ran
    overlap: float = 0.0

    @property
    def complete(self) -> np.ndarray:
        """Mask of the pairs in which both runs ended with a finite loss."""
        return np.isfinite(self.baseline) & np.isfinite(self.arm)

    @property
    def diverged_baseline(self) -> list[int]:
        """Seeds on which the baseline diverged."""
        return [s for s, x in zip(self.seeds, self.baseline, strict=True) if not np.isfinite(x)]

    @property
    def diverged_arm(self) -> list[int]:
        """Seeds on which the arm diverged."""
        return [s for s, x in zip(self.seeds, self.arm, strict=True) if not np.isfinite(x)]

    @property
    def differences(self) -> np.ndarray:
        """baseline - arm: -inf if only the arm diverged, +inf if only the baseline did, 0 if both did."""
        return differences(self.baseline, self.arm)


def differences(baseline: np.ndarray, arm: np.ndarray) -> np.ndarray:
    """Return baseline - arm by position, with +inf for a diverged run.

    The difference is -inf if only the arm diverged, +inf if only the baseline did, and 0 if both did. NaN stays NaN.
    """
    both = np.isposinf(baseline) & np.isposinf(arm)
    return np.subtract(baseline, arm, out=np.zeros(len(baseline)), where=~both)


def pair(losses: pd.DataFrame, baseline: str, arm: str, overlap: float = 0.0) -> Pairs:
    """Pair an arm with the baseline on the seeds that both ran.

    Args:
        losses: Table from `Study.losses`: seeds down, arms across, NaN if there is no such run.
        baseline: Column of the baseline.
        arm: Column of the arm.
        overlap: As for `Pairs`.
    """
    b, a = losses[baseline].dropna(), losses[arm].dropna()
    common = sorted(set(b.index) & set(a.index))
    return Pairs(
        seeds=[int(s) for s in common],
        baseline=b.reindex(common).to_numpy(float),
        arm=a.reindex(common).to_numpy(float),
        dropped_baseline=sorted(int(s) for s in set(b.index) - set(common)),
        dropped_arm=sorted(int(s) for s in set(a.index) - set(common)),
        overlap=overlap,
    )
