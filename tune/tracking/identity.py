"""Find a study in MLflow by its identity, which stays the same if its folder is moved, renamed or copied.

The identity is a digest of the ledger's event `study`, which has the time of the study's start. The parent run has it
as the tag `study_id`. A parent run without that tag, or one that was deleted for good, is recognised by its children:
some of them have the same cells, started at the same milliseconds.

A study has an experiment of its own, of its name. If another study has that experiment, for example one of the same
name on another machine, a part of the identity is added to the name. A study that was deleted and begun again in the
same folder takes the place of the deleted one.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune.run import ledger as ledgers

STUDY_ID = "study_id"  # tag of a parent run
PARENT = "mlflow.parentRunId"
AT_ONCE = 500  # experiments per search


@dataclass
class Found:
    """Place of a study in MLflow.

    Attributes:
        name: Name for a new experiment.
        experiment: Id of the experiment. None means that there is none yet.
        parent: The parent run. None means that there is none yet.
        others: Ids of other parent runs of the same study, which may have been deleted for good.
        replaced: The parent run is that of an earlier study of the same folder.
    """

    name: str
    experiment: str | None = None
    parent: Any = None
    others: set[str] = field(default_factory=set)
    replaced: bool = False


def study_id(ledger: Path) -> str | None:
    """Return the identity of a study, or None if its ledger has no event `study`."""
    event = ledgers.first(ledger, "study")
    if event is None:
        return None
    content = json.dumps({name: value for name, value in event.items() if name != "crc"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def place_tags(folder: Path) -> dict[str, str]:
    """Return the tags of a parent run that say where the study's folder is."""
    return {"study_folder": str(folder.resolve()), "study_host": socket.gethostname()}


def find(client: Any, name: str, folder: Path) -> Found:
    """Find a study in MLflow. Restore its experiment and its parent run if a user deleted them.

    Args:
        client: MLflow's client.
        name: Name of the study.
        folder: The study's folder.
    """
    ledger = folder / "ledger.jsonl"
    identity = study_id(ledger)
    own = f"{name} {identity[:8]}" if identity else name
    named = {each: _experiment(client, each) for each in dict.fromkeys((name, own))}
    for experiments, cells in _places(client, list(filter(None, named.values())), ledger):
        if experiments and (found := _found(client, experiments, identity, cells)):
            return Found(name, *found)
    first = named[name]
    if first is None or identity is None:
        return Found(name, first)
    parents = list(pages(client.search_runs, [first], "tags.stage = 'study'", max_results=1000))
    here = place_tags(folder)
    for parent in sorted(parents, key=_age):
        if all(parent.data.tags.get(tag, value) == value for tag, value in here.items()):
            return Found(name, first, parent, replaced=True)
    return Found(own, named[own]) if parents else Found(name, first)


def merge(client: Any, experiment: str, others: set[str], parent: str) -> None:
    """Give the children and models of the other parent runs of a study to `parent`. Delete those parent runs."""
    for other in others - {parent}:
        for child in pages(client.search_runs, [experiment], f"tags.`{PARENT}` = '{other}'", max_results=1000):
            client.set_tag(child.info.run_id, PARENT, parent)
        for model in pages(client.search_logged_models, [experiment], f"tags.study_run = '{other}'", max_results=1000):
            client.set_logged_model_tags(model.model_id, {"study_run": parent})
        if (run := _run(client, other)) is not None and run.info.lifecycle_stage == "active":
            client.delete_run(other)


def pages(search: Callable[..., Any], *given: Any, **named: Any) -> Iterator[Any]:
    """Yield the results on all pages of one of MLflow's searches."""
    token = None
    while True:
        page = search(*given, **named, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _places(client: Any, named: list[str], ledger: Path) -> Iterator[tuple[list[str], list[tuple[str, int]]]]:
    """Yield ids of experiments that may have a study, with the cells to recognise it by: the likeliest ones first."""
    from mlflow.entities import ViewType

    yield named, []
    cells = _some_cells(ledger)
    if not cells:  # the study is new
        return
    yield named, cells
    ours = "tags.`mlflow.sharedViewState.arms` LIKE '%'"  # also if a user gave it another name
    found = pages(client.search_experiments, ViewType.ALL, filter_string=ours, max_results=1000)
    rest = [each.experiment_id for each in found if each.experiment_id not in named]
    for start in range(0, len(rest), AT_ONCE):
        yield rest[start : start + AT_ONCE], cells


def _found(
    client: Any, experiments: list[str], identity: str | None, cells: list[tuple[str, int]]
) -> tuple[str, Any, set[str]] | None:
    """Find a study by its identity, or else by some cells, in some experiments. Restore it if it was deleted.

    Returns:
        `experiment`, `parent` and `others` of `Found`, or None.
    """
    from mlflow.entities import ViewType

    condition = f"tags.{STUDY_ID} = '{identity}' and tags.stage = 'study'"
    parents = (
        list(pages(client.search_runs, experiments, condition, ViewType.ALL, max_results=1000)) if identity else []
    )
    others = set[str]()
    experiment = None
    if not parents:
        children = [
            run
            for cell, start in cells
            for run in client.search_runs(experiments, f"tags.cell = '{cell}' and attributes.start_time = {start}")
            if PARENT in run.data.tags
        ]
        if not children:
            return None
        experiment = min(children, key=_age).info.experiment_id
        others = {run.data.tags[PARENT] for run in children if run.info.experiment_id == experiment}
        parents = [run for run in (_run(client, other) for other in others) if run is not None]
    parent = min(parents, key=lambda run: (run.info.lifecycle_stage == "deleted", *_age(run)), default=None)
    if parent is None:
        return str(experiment), None, others
    found = client.get_experiment(parent.info.experiment_id)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
        parent = client.get_run(parent.info.run_id)
    if parent.info.lifecycle_stage == "deleted":
        client.restore_run(parent.info.run_id)
    return found.experiment_id, parent, others


def _experiment(client: Any, name: str) -> str | None:
    """Return the id of an experiment by its name, or None if there is none. Restore it if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _run(client: Any, run_id: str) -> Any:
    """Return a run, also a deleted one, or None if it was deleted for good."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _age(run: Any) -> tuple[int, str]:
    return run.info.start_time, run.info.run_id


def _some_cells(ledger: Path) -> list[tuple[str, int]]:
    """Return the first, middle and last cell that ended, each with its start in milliseconds since 1970."""
    ended = [record for record in ledgers.records(ledgers.read(ledger)).values() if record.outcome is not None]
    some = {record.cell.key: record for record in (ended[0], ended[len(ended) // 2], ended[-1])} if ended else {}
    return [(key, round(1000 * (record.started or 0.0))) for key, record in some.items()]
