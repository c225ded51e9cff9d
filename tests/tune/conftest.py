"""What the tests of this wing share: a small study played without training, its events told by hand, an empty store."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tune.backend.inline import Inline
from tune.plan import work
from tune.run.ledger import Ledger, records
from tune.run.study_run import StudyRun
from tune.study import sizes
from tune.study.cell import COST, FINAL, Cell
from tune.study.files import parse
from tune.subject.known import Known
from tune.tracking import runs

SMALL = """
question: Is it better?
tokenizer: {vocab_size: 300}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 6400, batch_tokens: 64, eval_windows: 8}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
  mine: {gate: tanh, alpha: 0.5}
"""
STANDING = """
question: Is it better?
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 4096, batch_tokens: 64}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
search: {trials_per_arm: 3}
calibrate: {points: 3, seeds: 2, max_points: 5}
confirm: {seeds: 3}
"""


@pytest.fixture(scope="session")
def small_text():
    """The small study's file, of three arms."""
    return SMALL


@pytest.fixture(scope="session")
def study_of():
    """The small study, with more lines in its file."""
    return lambda more="": parse(SMALL + more, Path("small.yaml"))


@pytest.fixture(scope="session")
def models_of():
    """Parameters and FLOPs of each arm's model of a study, at a vocabulary of 300."""
    return lambda study: {arm: work.arm_model(study, arm, 300) for arm in study.arms}


@pytest.fixture(scope="session")
def rows_of(models_of):
    """What a study's stages and arms are planned to take."""
    return lambda study: work.work(study, models_of(study), sizes.confirm_seeds(study))


class Whole(Known):
    """Known losses, with rows and results as large as those of trained cells."""

    def train(self, trial, checkpoints, model):
        """Yield the rows of a cell, every figure with as many digits as a trained one has."""
        arm, layers = self._study.arms[trial.arm], self._study.model.n_layer
        alpha = [0.1234567890123456] * layers if getattr(arm.alpha, "learnable", None) else []
        for done, row in super().train(trial, checkpoints, model):
            noise = np.random.default_rng(done).uniform(0.1, 1.0, 4).tolist()
            row |= dict(zip(("train_nll", "lr", "grad_norm", "tokens_per_second"), noise, strict=True))
            if "final" in row:
                every = dict.fromkeys((*FINAL, *COST, "alpha", "compiled", "test_nll"), 1.2345678901234567)
                row["final"] = {**every, **row["final"]}
            yield done, {**row, "alpha": alpha}


@pytest.fixture(scope="session")
def played():
    """Play a whole study whose trials give `loss(cell, share of the budget)`; return its cells and tokens, counted.

    With `folder` the ledger is written there, as a study writes it.
    """

    def play(study, loss, folder=None):
        run = StudyRun(study, folder, Whole(study, loss))
        Inline().train(run)
        run.close()
        assert run.stages.finished
        tokens = Counter()
        for record in run.records.values():
            tokens[record.cell.stage, record.cell.arm] += record.final["tokens"]
        return Counter((record.cell.stage, record.cell.arm) for record in run.records.values()), tokens

    return play


@pytest.fixture(scope="session")
def inside():
    """Each later trial is better, and the grid's middle is best: nothing is stopped, nothing extended."""

    def loss(cell, share):
        if cell.stage == "search":
            return 3.0 - 0.001 * cell.index - share
        return 3.0 + 0.1 * abs(cell.index - 1)

    return loss


class Told:
    """Events of a ledger, written as a run writes them, at moments that the test names."""

    def __init__(self):
        self.events, self.now = [], 1000.0

    def add(self, event, **fields):
        self.events.append({"event": event, "time": self.now, **fields})

    def start(self, stage, arm, index=0, seed=1, lr=1e-3):
        key = f"{stage}/{arm}/{index}/{seed}" if stage == "search" else f"{stage}/{arm}/{lr}/{seed}"
        self.add(
            "suggested", cell=key, stage=stage, arm=arm, index=index, seed=seed, config={"lr": lr}, config_key=str(lr)
        )
        self.add("started", cell=key)
        return key

    def report(self, key, speed):
        self.add("report", cell=key, row={"step": 1, "val_nll": 5.0, "tokens_per_second": speed})

    def end(self, key, loss=None, outcome="completed"):
        self.add("ended", cell=key, outcome=outcome, final={} if loss is None else {"val_nll": loss}, reason=None)

    def cell(self, stage, arm, loss, seconds=10.0, outcome="completed", **where):
        key = self.start(stage, arm, **where)
        self.now += seconds
        self.end(key, loss, outcome)


@pytest.fixture(scope="session")
def standing_text():
    """The file of the study whose events `told` has, of two arms."""
    return STANDING


@pytest.fixture
def plan():
    """The study whose events `told` has."""
    return parse(STANDING, Path("x.yaml"))


@pytest.fixture
def told():
    """A study's events to be told, none yet."""
    return Told()


@pytest.fixture
def searching(told):
    """The events of a study that searches: five cells ended, one running."""
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
    """A store with nothing in it: its schema takes seconds to make."""
    made = tmp_path_factory.mktemp("store") / "mlflow.db"
    runs.prepare_store(f"sqlite:///{made}")
    return made


@pytest.fixture
def place(tmp_path, empty_store):
    """A study folder with an empty ledger, a packed corpus's description, and an empty store beside another."""
    for name in ("mlflow.db", "mlflow-2.db"):
        shutil.copy(empty_store, tmp_path / name)
    (tmp_path / "corpus").mkdir()
    splits = {split: {"tokens": 1} for split in ("train", "validation", "test")}
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({"digest": "abc", "splits": splits}))
    folder = tmp_path / "smoke"
    folder.mkdir()
    (folder / "study.yaml").write_text("question: none\n")
    Ledger(folder / "ledger.jsonl").close()
    return folder, tmp_path / "corpus", f"sqlite:///{tmp_path / 'mlflow.db'}"


ROW = {"step": 4, "tokens": 40, "val_nll": 3.5, "train_nll": 3.4, "lr": 1e-3, "grad_norm": 1.0, "alpha": [0.25]}


@pytest.fixture(scope="session")
def row():
    """An evaluation of a cell, as the ledger has it."""
    return lambda step: {**ROW, "step": step, "tokens_per_second": 10.0}


@pytest.fixture(scope="session")
def ledger_of(row):
    """To write a ledger with `cells` cells of two rows that have ended into the folder of a study; their records."""

    def write(folder, cells=3):
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
        return records(ledger.events)

    return write
