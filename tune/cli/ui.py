"""Command `pagating ui`: the MLflow UI of the logged studies."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune.cli.common import LOOPBACK, Output

if TYPE_CHECKING:
    from tune.study.study import Study


def ui(
    output: Output = Path("studies"),
    tracking: Annotated[str | None, typer.Option(help="MLflow tracking URI.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on. Any other than loopback lets others in.")] = LOOPBACK,
) -> None:
    """Open the MLflow UI of the logged studies, by default on this machine's loopback address only."""
    from ipaddress import ip_address

    from tune.errors import StudyError
    from tune.tracking.store import sqlite_file, tracking_uri

    uri = tracking_uri(tracking, None, output)
    if uri == "none":
        raise StudyError("tracking 'none': nothing is logged; allowed: the tracking URI of a sweep")
    try:
        open_to_others = host != "localhost" and not ip_address(host).is_loopback
    except ValueError:
        raise StudyError(f"--host '{host}': allowed: localhost or an IP address of this machine") from None
    path = sqlite_file(uri)
    if path is not None and not path.exists():
        raise StudyError(f"{uri}: nothing was logged here yet; run a sweep first")
    # no jobs, no telemetry and no warnings of MLflow's libraries
    quiet = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
        "PYTHONSAFEPATH": "1",  # for the server's workers: no module of the working directory
    }
    # the URI is not passed as an argument, because a list of processes would show its password
    environment = {**quiet, **os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    shown = f"[{host}]" if ":" in host else host
    page = f"http://{shown}:{port}/"
    typer.echo(f"MLflow UI: {page} (Ctrl-C ends it)")
    if open_to_others:
        typer.echo(
            f"Warning: with --host {host} anyone who reaches port {port} of this machine can read, change and delete "
            "everything that was logged, without a password. To use it from another machine, keep the default and run: "
            f"ssh -L {port}:{LOOPBACK}:{port} THIS_MACHINE",
            err=True,
        )
    server = [sys.executable, "-P", "-m", "mlflow", "ui", "--app-name", "pagating-study", "--workers", "1"]
    os.execve(sys.executable, [*server, "--host", host, "--port", str(port)], environment)


def ui_command(uri: str) -> str:
    """Return the command or the address that shows the runs of a tracking URI. A password in the URI is removed."""
    import shlex

    from analysis.io.text import redact
    from tune.tracking.store import sqlite_uri

    if uri.startswith(("http://", "https://")):
        return redact(uri)
    if uri == sqlite_uri(Path("mlflow.db").resolve()):
        return "make ui" if "MAKELEVEL" in os.environ else "pagating ui"
    return f"pagating ui --tracking {shlex.quote(redact(uri))}"


def browse(study: Study, output: Path) -> str:
    """Return `ui_command` of a study in a folder of studies, or nothing if its runs are in no store."""
    from tune.errors import StudyError
    from tune.tracking.store import tracking_uri

    try:
        uri = tracking_uri(None, study.tracking, output)
    except StudyError:  # a resolved study has no credentials
        uri = study.tracking or "none"
    return "" if uri == "none" else ui_command(uri)
