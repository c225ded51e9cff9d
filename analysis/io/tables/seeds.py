"""Read the seeds of a table: whole numbers, or names such as `s1`, which are numbered."""

import re

import pandas as pd

from analysis.io.files import TableError, shown
from analysis.io.tables import cells

FOLDS = ("fold", "cv_fold", "cv", "split")
MOST = 2**53  # above it, floating-point numbers skip whole numbers
_NUMBER = re.compile(r"[+-]?[\d.,' _]+(?:[eE][+-]?\d+)?|[+-]?(?:inf|infinity|nan)", re.IGNORECASE)
_NUMBERED = re.compile(r"(\D*)(\d{1,15})")


def read(source: str, column: pd.Series, splits: bool = False) -> tuple[pd.Series, str]:
    """Return one number per row, and a note if the seeds are names without one.

    Names that differ only in one number, such as `seed-3`, stand for that number. Others are numbered from 1 in the
    order of the table.

    Args:
        source: Name of the input in error messages.
        column: Cells, as `source.read` gives them.
        splits: True if it is known that the seeds split one data set.

    Raises:
        TableError: If a seed is missing, if numbers and names are mixed, or if the seeds are folds of one data set.
    """
    numbers = cells.numbers
    if pd.api.types.is_numeric_dtype(column):
        return filled(source, "seed", numbers(source, column)), ""
    codes, texts = pd.factorize(column.map(cells.name))
    known = [str(text) for text in texts if text.casefold() not in cells.MISSING]
    named = [text for text in known if not _NUMBER.fullmatch(text)]
    large = bool(known) and all(text.isdecimal() for text in known) and any(int(text) >= MOST for text in known)
    if named and len(known) < len(texts):
        _refuse_gap(source, "seed", column.map(cells.name).isin(set(texts) - set(known)))
    if not (named or large):
        return filled(source, "seed", numbers(source, column.rename("seed"))), ""
    if not large and len(named) < len(known):
        number = next(text for text in known if text not in named)
        raise TableError(
            f"{source}: column seed has {shown(number)} and {shown(named[0])}; allowed: all numbers, or all names"
        )
    if twins := cells.twins(known):
        raise TableError(
            f"{source}: column seed has {shown(twins[0])} and {shown(twins[1])}; allowed: one spelling per seed"
        )
    parts = [_NUMBERED.fullmatch(text) for text in known]
    if not large and all(parts) and len({part[1] for part in parts if part}) == 1:
        prefix = parts[0][1] if parts[0] else ""
        if re.sub(r"\W", "", prefix).casefold() in FOLDS and not splits:
            raise folds(source, str(column.name))
        values, note = [int(part[2]) for part in parts if part], ""
    else:
        values = list(range(1, len(known) + 1))
        listed = ", ".join(f"{text} is {i}" for text, i in zip(known[:3], values, strict=False))
        note = f"seeds are names, numbered in the order of the table: {listed}{' and so on' if len(known) > 3 else ''}"
    return pd.Series(values, dtype=float).take(codes).set_axis(column.index), note


def filled(source: str, role: str, found: cells.Numbers) -> pd.Series:
    """Return the numbers of a column; raise TableError if a cell is empty."""
    _refuse_gap(source, role, found.empty)
    return found.values


def _refuse_gap(source: str, role: str, empty: pd.Series) -> None:
    if empty.any():
        row = int(empty.to_numpy().argmax()) + 1
        raise TableError(f"{source}: column {role} is empty in row {row}; allowed: a value in every row")


def folds(source: str, column: str) -> TableError:
    """Return the error that runs are folds of one data set."""
    return TableError(
        f"{source}: column {column} numbers folds, which share training data; a t test over them errs too often; "
        f"allowed: runs with different seeds, or --resampled SHARE (of the data in a test set) --seed {column}"
    )
