"""A ladder: its rungs run from small to large, start at predictions, leave out arms that lost, and resume."""

import math

import pandas as pd
import pytest

from tests.tune.decide.ladders import BEST_LR, ladder_of, loss_of
from tune.backend.inline import Inline
from tune.decide import calibrate
from tune.decide.ladder import predict
from tune.errors import StudyError
from tune.run.extend import check_folder
from tune.run.progress import progress_of
from tune.run.study_run import StudyRun
from tune.run.tables import tables
from tune.study.files import dump
from tune.subject.known import Known


def climbed(study, folder=None, most=None):
    """Run a ladder of known losses, up to a number of ended cells; return the closed run."""
    run = StudyRun(study, folder, Known(study, loss_of, loss_of))
    if most:
        run._listen = lambda ended: run.give_up(KeyboardInterrupt()) if ended.ended >= most else None
    try:
        Inline().train(run)
    except Exception:  # noqa: BLE001 (the run was told to stop)
        assert most
    run.close()
    return run


def told(run):
    """Return the events of a run without their times, and without starts that an interruption repeated."""
    rows = [{k: v for k, v in e.items() if k not in ("time", "crc")} for e in run.ledger.events]
    return [e for e in rows if e["event"] in ("suggested", "ended", "grid", "corners", "chosen", "look", "dropped")]


def test_all_stages_of_a_rung_end_before_the_next_begins_and_only_the_lowest_searches():
    run = climbed(ladder_of())
    assert run.stages.finished
    rows, curves = tables("tiny", run.ledger.events)
    order = [record.cell.rung for record in run.records.values()]
    assert order == sorted(order)
    assert set(rows.loc[rows["stage"] == "search", "rung"]) == {1}
    assert set(rows.loc[rows["stage"] == "confirm", "rung"]) == set(curves["rung"]) == {1, 2, 3}
    confirm = rows[rows["stage"] == "confirm"]
    assert (confirm.groupby(["rung", "arm"])["seed"].nunique() == 8).all()
    assert confirm["chosen"].all()
    assert len({record.cell.key for record in run.records.values()}) == len(run.records)
    assert rows["seed"].nunique() == rows.groupby("rung")["seed"].nunique().sum()  # no seed in two rungs
    for rung, best in BEST_LR.items():  # every size finds its own optimum, whatever was predicted
        chosen = confirm.loc[confirm["rung"] == rung, "lr"]
        assert chosen.between(best / 1.1, best * 1.1).all()


def test_every_rung_may_search():
    run = climbed(ladder_of(ladder={"search": "every"}))
    rows, _ = tables("tiny", run.ledger.events)
    assert (rows[rows["stage"] == "search"].groupby(["rung", "arm"]).size() == 3).all()
    assert set(rows.loc[rows["stage"] == "search", "rung"]) == {1, 2, 3}


def test_no_rung_searches_if_only_arms_with_something_of_their_own_do():
    for ladder in ({}, {"ladder": {"search": "every"}}):
        run = climbed(ladder_of(search={"arms": "own"}, **ladder))
        assert run.stages.finished
        cells = [record.cell for record in run.records.values()]
        assert {cell.stage for cell in cells} == {"calibrate", "confirm"}
        assert {cell.rung for cell in cells} == {1, 2, 3}
        for rung, best in BEST_LR.items():
            rates = [cell.config["lr"] for cell in cells if (cell.stage, cell.rung) == ("confirm", rung)]
            assert rates == pytest.approx([best] * len(rates), rel=0.1)


def test_an_arm_that_lost_on_two_rungs_is_left_out_above_them_if_the_study_says_so():
    run = climbed(ladder_of(ladder={"drop": True}))
    rows, _ = tables("tiny", run.ledger.events)
    there = rows.groupby("rung")["arm"].unique().map(set)
    assert there[2] == {"gelu", "paglu", "bad", "floor"}
    assert there[3] == {"gelu", "paglu", "floor"}  # the floor lost twice too, and stays
    assert [(e["rung"], e["arms"]) for e in told(run) if e["event"] == "dropped"] == [(3, ["bad"])]
    again = tables("tiny", climbed(ladder_of()).ledger.events)[0]
    assert set(again.loc[again["rung"] == 3, "arm"]) == {"gelu", "paglu", "bad", "floor"}


@pytest.mark.parametrize("most", [5, 60, 130])
def test_a_ladder_that_is_stopped_on_any_rung_continues_to_the_same_ledger(tmp_path, most):
    study = ladder_of(ladder={"drop": True}, confirm={"rule": "obrien-fleming"})
    whole = climbed(study)
    part = climbed(study, tmp_path, most)
    assert not part.stages.finished
    rest = climbed(study, tmp_path)
    assert rest.stages.finished
    assert told(rest) == told(whole)
    columns = ["rung", "stage", "arm", "seed", "config_key", "test_nll", "look"]
    both = [tables("tiny", run.ledger.events)[0][columns] for run in (whole, rest)]
    pd.testing.assert_frame_equal(*both)


def test_a_study_that_goes_on_on_another_machine_keeps_its_grid(tmp_path, monkeypatch):
    study = ladder_of()
    climbed(study, tmp_path, most=150)
    grid = calibrate.geometric_grid
    monkeypatch.setattr(calibrate, "geometric_grid", lambda *given: [rate * (1 + 4e-16) for rate in grid(*given)])
    rest = climbed(study, tmp_path)
    assert len(rest.records) == rest.ended  # no cell was suggested twice
    firsts = [e for e in told(rest) if e["event"] == "grid" and e["nuisance"] == "lr" and e["rung"] == 1]
    assert len(firsts) == len({len(e["grid"]) for e in firsts})
    monkeypatch.setattr(calibrate, "geometric_grid", lambda *given: [rate * (1 + 1e-6) for rate in grid(*given)])
    other = StudyRun(study, tmp_path, Known(study, loss_of, loss_of))
    assert other.missing  # another grid is another study
    other.close()


def test_a_prediction_continues_the_line_of_all_arms_and_moves_one_step_at_most():
    study = ladder_of()
    first, second, third = study.rungs
    with_one = {arm: {"lr": 0.02, "weight_decay": 0.1} for arm in study.arms}
    assert predict([(first, with_one)], second) == with_one
    slight = {arm: {"lr": 0.016, "weight_decay": 0.1} for arm in study.arms}
    found = predict([(first, with_one), (second, slight)], third)
    at = [math.log(rung.compute) for rung in study.rungs]
    slope = math.log(0.016 / 0.02) / (at[1] - at[0])
    expected = 0.016 * math.exp(slope * (at[2] - at[1]))
    assert found["gelu"]["lr"] == pytest.approx(expected, rel=1e-3)
    assert found["gelu"]["weight_decay"] == 0.1
    steep = {arm: {"lr": 0.002, "weight_decay": 0.1} for arm in study.arms}
    assert predict([(first, with_one), (second, steep)], third)["gelu"]["lr"] == pytest.approx(0.001)


def test_progress_counts_all_rungs_and_names_the_one_that_runs():
    study = ladder_of()
    run = climbed(study)
    events = run.ledger.events
    begun = progress_of(study, events[:40])
    assert (begun.rung, begun.stage) == (1, "search")
    assert begun.planned("search") == (12, 12, 12)
    assert begun.planned("confirm") == (96, 96, 96)
    assert begun.seconds_left(2, events[40]["time"]) is not None
    ended = progress_of(study, events)
    assert (ended.rung, ended.ended, ended.count("confirm", "completed")) == (3, run.ended, 96)
    assert ended.chosen == run.stages.chosen
    assert not run.missing
    assert run.stages.remaining() == 0


def test_only_rungs_that_have_not_begun_may_change_their_size(tmp_path):
    study, folder = ladder_of(), tmp_path / "tiny"
    folder.mkdir()
    (folder / "study.yaml").write_text(dump(study))
    climbed(study, folder, most=60)  # in the calibrate stage of rung 1
    rows = [rung.model_dump(exclude_none=True, exclude={"tokens"}) for rung in study.scales]
    larger = [*rows[:2], rows[2] | {"d_model": 96}]
    check_folder(ladder_of(scales=larger), folder)
    with pytest.raises(StudyError, match=r"scales: rung 1\.n_layer was 1 and is now 2"):
        check_folder(ladder_of(scales=[rows[0] | {"n_layer": 2}, *rows[1:]]), folder)
    with pytest.raises(StudyError, match="scales was a ladder of 3 rungs and is now one of 2"):
        check_folder(ladder_of(scales=rows[:2]), folder)
    climbed(study, folder)
    with pytest.raises(StudyError, match=r"scales: rung 3\.d_model was 64 and is now 96"):
        check_folder(ladder_of(scales=larger), folder)
