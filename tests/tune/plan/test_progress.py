"""The progress of plan, try, check and the simulations, and their end by Ctrl-C."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from pagating_study import python_m
from tests.own_trainings import FUNCTION, own_study
from tune.plan import progress as progresses
from tune.plan.progress import ERASE, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progresses.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    return now


def test_the_time_left_is_that_of_the_parts_that_have_ended_or_the_expected_one(clock):
    work = Progress()
    work.begin("arms tried", 5)
    assert work.line() == "arms tried: 0 of 5, 0 s so far"
    clock[0] += 20
    work.done(2)
    clock[0] += 4
    assert work.line() == "arms tried: 2 of 5, 24 s so far, about 26 s left"  # 10 s each
    clock[0] += 60
    assert work.line() == "arms tried: 2 of 5, 84 s so far"  # a part takes longer: nothing is known
    work.begin("sizes calibrated", 1, 14)
    clock[0] += 4
    assert work.line().endswith("4 s so far, about 10 s left")


def test_a_terminal_has_one_line_which_makes_room_for_results(clock):
    terminal, results = Terminal(), io.StringIO()
    with Progress(terminal, ticks=False) as work:
        for item in work.each("rows", "ab"):
            clock[0] += 1
            work.say(f"result {item}", results)
    assert results.getvalue() == "result a\nresult b\n"
    written = terminal.getvalue()
    assert "\n" not in written
    assert written.endswith(ERASE)
    assert [line for line in written.split(ERASE) if line][-1] == "rows: 2 of 2, 2 s so far"


def test_a_pipe_has_a_line_only_after_a_silence(clock):
    pipe = io.StringIO()
    with Progress(pipe, ticks=False) as work:
        work.begin("trials", 10)
        for seconds in (10, 19, 2, 10, 25):
            clock[0] += seconds
            work.done()
    lines = pipe.getvalue().splitlines()
    assert lines == [
        "trials: 3 of 10, 31 s so far, about 72 s left",
        "trials: 5 of 10, 66 s so far, about 66 s left",
    ]


SLEEPS = FUNCTION.replace("    for step", "    import time; open('began', 'a').close(); time.sleep(60)\n    for step")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("command", [pytest.param("check", marks=pytest.mark.slow), "plan"])
def test_ctrl_c_ends_the_trials_too_with_one_line(tmp_path, command):
    own_study(tmp_path, SLEEPS)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    # a shell's background job would ignore the signal
    signals = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with subprocess.Popen(
        [*python_m("tune.cli"), command, "own.yaml"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **signals,
    ) as running:
        end = time.monotonic() + 60
        while not (tmp_path / "began").exists() and time.monotonic() < end:
            time.sleep(0.05)
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert time.monotonic() - began < 20
    assert (running.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in err
    assert list(scratch.glob("pagating-*")) == []
    if sys.platform == "linux":
        assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""
