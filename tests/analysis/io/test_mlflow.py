"""Studies in MLflow give the same verdict as their folders."""

import math
from pathlib import Path

import pandas as pd
import pytest

from analysis.describe.curves import slopes
from analysis.io import command
from analysis.io.files import TableError
from analysis.io.mlflow import load_mlflow
from analysis.io.study import load
from analysis.significance import main
from analysis.verdict import decide
from tests.analysis.helpers import climb, simulate

FINAL = ("test_nll", "val_nll", "val_ppl", "val_bpb", "train_nll", "tokens", "steps", "seconds", "parameters")
TAGS = ("study", "stage", "arm", "seed", "config_key", "outcome", "rung")


def log(folder: Path, uri: str, prefix: str) -> str:
    """Write the folder's confirm trials as runs under a parent run, with the names that a study uses."""
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("demo", artifact_location=(folder / "artifacts").as_uri())
    parent = client.create_run(experiment, tags={"study": "demo", "stage": "study"}).info.run_id
    client.log_text(parent, (folder / "study.yaml").read_text(), "study.yaml")
    trials = pd.read_parquet(folder / "trials.parquet").query("stage == 'confirm'")
    curves = pd.read_parquet(folder / "curves.parquet").set_index(["stage", "arm", "seed"]).sort_index()
    final = [k for k in (*FINAL, "flops_per_token") if k in trials.columns]
    for row in trials.to_dict("records"):
        tags = {k: str(row[k]) for k in TAGS if k in row}
        run = client.create_run(experiment, tags=tags | {"mlflow.parentRunId": parent}).info.run_id
        metrics = [Metric(f"{prefix}{k}", float(row[k]), 0, 200) for k in final if math.isfinite(row[k])]
        of_cell = curves.loc[(row["stage"], row["arm"], row["seed"])]
        metrics += [Metric("val/nll", r.val_nll, 0, r.step) for r in of_cell.itertuples()]
        params = [Param(k, str(row[k])) for k in ("lr", "alpha") if k in row]
        client.log_batch(run, metrics=metrics, params=params, tags=[RunTag("unused", "x")])
    cut = {"mlflow.parentRunId": parent, "stage": "confirm", "arm": "gelu", "seed": "100", "outcome": "running"}
    client.create_run(experiment, tags=cut)
    return parent


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "final/"])  # the latter of earlier versions
def test_mlflow_gives_the_verdict_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    folder = simulate(tmp_path / "demo", seeds=3)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    parent = log(folder, uri, prefix)
    want = decide.verdict(load(folder))
    for name in ("demo", parent):
        study = load_mlflow(uri, name)
        got = decide.verdict(study)
        for mine, row in zip(got["comparisons"], want["comparisons"], strict=True):
            for key in ("arm", "n", "improvement_percent", "p_t", "p_adjusted", "verdict", "seeds"):
                assert mine[key] == row[key]
    for mine, row in zip(slopes(study), slopes(load(folder)), strict=True):
        assert mine.pop("values") == pytest.approx(row.pop("values"))  # one slope per seed
        assert mine == pytest.approx(row)
    with pytest.raises(TableError, match=r"0 parent runs; allowed: one"):
        load_mlflow(uri, "other")
    with pytest.raises(TableError, match=r"without quotes"):
        load_mlflow(uri, "x' or '1")


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture):
    uri = f"sqlite:///{tmp_path / 'no.db'}"
    with pytest.raises(TableError, match=r"study 'demo': no such database file"):
        load_mlflow(uri, "demo")
    with pytest.raises(SystemExit) as done:
        command.run(lambda: main(["--mlflow", uri, "--study", "demo"]))
    assert done.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "no.db").exists()
    with pytest.raises(TableError, match=r"allowed: with --study NAME"):
        command.study(command.parser("x", "y").parse_args(["--mlflow", uri]))


@pytest.mark.slow
def test_mlflow_gives_the_trends_of_the_folder_of_a_ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    folder = climb(tmp_path / "climb", {"up": (0.5, 1.5, 3.0)}, seeds=4)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    log(folder, uri, "")
    got, want = (decide.verdict(study) for study in (load_mlflow(uri, "demo"), load(folder)))
    assert [rung["compute"] for rung in got["rungs"]] == [rung["compute"] for rung in want["rungs"]]
    assert got["trends"][0]["trend"] == "grows"
    assert got["trends"][0]["slope"] == pytest.approx(want["trends"][0]["slope"])
