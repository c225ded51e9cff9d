"""docs/performance.md says what docs/performance.json holds, and each benchmark keeps the figures of the others."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import performance  # noqa: E402

MACHINE = {"processor": "P", "cores": 2, "instructions": "I", "torch": "T", "python": "3", "date": "D", "load": 0.1}
PACK = {"median": 2.0, "low": 1.5, "high": 2.5, "n": 3}
RATE = {"median": 1234.4, "low": 1.0, "high": 2.0, "n": 3}
PACKED = {"machine": MACHINE, "rows": [{"trials": 4, "device": "cpu", "in turn": RATE, "packed": RATE, "ratio": PACK}]}
TABLE = {"machine": MACHINE, "trials": 100_000, "seconds": 17.04, "peak_gigabytes": 0.559, "report_megabytes": 1.26}


def test_the_page_holds_the_figures():
    kept = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    assert performance.page(kept) == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_each_benchmark_keeps_the_figures_of_the_others(tmp_path):
    performance.keep(tmp_path, "table", TABLE)
    performance.keep(tmp_path, "packed", PACKED)
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert "| 4 | cpu | 1,234 | 1,234 | 2.00 (1.50-2.50) |" in page
    assert "A report of 100,000 trials: 17.0 s, 0.56 GB at the most, a page of 1.3 MB." in page
    assert page.index("## Packed trials") < page.index("## A large table")
    performance.keep(tmp_path, "table", {**TABLE, "seconds": 20.0})
    assert "20.0 s" in (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))["packed"] == PACKED


def test_a_part_that_nobody_shows_is_refused(tmp_path):
    with pytest.raises(KeyError, match="gpu"):
        performance.keep(tmp_path, "gpu", TABLE)
