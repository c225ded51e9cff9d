import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tune import ledger as ledgers
from tune import mlflow_runs
from tune.ledger import Cell, Ledger, LedgerError, Record
from tune.mlflow_runs import default_uri, numeric_alpha
from tune.study import load
from tune.tracking import Tracker, TrackingError, is_marked, mark, sync

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from unreliable import Proxy, Server  # noqa: E402

SMOKE = ROOT / "configs" / "smoke.yaml"
ROW = {"step": 4, "tokens": 40, "val_nll": 3.5, "train_nll": 3.4, "lr": 1e-3, "grad_norm": 1.0, "alpha": [0.25]}
CELL = Cell("confirm", "gelu", 0, 101, {"lr": 1e-3}, "key")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with nothing in it: its schema takes seconds to make."""
    made = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_runs.prepare_store(f"sqlite:///{made}")
    return made


@pytest.fixture
def place(tmp_path, store):
    """A study folder with an empty ledger, a packed corpus's description, and an empty store beside another."""
    for name in ("mlflow.db", "mlflow-2.db"):
        shutil.copy(store, tmp_path / name)
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
    while CELL.key not in tracker.runs.known or not tracker.runs.known[CELL.key].rows:
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
    assert tracker.owed == 50


def test_a_store_that_lags_behind_is_waited_for_while_it_goes_on(place, monkeypatch):
    """What a busy machine does: at the end many cells are owed, and one is written each time the patience ends."""
    folder, corpus, uri = place
    write, said, turn = mlflow_runs.Runs.write, [], threading.Semaphore(0)

    def slowly(self, record):
        turn.acquire()
        write(self, record)

    monkeypatch.setattr(mlflow_runs.Runs, "write", slowly)
    tracker = Tracker(uri, load(SMOKE), folder, corpus)
    found = [Record(replace(CELL, seed=seed), started=1.0, outcome="completed", ended=2.0) for seed in range(5)]
    real = tracker._thread.join

    def join(patience):
        left = tracker.owed
        turn.release()
        while tracker._thread.is_alive() and tracker.owed == left:
            real(0.05)

    monkeypatch.setattr(tracker._thread, "join", join)
    tracker.close(found, lags=said.append)
    assert (tracker.owed, len(runs(uri))) == (0, 6)
    assert said == [4, 3, 2, 1]


def test_a_store_that_stands_still_is_given_up_on(place, monkeypatch):
    folder, corpus, uri = place
    asked = []

    def stuck(self, record):
        asked.append(record)
        time.sleep(60)

    monkeypatch.setattr(mlflow_runs.Runs, "write", stuck)
    tracker = Tracker(uri, load(SMOKE), folder, corpus)
    tracker.ended(Record(CELL, started=1.0, outcome="completed", ended=2.0))
    while not asked:
        time.sleep(0.05)
    began = time.monotonic()
    tracker.close(patience=0.5)
    assert time.monotonic() - began < 10
    assert (tracker.owed, tracker.problem) == (1, "it was given 0.5 s more")


@pytest.mark.parametrize(("errors", "owed"), [(2, 0), (9, 1)])
def test_the_last_cells_are_tried_again_a_few_times(place, monkeypatch, errors, owed):
    """A store that is locked for a moment while the study ends is no reason to owe it anything."""
    folder, corpus, uri = place
    write, left = mlflow_runs.Runs.write, [None] * errors

    def busy(self, record):
        if left:
            left.pop()
            raise MlflowException("database is locked")
        write(self, record)

    tracker = Tracker(uri, load(SMOKE), folder, corpus)
    monkeypatch.setattr(mlflow_runs.Runs, "write", busy)
    tracker.close([Record(CELL, started=1.0, outcome="completed", ended=2.0)], patience=30.0)
    assert tracker.owed == owed
    assert tracker.problem == (None if not owed else "database is locked")


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


# --- written once, whatever happens ----------------------------------------------------------------------------------


def ledger_of(folder, cells=3):
    """A ledger with `cells` cells of two rows that have ended, in the folder of a study that was begun."""
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("study", schema=1, study="smoke", corpus="abc")
    for seed in range(101, 101 + cells):
        cell = Cell("confirm", "gelu", 0, seed, {"lr": 1e-3}, "key")
        fields = {"stage": "confirm", "arm": "gelu", "index": 0, "seed": seed, "config": cell.config}
        ledger.append("suggested", cell=cell.key, **fields, config_key="key")
        ledger.append("started", cell=cell.key)
        for step in (4, 8):
            ledger.append("report", cell=cell.key, row=row(step))
        ledger.append("ended", cell=cell.key, outcome="completed", final={"val_nll": 3.5}, reason=None)
    ledger.close()
    return ledgers.records(ledger.events)


def shown(uri, experiment="smoke"):
    """What MLflow shows of each cell, times included; fails where a cell has two runs."""
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], max_results=1000)
    cells = {}
    for run in found:
        if run.data.tags["stage"] == "study":
            continue
        key = run.data.tags["cell"]
        assert key not in cells, f"{key} has two runs"
        history = client.get_metric_history(run.info.run_id, "val/nll")
        metrics = [(m.step, m.value, m.timestamp) for m in history]
        cells[key] = (run.info.status, run.info.start_time, run.info.end_time, metrics, run.data.tags["outcome"])
    assert sum(run.data.tags["stage"] == "study" for run in found) == 1
    return cells


def test_sync_fills_an_empty_store_and_a_second_one_changes_nothing(place):
    folder, _, uri = place
    found = ledger_of(folder)
    assert sync(uri, load(SMOKE), folder) == (3, 3)
    first = shown(uri)
    assert {key: value[3] for key, value in first.items()} == {
        key: [(4, 3.5, round(1000 * record.times[0])), (8, 3.5, round(1000 * record.times[1]))]
        for key, record in found.items()
    }
    assert sync(uri, load(SMOKE), folder) == (3, 0)
    assert shown(uri) == first
    again = f"{uri.removesuffix('.db')}-2.db"  # as after the store was lost
    assert sync(again, load(SMOKE), folder) == (3, 3)
    assert shown(again) == first


def test_answers_that_get_lost_double_nothing(place, monkeypatch):
    """Every first call of each kind is carried out and then fails, as behind a proxy that times out."""
    folder, corpus, uri = place
    found = ledger_of(folder)
    lost = []

    def losing(name):
        real = getattr(MlflowClient, name)

        def call(self, *args, **kwargs):
            answer = real(self, *args, **kwargs)
            if name not in lost:
                lost.append(name)
                raise MlflowException(f"{name}: 504 Gateway Timeout")
            return answer

        return call

    with monkeypatch.context() as patched:
        for name in ("create_experiment", "create_run", "log_batch", "log_inputs", "set_terminated"):
            patched.setattr(MlflowClient, name, losing(name))
        tracker = Tracker(uri, load(SMOKE), folder, corpus)
        deadline = time.monotonic() + 200
        while len(lost) < 5:
            for record in found.values():
                tracker.ended(record)
            assert time.monotonic() < deadline, lost
            time.sleep(0.2)
        tracker.close(found.values())
    assert tracker.owed == 0, tracker.problem
    seen = shown(uri)
    assert sync(uri, load(SMOKE), folder) == (3, 0)
    assert shown(uri) == seen
    undisturbed = f"{uri.removesuffix('.db')}-2.db"
    sync(undisturbed, load(SMOKE), folder)
    assert seen == shown(undisturbed)


@pytest.fixture(scope="module")
def server(tmp_path_factory, store):
    """A real server, started once."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(store, folder / "server.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["slow", "error", "lost"])
def test_a_bad_server_costs_the_study_nothing_and_has_everything_in_the_end(place, server, mode):
    """Slow (a second an answer), answering 500, or doing as told and answering 504; then well again."""
    folder, corpus, _ = place
    found = ledger_of(folder.rename(folder.with_name(mode)), cells=20)
    folder, study = folder.with_name(mode), load(SMOKE).model_copy(update={"name": mode})
    proxy = Proxy(server.port)
    try:
        proxy.mode = mode
        began = time.monotonic()
        tracker = Tracker(proxy.uri, study, folder, corpus)
        for record in found.values():
            tracker.started(record)
            for each in record.curve:
                tracker.reported(record, each)
            tracker.ended(record)
        assert (
            time.monotonic() - began < 10
        )  # of 80 calls, none waits for a server that takes a second for each of its answers
        tracker.close(found.values(), patience=3.0)
        assert tracker.owed > 0
        assert proxy.requests > 0
        proxy.mode = "ok"
        tracker._thread.join(120)  # it is not stopped, only no longer waited for
        cells, _ = sync(proxy.uri, study, folder)
        assert cells == 20
        assert sync(proxy.uri, study, folder) == (20, 0)
        undisturbed = f"sqlite:///{folder.parent / 'mlflow.db'}"
        sync(undisturbed, study, folder)
        assert shown(proxy.uri, mode) == shown(undisturbed, mode)
    finally:
        proxy.close()


def test_a_sync_while_a_sweep_runs_is_refused(place):
    folder, _, uri = place
    ledger_of(folder)
    held = Ledger(folder / "ledger.jsonl")
    with pytest.raises(LedgerError, match="another sweep is running this study: process"):
        sync(uri, load(SMOKE), folder)
    held.close()


def test_a_damaged_store_is_refused_in_one_line_and_left_alone(place):
    folder, _, uri = place
    ledger_of(folder)
    store = Path(uri.removeprefix("sqlite:///"))
    content = b"not a database at all, but text\n" * 100
    store.write_bytes(content)
    with pytest.raises(
        TrackingError, match=r"cannot be written: .*not a database.*moved away and synced anew"
    ) as caught:
        sync(uri, load(SMOKE), folder)
    assert "\n" not in str(caught.value)
    assert store.read_bytes() == content


def test_a_sweep_asks_a_store_that_has_everything_no_more(place):
    folder, _, uri = place
    ledger_of(folder)
    assert not is_marked(folder, uri)
    sync(uri, load(SMOKE), folder)
    mark(folder, uri)
    assert is_marked(folder, uri)
    assert not is_marked(folder, f"{uri}-other")
    assert "mlflow" not in (folder / "logs" / "tracked.json").read_text()  # a URI may hold a password
    Ledger(folder / "ledger.jsonl").append("ended", cell=CELL.key, outcome="completed", final={}, reason=None)
    assert not is_marked(folder, uri)


def test_times_never_run_backwards_in_mlflow(place):
    folder, corpus, uri = place
    stepped = Record(
        CELL, "completed", None, {"val_nll": 3.0}, [row(4), row(8)], [99.0, 101.0], started=100.0, ended=50.0
    )
    tracker = Tracker(uri, load(SMOKE), folder, corpus)
    tracker.ended(stepped)
    tracker.close()
    ((_, start, end, metrics, _),) = shown(uri).values()
    assert (start, end) == (100_000, 101_000)
    assert [stamp for _, _, stamp in metrics] == [100_000, 101_000]


@pytest.mark.slow
def test_two_processes_make_one_store(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = f"from tune.mlflow_runs import prepare_store; prepare_store({uri!r})"
    makers = [subprocess.Popen([sys.executable, "-c", code], cwd=SMOKE.parents[1]) for _ in range(2)]
    assert [maker.wait() for maker in makers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    MlflowClient(uri).create_experiment("works")
