"""Test that MLflow finally has each cell once, after unreachable or slow servers and damaged stores."""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from unreliable import Proxy, Server

from tests.tune.helpers import meta_of, row_at, write_ledger
from tune.errors import LedgerError, TrackingError
from tune.run.ledger import Ledger
from tune.study.cell import Cell, Record
from tune.study.files import load
from tune.tracking import tracker as mlflow_tracker
from tune.tracking.tracker import MlflowTracker, is_marked, mark, sync

ROOT = Path(__file__).parents[3]

SMOKE = ROOT / "configs" / "smoke.yaml"
CELL = Cell("confirm", "gelu", 0, 101, {"lr": 1e-3}, "key")


def shown(uri, experiment="smoke"):
    """Return the content of each cell in MLflow with its times. Fail if a cell has two runs."""
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
    found = write_ledger(folder)
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


@pytest.mark.slow
def test_the_report_of_an_unfinished_study_brings_no_verdict(place):
    folder, _, uri = place
    write_ledger(folder)
    text = json.dumps({"unfinished": "2 of 9 confirm trials", "comparisons": [], "floor": None, "summary": "x"})
    (folder / "verdict.json").write_text(text)
    (folder / "verdict.md").write_text("# x\n\n?\n\n**better**\n")
    sync(uri, load(SMOKE), folder)
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    (parent,) = [run for run in found if run.data.tags["stage"] == "study"]
    assert parent.info.status != "FINISHED"
    assert "no verdict yet" in parent.data.tags["mlflow.note.content"]


def test_answers_that_get_lost_double_nothing(place, monkeypatch):
    """Let every first call of each kind succeed and then report a failure, like a proxy that times out."""
    folder, corpus, uri = place
    found = write_ledger(folder)
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

    monkeypatch.setattr(mlflow_tracker, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(mlflow_tracker, "LONGEST_WAIT", 0.1)
    with monkeypatch.context() as patched:
        for name in ("create_experiment", "create_run", "log_batch", "log_inputs", "set_terminated"):
            patched.setattr(MlflowClient, name, losing(name))
        tracker = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
        deadline = time.monotonic() + 200
        while len(lost) < 5:
            for record in found.values():
                tracker.ended(record)
            assert time.monotonic() < deadline, lost
            time.sleep(0.05)
        tracker.close(found.values())
    assert tracker.owed == 0, tracker.problem
    seen = shown(uri)
    assert sync(uri, load(SMOKE), folder) == (3, 0)
    assert shown(uri) == seen
    undisturbed = f"{uri.removesuffix('.db')}-2.db"
    sync(undisturbed, load(SMOKE), folder)
    assert seen == shown(undisturbed)


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_store):
    """Start a real server, once."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "server.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["slow", "error", "lost"])
def test_a_bad_server_costs_the_study_nothing_and_has_everything_in_the_end(place, server, mode):
    """Use a server that is slow (1 s per answer), answers 500, or works but answers 504. Then it recovers."""
    folder, corpus, _ = place
    found = write_ledger(folder.rename(folder.with_name(mode)), cells=20)
    folder, study = folder.with_name(mode), load(SMOKE).model_copy(update={"name": mode})
    proxy = Proxy(server.port)
    try:
        proxy.mode = mode
        began = time.monotonic()
        tracker = MlflowTracker(proxy.uri, study, folder, meta_of(corpus))
        for record in found.values():
            tracker.started(record)
            for each in record.curve:
                tracker.reported(record, each)
            tracker.ended(record)
        assert time.monotonic() - began < 10  # none of 80 calls waits for a server that takes 1 s per answer
        tracker.close(found.values(), patience=3.0)
        assert tracker.owed > 0
        assert proxy.requests > 0
        proxy.mode = "ok"
        tracker._thread.join(120)  # the thread still runs; only the waiting has ended
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
    write_ledger(folder)
    held = Ledger(folder / "ledger.jsonl")
    with pytest.raises(LedgerError, match="another sweep is running this study: process"):
        sync(uri, load(SMOKE), folder)
    held.close()


def test_a_store_that_another_process_locks_is_named_and_can_be_synced_later(place, monkeypatch):
    folder, _, uri = place
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0.2))  # seconds, instead of 5
    write_ledger(folder)
    with sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None) as other:
        other.execute("begin exclusive")
        with pytest.raises(TrackingError, match=r"database is locked; the ledger has everything, so sync again later"):
            sync(uri, load(SMOKE), folder)
        other.execute("rollback")
    assert sync(uri, load(SMOKE), folder) == (3, 3)


def test_a_damaged_store_is_refused_in_one_line_and_left_alone(place):
    folder, _, uri = place
    write_ledger(folder)
    store = Path(uri.removeprefix("sqlite:///"))
    content = b"not a database at all, but text\n" * 100
    store.write_bytes(content)
    with pytest.raises(
        TrackingError, match=r"cannot be written: .*not a database.*moved away and synced again"
    ) as caught:
        sync(uri, load(SMOKE), folder)
    assert "\n" not in str(caught.value)
    assert store.read_bytes() == content


def test_a_sweep_asks_a_store_that_has_everything_no_more(place):
    folder, _, uri = place
    write_ledger(folder)
    assert not is_marked(folder, uri)
    sync(uri, load(SMOKE), folder)
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    (parent,) = (run.info.run_id for run in found if run.data.tags["stage"] == "study")
    mark(folder, uri, parent)
    assert is_marked(folder, uri)
    assert not is_marked(folder, f"{uri}-other")
    assert "mlflow" not in (folder / "logs" / "tracked.json").read_text()  # a URI may hold a password
    for run in found:  # as a user in the UI
        client.delete_run(run.info.run_id)
        assert not is_marked(folder, uri)
        client.restore_run(run.info.run_id)
        assert is_marked(folder, uri)
    client.delete_experiment(found[0].info.experiment_id)
    assert not is_marked(folder, uri)
    client.restore_experiment(found[0].info.experiment_id)
    assert is_marked(folder, uri)
    Ledger(folder / "ledger.jsonl").append("ended", cell=CELL.key, outcome="completed", final={}, reason=None)
    assert not is_marked(folder, uri)


def test_times_never_run_backwards_in_mlflow(place):
    folder, corpus, uri = place
    stepped = Record(
        CELL, "completed", None, {"val_nll": 3.0}, [row_at(4), row_at(8)], [99.0, 101.0], started=100.0, ended=50.0
    )
    tracker = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))
    tracker.ended(stepped)
    tracker.close()
    ((_, start, end, metrics, _),) = shown(uri).values()
    assert (start, end) == (100_000, 101_000)
    assert [stamp for _, _, stamp in metrics] == [100_000, 101_000]


@pytest.mark.slow
def test_two_processes_make_one_store(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = f"from tune.tracking.store import prepare_store; prepare_store({uri!r})"
    makers = [subprocess.Popen([sys.executable, "-c", code], cwd=SMOKE.parents[1]) for _ in range(2)]
    assert [maker.wait() for maker in makers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    MlflowClient(uri).create_experiment("works")


def flipped(content):
    """Flip one bit in the 16 bytes that name the format. No program can detect damage elsewhere."""
    return bytes([content[0] ^ 4]) + content[1:]


DAMAGE = {
    "text": lambda content: b"not a database at all, but text\n" * 100,
    "a flipped bit": flipped,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_store_is_left_alone_said_in_one_line_and_a_new_one_gets_all(place, empty_store, damage):
    folder, corpus, uri = place
    store = Path(uri.removeprefix("sqlite:///"))
    content = damage(store.read_bytes())
    store.write_bytes(content)
    found = write_ledger(folder)
    tracker = MlflowTracker(uri, load(SMOKE), folder, meta_of(corpus))  # that of a sweep
    for record in found.values():
        tracker.started(record)
        for row in record.curve:
            tracker.reported(record, row)
        tracker.ended(record)
    tracker.close(found.values(), patience=20.0)
    assert tracker.owed == 3
    said = tracker.finish({})
    assert said.startswith(f"MLflow at {uri} still lacks 3 cells and the verdict (")
    assert f"run `pagating sync {folder}` when" in said
    assert "\n" not in said
    with pytest.raises(TrackingError, match=r"cannot be written: .*moved away and synced again") as caught:
        sync(uri, load(SMOKE), folder)
    assert "\n" not in str(caught.value)
    assert store.read_bytes() == content
    again = store.with_name("again.db")  # another name: this process holds the damaged file open
    shutil.copy(empty_store, again)
    assert sync(f"sqlite:///{again}", load(SMOKE), folder) == (3, 3)
    client = MlflowClient(f"sqlite:///{again}")
    runs = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    assert sorted(run.data.tags.get("cell", "") for run in runs) == ["", *sorted(found)]
