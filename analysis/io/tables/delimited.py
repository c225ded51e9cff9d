"""Read delimited text: find its encoding, its separator, its comment lines and its header."""

import codecs
import csv
import io
import re
from dataclasses import dataclass, field

import pandas as pd

from analysis.io import files

_SEPARATORS = (",", ";", "\t", "|")
_SAMPLE = 50  # lines that decide the separator
_LINE = re.compile(r"\r\n|\n|\r")
_RULER = re.compile(r"[\s|:+=-]+")
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, eq=False)
class Cells:
    """A table as it was read, the notes on its reading, and the separator if it is text."""

    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    separator: str = ""


def decode(raw: bytes) -> tuple[str, list[str]]:
    """Return the text of a file in UTF-8, UTF-16, UTF-32 or Windows-1252, and a note if its encoding was guessed."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if raw.startswith(mark):
            return raw.decode(encoding), []
    head = raw[:1000]
    for encoding, zeros, others in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if len(head) > 3 and not any(zeros) and all(others):
            return raw.decode(encoding), []
    try:
        return raw.decode("utf-8"), []
    except UnicodeDecodeError:
        if b"\0" in raw:
            raise ValueError("it is binary") from None
    try:
        return raw.decode("cp1252"), ["not UTF-8: read as Windows-1252 (Latin-1)"]
    except UnicodeDecodeError:
        return raw.decode("latin-1"), ["not UTF-8: read as Latin-1"]


def read(raw: bytes) -> Cells:
    """Return the cells of a delimited text. Raises ValueError if it is none."""
    text, notes = decode(raw)
    if "\0" in text:
        raise ValueError("it is binary")
    head = [line for line in _LINE.split(text[:100_000]) if line.strip()]
    separator = ""
    if head and (named := re.fullmatch(r'"?sep=(.)"?[,;\t]*', head[0].strip("\ufeff "))):
        separator = named[1]  # Excel's own line
        text = text[text.index(head[0]) + len(head[0]) :]
    elif head and head[0].lower().rstrip('",;') in ("sep=\\t", "sep=tab"):
        separator, text = "\t", text[text.index(head[0]) + len(head[0]) :]
    if any(line.startswith("#") for line in head) or "\n#" in text:
        text, said = _without_comments(text, separator)
        notes += said
    sample = [line for line in _LINE.split(text[:100_000]) if line.strip()][:_SAMPLE]
    if not sample:
        raise ValueError("it is empty")
    separator = separator or _separator(sample)
    if separator == "|" and sample[0].lstrip().startswith("|"):  # Markdown
        lines = (line.strip().removeprefix("|").removesuffix("|") for line in _LINE.split(text))
        text = "\n".join(line for line in lines if not _RULER.fullmatch(line))
    return Cells(_frame(text, separator), notes, separator)


def _fields(line: str, separator: str) -> list[str]:
    if separator == " ":
        return next(csv.reader([" ".join(line.split())], delimiter=" "), [])
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])


def _separator(sample: list[str]) -> str:
    # the one that gives every line as many cells as the header; else the one that gives the header most
    best, score = ",", (False, 1)
    for separator in _SEPARATORS:
        counts = [len(_fields(line, separator)) for line in sample]
        found = (all(n == counts[0] for n in counts), counts[0])
        if counts[0] > 1 and found > score:
            best, score = separator, found
    return " " if score[1] == 1 and len(_fields(sample[0], " ")) > 1 else best


def _without_comments(text: str, separator: str) -> tuple[str, list[str]]:
    # blank the comments, so that errors keep their line numbers
    lines = _LINE.split(text)
    real = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not real:
        return "", []
    separator = separator or _separator(real[:_SAMPLE])
    header = _fields(real[0], separator)
    places = [i for i, line in enumerate(lines) if line.lstrip().startswith("#")]
    first = lines.index(real[0])
    if any(_NUMBER.fullmatch(cell.strip()) for cell in header):  # numpy writes the header as a comment
        for i in reversed([i for i in places if i < first]):
            named = lines[i].lstrip()[1:].strip()
            if len(_fields(named, separator)) == len(header):
                lines[first - 1 if i < first else i] = named
                places = [place for place in places if place != first - 1]
                break
    known = {_fields(line, separator)[0].strip() for line in real}
    out = 0
    for i in places:
        cells = _fields(lines[i].lstrip()[1:].lstrip(), separator)
        if i > first and len(cells) == len(header) > 1:
            if cells[0].strip() not in known:
                raise ValueError(
                    f"line {i + 1} begins with # and has the cells of a run; allowed: comments of another shape, "
                    "or a name in quotes"
                )
            out += 1
        lines[i] = ""
    notes = [f"{out} run{'s' if out > 1 else ''} behind # left out"] if out else []
    return "\n".join(lines), notes


def _frame(text: str, separator: str) -> pd.DataFrame:
    how = {"sep": r"\s+" if separator == " " else separator, "skipinitialspace": separator != " "}
    names = list(pd.read_csv(io.StringIO(text[:100_000]), header=None, nrows=1, dtype=str, **how).iloc[0])  # type: ignore[call-overload]
    names = [name.strip() if isinstance(name, str) else name for name in names]
    if twice := [name for name in dict.fromkeys(names) if isinstance(name, str) and names.count(name) > 1]:
        raise ValueError(f"column {twice[0]!r} appears twice")  # pandas would rename the second
    table: pd.DataFrame = pd.read_csv(  # type: ignore[call-overload]
        io.BytesIO(text.encode("utf-8", "surrogatepass")),
        dtype=str,
        keep_default_na=False,
        na_values=[],
        nrows=files.MOST_ROWS + 1,
        encoding_errors="surrogatepass",
        **how,
    )
    if not isinstance(table.index, pd.RangeIndex):  # every row has one cell more than the header
        if list(table.index) != [str(i + 1) for i in range(len(table))] or isinstance(table.index, pd.MultiIndex):
            raise ValueError(
                "its rows have more cells than its header; a decimal comma needs quotes or another separator than ','"
            )
        table = table.reset_index(drop=True)  # R numbers its rows
    if separator != " " and len(table.columns) > 1 and (table.iloc[:, -1] == "").any():
        _check_lengths(text, separator, len(names))
    table.columns = [str(name).strip() for name in table.columns]
    for i, name in enumerate(list(table.columns)):
        if re.fullmatch(r"Unnamed: \d+", name):
            column = table[name].fillna("").str.strip()
            numbered = [[str(k + start) for k in range(len(table))] for start in (0, 1)]
            if not column.any() or (i == 0 and list(column) in numbered):  # a last separator; the index of pandas
                table = table.drop(columns=name)
    return table


def _check_lengths(text: str, separator: str, header: int) -> None:
    # pandas fills a short row with empty cells; rows that all lack the same last columns are no sign of a cut
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    lengths = [(rows.line_num, len(row)) for row in rows if any(row)][1:]
    if len({length for _, length in lengths}) > 1:
        line, length = next((line, length) for line, length in lengths if length < header)
        raise ValueError(f"line {line} has {length} cells, the header {header}: was the file cut?")
