"""Read records from JSON: a list, lines, columns, or an object with one list; nested objects become dotted names."""

import ast
import json
import re
from typing import Any

import pandas as pd

_BARE = re.compile(r"(?<=[:\s\[,])(-?(?:nan|inf))(?=\s*[,}\]])")


def read(text: str) -> pd.DataFrame:
    """Return the records of a JSON text as cells of text; null and a missing key are empty, NaN is the text "NaN".

    Raises ValueError if the text is not JSON, or holds something else than records.
    """
    rows = _records(_documents(text))
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"JSON holds {str(wrong[0])[:50]!r}; allowed: objects with a name for each value")
    return pd.DataFrame([flat(row) for row in rows], dtype=object).map(_text)


def _documents(text: str) -> list[Any]:
    decoder = json.JSONDecoder(parse_constant=str, object_pairs_hook=_object)
    found, place = [], 0
    while place < len(text):
        if text[place].isspace() or text[place] == "\ufeff":
            place += 1
            continue
        value, place = decoder.raw_decode(text, place)
        found.append(value)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"key {twice[0]!r} appears twice in one object")
    return dict(pairs)


def _records(documents: list[Any]) -> list[Any]:
    if len(documents) != 1 or not isinstance(documents[0], list | dict):
        return documents  # JSON lines
    (whole,) = documents
    if isinstance(whole, list):
        return whole
    if isinstance(whole.get("columns"), list) and isinstance(whole.get("data"), list):
        return [dict(zip(map(str, whole["columns"]), row, strict=True)) for row in whole["data"]]
    values = list(whole.values())
    lists = [v for v in values if isinstance(v, list)]
    tables = [v for v in lists if v and all(isinstance(row, dict) for row in v)]
    if len(tables) == 1:
        return tables[0]
    if len(tables) == len(values) > 1:  # one list of runs per arm
        return [{"arm": name, **row} for name, rows in whole.items() for row in rows]
    if len(lists) == len(values):  # one list per column
        if len({len(v) for v in lists}) > 1:
            raise ValueError("its columns have unequal lengths")
        return [dict(zip(whole, row, strict=True)) for row in zip(*lists, strict=True)]
    if values and all(isinstance(v, dict) for v in values):
        keys = list(values[0])
        if all(key.isdecimal() for key in keys):  # pandas: one object per column, keyed by the row
            return [{name: column.get(key) for name, column in whole.items()} for key in keys]
        return values
    return [whole]


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a record without nesting: {"config": {"arm": "x"}} becomes {"config.arm": "x"}."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        out |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return out


def _text(value: Any) -> str:
    # a record without the key has NaN here; NaN in the text itself is already a str
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return value if isinstance(value, str) else repr(value) if isinstance(value, float) else json.dumps(value)


def unpack(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with each column of objects written as text, as exports of W&B have, split into columns."""
    for name in list(table.columns):
        column = table[name]
        if pd.api.types.is_numeric_dtype(column) or not len(column) or not str(column.iloc[0]).startswith("{"):
            continue
        found = [_literal(str(cell)) for cell in column]
        if all(isinstance(each, dict) for each in found):
            parts = pd.DataFrame([flat(each) for each in found], dtype=object).map(_text)  # type: ignore[arg-type]
            parts.columns = [f"{name}.{part}" for part in parts.columns]
            table = pd.concat([table.drop(columns=name).reset_index(drop=True), parts], axis=1)
    return table


def _literal(cell: str) -> object:
    try:
        return ast.literal_eval(_BARE.sub(r"'\1'", cell))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        try:
            return json.loads(cell, parse_constant=str)
        except (ValueError, RecursionError):
            return None
