"""Check the MLflow store of a study before anything is trained."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from analysis.io.text import one_line, redact
from tune.errors import StudyError
from tune.tracking.store import sqlite_file

PATIENCE = 10.0  # seconds for a server's answer
USUAL = {"MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY"}  # text, or set by us
ELSE = "name another store with --tracking"


def check_store(uri: str) -> str | None:
    """Raise StudyError if a store can never take the runs of a study.

    Args:
        uri: Tracking URI, from `tracking_uri`.

    Returns:
        None, or the reason why the store cannot be used now, on one line. It may be back later.
    """
    _check_settings()
    if (path := sqlite_file(uri)) is not None:
        return check_file(path)
    if uri.startswith(("http://", "https://")):
        return _check_server(uri)
    check = _check_databricks if uri.startswith("databricks") else _check_driver
    check(uri)
    return None


def _check_settings() -> None:
    """Raise StudyError if MLflow cannot read a variable of the environment, which it would say only later."""
    given = [name for name in os.environ if name.startswith("MLFLOW_") and name not in USUAL]
    if not given:
        return  # the import takes seconds
    try:
        from mlflow import environment_variables

        for name in given:
            if (variable := getattr(environment_variables, name, None)) is not None:
                variable.get()
    except ValueError as error:
        raise StudyError(
            f"MLflow cannot use the environment ({', '.join(sorted(given))}): {one_line(str(error), 200)}; unset or "
            "correct the variable"
        ) from None


def check_file(path: Path, write: bool = True) -> str | None:
    """Do as `check_store` for the file of a sqlite store. With `write` false, the file is only read."""
    place = next(each for each in (path, *path.parents) if each.exists())
    if path.is_dir():
        raise StudyError(f"{path}: is a folder, not an MLflow database; {ELSE}")
    if place != path and not place.is_dir():
        raise StudyError(f"{path}: {place} is not a folder; {ELSE}")
    for each in {place, path.parent if path.exists() else place}:
        if write and not os.access(each, os.W_OK):
            raise StudyError(f"{path}: {each} cannot be written (read-only, or owned by another user); {ELSE}")
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", timeout=1.0, uri=True)) as store:
            tables = {name for (name,) in store.execute("select name from sqlite_master where type = 'table'")}
            versions = [row[0] for row in store.execute("select * from alembic_version")] if "runs" in tables else []
    except sqlite3.DatabaseError as error:
        if "locked" in str(error) or "busy" in str(error):
            return str(error)
        raise StudyError(f"{path}: is no MLflow database ({error}); {ELSE}, or move the file away") from None
    if tables and "experiments" not in tables:
        raise StudyError(f"{path}: is the database of another program; {ELSE}")
    if versions and versions != [newest := _newest_schema()]:
        if versions[0] in _schemas():
            raise StudyError(
                f"{path}: was written by an older MLflow (schema {versions[0]}, now {newest}); make a copy, then run "
                f"`mlflow db upgrade sqlite:///{path}`; or {ELSE}"
            )
        raise StudyError(
            f"{path}: was written by a newer MLflow (schema {versions[0]}, here {newest}); install that one, or {ELSE}"
        )
    return None


def _schemas() -> dict[str, str]:
    """Return the schemas that the installed MLflow knows, each with the one before it. This does not import MLflow."""
    spec = find_spec("mlflow")
    folder = Path(str(spec and spec.origin)).parent / "store" / "db_migrations" / "versions"
    found = {}
    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        own = re.search(r"^revision\b.*?=\s*['\"](\w+)", text, re.MULTILINE)
        before = re.search(r"^down_revision\b.*?=\s*['\"](\w+)", text, re.MULTILINE)
        if own:
            found[own[1]] = before[1] if before else ""
    return found


def _newest_schema() -> str:
    known = _schemas()
    return next(each for each in known if each not in known.values())


def _check_server(uri: str) -> str | None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request
    from requests.exceptions import RequestException

    where = redact(uri)
    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            params={"max_results": 1},
            max_retries=0,
            timeout=PATIENCE,
            raise_on_status=False,
        )
        content = answer.json() if answer.status_code == 200 else None
    except (MlflowException, RequestException) as error:
        if isinstance(error, ValueError):  # the answer was no JSON
            content = None
        else:
            reason = str(error.__cause__ or error)
            known = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(timed out|certificate[^'\")]+)", reason)
            return one_line(redact((known[1] or known[2]) if known else reason), 200)
    if answer.status_code in (401, 403):
        raise StudyError(
            f"{where}: the server wants a login (HTTP {answer.status_code}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if answer.status_code >= 500 or answer.status_code in (408, 429):
        return f"HTTP {answer.status_code}"
    if not isinstance(content, dict):
        raise StudyError(f"{where}: answers (HTTP {answer.status_code}), but is no MLflow server; {ELSE}")
    return None


def _check_databricks(uri: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.databricks_utils import get_databricks_host_creds

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    try:
        get_databricks_host_creds(uri)
    except MlflowException:
        raise StudyError(
            f"{uri}: this machine has no login for it; set DATABRICKS_HOST and DATABRICKS_TOKEN, or a profile in "
            f"~/.databrickscfg; or {ELSE}"
        ) from None


def _check_driver(uri: str) -> None:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        raise StudyError(f"{redact(uri)}: needs the Python package {error.name}, which is missing; or {ELSE}") from None
    except ArgumentError as error:  # NoSuchModuleError is one
        raise StudyError(f"{redact(uri)}: {one_line(redact(str(error)), 200)}; {ELSE}") from None
