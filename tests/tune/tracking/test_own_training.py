"""Tests of MLflow's runs and views of a study of the user's own training."""

import json

from analysis.io.mlflow import load_mlflow
from analysis.io.study import load as load_tables
from analysis.report.build import build
from analysis.verdict.decide import decide
from tests.own_trainings import DEPTHS, FUNCTION, NAMED, named_study, own_study
from tune.backend.inline import Inline
from tune.sweep import sweep
from tune.tracking.runs import own_names
from tune.tracking.verdict import log_verdict
from tune.tracking.views import name_of, view_tags, views_of

SCORE = {"name": "val_score", "test": "test_score", "goal": "maximize"}


def test_values_have_the_users_names_and_sign(tmp_path):
    study = own_study(tmp_path, FUNCTION.replace("_loss", "_score"), metric=SCORE)
    values = {"val_nll": -0.75, "test_nll": -0.5, "tokens": 40, "steps": 40, "tokens_per_second": 3.0, "seconds": 2.0}
    expected = {"val_score": 0.75, "test_score": 0.5, "steps": 40, "steps_per_second": 3.0, "seconds": 2.0}
    assert own_names(study, values) == expected
    assert own_names(study, {"val_nll": None}) == {"val_score": None}


def test_views_speak_of_the_users_metric_only(tmp_path):
    study = own_study(tmp_path, metric=SCORE)
    tags = view_tags(study, [{"step": 40, "val_nll": -0.75}])
    text = json.dumps(tags)
    assert [word for word in ("nll", "nats", "alpha", "loss") if word in text] == []
    assert "metrics.`val_score`" in text
    assert json.loads(json.loads(tags["mlflow.sharedViewState.trials"])["state"])["orderByAsc"] is False
    assert all(len(name_of(study, view)) <= 33 for view in views_of(study))


def test_a_study_in_the_store_has_the_users_names_and_verdict(tmp_path):
    from mlflow import MlflowClient

    arms = {**NAMED["arms"], "new": {"set": {"kind": "new"}, "search": {"shift": {"uniform": [0.0, 1e-6]}}}}
    function = DEPTHS.replace("if trial.kind", "+ trial.shift if trial.kind").replace("trial.rate", "0.1")
    few = {"search": {"trials_per_arm": 2}, "calibrate": {"seeds": 1}, "confirm": {"seeds": 3}}
    study = named_study(tmp_path, function, nuisance={"depth": {"choice": [3, 4]}}, arms=arms, **few)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = sweep(study, tmp_path, tmp_path / "studies", Inline(), tracking_uri=uri)
    build(run.folder)
    verdict = json.loads((run.folder / "verdict.json").read_text())
    client = MlflowClient(tracking_uri=uri)
    ids = [each.experiment_id for each in client.search_experiments()]
    found = client.search_runs(ids, "tags.arm = 'new' and tags.stage = 'confirm'")
    assert {"val/accuracy", "train/epochs", "accuracy", "test_accuracy", "seconds"} <= set(found[0].data.metrics)
    assert found[0].data.params["kind"] == "new"
    assert found[0].data.params["depth"] == "4"
    assert (found[0].data.params["epochs"], found[0].data.params["seed"]) == ("40", found[0].data.tags["seed"])
    (short,) = client.search_runs(ids, "tags.arm = 'short' and tags.stage = 'confirm'", max_results=1)
    assert short.data.params["epochs"] == "20"  # half the budget
    assert "depth=4 shift=" in found[0].info.run_name
    assert not {"alpha", "gate", "base", "lr"} & set(found[0].data.params)
    (parent,) = client.search_runs(ids, "tags.stage = 'study'")
    log_verdict(uri, study, parent.info.run_id, run.folder, verdict)
    logged, row = client.get_run(parent.info.run_id).data.metrics, verdict["comparisons"][0]
    for name in ("mean_difference", "training_percent", "training_low", "training_high"):
        assert logged[f"{name}/new"] == row[name] > 0
    assert "training_percent/short" not in logged
    assert logged["test_accuracy/new"] > logged["test_accuracy/plain"] > logged["test_accuracy/short"] > 0.5
    said = client.get_experiment(parent.info.experiment_id).tags["mlflow.note.content"]
    assert said.startswith("Preliminary. Better than plain: new (+")
    again, here = load_mlflow(uri, study.name), load_tables(run.folder)
    assert decide(again).summary == decide(here).summary
    for mine, its in ((again.curves, here.curves), (again.trials, here.trials)):
        confirm = [table[table["stage"] == "confirm"].sort_values(["arm", "seed", "val_nll"]) for table in (mine, its)]
        for column in ("val_nll", "tokens"):
            assert confirm[0][column].tolist() == confirm[1][column].tolist()
