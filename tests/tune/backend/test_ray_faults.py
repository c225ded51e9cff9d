"""Test failures of actors without Ray: a worker hangs, is killed, or gives a reason."""

import os
import signal
from types import SimpleNamespace

import pytest
import ray

from tune.backend import ray_faults
from tune.backend.cluster import kill_at
from tune.backend.ray_faults import Heartbeats, Processes, failure


class Actor:
    """Fake actor that answers `place` when asked for its host and process id. None means no answer yet."""

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
OWNER = "The actor is dead because its owner has died. Worker exit detail: Owner's node has crashed."
SHORT = "Task was killed due to the node running low on memory.\nMemory on the node was 15 GB / 15 GB"


@pytest.mark.parametrize(
    ("text", "outcome", "reason"),
    [
        (DIED, "failed", "its worker died: Worker unexpectedly exits with a connection error code 2"),
        (OWNER, "failed", f"its node was lost: {OWNER}"),
        (SHORT, "failed", "Ray killed its worker: the node was running low on memory"),
        ('  File "a.py", line 1\nZeroDivisionError: by zero', "infeasible", "ZeroDivisionError: by zero"),
        ('Traceback:\n  File "a.py"\nModuleNotFoundError: no x', "failed", "ModuleNotFoundError: no x"),
    ],
    ids=["died", "owner", "memory", "raised", "machine"],
)
def test_what_ray_says_of_a_failure_is_read_as_the_trials_or_the_machines_fault(text, outcome, reason):
    assert failure(text) == (outcome, {}, reason)


def test_the_pulse_counts_silence_only_while_somebody_looks():
    now = [0.0]
    heartbeats = Heartbeats(10.0, lambda: now[0])
    heartbeats.beat("a")
    for now[0] in (3.0, 6.0, 9.0):
        assert heartbeats.silent() == []
    heartbeats.beat("b")
    now[0] = 12.0
    assert heartbeats.silent() == ["a"]
    assert heartbeats.silent() == []  # each trial is returned only once
    now[0] = 1000.0  # the driver itself was stopped
    assert heartbeats.silent() == []
    now[0] = 1002.0
    assert heartbeats.silent() == []
    now[0] = 1003.0
    assert heartbeats.silent() == ["b"]
    heartbeats.beat("c")
    heartbeats.forget("c")
    now[0] = 1014.0
    assert heartbeats.silent() == []
