"""A study of the user's own training whose hyperparameters have names of their own, and one that tunes nothing."""

import json

import pandas as pd
import pytest

from analysis import significance
from analysis.io.study import load as load_tables
from analysis.report.build import build
from analysis.verdict.grids import grids
from analysis.verdict.words import called
from tests.own_trainings import DEPTHS, NAMED, named_study
from tune.backend.inline import Inline
from tune.cli.screen import plain
from tune.cli.status_table import arms as arms_table
from tune.cli.status_table import look
from tune.run import ledger
from tune.study.files import find
from tune.sweep import sweep


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
