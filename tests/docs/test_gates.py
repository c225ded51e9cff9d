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
    names = [row[0] for heading, rows in make.tables().items() for row in rows if heading[0] != "study"]
    assert names == [f"`{name}`" for name in (*FORMS, *GATE_ROWS, *COMPETITORS)]


def test_a_learned_strength_is_read_as_that_of_the_other_unit():
    rows = {row[:3]: [float(value) for value in row[3:] if value] for row in make.read_as_both()}
    assert len(rows) == 31
    for alpha, strength, factor, *mirrored in rows.values():
        assert strength == pytest.approx((alpha - 1) / (2 - alpha), abs=0.01 + 0.02 / factor**2)
        assert factor == pytest.approx(2 - alpha, abs=0.011)
        assert mirrored == ([] if 0 <= alpha <= 2 else [pytest.approx(alpha / (alpha - 1), abs=0.01)])
    learned = rows["laptop-wikitext-2", "xsilu", "0"]  # 0.277 in docs/results
    assert learned == [1.22, 0.28, 0.78]
    assert rows["laptop-wikitext-2", "paglu-per-layer", "0"] == [-1.42, -0.71, 3.42, 0.59]  # -1.424


def test_a_changed_table_is_written_again_and_a_missing_one_is_refused():
    old = "| `mish` | `x * tanh(log(1 + exp(x)))` | [-0.31, inf) | 0, inf | paMishU | Misra 2019, arXiv 1908.08681 |"
    assert PAGE.count(old) == 1
    assert make.filled(PAGE.replace(old, "| `mish` | no formula |")) == PAGE
    with pytest.raises(ValueError, match=r"has the heading .* 0 times"):
        make.filled(PAGE.replace("| form | formula |", "| shape | formula |"))
