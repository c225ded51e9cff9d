"""Tests of MLflow's runs and views of a study of the user's own training."""

import json

from tests.own_trainings import FUNCTION, own_study
from tune.backend.inline import Inline
from tune.sweep import sweep
from tune.tracking.runs import own_names
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
    assert "final/val_score" in text
    assert json.loads(json.loads(tags["mlflow.sharedViewState.trials"])["state"])["orderByAsc"] is False
    assert all(len(name_of(study, view)) <= 33 for view in views_of(study))


def test_runs_in_the_store(tmp_path):
    from mlflow import MlflowClient

    study = own_study(tmp_path, stages=["search"], search={"trials_per_arm": 1})
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweep(study, tmp_path, tmp_path / "studies", Inline(), tracking_uri=uri)
    client = MlflowClient(tracking_uri=uri)
    ids = [each.experiment_id for each in client.search_experiments()]
    (found,) = client.search_runs(ids, "tags.arm = 'shifted'")
    assert {"val_loss", "steps", "final/val_loss", "final/test_loss", "final/seconds"} <= set(found.data.metrics)
    assert found.data.params["shift"] == "0.1"
    assert not {"alpha", "gate", "base"} & set(found.data.params)
