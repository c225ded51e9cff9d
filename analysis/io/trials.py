"""Check the rows of a study: names, seeds, numbers, outcomes and steps."""

import numpy as np
import pandas as pd

from analysis.io.files import TableError, shown
from analysis.io.names import OUTCOMES, STAGES

NUMERIC = (
    *("test_nll", "val_nll", "val_ppl", "val_bpb", "train_nll", "padded_nll", "lr", "alpha", "step", "tokens"),
    *("steps", "seconds", "tokens_per_second", "peak_rss_mb", "parameters", "flops_per_token", "grad_norm"),
    *("compiled", "peak_gpu_mb", "flops_utilisation"),
)
MOST_NAME = 200


def confirm_rows(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that a test may use: the confirm stage, and only `chosen` rows if the table has that column."""
    rows = trials[trials["stage"] == "confirm"]
    if "chosen" in rows.columns:
        rows = rows[rows["chosen"].isna() | (rows["chosen"] == True)]  # noqa: E712 (the column holds null too)
    return rows


def normalise(source: str, trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials with text names, whole seeds, a stage and an outcome; raise TableError if a value is wrong."""
    for column in ("arm", "seed"):
        if column not in trials.columns:
            raise TableError(f"{source}: column {column} is missing; it has {', '.join(map(str, trials.columns))}")
        if trials[column].isna().any():
            row = int(np.flatnonzero(trials[column].isna())[0]) + 1
            raise TableError(f"{source}: column {column} is empty in row {row}; allowed: a value in every row")
    seed = to_numbers(source, trials, "seed")
    whole = (seed == np.floor(seed)) & (seed.abs() < 2**53)
    if not whole.all():
        raise TableError(f"{source}: column seed has {seed[~whole].iloc[0]}; allowed: whole numbers below 2^53")
    trials = trials.assign(arm=trials["arm"].astype(str), seed=seed.astype("int64"))
    for arm in trials["arm"].unique():
        if not arm.isprintable() or not 0 < len(arm) <= MOST_NAME:
            raise TableError(
                f"{source}: column arm has {shown(arm)}; allowed: printable names, {MOST_NAME} letters at most"
            )
    if (
        "chosen" in trials.columns
        and not (known := trials["chosen"].isna() | trials["chosen"].isin([True, False])).all()
    ):
        raise TableError(
            f"{source}: column chosen has {shown(trials.loc[~known, 'chosen'].iloc[0])}; allowed: true, false"
        )
    for column, allowed, default in (("stage", STAGES, "confirm"), ("outcome", OUTCOMES, "completed")):
        if column not in trials.columns:
            trials = trials.assign(**{column: default})
        if not (known := trials[column].isin(allowed)).all():
            value = shown(trials.loc[~known, column].iloc[0])
            raise TableError(f"{source}: column {column} has {value}; allowed: {', '.join(allowed)}")
    return numeric_columns(source, trials)


def numeric_columns(source: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with its known numeric columns as floats; raise TableError if one has text."""
    names = [c for c in table.columns if c in NUMERIC or str(c).startswith("alpha_layer_")]
    return table.assign(**{c: to_numbers(source, table, c) for c in names})


def to_numbers(source: str, table: pd.DataFrame, column: str) -> pd.Series:
    """Return a column as floats; raise TableError if a value is text."""
    if pd.api.types.is_numeric_dtype(table[column]):
        return table[column].astype(float)
    numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
    text = table[column].astype(str).str.strip().str.lower()
    bad = numbers.isna() & table[column].notna() & (text != "nan")
    if bad.any():
        raise TableError(f"{source}: column {column} has {shown(table.loc[bad, column].iloc[0])}; allowed: numbers")
    return numbers


def last_step(source: str, trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the last step of every run; raise TableError if completed runs end at different steps.

    Checkpoints of one run are never samples: the unit of analysis is the run.
    """
    if "step" not in trials.columns:
        return trials
    trials = trials.assign(step=to_numbers(source, trials, "step"))
    if not (finite := np.isfinite(trials["step"])).all():
        raise TableError(
            f"{source}: column step has {trials.loc[~finite, 'step'].iloc[0]}; allowed: a number in each row"
        )
    run = ["stage", "arm", "seed"] + [c for c in ("config_key",) if c in trials.columns]
    if (twice := trials.duplicated([*run, "step"], keep=False)).any():
        row = trials[twice].iloc[0]
        raise TableError(
            f"{source}: arm {row['arm']!r} seed {row['seed']} has step {row['step']:g} twice; allowed: one row per step"
        )
    last = trials.sort_values("step", kind="stable").drop_duplicates(run, keep="last").sort_index()
    confirm = confirm_rows(last)
    cut = confirm[(confirm["step"] < confirm["step"].max()) & np.isfinite(confirm[metric].astype(float))]
    if len(cut):
        row = cut.iloc[0]
        raise TableError(
            f"{source}: arm {row['arm']!r} seed {row['seed']} ends at step {row['step']:g}, others at "
            f"{confirm['step'].max():g}; allowed: runs of equal length (a run stopped early is not evidence)"
        )
    return last
