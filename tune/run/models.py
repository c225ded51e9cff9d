"""The best trained model of each arm: in `models/ARM/` of the study's folder, and in MLflow with the run it comes from.

The best is the completed trial of the study's last stage with the lowest validation loss. The ledger says which that
is, so that the order in which trials end, an interruption or a second look changes nothing. `pagating.load_model` loads
one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from analysis.io.text import redact
from tune.files import write_whole
from tune.run.ledger import Cell, Record
from tune.study.arm import OWN_GATE
from tune.study.study import Study
from tune.tracking.views import COLOUR, arm_colour

TRAINED = "trained"  # where a trial leaves its model, in the folder of its checkpoints
FACTS = "model.json"  # as `pagating.saved_model`, whose libraries take seconds to load, has it
LATER = "pagating trial {study} {cell} > trial.json; python -m pagating.train trial.json --model FOLDER"


def models_folder(study: Study, folder: Path) -> Path:
    """Where a study keeps its models: in its own folder; with a storage there, where other machines leave them."""
    return (Path(study.storage) / study.name if study.storage else folder) / "models"


def keeps_model(study: Study, cell: Cell) -> bool:
    """Whether the trained model of a cell may be kept."""
    return study.keep.models == "best" and study.tests(cell.stage)


def best_cells(study: Study, records: Iterable[Record]) -> dict[str, Record]:
    """By arm, the completed cell of the last stage with the lowest `val_nll`, the lower seed where two are equal."""
    best: dict[str, Record] = {}
    for record in records:
        take_best(study, best, record)
    return best


def take_best(study: Study, best: dict[str, Record], record: Record) -> None:
    """Take one more record into what `best_cells` found, in place."""
    arm = record.cell.arm
    if record.outcome == "completed" and keeps_model(study, record.cell):
        best[arm] = min(best.get(arm, record), record, key=_rank)


def _rank(record: Record) -> tuple[float, int, str]:
    return record.final["val_nll"], record.cell.seed, record.cell.key


def place(models: Path, record: Record, trained: Path) -> None:
    """Put the model that a cell left in `trained` into `models/ARM/`, for the one there. Raises OSError.

    Cut off at any point, it can be done again: `trained` goes last, in one step.
    """
    cell = record.cell
    facts = {**read_facts(trained), "arm": cell.arm, "cell": cell.key}
    write_whole(trained / FACTS, json.dumps(facts, indent=1) + "\n")
    models.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(models / cell.arm, ignore_errors=True)
    os.replace(trained, models / cell.arm)


def read_facts(folder: Path) -> dict[str, Any]:
    """What `model.json` of a folder says; empty where there is none or it is damaged."""
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("final"), dict) else {}


def kept_models(models: Path, best: dict[str, Record]) -> dict[str, dict[str, Any]]:
    """By arm, what `model.json` says of those of the `best` cells whose model is there."""
    found = {}
    for arm, record in best.items():
        facts = read_facts(models / arm)
        if facts.get("cell") == record.cell.key and facts["final"].get("val_nll") == record.final["val_nll"]:
            found[arm] = facts
    return found


def missing_models(study: Study, folder: Path, records: Iterable[Record]) -> list[str]:
    """A line for each arm whose best model is not there, with the commands that train it again, to the same bits."""
    best = best_cells(study, records)
    there = kept_models(models_folder(study, folder), best)
    return [
        f"{arm}: the model of its best trial is not kept; "
        + LATER.format(study=study.name, cell=f"'{record.cell.key}'")
        for arm, record in best.items()
        if arm not in there
    ]


def log_models(uri: str, study: Study, parent_id: str, folder: Path, records: Iterable[Record]) -> int:
    """Log the kept models, each as a model of the run that it comes from, under `parent_id`; how many were logged now.

    One that is there whole is left, one of another cell or cut off while it was written is replaced. Raises what MLflow
    raises.
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
        if any(model.tags.get("cell") == facts["cell"] and str(model.status) == "READY" for model in old):
            continue
        for model in old:
            client.delete_logged_model(model.model_id)
        wanted = f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.cell = '{facts['cell']}'"
        for run in client.search_runs([experiment], wanted, max_results=1):
            _log(client, study, run, models / arm, facts, {"study_run": parent_id})
            logged += 1
    return logged


def _log(client: Any, study: Study, run: Any, folder: Path, facts: dict[str, Any], tags: dict[str, str]) -> None:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    arm, run_id, final = facts["arm"], run.info.run_id, facts["final"]
    tags |= {"arm": arm, "cell": facts["cell"], COLOUR: arm_colour(study, arm)}
    shown = {key: run.data.params[key] for key in ("arm", "lr", "alpha") if key in run.data.params}
    name = arm.replace(".", "_")  # MLflow allows no dot there
    made = client.create_logged_model(run.info.experiment_id, name, run_id, tags, shown)
    client.log_model_artifacts(made.model_id, str(folder))
    where = {"timestamp": run.info.end_time, "step": final["steps"], "model_id": made.model_id}
    last = [Metric(f"final/{metric}", final[metric], **where) for metric in ("val_nll", "test_nll") if metric in final]
    client.log_batch(run_id, metrics=last)
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, final["steps"])])
    client.set_logged_model_tags(
        made.model_id, {"mlflow.note.content": how_to_load(made.model_id, client.tracking_uri, facts)}
    )
    client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)


def how_to_load(model_id: str, uri: str, facts: dict[str, Any]) -> str:
    """Markdown: the lines that load a model of MLflow's store; a password in its address is left out.

    `facts`: what `model.json` says; for an own gate the lines name its file, as the study's folder has it.
    """
    gate = (facts.get("unit") or {}).get("gate")
    own = f", gate={f'STUDY/gates/{gate}'!r}" if gate and OWN_GATE.fullmatch(gate) else ""
    lines = ["import mlflow, pagating", "", f"mlflow.set_tracking_uri({redact(uri)!r})"]
    lines.append(f"model = pagating.load_model(mlflow.artifacts.download_artifacts({f'models:/{model_id}'!r}){own})")
    return "\n".join(["```python", *lines, "```"])
