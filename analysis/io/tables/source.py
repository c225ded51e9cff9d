"""Read a table of any usual format into cells: text, JSON, Parquet or a spreadsheet, from a file or standard input.

A column of cells holds text, in which "" is an empty cell, or numbers without a gap.
"""

import bz2
import csv
import gzip
import io
import lzma
import math
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from analysis.io import files
from analysis.io.files import TableError
from analysis.io.tables import delimited, records
from analysis.io.tables.delimited import Cells
from analysis.io.text import one_line

_PACKED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
_OTHER = {
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (.xls)",
    b"SQLite format 3": "a SQLite database",
    b"ARROW1": "a Feather file",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF",
}
# pandas' parser errors and those of Arrow that are not named here are ValueErrors
_UNREADABLE = (ValueError, OSError, EOFError, RecursionError, csv.Error, zlib.error, lzma.LZMAError, pa.ArrowException)


def read(path: str, sheet: str | None = None) -> Cells:
    """Return the cells of a table.

    Args:
        path: File, or "-" for standard input; its content decides the format, not its name.
        sheet: Sheet of a spreadsheet with several.

    Raises:
        TableError: If the table cannot be read, or has no rows or too many.
    """
    source = "standard input" if path == "-" else path
    try:
        raw = _bytes(path)
        for magic, unpack in _PACKED.items():
            if raw.startswith(magic):
                raw = unpack(raw)
        cells = _cells(source, raw, sheet)
    except TableError:
        raise
    except _UNREADABLE as error:
        raise TableError(f"{source}: cannot be read as a table: {one_line(str(error), 300)}") from None
    blank = (cells.table == "").all(axis=1)  # spreadsheets write rows of empty cells below a table
    if blank.any():
        cells = replace(cells, table=cells.table[~blank].reset_index(drop=True))
    if len(cells.table) > files.MOST_ROWS:
        raise TableError(f"{source}: has {len(cells.table):,} rows; allowed: {files.MOST_ROWS:,}")
    if cells.table.empty:
        raise TableError(f"{source}: has no rows")
    return cells


def _bytes(path: str) -> bytes:
    if path != "-":
        return Path(path).read_bytes()
    if sys.stdin.isatty():
        print("reading a table from the keyboard; it ends with Ctrl-D", file=sys.stderr)
    return sys.stdin.buffer.read()


def _cells(source: str, raw: bytes, sheet: str | None) -> Cells:
    if raw.startswith(b"PAR1"):
        return Cells(_parquet(raw))
    if raw.startswith(b"PK"):
        return Cells(_spreadsheet(source, raw, sheet))
    for magic, name in _OTHER.items():
        if raw.startswith(magic):
            raise TableError(f"{source}: is {name}; allowed: CSV, JSON, Parquet or .xlsx (save it as CSV)")
    if raw[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{") or path_is_json(source):
        return Cells(records.read(delimited.decode(raw)[0]))
    return delimited.read(raw)


def path_is_json(path: str) -> bool:
    """Check by its name if a file holds JSON."""
    return os.path.splitext(path.removesuffix(".gz"))[1] in (".json", ".jsonl", ".ndjson")


def _parquet(raw: bytes) -> pd.DataFrame:
    # Drop the metadata of pandas: the columns are complete without it, and damaged metadata raises errors of any kind.
    with ParquetFile(io.BytesIO(raw)) as opened:
        table = opened.read().replace_schema_metadata(None)
    table.validate(full=True)  # otherwise text that is not UTF-8 would fail later, at its first use
    return pd.DataFrame({name: _arrow_cells(table[name]) for name in table.column_names})


def _arrow_cells(column: pa.ChunkedArray) -> Any:
    # pandas does not tell null from NaN, but one is an empty cell and the other a run that diverged
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    return column.to_numpy() if number and not column.null_count else [as_text(v) for v in column.to_pylist()]


def as_text(value: object) -> str:
    """Return a value of JSON, Parquet or a spreadsheet as the text of a cell; None is an empty cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        value = float(value)
        return repr(value) if math.isfinite(value) else str(value)
    return str(value.item() if isinstance(value, np.generic) else value)


def _spreadsheet(source: str, raw: bytes, sheet: str | None) -> pd.DataFrame:
    try:
        read: dict[str, pd.DataFrame] = pd.read_excel(
            io.BytesIO(raw), sheet_name=None, engine="openpyxl", dtype=object, na_filter=False
        )
    except ImportError:
        advice = "save it as CSV, or: pip install openpyxl"
        raise TableError(f"{source}: is a spreadsheet, which needs the package openpyxl; {advice}") from None
    except (BadZipFile, KeyError) as error:
        raise TableError(f"{source}: cannot be read as a spreadsheet: {one_line(str(error), 200)}") from None
    sheets = {name: table for name, table in read.items() if len(table)}
    if sheet is None and len(sheets) > 1:
        raise TableError(f"{source}: has sheets {', '.join(sheets)}; name one: --sheet {next(iter(sheets))!r}")
    if sheet is not None and sheet not in sheets:
        raise TableError(f"{source}: has no sheet {sheet!r} with rows; allowed: {', '.join(sheets)}")
    table = next(iter(sheets.values()), pd.DataFrame()) if sheet is None else sheets[sheet]
    # openpyxl gives NaN for an error in a formula; an empty cell is ""
    return table.map(lambda v: "#ERROR!" if isinstance(v, float) and math.isnan(v) else as_text(v)).rename(columns=str)
