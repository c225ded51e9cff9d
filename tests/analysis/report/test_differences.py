"""Check that the bars of the figure, the words and the adjusted p agree, on many random tables."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from analysis.io.assemble import assemble
from analysis.io.study import load
from analysis.io.tables.columns import Options
from analysis.report import differences, plots
from analysis.verdict.decide import decide
from analysis.verdict.family import decision_bars


def table(rng, arms, seeds):
    """Return random losses of a baseline and arms whose effects, noise and margins are near each other."""
    base = 3 + rng.normal(0, 0.01, seeds)
    rows = [("base", s, x) for s, x in enumerate(base)]
    for i in range(arms):
        losses = base - rng.choice([0, 0.002, -0.003, 0.01, -0.02]) + rng.normal(0, rng.choice([0.002, 0.006]), seeds)
        rows += [(f"a{i}", s, x) for s, x in enumerate(losses)]
    return pd.DataFrame(rows, columns=["arm", "seed", "val_nll"])


def agree(study):
    """Return the kinds of all arms; fail if a bar does not say what the verdict says."""
    kinds = []
    for row in decide(study).every:
        differs, equivalent = decision_bars(row, study)
        assert differs is not None
        assert equivalent is not None
        clear = differs[0] > 0 or differs[1] < 0
        inside = -row.margin < equivalent[0] and equivalent[1] < row.margin
        assert clear == (row.kind in ("better", "worse")) == (row.p_adjusted <= study.level)
        assert not clear or (row.kind == "better") == (differs[0] > 0)
        assert inside == (row.p_tost_adjusted <= study.level)
        assert (row.kind == "no_difference") == (inside and not clear)
        assert (row.kind == "undecided") == (not inside and not clear)
        kinds.append((str(row.kind), inside))
    return kinds


@pytest.mark.parametrize("correction", ["holm", "bonferroni", "benjamini-hochberg", "none"])
def test_a_bar_says_exactly_what_the_verdict_says(correction):
    rng, seen = np.random.default_rng(5), Counter()
    for _ in range(6):
        settings = {"confirm": {"correction": correction, "margin": "0.2%"}}
        rows = table(rng, rng.integers(1, 8), rng.integers(4, 13))
        seen.update(agree(assemble("x", "x", rows, pd.DataFrame(), settings, baseline="base")))
    assert {("better", False), ("worse", False), ("no_difference", True)} <= set(seen)
    assert correction == "none" or ("undecided", False) in seen


def test_the_intervals_of_the_table_would_not_agree():
    rng, wrong = np.random.default_rng(6), 0
    for _ in range(5):
        study = assemble("x", "x", table(rng, 6, 8), pd.DataFrame(), {"confirm": {"margin": "0.2%"}}, baseline="base")
        for row in decide(study).comparisons:
            clear = row.improvement_low > 0 or row.improvement_high < 0
            wrong += clear != (row.kind in ("better", "worse"))
    assert wrong  # 95% for one arm alone against Holm over six


def test_runs_that_are_no_pairs_have_bars_that_agree(tmp_path):
    rng, seen = np.random.default_rng(7), set()
    for _ in range(4):
        table(rng, 3, 9).to_csv(tmp_path / "x.csv", index=False)
        for margin in ("0.2%", "1%"):
            seen.update(agree(load(tmp_path / "x.csv", baseline="base", margin=margin, options=Options(unpaired=True))))
    assert seen >= {("undecided", False), ("no_difference", True), ("worse", False), ("worse", True)}


def test_the_drawn_bars_are_the_deciding_intervals_in_percent_of_one_mean():
    rng = np.random.default_rng(8)
    study = assemble("x", "x", table(rng, 3, 8), pd.DataFrame(), {}, baseline="base")
    rows = decide(study).comparisons
    axes = plots.styled(lambda _: differences.differences(study, rows), None).axes[0]
    mean = rows[0].baseline_mean
    lines = [line.get_xdata() for line in axes.get_lines() if len(line.get_xdata()) == 2 and line.get_ydata()[0] % 1]
    for i, row in enumerate(rows):
        differs, equivalent = decision_bars(row, study)
        assert list(lines[2 * i]) == pytest.approx([100 * end / mean for end in equivalent])
        assert list(lines[2 * i + 1]) == pytest.approx([100 * end / mean for end in differs])


def test_an_arm_that_ranks_decide_has_no_bars():
    rows = table(np.random.default_rng(9), 2, 8)
    rows.loc[(rows["arm"] == "a0") & (rows["seed"] == 3), "val_nll"] = np.inf
    study = assemble("x", "x", rows, pd.DataFrame(), {}, baseline="base")
    first, second = decide(study).comparisons
    assert decision_bars(first, study) == (None, None)
    assert None not in decision_bars(second, study)


def test_the_bars_of_a_last_look_have_its_level():
    rng = np.random.default_rng(10)
    confirm = {"rule": "obrien-fleming", "max_seeds": 10, "margin": "0.2%"}
    study = assemble("x", "x", table(rng, 4, 10), pd.DataFrame(), {"confirm": confirm}, baseline="base")
    for row in decide(study).comparisons:
        differs, _ = decision_bars(row, study)
        early = any(look["p_anytime"] <= row.level_of_decision for look in row.path[:-1])
        clear = differs[0] > 0 or differs[1] < 0
        assert clear == (row.kind in ("better", "worse")) or (early and not clear)


@pytest.mark.parametrize("contrasts", [None, [["a0", "a1"], ["a2", "a0"]]])
def test_bars_agree_with_a_reserve_for_added_seeds_and_with_contrasts(contrasts):
    rng, seen = np.random.default_rng(11), Counter()
    for _ in range(4):
        rows = table(rng, 3, 8)
        arms = {"base": {"baseline": True}, "a0": {}, "a1": {}, "a2": {}}
        settings = {"arms": arms, "confirm": {"seeds": 8, "reserve": 0.2, "margin": "0.2%"}}
        settings |= {"contrasts": contrasts} if contrasts else {}
        seen.update(agree(assemble("x", "x", rows, pd.DataFrame(), settings)))
    assert {("better", False), ("undecided", False)} <= set(seen)
