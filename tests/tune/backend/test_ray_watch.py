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
    with announced(said.append, "x is not there yet"):
        pass
    time.sleep(0.1)
    assert said == []
    with announced(said.append, "x is not there yet"):
        time.sleep(0.2)
    assert said == ["after 0 s: x is not there yet"]


def test_a_cluster_that_is_gone_for_25_seconds_is_lost():
    now = [0.0]
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = Reach("head:6379", f"127.0.0.1:{server.getsockname()[1]}", lambda: now[0])
        for now[0] in range(0, 60, 4):
            assert reach() == []
    for now[0] in range(60, 80, 4):
        assert reach() == []
    now[0] = 90.0
    assert reach() == ["the cluster at 'head:6379' is not reached any more"]


def test_waiting_counts_from_the_first_wait_and_starts_again():
    now = [0.0]
    waiting = Waiting(60.0, lambda: now[0])
    assert waiting.seconds(True) == 0.0
    now[0] = 7.0
    assert waiting.seconds(True) == 7.0
    assert waiting.seconds(False) == 0.0
    now[0] = 9.0
    assert waiting.seconds(True) == 0.0
