"""Tests of `pagating sweep configs/smoke.yaml` through Ray and MLflow on sqlite."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from pagating import load_model
from pagating.data.corpus import eval_windows, open_split
from pagating.evaluate import mean_nll
from pagating.train import train
from tests.tune.helpers import typed
from tune.run import ledger
from tune.run.kept.models import best_cells
from tune.study.files import load
from tune.study.trial_spec import trial_spec

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
PAGATING = [sys.executable, "-m", "tune.cli"]


def sweep(output, *options, config=SMOKE, check=True):
    command = [*PAGATING, "sweep", str(config), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert not check or done.returncode in (0, 1), done.stdout + done.stderr
    return done


def records(output):
    return ledger.records(ledger.read(output / "smoke" / "ledger.jsonl"))


def confirm_losses(output):
    found = records(output).values()
    return {r.cell.key: (r.final["test_nll"], r.final["val_nll"]) for r in found if r.cell.stage == "confirm"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    os.environ["PAGATING_CACHE"] = str(folder)
    yield folder
    del os.environ["PAGATING_CACHE"]


@pytest.fixture(scope="module")
def study(tmp_path_factory, cache):
    output = tmp_path_factory.mktemp("two-slots") / "studies"
    done = sweep(output, "--slots", "2")
    return output, done


def test_the_study_ends_with_table_report_and_how_to_browse(study):
    output, done = study
    assert "verdict" in done.stdout
    assert f"Report:  {output / 'smoke' / 'report.html'}" in done.stdout
    assert f"pagating ui --tracking sqlite:///{output.parent / 'mlflow.db'}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    left = {path.name for path in (output / "smoke").iterdir()}
    assert {"study.yaml", "ledger.jsonl", "trials.parquet", "curves.parquet", "verdict.json", "verdict.md"} <= left
    assert {"report.html", "figures", "logs"} <= left


def test_every_stage_gave_every_arm_the_same(study):
    output, _ = study
    trials = pd.read_parquet(output / "smoke" / "trials.parquet")
    counts = trials.groupby(["stage", "arm"]).size().unstack()
    assert (counts.nunique(axis=1) == 1).all()
    assert counts.loc["search"].iloc[0] == 3
    assert counts.loc["confirm"].iloc[0] == 3
    confirm = trials[trials["stage"] == "confirm"]
    assert confirm["test_nll"].notna().all()
    assert trials.loc[trials["stage"] != "confirm", "test_nll"].isna().all()
    assert set(trials["outcome"]) <= {"completed", "stopped_early"}
    assert set(confirm["outcome"]) == {"completed"}


def test_each_loss_is_that_of_the_same_cell_run_alone(study, cache):
    output, _ = study
    loaded = load(output / "smoke" / "study.yaml")
    corpus = next(cache.glob("corpus-*"))
    completed = [record for record in records(output).values() if record.outcome == "completed"]
    some = completed[::7]
    assert {record.cell.stage for record in some} == {"search", "calibrate", "confirm"}
    for record in some:
        cell = record.cell
        spec = trial_spec(loaded, cell.arm, cell.config, cell.seed, corpus, test=cell.stage == "confirm")
        *_, row = train(spec)
        assert row["final"]["val_nll"] == record.final["val_nll"], cell.key
        assert row["final"].get("test_nll") == record.final.get("test_nll"), cell.key


def test_a_cell_runs_alone_from_the_command_line(study, tmp_path, monkeypatch, capsys):
    output, _ = study
    key, (test_nll, _) = next(iter(confirm_losses(output).items()))
    code, shown, _ = typed(monkeypatch, capsys, "trial", "smoke", key, "--output", output)
    assert code == 0
    (tmp_path / "trial.json").write_text(shown)
    command = [sys.executable, "-m", "pagating.train", str(tmp_path / "trial.json")]
    alone = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(alone.stdout)["test_nll"] == test_nll


def test_mlflow_holds_one_run_a_cell_as_the_ledger_has_it(study):
    output, _ = study
    client = MlflowClient(f"sqlite:///{output.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("smoke")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if run.data.tags["stage"] == "study"]
    children = {run.data.tags["cell"]: run for run in runs if run.data.tags["stage"] != "study"}
    found = records(output)
    assert len(parents) == 1
    assert len(children) == len(runs) - 1 == len(found)
    status = {"completed": "FINISHED", "stopped_early": "KILLED"}
    for key, record in found.items():
        run = children[key]
        assert run.info.status == status[record.outcome]
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.tags["outcome"] == record.outcome
        assert run.data.tags["seed"] == str(record.cell.seed)
        assert float(run.data.params["lr"]) == record.cell.config["lr"]
        assert 0 <= float(run.data.params["alpha"]) <= 2  # numeric for every arm, the baseline included
        assert run.data.metrics["val_nll"] == record.final["val_nll"]
        history = client.get_metric_history(run.info.run_id, "val/nll")
        assert [(m.step, m.value) for m in history] == [(row["step"], row["val_nll"]) for row in record.curve]
    learned = next(run for key, run in children.items() if key.startswith("confirm/paglu-per-layer"))
    assert "alpha/layer_0" in learned.data.metrics
    assert learned.inputs.dataset_inputs[0].dataset.digest == parents[0].data.tags["corpus"]
    artifacts = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert {"study.yaml", "report.html", "verdict.json", "verdict.md"} <= artifacts
    assert "gelu" in parents[0].data.tags["mlflow.note.content"]


def kept(output):
    return {path.parent.name: path.read_bytes() for path in (output / "smoke" / "models").glob("*/model.safetensors")}


def test_each_arms_best_model_is_kept_and_offered_by_mlflow(study, cache, monkeypatch):
    output, _ = study
    given, corpus, uri = load(SMOKE), next(cache.glob("corpus-*")), f"sqlite:///{output.parent / 'mlflow.db'}"
    best = best_cells(given, records(output).values())
    assert best.keys() == given.arms.keys() == kept(output).keys()
    assert not (output / "smoke" / "checkpoints").exists()
    client = MlflowClient(uri)
    offered = client.search_logged_models([client.get_experiment_by_name("smoke").experiment_id])
    assert sorted(model.tags["cell"] for model in offered) == sorted(record.cell.key for record in best.values())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    held = eval_windows(open_split(corpus, "validation"), given.model.n_ctx, given.fixed.eval_windows)
    for model in offered:
        loaded = load_model(download_artifacts(f"models:/{model.model_id}"))
        loss = mean_nll(loaded, held, given.fixed.batch_tokens // given.model.n_ctx, given.fixed.precision)
        assert loss == best[model.tags["arm"]].final["val_nll"]


@pytest.mark.slow
def test_one_slot_and_an_interruption_change_no_bit(study, tmp_path, cache):
    expected, _ = study
    output = tmp_path / "studies"
    command = [*PAGATING, "sweep", str(SMOKE), "--output", str(output), "--slots", "1"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    path = output / "smoke" / "ledger.jsonl"
    deadline = time.monotonic() + 120
    while sum(event["event"] == "ended" for event in (ledger.read(path) if path.exists() else [])) < 8:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, out + err
    assert "the same command continues from there" in err
    before = {key: r.ended for key, r in records(output).items() if r.outcome}
    assert 8 <= len(before) < len(records(expected))
    sweep(output, "--slots", "1")
    after = records(output)
    assert {key: after[key].ended for key in before} == before  # no finished cell ran again
    assert after.keys() == records(expected).keys()
    assert confirm_losses(output) == confirm_losses(expected)
    assert kept(output) == kept(expected)
    with sqlite3.connect(output.parent / "mlflow.db") as store:
        rows = store.execute(
            "select t.value, count(*) from tags t join runs r using (run_uuid) "
            "where t.key = 'cell' and r.lifecycle_stage = 'active' group by t.value"
        ).fetchall()
    assert sorted(rows) == sorted((key, 1) for key in after)  # none lost, none doubled


def test_a_finished_study_is_read_not_run_again(study, monkeypatch, capsys):
    output, _ = study
    before = (output / "smoke" / "ledger.jsonl").read_bytes()
    models = kept(output)
    _, out, err = typed(monkeypatch, capsys, "sweep", SMOKE, "--output", output)
    assert "verdict" in out
    assert "not kept" not in out + err
    assert kept(output) == models
    assert (output / "smoke" / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confirm": {"seeds": 2}}, "confirm.seeds was 3 and is now 2; it can only grow: undo the change"),
        (
            {"fixed": {"tokens": 40_960, "batch_tokens": 512, "eval_windows": 16}},
            "fixed.tokens was 20480 and is now 40960",
        ),
        ({"confirm": {"seeds": 3, "level": 0.01}}, "confirm.level was 0.05 and is now 0.01"),
    ],
)
def test_a_folder_of_another_configuration_is_refused_and_left_alone(
    study, tmp_path, monkeypatch, capsys, change, message
):
    output, _ = study
    content = {**yaml.safe_load(SMOKE.read_text()), **change}
    config = tmp_path / "smoke.yaml"
    config.write_text(yaml.safe_dump(content))
    before = (output / "smoke" / "study.yaml").read_bytes()
    code, out, err = typed(monkeypatch, capsys, "sweep", config, "--output", output)
    assert (code, out.count("\n"), err.count("\n")) == (2, 1, 1)
    assert message in err
    assert (output / "smoke" / "study.yaml").read_bytes() == before


def test_bad_input_writes_nothing(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text(SMOKE.read_text().replace("seeds: 3", "seed: 3"))
    done = sweep(tmp_path / "studies", config=config, check=False)
    assert done.returncode == 2
    wanted = f"pagating: {config}: unknown key 'confirm.seed'; did you mean 'seeds'? allowed: seeds, "
    assert done.stderr.startswith(wanted)
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml"]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", "", "{0}/text.txt: is empty"),
        ("a b c\n" * 40, "tokenizer: {vocab_size: 257}", "the validation split has "),
        ("a b c\n" * 4000, "tokenizer: {path: none}", "tokenizer 'none' cannot be loaded: {0}/none does not exist; "),
        (
            "a b c\n" * 4000,
            "model.pretrained",
            "pretrained 'none' cannot be loaded: no such folder ({0}/none) and no copy on the hub",
        ),
    ],
)
def test_what_is_missing_or_too_short_is_one_line_and_writes_nothing(
    tmp_path, monkeypatch, capsys, text, more, message
):
    monkeypatch.delenv("PAGATING_CACHE", raising=False)
    content = yaml.safe_load(SMOKE.read_text()) | {"corpus": {"files": {"train": "text.txt"}}}
    if more == "model.pretrained":
        content["model"]["pretrained"], content["tokenizer"] = "none", {"path": "none"}
    elif more:
        content |= yaml.safe_load(more)
    (tmp_path / "text.txt").write_text(text)
    config = tmp_path / "empty.yaml"
    config.write_text(yaml.safe_dump(content))
    code, _, err = typed(monkeypatch, capsys, "sweep", config, "--output", tmp_path / "studies")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("pagating: " + message.format(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.yaml", "text.txt"]


def test_status_counts_the_cells(study):
    output, _ = study
    command = [*PAGATING, "status", "smoke", "--output", str(output)]
    shown = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ, "COLUMNS": "120"}
    )
    lines = shown.stdout.splitlines()
    assert lines[0] == "smoke: Does the whole path work, from text to verdict?"
    assert next(line.split() for line in lines if line.startswith("confirm")) == ["confirm", "15", "0", "0", "0", "15"]
    losses = [record.final["val_nll"] for record in records(output).values() if record.cell.arm == "linear-floor"]
    mean = sum(losses[-3:]) / 3  # the confirm cells are the last
    assert f"{mean:.4f} lr=" in next(line for line in lines if line.startswith("linear-floor"))
    assert lines[-1].startswith("It has ended, ")


@pytest.mark.parametrize("command", ["status", "report", "trial"])
def test_an_unknown_study_is_one_line(tmp_path, monkeypatch, capsys, command):
    code, _, err = typed(monkeypatch, capsys, command, "nothing", "--output", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "no study of that name" in err


def test_resume_refuses_a_study_that_was_not_begun(tmp_path, monkeypatch, capsys):
    code, _, err = typed(monkeypatch, capsys, "sweep", SMOKE, "--output", tmp_path / "studies", "--resume")
    assert code == 2
    assert "no study was begun here" in err
    assert not (tmp_path / "studies").exists()
