"""MLflow store of a study: its address, and the sqlite file with the folder of artifacts beside it."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tune.study.addresses import SQLITE, check_tracking

ARTIFACTS = "mlruns"  # folder beside a sqlite store
PATHS = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
OURS = """
    select distinct experiments.experiment_id, experiments.artifact_location
    from tags join runs using (run_uuid) join experiments on experiments.experiment_id = runs.experiment_id
    where tags.key = 'study_folder'
"""

RUNS = """
    select count(distinct run_uuid)
    from tags join runs using (run_uuid) join experiments on experiments.experiment_id = runs.experiment_id
    where runs.lifecycle_stage = 'active' and experiments.lifecycle_stage = 'active'
      and (run_uuid = :parent or (tags.key = 'mlflow.parentRunId' and tags.value = :parent))
"""


def tracking_uri(option: str | None, key: str | None, output: Path) -> str:
    """Return the tracking URI of a command, or `none`.

    Args:
        option: Value of the option `--tracking`, or None.
        key: Value of the key `tracking` of the study file, or None.
        output: Folder of studies. By default, the store is `mlflow.db` next to it.

    Raises:
        StudyError: One line if the URI cannot be one.
    """
    given = (("--tracking", option), ("tracking", key), ("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI")))
    for source, text in given:
        if text:
            return _absolute(check_tracking(text, source))
    return sqlite_uri(output.resolve().parent / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """Return the URI of a sqlite store.

    SQLAlchemy would read a % and a ? in a plain URI in its own way. In a URI with an escaped path, MLflow would create
    the folder of the escaped name, unless the URI also names the driver.
    """
    if not {"%", "?"} & set(str(path)):
        return f"sqlite:///{path}"
    from sqlalchemy import URL

    return URL.create("sqlite+pysqlite", database=str(path)).render_as_string(hide_password=False)


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store, or None for another kind of store. `uri` comes from `tracking_uri`."""
    if uri.startswith("sqlite+pysqlite:///"):
        from sqlalchemy import make_url

        return Path(str(make_url(uri).database))
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _absolute(uri: str) -> str:
    """Return the URI of a sqlite store with an absolute path. Return another URI as it is.

    In a URI that a user wrote, a path may be escaped. It is taken literally if only the literal one exists.
    """
    match = SQLITE.fullmatch(uri)
    if not match:
        return uri
    text, mark, query = match["path"].rpartition("?")
    if not mark or "/" in query or "=" not in query:  # the ? is part of a name
        text, mark, query = match["path"], "", ""
    if text.startswith("file:"):  # SQLite's own URI
        return uri
    literal, decoded = Path(text), Path(unquote(text))
    there = literal.exists() or (literal.parent.is_dir() and not decoded.parent.is_dir())
    return f"{sqlite_uri((literal if there else decoded).absolute())}{mark}{query}"


def prepare_store(uri: str) -> None:
    """Create a new sqlite store in one step, from a temporary file, or adapt one that was moved.

    Do nothing for another kind of store.
    """
    path = sqlite_file(uri)
    if path is None:
        return
    if path.exists():
        move_artifacts(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as scratch:
        made = Path(scratch) / "mlflow.db"
        MlflowClient(tracking_uri=sqlite_uri(made)).search_experiments(max_results=1)
        try:
            os.link(made, path)  # in one step, and only if no other study has created it meanwhile
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            os.replace(made, path)


def artifact_folder(store: Path, name: str) -> Path:
    """Return the folder of the artifacts of a new experiment in a sqlite store."""
    return store.resolve().parent / ARTIFACTS / name


def local_path(location: str) -> Path | None:
    """Return the path of an artifact location on this machine, or None for a location elsewhere."""
    return Path(unquote(urlsplit(location).path)) if location.startswith("file:///") else None


def move_artifacts(store: Path) -> None:
    """Correct the paths of artifacts in a sqlite store that was moved, or copied, with its folder of artifacts.

    MLflow stores absolute paths and cannot change them. It would create the old folder again. Only experiments with a
    study are changed. Their artifacts are always in a folder beside the store. An experiment stays as it is if only
    the store was moved, so that its artifacts are still at the old place.
    """
    with closing(sqlite3.connect(store)) as opened, opened:
        if not opened.execute("select 1 from sqlite_master where name = 'experiments'").fetchone():
            return
        for experiment, location in opened.execute(OURS).fetchall():
            before = local_path(location)
            if before is None:
                continue
            after = artifact_folder(store, before.name)
            if before == after or before.parent.name != ARTIFACTS or (before.exists() and not after.exists()):
                continue
            for table, column in PATHS.items():
                opened.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) "
                    f"where experiment_id = ? and substr({column}, 1, ?) = ?",
                    (after.as_uri(), len(location) + 1, experiment, len(location), location),
                )


def count_runs(store: Path, parent: str) -> int:
    """Return the number of runs of a study in a sqlite store that were not deleted. Raises OSError, sqlite3.Error."""
    with closing(sqlite3.connect(f"{store.resolve(strict=True).as_uri()}?mode=ro", uri=True)) as opened:
        return int(opened.execute(RUNS, {"parent": parent}).fetchone()[0])
