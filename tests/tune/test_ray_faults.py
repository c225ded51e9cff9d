"""How Ray and its actors fail, without Ray: it does not come up, a worker is silent, is ended, says why."""

import os
import pwd
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from tune import ray_faults, ray_start
from tune.cluster import kill_at
from tune.ray_faults import Processes, Pulse, failure
from tune.ray_start import started
from tune.study import StudyError, load
from tune.study_run import StudyStopped

SMOKE = load(Path(__file__).parents[2] / "configs" / "smoke.yaml")


@pytest.mark.parametrize(
    ("problem", "times", "said"),
    [
        (Exception("The current node timed out during startup."), 2, None),
        (ConnectionError("no answer"), 3, r"Ray did not start \(3 attempts; a busy machine\?\): no answer"),
    ],
)
def test_a_ray_that_does_not_come_up_is_tried_again_then_said_in_a_line(monkeypatch, problem, times, said):
    calls = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def init(**settings):
        assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"  # Ray hands it on to its workers
        calls.append(settings["num_cpus"])
        if len(calls) <= times:
            raise problem

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(StudyStopped, match=said) if said else nullcontext(), started(2, SMOKE, None):
        assert calls == [2, 2, 2]
    assert calls == [2, 2, 2]


@pytest.fixture
def fake_ray(monkeypatch):
    """What is asked of Ray, in order; `init` and `shutdown` do nothing else."""
    asked = []
    monkeypatch.setattr(ray, "init", lambda **settings: asked.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: asked.append("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return asked


def test_what_is_done_beside_the_start_of_ray_does_not_wait_for_it(fake_ray, monkeypatch):
    looked = threading.Event()
    monkeypatch.setattr(ray, "init", lambda **settings: fake_ray.append(looked.wait(60)))
    with started(2, SMOKE, None, beside=looked.set):
        assert fake_ray == [True]  # the other thread had done its part while Ray started
    assert fake_ray == [True, "shutdown"]


def test_what_goes_wrong_beside_the_start_of_ray_ends_that_ray(fake_ray):
    def look():
        raise StudyError("the disk is full")

    with pytest.raises(StudyError, match="the disk is full"), started(2, SMOKE, None, beside=look):
        fake_ray.append("trained")
    assert fake_ray == ["init", "shutdown"]


def test_a_ray_that_is_asked_for_nonsense_is_not_tried_again(monkeypatch):
    calls = []

    def init(**settings):
        calls.append(1)
        raise ValueError("num_cpus must not be negative")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="must not be negative"), started(2, SMOKE, None):
        pass
    assert calls == [1]


@pytest.mark.parametrize(
    ("home", "entry", "given"),
    [
        ("/proc", "/proc", True),
        ("/nowhere", "/nowhere", True),
        ("", "", False),
        (None, "", False),
        (None, "/nowhere", True),
        (None, None, True),
    ],
    ids=["read-only", "not there", "writable", "unset", "unset, not there", "unset, of no known user"],
)
def test_ray_gets_a_token_where_home_cannot_keep_one(tmp_path, monkeypatch, home, entry, given):
    """`home`: HOME, None for none; `entry`: what the machine's list of users has, None for no entry; "": writable."""

    def user(uid):
        if entry is None:
            raise KeyError(f"getpwuid(): uid not found: {uid}")
        return SimpleNamespace(pw_dir=entry or str(tmp_path))

    monkeypatch.setattr(pwd, "getpwuid", user)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home or str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    ray_start._private_token()
    assert (len(os.environ.pop("RAY_AUTH_TOKEN", "")) == 64) == given


class Actor:
    """Stands for an actor that was asked where it runs and answers `place`; None: it has not answered."""

    def __init__(self, place):
        self.place, self.get_current_ip_pid = place, self

    def remote(self):
        return self


def died():
    raise ray.exceptions.RayActorError()


def gone():
    raise ProcessLookupError


@pytest.mark.parametrize(
    ("answer", "local", "expected"),
    [
        (("10.0.0.2", 77), None, [("there", "10.0.0.2", 77), "ray"]),
        (("10.0.0.1", 77), None, [("here", 77, signal.SIGKILL), "ray"]),
        (("10.0.0.1", 77), gone, [("here", 77, signal.SIGKILL), "ray"]),
        (died, None, ["ray"]),
        (None, None, ["ray"]),
    ],
    ids=["on another node", "here", "gone meanwhile", "died meanwhile", "never answered"],
)
def test_a_hung_worker_is_ended_where_it_runs(monkeypatch, answer, local, expected):
    done = []
    actor = Actor(answer)
    trial = SimpleNamespace(temporary_state=SimpleNamespace(ray_actor=actor))
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([a for a in asked if a.place], []))
    monkeypatch.setattr(ray, "get", lambda asked: asked.place() if callable(asked.place) else asked.place)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(ray, "kill", lambda ended: done.append("ray" if ended is actor else ended))
    monkeypatch.setattr(ray_faults, "kill_at", lambda host, pid: done.append(("there", host, pid)))
    monkeypatch.setattr(ray_faults.os, "kill", lambda *given: (done.append(("here", *given)), local and local()))
    processes = Processes()
    processes.ask(trial)
    processes.kill(trial)
    assert done == expected


def test_a_process_is_ended_by_a_task_on_its_own_node_and_on_no_lost_one(monkeypatch):
    sent = []

    class Task:
        def __init__(self, function):
            self.function = function

        def options(self, scheduling_strategy):
            self.node = scheduling_strategy.node_id
            return self

        def remote(self, *arguments):
            sent.append((self.function, self.node, *arguments))

    nodes = [("a" * 56, "10.0.0.1", True), ("b" * 56, "10.0.0.2", False), ("c" * 56, "10.0.0.2", True)]
    listed = [{"NodeID": node, "NodeManagerAddress": address, "Alive": lives} for node, address, lives in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: listed)
    monkeypatch.setattr(ray, "remote", lambda **needs: Task)
    kill_at("10.0.0.2", 77)
    kill_at("10.0.0.9", 78)  # no such node
    assert sent == [(os.kill, "c" * 56, 77, signal.SIGKILL)]


DIED = (
    "The actor died unexpectedly before finishing this task.\nThe actor is dead because its worker process has died. "
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End "
    "of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage."
)
SHORT = "Task was killed due to the node running low on memory.\nMemory on the node was 15 GB / 15 GB"


@pytest.mark.parametrize(
    ("text", "outcome", "reason"),
    [
        (DIED, "failed", "its worker died: Worker unexpectedly exits with a connection error code 2"),
        (SHORT, "failed", "its worker was ended by Ray: the node was running low on memory"),
        ('  File "a.py", line 1\nZeroDivisionError: by zero', "infeasible", "ZeroDivisionError: by zero"),
        ('Traceback:\n  File "a.py"\nModuleNotFoundError: no x', "failed", "ModuleNotFoundError: no x"),
    ],
    ids=["died", "memory", "raised", "machine"],
)
def test_what_ray_says_of_a_failure_is_read_as_the_trials_or_the_machines_fault(text, outcome, reason):
    assert failure(text) == (outcome, {}, reason)


def test_the_pulse_counts_silence_only_while_somebody_looks():
    now = [0.0]
    pulse = Pulse(10.0, lambda: now[0])
    pulse.beat("a")
    for now[0] in (3.0, 6.0, 9.0):
        assert pulse.silent() == []
    pulse.beat("b")
    now[0] = 12.0
    assert pulse.silent() == ["a"]
    assert pulse.silent() == []  # told once
    now[0] = 1000.0  # the driver itself was stopped
    assert pulse.silent() == []
    now[0] = 1002.0
    assert pulse.silent() == []
    now[0] = 1003.0
    assert pulse.silent() == ["b"]
    pulse.beat("c")
    pulse.forget("c")
    now[0] = 1014.0
    assert pulse.silent() == []
