"""Test the tracking thread of a study: what it writes, when it waits, what it lacks."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tests.tune.helpers import meta_of, row_at
from tune.study.cell import Cell, Record
from tune.study.files import load
from tune.tracking import runs as mlflow_runs
from tune.tracking import store as mlflow_store
from tune.tracking import tracker as mlflow_tracker
from tune.tracking.runs import Runs, numeric_alpha
from tune.tracking.store import prepare_store
from tune.tracking.tracker import MlflowTracker

ROOT = Path(__file__).parents[3]
SMOKE = ROOT / "configs" / "smoke.yaml"
CELL = Cell("confirm", "gelu", 0, 101, {"lr": 1e-3}, "key")


def runs(uri):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("smoke")
    found = client.search_runs([experiment.experiment_id])
    return {run.data.tags.get("cell", "study"): run for run in found}


def test_the_thread_gets_a_record_as_it_stood(place, monkeypatch):
    monkeypatch.setattr(MlflowTracker, "_work", lambda self: None)
    folder, corpus, uri = place
    tracker = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
    record = Record(CELL, started=1.0, curve=[row_at(4)])
    tracker.reported(record, record.curve[-1])
    record.outcome = "completed"
    record.curve.append(row_at(8))
    seen = tracker._queue.get()
    assert (seen.outcome, [r["step"] for r in seen.curve]) == (None, [4])


def test_a_cell_that_begins_again_replaces_its_run(place):
    folder, corpus, uri = place
    tracker = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
    record = Record(CELL, started=time.time(), curve=[row_at(4), row_at(8)])
    tracker.reported(record, record.curve[-1])
    while CELL.key not in tracker.runs.known or not tracker.runs.known[CELL.key].rows:
        time.sleep(0.1)
    record.started, record.curve = time.time(), [row_at(4), row_at(8), row_at(12)]  # before the thread looks
    record.outcome, record.final, record.ended = "completed", {"val_nll": 3.5}, time.time()
    tracker.ended(record)
    tracker.close()
    assert tracker.owed == 0
    run = runs(uri)[CELL.key]
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "val/nll")
    assert [metric.step for metric in history] == [4, 8, 12]
    assert (run.info.status, run.data.tags["outcome"], run.data.metrics["val_nll"]) == (
        "FINISHED",
        "completed",
        3.5,
    )


@pytest.mark.parametrize("arrived", [False, True], ids=["lost on the way", "its answer lost"])
def test_a_run_whose_first_request_failed_has_its_parameters_once_it_is_written(place, monkeypatch, arrived):
    folder, _, uri = place
    written = Runs(uri, load(SMOKE), folder, "abc")
    written.connect()
    record = Record(CELL, started=time.time(), curve=[row_at(4)])
    log, times = MlflowClient.log_batch, []

    def once(client, *given, **named):
        times.append(1)
        if len(times) > 1 or arrived:
            log(client, *given, **named)
        if len(times) == 1:
            raise MlflowException("away")

    monkeypatch.setattr(MlflowClient, "log_batch", once)
    with pytest.raises(MlflowException, match="away"):
        written.write(record)
    written.connect(again=True)
    record.outcome, record.final, record.ended = "completed", {"val_nll": 3.5}, time.time()
    written.write(record)
    assert written.has(record)
    assert len(times) == 2  # one request writes everything
    run = runs(uri)[CELL.key]
    own = {"lr": "0.001", "alpha": "0.0", "arm": "gelu", "gate": "none", "base": "stock", "seed": "101"}
    study = load(SMOKE)
    constants = {**study.model.model_dump(exclude_none=True), **study.fixed.model_dump(exclude_none=True)}
    assert {"d_model", "tokens", "weight_decay", "precision"} <= constants.keys()
    expected = {name: str(value) for name, value in constants.items()} | own | {"vocab_size": "300"}
    assert run.data.params == expected
    assert (run.data.tags["outcome"], run.data.metrics["val_nll"]) == ("completed", 3.5)
    (point,) = MlflowClient(uri).get_metric_history(run.info.run_id, "val/nll")
    assert (point.step, point.value) == (4, 3.5)


def test_a_run_of_an_earlier_version_gets_what_it_lacks(place):
    folder, _, uri = place
    written = Runs(uri, load(SMOKE), folder, "abc")
    written.connect()
    final = {"val_nll": 3.5, "alpha": 0.75}
    cell = replace(CELL, arm="paglu-learnable")
    record = Record(cell, started=1.0, outcome="completed", final=final, ended=2.0, curve=[row_at(4)])
    tags = {"mlflow.parentRunId": written.parent_id, "cell": cell.key, "outcome": "completed", "stage": "confirm"}
    client = MlflowClient(uri)
    old = client.create_run(written._experiment, start_time=1000, tags=tags).info.run_id
    client.log_param(old, "arm", "paglu-learnable")
    client.log_metric(old, "final/val_nll", 3.5)
    client.set_terminated(old)
    written.connect()
    assert not written.has(record)
    written.write(record)
    run = runs(uri)[cell.key]
    assert (run.info.run_id, run.data.params["seed"]) == (old, "101")
    assert (run.data.metrics["val_nll"], run.data.metrics["alpha"]) == (3.5, 0.75)
    assert run.data.params["alpha"] == "0.5"  # where it starts
    assert {name for name in run.data.metrics if "/" in name} >= {"val/nll", "train/nll", "train/lr"}
    written.connect()
    assert written.has(record)


def test_a_second_tracker_finds_what_is_there_and_sweeps_what_was_cut_off(place):
    folder, corpus, uri = place
    first = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
    done = Record(CELL, started=1.0, outcome="completed", final={"val_nll": 3.0}, ended=2.0, curve=[row_at(4)])
    cut = Record(Cell("confirm", "gelu", 0, 102, {"lr": 1e-3}, "key"), started=1.0, curve=[row_at(4)])
    first.ended(done)
    first.reported(cut, cut.curve[-1])
    first.close()
    before = runs(uri)
    assert before.keys() == {"study", CELL.key, cut.cell.key}
    second = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
    second.ended(done)
    second.close()
    after = runs(uri)
    assert after.keys() == {"study", CELL.key}
    assert after[CELL.key].info.run_id == before[CELL.key].info.run_id
    assert after["study"].info.run_id == before["study"].info.run_id


def test_a_dead_server_costs_the_study_nothing_and_is_owed(place):
    folder, corpus, _ = place
    began = time.monotonic()
    tracker = MlflowTracker("http://127.0.0.1:9", load(SMOKE), folder, meta_of(corpus))
    for seed in range(50):
        tracker.ended(Record(Cell("confirm", "gelu", 0, seed, {"lr": 1e-3}, "key"), outcome="completed"))
    assert time.monotonic() - began < 5  # no call of the study waits for the server
    tracker.close(patience=0.5)
    assert tracker.owed == 50


def test_a_store_that_lags_behind_is_waited_for_while_it_goes_on(place, monkeypatch):
    """Simulate a busy machine: many cells are left at the end, and one is written in each period of patience."""
    folder, corpus, uri = place
    write, said, turn = mlflow_runs.Runs.write, [], threading.Semaphore(0)

    def slowly(self, record):
        turn.acquire()
        write(self, record)

    monkeypatch.setattr(mlflow_runs.Runs, "write", slowly)
    tracker = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
    found = [Record(replace(CELL, seed=seed), started=1.0, outcome="completed", ended=2.0) for seed in range(5)]
    real = tracker._thread.join

    def join(patience):
        left = tracker.owed
        turn.release()
        while tracker._thread.is_alive() and tracker.owed == left:
            real(0.05)

    monkeypatch.setattr(tracker._thread, "join", join)
    tracker.close(found, warn=said.append)
    assert (tracker.owed, len(runs(uri))) == (0, 6)
    assert said == [
        f"waiting for MLflow, which lacks {cells} cells; Ctrl-C leaves them to `pagating sync`"
        for cells in (4, 3, 2, 1)
    ]


def test_a_store_that_stands_still_is_given_up_on(place, monkeypatch):
    folder, corpus, uri = place
    asked = []

    def stuck(self, record):
        asked.append(record)
        time.sleep(60)

    monkeypatch.setattr(mlflow_runs.Runs, "write", stuck)
    tracker = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
    tracker.ended(Record(CELL, started=1.0, outcome="completed", ended=2.0))
    while not asked:
        time.sleep(0.05)
    began = time.monotonic()
    tracker.close(patience=0.5)
    assert time.monotonic() - began < 10
    assert (tracker.owed, tracker.problem) == (1, "not written within 0.5 s")


@pytest.mark.parametrize(("errors", "owed"), [(2, 0), (9, 1)])
def test_the_last_cells_are_tried_again_a_few_times(place, monkeypatch, errors, owed):
    """Check that a store that is locked for a moment while the study ends gets all cells."""
    monkeypatch.setattr(mlflow_tracker, "FIRST_WAIT", 0.05)
    folder, corpus, uri = place
    write, left = mlflow_runs.Runs.write, [None] * errors

    def busy(self, record):
        if left:
            left.pop()
            raise MlflowException("database is locked")
        write(self, record)

    tracker = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
    monkeypatch.setattr(mlflow_runs.Runs, "write", busy)
    tracker.close([Record(CELL, started=1.0, outcome="completed", ended=2.0)], patience=30.0)
    assert tracker.owed == owed
    assert tracker.problem == (None if not owed else "database is locked")


def test_the_store_appears_whole_or_not_at_all(tmp_path, monkeypatch, empty_store):
    def broken(*_):
        raise OSError("disk full")

    class Made:
        """Client of a store whose schema is made at once."""

        def __init__(self, tracking_uri):
            shutil.copy(empty_store, mlflow_store.sqlite_file(tracking_uri))

        def search_experiments(self, max_results):
            assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []

    monkeypatch.setattr(mlflow, "MlflowClient", Made)
    with monkeypatch.context() as patched:
        patched.setattr(mlflow_store.os, "link", broken)
        patched.setattr(mlflow_store.os, "replace", broken)
        with pytest.raises(OSError, match="disk full"):
            prepare_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []
    prepare_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_every_arm_has_a_number_for_alpha():
    study = load(SMOKE)
    found = {arm: numeric_alpha(study, arm, {"lr": 1e-3}) for arm in study.arms if arm != "paglu-searched"}
    assert found == {"gelu": 0.0, "linear-floor": 0.0, "paglu-learnable": 0.5, "paglu-per-layer": 0.5}
    assert numeric_alpha(study, "paglu-searched", {"lr": 1e-3, "alpha": 1.25}) == 1.25
