"""Reader of a study from MLflow: the runs under a parent run become the two tables that a study folder holds.

Each run has the tags study, stage, arm, seed, config_key and outcome, and in a ladder rung. It has the params lr and
alpha, the metrics of the trial by their columns, and the step metrics val/nll, train/nll and alpha/layer_I. One that
trains the user's own code has the user's names instead, val/NAME and train/UNIT. Earlier versions wrote final/NAME for
the trial, and the user's names without a prefix for the steps. The parent has study.yaml as an artifact.
"""

import math
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.io import plain_yaml
from analysis.io.assemble import Study
from analysis.io.files import TableError, checked_settings
from analysis.io.names import OUTCOMES
from analysis.io.study import assemble_any
from analysis.io.text import one_line, redact

_STEP_METRICS = {"val/nll": "val_nll", "train/nll": "train_nll"}
_PAGE = 1000
_CLIENT = {  # give up after half a minute if a server does not answer
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def load_mlflow(
    uri: str, name: str, *, baseline: str | None = None, floor: str | None = None, metric: str | None = None
) -> Study:
    """Read a study from MLflow and check it.

    Step metrics are read only for the confirm runs, because each run and metric takes one request.

    Args:
        uri: Tracking URI.
        name: Run id of the parent, or its tag `study`, or the name of its experiment.
        baseline: Arm to use as baseline instead of the marked one.
        floor: Arm to use as floor instead of the marked one.
        metric: Metric to use instead of the default.

    Raises:
        TableError: If the study cannot be read or is not valid.
    """
    source = f"{redact(uri)} study {name!r}"
    if uri.startswith("sqlite:///"):
        _check_sqlite(source, Path(uri.removeprefix("sqlite:///")))
    for setting, value in _CLIENT.items():
        os.environ.setdefault(setting, value)
    import mlflow  # the import takes a second, which a study folder does not need
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        parent = _parent(client, source, name)
        children = _search(client, [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
        children = [run for run in children if run.data.tags.get("outcome") in OUTCOMES]
        if not children:
            raise TableError(f"{source}: no finished runs under parent {parent.info.run_id}")
        settings = _settings(mlflow, uri, source, parent)
        steps = _step_metrics(settings)
        confirm = [run for run in children if run.data.tags.get("stage") == "confirm"]
        curves = [row for run in confirm for row in _curve(client, run, steps)]
    except (MlflowException, RequestException, SQLAlchemyError, OSError, ImportError) as error:
        raise TableError(f"{source}: MLflow says: {one_line(redact(str(error)), 300)}") from None
    trials = pd.DataFrame([_row(run, _tuned(settings)) for run in children])
    found = pd.DataFrame(curves)
    return assemble_any(source, name, trials, found, settings, baseline=baseline, floor=floor, metric=metric)


def _check_sqlite(source: str, path: Path) -> None:
    # MLflow would create a missing file, and its tables in any existing database.
    if not os.path.isfile(path):
        raise TableError(f"{source}: no such database file; allowed: an existing one")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as store:
            known = store.execute("select 1 from sqlite_master where name = 'experiments'").fetchone()
    except sqlite3.Error as error:
        raise TableError(f"{source}: {error}; allowed: an MLflow database") from None
    if not known:
        raise TableError(f"{source}: has no table experiments; allowed: an MLflow database")


def _parent(client: Any, source: str, name: str) -> Any:
    if re.fullmatch(r"[0-9a-f]{32}", name):
        return client.get_run(name)
    if "'" in name or "`" in name:
        raise TableError(f"{source}: allowed: a study's name without quotes, or a run id")
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = _search(client, experiments, f"tags.study = '{name}' and tags.stage = 'study'")
    if not found and (experiment := client.get_experiment_by_name(name)):
        found = _search(client, [experiment.experiment_id], "tags.stage = 'study'")
    if len(found) != 1:
        ids = ", ".join(run.info.run_id for run in found[:5])
        raise TableError(f"{source}: {len(found)} parent runs{': ' + ids if ids else ''}; allowed: one (give a run id)")
    return found[0]


def _search(client: Any, experiments: list[str], condition: str) -> list[Any]:
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs(experiments, condition, max_results=_PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _settings(mlflow: Any, uri: str, source: str, parent: Any) -> dict[str, Any]:
    artifact = f"runs:/{parent.info.run_id}/study.yaml"
    text = mlflow.artifacts.load_text(_artifact(mlflow, uri, parent, artifact))
    try:
        return checked_settings(f"{source} artifact study.yaml", plain_yaml.parse(text))
    except plain_yaml.PlainYamlError as error:
        raise TableError(f"{source}: artifact study.yaml: {error}") from None


def _artifact(mlflow: Any, uri: str, parent: Any, artifact: str) -> str:
    # The artifact's own location needs no global tracking URI, which would change the caller's process.
    root = str(parent.info.artifact_uri)
    if root.startswith("mlflow-artifacts:"):
        mlflow.set_tracking_uri(uri)
        return artifact
    return f"{root.rstrip('/')}/study.yaml"


def _tuned(settings: dict[str, Any]) -> list[str]:
    """Return the params of a run that are hyperparameters."""
    if settings.get("trial") is None:
        return ["lr", "alpha"]
    searched = [options.get("search") or {} for options in (settings.get("arms") or {}).values()]
    return list(dict.fromkeys([*(settings.get("nuisance") or {}), *(name for own in searched for name in own)]))


def _step_metrics(settings: dict[str, Any]) -> dict[str, str]:
    """Return the metrics of an evaluation, and the column of each."""
    if settings.get("trial") is None:
        return _STEP_METRICS
    metric, units = (settings.get("metric") or {}).get("name"), settings.get("budget") or {}
    return {f"val/{metric}": str(metric)} | {f"train/{unit}": str(unit) for unit in units}


def _row(run: Any, tuned: list[str]) -> dict[str, Any]:
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    row: dict[str, Any] = {k: tags.get(k) for k in ("study", "stage", "arm", "seed", "config_key", "outcome", "reason")}
    row |= _rung(tags) | {"test_nll": math.nan, "val_nll": math.nan}
    row |= {k: float(params[k]) if k in params else math.nan for k in tuned}
    row |= _final(metrics)
    layers = {k: v for k, v in metrics.items() if k.startswith("alpha/layer_")}
    return row | {k.replace("alpha/layer_", "alpha_layer_"): v for k, v in layers.items()}


def _final(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of a whole trial by column."""
    old = {k.removeprefix("final/"): v for k, v in metrics.items() if k.startswith("final/")}
    return old if old or "lr" in metrics else {k: v for k, v in metrics.items() if "/" not in k}


def _rung(tags: dict[str, str]) -> dict[str, int]:
    return {"rung": int(tags["rung"])} if tags.get("rung") else {}


def _curve(client: Any, run: Any, steps: dict[str, str]) -> list[dict[str, Any]]:
    tags = run.data.tags
    base = {"stage": tags["stage"], "arm": tags["arm"], "seed": int(tags["seed"]), "config_key": tags.get("config_key")}
    base |= _rung(tags)
    names = {k if k in run.data.metrics else k.rpartition("/")[2]: column for k, column in steps.items()}
    names |= {k: k.replace("/", "_") for k in run.data.metrics if k.startswith("alpha/layer_")}
    rows: dict[int, dict[str, Any]] = {}
    for metric, column in names.items():
        for point in client.get_metric_history(run.info.run_id, metric):
            rows.setdefault(point.step, base | {"step": point.step})[column] = point.value
    final = _final(run.data.metrics)
    tokens, updates = final.get("tokens"), final.get("steps")
    per_step = tokens / updates if tokens and updates else 1.0
    return [row | {"tokens": row["step"] * per_step} for _, row in sorted(rows.items())]
