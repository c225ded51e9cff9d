"""Decisions on tables from elsewhere, with every number against scipy: direction, units, gaps, tasks and no pairs."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.describe import improvement
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.io.tables.columns import Options
from analysis.stats import estimates, unpaired_tests
from analysis.verdict.decide import decide, main, verdict

RNG = np.random.default_rng(11)
BASE = np.array([0.80, 0.81, 0.79, 0.805, 0.795])
MINE = np.array([0.84, 0.85, 0.835, 0.838, 0.847])
OTHER = np.array([0.801, 0.805, 0.796, 0.8, 0.79])


def table(path, metric, arms, extra=None):
    """Write a table of arms (name to values by seed 1, 2, ...; NaN is an empty cell) and return its path."""
    rows = [(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values, 1)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", metric])
    frame.to_csv(path, index=False)
    return path


def of(path, baseline="base", metric=None, **options):
    """Return the verdict's object."""
    return verdict(load(path, baseline=baseline, metric=metric, options=Options(**options)))


def test_a_higher_accuracy_is_better(tmp_path):
    file = table(tmp_path / "x.csv", "val_acc", {"base": BASE, "mine": MINE, "other": OTHER})
    found = of(file)
    mine, other = found["comparisons"]
    test = stats.ttest_rel(MINE, BASE)
    assert mine["p_t"] == pytest.approx(test.pvalue, rel=1e-10)
    assert mine["p_adjusted"] == pytest.approx(2 * test.pvalue, rel=1e-10)
    assert mine["t"] == pytest.approx(test.statistic)
    assert mine["mean_difference"] == pytest.approx((MINE - BASE).mean())
    low, high = test.confidence_interval()
    assert (mine["difference_low"], mine["difference_high"]) == pytest.approx((low, high))
    assert mine["improvement_percent"] == pytest.approx(100 * (MINE.mean() / BASE.mean() - 1))
    for end in ("improvement_low", "improvement_high"):  # Fieller: the t test of arm - (1 + r) base does not reject
        assert stats.ttest_1samp(MINE - (1 + mine[end] / 100) * BASE, 0).pvalue == pytest.approx(0.05, rel=1e-6)
    assert mine["improvement_low"] < mine["improvement_percent"] < mine["improvement_high"]
    assert (mine["baseline_mean"], mine["arm_mean"]) == pytest.approx((BASE.mean(), MINE.mean()))
    assert mine["probability_of_improvement"] == 1.0
    assert (mine["kind"], other["kind"]) == ("better", "undecided")
    assert (found["higher_is_better"], found["unit"]) == (True, "")
    assert "on val_acc (higher is better): mine: better, beyond the margin of 0.5% (+0.042" in found["summary"]
    swapped = of(file, higher_is_better=False)["comparisons"][0]
    assert swapped["kind"] == "worse"
    assert swapped["improvement_percent"] == pytest.approx(-mine["improvement_percent"])
    assert swapped["improvement_low"] == pytest.approx(-mine["improvement_high"])


def test_a_percentage_is_in_points_and_a_perplexity_needs_nats(tmp_path, capsys):
    file = tmp_path / "x.csv"
    rows = [f"{arm},{s},{100 * v:.1f}%" for arm, c in (("base", BASE), ("mine", MINE)) for s, v in enumerate(c)]
    file.write_text("\n".join(["arm,seed,acc", *rows]))
    assert "] points, +5." in of(file)["summary"]
    for metric, unit, shown in (("acc", "", False), ("loss", "", False), ("nll", "", True), ("loss", "nats", True)):
        table(file, metric, {"base": BASE, "mine": MINE})
        words = ["--unit", unit] if unit else []
        assert improvement.main([str(file), "--baseline", "base", "--format", "json", *words]) == 0
        (row,) = json.loads(capsys.readouterr().out)["comparisons"]
        want = 100 * (1 - np.exp(MINE.mean() - BASE.mean())) if shown else None
        assert row["perplexity_reduction_percent"] == (want if want is None else pytest.approx(want))
        improvement.main([str(file), "--baseline", "base", *words])
        assert ("perplexity" in capsys.readouterr().out) == shown


def test_empty_cells_leave_out_their_pairs_and_are_said(tmp_path):
    base, mine = RNG.normal(3.3, 0.02, 8), RNG.normal(3.25, 0.02, 8)
    mine[4:] = np.nan
    found = of(table(tmp_path / "x.csv", "val_loss", {"base": base, "mine": mine, "none": np.full(8, np.nan)}))
    row, none = found["comparisons"]
    assert (row["n"], row["complete_pairs"]) == (4, 4)
    assert row["p_t"] == pytest.approx(stats.ttest_rel(base[:4], mine[:4]).pvalue)
    assert row["p_adjusted"] == pytest.approx(min(1, 2 * row["p_t"]))  # an arm without runs stays in the family
    assert row["not_made_seeds_arm"] == [5, 6, 7, 8]
    assert row["diverged_seeds_arm"] == []
    assert "mine: 4 runs were not made (empty cells, seeds 5, 6, 7, 8), and left out" in row["why"]
    assert none["verdict"] == "not testable (no treatment runs)"
    assert "none: 8 runs were not made" in none["why"]


def test_n_beside_an_interval_counts_its_pairs(tmp_path):
    base, mine = RNG.normal(3.3, 0.02, 8), RNG.normal(3.0, 0.02, 8)
    mine[2] = np.inf
    found = of(table(tmp_path / "x.csv", "val_loss", {"base": base, "mine": mine}))
    assert found["comparisons"][0]["n"] == 8
    assert ", n = 7 of 8, " in found["summary"]


def test_no_percentage_of_a_mean_that_may_be_zero(tmp_path, capsys):
    file = table(tmp_path / "x.csv", "loss", {"base": [3, -2.9, 0.2], "mine": [2, -3.8, -0.9]})
    found = of(file)
    (row,) = found["comparisons"]
    low, high = stats.ttest_1samp([1, 0.9, 1.1], 0).confidence_interval()
    assert row["mean_difference"] == pytest.approx(1)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high))
    for key in ("improvement_percent", "improvement_low", "improvement_high", "mde_percent", "tost_excludes_percent"):
        assert row[key] is None
    assert "%" not in found["summary"]
    assert "better (+1 [+0.7516, +1.248], n = 3)" in found["summary"]
    assert main([str(file), "--baseline", "base"]) == 0
    assert "improvement %" not in capsys.readouterr().out
    with pytest.raises(TableError, match="not clearly above zero; allowed: a number: --margin NUMBER"):
        decide(load(file, baseline="base", margin="1%"))
    assert verdict(load(file, baseline="base", margin=2))["comparisons"][0]["margin"] == 2


def test_clearly_above_zero_is_where_fieller_has_bounds():
    for mean, sd, n in ((1.0, 0.5, 4), (1.0, 2.0, 4), (0.1, 0.1, 3), (-1.0, 0.1, 5)):
        values = mean + sd * (np.arange(n) - (n - 1) / 2)
        other = values + RNG.normal(0, 0.1, n)
        assert estimates.clearly_positive(values, 0.05) == (estimates.fieller(values, other) is not None)
        assert estimates.clearly_positive(values, 0.05) == (stats.ttest_1samp(values, 0).confidence_interval().low > 0)


def test_a_floor_is_judged_by_the_difference_if_there_is_no_percentage(tmp_path):
    arms = {"base": RNG.normal(0, 0.1, 7), "mine": RNG.normal(1, 0.1, 7), "bad": RNG.normal(-1, 0.1, 7)}
    file = table(tmp_path / "x.csv", "reward", arms)
    study = load(file, baseline="base", floor="bad")
    assert decide(study).sensitivity.testable is True
    assert decide(load(file, baseline="base", floor="mine")).sensitivity.testable is False


def test_runs_that_are_not_pairs_are_tested_by_welch(tmp_path, capsys):
    base, mine = RNG.normal(3.3, 0.02, 7), RNG.normal(3.25, 0.05, 10)
    rows = [("base", s, x) for s, x in enumerate(base)] + [("mine", 100 + s, x) for s, x in enumerate(mine)]
    file = tmp_path / "x.csv"
    pd.DataFrame(rows, columns=["arm", "seed", "loss"]).to_csv(file, index=False)
    with pytest.raises(TableError, match=r"base and mine have no seed in common; .*: --unpaired$"):
        load(file, baseline="base")
    found = of(file, unpaired=True)
    (row,) = found["comparisons"]
    test = stats.ttest_ind(base, mine, equal_var=False)
    assert (row["t"], row["df"], row["p_t"]) == pytest.approx((test.statistic, test.df, test.pvalue))
    low, high = test.confidence_interval()
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high))
    assert (row["n"], row["n_baseline"], row["n_arm"], row["test"]) == (17, 7, 10, "Welch's t")
    assert "n = 7 + 10" in found["summary"]
    assert row["p_paired"] is None
    bound = stats.t.ppf(0.975, test.df)
    for end in ("improvement_low", "improvement_high"):  # the test of mean(arm) = (1 - r) mean(base), with Welch's df
        shrunk = (1 - row[end] / 100) * base
        error = np.sqrt(shrunk.var(ddof=1) / 7 + mine.var(ddof=1) / 10)
        assert abs(mine.mean() - shrunk.mean()) / error == pytest.approx(bound)
    # the row numbers stand for seeds if there are none, and nothing is paired by them
    pd.DataFrame(rows, columns=["arm", "seed", "loss"]).drop(columns="seed").to_csv(file, index=False)
    alone = of(file, unpaired=True)
    assert alone["comparisons"][0]["p_t"] == pytest.approx(test.pvalue)
    assert alone["comparisons"][0]["p_paired"] is None
    assert alone["notes"] == ["no column of seeds: each row counts as a run of its own"]
    with pytest.raises(TableError, match=r"or if runs are not pairs: --unpaired$"):
        load(file, baseline="base")
    assert main([str(file), "--baseline", "base", "--unpaired"]) == 0
    assert "Welch's t of 7 and 10 runs that are not pairs" in " ".join(capsys.readouterr().out.split())


def test_the_paired_and_the_unpaired_test_stand_side_by_side(tmp_path):
    seeds = RNG.normal(0, 0.1, 8)
    base, mine = 3.3 + seeds, 3.29 + seeds + RNG.normal(0, 0.004, 8)
    file = table(tmp_path / "x.csv", "loss", {"base": base, "mine": mine})
    (row,) = of(file, unpaired=True)["comparisons"]
    assert row["p_paired"] == pytest.approx(stats.ttest_rel(base, mine).pvalue)
    assert row["p_adjusted"] == pytest.approx(stats.ttest_ind(base, mine, equal_var=False).pvalue)
    assert row["kind"] == "undecided"
    assert "more runs of each arm" in row["verdict"]
    assert "the paired test over 8 common seeds gives p = " in row["why"]
    assert "the smaller of the two" in row["why"]


def test_seeds_that_are_only_run_numbers_are_pointed_out(tmp_path):
    base, mine = RNG.normal(3.3, 0.01, 12), RNG.normal(3.28, 0.01, 8)
    mine = mine[np.argsort(-mine)][np.argsort(np.argsort(base[:8]))]  # the runs of one seed do not resemble each other
    file = table(tmp_path / "x.csv", "loss", {"base": base, "mine": mine})
    (row,) = of(file)["comparisons"]
    assert row["p_welch"] == pytest.approx(stats.ttest_ind(base, mine, equal_var=False).pvalue)
    assert "leaves out 4 runs; if seeds are only run numbers, --unpaired compares all runs" in row["why"]
    (alike,) = of(table(file, "loss", {"base": base, "mine": base[:8] - 0.02 + 0.001 * mine}))["comparisons"]
    assert alike["p_welch"] is None


def test_a_diverged_run_is_the_worst_of_unpaired_runs_too(tmp_path):
    base, mine = np.arange(1.0, 7.0), np.array([9.0, 10, 11, 12, np.inf, np.inf])
    file = table(tmp_path / "x.csv", "loss", {"base": base, "mine": mine})
    (row,) = of(file, unpaired=True)["comparisons"]
    assert row["p_deciding"] == pytest.approx(2 / 924)  # 12 choose 6 splits, two of them as far apart
    assert (row["test"], row["kind"]) == ("rank sum", "worse")
    separate = stats.mannwhitneyu(base, mine[:4], method="exact").pvalue
    assert unpaired_tests.rank_sum(base, mine[:4]) == pytest.approx(separate)


def test_what_no_unpaired_test_can_decide(tmp_path):
    file = tmp_path / "x.csv"
    for arms, verdict_ in (
        ({"base": [3.0], "mine": [3.1, 3.2]}, "not testable (n=1)"),
        ({"base": [3.0, 3.0], "mine": [3.1, 3.1]}, "not testable (zero variance: check seeds were really different)"),
        ({"base": [np.inf] * 2, "mine": [np.inf] * 2}, "not testable (both arms diverged on every seed)"),
    ):
        (row,) = of(table(file, "loss", arms), unpaired=True)["comparisons"]
        assert (row["verdict"], row["p_adjusted"]) == (verdict_, None)
    with pytest.raises(ValueError, match="zero variance"):
        unpaired_tests.welch(np.ones(3), np.ones(3), 0.05)
    with pytest.raises(ValueError, match="at least 2 each needed"):
        unpaired_tests.welch(np.ones(1), np.arange(3.0), 0.05)


def tasks_table(path, task="task"):
    """Write a table of three arms, two tasks and six seeds; return the losses by arm, task and seed."""
    rng = np.random.default_rng(5)
    cells = {
        (arm, name): level * (1 - gain) + rng.normal(0, 0.01, 6)
        for arm, gain in (("base", 0.0), ("mine", 0.01), ("other", -0.001))
        for name, level in (("books", 3.0), ("code", 1.2))
    }
    rows = [(arm, name, seed, x) for (arm, name), losses in cells.items() for seed, x in enumerate(losses)]
    pd.DataFrame(rows, columns=["arm", task, "seed", "loss"]).to_csv(path, index=False)
    return cells


def test_each_task_has_a_verdict_and_all_of_them_one(tmp_path, capsys):
    file = tmp_path / "x.csv"
    losses = tasks_table(file)
    found = of(file)
    assert list(found["tasks"]) == ["books", "code"]
    raw = {
        (arm, task): stats.ttest_rel(losses["base", task], losses[arm, task]).pvalue
        for arm in ("mine", "other")
        for task in ("books", "code")
    }
    for task, part in found["tasks"].items():
        for row in part["comparisons"]:
            assert row["p_t"] == pytest.approx(raw[row["arm"], task])
    smallest = min(raw, key=raw.get)
    (first,) = [r for r in found["tasks"][smallest[1]]["comparisons"] if r["arm"] == smallest[0]]
    assert first["p_adjusted"] == pytest.approx(4 * raw[smallest])  # Holm over two arms and two tasks
    for row in found["comparisons"]:
        relative = [(losses["base", t] - losses[row["arm"], t]) / losses["base", t].mean() for t in ("books", "code")]
        mean = 100 * np.mean(relative, axis=0)
        assert row["p_t"] == pytest.approx(stats.ttest_1samp(mean, 0).pvalue)
        assert row["improvement_percent"] == pytest.approx(mean.mean())
        each = [
            r["improvement_percent"]
            for p in found["tasks"].values()
            for r in p["comparisons"]
            if r["arm"] == row["arm"]
        ]
        assert row["improvement_percent"] == pytest.approx(np.mean(each))
    assert "mean over 2 tasks of the relative difference: mine: better" in found["summary"]
    assert main([str(file), "--baseline", "base"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count(", task ") == 2
    tasks_table(file, task="dataset")
    assert of(file, task="dataset")["summary"] == found["summary"]


def test_a_run_that_lacks_a_task_is_left_out_of_the_mean_and_said(tmp_path):
    file = tmp_path / "x.csv"
    tasks_table(file)
    whole = pd.read_csv(file)
    whole[~((whole["arm"] == "mine") & (whole["task"] == "code") & (whole["seed"] == 3))].to_csv(file, index=False)
    found = of(file)
    assert [row["n"] for row in found["comparisons"]] == [5, 6]
    assert found["notes"] == ["mean over tasks: 1 of the runs of mine left out for lack of a task"]
    whole[~((whole["arm"] == "mine") & (whole["task"] == "code"))].to_csv(file, index=False)
    assert of(file)["comparisons"][0]["verdict"] == "not testable (no treatment runs)"
    whole[~((whole["arm"] == "base") & (whole["task"] == "code"))].to_csv(file, index=False)
    with pytest.raises(TableError, match="task 'code' has no run of 'base'"):
        of(file)
    whole.assign(loss=whole["loss"].where(whole["task"] == "books", whole["loss"] - 1.2)).to_csv(file, index=False)
    with pytest.raises(TableError, match="mean of base in task code is not clearly above zero"):
        of(file)


def test_a_difference_without_a_percentage_is_something_to_show(tmp_path, capsys):
    file = table(tmp_path / "x.csv", "loss", {"base": [3, -2.9, 0.2], "mine": [2, -3.8, -0.9]})
    assert improvement.main([str(file), "--baseline", "base"]) == 0
    said = capsys.readouterr()
    assert "better" in said.out
    assert "nothing to show" not in said.err
    assert improvement.main([str(table(tmp_path / "y.csv", "loss", {"base": [3.0, 2.9]})), "--baseline", "base"]) == 0
    assert "nothing to show: no treatment runs" in capsys.readouterr().err
