"""The command where a user has modules called like our packages: in the working directory and in PYTHONPATH."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from pagating_study import PACKAGES
from tests.studies import TINY, yaml_of
from tests.tune.helpers import typed
from tune.cli import ui

ROOT = Path(__file__).parents[3]
PAGATING = [sys.executable, "-P", "-c", "from pagating_study import main; main()"]  # the installed command
GATE = "import torch\n\n\ndef hard(x):\n    return torch.clamp(x / 6 + 0.5, 0.0, 1.0)\n"
TABLE = "arm,seed,loss\n" + "".join(
    f"{arm},{seed},{loss + 0.01 * seed + 0.001 * (seed * 7 % 5) * (arm == 'mine')}\n"
    for arm, loss in (("gelu", 3.0), ("mine", 2.9))
    for seed in range(6)
)


@pytest.fixture
def own(tmp_path):
    """Return a working directory with a study, its gate, a table, and modules called like ours that cannot be used."""
    for name in ("analysis.py", "tune.py"):
        (tmp_path / name).write_text(f"raise RuntimeError('imported the {name} of the user')\n")
    (tmp_path / "pagating").mkdir()
    (tmp_path / "pagating" / "__init__.py").write_text("raise RuntimeError('imported the pagating of the user')\n")
    (tmp_path / "gate.py").write_text(GATE)
    arms = {"linear-floor": None, "mine": {"gate": "gate.py:hard", "alpha": 0.5}}
    # with two cores per trial Ray starts no worker early
    text = yaml_of(TINY, arms=arms, search={"trials_per_arm": 1}, resources={"cpus": os.cpu_count()})
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "runs.csv").write_text(TABLE)
    return tmp_path


def called(folder, *words, program=PAGATING, **environment):
    """Run a program in a folder that is also the first of PYTHONPATH. Return the process that ended."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    command = [*program, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def outcomes(folder):
    """Return the outcome of every cell of the study."""
    return set(pd.read_parquet(folder / "studies" / "own" / "trials.parquet")["outcome"])


def test_the_command_is_the_one_that_finds_our_packages_first():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"pagating": "pagating_study:main"}
    assert project["entry-points"]["mlflow.app"] == {"pagating-study": "pagating_study:app"}


def test_a_table_is_decided_beside_own_modules(own):
    script = called(own, "runs.csv", "--baseline", "gelu", program=[sys.executable, "-m", "analysis.significance"])
    assert script.returncode == 1
    assert "imported the analysis.py of the user" in script.stderr  # the folder does hide our package from Python
    done = called(own, "significance", "runs.csv", "--baseline", "gelu", "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("mine,6,")
    assert "better" in done.stdout


def test_a_trial_is_refused_by_our_own_package_beside_own_modules(own):
    (own / "trial.json").write_text("{}")
    done = called(own, "train", "trial.json")
    assert (done.returncode, done.stderr) == (
        2,
        "trial.json: missing: corpus, model, lr, tokens, batch_tokens, seed\n",
    )


def test_a_module_of_the_user_that_is_not_called_like_ours_is_found(own):
    (own / "mine.py").write_text("VALUE = 5\n")
    program = [sys.executable, "-c", "import pagating_study, mine, tune.errors as e; print(mine.VALUE, e.__file__)"]
    assert called(own, program=program).stdout.split() == ["5", str(ROOT / "tune" / "errors.py")]


@pytest.mark.parametrize("guarded", [True, False])
def test_a_worker_on_a_node_takes_the_packages_that_came_with_the_job(own, guarded):
    """Ray puts each of `py_modules` into a folder of its own and searches the driver's working directory first."""
    came = own / "py_modules_files"
    for name in PACKAGES:
        (came / name / name).mkdir(parents=True)
        (came / name / name / "__init__.py").touch()
    (came / "guard").mkdir()
    shutil.copy(ROOT / "pagating_study.py", came / "guard")
    guard = "import pagating_study; pagating_study.guard_worker(); " if guarded else ""
    path = [str(own), *map(str, came.iterdir())]
    code = f"import sys; sys.path[:0] = {path}; {guard}import analysis, pagating, tune; print(tune.__file__)"
    done = called(own, program=[sys.executable, "-I", "-S", "-c", code])
    if guarded:
        assert done.stdout == f"{came / 'tune' / 'tune' / '__init__.py'}\n", done.stderr
    else:
        assert "imported the analysis.py of the user" in done.stderr


def test_the_server_of_mlflow_sees_no_module_of_the_working_directory(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(ui, "_serve", lambda command, environment: given.append((command, environment)) or 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://127.0.0.1:9/mlflow")
    assert typed(monkeypatch, capsys, "ui", "--output", tmp_path)[0] == 0
    ((command, environment),) = given
    assert command[1:5] == ["-P", "-m", "mlflow", "ui"]
    assert environment["PYTHONSAFEPATH"] == "1"  # for the processes that the server starts


@pytest.mark.slow
def test_a_study_is_planned_tried_and_run_beside_own_modules(own):
    for words in (("plan", "own.yaml"), ("try", "own.yaml")):
        done = called(own, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    done = called(own, "sweep", "own.yaml", "--tracking", "none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(own) == {"completed"}


@pytest.mark.slow
def test_a_cluster_whose_nodes_see_the_users_modules_runs_the_study(own):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = tempfile.mkdtemp(prefix="pg-")  # short, because Ray puts sockets there
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    quiet = {**loopback, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": kept, "PYTHONPATH": str(own)}
    start = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
    head = subprocess.Popen(
        [*start, f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"],
        cwd=own,
        env={**os.environ, **quiet},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < until
            time.sleep(0.2)
        done = called(own, "sweep", "own.yaml", "--tracking", "none", "--address", f"127.0.0.1:{port}", **loopback)
        assert done.returncode == 0, done.stdout + done.stderr
        assert outcomes(own) == {"completed"}
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(kept, ignore_errors=True)
