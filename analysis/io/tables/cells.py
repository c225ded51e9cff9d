"""Read numbers and names from cells of text, as people and spreadsheets write them; refuse what may mean two things."""

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.io.files import TableError, shown

MISSING = frozenset(
    ("", "na", "n/a", "<na>", "#n/a", "null", "none", "-", "--", "---", "\u2013", "\u2014", "?", ".", "n.a.", "missing")
)
_LOST = {"nan": np.nan, "diverged": np.nan, "inf": np.inf, "infinity": np.inf, "\u221e": np.inf}
_PLAIN = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_POWER = r"(?:[eE][+-]?\d+)?"
_POINT = re.compile(rf"[+-]?(?:[1-9]\d{{0,2}}(?:[,' _]\d{{3}})+|\d+)?(?:\.\d*)?{_POWER}")  # 1,234.5
_COMMA = re.compile(rf"[+-]?(?:[1-9]\d{{0,2}}(?:[.' _]\d{{3}})+|\d+)?(?:,\d*)?{_POWER}")  # 1.234,5
_GROUPS = {".": re.compile(r"[,' _]"), ",": re.compile(r"[.' _]")}
_SPREAD = re.compile(r"[\d.]\s*(?:\u00b1|\+/-|\+-|\\pm|\()\s*\d")
_WITH_UNIT = re.compile(r"([+-]?[\d.,][\d.,' _]*?(?:[eE][+-]?\d+)?)\s*(%|[^\W\d_][^\d\s]*(?:[ /][^\W\d_]+)*)")
# Cyrillic and Greek letters that look like Latin ones, the dashes and the underscore
_TWINS = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0391\u0392\u0395\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a7_\u2010\u2011\u2012\u2013\u2014\u2212",
    "aeopcyxiabekmhoptx-------",
)
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"


@dataclass(frozen=True, eq=False)
class Numbers:
    """Numbers of one column; `empty` marks the cells without one, and NaN or infinity stands for a diverged run."""

    values: pd.Series
    empty: pd.Series
    unit: str = ""
    decimal: str = ""  # "," or "." if the cells show which one they use
    note: str = ""


def numbers(source: str, column: pd.Series, decimal: str | None = None, separator: str = "") -> Numbers:
    """Return the numbers of a column.

    Thousands separators and one common unit are accepted. "1,234" may mean two numbers; it is read with a decimal comma
    if other cells of the column or the separator ";" show one, and refused otherwise.

    Args:
        source: Name of the input in error messages.
        column: Cells, as `source.read` gives them.
        decimal: Decimal sign, "." or ","; None to find it.
        separator: Separator of the file's columns.

    Raises:
        TableError: If a cell is not a number, may mean two numbers, or has another unit than the rest.
    """
    if pd.api.types.is_bool_dtype(column):
        raise TableError(f"{source}: column {column.name} has {shown(column.iloc[0])}; allowed: numbers")
    if pd.api.types.is_numeric_dtype(column):
        return Numbers(column.astype(float), pd.Series(False, index=column.index))
    if decimal != "," and separator != ";" and column.str.fullmatch(_PLAIN).all():
        values = pd.Series(pd.to_numeric(column).astype(float))
        if (large := np.isinf(values)).any():
            raise TableError(f"{source}: column {column.name} has {column[large].iloc[0]}; allowed: up to 1e100")
        return Numbers(values, pd.Series(False, index=column.index))
    codes, texts = pd.factorize(column)
    clean = [_clean(str(text)) for text in texts]
    parts = [_parts(f"{source}: column {column.name}", text) for text in clean]
    found = [(number, unit) for number, unit in parts if number is not None]
    units = {unit: number for number, unit in found}
    if len(units) > 1:
        cells = " and ".join(repr(f"{number}{' ' if unit.isalpha() else ''}{unit}") for unit, number in units.items())
        raise TableError(f"{source}: column {column.name} has {cells}; allowed: one unit in all rows")
    sign = _decimal(source, str(column.name), [number for number, _ in found], decimal, separator)
    pattern = _COMMA if sign == "," else _POINT
    found_values = np.full(len(texts), np.nan)
    for i, (text, (number, _)) in enumerate(zip(clean, parts, strict=True)):
        if number is not None:
            if not pattern.fullmatch(number):
                raise TableError(
                    f"{source}: column {column.name} has {shown(number)}; allowed: numbers with decimal {sign!r}"
                )
            found_values[i] = float(_GROUPS[sign].sub("", number).replace(",", "."))
        elif text.casefold() not in MISSING:
            found_values[i] = _lost(text)
    absent = np.array([text.casefold() in MISSING for text in clean], bool)
    example = next((number for number, _ in found if "," in number), None)
    note = ""
    if example is not None:
        read = found_values[[number for number, _ in parts].index(example)]
        note = f"column {column.name}: {example!r} is read as {read:g}"
    return Numbers(
        pd.Series(found_values[codes], index=column.index, name=column.name),
        pd.Series(absent[codes], index=column.index),
        next(iter(units), ""),
        sign if example is not None else "",
        note,
    )


def _clean(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).strip().strip(_INVISIBLE).strip()
    return text.replace("\u2212", "-").replace("\u2019", "'")


def _lost(text: str) -> float:
    sign, name = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    return sign * _LOST[name.casefold()]


def _parts(where: str, text: str) -> tuple[str | None, str]:
    # a cell's number as text, None if it has none, and its unit
    if text.casefold() in MISSING or text.lstrip("+-").casefold() in _LOST:
        return None, ""
    if re.fullmatch(_PLAIN, text) or ((_POINT.fullmatch(text) or _COMMA.fullmatch(text)) and re.search(r"\d", text)):
        return text, ""
    if _SPREAD.search(text):
        raise TableError(
            f"{where} has {shown(text)}, a mean with its spread; allowed: one row per run (arm, seed, value), because "
            "a test needs the single runs"
        )
    found = _WITH_UNIT.fullmatch(text)
    number = found[1].strip() if found else ""
    if found and (_POINT.fullmatch(number) or _COMMA.fullmatch(number)):
        return number, found[2]
    raise TableError(f"{where} has {shown(text)}; allowed: numbers (an empty cell: not run; inf or nan: diverged)")


def _decimal(source: str, name: str, texts: list[str], given: str | None, separator: str) -> str:
    if given is not None:
        return given
    comma = next((t for t in texts if not _POINT.fullmatch(t)), None)  # "3,31" can only be a decimal comma
    point = next((t for t in texts if not _COMMA.fullmatch(t)), None)
    with_comma = next((t for t in texts if "," in t and "." not in t), None)
    with_point = next((t for t in texts if "." in t and "," not in t), None)
    both = any("," in t and "." in t for t in texts)
    if (comma is not None and point is not None) or (with_comma is not None and with_point is not None and not both):
        raise TableError(
            f"{source}: column {name} has {comma or with_comma!r} and {point or with_point!r}: two decimal signs, or "
            "thousands? Name the decimal sign: --decimal . or --decimal ,"
        )
    grouped = all(re.fullmatch(r"[+-]?[1-9]\d{0,2}(\.\d{3})?", t) for t in texts)
    if separator == ";" and with_point is not None and grouped and any(t.isdecimal() and len(t) == 3 for t in texts):
        raise TableError(
            f"{source}: column {name} has {with_point!r}: {with_point.replace('.', '')} or {with_point}? Name the "
            "decimal sign: --decimal . or --decimal ,"
        )
    if comma is None and point is None and with_comma is not None and separator != ";":
        point_value, comma_value = with_comma.replace(",", ""), with_comma.replace(",", ".")
        raise TableError(
            f"{source}: column {name} has {with_comma!r}: {point_value} or {comma_value}? Name the decimal sign: "
            "--decimal . or --decimal ,"
        )
    return "," if comma is not None or (point is None and with_comma is not None) else "."


def name(text: object) -> str:
    """Return a name without spaces and invisible characters at its ends."""
    return str(text).strip().strip(_INVISIBLE).strip()


def twins(names: list[str]) -> tuple[str, str] | None:
    """Return two different names that a reader would take for one: they differ in case, spaces or look-alikes only."""
    seen: dict[str, str] = {}
    for each in names:
        flat = unicodedata.normalize("NFKC", each.translate(_TWINS)).casefold().translate(_TWINS)
        key = "".join(c for c in flat if not c.isspace() and c not in _INVISIBLE)
        if seen.setdefault(key, each) != each:
            return seen[key], each
    return None
