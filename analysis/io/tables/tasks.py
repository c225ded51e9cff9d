"""Put the runs of several tasks together: the mean over tasks of the values relative to the baseline's mean."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.io.assemble import Study
from analysis.io.files import TableError
from analysis.stats import estimates


def together(source: str, parts: Sequence[Study]) -> pd.DataFrame:
    """Return one row per arm and seed that has every task.

    The value of a run is the mean over tasks of 100 * value / mean(baseline in that task). The improvement of an arm is
    therefore the mean over tasks of its improvement in percent, and each task has the same weight. A run that diverged
    in one task counts as diverged.

    Args:
        source: Name of the input in error messages.
        parts: One study per task, with the same metric.

    Raises:
        TableError: If the baseline's mean in a task is not clearly above zero, so that nothing is relative to it, or if
            no run has every task.
    """
    scaled = []
    for part in parts:
        losses = part.losses()
        base = part.sign * losses[part.baseline].to_numpy(float)
        base = base[np.isfinite(base)]
        if not estimates.clearly_positive(base, part.level):
            raise TableError(
                f"{source}: the mean of {part.baseline} in task {part.name} is not clearly above zero, so tasks cannot "
                "be averaged in percent; allowed: one task per table"
            )
        values = (100 * part.sign / base.mean() * losses).where(~np.isposinf(losses), np.inf)
        scaled.append(values.rename_axis(columns="arm").melt(ignore_index=False, value_name=part.metric).dropna())
    runs = pd.concat(scaled).reset_index().groupby(["arm", "seed"], sort=False)[parts[0].metric]
    whole = runs.mean()[runs.size() == len(parts)]
    if whole.empty:
        raise TableError(f"{source}: no run has all {len(parts)} tasks; allowed: arms and seeds with every task")
    return whole.reset_index()


def lacking(parts: Sequence[Study], mean: pd.DataFrame) -> list[tuple[str, int]]:
    """Return the arms with runs that lack a task, and how many runs these are.

    Args:
        parts: One study per task.
        mean: What `together` returned of them.
    """
    runs = {(arm, seed) for part in parts for arm, column in part.losses().items() for seed in column.dropna().index}
    out = runs - set(mean[["arm", "seed"]].itertuples(index=False, name=None))
    arms = dict.fromkeys(arm for part in parts for arm in part.arms)
    return [(arm, n) for arm in arms if (n := sum(each == arm for each, _ in out))]
