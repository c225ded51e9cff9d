"""Test the last line of a process that dies, and the limit of restarts. Each process is a fresh one."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tune.cli import endings
from tune.cli.endings import DIED, LOST, LastLine, restart

DRIVER = """
import os, signal, sys
from tune.cli.endings import LastLine
last_line = LastLine()
with last_line.watching():
    print("begun", flush=True)
    {end}
"""


def ended(end):
    command = [sys.executable, "-c", DRIVER.format(end=end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os._exit(1)", 1),  # as Ray's library ends a process
        ("os.abort()", -6),
        ("os.kill(0, signal.SIGTERM)", -15),  # to the whole group
    ],
)
def test_a_process_that_dies_has_a_last_line(end, code):
    if "kill(0" in end:
        end = f"os.setsid(); {end}"
    found, lines = ended(end)
    assert found == code
    assert lines[-1] == DIED


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("last_line.dismiss(); os._exit(130)", 130)]
)
def test_a_process_that_ends_as_it_chose_has_none(end, code):
    assert ended(end) == (code, [])


def test_restarts_without_progress_end(monkeypatch):
    monkeypatch.setenv(LOST, "0:-1")
    done = []
    screen = SimpleNamespace(warn=done.append, restore=lambda: None, last=done.append)
    monkeypatch.setattr(os, "execv", lambda program, command: done.append(command))

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    again = restart(screen, LastLine())
    run = SimpleNamespace(ledger=SimpleNamespace(events=[{"event": "report"}]))
    command = [sys.executable, *sys.orig_argv[1:]]
    line = "Ray's raylet ended; Ray is started again, and the trials go on from their checkpoints"
    for _ in range(3):
        again("Ray's raylet ended", run)
    assert done == [line, command] * 3
    run.ledger.events.append({"event": "report"})  # progress: the count begins again
    for _ in range(3):
        again("Ray's raylet ended", run)
    assert done == [line, command] * 6
    with pytest.raises(SystemExit) as left:
        again("Ray's raylet ended", run)
    assert left.value.code == 1
    assert done[-1] == "pagating: Ray's raylet ended, 4 times without progress; the same command continues"


def test_a_machine_that_allows_no_watcher_is_not_watched(monkeypatch):
    asked = []

    def refused(*given, **settings):
        asked.append(given)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(endings.subprocess, "Popen", refused)
    with LastLine().watching() as last_line:
        assert len(asked) == 1
    last_line.dismiss()
    assert len(asked) == 1
