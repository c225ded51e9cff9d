"""Outcomes of runs, as the columns of other people's tables state them."""

import pandas as pd

from analysis.io.files import TableError, shown
from analysis.io.tables import columns, metrics, source

_OUTCOMES = {
    "completed": "completed finished complete success succeeded successful terminated done ok",
    "stopped_early": "stopped_early pruned early_stopped",
    "infeasible": "infeasible diverged",
    "failed": "failed fail error errored crashed killed cancelled canceled aborted interrupted preempted timeout "
    "timed_out oom out_of_memory node_fail running pending scheduled queued waiting paused unfinished incomplete",
}
_STATES = {word: outcome for outcome, words in _OUTCOMES.items() for word in words.split()}
TRUTH = {"true": True, "false": False, "": None}
_FLAGS = {**TRUTH, "1": True, "0": False, "yes": True, "no": False}


def outcomes(where: str, table: pd.DataFrame, metric: str, notes: list[str]) -> pd.Series:
    """Return the outcome of each row: completed, stopped_early, infeasible or failed.

    Args:
        where: Name of the table in messages.
        table: The table, as text.
        metric: The metric's column, which states no outcome.
        notes: Receives a line for each column by which rows are left out.

    Raises:
        TableError: A word is not known, or a run was stopped because of its result.
    """
    found = pd.Series("completed", index=table.index)
    for column in map(str, table.columns):
        states = None if column == metric else _states(where, table[column])
        if states is None:
            continue
        if column == "outcome":
            return states
        if (states == "stopped_early").any():
            value = shown(table.loc[states == "stopped_early", column].iloc[0])
            raise TableError(
                f"{where}: column {column} has {value}, a run that was stopped because of its result; allowed: runs "
                "that were trained to the end"
            )
        if out := int((states == "failed").sum()):
            kinds = ", ".join(dict.fromkeys(table.loc[states == "failed", column].astype(str)))
            notes.append(f"{out} row{'s' if out > 1 else ''} left out because of column {column}: {kinds}")
        found = found.where(found != "completed", states)
    return found


def _states(where: str, column: pd.Series) -> pd.Series | None:
    # the outcomes that a column states: `status`, `run_status`, or one of true and false called `failed` or `diverged`
    name = columns.bare(str(column.name))
    words = column.map(lambda v: source.as_text(v).strip().casefold().replace(" ", "_"))
    if _STATES.get(name) in ("failed", "infeasible") and words.isin(_FLAGS).all():
        return words.map(lambda word: _STATES[name] if _FLAGS[word] else "completed")
    if metrics.words(name)[-1:] not in [[state] for state in columns.STATES]:
        return None
    states = words.map(_STATES)
    if states.isna().all() and name != "outcome":
        return None
    if states.isna().any():
        value = shown(column[states.isna()].iloc[0])
        raise TableError(
            f"{where}: column {column.name} has {value}; allowed: completed, stopped_early, infeasible, failed"
        )
    return states
