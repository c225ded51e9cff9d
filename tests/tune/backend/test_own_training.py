"""Tests of the user's own training with Ray."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.own_trainings import FUNCTION, own_study
from tune.backend.inline import Inline
from tune.run import ledger
from tune.sweep import sweep

ROOT = Path(__file__).parents[3]
CLOCK = ("time", "crc", "seconds", "tokens_per_second", "peak_rss_mb", "memory_growth_mb")


def without_clock(value):
    """Return an event without what differs between two runs."""
    if isinstance(value, dict):
        return {key: without_clock(kept) for key, kept in value.items() if key not in CLOCK}
    return list(map(without_clock, value)) if isinstance(value, list) else value


def swept(folder: Path, slots: int) -> subprocess.Popen:
    """Start `pagating sweep` with Ray in a fresh process."""
    words = [sys.executable, "-P", str(ROOT / "pagating_study.py"), "tune.cli", "sweep", str(folder / "own.yaml")]
    words += ["--output", str(folder / "studies"), "--tracking", "none", "--slots", str(slots)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [False, True])
def test_ray_and_inline_write_the_same_ledger(tmp_path, reuse):
    own_study(tmp_path / "ray", reuse=reuse)
    with swept(tmp_path / "ray", 1) as study:
        out = study.communicate(timeout=300)[0]
    assert study.returncode == 0, out
    given = own_study(tmp_path / "inline")
    run = sweep(given, tmp_path / "inline", tmp_path / "inline" / "studies", Inline())
    both = [ledger.read(folder / "ledger.jsonl") for folder in (tmp_path / "ray/studies/own", run.folder)]
    events = [[without_clock(event) for event in found if event["event"] != "verdict"] for found in both]
    assert events[0] == events[1]


@pytest.mark.slow
def test_killed_trials_are_tried_again_and_none_is_lost_or_doubled(tmp_path):
    """Kill processes of trials at random times: the losses are those of an undisturbed study."""
    slower = FUNCTION.replace("        trial.report", "        import time; time.sleep(0.05)\n        trial.report")
    given = own_study(tmp_path / "whole", slower)
    whole = sweep(given, tmp_path / "whole", tmp_path / "whole" / "studies", Inline())
    own_study(tmp_path / "killed", slower)
    draw, killed = random.Random(1), set()
    with swept(tmp_path / "killed", 2) as study:
        while study.poll() is None and len(killed) < 6:
            time.sleep(draw.uniform(0.3, 0.6))
            for pid in workers(tmp_path / "killed") - killed if len(killed) < 6 else ():
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
                break
        out = study.communicate(timeout=300)[0]
    assert study.returncode == 0, out
    assert len(killed) == 6
    events = ledger.read(tmp_path / "killed/studies/own/ledger.jsonl")
    ended = [event for event in events if event["event"] == "ended"]
    failed = [event for event in ended if event["outcome"] == "failed"]
    assert 1 <= len(failed) <= 6
    assert all(re.search("its process ended by signal 9", event["reason"]) for event in failed)
    counted = [event["cell"] for event in ended if event["outcome"] != "failed"]
    assert len(counted) == len(set(counted))
    found = ledger.records(events)
    assert found.keys() == whole.records.keys()
    for key, record in whole.records.items():
        assert found[key].final["val_nll"] == record.final["val_nll"]


def workers(folder: Path) -> set[int]:
    """Return the processes of trials of a study."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
            here = os.readlink(path.parent / "cwd")
        except OSError:  # it has ended
            continue
        if b"own_worker.py" in line and here == str(folder):
            found.add(int(path.parent.name))
    return found


@pytest.mark.slow
def test_with_ray_a_hang_and_a_process_that_is_killed_are_named_in_a_line(tmp_path):
    """A trial hangs in its first attempt, another one is killed as by a system short of memory; both are tried again.

    Then every attempt of a trial hangs, and the sweep ends with the reason.
    """
    once = """    import os, pathlib, signal, time
    first = pathlib.Path(__file__ + f".{trial.shift}")
    if trial.seed == 1 and not first.exists():
        first.touch()
        time.sleep(60) if trial.shift else os.kill(os.getpid(), signal.SIGKILL)
"""
    own_study(tmp_path / "once", FUNCTION.replace("    off =", once + "    off ="), resources={"stall_timeout": 2.0})
    with swept(tmp_path / "once", 2) as study:
        out = study.communicate(timeout=300)[0]
    assert study.returncode == 0, out
    ended = [event for event in ledger.read(tmp_path / "once/studies/own/ledger.jsonl") if event["event"] == "ended"]
    killed, hung = sorted(event["reason"] for event in ended if event["outcome"] == "failed")
    assert killed.startswith("its process ended by signal 9 (the system sends it when memory is short")
    assert re.fullmatch(r"no (report|heartbeat) for 2 s \(resources\.stall_timeout\)", hung)  # whichever comes first
    always = FUNCTION.replace("    off =", "    import time; time.sleep(60 * bool(trial.shift))\n    off =")
    own_study(tmp_path / "always", always, resources={"stall_timeout": 4.0})
    with swept(tmp_path / "always", 2) as study:
        out = study.communicate(timeout=300)[0]
    assert study.returncode == 1, out
    assert re.search(r"no (report|heartbeat) for 4 s \(resources\.stall_timeout\)", out)
    assert "Traceback" not in out
