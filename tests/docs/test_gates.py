"""Check that the tables of docs/gates.md are those of the catalogue."""

import importlib.util
from pathlib import Path

import pytest

from pagating.gating.catalog import COMPETITORS, FORMS, GATE_ROWS

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("make_gates", ROOT / "docs" / "make_gates.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
PAGE = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")


def test_the_tables_of_the_page_are_those_of_the_catalogue():
    assert make.filled(PAGE) == PAGE, "stale: run `python docs/make_gates.py`"
    names = [row[0] for rows in make.tables().values() for row in rows]
    assert names == [f"`{name}`" for name in (*FORMS, *GATE_ROWS, *COMPETITORS)]


def test_a_changed_table_is_written_again_and_a_missing_one_is_refused():
    old = "| `mish` | `x * tanh(log(1 + exp(x)))` | [-0.31, inf) | 0, inf | paMishU | Misra 2019, arXiv 1908.08681 |"
    assert PAGE.count(old) == 1
    assert make.filled(PAGE.replace(old, "| `mish` | no formula |")) == PAGE
    with pytest.raises(ValueError, match=r"has the heading .* 0 times"):
        make.filled(PAGE.replace("| form | formula |", "| shape | formula |"))
