"""Put the runs of several tasks together: the mean over tasks of the values relative to the baseline's mean."""

import numpy as np
import pandas as pd

from analysis.io.files import TableError
from analysis.io.study import Study
from analysis.stats import estimates


def together(source: str, parts: tuple[Study, ...]) -> pd.DataFrame:
    """Return one row per arm and seed that has every task.

    The value of a run is the mean over tasks of 100 * value / mean(baseline in that task). The improvement of an arm is
    therefore the mean over tasks of its improvement in percent, and each task has the same weight. A run that diverged
    in one task counts as diverged.

    Args:
        source: Name of the input in error messages.
        parts: One study per task, with the same arms and metric.

    Raises:
        TableError: If the baseline's mean in a task is not clearly above zero, so that nothing is relative to it.
    """
    scaled = []
    for part in parts:
        assert part.table is not None
        losses = part.losses()
        base = part.table.sign * losses[part.baseline]
        base = base[np.isfinite(base)].to_numpy(float)
        if not estimates.clearly_positive(base, part.level):
            raise TableError(
                f"{source}: the mean of {part.baseline} in task {part.table.task} is not clearly above zero, so tasks "
                "cannot be averaged in percent; allowed: one task per table"
            )
        values = part.table.sign * losses.where(np.isfinite(losses) | losses.isna())
        scaled.append((100 * values / base.mean()).where(~np.isposinf(losses), np.inf))
    whole = pd.concat(dict(enumerate(scaled)), names=["task"])
    whole.columns.name = "arm"
    runs = whole.melt(ignore_index=False, value_name="value").dropna().reset_index()
    count = runs.groupby(["arm", "seed"])["task"].transform("size")
    runs = runs[count == len(parts)]
    if runs.empty:
        raise TableError(
            f"{source}: no run has a value in each of the {len(parts)} tasks; allowed: runs with all tasks"
        )
    metric = parts[0].metric
    return runs.groupby(["arm", "seed"], sort=False)["value"].mean().rename(metric).reset_index().assign(task="all")
