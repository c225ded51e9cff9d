"""Tests of the output of a run on a terminal, on a dumb terminal and in a pipe, and of the output of libraries."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[3]
PAGATING = [sys.executable, "-m", "tune.cli"]
SMOKE = ROOT / "configs" / "smoke.yaml"
BEGIN, END = "\x1b[?25l", "\x1b[?25h"  # the cursor goes and comes back

# a small run: a ledger, a heartbeat, and libraries that write to the terminal in every way
DRIVER = """
import os, subprocess, sys, time, warnings
from pathlib import Path
from types import SimpleNamespace
from tune.cli import screen
from tune.run.ledger import Ledger
from tune.run.progress import Progress
from tune.study.files import load

screen.REFRESH_SECONDS = 0.0
screen.SILENT_SECONDS = float(os.environ.get("SILENT", "600"))
folder, config, then = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
study = load(config)
folder.mkdir()
book = Ledger(folder / "ledger.jsonl")

class Run(SimpleNamespace):
    progress = property(lambda self: Progress(study, book.events))

run = Run(study=study, folder=folder, ledger=book, slots_now=2, on_heartbeat=None, stopping=False)
shown = screen.Screen("make ui")

def cell(arm, index, loss, outcome="completed"):
    key = f"search/{arm}/{index}/1"
    config = {"lr": 0.002}
    book.append("suggested", cell=key, stage="search", arm=arm, index=index, seed=1, config=config, config_key="k")
    book.append("started", cell=key)
    if run.on_heartbeat: run.on_heartbeat()
    if outcome:
        book.append("ended", cell=key, outcome=outcome, final={"val_nll": loss} if loss else {}, reason=None)
        progress = SimpleNamespace(cell=SimpleNamespace(config=config, stage="search", arm=arm, seed=1, rung=0),
            outcome=outcome, loss=loss or float("inf"), metric="val_nll",
            setting=study.setting(config), ended=index + 1, total=45, seconds_left=125.0)
        shown.ended(progress)
    if run.on_heartbeat: run.on_heartbeat()

print("before")
with shown.watch(run):
    print("a library prints")
    print("a library complains", file=sys.stderr)
    warnings.warn("a library warns")
    os.write(2, b"C code writes\\n")
    subprocess.run(["sh", "-c", "echo a child process boxes"], check=True)
    cell("gelu", 0, 4.25)
    cell("linear-floor", 0, None, "infeasible")
    shown.warn("the disk has little room")
    cell("gelu", 1, None, None)
    if then == "stop":
        shown.say("Stopping: a matter of seconds.")
        time.sleep(0.1)
    if then == "die":
        shown.last("Stopped at once.")
        os._exit(130)
    if then == "raise":
        raise ValueError("a bug")
print("after")
"""


def on_terminal(words, width=80, height=24, act=None, folder=ROOT, closed_input=False, **environment):
    """Run a command on a terminal of this size. Return all its output and its exit code."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    mine = {**kept, "TERM": "xterm-256color", **environment}
    process, terminal = pty.fork()
    if process == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        if closed_input:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
        os.execvpe(words[0], words, mine)
    raw = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # what Linux says where the other end is closed
            break
        raw += data
        if act:
            act(raw, process)
    return raw.decode(), os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def lines_of(text):
    """Return the final lines of the terminal. An unknown control code fails."""
    screen, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]|\x1b", text):
        if part == "\n":
            row += 1  # the terminal sends \\r with it
            screen += [""] * (row + 1 - len(screen))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            number, code = part[2:-1], part[-1]
            if code == "A":
                row -= int(number or 1)
            elif code == "K":
                assert number == "2"
                screen[row] = ""
            else:
                assert code == "m" or part in (BEGIN, END), repr(part)
        else:
            assert part.isprintable(), repr(part)
            screen[row] = screen[row][:column].ljust(column) + part + screen[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in screen]


def driver(folder, then=""):
    """Write a driver into a folder. Return the command that runs it."""
    (folder / "driver.py").write_text(DRIVER)
    return [sys.executable, str(folder / "driver.py"), str(folder / "smoke"), str(SMOKE), then]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_one_table_that_is_redrawn(tmp_path, width):
    text, code = on_terminal(driver(tmp_path), width)
    lines = lines_of(text)
    assert code == 0
    assert lines[0] == "before"
    assert lines[1] == "Warning: the disk has little room"
    assert lines[2].split()[:2] == ["stage", "done"]
    assert sum(line.startswith("stage ") for line in lines) == 1  # drawn many times, seen once
    assert text.count("stage ") >= 5
    search = next(line.split() for line in lines if line.startswith("search "))
    assert search == ["search", "1", "1", "0", "1", "15"]
    assert any(line.split() == ["gelu", "4.2500", "lr=2.0e-03"] for line in lines)
    assert any("linear-floor" in line and "none: infeasible" in line for line in lines)
    assert f"Log:{tmp_path / 'smoke' / 'logs'}" in "".join(lines).replace(" ", "")
    assert "Browse:  make ui" in lines
    assert lines[-2:] == ["after", ""]
    assert max(map(len, lines)) <= width
    assert text.count(END) >= 2  # the cursor is there while the table is
    assert "Ctrl-C" not in "".join(lines)
    assert "Ctrl-C stops cleanly; the same command continues." in text


def test_the_size_is_that_of_the_terminal_also_without_its_keyboard(tmp_path):
    text, _ = on_terminal(driver(tmp_path), 50, closed_input=True)
    assert max(map(len, lines_of(text))) <= 50
    assert any(line.split()[:5] == ["stage", "done", "run", "stop", "inf"] for line in lines_of(text))


def test_what_libraries_write_goes_to_the_log_by_whatever_way(tmp_path):
    text, _ = on_terminal(driver(tmp_path))
    log = (tmp_path / "smoke" / "logs" / "libraries.log").read_text()
    for said in (
        "a library prints",
        "a library complains",
        "a library warns",
        "C code writes",
        "a child process boxes",
    ):
        assert said in log
        assert said not in text
    assert "before" not in log
    assert "after" not in log


def test_a_log_of_nothing_is_not_kept(tmp_path):
    from tune.cli.screen import libraries_to

    with libraries_to(tmp_path / "libraries.log") as (out, _):
        assert (tmp_path / "libraries.log").exists()
        out.write("")
    assert not (tmp_path / "libraries.log").exists()


def test_a_pipe_gets_plain_lines(tmp_path):
    done = subprocess.run(driver(tmp_path, "stop"), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "before",
        "[1/45] search gelu lr=2.0e-03 seed=1: val_nll 4.2500, about 2.1 min left",
        "[1/45] search linear-floor lr=2.0e-03 seed=1: no val_nll, infeasible, about 2.1 min left",
        "after",
    ]
    assert done.stderr.splitlines() == ["Warning: the disk has little room", "Stopping: a matter of seconds."]


def test_a_pipe_is_told_that_a_long_cell_goes_on(tmp_path):
    shown = subprocess.run(
        driver(tmp_path), env={**os.environ, "SILENT": "0"}, capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert shown.splitlines()[1] == "0 cells have ended; 1 running in 2 slots"
    assert re.fullmatch(r"2 cells have ended; about 0 s left; 1 running in 2 slots", shown.splitlines()[-2])


def test_a_dumb_terminal_gets_plain_lines_without_a_code(tmp_path):
    text, _ = on_terminal(driver(tmp_path), TERM="dumb")
    assert "\x1b" not in text
    assert "[1/45] search gelu lr=2.0e-03 seed=1: val_nll 4.2500, about 2.1 min left" in text.splitlines()


def test_no_color_means_none(tmp_path):
    text, _ = on_terminal(driver(tmp_path), NO_COLOR="1")
    assert not [code for code in re.findall(r"\x1b\[([0-9;]*)m", text) if re.search(r"(^|;)(3[0-8]|9\d|4[0-8])", code)]
    assert any(line.startswith("search ") for line in lines_of(text))


def test_a_terminal_without_such_letters_gets_others(tmp_path):
    text, code = on_terminal(driver(tmp_path), PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert code == 0
    assert text.isascii()
    assert any(line.startswith("search ") for line in lines_of(text))


def test_what_happens_next_stands_under_the_table(tmp_path):
    text, _ = on_terminal(driver(tmp_path, "stop"))
    last = text.rindex("Stopping: a matter of seconds.")
    assert text.rindex("Browse:  make ui", 0, last) > text.rindex("stage ", 0, last)
    assert lines_of(text[: last + 30])[-1] == "Stopping: a matter of seconds."


def test_a_process_that_ends_at_once_leaves_a_line_and_a_cursor(tmp_path):
    text, code = on_terminal(driver(tmp_path, "die"))
    assert code == 130
    assert text.rindex(END) > text.rindex(BEGIN)
    assert lines_of(text)[-2:] == ["Stopped at once.", ""]
    assert lines_of(text)[-3].startswith("Ctrl-C stops")


def test_a_bug_is_shown_on_the_terminal(tmp_path):
    text, code = on_terminal(driver(tmp_path, "raise"))
    assert code == 1
    assert "ValueError: a bug" in text
    assert "ValueError" not in (tmp_path / "smoke" / "logs" / "libraries.log").read_text()


def test_a_drawing_asked_for_in_the_midst_of_one_comes_after_it(monkeypatch):
    from tune.cli.screen import Screen

    screen, drawn = Screen(), []

    monkeypatch.setattr(Screen, "_fit", lambda self, console: None)

    class Live:
        console = None

        def refresh(self):
            drawn.append("begins")
            if len(drawn) == 1:
                screen._draw()  # as a signal's handler does
            drawn.append("ends")

    screen._live = Live()
    screen._draw()
    assert drawn == ["begins", "ends", "begins", "ends"]


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch, tmp_path):
    from tune.cli.screen import Screen

    screen = Screen()

    class Live:
        console = SimpleNamespace(file=None)

        def refresh(self):
            raise OSError(5, "Input/output error")

    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Screen, "_fit", lambda self, console: None)
    screen._live, screen._view, screen._err = Live(), SimpleNamespace(note=""), Gone()
    screen.say("Stopping.")
    assert Live.console.file.name == os.devnull  # what rich writes at the end goes there
    screen.say("Stopping.")


# --- a real study ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_study_on_a_terminal_prints_nothing_but_its_own(tmp_path):
    words = [*PAGATING, "sweep", str(SMOKE), "--slots", "2"]
    status = [*PAGATING, "status", "smoke"]
    seen = []

    def look(raw, process):
        if not seen and b"of calibrate" in raw and raw.count(b"lr=") > 40:
            seen.append(subprocess.run(status, capture_output=True, text=True, cwd=tmp_path).stdout)

    text, code = on_terminal(words, act=look, folder=tmp_path)
    lines = [line for line in lines_of(text) if line]
    assert code in (0, 1)
    assert re.search(r"It runs: process \d+ on \S+; last update \d+ s ago\.", seen[0])
    assert lines[0] == "smoke: Does the whole path work, from text to verdict?"
    assert lines[1].startswith("stage ")
    own = r"smoke: |stage |─+|search |calibrate |confirm |val nll|gelu|linear-floor|paglu-|Log: |Browse: |Against"
    own += r"|Not test|against gelu|[┏┃┡│└]|\d\. |.*\[[-+]\d|\S+\); paglu|.*tokens/s"
    assert not [line for line in lines if not re.match(own, line)]
    assert [line.split()[0] for line in lines if re.match(r"\d\. ", line)] == ["1.", "2.", "3."]
    counts = {
        line.split()[0]: line.split()[1:] for line in lines if line.startswith(("search ", "calibrate ", "confirm "))
    }
    assert sum(map(int, counts["search"][:-1])) == int(counts["search"][-1]) == 15
    assert counts["confirm"][0] == counts["confirm"][-1] == "15"
    assert not (tmp_path / "studies" / "smoke" / "heartbeat.json").exists()


@pytest.mark.slow
def test_ctrl_c_says_what_happens_next_and_status_how_to_go_on(tmp_path):
    words = [*PAGATING, "sweep", str(SMOKE), "--slots", "1"]
    sent = []

    def interrupt(raw, process):
        if not sent and raw.count(b"running in 1 slot") > 2:
            sent.append(time.monotonic())
            os.kill(process, signal.SIGINT)

    text, code = on_terminal([*words, "--tracking", "none"], act=interrupt, folder=tmp_path)
    lines = [line for line in lines_of(text) if line]
    assert code == 130
    assert "Stopping: running trials save a checkpoint, which takes seconds. A second signal" in text
    assert lines[-1] == "Interrupted. What has ended is kept; the same command continues from there."
    status = [*PAGATING, "status", "smoke"]
    shown = subprocess.run(status, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert "It is not running; last update" in shown
    assert json.loads((tmp_path / "studies" / "smoke" / "ledger.jsonl").read_text().splitlines()[0])["event"] == "study"
