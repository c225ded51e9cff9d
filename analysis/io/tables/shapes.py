"""Bring a table of another shape into one row per run: one column per arm, one per seed, or one row per metric."""

import re
from dataclasses import dataclass

import pandas as pd

from analysis.io.files import TableError
from analysis.io.tables import cells, metrics
from analysis.io.tables.columns import OWN, STATES, STEPS, SUMMARY, Options, bare, find, is_aside, listed, missing

VALUE = "value"  # the column of a reshaped table
_SEED = re.compile(r"(?:seed|run|rep|trial|s)?[ _#-]*(\d+)", re.IGNORECASE)
_NAMING = ("metric", "metric_name", "measure", "key", "tag")  # columns that name what the column value holds
_DIGIT = re.compile(r"\d|(?i:\s*(?:nan|[+-]?inf)\s*$)")


@dataclass(frozen=True)
class Layout:
    """Columns of a table: arm, seed, task, step and metric; `name` is the metric's own name, "" if it has none."""

    arm: str
    seed: str | None
    task: str | None
    step: str | None
    metric: str
    name: str


def one_metric(source: str, table: pd.DataFrame, named: str | None) -> tuple[pd.DataFrame, str | None]:
    """Return the rows of one metric if the table has one row per metric, and the metric's name; else the table.

    Args:
        source: Name of the input in error messages.
        table: The table.
        named: Metric from the command line, or None.

    Raises:
        TableError: If the table has several metrics and none is named, or not the one that is named.
    """
    value = next((c for c in table.columns if bare(c) == VALUE), None)
    naming = next((c for c in table.columns if bare(c) in _NAMING), None)
    if value is None or naming is None or pd.api.types.is_numeric_dtype(table[naming]) or named == value:
        return table, named
    names = [cells.name(x) for x in table[naming].unique()]
    if named is None and len(names) > 1:
        raise TableError(f"{source}: column {naming} has {listed(names)}; which one? --metric {names[0]}")
    wanted = names[0] if named is None else named.strip()
    rows = table[table[naming].map(cells.name) == wanted]
    if rows.empty:
        raise TableError(f"{source}: column {naming} has no {wanted!r}; allowed: {listed(names)}: --metric {names[0]}")
    if wanted in table.columns:
        raise TableError(f"{source}: {wanted!r} is both a column and a value of {naming}; allowed: one of them")
    return rows.drop(columns=naming).rename(columns={value: wanted}), wanted


def long(
    source: str, table: pd.DataFrame, options: Options, baseline: str | None, metric: str | None
) -> tuple[pd.DataFrame, Layout | None]:
    """Return the table with one row per run; if it had one column per arm or seed, also the layout that it has now.

    Args:
        source: Name of the input in error messages.
        table: The table.
        options: What the command line says of it.
        baseline: The baseline's name, which tells that columns are arms.
        metric: Name of the metric that the cells hold, or None.

    Raises:
        TableError: If no column holds the arms, and the columns are not arms either.
    """
    arm = find(source, table, "arm", options.arm) if options.wide is None else None
    if arm is not None:
        return _from_seeds(source, table, options, arm, metric)
    names = [str(c) for c in table.columns]
    if any(name.endswith("__MIN") for name in names):
        raise TableError(
            f"{source}: is a chart of Weights & Biases, with one column per run; allowed: its table of runs, with "
            "columns for --arm, --seed and --metric COLUMN"
        )
    roles = {role: find(source, table, role, getattr(options, role)) for role in ("seed", "task")}
    step = options.step or next((c for c in names if bare(c) in STEPS), None)
    ids = [c for c in (*roles.values(), step) if c is not None]
    free = [c for c in names if c not in ids and bare(c) not in {*OWN, *STATES} and not c.startswith("Unnamed:")]
    if options.wide is not None:
        arms = [cells.name(c) for c in options.wide.split(",")]
        if unknown := [c for c in arms if c not in names or c in ids]:
            raise TableError(f"{source}: no column {unknown[0]!r} for --wide; it has {listed(names)}")
    elif baseline is not None and cells.name(baseline) in free:
        arms = free
        if not _holds_numbers(table[cells.name(baseline)]):
            raise TableError(
                f"{source}: column {baseline} holds no numbers; is the first line a run? allowed: a header such as "
                "arm,seed,loss"
            )
        way = metrics.higher_is_better(baseline)
        if others := [
            c
            for c in arms
            if not _holds_numbers(table[c]) or is_aside(c) or bare(c) in SUMMARY or metrics.higher_is_better(c) != way
        ]:
            rest = ",".join(c for c in arms if c not in others)
            raise TableError(f"{source}: column {others[0]!r} seems to be no arm; which ones are? --wide {rest}")
    else:
        error = missing(source, table, "arm")
        wide = roles["seed"] is not None and len(free) > 1 and all(_holds_numbers(table[c]) for c in free)
        raise TableError(f"{error}, or if each column is an arm: --wide {','.join(free)}") if wide else error
    return _melted(table, ids, arms, "arm", metric), Layout(
        "arm", roles["seed"], roles["task"], step, metric or VALUE, metric or ""
    )


def _from_seeds(
    source: str, table: pd.DataFrame, options: Options, arm: str, metric: str | None
) -> tuple[pd.DataFrame, Layout | None]:
    # one column per seed: every other column is called like a number, or summarises them
    others = [str(c) for c in table.columns if c != arm and bare(str(c)) not in SUMMARY]
    numbered = {c: _SEED.fullmatch(bare(c)) for c in others}
    if len(numbered) < 2 or not all(numbered.values()) or find(source, table, "seed", options.seed) is not None:
        return table, None
    melted = _melted(table, [arm], list(numbered), "seed", metric)
    melted["seed"] = [match[1] for c in melted["seed"] if (match := numbered[c])]
    return melted, Layout(arm, "seed", None, None, metric or VALUE, metric or "")


def _melted(table: pd.DataFrame, ids: list[str], columns: list[str], into: str, metric: str | None) -> pd.DataFrame:
    texts = table.assign(**{c: table[c].map(lambda v: v if isinstance(v, str) else repr(float(v))) for c in columns})
    melted = texts.melt(id_vars=ids, value_vars=columns, var_name=into, value_name=metric or VALUE)
    return melted.astype({metric or VALUE: "str", into: "str"})


def _holds_numbers(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) or all(
        not text.strip() or _DIGIT.search(text) for text in column.unique()
    )
