"""The verdict of a ladder: its rungs, the trend of each arm, gains in compute, and what does not count."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.describe import alphas, budget, growth, improvement
from analysis.describe import ladder as command
from analysis.io import formats
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.report import build, plots
from analysis.stats import multiplicity
from analysis.verdict import decide as significance
from analysis.verdict.checks import unfinished
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Verdict, as_object
from analysis.verdict.ladder.kinds import ComputeGain, Trend
from analysis.verdict.ladder.words import in_compute, worth
from tests.analysis.helpers import COMPUTE, climb

LAWS = {
    "steady": (1.0, 1.0, 1.0),
    "same": (0.0, 0.0, 0.0),
    "up": (0.3, 1.0, 2.0),
    "down": (2.0, 1.0, 0.3),
    "turned": (1.5, 0.0, -1.5),
    "catching-up": (-3.0, -2.0, -1.0),
}


def edit(folder, change):
    """Rewrite the trials of a ladder's folder."""
    file = folder / "trials.parquet"
    change(pd.read_parquet(file)).to_parquet(file)
    return folder


def configure(folder, **keys):
    """Rewrite keys of a ladder's study file."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a ladder whose arms follow `LAWS`."""
    return climb(tmp_path_factory.mktemp("ladders") / "climb", LAWS)


@pytest.fixture(scope="module")
def result(finished):
    """Return its verdict."""
    return decide(load(finished))


def test_each_rung_is_decided_as_a_plain_study_at_a_third_of_the_level(finished, result):
    study = load(finished)
    assert [rung.rung for rung in result.rungs] == [1, 2, 3]
    assert [rung.compute for rung in result.rungs] == list(COMPUTE)
    for rung, own in zip(result.rungs, study.ladder.rungs, strict=True):
        assert own.level == own.settings["confirm"]["level"] == 0.05 / 3
        assert set(own.trials["seed"]) == set(range(1000 * rung.rung, 1000 * rung.rung + 8))
        losses = own.losses()
        p = {arm: stats.ttest_rel(losses["gelu"], losses[arm]).pvalue for arm in own.arms if arm != "gelu"}
        holm = dict(zip(p, multiplicity.adjust(list(p.values()), "holm"), strict=True))
        assert {row.arm: row.p_adjusted for row in rung.result.comparisons} == pytest.approx(holm)
        assert own.settings["model"]["d_model"] == 16 * 2**rung.rung
        assert "scales" not in own.settings
    top = decide(study.ladder.rungs[2])
    for key, value in as_object(top).items():  # the keys of a plain study are those of the highest rung
        assert key == "summary" or as_object(result)[key] == value


def test_the_trends_are_those_of_the_laws(finished, result):
    assert {row.arm: row.trend for row in result.trends} == {
        "steady": Trend.HOLDS,
        "same": Trend.HOLDS,
        "up": Trend.GROWS,
        "down": Trend.SHRINKS,
        "turned": Trend.TURNS,
        "catching-up": Trend.GROWS,
    }
    said = {row.arm: row.said for row in result.trends}
    assert said["steady"] == "holds on 3 rungs: better on each"
    assert said["same"] == "holds on 3 rungs: no difference larger than 0.5% on each"
    assert said["turned"] == "turns: better on rung 1, worse on rung 3"
    assert said["catching-up"].endswith("but it is behind on every rung and merely loses less")
    assert said["down"].startswith("shrinks by 0.")
    assert all("nothing is claimed beyond rung 3" in row.why for row in result.trends)
    first, then = result.summary.split(" Rung 1 (")
    assert "better: steady, up, down and turned; no difference: same; worse: catching-up." in then
    assert "Rung 3" not in then  # the largest rung comes first, with its numbers
    assert "steady: better, beyond the margin of 0.5% (+" in first
    assert all(f"; trend: {text}" in first for arm, text in said.items())
    assert "linear-floor:" not in first


def test_the_slope_is_that_of_an_independent_calculation(finished, result):
    study = load(finished)
    values, variances = [], []
    for rung in study.ladder.rungs:
        table = rung.losses()
        b, a = table["gelu"].to_numpy(), table["down"].to_numpy()
        n, r = len(b), a.mean() / b.mean()
        cov = np.cov(a, b, ddof=1)
        values.append(100 * (1 - r))
        variances.append(1e4 * (cov[0, 0] - 2 * r * cov[0, 1] + r**2 * cov[1, 1]) / (n * b.mean() ** 2))
    x = np.log2(COMPUTE)
    c = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    parts = c**2 * variances
    df = parts.sum() ** 2 / (parts**2 / 7).sum()
    row = next(row for row in result.trends if row.arm == "down")
    assert row.slope == pytest.approx(stats.linregress(x, values).slope)
    assert row.p == pytest.approx(2 * stats.t.sf(abs(c @ values) / math.sqrt(parts.sum()), df))
    assert (row.slope_low, row.slope_high) == pytest.approx(
        stats.t.interval(0.95, df, c @ values, math.sqrt(parts.sum()))
    )
    p = {row.arm: row.p for row in result.trends}
    assert [row.p_adjusted for row in result.trends] == pytest.approx(multiplicity.adjust(list(p.values()), "holm"))


def test_gains_in_compute_are_those_of_the_law(result):
    # the baseline's loss falls by 10% for 8 times the compute
    exponent = -math.log(0.9) / math.log(8)
    for rung in result.rungs:
        for gain in rung.gains:
            true = (1 - {**LAWS, "linear-floor": (-6.0,) * 3}[gain.arm][rung.rung - 1] / 100) ** (-1 / exponent)
            assert gain.factor_low * 0.97 < true < gain.factor_high * 1.03
    assert worth(ComputeGain("a", "b", 1.13, 1.08, 1.19)) == "worth 13.0% more compute [8.0, 19.0]"
    assert worth(ComputeGain("a", "b", 0.9, 0.8, 1.1)) == (
        "worth between 20.0% less and 10.0% more compute (estimate -10.0%)"
    )
    assert worth(ComputeGain("a", "b", 0.9, 0.8, 0.95)) == "worth 10.0% less compute [5.0, 20.0]"
    assert worth(ComputeGain("a", "b", 4.0, 2.9, 5.0)) == "worth 4 times the compute [2.9, 5]"
    assert worth(ComputeGain("a", "b")) == in_compute(ComputeGain("a", "b")) == ""
    assert in_compute(ComputeGain("a", "b", 1.13, 1.08, 1.19)) == "+13.0% [8.0, 19.0]"


def test_a_baseline_that_does_not_fall_gives_no_gain_in_compute(tmp_path):
    flat = edit(
        climb(tmp_path / "flat", {"a": (1.0, 1.0, 1.0)}),
        lambda t: t.assign(test_nll=t["test_nll"] / 0.9 ** (t["rung"] - 1)),
    )
    gains = [gain for rung in decide(load(flat)).rungs for gain in rung.gains]
    assert {gain.factor for gain in gains} == {None}
    assert {gain.why for gain in gains} == {"the loss of gelu does not clearly fall between the rungs"}


def test_the_json_is_strict_and_only_adds_keys(result, demo):
    found = json.loads(formats.to_json(as_object(result)))
    plain = as_object(decide(load(demo)))
    assert set(found) - set(plain) == {"rungs", "trends"}
    assert set(plain) - set(found) == set()
    assert set(plain) <= set(found["rungs"][0])
    assert found["rungs"][1]["sizes"] == {"d_model": 64, "tokens": 1_000_000}
    assert found["trends"][0]["trend"] == "holds"
    assert {gain["arm"] for gain in found["rungs"][0]["compute_gains"]} == {*LAWS, "linear-floor"}


def test_an_unfinished_ladder_states_no_trend_and_shows_the_rungs_that_ended(tmp_path):
    folder = climb(tmp_path / "two", {"steady": (1.0, 1.0, 1.0)}, rungs=2)
    study = load(folder)
    result = decide(study)
    assert (result.unfinished, result.trends) == ("rung 3 of 3 has not begun", [])
    assert {row.kind for row in result.comparisons} == {Verdict.UNFINISHED}
    assert unfinished(study) == "rung 3 of 3 has not begun"
    assert result.rungs[1].result.comparisons[1].kind is Verdict.BETTER
    assert command.main([str(folder), "--require-verdict"]) == 1
    assert significance.main([str(folder)]) == growth.main([str(folder)]) == improvement.main([str(folder)]) == 1
    cut = edit(climb(tmp_path / "cut", {"steady": (1.0, 1.0, 1.0)}), lambda t: t[t["seed"] != 3000])
    assert decide(load(cut)).unfinished == "rung 3 of 3: 21 of 24 confirm trials"
    begun = edit(
        climb(tmp_path / "begun", {"steady": (1.0, 1.0, 1.0)}),
        lambda t: t.assign(
            stage=t["stage"].mask(t["rung"] == 3, "calibrate"), test_nll=t["test_nll"].mask(t["rung"] == 3)
        ),
    )
    found = decide(load(begun))
    assert found.unfinished == "rung 3 of 3: 0 of 24 confirm trials"
    assert [rung.result.unfinished for rung in found.rungs][:2] == ["", ""]
    assert found.rungs[1].gains[1].factor is not None
    assert build.build(begun).is_file()
    one = decide(load(climb(tmp_path / "one", {"steady": (1.0, 1.0, 1.0)}, rungs=1)))
    assert one.unfinished == "rungs 2 to 3 of 3 have not begun"


def test_an_undecided_arm_of_the_highest_rung_is_no_verdict_if_one_is_required(tmp_path, capsys):
    folder = climb(tmp_path / "open", {"weak": (1.0, 1.0, 0.05)}, confirm={"margin": "0.01%"})
    assert command.main([str(folder)]) == 0
    assert command.main([str(folder), "--require-verdict"]) == 3
    assert "no verdict: weak: undecided" in capsys.readouterr().err


def test_two_sizes_have_verdicts_and_no_trend(tmp_path):
    result = decide(load(climb(tmp_path / "two", {"steady": (1.0, 1.0), "turned": (1.5, -1.5)})))
    assert {row.trend for row in result.trends} == {Trend.UNDECIDED}
    assert all("a trend needs three or more sizes" in row.said and row.slope is None for row in result.trends)
    assert [row.kind for row in result.rungs[0].result.comparisons] == [Verdict.WORSE, Verdict.BETTER, Verdict.BETTER]


def test_a_diverged_run_has_no_mean_so_there_is_no_slope(tmp_path):
    def spoil(trials):
        bad = (trials["arm"] == "up") & (trials["seed"] == 2003)
        return trials.assign(outcome=trials["outcome"].mask(bad, "infeasible"), test_nll=trials["test_nll"].mask(bad))

    result = decide(load(edit(climb(tmp_path / "spoilt", LAWS), spoil)))
    by_arm = {row.arm: row for row in result.trends}
    assert (by_arm["up"].slope, by_arm["up"].p_adjusted, by_arm["up"].trend) == (None, None, Trend.UNDECIDED)
    assert "no slope, because 1 run diverged on rung 2" in by_arm["up"].why
    assert by_arm["down"].trend is Trend.SHRINKS
    gain = next(gain for gain in result.rungs[1].gains if gain.arm == "up")
    assert (gain.factor, gain.why) == (None, "a run diverged, so there is no mean loss")


def test_the_figure_has_a_mark_for_each_rung_and_the_line_of_the_slope(result, finished):
    study = load(finished)
    drawn = plots.styled(lambda _: plots.ladder(study, result), None)
    panels = {ax.get_title(): ax for ax in drawn.axes if ax.get_visible()}
    assert list(panels) == [f"{row.arm}: {row.trend}" for row in result.trends]
    for row, ax in zip(result.trends, panels.values(), strict=True):
        line = next(each for each in ax.lines if each.get_linestyle() == "--")
        x, y = np.log2(line.get_xdata()), line.get_ydata()
        values = [r.improvement_percent for g in result.rungs for r in g.result.comparisons if r.arm == row.arm]
        assert y == pytest.approx(np.polyval(np.polyfit(np.log2(COMPUTE), values, 1), x))
        marks = next(each for each in ax.lines if len(each.get_xdata()) == 3 and each is not line)
        assert list(marks.get_ydata()) == values
    odd = plots.styled(lambda _: plots.ladder(study, replace(result, trends=result.trends[:3])), None)
    assert [ax.get_visible() for ax in odd.axes] == [True, True, True, False]
    assert odd.axes[1].xaxis.get_tick_params()["labelbottom"]
    hollow = [replace(row, rungs=[1], slope=None) for row in result.trends[:1]]
    one = plots.styled(lambda _: plots.ladder(study, replace(result, trends=hollow)), None)
    assert [len(each.get_xdata()) for each in one.axes[0].lines if each.get_markerfacecolor() == "none"] == [2]


def test_a_rung_whose_floor_does_not_lose_is_named_and_only_its_slope_counts(tmp_path):
    def no_floor(trials):
        low = (trials["arm"] == "linear-floor") & (trials["rung"] == 1)
        same = trials[(trials["arm"] == "gelu") & (trials["rung"] == 1)]["test_nll"].to_numpy()
        near = pd.Series(same + np.resize([0.003, -0.003], len(same)), trials.index[low])
        return trials.assign(test_nll=trials["test_nll"].mask(low, near))

    four = {"steady": (1.0, 1.0, 1.0, 1.0), "turned": (1.5, 1.0, 0.0, -1.5)}
    result = decide(load(edit(climb(tmp_path / "floor", four), no_floor)))
    steady, turned = result.trends
    assert (steady.trend, steady.rungs) == (Trend.HOLDS, [2, 3, 4])
    assert steady.said == "holds on 3 rungs: better on each"
    assert "the verdict on rung 1 does not count: not testable" in steady.why
    assert steady.why.count("its noise is in the error of the slope") == 1
    assert turned.said == "turns: better on rung 2, worse on rung 4"
    three = {"steady": (1.0, 1.0, 1.0), "falls": (2.0, 1.5, 1.0)}
    steady, falls = decide(load(edit(climb(tmp_path / "three", three), no_floor))).trends
    assert (steady.trend, steady.rungs) == (Trend.UNDECIDED, [2, 3])  # nothing holds where nothing could be seen
    assert steady.said.startswith("undecided (")
    assert falls.trend is Trend.SHRINKS
    same = decide(load(climb(tmp_path / "same", three))).trends
    assert [row.slope for row in same] == [steady.slope, falls.slope]  # by the same rungs
    assert (falls.rungs, falls.slope_rungs) == ([2, 3], [1, 2, 3])
    blind = decide(load(climb(tmp_path / "blind", {"falls": (2.0, 1.5, 1.0)}, floor=0.0))).trends[0]
    assert (blind.trend, blind.slope, blind.rungs) == (Trend.UNDECIDED, None, [])
    assert blind.said == "undecided: no rung counts, and a trend needs three or more sizes"


def test_an_arm_that_lost_on_two_rungs_is_dropped_and_named(tmp_path):
    arms = {"steady": (1.0,) * 4, "lost": (-2.0, -2.0), "late": (-1.0, 0.0, -1.0)}
    folder = climb(tmp_path / "drop", arms, ladder={"drop": True})
    result = decide(load(folder))
    by_arm = {row.arm: row for row in result.trends}
    assert result.unfinished == ""
    assert by_arm["lost"].said == "undecided: dropped after rung 2, worse on two rungs"
    assert by_arm["late"].rungs == [1, 2, 3]
    assert "dropped after rung 3" in by_arm["late"].said + by_arm["late"].why
    assert [sorted(rung.dropped) for rung in result.rungs] == [[], [], ["lost"], ["late", "lost"]]
    assert [row.arm for row in result.comparisons] == ["linear-floor", "steady"]
    none = decide(load(climb(tmp_path / "none", {"lost": (-2.0, -2.0)}, ladder={"drop": True}, planned=3)))
    assert [row.arm for row in none.trends] == ["lost"]
    assert command.rows(result)[2]["verdict_3"] == "dropped"
    # an arm that did not lose cannot have been dropped, and without `drop` none can
    won = decide(load(climb(tmp_path / "won", {"steady": (1.0,) * 3, "gone": (1.0, 1.0)}, ladder={"drop": True})))
    assert won.unfinished == "rung 3 of 3: no trial of gone"
    kept = decide(load(climb(tmp_path / "kept", {"steady": (1.0,) * 3, "gone": (-2.0, -2.0)})))
    assert kept.unfinished == "rung 3 of 3: 24 of 32 confirm trials"


def test_the_seeds_of_each_rung_are_its_own_under_racing(tmp_path):
    confirm = {"rule": "obrien-fleming", "max_seeds": 10}
    folder = climb(tmp_path / "raced", {"steady": (3.0,) * 3}, seeds=(5, 8, 10), confirm=confirm)
    result = decide(load(folder))
    assert result.unfinished == ""
    assert [rung.result.comparisons[1].n for rung in result.rungs] == [5, 8, 10]
    assert result.trends[0].trend is Trend.HOLDS
    assert [rung.result.comparisons[1].path[-1]["n"] for rung in result.rungs] == [5, 8, 10]


@pytest.mark.parametrize("main", [improvement.main, growth.main, budget.main, alphas.main])
def test_other_scripts_show_one_rung_and_say_which(finished, capsys, main):
    codes = [main([str(finished)]), main([str(finished), "--rung", "1"])]
    out, err = capsys.readouterr()
    assert codes == [0, 0]
    assert "note: climb is a ladder, and this is its rung 3 of 3 (--rung N)" in err
    assert "rung 1" not in out


def test_the_search_budget_is_that_of_the_rung_that_searched(tmp_path, capsys):
    def searched(trials):
        first = trials[trials["rung"] == 1].assign(stage="search", seed=1, chosen=None)
        return pd.concat([trials, first.assign(config_key=[f"s{i}" for i in range(len(first))])])

    folder = edit(climb(tmp_path / "searched", {"steady": (1.0,) * 3}), searched)
    assert budget.main([str(folder)]) == 0
    assert "no search trials here; arms searched on --rung 1" in capsys.readouterr().err
    assert budget.main([str(folder), "--rung", "1", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("arm,budget,")


def test_one_rung_is_a_plain_study_and_a_wrong_number_is_refused(finished, demo, capsys):
    assert improvement.main([str(finished), "--rung", "2", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["level"] == 0.05 / 3
    assert set(found["seeds"]["gelu"]) == set(range(2000, 2008))
    for source, rung, allowed in ((finished, 4, "1, 2, 3"), (demo, 1, "no --rung, because this study has one size")):
        with pytest.raises(TableError, match=f"--rung {rung}; allowed: {allowed}"):
            load(source, rung=rung)
    with pytest.raises(TableError, match="has one size"):
        command.main([str(demo)])


def test_rungs_are_never_mixed(finished, tmp_path):
    with pytest.raises(TableError, match="has a column rung: trials of a ladder"):
        load(finished / "trials.parquet", baseline="gelu")
    plain = configure(climb(tmp_path / "plain", {"steady": (1.0,) * 3}), scales=[])
    with pytest.raises(TableError, match="have a column rung; allowed: with a study file that has `scales`"):
        load(plain)
    gap = edit(climb(tmp_path / "gap", {"steady": (1.0,) * 3}), lambda t: t[t["rung"] != 2])
    with pytest.raises(TableError, match="column rung has 1, 3; allowed: 1 to 3, without a gap"):
        load(gap)
    none = edit(climb(tmp_path / "none", {"steady": (1.0,) * 3}), lambda t: t.drop(columns="rung"))
    with pytest.raises(TableError, match="has `scales`, but the trials have no column rung"):
        load(none)
    with pytest.raises(TableError, match="column rung has 1, 2, nan; allowed: 1 to 3"):
        load(
            edit(
                climb(tmp_path / "hole", {"steady": (1.0,) * 3}),
                lambda t: t.assign(rung=t["rung"].where(t["rung"] < 3)),
            )
        )
    with pytest.raises(TableError, match="column rung has 'top'; allowed: numbers"):
        load(edit(climb(tmp_path / "word", {"steady": (1.0,) * 3}), lambda t: t.assign(rung="top")))
    with pytest.raises(TableError, match="key ladder has 'drop'; allowed: a mapping"):
        load(configure(climb(tmp_path / "drop", {"steady": (1.0,) * 3}), ladder="drop"))
    with pytest.raises(TableError, match=r"level 0\.9; allowed: a number above 0 and below 0\.5"):
        load(climb(tmp_path / "level", {"steady": (1.0,) * 3}, level=0.9))
    with pytest.raises(TableError, match="level 'low'; allowed"):
        load(climb(tmp_path / "low", {"steady": (1.0,) * 3}, confirm={"level": "low"}))
    curves = climb(tmp_path / "curves", {"steady": (1.0,) * 3})
    pd.read_parquet(curves / "curves.parquet").drop(columns="rung").to_parquet(curves / "curves.parquet")
    with pytest.raises(TableError, match="the curves have no column rung"):
        load(curves)
    with pytest.raises(TableError, match="key scales has 'big'; allowed: a list of mappings"):
        load(configure(climb(tmp_path / "text", {"steady": (1.0,) * 3}), scales="big"))


def test_contrasts_have_trends_and_unknown_compute_has_none(tmp_path):
    folder = climb(tmp_path / "contrast", {"a": (1.0, 2.0, 3.0), "b": (0.0, 0.0, 0.0)})
    result = decide(load(configure(folder, contrasts=[["a", "b"]])))
    assert [(row.label, row.trend) for row in result.trends][2] == ("b against a", Trend.SHRINKS)
    unknown = edit(climb(tmp_path / "unknown", {"a": (1.0,) * 3}), lambda t: t.drop(columns="flops_per_token"))
    found = decide(load(unknown))
    assert found.trends[0].trend is Trend.HOLDS
    assert "no slope, because the compute is not known" in found.trends[0].why
    assert found.rungs[0].gains[0].why == "the training compute is not known"


def test_the_command_in_a_fresh_process(finished):
    def run(*words):
        return subprocess.run([sys.executable, "-m", "analysis.ladder", *words], capture_output=True, text=True)

    shown = run(str(finished), "--format", "csv")
    assert shown.returncode == 0
    table = pd.read_csv(io.StringIO(shown.stdout)).set_index("arm")
    assert table.loc["turned", "trend"] == "turns"
    assert table.loc["linear-floor", "verdict_2"] == "worse"
    assert table.loc["up", "slope"] > 0
    refused = run("no-such-folder")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)


def test_the_report_shows_the_ladder_first_and_folds_the_lower_rungs(tmp_path):
    folder = climb(tmp_path / "page", {"steady": (1.0,) * 3, "up": (0.3, 1.0, 2.0)})
    page = build.build(folder).read_text()
    assert page.index("Does it last?") < page.index("The verdict</h2>")
    assert page.count("<details>") == 3
    assert page.count("better: steady and up. The floor linear-floor loses by") == 3
    assert "The verdict on rung 1 (150k parameters, 1M tokens, 1e+12 FLOPs)" in page
    assert "the report is about rung 3 (1.35M parameters, 1M tokens, 6.4e+13 FLOPs), the highest rung" in page
    assert "Ladder of 3 rungs, each with the level 0.05 / 3" in page
    assert (folder / "figures" / "ladder.svg").is_file()
    assert "Holds: steady; grows: up." in page
    verdict = (folder / "verdict.md").read_text()
    assert verdict.index("## Rung 3") < verdict.index("## Trends")
    kept = (folder / "tables" / "ladder.csv").read_text()
    assert "rung 1, %\nverdict\nworth in compute" in page
    assert kept.startswith("arm,improvement_1,verdict_1,compute_1,")
    edit(folder, lambda t: t[t["rung"] < 3])
    half = build.build(folder).read_text()
    assert "Unfinished: rung 3 of 3 has not begun" in half
    assert half.count("<details>") == 3
    assert not (folder / "figures" / "ladder.svg").exists()


def each_size(folder, names=("small", "middle", "large"), **changes):
    """Write one plain study folder for each rung of a ladder; return the folders."""
    study = load(folder)
    out = []
    for name, rung in zip(names, study.ladder.rungs, strict=False):
        own = folder.parent / name
        own.mkdir()
        rung.trials.to_parquet(own / "trials.parquet")
        settings = {**rung.settings, "name": name, **changes}
        settings["confirm"] = {**settings["confirm"], "level": 0.05}
        (own / "study.yaml").write_text(yaml.safe_dump(settings))
        out.append(own)
    return out


def test_several_studies_are_a_ladder_with_holm_over_arms_and_rungs(tmp_path, capsys):
    laws = {"steady": (1.0, 1.0, 1.0), "turned": (1.5, 0.0, -1.5)}
    small, middle, large = each_size(climb(tmp_path / "climb", laws))
    written = yaml.safe_load((large / "study.yaml").read_text())
    for options in written["arms"].values():  # a later version writes more defaults
        options |= {"form": "pointwise", "base": "identity"}
    (large / "study.yaml").write_text(yaml.safe_dump(written))
    assert command.main([str(large), str(small), str(middle), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rung["name"] for rung in found["rungs"]] == ["small", "middle", "large"]
    assert {row["arm"]: row["trend"] for row in found["trends"]} == {"steady": "holds", "turned": "turns"}
    assert "one correction (holm) over the arms of all rungs at level 0.05" in found["summary"]
    tables = [load(own).losses() for own in (small, middle, large)]
    arms = ("linear-floor", "steady", "turned")
    p = [stats.ttest_rel(table["gelu"], table[arm]).pvalue for table in tables for arm in arms]
    adjusted = [row["p_adjusted"] for rung in found["rungs"] for row in rung["comparisons"]]
    assert adjusted == pytest.approx(multiplicity.adjust(p, "holm"))
    assert command.main([str(small), str(middle)]) == 0  # two sizes: verdicts, no trend
    assert "a trend needs three or more sizes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"confirm": {"margin": "1%"}}, "middle has the margin 1% and small 0.5%"),
        ({"arms": {"other": {"unit": "silu"}}}, "middle and small differ in the arms steady, other"),
        ({"name": "small"}, "small and small"),
        ({"scales": [{"d_model": 1}]}, "is a ladder itself"),
    ],
)
def test_studies_that_do_not_fit_together_are_refused(tmp_path, change, said):
    small, middle = each_size(climb(tmp_path / "climb", {"steady": (1.0, 1.0)}), ("small", "middle"))
    settings = yaml.safe_load((middle / "study.yaml").read_text())
    if "arms" in change:
        settings["arms"] |= change["arms"]
        del settings["arms"]["steady"]
        edit(middle, lambda t: t.assign(arm=t["arm"].replace("steady", "other")))
    elif "confirm" in change:
        settings["confirm"] |= change["confirm"]
    elif "scales" in change:
        settings |= change
        edit(middle, lambda t: t.assign(rung=1))
    else:
        settings |= change
    (middle / "study.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(TableError, match=said):
        command.main([str(small), str(middle)])


def test_other_sources_of_several_sizes_are_refused(tmp_path):
    folder = climb(tmp_path / "climb", {"steady": (1.0, 1.0)})
    small, middle = each_size(folder, ("small", "middle"))
    with pytest.raises(SystemExit, match="2"):  # the sources are the rungs
        command.main([str(small), str(middle), "--rung", "1"])
    with pytest.raises(TableError, match="has one size; allowed"):
        command.main([str(small)])
    pd.read_parquet(small / "trials.parquet").drop(columns="stage").to_csv(tmp_path / "rows.csv")
    with pytest.raises(TableError, match="rows is a table; allowed: study folders"):
        command.main([str(small), str(tmp_path / "rows.csv"), "--baseline", "gelu", "--metric", "test_nll"])
    edit(middle, lambda t: t.drop(columns="tokens"))
    with pytest.raises(TableError, match="middle: the baseline's training compute is not known"):
        command.main([str(small), str(middle)])
    edit(middle, lambda t: t[t["seed"] != 2000].assign(tokens=1_000_000))
    assert command.main([str(small), str(middle)]) == 1  # unfinished


def sized(improvements, metric="loss", start=3.0):
    """Return a table of runs at several sizes: seed noise that the arms share, and known improvements."""
    rng, rows = np.random.default_rng(3), []
    for i, size in enumerate((1e6, 4e6, 16e6)):
        for seed in range(8):
            shared, base = rng.normal(0, 0.01), start * 0.9**i
            rows.append({"arm": "base", "seed": seed, "params": size, metric: base + shared + rng.normal(0, 0.002)})
            for arm, gains in improvements.items():
                value = base * (1 - gains[i] / 100) + shared + rng.normal(0, 0.002)
                rows.append({"arm": arm, "seed": seed, "params": size, metric: value})
    return pd.DataFrame(rows)


def test_a_table_with_a_column_of_sizes_is_a_ladder(tmp_path, capsys):
    table = sized({"new": (1.0, 2.0, 3.0), "same": (0.5, 0.5, 0.5)})
    table.sample(frac=1, random_state=1).to_csv(tmp_path / "runs.csv", index=False)
    words = [str(tmp_path / "runs.csv"), "--baseline", "base", "--size", "params"]
    assert command.main([*words, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    new, same = found["trends"]
    assert (new["trend"], same["trend"]) == ("grows", "holds")
    assert new["slope"] == pytest.approx(0.5, abs=0.05)
    assert new["said"].endswith("points per doubling of params")
    assert [rung["compute"] for rung in found["rungs"]] == [1e6, 4e6, 16e6]
    assert found["rungs"][0]["compute_gains"][0]["why"] == "the training compute is not known"
    assert command.main(words) == significance.main(words) == improvement.main(words) == 0
    said = capsys.readouterr()
    assert "params 16M" in said.out
    assert improvement.main([*words, "--rung", "1", "--format", "csv"]) == 0
    assert 0.5 < pd.read_csv(io.StringIO(capsys.readouterr().out))["improvement_percent"][0] < 1.5
    with pytest.raises(TableError, match="--rung 4; allowed: 1, 2, 3"):
        improvement.main([*words, "--rung", "4"])
    assert "this is its rung 3 of 3" in said.err
    # an accuracy rises, and compute makes gains of compute known
    better = sized({"new": (-1.0, -2.0, -3.0)}, "accuracy", 0.5).rename(columns={"params": "train FLOPs"})
    better.to_csv(tmp_path / "better.csv", index=False)
    words = [str(tmp_path / "better.csv"), "--baseline", "base", "--size", "train FLOPs"]
    assert command.main([*words, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trends"][0]["trend"] == "grows"
    assert found["rungs"][0]["compute_gains"][0]["why"] == "the metric is not a loss above zero"
    flops = table.rename(columns={"params": "train FLOPs"})
    flops.to_csv(tmp_path / "flops.csv", index=False)
    assert command.main([str(tmp_path / "flops.csv"), *words[1:], "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rungs"][0]["compute_gains"][0]["factor"] > 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.drop(columns="params"), "no column 'params' for --size"),
        (lambda t: t.assign(params=t["params"].mask(t.index == 4)), "column params has no size in row 5"),
        (lambda t: t.assign(params=-t["params"]), "column params has no size in row 1"),
        (lambda t: t[(t["arm"] == "new") | (t["params"] > 1e6)], "params 1e[+]06: baseline 'base' is not an arm"),
        (lambda t: t.assign(params="big"), "params"),
    ],
)
def test_a_bad_column_of_sizes_is_refused(tmp_path, change, said):
    change(sized({"new": (1.0, 2.0, 3.0)})).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(TableError, match=said):
        command.main([str(tmp_path / "runs.csv"), "--baseline", "base", "--size", "params", "--metric", "loss"])


def test_sizes_may_be_written_with_a_letter(tmp_path, capsys):
    table = sized({"new": (1.0, 2.0, 3.0)})
    (tmp_path / "plain.csv").write_text(table.to_csv(index=False))
    names = {size: f"{size / 1e3:g}k" if size < 3e6 else f"{size / 1e6:g} M" for size in table["params"].unique()}
    table.assign(params=table["params"].map(names)).to_csv(tmp_path / "letters.csv", index=False)
    found = []
    for name in ("plain", "letters"):
        words = [str(tmp_path / f"{name}.csv"), "--baseline", "base", "--size", "params", "--format", "json"]
        assert command.main(words) == 0
        found.append(json.loads(capsys.readouterr().out)["trends"])
    assert found[0] == found[1]


def test_an_arm_that_a_size_lacks_has_the_trend_of_the_others(tmp_path, capsys):
    table = sized({"new": (1.0, 2.0, 3.0)})
    table[(table["arm"] != "new") | (table["params"] > 1e6)].to_csv(tmp_path / "runs.csv", index=False)
    with_other = pd.concat([pd.read_csv(tmp_path / "runs.csv"), table[table["arm"] == "new"].assign(arm="whole")])
    with_other.to_csv(tmp_path / "runs.csv", index=False)
    assert command.main([str(tmp_path / "runs.csv"), "--baseline", "base", "--size", "params", "--format", "json"]) == 0
    by_arm = {row["arm"]: row for row in json.loads(capsys.readouterr().out)["trends"]}
    assert by_arm["new"]["rungs"] == [2, 3]
    assert "no run on rung 1" in by_arm["new"]["why"]
    assert by_arm["whole"]["trend"] == "grows"


def test_one_look_that_ends_an_arm_widens_its_interval(tmp_path):
    confirm = {"rule": "obrien-fleming", "max_seeds": 10}
    early = load(climb(tmp_path / "early", {"a": (3.0,) * 3}, seeds=(5, 8, 10), confirm=confirm))
    study, row = early.ladder.rungs, decide(early).trends[0]
    errors = []
    for rung, n in zip(study, (5, 8, 10), strict=True):
        losses = rung.losses()
        r = losses["a"].mean() / losses["gelu"].mean()
        sd = 100 * (losses["a"] - r * losses["gelu"]).std(ddof=1) / losses["gelu"].mean()
        errors.append(sd / math.sqrt(n) * (math.sqrt((n - 1) / (n - 2)) if n < 10 else 1.0))
    assert row.standard_error == pytest.approx(math.sqrt(errors[0] ** 2 + errors[2] ** 2) / 6)
