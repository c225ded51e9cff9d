"""Test where `pagating ui` listens, what it refuses in one line, and how it ends."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict
from importlib.util import find_spec

import pytest

from tests.studies import SMALL, study_of
from tests.tune.helpers import typed
from tune.cli import ui
from tune.run.ledger import Ledger
from tune.study.cell import Cell
from tune.study.files import dump

PAGATING = [sys.executable, "-m", "tune.cli"]


@pytest.fixture
def home(tmp_path, empty_store, monkeypatch):
    """Enter a folder with a store; return it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def busy():
    """Return a port in use."""
    with socket.socket() as used:
        used.bind((ui.LOOPBACK, 0))
        used.listen()
        yield used.getsockname()[1]


def served(monkeypatch, capsys, *words):
    """Call `pagating ui` up to the start of the server. Return its exit code, output, errors and server command."""
    called = []
    monkeypatch.setattr(ui, "_serve", lambda command, environment: called.append((command, environment)) or 0)
    code, out, err = typed(monkeypatch, capsys, "ui", *words)
    return code, out, err, called


def test_a_port_in_use_is_refused_if_it_was_asked_for_and_else_the_next_is_taken(home, busy, monkeypatch, capsys):
    code, out, err, called = served(monkeypatch, capsys, "--port", busy)
    assert (code, out, called) == (2, "", [])
    assert err.startswith(f"pagating: port {busy} of 127.0.0.1 is in use; --port ")
    assert err.endswith("is free\n")
    monkeypatch.setattr(ui, "PORT", busy)
    code, out, err, called = served(monkeypatch, capsys)
    port = int(called[0][0][-1])
    assert (code, err) == (0, "")
    assert busy < port < busy + ui.PORTS
    assert out == f"MLflow UI: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    assert called[0][1]["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{home / 'mlflow.db'}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "0"], "Invalid value for '--port': "),
        (["--port", "70000"], "Invalid value for '--port': "),
        (["--host", "203.0.113.9"], "--host '203.0.113.9': Cannot assign requested address; allowed: an IP address"),
        (["--host", "2001:db8::9"], "--host '2001:db8::9': Cannot assign requested address; allowed: an IP address"),
        (["--host", "example.org"], "--host 'example.org': allowed: localhost or an IP address of this machine"),
        (["--tracking", "http://h:5000"], "tracking 'http://h:5000': has a UI of its own; open it in a browser"),
        (["--tracking", "./mlruns"], "--tracking './mlruns': MLflow has ended its support for stores that are fold"),
        (["--tracking", "sqlite:///no.db"], "no.db: nothing was logged here yet; run a sweep first"),
        (["--tracking", "sqlite:///other.db"], "other.db: is the database of another program"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(home, monkeypatch, capsys, words, said):
    with sqlite3.connect(home / "other.db") as other:
        other.execute("create table x (y)")
    code, out, err, called = served(monkeypatch, capsys, *words)
    assert (code, out, called) == (2, "", [])
    assert said in err
    assert err.count("\n") == 1


def test_a_port_of_root_is_refused_for_others(home, monkeypatch, capsys):
    monkeypatch.setattr(ui, "_refusal", lambda host, port: ui.errno.EACCES)
    code, out, err, called = served(monkeypatch, capsys, "--port", "80")
    assert (code, out, called) == (2, "", [])
    assert err == "pagating: --port 80: only root may use it; allowed: 1024 to 65535\n"


@pytest.mark.parametrize(
    ("server", "sent", "code"),
    [
        ("import time; time.sleep(60)", [signal.SIGINT], 130),
        ("import time; time.sleep(60)", [signal.SIGTERM], 143),
        ("import signal, time; signal.signal(15, 0); time.sleep(60)", [signal.SIGINT, signal.SIGINT], 130),
        ("raise SystemExit(0)", [], 1),  # as MLflow does on a port in use
        ("raise SystemExit(3)", [], 1),
        ("import os; os.kill(os.getpid(), 9)", [], 1),
    ],
)
def test_it_ends_with_its_server_and_the_server_with_it(tmp_path, server, sent, code):
    begin = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    (tmp_path / "server.py").write_text(f"{begin}\n{server}")
    command = [sys.executable, str(tmp_path / "server.py")]
    call = f"import os, sys; from tune.cli.ui import _serve; sys.exit(_serve({command!r}, dict(os.environ)))"
    with subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.PIPE, text=True) as process:
        for number in sent:
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.02)
            time.sleep(0.3)
            process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert ("the MLflow UI ended by itself" in err) == (code == 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_the_real_server_answers_and_ctrl_c_ends_all_of_it(home, busy):
    with socket.socket() as free:
        free.bind((ui.LOOPBACK, 0))
        port = free.getsockname()[1]
    with subprocess.Popen([*PAGATING, "ui", "--port", str(port)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == f"MLflow UI: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.25)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)


FAKE = """
import json
from optuna import get_all_study_summaries


def run_server(storage, host, port):
    names = sorted(each.study_name for each in get_all_study_summaries(storage))
    print(json.dumps([names, host, port]), flush=True)
"""


def dashboard(home, *words, path=""):
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [*PAGATING, "dashboard", *words]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


def test_the_dashboard_gets_the_searches_of_a_study_and_an_address(tmp_path):
    if find_spec("optuna_dashboard"):
        pytest.skip("optuna-dashboard is installed")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "optuna_dashboard.py").write_text(FAKE)
    for name, stages in (("one", "search"), ("two", "search"), ("bare", "confirm")):
        folder = tmp_path / "studies" / name
        folder.mkdir(parents=True)
        (folder / "study.yaml").write_text(dump(study_of(SMALL, name=name)))
        ledger = Ledger(folder / "ledger.jsonl")
        cell = Cell(stages, "gelu", 0, 1, {"lr": 0.01}, "key")
        ledger.append("suggested", **asdict(cell))
        ledger.close()
    missing = dashboard(tmp_path, "one")
    said = "pagating: dashboard: needs the package optuna-dashboard; run `pip install optuna-dashboard`\n"
    assert (missing.returncode, missing.stdout, missing.stderr) == (2, "", said)
    done = dashboard(tmp_path, "--port", "18080", path=tmp_path / "fake")
    assert done.returncode == 130, done.stderr
    first, called = done.stdout.splitlines()
    assert first == "Optuna dashboard: http://127.0.0.1:18080/ (Ctrl-C ends it)"
    assert json.loads(called) == [["one: gelu", "two: gelu"], "127.0.0.1", 18080]
    bare = dashboard(tmp_path, "bare", path=tmp_path / "fake")
    assert (bare.returncode, bare.stderr) == (2, "pagating: bare: has no search trials yet\n")
