"""Check a study of our own whose seeds are not pairs (confirm.test: welch): test, interval, TOST and words by hand."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis import improvement
from analysis.io.assemble import assemble
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.io.tables.columns import Options
from analysis.report import build, methods
from analysis.report.findings import Findings
from analysis.verdict.decide import decide
from tests.analysis.helpers import simulate
from tests.studies import SMALL, study_of
from tune.errors import StudyError

RNG = np.random.default_rng(4)
LOSSES = {
    "gelu": RNG.normal(3.3, 0.02, 8),
    "lin": RNG.normal(3.45, 0.02, 8),
    "a": RNG.normal(3.27, 0.02, 8),
    "b": RNG.normal(3.3, 0.002, 8),
}
ARMS = {"gelu": {"baseline": True}, "lin": {"floor": True}, "a": {}, "b": {}}


def study(contrasts=None, **confirm):
    rows = [(arm, 101 + i, x) for arm, values in LOSSES.items() for i, x in enumerate(values)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "test_nll"]).assign(stage="confirm", outcome="completed")
    settings = {"arms": ARMS, "confirm": {"seeds": 8, "test": "welch", **confirm}}
    settings |= {"contrasts": contrasts} if contrasts else {}
    return assemble("x", "x", table, pd.DataFrame(), settings)


def test_welch_decides_and_the_paired_test_stands_beside_it():
    result = decide(study())
    p = {arm: stats.ttest_ind(LOSSES["gelu"], LOSSES[arm], equal_var=False).pvalue for arm in ("lin", "a", "b")}
    for row in result.comparisons:
        assert row.p_t == row.p_deciding == pytest.approx(p[row.arm], rel=1e-9)
        more = row.of_table
        paired = stats.ttest_rel(LOSSES["gelu"], LOSSES[row.arm]).pvalue
        assert (more.p_paired, more.n_paired) == (pytest.approx(paired, rel=1e-9), 8)
        assert (more.test, more.n_baseline, more.n_arm) == ("Welch's t", 8, 8)
        assert f"the paired test over 8 common seeds gives p = {paired:.3g}" in row.why
        error = math.sqrt(LOSSES["gelu"].var(ddof=1) / 8 + LOSSES[row.arm].var(ddof=1) / 8)
        assert row.standard_error == pytest.approx(error)
        d = LOSSES["gelu"].mean() - LOSSES[row.arm].mean()
        upper = stats.t.cdf((d - row.margin) / error, row.df)
        assert row.p_tost == pytest.approx(max(stats.t.sf((d + row.margin) / error, row.df), upper), rel=1e-9)
    ordered = sorted(p.values())
    assert next(row for row in result.comparisons if row.arm == "a").p_adjusted == pytest.approx(
        max(3 * ordered[0], 2 * ordered[1])
    )


def test_the_words_count_runs():
    result = decide(study())
    assert "n = 8 + 8" in result.summary
    assert result.summary.startswith("With 8 runs (a claim needs 8), against gelu, on test_nll: a: ")
    assert "points" not in result.summary
    assert "nats" not in result.summary


def test_pairs_are_the_default_and_another_verdict():
    paired = decide(study(test="paired")).comparisons[1]
    assert paired.of_table is None
    assert paired.p_t == pytest.approx(stats.ttest_rel(LOSSES["gelu"], LOSSES["a"]).pvalue, rel=1e-9)


def test_a_contrast_of_runs_that_are_not_pairs_is_in_the_family():
    result = decide(study(contrasts=[["a", "b"]]))
    (row,) = result.contrasts
    assert row.p_t == pytest.approx(stats.ttest_ind(LOSSES["a"], LOSSES["b"], equal_var=False).pvalue, rel=1e-9)
    assert len(result.comparisons) == 3
    assert row.level_of_first_step == pytest.approx(0.05 / 4)
    error = math.sqrt(LOSSES["a"].var(ddof=1) / 8 + LOSSES["b"].var(ddof=1) / 8)
    assert row.standard_error == pytest.approx(error)


def test_looks_are_refused_before_anything_runs():
    with pytest.raises(StudyError, match=r"confirm.*test=welch has no looks; obrien-fleming takes the paired test"):
        study_of(SMALL, confirm={"rule": "obrien-fleming", "test": "welch"})
    assert study_of(SMALL, confirm={"test": "welch"}).confirm.test == "welch"
    with pytest.raises(StudyError, match=r"confirm\.test"):
        study_of(SMALL, confirm={"test": "wilcoxon"})
    with pytest.raises(TableError, match="rule e-process with test welch; allowed: the rule fixed"):
        study(rule="e-process", seeds=None)


def test_the_report_of_such_a_study_says_which_test_decided(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = simulate(tmp_path / "demo")
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    settings["confirm"]["test"] = "welch"
    (folder / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    text = build.build(folder).read_text()
    assert "Welch&#39;s t of 8 and 8 runs that are not pairs" in text
    assert '<th class="number">n baseline</th>' in text
    said = " ".join(methods.methods(Findings(load(folder)).study))
    assert "Welch's two-sided t test of runs that are not pairs" in said
    assert "paired t test over seeds" not in said
    assert improvement.main([str(folder)]) == 0
    assert "n baseline" in capsys.readouterr().out


def test_the_test_of_a_study_cannot_be_changed_after_it_ran(tmp_path: Path):
    folder = simulate(tmp_path / "demo")
    with pytest.raises(TableError, match=r"--unpaired: .*study.yaml fixed the test before the study ran"):
        load(folder, options=Options(unpaired=True))


def test_a_table_shows_the_runs_of_each_arm(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = [("base", s, 3 + s / 100) for s in range(5)] + [("mine", 10 + s, 2.9 + s / 90) for s in range(5)]
    pd.DataFrame(rows, columns=["arm", "seed", "loss"]).to_csv(tmp_path / "x.csv", index=False)
    assert improvement.main([str(tmp_path / "x.csv"), "--baseline", "base", "--unpaired", "--format", "csv"]) == 0
    head, row = capsys.readouterr().out.splitlines()[:2]
    shown = dict(zip(head.split(","), row.split(","), strict=True))
    assert (shown["n_baseline"], shown["n_arm"]) == ("5", "5")
    assert "n" not in shown
