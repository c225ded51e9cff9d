"""MLflow, filled from the ledger: one run a cell under the study's parent run.

Every write is an upsert keyed by the cell, made by one background thread that retries and never raises into the study:
a slow or dead tracking server costs the trials nothing, and what it missed is written when the sweep is run again.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tune import ledger as ledgers
from tune.ledger import Record
from tune.provenance import git_commit
from tune.study import Study

STATUS = {"completed": "FINISHED", "stopped_early": "KILLED", "infeasible": "FAILED", "failed": "FAILED"}
METRICS = {"val_nll": "val/nll", "train_nll": "train/nll", "lr": "lr", "grad_norm": "grad_norm"}
ROOM = 900  # metrics of one request; the server takes at most 1,000


def default_uri(output: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else `mlflow.db` beside the folder of studies, as an absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output.resolve().parent / 'mlflow.db'}"


def prepare_store(uri: str) -> None:
    """Create the schema of a new sqlite store in a temporary file, then move it into place: whole, or not there."""
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as scratch:
        made = Path(scratch) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        if not path.exists():
            os.replace(made, path)


def numeric_alpha(study: Study, arm: str, config: dict[str, float]) -> float:
    """One number for the gate strength of any arm, so that charts over alpha draw all of them.

    Fixed or searched: the value; per layer: the mean; learned: the start; stock activation: 0, the gate switched off.
    """
    alpha = study.arms[arm].alpha
    if "alpha" in config:
        return config["alpha"]
    if isinstance(alpha, list):
        return sum(alpha) / len(alpha)
    if isinstance(alpha, int | float):
        return float(alpha)
    return alpha.learnable.init if alpha is not None and alpha.learnable else 0.0


class Tracker:
    """Writes cells to MLflow from a thread of its own. `started`, `reported` and `ended` return at once."""

    def __init__(self, uri: str, study: Study, folder: Path, corpus: Path) -> None:
        """`uri`: tracking URI; `folder`: of the study; `corpus`: packed corpus, for its digest."""
        self.uri, self.study, self.folder = uri, study, folder
        self._corpus = json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._dirty: dict[str, Record] = {}
        self._runs: dict[str, str] = {}  # cell -> run id
        self._logged: dict[str, int] = {}  # cell -> rows of its curve that MLflow has
        self._began: dict[str, float | None] = {}  # cell -> start of the attempt that its run shows
        self._complete: set[str] = set()  # cells that MLflow has whole
        self._client: Any = None
        self.parent_id: str | None = None
        self._experiment = ""
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    # --- called by the study, never wait ---

    def started(self, record: Record) -> None:
        """A cell starts (again): its run appears as RUNNING."""
        self._queue.put(_as_it_stands(record))

    def reported(self, record: Record, row: dict[str, Any]) -> None:
        """A cell has a new evaluation."""
        self._queue.put(_as_it_stands(record))

    def ended(self, record: Record) -> None:
        """A cell has ended."""
        self._queue.put(_as_it_stands(record))

    @property
    def owed(self) -> int:
        """Cells that MLflow does not have yet as the ledger has them."""
        return len(self._dirty) + self._queue.qsize()

    def close(self, patience: float = 60.0) -> None:
        """Write what is left, for at most `patience` seconds; `owed` is then what could not be written."""
        for record in ledgers.records(ledgers.read(self.folder / "ledger.jsonl")).values():
            if record.outcome is not None:
                self._queue.put(record)
        self._queue.put(None)
        self._thread.join(patience)

    # --- the thread ---

    def _work(self) -> None:
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        stopping, wait = False, 0.0
        while not stopping or self._dirty:
            stopping = self._drain(stopping, wait) or stopping
            try:
                if self._client is None:
                    self._connect()
                for key in list(self._dirty):
                    self._upsert(self._dirty[key])
                    del self._dirty[key]
                self.problem, wait = None, 1.0
            except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
                self.problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                if stopping:
                    return
                wait = min(30.0, max(1.0, 2 * wait))

    def _drain(self, stopping: bool, wait: float) -> bool:
        """Move queued records to the dirty ones, waiting up to `wait` seconds (at least for one); True at the end."""
        end = time.monotonic() + wait
        while True:
            left = end - time.monotonic()
            try:
                record = self._queue.get(
                    block=not stopping, timeout=max(0.0, left) if self._dirty or left > 0 else None
                )
            except queue.Empty:
                return False
            if record is None:
                return True
            if record.cell.key not in self._complete or record.outcome is None:
                self._dirty[record.cell.key] = record

    def _connect(self) -> None:
        prepare_store(self.uri)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name(self.study.name)
        if experiment is None:
            local = self.uri.startswith("sqlite:///")
            root = Path(self.uri.removeprefix("sqlite:///")).parent / "mlruns" / self.study.name
            self._experiment = client.create_experiment(
                self.study.name,
                artifact_location=root.resolve().as_uri() if local else None,
                tags={"mlflow.experimentKind": "custom_model_development"},
            )
        else:
            self._experiment = experiment.experiment_id
        identity = str(self.folder.resolve())
        found = self._search(client, f"tags.study_folder = '{_quoted(identity)}' and tags.stage = 'study'")
        if found:
            self.parent_id = found[0].info.run_id
        else:
            tags = {
                "study": self.study.name,
                "stage": "study",
                "study_folder": identity,
                "corpus": self._corpus["digest"],
                "mlflow.note.content": f"**{self.study.question}**\n\nThe study is running: no verdict yet.",
                **_source_tags(),
            }
            created = client.create_run(self._experiment, run_name=f"study {self.study.name}", tags=tags)
            self.parent_id = created.info.run_id
            client.log_text(self.parent_id, (self.folder / "study.yaml").read_text(encoding="utf-8"), "study.yaml")
        for run in self._search(client, f"tags.`mlflow.parentRunId` = '{self.parent_id}'"):
            cell = run.data.tags.get("cell", "")
            outcome = run.data.tags.get("outcome")
            if outcome in ("running", "failed") or cell in self._complete:  # left behind by a run that was cut off
                client.delete_run(run.info.run_id)
            else:
                self._runs[cell] = run.info.run_id
                self._complete.add(cell)
        self._client = client

    def _search(self, client: Any, condition: str) -> list[Any]:
        runs: list[Any] = []
        token = None
        while True:
            page = client.search_runs([self._experiment], condition, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def _upsert(self, record: Record) -> None:
        """Bring the run of a cell up to what the ledger says of it."""
        from mlflow.entities import Metric, RunTag

        key = record.cell.key
        if key in self._complete and record.outcome is not None:
            return
        if key in self._complete or self._began.get(key, record.started) != record.started:  # the cell began again
            self._client.delete_run(self._runs.pop(key))
            self._complete.discard(key)
            self._logged[key] = 0
        if key not in self._runs:
            self._runs[key] = self._create(record)
            self._began[key] = record.started
        run_id, new = self._runs[key], record.curve[self._logged.get(key, 0) :]
        now = int(1000 * time.time())
        metrics = [
            Metric(name, value, now, row["step"])
            for row in new
            for name, value in [
                *((METRICS[source], row[source]) for source in METRICS),
                ("tokens_per_second", row["tokens_per_second"]),
                *((f"alpha/layer_{layer}", value) for layer, value in enumerate(row["alpha"])),
            ]
        ]
        tags: list[Any] = []
        if record.outcome is not None:
            last = record.curve[-1]["step"] if record.curve else 0
            metrics += [Metric(f"final/{name}", float(value), now, last) for name, value in record.final.items()]
            tags = [RunTag("outcome", record.outcome)] + ([RunTag("reason", record.reason)] if record.reason else [])
        for start in range(0, max(1, len(metrics)), ROOM):
            self._client.log_batch(run_id, metrics=metrics[start : start + ROOM], tags=tags)
        self._logged[key] = self._logged.get(key, 0) + len(new)
        if record.outcome is not None:
            self._client.set_terminated(run_id, STATUS[record.outcome], end_time=_milliseconds(record.ended))
            self._complete.add(key)

    def _create(self, record: Record) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        cell = record.cell
        tags = {
            "mlflow.parentRunId": self.parent_id,
            "study": self.study.name,
            "stage": cell.stage,
            "arm": cell.arm,
            "seed": str(cell.seed),
            "config_key": cell.config_key,
            "cell": cell.key,
            "outcome": "running",
            **_source_tags(),
        }
        name = f"{cell.arm} lr={cell.config['lr']:.1e} seed={cell.seed}"
        run = self._client.create_run(
            self._experiment, start_time=_milliseconds(record.started), run_name=name, tags=tags
        )
        params = {**cell.config, "alpha": numeric_alpha(self.study, cell.arm, cell.config)}
        arm = self.study.arms[cell.arm]
        shown = {"arm": cell.arm, "gate": arm.gate or "none", "base": arm.base if arm.gate else "stock"}
        self._client.log_batch(
            run.info.run_id, params=[Param(key, str(value)) for key, value in {**params, **shown}.items()]
        )
        dataset = Dataset(
            name=self.study.corpus.source or ("hub" if self.study.corpus.hub else "files"),
            digest=self._corpus["digest"],
            source_type="code",
            source=json.dumps(self.study.corpus.model_dump(exclude_none=True)),
            profile=json.dumps({split: counts["tokens"] for split, counts in self._corpus["splits"].items()}),
        )
        self._client.log_inputs(
            run.info.run_id,
            [DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", "training")])],
        )
        return run.info.run_id


def log_verdict(uri: str, study: Study, parent_id: str, folder: Path, verdict: dict[str, Any]) -> None:
    """Put the verdict into the parent run: description, a metric for each arm, and the report as artifacts."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, RunTag

    client = MlflowClient(tracking_uri=uri)
    table = (folder / "verdict.md").read_text(encoding="utf-8")
    now = int(1000 * time.time())
    metrics = [
        Metric(f"improvement_percent/{row['arm']}", row["improvement_percent"], now, 0)
        for row in verdict["comparisons"]
        if row["improvement_percent"] is not None
    ]
    client.log_batch(parent_id, metrics=metrics, tags=[RunTag("mlflow.note.content", table)])
    for name in ("study.yaml", "verdict.json", "verdict.md", "report.html"):
        client.log_artifact(parent_id, str(folder / name))
    client.set_terminated(parent_id)


def _as_it_stands(record: Record) -> Record:
    """A copy for the tracking thread: the study goes on changing its own, an end could be seen half written."""
    return replace(record, curve=list(record.curve))


def _source_tags() -> dict[str, str]:
    commit = git_commit()
    tags = {"mlflow.user": os.environ.get("USER", "unknown"), "mlflow.source.name": "pagating sweep"}
    return {**tags, "mlflow.source.type": "LOCAL", **({"mlflow.source.git.commit": commit} if commit else {})}


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(1000 * seconds)


def _quoted(text: str) -> str:
    return text.replace("'", "''")
