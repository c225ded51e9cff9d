"""Log the kept models of a study to MLflow."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from analysis.io.text import redact
from pagating.gating.catalog import own_code
from tune.run.kept.cards import CARD
from tune.run.kept.models import best_cells, kept_models, models_folder
from tune.study.cell import Record
from tune.study.study import Study
from tune.tracking.store import local_path
from tune.tracking.views import COLOUR, NOTE, arm_colour

NEW_TOKENS = 20  # the same as in `pagating.hf.serving`, whose libraries take seconds to load
NOT_SERVED = "MLflow cannot serve this model: it needs your own file, and no file that a model brings is ever run."
_CARD = "card_sha256"  # tag of a logged model: digest of its card
PACKAGES = ("pagating-study", "torch", "transformers", "safetensors", "mlflow")  # that a server needs


def log_models(uri: str, study: Study, parent_id: str, folder: Path, records: Iterable[Record]) -> int:
    """Log the kept models of a study, each at its run.

    A complete model in MLflow stays. A model of another cell and an incomplete one are replaced. Errors of MLflow are
    passed on.

    A complete model gets a new card, if its card has changed: the verdict of a study follows added seeds.

    Args:
        uri: MLflow tracking URI.
        study: The study.
        parent_id: Id of the study's parent run.
        folder: The study's folder.
        records: All cells of the study.

    Returns:
        The number of models that were logged by this call.
    """
    best = best_cells(study, records)
    models = models_folder(study, folder)
    kept = kept_models(models, best)
    if not kept:
        return 0
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_run(parent_id).info.experiment_id
    there = client.search_logged_models([experiment], filter_string=f"tags.study_run = '{parent_id}'", max_results=1000)
    logged = 0
    for arm, facts in kept.items():
        old = [model for model in there if model.tags.get("arm") == arm]
        if complete := [model for model in old if _is_complete(model, facts["cell"])]:
            _update(client, complete[0], models / arm, facts)
            continue
        for model in old:
            client.delete_logged_model(model.model_id)
        wanted = f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.cell = '{facts['cell']}'"
        for run in client.search_runs([experiment], wanted, max_results=1):
            _log(client, study, run, models / arm, facts, {"study_run": parent_id})
            logged += 1
    return logged


def _update(client: Any, logged: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Write what changed since a model was logged: its lines if the store was moved, and its card."""
    tags = _tags(logged.model_id, client.tracking_uri, folder, facts)
    if tags.get(_CARD) != logged.tags.get(_CARD) and (folder / CARD).is_file():
        client.log_model_artifact(logged.model_id, str(folder / CARD))
    if changed := {key: value for key, value in tags.items() if logged.tags.get(key) != value}:
        client.set_logged_model_tags(logged.model_id, changed)


def _tags(model_id: str, uri: str, folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    path = folder / CARD
    digest = {_CARD: hashlib.sha256(path.read_bytes()).hexdigest()[:16]} if path.is_file() else {}
    return {NOTE: how_to_load(model_id, uri, facts), **digest}


def _is_complete(model: Any, cell: str) -> bool:
    files = local_path(model.artifact_location)
    return model.tags.get("cell") == cell and str(model.status) == "READY" and (files is None or files.is_dir())


def _log(client: Any, study: Study, run: Any, folder: Path, facts: dict[str, Any], tags: dict[str, str]) -> None:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    arm, run_id, final = facts["arm"], run.info.run_id, facts["final"]
    tags |= {"arm": arm, "cell": facts["cell"], COLOUR: arm_colour(study, arm)}
    shown = {key: run.data.params[key] for key in ("arm", "lr", "alpha") if key in run.data.params}
    name = arm.replace(".", "_")  # MLflow allows no dot in a model's name
    made = client.create_logged_model(run.info.experiment_id, name, run_id, tags, shown)
    client.log_model_artifacts(made.model_id, str(folder))
    if not own_code(facts.get("unit")):
        with tempfile.TemporaryDirectory() as scratch:
            client.log_model_artifacts(made.model_id, str(_flavour(made, Path(scratch))))
    where = {"timestamp": run.info.end_time, "step": final["steps"], "model_id": made.model_id}
    last = [Metric(metric, final[metric], **where) for metric in ("val_nll", "test_nll") if metric in final]
    client.log_batch(run_id, metrics=last)
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, final["steps"])])
    client.set_logged_model_tags(made.model_id, _tags(made.model_id, client.tracking_uri, folder, facts))
    client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)


def _flavour(logged: Any, folder: Path) -> Path:
    """Write the files that make a logged model one of MLflow's flavour `pyfunc`, and return their folder.

    `pagating.hf.serving` loads it. Nothing is pickled.
    """
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    texts = Schema([ColSpec(DataType.string)])
    params = ParamSchema([ParamSpec("max_new_tokens", DataType.long, NEW_TOKENS)])
    signature = ModelSignature(inputs=texts, outputs=texts, params=params)
    model = Model(model_id=logged.model_id, run_id=logged.source_run_id, signature=signature)
    pyfunc.add_to_model(model, loader_module="pagating.hf.serving")
    model.save(folder / "MLmodel")
    needed = [f"{name}=={version(name)}" for name in PACKAGES]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    return folder


def how_to_load(model_id: str, uri: str, facts: dict[str, Any]) -> str:
    """Return Markdown with the Python lines that load a model from MLflow.

    Args:
        model_id: MLflow's id of the model.
        uri: MLflow tracking URI. A password in it is removed.
        facts: Content of `model.json`. For a user's gate the lines name its file in the study's folder.
    """
    code = own_code(facts.get("unit"))
    own = f", {code.key}={f'STUDY/gates/{code.reference}'!r}" if code else ""
    lines = ["import mlflow, pagating", "", f"mlflow.set_tracking_uri({redact(uri)!r})"]
    lines.append(f"model = pagating.load_model(mlflow.artifacts.download_artifacts({f'models:/{model_id}'!r}){own})")
    served = [] if code is None else ["", NOT_SERVED]
    return "\n".join(["```python", *lines, "```", *served])
