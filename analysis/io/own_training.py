"""Read the tables of a study that trains the user's own code: its metric, direction and budget are the user's."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.io.assemble import TableFacts
from analysis.io.files import TableError


def of_own(
    source: str, trials: pd.DataFrame, curves: pd.DataFrame, settings: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Return tables of a study of the user's own training with the columns that the descriptions read.

    `val_nll` is the validation metric as a loss, so that lower is better, and `tokens` the budget that was used. The
    metric's own columns stay as they are.

    Args:
        source: Name of the input in error messages.
        trials: One row per cell.
        curves: One row per cell and evaluation step.
        settings: Content of the study file.

    Returns:
        The two tables, and the arguments `metric` and `own` of `assemble`.

    Raises:
        TableError: The study file and the tables do not fit.
    """
    metric, budget = settings.get("metric"), settings.get("budget")
    if (
        not isinstance(metric, dict)
        or not {"name", "test"} <= set(metric)
        or not isinstance(budget, dict)
        or not budget
    ):
        raise TableError(f"{source}: the study file has `trial`, but no metric with name and test, and no budget")
    name, test, unit = str(metric["name"]), str(metric["test"]), str(next(iter(budget)))
    if name not in trials:
        raise TableError(f"{source}: the trials have no column {name}, which is the study's metric")
    facts = TableFacts(metric.get("goal") == "maximize", str(metric.get("unit") or ""), name=name, budget=unit)
    tested = test in trials and trials[test].notna().any()

    def read(table: pd.DataFrame) -> pd.DataFrame:
        if name not in table:
            return pd.DataFrame()
        found = {"val_nll": facts.sign * table[name].astype(float)}
        return table.assign(**found, **({"tokens": table[unit].astype(float)} if unit in table else {}))

    its = read(curves)
    its = its.assign(step=its["tokens"]) if len(its) and "step" not in its else its
    return read(trials), its, {"metric": test if tested else name, "own": facts}
