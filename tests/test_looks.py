"""The benchmarks of looks: racing, the bound of a reserve, and what docs/protocol.md has of them."""

import json
from pathlib import Path

import looks
import pytest
import reserve
from scipy import stats

from analysis.io.study import load
from analysis.report.figures import drawn
from analysis.report.findings import Findings
from analysis.verdict.decide import decide

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "protocol.md").read_text(encoding="utf-8")


def test_racing_trains_no_more_than_all_arms_together():
    gaps, margin = looks.EFFECTS["mixed differences"]
    mine, together, before = looks.raced("e-process", gaps, margin, range(3))["cells"]
    assert mine < 0.7 * before
    assert mine < together <= before


def test_the_page_has_the_table_of_racing_and_no_way_errs_more_often_than_promised():
    rows = json.loads((DOCS / "racing.json").read_text())
    assert looks.markdown(rows) in PAGE
    assert [row["name"] for row in rows] == [
        f"{rule}, {name}" for rule in ("e-process", "obrien-fleming") for name in looks.EFFECTS
    ]
    for row in rows:
        assert row["of"] >= 200
        for hits in (*row["wrong"], *row["same"]):
            assert stats.binomtest(round(hits), row["of"]).proportion_ci(method="wilson").low <= 0.05
    assert f"| {rows[0]['name']} | 200 | racing | {rows[0]['cells'][0]:.1f} | 54% |" in PAGE


def test_the_real_study_raced_as_the_page_says():
    study = load(DOCS / "racing_study")
    trials = study.trials[study.trials["stage"] == "confirm"].groupby("arm").size()
    assert (int(trials.sum()), study.races) == (102, True)
    result = decide(study)
    last = {row.label: row.path[-1]["n"] for row in result.every}
    assert last.pop("relu2") == 20 == study.looks[-1]
    assert set(last.values()) == {10, 11}
    assert len(last) == 7  # six arms and the contrast
    assert {row.label for row in result.every if not row.kind.settled} == {"relu2"}  # so all would go on to the cap
    shown = drawn(Findings(study))  # the contrast too
    for name in ("differences", "sequential"):
        (axes,) = shown[name].plot.axes
        legend = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
        names = [text.get_text() for text in axes.get_yticklabels()] if name == "differences" else legend
        assert set(names) == {row.label for row in result.every}
    assert "paglu-expanded against relu2" in shown["differences"].takeaway
    assert shown["sequential"].takeaway == "7 of 8 comparisons were decided, with 10 to 11 seeds."
    whole = 20 * len(study.arms)
    share = f"{100 * (1 - 102 / whole):.0f}% fewer"
    assert f"This took 102\nconfirm trials instead of {whole} ({share})" in PAGE


def test_the_chance_of_an_error_is_that_of_two_normal_looks():
    """With one number to choose it is P(|z1| >= a or |z2| >= b), where the correlation is sqrt(n1 / n2)."""
    a, b = (stats.norm.isf(0.05 * share / 2) for share in (0.8, 0.1))
    for first, cap in ((8, 9), (2, 3)):
        joint = stats.multivariate_normal(cov=[[1, (first / cap) ** 0.5], [(first / cap) ** 0.5, 1]])
        inside = joint.cdf([a, b], lower_limit=[-a, -b])
        assert reserve.chance(0.2, first, cap, looks=2) == pytest.approx(1 - inside, rel=1e-3)
    assert reserve.chance(0.2, 8, 100, looks=1) == pytest.approx(0.04, rel=1e-6)


def test_the_page_has_the_bounds_and_they_hold_under_the_conditions_that_it_names():
    rows = json.loads((DOCS / "reserve.json").read_text())
    assert reserve.markdown(rows) in PAGE
    found = {(row["reserve"], row["first"], row["cap"]): row for row in rows}
    assert found[0.2, 8, 100]["1"] == pytest.approx(reserve.chance(0.2, 8, 100), rel=1e-6)
    for share in (0.2, 0.25):
        assert found[share, 8, 100]["1"] < 0.05 < found[share, 8, 100]["16"] < 0.0515  # "at most 5.1% ... err"
        assert found[share, 3, 100]["16"] > 0.0515
        assert found[share, 8, 100_000]["1"] > 0.0515
