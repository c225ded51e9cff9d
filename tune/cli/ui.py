"""Commands `pagating ui` and `pagating dashboard`: MLflow's pages of the logged studies, Optuna's of their searches."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.io.exits import Exit
from tune.cli.common import INTERRUPTED, LOOPBACK, Output, begun_folder, complete_study, studies_in

if TYPE_CHECKING:
    from tune.study.study import Study

PORT = 5000  # default
DASHBOARD = 8080  # default port of `pagating dashboard`
PORTS = 100  # ports that are tried if the first one is in use


Host = Annotated[str, typer.Option(help="Address to listen on. Any other than loopback lets others in.")]


def ui(
    output: Output = Path("studies"),
    tracking: Annotated[str | None, typer.Option(help="MLflow tracking URI.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"Port to listen on. Default: {PORT}, or the next free one.")
    ] = None,
    host: Host = LOOPBACK,
) -> None:
    """Open the MLflow UI of the logged studies, by default on this machine's loopback address only."""
    import sqlite3

    from analysis.io.text import redact
    from tune.errors import StudyError
    from tune.tracking.check import check_file
    from tune.tracking.store import move_artifacts, sqlite_file, tracking_uri

    uri = tracking_uri(tracking, None, output)
    if uri == "none":
        raise StudyError("tracking 'none': nothing is logged; allowed: the tracking URI of a sweep")
    if uri.startswith(("http://", "https://", "databricks")):
        raise StudyError(f"tracking '{redact(uri)}': has a UI of its own; open it in a browser")
    open_to_others = _is_open(host)
    if (path := sqlite_file(uri)) is not None:
        if not path.exists():
            raise StudyError(f"{uri}: nothing was logged here yet; run a sweep first")
        check_file(path, write=False)
        with contextlib.suppress(sqlite3.Error):  # read-only, or a sweep writes to it: then `sync` does it
            move_artifacts(path)
    port = _free_port(host, port, PORT)
    # no jobs, no telemetry, no warnings of MLflow's libraries, and no modules of the working directory
    quiet = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
        "PYTHONSAFEPATH": "1",
    }
    # the URI is not passed as an argument, because a list of processes would show its password
    environment = {**quiet, **os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    _announce("MLflow UI", host, port, open_to_others, "read, change and delete everything that was logged")
    server = [sys.executable, "-P", "-m", "mlflow", "ui", "--app-name", "pagating-study", "--workers", "1"]
    quietly = ["--uvicorn-opts", "--log-level warning"]  # no line per request
    raise typer.Exit(_serve([*server, *quietly, "--host", host, "--port", str(port)], environment))


def dashboard(
    study: Annotated[
        str | None, typer.Argument(help="Study by name or path. Default: all studies.", autocompletion=complete_study)
    ] = None,
    output: Output = Path("studies"),
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help=f"Port to listen on. Default: {DASHBOARD}, or the next free one."),
    ] = None,
    host: Host = LOOPBACK,
) -> None:
    """Open optuna-dashboard, if it is installed, on the searches of a study: one study of Optuna per arm.

    It shows a copy of the ledger as it is at the start. Nothing that is changed in it reaches the study.
    """
    from importlib.util import find_spec

    from tune.errors import StudyError
    from tune.study.files import LEDGER, load

    if find_spec("optuna_dashboard") is None:
        raise StudyError("dashboard: needs the package optuna-dashboard; run `pip install optuna-dashboard`")
    open_to_others = _is_open(host)
    names = [study] if study else [name for name in studies_in(output) if (output / name / LEDGER).is_file()]
    folders = [begun_folder(name, output) for name in names]
    from tune.decide.storage import in_memory
    from tune.run import ledger

    found = [(load(each / "study.yaml"), ledger.records(ledger.read(each / LEDGER)).values()) for each in folders]
    if not any(record.cell.stage == "search" for _, records in found for record in records):
        raise StudyError(f"{study or output}: has no search trials yet")
    import optuna_dashboard

    port = _free_port(host, port, DASHBOARD)
    _announce("Optuna dashboard", host, port, open_to_others, "read the searches")
    optuna_dashboard.run_server(in_memory(found), host=host, port=port)  # until Ctrl-C
    raise typer.Exit(INTERRUPTED)


def _is_open(host: str) -> bool:
    """Return True if other machines reach an address. Raises StudyError if it is none."""
    from ipaddress import ip_address

    from tune.errors import StudyError

    try:
        return host != "localhost" and not ip_address(host).is_loopback
    except ValueError:
        raise StudyError(f"--host '{host}': allowed: localhost or an IP address of this machine") from None


def _announce(what: str, host: str, port: int, open_to_others: bool, can: str) -> None:
    """Print the address of a server, and a warning if other machines reach it."""
    typer.echo(f"{what}: http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)")
    if open_to_others:
        typer.echo(
            f"Warning: with --host {host} anyone who reaches port {port} of this machine can {can}, without a password."
            f" To use it from another machine, keep the default and run: ssh -L {port}:{LOOPBACK}:{port} THIS_MACHINE",
            err=True,
        )
    sys.stdout.flush()


def _free_port(host: str, wanted: int | None, default: int) -> int:
    """Return the wanted port, or the first free one from the default on if none is wanted.

    Raises:
        StudyError: The server could not listen there.
    """
    from tune.errors import StudyError

    first = wanted or default
    ports = range(first, min(first + PORTS, 1 << 16))
    refusal = _refusal(host, first)
    if refusal == errno.EADDRINUSE:
        free = next((port for port in ports[1:] if not _refusal(host, port)), None)
        if free and not wanted:
            return free
        raise StudyError(f"port {first} of {host} is in use{f'; --port {free} is free' if free else ''}")
    if refusal in (errno.EACCES, errno.EPERM):
        raise StudyError(f"--port {first}: only root may use it; allowed: 1024 to 65535")
    if refusal:
        raise StudyError(f"--host '{host}': {os.strerror(refusal)}; allowed: an IP address of this machine")
    return first


def _refusal(host: str, port: int) -> int:
    """Return the number of the error with which the system refuses to listen at an address, or 0."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL
    return 0


def _serve(command: list[str], environment: dict[str, str]) -> int:
    """Run the server until a signal ends it or it ends by itself; return the exit code."""
    caught: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def end(number: int, _: object) -> None:
        caught.append(number)
        for server in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM if len(caught) == 1 else signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    started.append(server)
    if caught:  # before there was a server
        server.kill()
    code = server.wait()
    if caught:
        return 128 + caught[0]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    typer.echo(f"pagating: the MLflow UI ended by itself (exit code {code}); its last lines say why", err=True)
    return Exit.COULD_NOT


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
