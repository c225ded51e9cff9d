"""A study of the user's own training whose hyperparameters have names of their own, and one that tunes nothing."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis import budget, growth, improvement, ladder, significance
from analysis.io.files import TableError
from analysis.io.formats import verdict_table
from analysis.io.study import load as load_tables
from analysis.report.build import build
from analysis.report.figures import drawn
from analysis.report.findings import Findings
from analysis.verdict.decide import decide
from analysis.verdict.grids import grids
from analysis.verdict.kinds import rows_of_rungs
from analysis.verdict.words import called
from tests.own_trainings import DEPTHS, NAMED, named_study
from tune.backend.inline import Inline
from tune.cli.screen import plain
from tune.cli.status_table import arms as arms_table
from tune.cli.status_table import look
from tune.run import ledger
from tune.study.files import find
from tune.sweep import sweep
from tune.tracking.views import view_tags


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Return the finished run of a study without a learning rate, and the lines on its cells."""
    base, lines = tmp_path_factory.mktemp("named"), []
    study = named_study(base)
    run = sweep(study, base, base / "studies", Inline(), listen=lambda ended: lines.append(plain(ended)))
    build(run.folder)
    return run, lines


def test_hyperparameters_of_any_name_are_tuned_in_their_order(named):
    run, lines = named
    assert (run.study.first, run.stages.finished) == ("depth", True)
    grid = {event["nuisance"]: event["grid"] for event in run.ledger.events if event["event"] == "grid"}
    assert list(grid) == ["depth", "rate"]
    assert set(grid["depth"]) <= {1, 2, 3, 4, 6, 8}  # a list is never left
    for config in run.stages.chosen.values():
        assert config["depth"] == 4
        assert config["rate"] == pytest.approx(0.1, rel=0.05)
    assert "confirm plain depth=4 rate=0.1 seed=101: accuracy 0.8" in lines[-15]
    trials = pd.read_parquet(run.folder / "trials.parquet")
    assert "lr" not in trials
    assert set(trials["depth"]) <= {1.0, 2.0, 3.0, 4.0, 6.0, 8.0}


def test_status_and_verdict_have_the_users_names(named, capsys):
    run, _ = named
    view = look(run.study, run.folder)
    table = arms_table(view.progress, 200)[0]
    assert [str(cell) for cell in table.columns[0].cells] == ["plain", "new", "short"]
    assert "depth=4 n=5" in next(iter(table.columns[3].cells))
    assert significance.main([str(run.folder), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["arm"]: row["kind"] for row in found["comparisons"]} == {"short": "worse", "new": "better"}
    assert "depth 4" in found["summary"]
    assert "Warning: no bracket" not in found["summary"]


def test_a_study_is_found_by_its_name_and_asked_for_beside_its_table(named, monkeypatch, capsys):
    run, _ = named
    monkeypatch.chdir(run.folder.parents[1])
    Path(run.study.name).mkdir()  # a folder of that name without a study is not meant
    for main in (significance.main, improvement.main, growth.main, budget.main):
        shown = []
        for source in (run.study.name, f"--study={run.study.name}", str(run.folder)):
            assert main([source, "--format", "csv"]) == 0
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1] == shown[2]
    with pytest.raises(TableError, match="has one size"):
        ladder.main([run.study.name])
    table = Path("studies", run.study.name, "trials.parquet")
    with pytest.raises(TableError, match=rf"{table.parent}/study\.yaml does; allowed: the folder, {table.parent}$"):
        significance.main([str(table)])


def test_report_speaks_of_no_learning_rate(named):
    run, _ = named
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "learning rate" not in page.lower()
    assert "at equal depth, on the selection seeds" in page
    study = load_tables(run.folder)
    found = grids(study)
    assert list(found) == ["depth", "rate"]
    assert all(4.0 in table.index for table in found["depth"].losses.values())
    assert called("depth") == "depth"
    assert "Relative speed" not in page
    assert ">relative speed<" not in page


def test_a_standard_error_that_one_seed_cannot_tell_is_not_shown(named, capsys):
    run, _ = named
    assert pd.read_csv(run.folder / "tables" / "calibration.csv")["standard_error"].isna().all()
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert 'data-of="standard error of a point">-<' in page
    assert improvement.main([str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert "standard error of a point" in out
    assert "nats" not in out


def test_an_unfinished_study_says_so_in_every_command(named, tmp_path, capsys):
    run, _ = named
    trials = pd.read_parquet(run.folder / "trials.parquet")
    for name, kept in (("none", trials["stage"] != "confirm"), ("some", trials["seed"] != 105)):
        folder = tmp_path / name
        shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("*.html", "figures", "logs"))
        trials[kept].to_parquet(folder / "trials.parquet")
        for main in (significance.main, improvement.main):
            assert main([str(folder), "--format", "csv"]) == 1
            assert "unfinished: " in capsys.readouterr().err
        rows = rows_of_rungs(decide(load_tables(folder)))
        assert "unfinished" in {str(cell) for cell in verdict_table(rows, "", 200, "").columns[-1].cells}


def test_an_improvement_has_the_sign_of_the_metric_and_a_worth_in_training(named):
    run, _ = named
    found = json.loads((run.folder / "verdict.json").read_text())
    new, short = found["comparisons"]
    trials = pd.read_parquet(run.folder / "trials.parquet")
    table = trials[trials["stage"] == "confirm"].pivot(index="seed", columns="arm", values="test_accuracy")
    means = table.mean()
    assert new["improvement_percent"] == pytest.approx(100 * (means["new"] / means["plain"] - 1))
    assert new["mean_difference"] == pytest.approx(means["new"] - means["plain"])
    doublings = (means["new"] - means["plain"]) / (means["plain"] - means["short"])  # the floor has half the budget
    assert new["training_percent"] == pytest.approx(100 * (2**doublings - 1))
    assert new["training_low"] < new["training_percent"] < new["training_high"]
    assert short["training_percent"] is None
    said = f"worth {new['training_percent']:.1f}% more training [{new['training_low']:.1f}, {new['training_high']:.1f}]"
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    for text in (found["summary"], new["why"], page, (run.folder / "verdict.md").read_text()):
        assert said in text
    assert "worth in training, %" in page
    assert "improvement is 100 * (mean(arm) / mean(plain) - 1)" in page
    assert "the same epochs per trial, but for arms with a share of them." in page
    curves = pd.read_csv(run.folder / "tables" / "search_budget.csv")
    assert (curves["without_replacement"].dropna() > 0).all()


def test_figures_of_a_metric_that_grows_have_no_minus_sign(named):
    run, _ = named
    found = Findings(load_tables(run.folder))
    shown = drawn(found)
    for name in ("learning_rate", "loss_curves", "search_budget"):
        for axes in shown[name].plot.axes:
            axes.figure.canvas.draw()
            assert "-" not in axes.get_ylabel()
            ticks = [float(tick.get_text().replace("\N{MINUS SIGN}", "-")) for tick in axes.get_yticklabels()]
            assert all(0 < value < 1 for value in ticks)
            heights = [tick.get_window_extent().y0 for tick in axes.get_yticklabels()]
            assert sorted(heights) == [
                height for _, height in sorted(zip(ticks, heights, strict=True))
            ]  # the better is higher
        text = f"{shown[name].takeaway} {shown[name].caption}"
        assert not [word for word in ("loss", "Loss", "lowest point", "{", "nats") if word in text]
    assert "the arm's accuracy minus the baseline's" in shown["differences"].caption
    view = view_tags(run.study)
    assert "accuracy against depth" in view["mlflow.sharedViewState.search"]
    assert "params.`rate`" in view["mlflow.sharedViewState.trials"]
    assert not [text for text in view.values() if "params.`lr`" in text or "loss" in text]


@pytest.mark.parametrize("rule", ["fixed", "obrien-fleming"])
def test_a_metric_around_zero_has_differences_and_no_percentages(tmp_path, rule):
    function = DEPTHS.replace("trial.depth", "4").replace("trial.rate", "0.1").replace("0.9 - off", "0.0248 - off")
    confirm = {"seeds": 6} if rule == "fixed" else {"rule": rule, "max_seeds": 8}
    study = named_study(tmp_path, function, nuisance={}, confirm=confirm)
    run = sweep(study, tmp_path, tmp_path / "studies", Inline())
    build(run.folder)
    found = json.loads((run.folder / "verdict.json").read_text())
    new, short = found["comparisons"]
    assert (new["kind"], short["kind"]) == ("better", "worse")
    assert new["improvement_percent"] is None
    assert new["mean_difference"] == pytest.approx(0.02, abs=0.003)
    assert new["training_percent"] > 0
    assert "%" not in found["summary"].replace("more training", "").split("worth")[0]
    assert "give confirm.margin as a number" in new["why"]
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "no percentage: the mean accuracy of plain is not clearly above zero" in page
    plot = drawn(Findings(load_tables(run.folder)))["differences"].plot
    assert "(test_accuracy; right of 0 = better)" in plot.axes[0].get_xlabel()


@pytest.mark.parametrize("search", [{}, {"shift": {"uniform": [0.0, 0.1]}}])
def test_a_study_that_tunes_nothing_goes_straight_to_confirm(tmp_path, search):
    function = (
        DEPTHS.replace("trial.depth", "4")
        .replace("trial.rate", "0.1")
        .replace('if trial.kind == "new"', f"if trial.kind == 'new' {'and trial.shift < 1' if search else ''}")
    )
    arms = {**NAMED["arms"], "new": {"set": {"kind": "new"}, "search": search}}
    study = named_study(tmp_path, function, nuisance={}, arms=arms, confirm={"seeds": 4})
    run = sweep(study, tmp_path, tmp_path / "studies", Inline())
    assert run.study.stages == (["search", "confirm"] if search else ["confirm"])
    assert run.stages.finished
    stages = [record.cell.stage for record in run.records.values()]
    assert stages.count("search") == (5 if search else 0)  # three of the arm that searches, one of every other
    assert stages.count("confirm") == 12
    build(run.folder)
    found = json.loads((run.folder / "verdict.json").read_text())
    assert found["unfinished"] == ""
    assert {row["arm"]: row["kind"] for row in found["comparisons"]} == {"short": "worse", "new": "better"}
    events, again = len(ledger.read(run.folder / "ledger.jsonl")), find(run.folder, tmp_path / "studies")
    assert sweep(again.study, again.base, again.output, Inline()).stages.finished
    assert len(ledger.read(run.folder / "ledger.jsonl")) == events
