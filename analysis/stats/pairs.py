"""Pair an arm with the baseline by seed, never by position, and say what was left out."""

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True, eq=False)
class Pairs:
    """Losses of one arm and the baseline on the seeds that both ran, in seed order; +inf = diverged."""

    seeds: list[int]
    baseline: np.ndarray
    arm: np.ndarray
    dropped_baseline: list[int]  # seeds that only the baseline ran
    dropped_arm: list[int]  # seeds that only the arm ran

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
        """baseline - arm: -inf where only the arm diverged, +inf where only the baseline did, 0 where both did."""
        return differences(self.baseline, self.arm)


def differences(baseline: np.ndarray, arm: np.ndarray) -> np.ndarray:
    """baseline - arm by position, +inf = diverged: -inf or +inf where one diverged, 0 where both did, NaN as it is."""
    both = np.isposinf(baseline) & np.isposinf(arm)
    return np.subtract(baseline, arm, out=np.zeros(len(baseline)), where=~both)


def pair(losses: pd.DataFrame, baseline: str, arm: str) -> Pairs:
    """Pairs on the intersection of seeds; `losses` as `Study.losses` gives it (NaN = no such run)."""
    b, a = losses[baseline].dropna(), losses[arm].dropna()
    common = sorted(set(b.index) & set(a.index))
    return Pairs(
        seeds=[int(s) for s in common],
        baseline=b.reindex(common).to_numpy(float),
        arm=a.reindex(common).to_numpy(float),
        dropped_baseline=sorted(int(s) for s in set(b.index) - set(common)),
        dropped_arm=sorted(int(s) for s in set(a.index) - set(common)),
    )
