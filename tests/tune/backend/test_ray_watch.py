"""Test the watcher of Ray and the announcements of a wait, on fake clocks."""

import signal
import socket
import subprocess
import threading
import time

import psutil
import pytest

from tune.backend import ray_watch
from tune.backend.ray_watch import OwnRay, RayWatch, Reach, Waiting, announced
from tune.errors import StudyStopped


@pytest.fixture
def part():
    """Return a process that stands for a part of Ray."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_process_of_ray_that_ended_is_a_loss_and_said_once(monkeypatch, part):
    monkeypatch.setattr(ray_watch, "SURE_SECONDS", 0.0)
    losses = []
    watch = RayWatch(OwnRay(lambda: [("scheduler (raylet)", part)]), losses.append)
    assert not watch.look()
    part.kill()
    part.wait()
    assert watch.look()
    assert watch.look()
    assert losses == ["Ray's scheduler (raylet) ended (exit code -9)"]


def test_a_process_of_ray_that_is_stopped_for_long_is_a_loss(part):
    now = [0.0]
    lost = OwnRay(lambda: [("server (gcs_server)", part)], lambda: now[0])

    def signalled(signum, status):
        part.send_signal(signum)
        deadline = time.monotonic() + 10
        while (psutil.Process(part.pid).status() == psutil.STATUS_STOPPED) != status:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    signalled(signal.SIGSTOP, True)
    assert lost() == []
    now[0] = 19.0
    assert lost() == []
    signalled(signal.SIGCONT, False)
    assert lost() == []  # a user stops and continues the whole command
    signalled(signal.SIGSTOP, True)
    now[0] = 30.0
    assert lost() == []
    now[0] = 51.0
    assert lost() == ["Ray's server (gcs_server) is stopped"]


def test_the_watcher_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 0.01)
    seen = threading.Event()
    with RayWatch(lambda: seen.set() or [], lambda reason: None) as watch:
        assert seen.wait(10)
    assert not watch._thread.is_alive()


def test_only_a_wait_that_lasts_is_announced(monkeypatch):
    monkeypatch.setattr(ray_watch, "ANNOUNCE_SECONDS", 0.05)
    said = []
    with announced(said.append, "x is not there yet", "x is there"):
        pass
    time.sleep(0.1)
    assert said == []
    with announced(said.append, "x is not there yet", "x is there"):
        time.sleep(0.2)
    assert said == ["x is not there yet", "x is there, after 0 s."]

    def fail():
        time.sleep(0.2)
        raise KeyError

    with pytest.raises(KeyError), announced(said.append, "y is not there yet", "y is there"):
        fail()
    assert said[2:] == ["y is not there yet"]


def test_a_server_that_is_gone_for_longer_than_the_patience_is_lost():
    now = [0.0]
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = Reach("the cluster at 'head:6379'", f"127.0.0.1:{server.getsockname()[1]}", 25.0, lambda: now[0])
        for now[0] in range(0, 60, 4):
            assert reach() == []
    for now[0] in range(60, 80, 4):
        assert reach() == []
    now[0] = 90.0
    assert reach() == ["the cluster at 'head:6379' is not reached any more"]


def test_a_wait_of_cells_is_said_once_and_its_end_too():
    now, said = [0.0], []
    waiting = Waiting(60.0, said.append, lambda: now[0])
    for now[0], waits in [(0, True), (19, True), (20, False), (21, True), (40, True), (41, True), (50, True)]:
        waiting.look(waits, slots=2)
    worker = "The next trials wait for a worker to start, which takes longer on a busy machine."
    assert said == [f"{worker} The study gives it up to 1 min."]
    for now[0], waits in [(55, False), (56, False), (60, True), (90, True)]:
        waiting.look(waits, slots=0)
    assert said[1:] == [
        "Trials run, after 34 s.",
        "The next trials wait for a node that can run one. The study gives it up to 1 min.",
    ]
    now[0] = 121
    with pytest.raises(
        StudyStopped, match=r"^no node can run a trial for 1 min; the same command continues from here$"
    ):
        waiting.look(True, slots=0)
