"""Check that every table of a study is computed once for all figures, tables and pages."""

from collections import Counter
from pathlib import Path

import pytest

from analysis.describe import alphas, budget, calibration, curves, fairness, growth, hyperparameters
from analysis.io.study import load
from analysis.published import page
from analysis.report import build, figures, findings
from analysis.report.findings import Findings

TABLES = [
    (findings, "decide"),
    (findings, "lines"),
    (fairness, "ledger"),
    (calibration, "optimum_rows"),
    (calibration, "at_grid"),
    (curves, "paired_curves"),
    (curves, "over_training"),
    (budget, "curves"),
    (hyperparameters, "importance"),
    (hyperparameters, "against_alpha"),
    (alphas, "by_layer"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the computations of each table."""
    counted: Counter[str] = Counter()

    def watch(module, name):
        compute = getattr(module, name)

        def computed(*args, **kwargs):
            counted[name] += 1
            return compute(*args, **kwargs)

        monkeypatch.setattr(module, name, computed)

    for module, name in [*TABLES, (growth, "table")]:
        watch(module, name)
    return counted


def test_a_report_computes_each_table_once(demo: Path, calls: Counter[str]):
    build.build(demo)
    assert calls == {name: 1 for _, name in TABLES if name != "lines"}  # lines are for a study without a confirm stage


def test_a_published_page_computes_each_table_once(demo: Path, calls: Counter[str]):
    (demo / "verdict.json").write_text("{}")  # the page names its size
    found = Findings(load(demo))
    page.page(found, figures.drawn(found, published=True))
    assert max(calls.values()) == 1
    assert calls["table"] == 1


def test_every_figure_says_how_to_read_it_and_has_its_own_name():
    names = [row.name for row in figures.FIGURES]
    assert len(set(names)) == len(names) == 12
    assert all(row.caption or row.short for row in figures.FIGURES)


def test_a_figure_without_rows_is_not_drawn(demo: Path):
    (demo / "curves.parquet").unlink()
    drawn = figures.drawn(Findings(load(demo)))
    assert "loss_curves" not in drawn
    assert "over_training" not in drawn
    assert "differences" in drawn
