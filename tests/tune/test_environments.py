"""Tests of hostile environments, each a real sweep in a fresh process: limits, networks, folders, lost parts of Ray.

The tests of control groups and network namespaces need root.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.studies import STEADY, TINY, yaml_of
from tune.run import ledger

ROOT = Path(__file__).parents[2]
CPU = Path("/sys/fs/cgroup/cpu")
TIMES = ("seconds", "tokens_per_second", "peak_rss_mb")
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def command(tmp_path, *before, base=TINY, **changes):
    """Return a command that runs a small study, with words before it."""
    (tmp_path / "hostile.yaml").write_text(yaml_of(base, **changes))
    sweep = [sys.executable, "-m", "tune.cli", "sweep", str(tmp_path / "hostile.yaml")]
    return [*before, *sweep, "--output", str(tmp_path / "studies ö"), "--tracking", "none"]


def settings(cache, **env):
    given = {**os.environ, "PAGATING_CACHE": str(cache), "PYTHONUNBUFFERED": "1", **env}
    return {name: value for name, value in given.items() if value is not None}


def ran(tmp_path, cache, *before, env=None, limit=800, **changes):
    """Run a small study to its end. Return its exit code, its lines and its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        command(tmp_path, *before, **changes), cwd=ROOT, env=settings(cache, **(env or {})), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, check=False, encoding="utf-8",
    )  # fmt: skip
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout.splitlines(), time.monotonic() - began


def finals(tmp_path):
    """Return outcome, result and curve of each cell, without clocks."""
    found = ledger.records(ledger.read(tmp_path / "studies ö" / "hostile" / "ledger.jsonl"))
    clean = lambda row: {name: value for name, value in row.items() if name not in TIMES}  # noqa: E731
    return {key: (one.outcome, clean(one.final), [clean(row) for row in one.curve]) for key, one in found.items()}


# --- parts of Ray that are lost --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ran(folder, cache, base=STEADY, fixed={"tokens": 102_400})[0] == 0
    return finals(folder)


def part(driver, name):
    """Return a process of a driver's Ray by its name."""
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in (process.name(), (process.cmdline() or [""])[0]):
                return process
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "signum", "ends"),
    [
        ("raylet", signal.SIGKILL, True),
        ("raylet", signal.SIGTERM, True),
        ("gcs_server", signal.SIGKILL, True),
        ("gcs_server", signal.SIGTERM, True),
        ("gcs_server", signal.SIGSTOP, True),
        ("ray::DashboardAgent", signal.SIGKILL, None),
        ("ray::RuntimeEnvAgent", signal.SIGKILL, None),
    ],
)
def test_a_lost_part_of_ray_is_said_and_the_study_goes_on(tmp_path, cache, undisturbed, name, signum, ends):
    """`ends`: Ray is lost with this part. None: with some versions of Ray."""
    running = subprocess.Popen(
        command(tmp_path, base=STEADY, fixed={"tokens": 102_400}), cwd=ROOT, env=settings(cache), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
    )  # fmt: skip
    struck, said, lines = None, None, []
    for line in running.stdout:
        lines.append(line)
        if line.startswith("[3/") and (found := part(running.pid, name)):
            struck = time.monotonic()
            found.send_signal(signum)
        if struck and said is None and line.startswith("Warning: Ray"):
            said = time.monotonic()
    assert running.wait(800) == 0, lines
    assert struck, lines
    if ends:
        assert said, lines
        assert said - struck < 30
        assert any("Ray is started again, and the trials go on from their checkpoints" in line for line in lines)
    assert finals(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("times", range(3))
def test_references_that_a_thread_frees_do_not_end_the_process(times):
    """Another thread frees thousands of references while Ray shuts down. Ray's own shutdown ends such a process."""
    code = """
import threading, time, ray
from tune.backend.ray_private import shut_down
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
refs = [ray.put(number) for number in range(3000)]
def free():
    while refs:
        refs.pop()
        time.sleep(0.0002)
threading.Thread(target=free, daemon=True).start()
shut_down()
print("verdict")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "verdict\n"), done.stderr


# --- limits of the machine -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("-v 3000000", "pagating: ulimit -v 3000000: Ray cannot start with this limit on memory addresses"),
        ("-f 100", "pagating: ulimit -f 100: Ray cannot start with this limit on the size of a file"),
        ("-n 64", "pagating: ulimit -n 64: Ray cannot start with this limit on open files"),
    ],
)
def test_a_limit_is_named_before_ray_starts(tmp_path, cache, limit, said):
    code, lines, _ = ran(tmp_path, cache, "bash", "-c", f'ulimit {limit}; exec "$@"', "bash")
    assert code == 1
    assert lines[-1].startswith(said)
    assert len(lines) == 2
    assert not (tmp_path / "studies ö").exists()


@root
@pytest.mark.slow
def test_a_namespace_without_loopback_is_named(tmp_path, cache):
    code, lines, seconds = ran(tmp_path, cache, "unshare", "-n")
    assert code == 1
    assert lines[-1].startswith("pagating: no connection to 127.0.0.1 (Network is unreachable): ")
    assert seconds < 60


@root
@pytest.mark.slow
@pytest.mark.skipif(not CPU.is_dir(), reason="needs control groups of version 1")
@pytest.mark.parametrize(("quota", "slots"), [(50_000, 1), (150_000, 1)])
def test_a_quota_of_cores_sets_the_slots(tmp_path, cache, quota, slots):
    group = CPU / f"pagating-{os.getpid()}-{quota}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text(str(quota))
        enter = f'echo $BASHPID > {group}/cgroup.procs; exec "$@"'
        code, lines, _ = ran(tmp_path, cache, "bash", "-c", enter, "bash")
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):  # Ray's agents leave some seconds later
                group.rmdir()
                break
            time.sleep(1)
    assert code == 0, lines
    assert f'"slots": {slots}' in (tmp_path / "studies ö" / "hostile" / "provenance.json").read_text()


# --- folders, locales, variables -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mit Ü", "with space", "x" * 80, "gone", "file"])
def test_any_temporary_folder_works(tmp_path, cache, name):
    folder = tmp_path / name
    folder.touch() if name == "file" else None if name == "gone" else folder.mkdir()
    code, lines, _ = ran(tmp_path, cache, env={"TMPDIR": str(folder)})
    assert code == 0, lines
    assert any(line.startswith(f"Warning: TMPDIR={folder}: Ray cannot use it for its files") for line in lines)


HOSTILE = {
    "C locale": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None},
    "POSIX locale": {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "no HOME": {"HOME": None, "XDG_CACHE_HOME": None},
    "read-only HOME": {"HOME": "/proc", "XDG_CACHE_HOME": None},
    "Ray": {"RAY_ADDRESS": "10.255.255.1:6379", "RAY_NAMESPACE": "other", "RAY_CHDIR_TO_TRIAL_DIR": "1"},
    "MLflow": {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_RUN_ID": "x", "MLFLOW_EXPERIMENT_NAME": "other"},
    "proxies": dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
    "devices": {"CUDA_VISIBLE_DEVICES": "7", "OMP_NUM_THREADS": "64", "MKL_NUM_THREADS": "x", "OMP_PROC_BIND": "true"},
}


@pytest.fixture(scope="module")
def usual(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    assert ran(folder, cache)[0] == 0
    return finals(folder)


@pytest.mark.slow
@pytest.mark.parametrize("env", HOSTILE.values(), ids=HOSTILE)
def test_the_users_own_variables_change_no_result(tmp_path, cache, usual, env):
    code, lines, _ = ran(tmp_path, cache, env=env, question="Hält es? Ü → ∞")
    assert code == 0, lines
    assert lines[0] in ("hostile: Hält es? Ü → ∞", "hostile: H\\xe4lt es? \\xdc \\u2192 \\u221e")
    assert finals(tmp_path) == usual
