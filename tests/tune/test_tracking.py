import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tune import mlflow_runs
from tune.ledger import Cell, Ledger, Record
from tune.mlflow_runs import default_uri, numeric_alpha
from tune.study import load
from tune.tracking import Tracker

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
ROW = {"step": 4, "tokens": 40, "val_nll": 3.5, "train_nll": 3.4, "lr": 1e-3, "grad_norm": 1.0, "alpha": [0.25]}
CELL = Cell("confirm", "gelu", 0, 101, {"lr": 1e-3}, "key")


@pytest.fixture
def place(tmp_path):
    """A study folder with an empty ledger, and a packed corpus's description."""
    (tmp_path / "corpus").mkdir()
    splits = {split: {"tokens": 1} for split in ("train", "validation", "test")}
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({"digest": "abc", "splits": splits}))
    folder = tmp_path / "smoke"
    folder.mkdir()
    (folder / "study.yaml").write_text("question: none\n")
    Ledger(folder / "ledger.jsonl").close()
    return folder, tmp_path / "corpus", f"sqlite:///{tmp_path / 'mlflow.db'}"


def row(step):
    return {**ROW, "step": step, "tokens_per_second": 10.0}


def runs(uri):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("smoke")
    found = client.search_runs([experiment.experiment_id])
    return {run.data.tags.get("cell", "study"): run for run in found}


def test_the_thread_gets_a_record_as_it_stood(place, monkeypatch):
    monkeypatch.setattr(Tracker, "_work", lambda self: None)
    folder, corpus, uri = place
    tracker = Tracker(uri, load(SMOKE), folder, corpus)
    record = Record(CELL, started=1.0, curve=[row(4)])
    tracker.reported(record, record.curve[-1])
    record.outcome = "completed"
    record.curve.append(row(8))
    seen = tracker._queue.get()
    assert (seen.outcome, [r["step"] for r in seen.curve]) == (None, [4])


def test_a_cell_that_begins_again_replaces_its_run(place):
    folder, corpus, uri = place
    tracker = Tracker(uri, load(SMOKE), folder, corpus)
    record = Record(CELL, started=time.time(), curve=[row(4), row(8)])
    tracker.reported(record, record.curve[-1])
    while CELL.key not in tracker.runs.known:
        time.sleep(0.1)
    record.started, record.curve = time.time(), [row(4), row(8), row(12)]  # as far again before the thread looks
    record.outcome, record.final, record.ended = "completed", {"val_nll": 3.5}, time.time()
    tracker.ended(record)
    tracker.close()
    assert tracker.owed == 0
    run = runs(uri)[CELL.key]
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "val/nll")
    assert [metric.step for metric in history] == [4, 8, 12]
    assert (run.info.status, run.data.tags["outcome"], run.data.metrics["final/val_nll"]) == (
        "FINISHED",
        "completed",
        3.5,
    )


def test_a_second_tracker_finds_what_is_there_and_sweeps_what_was_cut_off(place):
    folder, corpus, uri = place
    first = Tracker(uri, load(SMOKE), folder, corpus)
    done = Record(CELL, started=1.0, outcome="completed", final={"val_nll": 3.0}, ended=2.0, curve=[row(4)])
    cut = Record(Cell("confirm", "gelu", 0, 102, {"lr": 1e-3}, "key"), started=1.0, curve=[row(4)])
    first.ended(done)
    first.reported(cut, cut.curve[-1])
    first.close()
    before = runs(uri)
    assert before.keys() == {"study", CELL.key, cut.cell.key}
    second = Tracker(uri, load(SMOKE), folder, corpus)
    second.ended(done)
    second.close()
    after = runs(uri)
    assert after.keys() == {"study", CELL.key}
    assert after[CELL.key].info.run_id == before[CELL.key].info.run_id
    assert after["study"].info.run_id == before["study"].info.run_id


def test_a_dead_server_costs_the_study_nothing_and_is_owed(place):
    folder, corpus, _ = place
    began = time.monotonic()
    tracker = Tracker("http://127.0.0.1:9", load(SMOKE), folder, corpus)
    for seed in range(50):
        tracker.ended(Record(Cell("confirm", "gelu", 0, seed, {"lr": 1e-3}, "key"), outcome="completed"))
    assert time.monotonic() - began < 5  # no call of the study waits for the server
    tracker.close(patience=0.5)
    assert tracker.owed >= 50


def test_the_store_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(mlflow_runs.os, "link", broken)
        patched.setattr(mlflow_runs.os, "replace", broken)
        with pytest.raises(OSError, match="disk full"):
            mlflow_runs.prepare_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []


def test_every_arm_has_a_number_for_alpha():
    study = load(SMOKE)
    found = {arm: numeric_alpha(study, arm, {"lr": 1e-3}) for arm in study.arms if arm != "paglu-searched"}
    assert found == {"gelu": 0.0, "linear-floor": 0.0, "paglu-learnable": 0.5, "paglu-per-layer": 0.5}
    assert numeric_alpha(study, "paglu-searched", {"lr": 1e-3, "alpha": 1.25}) == 1.25


def test_the_default_store_stands_beside_the_studies(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(tmp_path / "studies") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_uri(tmp_path / "studies") == "http://127.0.0.1:5000"
