"""Test which files of an ended trial `keep: {checkpoints: true}` keeps, without Ray's processes."""

from pathlib import Path

import pytest
import torch

from pagating.checkpoint import CheckpointFolder
from pagating.train import train
from tests.studies import STEADY, changed, study_of
from tests.tune.helpers import run_of
from tune import sweep
from tune.backend.inline import Inline
from tune.backend.ray_trial import CellTrainable
from tune.plan import space
from tune.run import extend
from tune.run.study_run import StudyRun
from tune.study.files import dump
from tune.study.inputs import packed_corpus
from tune.subject.gpt2 import Gpt2
from tune.subject.subject import TRAINED

STUDY = changed(STEADY, fixed={"tokens": 2048, "eval_windows": 4}, search={"trials_per_arm": 1, "pruner": "none"})


def study(keep):
    return study_of(STUDY, "s", keep={"checkpoints": keep})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("text")
    (place / "text.txt").write_text("In the beginning God created the heaven and the earth.\n" * 400)
    return place


@pytest.fixture(scope="module")
def corpus(text):
    return packed_corpus(study_of(STUDY, corpus={"files": {"train": "text.txt"}}), text, text)


def test_nothing_is_kept_unless_the_study_says_so_and_it_may_change():
    assert study_of(STUDY).keep.checkpoints is False
    free = [key for key in extend.ANY if key != "reuse"]  # a key of the other form of a study
    assert study(True).digest(*free) == study(False).digest(*free)
    assert study(True).digest() != study(False).digest()


@pytest.mark.parametrize("keep", [True, False])
def test_the_trial_gets_the_wish(tmp_path, corpus, keep):
    run = run_of(study(keep), tmp_path, corpus)
    job = run.start(run.next_cell())
    run.ledger.close()
    actor = CellTrainable({"job": job})
    actor._training._checkpoints.request()
    while not actor.train().get("done"):
        actor._training._checkpoints.request()
    actor.stop()
    kept = sorted(path.name.split("-")[1] for path in Path(job.checkpoints).glob("*.safetensors"))
    assert kept == (["0000000002", "0000000003"] if keep else [])
    if keep:  # and training can continue from it
        *_, row = train(job.trial, CheckpointFolder(job.checkpoints, keep=True))
        assert row["step"] == 4


@pytest.mark.parametrize("keep", [True, False])
def test_the_driver_leaves_them_and_takes_the_models_that_are_not_kept(tmp_path, corpus, keep):
    """Write two checkpoints and a model per cell. The study keeps the best model of each arm."""
    folder = tmp_path / "s"

    class Playing(Gpt2):
        """Subject that writes two checkpoints and a model per cell, and trains nothing."""

        @staticmethod
        def train(trial, checkpoints, model):
            (checkpoints.folder / TRAINED).mkdir(parents=True)
            (checkpoints.folder / TRAINED / "model.json").write_text('{"final": {"val_nll": 3.0}}')
            for step in (1, 2):
                (checkpoints.folder / f"{step}.safetensors").touch()
            loss = 3.0 + abs(trial.lr - 3e-3) + trial.seed / 1000
            final = {"val_nll": loss, "test_nll": loss, "steps": 4}
            yield 4, {"step": 4, "tokens": 64, "val_nll": loss, "final": final}

    folder.mkdir()
    (folder / "study.yaml").write_text(dump(study(keep)))
    run = StudyRun(study(keep), folder, Playing.at(study(keep), folder, corpus))
    sweep._train(run, Inline(), run.subject.inputs, dump(study(keep)), None, lambda: None)
    assert run.stages.finished
    left = sorted(path.name for path in (folder / "checkpoints").rglob("*") if path.name == TRAINED or path.is_file())
    assert left == (["1.safetensors"] * len(run.records) + ["2.safetensors"] * len(run.records) if keep else [])
    assert (folder / "checkpoints").exists() == keep
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["gelu", "linear-floor"]


def test_the_plan_counts_them():
    model = space.largest(study(True), 300)
    parts = [space.disk_parts(study(keep), 10, 2, model)["checkpoints"] for keep in (True, False)]
    assert parts == [(3 * 2 + 2 * 10) * 12 * model.parameters, 3 * 2 * 12 * model.parameters]
