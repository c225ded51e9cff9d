"""An MLflow file that is damaged: the study goes on, one line says so, and a new file gets all of it."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tune import ledger as ledgers
from tune import mlflow_runs
from tune.ledger import Cell, Ledger
from tune.study import load
from tune.tracking import Tracker, TrackingError, finish, sync

SMOKE = load(Path(__file__).parents[2] / "configs" / "smoke.yaml")
ROW = {"tokens": 40, "val_nll": 3.5, "train_nll": 3.4, "lr": 1e-3, "grad_norm": 1.0, "alpha": [0.25]}


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    """The bytes of a store with nothing in it: its tables take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_runs.prepare_store(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture
def place(tmp_path, schema):
    """A study of three cells that have ended, its packed corpus's description, and an empty store."""
    (tmp_path / "mlflow.db").write_bytes(schema)
    (tmp_path / "corpus").mkdir()
    splits = {split: {"tokens": 1} for split in ("train", "validation", "test")}
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({"digest": "abc", "splits": splits}))
    folder = tmp_path / "smoke"
    folder.mkdir()
    (folder / "study.yaml").write_text("question: none\n")
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("study", schema=1, study="smoke", corpus="abc")
    for seed in (101, 102, 103):
        cell = Cell("confirm", "gelu", 0, seed, {"lr": 1e-3}, "key")
        fields = {"stage": "confirm", "arm": "gelu", "index": 0, "seed": seed, "config": cell.config}
        ledger.append("suggested", cell=cell.key, **fields, config_key="key")
        ledger.append("started", cell=cell.key)
        for step in (4, 8):
            ledger.append("report", cell=cell.key, row={**ROW, "step": step, "tokens_per_second": 10.0})
        ledger.append("ended", cell=cell.key, outcome="completed", final={"val_nll": 3.5}, reason=None)
    ledger.close()
    return folder, tmp_path / "corpus", tmp_path / "mlflow.db"


def flipped(content):
    """One bit of the 16 bytes that name the format; of the rest of a file no program can tell."""
    return bytes([content[0] ^ 4]) + content[1:]


DAMAGE = {
    "text": lambda content: b"not a database at all, but text\n" * 100,
    "a flipped bit": flipped,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_store_is_left_alone_said_in_one_line_and_a_new_one_gets_all(place, schema, damage):
    folder, corpus, store = place
    uri, content = f"sqlite:///{store}", damage(store.read_bytes())
    store.write_bytes(content)
    found = ledgers.records(ledgers.read(folder / "ledger.jsonl"))
    tracker = Tracker(uri, SMOKE, folder, corpus)  # that of a sweep
    for record in found.values():
        tracker.started(record)
        for row in record.curve:
            tracker.reported(record, row)
        tracker.ended(record)
    tracker.close(found.values(), patience=20.0)
    assert tracker.owed == 3
    said = finish(tracker, {})
    assert said.startswith(f"MLflow at {uri} still lacks 3 cells and the verdict (")
    assert f"run `pagating sync {folder}` when" in said
    assert "\n" not in said
    with pytest.raises(TrackingError, match=r"cannot be written: .*moved away and synced anew") as caught:
        sync(uri, SMOKE, folder)
    assert "\n" not in str(caught.value)
    assert store.read_bytes() == content
    again = store.with_name("again.db")  # another name: this process holds the damaged file open
    again.write_bytes(schema)
    assert sync(f"sqlite:///{again}", SMOKE, folder) == (3, 3)
    client = MlflowClient(f"sqlite:///{again}")
    runs = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    assert sorted(run.data.tags.get("cell", "") for run in runs) == ["", *sorted(found)]
