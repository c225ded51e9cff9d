"""Tests of seeds that split one data set: the corrected variance of Nadeau and Bengio, by hand and end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.io.files import TableError
from analysis.io.study import load
from analysis.io.tables.columns import Options
from analysis.report.methods import methods
from analysis.stats import estimates, paired_tests, power, trend
from analysis.verdict.decide import as_object, decide, main

D = np.array([0.7, 1.2, -0.3, 0.8, 1.0, 0.3, 1.5, 0.6])
OVERLAP = 0.25  # 20% of the data in the test set


def by_hand(d, overlap):
    """Return t and its standard error from the formula of the paper."""
    n = len(d)
    mean = sum(d) / n
    variance = sum((x - mean) ** 2 for x in d) / (n - 1)
    error = math.sqrt((1 / n + overlap) * variance)
    return mean / error, error


def table(folder: Path, head: str = "seed", d=D, **arms) -> Path:
    """Write a table of a baseline and an arm that is lower by `d`; return its path."""
    base = 10 + 0.3 * np.sin(np.arange(len(d)))
    rows = [("base", i, x) for i, x in enumerate(base)] + [("arm", i, x) for i, x in enumerate(base - d)]
    rows += [(name, i, x) for name, values in arms.items() for i, x in enumerate(values)]
    pd.DataFrame(rows, columns=["arm", head, "loss"]).to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def decided(path: Path, **options):
    return decide(load(path, baseline="base", options=Options(**options)))


def test_tests_and_intervals_are_those_of_the_formula():
    t, error = by_hand(D, OVERLAP)
    found, df, p = paired_tests.paired_t(D, OVERLAP)
    assert (found, df, p) == (pytest.approx(t, rel=1e-12), 7, pytest.approx(2 * stats.t.sf(t, 7), rel=1e-9))
    half = stats.t.isf(0.025, 7) * error
    assert paired_tests.mean_interval(D, 0.05, OVERLAP) == pytest.approx((D.mean() - half, D.mean() + half))
    assert paired_tests.tost(D, 2.0, OVERLAP)[0] == pytest.approx(stats.t.sf((2.0 - D.mean()) / error, 7))
    assert paired_tests.tost_excludes(D, 0.05, OVERLAP) == pytest.approx(D.mean() + stats.t.isf(0.05, 7) * error)
    b = 10 + np.arange(8) / 7
    for level in (p * 0.999, p * 1.001):  # Fieller's interval excludes 0 exactly if the test rejects
        low, high = estimates.fieller(b, b - D, level, OVERLAP)
        assert (low > 0) == (level > p)
        assert low < 100 * D.mean() / b.mean() < high
    plain = paired_tests.paired_t(D)
    assert plain[0] == paired_tests.paired_t(D, 0.0)[0] > 1.7 * found  # the uncorrected test is too sure
    assert estimates.clearly_positive(D, 0.05)
    assert not estimates.clearly_positive(D, 0.05, OVERLAP)


def test_power_has_a_limit_that_no_number_of_splits_passes():
    draw, hits, n = np.random.default_rng(0), 0, 10
    for _ in range(4000):  # splits with the correlation of the model: overlap / (1 + overlap)
        common = draw.normal() * math.sqrt(OVERLAP / (1 + OVERLAP))
        d = 1.2 + common + draw.normal(size=n) * math.sqrt(1 / (1 + OVERLAP))
        hits += paired_tests.paired_t(d, OVERLAP)[2] <= 0.05
    assert hits / 4000 == pytest.approx(power.power(1.2 * math.sqrt(1 + OVERLAP), n, 0.05, OVERLAP), abs=0.03)
    assert power.seeds_needed(1.2, 0.0, 0.05, 0.05) == 8
    needed = power.seeds_needed(1.7, 0.0, 0.05, 0.05, overlap=OVERLAP)
    assert power.power(1.7, needed - 1, 0.05, OVERLAP) < 0.8 <= power.power(1.7, needed, 0.05, OVERLAP)
    assert power.seeds_needed(1.2, 0.0, 0.05, 0.05, overlap=OVERLAP) is None
    assert power.tost_power(0.0, 1.2, 10**4, 0.05, OVERLAP) < 0.8 < power.tost_power(0.0, 1.2, 40, 0.05)


def test_worth_in_training_is_less_sure():
    draw = np.random.default_rng(0)
    b, a, s = (3 * x**-0.2 * (1 + 1e-3 * draw.normal(size=10)) for x in (1.0, 1.13, 0.8))
    plain, wide = (trend.budget_factor(b, a, s, 0.8, 0.05, overlap) for overlap in (0.0, OVERLAP))
    assert wide.value == plain.value
    ratio = math.log(wide.high / wide.low) / math.log(plain.high / plain.low)
    assert ratio == pytest.approx(math.sqrt(1 + 10 * OVERLAP), rel=0.02)


def test_a_table_of_splits_is_decided_with_the_corrected_variance(tmp_path, capsys):
    path = table(tmp_path)
    before, result = decided(path, higher_is_better=False), decided(path, higher_is_better=False, resampled=0.2)
    (was,), (row,) = before.comparisons, result.comparisons
    t, error = by_hand(D, OVERLAP)
    assert (row.t, row.standard_error) == (pytest.approx(t), pytest.approx(error))
    assert row.p_adjusted == pytest.approx(2 * stats.t.sf(t, 7))
    assert (was.kind, row.kind) == ("better", "undecided")
    half = stats.t.isf(0.025, 7) * error
    assert row.of_table.difference_high == pytest.approx(D.mean() + half)
    assert row.tost_excludes == pytest.approx(D.mean() + stats.t.isf(0.05, 7) * error)
    assert row.mde_percent > 1.7 * was.mde_percent
    assert (row.p_sign_flip, row.p_dunnett) == (None, None)
    assert "the variance of a mean is (1/n + 0.25) s^2" in row.why
    assert "8 splits" in result.summary
    assert (as_object(result)["overlap"], "overlap" in as_object(before)) == (0.25, False)
    study = load(path, baseline="base", options=Options(higher_is_better=False, resampled=0.2))
    assert "paired t test over splits" in methods(study)[-1]
    argv = [str(path), "--baseline", "base", "--lower-is-better", "--format", "json"]
    assert main([*argv, "--resampled", "0.2"]) == 0
    assert json.loads(capsys.readouterr().out)["comparisons"][0]["t"] == pytest.approx(t)


def test_an_effect_below_the_limit_of_the_splits_asks_for_more_data(tmp_path):
    few = np.array([0.2, 0.6, 1.4, 0.7, 1.6])
    (row,) = decided(table(tmp_path, d=few), higher_is_better=False, resampled=0.2).comparisons
    assert row.seeds_needed == power.seeds_needed(few.mean() / few.std(ddof=1), 0.01, 0.05, 0.05, overlap=OVERLAP)
    assert f"needs about {row.seeds_needed - 5} more splits" in row.verdict
    (row,) = decided(table(tmp_path), higher_is_better=False, resampled=0.2).comparisons
    assert row.seeds_needed is None
    assert "needs more data: no number of splits is enough" in row.verdict


def test_a_run_that_diverged_has_no_test_by_ranks(tmp_path):
    path = table(tmp_path, other=[9.0, *[8.0] * 6, float("inf")])
    found = {row.arm: row for row in decided(path, higher_is_better=False, resampled=0.2).comparisons}
    assert (found["other"].kind, found["other"].p_worst_rank) == ("not_testable", None)
    assert "needs seeds that do not split one data set" in found["other"].verdict
    assert found["arm"].p_adjusted is not None


def test_folds_are_refused_unless_their_share_is_given(tmp_path):
    path = table(tmp_path, head="fold")
    with pytest.raises(TableError, match=r"errs too often; .* --resampled SHARE .* --seed fold"):
        decided(path, higher_is_better=False, seed="fold")
    (row,) = decided(path, higher_is_better=False, seed="fold", resampled=0.2).comparisons
    assert row.t == pytest.approx(by_hand(D, OVERLAP)[0])


@pytest.mark.parametrize(
    "options", [{"resampled": 1.0}, {"resampled": 0.0}, {"resampled": 0.2, "unpaired": True}, {"resampled": math.nan}]
)
def test_a_share_that_makes_no_sense_is_refused(tmp_path, options):
    with pytest.raises(TableError, match="allowed: above 0, below 1, without --unpaired"):
        decided(table(tmp_path), higher_is_better=False, **options)
