"""Test which model of each arm is kept, in the study's folder and in MLflow, also after crashes and later looks."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version as version_of
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

import pagating
from pagating.data.corpus import eval_windows, open_split
from pagating.data.prepare import prepare
from pagating.evaluate import mean_nll
from pagating.export_model import export_model
from tests.studies import TINY, changed, study_of
from tests.tune.helpers import run_of, typed
from tune.backend.inline import Inline
from tune.run import extend, ledger, tables
from tune.run.kept import models
from tune.run.kept.cards import card
from tune.run.kept.models import best_cells, kept_models, missing_models, models_folder, place, take_best
from tune.run.provenance import git_commit
from tune.study.cell import Cell, Record
from tune.study.files import dump
from tune.subject.subject import TRAINED
from tune.tracking.models import how_to_load, log_models
from tune.tracking.tracker import sync

torch.set_num_threads(1)
STUDY = changed(
    TINY,
    corpus={"files": {"train": "train.txt"}},
    tokenizer={"vocab_size": 280},
    model={"d_model": 16},
    fixed={"tokens": 256},
    arms={
        "linear-floor": None,
        "pa.learned": {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.5, "per": "layer", "range": "free"}}},
    },
    stages=["search", "confirm"],
    search={"trials_per_arm": 1},
    calibrate=None,
    confirm={"seeds": 3},
)


def study(**changes):
    return study_of(STUDY, "kept", **changes)


def ended(seed, loss, arm="gelu", stage="confirm", outcome="completed"):
    final = {"val_nll": loss, "test_nll": loss + 1, "steps": 8}
    return Record(Cell(stage, arm, 0, seed, {"lr": 1e-3}, "key"), started=1.0, outcome=outcome, final=final)


def left(folder, record):
    """Write a fake trained model of a cell, with a word as its weights."""
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"final": record.final}))
    (folder / "model.safetensors").write_text(f"weights of {record.cell.seed}")
    return folder


# --- which one -------------------------------------------------------------------------------------------------------


def test_the_best_is_the_completed_confirm_cell_of_the_lowest_loss():
    cells = [ended(101, 3.2), ended(102, 3.1), ended(103, 3.0, outcome="infeasible"), ended(1, 2.0, stage="search")]
    cells += [ended(101, 3.9, "pa.learned"), Record(Cell("confirm", "gelu", 0, 104, {"lr": 1e-3}, "key"))]
    best = best_cells(study(), cells)
    assert {arm: record.cell.seed for arm, record in best.items()} == {"gelu": 102, "pa.learned": 101}


def test_of_equal_losses_the_lower_seed_whatever_the_order():
    one, other = ended(101, 3.0), ended(102, 3.0)
    for cells in ([one, other], [other, one]):
        assert best_cells(study(), cells)["gelu"] is one


def test_a_running_best_is_the_best_of_all_at_every_step():
    draw, given, best, seen = random.Random(0), study(), {}, []
    for seed in range(101, 301):
        outcome = draw.choice(["completed", "completed", "infeasible", "failed"])
        record = ended(seed, round(draw.random(), 1), draw.choice(["gelu", "pa.learned"]), outcome=outcome)
        seen.append(record)
        take_best(given, best, record)
        assert best == best_cells(given, draw.sample(seen, len(seen)))
    assert len(best) == 2


def test_a_study_without_confirm_keeps_its_last_stage_and_one_that_keeps_none_has_none():
    cells = [ended(1, 2.0, stage="search"), ended(101, 3.0)]
    assert best_cells(study(stages=["search"]), cells)["gelu"].cell.stage == "search"
    nothing = study(keep={"models": "none"})
    assert best_cells(nothing, cells) == {}


# --- in the folder ---------------------------------------------------------------------------------------------------


def test_a_better_model_takes_the_place_and_a_damaged_one_is_not_there(tmp_path):
    first, second = ended(101, 3.2), ended(102, 3.1)
    for record in (first, second):
        place(tmp_path / "models", record, left(tmp_path / "cell" / TRAINED, record))
    assert (tmp_path / "models" / "gelu" / "model.safetensors").read_text() == "weights of 102"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["gelu"]
    there = kept_models(tmp_path / "models", {"gelu": second})
    assert (there["gelu"]["cell"], there["gelu"]["final"]["val_nll"]) == ("confirm/gelu/key/102", 3.1)
    assert kept_models(tmp_path / "models", {"gelu": first}) == {}
    assert kept_models(tmp_path / "models", {"gelu": replace(second, final={"val_nll": 3.10001})}) == {}
    (tmp_path / "models" / "gelu" / "model.json").write_text("{")
    assert kept_models(tmp_path / "models", {"gelu": second}) == {}
    assert missing_models(study(), tmp_path, [second]) == [
        "gelu: the model of its best trial is not kept; pagating trial kept 'confirm/gelu/key/102' > trial.json; "
        "pagating train trial.json --model FOLDER"
    ]


def test_with_a_storage_the_models_lie_there(tmp_path):
    assert models_folder(study(storage="/mnt/shared"), tmp_path) == Path("/mnt/shared/kept/models")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} the quick brown fox jumps\n" for i in range(3000)))
    given = study()
    source = given.corpus.model_dump(exclude_none=True)
    return prepare(source, given.tokenizer.model_dump(), given.model.n_ctx, base / "cache", base)


def trained_run(given, folder, corpus, stop=lambda run, cell, final: None):
    """Run a study in this process without Ray. `stop` is called with each trained cell before it is recorded."""
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(dump(given))
    run = run_of(given, folder, corpus)
    end = run.end

    def watched(cell, *arguments):
        stop(run, cell, arguments[1])
        end(cell, *arguments)

    run.end = watched
    try:
        Inline().train(run)
    finally:
        run.close()
    return run


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """Return a finished study with its models."""
    folder = tmp_path_factory.mktemp("studies") / "kept"
    trained_run(study(), folder, corpus)
    tables.write_tables("kept", ledger.read(folder / "ledger.jsonl"), folder)
    return folder


def best_of(folder):
    return best_cells(study(), ledger.records(ledger.read(folder / "ledger.jsonl")).values())


def bits(folder):
    return {path.parent.name: path.read_bytes() for path in sorted((folder / "models").glob("*/model.safetensors"))}


def test_each_arms_model_has_the_ledgers_loss_to_the_bit(done, corpus):
    best = best_of(done)
    assert best.keys() == {"gelu", "pa.learned"}
    assert sorted(path.name for path in (done / "models").iterdir()) == ["gelu", "pa.learned"]
    for arm, record in best.items():
        model = pagating.load_model(done / "models" / arm)
        for split, loss in (("validation", "val_nll"), ("test", "test_nll")):
            assert mean_nll(model, eval_windows(open_split(corpus, split), 16, 4), 4) == record.final[loss]
    assert missing_models(study(), done, best.values()) == []


def test_a_cell_that_leaves_a_model_is_compared_with_its_arms_best_alone(corpus, tmp_path, monkeypatch):
    looked, plain = [], models.best_cells
    monkeypatch.setattr(models, "best_cells", lambda *given: looked.append(1) or plain(*given))
    trained_run(study(), tmp_path / "kept", corpus)
    assert looked == [1]  # once, at the beginning, over what the ledger had
    assert kept_models(tmp_path / "kept" / "models", best_of(tmp_path / "kept")).keys() == {"gelu", "pa.learned"}


def test_only_the_stage_that_counts_leaves_models(corpus, tmp_path):
    seen = []
    trained_run(
        study(), tmp_path / "kept", corpus, lambda run, cell, final: seen.append((cell.stage, _left(run, cell)))
    )
    assert set(seen) == {("search", False), ("confirm", True)}


def _left(run, cell):
    return (run.checkpoints(cell) / TRAINED / "model.json").is_file()


class Killed(BaseException):
    """Exception that stands for the end of the process."""


@pytest.mark.parametrize("recorded", [False, True], ids=["before its end is recorded", "after"])
def test_a_process_that_dies_beside_a_models_end_loses_none(done, corpus, tmp_path, recorded):
    wanted = {record.cell.key for record in best_of(done).values()}

    def die(run, cell, final):
        if cell.key in wanted:
            wanted.remove(cell.key)
            if recorded:
                run.ledger.append("ended", cell=cell.key, outcome="completed", final=final, reason=None)
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            trained_run(study(), tmp_path / "kept", corpus, die)
    trained_run(study(), tmp_path / "kept", corpus, die)
    assert bits(tmp_path / "kept") == bits(done)


def test_more_seeds_keep_the_best_of_all(done, corpus, tmp_path):
    folder = shutil.copytree(done, tmp_path / "kept")
    more = study(confirm={"seeds": 6})
    trained_run(more, folder, corpus)
    best = best_of(folder)
    assert kept_models(folder / "models", best).keys() == best.keys()
    assert any(record.cell.seed > 103 for record in best.values()), "no new seed is better: choose another text"


def test_what_is_kept_may_change_while_a_study_runs(done):
    extend.check_folder(study(keep={"models": "none"}), done)


def test_an_arm_whose_model_could_not_be_placed_is_named(done, corpus, tmp_path):
    folder = shutil.copytree(done, tmp_path / "kept")
    shutil.rmtree(folder / "models" / "gelu")
    run = run_of(study(), folder, corpus)
    assert run.models.missing(run.records.values()) == []  # nothing was trained now: whoever removed it knows
    run.begin(1, sees_models=True)
    missing = run.models.missing(run.records.values())
    run.close()
    assert [line.split(":")[0] for line in missing] == ["gelu"]


def test_the_line_of_a_missing_model_trains_it_again_to_the_same_bits(done, corpus, tmp_path):
    record = best_of(done)["gelu"]
    run = run_of(study(), shutil.copytree(done, tmp_path / "kept"), corpus)
    (tmp_path / "trial.json").write_text(json.dumps(run.start(record.cell).trial.as_dict()))
    run.ledger.close()
    command = [sys.executable, "-m", "pagating.train", str(tmp_path / "trial.json"), "--model", str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == bits(done)["gelu"]


def test_the_card_has_no_verdict_before_there_is_one(done):
    said = (done / "models" / "pa.learned" / "README.md").read_text()
    facts = json.loads((done / "models" / "pa.learned" / "model.json").read_text())
    assert said.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [pagating]\n---\n")
    for row in ("question | Is it better?", "study | kept", "verdict | none yet", f"cell | {facts['cell']}"):
        assert f"\n| {row} |\n" in said
    assert f"| validation loss | {facts['final']['val_nll']:.4f} nats per target |" in said
    assert "| verdict | the baseline |" in (done / "models" / "gelu" / "README.md").read_text()


def test_the_card_says_how_firm_the_verdict_is_and_names_the_commit_that_kept_the_model(done):
    facts = json.loads((done / "models" / "pa.learned" / "model.json").read_text())
    assert facts["commit"] == git_commit()
    row = {"arm": "pa.learned", "baseline": "gelu", "verdict": "better", "why": "it is"}
    verdict = {"comparisons": [row], "summary": "The level no longer holds. Preliminary, with 6 of 8"}
    said = card(study(), {**facts, "commit": "of another day", "task": "span"}, verdict)
    assert "| verdict | better against gelu: it is |\n" in said
    assert "| verdict of the study | The level no longer holds. Preliminary, with 6 of 8 |\n" in said
    assert "| commit | of another day |\n" in said
    assert said.startswith("---\nlibrary_name: transformers\ntags: [pagating]\n---\n")
    own = card(study(), {**facts, "unit": {"gate": "hard-1a.py:hard"}}, None)
    assert 'pagating.from_pretrained("FOLDER", gate="hard-1a.py:hard")' in own


def test_the_command_export_writes_and_compares_or_says_why_not(done, tmp_path, monkeypatch, capsys):
    def said(*words):
        code, out, err = typed(monkeypatch, capsys, "export", done, *words)
        assert err.count("\n") == (code != 0)
        return code, " ".join((out + err).split())

    code, line = said("pa.learned", "--to", "hf", "--into", tmp_path / "hf")
    assert (code, line.split(":")[0]) == (0, str(tmp_path / "hf"))
    assert float(line.split()[-1]) < 1e-5
    assert bits(done)["pa.learned"] == (tmp_path / "hf" / "model.safetensors").read_bytes()
    code, line = said("pa.learned", "--to", "torch", "--into", tmp_path / "model.pt2")
    assert (code, float(line.split()[-1]) < 1e-5, (tmp_path / "model.pt2").is_file()) == (0, True, True)
    assert said("gelu", "--into", tmp_path / "hf")[0] == 2
    assert said("nothing") == (2, "pagating: arm 'nothing': kept has gelu, pa.learned")
    assert said("gelu", "--to", "gguf") == (2, "pagating: --to 'gguf': allowed are hf, onnx, torch")
    monkeypatch.setattr("pagating.export_model.find_spec", lambda name: None)
    code, line = said("gelu", "--to", "onnx", "--into", tmp_path / "model.onnx")
    assert code == 1
    assert line.endswith(
        "needs onnx, onnxscript, onnxruntime, not installed here: pip install 'pagating-study[export]'"
    )


def test_an_export_that_computes_something_else_is_not_written(done, tmp_path, monkeypatch):
    monkeypatch.setattr("pagating.export_model.ALLOWED", -1.0)
    with pytest.raises(pagating.SavedModelError, match=r"as hf, its logits differ by .*; nothing is written"):
        export_model(done / "models" / "gelu", "hf", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


# --- in MLflow -------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored_uri(monkeypatch):
    """Restore MLflow's tracking URI after the test, because MLflow also sets it in the environment."""
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", before)
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture
def stored(done, empty_store, tmp_path):
    """Return the finished study in its own store: URI, study folder, parent run, records."""
    folder = shutil.copytree(done, tmp_path / "kept")
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    sync(uri, study(), folder)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("kept").experiment_id
    parent = client.search_runs([experiment], "tags.stage = 'study'")[0].info.run_id
    return uri, folder, parent, list(ledger.records(ledger.read(folder / "ledger.jsonl")).values())


def logged(uri):
    client = MlflowClient(uri)
    return client.search_logged_models([client.get_experiment_by_name("kept").experiment_id])


def test_mlflow_offers_them_and_its_own_lines_load_them(stored, corpus, restored_uri):
    uri, folder, parent, records = stored
    assert log_models(uri, study(), parent, folder, records) == 2
    client, best = MlflowClient(uri), best_of(folder)
    assert {model.name for model in logged(uri)} == {"gelu", "pa_learned"}
    for model in logged(uri):
        record = best[model.tags["arm"]]
        run = client.get_run(model.source_run_id)
        assert run.data.tags["cell"] == record.cell.key
        assert str(model.status) == "READY"
        assert {metric.key: metric.value for metric in model.metrics} == {
            "val_nll": record.final["val_nll"],
            "test_nll": record.final["test_nll"],
        }
        assert [out.model_id for out in run.outputs.model_outputs] == [model.model_id]
        assert run.data.metrics["val_nll"] == record.final["val_nll"]
        assert len(client.get_metric_history(run.info.run_id, "val_nll")) == 1
        names: dict = {}
        exec(model.tags["mlflow.note.content"].removeprefix("```python\n").removesuffix("```"), names)
        held = eval_windows(open_split(corpus, "validation"), 16, 4)
        assert mean_nll(names["model"], held, 4) == record.final["val_nll"]


def test_a_logged_model_is_one_of_mlflow_that_can_be_registered(stored, restored_uri):
    uri, folder, parent, records = stored
    log_models(uri, study(), parent, folder, records)
    mlflow.set_tracking_uri(uri)
    model = next(model for model in logged(uri) if model.name == "pa_learned")
    version = mlflow.register_model(f"models:/{model.model_id}", "best").version
    served = mlflow.pyfunc.load_model(f"models:/best/{version}")
    (said,) = served.predict(["the quick"], params={"max_new_tokens": 3})
    assert said.startswith("the quick")
    assert len(said) > len("the quick")
    needed = (Path(model.artifact_location.removeprefix("file://")) / "requirements.txt").read_text().splitlines()
    assert f"transformers=={version_of('transformers')}" in needed


def test_a_model_with_code_of_the_users_own_has_no_flavour_and_its_note_says_why(stored, restored_uri):
    uri, folder, parent, records = stored
    path = folder / "models" / "pa.learned" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unit": {"gate": "hard-1a.py:hard"}}))
    log_models(uri, study(), parent, folder, records)
    for model in logged(uri):
        files = {path.name for path in Path(model.artifact_location.removeprefix("file://")).iterdir()}
        own = model.name == "pa_learned"
        assert ("MLmodel" not in files) == own
        assert ("MLflow cannot serve this model: it needs your own file" in model.tags["mlflow.note.content"]) == own
        assert {"model.safetensors", "README.md"} < files


def test_a_card_that_changed_after_a_look_is_logged_again(stored):
    uri, folder, parent, records = stored
    log_models(uri, study(), parent, folder, records)
    (folder / "models" / "gelu" / "README.md").write_text("a later verdict")
    assert log_models(uri, study(), parent, folder, records) == 0
    for model in logged(uri):
        said = (Path(model.artifact_location.removeprefix("file://")) / "README.md").read_text()
        assert (said == "a later verdict") == (model.name == "gelu")
        assert said == (folder / "models" / model.tags["arm"] / "README.md").read_text()


def test_the_lines_that_load_a_model_name_no_password():
    lines = how_to_load("m-1", "https://me:secret@server:5000", {"unit": {"gate": "hard-1a.py:hard"}})
    assert "secret" not in lines
    assert "download_artifacts('models:/m-1'), gate='STUDY/gates/hard-1a.py:hard')" in lines
    assert "gate=" not in how_to_load("m-1", "sqlite:///mlflow.db", {"unit": {"gate": "sigmoid"}})


def test_a_second_look_doubles_none_and_mends_one_that_was_cut_off(stored):
    uri, folder, parent, records = stored
    log_models(uri, study(), parent, folder, records)
    first = {model.model_id for model in logged(uri)}
    assert log_models(uri, study(), parent, folder, records) == 0
    assert {model.model_id for model in logged(uri)} == first
    client = MlflowClient(uri)
    one = next(model for model in logged(uri) if model.name == "gelu")
    client.delete_logged_model(one.model_id)
    client.create_logged_model(one.experiment_id, "gelu", one.source_run_id, one.tags)  # its files never came
    assert log_models(uri, study(), parent, folder, records) == 1
    assert sorted((model.name, str(model.status)) for model in logged(uri)) == [
        ("gelu", "READY"),
        ("pa_learned", "READY"),
    ]


def test_a_moved_store_keeps_its_models_and_their_lines_name_the_new_place(stored, tmp_path):
    uri, folder, parent, records = stored
    log_models(uri, study(), parent, folder, records)
    first = {model.model_id for model in logged(uri)}
    (tmp_path / "new").mkdir()
    for name in ("mlflow.db", "mlruns"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    there = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    assert sync(there, study(), folder)[1] == 0
    assert log_models(there, study(), parent, folder, records) == 0
    assert {model.model_id for model in logged(there)} == first
    for model in logged(there):
        assert Path(model.artifact_location.removeprefix("file://")).relative_to(tmp_path / "new").parts[0] == "mlruns"
        assert there in model.tags["mlflow.note.content"]
    assert not (tmp_path / "mlruns").exists()
    shutil.rmtree(tmp_path / "new" / "mlruns")  # then its files are written again
    assert log_models(there, study(), parent, folder, records) == 2
    assert len(logged(there)) == 2


def test_a_better_seed_replaces_the_arms_model(stored, corpus):
    uri, folder, parent, records = stored
    log_models(uri, study(), parent, folder, records)
    before = {model.name: model.tags["cell"] for model in logged(uri)}
    more = study(confirm={"seeds": 6})
    trained_run(more, folder, corpus)
    sync(uri, more, folder)
    records = list(ledger.records(ledger.read(folder / "ledger.jsonl")).values())
    changed = sum(best.cell.key not in before.values() for best in best_cells(more, records).values())
    assert changed
    assert log_models(uri, more, parent, folder, records) == changed
    assert {model.tags["cell"] for model in logged(uri)} == {r.cell.key for r in best_cells(more, records).values()}


def test_a_model_that_is_not_the_ledgers_best_is_not_logged(stored):
    uri, folder, parent, records = stored
    (folder / "models" / "gelu" / "model.json").unlink()
    assert log_models(uri, study(), parent, folder, records) == 1
    assert [model.name for model in logged(uri)] == ["pa_learned"]
