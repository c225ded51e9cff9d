"""Runs of a study in MLflow, written from the ledger: one run per cell, below the study's parent run.

Every write is an upsert. Its key is the cell and the start of the attempt, and its times follow from the ledger. So
writing twice, or again after a lost answer, changes nothing.

A curve has a name with a prefix (`val/nll`). A result of a whole trial has the name of its column in trials.parquet.
MLflow draws the charts of names without a prefix last, so that its pages begin with curves, not with single points.
"""

from __future__ import annotations

import getpass
import json
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.io.files import read_json
from analysis.io.text import markdown, one_line
from tune.run.provenance import git_commit
from tune.study.arm import AlphaSection
from tune.study.cell import Cell, Record
from tune.study.ladder import vocabulary_of
from tune.study.own_study import OwnStudy
from tune.study.study import Study
from tune.tracking.identity import PARENT, STUDY_ID, Found, find, merge, pages, place_tags, study_id
from tune.tracking.store import artifact_folder, prepare_store, sqlite_file
from tune.tracking.verdict import note
from tune.tracking.views import COLOUR, NOTE, arm_colour, show, view_tags

STATUS = {"completed": "FINISHED", "stopped_early": "KILLED", "infeasible": "FAILED", "failed": "FAILED"}
REASONS = {"stopped_early": "at its last step its loss was among the worse of its arm's trials"}  # if a record has none
METRICS = {"val_nll": "val/nll", "train_nll": "train/nll", "lr": "train/lr", "grad_norm": "train/grad_norm"}
METRICS |= {"tokens_per_second": "train/tokens_per_second", "padded_nll": "val/padded_nll"}  # the last: only some rows
ROOM = 900  # metrics per request; the server accepts at most 1,000
HTTP = {  # MLflow's default of 4 minutes per call would hide that a server is unreachable
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


def numeric_alpha(study: Study, arm: str, config: dict[str, float]) -> float:
    """Return one number for the gate strength of an arm, so that charts over alpha show all arms.

    It is the value of a fixed or searched alpha, the mean of alphas per layer, the start of a learned or scheduled
    alpha, and 0 (no gate) without an alpha.
    """
    alpha = study.arms[arm].alpha
    if "alpha" in config:
        return config["alpha"]
    if isinstance(alpha, AlphaSection) and alpha.search:  # one alpha per layer
        alpha = alpha.spec(config)
    if isinstance(alpha, list):
        return sum(alpha) / len(alpha)
    if isinstance(alpha, int | float):
        return float(alpha)
    return (alpha.start if alpha is not None else None) or 0.0


@dataclass
class Known:
    """State of a cell's run in MLflow.

    Attributes:
        run_id: Id of the run.
        start: Start of the attempt that the run shows, milliseconds since 1970.
        outcome: Outcome of the cell. None means that the run is not completely written.
        rows: Number of rows of its curve that were written since the runs were listed.
        described: The run has its parameters.
    """

    run_id: str
    start: int
    outcome: str | None = None
    rows: int = 0
    described: bool = True


class Runs:
    """Runs of one study in one MLflow store. Each method raises one of `errors()` if the store cannot be used.

    Args:
        uri: MLflow tracking URI.
        study: The study.
        folder: The study's folder.
        digest: Digest of the corpus.
        tokens: Number of tokens of each split of the corpus, if known.
    """

    def __init__(self, uri: str, study: Study, folder: Path, digest: str, tokens: dict[str, int] | None = None) -> None:
        self.uri, self.study, self.folder, self.digest, self.tokens = uri, study, folder, digest, tokens
        self.known: dict[str, Known] = {}
        self.parent_id: str | None = None
        self.created = 0
        self._client: Any = None
        self._experiment = ""

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """Return the types of the errors of a store that is unreachable, slow, full or damaged.

        MLflow raises ValueError for a setting that it cannot use and for an answer that is no JSON.
        """
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        return MlflowException, RequestException, SQLAlchemyError, sqlite3.Error, OSError, ValueError

    def connect(self, again: bool = False) -> None:
        """Find or create the experiment and the parent run, list the runs and delete duplicates.

        Args:
            again: This sweep connects again after an error. False deletes the runs that an earlier sweep left
                unfinished.
        """
        for name, value in HTTP.items():
            os.environ.setdefault(name, value)
        prepare_store(self.uri)
        from mlflow import MlflowClient

        self._client = None
        client = MlflowClient(tracking_uri=self.uri)
        found = find(client, self.study.name, self.folder)
        self._experiment = found.experiment or self._create_experiment(client, found.name)
        self.parent_id = self._parent(client, found)
        merge(client, self._experiment, found.others, self.parent_id)
        description = note(self.study, self._experiment, self.parent_id)
        show(client, self._experiment, {**view_tags(self.study), NOTE: description})
        self.known = {}
        mine = f"tags.`{PARENT}` = '{self.parent_id}'"
        children = pages(client.search_runs, [self._experiment], mine, max_results=1000)
        for run in sorted(children, key=lambda run: (run.info.status == "RUNNING", -run.info.start_time)):
            cell, running = run.data.tags.get("cell", ""), run.info.status == "RUNNING"
            if cell in self.known or (running and not again):
                client.delete_run(run.info.run_id)
            else:
                described = "seed" in run.data.params  # not if its first request was lost, or by an earlier version
                outcome = run.data.tags.get("outcome") if described and not running else None
                self.known[cell] = Known(run.info.run_id, run.info.start_time, outcome, described=described)
        self._client = client

    def _create_experiment(self, client: Any, name: str) -> str:
        store = sqlite_file(self.uri)
        return client.create_experiment(
            name,
            artifact_location=artifact_folder(store, name).as_uri() if store else None,
            tags={"mlflow.experimentKind": "custom_model_development"},
        )

    def _parent(self, client: Any, found: Found) -> str:
        """Create the parent run of the study, or update the one that was found; return its id."""
        identity = study_id(self.folder / "ledger.jsonl")
        tags = place_tags(self.folder) | ({STUDY_ID: identity} if identity else {}) | _check_tag(self.folder)
        if found.parent is None:
            return self._create_parent(client, tags)
        parent = found.parent.info.run_id
        if found.replaced:
            mine = f"tags.`{PARENT}` = '{parent}'"
            for run in list(pages(client.search_runs, [self._experiment], mine, max_results=1000)):
                client.delete_run(run.info.run_id)
        for name, value in tags.items():
            if found.parent.data.tags.get(name) != value:
                client.set_tag(parent, name, value)
        if found.parent.info.status != "RUNNING":
            client.update_run(parent, status="RUNNING")
        return parent

    def _create_parent(self, client: Any, own: dict[str, str]) -> str:
        """Create the parent run of the study with tags of its own; return its id."""
        from mlflow.entities import Param

        tags = {
            "study": self.study.name,
            "stage": "study",
            "corpus": self.digest,
            NOTE: note(self.study, self._experiment, None),
            COLOUR: "#8a8a8f",
            **own,
            **_source_tags(),
        }
        created = client.create_run(self._experiment, run_name=f"study {self.study.name}", tags=tags)
        parent = created.info.run_id
        client.log_inputs(parent, [self._dataset()])
        client.log_batch(parent, params=[Param(key, str(value)) for key, value in _constants(self.study).items()])
        client.log_text(parent, (self.folder / "study.yaml").read_text(encoding="utf-8"), "study.yaml")
        return parent

    def has(self, record: Record) -> bool:
        """Return True if the cell has ended and the store has its final state."""
        known = self.known.get(record.cell.key)
        return known is not None and record.outcome is not None and _same(known, record)

    def write(self, record: Record) -> None:
        """Update the run of a cell to its state in the ledger."""
        from mlflow.entities import Metric, RunTag

        key, stamps = record.cell.key, _stamps(record)
        if self.has(record):
            return
        known = self.known.get(key)
        if known and (known.start != stamps[0] or known.outcome is not None):  # the cell started again
            self._client.delete_run(known.run_id)
            del self.known[key]
        if key not in self.known:
            self.known[key] = Known(self._create(record, stamps[0]), stamps[0], described=False)
            self.created += 1
        known = self.known[key]
        metrics = [
            Metric(name, value, stamp, row["step"])
            for stamp, row in list(zip(stamps[1:], record.curve, strict=False))[known.rows :]
            for name, value in _metrics(self.study, row)
            if value is not None  # the ledger's null for a number that is not finite
        ]
        tags: list[Any] = []
        if record.outcome is not None:
            last = record.curve[-1]["step"] if record.curve else 0
            final = own_names(self.study, record.final)
            if final and not self.study.shown:  # a chart over alpha shows only runs that have it
                final = {"alpha": numeric_alpha(self.study, record.cell.arm, record.cell.config), **final}
            metrics += [
                Metric(name, float(value), stamps[-1], last)
                for name, value in final.items()
                if value is not None and not isinstance(value, str)
            ]
            tags = [RunTag("outcome", record.outcome)]
            tags += [RunTag(name, value) for name, value in record.final.items() if isinstance(value, str)]  # device
            if reason := one_line(record.reason or REASONS.get(record.outcome, "")):
                tags += [RunTag("reason", reason), RunTag(NOTE, f"**{record.outcome}**: {markdown(reason)}")]
        params = [] if known.described else self._params(record.cell)
        starts = range(0, max(1, len(metrics)), ROOM)
        for start in starts:  # the outcome is in the last request, so it is written only if all metrics are
            self._client.log_batch(
                known.run_id,
                metrics=metrics[start : start + ROOM],
                params=params if start == starts[0] else [],
                tags=tags if start == starts[-1] else [],
            )
        known.rows, known.described = len(record.curve), True
        if record.outcome is not None:
            self._client.set_terminated(known.run_id, STATUS[record.outcome], end_time=stamps[-1])
            known.outcome = record.outcome

    def pause(self) -> None:
        """Mark the parent run as KILLED, because the study stops before its end."""
        self._client.set_terminated(self.parent_id, "KILLED")

    def _create(self, record: Record, start: int) -> str:
        cell = record.cell
        tags = {
            PARENT: self.parent_id,
            "study": self.study.name,
            "stage": cell.stage,
            "arm": cell.arm,
            "seed": str(cell.seed),
            "config_key": cell.config_key,
            "cell": cell.key,
            **({"rung": str(cell.rung)} if cell.rung else {}),
            "outcome": "running",
            COLOUR: arm_colour(self.study, cell.arm),
            **_source_tags(),
        }
        run = self._client.create_run(
            self._experiment, start_time=start, run_name=run_name(self.study, cell), tags=tags
        )
        self._client.log_inputs(run.info.run_id, [self._dataset()])
        return run.info.run_id

    def _params(self, cell: Cell) -> list[Any]:
        from mlflow.entities import Param

        arm, study = self.study.arms[cell.arm], self.study.at(cell.rung)
        values = {**_constants(study, cell.arm), "arm": cell.arm, "seed": cell.seed}
        values |= {"rung": cell.rung} if cell.rung else {}
        if isinstance(study, OwnStudy):
            values |= study.values(cell.arm, cell.config)
        else:
            values |= {"gate": arm.gate or "none", "base": arm.base if arm.gate else arm.unit or "stock"}
            values |= {"alpha": numeric_alpha(study, cell.arm, cell.config), **cell.config}
        return [Param(key, str(value)) for key, value in values.items()]

    def _dataset(self) -> Any:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        own = isinstance(self.study, OwnStudy)
        dataset = Dataset(
            name="the user's own code" if own else self.study.corpus.called,
            digest=self.digest,
            source_type="code",
            source=json.dumps("code" if own else self.study.corpus.model_dump(exclude_none=True)),
            profile=json.dumps(self.tokens) if self.tokens else None,
        )
        return DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", "training")])


def run_name(study: Study, cell: Cell) -> str:
    """Return a short name of a cell's run: rung of a ladder, arm, hyperparameters and seed."""
    rung = f"rung {cell.rung} " if cell.rung else ""
    return f"{rung}{cell.arm}{study.setting(cell.config)} seed={cell.seed}"


def own_names(study: Study, values: dict[str, Any]) -> dict[str, Any]:
    """Return values of the ledger under the names, and with the sign, that the study's metric has for its user."""
    if not study.shown:
        return values
    losses = ("val_nll", "test_nll")
    return {
        study.shown.get(name, name): study.sign * value if name in losses and value is not None else value
        for name, value in values.items()
        if name != "steps"
    }


def _metrics(study: Study, row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return names and values of the metrics of an evaluation."""
    if study.shown:
        metric = study.shown["val_nll"]
        found = {name: value for name, value in own_names(study, row).items() if name not in ("step", "alpha")}
        return [(f"{'val' if name == metric else 'train'}/{name}", value) for name, value in found.items()]
    return [
        *((METRICS[source], row[source]) for source in METRICS if source in row),
        *((f"alpha/layer_{layer}", value) for layer, value in enumerate(row["alpha"])),
    ]


def _constants(study: Study, arm: str = "") -> dict[str, Any]:
    """Return what is the same in all trials of a study of one size, or of one of its arms."""
    if study.scales:
        return {"rungs": len(study.scales)}
    if isinstance(study, OwnStudy):
        return {unit: study.length(arm, amount) if arm else amount for unit, amount in study.budget.items()}
    sections = (study.model, study.fixed)
    found = {name: value for each in sections for name, value in each.model_dump(exclude_none=True).items()}
    return found | {"vocab_size": vocabulary_of(study.tokenizer)}


def _stamps(record: Record) -> list[int]:
    """Return the times of a cell's start, of each row of its curve and of its end, in milliseconds since 1970.

    They follow from the ledger alone, so that a metric that is written twice stays one metric. They never decrease,
    even if the clock was set back. A row without a time of its own has the time of the row before.
    """
    times = [record.started or 0.0, *record.times[: len(record.curve)]]
    times += [times[-1]] * (1 + len(record.curve) - len(times))
    times.append(record.ended if record.ended is not None else times[-1])
    stamps: list[int] = []
    for value in times:
        stamps.append(max(round(1000 * value), stamps[-1] if stamps else 0))
    return stamps


def _same(known: Known, record: Record) -> bool:
    return known.outcome == record.outcome and known.start == _stamps(record)[0]


def _check_tag(folder: Path) -> dict[str, str]:
    """Return the tag with the grade of the user's own training; nothing for the built-in model."""
    found = read_json(folder / "provenance.json").get("check")
    return {"check": ", ".join(filter(None, [found["grade"], "refused" * bool(found.get("refused"))]))} if found else {}


def _source_tags() -> dict[str, str]:
    commit = git_commit()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user has no name, for example in a container
        user = "unknown"
    tags = {"mlflow.user": user, "mlflow.source.name": "pagating sweep"}
    return {**tags, "mlflow.source.type": "LOCAL", **({"mlflow.source.git.commit": commit} if commit else {})}
