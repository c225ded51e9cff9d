"""Tests of the planned disk and memory, against real files and trials."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.studies import SMALL, changed, study_of
from tests.tune.helpers import inside, played
from tune.errors import StudyError
from tune.plan import plan, space, work
from tune.run import ledger
from tune.run.tables import write_tables
from tune.study import sizes
from tune.study.files import load

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]
SMOKE = load(ROOT / "configs" / "smoke.yaml")


def test_ledger_and_tables_are_as_large_as_planned(tmp_path):
    cells, _ = played(SMOKE, inside, tmp_path)
    events = ledger.read(tmp_path / "ledger.jsonl")
    write_tables("smoke", events, tmp_path)
    model = work.arm_model(SMOKE, "gelu", 300)
    planned = space.disk_parts(SMOKE, sum(cells.values()), 2, model)
    assert (tmp_path / "ledger.jsonl").stat().st_size == pytest.approx(planned["ledger"], rel=0.1)
    tables = sum((tmp_path / f"{name}.parquet").stat().st_size for name in ("trials", "curves"))
    assert tables / 1.5 < planned["tables"] < 2 * tables
    assert planned["checkpoints"] == 3 * 2 * 12 * model.parameters


def test_what_is_needed_grows_with_cells_slots_and_vocabulary():
    needed = space.disk_needed(SMOKE)
    assert needed == space.disk_needed(SMOKE, 1, vocab_size=300, cells=space.most_cells(SMOKE))
    width = SMOKE.model.d_model
    assert space.disk_needed(SMOKE, vocab_size=1300) - needed == (3 * 12 + (2 * len(SMOKE.arms) + 1) * 4) * 1000 * width
    assert space.disk_needed(SMOKE, cells=5) < needed < space.disk_needed(SMOKE, slots=2)


def test_the_models_that_may_stand_are_planned():
    model = space.largest(SMOKE, 300)
    arms, one = len(SMOKE.arms), 4 * model.parameters
    planned = {cells: space.disk_parts(SMOKE, cells, 2, model)["models"] for cells in (0, 1, 50)}
    assert planned == {0: 0, 1: (1 + arms + 2) * one, 50: (arms + arms + 2) * one}  # folder, MLflow, one per slot
    none = SMOKE.model_copy(update={"keep": SMOKE.keep.model_copy(update={"models": "none"})})
    assert space.disk_parts(none, 50, 2, model)["models"] == 0


def test_too_little_space_is_one_line(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=3 << 20)

    monkeypatch.setattr(space.shutil, "disk_usage", usage)
    folder = tmp_path / "not" / "there"
    space.check_space(folder, lambda: 3 << 20)
    space.check_space(folder, lambda: 7 << 19, lambda: 3 << 20)
    space.check_space(folder, lambda: 3 << 20, lambda: pytest.fail("counted"))
    with pytest.raises(StudyError, match=r"may need 3\.5 MiB, but 3\.0 MiB are free there; free some space or give"):
        space.check_space(folder, lambda: 8 << 20, lambda: 7 << 19)
    assert asked == [tmp_path.resolve()] * 4
    assert not folder.exists()


def test_without_torch_no_model_is_taken_for_smaller_than_it_is():
    arms = {"gelu": {"baseline": True}, "channels": {"gate": "tanh", "alpha": {"learnable": {"per": "channel"}}}}
    arms["projected"] = {"gate": "sigmoid", "form": "projected", "alpha": 0.5}
    arms |= {"swiglu": {"unit": "swiglu"}, "glu": {"gate": "sigmoid", "form": "glu", "alpha": 0.5}}
    every = changed(SMALL, arms=None)
    for model in ({"n_layer": 1, "d_model": 8}, {"n_layer": 4, "d_model": 128}):
        study = study_of(every, arms=arms, model={**model, "n_head": 2, "n_ctx": 16})
        real, bound = space.largest(study, 300).parameters, space.most_parameters(study, 300)
        assert real <= bound < 4 * real
        assert space.disk_needed(study, 2) <= space.disk_needed(study, 2, rough=True)
    own = study_of(every, arms={"gelu": {"baseline": True}, "mine": {"unit": "mine.py:snake"}})
    assert [space.most_parameters(given, 300) for given in (own, study_of(SMALL, task="span"))] == [0, 0]


def trained_mb(tmp_path, study, name):
    """Return the peak memory of `python -m pagating.train` on a cell of a study, in MiB."""
    folder = tmp_path / name
    folder.mkdir()
    corpus = plan.stand_in(folder, study.tokenizer.vocab_size, 1 << 14)
    spec = plan.trial_spec(study, "mine", sizes.example(study, "mine"), 1, corpus, test=False)
    (folder / "trial.json").write_text(json.dumps(spec.as_dict()))
    command = [sys.executable, "-m", "pagating.train", str(folder / "trial.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)["peak_rss_mb"]


@pytest.mark.slow
def test_memory_of_a_trial_is_within_a_factor_of_what_is_planned(tmp_path):
    tiny = study_of(SMALL)
    model = {"n_layer": 6, "d_model": 256, "n_head": 4, "n_ctx": 64}
    fixed = {"tokens": 8192, "batch_tokens": 4096}
    large = study_of(SMALL, "large", model=model, fixed=fixed, tokenizer={"vocab_size": 4096})
    base = trained_mb(tmp_path, tiny, "tiny")
    parts = space.memory_parts(large, work.arm_model(large, "mine", 4096), 4096, base)
    held = trained_mb(tmp_path, large, "large") - base  # memory of the model and its step
    planned = (sum(parts.values()) - parts["base"]) / (1 << 20)
    assert planned > 250
    assert held / 1.4 < planned < 1.4 * held
