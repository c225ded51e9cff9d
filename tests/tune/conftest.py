"""Shared fixtures: a study whose events are told by hand, an empty store and a study folder beside it."""

import json
import shutil

import pytest

from tests.studies import TOLD, study_of
from tests.tune.helpers import Told
from tune.run.ledger import Ledger
from tune.tracking.store import prepare_store


@pytest.fixture
def plan():
    """Return the study whose events `told` has."""
    return study_of(TOLD)


@pytest.fixture
def told():
    """Return the events of a study, none yet."""
    return Told()


@pytest.fixture
def searching(told):
    """Return the events of a study that searches. Five of its cells have ended, and one runs."""
    told.cell("search", "gelu", 4.0, 10.0, index=0, lr=1e-3)
    told.cell("search", "floor", 4.2, 20.0, index=0, lr=2e-3)
    told.cell("search", "gelu", 3.9, 12.0, index=1, lr=3e-3)
    told.cell("search", "floor", 4.5, 5.0, index=1, lr=4e-3, outcome="stopped_early")
    told.cell("search", "gelu", None, 2.0, index=2, lr=9e-3, outcome="infeasible")
    key = told.start("search", "floor", index=2, lr=5e-3)
    told.now += 4.0
    told.report(key, 250.0)
    return told


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """Return an empty store. Its schema takes seconds to make."""
    made = tmp_path_factory.mktemp("store") / "mlflow.db"
    prepare_store(f"sqlite:///{made}")
    return made


@pytest.fixture
def place(tmp_path, empty_store):
    """Return a study folder without a cell, a folder with a corpus.json, and the address of an empty store."""
    for name in ("mlflow.db", "mlflow-2.db"):
        shutil.copy(empty_store, tmp_path / name)
    (tmp_path / "corpus").mkdir()
    splits = {split: {"tokens": 1} for split in ("train", "validation", "test")}
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({"digest": "abc", "splits": splits}))
    folder = tmp_path / "smoke"
    folder.mkdir()
    (folder / "study.yaml").write_text("question: none\n")
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("study", schema=1, study="smoke", corpus="abc")
    ledger.close()
    return folder, tmp_path / "corpus", f"sqlite:///{tmp_path / 'mlflow.db'}"
