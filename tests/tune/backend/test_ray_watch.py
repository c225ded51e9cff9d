"""Test the watcher of Ray and the announcements of a wait, on fake clocks."""

import socket
import threading
import time

import pytest

from tune.backend import ray_watch
from tune.backend.ray_watch import RayWatch, Reach, Waiting, announced


@pytest.fixture
def watched(monkeypatch):
    """Return a watcher of a fake Ray, its clock, its ended processes, and the lists of warnings and losses."""
    monkeypatch.setattr(ray_watch, "SURE_SECONDS", 0.0)
    now, ended, warnings, losses = [0.0], [], [], []
    watch = RayWatch(warnings.append, losses.append, lambda: ended, lambda: now[0])
    return watch, now, ended, warnings, losses


def test_a_process_of_ray_that_ended_is_a_loss_and_said_once(watched):
    watch, _, ended, _, losses = watched
    assert not watch.look()
    ended.append("Ray's scheduler (raylet) ended (exit code -9)")
    assert watch.look()
    assert watch.look()
    assert losses == ["Ray's scheduler (raylet) ended (exit code -9)"]


def test_silence_is_announced_and_then_ends(watched):
    watch, now, _, warnings, losses = watched
    for now[0] in range(0, 50, 2):
        assert not watch.look()
    assert warnings == ["Ray has not answered for 20 s; it is given 50 s"]
    watch.step()
    for now[0] in range(50, 98, 2):
        assert not watch.look()
    now[0] = 100.0
    assert watch.look()
    assert losses == ["Ray has not answered for 50 s"]
    assert len(warnings) == 2


def test_a_process_that_was_stopped_itself_has_not_waited(watched):
    watch, now, *_ = watched
    now[0] = 3600.0
    assert not watch.look()


def test_the_watcher_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 0.01)
    seen = threading.Event()
    with RayWatch(print, lambda reason: None, lambda: seen.set() or []) as watch:
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
